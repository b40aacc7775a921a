"""The check that a loaded model is bidirectional and keeps texts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_key
from torch import Tensor
from torch.nn import functional as F

from skembed.exceptions import CausalLeakError
from skembed.inference.registry import ModelRegistry
from skembed.model import attention as model_module
from skembed.model import loaded as loaded_module
from skembed.model.checkpoint import load_model
from skembed.model.loaded import prove_bidirectional
from skembed.model.network import NVEmbedModel
from skembed.model.sources import ModelSource, read_config
from skembed.model.tokenization import PackedBatch

CPU = torch.device("cpu")


@pytest.fixture
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """A process in which no attention path has been checked yet."""
    proven: set[Any] = set()
    monkeypatch.setattr(loaded_module, "_proven", proven)
    return proven


@pytest.fixture
def make_model(golden_dir: Path) -> Iterator[Callable[..., NVEmbedModel]]:
    source = ModelSource("tiny", golden_dir)

    def make(path: str, dtype: torch.dtype = torch.float32) -> NVEmbedModel:
        return load_model(source, read_config(source), device=CPU, dtype=dtype, attention_path=path)

    yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_paths_are_bidirectional(
    path: str, dtype: torch.dtype, make_model: Any, nothing_proven: set[Any]
) -> None:
    prove_bidirectional(make_model(path, dtype), CPU)
    assert [proof[:3] for proof in nothing_proven] == [(path, "cpu", dtype)]


def causal(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """What the grouped path would be with a causal mask."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    parts = [
        F.scaled_dot_product_attention(*piece, is_causal=True, scale=scaling).transpose(0, 1)
        for piece in zip(*(x.split(packed.lengths, dim=1) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts)


def mixing(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """What it would be if texts of a pack saw each other."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)


@pytest.mark.parametrize(
    ("attention", "fault"), [(causal, "is causal"), (mixing, "mixes neighbouring texts")]
)
def test_faulty_attention_is_found(
    attention: Any,
    fault: str,
    make_model: Any,
    nothing_proven: set[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_module, "_grouped", attention)
    with pytest.raises(CausalLeakError, match=f"path 'grouped' on cpu .* {fault}.*install another"):
        prove_bidirectional(make_model("grouped"), CPU)
    assert not nothing_proven


def test_causal_attention_for_one_length_only_is_found(
    make_model: Any, nothing_proven: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kernel chosen for texts of one length only, as some libraries do without a mask.
    grouped = model_module._grouped

    def sometimes(q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, *args: float) -> Tensor:
        uniform = len(set(packed.lengths)) == 1
        return (causal if uniform else grouped)(q, k, v, packed, *args)

    monkeypatch.setattr(model_module, "_grouped", sometimes)
    with pytest.raises(CausalLeakError, match="is causal"):
        prove_bidirectional(make_model("grouped"), CPU)


def test_each_path_is_proven_once_and_at_loading(
    fresh_dir: Path, nothing_proven: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ModelRegistry()
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "_grouped", causal)
        with pytest.raises(CausalLeakError):
            own.get(*make_key(fresh_dir))
        assert len(own) == 0
    own.get(*make_key(fresh_dir))
    assert len(nothing_proven) == 1

    def no_more(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("proven already")

    monkeypatch.setattr(loaded_module, "_first_positions", no_more)
    own.get(*make_key(fresh_dir))
    with pytest.raises(AssertionError, match="proven already"):
        own.get(*make_key(fresh_dir, attention_path="padded"))
