"""Fixtures of the tests of inference."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from engines_worker import make_texts, make_vectorizer

from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Return the rows of one process."""
    return make_vectorizer().transform(make_texts())


@pytest.fixture
def n_threads() -> Iterator[int]:
    """Torch's number of threads, which must be the same afterwards."""
    before = torch.get_num_threads()
    yield before
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Thread, texts and torch's threads of each forward pass of this process."""
    seen: list[tuple[int, int, int]] = []
    forward = NVEmbedModel.forward

    def watched(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        seen.append((threading.get_ident(), batch.n_texts, torch.get_num_threads()))
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", watched)
    return seen
