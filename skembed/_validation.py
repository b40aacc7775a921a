"""Check what users hand in, with one sentence shape for every error.

``check_texts`` turns any supported container into plain lists of ``str``; the
other ``check_*`` functions hold one parameter each to its type and range and
return it as a built-in Python value. All messages read "The `top_k` parameter of
`Retriever` must be an int in [1, 42]; got 0.", followed by the next step. Texts
themselves are never quoted in an error: they may be long, or private.
"""

import difflib
import importlib
import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

__all__ = [
    "MISSING_POLICIES",
    "TextColumns",
    "check_bool",
    "check_choice",
    "check_int",
    "check_real",
    "check_string",
    "check_texts",
    "count_columns",
    "import_optional",
    "replace_surrogates",
]

MISSING_POLICIES = ("error", "empty", "zero", "nan")

_T = TypeVar("_T")
_Inclusive = Literal["both", "left", "right", "neither"]


class TextColumns(NamedTuple):
    """One column of texts, or two for pairs.

    Attributes
    ----------
    columns : list of list of str
        One or two lists of n texts each. Lone surrogates are replaced by U+FFFD,
        missing entries by the empty text. The lists belong to the caller.
    missing : list of ndarray of shape (n,), dtype bool
        One mask per column; True where the text was missing.
    """

    columns: list[list[str]]
    missing: list[npt.NDArray[np.bool_]]


def check_texts(X: Any, *, owner: str, missing: str = "error", name: str = "X") -> TextColumns:
    """Turn a container of texts, or of pairs of texts, into plain lists.

    Costs one pass over the items and one list per column; strings are shared with
    the input, which is left as it was.

    Parameters
    ----------
    X : list, tuple, ndarray, Series or DataFrame of str
        Texts: a list, tuple or other sequence; an ndarray (object, str or
        StringDType) of shape (n,) or (n, 1); a pandas or polars Series, or a frame
        of one column. Pairs: a sequence of 2-tuples or 2-lists, an ndarray of shape
        (n, 2), or a frame of two columns. May be empty.
    owner : str
        Name of the estimator or function to name in errors.
    missing : {"error", "empty", "zero", "nan"}, default="error"
        "error" refuses None, NaN, pandas' NA and NaT, and polars' null. All others
        mark them in the mask; what they turn into is the caller's affair.
    name : str, default="X"
        Name of the argument to name in errors.

    Returns
    -------
    TextColumns
        Columns and masks, in input order.

    Raises
    ------
    TypeError
        If `X` is a bare text, bytes, a number, an unordered or one-shot container,
        or a sparse matrix; or if an item is not a text.
    ValueError
        If `X` has neither one nor two columns, if rows are not pairs, if a text is
        missing under ``missing="error"``, or if `missing` is unknown.

    Examples
    --------
    >>> from skembed._validation import check_texts
    >>> check_texts(["a cat", "a dog"], owner="NVEmbedVectorizer").columns
    [['a cat', 'a dog']]
    >>> check_texts([("a cat", "a dog")], owner="NVEmbedVectorizer").columns
    [['a cat'], ['a dog']]
    """
    check_choice(missing, name="missing", owner=owner, allowed=MISSING_POLICIES)
    subject = f"The `{name}` parameter of `{owner}`"
    columns = _extract_columns(X, subject=subject)
    if len(columns) == 1 and columns[0] and isinstance(columns[0][0], (list, tuple)):
        columns = _split_pairs(columns[0], subject=subject, name=name)
    suffixes = [""] if len(columns) == 1 else ["[0]", "[1]"]
    masks = [
        _clean_column(column, subject=subject, name=name, suffix=suffix)
        for column, suffix in zip(columns, suffixes, strict=True)
    ]
    if missing == "error":
        _refuse_missing(masks, subject=subject, name=name, suffixes=suffixes)
    return TextColumns(columns, masks)


def count_columns(X: Any) -> int:
    """Text columns of a container as it looks: 1 for single texts, more for pairs and rows.

    Looks at the shape or the first item only; whether `X` is in order is for others to check.

    >>> from skembed._validation import count_columns
    >>> count_columns([("a cat", "a feline", "a dog")])
    3
    """
    shape = getattr(X, "shape", None)
    if shape is not None:
        return int(shape[1]) if len(shape) == 2 else 1
    if isinstance(X, (list, tuple)) and X and isinstance(X[0], (list, tuple)):
        return len(X[0])
    return 1


