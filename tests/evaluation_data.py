"""Small evaluation tasks, and a transformer with a random vector for each word."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from skembed.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)

WORDS = ("cat dog horse", "car train ship", "bread milk salt")


def write_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return n texts of three topics, and their topics."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(len(WORDS), size=n)
    words = [WORDS[topic].split() for topic in topics]
    texts = [f"{rng.choice(own)} {rng.choice(own)} {i % 7}" for i, own in enumerate(words)]
    return texts, [WORDS[topic].split()[0] for topic in topics]


class Words:
    """A transformer with a random vector for each word; notes the sides it is asked for."""

    def __init__(self, dim: int = 16, noise: float = 0.0, seed: int = 0) -> None:
        self.dim, self.noise, self.seed = dim, noise, seed
        self.calls: list[tuple[str, list[str]]] = []

    def _embed(self, texts: list[str], side: str) -> np.ndarray:
        self.calls.append((side, list(texts)))
        return np.array([self._embed_one(text) for text in texts], dtype=np.float32)

    def _embed_one(self, text: str) -> np.ndarray:
        words = [random.Random(f"{self.seed} {word}") for word in text.split()]
        vectors = [[source.gauss(0, 1) for _ in range(self.dim)] for source in words]
        noise = random.Random(f"{self.seed} noise {text}")
        return np.mean(vectors, axis=0) + [self.noise * noise.gauss(0, 1) for _ in range(self.dim)]

    def transform(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "transform")


TEXTS, LABELS = write_texts(90)
TEST, TEST_LABELS = write_texts(40, seed=1)
PAIRS = list(zip(TEXTS[:30], TEXTS[30:60], strict=True))
SCORES = [float(len(set(a.split()) & set(b.split()))) for a, b in PAIRS]
QUERIES = {f"q{i}": text for i, text in enumerate(TEST[:12])}
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS)}
RELEVANCE = {
    query: {d: 1 for d, other in CORPUS.items() if text.split()[0] == other.split()[0]}
    for query, text in QUERIES.items()
}


def make_tasks() -> list[Any]:
    return [
        ClassificationTask(TEXTS, LABELS, test_texts=TEST, test_labels=TEST_LABELS),
        ClusteringTask(TEXTS, LABELS, sample_size=100, n_experiments=5),
        STSTask(PAIRS, SCORES),
        RerankingTask(TEST[:5], [TEXTS[:9]] * 5, [[1, 0, 0] * 3] * 5),
        RetrievalTask(QUERIES, CORPUS, RELEVANCE),
    ]


class FailsOn(Words):
    """A transformer that fails when it is given a certain text."""

    def __init__(self, text: str, error: BaseException) -> None:
        super().__init__(noise=3.0)
        self.text, self.error = text, error

    def transform(self, texts: list[str]) -> np.ndarray:
        if self.text in texts:
            raise self.error
        return super().transform(texts)


BROKEN_TEXT = "a text that breaks"
THREE_TASKS = [
    STSTask(PAIRS, SCORES, name="first"),
    RetrievalTask({"q": BROKEN_TEXT, **QUERIES}, CORPUS, {"q": ["d0"], **RELEVANCE}, name="second"),
    STSTask(PAIRS[:20], SCORES[:20], name="third"),
]
