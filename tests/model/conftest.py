"""Fixtures of the model tests."""

import shutil
from pathlib import Path

import pytest
from paths import GOLDEN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the golden checkpoint to damage."""
    target = tmp_path / "model"
    shutil.copytree(GOLDEN, target)
    return target
