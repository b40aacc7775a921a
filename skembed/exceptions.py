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
    """Error for a model that is not bundled, a local folder or a reachable hub id."""


class CheckpointError(SkembedError, ValueError):
    """Error for a checkpoint whose weights or configuration cannot be used."""


class CacheError(SkembedError, OSError):
    """Error for an embedding cache that cannot be opened, read or written."""


class CausalLeakError(SkembedError, RuntimeError):
    """Error for a bidirectional attention path that is causal on this machine."""


class TrainingError(SkembedError, RuntimeError):
    """Error for training without a finite loss, or without any negative left."""


class SkembedWarning(UserWarning):
    """Base of every warning class that skembed defines."""


class TruncationWarning(SkembedWarning):
    """Warning about texts that were cut at ``max_length`` tokens."""


class FreshPoolingWarning(SkembedWarning):
    """Warning about a checkpoint without pooling weights, which starts from random ones."""
