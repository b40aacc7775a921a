"""Checks of parameters' types and ranges, with one sentence for every error.

Each ``check_*`` function returns its parameter as a built-in Python value, whatever scalar of NumPy
it came as. All messages read "The `top_k` parameter of `Retriever` must be an int in [1, 42]; got
0.", followed by the next step (`parameter_error`).

A class lists the checks of its parameters once, in a table of `Rule`s, and reads them through
`CheckedParameters`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal, TypeVar, cast, overload

import numpy as np

__all__ = [
    "LARGEST_SEED",
    "CheckedParameters",
    "Rule",
    "check_bool",
    "check_choice",
    "check_dtype",
    "check_int",
    "check_int64",
    "check_parameters",
    "check_path",
    "check_real",
    "check_seed",
    "check_string",
    "describe_type",
    "describe_value",
    "import_optional",
    "list_items",
    "name_our_words",
    "or_word",
    "parameter_error",
    "unwrap",
]

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Inclusive = Literal["both", "left", "right", "neither"]
# Called with a value, `name` and `owner`: returns what the code uses, or raises.
Rule = Callable[..., Any]
# What arrays, files and the libraries below can hold. No parameter needs more.
_LARGEST_INT = 2**63 - 1
LARGEST_SEED = 2**32 - 1
_LONGEST_NAME = 255  # bytes of one name in a path, on the usual file systems


def describe_type(value: Any) -> str:
    """Return the type of `value` with its article, such as "an int"."""
    if value is None:
        return "None"
    type_name = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    article = "an" if type_name[0].lower() in "aeiou" or type_name == "ndarray" else "a"
    return f"{article} {type_name}"


def describe_value(value: Any) -> str:
    """Return a short form of a parameter's value, or its type where that is long."""
    if isinstance(value, str):
        return repr(str(value)) if len(value) <= 60 else f"a str of {len(value)} characters"
    if isinstance(value, numbers.Integral) and abs(int(value)) > 10**60:  # `str` may refuse it
        return f"an int of {int(value).bit_length()} bits"
    if value is None or isinstance(value, (bool, np.bool_, int, float, np.number)):
        return str(value)
    return describe_type(value)


def parameter_error(
    value: Any,
    *,
    name: str,
    owner: str,
    expected: str,
    advice: str = "",
    kind: type[Exception] = ValueError,
) -> Exception:
    """Return the error for a bad parameter: which, whose, what is allowed, what came, what to do.

    `expected` follows "must be".
    """
    step = f" {advice}" if advice else ""
    got = describe_value(value)
    return kind(f"The `{name}` parameter of `{owner}` must be {expected}; got {got}.{step}")


def unwrap(value: Any) -> Any:
    """Return the Python value in a scalar or an array without dimensions, of NumPy or torch."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


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
    value = unwrap(value)
    same_type = [
        option
        for option in allowed
        if isinstance(value, type(option)) and isinstance(value, bool) == isinstance(option, bool)
    ]
    for option in same_type:
        if value == option:
            return option
    strings = {option.casefold(): option for option in allowed if isinstance(option, str)}
    near = []
    if isinstance(value, str):
        near = difflib.get_close_matches(value.casefold(), strings, n=1)
    raise parameter_error(
        value,
        name=name,
        owner=owner,
        expected=f"one of {', '.join(map(repr, allowed))}",
        advice=f"Did you mean {strings[near[0]]!r}?" if near else "",
        kind=ValueError if same_type else TypeError,
    )


def check_dtype(value: Any, *, name: str, owner: str, allowed: Sequence[_T]) -> _T:
    """Return the name among `allowed` of a type: a str, or a dtype of NumPy or torch."""
    kind = type(value)
    if isinstance(value, type) and issubclass(value, np.generic):
        value = value.__name__
    elif isinstance(value, np.dtype) or (kind.__module__, kind.__name__) == ("torch", "dtype"):
        value = str(value)
    if isinstance(value, str):
        value = str.__str__(value).removeprefix("torch.")
    return check_choice(value, name=name, owner=owner, allowed=allowed)


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
    range and for what int64 cannot hold. With `allow_none`, None passes as None.
    """
    value = unwrap(value)
    if value is None and allow_none:
        return None
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_int and abs(int(value)) > _LARGEST_INT:
        low = -_LARGEST_INT if low is None else low
        high = _LARGEST_INT if high is None else high
    if is_int and _is_within(int(value), low, high, "both"):
        return int(value)
    raise parameter_error(
        value,
        name=name,
        owner=owner,
        expected=f"an int{_describe_interval(low, high, 'both')}{' or None' * allow_none}",
        kind=ValueError if is_int else TypeError,
    )


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
    value = unwrap(value)
    if value is None and allow_none:
        return None
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_real:
        number = _to_float(value)
        if math.isfinite(number) and _is_within(number, low, high, inclusive):
            return number
    interval = _describe_interval(low, high, inclusive)
    raise parameter_error(
        value,
        name=name,
        owner=owner,
        expected=f"a finite number{interval}{' or None' * allow_none}",
        kind=ValueError if is_real else TypeError,
    )


