"""The parts of a task as users give them, checked into lists: columns, labels, ids and grades."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._validation import check_texts

__all__ = [
    "check_distinct_classes",
    "read_column",
    "read_grades",
    "read_items",
    "read_labels",
    "read_levels",
    "read_relevance",
]

_Ints = npt.NDArray[np.int64]
_Labels = npt.NDArray[Any]


def read_column(texts: Any, *, name: str, owner: str) -> list[str]:
    """Return one column of texts, not empty.

    >>> from skembed._task_input import read_column
    >>> read_column(("a cat",), name="texts", owner="ClusteringTask")
    ['a cat']
    """
    columns = check_texts(texts, owner=owner, name=name).columns
    if len(columns) != 1 or not columns[0]:
        got = "pairs" if len(columns) != 1 else "none"
        raise ValueError(f"The `{name}` parameter of `{owner}` must hold texts; got {got}.")
    return columns[0]


def read_labels(labels: Any, n: int, *, name: str, owner: str) -> _Labels:
    """Return class labels as an array of str, int or bool, (n,).

    >>> from skembed._task_input import read_labels
    >>> read_labels([1.0, 2.0], 2, name="labels", owner="ClusteringTask")
    array([1, 2])
    """
    subject = f"The `{name}` parameter of `{owner}`"
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ValueError(
            f"{subject} must be of shape ({n},), one label a text; got shape {array.shape}."
        )
    items = list(labels) if isinstance(labels, (list, tuple)) else array.tolist()
    kinds = {_kind_of(item) for item in items}
    if None in kinds:
        position = next(i for i, item in enumerate(items) if _kind_of(item) is None)
        raise TypeError(
            f"{subject} must hold labels of str, int or bool; {name}[{position}] is of type "
            f"{type(items[position]).__name__}. Drop missing labels, round or bin numbers."
        )
    if len(kinds) > 1:
        raise TypeError(f"{subject} must hold labels of one type; got {sorted(map(str, kinds))}.")
    return np.array(
        [int(item) if isinstance(item, (float, np.floating)) else item for item in items]
    )


def _kind_of(label: Any) -> str | None:
    """Return "str", "bool" or "int" for a label, None for what is none."""
    if isinstance(label, str):
        return "str"
    if isinstance(label, (bool, np.bool_)):
        return "bool"
    if isinstance(label, (int, np.integer)):
        return "int"
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return "int"
    return None


def read_levels(labels: Any, n: int, *, owner: str) -> list[tuple[_Ints, _Labels]]:
    """Return, for each level of a hierarchy, the rows that reach it and their labels.

    >>> from skembed._task_input import read_levels
    >>> read_levels([["a"], ["a", "b"]], 2, owner="ClusteringTask")[1]
    (array([1]), array(['b'], dtype='<U1'))
    """
    items = list(labels)
    if len(items) != n:
        raise ValueError(
            f"The `labels` parameter of `{owner}` must hold one label a text, {n}; "
            f"got {len(items)}."
        )
    nested = [isinstance(item, (list, tuple, np.ndarray)) for item in items]
    if any(nested) != all(nested):
        raise TypeError(
            f"The `labels` parameter of `{owner}` must hold either labels or lists of labels."
        )
    paths = [list(item) if is_list else [item] for item, is_list in zip(items, nested, strict=True)]
    levels = []
    for level in range(max(map(len, paths))):
        rows = [row for row, path in enumerate(paths) if len(path) > level]
        found = read_labels(
            [paths[row][level] for row in rows], len(rows), name="labels", owner=owner
        )
        is_int = found.dtype.kind in "iu"
        reached = found != -1 if is_int else np.ones(len(rows), dtype=bool)
        levels.append((np.array(rows, dtype=np.int64)[reached], found[reached]))
    return levels


def check_distinct_classes(labels: _Labels, *, name: str, owner: str) -> None:
    """Raise ValueError unless there are two different labels.

    >>> import numpy as np
    >>> from skembed._task_input import check_distinct_classes
    >>> check_distinct_classes(np.array(["a", "b"]), name="labels", owner="ClusteringTask")
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must hold at least two different labels; "
            f"got {len(classes)}."
        )


def read_items(items: Any, ids: Any, *, kind: str, owner: str) -> tuple[list[str], list[Any]]:
    """Return the texts and ids of queries or documents; documents are stripped, as in mteb.

    >>> from skembed._task_input import read_items
    >>> read_items({"d": {"title": "Cats", "text": "purr"}}, None, kind="document", owner="Task")
    (['Cats purr'], ['d'])
    """
    name = "queries" if kind == "query" else "corpus"
    if isinstance(items, Mapping):
        if ids is not None:
            raise ValueError(
                f"The `{kind}_ids` parameter of `{owner}` must be None where `{name}` is a mapping."
            )
        ids, items = list(items), [_join_title(item) for item in items.values()]
    texts = read_column(items, name=name, owner=owner)
    found = list(range(len(texts))) if ids is None else _read_ids(ids, len(texts), kind, owner)
    return ([text.strip() for text in texts] if kind == "document" else texts), found


