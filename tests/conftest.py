"""What all tests share: no network, the tiny checkpoint, the folder of evaluation data."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline import block_network
from paths import GOLDEN, ROOT, copy_checkpoint
from texts import TEXTS

# Worker processes and subprocesses inherit these two; the blocked sockets below they do not.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")  # plots need no screen


@pytest.fixture(scope="session", autouse=True)
def blocked_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    with block_network():
        yield


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    """Close the figures of a test: matplotlib warns of more than twenty."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


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


@pytest.fixture
def fresh_dir(tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint that no process can have loaded."""
    return copy_checkpoint(tmp_path / "model")


@pytest.fixture
def emb() -> Any:
    """Return an unused estimator of the tiny checkpoint."""
    from tiny import make_vectorizer

    return make_vectorizer()


@pytest.fixture(scope="session")
def vectors() -> np.ndarray:
    """Return the tiny checkpoint's vectors of `texts.TEXTS`."""
    from tiny import make_vectorizer

    return make_vectorizer().transform(TEXTS)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List how many texts each forward pass of this process was given."""
    from skembed.model.network import NVEmbedModel
    from skembed.model.tokenization import PackedBatch

    counts: list[int] = []
    forward = NVEmbedModel.forward

    def counting(self: NVEmbedModel, batch: PackedBatch) -> Any:
        counts.append(batch.n_texts)
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", counting)
    return counts


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the training steps whose gradients were taken."""
    from skembed.training import loop

    taken: list[int] = []
    accumulate = loop._Learner.accumulate

    def counting(self: Any, batch: Any, step: int) -> Any:
        taken.append(step)
        return accumulate(self, batch, step)

    monkeypatch.setattr(loop._Learner, "accumulate", counting)
    return taken
