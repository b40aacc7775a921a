"""Results: intervals, comparisons, frames, pictures."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from evaluation_data import BROKEN_TEXT, PAIRS, SCORES, THREE_TASKS, FailsOn, Words, make_tasks

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.evaluation import protocols as _protocols
from skembed.evaluation.harness import evaluate
from skembed.evaluation.results import EvaluationResult
from skembed.evaluation.tasks import (
    STSTask,
)
from skembed.exceptions import SkembedWarning

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


# The table


def test_table_as_text_and_as_frames() -> None:
    result = evaluate({"a": Words(), "bb": Words(noise=1.0)}, make_tasks(), n_bootstraps=20)
    lines = repr(result).splitlines()
    assert len(lines) == 11
    assert lines[0].split() == [
        *("task", "vectorizer", "metric", "score", "low", "high"),
        *("n", "unit", "seconds", "texts_per_s"),
    ]
    assert lines[2].split()[:3] == ["classification", "bb", "accuracy"]
    assert lines[2].split()[3] == f"{result[1].score:.4f}"
    frame = result.to_frame()
    assert list(frame.columns) == lines[0].split()
    assert frame["score"].tolist() == [row.score for row in result]
    tidy = result.to_frame(all_metrics=True)
    assert list(tidy.columns) == ["task", "vectorizer", "metric", "value"]
    assert len(tidy) == sum(len(row.metrics) for row in result)
    chosen = tidy.query("task == 'sts' and vectorizer == 'bb' and metric == 'euclidean_pearson'")
    assert chosen["value"].tolist() == [result.get("sts", "bb").metrics["euclidean_pearson"]]


# Intervals and comparisons


def test_bootstrap_by_hand() -> None:
    row = evaluate(Words(), make_tasks()[4], n_bootstraps=200, confidence=0.8)[0]
    generator = np.random.default_rng(42)
    samples = [generator.integers(12, size=12) for _ in range(200)]
    expected = [row.values[sample].mean() for sample in samples]
    np.testing.assert_array_equal(row.replicates, expected)
    np.testing.assert_allclose([row.low, row.high], np.percentile(expected, [10, 90]))
    assert row.low < row.score < row.high


def test_bootstrap_of_pairs_correlates_each_sample_anew() -> None:
    row = evaluate(Words(), STSTask(PAIRS, SCORES), n_bootstraps=20)[0]
    generator = np.random.default_rng(42)
    from scipy.stats import spearmanr

    for found in row.replicates:
        sample = generator.integers(30, size=30)
        assert found == spearmanr(np.array(SCORES)[sample], row.values[sample])[0]


def test_interval_covers_the_mean_as_often_as_it_says(rng: np.random.Generator) -> None:
    covered = 0
    for _ in range(200):
        values = rng.random(60)
        found = _protocols._bootstrap(60, 200, 0, lambda i, v=values: float(v[i].mean()))
        low, high = np.percentile(found, [10, 90])
        covered += low <= 0.5 <= high
    assert 0.70 < covered / 200 < 0.90


def test_without_bootstraps_there_is_no_interval() -> None:
    result = evaluate({"a": Words(), "b": Words(seed=1)}, make_tasks(), n_bootstraps=0)
    row = result.get("retrieval", "a")
    assert math.isnan(row.low) and math.isnan(row.high) and len(row.replicates) == 0
    draws = result.get("classification", "a")
    assert draws.low <= draws.high, "draws have one anyway"
    assert math.isnan(result.compare("a", "b")[4].wins)


def test_comparison_is_paired() -> None:
    vectorizers = {"good": Words(), "bad": Words(noise=2.0), "same": Words()}
    result = evaluate(vectorizers, make_tasks(), n_bootstraps=100)
    for row in result.compare("good", "same"):
        assert (row.difference, row.low, row.high, row.wins) == (0.0, 0.0, 0.0, 0.5)
    compared = result.compare("good", "bad")
    assert [row.task for row in compared] == result.tasks
    for row in compared:
        good, bad = result.get(row.task, "good"), result.get(row.task, "bad")
        differences = good.replicates - bad.replicates
        assert row.difference == good.score - bad.score
        expected = np.percentile(differences, [2.5, 97.5])
        np.testing.assert_allclose([row.low, row.high], expected, atol=1e-12)
        assert row.wins == np.mean((differences > 0) + (differences == 0) / 2)
    back = result.compare("bad", "good")
    assert [row.difference for row in back] == [-row.difference for row in compared]
    assert repr(compared).splitlines()[1].split()[:4] == [
        "classification", "good", "bad", "accuracy"
    ]  # fmt: skip
    assert compared.to_frame()["wins"].tolist() == [row.wins for row in compared]
    with pytest.raises(KeyError, match="vectorizer 'ugly'"):
        result.compare("good", "ugly")


@pytest.mark.filterwarnings("ignore:The model .* learned no instructions:skembed.SkembedWarning")
def test_two_instructions_of_one_model_are_compared() -> None:
    cache = EmbeddingCache()
    vectorizers = {
        "bare": NVEmbedVectorizer(cache=cache),
        "instructed": NVEmbedVectorizer(instruction="STS", cache=cache),
    }
    scores = [len(a + b) % 5 for a, b in PAIRS]
    result = evaluate(vectorizers, [STSTask(PAIRS, scores)], n_bootstraps=20)
    (row,) = result.compare("instructed", "bare")
    assert row.difference != 0 and row.low < row.high
    assert vectorizers["bare"].instruction == "auto"


# Pictures


def test_bar_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    result = evaluate({"a": Words(), "b": Words(noise=1.0)}, make_tasks(), n_bootstraps=20)
    ax = result.plot()
    bars = [bar for bars in ax.containers if hasattr(bars, "patches") for bar in bars]
    heights = [result.get(task, name).score for name in "ab" for task in result.tasks]
    np.testing.assert_allclose([bar.get_height() for bar in bars], heights)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xticklabels()[0].get_text() == "classification\naccuracy"
    ax.figure.canvas.draw()
    pyplot.close(ax.figure)
    _, given = pyplot.subplots()
    assert result.plot(ax=given) is given
    pyplot.close(given.figure)
    broken = EvaluationResult(evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5).rows)
    pyplot.close(broken.plot().figure)


class Constant:
    def transform(self, texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 3))


def test_equal_vectors_score_nan_and_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5)[0]
    assert math.isnan(row.score) and math.isnan(row.low)
    assert "nan" in repr(evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5))


# A vectorizer that fails in the middle


def test_bars_leave_a_gap_where_a_row_is_missing() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, OSError("disk full"))}
    with pytest.warns(SkembedWarning):
        result = evaluate(vectorizers, THREE_TASKS, n_bootstraps=50, on_error="warn")
    ax = result.plot()
    good, bad = ([bar.get_x() + bar.get_width() / 2 for bar in c] for c in ax.containers[1::2])
    pyplot.close(ax.figure)
    assert np.allclose(good, [-0.2, 0.8, 1.8])
    assert np.allclose(bad, [0.2, 2.2])
