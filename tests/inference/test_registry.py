"""Loaded models: one a key and process, freed with the last estimator, proven bidirectional."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tiny import make_vectorizer
from torch import Tensor
from torch.nn import functional as F

from skembed import NVEmbedVectorizer
from skembed.exceptions import CausalLeakError, CheckpointError
from skembed.inference import devices
from skembed.inference import registry as registry_module
from skembed.inference.devices import (
    choose_attention_path,
    cpu_has_bfloat16,
    resolve_device,
    resolve_dtype,
)
from skembed.inference.registry import Lease, ModelRegistry, registry
from skembed.model import attention as model_module
from skembed.model import loaded as loaded_module
from skembed.model.checkpoint import load_model
from skembed.model.loaded import LoadedModel, ModelKey, prove_bidirectional
from skembed.model.network import NVEmbedModel
from skembed.model.sources import ModelSource, fingerprint_weights, read_config
from skembed.model.tokenization import PackedBatch

CPU = torch.device("cpu")
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def make_key(folder: Path, **changes: str) -> tuple[ModelKey, ModelSource, Any]:
    source = ModelSource(str(folder), folder)
    config = read_config(source, changes.get("pooling"))
    key = ModelKey(fingerprint_weights(source), config.pooling, "cpu", "float32", "grouped")
    return replace(key, **changes), source, config


def loaded_of(emb: NVEmbedVectorizer) -> weakref.ref[LoadedModel]:
    """The one model an estimator holds, without holding it."""
    (loaded,) = emb._lease.models.values()
    return weakref.ref(loaded)


def is_alive(reference: weakref.ref[LoadedModel]) -> bool:
    gc.collect()
    return reference() is not None


# ---------------------------------------------------------------- loading and freeing


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
        together.wait(timeout=20)
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


# ---------------------------------------------------------------- bidirectional attention


@pytest.fixture
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """A process in which no attention path has been checked yet."""
    proven: set[Any] = set()
    monkeypatch.setattr(loaded_module, "_proven", proven)
    return proven


@pytest.fixture
def make_model(golden_dir: Path) -> Iterator[Callable[..., NVEmbedModel]]:
    source = ModelSource("tiny", golden_dir)

    def make(path: str, dtype: torch.dtype = torch.float32) -> NVEmbedModel:
        return load_model(source, read_config(source), device=CPU, dtype=dtype, attention_path=path)

    yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_paths_are_bidirectional(
    path: str, dtype: torch.dtype, make_model: Any, nothing_proven: set[Any]
) -> None:
    prove_bidirectional(make_model(path, dtype), CPU)
    assert [proof[:3] for proof in nothing_proven] == [(path, "cpu", dtype)]


def causal(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """What the grouped path would be with a causal mask."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    parts = [
        F.scaled_dot_product_attention(*piece, is_causal=True, scale=scaling).transpose(0, 1)
        for piece in zip(*(x.split(packed.lengths, dim=1) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts)


def mixing(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """What it would be if texts of a pack saw each other."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)


@pytest.mark.parametrize(
    ("attention", "fault"), [(causal, "is causal"), (mixing, "mixes neighbouring texts")]
)
def test_faulty_attention_is_found(
    attention: Any,
    fault: str,
    make_model: Any,
    nothing_proven: set[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_module, "_grouped", attention)
    with pytest.raises(CausalLeakError, match=f"path 'grouped' on cpu .* {fault}.*install another"):
        prove_bidirectional(make_model("grouped"), CPU)
    assert not nothing_proven


def test_causal_attention_for_one_length_only_is_found(
    make_model: Any, nothing_proven: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kernel chosen for texts of one length only, as some libraries do without a mask.
    grouped = model_module._grouped

    def sometimes(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, *args: float) -> Tensor:
        uniform = len(set(packed.lengths)) == 1
        return (causal if uniform else grouped)(q, k, v, packed, *args)

    monkeypatch.setattr(model_module, "_grouped", sometimes)
    with pytest.raises(CausalLeakError, match="is causal"):
        prove_bidirectional(make_model("grouped"), CPU)


def test_each_path_is_proven_once_and_at_loading(
    fresh_dir: Path, nothing_proven: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ModelRegistry()
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "_grouped", causal)
        with pytest.raises(CausalLeakError):
            own.get(*make_key(fresh_dir))
        assert len(own) == 0
    own.get(*make_key(fresh_dir))
    assert len(nothing_proven) == 1

    def no_more(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("proven already")

    monkeypatch.setattr(loaded_module, "_first_positions", no_more)
    own.get(*make_key(fresh_dir))
    with pytest.raises(AssertionError, match="proven already"):
        own.get(*make_key(fresh_dir, attention_path="padded"))


# ---------------------------------------------------------------- device, type and path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch believe in other devices."""

    def set_devices(
        *, n_cuda: int = 0, mps: bool = False, capability: tuple[int, int] = (8, 0)
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: n_cuda - 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return set_devices


def test_resolve_device(machine: Callable[..., None]) -> None:
    machine()
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    machine(mps=True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    machine(n_cuda=2, mps=True)
    assert resolve_device("auto") == torch.device("cuda", 1), "the current one"
    assert resolve_device("cuda") == torch.device("cuda", 1), "the current one"
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta", "xpu", "CPU"])
def test_resolve_device_refuses_unknown_names(device: str, machine: Callable[..., None]) -> None:
    machine(n_cuda=1)
    with pytest.raises(ValueError, match=r"The `device` parameter .* must be 'auto', 'cpu', .*got"):
        resolve_device(device)


def test_resolve_device_refuses_absent_devices(machine: Callable[..., None]) -> None:
    machine()
    with pytest.raises(ValueError, match="'cuda', but torch sees 0 CUDA devices.*device='auto'"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="'mps', which this machine has not"):
        resolve_device("mps")
    machine(n_cuda=2)
    with pytest.raises(ValueError, match="'cuda:2', but torch sees 2 CUDA devices"):
        resolve_device("cuda:2")


def test_resolve_dtype(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda native=native: native)
        assert resolve_dtype("auto", CPU) == dtype
        assert resolve_dtype("auto", torch.device("mps")) == torch.float32
    cuda = torch.device("cuda", 0)
    machine(n_cuda=1, capability=(7, 5))
    assert resolve_dtype("auto", cuda) == torch.float32
    machine(n_cuda=1, capability=(8, 0))
    assert resolve_dtype("auto", cuda) == torch.bfloat16
    for name in ("float32", "bfloat16", "float16"):
        assert resolve_dtype(name, CPU) == getattr(torch, name)


@pytest.fixture
def ask_again() -> Iterator[None]:
    """Forget what the processor answered, before and after."""
    cpu_has_bfloat16.cache_clear()
    yield
    cpu_has_bfloat16.cache_clear()


@pytest.mark.usefixtures("ask_again")
@pytest.mark.parametrize(
    ("answer", "native"),
    [
        ({"amx_bf16": True, "avx2": True}, True),
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_asked_of_the_processor(
    answer: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answer, raising=False)
    assert cpu_has_bfloat16() is native


@pytest.mark.usefixtures("ask_again")
@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_int8\n", True),
        ("processor: 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor: 0\nflags\t\t: fpu avx2 avx512f\nbf16 elsewhere\n", False),
        (None, False),
    ],
)
def test_bfloat16_with_a_torch_that_cannot_tell(
    text: str | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CpuInfo:
        def __init__(self, name: str) -> None:
            assert name == "/proc/cpuinfo"

        def read_text(self, encoding: str) -> str:
            if text is None:
                raise FileNotFoundError
            return text

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(registry_module, "Path", CpuInfo)
    assert cpu_has_bfloat16() is native


@pytest.mark.usefixtures("ask_again")
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(torch.cpu, "get_capabilities"),
    reason="compares torch's answer with that of Linux",
)
def test_both_ways_of_asking_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = cpu_has_bfloat16()
    cpu_has_bfloat16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_has_bfloat16() is by_torch


def test_choose_attention_path(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_varlen(function: Any) -> None:
        module = types.ModuleType("torch.nn.attention.varlen")
        if function is not None:
            module.varlen_attn = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)

    cuda, half = torch.device("cuda", 0), torch.bfloat16
    machine(n_cuda=1)
    with_varlen(lambda q, k, v, *, scale=None: q)
    assert choose_attention_path(CPU, torch.float32) == "grouped"
    assert choose_attention_path(CPU, half) == "grouped"
    assert choose_attention_path(cuda, half) == "varlen"
    assert choose_attention_path(cuda, torch.float16) == "varlen"
    assert choose_attention_path(cuda, torch.float32) == "padded"
    assert choose_attention_path(torch.device("mps"), half) == "padded"
    machine(n_cuda=1, capability=(7, 5))
    assert choose_attention_path(cuda, half) == "padded"
    machine(n_cuda=1)
    with_varlen(lambda q, k, v: q)  # an early form without a scale
    assert choose_attention_path(cuda, half) == "padded"
    with_varlen(None)
    assert choose_attention_path(cuda, half) == "padded"
