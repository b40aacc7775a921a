"""The protocols of mteb 2.26, from a task's data to its scores.

The operations and their order are mteb's, so that scores agree to the last digit.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import (
    paired_cosine_distances,
    paired_euclidean_distances,
    paired_manhattan_distances,
)
from sklearn.preprocessing import normalize

from skembed._inputs import is_instance_of
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
from skembed.embedding import embed
from skembed.evaluation.task_data import (
    ClassificationData,
    ClusteringData,
    RankingData,
    STSData,
    TaskData,
)
from skembed.evaluation.tasks import (
    CLUSTERING_METRICS,
    STS_METRICS,
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
    Task,
)
from skembed.metrics.agreement import ami, pearson, spearman, v_measure
from skembed.metrics.classification import classification_metrics
from skembed.metrics.ranking import ranking_metrics, round_means
from skembed.similarity import Floats, Ints, Vectors

__all__ = [
    "BLOCK_BYTES",
    "CHUNK_SIZE",
    "KMEANS_BATCH_SIZE",
    "Outcome",
    "TimedVectorizer",
    "run_protocol",
]

CHUNK_SIZE = 50_000  # documents at a time, as in mteb: the same products, to the last bit
BLOCK_BYTES = 256 * 2**20  # of the scores of one chunk
KMEANS_BATCH_SIZE = 512


@dataclass(frozen=True, eq=False)
class Outcome:
    """The scores of one vectorizer on one task; fields as in `TaskScore`."""

    metrics: dict[str, float]
    values: Floats  # (n,)
    replicates: Floats  # (n_replicates,); of one task, paired across vectorizers
    unit: str


class TimedVectorizer:
    """A vectorizer that counts its texts and seconds."""

    def __init__(self, vectorizer: Any) -> None:
        self.vectorizer = vectorizer
        self.seconds = 0.0
        self.n_texts = 0  # without those that came out of its cache

    def embed(self, texts: list[str], side: str | None = None) -> Any:
        """Return the vectors of texts, (n_texts, dim): float32, or CSR from a sparse encoder."""
        cache = self._find_cache()
        misses, start = 0 if cache is None else cache.misses, time.perf_counter()
        vectors = embed(self.vectorizer, texts, side, owner="evaluate", sparse=True)
        self.seconds += time.perf_counter() - start
        self.n_texts += len(texts) if cache is None else cache.misses - misses
        return vectors

    def texts_per_s(self) -> float:
        """Return the texts embedded in a second; NaN where all came out of a cache."""
        return self.n_texts / max(self.seconds, 1e-9) if self.n_texts else math.nan

    def _find_cache(self) -> EmbeddingCache | None:
        """Return the cache of this package's vectorizer, alone or first in a Pipeline."""
        steps = getattr(self.vectorizer, "steps", None)
        first = steps[0][1] if isinstance(steps, list) and steps else self.vectorizer
        if not is_instance_of(first, "skembed.vectorizer", "NVEmbedVectorizer"):
            return None
        return resolve_cache(first.cache)


def run_protocol(
    task: Task, data: TaskData, vectorizer: TimedVectorizer, *, n_bootstraps: int
) -> Outcome:
    """Run the protocol of a task on what `read_task` returned for it."""
    if isinstance(task, ClassificationTask) and isinstance(data, ClassificationData):
        return _run_classification(task, data, vectorizer)
    if isinstance(task, ClusteringTask) and isinstance(data, ClusteringData):
        return _run_clustering(task, data, vectorizer)
    if isinstance(task, STSTask) and isinstance(data, STSData):
        return _run_sts(task, data, vectorizer, n_bootstraps)
    if isinstance(task, (RetrievalTask, RerankingTask)) and isinstance(data, RankingData):
        return _run_ranking(task, data, vectorizer, n_bootstraps)
    raise TypeError(f"No protocol for {type(task).__name__} with {type(data).__name__}.")


