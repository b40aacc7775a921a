"""Choosing the device, the type and the attention path."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from skembed.inference import devices
from skembed.inference.devices import (
    choose_attention_path,
    cpu_has_bfloat16,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


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
    with pytest.raises(ValueError, match="'mps', which is not available on this machine"):
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
    monkeypatch.setattr(devices, "Path", CpuInfo)
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
