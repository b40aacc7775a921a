"""Settings: found once for each set of parameters, and never stale."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from sklearn.base import clone
from tiny import make_vectorizer

import skembed
from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import ModelNotFoundError, SkembedWarning, TruncationWarning
from skembed.inference import settings as resolution
from skembed.inference.encoder import Encoder
from skembed.inference.registry import LEASE_SETTINGS
from skembed.inference.settings import Settings

FILES = ("config.json", "model.safetensors", "tokenizer.json")
DIM = 48
TEXTS = ["a card was stolen", "how to open an account?", "a card lost"]
PAIRS = [("a card", "the card"), ("an account", "my account")]


def settings_of(emb: NVEmbedVectorizer) -> Settings:
    return emb._make_encoder().settings


def copy_model(folder: Path) -> Path:
    folder.mkdir()
    for name in FILES:
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def change_model(folder: Path) -> None:
    """Another model of the same sizes, in files of the same sizes."""
    config = folder / "config.json"
    text = config.read_text()
    changed = text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e+00')
    assert changed != text and len(changed) == len(text)
    config.write_text(changed)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameters of which settings were not cached."""
    calls: list[Any] = []
    resolve = resolution._resolve

    def watched(parameters: Any, *args: Any) -> Settings:
        calls.append(parameters)
        return resolve(parameters, *args)

    monkeypatch.setattr(resolution, "_resolve", watched)
    return calls


# Asked once


def test_settled_questions_are_not_asked_again(resolved: list[Any]) -> None:
    emb = make_vectorizer(cache=EmbeddingCache())
    for _ in range(3):
        emb.transform(TEXTS)
        clone(emb).encode_document(TEXTS)
    emb.fit(TEXTS)
    assert len(resolved) == 1
    assert settings_of(emb) is settings_of(clone(emb))


def test_the_last_eight_are_cached(resolved: list[Any]) -> None:
    emb = make_vectorizer()
    for dim in range(1, LEASE_SETTINGS + 1):
        settings_of(emb.set_params(truncate_dim=dim))
    settings_of(emb.set_params(truncate_dim=1))  # used again: the second is now the oldest
    settings_of(emb.set_params(truncate_dim=DIM))
    before = len(resolved)
    for dim, n_more in ((1, 0), (3, 0), (2, 1)):
        assert settings_of(emb.set_params(truncate_dim=dim)).dim == dim
        assert len(resolved) == before + n_more


def test_threads_find_the_same_settings() -> None:
    emb = make_vectorizer()
    expected = [make_vectorizer(truncate_dim=dim).transform(TEXTS) for dim in range(1, 13)]
    barrier = threading.Barrier(4)

    def embed(k: int) -> list[np.ndarray]:
        barrier.wait()
        return [clone(emb).set_params(truncate_dim=dim).transform(TEXTS) for dim in range(1, 13)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(embed, range(4)):
            for mine, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-6)


# Never stale


def test_each_parameter_takes_effect_at_once() -> None:
    changes: list[dict[str, Any]] = [
        {"normalize": False},
        {"max_length": 4},
        {"truncate_dim": 8},
        {"instruction": "Find the text that says the same"},
        {"instruction_template": "{instruction}! ", "instruction": "Find the same text"},
        {"pooling": "mean"},
        {"missing": "empty"},
    ]
    emb = make_vectorizer(cache=EmbeddingCache())
    first = emb.transform(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        for change in changes:
            before = {name: emb.get_params()[name] for name in change}
            found = emb.set_params(**change).transform(TEXTS)
            np.testing.assert_array_equal(found, make_vectorizer(**change).transform(TEXTS))
            np.testing.assert_allclose(emb.set_params(**before).transform(TEXTS), first, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("normalize", True, 1.0),
        ("max_length", 512, 512.0),
        ("truncate_dim", 1, True),
        ("batch_tokens", 64, 64.0),
        ("n_jobs", 1, True),
        ("verbose", False, 0.0),
    ],
)
def test_an_equal_value_of_another_type_is_checked(name: str, good: Any, bad: Any) -> None:
    emb = make_vectorizer(**{name: good})
    emb.transform(TEXTS)
    with pytest.raises(TypeError, match=f"The `{name}` parameter of `NVEmbedVectorizer` must be"):
        emb.set_params(**{name: bad}).transform(TEXTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instruction", ["STS"]),
        ("pooling", {"mean"}),
        ("max_length", np.array([8, 9])),
        ("truncate_dim", [3]),
        ("missing", {}),
        ("device", [["cpu"]]),
        ("dtype", ["float32"]),
        ("revision", [None]),
    ],
)
def test_values_without_a_hash_are_refused_in_words(name: str, value: Any) -> None:
    emb = make_vectorizer()
    emb.transform(TEXTS)
    with pytest.raises(TypeError, match=f"The `{name}` parameter of `NVEmbedVectorizer` must be"):
        emb.set_params(**{name: value}).transform(TEXTS)


