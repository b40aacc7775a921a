"""The `device` and `dtype` parameters -> torch's devices and types, and the attention path."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from skembed._validation import check_int, list_items, parameter_error, unwrap
from skembed.model.quantized import WEIGHT_FORMATS

__all__ = [
    "COMPUTE_DTYPES",
    "DTYPES",
    "check_device",
    "choose_attention_path",
    "choose_search_device",
    "cpu_has_bfloat16",
    "name_dtype",
    "resolve_device",
    "resolve_devices",
    "resolve_dtype",
]


COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = (*COMPUTE_DTYPES, *WEIGHT_FORMATS)
_LAST_GPU = 127  # torch numbers them in one byte
_OWNER = "The `device` parameter of `NVEmbedVectorizer`"


def check_device(
    value: Any, *, name: str, owner: str, several: bool = False
) -> str | tuple[str, ...]:
    """Return the name of a device, or of each of `several`; whether they exist is checked later.

    A number is a GPU, None is "auto". Raises TypeError and ValueError.
    """
    value = unwrap(value)
    items = list_items(value) if several else None
    if items is not None:
        return tuple(str(check_device(each, name=name, owner=owner)) for each in items)
    if value is None:
        return "auto"
    if isinstance(value, (str, torch.device)):
        return str(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"cuda:{check_int(value, name=name, owner=owner, low=0, high=_LAST_GPU)}"
    expected = "a str" + ", or a list of str for several devices" * several
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


def choose_search_device(device: str, *, owner: str) -> torch.device:
    """Return where to search; "auto" takes CUDA, else the CPU. Raises as `resolve_device`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rule = f"The `device` parameter of `{owner}` must be 'auto', 'cpu', 'cuda' or 'cuda:<number>'"
    return _find_device(device, ("cpu", "cuda"), rule)


def resolve_device(device: str) -> torch.device:
    """Return the device of a `device` parameter; "auto" takes CUDA, then MPS, then the CPU.

    Raises ValueError for an unknown name, or a device that is not available on this machine.
    """
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    rule = f"{_OWNER} must be 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'"
    resolved = _find_device(device, ("cpu", "cuda", "mps"), rule)
    if resolved.type == "mps" and not has_mps:
        raise ValueError(
            f"{_OWNER} is 'mps', which is not available on this machine. Pass device='auto'."
        )
    return resolved


def _find_device(device: str, kinds: Sequence[str], rule: str) -> torch.device:
    """Return a device of one of some kinds, a GPU with its number."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{rule}; got {device!r}.") from error
    if parsed.type not in kinds:
        raise ValueError(f"{rule}; got {device!r}.")
    if parsed.type != "cuda":
        return torch.device(parsed.type)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (parsed.index or 0) >= count:
        raise ValueError(
            f"{rule}; got {device!r}, but torch sees {count} CUDA devices here. Pass "
            "device='auto' or 'cpu'."
        )
    # Without a number the current one: under torchrun each process has its own.
    index = torch.cuda.current_device() if parsed.index is None else parsed.index
    return torch.device("cuda", index)


def resolve_devices(device: str | Sequence[str]) -> list[torch.device]:
    """Return the devices of a `device` parameter: one, or each of a list of one kind.

    Raises ValueError as `resolve_device`, and for a list that is empty, mixes kinds, says "auto",
    or names a GPU twice.
    """
    if isinstance(device, str):
        return [resolve_device(device)]
    rule = f"{_OWNER} must, as a list, "
    if not device:
        raise ValueError(f"{rule}name at least one device, such as ['cuda:0', 'cuda:1']; got [].")
    if "auto" in device:
        raise ValueError(
            f"{rule}name each device, such as ['cuda:0', 'cuda:1']; got {list(device)!r}."
        )
    devices = [resolve_device(name) for name in device]
    if len({each.type for each in devices}) > 1:
        raise ValueError(f"{rule}name devices of one kind; got {list(device)!r}.")
    if devices[0].type != "cpu" and len(set(devices)) < len(devices):
        raise ValueError(
            f"{rule}name each GPU once: a second copy of the model on it brings nothing; got "
            f"{list(device)!r}."
        )
    return devices


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type of activations, and of weights unless quantised; "auto" asks the device.

    bfloat16 where it is native (CUDA from compute capability 8.0, CPUs with AVX512-BF16, AMX or
    Arm's BF16 instructions), else float32. "int8" and "nf4", which serve to save memory, take
    float16 on older CUDA devices. Raises ValueError if a device has no kernels for the type.
    """
    if dtype in COMPUTE_DTYPES:
        return getattr(torch, dtype)
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
    """Return the `dtype` of a `ModelKey` for a `dtype` parameter: "bfloat16", "int8+bfloat16"."""
    computed = str(compute_dtype).removeprefix("torch.")
    return f"{dtype}+{computed}" if dtype in WEIGHT_FORMATS else computed


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices natively."""
    instructions = {"avx512_bf16", "amx_bf16", "sve_bf16", "bf16"}
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return any(get_capabilities().get(name, False) for name in instructions)
    try:  # older torch, on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(instructions & set(flags.split()))


def choose_attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention path without padding that a device has, else "padded"."""
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
