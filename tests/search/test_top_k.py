"""Exact search in blocks against a full sort."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import unit_rows
from scipy import sparse

from skembed.search import top_k as similarity
from skembed.search.top_k import top_k_blocks, top_k_rows
from skembed.similarity import (
    TopK,
)

N, M, DIM = 23, 41, 4
SMALL_BLOCKS = [1, 200, 1000, 5000, 20_000, similarity.BLOCK_BYTES]


def draw_ints(rng: np.random.Generator, n: int, high: int = 2) -> np.ndarray:
    """Small ints as float32: dot products are exact, and many are equal."""
    return rng.integers(-high, high + 1, (n, DIM)).astype(np.float32)


def search_all(scores: np.ndarray, allowed: np.ndarray, k: int) -> TopK:
    """Sort everything: descending, equal scores by lower index, NaN and -1 behind."""
    n, m = scores.shape
    best = np.full((n, k), np.nan, dtype=np.float32)
    indices = np.full((n, k), -1)
    for i in range(n):
        order = [j for j in np.argsort(-scores[i], kind="stable") if allowed[i, j]][:k]
        best[i, : len(order)], indices[i, : len(order)] = scores[i, order], order
    return TopK(best, indices)


def assert_same(found: TopK, expected: TopK) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.scores.dtype == np.float32
    assert found.indices.dtype == np.int64


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks be as narrow as `block_bytes` asks, so that small data take many."""
    monkeypatch.setattr(similarity, "_MIN_COLUMNS", 3)


# Blocks


@pytest.mark.parametrize("block_bytes", SMALL_BLOCKS)
@pytest.mark.parametrize("k", [1, 2, 7, M, M + 5])
@pytest.mark.usefixtures("narrow")
def test_blocks_equal_a_full_sort(k: int, block_bytes: int, rng: np.random.Generator) -> None:
    queries, corpus = draw_ints(rng, N), draw_ints(rng, M)
    scores = queries @ corpus.T
    assert len(np.unique(scores)) < 40, "the test needs equal scores"
    found = top_k_blocks(queries, corpus, k, block_bytes=block_bytes)
    assert_same(found, search_all(scores, np.ones((N, M), dtype=bool), k))


