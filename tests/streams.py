"""Embeddings on disk: written, read, listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_kills import make_texts

from skembed.streaming.stream import StreamReport, open_embeddings

N_ROWS = 50
ROWS = 16  # of a shard: three full ones and a rest
TEXTS = list(make_texts(N_ROWS))
LAYOUTS = ("parquet", "npy")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def stream(vectorizer: Any, X: Any, path: Path, **kwargs: Any) -> StreamReport:
    return vectorizer.transform_to(X, path, **{"rows_per_shard": ROWS, **kwargs})


def place(folder: Path, layout: str, name: str = "out") -> Path:
    return folder / (f"{name}.npy" if layout == "npy" else name)


def read_bytes(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a set of embeddings."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return {
        file.name.removeprefix(path.name): file.read_bytes()
        for file in path.parent.glob(f"*{path.name}*")
    }


def read_vectors(path: Path) -> np.ndarray:
    found = open_embeddings(path, verify=True)
    if isinstance(found, np.ndarray):
        return found
    column = found.to_table()["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def read_manifest(path: Path) -> dict[str, Any]:
    file = (
        path / "_manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")
    )
    return json.loads(file.read_text(encoding="utf-8"))
