"""`SimilarityRegressor`: how alike two texts are, on the scale of the user's scores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_consistent_length

from skembed._inputs import read_numbers
from skembed._validation import check_choice, check_real, check_seed
from skembed.embedding import check_pair_columns, embed_pairs
from skembed.estimators.base import (
    TextEstimatorMixin,
    check_embeddings,
    check_encoder,
    fit_vectorizer,
    make_vectorizer,
    trains_on_labels,
)
from skembed.exceptions import SkembedWarning
from skembed.similarity import Floats

__all__ = ["SimilarityRegressor"]

_Texts = list[str | None]


class SimilarityRegressor(TextEstimatorMixin, RegressorMixin, BaseEstimator):
    r"""Similarity of pairs of texts: the cosine of their embeddings, calibrated to given scores.

    Fitted without scores it gives the cosine itself. Fitted with scores it maps the cosine to
    their scale by a curve that only rises.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of the texts; `fit` uses a clone. A name or path is a frozen model of
        `NVEmbedVectorizer`. An instance that trains (its `trainer` is "auto" or a
        ContrastiveTrainer) is tuned on pairs with scores, as in a Pipeline; pass
        ``trainer=None`` to keep it frozen. An encoder (an object with ``encode``, such as a
        SentenceTransformer, or a callable) is used as it is. None: X holds embeddings of pairs side
        by side.
    calibration : {"logistic", "isotonic", None}, default="logistic"
        The curve from cosine to score. "logistic" has two parameters and keeps the order of the
        cosines; "isotonic" is a step function, which follows the scores more closely where there
        are thousands, and makes ties; None predicts the cosine and learns nothing of y.
    calibration_fraction : float, default=0.2
        Share of the pairs that a vectorizer which trains does not see, so that the curve is
        fitted on pairs whose cosines are those of new ones. Without effect on frozen models.
    random_state : int, RandomState instance or None, default=None
        Seed of that split.

    Attributes
    ----------
    calibration_ : object or None
        The fitted curve, with ``predict(cosines)``; None where `fit` saw no scores.
    vectorizer_ : transformer
        The fitted vectorizer; absent where ``vectorizer=None``.
    embedding_dim_ : int
        Width of the embedding of one text.
    n_features_in_ : int
        Columns of X, twice as many, where ``vectorizer=None``.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Column names, where embeddings came as a frame with names.

    See Also
    --------
    NVEmbedVectorizer : Trains on pairs with graded scores.

    Notes
    -----
    With lowest and highest score l and h of the fit, the logistic curve is

    .. math:: \hat y = l + (h - l) \, \sigma(a \cos(u, v) + b), \quad a > 0,

    fitted by least squares. How the two curves compare, by number of pairs, is measured in
    `benchmarks/sts_calibration.py`.

    The first text of a pair is embedded as a query, the second as a document, each with its
    instruction; the task name "STS" has one for both.

    Examples
    --------
    >>> from skembed import SimilarityRegressor
    >>> pairs = [("a cat sleeps", "a cat is asleep"), ("a cat sleeps", "the stock market fell")]
    >>> sts = SimilarityRegressor().fit(pairs)  # no scores: cosines
    >>> alike, unlike = sts.predict(pairs)
    >>> bool(alike > unlike)
    True
    """

    _fitted_mark = "calibration_"
    _rules = {
        "vectorizer": check_encoder,
        "calibration": partial(check_choice, allowed=("logistic", "isotonic", None)),
        "calibration_fraction": partial(check_real, low=0, high=1, inclusive="neither"),
        "random_state": check_seed,
    }

    def __init__(
        self,
        vectorizer: Any = "skembed-mini",
        *,
        calibration: str | None = "logistic",
        calibration_fraction: float = 0.2,
        random_state: Any = None,
    ) -> None:
        self.vectorizer = vectorizer
        self.calibration = calibration
        self.calibration_fraction = calibration_fraction
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> SimilarityRegressor:
        """Fit the curve from cosine to score; without scores, only look at the pairs.

        Parameters
        ----------
        X : list of 2-tuples, ndarray of shape (n_pairs, 2), or two-column frame of str
            The pairs; embeddings of shape (n_pairs, 2 * dim) where ``vectorizer=None``.
        y : array-like of float, shape (n_pairs,), optional
            Similarity of each pair, on any scale; higher is more alike.

        Returns
        -------
        SimilarityRegressor
            This estimator.

        Raises
        ------
        TypeError
            If X is not pairs of texts (or embeddings), or a parameter is of the wrong type.
        ValueError
            If the columns of embeddings are not even in number, scores are missing or not as
            many as pairs, or a parameter is out of range.
        ImportError
            If a vectorizer that trains needs peft and it is not installed.

        Warns
        -----
        SkembedWarning
            If cosines do not rise with the scores, so that the curve is flat.
        """
        calibration = self._checked().calibration
        scores = None if y is None else read_numbers(y, name="y", owner=type(self).__name__)
        cosines, rows = self._fit_cosines(X, scores)
        if scores is None or calibration is None:
            self.calibration_ = None
            return self
        curve: Any = _LogisticCurve()
        if calibration == "isotonic":  # flat beyond the cosines it saw
            curve = IsotonicRegression(increasing=True, out_of_bounds="clip")
        self.calibration_ = curve.fit(cosines, scores[rows])
        _warn_flat(self.calibration_, cosines, scores[rows])
        return self

    def predict(self, X: Any) -> Floats:
        """Score each pair.

        Parameters
        ----------
        X : list of 2-tuples, ndarray of shape (n_pairs, 2), or two-column frame of str
            The pairs, or their embeddings; as `fit` got them.

        Returns
        -------
        ndarray of float64, shape (n_pairs,)
            On the scale of y, between its lowest and highest value; cosines in [-1, 1] where
            `fit` saw no scores.
        """
        cosines = self._compute_cosines(X)
        if self.calibration_ is None:
            return cosines
        return np.asarray(self.calibration_.predict(cosines), dtype=np.float64)

    def score(self, X: Any, y: Any, sample_weight: None = None) -> float:
        """Return the Spearman correlation of predictions and scores.

        Parameters
        ----------
        X : list of 2-tuples, ndarray of shape (n_pairs, 2), or two-column frame of str
            The pairs, or their embeddings; as `fit` got them.
        y : array-like of float, shape (n_pairs,)
            Their true scores.
        sample_weight : None
            Rank correlation takes no weights.

        Returns
        -------
        float
            In [-1, 1]; 0 where predictions or scores are all the same.

        Raises
        ------
        ValueError
            If there are weights, or scores are missing or not as many as pairs.
        """
        owner = type(self).__name__
        if sample_weight is not None:
            raise ValueError(f"The `sample_weight` parameter of `{owner}.score` must be None.")
        predicted, scores = self.predict(X), read_numbers(y, name="y", owner=f"{owner}.score")
        check_consistent_length(predicted, scores)
        if len(scores) < 2 or np.ptp(predicted) == 0 or np.ptp(scores) == 0:
            return 0.0
        return float(spearmanr(predicted, scores).statistic)

    def _fit_cosines(self, X: Any, scores: Floats | None) -> tuple[Floats, Any]:
        """Fit the vectorizer; return the cosines to calibrate on, (n,), and their rows."""
        owner = type(self).__name__
        vectorizer = make_vectorizer(self.vectorizer, owner=owner)
        if vectorizer is None:
            vectors = check_embeddings(self, X, reset=True)
            if scores is not None:
                check_consistent_length(vectors, scores)
            _check_even(vectors.shape[1], owner=owner)
            self._set_vectorizer(None, vectors.shape[1] // 2)
            return _split_cosines(vectors), slice(None)
        pairs = check_pair_columns(X, vectorizer=vectorizer, owner=owner)
        if scores is not None:
            check_consistent_length(pairs[0], scores)
        rows = slice(None)
        if scores is not None and trains_on_labels(vectorizer):
            rows = self._train(vectorizer, pairs, scores)
        else:
            fit_vectorizer(vectorizer, pairs[0] + pairs[1])
        chosen = [np.asarray(side, dtype=object)[rows].tolist() for side in pairs]
        sides = embed_pairs(vectorizer, chosen, owner=owner)
        self._set_vectorizer(vectorizer, sides[0].shape[1])
        return _split_cosines(np.hstack(sides)), rows

    def _train(self, vectorizer: Any, pairs: tuple[_Texts, _Texts], scores: Floats) -> Any:
        """Train the vectorizer on some of the pairs and return the rows it did not see."""
        rows = unseen = np.arange(len(scores))
        checked = self._checked()
        if checked.calibration is not None and len(rows) > 2:
            seed = checked.random_state
            split = {"test_size": checked.calibration_fraction, "random_state": seed}
            rows, unseen = train_test_split(rows, **split)
        vectorizer.fit([(pairs[0][i], pairs[1][i]) for i in rows], scores[rows])
        return np.sort(unseen)

    def _compute_cosines(self, X: Any) -> Floats:
        """Return the cosine of each pair, (n,)."""
        owner = type(self).__name__
        if not self.__sklearn_is_fitted__() or not hasattr(self, "vectorizer_"):
            return _split_cosines(self._embed_vectors(X))
        pairs = check_pair_columns(X, vectorizer=self.vectorizer_, owner=owner)
        sides = embed_pairs(self.vectorizer_, pairs, owner=owner, dim=self.embedding_dim_)
        return _split_cosines(np.hstack(sides))

    def __sklearn_tags__(self) -> Any:
        """Return tags for optional scores, and for a cosine, which cannot fit any target."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.regressor_tags.poor_score = True
        return tags


