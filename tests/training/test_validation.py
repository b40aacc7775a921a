"""Scores of held-out examples against plain definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import pairwise_distances_argmin
from training_runs import LABELS, PAIRS, TEXTS, held_out_score, make, make_texts

from skembed.training import loop
from skembed.training.examples import TrainingTask, check_examples
from skembed.training.validation import split_validation, validation


def random_units(n: int, rng: np.random.Generator, dim: int = 6) -> np.ndarray:
    vectors = rng.normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_accuracy_is_that_of_the_nearest_centroid(rng: np.random.Generator) -> None:
    texts, labels = make_texts(20)
    examples = check_examples(texts, labels)
    train, held = split_validation(examples, 0.3, 0)
    vectors = random_units(len(texts), rng)
    rows = np.arange(len(texts))
    check = validation(examples, train, held, rows, rows, 0)
    # On unit centroids, the nearest one is that of the highest cosine.
    unit = np.stack([vectors[train][examples.labels[train] == k].mean(0) for k in range(3)])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = (pairwise_distances_argmin(vectors[held], unit) == examples.labels[held]).mean()
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(expected)
    assert 0.1 < expected < 0.9
    assert check.metric == "accuracy of the nearest centroid"


def test_correlation_is_scipys(rng: np.random.Generator) -> None:
    pairs = [(f"a {i}", f"b {i}") for i in range(60)]
    scores = rng.integers(0, 5, 60).astype(float)
    examples = check_examples(pairs, scores)
    train, held = split_validation(examples, 0.5, 0)
    n = len(examples.texts)
    vectors = random_units(2 * n, rng)
    check = validation(examples, train, held, np.arange(n), n + np.arange(n), 0)
    left = vectors[examples.columns[held, 0]]
    right = vectors[n + examples.columns[held, 1]]
    expected = spearmanr((left * right).sum(1), scores[held]).statistic
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(expected)
    assert abs(expected) > 0.01


@pytest.mark.parametrize("n_candidates", [12, 400])
def test_reciprocal_rank_by_hand(n_candidates: int, rng: np.random.Generator) -> None:
    # Anchors with several positives, positives that are anchors elsewhere, given negatives.
    rows = []
    while len(rows) < 300:
        a, p, n = rng.choice(n_candidates, 3, replace=False)
        rows.append((f"t {a}", f"t {p}", f"t {n}"))
    examples = check_examples(rows)
    train, held = split_validation(examples, 0.4, 0)
    n = len(examples.texts)
    vectors = random_units(2 * n, rng)
    check = validation(examples, train, held, np.arange(n), n + np.arange(n), 0)
    known: dict[int, set[int]] = {t: set() for t in range(n)}
    for a, p, _ in examples.columns.tolist():
        known[a].add(p)
        known[p].add(a)
    candidates = {t for row in examples.columns[held].tolist() for t in row[1:]}
    total = 0.0
    for a, p, _ in examples.columns[held].tolist():
        cosines = {c: float(vectors[a] @ vectors[n + c]) for c in candidates - known[a] - {a}}
        rank = 1 + sum(c > float(vectors[a] @ vectors[n + p]) for c in cosines.values())
        total += 1 / rank if rank <= 10 else 0
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(total / len(held), abs=1e-6)
    assert 0 < total / len(held) < 1


def test_reciprocal_rank_needs_no_matrix_of_all_cosines(rng: np.random.Generator) -> None:
    import tracemalloc

    examples = check_examples([(f"a {i}", f"b {i}") for i in range(12_000)])
    train, held = split_validation(examples, 0.5, 0)
    vectors = random_units(len(examples.texts), rng, dim=4)
    rows = np.arange(len(examples.texts))
    check = validation(examples, train, held, rows, rows, 0)
    tracemalloc.start()
    check.score(lambda wanted: vectors[wanted])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000 * 6_000 * 4 / 2, "half of the whole matrix"


KINDS = {
    "labels": (TEXTS, LABELS),
    "rows": (PAIRS, None),
    "scores": (PAIRS, [float(grade) for grade in range(len(PAIRS))]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_the_history_are_those_of_the_vectors(kind: str) -> None:
    X, y = KINDS[kind]
    names = {"instruction": "Find the like", "document_instruction": "Say it"}
    trainer = {"validation_fraction": 0.4, "learning_rate": 2e-2, "epochs": 4}
    emb = make(vectorizer=names, **trainer).fit(X, y)
    scores = emb.history_["score"]
    assert [entry["step"] for entry in emb.history_.validation] == list(range(5))
    assert scores[-1] == pytest.approx(held_out_score(emb, X, y, 0.4), abs=1e-6)
    start = make(vectorizer=names, max_steps=1, max_grad_norm=1e-14, weight_decay=0).fit(X, y)
    assert scores[0] == pytest.approx(held_out_score(start, X, y, 0.4), abs=1e-6)
    assert emb.history_.validation_metric.split()[0] in ("accuracy", "mean", "Spearman")


def test_several_tasks_are_scored_by_their_mean() -> None:
    tasks = [TrainingTask(*KINDS[kind]) for kind in KINDS]
    emb = make(max_steps=1, validation_fraction=0.4).fit_tasks(tasks)
    assert emb.history_.validation_metric == "mean score of 3 tasks"
    start = make(max_steps=1, max_grad_norm=1e-14, weight_decay=0).fit(PAIRS)
    alone = [held_out_score(start, *KINDS[kind], 0.4) for kind in KINDS]
    assert emb.history_["score"][0] == pytest.approx(np.mean(alone), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_part_is_never_trained_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = KINDS[kind]
    examples = check_examples(X, y)
    _, held = split_validation(examples, 0.4, 0)
    unseen = {examples.texts[i] for i in examples.columns[held].ravel()}
    unseen -= {examples.texts[i] for i in np.delete(examples.columns, held, axis=0).ravel()}
    seen: set[int] = set()
    build = loop.BatchPlan.build

    def recording(self: Any, step: int, batch_rows: Any) -> Any:
        batch = build(self, step, batch_rows)
        for task in self.tasks:
            for row, text in zip(task.queries, task.examples.texts, strict=True):
                if row in batch.texts:
                    seen.add(text)
            for row, text in zip(task.documents, task.examples.texts, strict=True):
                if row in batch.texts:
                    seen.add(text)
        return batch

    monkeypatch.setattr(loop.BatchPlan, "build", recording)
    make(validation_fraction=0.4, max_steps=None, batch_size=4).fit(X, y)
    assert unseen
    assert not seen & unseen
    assert len(seen) == len(examples.texts) - len(unseen)
