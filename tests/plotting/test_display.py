"""Maps from estimators."""

import copy
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import FakeVectorizer
from maps import MONEY, TEXTS, face_colors
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skembed.estimators.classification import EmbeddingClassifier
from skembed.estimators.clustering import EmbeddingClusterer
from skembed.estimators.zero_shot import ZeroShotClassifier
from skembed.plotting.display import EmbeddingMapDisplay
from skembed.plotting.drawing import list_legend
from skembed.plotting.groups import (
    PALETTE,
)
from skembed.plotting.projection import read_hover_texts

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")
LABELS = ["animals"] * 6 + ["money"] * 6


def fitted(estimator: Any, y: Any = LABELS) -> Any:
    estimator = estimator.fit(TEXTS, y)
    FakeVectorizer.n_texts = 0
    return estimator


def make_map(estimator: Any, X: Any = TEXTS, y: Any = None, **options: Any) -> EmbeddingMapDisplay:
    return EmbeddingMapDisplay.from_estimator(estimator, X, y, reducer="pca", **options)


def clf_pipeline() -> Pipeline:
    return make_pipeline(FakeVectorizer(), StandardScaler(), LogisticRegression())


PREDICTORS = {
    "classifier": lambda: EmbeddingClassifier(FakeVectorizer()),
    "zero-shot": lambda: ZeroShotClassifier(
        FakeVectorizer(), descriptions={"animals": "cat dog horse", "money": "bank loan interest"}
    ),
    "pipeline": clf_pipeline,
    "pipeline of embeddings": lambda: make_pipeline(
        FakeVectorizer(), EmbeddingClassifier(vectorizer=None)
    ),
    "pipeline of a classifier of texts": lambda: make_pipeline(
        FunctionTransformer(lambda X: [text.upper() for text in X]),
        EmbeddingClassifier(FakeVectorizer()),
    ),
    "search": lambda: GridSearchCV(clf_pipeline(), {"logisticregression__C": [1.0]}, cv=2),
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictions_color_and_texts_are_embedded_once(kind: str) -> None:
    estimator = fitted(PREDICTORS[kind]())
    before = copy.deepcopy(vars(estimator)).keys()
    display = make_map(estimator)
    assert FakeVectorizer.n_texts == len(TEXTS)
    assert np.asarray(display.y).tolist() == estimator.predict(TEXTS).tolist() == LABELS
    assert display.texts == TEXTS
    assert vars(estimator).keys() == before
    assert np.ptp(display.coordinates, axis=0).min() > 0
    # New texts take the same way.
    placed = display.place(TEXTS[:3])
    np.testing.assert_allclose(placed, display.coordinates[:3], atol=1e-5)


def test_labels_win_over_predictions() -> None:
    estimator = fitted(EmbeddingClassifier(FakeVectorizer()))
    display = make_map(estimator, y=np.arange(12) % 3)
    assert [name for name, *_ in list_legend(display._read()[1])] == ["0 (4)", "1 (4)", "2 (4)"]


def test_classes_fix_the_colors_where_one_is_not_predicted() -> None:
    estimator = fitted(EmbeddingClassifier(FakeVectorizer()))
    display = make_map(estimator, MONEY)
    assert set(display.y) == {"money"}
    assert face_colors(display) == {PALETTE[1]}


@pytest.mark.parametrize(
    "vectorizer", [FakeVectorizer(), Pipeline([("emb", FakeVectorizer()), ("all", "passthrough")])]
)
def test_vectorizer_alone(vectorizer: Any) -> None:
    FakeVectorizer.n_texts = 0
    display = make_map(vectorizer)
    assert FakeVectorizer.n_texts == len(TEXTS)
    assert display.y is None and display.place(MONEY).shape == (6, 2)


def test_regressor_gives_a_scale() -> None:
    estimator = make_pipeline(FakeVectorizer(), Ridge()).fit(TEXTS, np.arange(12.0))
    assert make_map(estimator).colorbar_ is not None


def test_clusterer_shows_its_labels_for_the_texts_of_fit() -> None:
    found = fitted(EmbeddingClusterer(FakeVectorizer(), n_clusters=2, random_state=0), None)
    # No nearest centre would say this, so the labels must come from `labels_`.
    found.labels_ = np.where(np.arange(12) == 11, -1, found.labels_)
    display = make_map(found)
    assert np.array_equal(display.y, found.labels_)
    assert {note.get_text() for note in display.annotations_} <= set(found.cluster_names_.values())
    assert [text.get_text() for text in display.legend_.get_texts()][-1] == "noise (1)"
    # Other texts, or the same in another order, are predicted.
    assert np.array_equal(make_map(found, TEXTS[::-1]).y, found.predict(TEXTS[::-1]))
    assert np.array_equal(make_map(found, TEXTS[:10]).y, found.predict(TEXTS[:10]))
    # Labels of one's own are not clusters, so they get no cluster's name.
    assert make_map(found, y=np.arange(12) % 2).names is None
    assert make_map(found, y=found.labels_).names == found.cluster_names_


def test_clusterer_without_predict_shows_the_texts_of_fit() -> None:
    found = make_pipeline(FakeVectorizer(), AgglomerativeClustering(2)).fit(TEXTS)
    assert np.array_equal(make_map(found).y, found[-1].labels_)
    with pytest.raises(ValueError, match=r"only the 12 texts that it was fitted on; got 6. Pass y"):
        make_map(found, MONEY)
    assert make_map(found, MONEY, y=["a"] * 6).y == ["a"] * 6


def test_estimator_of_embeddings() -> None:
    vectors = FakeVectorizer().transform(TEXTS)
    estimator = KMeans(2, random_state=0, n_init=1).fit(vectors)
    display = make_map(estimator, vectors)
    assert np.array_equal(display.y, estimator.labels_)
    assert display.texts is None and display.vectorizer_ is None
    assert display.place(vectors[:2]).shape == (2, 2)


def test_frames_go_into_a_pipeline_as_they_are() -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": TEXTS, "year": np.arange(12)})
    pick = FunctionTransformer(lambda X: X["text"].tolist())
    display = make_map(make_pipeline(pick, FakeVectorizer()), frame)
    assert display.texts is None and display.coordinates.shape == (12, 2)


def test_missing_texts_follow_the_vectorizer() -> None:
    texts = [*TEXTS, None]
    display = make_map(FakeVectorizer(missing="zero"), texts)
    assert display.texts == [*TEXTS, ""]
    with pytest.raises(ValueError, match=r"no missing texts.*X\[12\]"):
        make_map(FakeVectorizer(), texts)


@pytest.mark.parametrize(
    ("estimator", "X", "error", "message"),
    [
        (EmbeddingClassifier(FakeVectorizer()), TEXTS, NotFittedError, "not fitted"),
        (
            object(),
            TEXTS,
            TypeError,
            "`estimator` parameter of `EmbeddingMapDisplay`.*got an object of type object",
        ),
        (FakeVectorizer, TEXTS, TypeError, "`estimator` parameter"),
        (FakeVectorizer(), "a text", TypeError, "bare str"),
        (FakeVectorizer(), [("a", "b")], ValueError, "got pairs"),
        (FakeVectorizer(), np.eye(3), TypeError, "must hold texts"),
    ],
)
def test_bad_estimators(estimator: Any, X: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_map(estimator, X)


def test_place_refuses_what_the_map_does_not_know() -> None:
    display = make_map(FakeVectorizer())
    with pytest.raises(ValueError, match=r"shape \(n_texts, 64\); got shape \(2, 3\)"):
        display.place(np.ones((2, 3)))
    with pytest.raises(TypeError, match="bare str"):
        display.place("a text")
    vectors = FakeVectorizer().transform(TEXTS)
    with pytest.raises(TypeError, match="array of numbers"):
        EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca").place(TEXTS)


def test_hover_texts_are_one_column() -> None:
    assert read_hover_texts(np.array(["a", "b"])) == ["a", "b"]
    assert read_hover_texts([("a", "b")]) is None
    assert read_hover_texts(np.eye(2)) is None
