"""Retrievers on disk, and the model that made them."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import LetterVectorizer
from paths import GOLDEN
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline

from skembed import NVEmbedVectorizer
from skembed.estimators.retrieval import Retriever
from skembed.search import index_file as _index_file

N, M, DIM = 13, 400, 24
TEXTS = ["a card was stolen", "open an account", "a fee for a transfer", "lost my card", "the sun"]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", ["int", "str"])
@pytest.mark.parametrize(
    ("storage", "rescore_storage"),
    [("float32", None), ("float16", None), ("int8", "float16"), ("binary", "int8")],
)
def test_a_loaded_index_is_the_saved_one(
    storage: str,
    rescore_storage: str | None,
    kind: str,
    mmap: bool,
    tmp_path: Path,
    queries: np.ndarray,
    corpus: np.ndarray,
) -> None:
    ids = None if kind == "int" else [f"é{i}" for i in range(M)]
    retriever = Retriever(None, storage=storage, rescore_storage=rescore_storage, rescore=3)
    retriever.fit(corpus, ids=ids)
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", mmap=mmap)
    assert loaded.get_params() == retriever.get_params()
    assert loaded.ids_.tolist() == retriever.ids_.tolist()
    values = loaded._index.stored.arrays["values"]
    assert values.flags.writeable is not mmap
    for each in (loaded, pickle.loads(pickle.dumps(loaded))):
        for a, b in zip(each.search(queries), retriever.search(queries), strict=True):
            np.testing.assert_array_equal(a, b)
    first = loaded.ids_[0]
    loaded.remove([first]).add(corpus[:1], ids=None if kind == "int" else [first])
    loaded.save(tmp_path / "index")  # over the files that it is mapped from
    again = Retriever.load(tmp_path / "index")
    assert again.ids_.tolist() == loaded.ids_.tolist()
    np.testing.assert_array_equal(again.search(queries).scores, loaded.search(queries).scores)
    named = json.loads((tmp_path / "index" / "manifest.json").read_text())["files"].values()
    assert {p.name for p in (tmp_path / "index").iterdir()} == {
        "manifest.json",
        *(entry["file"] for entry in named),
    }


def test_an_empty_index_is_saved(tmp_path: Path, corpus: np.ndarray) -> None:
    Retriever(None).fit(corpus[:1], ids=["a"]).remove(["a"]).save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index").add(corpus[:1], ids=["b"])
    assert loaded.search(corpus[:1], 1).indices.tolist() == [[0]]


def test_an_index_of_texts_knows_its_model(tmp_path: Path, tiny: NVEmbedVectorizer) -> None:
    retriever = Retriever(tiny).fit(TEXTS)
    retriever.save(tmp_path / "index")
    with pytest.raises(ValueError, match="a vectorizer that has no name. Pass it"):
        Retriever.load(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", vectorizer=clone(tiny))
    for a, b in zip(loaded.search(TEXTS, 2), retriever.search(TEXTS, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    # Another task for the queries is the same index; half the precision the same model.
    Retriever.load(tmp_path / "index", vectorizer=clone(tiny).set_params(instruction="Find it"))
    Retriever.load(tmp_path / "index", vectorizer=clone(tiny).set_params(dtype="bfloat16"))


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": "mean"},
        {"document_instruction": "Say the same"},
        {"truncate_dim": 16},
        {"normalize": False},
    ],
)
def test_an_index_of_another_model_is_refused(
    change: dict[str, Any], tmp_path: Path, tiny: NVEmbedVectorizer
) -> None:
    Retriever(tiny).fit(TEXTS).save(tmp_path / "index")
    other = clone(tiny).set_params(**change)
    with pytest.raises(ValueError, match="was built with another model"):
        Retriever.load(tmp_path / "index", vectorizer=other)


def test_the_fingerprint_refuses_what_the_probes_do_not(
    tmp_path: Path, tiny: NVEmbedVectorizer
) -> None:
    Retriever(tiny).fit(TEXTS).save(tmp_path / "index")
    other = clone(tiny).fit(TEXTS)
    other.model_["fingerprint"] = "0" * 32
    with pytest.raises(ValueError, match=r"another model.*fingerprint \w{32}.*fingerprint 0{32}"):
        Retriever.load(tmp_path / "index", vectorizer=other)


def test_any_transformer_is_told_apart(tmp_path: Path) -> None:
    Retriever(LetterVectorizer()).fit(TEXTS).save(tmp_path / "index")
    Retriever.load(tmp_path / "index", vectorizer=LetterVectorizer())
    with pytest.raises(ValueError, match="was built with another model than"):
        Retriever.load(tmp_path / "index", vectorizer=LetterVectorizer(shift=2))


def test_a_named_model_is_found_again(tmp_path: Path) -> None:
    Retriever(str(GOLDEN)).fit(TEXTS).save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index")
    assert loaded.vectorizer == str(GOLDEN)
    assert loaded.search(["the sun"], 1).indices.tolist() == [[4]]


def test_embeddings_say_nothing_of_their_model(tmp_path: Path, tiny: NVEmbedVectorizer) -> None:
    Retriever(None).fit(tiny.transform(TEXTS)).save(tmp_path / "index")
    with pytest.raises(ValueError, match="was built from embeddings"):
        Retriever.load(tmp_path / "index", vectorizer=tiny)
    Retriever(tiny).fit(TEXTS).save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", vectorizer=None)
    assert loaded.search(tiny.encode_query(TEXTS), 1).indices.shape == (5, 1)
    with pytest.raises(ValueError, match="3 features, but .* is expecting 48"):
        loaded.search(np.ones((1, 3)), 1)


def test_a_frozen_vectorizer_keeps_what_it_learned() -> None:
    fitted = make_pipeline(TfidfVectorizer(), TruncatedSVD(2, random_state=0)).fit(TEXTS)
    frozen = Retriever(FrozenEstimator(fitted)).fit(TEXTS[:3])
    own = Retriever(fitted).fit(TEXTS[:3])
    values = [each._index.stored.arrays["values"] for each in (frozen, own)]
    expected = fitted.transform(TEXTS[:3])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(values[0], expected, atol=1e-5)
    assert np.abs(values[1] - expected).max() > 0.01


def damage_size(folder: Path) -> None:
    path = max(folder.glob("*.npy"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    path = max(folder.glob("*.npy"), key=lambda p: p.stat().st_size)
    path.write_bytes(b"x" * path.stat().st_size)


def damage_file(folder: Path) -> None:
    next(folder.glob("labels*.npy")).unlink()


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def climb(folder: Path) -> None:
    entry = {"bytes": 1, "dtype": "<i8", "shape": [1], "crc32": "00000000"}
    edit_manifest(folder, files={"labels": {"file": "../other.npy", **entry}})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_size, ValueError, "is damaged.*bytes instead of"),
        (damage_header, ValueError, "is damaged.*checksum of its bytes from 0 is wrong"),
        (damage_file, ValueError, "is damaged.*is missing"),
        (climb, ValueError, "is damaged.*must name a file of an index; got '../other.npy'"),
        (lambda f: (f / "manifest.json").write_text("{"), ValueError, "damaged.*not JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), ValueError, "holds no index of skembed"),
        (lambda f: edit_manifest(f, version=9), ValueError, "is of version 9"),
        (lambda f: edit_manifest(f, files=3), ValueError, "is damaged.*a field 'files'"),
        (lambda f: edit_manifest(f, settings={}), ValueError, "is damaged.*checksum is wrong"),
        (lambda f: (f / "manifest.json").unlink(), FileNotFoundError, "There is no index in"),
    ],
)
def test_a_damaged_index_is_refused(
    damage: Any, error: type[Exception], message: str, tmp_path: Path, corpus: np.ndarray
) -> None:
    Retriever(None).fit(corpus).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        Retriever.load(tmp_path)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("step", ["array", "manifest"])
def test_a_full_disk_loses_nothing(
    step: str,
    there: bool,
    tmp_path: Path,
    corpus: np.ndarray,
    queries: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "index"
    old = Retriever(None).fit(corpus[:50])
    if there:
        old.save(folder)
    kept = sorted(folder.glob("*"))
    real = _index_file.write_array
    left = [1] if step == "array" else [100]

    def write_array(path: Path, array: np.ndarray) -> Any:
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, array)

    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_index_file, "write_array", write_array)
    if step == "manifest":
        monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="cannot be written.*No space left") as caught:
        Retriever(None).fit(corpus).save(folder)
    assert caught.value.errno == errno.ENOSPC
    assert ("still whole" in str(caught.value)) is there
    assert sorted(folder.glob("*")) == kept
    if there:
        found = Retriever.load(folder).search(queries)
        np.testing.assert_array_equal(found.scores, old.search(queries).scores)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, corpus: np.ndarray) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="must be a new or empty folder"):
            Retriever(None).fit(corpus).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