def _to_float(value: Any) -> float:
    """Return a real number as a float, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_bool(value: Any, *, name: str, owner: str) -> bool:
    """Return `value` as a built-in bool; the ints 0 and 1 count, all else is a TypeError."""
    value = unwrap(value)
    if isinstance(value, numbers.Integral) and value in (0, 1):
        return bool(value)
    raise parameter_error(value, name=name, owner=owner, expected="True or False", kind=TypeError)


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
    value = unwrap(value)
    if value is None and allow_none:
        return None
    if isinstance(value, str) and (value or allow_empty):
        return str.__str__(value)
    raise parameter_error(
        value,
        name=name,
        owner=owner,
        expected=f"{'a str' if allow_empty else 'a non-empty str'}{' or None' * allow_none}",
        kind=ValueError if isinstance(value, str) else TypeError,
    )


@overload
def check_path(value: Any, *, name: str, owner: str, expected: str = ...) -> str: ...


@overload
def check_path(
    value: Any, *, name: str, owner: str, expected: str = ..., allow_none: bool
) -> str | None: ...


def check_path(
    value: Any, *, name: str, owner: str, expected: str = "a path", allow_none: bool = False
) -> str | None:
    """Return a path as a built-in str; whether there is such a file is not looked at.

    Raises TypeError for the type (bytes too), ValueError for "" and a null character.
    """
    value = unwrap(value)
    if value is None and allow_none:
        return None
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    error = functools.partial(
        parameter_error, name=name, owner=owner, expected=f"{expected}{' or None' * allow_none}"
    )
    if not isinstance(text, str):
        raise error(value, kind=TypeError)
    advice = _find_fault(text) if text else ""
    if not text or advice:
        raise error(value, advice=advice)
    return str.__str__(text)


def _find_fault(path: str) -> str:
    """Return why no file system takes a path; "" where some may."""
    if "\0" in path:
        return "It holds a null character."
    try:
        names = os.fsencode(path).split(os.fsencode(os.sep))
    except UnicodeEncodeError:
        return "It holds characters that no path has."
    return "It is too long for a path." if max(map(len, names)) > _LONGEST_NAME else ""


def check_seed(value: Any, *, name: str, owner: str) -> Any:
    """Return a `random_state` of scikit-learn's kind: None, a built-in int, or a RandomState."""
    value = unwrap(value)
    if value is None or value is np.random or isinstance(value, np.random.RandomState):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return check_int(value, name=name, owner=owner, low=0, high=LARGEST_SEED)
    expected = f"an int in [0, {LARGEST_SEED}], a RandomState or None"
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


