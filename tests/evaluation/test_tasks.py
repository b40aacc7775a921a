"""Tasks that are refused before anything is embedded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from evaluation_data import (
    CORPUS,
    LABELS,
    PAIRS,
    QUERIES,
    RELEVANCE,
    SCORES,
    TEST,
    TEXTS,
    Words,
    make_tasks,
)

from skembed.evaluation.harness import evaluate
from skembed.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


# Bad input: refused before anything is embedded


BAD_TASKS = [
    (lambda: ClassificationTask([], []), "must hold texts; got none"),
    (lambda: ClassificationTask(TEXTS, LABELS[1:]), r"shape \(90,\), one label a text"),
    (lambda: ClassificationTask(TEXTS, ["one"] * 90), "two different labels; got 1"),
    (lambda: ClassificationTask(TEXTS, [None, *LABELS[1:]]), r"no missing labels.*labels\[0\]"),
    (lambda: ClassificationTask(TEXTS, [0.5, *[1.0] * 89]), "round or bin numbers"),
    (lambda: ClassificationTask(TEXTS, [1, *LABELS[1:]]), "labels of one type"),
    (lambda: ClassificationTask(PAIRS, SCORES), "must hold texts; got pairs"),
    (lambda: ClassificationTask(TEXTS, LABELS, test_texts=TEST), "must be given together"),
    (
        lambda: ClassificationTask(TEXTS, LABELS, test_texts=["a"], test_labels=["new"]),
        "labels that are in `labels`; 1 are not, the first is 'new'",
    ),
    (lambda: ClassificationTask(TEXTS, LABELS, samples_per_label=90), "leave texts to test on"),
    (lambda: ClassificationTask(TEXTS, LABELS, samples_per_label=0), r"an int in \[1, inf\)"),
    (lambda: ClassificationTask(TEXTS, LABELS, metric="auc"), "`metric` parameter of"),
    (lambda: ClassificationTask(TEXTS, LABELS, random_state=-1), "`random_state` parameter of"),
    (lambda: ClusteringTask(TEXTS, ["one"] * 90), "two different labels; got 1"),
    (lambda: ClusteringTask(TEXTS, LABELS, max_fraction=1.5), "`max_fraction` parameter of"),
    (lambda: ClusteringTask(TEXTS, LABELS, max_fraction=0.1, max_texts=5), "must be None where"),
    (lambda: ClusteringTask(TEXTS, [["a"], *LABELS[1:]]), "either labels or lists of labels"),
    (lambda: ClusteringTask(TEXTS, LABELS[1:]), "one label a text, 90; got 89"),
    (lambda: STSTask(TEXTS, SCORES), "must hold pairs of texts; got 90 single texts"),
    (lambda: STSTask(PAIRS, SCORES[1:]), r"numbers of shape \(30,\)"),
    (lambda: STSTask(PAIRS, [1.0] * 30), "two different finite numbers or more; got less"),
    (lambda: STSTask(PAIRS, [math.nan] * 30), r"no missing numbers.*scores\[0\]"),
    (lambda: RetrievalTask(QUERIES, {}, RELEVANCE), "`corpus` parameter of .* got none"),
    (lambda: RetrievalTask([], CORPUS, RELEVANCE), "`queries` parameter of .* got none"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {"q0": ["d0"]}), "11 of 12 have none, the first is"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {**RELEVANCE, "q1": {}}), "1 of 12 have none"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {**RELEVANCE, "x": {"d0": 1}}), "are of none"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": [0]}), "ids of one type, str or int"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": {"d": 0.5}}), "grades of int; got float"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": "d"}), "lists of document ids; got str"),
    (lambda: RetrievalTask(["a"], ["b"], [[0], [0]]), "one entry a query, 1; got 2"),
    (lambda: RetrievalTask(["a"], ["b"], np.ones((1, 2), int)), r"of shape \(1, 1\)"),
    (lambda: RetrievalTask(["a"], ["b"], 3), "a mapping, a sequence, a matrix or a frame"),
    (
        lambda: RetrievalTask(["a", "b"], ["c"], [[0], [0]], query_ids=["x", "x"]),
        r"`query_ids` .* each id once; query_ids\[1\], 'x', is there before",
    ),
    (
        lambda: RetrievalTask(["a"], ["b", "c"], [["x"]], document_ids=["x", "x"]),
        "`document_ids` .* each id once",
    ),
    (lambda: RetrievalTask(["a"], ["b"], [[1]], document_ids=["x", "y"]), "must hold 1 ids"),
    (
        lambda: RetrievalTask(["a"], ["b", "c"], [[1]], document_ids=["x", 1]),
        r"all of one type; document_ids\[1\] is of type int",
    ),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, query_ids=["q"]), "must be None where"),
    (
        lambda: RetrievalTask(["a"], ["b"], pd.DataFrame([(0, 0, 1), (0, 0, 1)])),
        "judge a document once; 0 occurs twice",
    ),
    (lambda: RetrievalTask(["a"], ["b"], pd.DataFrame([(0, 0)])), "three columns"),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, metric="ndcg_at_11"), "`metric`"),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, top_k=0), "`top_k`"),
    (lambda: RerankingTask(["a", "b"], [["c"], []], [[1], []]), "1 have none, the first is 1"),
    (lambda: RerankingTask(["a"], [["c"]], [[1, 0]]), "query 0 has 1 candidates and 2 grades"),
    (lambda: RerankingTask(["a"], [["c"]], [[0.5]]), "grades of int; query 0 has another"),
    (lambda: RerankingTask(["a"], [["c"], ["d"]], [[1]]), "one list a query, 1; got 2"),
    (lambda: RerankingTask(["a"], [["c"]], [[1], [1]]), "one list a query, 1; got 2"),
    (lambda: RerankingTask(["a"], ["c"], [[1]]), "must hold lists; got str"),
    (lambda: RerankingTask(["a"], [["x"]], [["b"]], corpus={"b": "b"}), "unknown or repeated one"),
    (
        lambda: RerankingTask(["a"], [["b", "b"]], [["b"]], corpus={"b": "b"}),
        "unknown or repeated one",
    ),
    (
        lambda: RerankingTask({"q": "a"}, {"r": ["b"]}, {"q": ["b"]}, corpus={"b": "b"}),
        "an entry for every query, and for no other id",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD_TASKS, ids=range(len(BAD_TASKS)))
def test_bad_tasks_are_refused_before_anything_is_embedded(make: Any, message: str) -> None:
    spy, good = Words(), STSTask(PAIRS, SCORES, name="good")
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(spy, [good, make()])
    assert not spy.calls


# A vectorizer that fails in the middle


def test_repr_of_a_task_shows_no_texts() -> None:
    for task in make_tasks():
        assert repr(task) == f"{type(task).__name__}(name={task.name!r})"
