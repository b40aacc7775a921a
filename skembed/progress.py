"""Progress bars: the one place that makes them."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(show: bool, **options: Any) -> tqdm:
    """Return a bar of tqdm with its `options`; hidden unless `show`, or where TQDM_DISABLE is set.

    tqdm reads the variable when it is imported, and where `disable` is not given; here it counts at
    every bar.
    """
    off = os.getenv("TQDM_DISABLE", "").strip().casefold() not in ("", "0", "false")
    return tqdm(disable=off or not show, **options)
