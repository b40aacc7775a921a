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

    It holds a copy of the vectors in float16; pickles and copies contain the graph itself. One
    thread adds and removes, since usearch leaves some vectors unreachable when they are added in
    parallel. A search uses as many threads as torch, since usearch's own choice spins on a busy
    machine.
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
        """Remove the vectors of these labels, (n,)."""
        self._index.remove(labels.astype(np.uint64), threads=1)

    def search(self, queries: Vectors, k: int) -> Indices:
        """Return labels of about the best k of each query, (n_queries, k); -1 where missing."""
        self._index.expansion_search = max(_EXPANSION_SEARCH, 2 * k)
        labels = np.full((len(queries), k), -1, dtype=np.int64)
        for rows in iterate_blocks(len(queries), max(k, queries.shape[1])):
            matches = self._index.search(queries[rows], k, threads=torch.get_num_threads())
            # A single query gives one row of matches, without its count.
            keys = np.atleast_2d(matches.keys).astype(np.int64)
            width = keys.shape[1]
            counts = np.atleast_1d(np.asarray(getattr(matches, "counts", width)))
            is_match = np.arange(width) < counts[:, None]
            labels[rows, :width] = np.where(is_match, keys, -1)
        return labels

    def to_array(self) -> npt.NDArray[np.uint8]:
        """Return the graph as bytes, (size,)."""
        return np.frombuffer(bytes(self._index.save()), dtype=np.uint8)

    @classmethod
    def from_array(cls, data: npt.NDArray[np.uint8]) -> HnswGraph:
        """Return the graph that `to_array` turned into bytes."""
        graph = cls.__new__(cls)
        graph._index = _import_usearch().Index.restore(data.tobytes())
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        return HnswGraph.from_array, (self.to_array(),)


def _import_usearch() -> Any:
    """Return usearch's module; raise ImportError that says how to install it."""
    return import_optional("usearch.index", extra="ann", purpose="`Retriever(algorithm='hnsw')`")
