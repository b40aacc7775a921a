"""The documents of a retriever: ids, stored vectors, and the search among them.

A search has two steps. The first finds candidates by the stored vectors: by all of them, or by
those that a graph proposes. The second scores each candidate as one pair, from the finest vectors
available, and sorts by score and id, so that a result depends on query and document alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skembed._files import check_fields
from skembed.search.gpu import top_k_rows_on_device
from skembed.search.hnsw import HnswGraph
from skembed.search.index_file import Array, SavedIndex, pack_strings, unpack_strings
from skembed.search.saved_array import SavedArray
from skembed.search.stored_vectors import STORAGE_KINDS, StoredVectors
from skembed.search.top_k import N_SPARE, rescore_candidates, top_k_rows
from skembed.similarity import Ids, Indices, TopK, Vectors, iterate_blocks, normalize_rows

__all__ = ["Array", "DocumentIndex", "prepare_vectors"]

_BLOCK_BYTES = 32 * 2**20
_DEVICE_BLOCK_BYTES = 512 * 2**20
# How far from 1 the length of float32 vectors may be after scaling.
_UNIT_TOLERANCE = 1e-6


class DocumentIndex:
    """Documents that can be searched, added and removed."""

    def __init__(
        self,
        ids: Ids,
        stored: StoredVectors,
        fine: StoredVectors | None = None,
        graph: HnswGraph | None = None,
        labels: Indices | None = None,
        next_label: int | None = None,
    ) -> None:
        self.stored = stored  # what every query is compared with
        self.fine = fine  # a finer copy, for scores
        self.graph = graph  # an approximate index over `labels`
        # Ascending numbers, never used again after a removal.
        self.labels = np.arange(len(ids), dtype=np.int64) if labels is None else labels
        self.next_label = len(ids) if next_label is None else next_label
        self._set_ids(ids)

    @classmethod
    def build(
        cls, ids: Ids, vectors: Vectors, *, storage: str, rescore_storage: str | None, hnsw: bool
    ) -> DocumentIndex:
        """Return an index that stores vectors (n, dim), with a graph over them if `hnsw`."""
        stored = StoredVectors.encode(vectors, storage)
        fine = None if rescore_storage is None else StoredVectors.encode(vectors, rescore_storage)
        index = cls(ids, stored, fine, HnswGraph(stored.dim) if hnsw else None)
        if index.graph is not None:
            index.graph.add(index.labels, StoredVectors.encode(vectors, "float32"))
        return index

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Vectors, top_k: int, *, rescore: int, device: torch.device) -> TopK:
        """Return the best documents of each query, (n_queries, top_k); top_k <= n.

        Of equal scores the higher id comes first.
        """
        factor = rescore if self.fine is not None or self.graph is not None else 1
        n = min(len(self.ids), factor * top_k + N_SPARE)
        if self.graph is None:
            candidates = self._find_exactly(queries, n, device=device)  # (Q, n)
        else:
            candidates = self._find_by_graph(self.graph, queries, n, device=device)
        finest = self.stored if self.fine is None else self.fine
        return rescore_candidates(queries, candidates, finest.read_rows, self._ranks, top_k)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Append documents; an error leaves the documents as they were."""
        stored = self.stored.append(vectors)
        fine = None if self.fine is None else self.fine.append(vectors)
        labels = np.arange(self.next_label, self.next_label + len(ids), dtype=np.int64)
        if self.graph is not None:
            try:
                self.graph.add(labels, StoredVectors.encode(vectors, "float32"))
            except BaseException:
                self.graph.remove(labels)  # those that it took before it failed
                raise
        self._set_ids(np.concatenate([self.ids, ids]))
        self.stored, self.fine = stored, fine
        self.labels, self.next_label = (
            np.concatenate([self.labels, labels]),
            self.next_label + len(ids),
        )

    def remove(self, positions: Indices) -> None:
        """Remove the documents at these positions."""
        mask = np.ones(len(self), dtype=np.bool_)
        mask[positions] = False
        stored = self.stored.select(mask)
        fine = None if self.fine is None else self.fine.select(mask)
        if self.graph is not None:
            self.graph.remove(self.labels[~mask])
        self._set_ids(self.ids[mask])
        self.stored, self.fine, self.labels = stored, fine, self.labels[mask]

    def pack(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return settings and arrays, from which `unpack` restores the index."""
        parts = {"stored": self.stored}
        if self.fine is not None:
            parts["fine"] = self.fine
        kinds = {part: vectors.kind for part, vectors in parts.items()}
        arrays: dict[str, Array] = {"labels": self.labels}
        arrays |= pack_strings(self.ids) if self.ids.dtype == object else {"ids": self.ids}
        for part, vectors in parts.items():
            arrays |= {f"{part}.{k}": array for k, array in vectors.check().arrays.items()}
        if self.graph is not None:
            arrays["graph"] = self.graph.to_array()
        # "n_seen" is the name of `next_label` in the manifests of saved indexes.
        return {"kinds": kinds, "dim": self.stored.dim, "n_seen": self.next_label}, arrays

    @classmethod
    def unpack(cls, saved: SavedIndex) -> DocumentIndex:
        """Return the index that `pack` took apart; raise ValueError where parts do not fit."""
        fields = {"kinds": dict, "dim": int, "n_seen": int}
        settings = check_fields(saved.settings, fields, subject="its settings", error=saved.damaged)
        dim, next_label = settings["dim"], settings["n_seen"]
        is_text = "ids" not in saved.arrays
        packed = {"characters": "u1", "ends": "i8"} if is_text else {"ids": "i8"}
        read = {name: saved.read(name, dtype) for name, dtype in packed.items()}
        labels = saved.read("labels", "i8")
        data = saved.read("graph", "u1") if "graph" in saved.arrays else None
        try:
            ids = unpack_strings(**read) if is_text else np.array(read["ids"])
            _check_labels(labels, len(ids), next_label)
            parts = _open_parts(settings["kinds"], dim, len(ids), saved.arrays)
            graph = None if data is None else HnswGraph.read(data, dim, labels)
        except ValueError as error:
            raise saved.damaged(str(error)) from error
        index = cls(ids, parts["stored"], parts.get("fine"), graph, labels, next_label)
        if index._has_equal_ids():
            raise saved.damaged("it has an id twice")
        return index

    def _set_ids(self, ids: Ids) -> None:
        """Set the ids, and the rank of each in ascending order."""
        ranks = np.arange(len(ids), dtype=np.int64)
        if ids.dtype == object or not _is_ascending(ids):
            ranks[np.argsort(ids, kind="stable")] = ranks.copy()
        self.ids, self._ranks = ids, ranks

    def _has_equal_ids(self) -> bool:
        """Return whether two documents have the same id."""
        if self.ids.dtype == object:
            return len(set(self.ids.tolist())) < len(self.ids)
        return not _is_ascending(self.ids) and not _is_ascending(np.sort(self.ids))

    def _find_by_graph(
        self, graph: HnswGraph, queries: Vectors, n: int, *, device: torch.device
    ) -> Indices:
        """Return the rows that a graph finds for the best n of each query, (n_queries, n)."""
        labels = graph.search(queries, n)
        rows = np.minimum(np.searchsorted(self.labels, labels), len(self.ids) - 1)
        # Queries for which the graph found too few are searched exactly.
        incomplete = (self.labels[rows] != labels).any(axis=1)
        rows[incomplete] = self._find_exactly(queries[incomplete], n, device=device)
        return rows

    def _find_exactly(self, queries: Vectors, n: int, *, device: torch.device) -> Indices:
        """Return the rows of the best n documents by the stored vectors, (n_queries, n)."""
        read, ranks = self.stored.read_rows, self._ranks
        if device.type == "cpu":
            return top_k_rows(queries, read, ranks, n, block_bytes=_BLOCK_BYTES).indices
        return top_k_rows_on_device(
            queries, read, ranks, n, device=device, block_bytes=_DEVICE_BLOCK_BYTES
        ).indices


def _check_labels(labels: Indices, n: int, next_label: int) -> None:
    """Raise ValueError unless these are n ascending labels below `next_label`."""
    ends = [0, int(labels[0]), int(labels[-1]) + 1] if len(labels) else [0]
    if len(labels) != n or sorted(ends) != ends or not ends[-1] <= next_label < 2**62:
        raise ValueError(f"it has {len(labels)} labels below {next_label} for {n} documents")
    if not _is_ascending(labels):
        raise ValueError("its labels do not ascend")


def _is_ascending(numbers: Indices) -> bool:
    """Return whether each number is above the one before."""
    return bool((numbers[1:] > numbers[:-1]).all())


def _open_parts(
    kinds: dict[str, Any], dim: int, n: int, saved: Mapping[str, SavedArray]
) -> dict[str, StoredVectors]:
    """Return the stored vectors and their finer copy; ValueError if arrays are none of an index."""
    if not {"stored"} <= set(kinds) <= {"stored", "fine"}:
        raise ValueError(f"it holds {sorted(kinds)} instead of stored vectors")
    parts, others = {}, {*saved} - {"ids", "characters", "ends", "labels", "graph", "probe"}
    for part, kind in kinds.items():
        if kind not in STORAGE_KINDS:
            raise ValueError(f"its {part} vectors are {kind!r:.40}, not one of {STORAGE_KINDS}")
        names = {name for name in others if name.startswith(f"{part}.")}
        own = {name.removeprefix(f"{part}."): saved[name] for name in names}
        parts[part] = StoredVectors.open(kind, dim, n, own)
        others -= names
    if others:
        raise ValueError(f"it holds {sorted(others)}, which are no part of an index")
    return parts


def prepare_vectors(vectors: npt.ArrayLike, similarity: str, *, owner: str) -> Vectors:
    """Return vectors as float32, of unit length for "cosine"; a copy only where they change.

    Raises ValueError where float32 cannot hold a value.
    """
    with np.errstate(over="ignore"):
        prepared = np.ascontiguousarray(vectors, dtype=np.float32)
    is_unit = True
    for rows in iterate_blocks(*prepared.shape):
        block = prepared[rows]
        if not np.isfinite(block).all():
            row = rows.start + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise ValueError(
                f"The embeddings of `{owner}` must be finite in float32; that of row {row} is not. "
                "Scale them down."
            )
        if similarity == "cosine" and is_unit:
            squares = np.einsum("nd,nd->n", block, block, dtype=np.float64)
            is_unit = bool((np.abs(squares - 1) <= 2 * _UNIT_TOLERANCE).all())
    if is_unit:
        return prepared
    unit = np.empty_like(prepared)
    for rows in iterate_blocks(*prepared.shape):
        unit[rows] = normalize_rows(prepared[rows])
    return unit
