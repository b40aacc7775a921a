"""The seam between tasks and encoders: every estimator takes every kind of encoder."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import (
    EncodeOnly,
    FakeVectorizer,
    SentenceTransformerLike,
    TwoSidedEncoder,
    TwoSidedVectorizer,
    call_fake,
)
from scipy import sparse
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

from skembed import (
    EmbeddingClassifier,
    EmbeddingClusterer,
    Reranker,
    Retriever,
    SimilarityRegressor,
    ZeroShotClassifier,
    mine_hard_negatives,
)
from skembed.embedding import check_pair_columns, check_text_column, embed, embed_pairs
from skembed.evaluation.harness import evaluate
from skembed.evaluation.tasks import ClassificationTask, RetrievalTask, STSTask
from skembed.mteb import MTEBEncoder
from skembed.plotting.display import EmbeddingMapDisplay

WORDS = {"card": "card bank stolen lost", "food": "bread soup cheese apple"}
TEXTS = [f"{a} {b} {i}" for words in WORDS.values() for i, a in enumerate(words.split())
         for b in words.split()]  # fmt: skip
LABELS = [label for label in WORDS for _ in range(16)]
NEW = ["a stolen card", "soup with cheese", "the bank lost it"]
PAIRS = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))
SCORES = [float(i % 5) for i in range(len(PAIRS))]


def run_mteb(vectorizer: Any) -> Any:
    options: dict[str, Any] = {"hf_split": "test", "hf_subset": "default"}
    task = SimpleNamespace(name="Mine", type="Retrieval", prompt=None)
    batches = [{"text": TEXTS[:3]}, {"text": NEW}]
    encoder = MTEBEncoder(vectorizer)
    sides = [SimpleNamespace(value="query"), SimpleNamespace(value="document")]
    return [encoder.encode(batches, task_metadata=task, prompt_type=s, **options) for s in sides]


def run_evaluate(vectorizer: Any) -> Any:
    tasks = [
        ClassificationTask(TEXTS, LABELS, samples_per_label=4, n_experiments=2),
        STSTask(PAIRS, SCORES),
        RetrievalTask(NEW, TEXTS, [[0], [20], [3]]),
    ]
    return [row.values for row in evaluate(vectorizer, tasks, n_bootstraps=2)]


def run_retriever(vectorizer: Any) -> Any:
    retriever = Retriever(vectorizer).fit(TEXTS).add(NEW[:1])
    return [*retriever.search(NEW, top_k=4), retriever.score(NEW, [32, [20, 21], {3: 1}])]


def run_clusterer(vectorizer: Any) -> Any:
    clusterer = EmbeddingClusterer(vectorizer, n_clusters=2, random_state=0).fit(TEXTS)
    return [clusterer.cluster_centers_, clusterer.predict(NEW)]


def run_sts(vectorizer: Any) -> Any:
    fitted = SimilarityRegressor(vectorizer, calibration="isotonic").fit(PAIRS, SCORES)
    return [fitted.predict(PAIRS), SimilarityRegressor(vectorizer).fit(PAIRS).predict(PAIRS)]


def run_reranker(vectorizer: Any) -> Any:
    reranker = Reranker(vectorizer).fit(PAIRS, [1, 0] * 8)
    ranking = reranker.rank(NEW, [TEXTS[:3], [], TEXTS[20:]])
    return [reranker.predict(PAIRS), *ranking.indices, *ranking.scores]


def run_mining(vectorizer: Any) -> Any:
    mined = [
        mine_hard_negatives(PAIRS, vectorizer=vectorizer, n_negatives=2),
        mine_hard_negatives(TEXTS, LABELS, vectorizer=vectorizer, n_negatives=2),
    ]
    return [getattr(found, name) for found in mined for name in ("indices", "scores")]


def run_map(vectorizer: Any) -> Any:
    pytest.importorskip("matplotlib", reason="needs matplotlib: skembed[plot]")
    display = EmbeddingMapDisplay.from_estimator(vectorizer, TEXTS, LABELS, reducer="pca")
    return [display.coordinates, display.place(NEW)]


RUNS: dict[str, Callable[[Any], Any]] = {
    "EmbeddingClassifier": lambda v: [EmbeddingClassifier(v).fit(TEXTS, LABELS).predict_proba(NEW)],
    "ZeroShotClassifier": lambda v: [
        ZeroShotClassifier(v, descriptions=WORDS).fit(TEXTS, LABELS).predict_proba(NEW)
    ],
    "EmbeddingClusterer": run_clusterer,
    "SimilarityRegressor": run_sts,
    "Retriever": run_retriever,
    "Reranker": run_reranker,
    "EmbeddingMapDisplay": run_map,
    "MTEBEncoder": run_mteb,
    "evaluate": run_evaluate,
    "mine_hard_negatives": run_mining,
}
ENCODERS = {
    "encode": (EncodeOnly(), FakeVectorizer()),
    "callable": (call_fake, FakeVectorizer()),
    "method": (EncodeOnly().encode, FakeVectorizer()),
    "two sides": (TwoSidedEncoder(), TwoSidedVectorizer(document_instruction="document")),
    "sentence-transformers": (
        SentenceTransformerLike(),
        TwoSidedVectorizer(document_instruction="document"),
    ),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


@every_encoder
@pytest.mark.parametrize("name", RUNS)
def test_every_encoder_gives_the_results_of_a_transformer(name: str, kind: str) -> None:
    encoder, transformer = ENCODERS[kind]
    for ours, theirs in zip(RUNS[name](encoder), RUNS[name](transformer), strict=True):
        np.testing.assert_array_equal(ours, theirs)


ESTIMATORS = [
    EmbeddingClassifier,
    ZeroShotClassifier,
    EmbeddingClusterer,
    SimilarityRegressor,
    Retriever,
    Reranker,
]


@every_encoder
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_clone_holds_the_same_encoder(estimator: Any, kind: str) -> None:
    encoder = ENCODERS[kind][0]
    original = estimator(encoder)
    twin = clone(original)
    assert twin is not original and twin.vectorizer is encoder is original.vectorizer
    assert type(twin) is estimator
    others = {k: v for k, v in original.get_params(deep=False).items() if k != "vectorizer"}
    assert {k: v for k, v in twin.get_params(deep=False).items() if k != "vectorizer"} == others


def test_a_clone_of_a_fitted_estimator_is_not_fitted() -> None:
    fitted = Retriever(EncodeOnly(), storage="int8").fit(TEXTS)
    twin = clone(fitted)
    assert fitted.vectorizer_ is fitted.vectorizer
    assert twin.storage == "int8" and not [name for name in vars(twin) if name.endswith("_")]
    assert len(fitted.ids_) == len(TEXTS), "the original stays as it was"


def test_a_transformer_is_still_cloned_and_fitted() -> None:
    vectorizer = FakeVectorizer()
    clf = EmbeddingClassifier(vectorizer).fit(TEXTS, LABELS)
    assert clf.vectorizer_ is not vectorizer and clf.vectorizer_.n_fitted_ == len(TEXTS)
    assert not hasattr(vectorizer, "n_fitted_")
    assert clone(clf).vectorizer is not vectorizer


@every_encoder
def test_searches_over_parameters_share_the_encoder(kind: str) -> None:
    clf = EmbeddingClassifier(ENCODERS[kind][0])
    assert cross_val_score(clf, TEXTS, LABELS, cv=2).mean() > 0.5
    search = GridSearchCV(ZeroShotClassifier(ENCODERS[kind][0], descriptions=WORDS),
                          {"temperature": [0.05, 0.1]}, cv=2)  # fmt: skip
    best = search.fit(TEXTS, LABELS).best_estimator_
    assert best.vectorizer_ is ENCODERS[kind][0]


@every_encoder
def test_a_pickle_holds_its_encoder(kind: str) -> None:
    clf = EmbeddingClassifier(ENCODERS[kind][0]).fit(TEXTS, LABELS)
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(NEW), clf.predict_proba(NEW))


@every_encoder
def test_a_saved_index_knows_its_encoder(kind: str, tmp_path: Path) -> None:
    encoder = ENCODERS[kind][0]
    retriever = Retriever(encoder).fit(TEXTS)
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", vectorizer=encoder)
    for ours, theirs in zip(loaded.search(NEW), retriever.search(NEW), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="was built with another model"):
        Retriever.load(tmp_path / "index", vectorizer=FakeVectorizer(dim=8).transform)
    with pytest.raises(ValueError, match="built with a vectorizer that has no name"):
        Retriever.load(tmp_path / "index")
    with pytest.raises(TypeError, match="or a callable; got an object of type int"):
        Retriever.load(tmp_path / "index", vectorizer=3)


@pytest.mark.parametrize("wrong", [3, object(), b"mini", EncodeOnly, FakeVectorizer])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "MTEBEncoder"])
def test_what_cannot_embed_is_refused(name: str, wrong: Any) -> None:
    got = "the class .*, not an instance" if isinstance(wrong, type) else "an object of type"
    message = f"must be .*`transform`.*`encode`.*SentenceTransformer, or a callable; got {got}"
    with pytest.raises(TypeError, match=message):
        RUNS[name](wrong)


# The seam itself


class Noisy:
    """Says which of its methods was called."""

    def __init__(self, *names: str) -> None:
        for place, name in enumerate(names):
            setattr(self, name, lambda texts, place=place: np.full((len(texts), 1), place))


@pytest.mark.parametrize(
    ("side", "names"),
    [
        ("query", ["encode_query", "transform", "encode"]),
        ("document", ["encode_document", "transform", "encode"]),
        (None, ["transform", "encode", "encode_query"]),
    ],
)
def test_order_of_methods(side: str | None, names: list[str]) -> None:
    for start in range(len(names)):
        found = embed(Noisy(*names[start:], "encode_other"), ["a"], side, owner="f")
        assert found.tolist() == [[0.0]], names[start:]


def test_vectors_come_as_float32_in_order() -> None:
    found = embed(lambda texts: [[len(text), 0.1] for text in texts], ("a", "abc"), owner="f")
    assert found.dtype == np.float32 and found[:, 0].tolist() == [1, 3]
    given = np.ones((1, 2), dtype=np.float32)
    assert embed(lambda texts: given, ["a"], owner="f") is given, "no copy"
    assert embed(lambda texts: 1 / 0, [], owner="f", dim=7).shape == (0, 7)


def test_sparse_vectors_where_the_task_can_use_them() -> None:
    matrix = sparse.csc_matrix([[0.0, 2.0], [1.0, 0.0]])
    found = embed(lambda texts: matrix, ["a", "b"], owner="f", sparse=True)
    assert sparse.issparse(found) and found.format == "csr" and found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), matrix.toarray())
    with pytest.raises(TypeError, match="`f` must turn 2 texts into a dense array; got a sparse"):
        embed(lambda texts: matrix, ["a", "b"], owner="f")
    matrix.data[1] = np.inf
    with pytest.raises(ValueError, match=r"the vector of texts\[0\] is not finite"):
        embed(lambda texts: matrix, ["a", "b"], owner="f", sparse=True)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (np.ones((2, 2)), ValueError, r"2 texts into an array of shape \(2, 3\); got .*\(2, 2\)"),
        (np.ones((3, 3)), ValueError, r"got shape \(3, 3\)"),
        (np.ones(3), ValueError, r"got shape \(3,\)"),
        ([["a"] * 3] * 2, TypeError, "an array of numbers; got dtype <U1"),
        ([[1, 1, 1], [1, np.nan, 1]], ValueError, r"the vector of texts\[1\] is not finite"),
        (np.full((2, 3), 1e300), ValueError, r"the vector of texts\[0\] is not finite"),
        (sparse.eye(2, 3).tocsr() * 1e300, ValueError, r"texts\[0\] is not finite"),
    ],
)
def test_bad_vectors(found: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed(lambda texts: found, ["a", "b"], owner="f", dim=3, sparse=True)


def test_pairs_have_one_width() -> None:
    encoder = Noisy()
    encoder.encode_query = lambda texts: np.ones((len(texts), 2))  # type: ignore[attr-defined]
    encoder.encode_document = lambda texts: np.ones((len(texts), 3))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="queries and documents of one width; got 2 and 3"):
        embed_pairs(encoder, (["a"], ["b"]), owner="f")


def test_columns_of_texts() -> None:
    options = {"vectorizer": None, "owner": "f"}
    assert check_text_column(("a", "b"), **options) == ["a", "b"]
    assert check_pair_columns([("a", "b")], **options) == (["a"], ["b"])
    missing = FakeVectorizer(missing="zero")
    assert check_text_column(["a", None], vectorizer=missing, owner="f") == ["a", None]
    with pytest.raises(ValueError, match="must have one text a row; got pairs"):
        check_text_column([("a", "b")], **options)
    with pytest.raises(ValueError, match=r"pairs of texts, such as \[\(text, text\)"):
        check_pair_columns(["a"], **options)
    with pytest.raises(ValueError, match="at least 2 texts; got 1"):
        check_text_column(["a"], min_rows=2, **options)
    with pytest.raises(TypeError, match="must hold texts, since it has a `vectorizer`"):
        check_text_column(np.ones((2, 2)), **options)
