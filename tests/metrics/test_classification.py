"""Metrics of labels against scikit-learn."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from skembed import metrics

hypothesis = pytest.importorskip("hypothesis")
pytrec_eval = pytest.importorskip("pytrec_eval")
st = hypothesis.strategies
# The same examples on every machine, nothing kept on disk.
drawn = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
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
        (lambda: metrics.v_measure([[1]], [[1]]), TypeError, r"y_true\[0\] is a list"),
        (lambda: metrics.ami([1], np.ones((1, 1))), ValueError, "second parameter of `ami`"),
        (lambda: metrics.accuracy(["a", math.nan], ["a", "b"]), ValueError, r"at y_true\[1\]"),
        (lambda: metrics.v_measure(["a", 1], [0, 1]), TypeError, r"of one type.*y_true\[1\]"),
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


numbers = st.lists(
    st.tuples(st.integers(0, 5), st.floats(-1, 1, allow_subnormal=False)), min_size=2, max_size=30
)
