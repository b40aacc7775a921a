"""ZeroShotClassifier."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_vectorizer import FakeVectorizer, TwoSidedVectorizer
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from topics import DESCRIPTIONS, LABELS, NEW, NEW_LABELS, NEW_VECTORS, TEXTS, WORDS

from skembed.estimators.zero_shot import ZeroShotClassifier


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
