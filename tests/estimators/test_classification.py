"""`EmbeddingClassifier` and `ZeroShotClassifier`, and the seam to vectorizers that they share."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fake_vectorizer import FakeVectorizer, TwoSidedVectorizer
from paths import ROOT
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from skembed import NVEmbedVectorizer
from skembed.estimators.base import make_vectorizer, trains_on_labels
from skembed.estimators.classification import DEFAULT_C, EmbeddingClassifier
from skembed.estimators.zero_shot import ZeroShotClassifier

WORDS = {
    "card": "card stolen lost blocked plastic pin".split(),
    "account": "account open close new savings joint".split(),
    "fee": "fee charge cost price expensive refund".split(),
}
COMMON = "the my a please is of to why".split()
DESCRIPTIONS = {label: " ".join(words) for label, words in WORDS.items()}


def make_data(n: int = 60, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts with three words of their class and two that say nothing."""
    rng = np.random.default_rng(seed)
    labels = [list(WORDS)[i % 3] for i in range(n)]
    texts = [" ".join([*rng.choice(WORDS[c], 3), *rng.choice(COMMON, 2)]) for c in labels]
    return texts, labels


TEXTS, LABELS = make_data()
NEW, NEW_LABELS = make_data(30, seed=1)
VECTORS, NEW_VECTORS = FakeVectorizer().transform(TEXTS), FakeVectorizer().transform(NEW)


@parametrize_with_checks(
    [EmbeddingClassifier(vectorizer=None), ZeroShotClassifier(vectorizer=None)]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


# EmbeddingClassifier


def test_texts_and_embeddings_give_the_same() -> None:
    on_texts = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS)
    on_vectors = EmbeddingClassifier(None).fit(VECTORS, LABELS)
    for method in ("predict", "predict_proba", "decision_function"):
        found = getattr(on_texts, method)(NEW)
        np.testing.assert_array_equal(found, getattr(on_vectors, method)(NEW_VECTORS))
    assert on_texts.score(NEW, NEW_LABELS) > 0.9
    assert on_texts.classes_.tolist() == ["account", "card", "fee"]
    assert on_texts.embedding_dim_ == on_vectors.n_features_in_ == 64
    assert not hasattr(on_texts, "n_features_in_")
    assert not hasattr(on_vectors, "vectorizer_")


def test_default_head_is_the_measured_one() -> None:
    head = LogisticRegression(C=DEFAULT_C, max_iter=1000).fit(VECTORS, LABELS)
    found = EmbeddingClassifier(None).fit(VECTORS, LABELS).predict_proba(NEW_VECTORS)
    np.testing.assert_array_equal(found, head.predict_proba(NEW_VECTORS))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-6)


def test_vectorizer_and_head_are_cloned() -> None:
    vectorizer, head = FakeVectorizer(), LogisticRegression()
    clf = EmbeddingClassifier(vectorizer, head=head).fit(TEXTS, LABELS)
    assert vars(vectorizer) == vars(FakeVectorizer())
    assert not hasattr(head, "coef_")
    assert clf.vectorizer_.n_fitted_ == len(TEXTS)
    assert clf.head_.coef_.shape == (3, 64)


def test_last_step_of_a_pipeline() -> None:
    pipe = make_pipeline(FakeVectorizer(), EmbeddingClassifier(None)).fit(TEXTS, LABELS)
    direct = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS)
    np.testing.assert_array_equal(pipe.predict_proba(NEW), direct.predict_proba(NEW))
    pipe = pipe.set_params(fakevectorizer__dim=32).fit(TEXTS, LABELS)
    assert pipe[-1].embedding_dim_ == 32


def test_cross_validation_and_grid_search() -> None:
    clf = EmbeddingClassifier(FakeVectorizer(), head=LogisticRegression())
    assert cross_val_score(clf, TEXTS, LABELS, cv=3).mean() > 0.9
    grid = {"vectorizer__dim": [8, 64], "head__C": [0.1, 10.0]}
    search = GridSearchCV(clf, grid, cv=3, error_score="raise").fit(TEXTS, LABELS)
    means = search.cv_results_["mean_test_score"]
    assert len(means) == 4
    assert len(set(means)) > 1, "the grid changes nothing"
    assert search.best_params_["vectorizer__dim"] == 64
    assert search.score(NEW, NEW_LABELS) > 0.9


