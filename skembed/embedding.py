"""The one way from any encoder to vectors: `embed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._inputs import MISSING_POLICIES, check_texts

__all__ = [
    "FloatArray",
    "check_pair_columns",
    "check_text_column",
    "check_vectorizer",
    "embed",
    "embed_pairs",
    "is_transformer",
]

FloatArray = npt.NDArray[np.floating[Any]]
_Texts = Sequence[str | None]


def embed(
    vectorizer: Any,
    texts: _Texts,
    side: str | None = None,
    *,
    owner: str,
    dim: int | None = None,
    sparse: bool = False,
) -> FloatArray:
    """Return the vectors of texts, (n_texts, dim): finite float32, or CSR with `sparse`.

    Calls ``encode_{side}``, else ``transform``, else ``encode``, else the encoder itself; without a
    side, ``transform`` first. If `dim` is given, vectors must have that width, and the encoder is
    not called for no texts. Raises TypeError if `vectorizer` cannot embed or returns a sparse
    matrix or anything but numbers, ValueError for another shape, NaN or infinity.
    """
    n = len(texts)
    if not n and dim is not None:
        return np.empty((0, dim), dtype=np.float32)
    call = _find_call(vectorizer, side)
    if call is None:
        raise _describe_vectorizer(vectorizer, subject=f"The `vectorizer` parameter of `{owner}`")
    vectors = call(texts)
    subject = f"The `vectorizer` of `{owner}` must turn {n} texts into"
    is_sparse = hasattr(vectors, "tocsr")
    if is_sparse and not sparse:
        raise TypeError(
            f"{subject} a dense array; got a sparse matrix. Reduce it, for example with "
            "make_pipeline(TfidfVectorizer(), TruncatedSVD(256))."
        )
    array: Any = vectors.tocsr() if is_sparse else np.asarray(vectors)
    if array.dtype.kind not in "fiubO":
        raise TypeError(f"{subject} an array of numbers; got dtype {array.dtype}.")
    if array.ndim != 2 or array.shape[0] != n or dim not in (None, array.shape[1]):
        expected = f"({n}, {'dim' if dim is None else dim})"
        raise ValueError(f"{subject} an array of shape {expected}; got shape {array.shape}.")
    with np.errstate(over="ignore"):  # values too large for float32 are refused as infinite
        array = array.astype(np.float32, copy=False)
    is_finite = np.isfinite(array.data if is_sparse else array)
    if not is_finite.all():
        row = (array.tocoo().row[~is_finite] if is_sparse else np.nonzero(~is_finite)[0])[0]
        raise ValueError(
            f"{subject} finite numbers; the vector of texts[{row}] is not finite. Drop missing "
            "texts, or embed them as zeros: missing='zero'."
        )
    return array


def embed_pairs(
    vectorizer: Any, pairs: Sequence[_Texts], *, owner: str, dim: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return the vectors of the first texts of pairs as queries, of the second as documents."""
    queries = embed(vectorizer, pairs[0], "query", owner=owner, dim=dim)
    documents = embed(vectorizer, pairs[1], "document", owner=owner, dim=dim)
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"The `vectorizer` of `{owner}` must give queries and documents of one width; got "
            f"{queries.shape[1]} and {documents.shape[1]}."
        )
    return queries, documents


def is_transformer(vectorizer: Any) -> bool:
    """Return whether an encoder has `transform`, so that it is cloned and fitted."""
    return callable(getattr(vectorizer, "transform", None))


def check_vectorizer(vectorizer: Any, *, subject: str, others: str = "") -> None:
    """Raise TypeError unless both sides of `vectorizer` can be embedded."""
    if not all(_find_call(vectorizer, side) for side in ("query", "document")):
        raise _describe_vectorizer(vectorizer, subject=subject, others=others)


def _find_call(vectorizer: Any, side: str | None) -> Callable[[_Texts], Any] | None:
    """Return what embeds the texts of a side, None if there is nothing."""
    # A str has an `encode` of another kind, a table or a column a `transform`.
    has_rows = isinstance(getattr(vectorizer, "ndim", None), int)
    if has_rows or isinstance(vectorizer, (type, str, bytes)):
        return None
    names = [f"encode_{side}", "transform", "encode"]
    for name in names if side else ["transform", "encode", "encode_query"]:
        call: Callable[[_Texts], Any] | None = getattr(vectorizer, name, None)
        if callable(call):
            return call
    return vectorizer if callable(vectorizer) else None


def _describe_vectorizer(vectorizer: Any, *, subject: str, others: str = "") -> TypeError:
    """Return the error for what cannot embed; `others` says what else is allowed."""
    actual = (
        f"the class {vectorizer.__name__}, not an instance"
        if isinstance(vectorizer, type)
        else f"an object of type {type(vectorizer).__name__}"
    )
    return TypeError(
        f"{subject} must be {others}an object with `transform`, such as NVEmbedVectorizer(), an "
        "object with `encode`, or with `encode_query` and `encode_document`, such as a "
        f"SentenceTransformer, or a callable; got {actual}."
    )


def check_text_column(
    X: Any, *, vectorizer: Any, owner: str, name: str = "X", min_rows: int = 1
) -> list[str | None]:
    """Return the texts of one column as a list, None for a missing text where those are allowed.

    Raises as `check_texts`, and ValueError for pairs and for fewer texts than `min_rows`.
    """
    texts, *others = _read_columns(X, vectorizer, owner=owner, name=name, min_rows=min_rows)
    if others:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must have one text a row; got "
            f"{'pairs' if len(others) == 1 else f'{len(others) + 1} columns'}. Choose one column, "
            "or join each row into one text."
        )
    return texts


def check_pair_columns(
    X: Any, *, vectorizer: Any, owner: str, name: str = "X", min_rows: int = 1
) -> tuple[list[str | None], list[str | None]]:
    """Return the two columns of pairs of texts as lists, None for a missing text where allowed.

    Raises as `check_texts`, and ValueError for single texts and fewer pairs than `min_rows`.
    """
    columns = _read_columns(X, vectorizer, owner=owner, name=name, min_rows=min_rows)
    if len(columns) != 2:
        if len(columns) == 1 and not columns[0]:
            return [], []
        got = "one text" if len(columns) == 1 else f"{len(columns)} texts"
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must hold pairs of texts, such as "
            f"[(text, text), ...] or two columns; got {got} a row."
        )
    return columns[0], columns[1]


def _read_columns(
    X: Any, vectorizer: Any, *, owner: str, name: str, min_rows: int
) -> list[list[str | None]]:
    """Return the columns of texts; missing ones by the vectorizer's policy."""
    subject = f"The `{name}` parameter of `{owner}` must hold"
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if kind in ("f", "i", "u") and getattr(X, "ndim", 0) == 2:
        raise TypeError(
            f"{subject} texts, since it has a `vectorizer`; got an array of {X.dtype}. Set "
            "vectorizer=None to pass embeddings."
        )
    missing = getattr(vectorizer, "missing", "error")
    policy = missing if missing in MISSING_POLICIES else "error"
    columns, masks = check_texts(X, owner=owner, missing=policy, name=name)
    if len(columns[0]) < min_rows:
        raise ValueError(
            f"{subject} at least {min_rows} text{'s' if min_rows > 1 else ''}; "
            f"got {len(columns[0])}."
        )
    return [
        [None if absent else text for text, absent in zip(texts, mask, strict=True)]
        for texts, mask in zip(columns, masks, strict=True)
    ]
