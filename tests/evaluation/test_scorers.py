"""Scorers for scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_data import LABELS, PAIRS, SCORES, TEXTS, WORDS, Words
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.evaluation.harness import evaluate
from skembed.evaluation.scorers import (
    clustering_scorer,
    reranking_scorer,
    retrieval_scorer,
    sts_scorer,
)
from skembed.evaluation.tasks import (
    RetrievalTask,
)
from skembed.metrics.ranking import ndcg_at_k

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


@pytest.fixture(scope="module")
def frozen() -> NVEmbedVectorizer:
    return NVEmbedVectorizer(trainer=None, cache=EmbeddingCache())


def test_sts_scorer_in_a_grid_search(frozen: NVEmbedVectorizer) -> None:
    grid = {"truncate_dim": [4, None]}
    search = GridSearchCV(frozen, grid, scoring=sts_scorer, cv=2).fit(PAIRS, SCORES)
    best = search.cv_results_["mean_test_score"]
    assert np.isfinite(best).all() and best[0] != best[1]
    vectors = frozen.transform(PAIRS)
    by_hand = np.einsum("nd,nd->n", vectors[:, :384], vectors[:, 384:])
    from scipy.stats import spearmanr

    expected = spearmanr(SCORES, by_hand)[0]
    assert sts_scorer(frozen, PAIRS, SCORES) == pytest.approx(expected, abs=1e-6)

    class Fitted:
        def predict(self, X: Any) -> list[float]:
            return SCORES

    assert sts_scorer(Fitted(), PAIRS, SCORES) == pytest.approx(1.0)


def test_reranking_scorer_keeps_queries_together(frozen: NVEmbedVectorizer) -> None:
    rows = [(q, t) for q in ("cat dog", "car ship", "milk salt") for t in TEXTS[:12]]
    grades = [int(t.split()[0] in WORDS[i // 12].split()) for i, (_, t) in enumerate(rows)]
    queries = [q for q, _ in rows]
    scores = cross_val_score(
        frozen, rows, grades, groups=queries, cv=GroupKFold(3), scoring=reranking_scorer
    )
    expected = reranking_scorer(frozen, rows, grades)
    assert 0.4 < expected <= 1
    assert scores.mean() == pytest.approx(expected), "the mean over queries, either way"
    shuffled = np.random.default_rng(0).permutation(len(rows))
    again = reranking_scorer(frozen, [rows[i] for i in shuffled], [grades[i] for i in shuffled])
    assert again == pytest.approx(expected)


def test_retrieval_scorer_of_pairs_and_of_a_retriever(frozen: NVEmbedVectorizer) -> None:
    pairs = [(f"about {t}", t) for t in dict.fromkeys(TEXTS[:40])]
    scores = cross_val_score(frozen, pairs, cv=2, scoring=retrieval_scorer)
    assert ((scores > 0.2) & (scores <= 1)).all()
    queries, documents = (list(column) for column in zip(*pairs, strict=True))
    task = RetrievalTask(queries, documents, [[i] for i in range(len(pairs))])
    expected = evaluate(frozen, task, n_bootstraps=0)[0].score
    assert retrieval_scorer(frozen, pairs) == pytest.approx(expected, abs=2e-5)
    twice = [*pairs, ("about " + documents[0], documents[1])]
    assert retrieval_scorer(frozen, twice) != retrieval_scorer(frozen, pairs)

    class Search:
        def search(self, X: list[str], *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
            n = len(X)
            return np.tile([0.9, 0.5], (n, 1)), np.tile([1, 0], (n, 1))

    assert retrieval_scorer(Search(), ["a", "b"], [[1], {0: 2}]) == pytest.approx(
        (1 + ndcg_at_k([[1, 0]], [[0.5, 0.9]])) / 2
    )


def test_clustering_scorer_in_cross_validation(frozen: NVEmbedVectorizer) -> None:
    pipe = make_pipeline(frozen, KMeans(3, n_init=3, random_state=0))
    scores = cross_val_score(pipe, TEXTS, LABELS, cv=2, scoring=clustering_scorer)
    assert ((scores >= 0) & (scores <= 1)).all()
    fitted = pipe.fit(TEXTS)
    assert clustering_scorer(fitted, TEXTS, LABELS) == v_measure_score(
        LABELS, fitted.predict(TEXTS)
    )


class Odd:
    def transform(self, X: Any) -> np.ndarray:
        return np.ones((len(X), 3))


class Finder:
    def search(self, X: Any, *, top_k: int) -> Any:
        raise AssertionError("asked before the entries were counted")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sts_scorer(object(), PAIRS, SCORES), TypeError, "`sts_scorer` needs an estimator"),
        (
            lambda: sts_scorer(Odd(), PAIRS, SCORES),
            ValueError,
            r"returned an array of shape \(30, 3\)",
        ),
        (lambda: clustering_scorer(object(), TEXTS, LABELS), TypeError, "estimator with `predict`"),
        (lambda: retrieval_scorer(Words(dim=4), TEXTS), ValueError, "must hold pairs"),
        (lambda: retrieval_scorer(Finder(), ["a"], [[0], [0]]), ValueError, "a query, 1; got 2"),
        (lambda: retrieval_scorer(Finder(), ["a"]), ValueError, "a query, 1; got None"),
    ],
)
def test_bad_scorers(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
