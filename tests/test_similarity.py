"""Unit rows and scores of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skembed.similarity import (
    check_index_pairs,
    check_vectors,
    normalize_rows,
    paired_cosine,
    paired_dot,
)

# Rows


def test_normalized_rows_have_unit_length(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((50, 7)) * 10.0 ** rng.integers(-30, 30, (50, 1))
    unit = normalize_rows(vectors)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-6)


def test_normalize_leaves_zeros_and_the_input() -> None:
    vectors = np.array([[0.0, 0.0], [3.0, 4.0]], dtype=np.float32)
    np.testing.assert_allclose(normalize_rows(vectors), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert vectors[1].tolist() == [3, 4]
    assert normalize_rows(np.empty((0, 3))).shape == (0, 3)


def test_paired_scores(rng: np.random.Generator) -> None:
    left, right = rng.standard_normal((2, 30, 5))
    np.testing.assert_allclose(paired_dot(left, right), (left * right).sum(1), atol=1e-5)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = paired_cosine(left, right)
    np.testing.assert_allclose(cosines, (left * right).sum(1) / norms, atol=1e-6)
    assert paired_cosine([[3.0, 0.1]], [[3.0, 0.1]])[0] <= 1


def test_float32_is_not_copied() -> None:
    vectors = np.ones((2, 2), dtype=np.float32)
    assert check_vectors(vectors, name="x", owner="f") is vectors


# Errors


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([0, 1, 2], TypeError, r"pair of arrays \(indptr, indices\)"),
        (([0, 1], [0]), ValueError, r"`indptr` must be of shape \(3,\)"),
        (([0, 1, 3], [0, 1]), ValueError, "rises from 0 to the number of indices, 2; .* 0 to 3"),
        (([0, 2, 1], [0]), ValueError, "rises from 0"),
        (([1, 1, 1], [0]), ValueError, "rises from 0"),
        (([0, 1, 2], [0, 3]), ValueError, r"`indices` in \[0, 2\]; got \[0, 3\]"),
        (([0, 1, 2], [-1, 0]), ValueError, r"`indices` in \[0, 2\]"),
        (([0, 1, 2], [0.0, 1.0]), TypeError, "`indices` must be an array of int"),
    ],
)
def test_wrong_pairs(pairs: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_index_pairs(pairs, name="excluded", owner="f", n_rows=2, n_columns=3)


@pytest.mark.parametrize("function", [paired_dot, paired_cosine])
def test_rows_that_do_not_pair(function: Any) -> None:
    with pytest.raises(ValueError, match="shape of `left`, \\(2, 2\\); got \\(3, 2\\)"):
        function(np.ones((2, 2)), np.ones((3, 2)))
