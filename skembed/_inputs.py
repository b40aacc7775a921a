"""What `X` and `y` mean: texts, columns of texts, pairs and labels of any supported container.

`read_columns` decides it, for every estimator and function:

- one text a row (a list, an array, a Series, a frame of one column) is one column of texts;
- a list of tuples (or lists) of k texts is k columns, and these rows are what training reads as
  pairs or rows of anchor, positive and negatives;
- a frame or an array of k columns is k columns of texts, features, and never pairs to train on.

`read_items` reads everything that has one entry a row (labels, scores, ids, groups), and
`is_missing` says everywhere what counts as missing. No error quotes a text, which may be long, or
private.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._validation import check_choice, check_int64, describe_type

__all__ = [
    "MISSING_POLICIES",
    "RawColumns",
    "TextColumns",
    "check_columns",
    "check_hashable",
    "check_known_labels",
    "check_label_items",
    "check_labels",
    "check_texts",
    "clean_column",
    "column_names",
    "find_missing",
    "holds_rows",
    "is_instance_of",
    "is_missing",
    "kind_of",
    "name_some",
    "read_columns",
    "read_items",
    "read_label_array",
    "read_labels",
    "read_numbers",
    "read_weights",
    "replace_surrogates",
    "to_float",
    "tuples_step",
]

MISSING_POLICIES = ("error", "empty", "zero", "nan")
_SEVERAL_LABELS_STEP = (
    "For several labels a text, pass an indicator matrix, "
    "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y), to an `EmbeddingClassifier` "
    "with head=sklearn.multiclass.OneVsRestClassifier(LogisticRegression())."
)


class TextColumns(NamedTuple):
    """Columns of texts, one or more."""

    # The lists belong to the caller. Lone surrogates are U+FFFD, missing texts are empty.
    columns: list[list[str]]
    missing: list[npt.NDArray[np.bool_]]  # a mask (n,) for each column


class RawColumns(NamedTuple):
    """The columns of a container as new lists; their items are not checked."""

    columns: list[list[Any]]
    is_rows: bool  # a list of tuples (or lists): pairs or rows, where one trains


# Texts


def check_texts(X: Any, *, owner: str, missing: str = "error", name: str = "X") -> TextColumns:
    """Return the columns of any supported container as lists of str, and masks of missing ones.

    What `read_columns` takes. The input is left as it was. "error" refuses what `is_missing` says
    is missing; any other policy only marks it in the mask. Raises TypeError for another container
    or an item that is not text, ValueError for rows of different lengths and missing texts.
    """
    check_choice(missing, name="missing", owner=owner, allowed=MISSING_POLICIES)
    subject = f"The `{name}` parameter of `{owner}`"
    columns, _ = read_columns(X, subject=subject, name=name)
    suffixes = [""] if len(columns) == 1 else [f"[{j}]" for j in range(len(columns))]
    masks = [
        clean_column(column, subject=subject, name=name, suffix=suffix)
        for column, suffix in zip(columns, suffixes, strict=True)
    ]
    if missing == "error":
        _refuse_missing(masks, subject=subject, name=name, suffixes=suffixes)
    return TextColumns(columns, masks)


def read_columns(X: Any, *, subject: str, name: str = "X") -> RawColumns:
    """Return the columns of texts of any supported container: the rule of this module.

    A list, tuple or other sequence of texts, or of tuples (or lists) of k texts; an ndarray of
    shape (n,) or (n, k); a Series, Index, array, frame or table of pandas, polars, pyarrow,
    narwhals or datasets. Raises TypeError for another container, ValueError for another shape or
    rows of different lengths; items are not checked.
    """
    columns = _list_columns(X, subject=subject, of="texts")
    if len(columns) == 1 and columns[0] and isinstance(columns[0][0], (list, tuple)):
        return RawColumns(_transpose(columns[0], subject=subject, name=name), True)
    return RawColumns(columns, False)


def holds_rows(X: Any, *, subject: str) -> bool:
    """Return whether X is a list of tuples (or lists), as training reads pairs and rows.

    Raises as `read_columns`.
    """
    if not isinstance(X, (list, tuple)):
        return read_columns(X, subject=subject).is_rows
    return bool(X) and isinstance(X[0], (list, tuple))


def column_names(X: Any) -> list[str] | None:
    """Return the names of the columns of a frame or table; None where they are not distinct str."""
    names: Any = getattr(X, "column_names", None)  # pyarrow, datasets
    if not isinstance(names, list):
        names = getattr(X, "columns", None)
    if names is None or isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        return None
    names = list(names)
    is_named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if is_named else None


def check_columns(estimator: Any, X: Any, n_columns: int, *, owner: str) -> None:
    """Raise ValueError for other columns of texts than `fit` saw: another number, names or order.

    One column may go by any name.
    """
    n_fitted = getattr(estimator, "n_features_in_", n_columns)
    if n_columns != n_fitted:
        raise ValueError(
            f"X has {n_columns} text columns, but {owner} was fitted with {n_fitted}. Pass the "
            "same columns, or fit again."
        )
    names, fitted = column_names(X), getattr(estimator, "feature_names_in_", None)
    if n_columns > 1 and names is not None and fitted is not None and names != fitted.tolist():
        raise ValueError(
            f"X has the text columns {names}, but {owner} was fitted with {fitted.tolist()}. Pass "
            "the same columns in the same order, or fit again."
        )


def tuples_step(X: Any) -> str:
    """Return the expression that makes tuples of the rows of a table."""
    if isinstance(X, np.ndarray):
        return "X.tolist()"
    if is_instance_of(X, "pandas", "DataFrame"):
        return "list(X.itertuples(index=False, name=None))"
    if hasattr(X, "rows"):  # polars, narwhals
        return "X.rows()"
    if is_instance_of(X, "datasets", "Dataset"):
        return "list(zip(*(X[name] for name in X.column_names)))"
    return "list(zip(*X.to_pydict().values()))"


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
                    f"{name}[{position}]{suffix} is {describe_type(item)}. "
                    f"{_item_step(item, suffix)}"
                )
    if not all(map(str.isascii, column)):
        column[:] = map(replace_surrogates, column)
    return mask


def _transpose(rows: list[Any], *, subject: str, name: str) -> list[list[Any]]:
    """Turn n rows of k texts into k columns of n."""
    k = len(rows[0])
    if k < 2:
        raise ValueError(
            f"{subject} must hold texts, or rows of several, and a pair has two texts; {name}[0] "
            f"has {k}. Flatten nested lists of texts: [text for row in {name} for text in row]."
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
                f"{name}[{position}] has {len(row)}. Give each row as many, or train on rows of "
                "different lengths as different tasks."
            )
    return [list(column) for column in zip(*rows, strict=True)]


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


def _item_step(item: Any, suffix: str) -> str:
    """Return what to do about an item that is not a text."""
    if isinstance(item, (bytes, bytearray)):
        return "Decode it: item.decode('utf-8')."
    if isinstance(item, (list, tuple)):
        return "Give either texts or pairs of two texts, not both."
    if isinstance(item, Mapping):
        return "Take its text, such as item['text']."
    if hasattr(item, "keys"):  # a row of a database
        return "Make tuples of such rows: [tuple(row) for row in X]."
    return f"Convert it, or drop the {'column' if suffix else 'row'}."


# Containers


def is_instance_of(value: Any, module: str, class_name: str) -> bool:
    """Return whether `value` is of a class of `module`, without importing that module."""
    # An object of the class can exist only after something has imported its module.
    cls = getattr(sys.modules.get(module), class_name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def is_missing(item: Any) -> bool:
    """Return whether an item is missing: None, NaN (float, numpy, Decimal), NaT, pandas' NA.

    polars' and pyarrow's null are None, numpy's masked items its `masked` or None.
    """
    if item is None or item is np.ma.masked:
        return True
    if isinstance(item, (float, np.floating)):
        return math.isnan(item)
    if isinstance(item, Decimal):
        return item.is_nan()
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return type(item).__name__ in ("NAType", "NaTType")


def find_missing(items: Sequence[Any]) -> list[int]:
    """Return the positions of missing items."""
    if set(map(type, items)) <= {str, int, bool}:  # at C speed
        return []
    return [position for position, item in enumerate(items) if is_missing(item)]


def read_items(values: Any, *, subject: str, of: str = "labels") -> list[Any]:
    """Return the items of a container with one entry a row as a new list; they are not checked.

    The same containers as `read_columns`, of one column. Raises TypeError for another container,
    ValueError for several columns.
    """
    columns = _list_columns(values, subject=subject, of=of)
    if len(columns) != 1:
        shape = getattr(values, "shape", None)
        raise ValueError(
            f"{subject} must have one dimension; got {len(columns)} columns"
            f"{'' if shape is None else f', shape {tuple(shape)}'}. Pass one of the {of} a row."
        )
    # A member of a str enum is the str it holds; NumPy would take its name, cut to that length.
    if any(issubclass(kind, str) and kind is not str for kind in set(map(type, columns[0]))):
        return [str.__str__(item) if isinstance(item, str) else item for item in columns[0]]
    return columns[0]


def check_hashable(items: Sequence[Any], *, subject: str, of: str) -> None:
    """Raise TypeError for keys that no dict takes, such as lists; `subject` begins the sentence."""
    try:
        set(items)
    except TypeError as error:
        item = next(item for item in items if not _is_hashable(item))
        raise TypeError(
            f"{subject} must hold {of} of str or int; one is {describe_type(item)}. Pass a flat "
            "list of them."
        ) from error


def _is_hashable(item: Any) -> bool:
    """Return whether a dict takes an item as a key; a tuple may hold what it doesn't."""
    try:
        hash(item)
    except TypeError:
        return False
    return True


