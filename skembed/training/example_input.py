"""Arrays of distinct texts, rows, labels and scores, read from containers of examples."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._inputs import clean_column, extract_columns, is_instance_of, is_missing
from skembed._validation import describe_type
from skembed.similarity import Floats, Ints

__all__ = [
    "check_rows",
    "clean_texts",
    "extract_rows",
    "extract_targets",
    "index_texts",
    "read_labels",
    "read_scores",
]


def extract_rows(X: Any, *, subject: str, name: str) -> list[list[Any]]:
    """Return the columns of any supported container as fresh lists; items unchecked."""
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] > 2:
        parts: list[Any] = [X[:, j] for j in range(X.shape[1])]
    elif is_instance_of(X, "pandas", "DataFrame") and X.shape[1] > 2:
        parts = [X.iloc[:, j] for j in range(X.shape[1])]
    elif is_instance_of(X, "polars", "DataFrame") and X.shape[1] > 2:
        parts = [X.to_series(j) for j in range(X.shape[1])]
    else:
        parts = [X]
    columns = [column for part in parts for column in extract_columns(part, subject=subject)]
    if len(columns) == 1 and columns[0] and isinstance(columns[0][0], (list, tuple)):
        return _transpose(columns[0], subject=subject, name=name)
    return columns


def _transpose(rows: list[Any], *, subject: str, name: str) -> list[list[Any]]:
    """Turn n rows of k texts into k columns of n."""
    k = len(rows[0])
    if k < 2:
        raise ValueError(
            f"{subject} must hold texts, pairs, or rows of anchor, positive and negatives; "
            f"{name}[0] is {describe_type(rows[0])} of {k}. Pass single texts as a flat list."
        )
    for position, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise TypeError(
                f"{subject} must hold either texts or rows of texts; {name}[0] is "
                f"{describe_type(rows[0])}, but {name}[{position}] is {describe_type(row)}. "
                "Make every item a row, or none."
            )
        if len(row) != k:
            raise ValueError(
                f"{subject} must hold rows of equal length; {name}[0] has {k} texts, but "
                f"{name}[{position}] has {len(row)}. Give each row as many negatives, or train on "
                "rows of different lengths as different tasks."
            )
    return [list(column) for column in zip(*rows, strict=True)]


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
    targets = _list_targets(y, subject=subject)
    if len(targets) != n:
        raise ValueError(
            f"{subject} must have as many entries as there are examples, {n}; got {len(targets)}. "
            f"Pass one for each item of `{name}`."
        )
    absent = [position for position, item in enumerate(targets) if is_missing(item)]
    if absent:
        raise ValueError(
            f"{subject} must hold no missing entries (None, NaN); got {len(absent)}, the first at "
            f"y[{absent[0]}]. Fill them, or drop their examples."
        )
    return targets


def _list_targets(y: Any, *, subject: str) -> list[Any]:
    """Return the items of any supported container of targets as a list."""
    if isinstance(y, np.ndarray):
        if y.ndim != 1:
            raise ValueError(
                f"{subject} must have one dimension; got an array of shape {y.shape}. "
                "Pass one label or score for each example."
            )
        # As a list, dates would turn into ints, which pass for labels.
        return list(y) if y.dtype.kind in "mM" else y.tolist()
    if is_instance_of(y, "pandas", "Series") or is_instance_of(y, "pandas", "Index"):
        return list(y.tolist())
    if is_instance_of(y, "polars", "Series"):
        return list(y.to_list())
    if isinstance(y, Sequence) and not isinstance(y, (str, bytes, bytearray, memoryview)):
        return list(y)
    raise TypeError(
        f"{subject} must be a list, array or column of labels or scores; "
        f"got {describe_type(y)}. Make it a list: one entry for each example."
    )


def read_scores(targets: list[Any], owner: str, name: str) -> Floats:
    """Return the graded similarities as float64 (n,): finite, and not all equal."""
    subject = f"The `y` parameter of `{owner}`"
    for position, item in enumerate(targets):
        if not isinstance(item, (numbers.Real, np.bool_)):
            raise TypeError(
                f"{subject} must hold numbers (graded similarity) where `{name}` holds pairs; "
                f"y[{position}] is {describe_type(item)}. Class labels go with single texts."
            )
    scores = np.fromiter(map(_to_float, targets), dtype=np.float64, count=len(targets))
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(
            f"{subject} must hold finite scores; got {int((~finite).sum())} that are not, the "
            f"first at y[{int(finite.argmin())}]. Drop or clip them."
        )
    if (scores == scores[0]).all():
        raise ValueError(
            f"{subject} must hold scores that differ, so that there is something to rank; all "
            f"{len(scores)} are {scores[0]:g}. Leave out `y` to train on pairs as positives."
        )
    return scores


def _to_float(value: Any) -> float:
    """Return a real number as a float, one beyond its range as an infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_labels(targets: list[Any], owner: str) -> tuple[Ints, npt.NDArray[Any]]:
    """Return the index of each label (n,) and the distinct labels, sorted."""
    if set(map(type, targets)) not in ({str}, {int}, {bool}):
        targets = list(_iterate_labels(targets, owner))
    distinct = sorted(set(targets))
    index = {label: number for number, label in enumerate(distinct)}
    labels = np.fromiter(map(index.__getitem__, targets), dtype=np.int64, count=len(targets))
    # As objects: numpy's own str pads all labels to the longest and drops closing NULs.
    classes = np.array(distinct, dtype=object if isinstance(distinct[0], str) else None)
    return labels, classes


def _iterate_labels(targets: list[Any], owner: str) -> Iterator[str | bool | int | float]:
    """Yield each label as a built-in value; refuse anything else, and a mixture."""
    subject = f"The `y` parameter of `{owner}`"
    is_text = isinstance(targets[0], str)
    for position, item in enumerate(targets):
        if not isinstance(item, (str, numbers.Real, np.bool_)):
            raise TypeError(
                f"{subject} must hold class labels (str, int or bool) for single texts; "
                f"y[{position}] is {describe_type(item)}. Convert the labels to str."
            )
        if isinstance(item, str) != is_text:
            raise TypeError(
                f"{subject} must hold labels of one type; y[0] is {describe_type(targets[0])}, "
                f"but y[{position}] is {describe_type(item)}. Convert the labels to str."
            )
        if isinstance(item, str):
            yield str.__str__(item)
        elif isinstance(item, np.bool_):
            yield bool(item)
        elif isinstance(item, numbers.Integral):
            yield item if isinstance(item, bool) else int(item)
        elif (number := _to_float(item)).is_integer():
            yield number
        else:
            raise ValueError(
                f"{subject} must hold class labels for single texts, and numbers among them must "
                f"be whole; y[{position}] is {number:g}. Graded scores go with pairs of texts."
            )