def _run_classification(
    task: ClassificationTask, data: ClassificationData, vectorizer: TimedVectorizer
) -> Outcome:
    """Fit a classifier on each draw and test it; metrics are means over draws."""
    pooled = data.test_texts is None
    used = np.arange(len(data.texts)) if pooled else np.unique(np.concatenate(data.draws))
    vectors = vectorizer.embed([data.texts[row] for row in used.tolist()])  # (U, D)
    test = vectors if data.test_texts is None else vectorizer.embed(data.test_texts)
    _check_width(vectors, test)
    labels = data.labels if data.test_labels is None else data.test_labels
    by_draw = []
    for draw in data.draws:
        rows = np.setdiff1d(used, draw) if pooled else np.arange(test.shape[0])
        classifier = _make_classifier(task)
        with warnings.catch_warnings():
            if task.classifier is None:  # the protocol has 100 iterations, enough or not
                warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(vectors[np.searchsorted(used, draw)], data.labels[draw])
        by_draw.append(classification_metrics(labels[rows], classifier.predict(test[rows])))
    names = [name for name in by_draw[0] if all(name in metrics for metrics in by_draw)]
    if task.metric not in names:
        raise ValueError(
            f"The `metric` parameter of `ClassificationTask` must be one of {names} for the labels "
            f"of {task.name!r}; got {task.metric!r}, which needs two labels."
        )
    means = {name: float(np.mean([metrics[name] for metrics in by_draw])) for name in names}
    values = np.array([metrics[task.metric] for metrics in by_draw])
    return Outcome(means, values, values, "draws")


def _make_classifier(task: ClassificationTask) -> Any:
    """Return a fresh classifier, seeded where it takes a seed and has none."""
    if task.classifier is None:
        return LogisticRegression(max_iter=100, random_state=task.random_state)
    classifier = clone(task.classifier)
    if classifier.get_params().get("random_state", task) is None:
        classifier.set_params(random_state=task.random_state)
    return classifier


def _run_clustering(
    task: ClusteringTask, data: ClusteringData, vectorizer: TimedVectorizer
) -> Outcome:
    """Cluster each sample of each level; metrics are means over all of them."""
    vectors = vectorizer.embed(data.texts)  # (N, D)
    by_metric: dict[str, list[float]] = {name: [] for name in CLUSTERING_METRICS}
    for rows, labels, samples in data.levels:
        kmeans = MiniBatchKMeans(
            n_clusters=len(np.unique(labels)),
            batch_size=KMEANS_BATCH_SIZE,
            init="k-means++",
            n_init=1,
            random_state=task.random_state,
        )
        for sample in samples:
            clusters = kmeans.fit_predict(vectors[rows[sample]])
            by_metric["v_measure"].append(v_measure(labels[sample], clusters))
            by_metric["ami"].append(ami(labels[sample], clusters))
    means = {}
    for name, scores in by_metric.items():
        means[name], means[f"{name}_std"] = float(np.mean(scores)), float(np.std(scores))
    values = np.array(by_metric[task.metric])
    return Outcome(means, values, values, "draws")


def _run_sts(
    task: STSTask, data: STSData, vectorizer: TimedVectorizer, n_bootstraps: int
) -> Outcome:
    """Correlate three similarities with the scores."""
    left, right = vectorizer.embed(data.left), vectorizer.embed(data.right)
    _check_width(left, right)
    similarities = {
        "cosine": 1 - paired_cosine_distances(left, right),
        "manhattan": -paired_manhattan_distances(left, right),
        "euclidean": -paired_euclidean_distances(left, right),
    }
    correlations = {"pearson": pearson, "spearman": spearman}
    metrics = {}
    for metric in STS_METRICS:
        similarity, name = metric.split("_")
        metrics[metric] = correlations[name](data.scores, similarities[similarity])
    similarity, name = task.metric.split("_")
    values = np.asarray(similarities[similarity], dtype=np.float64)
    correlate = correlations[name]
    replicates = _bootstrap(
        len(values), n_bootstraps, task.random_state, lambda i: correlate(data.scores[i], values[i])
    )
    return Outcome(metrics, values, replicates, "pairs")


