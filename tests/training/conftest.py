"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from paths import copy_checkpoint
from training_examples import LABELS, TEXTS, make, make_trainer

from skembed import NVEmbedVectorizer
from skembed.inference.registry import registry


@pytest.fixture(scope="module")
def unloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tiny checkpoint that nothing may load."""
    return copy_checkpoint(tmp_path_factory.mktemp("unloaded") / "model")


@pytest.fixture
def nothing_done(steps: list[int]) -> Any:
    """Check after a refusal that no model was loaded and no step taken."""
    n_loads = registry.n_loads
    yield
    assert registry.n_loads == n_loads
    assert steps == []


@pytest.fixture(scope="module")
def trained() -> NVEmbedVectorizer:
    return make(make_trainer(learning_rate=5e-2)).fit(TEXTS, LABELS)