def replace_surrogates(text: str) -> str:
    r"""Return `text` with each lone surrogate replaced by U+FFFD, so that UTF-8 can hold it.

    A high surrogate followed by a low one is joined to the character the two stand for.
    A text without surrogates is returned as it is.

    >>> from skembed._validation import replace_surrogates
    >>> replace_surrogates("caf\udce9") == "caf\ufffd"
    True
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _extract_columns(X: Any, *, subject: str) -> list[list[Any]]:
    """Return the columns of any supported container as fresh lists; items unchecked."""
    if isinstance(X, str):
        raise TypeError(
            f"{subject} must be a list, array or column of texts; got a bare str. Wrap it: [text]."
        )
    if isinstance(X, np.ndarray):
        return _extract_array(X, subject=subject)
    if _is_instance_of(X, "pandas", "DataFrame"):
        _check_width(X.shape[1], subject=subject)
        return [X.iloc[:, j].tolist() for j in range(X.shape[1])]
    if _is_instance_of(X, "polars", "DataFrame"):
        _check_width(X.shape[1], subject=subject)
        return [X.to_series(j).to_list() for j in range(X.shape[1])]
    if _is_instance_of(X, "pandas", "Series") or _is_instance_of(X, "pandas", "Index"):
        return [X.tolist()]
    if _is_instance_of(X, "polars", "Series"):
        return [X.to_list()]
    if isinstance(X, Sequence) and not isinstance(X, (bytes, bytearray, memoryview)):
        return [list(X)]
    raise TypeError(
        f"{subject} must be a list, array or column of texts; "
        f"got {_describe_type(X)}. {_next_step(X)}"
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
    # A column that is missing throughout usually arrives as float NaN.
    if array.size and kind not in "OUT" and not (kind == "f" and np.isnan(array).all()):
        step = "Decode it: np.char.decode(X, 'utf-8')." if kind == "S" else "Pass the raw texts."
        raise TypeError(
            f"{subject} must be an array of str; got an array of dtype {array.dtype}. {step}"
        )
    if array.ndim == 1:
        return [array.tolist()]
    return [array[:, j].tolist() for j in range(array.shape[1])]


def _split_pairs(rows: list[Any], *, subject: str, name: str) -> list[list[Any]]:
    """Split rows of two texts into two columns."""
    for position, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise TypeError(
                f"{subject} must hold either texts or pairs of texts; {name}[0] is "
                f"{_describe_type(rows[0])}, but {name}[{position}] is {_describe_type(row)}. "
                "Make every row a pair, or none."
            )
        if len(row) != 2:
            raise ValueError(
                f"{subject} must hold texts or pairs, and a pair has two texts; "
                f"{name}[{position}] has {len(row)}. Flatten nested lists of texts; "
                "rows longer than two are for `fit` only."
            )
    return [[row[0] for row in rows], [row[1] for row in rows]]


def _clean_column(
    column: list[Any], *, subject: str, name: str, suffix: str
) -> npt.NDArray[np.bool_]:
    """Make every item of `column` a clean str, in place; return the mask of missing ones, (n,)."""
    mask = np.zeros(len(column), dtype=np.bool_)
    # Two passes at C speed settle the common case; the loops run only where needed.
    if not set(map(type, column)) <= {str}:
        for position, item in enumerate(column):
            if type(item) is str:
                continue
            if isinstance(item, str):  # numpy.str_, for one
                column[position] = str.__str__(item)
            elif _is_missing(item):
                column[position] = ""
                mask[position] = True
            else:
                raise TypeError(
                    f"{subject} must hold texts (str); "
                    f"{name}[{position}]{suffix} is {_describe_type(item)}. {_item_step(item)}"
                )
    if not all(map(str.isascii, column)):
        for position, text in enumerate(column):
            if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    column[position] = replace_surrogates(text)
    return mask


def _refuse_missing(
    masks: list[npt.NDArray[np.bool_]], *, subject: str, name: str, suffixes: list[str]
) -> None:
    """Raise if any text is missing, naming the first place and the count."""
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


def _is_instance_of(value: Any, module: str, class_name: str) -> bool:
    """Tell whether `value` is of a class of `module`, without importing that module."""
    # An object of the class can only exist once something has imported its module.
    cls = getattr(sys.modules.get(module), class_name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def _is_missing(item: Any) -> bool:
    """Tell whether `item` stands for a missing text: None, NaN, NaT, pandas' NA."""
    if item is None or item is np.ma.masked:
        return True
    if isinstance(item, (float, np.floating)):
        return math.isnan(item)
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(item))
    return type(item).__name__ in ("NAType", "NaTType")


