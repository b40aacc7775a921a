"""Protocols of the tasks, by hand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from evaluation_data import (
    CORPUS,
    LABELS,
    QUERIES,
    RELEVANCE,
    TEST,
    TEST_LABELS,
    TEXTS,
    Words,
    make_tasks,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.neighbors import KNeighborsClassifier

from skembed.evaluation import protocols as _protocols
from skembed.evaluation.harness import evaluate
from skembed.evaluation.results import EvaluationError
from skembed.evaluation.task_data import read_task
from skembed.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
)

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


# Classification


def test_classification_by_hand() -> None:
    row = evaluate(Words(noise=1.5), make_tasks()[0])[0]
    order = list(range(len(TEXTS)))
    vectors, test = Words(noise=1.5).transform(TEXTS), Words(noise=1.5).transform(TEST)
    expected = []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        drawn: list[int] = []
        for i in order:
            if sum(LABELS[j] == LABELS[i] for j in drawn) < 8:
                drawn.append(i)
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit(vectors[drawn], [LABELS[i] for i in drawn])
        expected.append(classifier.score(test, TEST_LABELS))
    assert row.values.tolist() == expected
    assert row.score == np.mean(expected)
    np.testing.assert_allclose([row.low, row.high], np.percentile(expected, [2.5, 97.5]))


def test_pooled_classification_tests_on_what_is_left() -> None:
    task = ClassificationTask(TEXTS, LABELS, samples_per_label=4, n_experiments=3)
    spy = Words(noise=1.5)
    row = evaluate(spy, task)[0]
    assert [texts for _, texts in spy.calls] == [TEXTS], "each text once"
    vectors, labels = Words(noise=1.5).transform(TEXTS), np.array(LABELS)
    draws = read_task(task).draws  # type: ignore[union-attr]
    assert len({tuple(draw) for draw in draws}) == 3
    for value, draw in zip(row.values, draws, strict=True):
        assert len(draw) == 12
        rest = np.delete(np.arange(90), draw)
        classifier = LogisticRegression(max_iter=100).fit(vectors[draw], labels[draw])
        assert value == classifier.score(vectors[rest], labels[rest])


def test_only_what_is_drawn_is_embedded() -> None:
    texts = [f"cat {i}" if i % 2 else f"dog {i}" for i in range(1000)]
    labels = ["cat" if i % 2 else "dog" for i in range(1000)]
    spy = Words()
    task = ClassificationTask(
        texts, labels, test_texts=texts[:10], test_labels=labels[:10], samples_per_label=2
    )
    evaluate(spy, task)
    assert len(spy.calls[0][1]) <= 40


def test_other_classifiers_and_main_scores() -> None:
    nearest = KNeighborsClassifier(1)
    base = {"texts": TEXTS, "labels": LABELS, "test_texts": TEST, "test_labels": TEST_LABELS}
    row = evaluate(Words(noise=1.5), ClassificationTask(**base, classifier=nearest, metric="f1"))[0]
    assert row.metric == "f1" and row.score == row.metrics["f1"] != row.metrics["accuracy"]
    assert not hasattr(nearest, "classes_"), "a clone was fitted"
    assert row.score != evaluate(Words(noise=1.5), ClassificationTask(**base, metric="f1"))[0].score
    with pytest.raises(EvaluationError, match="must be one of .*got 'ap', which needs two labels"):
        evaluate(Words(), ClassificationTask(**base, metric="ap"))


def test_labels_of_any_type_give_the_same_score() -> None:
    binary = [label == "cat" for label in LABELS]
    tested = [label == "cat" for label in TEST_LABELS]

    def score(convert: Any, container: Any = list) -> float:
        task = ClassificationTask(
            TEXTS,
            container([convert(x) for x in binary]),
            test_texts=TEST,
            test_labels=container([convert(x) for x in tested]),
            n_experiments=2,
        )
        row = evaluate(Words(noise=1.0), task)[0]
        assert 0 < row.metrics["ap"] < 1
        return row.score

    expected = score(int)
    assert score(bool) == score(float) == score(np.int8) == expected
    assert score(lambda x: "b" if x else "a") == score(str, pd.Series) == expected
    assert score(str, pl.Series) == score(int, np.array) == expected
    assert score(str, lambda items: pd.Series(items, dtype="category")) == expected
    assert score(str, lambda items: np.array(items, dtype=object)) == expected


# Clustering


def test_clustering_by_hand() -> None:
    from sklearn.cluster import MiniBatchKMeans

    row = evaluate(Words(noise=0.6), ClusteringTask(TEXTS, LABELS, max_fraction=0.5))[0]
    generator = random.Random(42)
    kept = generator.sample(range(90), k=45)
    vectors = Words(noise=0.6).transform([TEXTS[i] for i in kept])
    labels = np.array([LABELS[i] for i in kept])
    expected = []
    for _ in range(10):
        sample = generator.choices(range(45), k=16_384)
        kmeans = MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=42)
        expected.append(v_measure_score(labels[sample], kmeans.fit_predict(vectors[sample])))
    assert row.values.tolist() == expected
    assert row.metrics["v_measure"] == np.mean(expected)
    assert row.metrics["v_measure_std"] == np.std(expected)


def test_levels_that_a_text_does_not_reach() -> None:
    labels = [[label] if i % 4 == 0 else [label, str(i % 2)] for i, label in enumerate(LABELS)]
    base = {"sample_size": 50, "n_experiments": 2}
    both = evaluate(Words(), ClusteringTask(TEXTS, labels, **base))[0]
    assert both.n == 4
    first = evaluate(Words(), ClusteringTask(TEXTS, labels, max_depth=1, **base))[0]
    assert first.values.tolist() == both.values[:2].tolist()
    data = read_task(ClusteringTask(TEXTS, labels, **base))
    rows, found, _ = data.levels[1]  # type: ignore[union-attr]
    assert rows.tolist() == [i for i in range(90) if i % 4]
    assert set(found) == {"0", "1"}


# Pairs and queries


def test_relevance_in_any_form_is_the_same() -> None:
    grades = np.zeros((12, 90), dtype=int)
    for i, found in enumerate(RELEVANCE.values()):
        for document in found:
            grades[i, int(document[1:])] = 1
    rows = [(q, d, g) for q, found in RELEVANCE.items() for d, g in found.items()]
    forms: list[Any] = [
        RELEVANCE,
        {query: list(found) for query, found in RELEVANCE.items()},
        list(RELEVANCE.values()),
        [set(found) for found in RELEVANCE.values()],
        grades,
        pd.DataFrame(rows, columns=["query", "document", "grade"]),
        pl.DataFrame(rows, schema=["query", "document", "grade"], orient="row"),
    ]
    expected = evaluate(Words(), RetrievalTask(QUERIES, CORPUS, RELEVANCE))[0].metrics
    for relevance in forms:
        assert evaluate(Words(), RetrievalTask(QUERIES, CORPUS, relevance))[0].metrics == expected
    lists = RetrievalTask(
        pd.Series(list(QUERIES.values())),
        list(CORPUS.values()),
        RELEVANCE,
        query_ids=list(QUERIES),
        document_ids=np.array(list(CORPUS)),
    )
    assert evaluate(Words(), lists)[0].metrics == expected


def test_search_in_chunks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = RetrievalTask(QUERIES, CORPUS, RELEVANCE, top_k=7)
    # Noise keeps scores apart: the last bit of a product may depend on the size of the block.
    whole = evaluate(Words(noise=0.5), task, n_bootstraps=0)[0].metrics
    monkeypatch.setattr(_protocols, "CHUNK_SIZE", 11)
    monkeypatch.setattr(_protocols, "BLOCK_BYTES", 5 * 4 * 11)
    assert evaluate(Words(noise=0.5), task, n_bootstraps=0)[0].metrics == whole
    assert len(set(whole.values())) > 10


def test_equal_documents_stand_in_descending_order_of_their_ids() -> None:
    corpus = {"d9": "a cat", "d10": "a cat", "d1": "a cat"}
    for relevant, rank in (("d9", 1), ("d10", 2), ("d1", 3)):
        for top_k in (1, 2, 3):
            task = RetrievalTask({"q": "a cat"}, corpus, {"q": [relevant]}, top_k=top_k)
            metrics = evaluate(Words(), task, n_bootstraps=0)[0].metrics
            assert metrics["mrr_at_10"] == (1 / rank if rank <= top_k else 0.0)
    listed = RerankingTask(["a cat"], [["a cat", "a cat", "a car"]], [[1, 0, 0]])
    assert evaluate(Words(), listed, n_bootstraps=0)[0].score == 0.5


def test_documents_have_titles_and_no_space_around_them() -> None:
    spy = Words()
    corpus = {"a": {"title": "Cats", "text": "purr "}, "b": {"title": "", "text": " cars "}}
    evaluate(spy, RetrievalTask({"q": " cats "}, corpus, {"q": ["a"]}), n_bootstraps=0)
    assert spy.calls == [("transform", [" cats "]), ("transform", ["Cats purr", "cars"])]


def test_candidates_as_texts_and_by_id_agree() -> None:
    lists = [[f"d{(5 * i + j) % 90}" for j in range(12)] for i in range(12)]
    by_id = RerankingTask(QUERIES, dict(zip(QUERIES, lists, strict=True)), RELEVANCE, corpus=CORPUS)
    inside = [[RELEVANCE[q].get(d, 0) for d in ids] for q, ids in zip(QUERIES, lists, strict=True)]
    texts = [[CORPUS[d] for d in ids] for ids in lists]
    as_texts = RerankingTask(list(QUERIES.values()), texts, inside)
    found, listed = (evaluate(Words(noise=0.01), task)[0] for task in (by_id, as_texts))
    assert found.metrics["mrr_at_10"] == listed.metrics["mrr_at_10"]
    assert 0 < found.score < listed.score, "by id, positives beyond the candidates count"


def test_a_query_drops_its_own_document() -> None:
    corpus = {"q": "a cat", "d": "a cat or so"}
    task = RetrievalTask({"q": "a cat"}, corpus, {"q": ["d"]}, ignore_identical_ids=True)
    assert evaluate(Words(), task)[0].metrics["mrr_at_1"] == 1.0
    same = RetrievalTask({"q": "a cat"}, corpus, {"q": ["d"]})
    assert evaluate(Words(), same)[0].metrics["mrr_at_1"] == 0.0


def test_judged_documents_outside_the_corpus_count() -> None:
    task = RetrievalTask({"q": "a cat"}, {"d": "a cat"}, {"q": ["d", "elsewhere"]})
    assert evaluate(Words(), task)[0].metrics["recall_at_10"] == 0.5
