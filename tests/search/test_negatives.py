"""Choosing negatives by score: rules against brute force, sampling, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_vectorizer import Table, unit_rows
from scipy import sparse

from skembed.search.negatives import select_negatives
from skembed.training import mining
from skembed.training.mining import mine_hard_negatives

# Vectors: the rules


def choose_all(
    scores: np.ndarray, bounds: np.ndarray, allowed: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sort everything, then take the first k that may be taken."""
    indices = np.full((len(scores), k), -1)
    best = np.full((len(scores), k), np.nan)
    for i, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")
        kept = [j for j in order if allowed[i, j] and row[j] <= bounds[i]][:k]
        indices[i, : len(kept)], best[i, : len(kept)] = kept, row[kept]
    return indices, best


@pytest.mark.parametrize("block_bytes", [1, 3000, mining.BLOCK_BYTES])
@pytest.mark.parametrize(
    ("strategy", "threshold"),
    [("perc_pos", None), ("perc_pos", 0.5), ("margin_pos", None), ("margin_pos", 0.4)],
)
def test_selection_equals_brute_force(
    strategy: str, threshold: float | None, block_bytes: int, rng: np.random.Generator
) -> None:
    n, m, k = 40, 90, 5
    anchors, positives, candidates = (
        unit_rows(rng, n, 8),
        unit_rows(rng, n, 8),
        unit_rows(rng, m, 8),
    )
    known = rng.random((n, m)) < 0.1
    groups = rng.integers(-1, 5, n), rng.integers(-1, 5, m)
    matrix = sparse.csr_array(known)
    indices, scores = select_negatives(
        anchors,
        positives,
        candidates,
        known_positives=(matrix.indptr, matrix.indices),
        anchor_groups=groups[0],
        candidate_groups=groups[1],
        n_negatives=k,
        strategy=strategy,
        threshold=threshold,
        block_bytes=block_bytes,
    )
    own = (anchors * positives).sum(1)
    assert (own < 0).any() and (own > 0).any(), "the test needs both signs"
    if strategy == "perc_pos":
        bounds = own - (1 - (threshold or 0.95)) * np.abs(own)
    else:
        bounds = own - (threshold or 0.05)
    same = (groups[0][:, None] == groups[1]) & (groups[0][:, None] >= 0)
    expected = choose_all(anchors @ candidates.T, bounds, ~known & ~same, k)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=1e-6)
    assert (indices == -1).any() and (indices >= 0).any()
    assert indices.dtype == np.int64 and scores.dtype == np.float32


# One anchor at 0 degrees; the positive's cosine is 0.8. The candidates' cosines stand here.
COSINES = np.array([0.99, 0.80, 0.77, 0.751, 0.749, 0.30, -0.5])


def select_of_cosines(positive: float = 0.8, **parameters: Any) -> list[int]:
    candidates = np.stack([COSINES, np.sqrt(1 - COSINES**2)], axis=1)
    found, _ = select_negatives(
        [[1.0, 0.0]], [[positive, np.sqrt(1 - positive**2)]], candidates, **parameters
    )
    return [j for j in found[0].tolist() if j >= 0]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [3, 4, 5, 6]),  # 0.95 * 0.8 = 0.76
        ({"threshold": 1.0}, [2, 3, 4, 5, 6]),  # 0.80 equals the positive but for rounding
        ({"threshold": 0.9}, [5, 6]),
        ({"strategy": "margin_pos"}, [4, 5, 6]),  # 0.75
        ({"strategy": "margin_pos", "threshold": 0.02}, [2, 3, 4, 5, 6]),
        ({"strategy": "margin_pos", "threshold": 2}, []),
        ({"n_negatives": 2}, [3, 4]),
    ],
)
def test_rules_on_known_cosines(parameters: dict[str, Any], expected: list[int]) -> None:
    found = select_of_cosines(**parameters)
    assert [j for j in found if j != 1] == expected


@pytest.mark.parametrize("strategy", ["perc_pos", "margin_pos"])
@pytest.mark.parametrize("positive", [-0.9, -0.3, -1e-6, 0.0, 1e-6, 0.3])
def test_no_negative_is_closer_than_the_positive(positive: float, strategy: str) -> None:
    """0.95 times a negative score would lie above it."""
    score = np.float32(positive)
    candidates = np.stack([[1.0, 0.97 * score, score + 1e-7, 1.2 * score, -1.0], np.zeros(5)], 1)
    _, scores = select_negatives([[1.0, 0.0]], [[score, 0.0]], candidates, strategy=strategy)
    found = scores[0][~np.isnan(scores[0])]
    assert -1.0 in found
    assert (found <= score).all()


def test_negative_positives_have_a_margin_too() -> None:
    candidates = [[-0.51, 0.0], [-0.53, 0.0]]
    indices, _ = select_negatives([[1.0, 0.0]], [[-0.5, 0.0]], candidates, n_negatives=2)
    assert indices.tolist() == [[1, -1]]  # the bound is 1.05 * -0.5 = -0.525


def test_a_candidate_at_the_bound_is_kept() -> None:
    indices, _ = select_negatives(
        [[1.0]], [[0.75]], [[0.5], [0.500001]], strategy="margin_pos", threshold=0.25
    )
    assert indices[0, :2].tolist() == [0, -1]


def test_equal_scores_come_by_lower_index() -> None:
    indices, _ = select_negatives([[1.0]], [[1.0]], np.full((30, 1), 0.5), n_negatives=3)
    assert indices.tolist() == [[0, 1, 2]]


