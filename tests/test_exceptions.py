"""The tree of exceptions."""

import types

import pytest

from skembed import exceptions


@pytest.mark.parametrize(
    ("name", "bases"),
    [
        ("ModelNotFoundError", (exceptions.SkembedError, OSError)),
        ("CheckpointError", (exceptions.SkembedError, ValueError)),
        ("CacheError", (exceptions.SkembedError, OSError)),
        ("CausalLeakError", (exceptions.SkembedError, RuntimeError)),
        ("TruncationWarning", (exceptions.SkembedWarning, UserWarning)),
        ("FreshPoolingWarning", (exceptions.SkembedWarning, UserWarning)),
    ],
)
def test_exception_tree(name, bases):
    cls = getattr(exceptions, name)
    assert issubclass(cls, bases[0])
    assert issubclass(cls, bases[1])
    assert str(cls("said so")) == "said so"
    assert name in exceptions.__doc__


def test_every_exception_is_exported():
    defined = {
        name
        for name, value in vars(exceptions).items()
        if isinstance(value, type) and value.__module__ == exceptions.__name__
    }
    assert set(exceptions.__all__) == defined
    assert isinstance(exceptions, types.ModuleType)