def test_clone_and_pickle() -> None:
    clf = EmbeddingClassifier(FakeVectorizer(dim=32), head=LinearSVC()).fit(TEXTS, LABELS)
    twin = clone(clf)
    assert not hasattr(twin, "head_")
    assert twin.get_params()["vectorizer__dim"] == 32
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.decision_function(NEW), clf.decision_function(NEW))


def test_methods_are_those_of_the_head() -> None:
    svm = EmbeddingClassifier(FakeVectorizer(), head=LinearSVC())
    assert not hasattr(svm, "predict_proba")
    assert hasattr(svm.fit(TEXTS, LABELS), "decision_function")
    knn = EmbeddingClassifier(FakeVectorizer(), head=KNeighborsClassifier(3))
    assert hasattr(knn, "predict_proba")
    assert not hasattr(knn, "decision_function")


def test_several_labels_a_text() -> None:
    targets = np.array([[c == "card", c != "fee"] for c in LABELS], dtype=int)
    head = OneVsRestClassifier(LogisticRegression(C=10))
    clf = EmbeddingClassifier(FakeVectorizer(), head=head).fit(TEXTS, targets)
    found = clf.predict(NEW)
    assert found.shape == (30, 2)
    expected = [[c == "card", c != "fee"] for c in NEW_LABELS]
    assert (found == expected).mean() > 0.9
    assert clf.score(NEW, np.array(expected, dtype=int)) > 0.7


def test_sample_weight_reaches_the_head() -> None:
    keep = np.array([c != "fee" for c in LABELS], dtype=float)
    clf = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS, sample_weight=keep)
    assert "fee" not in clf.predict(NEW)
    with pytest.raises(TypeError, match=r"`sample_weight`.*KNeighborsClassifier takes none"):
        EmbeddingClassifier(FakeVectorizer(), head=KNeighborsClassifier(3)).fit(
            TEXTS, LABELS, sample_weight=keep
        )


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        np.array,
        lambda x: np.array(x, dtype=object)[:, None],
        pd.Series,
        lambda x: pd.Series(x, index=range(7, 7 + len(x))),
        lambda x: pd.DataFrame({"text": x}),
        pl.Series,
        lambda x: pl.DataFrame({"text": x}),
    ],
)
def test_containers_of_texts_and_labels(wrap: Any) -> None:
    expected = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS).predict_proba(NEW)
    y = wrap(LABELS) if getattr(wrap(LABELS), "ndim", 1) == 1 else LABELS
    y = LABELS if isinstance(y, pl.DataFrame) else y
    clf = EmbeddingClassifier(FakeVectorizer()).fit(wrap(TEXTS), y)
    np.testing.assert_array_equal(clf.predict_proba(wrap(NEW)), expected)


def test_refit_forgets_the_other_kind_of_input() -> None:
    clf = EmbeddingClassifier(None).fit(pd.DataFrame(VECTORS).add_prefix("x"), LABELS)
    assert clf.feature_names_in_[0] == "x0"
    clf.set_params(vectorizer=FakeVectorizer(dim=8)).fit(TEXTS, LABELS)
    assert not {"n_features_in_", "feature_names_in_"} & vars(clf).keys()
    assert clf.embedding_dim_ == 8
    clf.set_params(vectorizer=None).fit(VECTORS, LABELS)
    assert not hasattr(clf, "vectorizer_")


def test_missing_texts_by_the_rule_of_the_vectorizer() -> None:
    texts = [*TEXTS[:-1], None]
    with pytest.raises(ValueError, match=r"1 missing, the first at X\[59\]"):
        EmbeddingClassifier(FakeVectorizer()).fit(texts, LABELS)
    clf = EmbeddingClassifier(FakeVectorizer(missing="zero")).fit(texts, LABELS)
    assert clf.predict([None]).shape == (1,)
    with pytest.raises(ValueError, match=r"the vector of texts\[59\] is not finite"):
        EmbeddingClassifier(FakeVectorizer(missing="nan")).fit(texts, LABELS)


