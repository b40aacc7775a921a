"""What a retriever is given: titles, ids, vectors and judgments, checked and in one form."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._quantization import iterate_blocks
from skembed._validation import check_texts, count_columns
from skembed.similarity import Indices, Vectors, normalize_rows

__all__ = [
    "check_ids",
    "check_new_ids",
    "find_positions",
    "join_titles",
    "prepare_vectors",
    "read_judgments",
]

Ids = npt.NDArray[Any]  # of object (str) or int64
# How far from 1 the length of float32 vectors is after they were scaled to it.
_UNIT_TOLERANCE = 1e-6


def join_titles(X: Any, *, owner: str, name: str = "X") -> Any:
    """Return one text for each document: the title, a space, the text; other input as it is.

    Of a frame with a column "text", that one and "title" count. A title that is missing is left
    out; a document without both stays missing.

    >>> from skembed._corpus import join_titles
    >>> join_titles([("Llama", "A camelid."), ("", "Hot.")], owner="Retriever")
    ['Llama A camelid.', 'Hot.']
    """
    names = list(getattr(X, "columns", ()))
    if len(names) > 1 and "text" in names:
        X = X[["title", "text"]] if "title" in names else X[["text"]]
    if count_columns(X) != 2:
        return X
    (titles, texts), (no_title, no_text) = check_texts(X, owner=owner, missing="empty", name=name)
    return [
        None if lacks_both else f"{title} {text}".strip()
        for title, text, lacks_both in zip(titles, texts, no_title & no_text, strict=True)
    ]


def prepare_vectors(vectors: Any, similarity: str, *, owner: str) -> Vectors:
    """Return vectors as float32, of unit length for "cosine"; a copy only where they change.

    Raises ValueError for what float32 cannot hold.
    """
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(vectors, dtype=np.float32)
    for rows in iterate_blocks(*found.shape):
        if not np.isfinite(found[rows]).all():
            row = rows.start + int(np.argmin(np.isfinite(found[rows]).all(axis=1)))
            raise ValueError(
                f"The embeddings of `{owner}` must be finite in float32; that of row {row} is not. "
                "Scale them down."
            )
    if similarity != "cosine" or all(
        _is_unit(found[rows]) for rows in iterate_blocks(*found.shape)
    ):
        return found
    unit = np.empty_like(found)
    for rows in iterate_blocks(*found.shape):
        unit[rows] = normalize_rows(found[rows])
    return unit


def _is_unit(vectors: Vectors) -> bool:
    """Tell whether all vectors have unit length."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return bool((np.abs(squares - 1) <= 2 * _UNIT_TOLERANCE).all())


# Ids


def check_ids(ids: Any, *, owner: str) -> Ids | None:
    """Return distinct ids of one type, (n,), str as objects or int64; None for None.

    >>> from skembed._corpus import check_ids
    >>> check_ids(["a", "b"], owner="Retriever")
    array(['a', 'b'], dtype=object)
    """
    if ids is None:
        return None
    subject = f"The `ids` parameter of `{owner}`"
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise TypeError(f"{subject} must be a list of ids; got {type(ids).__name__}.")
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(values, list):
        raise ValueError(f"{subject} must be of shape (n,); got a single value.")
    if all(isinstance(value, str) for value in values):
        found: Ids = np.empty(len(values), dtype=object)
        found[:] = [str.__str__(value) for value in values]
    elif all(_is_int(value) for value in values):
        found = np.array(values, dtype=np.int64)
    else:
        place = next(
            i
            for i, value in enumerate(values)
            if not isinstance(value, str if isinstance(values[0], str) else numbers.Integral)
            or isinstance(value, bool)
        )
        raise TypeError(
            f"{subject} must hold str or int, all of one type; ids[{place}] is of type "
            f"{type(values[place]).__name__}."
        )
    if len(set(values)) != len(values):
        first = {value: i for i, value in reversed(list(enumerate(values)))}
        place = next(i for i, value in enumerate(values) if first[value] != i)
        raise ValueError(
            f"{subject} must hold each id once; ids[{place}], {values[place]!r}, is there before."
        )
    return found


