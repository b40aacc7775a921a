"""The parts of a task as users give them, checked into lists: columns, labels and items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._inputs import check_texts, find_missing, is_missing, read_labels
from skembed._inputs import read_items as read_entries
from skembed.metrics.qrels import join_title, read_ids
from skembed.similarity import Ints

__all__ = ["check_distinct_classes", "read_column", "read_items", "read_levels"]

_Labels = npt.NDArray[Any]


def read_column(texts: Any, *, name: str, owner: str) -> list[str]:
    """Return one column of texts, not empty."""
    columns = check_texts(texts, owner=owner, name=name).columns
    if len(columns) != 1 or not columns[0]:
        got = "pairs" if len(columns) != 1 else "none"
        raise ValueError(f"The `{name}` parameter of `{owner}` must hold texts; got {got}.")
    return columns[0]


def read_levels(labels: Any, n: int, *, owner: str) -> list[tuple[Ints, _Labels]]:
    """Return, for each level of a hierarchy, the rows that reach it and their labels."""
    items = read_entries(labels, subject=f"The `labels` parameter of `{owner}`")
    if len(items) != n:
        raise ValueError(
            f"The `labels` parameter of `{owner}` must hold one label a text, {n}; "
            f"got {len(items)}."
        )
    kinds = (list, tuple, np.ndarray)
    nested = [isinstance(item, kinds) and not is_missing(item) for item in items]
    if any(nested) != all(nested):
        raise TypeError(
            f"The `labels` parameter of `{owner}` must hold either labels or lists of labels."
        )
    paths = [list(item) if is_list else [item] for item, is_list in zip(items, nested, strict=True)]
    levels = []
    for level in range(max(map(len, paths))):
        rows = [row for row, path in enumerate(paths) if len(path) > level]
        at_level = read_labels(
            [paths[row][level] for row in rows], len(rows), name="labels", owner=owner
        )
        is_int = at_level.dtype.kind in "iu"
        reached = at_level != -1 if is_int else np.ones(len(rows), dtype=bool)
        levels.append((np.array(rows, dtype=np.int64)[reached], at_level[reached]))
    return levels


def check_distinct_classes(labels: _Labels, *, owner: str) -> None:
    """Raise ValueError unless there are two different labels."""
    n_classes = len(np.unique(labels))
    if n_classes < 2:
        raise ValueError(
            f"The `labels` parameter of `{owner}` must hold at least two different labels; "
            f"got {n_classes}."
        )


def read_items(items: Any, ids: Any, *, kind: str, owner: str) -> tuple[list[str], list[Any]]:
    """Return the texts and ids of queries or documents; documents are stripped, as in mteb."""
    name = "queries" if kind == "query" else "corpus"
    is_mapping = isinstance(items, Mapping)
    if is_mapping:
        if ids is not None:
            raise ValueError(
                f"The `{kind}_ids` parameter of `{owner}` must be None where `{name}` is a mapping."
            )
        ids = list(items)
        if find_missing(ids):
            raise ValueError(
                f"The `{name}` parameter of `{owner}` must have ids, none missing; "
                f"list({name})[{find_missing(ids)[0]}] is None or NaN. Drop it."
            )
        items = join_title(list(items.values()), owner=owner, name=name)
    texts = read_column(items, name=name, owner=owner)
    if ids is None:
        ids = range(len(texts))
    elif not is_mapping:
        ids = read_ids(ids, len(texts), name=f"{kind}_ids", owner=owner)
    return ([text.strip() for text in texts] if kind == "document" else texts), list(ids)