def _list_columns(X: Any, *, subject: str, of: str) -> list[list[Any]]:
    """Return the columns of any supported container as new lists; items are not checked."""
    if isinstance(X, str):
        raise TypeError(
            f"{subject} must be a list, array or column of {of}; got a bare str. "
            f"Wrap it: [{of.removesuffix('s').partition(' ')[0]}]."
        )
    if isinstance(X, Sequence) and not isinstance(X, (bytes, bytearray, memoryview)):
        items = list(X)
        if items and hasattr(items[0], "as_py"):  # scalars of pyarrow, from a loop over an array
            items = [item.as_py() if hasattr(item, "as_py") else item for item in items]
        return [items]
    if isinstance(X, np.ndarray):
        return _list_array(X, subject=subject, of=of)
    columns = _list_foreign(X, subject=subject, of=of)
    if columns is None:
        raise TypeError(
            f"{subject} must be a list, array or column of {of}; "
            f"got {describe_type(X)}. {_next_step(X, of)}"
        )
    if not columns:
        raise ValueError(f"{subject} must have a column of {of}; got 0 columns.")
    return columns


def _list_foreign(X: Any, *, subject: str, of: str) -> list[list[Any]] | None:
    """Return the columns of a container of another package; None for what is not supported."""
    if is_instance_of(X, "pandas", "DataFrame"):
        return [X.iloc[:, j].tolist() for j in range(X.shape[1])]
    if is_instance_of(X, "pandas", "MultiIndex"):
        return [X.get_level_values(j).tolist() for j in range(X.nlevels)]
    if (
        is_instance_of(X, "pandas", "Series")
        or is_instance_of(X, "pandas", "Index")
        or is_instance_of(X, "pandas.api.extensions", "ExtensionArray")
    ):
        return [list(X.tolist())]
    if is_instance_of(X, "polars", "Series"):
        return [X.to_list()]
    if is_instance_of(X, "polars", "DataFrame"):
        return [X.to_series(j).to_list() for j in range(X.shape[1])]
    if is_instance_of(X, "pyarrow", "Array") or is_instance_of(X, "pyarrow", "ChunkedArray"):
        return [X.to_pylist()]
    if is_instance_of(X, "pyarrow", "Table") or is_instance_of(X, "pyarrow", "RecordBatch"):
        return [column.to_pylist() for column in X.columns]
    if is_instance_of(X, "narwhals", "Series") or is_instance_of(X, "narwhals", "DataFrame"):
        return _list_foreign(X.to_native(), subject=subject, of=of)
    if is_instance_of(X, "datasets", "Dataset"):
        return [list(X[name]) for name in X.column_names]
    is_lazy = hasattr(X, "__dask_graph__")  # its array would be computed unasked
    if hasattr(X, "__array__") and not is_lazy and not hasattr(X, "tocsr"):
        return _list_array(np.asarray(X), subject=subject, of=of)
    return None