def test_fewer_candidates_than_wanted() -> None:
    indices, scores = select_negatives([[1.0], [1.0]], [[1.0], [0.1]], [[0.5]], n_negatives=3)
    assert indices.tolist() == [[0, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(scores, [[0.5, np.nan, np.nan], [np.nan] * 3])
    indices, _ = select_negatives([[1.0]], [[1.0]], np.empty((0, 1)), n_negatives=3)
    assert indices.tolist() == [[-1, -1, -1]]


# Vectors: sampling


def test_random_draws_from_the_best_in_their_order(rng: np.random.Generator) -> None:
    n, k, pool = 400, 4, 10  # NV-Retriever's 4 of 10
    anchors, candidates = unit_rows(rng, n, 8), unit_rows(rng, 60, 8)
    best, _ = select_negatives(anchors, anchors, candidates, n_negatives=pool)
    indices, scores = select_negatives(
        anchors, anchors, candidates, n_negatives=k, sampling="random", random_state=0
    )
    np.testing.assert_allclose(
        scores, np.einsum("nd,nkd->nk", anchors, candidates[indices]), atol=1e-6
    )
    assert (np.diff(scores, axis=1) <= 0).all()
    places = [
        [row.index(j) for j in found]
        for row, found in zip(best.tolist(), indices.tolist(), strict=True)
    ]
    assert all(len(set(row)) == k for row in places)
    counts = np.bincount(np.ravel(places), minlength=pool)
    assert len(counts) == pool
    # Each place is drawn with probability 0.4; five standard deviations.
    assert np.abs(counts - 0.4 * n).max() < 5 * np.sqrt(n * 0.4 * 0.6)


def test_random_takes_all_where_there_are_few() -> None:
    candidates = [[0.5], [0.4], [0.3]]
    for seed in range(5):
        indices, _ = select_negatives(
            [[1.0]], [[0.45]], candidates, n_negatives=2, sampling="random", random_state=seed
        )
        assert indices.tolist() == [[1, 2]]


def test_random_state_decides(rng: np.random.Generator) -> None:
    anchors, candidates = unit_rows(rng, 50, 8), unit_rows(rng, 60, 8)

    def draw(seed: Any, block_bytes: int = mining.BLOCK_BYTES) -> list[list[int]]:
        return select_negatives(
            anchors,
            anchors,
            candidates,
            n_negatives=3,
            sampling="random",
            random_state=seed,
            block_bytes=block_bytes,
        )[0].tolist()

    assert draw(0) == draw(0) == draw(np.random.RandomState(0)) == draw(0, block_bytes=5000)
    assert draw(0) != draw(1)


# Real vectorizers


PAIRS = [
    ("my card was stolen on holiday", "how to report a stolen card"),
    ("I want to open an account", "opening an account, step by step"),
    ("the machine kept my card", "what to do when a cash machine keeps your card"),
    ("is there a fee for transfers?", "fees for transfers abroad"),
    ("I forgot my password", "resetting a forgotten password"),
]


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_negatives": 0}, ValueError, r"`n_negatives` .* int in \[1, 1000000\]; got 0"),
        ({"n_negatives": 2.0}, TypeError, "`n_negatives` .* got 2.0"),
        ({"strategy": "perc"}, ValueError, "`strategy` .* 'perc_pos', 'margin_pos'; got 'perc'"),
        ({"strategy": None}, TypeError, "`strategy`"),
        ({"sampling": "best"}, ValueError, "`sampling` .* 'top', 'random'"),
        ({"threshold": 0}, ValueError, r"`threshold` .* in \(0, 1\]; got 0"),
        ({"threshold": 1.5}, ValueError, r"`threshold` .* in \(0, 1\]; got 1.5"),
        ({"threshold": np.nan}, ValueError, "`threshold` .* finite"),
        ({"threshold": "0.9"}, TypeError, "`threshold`"),
        ({"threshold": -0.1, "strategy": "margin_pos"}, ValueError, r"`threshold` .* in \[0, 2\]"),
        ({"random_state": "seed", "sampling": "random"}, TypeError, "`random_state` parameter"),
    ],
)
def test_wrong_rules(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        select_negatives([[1.0]], [[1.0]], [[0.5]], **changes)
    table = Table({})
    with pytest.raises(error, match=message):
        mine_hard_negatives(PAIRS, vectorizer=table, **changes)
    assert not table.calls, "the error must come before any text is embedded"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": [[1.0, 0.0]]}, "`positives` .* must have 2 rows, .*; got 1"),
        ({"positives": [[1.0], [1.0]]}, "`positives` .* must have 2 columns"),
        ({"candidates": [[1.0]]}, "`candidates` .* must have 2 columns"),
        ({"anchors": [1.0]}, r"`anchors` .* \(n, dim\)"),
        ({"anchor_groups": [0, 1]}, "`candidate_groups` .* together with `anchor_groups`"),
        ({"known_positives": ([0, 1], [0])}, "`known_positives` .* `indptr`"),
        ({"block_bytes": 0}, "`block_bytes`"),
    ],
)
def test_wrong_vectors(changes: dict[str, Any], message: str) -> None:
    eye = np.eye(2)
    arguments = {"anchors": eye, "positives": eye, "candidates": eye, **changes}
    first = [arguments.pop(name) for name in ("anchors", "positives", "candidates")]
    with pytest.raises(ValueError, match=message):
        select_negatives(*first, **arguments)
