"""Arrays of distinct texts, rows, labels and scores, read from containers of examples."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._inputs import (
    check_label_items,
    clean_column,
    find_missing,
    is_missing,
    read_columns,
    read_items,
    read_numbers,
    to_float,
    tuples_step,
)
from skembed._validation import describe_type
from skembed.similarity import Floats, Ints

__all__ = [
    "check_rows",
    "clean_texts",
    "extract_rows",
    "extract_targets",
    "index_labels",
    "index_texts",
    "read_scores",
]


def extract_rows(X: Any, *, subject: str, name: str, allow_columns: bool) -> list[list[Any]]:
    """Return single texts, or the columns of rows, as fresh lists; items unchecked.

    Rows are a list of tuples: columns of a table are refused unless `allow_columns`.
    """
    columns, is_rows = read_columns(X, subject=subject, name=name)
    if len(columns) > 1 and not is_rows and not allow_columns:
        raise ValueError(
            f"{subject} must hold texts with class labels `y`, or a list of tuples (pairs, or "
            f"rows of anchor, positive and negatives), to train on; got {describe_type(X)} of "
            f"{len(columns)} columns, which are features. Make tuples of its rows: "
            f"{tuples_step(X).replace('X', name)}. With trainer=None, or 'auto', `fit` leaves the "
            "model frozen and `transform` embeds each column."
        )
    return columns


def clean_texts(raw: list[list[Any]], *, subject: str, name: str, missing: str) -> None:
    """Make every item a clean str, in place; refuse missing and blank ones."""
    if len(raw) > 1 and raw[-1] and isinstance(raw[-1][0], (numbers.Number, np.bool_)):
        if not is_missing(raw[-1][0]):
            raise TypeError(
                f"{subject} must hold texts (str); {name}[0][{len(raw) - 1}] is "
                f"{describe_type(raw[-1][0])}. Pass labels or scores as `y`."
            )
    suffixes = [""] if len(raw) == 1 else [f"[{j}]" for j in range(len(raw))]
    blank = np.zeros((len(raw[0]), len(raw)), dtype=np.bool_)  # (n, k)
    for j, (column, suffix) in enumerate(zip(raw, suffixes, strict=True)):
        clean_column(column, subject=subject, name=name, suffix=suffix)  # missing turn into ""
        blank[:, j] = np.fromiter((not text.strip() for text in column), np.bool_, len(column))
    if blank.any():
        row, j = divmod(int(blank.argmax()), blank.shape[1])
        step = "Fill them, or drop their rows"
        step += "." if missing == "error" else f"; missing={missing!r} is for `transform` only."
        raise ValueError(
            f"{subject} must hold no missing or blank texts to train on; got {int(blank.sum())}, "
            f"the first at {name}[{row}]{suffixes[j]}. {step}"
        )


def index_texts(raw: Sequence[list[str]]) -> tuple[list[str], Ints]:
    """Return the distinct texts, first seen first, and the columns (n, k) as indices."""
    index: dict[str, int] = {}
    rows = zip(*raw, strict=True)
    indices = (index.setdefault(text, len(index)) for text in chain.from_iterable(rows))
    columns = np.fromiter(indices, dtype=np.int64, count=len(raw) * len(raw[0]))
    return list(index), columns.reshape(-1, len(raw))


def check_rows(columns: Ints, *, subject: str, name: str) -> None:
    """Refuse rows (n, k) whose positive equals the anchor, or a negative either of them."""
    same = columns[:, 0] == columns[:, 1]  # (n,)
    if same.any():
        count = int(same.sum())
        where = "every row" if same.all() else "1 row" if count == 1 else f"{count} rows"
        raise ValueError(
            f"{subject} must hold positives that differ from their anchors; they are equal in "
            f"{where}, the first {name}[{int(same.argmax())}]. Drop such rows: there is nothing to "
            "learn from a text and itself."
        )
    for other, role in enumerate(("anchor", "positive")):
        wrong = columns[:, 2:] == columns[:, other, None]  # (n, k - 2)
        if wrong.any():
            row, negative = divmod(int(wrong.argmax()), wrong.shape[1])
            raise ValueError(
                f"{subject} must hold negatives that differ from the row's anchor and positive; "
                f"{name}[{row}][{negative + 2}] equals the {role} of its row, the first of "
                f"{int(wrong.sum())}. Replace these negatives, or drop the rows."
            )


def extract_targets(y: Any, *, n: int, k: int, owner: str, name: str) -> list[Any] | None:
    """Return `y` as a list of n, none missing; None where k columns need none."""
    subject = f"The `y` parameter of `{owner}`"
    if y is None and k == 1:
        raise ValueError(
            f"{subject} must hold a class label for each text, to train on single texts; got None. "
            f"Pass `y`, or pairs or rows (anchor, positive, negative, ...) as `{name}`."
        )
    if y is None:
        return None
    if k > 2:
        raise ValueError(
            f"{subject} must be None for rows of anchor, positive and negatives; "
            f"got {describe_type(y)}, and rows of {k} texts. Labels go with single texts, scores "
            "with pairs."
        )
    targets = read_items(y, subject=subject, of="labels or scores")
    if len(targets) != n:
        raise ValueError(
            f"{subject} must have as many entries as there are examples, {n}; got {len(targets)}. "
            f"Pass one for each item of `{name}`."
        )
    absent = find_missing(targets)
    if absent:
        raise ValueError(
            f"{subject} must hold no missing entries (None, NaN); got {len(absent)}, the first at "
            f"y[{absent[0]}]. Fill them, or drop their examples."
        )
    return targets


def read_scores(targets: list[Any], owner: str, name: str) -> Floats:
    """Return the graded similarities as float64 (n,): given as floats, finite, and not all equal.

    Whole numbers, bools and str are refused: they may be class labels.
    """
    subject = f"The `y` parameter of `{owner}`"
    kinds = (str, bool, np.bool_)
    position = next((i for i, item in enumerate(targets) if isinstance(item, kinds)), None)
    if position is None and all(isinstance(item, numbers.Integral) for item in targets):
        position = 0
    if position is not None:
        raise TypeError(
            f"{subject} must hold floats (graded similarity) where `{name}` holds pairs; "
            f"y[{position}] is {describe_type(targets[position])}. If these are grades, pass "
            "floats: np.asarray(y, dtype=float). Class labels go with single texts: join each row "
            f"into one, [' '.join(row) for row in {name}]."
        )
    scores = read_numbers(targets, name="y", owner=owner)
    if (scores == scores[0]).all():
        raise ValueError(
            f"{subject} must hold scores that differ, so that there is something to rank; all "
            f"{len(scores)} are {scores[0]:g}. Leave out `y` to train on pairs as positives."
        )
    return scores


def index_labels(targets: list[Any], owner: str) -> tuple[Ints, npt.NDArray[Any]]:
    """Return the index of each label (n,) and the distinct labels, sorted."""
    check_label_items(targets, name="y", owner=owner)
    if set(map(type, targets)) not in ({str}, {int}, {bool}):
        targets = list(_iterate_labels(targets, owner))
    distinct = sorted(set(targets))
    index = {label: number for number, label in enumerate(distinct)}
    labels = np.fromiter(map(index.__getitem__, targets), dtype=np.int64, count=len(targets))
    # As objects: numpy's own str pads all labels to the longest and drops closing NULs.
    classes = np.array(distinct, dtype=object if isinstance(distinct[0], str) else None)
    return labels, classes


def _iterate_labels(targets: list[Any], owner: str) -> Iterator[str | bool | int | float]:
    """Yield each checked label as a built-in value; refuse fractions."""
    for position, item in enumerate(targets):
        if isinstance(item, str):
            yield str.__str__(item)
        elif isinstance(item, np.bool_):
            yield bool(item)
        elif isinstance(item, numbers.Integral):
            yield item if isinstance(item, bool) else int(item)
        elif (number := to_float(item)).is_integer():
            yield number
        else:
            raise ValueError(
                f"The `y` parameter of `{owner}` must hold class labels for single texts, and "
                f"numbers among them must be whole; y[{position}] is {number:g}. Graded "
                "scores go with pairs of texts."
            )
