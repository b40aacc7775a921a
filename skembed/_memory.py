"""Give memory that is free back to the system.

Forward passes in several threads leave free blocks between used ones, each thread in an area of its
own, and the C library of Linux keeps them: over a long call, more and more memory of which nothing
is in use. Its setting that would give large blocks back at once makes every pass fetch its pages
anew; asking for all that is free now and then does not.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

__all__ = ["release_free_memory"]


@lru_cache(maxsize=1)
def _find_trim() -> Any:
    """Return the C library's function, or None where it has none (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def release_free_memory() -> bool:
    """Give free pages of the heap back to the system; whether there were any to give."""
    trim = _find_trim()
    return trim is not None and bool(trim(0))
