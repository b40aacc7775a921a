"""Fixtures of the map tests."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def needs_matplotlib() -> None:
    pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


@pytest.fixture
def blobs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two-dimensional blobs of 77 labels, (600, 2) and (600,)."""
    centres = rng.uniform(0, 20, size=(77, 2))
    labels = np.concatenate([np.arange(77), rng.integers(77, size=523)])
    return centres[labels] + 0.5 * rng.normal(size=(600, 2)), labels
