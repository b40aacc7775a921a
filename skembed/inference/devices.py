"""The `device` and `dtype` parameters -> torch's devices and types, and the attention path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from skembed.model.quantized import WEIGHT_FORMATS

__all__ = [
    "COMPUTE_DTYPES",
    "DTYPES",
    "choose_attention_path",
    "choose_search_device",
    "cpu_has_bfloat16",
    "name_dtype",
    "resolve_device",
    "resolve_devices",
    "resolve_dtype",
]


def choose_search_device(device: str, *, owner: str) -> torch.device:
    """Return where to search: for "auto" a CUDA device if there is one, else the CPU.

    Raises ValueError for any other device, and for one that is not there.

    >>> from skembed.inference.devices import choose_search_device
    >>> choose_search_device("cpu", owner="Retriever")
    device(type='cpu')
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    subject = (
        f"The `device` parameter of `{owner}` must be 'auto', 'cpu', 'cuda' or 'cuda:<number>'"
    )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{subject}; got {device!r}.") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{subject}; got {device!r}.")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"{subject}; got {device!r}, but torch sees {count} CUDA devices here.")
    return found


COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = (*COMPUTE_DTYPES, *WEIGHT_FORMATS)


def resolve_device(device: str) -> torch.device:
    """The torch device of a `device` parameter; "auto" takes CUDA, then MPS, then the CPU.

    Raises ValueError for an unknown name, or a device that is not available on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    owner = "The `device` parameter of `NVEmbedVectorizer`"
    allowed = "'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner} must be {allowed}; got {device!r}.") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{owner} must be {allowed}; got {device!r}.")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(
                f"{owner} is {device!r}, but torch sees {count} CUDA devices here. Pass "
                "device='auto' or 'cpu'."
            )
        # Without a number the current one: under torchrun each process has its own.
        index = torch.cuda.current_device() if found.index is None else found.index
        return torch.device("cuda", index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{owner} is 'mps', which this machine has not. Pass device='auto'.")
    return torch.device(found.type)


def resolve_devices(device: str | Sequence[str]) -> list[torch.device]:
    """The torch devices of a `device` parameter: one, or each of a list of one kind.

    Raises ValueError as `resolve_device`, and for a list that is empty, mixes kinds, says "auto",
    or names a GPU twice.
    """
    if isinstance(device, str):
        return [resolve_device(device)]
    rule = "The `device` parameter of `NVEmbedVectorizer` must, as a list, "
    if not device:
        raise ValueError(f"{rule}name at least one device, such as ['cuda:0', 'cuda:1']; got [].")
    if "auto" in device:
        raise ValueError(
            f"{rule}name each device, such as ['cuda:0', 'cuda:1']; got {list(device)!r}."
        )
    found = [resolve_device(name) for name in device]
    if len({one.type for one in found}) > 1:
        raise ValueError(f"{rule}name devices of one kind; got {list(device)!r}.")
    if found[0].type != "cpu" and len(set(found)) < len(found):
        raise ValueError(
            f"{rule}name each GPU once: a second copy of the model on it brings nothing; got "
            f"{list(device)!r}."
        )
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type activations are held in, and weights unless quantised; "auto" asks the device.

    bfloat16 where it is native (CUDA from compute capability 8.0, CPUs with AVX512-BF16, AMX or
    Arm's BF16 instructions), else float32. "int8" and "nf4", which are there to save memory, take
    float16 on older CUDA devices. Raises ValueError where a device has no kernels for the type.
    """
    if dtype in COMPUTE_DTYPES:
        found: torch.dtype = getattr(torch, dtype)
        return found
    if dtype == "nf4" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            "The `dtype` parameter of `NVEmbedVectorizer` is 'nf4', which runs on 'cuda' and "
            f"'cpu'; got device {str(device)!r}. Pass dtype='int8', which runs everywhere."
        )
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if not native and dtype != "auto":
            return torch.float16
    else:
        native = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def name_dtype(dtype: str, compute_dtype: torch.dtype) -> str:
    """The `dtype` of a `ModelKey` for a `dtype` parameter: "bfloat16", or "int8+bfloat16".

    >>> from skembed.inference.devices import name_dtype
    >>> name_dtype("auto", torch.float32), name_dtype("int8", torch.bfloat16)
    ('float32', 'int8+bfloat16')
    """
    computed = str(compute_dtype).removeprefix("torch.")
    return f"{dtype}+{computed}" if dtype in WEIGHT_FORMATS else computed


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices natively."""
    wanted = {"avx512_bf16", "amx_bf16", "sve_bf16", "bf16"}
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return any(ask().get(name, False) for name in wanted)
    try:  # older torch, on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(wanted & set(flags.split()))


def choose_attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """The attention path without padding that a device has, else "padded"."""
    if device.type == "cpu":
        return "grouped"
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return "padded"
        if "scale" in inspect.signature(varlen_attn).parameters:
            return "varlen"
    return "padded"
