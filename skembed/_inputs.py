"""Texts, pairs and labels, read from any supported container and checked.

No error quotes a text, which may be long, or private.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._validation import check_choice, describe_type

__all__ = [
    "MISSING_POLICIES",
    "TextColumns",
    "check_labels",
    "check_texts",
    "clean_column",
    "count_columns",
    "extract_columns",
    "is_instance_of",
    "is_missing",
    "kind_of",
    "name_some",
    "read_labels",
    "refuse_foreign_labels",
    "refuse_missing_labels",
    "replace_surrogates",
]

MISSING_POLICIES = ("error", "empty", "zero", "nan")


class TextColumns(NamedTuple):
    """One column of texts, or two for pairs."""

    # The lists belong to the caller. Lone surrogates are U+FFFD, missing texts are empty.
    columns: list[list[str]]
    missing: list[npt.NDArray[np.bool_]]  # a mask (n,) for each column


def check_texts(X: Any, *, owner: str, missing: str = "error", name: str = "X") -> TextColumns:
    """Return texts or pairs of any supported container as lists, and masks of missing ones.

    A list, tuple or other sequence of texts, 2-tuples or 2-lists; an ndarray of shape (n,), (n, 1)
    or (n, 2); a pandas or polars Series, or a frame of one or two columns. The input is left as it
    was. "error" refuses None, NaN, pandas' NA and NaT, and polars' null; any other policy only
    marks them in the mask. Raises TypeError for another container or an item that is not text,
    ValueError for rows that are not pairs, another number of columns and missing texts.
    """
    check_choice(missing, name="missing", owner=owner, allowed=MISSING_POLICIES)
    subject = f"The `{name}` parameter of `{owner}`"
    columns = extract_columns(X, subject=subject)
    if len(columns) == 1 and columns[0] and isinstance(columns[0][0], (list, tuple)):
        columns = _split_pairs(columns[0], subject=subject, name=name)
    suffixes = [""] if len(columns) == 1 else ["[0]", "[1]"]
    masks = [
        clean_column(column, subject=subject, name=name, suffix=suffix)
        for column, suffix in zip(columns, suffixes, strict=True)
    ]
    if missing == "error":
        _refuse_missing(masks, subject=subject, name=name, suffixes=suffixes)
    return TextColumns(columns, masks)


def count_columns(X: Any) -> int:
    """Return the number of text columns, from the shape or the first item; `X` is not checked."""
    shape = getattr(X, "shape", None)
    if shape is not None:
        return int(shape[1]) if len(shape) == 2 else 1
    if isinstance(X, (list, tuple)) and X and isinstance(X[0], (list, tuple)):
        return len(X[0])
    return 1


def replace_surrogates(text: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD, so that UTF-8 can encode it.

    A high surrogate followed by a low one is joined to the character that the two stand for.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def extract_columns(X: Any, *, subject: str) -> list[list[Any]]:
    """Return the columns of any supported container as new lists; items are not checked."""
    if isinstance(X, str):
        raise TypeError(
            f"{subject} must be a list, array or column of texts; got a bare str. Wrap it: [text]."
        )
    if isinstance(X, Sequence) and not isinstance(X, (bytes, bytearray, memoryview)):
        return [list(X)]
    if isinstance(X, np.ndarray):
        return _extract_array(X, subject=subject)
    if is_instance_of(X, "pandas", "DataFrame"):
        _check_width(X.shape[1], subject=subject)
        return [X.iloc[:, j].tolist() for j in range(X.shape[1])]
    if is_instance_of(X, "polars", "DataFrame"):
        _check_width(X.shape[1], subject=subject)
        return [X.to_series(j).to_list() for j in range(X.shape[1])]
    if is_instance_of(X, "pandas", "Series") or is_instance_of(X, "pandas", "Index"):
        return [X.tolist()]
    if is_instance_of(X, "polars", "Series"):
        return [X.to_list()]
    raise TypeError(
        f"{subject} must be a list, array or column of texts; "
        f"got {describe_type(X)}. {_next_step(X)}"
    )


def _extract_array(X: npt.NDArray[Any], *, subject: str) -> list[list[Any]]:
    """Return the columns of an ndarray of shape (n,), (n, 1) or (n, 2)."""
    # np.matrix would keep its slices 2-D; a masked array turns masked items into None itself.
    array = X if isinstance(X, np.ma.MaskedArray) else np.asarray(X)
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{subject} must be an array of shape (n,), (n, 1) or (n, 2); "
            f"got {array.ndim} dimensions, shape {array.shape}. Reshape it to a column of texts."
        )
    if array.ndim == 2:
        _check_width(array.shape[1], subject=subject)
    kind = array.dtype.kind
    # A column without any text usually arrives as float NaN.
    if array.size and kind not in "OUT" and not (kind == "f" and np.isnan(array).all()):
        step = "Decode it: np.char.decode(X, 'utf-8')." if kind == "S" else "Pass the raw texts."
        raise TypeError(
            f"{subject} must be an array of str; got an array of dtype {array.dtype}. {step}"
        )
    if array.ndim == 1:
        return [array.tolist()]
    return [array[:, j].tolist() for j in range(array.shape[1])]


def _split_pairs(rows: list[Any], *, subject: str, name: str) -> list[list[Any]]:
    """Return two columns for rows of two texts."""
    for position, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise TypeError(
                f"{subject} must hold either texts or pairs of texts; {name}[0] is "
                f"{describe_type(rows[0])}, but {name}[{position}] is {describe_type(row)}. "
                "Make every row a pair, or none."
            )
        if len(row) != 2:
            raise ValueError(
                f"{subject} must hold texts or pairs, and a pair has two texts; "
                f"{name}[{position}] has {len(row)}. Flatten nested lists of texts; "
                "rows longer than two are for `fit` only."
            )
    return [[row[0] for row in rows], [row[1] for row in rows]]


def clean_column(
    column: list[Any], *, subject: str, name: str, suffix: str
) -> npt.NDArray[np.bool_]:
    """Make every item of `column` a clean str, in place; return the mask of missing ones, (n,)."""
    mask = np.zeros(len(column), dtype=np.bool_)
    # Two passes at C speed settle the common case; the rest runs only where needed.
    if not set(map(type, column)) <= {str}:
        for position, item in enumerate(column):
            if type(item) is str:
                continue
            if isinstance(item, str):  # numpy.str_, for one
                column[position] = str.__str__(item)
            elif is_missing(item):
                column[position] = ""
                mask[position] = True
            else:
                raise TypeError(
                    f"{subject} must hold texts (str); "
                    f"{name}[{position}]{suffix} is {describe_type(item)}. {_item_step(item)}"
                )
    if not all(map(str.isascii, column)):
        column[:] = map(replace_surrogates, column)
    return mask


def _refuse_missing(
    masks: list[npt.NDArray[np.bool_]], *, subject: str, name: str, suffixes: list[str]
) -> None:
    """Raise if any text is missing, naming the first position and the count."""
    count = sum(int(mask.sum()) for mask in masks)
    if not count:
        return
    position, suffix = min(
        (int(mask.argmax()), suffix)
        for mask, suffix in zip(masks, suffixes, strict=True)
        if mask.any()
    )
    raise ValueError(
        f"{subject} must hold no missing texts; got {count} missing, the first at "
        f"{name}[{position}]{suffix}. Fill or drop them, or set missing='empty', "
        "missing='zero' or missing='nan' on the vectorizer to embed them as an empty text, "
        "zeros or NaN."
    )


def _check_width(n_columns: int, *, subject: str) -> None:
    """Raise unless a table has one or two columns."""
    if n_columns not in (1, 2):
        raise ValueError(
            f"{subject} must have one column of texts, or two columns of pairs; "
            f"got {n_columns} columns. Select the text columns first."
        )


def is_instance_of(value: Any, module: str, class_name: str) -> bool:
    """Return whether `value` is of a class of `module`, without importing that module."""
    # An object of the class can exist only after something has imported its module.
    cls = getattr(sys.modules.get(module), class_name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def is_missing(item: Any) -> bool:
    """Return whether `item` stands for a missing text: None, NaN, NaT, pandas' NA."""
    if item is None or item is np.ma.masked:
        return True
    if isinstance(item, (float, np.floating)):
        return math.isnan(item)
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return type(item).__name__ in ("NAType", "NaTType")


