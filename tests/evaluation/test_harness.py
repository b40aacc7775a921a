"""`evaluate`: the table, vectors and vectorizers that fail."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
from evaluation_data import (
    BROKEN_TEXT,
    CORPUS,
    PAIRS,
    QUERIES,
    RELEVANCE,
    SCORES,
    TEXTS,
    THREE_TASKS,
    FailsOn,
    Words,
    make_tasks,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer
from tiny import make_vectorizer

from skembed import EmbeddingCache
from skembed.evaluation import protocols as _protocols
from skembed.evaluation.harness import evaluate
from skembed.evaluation.results import EvaluationError, EvaluationResult
from skembed.evaluation.tasks import (
    RetrievalTask,
    STSTask,
)
from skembed.exceptions import SkembedWarning

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


class TwoSided(Words):
    def encode_query(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "query")

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "document")


# The table


def test_one_row_for_each_task_and_vectorizer() -> None:
    result = evaluate({"good": Words(), "bad": Words(noise=3.0)}, make_tasks(), n_bootstraps=50)
    assert len(result) == 10
    assert result.vectorizers == ["good", "bad"]
    assert result.tasks == ["classification", "clustering", "sts", "reranking", "retrieval"]
    assert [row.vectorizer for row in result[:4]] == ["good", "bad", "good", "bad"]
    units = {row.task: (row.unit, row.n) for row in result}
    assert units == {
        "classification": ("draws", 10),
        "clustering": ("draws", 5),
        "sts": ("pairs", 30),
        "reranking": ("queries", 5),
        "retrieval": ("queries", 12),
    }
    for row in result:
        assert row.score == row.metrics[row.metric]
        assert row.low <= row.high
        assert row.seconds > 0 and row.texts_per_s > 0
        assert result.get(row.task, row.vectorizer) is row
    with pytest.raises(KeyError, match="No row of task 'sts' and vectorizer 'ugly'"):
        result.get("sts", "ugly")
    for task in ("classification", "clustering", "retrieval"):
        assert result.get(task, "good").score > result.get(task, "bad").score


def test_the_same_call_gives_the_same_scores() -> None:
    tasks = make_tasks()
    first, again = (evaluate(Words(noise=1.0), tasks, n_bootstraps=30) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert (a.metrics, a.low, a.high) == (b.metrics, b.low, b.high)
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.replicates, b.replicates)
    np.random.seed(7)  # noqa: NPY002 -- what a user's script may have done
    random.seed(7)
    assert [row.score for row in evaluate(Words(noise=1.0), tasks)] == [r.score for r in first]


def test_vectorizers_are_named_by_their_class() -> None:
    task = make_tasks()[2]
    assert evaluate(Words(), task).vectorizers == ["Words"]
    several = evaluate([Words(), TwoSided(), Words(seed=1)], task, n_bootstraps=0)
    assert several.vectorizers == ["Words", "TwoSided", "Words-2"]
    assert several[0].score != several[2].score


def test_sides_go_where_they_belong() -> None:
    sided = TwoSided()
    evaluate(sided, make_tasks(), n_bootstraps=0)
    assert [side for side, _ in sided.calls] == [
        *("transform", "transform"),  # classification: train, test
        "transform",  # clustering
        *("transform", "transform"),  # sts: left, right
        *("query", "document"),
        *("query", "document"),
    ]
    plain = Words()
    assert [r.score for r in evaluate(plain, make_tasks())] == [
        r.score for r in evaluate(sided, make_tasks())
    ]

    class OnlySides:
        encode_query, encode_document = Words().transform, Words().transform

    assert evaluate(OnlySides(), make_tasks()[0]).vectorizers == ["OnlySides"]


def test_time_counts_the_vectorizer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(_protocols.time, "perf_counter", lambda: float(next(clock)))
    row = evaluate(Words(), STSTask(PAIRS, SCORES), n_bootstraps=0)[0]
    assert (row.seconds, row.texts_per_s) == (2.0, 60 / 2)


# Bad input: refused before anything is embedded


class Returns:
    """A transformer that returns what it is told."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def transform(self, texts: list[str]) -> Any:
        return self.result(len(texts))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: np.full((n, 2), np.nan), r"finite numbers; .* texts\[0\] is not finite"),
        (lambda n: np.r_[np.ones((n - 1, 2)), [[1, np.inf]]], r"texts\[29\] is not finite"),
        (lambda n: np.ones((n - 1, 2)), r"30 texts into .* got shape \(29, 2\)"),
        (lambda n: np.ones(n), r"array of shape \(30, dim\); got shape \(30,\)"),
        (lambda n: [["a"]] * n, "array of numbers"),
    ],
)
def test_bad_vectors(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate({"mine": Returns(result)}, STSTask(PAIRS, SCORES))
    assert isinstance(caught.value.__cause__, (ValueError, TypeError))


def test_sparse_vectors_score_as_dense_ones() -> None:
    words = TfidfVectorizer().fit(TEXTS)
    dense = make_pipeline(words, FunctionTransformer(lambda X: X.toarray(), accept_sparse=True))
    tasks = make_tasks()
    rows = list(zip(evaluate(words, tasks), evaluate(dense, tasks), strict=True))
    assert len(rows) == len(tasks)
    for sparse_row, dense_row in rows:
        # Rounding orders pairs without a common word, which the dense side has equal.
        names = [name for name in dense_row.metrics if "spearman" not in name]
        expected = {name: dense_row.metrics[name] for name in names}
        assert {n: sparse_row.metrics[n] for n in names} == pytest.approx(expected, abs=2e-5)


def test_speed_leaves_out_what_came_from_the_cache() -> None:
    cache = EmbeddingCache()
    emb = make_vectorizer(cache=cache)
    task = STSTask(PAIRS, SCORES)
    distinct = len({text for pair in PAIRS for text in pair})
    first = evaluate({"emb": emb}, task, n_bootstraps=0)[0]
    assert first.texts_per_s == pytest.approx(distinct / first.seconds)
    for again in (emb, make_pipeline(emb, Normalizer())):
        result = evaluate({"emb": again}, task, n_bootstraps=0)
        assert np.isnan(result[0].texts_per_s)
        assert "cached" in repr(result)
    uncached = evaluate({"emb": make_vectorizer(cache=None)}, task, n_bootstraps=0)[0]
    assert uncached.texts_per_s == pytest.approx(2 * len(PAIRS) / uncached.seconds)


def test_two_widths() -> None:
    widths = iter([2, 3])
    uneven = Returns(lambda n: np.ones((n, next(widths))))
    with pytest.raises(EvaluationError, match="ValueError: .* of one width; got 2 and 3"):
        evaluate(uneven, RetrievalTask(QUERIES, CORPUS, RELEVANCE))


# A vectorizer that fails in the middle


def test_error_keeps_the_finished_rows_and_its_cause() -> None:
    cause = OSError("disk full")
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, cause), "last": Words(seed=1)}
    with pytest.raises(EvaluationError) as caught:
        evaluate(vectorizers, THREE_TASKS, confidence=0.9, n_bootstraps=50)
    error = caught.value
    assert str(error).startswith("The vectorizer 'bad' failed on the task 'second'")
    assert str(error).endswith("OSError: disk full")
    assert error.__cause__ is cause
    found = [(row.task, row.vectorizer) for row in error.results]
    first = [("first", name) for name in vectorizers]
    assert found == [*first, ("second", "good")]
    assert error.results.confidence == 0.9
    # The same rows as in an undisturbed run, and usable as such.
    whole = evaluate({"good": Words()}, THREE_TASKS, confidence=0.9, n_bootstraps=50)
    for row in (error.results[0], error.results[3]):
        expected = whole.get(row.task, "good")
        assert (row.score, row.low, row.high) == (expected.score, expected.low, expected.high)
    assert [row.task for row in error.results.compare("good", "bad")] == ["first"]
    assert len(EvaluationResult([*error.results, *whole])) == 7