def list_items(value: Any) -> list[Any] | None:
    """Return the items of a list, tuple, range, array or Series; None for anything else."""
    if getattr(value, "ndim", 0) > 0 and callable(getattr(value, "tolist", None)):
        return list(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(value)
    return None


def check_int64(
    values: Sequence[Any],
    *,
    subject: str,
    name: str,
    start: int = 0,
    step: str = "Pass such ids as str.",
) -> None:
    """Raise ValueError for ints that int64 cannot hold; `start` is the position of the first."""
    wide = next(
        (i for i, value in enumerate(values) if not -_LARGEST_INT <= value <= _LARGEST_INT), None
    )
    if wide is not None:
        raise ValueError(
            f"{subject} must hold ints in [{-_LARGEST_INT}, {_LARGEST_INT}]; {name}"
            f"[{start + wide}] is {describe_value(values[wide])}. {step}"
        )


# Tables of parameters


def or_word(word: str, rule: Rule) -> Rule:
    """Return the rule of a parameter that is a word, such as "auto", or what `rule` takes."""

    def check(value: Any, *, name: str, owner: str) -> Any:
        if isinstance(value, str):
            return check_choice(value, name=name, owner=owner, allowed=(word,))
        return rule(value, name=name, owner=owner)

    return check


def check_parameters(
    values: Mapping[str, Any], rules: Mapping[str, Rule], *, owner: str
) -> dict[str, Any]:
    """Return the parameters that a table of rules names, each as its rule gives it."""
    return {
        name: rule(unwrap(values[name]), name=name, owner=owner) for name, rule in rules.items()
    }


class CheckedParameters:
    """Mixin of estimators that check their parameters by a table, at each use.

    `_rules` has an entry for each parameter of ``__init__``.
    """

    _rules: ClassVar[Mapping[str, Rule]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = name_our_words(cls.__init__)  # type: ignore[method-assign]

    def _checked(self) -> Any:
        """Return the parameters as built-in values, by name; raise TypeError or ValueError."""
        values = {name: getattr(self, name) for name in self._rules}
        return SimpleNamespace(**check_parameters(values, self._rules, owner=type(self).__name__))


# Words of other packages for our parameters.
_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "model": (
        *("model_name", "model_name_or_path", "pretrained_model_name_or_path", "model_id"),
        *("model_path", "checkpoint", "repo_id"),
    ),
    "instruction": (
        *("prompt", "prompts", "prompt_name", "default_prompt_name", "query_prompt"),
        *("query_instruction", "task", "task_name"),
    ),
    "document_instruction": (
        *("document_prompt", "passage_prompt", "passage_instruction", "corpus_prompt"),
    ),
    "max_length": ("max_seq_length", "max_tokens", "seq_length"),
    "truncate_dim": ("dim", "dimensions", "output_dimension", "output_dim", "n_components"),
    "normalize": ("normalize_embeddings", "normalise", "normalize_vectors"),
    "batch_tokens": ("batch_size", "mini_batch_size", "chunk_size"),
    "verbose": ("show_progress_bar", "show_progress", "progress", "progress_bar"),
    "dtype": ("torch_dtype", "precision"),
    "cache": ("cache_dir", "cache_folder", "cache_path"),
    "pooling": ("pooling_mode", "pooling_strategy"),
    "n_jobs": ("num_workers", "n_workers", "num_proc"),
    "store_weights": ("store_weights_in_pickle",),
    "batch_size": ("per_device_train_batch_size", "train_batch_size"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs"),
    "learning_rate": ("lr", "body_learning_rate"),
    "warmup_ratio": ("warmup", "warmup_proportion", "warmup_steps"),
    "random_state": ("seed", "random_seed"),
    "r": ("rank", "lora_r", "lora_rank"),
    "temperature": ("scale",),
    "checkpoint_dir": ("output_dir",),
    "vectorizer": (
        *("model", "model_name", "model_name_or_path", "encoder", "embedder", "embedding_model"),
        *("transformer", "embeddings"),
    ),
    "head": ("classifier", "clf", "estimator", "model_head"),
    "similarity": ("metric", "score_function", "similarity_fn_name", "similarity_fn"),
    "storage": ("quantization", "precision", "dtype"),
    "descriptions": ("labels", "candidate_labels", "classes"),
    "n_clusters": ("k", "n_topics", "nr_topics"),
    "clusterer": ("hdbscan_model", "cluster_model"),
    "reducer": ("umap_model", "dim_model"),
}


def name_our_words(function: _Function) -> _Function:
    """Return a method that answers an unknown keyword with the parameter that is meant."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if not keywords.keys() <= known.keys():
            unknown = next(word for word in keywords if word not in known)
            raise TypeError(_explain_keyword(type(self), function.__name__, unknown))
        return function(self, *args, **keywords)

    return cast("_Function", call)


def _explain_keyword(kind: type, method: str, word: str) -> str:
    """Return the error for a keyword that a method of a class does not take."""
    parameters = list(inspect.signature(kind).parameters)
    meant = [name for name in parameters if name == word or word in _OTHER_WORDS.get(name, ())]
    meant = meant or difflib.get_close_matches(word, parameters, n=1)
    is_init = method == "__init__"
    sentence = f"`{kind.__name__}{'' if is_init else f'.{method}'}` has no parameter `{word}`"
    if not meant:
        sentence += f"; the parameters of `{kind.__name__}` are {', '.join(parameters)}"
    elif is_init:
        sentence += f"; here it is `{meant[0]}`"
    else:
        sentence += f"; set `{meant[0]}` of `{kind.__name__}` instead"
    return f"{sentence}. The page 'Coming from another package' of the docs compares names."


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