@dataclass
class _LogisticCurve:
    """A logistic curve from cosine to score that rises, between the lowest and highest score."""

    low: float = 0.0
    high: float = 0.0
    slope: float = 0.0
    offset: float = 0.0

    def fit(self, cosines: Floats, scores: Floats) -> _LogisticCurve:
        """Fit slope (as its logarithm, so that it stays above 0) and offset by least squares."""
        self.low, self.high = float(scores.min()), float(scores.max())
        center, spread = float(cosines.mean()), float(cosines.std()) or 1.0
        if self.high == self.low:
            return self
        targets = (scores - self.low) / (self.high - self.low)
        scaled = (cosines - center) / spread
        fit = least_squares(lambda p: expit(np.exp(p[0]) * scaled + p[1]) - targets, [0.0, 0.0])
        self.slope = float(np.exp(fit.x[0])) / spread
        self.offset = float(fit.x[1]) - self.slope * center
        return self

    def predict(self, cosines: Floats) -> Floats:
        """Return the score of each cosine, (n,)."""
        share = expit(self.slope * cosines + self.offset)
        return np.asarray(self.low + (self.high - self.low) * share)


def _split_cosines(vectors: npt.NDArray[Any]) -> Floats:
    """Return the cosine of the halves of each row, float64, (n,); 0 beside a vector of zeros."""
    left, right = (normalize(half.astype(np.float64)) for half in np.hsplit(vectors, 2))
    return np.clip(np.einsum("nd,nd->n", left, right), -1.0, 1.0)


def _check_even(n_columns: int, *, owner: str) -> None:
    """Raise ValueError unless columns can be split into the embeddings of two texts."""
    if n_columns % 2:
        raise ValueError(
            f"The `X` parameter of `{owner}` must have an even number of columns, the embeddings "
            f"of two texts side by side; got n_features = {n_columns}."
        )


def _warn_flat(curve: Any, cosines: Floats, scores: Floats) -> None:
    """Warn where the scores differ but the curve cannot follow them upwards."""
    rises = np.ptp(curve.predict(cosines)) > 1e-3 * np.ptp(scores)
    if np.ptp(scores) and np.ptp(cosines) and not rises:
        warnings.warn(
            "Cosines do not rise with the scores, so all predictions are nearly the same. Higher "
            "scores must mean more alike; negate distances. Silence this with "
            "warnings.filterwarnings('ignore', category=skembed.SkembedWarning).",
            SkembedWarning,
            stacklevel=3,
        )