def _next_step(X: Any) -> str:
    """Say how to turn a container of the wrong kind into a list of texts."""
    if isinstance(X, (bytes, bytearray, memoryview)):
        return "Decode and wrap it: [data.decode('utf-8')]."
    if isinstance(X, Mapping):
        return "Pass its texts: list(X.values())."
    if hasattr(X, "tocsr"):
        return "Pass the raw texts, not a sparse matrix of features."
    if isinstance(X, Set):
        return "It has no order; pass sorted(X)."
    if _is_instance_of(X, "polars", "LazyFrame"):
        return "Collect it first: X.collect()."
    if isinstance(X, (Iterator, Iterable)):
        return "Make it a list first: list(X)."
    return "Pass the raw texts as a list."


def _item_step(item: Any) -> str:
    """Say what to do about an item that is not a text."""
    if isinstance(item, (bytes, bytearray)):
        return "Decode it: item.decode('utf-8')."
    if isinstance(item, (list, tuple)):
        return "Give either texts or pairs of two texts, not both."
    return "Convert it, or drop the row."


def _describe_type(value: Any) -> str:
    """Return the type of `value` with its article, such as "an int"."""
    if value is None:
        return "None"
    type_name = type(value).__name__
    article = "an" if type_name[0].lower() in "aeiou" or type_name == "ndarray" else "a"
    return f"{article} {type_name}"


def _describe_value(value: Any) -> str:
    """Return a short form of a parameter's value, or its type where that would be long."""
    if isinstance(value, str):
        return repr(str(value)) if len(value) <= 60 else f"a str of {len(value)} characters"
    if value is None or isinstance(value, (bool, np.bool_, int, float, np.number)):
        return str(value)
    return _describe_type(value)


def _describe_interval(low: float | None, high: float | None, inclusive: _Inclusive) -> str:
    """Return " in [low, high]" in interval notation, or "" where there is no bound."""
    if low is None and high is None:
        return ""
    left = "[" if low is not None and inclusive in ("both", "left") else "("
    right = "]" if high is not None and inclusive in ("both", "right") else ")"
    return f" in {left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"


def _is_within(value: float, low: float | None, high: float | None, inclusive: _Inclusive) -> bool:
    """Tell whether `value` lies between the bounds that are given."""
    if low is not None and (value < low or (value == low and inclusive in ("right", "neither"))):
        return False
    return high is None or not (
        value > high or (value == high and inclusive in ("left", "neither"))
    )


def check_choice(value: Any, *, name: str, owner: str, allowed: Sequence[_T]) -> _T:
    """Return the member of `allowed` that equals `value`.

    Raises TypeError if no allowed value has the type of `value`, else ValueError with
    the nearest string suggested.

    >>> from skembed._validation import check_choice
    >>> check_choice("mean", name="pooling", owner="NVEmbedVectorizer", allowed=["mean", "eos"])
    'mean'
    """
    same_type = [
        option
        for option in allowed
        if isinstance(value, type(option)) and isinstance(value, bool) == isinstance(option, bool)
    ]
    for option in same_type:
        if value == option:
            return option
    message = (
        f"The `{name}` parameter of `{owner}` must be one of "
        f"{', '.join(map(repr, allowed))}; got {_describe_value(value)}."
    )
    if not same_type:
        raise TypeError(message)
    strings = {option.casefold(): option for option in allowed if isinstance(option, str)}
    if isinstance(value, str):
        near = difflib.get_close_matches(value.casefold(), strings, n=1)
        message += f" Did you mean {strings[near[0]]!r}?" if near else ""
    raise ValueError(message)


@overload
def check_int(
    value: Any,
    *,
    name: str,
    owner: str,
    low: int | None = ...,
    high: int | None = ...,
    allow_none: Literal[False] = ...,
) -> int: ...
@overload
def check_int(
    value: Any,
    *,
    name: str,
    owner: str,
    low: int | None = ...,
    high: int | None = ...,
    allow_none: bool,
) -> int | None: ...
def check_int(
    value: Any,
    *,
    name: str,
    owner: str,
    low: int | None = None,
    high: int | None = None,
    allow_none: bool = False,
) -> int | None:
    """Return `value` as a built-in int within [low, high]; None leaves a side open.

    numpy integers count as int, booleans and floats do not. Raises TypeError for the
    type, ValueError for the range. With `allow_none`, None passes as None.

    >>> from skembed._validation import check_int
    >>> check_int(0, name="top_k", owner="Retriever", low=1, high=42)
    Traceback (most recent call last):
    ...
    ValueError: The `top_k` parameter of `Retriever` must be an int in [1, 42]; got 0.
    """
    if value is None and allow_none:
        return None
    expected = f"an int{_describe_interval(low, high, 'both')}{' or None' if allow_none else ''}"
    message = _parameter_message(value, name=name, owner=owner, expected=expected)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(message)
    if not _is_within(int(value), low, high, "both"):
        raise ValueError(message)
    return int(value)


