"""The containers that texts, labels, ids and scores may come in: name -> conversion of a list."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def _object_array(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _pandas(make: Callable[[Any, list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda items: make(pytest.importorskip("pandas"), items)


def _polars(make: Callable[[Any, list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda items: make(pytest.importorskip("polars"), items)


def _arrow(make: Callable[[Any, list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda items: make(pytest.importorskip("pyarrow"), items)


def _narwhals(items: list[Any], package: str) -> Any:
    nw, native = pytest.importorskip("narwhals"), pytest.importorskip(package)
    return nw.from_native(native.Series(items), series_only=True)


def _datasets(items: list[Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"one": items})["one"]


COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "UserList": UserList,
    "deque": deque,
    "numpy": np.array,
    "numpy of objects": _object_array,
    "numpy of StringDType": lambda items: np.array(
        items, dtype=np.dtypes.StringDType() if isinstance(items[0], str) else None
    ),
    "masked": lambda items: np.ma.masked_array(np.array(items)),
    "pandas Series": _pandas(lambda pd, items: pd.Series(items, index=range(5, 5 + len(items)))),
    "pandas Series of objects": _pandas(lambda pd, items: pd.Series(items, dtype=object)),
    "pandas Series of category": _pandas(lambda pd, items: pd.Series(items, dtype="category")),
    "pandas values": _pandas(lambda pd, items: pd.Series(items).values),
    "pandas array": _pandas(lambda pd, items: pd.array(items)),
    "pandas Categorical": _pandas(lambda pd, items: pd.Categorical(items)),
    "pandas Index": _pandas(lambda pd, items: pd.Index(items)),
    "polars": _polars(lambda pl, items: pl.Series(items)),
    "pyarrow Array": _arrow(lambda pa, items: pa.array(items)),
    "pyarrow ChunkedArray": _arrow(lambda pa, items: pa.chunked_array([items[:1], items[1:]])),
    "pyarrow dictionary": _arrow(lambda pa, items: pa.array(items).dictionary_encode()),
    "pyarrow scalars": _arrow(lambda pa, items: list(pa.array(items))),
    "narwhals of pandas": lambda items: _narwhals(items, "pandas"),
    "narwhals of polars": lambda items: _narwhals(items, "polars"),
    "datasets Column": _datasets,
}
"""One entry a row."""

_Rows = list[tuple[Any, ...]]
TABLES: dict[str, Callable[[_Rows], Any]] = {
    "numpy": np.array,
    "numpy of objects": lambda rows: np.array(rows, dtype=object),
    "pandas": _pandas(lambda pd, rows: pd.DataFrame(rows, columns=_names(rows))),
    "polars": _polars(lambda pl, rows: pl.DataFrame(rows, schema=_names(rows), orient="row")),
    "pyarrow": _arrow(lambda pa, rows: pa.table(_columns(rows))),
    "pyarrow RecordBatch": _arrow(lambda pa, rows: pa.RecordBatch.from_pydict(_columns(rows))),
    "narwhals": lambda rows: pytest.importorskip("narwhals").from_native(
        pytest.importorskip("polars").DataFrame(_columns(rows))
    ),
    "datasets": lambda rows: pytest.importorskip("datasets").Dataset.from_dict(_columns(rows)),
}
"""Columns side by side."""


def _names(rows: _Rows) -> list[str]:
    return ["title", "body", "note", "more"][: len(rows[0])]


def _columns(rows: _Rows) -> dict[str, list[Any]]:
    return {n: list(c) for n, c in zip(_names(rows), zip(*rows, strict=True), strict=True)}
