"""Sources of texts of every kind, and their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from streams import N_ROWS, ROWS, TEXTS, read_bytes, stream

from skembed import NVEmbedVectorizer
from skembed.streaming.stream import open_embeddings

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
dataset = pytest.importorskip("pyarrow.dataset")


def make_sources(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The same texts in every shape, and the keywords that go with it."""
    table = pa.table({"n": range(N_ROWS), "text": TEXTS})
    files = folder / "parts"
    files.mkdir()
    for k, (start, stop) in enumerate([(0, 7), (7, 7), (7, 40), (40, N_ROWS)]):
        part = table.slice(start, stop - start)
        parquet.write_table(part, files / f"{k}.parquet", row_group_size=5)
    parquet.write_table(table, folder / "one.parquet")
    frame = table.to_pandas()
    named = {"column": "text"}
    return {
        "list": (TEXTS, {}),
        "tuple": (tuple(TEXTS), {}),
        "generator": ((text for text in TEXTS), {}),
        "array": (np.array(TEXTS), {}),
        "Series": (pd.Series(TEXTS, index=range(N_ROWS, 0, -1)), {}),
        "Index": (pd.Index(TEXTS), {}),
        "polars Series": (pl.Series(TEXTS), {}),
        "map": (map(str, TEXTS), {}),
        "Arrow array": (pa.chunked_array([TEXTS[:9], TEXTS[9:]]), {}),
        "pandas": (frame, named),
        "pandas, one column": (frame[["text"]], {}),
        "pandas, category": (frame.astype({"text": "category"}), named),
        "polars": (pl.from_arrow(table), named),
        "polars, category": (
            pl.from_arrow(table).with_columns(pl.col("text").cast(pl.Categorical)),
            named,
        ),
        "table": (table, named),
        "batch": (table.combine_chunks().to_batches()[0], named),
        "reader": (table.to_reader(max_chunksize=11), named),
        "data set": (dataset.dataset(files), named),
        "table as data set": (dataset.dataset(table), named),
        "Parquet file": (folder / "one.parquet", named),
        "Parquet folder": (str(files), named),
    }


def test_every_source_gives_the_same_bytes(vectorizer: NVEmbedVectorizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sources = make_sources(tmp_path / "in")
    stream(vectorizer, TEXTS, tmp_path / "first")
    expected = read_bytes(tmp_path / "first")
    for name, (X, kwargs) in sources.items():
        stream(vectorizer, X, tmp_path / name, **kwargs)
        assert read_bytes(tmp_path / name) == expected, name


def test_columns_are_carried_along(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": TEXTS,
            "key": [f"k{i}" for i in range(N_ROWS)],
            "price": [None if i % 4 == 0 else i * 1.5 for i in range(N_ROWS)],
            "at": pa.array(range(N_ROWS), pa.timestamp("ns")),
            "kind": pa.array(["a", "b"] * (N_ROWS // 2)).dictionary_encode(),
            "tags": [[i, None] for i in range(N_ROWS)],
            "nested": [{"x": i, "y": ["z"]} for i in range(N_ROWS)],
        }
    )
    names = ["text", "key", "price", "at", "kind", "tags", "nested"]
    kwargs = {"column": "text", "keep_columns": names, "embedding_column": "vector"}
    stream(quick, table, tmp_path / "out", **kwargs)
    found = open_embeddings(tmp_path / "out").to_table()
    assert found.column_names == [*names, "vector"]
    for name in names:
        expected = table[name].cast(pa.string()) if name == "kind" else table[name]
        assert found[name].combine_chunks() == expected.combine_chunks(), name
    again = stream(quick, table.to_reader(max_chunksize=3), tmp_path / "out", **kwargs)
    assert again.n_skipped == N_ROWS


@pytest.mark.parametrize("ids", [np.arange(N_ROWS), pd.Series(map(str, range(N_ROWS)))])
def test_ids_stand_beside_the_vectors(quick: NVEmbedVectorizer, tmp_path: Path, ids: Any) -> None:
    stream(quick, iter(TEXTS), tmp_path / "out", ids=ids)
    assert open_embeddings(tmp_path / "out").to_table()["id"].to_pylist() == ids.tolist()


@pytest.mark.parametrize("n_ids", [0, ROWS - 1, ROWS, N_ROWS - 1, N_ROWS + 1, N_ROWS + ROWS])
def test_ids_must_be_as_many(quick: NVEmbedVectorizer, tmp_path: Path, n_ids: int) -> None:
    with pytest.raises(ValueError, match="must have one id for each row"):
        stream(quick, TEXTS, tmp_path / "out", ids=range(n_ids))
    with pytest.raises((FileNotFoundError, ValueError), match="no embeddings|not complete"):
        open_embeddings(tmp_path / "out")
