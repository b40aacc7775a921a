"""Rows of the embedding cache in this process's memory, the least recently used out first.

The memory side of ``skembed.cache``, with the same methods as ``skembed._cache_file.FileStore``;
the caller holds the lock of the cache.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from skembed._cache_layout import DTYPES, find_storable

__all__ = ["ROW_OVERHEAD_BYTES", "MemoryStore"]

# Key (49 bytes), header of the vector's bytes object (33) and its place in an OrderedDict:
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
        """Copy known rows into `out` (n, dim); return which these are (n,)."""
        get, move_to_end = self._rows.get, self._rows.move_to_end
        row_bytes = out.shape[1] * self._dtype.itemsize
        found: list[bytes] = []
        positions: list[int] = []
        for position, value in enumerate(map(get, keys)):
            if value is not None and len(value) == row_bytes:
                move_to_end(keys[position])
                positions.append(position)
                found.append(value)
        mask = np.zeros(len(keys), dtype=np.bool_)
        mask[positions] = True
        vectors = np.frombuffer(b"".join(found), dtype=self._dtype)
        vectors = vectors.reshape(len(found), out.shape[1])  # (n_found, dim)
        # Converted first: an assignment that converts takes twice as long.
        out[mask] = vectors.astype(np.float32, copy=False)
        return mask

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Insert row `position` of `vectors` under each key, then evict down to the limit."""
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
        """Take the bytes of a row that has left the dict off the account."""
        if row is not None:
            self._size_bytes -= len(row) + ROW_OVERHEAD_BYTES

    def dtype(self) -> str:
        """Return the type of the vectors."""
        return self._dtype.name

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def size_bytes(self) -> int:
        """Return the bytes held, with the overhead of each row."""
        return self._size_bytes

    def clear(self) -> None:
        """Drop every row; a new dict, as an emptied one keeps its table."""
        self._rows = OrderedDict()
        self._size_bytes = 0

    def close(self) -> None:
        """Do nothing: there is no file to let go of."""

    def after_fork(self) -> None:
        """Do nothing: the child goes on with its own copy of the rows."""