def _list_array(X: npt.NDArray[Any], *, subject: str, of: str) -> list[list[Any]]:
    """Return the columns of an ndarray of shape (n,) or (n, k)."""
    # np.matrix would keep its slices 2-D; a masked array turns masked items into None itself.
    array = X if isinstance(X, np.ma.MaskedArray) else np.asarray(X)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not array.shape[1]):
        got = f"{array.ndim} dimensions" if array.ndim != 2 else "0 columns"
        raise ValueError(
            f"{subject} must be an array of shape (n,) or (n, n_columns); "
            f"got {got}, shape {array.shape}. Reshape it to a column of {of}."
        )
    kind = array.dtype.kind
    # A column without any text usually arrives as float NaN.
    is_empty = not array.size or (kind == "f" and bool(np.isnan(array).all()))
    if of == "texts" and kind not in "OUT" and not is_empty:
        step = "Decode it: np.char.decode(X, 'utf-8')." if kind == "S" else "Pass the raw texts."
        raise TypeError(
            f"{subject} must be an array of str; got an array of dtype {array.dtype}. {step}"
        )
    if kind == "c":
        raise ValueError(f"Complex data not supported: {subject} must hold {of}.")
    if kind in "mM":  # as a list, dates would turn into ints, which pass for labels
        return [list(column) for column in (array[:, None] if array.ndim == 1 else array).T]
    if array.ndim == 1:
        return [array.tolist()]
    return [array[:, j].tolist() for j in range(array.shape[1])]


