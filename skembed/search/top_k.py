"""The exact best k of a corpus for each query, in blocks of bounded memory.

`top_k_blocks` holds one block of scores at a time, never the (n_queries, n_corpus) matrix. Its
rules exclude documents, so that search and mining share one implementation; `top_k_rows` does the
same for a corpus that is read block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._validation import check_int
from skembed.similarity import (
    Indices,
    PairIndices,
    TopK,
    Vectors,
    check_groups,
    check_index_pairs,
    check_vectors,
    iterate_blocks,
)

__all__ = ["BLOCK_BYTES", "N_SPARE", "rescore_candidates", "top_k_blocks", "top_k_rows"]

# Scores of a block and scores of single pairs differ in the last bits. Scoring this many more
# candidates as pairs keeps those bits from deciding what is found.
N_SPARE = 16


def rescore_candidates(
    queries: Vectors,
    candidates: Indices,
    read_rows: Callable[[Indices], Vectors],
    ranks: Indices,
    top_k: int,
) -> TopK:
    """Return the best `top_k` of each query's own candidates (n_queries, n), scored pair by pair.

    A score depends on one query and one document alone. Of equal scores the document with the
    higher rank comes first. `read_rows` takes rows and returns their vectors as float32,
    (n_rows, dim).
    """
    flat = np.empty(candidates.size, dtype=np.float32)
    flat_rows, width = candidates.ravel(), candidates.shape[1]
    for block in iterate_blocks(candidates.size, queries.shape[1]):
        pair_queries = queries[np.arange(block.start, block.stop) // width]
        np.einsum("nd,nd->n", pair_queries, read_rows(flat_rows[block]), out=flat[block])
    scores = flat.reshape(candidates.shape)
    order = np.lexsort((-ranks[candidates], -scores), axis=1)[:, :top_k]
    return TopK(
        np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)
    )


BLOCK_BYTES = 64 * 2**20

# What one score of a block costs at its peak: the score (4), masks (3) and, for the share that is
# picked out, position, row, column, key and a copy of each (80 / 16), rounded up.
_BYTES_PER_SCORE = 16
# What one of the best k of a query costs: its key, the keys that wait for a merge, their copies.
_BYTES_PER_KEY = 96
# A product this wide runs at full speed, and its scores are compared while they are in the cache.
_MIN_COLUMNS = 1024
# Below this share of scores above the floor, it is faster to pick them out one by one.
_SPARSE_SHARE = 1 / 16
# Keys that are merged at once.
_MERGED_KEYS = 2**15

# A key is a score and its index in one int64: comparing keys compares scores, then lower indices.
_LOW_HALF = 0xFFFFFFFF
_NO_KEY = np.iinfo(np.int64).min  # below every key; its score decodes to NaN
_MAGNITUDE = np.int32(0x7FFFFFFF)


@dataclass(frozen=True)
class _Rules:
    """Limits on the scores of one block of queries: the arguments of `top_k_blocks`, cut to it."""

    max_scores: Vectors | None
    query_groups: Indices | None
    corpus_groups: Indices | None
    excluded_rows: Indices | None  # both sorted by column
    excluded_columns: Indices | None

    def apply(self, allowed: npt.NDArray[np.bool_], scores: Vectors, columns: slice) -> None:
        """Clear in `allowed` (B, C) what the rules forbid."""
        if self.max_scores is not None:
            allowed &= scores <= self.max_scores[:, None]
        if self.query_groups is not None and self.corpus_groups is not None:
            allowed &= self.query_groups[:, None] != self.corpus_groups[None, columns]
        if self.excluded_rows is not None and self.excluded_columns is not None:
            first, last = np.searchsorted(self.excluded_columns, (columns.start, columns.stop))
            inside = self.excluded_columns[first:last] - columns.start
            allowed[self.excluded_rows[first:last], inside] = False


def top_k_blocks(
    queries: npt.ArrayLike,
    corpus: npt.ArrayLike,
    k: int,
    *,
    max_scores: npt.ArrayLike | None = None,
    excluded: PairIndices | None = None,
    query_groups: npt.ArrayLike | None = None,
    corpus_groups: npt.ArrayLike | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> TopK:
    """Return the k rows of `corpus` with the highest dot product for each query, exactly.

    Equal scores come by lower row; what cannot be filled holds NaN and -1. A query finds nothing
    above its `max_scores`; no row of its own group, where group -1 is none; and not the rows
    ``indices[indptr[i] : indptr[i + 1]]`` of `excluded`, (indptr, indices) as in a CSR matrix. A
    score that is NaN is never found. Raises TypeError and ValueError for wrong arguments.

    Beside the inputs and the result, memory stays below `block_bytes` for any number of queries and
    documents. The exceptions are the excluded pairs of one block of queries (24 bytes each), and k
    so large that a single query needs more (32 bytes times k).

    Scores are computed in float32. Another block size may change their last bit, and with it the
    order of rows that are equal but for that bit.
    """
    owner = "top_k_blocks"
    queries = check_vectors(queries, name="queries", owner=owner)
    corpus = check_vectors(corpus, name="corpus", owner=owner, dim=queries.shape[1])
    k = check_int(k, name="k", owner=owner, low=1)
    block_bytes = check_int(block_bytes, name="block_bytes", owner=owner, low=1)
    n, m = len(queries), len(corpus)
    limits = _check_max_scores(max_scores, n, owner=owner)
    pairs = check_index_pairs(excluded, name="excluded", owner=owner, n_rows=n, n_columns=m)
    groups = check_groups(
        query_groups, corpus_groups, names=("query_groups", "corpus_groups"), owner=owner, n=n, m=m
    )
    scores = np.full((n, k), np.nan, dtype=np.float32)
    indices = np.full((n, k), -1, dtype=np.int64)
    n_rows, n_columns = _choose_block(n, m, k, block_bytes=block_bytes)
    for rows in _iterate_slices(n, n_rows):
        rules = _cut_rules(rows, limits, pairs, groups)
        keys = _find_keys(queries[rows], corpus.__getitem__, m, k, rules=rules, n_columns=n_columns)
        scores[rows], indices[rows] = _unpack_keys(keys)
    return TopK(scores, indices)


def top_k_rows(
    queries: Vectors,
    read_rows: Callable[[slice], Vectors],
    ranks: Indices,
    k: int,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> TopK:
    """Return the best k rows of a corpus that is read in blocks; k is in [1, n_corpus].

    As `top_k_blocks`, but of equal scores the row with the higher rank comes first; `ranks` is a
    permutation of 0 ... n_corpus - 1. `read_rows` takes a slice and returns its rows as float32,
    (n_rows, dim), which may take `block_bytes` once more.
    """
    n, m = len(queries), len(ranks)
    rows_by_rank = np.empty(m + 1, dtype=np.int64)
    rows_by_rank[ranks], rows_by_rank[m] = np.arange(m), -1
    scores = np.empty((n, k), dtype=np.float32)
    indices = np.empty((n, k), dtype=np.int64)
    n_rows, n_columns = _choose_block(n, m, k, block_bytes=block_bytes)
    n_columns = max(1, min(n_columns, block_bytes // (4 * max(1, queries.shape[1]))))
    for rows in _iterate_slices(n, n_rows):
        keys = _find_keys(queries[rows], read_rows, m, k, n_columns=n_columns, ranks=ranks)
        scores[rows] = _unpack_keys(keys)[0]
        indices[rows] = rows_by_rank[np.where(keys == _NO_KEY, m, keys & _LOW_HALF)]
    return TopK(scores, indices)


def _check_max_scores(values: npt.ArrayLike | None, n: int, *, owner: str) -> Vectors | None:
    """Return the bounds of the scores as float32, (n,)."""
    if values is None:
        return None
    subject = f"The `max_scores` parameter of `{owner}`"
    array: npt.NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{subject} must be an array of numbers; got dtype {array.dtype}.")
    if array.shape != (n,):
        raise ValueError(f"{subject} must be of shape ({n},); got shape {array.shape}.")
    return array.astype(np.float32, copy=False)


def _choose_block(n: int, m: int, k: int, *, block_bytes: int) -> tuple[int, int]:
    """Return how many queries and how many rows of the corpus make up a block."""
    budget = max(1, block_bytes - 24 * _MERGED_KEYS) // _BYTES_PER_SCORE  # in scores
    best = _BYTES_PER_KEY // _BYTES_PER_SCORE * k
    n_columns = max(1, min(m, budget, max(_MIN_COLUMNS, 2 * k)))
    n_rows = max(1, min(n, budget // (n_columns + best)))
    n_rows = -(-n // -(-n // n_rows)) if n else 1  # blocks of equal size
    # Few queries leave room for wider blocks.
    return n_rows, max(n_columns, min(m, budget // n_rows - best, _MERGED_KEYS))


def _iterate_slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(n)."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _cut_rules(
    rows: slice,
    limits: Vectors | None,
    pairs: tuple[Indices, Indices] | None,
    groups: tuple[Indices, Indices] | None,
) -> _Rules:
    """Return the rules of one block of queries."""
    excluded_rows = excluded_columns = None
    if pairs is not None:
        indptr, indices = pairs[0][rows.start : rows.stop + 1], pairs[1]
        columns = indices[indptr[0] : indptr[-1]]
        order = np.argsort(columns, kind="stable")
        excluded_columns = columns[order]
        excluded_rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[order]
    query_groups = corpus_groups = None
    if groups is not None:
        query_groups, corpus_groups = groups[0][rows].copy(), groups[1]
        query_groups[query_groups < 0] = np.iinfo(np.int64).min  # equal to no group of the corpus
    limits = None if limits is None else limits[rows]
    return _Rules(limits, query_groups, corpus_groups, excluded_rows, excluded_columns)


def _find_keys(
    queries: Vectors,
    read_rows: Callable[[slice], Vectors],
    m: int,
    k: int,
    *,
    n_columns: int,
    rules: _Rules | None = None,
    ranks: Indices | None = None,
) -> Indices:
    """Return the k largest keys of each query of one block, descending, (B, k)."""
    best = _BestKeys(len(queries), k, keep_equal=ranks is not None)
    buffer = np.empty(len(queries) * min(n_columns, m), dtype=np.float32)
    for columns in _iterate_slices(m, n_columns):
        shape = len(queries), columns.stop - columns.start
        scores = buffer[: shape[0] * shape[1]].reshape(shape)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN is never found
            np.matmul(queries, read_rows(columns).T, out=scores)  # (B, C)
        allowed = best.compare(scores)
        if rules is not None:
            rules.apply(allowed, scores, columns)
        if ranks is None:
            low_halves = np.arange(_LOW_HALF - columns.start, _LOW_HALF - columns.stop, -1)
        else:
            low_halves = ranks[columns]
        best.add(scores, allowed, low_halves)
    best.merge()
    best.keys.sort(axis=1)
    return best.keys[:, ::-1]


class _BestKeys:
    """The k largest keys of each of n queries so far, the smallest in front; (n, k).

    Keys above the floor (the score of a query's k-th key at the last merge) wait until a merge
    pays, so that one block of scores costs little more than one comparison.
    """

    def __init__(self, n: int, k: int, *, keep_equal: bool) -> None:
        self.keys = np.full((n, k), _NO_KEY, dtype=np.int64)
        # With ranks, a later row may precede an earlier one of equal score; without, never.
        self._compare = np.greater_equal if keep_equal else np.greater
        self._lowest = np.finfo(np.float32).min if keep_equal else np.float32(-np.inf)
        self._floor = np.full(n, self._lowest, dtype=np.float32)
        self._waiting: list[tuple[Indices, Indices]] = []
        self._n_waiting = 0

    def compare(self, scores: Vectors) -> npt.NDArray[np.bool_]:
        """Return which scores (n, C) may be among the best; NaN is not."""
        mask: npt.NDArray[np.bool_] = self._compare(scores, self._floor[:, None])
        return mask

    def add(self, scores: Vectors, allowed: npt.NDArray[np.bool_], low_halves: Indices) -> None:
        """Add the allowed scores (n, C) of the rows with these lower halves (C,)."""
        n_allowed = int(np.count_nonzero(allowed))
        if n_allowed > _SPARSE_SHARE * allowed.size:
            self.merge()
            self._merge_all(scores, allowed, low_halves)
        elif n_allowed:
            positions = np.flatnonzero(allowed)
            rows, columns = np.divmod(positions, allowed.shape[1])
            keys = np.empty(n_allowed, dtype=np.int64)
            _pack_keys(scores.ravel()[positions], low_halves[columns], out=keys)
            self._waiting.append((rows, keys))
            self._n_waiting += n_allowed
            if self._n_waiting > self.keys.size // 2:
                self.merge()

    def merge(self) -> None:
        """Merge the waiting keys."""
        if not self._waiting:
            return
        rows, keys = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        order = np.argsort(rows, kind="stable")
        rows, keys = rows[order], keys[order]
        starts = np.searchsorted(rows, np.arange(len(self.keys) + 1))
        n, k = self.keys.shape
        for block in _iterate_slices(n, max(1, _MERGED_KEYS // (k + int(np.diff(starts).max())))):
            part = slice(int(starts[block.start]), int(starts[block.stop]))
            widths = np.diff(starts[block.start : block.stop + 1])
            shape = len(widths), k + int(widths.max())
            merged = np.full(shape, _NO_KEY, dtype=np.int64)
            columns = k + np.arange(part.start, part.stop) - np.repeat(starts[block], widths)
            merged[rows[part] - block.start, columns] = keys[part]
            self._keep_largest(block, merged)

    def _merge_all(
        self, scores: Vectors, allowed: npt.NDArray[np.bool_], low_halves: Indices
    ) -> None:
        """Merge every allowed score at once, block of queries by block."""
        (n, k), width = self.keys.shape, scores.shape[1]
        for block in _iterate_slices(n, max(1, _MERGED_KEYS // (k + width))):
            merged = np.empty((block.stop - block.start, k + width), dtype=np.int64)
            _pack_keys(scores[block], low_halves, out=merged[:, k:])
            np.copyto(merged[:, k:], _NO_KEY, where=~allowed[block])
            self._keep_largest(block, merged)

    def _keep_largest(self, block: slice, merged: Indices) -> None:
        """Keep the k largest of `merged` (B, k + width), whose first k columns are still free."""
        k = self.keys.shape[1]
        merged[:, :k] = self.keys[block]
        merged.partition(merged.shape[1] - k, axis=1)
        self.keys[block] = merged[:, -k:]
        floor = _unpack_keys(self.keys[block, :1])[0][:, 0]
        np.copyto(floor, self._lowest, where=np.isnan(floor))
        self._floor[block] = floor


def _pack_keys(scores: Vectors, low_halves: Indices, *, out: Indices) -> None:
    """Write to `out` the keys of scores, (C,) or (B, C), with the lower halves, (C,)."""
    # The bits of floats sort like ints, except for negative floats, whose order is reversed.
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0, its equal
    flips = bits >> 31
    flips &= _MAGNITUDE
    bits ^= flips
    out[...] = bits
    out <<= 32
    out |= low_halves


def _unpack_keys(keys: Indices) -> tuple[Vectors, Indices]:
    """Return the scores and the indices of keys, NaN and -1 where there is no key."""
    bits = (keys >> 32).astype(np.int32)
    bits ^= (bits >> 31) & _MAGNITUDE
    indices = _LOW_HALF - (keys & _LOW_HALF)
    indices[keys == _NO_KEY] = -1
    return bits.view(np.float32), indices
