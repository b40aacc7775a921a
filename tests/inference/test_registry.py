"""The registry: one load for all, freed with its last user."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tiny import make_key, make_vectorizer

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError
from skembed.inference import registry as registry_module
from skembed.inference.registry import Lease, ModelRegistry, registry
from skembed.model.loaded import LoadedModel, ModelKey
from skembed.model.sources import ModelSource

CPU = torch.device("cpu")
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def loaded_of(emb: NVEmbedVectorizer) -> weakref.ref[LoadedModel]:
    """The one model an estimator holds, without holding it."""
    (loaded,) = emb._lease.models.values()
    return weakref.ref(loaded)


def is_alive(reference: weakref.ref[LoadedModel]) -> bool:
    gc.collect()
    return reference() is not None


def test_one_load_under_threads(fresh_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, load, n_loads = ModelRegistry(), registry_module.load_registered, []
    barrier = threading.Barrier(8)

    def slow_load(*args: Any) -> LoadedModel:
        n_loads.append(1)
        time.sleep(0.1)
        return load(*args)

    monkeypatch.setattr(registry_module, "load_registered", slow_load)
    arguments = make_key(fresh_dir)

    def get(_: int) -> LoadedModel:
        barrier.wait()
        return own.get(*arguments)

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(get, range(8)))
    assert len(n_loads) == own.n_loads == len(own) == 1
    assert all(found is models[0] for found in models)


def test_two_keys_load_side_by_side(fresh_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each load waits until the other one runs too: one lock for all keys would never get there.
    own, together = ModelRegistry(), threading.Barrier(2)
    key, source, config = make_key(fresh_dir)

    def load(key: ModelKey, source: ModelSource, config: Any) -> LoadedModel:
        together.wait(timeout=60)
        return LoadedModel(key, config, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(registry_module, "load_registered", load)
    with ThreadPoolExecutor(2) as pool:
        keys = [key, replace(key, dtype="bfloat16")]
        models = list(pool.map(lambda key: own.get(key, source, config), keys))
    assert models[0] is not models[1]
    assert own.n_loads == 2


def test_failed_load_is_tried_again(fresh_dir: Path) -> None:
    own = ModelRegistry()
    weights = (fresh_dir / "model.safetensors").read_bytes()
    arguments = make_key(fresh_dir)
    (fresh_dir / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(CheckpointError):
        own.get(*arguments)
    assert (own.n_loads, len(own)) == (0, 0)
    (fresh_dir / "model.safetensors").write_bytes(weights)
    assert own.get(*arguments).key == arguments[0]


def test_freed_with_the_last_estimator_of_the_family(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir)
    emb.transform(["a"])
    loaded, twin = loaded_of(emb), clone(emb)
    assert is_alive(loaded)
    del emb
    assert is_alive(loaded), "a clone keeps the weights, even one that has embedded nothing"
    n_loads = registry.n_loads
    twin.transform(["b"])
    assert registry.n_loads == n_loads
    n_models = len(registry)
    del twin
    assert not is_alive(loaded)
    assert len(registry) == n_models - 1


def test_clone_of_an_unused_estimator_shares_what_either_loads(fresh_dir: Path) -> None:
    first = make_vectorizer(fresh_dir)
    second = clone(clone(first))
    second.transform(["a"])
    loaded = loaded_of(first)
    del second
    assert is_alive(loaded)


def test_estimators_of_different_families_share_weights(fresh_dir: Path) -> None:
    one, two = make_vectorizer(fresh_dir), make_vectorizer(fresh_dir, instruction="STS")
    one.transform(["a"])
    n_loads = registry.n_loads
    two.transform(["a"])
    assert registry.n_loads == n_loads
    assert loaded_of(one)() is loaded_of(two)()
    loaded = loaded_of(one)
    del one
    assert is_alive(loaded)
    del two
    assert not is_alive(loaded)


def test_another_model_takes_the_place_of_the_first(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir)
    emb.transform(["a"])
    loaded = loaded_of(emb)
    emb.set_params(dtype="bfloat16").transform(["a"])
    assert not is_alive(loaded)
    assert loaded_of(emb)().key.dtype == "bfloat16"


def test_copy_of_an_estimator_loads_nothing_new(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir)
    vectors = emb.transform(["a"])
    n_loads = registry.n_loads
    np.testing.assert_array_equal(copy.deepcopy(emb).transform(["a"]), vectors)
    assert registry.n_loads == n_loads


def test_device_dtype_and_pooling_make_their_own_entry(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(key: ModelKey, source: ModelSource, config: Any) -> LoadedModel:
        return LoadedModel(key, config, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(registry_module, "load_registered", load)
    own = ModelRegistry()
    changes = [
        {},
        {"dtype": "bfloat16"},
        {"pooling": "mean"},
        {"device": "cuda:0"},
        {"attention_path": "padded"},
        {"fingerprint": "another"},
    ]
    models = [own.get(*make_key(fresh_dir, **change)) for change in changes]
    assert len(own) == own.n_loads == len({id(model) for model in models}) == 6
    assert own.get(*make_key(fresh_dir, dtype="bfloat16")) is models[1]


def test_estimators_of_two_dtypes_and_poolings(fresh_dir: Path) -> None:
    n_models = len(registry)
    family = [
        make_vectorizer(fresh_dir),
        make_vectorizer(fresh_dir, dtype="bfloat16"),
        make_vectorizer(fresh_dir, pooling="mean"),
    ]
    vectors = [emb.transform(["some text"]) for emb in family]
    assert len(registry) == n_models + 3
    assert next(loaded_of(family[1])().model.parameters()).dtype == torch.bfloat16
    assert np.abs(vectors[0] - vectors[2]).max() > 0.01


def test_lease_holds_the_last_model_only(fresh_dir: Path) -> None:
    key, _, config = make_key(fresh_dir)
    lease = Lease()
    for dtype in ("float32", "bfloat16"):
        lease.hold(LoadedModel(replace(key, dtype=dtype), config, None, None))  # type: ignore[arg-type]
    assert [key.dtype for key in lease.models] == ["bfloat16"]


def test_worker_process_keeps_the_models_used_last(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(key: ModelKey, source: ModelSource, config: Any) -> LoadedModel:
        return LoadedModel(key, config, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(registry_module, "load_registered", load)
    own = ModelRegistry()
    key, source, config = make_key(fresh_dir)
    own.get(key, source, config)
    gc.collect()
    assert len(own) == 0, "this process keeps nothing that no one holds"
    monkeypatch.setattr(registry_module.multiprocessing, "parent_process", lambda: object())
    a, b, c = (replace(key, dtype=dtype) for dtype in ("a", "b", "c"))
    for used in (a, b, a, c, a):
        own.get(used, source, config)
    gc.collect()
    assert own.n_loads == 4
    assert set(own._models) == {a, c}, "the least recently used one goes"


def test_loaded_model_tells_its_size(fresh_dir: Path) -> None:
    loaded = ModelRegistry().get(*make_key(fresh_dir))
    parameters = sum(tensor.nbytes for tensor in loaded.model.parameters())
    assert parameters <= loaded.weight_bytes < 600_000
    assert loaded.device == CPU
    assert not any(tensor.requires_grad for tensor in loaded.model.parameters())
    assert not loaded.model.training