def _next_step(X: Any) -> str:
    """Return how to turn a container of the wrong kind into a list of texts."""
    if isinstance(X, (bytes, bytearray, memoryview)):
        return "Decode and wrap it: [data.decode('utf-8')]."
    if isinstance(X, Mapping):
        return "Pass its texts: list(X.values())."
    if hasattr(X, "tocsr"):
        return "Pass the raw texts, not a sparse matrix of features."
    if isinstance(X, Set):
        return "It has no order; pass sorted(X)."
    if is_instance_of(X, "polars", "LazyFrame"):
        return "Collect it first: X.collect()."
    if isinstance(X, (Iterator, Iterable)):
        return "Make it a list first: list(X)."
    return "Pass the raw texts as a list."


def _item_step(item: Any) -> str:
    """Return what to do about an item that is not a text."""
    if isinstance(item, (bytes, bytearray)):
        return "Decode it: item.decode('utf-8')."
    if isinstance(item, (list, tuple)):
        return "Give either texts or pairs of two texts, not both."
    return "Convert it, or drop the row."


# Labels


def check_labels(X: Any, y: Any, *, owner: str) -> npt.NDArray[Any]:
    """Return the labels of the rows of X, (n,) or (n, n_labels), of at least two classes."""
    # Not at the top: scikit-learn imports pandas, which texts alone never need.
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, column_or_1d

    if y is None:
        raise ValueError(
            f"{owner} requires y to be passed, but the target y is None. Pass one label a text."
        )
    labels = np.asarray(y)
    if labels.ndim != 2 or labels.shape[1] == 1:
        labels = column_or_1d(y, warn=True)
        refuse_missing_labels(labels, owner=owner)
        if len(labels) and len(np.unique(labels)) < 2:
            raise ValueError(
                f"The `y` parameter of `{owner}` must hold at least 2 classes; got 1 class: "
                f"{name_some(labels[:1])}."
            )
        if labels.dtype.kind == "f" and (labels != np.rint(labels)).any():
            raise ValueError(
                f"Unknown label type: continuous. The `y` parameter of `{owner}` must hold class "
                "labels; got fractions."
            )
    else:
        check_classification_targets(labels)
    # A bare str has a length, too; others report it, and what has no length.
    if not isinstance(X, (str, bytes)) and (hasattr(X, "__len__") or hasattr(X, "shape")):
        check_consistent_length(X, labels)
    return labels


