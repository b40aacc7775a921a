"""`Reranker`: order and scores of ragged candidates, training rows, MAP, bad input."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.estimators import reranking
from skembed.estimators.reranking import Reranker, _make_rows

DIM = 48
QUERIES = ["who wrote Faust", "what is a llama", "how hot is the sun"]
CANDIDATES = [
    ["Faust is a play by Goethe", "the sun is hot", "a llama is a camelid"],
    [],
    ["a llama", "some 5,500 degrees"],
]
PAIRS = [(q, d) for q in QUERIES for part in CANDIDATES for d in part]
RELEVANCE = np.array([1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 2])
GROUPS = np.repeat(["q0", "q1", "q2"], 5)


@pytest.fixture
def tiny() -> NVEmbedVectorizer:
    return NVEmbedVectorizer(
        GOLDEN, trainer=None, device="cpu", dtype="float32", instruction="Find the answer"
    )


class Recorder:
    """A vectorizer that keeps what `fit` is given."""

    trainer = "auto"

    def fit(self, X: Any, y: Any = None) -> Recorder:
        self.seen = X
        return self

    def transform(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(t), 1.0] for t in texts], dtype=np.float32).reshape(-1, 2)


# Rank and predict


def test_rank_sorts_by_similarity(tiny: NVEmbedVectorizer) -> None:
    ranking = Reranker(tiny).fit().rank(QUERIES, CANDIDATES)
    indices, scores = ranking
    assert [len(part) for part in indices] == [3, 0, 2]
    for query, part, order, values in zip(QUERIES, CANDIDATES, indices, scores, strict=True):
        assert (order.dtype, values.dtype) == (np.int64, np.float32)
        if not part:
            continue
        expected = (tiny.encode_document(part) @ tiny.encode_query([query]).T)[:, 0]
        np.testing.assert_array_equal(order, np.argsort(-expected, kind="stable"))
        np.testing.assert_allclose(values, expected[order], atol=1e-5)


def test_predict_agrees_with_rank(tiny: NVEmbedVectorizer) -> None:
    reranker = Reranker(tiny).fit()
    indices, scores = reranker.rank(QUERIES[:1], CANDIDATES[:1])
    found = reranker.predict([(QUERIES[0], CANDIDATES[0][i]) for i in indices[0]])
    np.testing.assert_allclose(found, scores[0], atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_embeddings(similarity: str, rng: np.random.Generator) -> None:
    queries = rng.standard_normal((3, 6))
    lists = [rng.standard_normal((n, 6)) for n in (4, 0, 2)]
    reranker = Reranker(None, similarity=similarity).fit()
    indices, scores = reranker.rank(queries, lists)
    for query, part, order, values in zip(queries, lists, indices, scores, strict=True):
        expected = part @ query
        if similarity == "cosine":
            expected = expected / np.linalg.norm(part, axis=1) / np.linalg.norm(query)
        np.testing.assert_array_equal(order, np.argsort(-expected))
        np.testing.assert_allclose(values, expected[order], atol=1e-5)
    pairs = np.hstack([np.repeat(queries[:1], 4, axis=0), lists[0]])
    np.testing.assert_allclose(reranker.predict(pairs)[indices[0]], scores[0], atol=1e-6)


def test_equal_scores_stay_in_order() -> None:
    ranking = Reranker(None).fit().rank(np.ones((1, 2)), [np.ones((5, 2))])
    assert ranking.indices[0].tolist() == [0, 1, 2, 3, 4]


def test_nothing_to_rank(tiny: NVEmbedVectorizer) -> None:
    reranker = Reranker(tiny).fit()
    assert [part.shape for part in reranker.rank(QUERIES, [[], [], []]).scores] == [(0,)] * 3
    assert Reranker(None).fit().rank(np.ones((2, 3)), [[], []]).indices[1].shape == (0,)
    assert Reranker(None).fit().rank(np.empty((0, 3)), []) == ([], [])


def test_a_pipeline_of_pairs(tiny: NVEmbedVectorizer) -> None:
    pipe = Pipeline([("emb", tiny), ("rerank", Reranker(None))]).fit(PAIRS, RELEVANCE)
    own = Reranker(tiny).fit(PAIRS, RELEVANCE)
    np.testing.assert_allclose(pipe.predict(PAIRS), own.predict(PAIRS), atol=1e-6)
    assert pipe.score(PAIRS, RELEVANCE) == own.score(PAIRS, RELEVANCE, groups=GROUPS)
    assert (own.embedding_dim_, pipe[-1].n_features_in_) == (DIM, 2 * DIM)


def test_other_transformers_fit_on_both_sides() -> None:
    vectorizer = make_pipeline(TfidfVectorizer(), TruncatedSVD(3, random_state=0))
    reranker = Reranker(vectorizer).fit(PAIRS, RELEVANCE)
    known = reranker.vectorizer_[0].vocabulary_
    assert {"wrote", "camelid"} <= known.keys()
    assert not reranker.trained_
    assert reranker.predict(PAIRS).shape == (15,)


# Training


def test_training_learns_the_judgments(tiny: NVEmbedVectorizer) -> None:
    trainer = ContrastiveTrainer(r=4, epochs=20, learning_rate=5e-3, random_state=0)
    reranker = Reranker(tiny.set_params(trainer=trainer))
    frozen = Reranker(clone(tiny).set_params(trainer=None)).fit().score(PAIRS, RELEVANCE)
    reranker.fit(PAIRS, RELEVANCE, groups=GROUPS)
    assert reranker.trained_
    assert not hasattr(tiny, "adapter_")
    assert frozen < 0.95
    assert reranker.score(PAIRS, RELEVANCE) == 1.0
    again = clone(reranker).fit(PAIRS, RELEVANCE)  # the queries tell the groups themselves
    np.testing.assert_array_equal(again.predict(PAIRS), reranker.predict(PAIRS))
    twin = pickle.loads(pickle.dumps(reranker))
    np.testing.assert_allclose(twin.predict(PAIRS), reranker.predict(PAIRS), atol=1e-6)


def test_rows_have_negatives_of_their_own_query() -> None:
    vectorizer = Recorder()
    reranker = Reranker(vectorizer).fit(PAIRS, RELEVANCE)
    rows = reranker.vectorizer_.seen
    documents = [d for part in CANDIDATES for d in part]
    positives = {(q, d) for (q, d), r in zip(PAIRS, RELEVANCE, strict=True) if r > 0}
    assert [row[:2] for row in rows] == [p for p, r in zip(PAIRS, RELEVANCE, strict=True) if r > 0]
    for query, positive, *negatives in rows:
        assert len(negatives) == 7
        assert positive not in negatives
        own = {d for d in documents if (query, d) not in positives}
        assert set(negatives) == own, "all of the query's own, repeated up to seven"


def test_rows_borrow_negatives_where_there_are_few() -> None:
    queries = ["a", "a", "b", "b"]
    documents = ["a1", "a2", "b1", "b2"]
    relevant = np.array([True, True, True, False])
    rows = list(
        _make_rows(
            queries, documents, relevant, np.array([0, 0, 1, 1]), n_negatives=2, random_state=0
        )
    )
    assert [row[:2] for row in rows] == [("a", "a1"), ("a", "a2"), ("b", "b1")]
    assert [set(row[2:]) for row in rows[:2]] == [{"b1", "b2"}] * 2
    assert rows[2][2] == "b2"
    assert rows[2][3] in ("a1", "a2")
    again = _make_rows(
        queries, documents, relevant, np.array([0, 0, 1, 1]), n_negatives=2, random_state=0
    )
    assert list(again) == rows
    pairs = _make_rows(
        queries, documents, np.ones(4, bool), np.array([0, 0, 1, 1]), n_negatives=2, random_state=0
    )
    assert list(pairs) == list(zip(queries, documents, strict=True))


def test_without_judgments_nothing_is_trained() -> None:
    trained = Reranker(Recorder()).fit(PAIRS)
    assert not trained.trained_
    assert trained.vectorizer_.seen == [q for q, _ in PAIRS] + [d for _, d in PAIRS]
    assert not hasattr(Reranker(Recorder()).fit().vectorizer_, "seen")


def test_fit_twice_equals_fit_once(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((15, 8))
    twice = Reranker(Recorder()).fit(PAIRS, RELEVANCE).set_params(vectorizer=None).fit(vectors)
    once = Reranker(None).fit(vectors)
    assert vars(twice).keys() == vars(once).keys()
    bare = twice.fit()
    assert vars(bare).keys() == vars(Reranker(None).fit()).keys()


# Score


def test_score_is_the_map_of_trec_eval(rng: np.random.Generator) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    vectors, relevance = rng.standard_normal((60, 10)), rng.integers(0, 3, 60)
    groups = rng.integers(0, 7, 60)
    relevance[groups == 3] = 0  # counts, with 0
    reranker = Reranker(None).fit(vectors)
    scores = reranker.predict(vectors)
    run: dict[str, dict[str, float]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for i in range(60):
        run.setdefault(str(groups[i]), {})[f"{i:03}"] = float(scores[i])
        qrels.setdefault(str(groups[i]), {})[f"{i:03}"] = int(relevance[i] > 0)
    found = pytrec_eval.RelevanceEvaluator(qrels, {"map_cut"}).evaluate(run)
    expected = np.mean([row["map_cut_1000"] for row in found.values()])
    assert reranker.score(vectors, relevance, groups=groups) == pytest.approx(expected, abs=1e-12)


def test_cross_validation(tiny: NVEmbedVectorizer) -> None:
    folds = GroupKFold(3)
    scores = cross_val_score(Reranker(tiny), np.array(PAIRS), RELEVANCE, groups=GROUPS, cv=folds)
    expected = [
        Reranker(tiny).fit().score([PAIRS[i] for i in test], RELEVANCE[test])
        for _, test in folds.split(PAIRS, groups=GROUPS)
    ]
    np.testing.assert_allclose(scores, expected)


# Bad input


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda r: r.rank(QUERIES, CANDIDATES[:2]), ValueError, "each of 3 queries; got 2"),
        (lambda r: r.rank(QUERIES[:1], "text"), TypeError, "must be a list of lists; got str"),
        (lambda r: r.rank(QUERIES[:1], ["text"]), TypeError, r"`candidates\[0\]`.*bare str"),
        (lambda r: r.rank(QUERIES[:2], [["a"], ["b", 3]]), TypeError, r"candidates\[1\]\[1\]"),
        (lambda r: r.rank(QUERIES[:1], [["a", None]]), ValueError, "1 missing"),
        (lambda r: r.rank(QUERIES[0], [["a"]]), TypeError, "bare str"),
        (lambda r: r.predict(["a"]), ValueError, "must hold pairs of texts"),
        (lambda r: r.score(PAIRS, RELEVANCE[:4]), ValueError, r"shape \(15,\); got shape \(4,\)"),
        (lambda r: r.score(PAIRS, ["x"] * 15), TypeError, r"must hold numbers; y\[0\] is a str"),
        (lambda r: r.score(PAIRS, [np.nan] * 15), ValueError, r"no missing numbers.*y\[0\]"),
        (lambda r: r.score(PAIRS, RELEVANCE, groups=[1]), ValueError, "each of 15 rows; got 1"),
        (lambda r: r.fit(PAIRS, RELEVANCE * 0), ValueError, "a relevance above 0, to train on"),
        (lambda r: r.fit(PAIRS, RELEVANCE, groups=[1]), ValueError, "each of 15 rows; got 1"),
        (lambda r: r.fit([], []), ValueError, "at least 1"),
        (lambda r: r.set_params(similarity="l2").fit(), ValueError, "`similarity`.*one of"),
    ],
)
def test_bad_texts(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(Reranker(Recorder()).fit())


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda r: r.predict(np.ones((2, 5))), ValueError, "even number of columns.*5"),
        (lambda r: r.fit(np.ones((2, 5))), ValueError, "even number of columns.*5"),
        (lambda r: r.fit(np.ones((2, 4))).predict(np.ones((2, 6))), ValueError, "6 features"),
        (lambda r: r.predict(np.full((2, 4), np.nan)), ValueError, "NaN"),
        (lambda r: r.rank(np.ones((1, 3)), [np.ones((2, 4))]), ValueError, "must have 3 columns"),
        (lambda r: r.rank(np.ones((1, 2)), [[[1, np.inf]]]), ValueError, "finite numbers"),
        (lambda r: r.predict(["a"]), TypeError, "since `vectorizer` is None; got texts"),
    ],
)
def test_bad_embeddings(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act(Reranker(None).fit())


def test_use_before_fit(tiny: NVEmbedVectorizer) -> None:
    for act in (lambda r: r.predict(PAIRS), lambda r: r.rank(QUERIES, CANDIDATES)):
        with pytest.raises(NotFittedError):
            act(Reranker(tiny))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", SkipTestWarning)

    @parametrize_with_checks([Reranker(None)])
    def test_scikit_learns_checks(
        estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The checks use odd numbers of columns: the two embeddings then share the middle one.
        monkeypatch.setattr(reranking, "_half_width", lambda width: (width + 1) // 2)
        check(estimator)
