"""Metrics against pytrec_eval, scikit-learn and scipy, on drawn data and by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from skembed import metrics
from skembed.metrics.ranking import K_VALUES, RANKING_METRICS

hypothesis = pytest.importorskip("hypothesis")
pytrec_eval = pytest.importorskip("pytrec_eval")
st = hypothesis.strategies

# The same examples on every machine, nothing kept on disk.
drawn = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)

TREC_NAMES = {
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "hit_rate": "success",
}
# As text these sort differently from how they sort as numbers; some need more than one byte.
IDS = ["1", "2", "10", "20", "d", "D", "é", "\uffee", "🙂", "a b", "", "doc-7", "doc-07"]
# Few values, so that many are equal; some differ only beyond float32.
SCORES = [0.0, -0.0, 0.5, 0.5 + 1e-12, 0.25, -1.0, 1e-3, 3e38, 1e39, 0.5 + 1e-7]

graded = st.dictionaries(st.sampled_from(IDS), st.integers(-1, 4), min_size=1, max_size=8)
scored = st.dictionaries(
    st.sampled_from(IDS), st.sampled_from(SCORES) | st.floats(-2, 2), max_size=13
)
queries = st.dictionaries(
    st.sampled_from(["q1", "q2", "q10"]), st.tuples(graded, scored), min_size=1
)


def evaluate_with_pytrec(
    relevance: dict[str, dict[str, int]], run: dict[str, dict[str, float]], k_values: list[int]
) -> dict[str, dict[str, float]]:
    cuts = ",".join(map(str, k_values))
    names = {f"{name}.{cuts}" for name in TREC_NAMES.values()}
    found: dict[str, dict[str, float]] = pytrec_eval.RelevanceEvaluator(relevance, names).evaluate(
        run
    )
    return found


# Rankings


@drawn
@hypothesis.given(
    queries=queries, k_values=st.lists(st.integers(1, 20), min_size=1, max_size=4, unique=True)
)
def test_rankings_equal_pytrec_eval_to_the_last_bit(
    queries: dict[str, Any], k_values: list[int]
) -> None:
    relevance = {query: grades for query, (grades, _) in queries.items()}
    run = {query: found for query, (_, found) in queries.items()}
    expected = evaluate_with_pytrec(relevance, run, k_values)
    found = metrics.ranking_metrics(relevance, run, k_values=k_values)
    for position, query in enumerate(run):
        for name, trec_name in TREC_NAMES.items():
            for k in k_values:
                value = found[f"{name}_at_{k}"][position]
                assert value == expected[query][f"{trec_name}_{k}"], (name, k)


@drawn
@hypothesis.given(grades=graded, found=scored)
def test_mrr_equals_pytrec_eval(grades: dict[str, int], found: dict[str, float]) -> None:
    expected = pytrec_eval.RelevanceEvaluator({"q": grades}, {"recip_rank"}).evaluate({"q": found})
    assert metrics.mrr_at_k({"q": grades}, {"q": found}, k=1000) == expected["q"]["recip_rank"]


@drawn
@hypothesis.given(
    data=st.integers(1, 12).flatmap(
        lambda m: st.lists(
            st.lists(st.tuples(st.integers(0, 3), st.sampled_from(SCORES[:6])), min_size=m,
                     max_size=m),
            min_size=1,
            max_size=3,
        )
    )
)  # fmt: skip
def test_matrices_equal_mappings(data: list[list[tuple[int, float]]]) -> None:
    grades = [[grade for grade, _ in row] for row in data]
    scores = [[score for _, score in row] for row in data]
    relevance = {i: dict(enumerate(row)) for i, row in enumerate(grades)}
    run = {i: dict(enumerate(row)) for i, row in enumerate(scores)}
    dense = metrics.ranking_metrics(grades, scores, k_values=[1, 3, 10])
    sparse = metrics.ranking_metrics(relevance, run, k_values=[1, 3, 10])
    assert dense.keys() == sparse.keys()
    for name, values in dense.items():
        np.testing.assert_array_equal(values, sparse[name], err_msg=name)


@drawn
@hypothesis.given(
    scores=st.lists(st.integers(0, 1000), min_size=2, max_size=15, unique=True), data=st.data()
)
def test_ndcg_equals_scikit_learn_without_ties(scores: list[int], data: Any) -> None:
    grades = data.draw(st.lists(st.integers(0, 4), min_size=len(scores), max_size=len(scores)))
    k = data.draw(st.integers(1, 15))
    expected = reference.ndcg_score([grades], [scores], k=k)
    assert metrics.ndcg_at_k([grades], [scores], k=k) == pytest.approx(expected, abs=1e-12)


@drawn
@hypothesis.given(
    scores=st.lists(st.integers(0, 1000), min_size=2, max_size=15, unique=True), data=st.data()
)
def test_map_equals_scikit_learn_when_all_are_ranked(scores: list[int], data: Any) -> None:
    size = len(scores)
    grades = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    hypothesis.assume(any(grades))
    expected = reference.average_precision_score(grades, scores)
    assert metrics.map_at_k([grades], [scores]) == pytest.approx(expected, abs=1e-12)


def test_ties_put_the_greater_id_first() -> None:
    tie = {"9": 0.5, "10": 0.5}
    assert metrics.mrr_at_k({"q": {"9": 1}}, {"q": tie}) == 1.0, "ids of str are text"
    assert metrics.mrr_at_k({"q": {"10": 1}}, {"q": tie}) == 0.5
    numbers = {9: 0.5, 10: 0.5}
    assert metrics.mrr_at_k({"q": {10: 1}}, {"q": numbers}) == 1.0, "ids of int are numbers"
    assert metrics.mrr_at_k([[0, 1]], [[0.5, 0.5]]) == 1.0, "columns are numbers, too"


def test_average_precision_counts_positives_that_were_not_found() -> None:
    relevance = {"q": {"a": 1, "b": 1, "c": 1, "d": 1}}
    assert metrics.map_at_k(relevance, {"q": {"a": 1.0}}) == 0.25
    assert metrics.recall_at_k(relevance, {"q": {"a": 1.0}}) == 0.25


def test_gains_are_linear_and_by_hand() -> None:
    relevance, run = {"q": {"a": 3, "b": 1}}, {"q": {"x": 0.9, "b": 0.8, "a": 0.7}}
    dcg = 1 / math.log2(3) + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert metrics.ndcg_at_k(relevance, run, k=3) == pytest.approx(dcg / ideal, abs=1e-15)
    assert metrics.ndcg_at_k(relevance, run, k=1) == 0.0
    assert metrics.precision_at_k(relevance, run, k=10) == 0.2, "divided by k, not by 3"
    assert metrics.hit_rate_at_k(relevance, run, k=2) == 1.0
    assert metrics.hit_rate_at_k(relevance, run, k=1) == 0.0


def test_means_are_over_queries_that_found_nothing_too() -> None:
    relevance = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 0}}
    run = {"q1": {"a": 1.0}, "q2": {}, "q3": {"a": 1.0}}
    assert metrics.ndcg_at_k(relevance, run) == pytest.approx(1 / 3)
    per_query = metrics.ranking_metrics(relevance, run, k_values=[10])["ndcg_at_10"]
    np.testing.assert_array_equal(per_query, [1.0, 0.0, 0.0])


def test_queries_stand_in_the_order_of_the_scores() -> None:
    relevance, run = {"q1": {"a": 1}, "q2": {"b": 1}}, {"q2": {"a": 1.0}, "q1": {"a": 1.0}}
    np.testing.assert_array_equal(
        metrics.ranking_metrics(relevance, run, k_values=[1])["ndcg_at_1"], [0.0, 1.0]
    )


def test_summary_rounds_all_but_the_reciprocal_rank() -> None:
    relevance = {f"q{i}": {"a": 1} for i in range(3)}
    run = {"q0": {"a": 1.0}, "q1": {"a": 1.0, "b": 2.0}, "q2": {"a": 1.0, "b": 2.0, "c": 3.0}}
    found = metrics.ranking_summary(relevance, run)
    assert set(found) == {f"{name}_at_{k}" for name in RANKING_METRICS for k in K_VALUES}
    exact = metrics.ndcg_at_k(relevance, run, k=10)
    assert found["ndcg_at_10"] == round(exact, 5) != exact
    assert found["mrr_at_10"] == (1 + 1 / 2 + 1 / 3) / 3


def test_search_arrays_become_a_run() -> None:
    scores = np.array([[0.9, 0.8], [0.7, np.nan]], dtype=np.float32)
    indices = np.array([[2, 0], [1, -1]])
    run = metrics.search_to_run(
        scores, indices, query_ids=["q", "r"], document_ids=["a", "b", "c", "d"]
    )
    assert run == {"q": {"c": float(scores[0, 0]), "a": float(scores[0, 1])}, "r": {"b": float(
        scores[1, 0])}}  # fmt: skip
    assert metrics.recall_at_k({"q": {"a": 1}, "r": {"b": 1, "a": 1}}, run) == 0.75
    assert metrics.search_to_run(scores, indices)[1] == {1: pytest.approx(0.7)}


@pytest.mark.parametrize(
    ("relevance", "scores", "error", "message"),
    [
        ({"q": {"a": 1}}, [[1.0]], TypeError, "two mappings or two arrays; got dict and list"),
        ({}, {}, ValueError, "must hold a query; got none"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}, "r": {"a": 1.0}}, ValueError, "the first is 'r'"),
        ({"q": {}}, {"q": {"a": 1.0}}, ValueError, "judge a document for every query; 1 of 1"),
        ({"q": {"a": 1}, "r": {"a": 1}}, {"q": {"a": 1.0}}, ValueError, "1 of 2 are absent"),
        ({"q": {"a": 1}}, {"q": {"a": math.nan}}, ValueError, "must hold no NaN; got one in query"),
        ({"q": {"a": 0.5}}, {"q": {"a": 1.0}}, TypeError, "grades of int; got dtype float64"),
        ({"q": {"a": "1"}}, {"q": {"a": 1.0}}, TypeError, "grades of int"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0, 2: 0.5}}, TypeError, "document ids of one type"),
        ([[1, 0]], [[0.5]], ValueError, r"one shape .* got \(1, 2\) and \(1, 1\)"),
        ([[1, 0]], [[0.5, math.nan]], ValueError, "must hold no NaN; got one in row 0"),
        (np.zeros((0, 3), dtype=int), np.zeros((0, 3)), ValueError, "not empty"),
        ([[math.nan, 0]], [[0.5, 0.1]], TypeError, "grades of int"),
        ([1, 0], [0.5, 0.1], ValueError, "one shape"),
    ],
)
def test_bad_rankings(relevance: Any, scores: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metrics.ndcg_at_k(relevance, scores)
    with pytest.raises(error, match=message):
        metrics.ranking_metrics(relevance, scores)


def test_bad_cut_offs() -> None:
    with pytest.raises(ValueError, match=r"`k` parameter of `map_at_k` must be an int in \[1"):
        metrics.map_at_k([[1]], [[0.5]], k=0)
    with pytest.raises(ValueError, match="must hold a cut-off"):
        metrics.ranking_metrics([[1]], [[0.5]], k_values=[])
    with pytest.raises(TypeError, match="`k_values` parameter"):
        metrics.ranking_metrics([[1]], [[0.5]], k_values=[2.5])  # type: ignore[list-item]


def test_bad_search_arrays() -> None:
    with pytest.raises(ValueError, match="must be ints of the shape of `scores`"):
        metrics.search_to_run([[0.5]], [[1, 2]])
    with pytest.raises(ValueError, match="must be ints"):
        metrics.search_to_run([[0.5]], [[1.0]])
    with pytest.raises(ValueError, match="`query_ids` .* must hold 1 ids; got 2"):
        metrics.search_to_run([[0.5]], [[0]], query_ids=["a", "b"])
    with pytest.raises(ValueError, match="`document_ids` .* at least 3 ids; got 1"):
        metrics.search_to_run([[0.5]], [[2]], document_ids=["a"])
    with pytest.raises(ValueError, match="`document_ids` .* each id once"):
        metrics.search_to_run([[0.5]], [[0]], document_ids=["a", "a"])


# Labels

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@hypothesis.settings(drawn, max_examples=40)  # each runs some twenty functions of scikit-learn
@hypothesis.given(pairs=labels)
def test_labels_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, predicted = ([pair[i] for pair in pairs] for i in (0, 1))
    found = metrics.classification_metrics(true, predicted)
    assert found["accuracy"] == reference.accuracy_score(true, predicted)
    for name in ("f1", "precision", "recall"):
        score = getattr(reference, f"{name}_score")
        for average, suffix in (("macro", ""), ("weighted", "_weighted")):
            expected = score(true, predicted, average=average, zero_division=0)
            assert found[name + suffix] == expected
    assert metrics.accuracy(true, predicted) == found["accuracy"]
    assert metrics.f1(true, predicted) == found["f1"]
    assert metrics.f1(true, predicted, average="weighted") == found["f1_weighted"]
    assert metrics.v_measure(true, predicted) == reference.v_measure_score(true, predicted)
    assert metrics.ami(true, predicted) == reference.adjusted_mutual_info_score(true, predicted)
    assert ("ap" in found) == (len(set(true)) == 2)
    if "ap" in found and 1 in true:
        assert found["ap"] == reference.average_precision_score(true, predicted)
        weighted = reference.average_precision_score(true, predicted, average="weighted")
        assert found["ap_weighted"] == weighted


def test_average_precision_of_other_labels() -> None:
    numbers = metrics.average_precision([0, 1, 1, 0], [0, 1, 0, 1])
    words = metrics.classification_metrics(list("abba"), list("abab"))
    assert words["ap"] == words["ap_weighted"] == numbers
    bools = metrics.classification_metrics([False, True, True, False], [False, True, False, True])
    assert bools["ap"] == numbers
    assert metrics.classification_metrics([0, 2, 2, 0], [0, 2, 0, 2])["ap"] == numbers


def test_a_label_never_predicted_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.classification_metrics(["a", "b", "c"], ["a", "a", "a"])
    assert found["precision"] == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.accuracy([], []), ValueError, r"shape \(n,\) with n > 0; got shape \(0,"),
        (lambda: metrics.accuracy([1], [1, 2]), ValueError, r"shape of `y_true`, \(1,\); got"),
        (lambda: metrics.v_measure([[1]], [[1]]), ValueError, r"got shape \(1, 1\)"),
        (lambda: metrics.ami([1], [[1]]), ValueError, "second parameter of `ami`"),
        (lambda: metrics.f1([1], [1], average="samples"), ValueError, "`average` parameter of"),
        (lambda: metrics.average_precision([1, 1], [0, 1]), ValueError, "two labels; got 1"),
        (lambda: metrics.spearman([1], [1]), ValueError, "at least two scores; got 1"),
        (lambda: metrics.pearson([1, math.nan], [1, 2]), ValueError, "finite numbers; got NaN"),
        (lambda: metrics.pearson([1, 2], [math.inf, 2]), ValueError, "finite numbers"),
        (lambda: metrics.spearman(["a", "b"], [1, 2]), TypeError, "takes numbers; got <U1"),
    ],
)
def test_bad_labels(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Correlation

numbers = st.lists(
    st.tuples(st.integers(0, 5), st.floats(-1, 1, allow_subnormal=False)), min_size=2, max_size=30
)


@drawn
@hypothesis.given(pairs=numbers)
def test_correlations_equal_scipy(pairs: list[tuple[int, float]]) -> None:
    true, predicted = ([pair[i] for pair in pairs] for i in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stats.spearmanr(true, predicted)[0], stats.pearsonr(true, predicted)[0]
    found = metrics.spearman(true, predicted), metrics.pearson(true, predicted)
    np.testing.assert_array_equal(found, expected)


def test_a_constant_has_no_correlation_and_no_warning() -> None:
    assert math.isnan(metrics.spearman([1, 2, 3], [0.5, 0.5, 0.5]))
    assert math.isnan(metrics.pearson([1, 1, 1], [0.1, 0.5, 0.5]))


def test_float32_is_correlated_in_float64(rng: np.random.Generator) -> None:
    true = rng.random(200).astype(np.float32)
    predicted = (0.5 + 1e-4 * rng.random(200)).astype(np.float32)
    expected = stats.pearsonr(true.astype(np.float64), predicted.astype(np.float64))[0]
    assert metrics.pearson(true, predicted) == expected