def check_new_ids(ids: Ids, known: Ids, *, owner: str) -> None:
    """Raise TypeError for ids of another type than the known ones, ValueError for one of them."""
    subject = f"The `ids` parameter of `{owner}`"
    if len(ids) and ids.dtype != known.dtype:
        kind = "str" if known.dtype == object else "int"
        raise TypeError(f"{subject} must hold {kind}, as `ids_` does.")
    there = set(known.tolist())
    twice = next((value for value in ids.tolist() if value in there), None)
    if twice is not None:
        raise ValueError(
            f"{subject} must hold new ids; {twice!r} is there already. To replace a document, "
            "remove it first."
        )


def find_positions(ids: Ids, known: Ids, *, owner: str) -> Indices:
    """Return where each id stands among the known ones, (n,); raises ValueError for another."""
    places = {value: i for i, value in enumerate(known.tolist())}
    absent = [value for value in ids.tolist() if value not in places]
    if absent:
        raise ValueError(
            f"The `ids` parameter of `{owner}` must hold ids of `ids_`; {len(absent)} of "
            f"{len(ids)} are not there, the first is {absent[0]!r}."
        )
    return np.array([places[value] for value in ids.tolist()], dtype=np.int64)


def _is_int(value: Any) -> bool:
    """Tell whether an id is an int, which a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# Judgments


def read_judgments(
    y: Any, query_ids: Sequence[Any] | None, *, ids: Ids, owner: str
) -> list[dict[Any, int]]:
    """Return ``{document_id: grade}`` of each query, in their order.

    Raises TypeError for what is no judgment, ValueError for a query without one, and where no
    judged document is among `ids`.
    """
    rows = _align_judgments(y, query_ids, owner=owner)
    judged = [_read_row(row, f"The `y` parameter of `{owner}`", i) for i, row in enumerate(rows)]
    bare = [i for i, grades in enumerate(judged) if not grades]
    if bare:
        raise ValueError(
            f"The `y` parameter of `{owner}` must judge a document for every query; {len(bare)} of "
            f"{len(judged)} have none, the first is query {bare[0]}. Drop such queries."
        )
    known = set(ids.tolist())
    if judged and not any(known & grades.keys() for grades in judged):
        other = next(iter(judged[0]))
        raise ValueError(
            f"The `y` parameter of `{owner}` must judge documents of the corpus; none of them is "
            f"there. Ids of `y` are such as {other!r}, ids of the corpus such as "
            f"{ids[0] if len(ids) else None!r}."
        )
    return judged


def _align_judgments(y: Any, query_ids: Sequence[Any] | None, *, owner: str) -> list[Any]:
    """Return what `y` holds for each query."""
    if isinstance(y, Mapping):
        if query_ids is None:
            raise ValueError(
                f"The `query_ids` parameter of `{owner}` must name the key of each query, since "
                "`y` is a mapping; got None."
            )
        return [y.get(query, ()) for query in query_ids]
    if query_ids is not None:
        raise TypeError(
            f"The `y` parameter of `{owner}` must be a mapping, since `query_ids` is given; "
            f"got {type(y).__name__}."
        )
    if isinstance(y, (str, bytes)) or not isinstance(y, Iterable):
        raise TypeError(
            f"The `y` parameter of `{owner}` must be a list of judgments; got {type(y).__name__}."
        )
    return y.tolist() if hasattr(y, "tolist") else list(y)


def _read_row(row: Any, subject: str, position: int) -> dict[Any, int]:
    """Return the judgments of one query."""
    if isinstance(row, Mapping):
        return dict(row)
    if isinstance(row, str) or _is_int(row):
        return {row: 1}
    if isinstance(row, Collection):
        return dict.fromkeys(row.tolist() if hasattr(row, "tolist") else row, 1)
    raise TypeError(
        f"{subject} must hold a mapping, a list of ids or an id for each query; y[{position}] is "
        f"of type {type(row).__name__}."
    )
