"""A caller's torch.autocast reaches into nothing: vectors, weights and scores are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, embed
from evaluation_data import Words, make_tasks
from paths import copy_checkpoint
from tiny import make_vectorizer, weights
from trained import TEXTS as TRAINED_TEXTS
from trained import train, trained

from skembed.evaluation.harness import evaluate
from skembed.search.gpu import top_k_rows_on_device

MIXED = [torch.bfloat16, torch.float16]


def load_and_embed(folder: Path) -> Any:
    return embed(folder)


def embed_bfloat16(folder: Path) -> Any:
    return embed(folder, dtype="bfloat16")


def embed_int8(folder: Path) -> Any:
    return embed(folder, dtype="int8")


def embed_multilayer(folder: Path) -> Any:
    return embed(folder, pooling="multilayer")


def fit(folder: Path) -> Any:
    emb = train(folder)
    return [emb.transform(TRAINED_TEXTS), *weights(emb).values()]


def fit_with_mining(folder: Path) -> Any:
    emb = train(folder, trainer={"mine_negatives": "perc_pos", "n_negatives": 1})
    return [emb.transform(TRAINED_TEXTS), *weights(emb).values()]


def save_merged(folder: Path) -> Any:
    trained().save_pretrained(folder.with_name("merged"), merge=True)
    return embed(folder.with_name("merged"))


def save_adapter(folder: Path) -> Any:
    trained().save_pretrained(folder.with_name("adapter"))
    return make_vectorizer(folder.with_name("adapter"), trainer=None).transform(TEXTS)


def search(folder: Path) -> Any:
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(50, 8)).astype(np.float32)
    device, ranks = torch.device("cpu"), np.arange(50)
    found = top_k_rows_on_device(
        corpus[:9], corpus.__getitem__, ranks, 5, device=device, block_bytes=2**20
    )
    return [found.scores, found.indices]


USES: list[Callable[[Path], Any]] = [
    *(load_and_embed, embed_bfloat16, embed_int8, embed_multilayer, fit, fit_with_mining),
    *(save_merged, save_adapter, search),
]


@pytest.mark.filterwarnings("ignore::skembed.exceptions.FreshPoolingWarning")
@pytest.mark.parametrize("dtype", MIXED, ids=str)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_autocast_changes_nothing(
    use: Callable[[Path], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    expected = use(copy_checkpoint(tmp_path / "plain" / "model"))
    with torch.autocast("cpu", dtype=dtype):
        found = use(copy_checkpoint(tmp_path / "mixed" / "model"))
        assert torch.is_autocast_enabled("cpu"), "the caller's own setting stays"
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def run_evaluation() -> Any:
    result = evaluate(Words(), make_tasks(), n_bootstraps=10)
    return [np.array([row.score for row in result])]


def test_an_evaluation_under_autocast() -> None:
    (expected,) = run_evaluation()
    with torch.autocast("cpu"):
        (found,) = run_evaluation()
    np.testing.assert_array_equal(found, expected)
