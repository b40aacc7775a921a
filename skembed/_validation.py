"""Checks of parameters' types and ranges, with one sentence for every error.

Each ``check_*`` function returns its parameter as a built-in Python value. All messages read "The
`top_k` parameter of `Retriever` must be an int in [1, 42]; got 0.", followed by the next step.
"""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, TypeVar, overload

import numpy as np

__all__ = [
    "check_bool",
    "check_choice",
    "check_int",
    "check_real",
    "check_string",
    "describe_type",
    "describe_value",
    "import_optional",
]

_T = TypeVar("_T")
_Inclusive = Literal["both", "left", "right", "neither"]


def describe_type(value: Any) -> str:
    """Return the type of `value` with its article, such as "an int"."""
    if value is None:
        return "None"
    type_name = type(value).__name__
    article = "an" if type_name[0].lower() in "aeiou" or type_name == "ndarray" else "a"
    return f"{article} {type_name}"


def describe_value(value: Any) -> str:
    """Return a short form of a parameter's value, or its type where that is long."""
    if isinstance(value, str):
        return repr(str(value)) if len(value) <= 60 else f"a str of {len(value)} characters"
    if value is None or isinstance(value, (bool, np.bool_, int, float, np.number)):
        return str(value)
    return describe_type(value)


def _describe_interval(low: float | None, high: float | None, inclusive: _Inclusive) -> str:
    """Return " in [low, high]" in interval notation, or "" where there is no bound."""
    if low is None and high is None:
        return ""
    left = "[" if low is not None and inclusive in ("both", "left") else "("
    right = "]" if high is not None and inclusive in ("both", "right") else ")"
    return f" in {left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"


def _is_within(value: float, low: float | None, high: float | None, inclusive: _Inclusive) -> bool:
    """Return whether `value` lies between the bounds that are given."""
    if low is not None and (value < low or (value == low and inclusive in ("right", "neither"))):
        return False
    return high is None or not (
        value > high or (value == high and inclusive in ("left", "neither"))
    )


def check_choice(value: Any, *, name: str, owner: str, allowed: Sequence[_T]) -> _T:
    """Return the member of `allowed` that equals `value`.

    Raises TypeError if no allowed value has the type of `value`, else ValueError with the nearest
    string suggested.
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
        f"{', '.join(map(repr, allowed))}; got {describe_value(value)}."
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
    value: Any, *, name: str, owner: str, low: int | None = ..., high: int | None = ...
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
    """Return `value` as a built-in int between `low` and `high`, both included.

    Any integer type counts, booleans do not. Raises TypeError for the type, ValueError for the
    range. With `allow_none`, None passes as None.
    """
    if value is None and allow_none:
        return None
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if is_int and _is_within(int(value), low, high, "both"):
        return int(value)
    expected = f"an int{_describe_interval(low, high, 'both')}{' or None' if allow_none else ''}"
    message = _parameter_message(value, name=name, owner=owner, expected=expected)
    raise (ValueError if is_int else TypeError)(message)


@overload
def check_real(
    value: Any,
    *,
    name: str,
    owner: str,
    low: float | None = ...,
    high: float | None = ...,
    inclusive: _Inclusive = ...,
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

    `inclusive` says which bounds are allowed. Ints and numpy numbers count, booleans do not. Raises
    TypeError for the type, ValueError for NaN, infinity and the range. With `allow_none`, None
    passes as None.
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
def check_string(value: Any, *, name: str, owner: str, allow_empty: bool = ...) -> str: ...


@overload
def check_string(
    value: Any, *, name: str, owner: str, allow_empty: bool = ..., allow_none: bool
) -> str | None: ...


def check_string(
    value: Any, *, name: str, owner: str, allow_empty: bool = False, allow_none: bool = False
) -> str | None:
    """Return `value` as a built-in str.

    Raises TypeError for the type, ValueError for "" unless `allow_empty`. With `allow_none`, None
    passes as None.
    """
    if value is None and allow_none:
        return None
    if isinstance(value, str) and (value or allow_empty):
        return str.__str__(value)
    expected = "a str" if allow_empty else "a non-empty str"
    expected += " or None" if allow_none else ""
    message = _parameter_message(value, name=name, owner=owner, expected=expected)
    raise (ValueError if isinstance(value, str) else TypeError)(message)


def _parameter_message(value: Any, *, name: str, owner: str, expected: str) -> str:
    """Return the sentence that all parameter errors share."""
    return f"The `{name}` parameter of `{owner}` must be {expected}; got {describe_value(value)}."


def import_optional(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Return a module that only some installations have; `module` may be dotted.

    `purpose` begins the error's sentence, such as "`EmbeddingMapDisplay`"; `extra` is the extra of
    skembed to install. Raises ImportError if the module, or one that it needs, is absent or broken.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or module
        package = module.partition(".")[0]
        missing = f"`{package}`"
        if absent.partition(".")[0] != package:
            missing = f"`{absent}` (imported by `{package}`)"
        raise ImportError(
            f"{purpose} needs {missing}, which is not installed. Run: pip install skembed[{extra}]",
            name=absent,
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module}`, which is installed but cannot be imported: {error}. "
            f"Reinstall it: pip install --force-reinstall skembed[{extra}]",
            name=module,
        ) from error
