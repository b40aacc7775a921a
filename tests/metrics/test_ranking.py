"""Rankings against pytrec_eval and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
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


numbers = st.lists(
    st.tuples(st.integers(0, 5), st.floats(-1, 1, allow_subnormal=False)), min_size=2, max_size=30
)


def test_lists_and_str_in_mappings_are_an_error() -> None:
    graded, scored = {"q": {"a": 1}}, {"q": {"a": 0.5}}
    with pytest.raises(TypeError, match=r"`relevance` .* that of 'q' is a list"):
        metrics.ndcg_at_k({"q": ["a"]}, scored)
    with pytest.raises(TypeError, match=r"`scores` .* that of 'q' is a list"):
        metrics.ndcg_at_k(graded, {"q": ["a"]})
    for score in ("1", None):
        with pytest.raises(TypeError, match=r"`scores` .* numbers; got .* in query 'q'"):
            metrics.ndcg_at_k(graded, {"q": {"a": score}})