def refuse_missing_labels(labels: npt.NDArray[Any], *, owner: str) -> None:
    """Raise ValueError for None and NaN among labels, TypeError for labels of several types."""
    if labels.dtype.kind == "O":
        absent = [i for i, label in enumerate(labels) if is_missing(label)]
        kinds = {isinstance(label, str) for label in labels}
        if not absent and len(kinds) > 1:
            raise TypeError(
                f"The `y` parameter of `{owner}` must hold labels of one type; got str and others."
            )
    else:
        absent = np.flatnonzero(np.isnan(labels)).tolist() if labels.dtype.kind == "f" else []
    if absent:
        raise ValueError(
            f"The `y` parameter of `{owner}` must hold no missing labels, such as None or NaN; "
            f"got {len(absent)}, the first at y[{absent[0]}]. Drop these rows."
        )


def refuse_foreign_labels(y: Any, classes: Any, *, owner: str) -> None:
    """Raise ValueError if `fit` saw none of the labels, which are then of another kind."""
    labels = np.asarray(y)
    if labels.ndim != 1 or not len(labels) or isinstance(classes, list):
        return
    if not set(np.asarray(classes).tolist()).intersection(labels.tolist()):
        raise ValueError(
            f"The `y` parameter of `{owner}.score` must hold labels that `fit` saw, at least "
            f"some; got none of them. They are {name_some(classes)}, of dtype "
            f"{np.asarray(classes).dtype}; those in y are of dtype {labels.dtype}."
        )


def name_some(labels: Any) -> str:
    """Return the first three labels as text."""
    shown = ", ".join(repr(label) for label in np.asarray(labels)[:3].tolist())
    return f"{shown}, ..." if len(labels) > 3 else shown


def read_labels(labels: Any, n: int, *, name: str, owner: str) -> npt.NDArray[Any]:
    """Return class labels as an array of str, int or bool, (n,); whole floats become int."""
    subject = f"The `{name}` parameter of `{owner}`"
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ValueError(
            f"{subject} must be of shape ({n},), one label a text; got shape {array.shape}."
        )
    items = list(labels) if isinstance(labels, (list, tuple)) else array.tolist()
    kinds = {kind_of(item) for item in items}
    if None in kinds:
        position = next(i for i, item in enumerate(items) if kind_of(item) is None)
        raise TypeError(
            f"{subject} must hold labels of str, int or bool; {name}[{position}] is of type "
            f"{type(items[position]).__name__}. Drop missing labels, round or bin numbers."
        )
    if len(kinds) > 1:
        raise TypeError(f"{subject} must hold labels of one type; got {sorted(map(str, kinds))}.")
    return np.array(
        [int(item) if isinstance(item, (float, np.floating)) else item for item in items]
    )


def kind_of(label: Any) -> str | None:
    """Return "str", "bool" or "int" for a label, whole floats included; None for anything else."""
    if isinstance(label, str):
        return "str"
    if isinstance(label, (bool, np.bool_)):
        return "bool"
    if isinstance(label, (int, np.integer)):
        return "int"
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return "int"
    return None
