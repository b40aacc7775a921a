"""Errors and warnings of skembed that a caller may want to catch.

Anything that is simply a wrong value, type or state is a ``ValueError``, ``TypeError``,
``ImportError`` or scikit-learn's ``NotFittedError``. A class below exists where callers
would react in their own way::

    Exception
    +-- SkembedError
        +-- ModelNotFoundError   (also OSError)       no such folder or hub id, or offline
        +-- CheckpointError      (also ValueError)    weights bad, missing, misshapen or pickled
        +-- CacheError           (also OSError)       cache file foreign, corrupt or unwritable
        +-- CausalLeakError      (also RuntimeError)  an attention path ignores later tokens
        +-- TrainingError        (also RuntimeError)  loss not finite, or nothing to compare
    UserWarning
    +-- SkembedWarning
        +-- TruncationWarning                         texts longer than ``max_length``
        +-- FreshPoolingWarning                       pooling weights start untrained
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CausalLeakError",
    "CheckpointError",
    "FreshPoolingWarning",
    "ModelNotFoundError",
    "SkembedError",
    "SkembedWarning",
    "TrainingError",
    "TruncationWarning",
]


class SkembedError(Exception):
    """Base of every error class that skembed defines."""


class ModelNotFoundError(SkembedError, OSError):
    """The model is neither a bundled one, nor a local folder, nor a reachable hub id."""


class CheckpointError(SkembedError, ValueError):
    """The weights or the config of a checkpoint cannot be used as they are."""


class CacheError(SkembedError, OSError):
    """The embedding cache cannot be opened, read or written."""


class CausalLeakError(SkembedError, RuntimeError):
    """An attention path that must be bidirectional behaves causally on this machine."""


class TrainingError(SkembedError, RuntimeError):
    """Training cannot go on: the loss is not finite, or no example has a negative left."""


class SkembedWarning(UserWarning):
    """Base of every warning class that skembed defines."""


class TruncationWarning(SkembedWarning):
    """Some texts were longer than ``max_length`` tokens and were cut."""


class FreshPoolingWarning(SkembedWarning):
    """The checkpoint holds no weights for the pooling, so it starts from random ones."""
