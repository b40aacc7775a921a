"""`SimilarityRegressor`: cosines, their calibration, and pairs of all shapes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fake_vectorizer import FakeVectorizer, TwoSidedVectorizer
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.estimators import sts
from skembed.estimators.sts import SimilarityRegressor
from skembed.exceptions import SkembedWarning
from skembed.similarity import paired_cosine

WORDS = np.array("card account fee bank open lost new old cheap fast slow red green".split())


def make_pairs(n: int = 60, seed: int = 0) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Pairs that share 0 to 5 of 5 words, and that number with some noise, from 1 to 11."""
    rng = np.random.default_rng(seed)
    pairs, shared = [], []
    for i in range(n):
        words = rng.permutation(WORDS)
        k = i % 6
        pairs.append((" ".join(words[:5]), " ".join([*words[:k], *words[5 : 10 - k]])))
        shared.append(k)
    return pairs, 1 + 2 * np.array(shared) + rng.uniform(-0.5, 0.5, n)


PAIRS, SCORES = make_pairs()
NEW, NEW_SCORES = make_pairs(30, seed=1)
LEFT, RIGHT = (FakeVectorizer().transform([pair[i] for pair in NEW]) for i in (0, 1))
COSINES = paired_cosine(LEFT, RIGHT)

# The targets of scikit-learn's checks are drawn at random and need not rise with the cosines. Goes
# when it generates pairs.
ignore_flat = pytest.mark.filterwarnings("ignore:Cosines do not rise:skembed.SkembedWarning")

# An odd number of columns cannot be the embeddings of two texts; these checks of scikit-learn
# bring 3 or 5 columns.
ODD_COLUMNS = {
    name: "embeddings of pairs have an even number of columns; the check brings an odd one"
    for name in (
        "check_dict_unchanged",
        "check_dont_overwrite_parameters",
        "check_estimators_dtypes",
        "check_estimators_nan_inf",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_fit2d_predict1d",
        "check_fit_score_takes_y",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_pipeline_consistency",
        "check_supervised_y_2d",
    )
}


