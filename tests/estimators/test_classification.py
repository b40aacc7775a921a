"""EmbeddingClassifier and the seam to the vectorizer."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fake_vectorizer import FakeVectorizer
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
from topics import DESCRIPTIONS, LABELS, NEW, NEW_LABELS, NEW_VECTORS, TEXTS, VECTORS

from skembed import NVEmbedVectorizer
from skembed.estimators.base import make_vectorizer, trains_on_labels
from skembed.estimators.classification import DEFAULT_C, EmbeddingClassifier
from skembed.estimators.zero_shot import ZeroShotClassifier
from skembed.exceptions import SkembedWarning


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


@pytest.mark.parametrize(
    "weight",
    [-1.0, 0.0, np.nan, np.inf, "1", None],
    ids=["below", "zeros", "nan", "inf", "str", "None"],
)
def test_weights_that_are_none_are_an_error(weight: Any) -> None:
    weights = [weight] * len(TEXTS)
    with pytest.raises((TypeError, ValueError), match="`sample_weight` .*Classifier.fit` must"):
        EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS, sample_weight=weights)
    for fitted in (
        EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS),
        ZeroShotClassifier(FakeVectorizer()).fit(DESCRIPTIONS),
    ):
        with pytest.raises((TypeError, ValueError), match="`sample_weight` .*score` must"):
            fitted.score(TEXTS, LABELS, sample_weight=weights)


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
    with pytest.warns(SkembedWarning, match="learned no instructions"):
        other = ZeroShotClassifier(label_instruction="Find the topic").fit(DESCRIPTIONS)
    assert np.abs(plain.prototypes_ - other.prototypes_).max() > 1e-3
    assert other.vectorizer_.document_instruction == "Find the topic"
