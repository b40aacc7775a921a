"""Adapters that several tests read: a trainer of three steps, texts of two classes."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tiny
from paths import GOLDEN
from transformers import AutoModel, MistralConfig

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel

TEXTS = [
    "My card was stolen at the station",
    "The card is lost",
    "Someone took my card",
    "I cannot find my card anywhere in the house",
    "Open an account",
    "I want a new account, please",
    "How do I get an account?",
    "A second account for my daughter",
]
LABELS = list("ccccaaaa")
OTHER_TEXTS = ["The exchange rate of the euro", "x", "A card for the new account of my brother"]


def make_vectorizer(folder: Path | str = GOLDEN, **parameters: Any) -> NVEmbedVectorizer:
    return tiny.make_vectorizer(folder, **{"trainer": None, **parameters})


def make_trainer(**parameters: Any) -> ContrastiveTrainer:
    """Return a trainer of three steps that move the vectors far."""
    defaults = {"r": 4, "learning_rate": 1e-2, "max_steps": 3, "batch_size": 8, "random_state": 0}
    return ContrastiveTrainer(**{**defaults, **parameters})


def train(
    folder: Path | str = GOLDEN,
    *,
    trainer: Mapping[str, Any] | None = None,
    labels: list[str] = LABELS,
    **parameters: Any,
) -> NVEmbedVectorizer:
    trainer = make_trainer(**(trainer or {}))
    return make_vectorizer(folder, trainer=trainer, **parameters).fit(TEXTS, labels)


@cache
def trained() -> NVEmbedVectorizer:
    """Return an estimator that tests read and do not change."""
    return train()


def stock_backbone(config: NVEmbedConfig, model: NVEmbedModel | None = None) -> Any:
    """transformers' own MistralModel, with a model's weights."""
    backbone = MistralConfig(**{**config.backbone, "sliding_window": None})
    stock = AutoModel.from_config(backbone, attn_implementation="eager").eval()
    if model is not None:
        stock.load_state_dict(model.embedding_model.state_dict())
    return stock
