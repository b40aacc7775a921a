"""Vectors of a corpus as float32, float16, int8 or single bits, read back as float32 in blocks.

The kind decides the memory and how close a vector stays to the original; scores are always
computed in float32.

======== ================= ==========================================================
kind     bytes a component read back
======== ================= ==========================================================
float32  4                 as given
float16  2                 rounded to 11 bits
int8     1, and 4 a vector in 255 steps between minus and plus the vector's largest magnitude
binary   1/8               one of two levels of the component, learned from the first vectors
======== ================= ==========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed.search.codes import Levels
from skembed.search.saved_array import SavedArray
from skembed.similarity import Indices, Vectors, iterate_blocks

__all__ = ["Rows", "STORAGE_KINDS", "StoredVectors"]

STORAGE_KINDS = ("float32", "float16", "int8", "binary")
_MAX_INT8 = 127

Rows = slice | Indices


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """The vectors of n documents; every method leaves them as they are."""

    kind: str  # one of `STORAGE_KINDS`
    dim: int
    # "values", (n, dim) or (n, ceil(dim / 8)) bits; for int8 "scales", (n,); for binary "levels",
    # (3, dim), the table of `Levels`.
    arrays: Mapping[str, npt.NDArray[np.generic]]
    # The same arrays where they come from files, to be checked before they are used.
    saved: Mapping[str, SavedArray] = field(default_factory=dict)

    @classmethod
    def encode(cls, vectors: Vectors, kind: str) -> StoredVectors:
        """Return finite vectors (n, dim) as `kind` stores them; float32 ones are not copied."""
        levels = {"levels": Levels.learn(vectors).table} if kind == "binary" else {}
        empty = cls(kind, vectors.shape[1], levels)
        return cls(kind, empty.dim, {**levels, **empty._encode_rows(vectors)})

    @classmethod
    def open(cls, kind: str, dim: int, n: int, saved: Mapping[str, SavedArray]) -> StoredVectors:
        """Return n vectors of a saved index; raise ValueError if these are not their arrays."""
        dtypes = {"float32": "f4", "float16": "f2", "int8": "i1", "binary": "u1"}
        width = -(-dim // 8) if kind == "binary" else dim
        expected: dict[str, tuple[str, tuple[int, ...]]] = {"values": (dtypes[kind], (n, width))}
        if kind == "int8":
            expected["scales"] = ("f4", (n,))
        if kind == "binary":
            expected["levels"] = ("f4", (3, dim))
        found = {
            name: (array.values.dtype.str[1:], array.values.shape) for name, array in saved.items()
        }
        if found != expected:
            raise ValueError(f"{found} are not the arrays of {n} {kind} vectors of width {dim}")
        return cls(kind, dim, {name: array.values for name, array in saved.items()}, saved)

    def __len__(self) -> int:
        return len(self.arrays["values"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.check().__dict__}

    def check(self) -> StoredVectors:
        """Return these vectors in memory, all checked; raise ValueError if a file is damaged."""
        for array in self.saved.values():
            array.check()
        return StoredVectors(self.kind, self.dim, self.arrays)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    def read_rows(self, rows: Rows) -> Vectors:
        """Return some vectors as float32, (n_rows, dim); a slice of float32 is not copied."""
        for name, array in self.saved.items():
            array.check(None if name == "levels" else rows)
        values: Any = self.arrays["values"][rows]
        if self.kind == "int8":
            scaled: Vectors = values * self.arrays["scales"][rows][:, None]
            return scaled
        if self.kind == "binary":
            return self._levels.decode(values.view(np.uint8))
        return values.astype(np.float32, copy=False)

    def append(self, vectors: Vectors) -> StoredVectors:
        """Return these vectors followed by more."""
        self.check()
        new = self._encode_rows(vectors)
        rows = {name: np.concatenate([self.arrays[name], array]) for name, array in new.items()}
        return StoredVectors(self.kind, self.dim, {**self.arrays, **rows})

    def select(self, rows: npt.NDArray[np.bool_]) -> StoredVectors:
        """Return the vectors of the rows where a mask (n,) is True."""
        self.check()
        arrays = {k: v if k == "levels" else v[rows] for k, v in self.arrays.items()}
        return StoredVectors(self.kind, self.dim, arrays)

    def _encode_rows(self, vectors: Vectors) -> dict[str, npt.NDArray[np.generic]]:
        """Return the arrays that have a row for each vector."""
        n = len(vectors)
        if self.kind == "float32":
            return {"values": vectors.astype(np.float32, copy=False)}
        if self.kind == "float16":
            return {"values": _to_float16(vectors)}
        if self.kind == "int8":
            values = np.empty((n, self.dim), dtype=np.int8)
            scales = np.empty(n, dtype=np.float32)
            for rows in iterate_blocks(n, self.dim):
                block = vectors[rows].astype(np.float32, copy=False)
                largest = np.maximum(block.max(axis=1), -block.min(axis=1))
                scales[rows] = largest / _MAX_INT8
                steps = np.where(scales[rows] > 0, scales[rows], 1)[:, None]
                # A tiny scale is inexact, so that quotients may exceed the bound.
                values[rows] = np.clip(np.rint(block / steps), -_MAX_INT8, _MAX_INT8)
            return {"values": values, "scales": scales}
        return {"values": self._levels.encode(vectors)}

    @property
    def _levels(self) -> Levels:
        """Two levels of each component, of "binary" only."""
        table: Any = self.arrays["levels"]
        return Levels(table)


def _to_float16(vectors: Vectors) -> npt.NDArray[np.float16]:
    """Return vectors rounded to float16 and clipped to its range."""
    largest = np.finfo(np.float16).max
    values = np.empty(vectors.shape, dtype=np.float16)
    for rows in iterate_blocks(*vectors.shape):
        values[rows] = np.clip(vectors[rows], -largest, largest)
    return values