def _next_step(X: Any, of: str) -> str:
    """Return how to turn a container of the wrong kind into one that is read."""
    if isinstance(X, (bytes, bytearray, memoryview)):
        return "Decode and wrap it: [data.decode('utf-8')]."
    if is_instance_of(X, "datasets", "DatasetDict"):
        return "Pass a column of one split, such as X['train']['text']."
    if isinstance(X, Mapping):
        return f"Pass its {of}: list(X.values())."
    if hasattr(X, "tocsr"):
        return f"Pass the raw {of}, not a sparse matrix of features."
    if isinstance(X, Set):
        return "It has no order; pass sorted(X)."
    if is_instance_of(X, "datasets", "IterableDataset"):
        return "Take one column of it, such as [row['text'] for row in X]."
    # What is lazy, or knows how to become one of the above.
    for method in ("collect", "compute", "to_pylist", "to_list", "to_pandas", "to_numpy", "tolist"):
        if callable(getattr(X, method, None)) and not isinstance(X, type):
            return f"{'Collect' if method == 'collect' else 'Convert'} it first: X.{method}()."
    if isinstance(X, (Iterator, Iterable)):
        return "Make it a list first: list(X)."
    return f"Pass the raw {of} as a list."


# Labels, scores and vectors


def check_labels(X: Any, y: Any, *, owner: str) -> npt.NDArray[Any]:
    """Return the labels of the rows of X, (n,) or (n, n_labels), of at least two classes."""
    # Not at the top: scikit-learn imports pandas, which texts alone never need.
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length

    if y is None:
        raise ValueError(
            f"{owner} requires y to be passed, but the target y is None. Pass one label a text."
        )
    labels = _read_indicators(y)
    if labels is not None:
        check_classification_targets(labels)
    else:
        labels = read_label_array(y, name="y", owner=owner)
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
    # A bare str has a length, too; others report it, and what has no length.
    if not isinstance(X, (str, bytes)) and (hasattr(X, "__len__") or hasattr(X, "shape")):
        check_consistent_length(X, labels)
    return labels


