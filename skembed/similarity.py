"""Similarity of rows: unit length, row by row, and the exact best k of a corpus in blocks.

`top_k_blocks` holds one block of scores at a time, never the (n_queries, n_corpus) matrix. It also
takes rules about which documents may be found, so that search and mining share one implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._validation import check_int

__all__ = [
    "BLOCK_BYTES",
    "PairIndices",
    "TopK",
    "check_groups",
    "check_index_pairs",
    "check_vectors",
    "normalize_rows",
    "paired_cosine",
    "paired_dot",
    "top_k_blocks",
]

BLOCK_BYTES = 64 * 2**20

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
PairIndices = tuple[npt.ArrayLike, npt.ArrayLike]

# What one score of a block costs at its peak: the score (4), its key (8), the key's parts (16, for
# a single query) and masks (2), rounded up.
_BYTES_PER_SCORE = 32
# A first block this wide gives each query a floor that most later scores do not reach.
_MIN_COLUMNS = 2048
# Below this share of scores above the floor, it is faster to pick them out one by one.
_SPARSE_SHARE = 1 / 8

# A key is a score and its index in one int64: comparing keys compares scores, then lower indices.
_LOW_HALF = 0xFFFFFFFF
_NO_KEY = np.iinfo(np.int64).min  # below every key; its score decodes to NaN
_MAGNITUDE = np.int32(0x7FFFFFFF)


class TopK(NamedTuple):
    """The best k documents of each query.

    Attributes
    ----------
    scores : ndarray of float32, shape (n_queries, k)
        Descending; NaN where fewer than k documents may be found.
    indices : ndarray of int64, shape (n_queries, k)
        Rows of the corpus, the lower one first where scores are equal; -1 beside a NaN.
    """

    scores: Vectors
    indices: Indices


@dataclass(frozen=True)
class _Rules:
    """Which scores of one block of queries count; arrays as `top_k_blocks` got them, cut to it."""

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


def normalize_rows(vectors: npt.ArrayLike) -> Vectors:
    """Return a copy with rows of unit length.

    Parameters
    ----------
    vectors : array-like of float, shape (n, dim)
        Any vectors; a row of zeros stays as it is.

    Returns
    -------
    ndarray of float32, shape (n, dim)
        In input order, rows of unit or zero length.

    Raises
    ------
    TypeError, ValueError
        If `vectors` is no two-dimensional array of numbers.

    Examples
    --------
    >>> from skembed.similarity import normalize_rows
    >>> normalize_rows([[3.0, 4.0], [0.0, 0.0]])
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    found = check_vectors(vectors, name="vectors", owner="normalize_rows")
    # Scaled first, so that squares neither overflow nor vanish in float32.
    high = found.max(axis=1, initial=0.0, keepdims=True)
    largest = np.maximum(high, -found.min(axis=1, initial=0.0, keepdims=True))
    unit: Vectors = np.divide(found, np.where(largest > 0, largest, 1), dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", unit, unit))
    unit /= np.where(norms > 0, norms, np.float32(1))[:, None]
    return unit


def paired_dot(left: npt.ArrayLike, right: npt.ArrayLike) -> Vectors:
    """Return the dot product of each row of `left` with the same row of `right`.

    Parameters
    ----------
    left, right : array-like of float, shape (n, dim)
        Vectors of equal shape.

    Returns
    -------
    ndarray of float32, shape (n,)
        One score a row; the cosine similarity where rows have unit length.

    Raises
    ------
    TypeError, ValueError
        If one is no two-dimensional array of numbers, or the shapes differ.

    Examples
    --------
    >>> from skembed.similarity import paired_dot
    >>> paired_dot([[1.0, 2.0]], [[3.0, 4.0]])
    array([11.], dtype=float32)
    """
    left = check_vectors(left, name="left", owner="paired_dot")
    right = check_vectors(right, name="right", owner="paired_dot")
    if left.shape != right.shape:
        raise ValueError(
            f"The `right` parameter of `paired_dot` must be of the shape of `left`, {left.shape}; "
            f"got {right.shape}."
        )
    return np.einsum("nd,nd->n", left, right)


def paired_cosine(left: npt.ArrayLike, right: npt.ArrayLike) -> Vectors:
    """Return the cosine similarity of each row of `left` with the same row of `right`.

    Parameters
    ----------
    left, right : array-like of float, shape (n, dim)
        Vectors of equal shape and any length; a row of zeros is as similar as 0 to all.

    Returns
    -------
    ndarray of float32, shape (n,)
        One score in [-1, 1] a row.

    Raises
    ------
    TypeError, ValueError
        If one is no two-dimensional array of numbers, or the shapes differ.

    Examples
    --------
    >>> from skembed.similarity import paired_cosine
    >>> paired_cosine([[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [5.0, 0.0]])
    array([0., 1.], dtype=float32)
    """
    return np.clip(paired_dot(normalize_rows(left), normalize_rows(right)), -1, 1)


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
    """Find the k rows of `corpus` with the highest dot product for each query, exactly.

    Parameters
    ----------
    queries : array-like of float, shape (n_queries, dim)
        Unit vectors, if cosine similarity is meant. float32 is used in place; another type is
        copied once.
    corpus : array-like of float, shape (n_corpus, dim)
        The rows to search.
    k : int
        How many to find; may exceed `n_corpus`.
    max_scores : array-like of float, shape (n_queries,), optional
        Highest score that still counts, per query. What scores above it is not found.
    excluded : (indptr, indices), optional
        Pairs that are not found, as in a CSR matrix: query i never finds the rows
        ``indices[indptr[i] : indptr[i + 1]]`` of the corpus, in any order.
    query_groups : array-like of int, shape (n_queries,), optional
        Group of each query. A query finds no row of its own group; -1 is of no group.
    corpus_groups : array-like of int, shape (n_corpus,), optional
        Group of each row of the corpus; given together with `query_groups`.
    block_bytes : int, default=67108864
        Bound on the working memory in bytes.

    Returns
    -------
    TopK
        `scores` and `indices`, each of shape (n_queries, k), descending, equal scores by lower
        index. Places that cannot be filled hold NaN and -1.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range.

    Notes
    -----
    Beside the inputs and the result, memory stays below `block_bytes` for any number of queries
    and documents. The exceptions are the excluded pairs of one block of queries (24 bytes each),
    and k so large that a single query needs more (32 bytes times k).

    A score that is NaN is never found, so a query with NaN finds nothing.

    Scores are computed in float32. Another block size may change their last bit, and with it the
    order of rows that are equal but for that bit.

    Examples
    --------
    >>> from skembed.similarity import top_k_blocks
    >>> found = top_k_blocks([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], 2)
    >>> found.indices, found.scores
    (array([[1, 2]]), array([[1. , 0.6]], dtype=float32))
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
        keys = _find_keys(queries[rows], corpus, k, rules=rules, n_columns=n_columns)
        scores[rows], indices[rows] = _unpack_keys(keys)
    return TopK(scores, indices)


def check_vectors(
    vectors: npt.ArrayLike, *, name: str, owner: str, dim: int | None = None
) -> Vectors:
    """Return `vectors` as float32, (n, dim); without a copy if they are that already.

    Raises TypeError for what holds no numbers, ValueError for another shape or width.

    >>> from skembed.similarity import check_vectors
    >>> check_vectors([[1, 2]], name="queries", owner="top_k_blocks")
    array([[1., 2.]], dtype=float32)
    """
    subject = f"The `{name}` parameter of `{owner}`"
    if hasattr(vectors, "tocsr"):
        raise TypeError(
            f"{subject} must be a dense array of shape (n, dim); got a sparse matrix. "
            "Reduce it first, for example with TruncatedSVD."
        )
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{subject} must be an array of numbers; got dtype {array.dtype}.")
    if array.ndim != 2:
        raise ValueError(f"{subject} must be an array of shape (n, dim); got shape {array.shape}.")
    if dim is not None and array.shape[1] != dim:
        raise ValueError(
            f"{subject} must have {dim} columns, as many as the vectors it is compared with; "
            f"got {array.shape[1]}."
        )
    return array.astype(np.float32, copy=False)


def check_index_pairs(
    pairs: PairIndices | None, *, name: str, owner: str, n_rows: int, n_columns: int
) -> tuple[Indices, Indices] | None:
    """Return (indptr, indices) of a CSR-like set of pairs as int64, checked against the sizes.

    Raises TypeError for what is no pair of int arrays, ValueError for a wrong length or range.

    >>> from skembed.similarity import check_index_pairs
    >>> check_index_pairs(([0, 1], [4]), name="excluded", owner="f", n_rows=1, n_columns=5)
    (array([0, 1]), array([4]))
    """
    if pairs is None:
        return None
    subject = f"The `{name}` parameter of `{owner}`"
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
        raise TypeError(f"{subject} must be a pair of arrays (indptr, indices).")
    indptr = _check_ints(pairs[0], subject=f"{subject}: `indptr`", size=n_rows + 1)
    indices = _check_ints(pairs[1], subject=f"{subject}: `indices`")
    if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"{subject} must have an `indptr` that rises from 0 to the number of indices, "
            f"{len(indices)}; got one from {indptr[0]} to {indptr[-1]}."
        )
    if len(indices) and not (0 <= indices.min() and indices.max() < n_columns):
        raise ValueError(
            f"{subject} must have `indices` in [0, {n_columns - 1}]; "
            f"got [{indices.min()}, {indices.max()}]."
        )
    return indptr, indices


def check_groups(
    row_groups: npt.ArrayLike | None,
    column_groups: npt.ArrayLike | None,
    *,
    names: tuple[str, str],
    owner: str,
    n: int,
    m: int,
) -> tuple[Indices, Indices] | None:
    """Return the groups of n rows and m columns as int64, or None where there are none.

    Raises TypeError for what is not int, ValueError for a wrong length or only one of the two.

    >>> from skembed.similarity import check_groups
    >>> check_groups([0], [1, -1], names=("left", "right"), owner="f", n=1, m=2)
    (array([0]), array([ 1, -1]))
    """
    if row_groups is None and column_groups is None:
        return None
    if row_groups is None or column_groups is None:
        absent, given = names if row_groups is None else names[::-1]
        raise ValueError(
            f"The `{absent}` parameter of `{owner}` must be given together with `{given}`; "
            "got None."
        )
    subjects = [f"The `{name}` parameter of `{owner}`" for name in names]
    return (
        _check_ints(row_groups, subject=subjects[0], size=n),
        _check_ints(column_groups, subject=subjects[1], size=m),
    )


def _check_ints(values: npt.ArrayLike, *, subject: str, size: int | None = None) -> Indices:
    """Return a one-dimensional int array as int64, of `size` if given."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{subject} must be an array of int; got dtype {array.dtype}.")
    if array.ndim != 1 or (size is not None and len(array) != size):
        expected = "(n,)" if size is None else f"({size},)"
        raise ValueError(f"{subject} must be of shape {expected}; got shape {array.shape}.")
    return array.astype(np.int64, copy=False)


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
    """Return how many queries and how many rows of the corpus make a block."""
    budget = max(1, block_bytes // _BYTES_PER_SCORE)  # in scores
    # The best k so far are merged with each block, so a block narrower than k would be waste.
    n_columns = max(1, min(m, budget, max(_MIN_COLUMNS, 8 * k)))
    n_rows = max(1, min(n, budget // (n_columns + k)))
    # Few queries leave room for wider blocks.
    n_columns = max(1, min(m, budget // n_rows - k)) if budget // n_rows > k else n_columns
    return n_rows, n_columns


def _iterate_slices(n: int, size: int) -> Iterator[slice]:
    """Cut range(n) into slices of at most `size`."""
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
    queries: Vectors, corpus: Vectors, k: int, *, rules: _Rules, n_columns: int
) -> Indices:
    """Return the k largest keys of each query of one block, descending, (B, k)."""
    best = np.full((len(queries), k), _NO_KEY, dtype=np.int64)
    floor = np.full(len(queries), -np.inf, dtype=np.float32)
    for columns in _iterate_slices(len(corpus), n_columns):
        with np.errstate(invalid="ignore", over="ignore"):  # the NaN that follow are never found
            scores = queries @ corpus[columns].T  # (B, C)
        # Strictly above: of equal scores the earlier row stays. NaN is above nothing.
        allowed = scores > floor[:, None]
        rules.apply(allowed, scores, columns)
        best = _merge_block(best, scores, allowed, columns.start)
        floor = _unpack_keys(best[:, :1])[0][:, 0]
        np.copyto(floor, -np.inf, where=np.isnan(floor))
    best.sort(axis=1)
    return best[:, ::-1]


def _merge_block(
    best: Indices, scores: Vectors, allowed: npt.NDArray[np.bool_], first: int
) -> Indices:
    """Return the k largest of `best` and the allowed scores as keys, the smallest in front."""
    n, k = best.shape
    n_allowed = np.count_nonzero(allowed)
    if not n_allowed:
        return best
    if n_allowed > _SPARSE_SHARE * allowed.size:
        merged = np.empty((n, k + scores.shape[1]), dtype=np.int64)
        last = _LOW_HALF - first
        _pack_keys(scores, np.arange(last, last - scores.shape[1], -1), out=merged[:, k:])
        np.copyto(merged[:, k:], _NO_KEY, where=~allowed)
    else:
        rows, columns = np.nonzero(allowed)
        counts = np.bincount(rows, minlength=n)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        merged = np.full((n, k + int(counts.max())), _NO_KEY, dtype=np.int64)
        keys = np.empty(len(rows), dtype=np.int64)
        _pack_keys(scores[rows, columns], _LOW_HALF - first - columns, out=keys)
        merged[rows, k + places] = keys
    merged[:, :k] = best
    merged.partition(merged.shape[1] - k, axis=1)
    return merged[:, -k:].copy()  # a view would keep the whole block alive


def _pack_keys(scores: Vectors, low_halves: Indices, *, out: Indices) -> None:
    """Write to `out` the keys of scores, (C,) or (B, C), with the lower halves, (C,)."""
    # The bits of floats sort like ints, but for the negative ones, whose order is reversed.
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
