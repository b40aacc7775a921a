"""What all tests share: no network, the tiny checkpoint, the folder of evaluation data."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from offline import block_network
from paths import GOLDEN, ROOT

# Worker processes and subprocesses inherit these two; the blocked sockets below they do not.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")  # plots need no screen


@pytest.fixture(scope="session", autouse=True)
def blocked_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    with block_network():
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of a tiny NV-Embed checkpoint, its tokenizer and its golden vectors."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Folder of the public evaluation sets, which are not part of the repository."""
    folder = Path(os.environ.get("SKEMBED_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "eval").is_dir():
        pytest.skip("needs the evaluation data: set SKEMBED_DATA to the folder that holds eval/")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a fresh generator, seeded the same for each test."""
    return np.random.default_rng(0)