def _run_ranking(
    task: RetrievalTask | RerankingTask,
    data: RankingData,
    vectorizer: TimedVectorizer,
    n_bootstraps: int,
) -> Outcome:
    """Rank documents for each query; metrics are means over queries, rounded as mteb rounds."""
    queries = vectorizer.embed(data.queries, "query")  # (Q, D)
    documents = vectorizer.embed(data.documents, "document")  # (N, D)
    _check_width(queries, documents)
    if data.candidates is None:
        ranked = _search_corpus(queries, documents, _rank_ids(data.document_ids), task.top_k)
    else:
        ranked = _rank_candidates(queries, documents, data, task.top_k)
    run: dict[Any, dict[Any, float]] = {}
    for i, (query, (positions, scores)) in enumerate(zip(data.query_ids, ranked, strict=True)):
        ids = data.document_ids if data.candidate_ids is None else data.candidate_ids[i]
        run[query] = {ids[j]: s for j, s in zip(positions.tolist(), scores.tolist(), strict=True)}
        if isinstance(task, RetrievalTask) and task.ignore_identical_ids:
            run[query].pop(query, None)
    metrics = ranking_metrics(data.relevance, run)
    values = metrics[task.metric]
    replicates = _bootstrap(
        len(values), n_bootstraps, task.random_state, lambda i: float(values[i].mean())
    )
    return Outcome(round_means(metrics), values, replicates, "queries")


def _search_corpus(
    queries: Any, documents: Any, ranks: Ints, top_k: int
) -> list[tuple[Ints, Vectors]]:
    """Return the rows and cosines of the best documents of each query, in chunks of the corpus."""
    n, m = queries.shape[0], documents.shape[0]
    best = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in range(n)]
    for start in range(0, m, CHUNK_SIZE):
        chunk = documents[start : start + CHUNK_SIZE]
        size = chunk.shape[0]
        n_rows = max(1, BLOCK_BYTES // (4 * size))
        for first in range(0, n, n_rows):
            scores = _cosines(queries[first : first + n_rows], chunk)  # (B, C)
            for i, row in enumerate(scores, start=first):
                new = _choose_best(row, ranks[start : start + size], top_k)
                rows = np.concatenate([best[i][0], new + start])
                values = np.concatenate([best[i][1], row[new]])
                order = _choose_best(values, ranks[rows], top_k)
                best[i] = rows[order], values[order]
    return best


def _rank_candidates(
    queries: Any, documents: Any, data: RankingData, top_k: int
) -> list[tuple[Ints, Vectors]]:
    """Return the best candidates of each query, as positions in its list or rows of the corpus."""
    ranks, ranked = _rank_ids(data.document_ids), []
    by_position = data.candidate_ids is not None
    for i, rows in enumerate(data.candidates or ()):
        scores = _cosines(queries[i : i + 1], documents[rows])[0]  # (C,)
        best = _choose_best(
            scores, np.arange(len(rows))[::-1] if by_position else ranks[rows], top_k
        )
        ranked.append((best if by_position else rows[best], scores[best]))
    return ranked


def _cosines(queries: Any, documents: Any) -> Vectors:
    """Return cosine similarities (Q, N) by the same operations as mteb."""
    import torch

    if hasattr(queries, "tocsr"):
        unit = normalize(queries) @ normalize(documents).T
        return np.asarray(unit.toarray(), dtype=np.float32)
    sides = (torch.from_numpy(np.ascontiguousarray(side)) for side in (queries, documents))
    left, right = (torch.nn.functional.normalize(side, p=2, dim=1) for side in sides)
    with torch.autocast("cpu", enabled=False):
        return (left @ right.transpose(0, 1)).numpy()


def _rank_ids(ids: list[Any]) -> Ints:
    """Return the rank of each id in descending order, (N,)."""
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    return ranks


def _choose_best(scores: Vectors, ranks: Ints, top_k: int) -> Ints:
    """Return the positions of the highest scores, best first, equal ones by rank, (<= top_k,)."""
    candidates = np.arange(len(scores))
    if len(scores) > top_k:
        floor = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        candidates = np.flatnonzero(scores >= floor)
    return candidates[np.lexsort((ranks[candidates], -scores[candidates]))][:top_k]


def _bootstrap(n: int, n_bootstraps: int, seed: int, score: Callable[[Ints], float]) -> Floats:
    """Return the score of each bootstrap sample of n; the same samples for the same seed."""
    generator = np.random.default_rng(seed)
    return np.array([score(generator.integers(n, size=n)) for _ in range(n_bootstraps)])


def _check_width(left: Any, right: Any) -> None:
    """Raise unless two sides have vectors of one width."""
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            "The `vectorizer` of `evaluate` must give vectors of one width; got "
            f"{left.shape[1]} and {right.shape[1]} on the two sides of a task."
        )
