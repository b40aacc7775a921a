"""Examples of every kind for a training `fit`, and quick trainers."""

from __future__ import annotations

from typing import Any

import numpy as np
from paths import GOLDEN

from skembed import ContrastiveTrainer, NVEmbedVectorizer

DIM = 48
WORDS = {
    "card": "card stolen lost blocked pin chip",
    "account": "account open new savings branch form",
    "fee": "fee charge rate cost monthly price",
}


def make_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return texts of each class's own words and some that all share, and their labels."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for label, words in WORDS.items():
        for k in range(n):
            shared = rng.choice("please tell me about my the of to".split(), 4)
            chosen = [*rng.choice(words.split(), 2), *shared, str(k)]
            texts.append(" ".join(rng.permutation(chosen)))
            labels.append(label)
    return texts, labels


def mix(texts: list[str], labels: list[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order], [labels[i] for i in order]


TEXTS, LABELS = mix(*make_texts(12))
BY_CLASS = {label: [t for t, y in zip(TEXTS, LABELS, strict=True) if y == label] for label in WORDS}
PAIRS = [pair for texts in BY_CLASS.values() for pair in zip(texts[::2], texts[1::2], strict=True)]
ROWS = [
    (*pair, BY_CLASS[other][k % 12], BY_CLASS[other][(k + 1) % 12])
    for k, (pair, other) in enumerate(zip(PAIRS, [*["fee"] * 6, *["card"] * 12], strict=True))
]
DRAWN = [(i, j) for i, j in np.random.default_rng(0).integers(0, 36, (81, 2)).tolist() if i != j]
GRADED = [(TEXTS[i], TEXTS[j]) for i, j in DRAWN]
SCORES = [float(LABELS[i] == LABELS[j]) for i, j in DRAWN]
KINDS: dict[str, tuple[Any, Any]] = {
    "labels": (TEXTS, LABELS),
    "pairs": (PAIRS, None),
    "rows": (ROWS, None),
    "scores": (GRADED, SCORES),
}


def make_trainer(**parameters: Any) -> ContrastiveTrainer:
    """Return a trainer of a few quick steps."""
    return ContrastiveTrainer(
        **{
            "r": 2,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 5e-3,
            "max_steps": 3,
            "batch_size": 12,
            "random_state": 0,
            **parameters,
        }
    )


def make(trainer: Any = "quick", **parameters: Any) -> NVEmbedVectorizer:
    given = {"model": GOLDEN, "device": "cpu", "dtype": "float32", "cache": None, **parameters}
    trainer = make_trainer() if isinstance(trainer, str) and trainer == "quick" else trainer
    return NVEmbedVectorizer(**given, trainer=trainer)