def _join_title(item: Any) -> Any:
    """Return title and text in one, where a document has both."""
    if not isinstance(item, Mapping):
        return item
    title, text = item.get("title") or "", item.get("text")
    return f"{title} {text}" if title and isinstance(text, str) else text


def _read_ids(ids: Any, n: int, kind: str, owner: str) -> list[Any]:
    """Return ids as a list: all str or all int, each once."""
    found = np.asarray(ids).tolist() if isinstance(ids, np.ndarray) else list(ids)
    subject = f"The `{kind}_ids` parameter of `{owner}`"
    if len(found) != n:
        raise ValueError(f"{subject} must hold {n} ids; got {len(found)}.")
    if not (all(isinstance(i, str) for i in found) or all(_kind_of(i) == "int" for i in found)):
        raise TypeError(f"{subject} must be all str or all int.")
    if len(set(found)) != n:
        twice = next(i for i in found if found.count(i) > 1)
        raise ValueError(f"{subject} must hold each id once; {twice!r} occurs more than once.")
    return found


def read_relevance(
    relevance: Any, query_ids: list[Any], document_ids: list[Any], *, owner: str
) -> dict[Any, dict[Any, int]]:
    """Return ``{query_id: {document_id: grade}}`` for every query.

    >>> from skembed._task_input import read_relevance
    >>> read_relevance([["d"]], ["q"], ["d"], owner="RetrievalTask")
    {'q': {'d': 1}}
    """
    subject = f"The `relevance` parameter of `{owner}`"
    if hasattr(relevance, "columns"):
        judged = _read_rows(relevance, subject=subject)
    elif isinstance(relevance, Mapping):
        judged = dict(relevance)
    else:
        judged = _read_aligned(relevance, query_ids, document_ids, subject=subject)
    unknown = [query for query in judged if query not in set(query_ids)]
    if unknown:
        raise ValueError(
            f"{subject} must judge known queries; {len(unknown)} ids are of none, the first is "
            f"{unknown[0]!r}."
        )
    bare = [query for query in query_ids if query not in judged or not len(judged[query])]
    if bare:
        raise ValueError(
            f"{subject} must judge a document for every query; {len(bare)} of {len(query_ids)} "
            f"have none, the first is {bare[0]!r}. Drop those queries."
        )
    found = {query: _read_judged(judged[query], query, subject=subject) for query in query_ids}
    known = set(document_ids)
    if not any(document in known for grades in found.values() for document in grades):
        raise ValueError(
            f"{subject} must name documents of the corpus; none of its ids is there. Are the ids "
            "of one type, str or int?"
        )
    return found


def _read_aligned(
    relevance: Any, query_ids: list[Any], document_ids: list[Any], *, subject: str
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
    if len(frame.columns) != 3:
        raise ValueError(
            f"{subject} must have three columns, query id, document id and grade; "
            f"got {len(frame.columns)}."
        )
    rows = frame.iter_rows() if hasattr(frame, "iter_rows") else frame.itertuples(index=False)
    judged: dict[Any, dict[Any, Any]] = {}
    for query, document, grade in rows:
        grades = judged.setdefault(query, {})
        if document in grades:
            raise ValueError(
                f"{subject} must judge a document once; {document!r} occurs twice for {query!r}."
            )
        grades[document] = grade
    return judged


def _read_judged(judged: Any, query: Any, *, subject: str) -> dict[Any, int]:
    """Return the grades of one query; ids without one have grade 1."""
    if not isinstance(judged, Mapping):
        if isinstance(judged, (str, bytes)) or not isinstance(judged, Iterable):
            raise TypeError(
                f"{subject} must hold mappings or lists of document ids; got "
                f"{type(judged).__name__} for query {query!r}."
            )
        judged = dict.fromkeys(judged, 1)
    for grade in judged.values():
        if _kind_of(grade) not in ("int", "bool"):
            raise TypeError(
                f"{subject} must hold grades of int; got {type(grade).__name__} for query "
                f"{query!r}."
            )
    return {document: int(grade) for document, grade in judged.items()}


def read_grades(grades: Any, n: int, *, where: str, owner: str) -> list[int]:
    """Return the grades of one list of candidates.

    >>> from skembed._task_input import read_grades
    >>> read_grades([0, True], 2, where="query 0", owner="RerankingTask")
    [0, 1]
    """
    subject = f"The `relevance` parameter of `{owner}`"
    found = list(grades)
    if len(found) != n:
        raise ValueError(
            f"{subject} must hold one grade a candidate; {where} has {n} candidates and "
            f"{len(found)} grades."
        )
    if not all(_kind_of(grade) in ("int", "bool") for grade in found):
        raise TypeError(f"{subject} must hold grades of int; {where} has another type.")
    return [int(grade) for grade in found]
