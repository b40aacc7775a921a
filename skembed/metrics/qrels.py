"""Ids, titles, grades and judgments of a ranking, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._inputs import (
    check_hashable,
    clean_column,
    column_names,
    find_missing,
    kind_of,
    read_columns,
    read_items,
)
from skembed._validation import check_int64
from skembed.similarity import Ids, Ints

__all__ = [
    "check_grades",
    "check_ids",
    "check_new_ids",
    "find_positions",
    "join_title",
    "join_titles",
    "read_grades",
    "read_ids",
    "read_judged",
    "read_judgments",
    "read_relevance",
    "search_to_run",
]


def search_to_run(
    scores: npt.ArrayLike,
    indices: npt.ArrayLike,
    *,
    query_ids: Sequence[Any] | None = None,
    document_ids: Sequence[Any] | None = None,
) -> dict[Any, dict[Any, float]]:
    """Turn the arrays of a search into the mapping that the ranking metrics take.

    Parameters
    ----------
    scores : array-like of float, shape (n_queries, k)
        Scores of the documents found.
    indices : array-like of int, shape (n_queries, k)
        Their positions in the corpus; -1 is left out.
    query_ids : sequence, optional
        Ids of the queries; None takes their positions.
    document_ids : sequence, optional
        Ids of the corpus; None takes positions.

    Returns
    -------
    dict of dict
        ``{query_id: {document_id: score}}``.

    Raises
    ------
    ValueError
        If the shapes differ, or there are not enough ids, or one occurs twice.

    Examples
    --------
    >>> from skembed.metrics import search_to_run
    >>> search_to_run([[0.9, float("nan")]], [[2, -1]], document_ids=["a", "b", "c"])
    {0: {'c': 0.9}}
    """
    owner = "search_to_run"
    try:
        values, positions = np.asarray(scores), np.asarray(indices)
    except ValueError as error:
        raise ValueError(
            f"The `scores` and `indices` parameters of `{owner}` must be of one shape "
            "(n_queries, k); got rows of different lengths."
        ) from error
    if values.dtype.kind not in "fiub":
        raise TypeError(
            f"The `scores` parameter of `{owner}` must hold numbers; got dtype {values.dtype}."
        )
    values = values.astype(np.float64)
    if values.ndim != 2 or values.shape != positions.shape or positions.dtype.kind not in "iu":
        raise ValueError(
            f"The `indices` parameter of `{owner}` must be ints of the shape of `scores`, "
            f"(n_queries, k); got {positions.dtype} of shape {positions.shape} for {values.shape}."
        )
    queries: Sequence[Any] = range(len(values))
    if query_ids is not None:
        queries = read_ids(query_ids, len(values), name="query_ids", owner=owner)
    n = int(positions.max(initial=-1)) + 1
    documents: Sequence[Any] = range(n)
    if document_ids is not None:
        documents = read_ids(document_ids, name="document_ids", owner=owner)
    if len(documents) < n:
        raise ValueError(
            f"The `document_ids` parameter of `{owner}` must hold at least {n} ids; "
            f"got {len(documents)}."
        )
    return {
        query: {documents[j]: score for j, score in zip(row, line, strict=True) if j >= 0}
        for query, row, line in zip(queries, positions.tolist(), values.tolist(), strict=True)
    }


def check_grades(grades: Any, *, owner: str) -> Ints:
    """Return grades as int64; raise TypeError for anything but whole numbers."""
    array = np.asarray(grades)
    if array.dtype.kind not in "iub":
        whole = array.dtype.kind == "f" and bool(np.all(array == np.floor(array)))
        if not whole or not np.isfinite(array).all():
            raise TypeError(
                f"The `relevance` parameter of `{owner}` must hold grades of int; "
                f"got dtype {array.dtype}."
            )
    return array.astype(np.int64)


def join_titles(X: Any, *, owner: str, name: str = "X") -> Any:
    """Return one text for each document: the title, a space, the text; one column as it is.

    From a frame with a column "text", only that one and "title" are read. A missing title is left
    out; a document that lacks both is None.
    """
    subject = f"The `{name}` parameter of `{owner}`"
    columns, _ = read_columns(X, subject=subject, name=name)
    names = column_names(X) or []
    if len(columns) > 1 and "text" in names:
        wanted = ["title", "text"] if "title" in names else ["text"]
        columns = [columns[names.index(each)] for each in wanted]
        if len(columns) == 1:
            return columns[0]
    return _join(*columns, subject=subject, name=name) if len(columns) == 2 else X


def join_title(items: Sequence[Any], *, owner: str, name: str) -> list[str | None]:
    """Return one text for each item: of a mapping, title, space and text."""
    is_mapping = [isinstance(item, Mapping) for item in items]
    if not any(is_mapping):
        return list(items)
    pairs = list(zip(items, is_mapping, strict=True))
    titles = [item.get("title") if has_title else None for item, has_title in pairs]
    texts = [item.get("text") if has_title else item for item, has_title in pairs]
    return _join(titles, texts, subject=f"The `{name}` parameter of `{owner}`", name=name)


def _join(titles: list[Any], texts: list[Any], *, subject: str, name: str) -> list[str | None]:
    """Return title and text of each document as one text; None where both are missing."""
    no_title = clean_column(titles, subject=subject, name=name, suffix=" (title)")
    no_text = clean_column(texts, subject=subject, name=name, suffix=" (text)")
    return [
        None if lacks_both else f"{title} {text}".strip() if title else text
        for title, text, lacks_both in zip(titles, texts, no_title & no_text, strict=True)
    ]


def read_ids(ids: Any, n: int | None = None, *, name: str = "ids", owner: str) -> list[Any]:
    """Return n distinct ids as a list, all str or all int."""
    subject = f"The `{name}` parameter of `{owner}`"
    refused = (str, bytes, Mapping, set, frozenset)  # a set has no order
    if isinstance(ids, refused) or not (isinstance(ids, Iterable) or hasattr(ids, "__array__")):
        raise TypeError(f"{subject} must be a list of ids; got {type(ids).__name__}.")
    is_view = isinstance(ids, (Iterator, KeysView, ValuesView))  # they have an order
    values = list(ids) if is_view else read_items(ids, subject=subject, of="ids")
    if n is not None and len(values) != n:
        raise ValueError(f"{subject} must hold {n} ids; got {len(values)}.")
    kinds = [kind_of(value) for value in values]
    expected = "str" if kinds[:1] == ["str"] else "int"
    if kinds.count(expected) != len(values):
        position = next(i for i, kind in enumerate(kinds) if kind != expected)
        raise TypeError(
            f"{subject} must hold str or int, all of one type; {name}[{position}] is of type "
            f"{type(values[position]).__name__}."
        )
    if len(set(values)) != len(values):
        first = {value: i for i, value in reversed(list(enumerate(values)))}
        position = next(i for i, value in enumerate(values) if first[value] != i)
        raise ValueError(
            f"{subject} must hold each id once; {name}[{position}], {values[position]!r}, is there "
            "before."
        )
    return [str.__str__(value) if isinstance(value, str) else value for value in values]


def check_ids(ids: Any, *, owner: str) -> Ids | None:
    """Return distinct ids of one type, (n,), str as objects or int64; None for None."""
    if ids is None:
        return None
    values = read_ids(ids, owner=owner)
    if values and isinstance(values[0], str):
        return np.array(values, dtype=object)
    check_int64(values, subject=f"The `ids` parameter of `{owner}`", name="ids")
    return np.array(values, dtype=np.int64)


def check_new_ids(ids: Ids, old_ids: Ids, *, owner: str) -> None:
    """Raise TypeError for ids of another type than the old ones, ValueError for an old one."""
    subject = f"The `ids` parameter of `{owner}`"
    if len(ids) and ids.dtype != old_ids.dtype:
        kind = "str" if old_ids.dtype == object else "int"
        raise TypeError(f"{subject} must hold {kind}, as `ids_` does.")
    old = set(old_ids.tolist())
    repeated = next((value for value in ids.tolist() if value in old), None)
    if repeated is not None:
        raise ValueError(
            f"{subject} must hold new ids; {repeated!r} is there already. To replace a document, "
            "remove it first."
        )


def find_positions(ids: Ids, all_ids: Ids, *, owner: str) -> npt.NDArray[np.int64]:
    """Return the position of each id among all ids, (n,); ValueError for an unknown one."""
    positions = {value: i for i, value in enumerate(all_ids.tolist())}
    absent = [value for value in ids.tolist() if value not in positions]
    if absent:
        raise ValueError(
            f"The `ids` parameter of `{owner}` must hold ids of `ids_`; {len(absent)} of "
            f"{len(ids)} are not there, the first is {absent[0]!r}."
        )
    return np.array([positions[value] for value in ids.tolist()], dtype=np.int64)


def read_relevance(
    relevance: Any,
    query_ids: Sequence[Any],
    document_ids: Sequence[Any],
    *,
    owner: str,
    name: str = "relevance",
) -> dict[Any, dict[Any, int]]:
    """Return ``{query_id: {document_id: grade}}`` for every query.

    Raises TypeError for anything but judgments, ValueError for a query without one, and if no
    judged document is among the documents.
    """
    subject = f"The `{name}` parameter of `{owner}`"
    if hasattr(relevance, "columns"):
        given = _read_rows(relevance, subject=subject)
    elif isinstance(relevance, Mapping):
        given = dict(relevance)
    else:
        given = _read_aligned(relevance, query_ids, document_ids, subject=subject)
    unknown = given.keys() - set(query_ids)
    if unknown:
        raise ValueError(
            f"{subject} must judge known queries; {len(unknown)} ids are of none, the first is "
            f"{next(query for query in given if query in unknown)!r}."
        )
    judged = {
        query: read_judged(given.get(query, ()), query, subject=subject) for query in query_ids
    }
    unjudged = [query for query, grades in judged.items() if not grades]
    if unjudged:
        raise ValueError(
            f"{subject} must judge a document for every query; {len(unjudged)} of {len(judged)} "
            f"have none, the first is query {unjudged[0]!r}. Drop those queries."
        )
    corpus = set(document_ids)
    if judged and not any(corpus & grades.keys() for grades in judged.values()):
        judged_id = next(iter(next(iter(judged.values()))))
        corpus_id = next(iter(document_ids), None)
        raise ValueError(
            f"{subject} must name documents of the corpus; none of them is there. Ids of `{name}` "
            f"are such as {judged_id!r}, ids of the corpus such as {corpus_id!r}. Are the ids of "
            "one type, str or int?"
        )
    return judged


def read_judgments(
    y: Any, query_ids: Sequence[Any] | None, *, ids: Ids, owner: str
) -> dict[int, dict[Any, int]]:
    """Return ``{position: {document_id: grade}}`` of the queries; a bare id is a list of one."""
    rows = {
        i: [row] if isinstance(row, str) or kind_of(row) == "int" else row
        for i, row in enumerate(_align_judgments(y, query_ids, owner=owner))
    }
    return read_relevance(rows, range(len(rows)), ids.tolist(), name="y", owner=owner)


def _align_judgments(y: Any, query_ids: Sequence[Any] | None, *, owner: str) -> list[Any]:
    """Return the entry of `y` for each query."""
    if isinstance(y, Mapping):
        if query_ids is None:
            raise ValueError(
                f"The `query_ids` parameter of `{owner}` must name the key of each query, since "
                "`y` is a mapping; got None."
            )
        subject = f"The `query_ids` parameter of `{owner}`"
        is_view = isinstance(query_ids, (Iterator, KeysView, ValuesView))
        keys = list(query_ids) if is_view else read_items(query_ids, subject=subject, of="ids")
        check_hashable(keys, subject=subject, of="ids")
        return [y.get(query, ()) for query in keys]
    if query_ids is not None:
        raise TypeError(
            f"The `y` parameter of `{owner}` must be a mapping, since `query_ids` is given; "
            f"got {type(y).__name__}."
        )
    if isinstance(y, (str, bytes)) or not isinstance(y, Iterable):
        raise TypeError(
            f"The `y` parameter of `{owner}` must be a list of judgments; got {type(y).__name__}."
        )
    is_view = isinstance(y, (Iterator, KeysView, ValuesView))
    return list(y) if is_view else read_items(y, subject=f"The `y` parameter of `{owner}`")


def _read_aligned(
    relevance: Any, query_ids: Sequence[Any], document_ids: Sequence[Any], *, subject: str
) -> dict[Any, Any]:
    """Return the judgments of a matrix, or of a sequence with one entry a query."""
    if isinstance(relevance, np.ndarray) and relevance.ndim == 2:
        if relevance.shape != (len(query_ids), len(document_ids)):
            raise ValueError(
                f"{subject} must be of shape ({len(query_ids)}, {len(document_ids)}); "
                f"got {relevance.shape}."
            )
        rows: Sequence[Any] = [
            {document_ids[j]: row[j] for j in np.flatnonzero(row).tolist()} for row in relevance
        ]
    elif isinstance(relevance, Sequence) and not isinstance(relevance, (str, bytes)):
        rows = relevance
    else:
        raise TypeError(
            f"{subject} must be a mapping, a sequence, a matrix or a frame; "
            f"got {type(relevance).__name__}."
        )
    if len(rows) != len(query_ids):
        raise ValueError(
            f"{subject} must hold one entry a query, {len(query_ids)}; got {len(rows)}."
        )
    return dict(zip(query_ids, rows, strict=True))


def _read_rows(frame: Any, *, subject: str) -> dict[Any, dict[Any, Any]]:
    """Return the judgments of a frame of three columns."""
    columns, _ = read_columns(frame, subject=subject)
    if len(columns) != 3:
        raise ValueError(
            f"{subject} must have three columns, query id, document id and grade; "
            f"got {len(columns)}."
        )
    for keys, of in zip(columns, ("ids of queries", "ids of documents"), strict=False):
        check_hashable(keys, subject=subject, of=of)
    judged: dict[Any, dict[Any, Any]] = {}
    for query, document, grade in zip(*columns, strict=True):
        grades = judged.setdefault(query, {})
        if document in grades:
            raise ValueError(
                f"{subject} must judge a document once; {document!r} occurs twice for {query!r}."
            )
        grades[document] = grade
    return judged


def read_judged(judged: Any, query: Any, *, subject: str) -> dict[Any, int]:
    """Return ``{document_id: grade}`` of one query; ids without a grade have grade 1."""
    if not isinstance(judged, Mapping):
        if isinstance(judged, (str, bytes)) or not isinstance(judged, Iterable):
            raise TypeError(
                f"{subject} must hold mappings or lists of document ids; got "
                f"{type(judged).__name__} for query {query!r}."
            )
        documents = list(judged)
        check_hashable(documents, subject=subject, of="ids of documents")
        judged = dict.fromkeys(documents, 1)
    if find_missing(list(judged)):
        raise ValueError(
            f"{subject} must hold ids of documents, none missing; query {query!r} has one of None "
            "or NaN. Drop it."
        )
    for grade in judged.values():
        if kind_of(grade) not in ("int", "bool"):
            raise TypeError(
                f"{subject} must hold grades of int; got {type(grade).__name__} for query "
                f"{query!r}."
            )
    grades = list(map(int, judged.values()))
    check_int64(grades, subject=subject, name="grades", step="Pass smaller grades.")
    return dict(zip(judged, grades, strict=True))


def read_grades(grades: Any, n: int, *, where: str, owner: str) -> list[int]:
    """Return the n grades of one list of candidates as int."""
    subject = f"The `relevance` parameter of `{owner}`"
    grades = read_items(grades, subject=subject, of="grades")
    if len(grades) != n:
        raise ValueError(
            f"{subject} must hold one grade a candidate; {where} has {n} candidates and "
            f"{len(grades)} grades."
        )
    if not all(kind_of(grade) in ("int", "bool") for grade in grades):
        raise TypeError(f"{subject} must hold grades of int; {where} has another type.")
    return [int(grade) for grade in grades]