def test_error_before_the_first_row_holds_an_empty_table() -> None:
    broken = FailsOn(PAIRS[0][0], RuntimeError("no model"))
    with pytest.raises(EvaluationError) as caught:
        evaluate({"bad": broken, "good": Words()}, THREE_TASKS)
    results = caught.value.results
    assert len(results) == 0 and results.tasks == []
    assert repr(results).split() == list(EvaluationResult.columns)
    assert results.to_frame().empty
    with pytest.raises(ValueError, match="needs a row to draw"):
        results.plot()
    assert len(EvaluationError("made elsewhere").results) == 0


def test_error_survives_a_pickle() -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(FailsOn(BROKEN_TEXT, OSError("disk full")), THREE_TASKS)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert [row.score for row in again.results] == [row.score for row in caught.value.results]


def test_warning_leaves_the_row_out_and_goes_on() -> None:
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, OSError("disk full"))}
    with pytest.warns(SkembedWarning, match="'bad' failed on the task 'second'.*disk full") as seen:
        result = evaluate(vectorizers, THREE_TASKS, n_bootstraps=50, on_error="warn")
    assert len(seen) == 1 and seen[0].filename == __file__
    rows = [(row.task, row.vectorizer) for row in result]
    both = [(task, name) for task in ("first", "second", "third") for name in vectorizers]
    assert rows == [row for row in both if row != ("second", "bad")]
    assert [row.task for row in result.compare("bad", "good")] == ["first", "third"]
    with pytest.raises(KeyError, match="No row of task 'second' and vectorizer 'bad'"):
        result.get("second", "bad")


def test_warning_for_all_rows_is_an_error() -> None:
    broken = FailsOn(PAIRS[0][0], RuntimeError("no model"))
    with pytest.warns(SkembedWarning), pytest.raises(EvaluationError, match="no model") as caught:
        evaluate(broken, THREE_TASKS[::2], on_error="warn")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_interrupt_stays_an_interrupt(on_error: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(FailsOn(BROKEN_TEXT, KeyboardInterrupt()), THREE_TASKS, on_error=on_error)


def test_bad_calls() -> None:
    task = STSTask(PAIRS, SCORES)
    for bad in ([], {}, {1: Words()}):
        with pytest.raises(TypeError, match="`vectorizers` parameter of `evaluate`"):
            evaluate(bad, task)
    for bad in (object(), Words, "skembed-mini"):
        with pytest.raises(TypeError, match="of `evaluate` must be an object with `transform`"):
            evaluate(bad, task)
    with pytest.raises(ValueError, match="must hold a task; got none"):
        evaluate(Words(), [])
    with pytest.raises(ValueError, match="'sts' occurs more than once. Pass `name=`"):
        evaluate(Words(), [task, task])
    with pytest.raises(TypeError, match="must hold tasks, such as ClassificationTask; got an obj"):
        evaluate(Words(), [task, "STS12"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`confidence` parameter"):
        evaluate(Words(), task, confidence=1.0)
    with pytest.raises(ValueError, match="`n_bootstraps` parameter"):
        evaluate(Words(), task, n_bootstraps=-1)
    with pytest.raises(TypeError, match="`verbose` parameter"):
        evaluate(Words(), task, verbose=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`on_error` parameter of `evaluate` must be one of"):
        evaluate(Words(), task, on_error="ignore")  # type: ignore[arg-type]
