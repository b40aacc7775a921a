"""Similarity of rows: types of arrays, unit length, cosine, dot product, results of a search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Floats",
    "Ids",
    "Indices",
    "Ints",
    "PairIndices",
    "Ranking",
    "TopK",
    "Vectors",
    "check_groups",
    "check_index_pairs",
    "check_vectors",
    "iterate_blocks",
    "normalize_rows",
    "paired_cosine",
    "paired_dot",
]

_BLOCK_BYTES = 4 * 2**20

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Indices = Ints  # positions of rows
Ids = npt.NDArray[Any]  # of object (str) or int64
PairIndices = tuple[npt.ArrayLike, npt.ArrayLike]


def iterate_blocks(n: int, dim: int) -> Iterator[slice]:
    """Yield slices of a few MiB that cover n rows of `dim` float32 components."""
    size = max(1, _BLOCK_BYTES // (4 * max(1, dim)))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Ranking(NamedTuple):
    """The candidates of each query, the best first.

    Attributes
    ----------
    indices : list of ndarray of int64, each of shape (n_candidates,)
        Positions in the list that was given; the earlier one first where scores are equal.
    scores : list of ndarray of float32, each of shape (n_candidates,)
        Descending, beside `indices`.
    """

    indices: list[Indices]
    scores: list[Vectors]


class TopK(NamedTuple):
    """The best k documents of each query, in an order that each search states.

    Attributes
    ----------
    scores : ndarray of float32, shape (n_queries, k)
        Descending; NaN where fewer than k documents may be found.
    indices : ndarray of int64, shape (n_queries, k)
        Rows of the corpus; -1 beside a NaN.
    """

    scores: Vectors
    indices: Indices


def normalize_rows(vectors: npt.ArrayLike) -> Vectors:
    """Return a copy with rows of unit length, float32, (n, dim); a row of zeros stays as it is."""
    rows = check_vectors(vectors, name="vectors", owner="normalize_rows")
    # Scaled first, so that squares neither overflow nor underflow in float32.
    high = rows.max(axis=1, initial=0.0, keepdims=True)
    largest = np.maximum(high, -rows.min(axis=1, initial=0.0, keepdims=True))
    unit: Vectors = np.divide(rows, np.where(largest > 0, largest, 1), dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", unit, unit))
    unit /= np.where(norms > 0, norms, np.float32(1))[:, None]
    return unit


def paired_dot(left: npt.ArrayLike, right: npt.ArrayLike) -> Vectors:
    """Return the dot product of each row of `left` with the same row of `right`, float32, (n,).

    Raises TypeError for anything but numbers, ValueError where the shapes differ.
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
    """Return the cosine of each row of `left` and the same row of `right`, (n,); 0 for zeros."""
    return np.clip(paired_dot(normalize_rows(left), normalize_rows(right)), -1, 1)


def check_vectors(
    vectors: npt.ArrayLike, *, name: str, owner: str, dim: int | None = None
) -> Vectors:
    """Return `vectors` as float32, (n, dim); without a copy if they are that already.

    Raises TypeError for anything but numbers, ValueError for another shape or width.
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

    Raises TypeError for anything but a pair of int arrays, ValueError for a wrong length or range.
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