@pytest.mark.parametrize("X", ["a text", b"a text", {"a", "b"}, 3])
def test_what_is_no_list_of_texts(X: Any) -> None:
    with pytest.raises(TypeError, match="`X` parameter of `EmbeddingClassifier`"):
        EmbeddingClassifier(FakeVectorizer()).fit(X, ["a", "b"])


def test_the_other_kind_of_input_says_what_to_set() -> None:
    with pytest.raises(TypeError, match=r"must hold texts.*Set vectorizer=None"):
        EmbeddingClassifier(FakeVectorizer()).fit(VECTORS, LABELS)
    for texts in (TEXTS, np.array(TEXTS), pd.Series(TEXTS), pl.DataFrame({"t": TEXTS}), "a"):
        with pytest.raises(TypeError, match=r"embeddings.*got texts.*vectorizer='skembed-mini'"):
            EmbeddingClassifier(None).fit(texts, LABELS)
    clf = EmbeddingClassifier(None).fit(VECTORS, LABELS)
    with pytest.raises(TypeError, match="got texts"):
        clf.predict(NEW)
    with pytest.raises(ValueError, match="one text a row; got pairs"):
        EmbeddingClassifier(FakeVectorizer()).fit([(t, t) for t in TEXTS], LABELS)


def test_embeddings_out_of_order() -> None:
    broken = VECTORS.copy()
    broken[3, 5] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        EmbeddingClassifier(None).fit(broken, LABELS)
    clf = EmbeddingClassifier(None).fit(VECTORS, LABELS)
    with pytest.raises(ValueError, match="X has 32 features, but .* is expecting 64"):
        clf.predict(NEW_VECTORS[:, :32])
    with pytest.raises(ValueError, match="NaN"):
        clf.predict(broken)


def test_empty_input() -> None:
    with pytest.raises(ValueError, match="at least 1 text; got 0"):
        EmbeddingClassifier(FakeVectorizer()).fit([], [])
    clf = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="at least 1 text; got 0"):
        clf.predict([])


@pytest.mark.parametrize(
    ("y", "error", "match"),
    [
        (None, ValueError, "requires y"),
        (["a"] * 60, ValueError, "at least 2 classes; got 1 class: 'a'"),
        (LABELS[:-1], ValueError, "inconsistent numbers of samples"),
        ([*LABELS[:-2], None, None], ValueError, r"got 2, the first at y\[58\]"),
        ([1.0] * 59 + [np.nan], ValueError, r"got 1, the first at y\[59\]"),
        (pd.Series([*LABELS[:-1], pd.NA], dtype="string"), ValueError, r"got 1.*y\[59\]"),
        (np.array([*LABELS[:-1], 3], dtype=object), TypeError, "labels of one type"),
        (np.linspace(0, 1, 60), ValueError, "continuous"),
    ],
)
def test_labels_out_of_order(y: Any, error: type[Exception], match: str) -> None:
    before = FakeVectorizer.n_texts
    with pytest.raises(error, match=match):
        EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, y)
    assert FakeVectorizer.n_texts == before, "found only after embedding"


