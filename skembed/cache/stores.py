"""Storage of the rows of a cache: the protocol of a store, and the store in memory.

The store in memory drops the least recently used rows first. The cache holds the lock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "COPY_ROWS",
    "DTYPES",
    "KEY_BYTES",
    "MemoryStore",
    "ROW_OVERHEAD_BYTES",
    "Store",
    "find_storable",
]

# Storage types of vectors; a fixed byte order, so that a file can move between machines.
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
KEY_BYTES = 16
COPY_ROWS = 1024  # rows copied at once
_LARGEST_FLOAT16 = 65520.0  # from here on, rounding to float16 gives infinity


def find_storable(vectors: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Return which rows (n,) are finite, also once rounded to `dtype`."""
    mask = np.empty(len(vectors), dtype=np.bool_)
    for start in range(0, len(vectors), COPY_ROWS):
        part = slice(start, start + COPY_ROWS)
        if dtype.itemsize == 4:
            mask[part] = np.isfinite(vectors[part]).all(axis=1)
        else:  # false for NaN, too
            mask[part] = (np.abs(vectors[part]) < _LARGEST_FLOAT16).all(axis=1)
    return mask


class Store(Protocol):
    """Rows of a cache, in memory or in a file; the caller holds the lock of the cache."""

    def fetch(self, keys: list[bytes], out: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Fill the rows of `out` (n, dim) whose keys are stored; return which, (n,)."""

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Store row ``items[key]`` of `vectors` under each key."""

    def dtype(self) -> str:
        """Return the type that vectors are stored in."""

    def count(self) -> int:
        """Return the number of rows."""

    def size_bytes(self) -> int:
        """Return the bytes taken."""

    def clear(self) -> None:
        """Drop all rows."""

    def close(self) -> None:
        """Release what is open; the next use opens it again."""


# Key (49 bytes), header of the vector's bytes object (33) and its entry in an OrderedDict:
# 187 to 198 bytes a row measured with tracemalloc, more right after the table has grown.
ROW_OVERHEAD_BYTES = 208


class MemoryStore:
    """Rows in an OrderedDict, the least recently used first."""

    def __init__(self, max_bytes: int, dtype: str) -> None:
        self._max_bytes = max_bytes
        self._dtype = DTYPES[dtype]
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._size_bytes = 0

    def fetch(self, keys: list[bytes], out: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Fill the rows of `out` (n, dim) whose keys are stored; return which, (n,)."""
        get, move_to_end = self._rows.get, self._rows.move_to_end
        row_bytes = out.shape[1] * self._dtype.itemsize
        rows: list[bytes] = []
        positions: list[int] = []
        for position, value in enumerate(map(get, keys)):
            if value is not None and len(value) == row_bytes:
                move_to_end(keys[position])
                positions.append(position)
                rows.append(value)
        mask = np.zeros(len(keys), dtype=np.bool_)
        mask[positions] = True
        vectors = np.frombuffer(b"".join(rows), dtype=self._dtype)
        vectors = vectors.reshape(len(rows), out.shape[1])  # (n_rows, dim)
        # Converted first: an assignment that converts takes twice as long.
        out[mask] = vectors.astype(np.float32, copy=False)
        return mask

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Store row ``items[key]`` of `vectors` under each key; evict down to the limit."""
        row_cost = vectors.shape[1] * self._dtype.itemsize + ROW_OVERHEAD_BYTES
        if row_cost > self._max_bytes:
            return  # it would push out everything else and then itself
        storable = find_storable(vectors, self._dtype).tolist()
        with np.errstate(over="ignore"):  # in rows that are left out
            rounded = vectors.astype(self._dtype, copy=False)
        for key, position in items.items():
            if not storable[position]:
                continue
            self._remove(self._rows.pop(key, None))
            self._rows[key] = rounded[position].tobytes()
            self._size_bytes += row_cost
            while self._size_bytes > self._max_bytes:
                self._remove(self._rows.popitem(last=False)[1])

    def _remove(self, row: bytes | None) -> None:
        """Subtract the bytes of a row that has left the dict, if any."""
        if row is not None:
            self._size_bytes -= len(row) + ROW_OVERHEAD_BYTES

    def dtype(self) -> str:
        """Return the type that vectors are stored in."""
        return self._dtype.name

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def size_bytes(self) -> int:
        """Return the bytes taken, with the overhead of each row."""
        return self._size_bytes

    def clear(self) -> None:
        """Drop all rows, in a new dict, since an emptied one keeps its table."""
        self._rows = OrderedDict()
        self._size_bytes = 0

    def close(self) -> None:
        """Do nothing: there is no file to close."""
