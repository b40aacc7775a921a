"""Fixtures of the streaming tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stream_kills import make_up
from streams import LAYOUTS, ROWS, TEXTS, place, read_manifest, stream

from skembed import NVEmbedVectorizer
from skembed.inference.encoder import Encoder


@pytest.fixture(scope="module")
def vectorizer(golden_dir: Path) -> NVEmbedVectorizer:
    return NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", cache=None)


@pytest.fixture
def quick(vectorizer: NVEmbedVectorizer, monkeypatch: pytest.MonkeyPatch) -> NVEmbedVectorizer:
    """Return the vectorizer, its vectors made up."""
    monkeypatch.setattr(Encoder, "embed", make_up)
    return vectorizer


@pytest.fixture(params=LAYOUTS)
def begun(request: Any, quick: NVEmbedVectorizer, tmp_path: Path) -> Path:
    """Return the path of a run that ended in its third shard."""
    path = place(tmp_path, request.param)

    def texts() -> Iterator[str]:
        yield from TEXTS[:40]
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        stream(quick, texts(), path)
    assert read_manifest(path)["n_rows"] == 2 * ROWS
    return path