def test_labels_that_fit_did_not_see() -> None:
    clf = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match=r"labels that `fit` saw.*'account', 'card', 'fee'"):
        clf.score(NEW, [0, 1, 2] * 10)
    assert clf.score(NEW[:3], ["loan", *NEW_LABELS[1:3]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "head", [LogisticRegression, "logistic", LinearRegression(), KMeans(), FakeVectorizer()]
)
def test_what_is_no_head(head: Any) -> None:
    with pytest.raises(TypeError, match="`head` parameter of `EmbeddingClassifier`"):
        EmbeddingClassifier(FakeVectorizer(), head=head).fit(TEXTS, LABELS)


def test_unfitted() -> None:
    for clf in (EmbeddingClassifier(FakeVectorizer()), ZeroShotClassifier(FakeVectorizer())):
        for call in (clf.predict, clf.predict_proba, clf.decision_function):
            with pytest.raises(NotFittedError):
                call(NEW)
        with pytest.raises(NotFittedError):
            clf.score(NEW, NEW_LABELS)


# The seam


@pytest.mark.parametrize("vectorizer", [FakeVectorizer, 3, object(), LogisticRegression()])
def test_what_is_no_vectorizer(vectorizer: Any) -> None:
    with pytest.raises(TypeError, match=r"`vectorizer` parameter.*an object with `transform`"):
        EmbeddingClassifier(vectorizer).fit(TEXTS, LABELS)


def test_a_name_is_a_frozen_model() -> None:
    found = make_vectorizer("skembed-mini", owner="X")
    assert (type(found), found.model, found.trainer) == (NVEmbedVectorizer, "skembed-mini", None)
    assert not trains_on_labels(found)
    assert trains_on_labels(NVEmbedVectorizer())
    assert make_vectorizer(ROOT, owner="X").model == ROOT
    assert make_vectorizer(None, owner="X") is None


class Constant:
    """Not an estimator at all: transform returns what it was given."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def transform(self, X: Any) -> Any:
        return self.found


def test_transform_alone_is_enough() -> None:
    clf = EmbeddingClassifier(Constant(VECTORS)).fit(TEXTS, LABELS)
    expected = EmbeddingClassifier(None).fit(VECTORS, LABELS).predict(VECTORS)
    np.testing.assert_array_equal(clf.predict(TEXTS), expected)


@pytest.mark.parametrize(
    ("found", "error", "match"),
    [
        (VECTORS[:-1], ValueError, r"60 texts into an array of shape \(60, dim\).*\(59, 64\)"),
        (VECTORS[:, 0], ValueError, r"got shape \(60,\)"),
        (sparse.csr_matrix(VECTORS), TypeError, "dense array; got a sparse matrix"),
        (np.full((60, 4), np.inf), ValueError, r"texts\[0\] is not finite"),
    ],
)
def test_vectors_out_of_order(found: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EmbeddingClassifier(Constant(found)).fit(TEXTS, LABELS)


def test_another_width_after_fit() -> None:
    clf = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS)
    clf.vectorizer_.set_params(dim=8)
    with pytest.raises(ValueError, match=r"array of shape \(30, 64\); got shape \(30, 8\)"):
        clf.predict(NEW)


def test_sparse_vectorizers_say_how_to_reduce() -> None:
    with pytest.raises(TypeError, match="TruncatedSVD"):
        EmbeddingClassifier(TfidfVectorizer()).fit(TEXTS, LABELS)


def test_tags_follow_the_input() -> None:
    with_texts = EmbeddingClassifier(FakeVectorizer()).__sklearn_tags__().input_tags
    with_vectors = EmbeddingClassifier(None).__sklearn_tags__().input_tags
    assert (with_texts.string, with_texts.two_d_array) == (True, False)
    assert (with_vectors.string, with_vectors.two_d_array) == (False, True)


# ZeroShotClassifier


def test_descriptions_alone_classify() -> None:
    clf = ZeroShotClassifier(FakeVectorizer()).fit(DESCRIPTIONS)
    assert clf.classes_.tolist() == ["account", "card", "fee"]
    assert clf.score(NEW, NEW_LABELS) > 0.9
    np.testing.assert_allclose(np.linalg.norm(clf.prototypes_, axis=1), 1.0)
    cosines = clf.decision_function(NEW)
    vectors = FakeVectorizer().transform([DESCRIPTIONS[c] for c in clf.classes_])
    np.testing.assert_allclose(cosines, NEW_VECTORS @ vectors.T, atol=1e-6)
    proba = clf.predict_proba(NEW)
    powers = np.exp(cosines / 0.05)
    np.testing.assert_allclose(proba, powers / powers.sum(axis=1, keepdims=True), rtol=1e-9)


def test_ways_to_give_descriptions() -> None:
    expected = ZeroShotClassifier(FakeVectorizer()).fit(DESCRIPTIONS).prototypes_
    ways = [
        ({label: [text] for label, text in DESCRIPTIONS.items()}, None),
        (list(DESCRIPTIONS.values()), list(DESCRIPTIONS)),
        (pd.Series(DESCRIPTIONS), list(DESCRIPTIONS)),
    ]
    for X, y in ways:
        found = ZeroShotClassifier(FakeVectorizer()).fit(X, y)
        np.testing.assert_array_equal(found.prototypes_, expected)
    vectors = FakeVectorizer().transform(list(DESCRIPTIONS.values()))
    for X, y in (
        (vectors, list(DESCRIPTIONS)),
        (dict(zip(DESCRIPTIONS, vectors, strict=True)), None),
        ({label: vectors[[i]] for i, label in enumerate(DESCRIPTIONS)}, None),
    ):
        found = ZeroShotClassifier(None).fit(X, y)
        np.testing.assert_allclose(found.prototypes_, expected, atol=1e-7)
    names = ZeroShotClassifier(FakeVectorizer()).fit(["card lost", "open account"])
    assert names.predict(["lost"]).tolist() == ["card lost"]


def test_many_labels_with_one_description_each() -> None:
    # scikit-learn takes so many different labels for numbers to predict, and warns: an error here.
    described = {f"label {i}": f"word{i}" for i in range(40)}
    clf = ZeroShotClassifier(FakeVectorizer()).fit(described)
    assert clf.predict(["word7"]).tolist() == ["label 7"]


def test_several_descriptions_are_averaged_by_direction() -> None:
    one, two = FakeVectorizer().transform(["card lost", "plastic"])
    clf = ZeroShotClassifier(FakeVectorizer())
    clf.fit({"card": ["card lost", "plastic"], "account": "open account"})
    expected = (one + two) / np.linalg.norm(one + two)
    np.testing.assert_allclose(clf.prototypes_[1], expected, atol=1e-6)


def test_examples_move_the_prototypes() -> None:
    texts, labels = ["pin pin", "savings"], ["card", "account"]
    described, pin = FakeVectorizer().transform([DESCRIPTIONS["card"], "pin"]).astype(float)
    clf = ZeroShotClassifier(FakeVectorizer(), descriptions=DESCRIPTIONS, description_weight=2.0)
    plain = clone(clf).fit()
    moved = clone(clf).fit(texts, labels)
    expected = 2 * described + pin
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(moved.prototypes_[1], expected, atol=1e-6)
    np.testing.assert_allclose(moved.prototypes_[2], plain.prototypes_[2], atol=1e-12)
    assert np.abs(moved.prototypes_[0] - plain.prototypes_[0]).max() > 0.01
    ignored = clone(clf).set_params(description_weight=float("inf")).fit(texts, labels)
    np.testing.assert_array_equal(ignored.prototypes_, plain.prototypes_)
    np.testing.assert_array_equal(clone(clf).fit(texts).prototypes_, plain.prototypes_)


def test_zero_shot_is_cross_validated_and_searched() -> None:
    bad = {label: "the a of" for label in WORDS}
    clf = ZeroShotClassifier(FakeVectorizer(), descriptions=DESCRIPTIONS)
    assert cross_val_score(clf, TEXTS, LABELS, cv=3).mean() > 0.9
    grid = {
        "descriptions": [bad, DESCRIPTIONS],
        "vectorizer__dim": [4, 64],
        "description_weight": [float("inf")],
    }
    search = GridSearchCV(clf, grid, cv=3, error_score="raise").fit(TEXTS, LABELS)
    assert search.best_params_["descriptions"] == DESCRIPTIONS
    assert search.best_params_["vectorizer__dim"] == 64
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(NEW), search.predict(NEW))


def test_zero_shot_in_a_pipeline() -> None:
    vectors = dict(
        zip(DESCRIPTIONS, FakeVectorizer().transform(list(DESCRIPTIONS.values())), strict=True)
    )
    step = ZeroShotClassifier(None, descriptions=vectors)
    pipe = make_pipeline(FakeVectorizer(), step).fit(TEXTS, LABELS)
    direct = ZeroShotClassifier(FakeVectorizer(), descriptions=DESCRIPTIONS).fit(TEXTS, LABELS)
    np.testing.assert_allclose(pipe.predict_proba(NEW), direct.predict_proba(NEW), atol=1e-5)


def test_labels_have_an_instruction_of_their_own() -> None:
    clf = ZeroShotClassifier(TwoSidedVectorizer(), label_instruction="topic")
    found = clf.fit(DESCRIPTIONS).prototypes_
    fronted = {label: f"topic {text}" for label, text in DESCRIPTIONS.items()}
    expected = ZeroShotClassifier(FakeVectorizer()).fit(fronted).prototypes_
    np.testing.assert_array_equal(found, expected)
    assert clf.vectorizer.document_instruction is None
    with pytest.raises(ValueError, match=r"`label_instruction`.*FakeVectorizer has none"):
        ZeroShotClassifier(FakeVectorizer(), label_instruction="topic").fit(DESCRIPTIONS)


@pytest.mark.parametrize(
    ("parameters", "X", "y", "error", "match"),
    [
        ({}, None, None, ValueError, "needs descriptions"),
        ({}, "sport", None, TypeError, "bare str"),
        ({}, {"card": "a"}, None, ValueError, "at least 2 classes; got 1 class"),
        ({}, {}, None, ValueError, "at least 1 text; got 0"),
        ({}, {"card": "a", "fee": []}, None, TypeError, "that of 'fee' is an empty list"),
        ({}, {"card": "a", "fee": 3}, None, TypeError, "that of 'fee' is int"),
        ({}, DESCRIPTIONS, ["a"] * 3, ValueError, "`descriptions`"),
        ({"descriptions": DESCRIPTIONS}, TEXTS, LABELS[1:], ValueError, "inconsistent"),
        (
            {"descriptions": DESCRIPTIONS},
            TEXTS[:2],
            ["card", "loan"],
            ValueError,
            r"have a description.*the first at y\[1\]: 'loan'",
        ),
        ({"temperature": 0}, DESCRIPTIONS, None, ValueError, "`temperature`"),
        ({"description_weight": -1.0}, DESCRIPTIONS, None, ValueError, "`description_weight`"),
        ({"label_instruction": 3}, DESCRIPTIONS, None, TypeError, "`label_instruction`"),
    ],
)
def test_descriptions_out_of_order(
    parameters: dict[str, Any], X: Any, y: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ZeroShotClassifier(FakeVectorizer(), **parameters).fit(X, y)


def test_zero_shot_scores_only_known_labels() -> None:
    clf = ZeroShotClassifier(FakeVectorizer()).fit(DESCRIPTIONS)
    with pytest.raises(ValueError, match="labels that `fit` saw"):
        clf.score(NEW, [0, 1, 2] * 10)


# The bundled model


def test_bundled_model_by_default() -> None:
    texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
    labels = ["card", "card", "account", "account"]
    clf = EmbeddingClassifier().fit(texts, labels)
    pipe = make_pipeline(NVEmbedVectorizer(), EmbeddingClassifier(None)).fit(texts, labels)
    new = ["I lost my card", "opening accounts"]
    assert clf.predict(new).tolist() == ["card", "account"]
    np.testing.assert_allclose(pipe.predict_proba(new), clf.predict_proba(new), atol=1e-6)
    assert len(pickle.dumps(clf)) < 100_000, "weights are in the pickle"


def test_bundled_model_sees_the_label_instruction() -> None:
    plain = ZeroShotClassifier().fit(DESCRIPTIONS)
    other = ZeroShotClassifier(label_instruction="Find the topic").fit(DESCRIPTIONS)
    assert np.abs(plain.prototypes_ - other.prototypes_).max() > 1e-3
    assert other.vectorizer_.document_instruction == "Find the topic"
