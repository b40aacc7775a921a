"""Fixtures of the estimator tests."""

from __future__ import annotations

import numpy as np
import pytest
from fake_vectorizer import unit_rows
from paths import GOLDEN

from skembed import NVEmbedVectorizer

N, M, DIM = 13, 400, 24


@pytest.fixture
def corpus(rng: np.random.Generator) -> np.ndarray:
    return unit_rows(rng, M, DIM)


@pytest.fixture
def queries(rng: np.random.Generator) -> np.ndarray:
    return unit_rows(np.random.default_rng(1), N, DIM)


@pytest.fixture
def tiny() -> NVEmbedVectorizer:
    return NVEmbedVectorizer(GOLDEN, trainer=None, device="cpu", dtype="float32", cache=None)
