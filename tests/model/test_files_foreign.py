"""Model and adapter folders from anywhere: damaged in every way, mutated, swapped for other things.

Each file that a folder may hold meets each fault. The outcome is the right result, or an error in
our words that names the file; never a hang, a crash, or the content of a file from outside.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TEXTS, shard
from fuzz import assert_ours, mutate
from paths import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_vectorizer
from trained import trained

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError, SkembedError
from skembed.model import sources
from skembed.model.sources import (
    ADAPTER_FILES,
    CARD_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
)

SECRET = b'{"secret": "of another folder"}' * 40
SHARD = "model-00002-of-00003.safetensors"
MODEL_FILES = (CONFIG_FILE, *TOKENIZER_FILES, WEIGHTS_FILE, INDEX_FILE, SHARD)
# How a model is to be used, saying what would hold without them.
CARD: dict[str, Any] = {
    "skembed.json": {"instructions": True, "max_length": 512},
    "config_sentence_transformers.json": {"prompts": {}},
    "sentence_bert_config.json": {"max_seq_length": 512},
    "modules.json": [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
}
EVERY_FILE = (*MODEL_FILES, *ADAPTER_FILES, *CARD)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """End the whole run where a test hangs, even inside a library."""
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def make_folder(parent: Path, file: str) -> Path:
    """Return a valid folder that holds a file: a model's, in shards or not, or an adapter's."""
    folder = parent / "folder"
    if file in ADAPTER_FILES:
        trained().save_pretrained(folder)
    else:
        shutil.copytree(GOLDEN, folder)
        if file in (INDEX_FILE, SHARD):
            shard(folder)
        for name, values in CARD.items() if file in CARD else ():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(values))
    return folder


def test_the_list_of_files_is_complete() -> None:
    """Every name of a file in `sources` is in the matrix."""
    names = {
        value
        for name, value in vars(sources).items()
        if name.endswith("_FILE") and isinstance(value, str)
    }
    assert names | set(CARD_FILES) <= set(EVERY_FILE)


# Faults of one file


def link_out(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "folder")
    outside = folder.with_name("outside")
    outside.write_bytes(SECRET)
    path.unlink()
    path.symlink_to(outside)


def link_to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def forbid(path: Path) -> None:
    path.chmod(0)


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


FAULTS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "directory": make_directory,
    "fifo": make_fifo,
    "dangling": dangle,
    "link out": link_out,
    "link to a device": link_to_device,
    "deep JSON": write(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep list": write(b"[" * 100_000),
    "JSON list": write(b"[1, 2]"),
    "JSON null": write(b"null"),
    "empty object": write(b"{}"),
    "random": write(np.random.default_rng(0).bytes(5_000)),
    "huge header": write((2**62).to_bytes(8, "little") + b"{}"),
    "sparse": lambda path: os.truncate(path, 10**12),
    "no UTF-8": write(b'{"a": "\xff"}'),
    "forbidden": forbid,
}
# What nobody reads for an embedding, and what a folder need not have.
UNREAD = TOKENIZER_FILES[1:]


@cache
def expected(kind: str) -> np.ndarray:
    return (trained() if kind == "adapter" else make_vectorizer()).transform(TEXTS)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_fault_gives_the_right_result_or_our_error(file: str, fault: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, file)
    FAULTS[fault](folder / file)
    if fault == "forbidden" and os.access(folder / file, os.R_OK):
        pytest.skip("this user may read everything")
    emb = make_vectorizer(folder, trainer=None, store_weights=True)
    vectors = assert_ours(lambda: emb.transform(TEXTS), names=None if file == SHARD else file)
    kind = "adapter" if file in ADAPTER_FILES else "model"
    if vectors is None:
        assert file not in UNREAD
    else:
        assert np.array_equal(vectors, expected(kind))
    pickled = assert_ours(lambda: pickle.dumps(emb))
    assert pickled is None or b"of another folder" not in pickled
    assert_ours(lambda: emb.save_pretrained(tmp_path / "saved", merge=True))
    for path in (tmp_path / "saved").glob("*"):
        assert b"of another folder" not in path.read_bytes()


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../outside", "sub/../../outside", "a\0b", "", 3]
)
def test_a_shard_is_named_inside_the_folder(target: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, INDEX_FILE)
    index = json.loads((folder / INDEX_FILE).read_text())
    key = min(index["weight_map"])
    shutil.copy(folder / index["weight_map"][key], tmp_path / "outside")
    index["weight_map"][key] = target
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert assert_ours(lambda: make_vectorizer(folder).transform(TEXTS), names=INDEX_FILE) is None


def test_links_inside_the_folder_work(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, WEIGHTS_FILE)
    for name in MODEL_FILES[:-2]:
        (folder / name).rename(folder / f"real-{name}")
        (folder / name).symlink_to(f"real-{name}")
    assert np.array_equal(make_vectorizer(folder).transform(TEXTS), expected("model"))


def test_links_of_the_hubs_cache_work_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in MODEL_FILES[:-2]:
        shutil.copy(GOLDEN / name, blobs / f"blob-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-of-{name}")
    emb = make_vectorizer(snapshot, store_weights=True)
    assert np.array_equal(emb.transform(TEXTS), expected("model"))
    pickled = pickle.dumps(emb)
    emb.save_pretrained(tmp_path / "saved")
    assert not any(path.is_symlink() for path in (tmp_path / "saved").iterdir())
    # A folder of blobs that is a link itself makes nothing outside a part of the repository.
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SkembedError, match="leads out of it"):
        make_vectorizer(snapshot).transform(TEXTS)
    shutil.rmtree(repository)
    assert np.array_equal(pickle.loads(pickled).transform(TEXTS), expected("model"))


def test_shards_in_subfolders_come_back_from_a_pickle(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, INDEX_FILE)
    index = json.loads((folder / INDEX_FILE).read_text())
    for k, name in enumerate(sorted(set(index["weight_map"].values()))):
        part = folder / "parts" / str(k)
        part.mkdir(parents=True)
        (folder / name).rename(part / "weights.safetensors")  # of one name in each
        for key, file in index["weight_map"].items():
            if file == name:
                index["weight_map"][key] = f"parts/{k}/weights.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    emb = make_vectorizer(folder, store_weights=True)
    assert np.array_equal(emb.transform(TEXTS), expected("model"))
    pickled = pickle.dumps(emb)
    shutil.rmtree(folder)
    assert np.array_equal(pickle.loads(pickled).transform(TEXTS), expected("model"))


# Adapters that lead to each other


def write_adapter(folder: Path, base: str) -> Path:
    trained().save_pretrained(folder)
    path = folder / ADAPTER_FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return folder


def test_an_adapter_is_no_base_of_itself(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", str(tmp_path / "one"))
    with pytest.raises(SkembedError, match="is an adapter itself"):
        make_vectorizer(one).transform(TEXTS)
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        write_adapter(tmp_path / name, str(tmp_path / base))
    with pytest.raises(SkembedError, match="is an adapter itself"):
        make_vectorizer(tmp_path / "a").transform(TEXTS)
    whole = write_adapter(tmp_path / "d", str(tmp_path / "d"))
    for name in MODEL_FILES[:-2]:
        shutil.copy(GOLDEN / name, whole / name)
    assert np.array_equal(make_vectorizer(whole).transform(TEXTS), expected("adapter"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model_name_or_path", 3),
        ("base_model_name_or_path", "a\0b"),
        ("revision", 3),
        ("r", True),
        ("r", 2.0),
        ("r", 10**30),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_dropout", 2),
        ("lora_dropout", -0.5),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", []),
        ("target_modules", "(a+)+$" * 3_000),
        ("target_modules", "(" * 5_000 + ")" * 5_000),
        ("target_modules", r"(.)\1_proj"),
        ("peft_type", ["LORA"]),
        ("init_lora_weights", {"a": 1}),
    ],
)
def test_values_of_an_adapters_configuration(name: str, value: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", str(GOLDEN))
    path = folder / ADAPTER_FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    emb = make_vectorizer(folder)
    assert assert_ours(lambda: emb.transform(TEXTS), names="adapter_config.json") is None


def test_vectors_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """Finite weights may give infinite vectors, and these a zero after their norm is taken out."""
    folder = write_adapter(tmp_path / "adapter", str(GOLDEN))
    path = folder / ADAPTER_FILES[1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for factor in (1e30, 1e22):
        tensors = {name: value * factor for name, value in load_file(path).items()}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"gives NaN, infinite or huge values for texts"):
            make_vectorizer(folder).transform(TEXTS)
        trained().save_pretrained(folder)


# Bytes changed at random


class Reader:
    """A kind of foreign bytes: a valid file, and what is read from its folder."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __repr__(self) -> str:
        return self.file

    def check(self, folder: Path, content: bytes) -> bool:
        """Embed with the file's content changed; return whether that was refused."""
        path = folder / self.file
        valid = path.read_bytes()
        path.write_bytes(content)
        try:
            vectors = assert_ours(lambda: read(folder))
        finally:
            path.write_bytes(valid)
        if vectors is None:
            return True
        assert np.isfinite(vectors).all(), "accepted, and gives no numbers"
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
        return False


def read(folder: Path) -> np.ndarray:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache": None}
    vectors: np.ndarray = NVEmbedVectorizer(folder, **options).transform(TEXTS)
    return vectors


READERS = [Reader(file) for file in EVERY_FILE if file not in UNREAD]


def fuzz(reader: Reader, parent: Path, seeds: range) -> int:
    """Return how many changed contents were refused."""
    folder = make_folder(parent, reader.file)
    content = (folder / reader.file).read_bytes()
    return sum(reader.check(folder, mutate(content, seed)) for seed in seeds)


fuzzing = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@fuzzing
@pytest.mark.parametrize("reader", READERS, ids=repr)
def test_changed_bytes_are_refused_or_harmless(reader: Reader, tmp_path: Path) -> None:
    assert fuzz(reader, tmp_path, range(50)) > 0


@fuzzing
@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=repr)
def test_many_changed_bytes_are_refused_or_harmless(reader: Reader, tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()
    assert fuzz(reader, tmp_path, range(50, 2_050)) > 0
