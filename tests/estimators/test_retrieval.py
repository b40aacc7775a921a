"""Retriever: search, storage, changes, scores, bad input."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vectorizer import LetterVectorizer, unit_rows
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skembed import NVEmbedVectorizer
from skembed.estimators.retrieval import Retriever
from skembed.search import index as _document_index
from skembed.search import top_k as _quantization
from skembed.search.gpu import top_k_rows_on_device
from skembed.search.stored_vectors import STORAGE_KINDS, StoredVectors
from skembed.search.top_k import top_k_rows

N, M, DIM = 13, 400, 24
TEXTS = ["a card was stolen", "open an account", "a fee for a transfer", "lost my card", "the sun"]


def search_all(queries: np.ndarray, corpus: np.ndarray, ids: Any, k: int) -> np.ndarray:
    """Rows by descending score, equal ones by descending id."""
    scores = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    found = []
    for row in scores:
        order = sorted(range(len(ids)), key=lambda j: ids[j], reverse=True)
        found.append(sorted(order, key=lambda j: -row[j])[:k])
    return np.array(found)


# Search


@pytest.mark.parametrize("k", [1, 10, M])
@pytest.mark.parametrize("kind", ["int", "str"])
def test_search_equals_brute_force(k: int, kind: str, rng: np.random.Generator) -> None:
    # Small ints: products are exact, and many are equal.
    queries, corpus = (rng.integers(-3, 4, (n, DIM)).astype(np.float32) for n in (N, M))
    numbers = rng.permutation(M)
    ids = numbers if kind == "int" else np.array([f"d{i}" for i in numbers])
    retriever = Retriever(None, similarity="dot").fit(corpus, ids=ids)
    scores, indices = retriever.search(queries, k)
    assert (scores.dtype, indices.dtype, scores.shape) == (np.float32, np.int64, (N, k))
    np.testing.assert_array_equal(indices, search_all(queries, corpus, ids.tolist(), k))
    own = np.take_along_axis(queries @ corpus.T, indices, axis=1)
    np.testing.assert_array_equal(scores, own)


@pytest.mark.parametrize("k", [1, 10, M])
def test_cosines_equal_those_in_float64(k: int, queries: np.ndarray, corpus: np.ndarray) -> None:
    corpus[200:] = corpus[:200]  # each document twice, so that ids decide
    scores, indices = Retriever(None).fit(corpus).search(queries, k)
    exact = queries.astype(np.float64) @ corpus.astype(np.float64).T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, indices, axis=1), atol=1e-6)
    assert all(len(set(row)) == k for row in indices.tolist())
    np.testing.assert_array_equal(indices[:, 0] >= 200, True)


def test_ties_are_those_of_trec_eval(rng: np.random.Generator) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ids = [str(i) for i in range(30)]
    corpus = np.repeat(unit_rows(rng, 3, DIM), 10, axis=0)
    queries = unit_rows(rng, 8, DIM)
    retriever = Retriever(None).fit(corpus, ids=ids)
    grades = [{doc: int(rng.integers(0, 3)) for doc in ids} for _ in queries]
    found = retriever.search(queries, 30)
    run = {
        str(i): {ids[j]: float(s) for s, j in zip(*pair, strict=True)}
        for i, pair in enumerate(zip(*found, strict=True))
    }
    judge = pytrec_eval.RelevanceEvaluator({str(i): g for i, g in enumerate(grades)}, {"ndcg_cut"})
    expected = np.mean([row["ndcg_cut_10"] for row in judge.evaluate(run).values()])
    # `score` sees the best ten only: the right ten of each thirty, in the right order.
    assert retriever.score(queries, grades) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [3, 24, 384])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_query_finds_the_same_in_any_company(
    dim: int, similarity: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, queries = rng.standard_normal((700, dim)), rng.standard_normal((9, dim))
    corpus[300:600] = corpus[:300]
    retriever = Retriever(None, similarity=similarity).fit(corpus)
    whole = retriever.search(queries, 7)
    for i in range(9):
        alone = retriever.search(queries[i : i + 1], 7)
        np.testing.assert_array_equal(alone.scores[0], whole.scores[i])
        np.testing.assert_array_equal(alone.indices[0], whole.indices[i])
    monkeypatch.setattr(_document_index, "_BLOCK_BYTES", 2**20)
    again = retriever.search(queries, 7)
    np.testing.assert_array_equal(again.scores, whole.scores)
    np.testing.assert_array_equal(again.indices, whole.indices)


def test_cosine_does_not_care_about_length(queries: np.ndarray, corpus: np.ndarray) -> None:
    lengths = np.geomspace(1e-3, 1e3, M)[:, None]
    given = corpus * lengths
    kept = given.copy()
    found = Retriever(None).fit(given).search(queries * 7)
    np.testing.assert_array_equal(given, kept)
    expected = Retriever(None).fit(corpus).search(queries)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    by_dot = Retriever(None, similarity="dot").fit(given).search(queries, 1)
    np.testing.assert_array_equal(by_dot.indices[:, 0], (queries @ given.T).argmax(axis=1))


def test_a_vector_of_zeros_is_like_nothing(queries: np.ndarray, corpus: np.ndarray) -> None:
    corpus[5] = 0
    found = Retriever(None).fit(corpus).search(np.vstack([queries, np.zeros((1, DIM))]), M)
    assert found.scores[found.indices == 5].tolist() == [0.0] * (N + 1)
    np.testing.assert_array_equal(found.indices[-1], np.arange(M)[::-1])


def test_no_queries_find_nothing(corpus: np.ndarray) -> None:
    found = Retriever(None).fit(corpus).search(np.empty((0, DIM)), 3)
    assert found.scores.shape == found.indices.shape == (0, 3)
    texts = Retriever(LetterVectorizer()).fit(TEXTS).search([], 3)
    assert texts.indices.shape == (0, 3)


def test_what_a_vectorizer_keeps_is_left_alone() -> None:
    class Kept(LetterVectorizer):
        table = np.arange(1, 11, dtype=np.float32).reshape(5, 2)

        def transform(self, texts: list[str]) -> np.ndarray:
            return self.table[: len(texts)]

    Retriever(Kept()).fit(TEXTS).search(TEXTS, 1)
    np.testing.assert_array_equal(Kept.table, np.arange(1, 11).reshape(5, 2))


def test_unit_vectors_are_not_copied(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus)
    assert np.shares_memory(retriever._index.stored.arrays["values"], corpus)


def test_search_holds_little_memory(rng: np.random.Generator) -> None:
    corpus, queries = unit_rows(rng, 60_000, 16), unit_rows(rng, 2000, 16)
    retriever = Retriever(None, device="cpu").fit(corpus)
    tracemalloc.start()
    found = retriever.search(queries, 20)  # all scores would take 458 MiB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The stated 32 MiB, the result, and of each candidate its row, rank, score and their order.
    candidates = 2000 * (20 + _quantization.N_SPARE)
    assert peak <= 32 * 2**20 + found.scores.nbytes + found.indices.nbytes + 48 * candidates


@pytest.mark.parametrize("block_bytes", [1, 100_000, 2**29])
def test_the_search_of_a_device_is_that_of_the_cpu(
    block_bytes: int, rng: np.random.Generator
) -> None:
    corpus = rng.integers(-2, 3, (900, 6)).astype(np.float32)  # exact scores, many of them equal
    queries, ranks = rng.integers(-2, 3, (11, 6)).astype(np.float32), rng.permutation(900)
    corpus.flags.writeable = False
    arguments = queries, corpus.__getitem__, ranks, 17
    found = top_k_rows_on_device(*arguments, device=torch.device("cpu"), block_bytes=block_bytes)
    expected = top_k_rows(*arguments)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(rng: np.random.Generator) -> None:
    corpus, queries = unit_rows(rng, 50_000, 384), unit_rows(rng, 100, 384)
    retriever = Retriever(None, device="cuda").fit(corpus)
    found = retriever.search(queries, 50)
    expected = retriever.set_params(device="cpu").search(queries, 50)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)


# Storage


def test_storage_takes_the_memory_it_says(corpus: np.ndarray) -> None:
    sizes = [
        Retriever(None, storage=kind).fit(corpus)._index.stored.nbytes for kind in STORAGE_KINDS
    ]
    levels = 3 * DIM * 4
    assert sizes == [4 * M * DIM, 2 * M * DIM, M * DIM + 4 * M, M * DIM // 8 + levels]


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("float32", 0), ("float16", 2**-11), ("int8", 0.5 / 127)]
)
def test_stored_vectors_come_back(kind: str, tolerance: float, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((50, 13)).astype(np.float32)
    vectors[3] = 0
    stored = StoredVectors.encode(vectors, kind)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    assert (np.abs(stored.read_rows(slice(None)) - vectors) <= tolerance * largest * 1.0001).all()
    np.testing.assert_array_equal(
        stored.read_rows(np.array([7, 2])), stored.read_rows(slice(8))[[7, 2]]
    )
    more = stored.append(vectors[:5])
    np.testing.assert_array_equal(more.read_rows(slice(50, 55)), stored.read_rows(slice(5)))
    rest = more.select(np.arange(55) % 2 == 1)
    np.testing.assert_array_equal(rest.read_rows(slice(None)), more.read_rows(slice(1, None, 2)))
    assert len(stored) == 50


@pytest.mark.parametrize("dim", [1, 8, 13])
def test_bits_stand_for_the_two_means(dim: int, rng: np.random.Generator) -> None:
    vectors = (rng.standard_normal((60, dim)) + 3).astype(np.float32)
    found = StoredVectors.encode(vectors, "binary").read_rows(slice(None))
    for column, read in zip(vectors.T, found.T, strict=True):
        above = column > column.mean()
        np.testing.assert_allclose(read[above], column[above].mean(), rtol=1e-5)
        np.testing.assert_allclose(read[~above], column[~above].mean(), rtol=1e-5)
    same = StoredVectors.encode(np.full((4, dim), 0.3, dtype=np.float32), "binary")
    np.testing.assert_allclose(same.read_rows(slice(None)), 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("storage", "rescore_storage", "least"),
    [
        ("float16", None, 0.99),
        ("int8", None, 0.95),
        ("binary", None, 0.4),
        ("binary", "int8", 0.9),
        ("binary", "float32", 0.9),
    ],
)
def test_recall_of_small_storage(
    storage: str, rescore_storage: str | None, least: float, rng: np.random.Generator
) -> None:
    # Clusters, as texts have them: random directions alone are the worst case.
    centers = unit_rows(rng, 40, 64)
    corpus = np.repeat(centers, 50, axis=0) + 0.1 * rng.standard_normal((2000, 64))
    queries = centers + 0.1 * rng.standard_normal(centers.shape)
    exact = Retriever(None).fit(corpus).search(queries)
    retriever = Retriever(None, storage=storage, rescore_storage=rescore_storage).fit(corpus)
    found = retriever.search(queries)
    recall = np.mean(
        [np.isin(a, b).mean() for a, b in zip(exact.indices, found.indices, strict=True)]
    )
    assert recall >= least
    if rescore_storage == "float32":
        hits = exact.scores[:, 0]
        np.testing.assert_allclose(found.scores[:, 0], hits, atol=1e-6)


def test_more_candidates_find_more(rng: np.random.Generator) -> None:
    corpus, queries = unit_rows(rng, 3000, 64), unit_rows(rng, 40, 64)
    exact = Retriever(None).fit(corpus).search(queries)
    retriever = Retriever(None, storage="binary", rescore_storage="int8").fit(corpus)
    recalls = []
    for rescore in (1, 4, 16, 300):
        found = retriever.set_params(rescore=rescore).search(queries).indices
        recalls.append(
            np.mean([np.isin(a, b).mean() for a, b in zip(exact.indices, found, strict=True)])
        )
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.8 < 0.95 < recalls[-1]


# The approximate index


@pytest.fixture
def usearch() -> Iterator[None]:
    pytest.importorskip("usearch")
    return


@pytest.mark.usefixtures("usearch")
def test_graph_finds_nearly_all(rng: np.random.Generator) -> None:
    corpus, queries = unit_rows(rng, 800, 16), unit_rows(rng, 40, 16)
    exact = Retriever(None).fit(corpus).search(queries)
    retriever = Retriever(None, algorithm="hnsw").fit(corpus)
    found = retriever.search(queries)
    hits = [np.isin(a, b).mean() for a, b in zip(exact.indices, found.indices, strict=True)]
    assert np.mean(hits) >= 0.95
    np.testing.assert_allclose(found.scores[:, 0], exact.scores[:, 0], atol=1e-6)


@pytest.mark.usefixtures("usearch")
def test_graph_loses_no_document() -> None:
    """Threads that add to a graph side by side leave some vectors that no search reaches."""
    for seed in range(60):
        corpus = unit_rows(np.random.default_rng(seed), 60, 8)
        found = Retriever(None, algorithm="hnsw").fit(corpus).search(corpus, 1)
        assert found.indices[:, 0].tolist() == list(range(60))


@pytest.mark.usefixtures("usearch")
def test_graph_lives_through_changes_and_copies(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus = unit_rows(rng, 60, 8)
    retriever = Retriever(None, algorithm="hnsw").fit(corpus)
    retriever.remove([3, 4]).add(corpus[3:4])
    expected = Retriever(None).fit(corpus).remove([3, 4]).add(corpus[3:4]).search(corpus, 5)
    retriever.save(tmp_path / "index")
    others = [pickle.loads(pickle.dumps(retriever)), Retriever.load(tmp_path / "index")]
    for each in (retriever, *others):
        found = each.search(corpus, 5)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)
    # More than the graph can propose is found the long way.
    assert set(retriever.search(corpus[:1], 59).indices[0].tolist()) == set(range(59))


def test_graph_says_what_to_install(monkeypatch: pytest.MonkeyPatch, corpus: np.ndarray) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    monkeypatch.delitem(__import__("sys").modules, "usearch.index", raising=False)
    with pytest.raises(ImportError, match=r"pip install skembed\[ann\]"):
        Retriever(None, algorithm="hnsw").fit(corpus)


# Texts


def test_texts_go_through_their_own_side() -> None:
    retriever = Retriever(LetterVectorizer()).fit(TEXTS)
    retriever.search(["a card"], 2)
    retriever.add(["an oak"])
    assert retriever.vectorizer_.calls == ["document", "query", "document"]


def test_instructions_stand_before_queries_only(tiny: NVEmbedVectorizer) -> None:
    tiny.set_params(instruction="Find the text that says the same")
    retriever = Retriever(tiny).fit(TEXTS)
    scores, indices = retriever.search(["lost my card"], 5)
    expected = tiny.encode_query(["lost my card"]) @ tiny.encode_document(TEXTS).T
    np.testing.assert_allclose(scores[0], np.sort(expected[0])[::-1], atol=1e-5)
    assert np.abs(tiny.encode_query(TEXTS) - tiny.encode_document(TEXTS)).max() > 1e-3
    asked = clone(tiny).set_params(document_instruction="Find the text that says the same")
    again = Retriever(asked).fit(TEXTS).search(["lost my card"], 1)
    assert again.scores[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_titles_stand_before_their_texts() -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    columns = {"title": ["Llama", None, ""], "text": ["a camelid", "hot", "by Goethe"]}
    joined = ["Llama a camelid", "hot", "by Goethe"]
    expected = LetterVectorizer().transform(joined)
    extra = {"_id": ["a", "b", "c"], **columns}
    for X in (
        list(zip(*columns.values(), strict=True)),
        pandas.DataFrame(columns),
        polars.DataFrame(columns),
        pandas.DataFrame(extra),
        polars.DataFrame(extra),
    ):
        retriever = Retriever(LetterVectorizer(), similarity="dot").fit(X)
        values = retriever._index.stored.arrays["values"]
        np.testing.assert_array_equal(values, expected)
    retriever.add(list(zip(*columns.values(), strict=True)))
    np.testing.assert_array_equal(retriever._index.stored.arrays["values"][3:], expected)


def test_last_step_of_a_pipeline(tiny: NVEmbedVectorizer) -> None:
    pipe = Pipeline([("emb", tiny), ("find", Retriever(None))]).fit(TEXTS, find__ids=list("abcde"))
    expected = Retriever(tiny).fit(TEXTS, ids=list("abcde"))
    vectors = pipe[:-1].transform(TEXTS)
    np.testing.assert_array_equal(
        pipe[-1].search(vectors, 2).indices, expected.search(TEXTS, 2).indices
    )
    assert pipe.score(TEXTS, list("abcde")) == expected.score(TEXTS, list("abcde")) == 1.0


def test_fit_twice_equals_fit_once(queries: np.ndarray, corpus: np.ndarray) -> None:
    twice = Retriever(LetterVectorizer()).fit(TEXTS, ids=list("abcde"))
    twice.set_params(vectorizer=None, storage="int8").fit(corpus)
    once = Retriever(None, storage="int8").fit(corpus)
    assert vars(twice).keys() == vars(once).keys()
    assert not hasattr(twice, "vectorizer_")
    assert twice.n_features_in_ == DIM
    for a, b in zip(twice.search(queries), once.search(queries), strict=True):
        np.testing.assert_array_equal(a, b)
    twice.set_params(vectorizer=LetterVectorizer()).fit(TEXTS)
    assert not hasattr(twice, "n_features_in_")


def test_clone_and_pickle(queries: np.ndarray, corpus: np.ndarray) -> None:
    retriever = Retriever(None, storage="binary", rescore_storage="int8").fit(corpus)
    twin = clone(retriever)
    assert twin.get_params() == retriever.get_params()
    assert not hasattr(twin, "ids_")
    found = pickle.loads(pickle.dumps(retriever)).search(queries)
    np.testing.assert_array_equal(found.indices, retriever.search(queries).indices)


def test_a_failing_fit_leaves_the_index(queries: np.ndarray, corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus)
    before = retriever.search(queries)
    for X, ids in ((corpus * np.nan, None), (unit_rows(np.random.default_rng(0), 5, 7), ["a"])):
        with pytest.raises(ValueError, match=r"NaN|must hold an id for each of 5"):
            retriever.fit(X, ids=ids)
    np.testing.assert_array_equal(retriever.search(queries).scores, before.scores)
    assert retriever.n_features_in_ == DIM


# Add and remove


@pytest.mark.parametrize("storage", STORAGE_KINDS)
def test_add_and_remove_equal_a_fresh_fit(
    storage: str, queries: np.ndarray, corpus: np.ndarray
) -> None:
    ids = [f"d{i}" for i in range(M)]
    retriever = Retriever(None, storage=storage).fit(corpus[:300], ids=ids[:300])
    retriever.add(corpus[300:], ids=ids[300:]).remove(ids[100:200])
    rest = np.r_[0:100, 200:M]
    assert retriever.ids_.tolist() == [ids[i] for i in rest]
    # Of bits, the levels are those of the first fit.
    stored = StoredVectors.encode(corpus[:300], storage).append(corpus[300:])
    expected = search_all(queries, stored.read_rows(rest), [ids[i] for i in rest], 10)
    np.testing.assert_array_equal(retriever.search(queries).indices, expected)


def test_counted_ids_are_never_given_twice(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus[:3]).remove([2]).add(corpus[3:5])
    assert retriever.ids_.tolist() == [0, 1, 3, 4]
    retriever.add(corpus[5:6], ids=[77])
    with pytest.raises(ValueError, match="must hold an id for each document"):
        retriever.add(corpus[6:7])


def test_all_documents_may_go(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus[:2]).remove([0, 1])
    with pytest.raises(ValueError, match="holds no documents. Call `add`"):
        retriever.search(corpus[:1], 1)
    assert retriever.add(corpus[:2]).search(corpus[:1], 1).indices.tolist() == [[0]]
    assert retriever.ids_.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r, c: r.add(c[:1], ids=["d0"]), ValueError, "'d0' is there already"),
        (lambda r, c: r.add(c[:2], ids=["x", "x"]), ValueError, r"ids\[1\], 'x', is there before"),
        (lambda r, c: r.add(c[:2], ids=["x"]), ValueError, "each of 2 documents; got 1"),
        (lambda r, c: r.add(c[:1], ids=[5]), TypeError, "must hold str, as `ids_` does"),
        (lambda r, c: r.add(c[:1]), ValueError, "must hold an id for each document"),
        (lambda r, c: r.add(c[:1, :5], ids=["x"]), ValueError, "5 features.*24 features"),
        (lambda r, c: r.add(c[:1] * np.nan, ids=["x"]), ValueError, "NaN"),
        (lambda r, c: r.remove(["d1", "no"]), ValueError, "1 of 2 are not there.*'no'"),
        (lambda r, c: r.remove(["d1", "d1"]), ValueError, "each id once"),
        (lambda r, c: r.remove("d1"), TypeError, "must be a list of ids; got str"),
        (lambda r, c: r.remove(None), TypeError, "must be a list of ids; got None"),
    ],
)
def test_a_failing_change_changes_nothing(
    change: Any, error: type[Exception], message: str, queries: np.ndarray, corpus: np.ndarray
) -> None:
    retriever = Retriever(None).fit(corpus, ids=[f"d{i}" for i in range(M)])
    before, ids = retriever.search(queries), retriever.ids_.copy()
    with pytest.raises(error, match=message):
        change(retriever, corpus)
    np.testing.assert_array_equal(retriever.search(queries).scores, before.scores)
    np.testing.assert_array_equal(retriever.ids_, ids)


# Score


def test_score_takes_judgments_in_any_form(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus[:4], ids=list("abcd"))
    X = corpus[:2]
    expected = retriever.score(X, [{"a": 1, "b": 1}, {"c": 1}])
    assert 0 < expected < 1
    assert retriever.score(X, [["a", "b"], ["c"]]) == expected
    assert retriever.score(X, [{"a", "b"}, "c"]) == expected
    assert retriever.score(X, [np.array(["a", "b"]), ("c",)]) == expected
    qrels = {"q2": {"c": 1}, "q1": {"a": 1, "b": 1}, "other": {}}
    assert retriever.score(X, qrels, query_ids=["q1", "q2"]) == expected
    # What is judged and not in the corpus is missed.
    assert retriever.score(X, [{"a": 1, "b": 1, "gone": 1}, {"c": 1}]) < expected
    assert Retriever(None).fit(corpus).score(corpus[:5], np.arange(5)) == 1.0


@pytest.mark.parametrize(
    ("y", "query_ids", "error", "message"),
    [
        ([{"a": 1}, {}], None, ValueError, "1 of 2 have none, the first is query 1"),
        ([{"a": 1}, []], None, ValueError, "1 of 2 have none, the first is query 1"),
        ([{"a": 1}], None, ValueError, "each of 2 queries; got 1"),
        ([{7: 1}, {8: 1}], None, ValueError, "none of them is there. Ids of `y` are such as 7"),
        ([{"a": 1}, 0.5], None, TypeError, "lists of document ids; got float for query 1"),
        ({"q": ["a"]}, None, ValueError, "`query_ids`.*since `y` is a mapping"),
        ({"q": ["a"]}, ["q", "r"], ValueError, "1 of 2 have none, the first is query 1"),
        (["a", "b"], ["q", "r"], TypeError, "must be a mapping, since `query_ids` is given"),
        ("ab", None, TypeError, "must be a list of judgments; got str"),
    ],
)
def test_bad_judgments(
    y: Any, query_ids: Any, error: type[Exception], message: str, corpus: np.ndarray
) -> None:
    retriever = Retriever(None).fit(corpus[:4], ids=list("abcd"))
    with pytest.raises(error, match=message):
        retriever.score(corpus[:2], y, query_ids=query_ids)


# Bad input


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"similarity": "l2"}, ValueError, "`similarity` parameter of `Retriever` must be one of"),
        ({"storage": "int4"}, ValueError, "`storage` parameter of `Retriever` must be one of"),
        ({"rescore_storage": "binary"}, ValueError, "`rescore_storage`.*must be one of"),
        ({"rescore_storage": "float16"}, ValueError, "must be finer than storage='float32'"),
        ({"storage": "int8", "rescore_storage": "int8"}, ValueError, "must be finer than"),
        ({"rescore": 0}, ValueError, r"`rescore`.*int in \[1, inf\); got 0"),
        ({"algorithm": "annoy"}, ValueError, "`algorithm`.*must be one of 'exact', 'hnsw'"),
        ({"device": 3}, ValueError, "`device`.*got 'cuda:3'"),
        ({"device": 0.5}, TypeError, "`device`.*must be a str; got 0.5"),
        ({"device": "gpu"}, ValueError, "`device` parameter of `Retriever`.*got 'gpu'"),
        ({"device": "mps"}, ValueError, "`device` parameter of `Retriever`.*got 'mps'"),
        ({"device": "cuda:99"}, ValueError, "got 'cuda:99', but torch sees"),
    ],
)
def test_bad_parameters(
    parameters: dict[str, Any], error: type[Exception], message: str, corpus: np.ndarray
) -> None:
    with pytest.raises(error, match=message):
        Retriever(None, **parameters).fit(corpus)


def test_top_k_is_clipped_to_the_corpus(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus)
    expected = retriever.search(corpus[:2], M)
    for top_k in (M + 1, 10 * M):
        found = retriever.search(corpus[:2], top_k)
        np.testing.assert_array_equal(found.indices, expected.indices)
    small = Retriever(None).fit(corpus[:4])
    assert small.search(corpus[:2]).scores.shape == (2, 4)
    assert small.remove([0, 2]).search(corpus[:2]).indices.shape == (2, 2)
    with pytest.raises(ValueError, match=r"`top_k` parameter of `Retriever` .*; got 0"):
        retriever.search(corpus[:1], 0)


def test_set_params_changes_an_index_at_the_next_fit(corpus: np.ndarray, tmp_path: Path) -> None:
    scaled = corpus * np.linspace(1, 9, len(corpus), dtype=np.float32)[:, None]
    retriever = Retriever(None).fit(scaled)
    expected = retriever.search(scaled[:3], 5)
    retriever.set_params(similarity="dot", storage="int8", algorithm="hnsw")
    np.testing.assert_array_equal(retriever.search(scaled[:3], 5).scores, expected.scores)
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index")
    assert (loaded.similarity, loaded.storage) == ("cosine", "float32")
    np.testing.assert_array_equal(loaded.search(scaled[:3], 5).scores, expected.scores)
    retriever.set_params(algorithm="exact", storage="float32").fit(scaled)
    assert np.abs(retriever.search(scaled[:3], 5).scores - expected.scores).max() > 0.1


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a", "b", "a"], ValueError, r"ids\[2\], 'a', is there before"),
        ([1, "b", 2], TypeError, r"all of one type; ids\[1\] is of type str"),
        ([True, False, True], TypeError, r"ids\[0\] is of type bool"),
        ([1.5, 2.5, 3.5], TypeError, r"ids\[0\] is of type float"),
        ("abc", TypeError, "must be a list of ids; got str"),
        (["a", "b"], ValueError, "each of 3 documents; got 2"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], message: str, corpus: np.ndarray) -> None:
    with pytest.raises(error, match=message):
        Retriever(None).fit(corpus[:3], ids=ids)


def test_bad_input_to_search(corpus: np.ndarray) -> None:
    retriever = Retriever(None).fit(corpus)
    with pytest.raises(ValueError, match="7 features, but .* is expecting 24"):
        retriever.search(np.ones((2, 7)))
    with pytest.raises(ValueError, match="NaN"):
        retriever.search(np.full((2, DIM), np.nan))
    with pytest.raises(TypeError, match="since `vectorizer` is None; got texts"):
        retriever.search(["a text"])
    with pytest.raises(ValueError, match="finite in float32; that of row 1"):
        retriever.search(np.array([np.ones(DIM), np.full(DIM, 1e300)]))
    with pytest.raises(NotFittedError):
        Retriever(None).search(corpus)


def test_bad_corpora() -> None:
    for empty in ([], np.array([], dtype=object)):
        with pytest.raises(ValueError, match="at least 1 text|0 texts|must hold"):
            Retriever(LetterVectorizer()).fit(empty)
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        Retriever(None).fit(np.empty((0, 4)))
    with pytest.raises(TypeError, match="bare str"):
        Retriever(LetterVectorizer()).fit("a text")
    with pytest.raises(TypeError, match="must be None, the name of a model"):
        Retriever(3).fit(TEXTS)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", SkipTestWarning)

    @parametrize_with_checks([Retriever(None), Retriever(None, storage="int8")])
    def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
        check(estimator)
