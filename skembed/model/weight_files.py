"""Safetensors files, read with distrust: names, types and shapes first, then finite numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skembed._files import open_file
from skembed.exceptions import CheckpointError

__all__ = [
    "TensorHeader",
    "WeightFiles",
    "check_file",
    "check_finite",
    "join_first",
    "open_tensors",
    "read_header",
]

MAX_HEADER_BYTES = 16 * 1024**2  # about 100,000 tensors
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of its content."""

    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]


def read_header(path: Path) -> TensorHeader:
    """Return the header of a safetensors file; raise CheckpointError if missing or damaged."""
    try:
        with open_file(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise ValueError(f"its header would have {size:,} bytes")
            values = json.loads(file.read(size), object_pairs_hook=_make_object)
        if not isinstance(values, dict):
            raise ValueError("its header is no JSON object")
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
        shapes = {name: _read_shape(name, entry) for name, entry in values.items()}
        dtypes = {name: str(entry.get("dtype"))[:40] for name, entry in values.items()}
        return TensorHeader(dtypes, shapes, metadata)
    except FileNotFoundError as error:
        raise CheckpointError(f"The folder {path.parent} lacks {path.name}.") from error
    except (OSError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "its header is nested too deeply"
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error
    except ValueError as error:
        raise _damage(path, error) from error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError if it has a name twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header has the name {twice!r:.100} twice")
    return values


def _read_shape(name: str, entry: Any) -> tuple[int, ...]:
    """Return a tensor's shape from its entry in the header."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its header gives {name!r:.100} no shape")
    return tuple(shape)


def _damage(path: Path, reason: object) -> CheckpointError:
    """Return the error for a file that is no valid safetensors file."""
    return CheckpointError(
        f"{path} is truncated or not a safetensors file ({reason}). Copy or download it again."
    )


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file whose header was read; raise CheckpointError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _damage(path, error) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def check_file(path: Path) -> TensorHeader:
    """Return the header of a safetensors file, if the rest of the file is as long as it says."""
    header = read_header(path)
    with open_tensors(path):
        return header


class WeightFiles:
    """Safetensors files as one mapping from a model's names to tensors.

    `rename` turns a key into the model's name; two keys of one name are refused. Each reading maps
    its file again: pages of a closed mapping no longer count as this process's memory, so loading
    needs little more than its result.
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str]) -> None:
        self.locations: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in paths:
            header = check_file(path)
            for key, shape in header.shapes.items():
                name = rename(key)
                if name in self.locations:
                    other, twin = self.locations[name]
                    raise CheckpointError(
                        f"The tensor {name} is there twice: as {twin} in {other} and as {key} in "
                        f"{path}. Remove one of the two, or download the folder again."
                    )
                self.locations[name] = (path, key)
                self.shapes[name] = shape
                self._dtypes[name] = header.dtypes[key]

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped; copy it before reading the next one."""
        path, key = self.locations[name]
        dtype = self._dtypes[name]
        if dtype not in _DTYPES:
            kind = {"F": "float", "I": "int", "U": "uint"}.get(dtype[:1], dtype[:1])
            raise CheckpointError(
                f"The tensor {key} of {path} must be float32, float16 or bfloat16; got "
                f"{kind}{dtype[1:]}. Quantised checkpoints are not read."
            )
        with open_tensors(path) as file:
            tensor: Tensor = file.get_tensor(key)
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(f"{path} has changed while it was read. Load it again.")
        return tensor

    def check_index(self, index: Mapping[str, Path], index_path: Path) -> None:
        """Raise CheckpointError where an index names a file that lacks the tensor."""
        found = {(key, path) for path, key in self.locations.values()}
        wrong = sorted(key for key, path in index.items() if (key, path) not in found)
        if wrong:
            raise CheckpointError(
                f"{index_path} names {join_first(wrong)} in {index[wrong[0]].name}, which lacks "
                "it. Copy or download the folder again."
            )

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignored: Sequence[str],
        *,
        folder: Path,
        config_file: str,
    ) -> None:
        """Raise CheckpointError naming what is missing, unexpected or of another shape.

        Language-model heads and rotary buffers of older files are ignored, too.
        """
        stored = {
            name
            for name in self.shapes
            if not name.startswith(("lm_head.", *ignored))
            and not name.endswith("rotary_emb.inv_freq")
        }
        faults = {
            "missing": sorted(set(expected) - stored),
            "unexpected": sorted(stored - set(expected)),
            "wrong shape": [
                f"{name} has {self.shapes[name]}, expected {expected[name]}"
                for name in sorted(stored & set(expected))
                if self.shapes[name] != expected[name]
            ],
        }
        if any(faults.values()):
            raise CheckpointError(
                f"The weights in {folder} do not fit its {config_file}; "
                + "; ".join(
                    f"{fault}: {join_first(names)}" for fault, names in faults.items() if names
                )
                + ". The two files belong to different models, or the copy is incomplete."
            )


def check_finite(tensor: Tensor, name: str, folder: Path, *, stored: Tensor | None = None) -> None:
    """Raise CheckpointError if a tensor holds NaN or infinity.

    `stored` is the tensor as it is in the file, where that is of another type.
    """
    # A sum of finite numbers overflows only where they are absurd.
    if torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all():
        return
    if stored is not None and torch.isfinite(stored).all():
        raise CheckpointError(
            f"The tensor {name} of {folder} holds values above the range of {tensor.dtype}. Pass "
            "dtype='bfloat16' or dtype='float32'."
        )
    raise CheckpointError(
        f"The tensor {name} of {folder} holds NaN or infinite values. The training that wrote it "
        "diverged, or the copy is damaged."
    )


def join_first(items: Sequence[str], limit: int = 5) -> str:
    """Return the first few of many names, joined."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(f"{item:.200}" for item in items[:limit]) + more
