"""Search results as rankings."""

from __future__ import annotations

import numpy as np
import pytest

from skembed import metrics

hypothesis = pytest.importorskip("hypothesis")
pytrec_eval = pytest.importorskip("pytrec_eval")


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


def test_bad_search_arrays() -> None:
    with pytest.raises(ValueError, match="got rows of different lengths"):
        metrics.search_to_run([[1.0], [1.0, 2.0]], [[1], [1, 2]])
    for scores in ([["a"]], [[1j]], [[None]]):
        with pytest.raises(TypeError, match="`scores` .* must hold numbers"):
            metrics.search_to_run(scores, [[0]])
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
