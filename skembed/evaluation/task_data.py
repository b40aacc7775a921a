"""The data of a task, checked and drawn before anything is embedded.

All draws come from fresh generators: they are the same for every vectorizer and every call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._inputs import check_texts, read_labels, read_numbers
from skembed._validation import (
    LARGEST_SEED,
    Rule,
    check_bool,
    check_choice,
    check_int,
    check_parameters,
    check_real,
    check_string,
    parameter_error,
)
from skembed.evaluation.task_input import (
    check_distinct_classes,
    read_column,
    read_items,
    read_levels,
)
from skembed.evaluation.tasks import (
    CLASSIFICATION_METRICS,
    CLUSTERING_METRICS,
    STS_METRICS,
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
    Task,
)
from skembed.metrics.qrels import read_grades, read_relevance
from skembed.metrics.ranking import K_VALUES, RANKING_METRICS
from skembed.similarity import Ints

__all__ = [
    "ClassificationData",
    "ClusteringData",
    "RankingData",
    "STSData",
    "TaskData",
    "check_task",
    "read_task",
]

_Labels = npt.NDArray[Any]


class ClassificationData(NamedTuple):
    """Texts and labels to draw from and to test on, and the rows of each draw."""

    texts: list[str]
    labels: _Labels
    test_texts: list[str] | None  # None: what a draw left over of `texts`
    test_labels: _Labels | None
    draws: list[Ints]  # training rows, in the order drawn


class ClusteringData(NamedTuple):
    """Texts to embed; per level the rows that reach it, their labels, and samples of them."""

    texts: list[str]
    levels: list[tuple[Ints, _Labels, list[Ints]]]


class STSData(NamedTuple):
    """Two columns of texts and the true scores, float64."""

    left: list[str]
    right: list[str]
    scores: npt.NDArray[np.float64]


class RankingData(NamedTuple):
    """Queries, documents with their ids, grades, and the rows to rank (None: all documents)."""

    queries: list[str]
    query_ids: list[Any]
    documents: list[str]
    document_ids: list[Any]
    relevance: dict[Any, dict[Any, int]]
    candidates: list[Ints] | None
    candidate_ids: list[list[Any]] | None = None  # where each list numbers its documents


TaskData = ClassificationData | ClusteringData | STSData | RankingData


def _check_classifier(value: Any, *, name: str, owner: str) -> Any:
    """Return a classifier as it is, or None."""
    usable = all(callable(getattr(value, method, None)) for method in ("fit", "predict"))
    if value is None or (usable and not isinstance(value, type)):
        return value
    expected = "a classifier of scikit-learn's kind, or None"
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


_MAX_DRAWS, _MAX_SAMPLE = 100_000, 10_000_000  # all are drawn, and held, before the first is used
_check_count = partial(check_int, low=1)
_check_bound = partial(check_int, low=1, allow_none=True)
# Of all tasks, by name; `metric` differs from one kind to the other.
_RULES: dict[str, Rule] = {
    "name": check_string,
    "samples_per_label": _check_count,
    "n_experiments": partial(check_int, low=1, high=_MAX_DRAWS),
    "classifier": _check_classifier,
    "sample_size": partial(check_int, low=1, high=_MAX_SAMPLE),
    "max_fraction": partial(check_real, low=0, high=1, inclusive="right", allow_none=True),
    "max_texts": _check_bound,
    "max_depth": _check_bound,
    "top_k": _check_count,
    "ignore_identical_ids": check_bool,
    # The range that the generators of numpy and Python share.
    "random_state": partial(check_int, low=0, high=LARGEST_SEED),
}


def check_task(task: Any) -> Any:
    """Return a task with built-in values; its texts and labels are not looked at."""
    for kind, (_, metrics) in _READERS.items():
        if isinstance(task, kind):
            rules: dict[str, Rule] = {"metric": partial(check_choice, allowed=metrics), **_RULES}
            given: Any = task
            names = rules.keys() & {field.name for field in fields(given)}
            values = {name: getattr(task, name) for name in names}
            rules = {name: rule for name, rule in rules.items() if name in names}
            return replace(given, **check_parameters(values, rules, owner=kind.__name__))
    raise TypeError(
        "The `tasks` parameter of `evaluate` must hold tasks, such as ClassificationTask; "
        f"got an object of type {type(task).__name__}."
    )


def read_task(task: Task) -> TaskData:
    """Check a task and make its draws; raise TypeError or ValueError for bad data."""
    task = check_task(task)
    kind, read = next((k, read) for k, (read, _) in _READERS.items() if isinstance(task, k))
    return read(task, kind.__name__)


def _read_classification(task: ClassificationTask, owner: str) -> ClassificationData:
    """Check texts and labels and draw the training samples."""
    texts = read_column(task.texts, name="texts", owner=owner)
    labels = read_labels(task.labels, len(texts), name="labels", owner=owner)
    check_distinct_classes(labels, owner=owner)
    size, n = task.samples_per_label, task.n_experiments
    draws = _draw_samples(labels.tolist(), size, n, seed=task.random_state)
    if (task.test_texts is None) != (task.test_labels is None):
        raise ValueError(
            f"The `test_texts` and `test_labels` parameters of `{owner}` must be given together."
        )
    if task.test_texts is None:
        if any(len(draw) == len(texts) for draw in draws):
            raise ValueError(
                f"The `samples_per_label` parameter of `{owner}` must leave texts to test on; got "
                f"{size}, which takes all {len(texts)}. Lower it, or pass `test_texts`."
            )
        return ClassificationData(texts, labels, None, None, draws)
    test_texts = read_column(task.test_texts, name="test_texts", owner=owner)
    test_labels = read_labels(task.test_labels, len(test_texts), name="test_labels", owner=owner)
    unseen = sorted(set(test_labels.tolist()) - set(labels.tolist()), key=str)
    if unseen:
        raise ValueError(
            f"The `test_labels` parameter of `{owner}` must hold labels that are in `labels`; "
            f"{len(unseen)} are not, the first is {unseen[0]!r}."
        )
    return ClassificationData(texts, labels, test_texts, test_labels, draws)


def _draw_samples(labels: list[Any], size: int, n: int, *, seed: int) -> list[Ints]:
    """Return the rows of each draw as mteb takes them: the same shuffle, over and over."""
    order, draws = list(range(len(labels))), []
    for _ in range(n):
        np.random.RandomState(seed).shuffle(order)
        counts: dict[Any, int] = {}
        rows = []
        for row in order:
            count = counts.get(labels[row], 0)
            if count < size:
                rows.append(row)
                counts[labels[row]] = count + 1
        draws.append(np.array(rows, dtype=np.int64))
    return draws


def _read_clustering(task: ClusteringTask, owner: str) -> ClusteringData:
    """Check texts and labels, draw the texts to embed and the samples of each level."""
    texts = read_column(task.texts, name="texts", owner=owner)
    levels = read_levels(task.labels, len(texts), owner=owner)
    depth, n, size = task.max_depth, task.n_experiments, task.sample_size
    generator = random.Random(task.random_state)  # one for all draws, in mteb's order
    drawn_rows = _draw_texts(task, len(texts), generator, owner=owner)
    drawn_levels = []
    for rows, labels in levels[:depth]:
        label_of = dict(zip(rows.tolist(), labels, strict=True))
        reached = [i for i, row in enumerate(drawn_rows) if row in label_of]
        drawn_labels = np.array([label_of[drawn_rows[i]] for i in reached], dtype=labels.dtype)
        check_distinct_classes(drawn_labels, owner=owner)
        samples = [
            np.array(generator.choices(range(len(reached)), k=size), dtype=np.int64)
            for _ in range(n)
        ]
        drawn_levels.append((np.array(reached, dtype=np.int64), drawn_labels, samples))
    return ClusteringData([texts[row] for row in drawn_rows], drawn_levels)


def _draw_texts(
    task: ClusteringTask, n: int, generator: random.Random, *, owner: str
) -> Sequence[int]:
    """Return the rows to embed, in the order drawn."""
    fraction, most = task.max_fraction, task.max_texts
    if fraction is not None and most is not None:
        raise ValueError(
            f"The `max_fraction` parameter of `{owner}` must be None where `max_texts` is given."
        )
    if fraction is None and most is None:
        return range(n)
    size = int(fraction * n) if fraction is not None else most or n
    return generator.sample(range(n), k=min(n, size))


def _read_sts(task: STSTask, owner: str) -> STSData:
    """Check pairs and scores."""
    columns = check_texts(task.pairs, owner=owner, name="pairs").columns
    if len(columns) != 2:
        raise ValueError(
            f"The `pairs` parameter of `{owner}` must hold pairs of texts; got "
            f"{len(columns[0])} {'single texts' if len(columns) == 1 else 'rows of other lengths'}."
        )
    scores = read_numbers(task.scores, name="scores", owner=owner, n=len(columns[0]))
    if len(np.unique(scores)) < 2:
        raise ValueError(
            f"The `scores` parameter of `{owner}` must hold two different finite numbers or more; "
            "got less than two."
        )
    return STSData(columns[0], columns[1], scores)


def _read_retrieval(task: RetrievalTask, owner: str) -> RankingData:
    """Check queries, corpus and grades."""
    queries, query_ids = read_items(task.queries, task.query_ids, kind="query", owner=owner)
    corpus, ids = read_items(task.corpus, task.document_ids, kind="document", owner=owner)
    relevance = read_relevance(task.relevance, query_ids, ids, owner=owner)
    return RankingData(queries, query_ids, corpus, ids, relevance, None)


def _read_reranking(task: RerankingTask, owner: str) -> RankingData:
    """Check queries, candidates and grades."""
    queries, query_ids = read_items(task.queries, task.query_ids, kind="query", owner=owner)
    lists = _read_candidates(task.candidates, query_ids, owner=owner)
    if task.corpus is None:
        return _read_listed(task, queries, query_ids, lists, owner=owner)
    corpus, ids = read_items(task.corpus, task.document_ids, kind="document", owner=owner)
    relevance = read_relevance(task.relevance, query_ids, ids, owner=owner)
    row_of = {document: row for row, document in enumerate(ids)}
    rows = []
    for query, names in zip(query_ids, lists, strict=True):
        if not set(names) <= row_of.keys() or len(set(names)) != len(names):
            raise ValueError(
                f"The `candidates` parameter of `{owner}` must hold ids of the corpus, each once; "
                f"query {query!r} has an unknown or repeated one."
            )
        rows.append(np.array([row_of[name] for name in names], dtype=np.int64))
    return RankingData(queries, query_ids, corpus, ids, relevance, rows)


def _read_candidates(candidates: Any, query_ids: list[Any], *, owner: str) -> list[list[Any]]:
    """Return the candidates of each query, none empty."""
    subject = f"The `candidates` parameter of `{owner}`"
    if isinstance(candidates, Mapping):
        if set(candidates) != set(query_ids):
            raise ValueError(f"{subject} must have an entry for every query, and for no other id.")
        candidates = [candidates[query] for query in query_ids]
    lists = list(candidates)
    if len(lists) != len(query_ids):
        raise ValueError(
            f"{subject} must hold one list a query, {len(query_ids)}; got {len(lists)}."
        )
    for query, items in zip(query_ids, lists, strict=True):
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise TypeError(
                f"{subject} must hold lists; got {type(items).__name__} for query {query!r}."
            )
    lists = [list(items) for items in lists]
    empty = [query for query, items in zip(query_ids, lists, strict=True) if not items]
    if empty:
        raise ValueError(
            f"{subject} must hold candidates for every query; {len(empty)} have none, the first is "
            f"{empty[0]!r}. Drop those queries."
        )
    return lists


def _read_listed(
    task: RerankingTask,
    queries: list[str],
    query_ids: list[Any],
    lists: list[list[Any]],
    *,
    owner: str,
) -> RankingData:
    """Check candidates given as texts, with one grade each; their ids are their positions."""
    grades = list(task.relevance.values() if hasattr(task.relevance, "values") else task.relevance)
    if len(grades) != len(lists):
        raise ValueError(
            f"The `relevance` parameter of `{owner}` must hold one list a query, {len(lists)}; "
            f"got {len(grades)}."
        )
    relevance, row_of, rows = {}, dict[str, int](), []
    for query, names, values in zip(query_ids, lists, grades, strict=True):
        texts = check_texts(names, owner=owner, name="candidates").columns[0]
        judged = read_grades(values, len(texts), where=f"query {query!r}", owner=owner)
        relevance[query] = dict(enumerate(judged))
        rows.append(np.array([row_of.setdefault(text, len(row_of)) for text in texts]))
    ids = [list(range(len(names))) for names in lists]
    documents = list(row_of)
    return RankingData(
        queries, query_ids, documents, list(range(len(documents))), relevance, rows, ids
    )


_RANKING = tuple(f"{name}_at_{k}" for name in RANKING_METRICS for k in K_VALUES)
_READERS: dict[type[Task], tuple[Callable[[Any, str], TaskData], tuple[str, ...]]] = {
    ClassificationTask: (_read_classification, CLASSIFICATION_METRICS),
    ClusteringTask: (_read_clustering, CLUSTERING_METRICS),
    STSTask: (_read_sts, STS_METRICS),
    RetrievalTask: (_read_retrieval, _RANKING),
    RerankingTask: (_read_reranking, _RANKING),
}
