"""An approximate index: a graph of near neighbours (HNSW) through usearch.

It proposes candidates; the retriever computes their scores itself, from the stored vectors. usearch
follows what the bytes of a saved graph say, out of its memory too, so they are checked before.
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
_NODES_AT_ONCE = 32_768

# A graph as usearch 2 writes it: two sizes (u4), the vectors, _HEAD, _GRAPH, the level of each node
# (i2), and the nodes. A node has a list of neighbours for level 0, and one more for each above.
_HEAD = np.dtype(
    [
        ("magic", "S7"),
        ("version", "<u2", 3),
        ("kinds", "u1", 4),  # of metric, scalars, keys and slots
        ("present", "<u8"),
        ("deleted", "<u8"),
        ("dim", "<u8"),
        ("multi", "u1"),
        ("rest", "V22"),
    ]
)
_GRAPH = np.dtype([(name, "<u8") for name in ("n", "links", "links_base", "max_level", "entry")])
_LIST = np.dtype([("count", "<u4"), ("slots", "<u4", _CONNECTIVITY)])
_NODE = np.dtype(
    [("key", "<u8"), ("level", "<i2"), ("count", "<u4"), ("slots", "<u4", 2 * _CONNECTIVITY)]
)
_REMOVED = np.uint64(2**64 - 1)  # the key of a node that was removed


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
    def from_array(cls, data: npt.NDArray[np.uint8], dim: int) -> HnswGraph:
        """Return the graph that `to_array` turned into bytes; trusts them."""
        graph = cls(dim)
        graph._index.load(data)
        return graph

    @classmethod
    def read(cls, data: npt.NDArray[np.uint8], dim: int, labels: Indices) -> HnswGraph:
        """Return the graph of these ascending labels, from the bytes of a file.

        Raises ValueError where they are no such graph, before usearch sees them.
        """
        fault = _find_fault(data, dim, labels)
        if fault is not None:
            raise ValueError(fault)
        return cls.from_array(data, dim)

    def __reduce__(self) -> tuple[Any, ...]:
        return HnswGraph.from_array, (self.to_array(), self._index.ndim)


def _find_fault(data: npt.NDArray[np.uint8], dim: int, labels: Indices) -> str | None:
    """Return what keeps bytes from being a graph of vectors (dim,) under these labels, or None."""
    fresh = HnswGraph(dim).to_array()
    if len(data) < len(fresh):
        return f"it has {len(data)} bytes"
    n, width = data[:8].view("<u4").tolist()
    start = 8 + n * width  # of the heads
    after = start + _HEAD.itemsize + _GRAPH.itemsize
    if width != 2 * dim or len(data) < after + 2 * n:
        return f"{n} vectors of {width} bytes are not what it holds"
    (head, graph), (usual, usual_graph) = _read_heads(data[start:after]), _read_heads(fresh[8:])
    if head["magic"] != usual["magic"] or head["version"][0] != usual["version"][0]:
        return f"it is no graph of usearch {usual['version'][0]}"
    same = all((head[k] == usual[k]).all() for k in ("kinds", "dim", "multi"))
    if not same or any(graph[k] != usual_graph[k] for k in ("links", "links_base")):
        return "it is a graph of another kind"
    n_present, n_deleted = int(head["present"]), int(head["deleted"])
    if graph["n"] != n or n_present + n_deleted != n or n_present != len(labels):
        return (
            f"it has {graph['n']} nodes, {n_deleted} of them removed, for {len(labels)} documents"
        )
    levels = data[after : after + 2 * n].view("<i2").astype(np.int64)
    if n and (graph["entry"] >= n or levels[int(graph["entry"])] != graph["max_level"]):
        return "its entry is not a node of the highest level"
    sizes = _NODE.itemsize + _LIST.itemsize * levels
    if (levels < 0).any() or after + 2 * n + sizes.sum() != len(data):
        return "its levels do not fit its size"
    return _find_bad_node(data, len(data) - np.cumsum(sizes[::-1])[::-1], levels, labels)


def _read_heads(data: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
    """Return the head of the file and that of the graph."""
    return (
        data[: _HEAD.itemsize].view(_HEAD)[0],
        data[_HEAD.itemsize : _HEAD.itemsize + _GRAPH.itemsize].view(_GRAPH)[0],
    )


def _find_bad_node(
    data: npt.NDArray[np.uint8], starts: Indices, levels: Indices, labels: Indices
) -> str | None:
    """Return what is wrong with a node; all lists must lead to nodes that have their level."""
    n, keys = len(levels), np.empty(len(levels), dtype=np.uint64)
    for first in range(0, n, _NODES_AT_ONCE):
        block = slice(first, first + _NODES_AT_ONCE)
        nodes = _gather(data, starts[block], _NODE)
        keys[block] = nodes["key"]
        if (nodes["level"] != levels[block]).any():
            return "the levels of its nodes contradict each other"
        if not _lead_to(nodes, levels, 0):
            return "a node leads nowhere"
    for level in range(1, int(levels.max(initial=0)) + 1):
        lists = starts[levels >= level] + _NODE.itemsize + (level - 1) * _LIST.itemsize
        if not _lead_to(_gather(data, lists, _LIST), levels, level):
            return "a node leads nowhere"
    found = np.sort(keys[keys != _REMOVED])
    if not np.array_equal(found, labels.astype(np.uint64)):
        return "its nodes are other documents"
    return None


def _gather(data: npt.NDArray[np.uint8], starts: Indices, kind: np.dtype[Any]) -> Any:
    """Return the records of `kind` that start at these bytes, (n,)."""
    size = kind.itemsize
    # One record at every byte; numpy checks that the last one ends in `data`.
    windows: Any = np.ndarray(len(data) - size + 1, f"V{size}", data, strides=(1,))
    return windows[starts].view(kind)


def _lead_to(lists: Any, levels: Indices, level: int) -> bool:
    """Return whether lists of neighbours hold nodes of at least this level."""
    slots, counts = lists["slots"], lists["count"]
    width = slots.shape[1]
    is_used = np.arange(width, dtype=np.uint32) < counts[:, None]
    if (counts > width).any() or ((slots >= len(levels)) & is_used).any():
        return False
    return level == 0 or bool((levels[slots[is_used]] >= level).all())


def _import_usearch() -> Any:
    """Return usearch's module; raise ImportError that says how to install it."""
    return import_optional("usearch.index", extra="ann", purpose="`Retriever(algorithm='hnsw')`")
