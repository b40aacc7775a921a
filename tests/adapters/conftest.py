"""Fixtures of the adapter tests."""

from pathlib import Path
from typing import Any

import pytest
from trained import trained


@pytest.fixture(scope="module", autouse=True)
def forget_trained() -> Any:
    yield
    trained.cache_clear()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a trained adapter's folder, pooling included."""
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    return folder