def _read_indicators(y: Any) -> npt.NDArray[Any] | None:
    """Return an indicator matrix (n, n_labels) of several labels a text; None for anything else."""
    if hasattr(y, "tocsr"):
        y = y.toarray()
    shape = getattr(y, "shape", None)
    if shape is None:
        is_list = isinstance(y, (list, tuple)) and len(y) > 0
        if not is_list or not all(isinstance(row, (list, tuple, np.ndarray)) for row in y):
            return None
    elif len(shape) != 2:
        return None
    try:
        matrix = np.asarray(y)
    except ValueError:  # lists of labels, of different lengths
        return None
    is_matrix = matrix.ndim == 2 and matrix.shape[1] != 1 and matrix.dtype.kind in "iubf"
    return matrix if is_matrix else None


def read_label_array(y: Any, *, name: str, owner: str, item: str | None = None) -> npt.NDArray[Any]:
    """Return labels as an array, (n,): str, bool or numbers, none missing, all of one type.

    `item` is what a position is counted in, where that is not `name`. Raises TypeError and
    ValueError.
    """
    from sklearn.utils.validation import column_or_1d

    if is_instance_of(y, "pandas", "Series") and isinstance(y.dtype, np.dtype):
        y = y.to_numpy()
    if isinstance(y, np.ndarray) and not isinstance(y, np.ma.MaskedArray):
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if y.ndim == 1 and y.dtype.kind in "iubU":
            return y
    items = read_items(y, subject=f"The `{name}` parameter of `{owner}`")
    check_label_items(items, name=name, owner=owner, item=item)
    is_plain = is_instance_of(y, "pandas", "Series") or isinstance(y, np.ndarray)
    array = np.asarray(y if is_plain else items)
    is_text = bool(items) and isinstance(items[0], str)
    if is_text and array.dtype.kind == "O":
        array = np.array(items, dtype=object)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        position = int(np.isfinite(array).argmin())
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must hold finite numbers; "
            f"{name if item is None else item}[{position}] is not finite. Drop or clip them."
        )
    return array if array.dtype.kind in ("OU" if is_text else "iubf") else np.asarray(items)


def check_label_items(
    items: Sequence[Any], *, name: str, owner: str, item: str | None = None
) -> None:
    """Raise for a missing label, one that is no str, bool or number, and str beside numbers."""
    subject, item = f"The `{name}` parameter of `{owner}`", name if item is None else item
    kinds = set(map(type, items))
    if kinds == {int}:  # of others NumPy makes floats, in which neighbours are equal, or objects
        check_int64(items, subject=subject, name=item, step="Convert the labels to str.")
    if kinds in (set(), {str}, {int}, {bool}):  # at C speed
        return
    absent = find_missing(items)
    if absent:
        raise ValueError(
            f"{subject} must hold no missing labels, such as None or NaN; got {len(absent)}, the "
            f"first at {item}[{absent[0]}]. Drop these rows."
        )
    for position, label in enumerate(items):
        if isinstance(label, (list, tuple, set, frozenset, np.ndarray)):
            raise TypeError(
                f"{subject} must hold one label a text; {item}[{position}] is "
                f"{describe_type(label)}. {_SEVERAL_LABELS_STEP}"
            )
        if not isinstance(label, (str, float, np.floating)) and kind_of(label) is None:
            raise TypeError(
                f"{subject} must hold labels of str, int or bool; {item}[{position}] is "
                f"{describe_type(label)}. Convert the labels to str."
            )
        if isinstance(label, str) != isinstance(items[0], str):
            raise TypeError(
                f"{subject} must hold labels of one type; {item}[0] is "
                f"{describe_type(items[0])}, but {item}[{position}] is {describe_type(label)}. "
                "Convert the labels to str."
            )


def check_known_labels(y: Any, classes: Any, *, owner: str) -> Any:
    """Return the labels to score by; raise ValueError if `fit` saw none of them."""
    if isinstance(classes, list) or _read_indicators(y) is not None:  # several labels a text
        return y
    labels = read_label_array(y, name="y", owner=f"{owner}.score")
    if len(labels) and not set(np.asarray(classes).tolist()).intersection(labels.tolist()):
        raise ValueError(
            f"The `y` parameter of `{owner}.score` must hold labels that `fit` saw, at least "
            f"some; got none of them. They are {name_some(classes)}, of dtype "
            f"{np.asarray(classes).dtype}; those in y are of dtype {labels.dtype}."
        )
    return labels


