"""Correlations against scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from skembed import metrics

hypothesis = pytest.importorskip("hypothesis")
pytrec_eval = pytest.importorskip("pytrec_eval")
st = hypothesis.strategies
# The same examples on every machine, nothing kept on disk.
drawn = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
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
