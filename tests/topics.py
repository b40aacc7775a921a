"""Texts of topics, their labels and descriptions."""

from __future__ import annotations

import numpy as np
from fake_vectorizer import FakeVectorizer

WORDS = {
    "card": "card stolen lost blocked plastic pin".split(),
    "account": "account open close new savings joint".split(),
    "fee": "fee charge cost price expensive refund".split(),
}
COMMON = "the my a please is of to why".split()
DESCRIPTIONS = {label: " ".join(words) for label, words in WORDS.items()}


def make_data(n: int = 60, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return texts with three words of their class and two that say nothing."""
    rng = np.random.default_rng(seed)
    labels = [list(WORDS)[i % 3] for i in range(n)]
    texts = [" ".join([*rng.choice(WORDS[c], 3), *rng.choice(COMMON, 2)]) for c in labels]
    return texts, labels


TEXTS, LABELS = make_data()
NEW, NEW_LABELS = make_data(30, seed=1)
VECTORS, NEW_VECTORS = FakeVectorizer().transform(TEXTS), FakeVectorizer().transform(NEW)