@overload
def check_real(
    value: Any,
    *,
    name: str,
    owner: str,
    low: float | None = ...,
    high: float | None = ...,
    inclusive: _Inclusive = ...,
    allow_none: Literal[False] = ...,
) -> float: ...
@overload
def check_real(
    value: Any,
    *,
    name: str,
    owner: str,
    low: float | None = ...,
    high: float | None = ...,
    inclusive: _Inclusive = ...,
    allow_none: bool,
) -> float | None: ...
def check_real(
    value: Any,
    *,
    name: str,
    owner: str,
    low: float | None = None,
    high: float | None = None,
    inclusive: _Inclusive = "both",
    allow_none: bool = False,
) -> float | None:
    """Return `value` as a finite built-in float between `low` and `high`.

    `inclusive` says which bounds may be reached. Ints and numpy numbers count, booleans
    do not. Raises TypeError for the type, ValueError for NaN, infinity and the range.
    With `allow_none`, None passes as None.

    >>> from skembed._validation import check_real
    >>> check_real(1, name="temperature", owner="ContrastiveTrainer", low=0, inclusive="right")
    1.0
    """
    if value is None and allow_none:
        return None
    is_real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if is_real and math.isfinite(value) and _is_within(float(value), low, high, inclusive):
        return float(value)
    interval = _describe_interval(low, high, inclusive)
    expected = f"a finite number{interval}{' or None' if allow_none else ''}"
    message = _parameter_message(value, name=name, owner=owner, expected=expected)
    raise (ValueError if is_real else TypeError)(message)


def check_bool(value: Any, *, name: str, owner: str) -> bool:
    """Return `value` as a built-in bool; anything but bool and numpy.bool is a TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(_parameter_message(value, name=name, owner=owner, expected="True or False"))
    return bool(value)


@overload
def check_string(
    value: Any,
    *,
    name: str,
    owner: str,
    allow_empty: bool = ...,
    allow_none: Literal[False] = ...,
) -> str: ...
@overload
def check_string(
    value: Any, *, name: str, owner: str, allow_empty: bool = ..., allow_none: bool
) -> str | None: ...
def check_string(
    value: Any, *, name: str, owner: str, allow_empty: bool = False, allow_none: bool = False
) -> str | None:
    """Return `value` as a built-in str.

    Raises TypeError for the type, ValueError for "" unless `allow_empty`. With
    `allow_none`, None passes as None.

    >>> from skembed._validation import check_string
    >>> check_string("skembed-mini", name="model", owner="NVEmbedVectorizer")
    'skembed-mini'
    """
    if value is None and allow_none:
        return None
    expected = "a str" if allow_empty else "a non-empty str"
    expected += " or None" if allow_none else ""
    message = _parameter_message(value, name=name, owner=owner, expected=expected)
    if not isinstance(value, str):
        raise TypeError(message)
    if not value and not allow_empty:
        raise ValueError(message)
    return str.__str__(value)


def _parameter_message(value: Any, *, name: str, owner: str, expected: str) -> str:
    """Return the one sentence that all parameter errors share."""
    return f"The `{name}` parameter of `{owner}` must be {expected}; got {_describe_value(value)}."


def import_optional(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a module that only some installations have; `module` may be dotted.

    `purpose` begins the error's sentence, such as "`EmbeddingMapDisplay`"; `extra` is the
    extra of skembed to install. Raises ImportError if the module, or one that it needs,
    is not installed, or is installed but broken.

    >>> from skembed._validation import import_optional
    >>> import_optional("json", extra="plot", purpose="The example").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or module
        package = module.partition(".")[0]
        via = "" if absent.partition(".")[0] == package else f" (imported by `{package}`)"
        wanted = absent if via else package
        raise ImportError(
            f"{purpose} needs `{wanted}`{via}, which is not installed. "
            f"Run: pip install skembed[{extra}]",
            name=absent,
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module}`, which is installed but cannot be imported: {error}. "
            f"Reinstall it: pip install --force-reinstall skembed[{extra}]",
            name=module,
        ) from error