def name_some(labels: Any) -> str:
    """Return the first three labels as text."""
    shown = ", ".join(repr(label) for label in np.asarray(labels)[:3].tolist())
    return f"{shown}, ..." if len(labels) > 3 else shown


def read_labels(labels: Any, n: int, *, name: str, owner: str) -> npt.NDArray[Any]:
    """Return class labels as an array of str, int or bool, (n,); whole floats become int."""
    subject = f"The `{name}` parameter of `{owner}`"
    items = read_items(labels, subject=subject)
    if len(items) != n:
        raise ValueError(
            f"{subject} must be of shape ({n},), one label a text; got shape ({len(items)},)."
        )
    check_label_items(items, name=name, owner=owner)
    for position, item in enumerate(items):
        if kind_of(item) is None:
            raise TypeError(
                f"{subject} must hold labels of str, int or bool; {name}[{position}] is "
                f"{describe_type(item)} with a fraction; round or bin numbers."
            )
    whole = [int(item) if isinstance(item, (float, np.floating)) else item for item in items]
    check_label_items(whole, name=name, owner=owner)
    return np.array(whole)


def kind_of(label: Any) -> str | None:
    """Return "str", "bool" or "int" for a label, whole floats included; None for anything else."""
    if isinstance(label, str):
        return "str"
    if isinstance(label, (bool, np.bool_)):
        return "bool"
    if isinstance(label, (int, np.integer)) and not isinstance(label, np.timedelta64):
        return "int"
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return "int"
    return None


def read_weights(weights: Any, *, owner: str) -> npt.NDArray[np.float64] | None:
    """Return weights of rows as float64, (n,), none below 0 and one above; None for None."""
    if weights is None:
        return None
    values = read_numbers(weights, name="sample_weight", owner=owner)
    if (values < 0).any() or not values.any():
        got = "negative ones" if (values < 0).any() else "only zeros"
        raise ValueError(
            f"The `sample_weight` parameter of `{owner}` must hold weights of 0 or more, at least "
            f"one non-zero number; got {got}."
        )
    return values


def read_numbers(y: Any, *, name: str, owner: str, n: int | None = None) -> npt.NDArray[np.float64]:
    """Return scores or grades as float64, (n,), finite and none missing."""
    from sklearn.utils.validation import column_or_1d

    subject = f"The `{name}` parameter of `{owner}`"
    if y is None:
        raise ValueError(f"{owner} requires {name} to be passed, but the target {name} is None.")
    if isinstance(y, np.ndarray) and y.ndim == 2 and y.shape[1] == 1:
        y = column_or_1d(y, warn=True)
    items = read_items(y, subject=subject, of="numbers")
    absent = find_missing(items)
    if absent:
        raise ValueError(
            f"{subject} must hold no missing numbers, such as None or NaN; got {len(absent)}, the "
            f"first at {name}[{absent[0]}]. Drop these rows."
        )
    is_number = [_is_number(item) or isinstance(item, Decimal) for item in items]
    position = is_number.index(False) if not all(is_number) else None
    if position is not None:
        raise TypeError(
            f"{subject} must hold numbers; {name}[{position}] is "
            f"{describe_type(items[position])}. Convert it, or drop the row."
        )
    if n is not None and len(items) != n:
        raise ValueError(f"{subject} must hold numbers of shape ({n},); got shape ({len(items)},).")
    values = np.fromiter(map(to_float, items), dtype=np.float64, count=len(items))
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"{subject} must hold finite numbers; got {int((~finite).sum())} that are not, the "
            f"first at {name}[{int(finite.argmin())}]. Drop or clip them."
        )
    return values


def _is_number(item: Any) -> bool:
    """Return whether an item is a real number or a bool; numpy's durations are ints to Python."""
    return isinstance(item, (numbers.Real, np.bool_)) and not isinstance(item, np.timedelta64)


def to_float(value: Any) -> float:
    """Return a real number as a float, one beyond its range as an infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