@ignore_flat
@parametrize_with_checks(
    [SimilarityRegressor(vectorizer=None)], expected_failed_checks=lambda estimator: ODD_COLUMNS
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def check_name(check: Any) -> str:
    return getattr(check, "func", check).__name__


@ignore_flat
@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_scikit_learn_checks_but_for_the_columns(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a column of zeros beside an odd number of them, the same checks pass."""
    split = sts._split_cosines

    def split_padded(vectors: np.ndarray) -> np.ndarray:
        return split(np.pad(vectors, ((0, 0), (0, vectors.shape[1] % 2))))

    monkeypatch.setattr(sts, "_split_cosines", split_padded)
    monkeypatch.setattr(sts, "_check_even", lambda n_columns, owner: None)
    checks = [
        (estimator, check)
        for estimator, check in estimator_checks_generator(SimilarityRegressor(vectorizer=None))
        if check_name(check) == name
    ]
    assert checks
    for estimator, check in checks:
        check(estimator)


# Values


@pytest.mark.parametrize("calibration", ["logistic", "isotonic", None])
def test_without_scores_it_is_the_cosine(calibration: str | None) -> None:
    reg = SimilarityRegressor(FakeVectorizer(), calibration=calibration).fit(PAIRS)
    np.testing.assert_allclose(reg.predict(NEW), COSINES, atol=1e-6)
    assert reg.calibration_ is None
    again = SimilarityRegressor(FakeVectorizer(), calibration=None).fit(PAIRS, SCORES)
    np.testing.assert_array_equal(again.predict(NEW), reg.predict(NEW))
    assert reg.score(NEW, NEW_SCORES) == spearmanr(reg.predict(NEW), NEW_SCORES).statistic


@pytest.mark.parametrize("calibration", ["logistic", "isotonic"])
def test_predictions_are_on_the_scale_of_y(calibration: str) -> None:
    reg = SimilarityRegressor(FakeVectorizer(), calibration=calibration).fit(PAIRS, SCORES)
    found = reg.predict(NEW)
    assert found.dtype == np.float64
    assert SCORES.min() <= found.min() < found.max() <= SCORES.max()
    errors = found - NEW_SCORES
    assert np.sqrt(np.mean(errors**2)) < 0.5 * NEW_SCORES.std()
    assert abs(errors.mean()) < 0.3
    assert (np.diff(found[np.argsort(reg._compute_cosines(NEW))]) >= 0).all()


def test_logistic_keeps_the_order_and_the_spearman_of_cosines() -> None:
    plain = SimilarityRegressor(FakeVectorizer()).fit(PAIRS)
    curved = SimilarityRegressor(FakeVectorizer()).fit(PAIRS, SCORES)
    # Cosines of 1 differ in their last bit on some processors, and the curve joins them.
    apart = np.flatnonzero(COSINES < 1 - 1e-6)
    new, scores = [NEW[row] for row in apart], NEW_SCORES[apart]
    assert curved.score(new, scores) == plain.score(new, scores)


def test_logistic_finds_the_curve_behind_the_scores() -> None:
    # The ends of the scale are the lowest and highest score seen: give it both.
    cosines = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 300), [-50.0, 50.0]])
    scores = 5 / (1 + np.exp(-(4 * cosines - 1)))
    curve = sts._LogisticCurve().fit(cosines, scores)
    np.testing.assert_allclose([curve.slope, curve.offset], [4.0, -1.0], rtol=1e-3)
    np.testing.assert_allclose(curve.predict(cosines), scores, atol=1e-3)


def test_isotonic_is_that_of_scikit_learn() -> None:
    reg = SimilarityRegressor(FakeVectorizer(), calibration="isotonic").fit(PAIRS, SCORES)
    plain = SimilarityRegressor(FakeVectorizer()).fit(PAIRS)
    curve = IsotonicRegression(out_of_bounds="clip").fit(plain.predict(PAIRS), SCORES)
    np.testing.assert_allclose(reg.predict(NEW), curve.predict(plain.predict(NEW)))


def test_sides_of_a_pair_are_query_and_document() -> None:
    reg = SimilarityRegressor(TwoSidedVectorizer(document_instruction="the")).fit(PAIRS)
    fronted = FakeVectorizer().transform([f"the {right}" for _, right in NEW])
    np.testing.assert_allclose(reg.predict(NEW), paired_cosine(LEFT, fronted), atol=1e-6)


def test_scores_fell_where_they_should_rise() -> None:
    for calibration in ("logistic", "isotonic"):
        reg = SimilarityRegressor(FakeVectorizer(), calibration=calibration)
        with pytest.warns(SkembedWarning, match="Cosines do not rise with the scores"):
            reg.fit(PAIRS, -SCORES)
        assert np.ptp(reg.predict(NEW)) < 0.02 * np.ptp(SCORES)


def test_equal_scores_predict_that_score() -> None:
    reg = SimilarityRegressor(FakeVectorizer()).fit(PAIRS, [3] * len(PAIRS))
    np.testing.assert_array_equal(reg.predict(NEW), 3.0)
    assert reg.score(NEW, NEW_SCORES) == 0.0


# scikit-learn


def test_texts_pipeline_and_embeddings_give_the_same() -> None:
    direct = SimilarityRegressor(FakeVectorizer()).fit(PAIRS, SCORES)
    both = [FakeVectorizer().transform([pair[i] for pair in PAIRS]) for i in (0, 1)]
    on_vectors = SimilarityRegressor(None).fit(np.hstack(both), SCORES)
    expected = direct.predict(NEW)
    np.testing.assert_allclose(on_vectors.predict(np.hstack([LEFT, RIGHT])), expected)
    assert (on_vectors.n_features_in_, on_vectors.embedding_dim_) == (128, 64)
    assert direct.embedding_dim_ == 64


def test_cross_validation_and_grid_search() -> None:
    reg = SimilarityRegressor(FakeVectorizer())
    assert cross_val_score(reg, PAIRS, SCORES, cv=3).mean() > 0.9
    grid = {"vectorizer__dim": [2, 64], "calibration": ["logistic", "isotonic"]}
    search = GridSearchCV(reg, grid, cv=3, error_score="raise").fit(PAIRS, SCORES)
    assert search.best_params_["vectorizer__dim"] == 64
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(NEW), search.predict(NEW))
    assert not hasattr(clone(again), "calibration_")


@pytest.mark.parametrize(
    "wrap",
    [
        tuple,
        lambda x: [list(pair) for pair in x],
        np.array,
        lambda x: np.array(x, dtype=object),
        lambda x: pd.DataFrame(x, columns=["a", "b"], index=range(5, 5 + len(x))),
        lambda x: pl.DataFrame(x, schema=["a", "b"], orient="row"),
    ],
)
def test_containers_of_pairs(wrap: Any) -> None:
    expected = SimilarityRegressor(FakeVectorizer()).fit(PAIRS, SCORES).predict(NEW)
    reg = SimilarityRegressor(FakeVectorizer()).fit(wrap(PAIRS), SCORES)
    np.testing.assert_array_equal(reg.predict(wrap(NEW)), expected)


# Bad input


@pytest.mark.parametrize(
    ("X", "y", "error", "match"),
    [
        ("a text", None, TypeError, "bare str"),
        (["a", "b"], None, ValueError, "must hold pairs of texts.*got one text a row"),
        ([("a", "b", "c")], None, ValueError, "must hold pairs of texts.*got 3 texts a row"),
        ([("a", None)], None, ValueError, r"1 missing, the first at X\[0\]\[1\]"),
        ([], None, ValueError, "at least 1 text; got 0"),
        (np.eye(4), None, TypeError, "Set vectorizer=None"),
        (PAIRS, SCORES[1:], ValueError, "inconsistent"),
        (PAIRS, [*SCORES[1:], np.nan], ValueError, r"no missing numbers.*y\[59\]"),
        (PAIRS, ["a"] * 60, TypeError, r"must hold numbers; y\[0\] is a str"),
    ],
)
def test_pairs_out_of_order(X: Any, y: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SimilarityRegressor(FakeVectorizer()).fit(X, y)


def test_embeddings_out_of_order() -> None:
    reg = SimilarityRegressor(None)
    with pytest.raises(TypeError, match="got texts"):
        reg.fit(PAIRS)
    with pytest.raises(ValueError, match="even number of columns.*n_features = 63"):
        reg.fit(LEFT[:, :63])
    broken = np.hstack([LEFT, RIGHT])
    broken[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        reg.fit(broken)
    reg.fit(np.hstack([LEFT, RIGHT]))
    with pytest.raises(ValueError, match="X has 64 features, but .* is expecting 128"):
        reg.predict(LEFT)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"calibration": "linear"}, "`calibration` parameter"),
        ({"calibration_fraction": 1}, "`calibration_fraction` parameter"),
    ],
)
def test_parameters_out_of_range(parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SimilarityRegressor(FakeVectorizer(), **parameters).fit(PAIRS, SCORES)


def test_unfitted_and_misused() -> None:
    reg = SimilarityRegressor(FakeVectorizer())
    with pytest.raises(NotFittedError):
        reg.predict(NEW)
    reg.fit(PAIRS)
    with pytest.raises(ValueError, match="requires y"):
        reg.score(NEW, None)
    with pytest.raises(ValueError, match="`sample_weight`"):
        reg.score(NEW, NEW_SCORES, sample_weight=NEW_SCORES)


# A model


TINY = {"device": "cpu", "dtype": "float32", "cache": None}


@pytest.fixture
def golden(golden_dir: Path) -> Path:
    return golden_dir


def test_model_in_a_pipeline_gives_the_same(golden: Path) -> None:
    emb = NVEmbedVectorizer(golden, trainer=None, instruction="STS", **TINY)
    pipe = make_pipeline(emb, SimilarityRegressor(None)).fit(PAIRS, SCORES)
    direct = SimilarityRegressor(emb).fit(PAIRS, SCORES)
    np.testing.assert_allclose(pipe.predict(NEW), direct.predict(NEW), atol=1e-4)


def test_names_are_frozen_models() -> None:
    reg = SimilarityRegressor().fit(PAIRS, SCORES)
    assert not hasattr(reg.vectorizer_, "adapter_")
    assert reg.score(NEW, NEW_SCORES) > 0.5
    assert len(pickle.dumps(reg)) < 100_000, "weights are in the pickle"


def test_training_leaves_pairs_for_the_calibration(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    emb = NVEmbedVectorizer(golden, trainer=trainer, **TINY)
    trained, calibrated = [], []
    fit, curve_fit = NVEmbedVectorizer.fit, sts._LogisticCurve.fit

    def spy_fit(self: Any, X: Any, y: Any = None) -> Any:
        trained.extend(X)
        return fit(self, X, y)

    def spy_curve(self: Any, cosines: np.ndarray, scores: np.ndarray) -> Any:
        calibrated.extend(scores)
        return curve_fit(self, cosines, scores)

    monkeypatch.setattr(NVEmbedVectorizer, "fit", spy_fit)
    monkeypatch.setattr(sts._LogisticCurve, "fit", spy_curve)
    reg = SimilarityRegressor(emb, random_state=0).fit(PAIRS, SCORES)
    assert hasattr(reg.vectorizer_, "adapter_")
    assert (len(trained), len(calibrated)) == (48, 12)
    scores_of = dict(zip(PAIRS, SCORES, strict=True))
    assert not {scores_of[pair] for pair in trained} & set(calibrated)
    assert not hasattr(emb, "adapter_")


def test_pairs_without_scores_train_nothing(golden: Path) -> None:
    reg = SimilarityRegressor(NVEmbedVectorizer(golden, **TINY)).fit(PAIRS)
    assert not hasattr(reg.vectorizer_, "adapter_")
