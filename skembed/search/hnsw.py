"""An approximate index: a graph of near neighbours (HNSW) through usearch.

It proposes candidates; the retriever computes their scores itself, from the stored vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skembed._validation import import_optional
from skembed.search.stored_vectors import StoredVectors
from skembed.similarity import Indices, Vectors, iterate_blocks

__all__ = ["HnswGraph"]

_CONNECTIVITY = 16
_EXPANSION_ADD = 128
_EXPANSION_SEARCH = 64


class HnswGraph:
    """Graph over the vectors of documents, each under a label that is never used again.

    Holds a copy of the vectors in float16. Pickles and copies hold the graph itself. One thread
    adds and removes: of vectors added side by side usearch leaves some where no search reaches
    them. A search has as many threads as torch: usearch's own choice spins on a busy machine.
    """

    def __init__(self, dim: int) -> None:
        self._index = _import_usearch().Index(
            ndim=dim,
            metric="ip",
            dtype="f16",
            connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD,
            expansion_search=_EXPANSION_SEARCH,
        )

    def __len__(self) -> int:
        return len(self._index)

    def add(self, labels: Indices, vectors: StoredVectors) -> None:
        """Add vectors under new labels, (n,)."""
        for rows in iterate_blocks(len(vectors), vectors.dim):
            keys = labels[rows].astype(np.uint64)
            self._index.add(keys, vectors.read_rows(rows), threads=1)

    def remove(self, labels: Indices) -> None:
        """Take the vectors of these labels out."""
        self._index.remove(labels.astype(np.uint64), threads=1)

    def search(self, queries: Vectors, k: int) -> Indices:
        """Return labels of about the best k of each query, (n_queries, k); -1 where missing."""
        self._index.expansion_search = max(_EXPANSION_SEARCH, 2 * k)
        labels = np.full((len(queries), k), -1, dtype=np.int64)
        for rows in iterate_blocks(len(queries), max(k, queries.shape[1])):
            found = self._index.search(queries[rows], k, threads=torch.get_num_threads())
            # One query gives one row of matches, without its count.
            keys = np.atleast_2d(found.keys).astype(np.int64)
            counts = np.atleast_1d(np.asarray(getattr(found, "counts", keys.shape[1])))
            width = keys.shape[1]
            places = np.arange(width) < counts[:, None]
            labels[rows, :width] = np.where(places, keys, -1)
        return labels

    def to_array(self) -> npt.NDArray[np.uint8]:
        """Return the graph as bytes, (size,)."""
        return np.frombuffer(bytes(self._index.save()), dtype=np.uint8)

    @classmethod
    def from_array(cls, data: npt.NDArray[np.uint8]) -> HnswGraph:
        """Return the graph that `to_array` made bytes of."""
        graph = cls.__new__(cls)
        graph._index = _import_usearch().Index.restore(data.tobytes())
        return graph

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.to_array()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._index = HnswGraph.from_array(state["data"])._index


def _import_usearch() -> Any:
    """Return usearch's module, or say how to install it."""
    return import_optional("usearch.index", extra="ann", purpose="`Retriever(algorithm='hnsw')`")