@pytest.mark.parametrize("n_columns", range(1, M + 1))
def test_every_width_of_a_block(
    n_columns: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_choose_block", lambda *_, **__: (5, n_columns))
    queries, corpus = draw_ints(rng, N), draw_ints(rng, M)
    found = top_k_blocks(queries, corpus, 6)
    assert_same(found, search_all(queries @ corpus.T, np.ones((N, M), dtype=bool), 6))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_bytes", SMALL_BLOCKS)
@pytest.mark.usefixtures("narrow")
def test_all_rules_together_equal_a_full_sort(block_bytes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, corpus = draw_ints(rng, N), draw_ints(rng, M)
    pairs = rng.random((N, M)) < 0.2
    groups = rng.integers(-1, 4, N), rng.integers(-1, 4, M)
    limits = rng.integers(-3, 6, N)
    scores = queries @ corpus.T
    same = (groups[0][:, None] == groups[1]) & (groups[0][:, None] >= 0)
    allowed = ~pairs & ~same & (scores <= limits[:, None])
    matrix = sparse.csr_array(pairs)
    found = top_k_blocks(
        queries,
        corpus,
        9,
        max_scores=limits,
        excluded=(matrix.indptr, matrix.indices),
        query_groups=groups[0],
        corpus_groups=groups[1],
        block_bytes=block_bytes,
    )
    expected = search_all(scores, allowed, 9)
    assert (expected.indices == -1).any(), "the test needs rows that are short"
    assert_same(found, expected)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.usefixtures("narrow")
def test_sorted_corpus(order: int) -> None:
    """The best last is the most work for blocks; the best first the least."""
    corpus = np.arange(M, dtype=np.float32)[::order, None].copy()
    found = top_k_blocks([[1.0], [-1.0]], corpus, 4, block_bytes=1000)
    best = np.arange(M - 1, M - 5, -1) if order == 1 else np.arange(4)
    np.testing.assert_array_equal(found.indices, [best, M - 1 - best])


def test_real_scores_equal_a_full_sort(rng: np.random.Generator) -> None:
    queries, corpus = unit_rows(rng, 300, 16), unit_rows(rng, 5000, 16)
    corpus[3000:] = corpus[:2000]
    found = top_k_blocks(queries, corpus, 10, block_bytes=2**20)
    scores = queries.astype(np.float64) @ corpus.astype(np.float64).T
    best = -np.sort(-scores, axis=1)[:, :10]
    np.testing.assert_allclose(found.scores, best, atol=1e-6)
    own = np.take_along_axis(scores, found.indices, axis=1)
    np.testing.assert_allclose(found.scores, own, atol=1e-6)
    assert all(len(set(row)) == 10 for row in found.indices.tolist())


def test_equal_rows_come_by_lower_index() -> None:
    found = top_k_blocks(np.ones((2, 3)), np.ones((50, 3)), 4, block_bytes=1)
    np.testing.assert_array_equal(found.indices, [[0, 1, 2, 3]] * 2)


def test_minus_zero_equals_zero() -> None:
    # Whether a product gives -0.0 is up to the BLAS, so the keys themselves are compared.
    keys = np.empty(2, dtype=np.int64)
    similarity._pack_keys(np.array([-0.0, 0.0], dtype=np.float32), np.array([7, 7]), out=keys)
    assert keys[0] == keys[1]


def test_scores_of_any_size_keep_their_bits() -> None:
    values = np.array([-3e38, -1.5, -1e-40, 0.0, 1e-45, 0.1, 1.0, 3e38], dtype=np.float32)
    found = top_k_blocks([[1.0]], values[:, None], len(values))
    np.testing.assert_array_equal(found.scores[0], values[::-1])
    assert found.indices[0].tolist() == list(range(len(values)))[::-1]


def test_nan_and_infinity_are_not_in_the_way() -> None:
    corpus = [[1.0, 0.0], [np.nan, 0.0], [0.5, 0.0], [-np.inf, 0.0]]
    found = top_k_blocks([[1.0, 1.0], [np.nan, 1.0]], corpus, 3)
    assert found.indices.tolist() == [[0, 2, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(found.scores, [[1.0, 0.5, np.nan], [np.nan] * 3])


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_search(n: int, m: int) -> None:
    found = top_k_blocks(np.ones((n, 2)), np.ones((m, 2)), 2)
    assert found.scores.shape == found.indices.shape == (n, 2)
    assert (found.indices == (-1 if m == 0 else 0)).all()


def test_inputs_stay_as_they_were(rng: np.random.Generator) -> None:
    queries, corpus = draw_ints(rng, N), draw_ints(rng, M)
    groups = np.full(N, -1), np.full(M, -1)
    kept = [values.copy() for values in (queries, corpus, *groups)]
    top_k_blocks(queries, corpus, 3, query_groups=groups[0], corpus_groups=groups[1])
    for values, before in zip((queries, corpus, *groups), kept, strict=True):
        np.testing.assert_array_equal(values, before)


def test_no_group_excludes_nothing() -> None:
    found = top_k_blocks(
        np.ones((1, 1)), np.ones((2, 1)), 2, query_groups=[-1], corpus_groups=[-1, 0]
    )
    assert found.indices.tolist() == [[0, 1]]


# Rows read in blocks, equal scores by rank


def search_by_rank(scores: np.ndarray, ranks: np.ndarray, k: int) -> TopK:
    """Sort everything: descending, equal scores by higher rank."""
    order = np.lexsort((np.broadcast_to(-ranks, scores.shape), -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(scores, order, axis=1), order)


@pytest.mark.parametrize("block_bytes", SMALL_BLOCKS)
@pytest.mark.parametrize("k", [1, 2, 7, M])
@pytest.mark.usefixtures("narrow")
def test_equal_scores_come_by_rank(k: int, block_bytes: int, rng: np.random.Generator) -> None:
    queries, corpus, ranks = draw_ints(rng, N), draw_ints(rng, M), rng.permutation(M)
    found = top_k_rows(queries, corpus.__getitem__, ranks, k, block_bytes=block_bytes)
    assert_same(found, search_by_rank(queries @ corpus.T, ranks, k))


@pytest.mark.parametrize("n_columns", range(1, M + 1))
def test_every_width_of_a_block_by_rank(
    n_columns: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_choose_block", lambda *_, **__: (5, n_columns))
    queries, corpus, ranks = draw_ints(rng, N), draw_ints(rng, M), rng.permutation(M)
    found = top_k_rows(queries, corpus.__getitem__, ranks, 6)
    assert_same(found, search_by_rank(queries @ corpus.T, ranks, 6))


def test_merges_are_as_rare_as_they_may_be(rng: np.random.Generator) -> None:
    """Keys that wait for a merge across many blocks are found as well."""
    queries, corpus = unit_rows(rng, 40, 16), unit_rows(rng, 60_000, 16)
    scores = queries @ corpus.T
    found = top_k_rows(queries, corpus.__getitem__, np.arange(60_000), 50, block_bytes=2**20)
    expected = search_by_rank(scores, np.arange(60_000), 50)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


@pytest.mark.parametrize("case", ["equal", "rising"])
def test_memory_of_rows_holds_in_the_worst_cases(case: str) -> None:
    n, m, limit = 2000, 6000, 4 * 2**20
    queries, corpus = np.ones((n, 2), dtype=np.float32), np.ones((m, 2), dtype=np.float32)
    if case == "rising":
        corpus[:] = np.arange(m, dtype=np.float32)[:, None]
    tracemalloc.start()
    found = top_k_rows(queries, corpus.__getitem__, np.arange(m), 10, block_bytes=limit)
    peak = tracemalloc.get_traced_memory()[1] - found.scores.nbytes - found.indices.nbytes
    tracemalloc.stop()
    assert peak <= limit + 2**16 + 40 * n
    np.testing.assert_array_equal(found.indices, [np.arange(m - 1, m - 11, -1)] * n)


# Memory


def peak_bytes(*args: Any, **kwargs: Any) -> tuple[TopK, int]:
    """What a search holds at its most, beside what it is given and what it returns."""
    tracemalloc.start()
    found = top_k_blocks(*args, **kwargs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, peak - found.scores.nbytes - found.indices.nbytes


def test_memory_does_not_grow_with_the_data(rng: np.random.Generator) -> None:
    vectors = unit_rows(rng, 20_000, 32)
    limit = 16 * 2**20  # all scores would take 1,526 MiB
    found, peak = peak_bytes(vectors, vectors, 10, block_bytes=limit)
    assert peak <= limit
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(20_000))


@pytest.mark.parametrize("case", ["equal", "rising", "rules", "large k", "one query"])
def test_memory_holds_in_the_worst_cases(case: str, rng: np.random.Generator) -> None:
    n, m, k, limit, rules = 2000, 6000, 10, 4 * 2**20, {}
    queries, corpus = np.ones((n, 2), dtype=np.float32), unit_rows(rng, m, 2)
    if case == "equal":
        corpus[:] = 1
    elif case == "rising":
        corpus[:] = np.arange(m, dtype=np.float32)[:, None]
    elif case == "rules":
        groups = {"query_groups": np.arange(n) % 7, "corpus_groups": np.arange(m) % 7}
        rules = {"max_scores": np.full(n, 0.9), **groups}
    elif case == "large k":
        n, k = 300, 3000
        queries = queries[:n]
    else:
        n, m = 1, 500_000
        queries, corpus = queries[:1], unit_rows(rng, m, 2)
    _, peak = peak_bytes(queries, corpus, k, block_bytes=limit, **rules)
    fixed = 2**16 + 40 * n  # arrays of one entry a query, and Python's own
    assert peak <= limit + fixed


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 0}, ValueError, r"`k` parameter of `top_k_blocks` must be an int in \[1, inf\)"),
        ({"k": 1.5}, TypeError, "`k` parameter .* must be an int"),
        ({"block_bytes": 0}, ValueError, "`block_bytes` parameter"),
        ({"queries": [1.0, 2.0]}, ValueError, r"`queries` .* \(n, dim\); got shape \(2,\)"),
        ({"queries": [["a", "b"]]}, TypeError, "`queries` .* array of numbers; got dtype <U1"),
        ({"corpus": sparse.eye(2).tocsr()}, TypeError, "`corpus` .* got a sparse matrix"),
        ({"corpus": [[1.0]]}, ValueError, "`corpus` .* must have 2 columns.*got 1"),
        ({"max_scores": [1.0]}, ValueError, r"`max_scores` .* shape \(2,\); got shape \(1,\)"),
        ({"max_scores": ["a", "b"]}, TypeError, "`max_scores` .* array of numbers"),
        ({"query_groups": [0, 1]}, ValueError, "`corpus_groups` .* together with `query_groups`"),
        ({"corpus_groups": [0, 1, 1]}, ValueError, "`query_groups` .* together with"),
        (
            {"query_groups": [0.0, 1.0], "corpus_groups": [0, 1, 1]},
            TypeError,
            "`query_groups` .* array of int; got dtype float64",
        ),
        (
            {"query_groups": [0, 1], "corpus_groups": [0, 1]},
            ValueError,
            r"`corpus_groups` .* shape \(3,\); got shape \(2,\)",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = {"queries": np.ones((2, 2)), "corpus": np.ones((3, 2)), "k": 1, **changes}
    with pytest.raises(error, match=message):
        top_k_blocks(arguments.pop("queries"), arguments.pop("corpus"), **arguments)