def test_numpy_values_and_paths_are_taken_as_built_in_ones(tmp_path: Path) -> None:
    plain = make_vectorizer(str(GOLDEN), max_length=64, truncate_dim=8, missing="zero")
    odd = make_vectorizer(
        GOLDEN,
        max_length=np.int64(64),
        truncate_dim=np.int32(8),
        missing=np.str_("zero"),
        device=np.str_("cpu"),
        normalize=np.True_,
    )
    np.testing.assert_array_equal(odd.transform(TEXTS), plain.transform(TEXTS))
    assert settings_of(odd).requests == settings_of(plain).requests
    odd.transform_to(TEXTS, tmp_path / "odd.npy")
    odd.save_pretrained(tmp_path / "odd")


def test_a_list_of_devices_may_be_changed_in_place() -> None:
    devices = ["cpu", "cpu"]
    emb = make_vectorizer(device=devices)
    emb.transform(TEXTS)
    assert len(settings_of(emb).model.replicas) == 1
    devices.append("cpu")
    assert len(settings_of(emb).model.replicas) == 2
    devices[:] = ["gpu"]
    with pytest.raises(ValueError, match="`device` parameter"):
        emb.transform(TEXTS)


@pytest.mark.parametrize("keeps_times", [False, True])
def test_a_folder_that_is_written_again_is_noticed(tmp_path: Path, keeps_times: bool) -> None:
    folder = copy_model(tmp_path / "model")
    emb = make_vectorizer(folder, cache=EmbeddingCache())
    first = emb.transform(TEXTS)
    times = os.stat(folder / "config.json")
    change_model(folder)
    if keeps_times:
        os.utime(folder / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    found = emb.transform(TEXTS)
    assert np.abs(found - first).max() > 1e-3
    np.testing.assert_allclose(found, make_vectorizer(folder).transform(TEXTS), atol=1e-6)
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFoundError):
        emb.transform(TEXTS)


def test_a_relative_folder_is_that_of_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copy_model(tmp_path / name / "model")
    change_model(tmp_path / "two" / "model")
    emb, found = make_vectorizer("model", cache=EmbeddingCache()), []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        found.append(emb.transform(TEXTS))
    assert np.abs(found[1] - found[0]).max() > 1e-3


def test_the_base_of_a_saved_adapter_is_watched(tmp_path: Path) -> None:
    base = copy_model(tmp_path / "base")
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    tuned = make_vectorizer(base, trainer=trainer).fit(PAIRS)
    tuned.save_pretrained(tmp_path / "adapter")
    emb = make_vectorizer(tmp_path / "adapter")
    np.testing.assert_allclose(emb.transform(TEXTS), tuned.transform(TEXTS), atol=1e-6)
    change_model(base)
    with pytest.raises(skembed.CheckpointError, match="trained on another model"):
        emb.transform(TEXTS)


def test_a_new_fit_replaces_the_adapter() -> None:
    trainer = ContrastiveTrainer(r=2, max_steps=2, learning_rate=0.1, random_state=0)
    emb = make_vectorizer(trainer=trainer, cache=EmbeddingCache())
    first = emb.fit(PAIRS).transform(TEXTS)
    adapter = weakref.ref(emb.adapter_)
    emb.set_params(trainer__random_state=1)
    second = emb.fit(PAIRS).transform(TEXTS)
    assert np.abs(second - first).max() > 1e-4
    gc.collect()
    assert adapter() is None, "the lease keeps no adapter alive"
    with pytest.warns(SkembedWarning, match="drops the adapter"):
        frozen = emb.set_params(trainer=None).fit(TEXTS).transform(TEXTS)
    np.testing.assert_allclose(frozen, make_vectorizer().transform(TEXTS), atol=1e-6)


def test_another_cache_takes_the_place_of_the_first(tmp_path: Path) -> None:
    first, second = EmbeddingCache(), EmbeddingCache()
    emb = make_vectorizer(cache=first)
    emb.transform(TEXTS)
    emb.set_params(cache=second).transform(TEXTS)
    assert (len(first), len(second), second.misses) == (len(TEXTS), len(TEXTS), len(TEXTS))
    kept = weakref.ref(first)
    del first
    gc.collect()
    assert kept() is None
    emb.set_params(cache=tmp_path / "cache.sqlite").transform(TEXTS)
    assert len(EmbeddingCache(tmp_path / "cache.sqlite")) == len(TEXTS)
    with pytest.raises(TypeError, match="The `cache` parameter"):
        emb.set_params(cache=7).transform(TEXTS)


def test_a_pickle_holds_no_settings() -> None:
    emb = make_vectorizer()
    before = pickle.dumps(emb)
    emb.transform(TEXTS)
    assert pickle.dumps(emb) == before
    assert pickle.dumps(pickle.loads(before)) == before


def test_an_encoder_without_a_cache_leaves_that_of_the_vectorizer(tmp_path: Path) -> None:
    cache = EmbeddingCache()
    emb = make_vectorizer(cache=cache)
    emb.transform_to(TEXTS, tmp_path / "a.npy")
    assert len(cache) == 0
    assert isinstance(emb._make_encoder(), Encoder)
    assert emb._make_encoder().cache is cache
