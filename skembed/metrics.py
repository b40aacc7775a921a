"""Metrics equal to mteb 2.26 and pytrec_eval: classification, clustering, correlation, ranking.

The first three are thin, over scikit-learn and scipy. The metrics of rankings (`ndcg_at_k` and so
on) are trec_eval's; they take ``{query_id: {document_id: ...}}`` or two matrices.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    adjusted_mutual_info_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    v_measure_score,
)

from skembed._ranking import (
    K_VALUES,
    RANKING_METRICS,
    hit_rate_at_k,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    precision_at_k,
    ranking_metrics,
    ranking_summary,
    recall_at_k,
    search_to_run,
)
from skembed._validation import check_choice

__all__ = [
    "K_VALUES",
    "RANKING_METRICS",
    "accuracy",
    "ami",
    "average_precision",
    "classification_metrics",
    "f1",
    "hit_rate_at_k",
    "map_at_k",
    "mrr_at_k",
    "ndcg_at_k",
    "pearson",
    "precision_at_k",
    "ranking_metrics",
    "ranking_summary",
    "recall_at_k",
    "search_to_run",
    "spearman",
    "v_measure",
]


# Classification


def accuracy(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return the share of labels that are right.

    Parameters
    ----------
    y_true, y_pred : array-like of labels, shape (n,)
        True and predicted labels.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there are no labels, or not equally many.

    Examples
    --------
    >>> from skembed.metrics import accuracy
    >>> accuracy(["cat", "dog", "dog"], ["cat", "dog", "cat"])
    0.6666666666666666
    """
    return float(accuracy_score(*_check_labels(y_true, y_pred, owner="accuracy")))


def f1(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, average: str = "macro") -> float:
    """Return the F1 score over all labels.

    Parameters
    ----------
    y_true, y_pred : array-like of labels, shape (n,)
        True and predicted labels.
    average : {"macro", "weighted", "micro"}, default="macro"
        Each label counts the same, by its number of texts, or each text counts the same.

    Returns
    -------
    float
        In [0, 1]; a label never predicted counts 0.

    Raises
    ------
    TypeError, ValueError
        If there are no labels or not equally many, or `average` is unknown.

    Examples
    --------
    >>> from skembed.metrics import f1
    >>> f1(["cat", "dog", "dog"], ["cat", "dog", "cat"])
    0.6666666666666666
    """
    check_choice(average, name="average", owner="f1", allowed=("macro", "weighted", "micro"))
    labels = _check_labels(y_true, y_pred, owner="f1")
    return float(f1_score(*labels, average=average, zero_division=0))


def average_precision(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    """Return the average precision of scores for the positive one of two labels.

    Parameters
    ----------
    y_true : array-like of labels, shape (n,)
        Two different labels. 1 is the positive one; where it is absent, the greater.
    y_score : array-like of float, shape (n,)
        Higher for texts more likely positive. mteb passes predicted labels here.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there are not exactly two labels, or not as many scores as labels.

    Examples
    --------
    >>> from skembed.metrics import average_precision
    >>> average_precision([0, 1, 1, 0], [0.1, 0.9, 0.3, 0.4])
    0.8333333333333333
    """
    true, scores = _check_labels(y_true, y_score, owner="average_precision")
    classes = np.unique(true)
    if len(classes) != 2:
        raise ValueError(
            "The `y_true` parameter of `average_precision` must hold exactly two labels; "
            f"got {len(classes)}."
        )
    positive = 1 if 1 in classes.tolist() else classes[1]
    return float(average_precision_score(true == positive, scores.astype(np.float64)))


def classification_metrics(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> dict[str, float]:
    """Return all metrics that mteb reports for one classification.

    Parameters
    ----------
    y_true, y_pred : array-like of labels, shape (n,)
        True and predicted labels.

    Returns
    -------
    dict of str to float
        `accuracy`; `f1`, `precision` and `recall` (macro), each with `_weighted` too; and, where
        `y_true` holds two labels, `ap` and `ap_weighted`, which are equal.

    Raises
    ------
    ValueError
        If there are no labels, or not equally many.

    Notes
    -----
    mteb computes `ap` from predicted labels, as numbers. For labels without a 1, such as str, it
    fails; here the greater label is positive then.

    Examples
    --------
    >>> from skembed.metrics import classification_metrics
    >>> classification_metrics([0, 1, 1], [0, 1, 0])["ap"]
    0.8333333333333333
    """
    true, predicted = _check_labels(y_true, y_pred, owner="classification_metrics")
    found = {"accuracy": float(accuracy_score(true, predicted))}
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average, suffix in (("macro", ""), ("weighted", "_weighted")):
            value = score(true, predicted, average=average, zero_division=0)
            found[name + suffix] = float(value)
    classes = np.unique(true)
    if len(classes) == 2:
        scores = predicted if 1 in classes.tolist() else predicted == classes[1]
        found["ap"] = found["ap_weighted"] = average_precision(true, scores)
    return found


# Clustering


def v_measure(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return the harmonic mean of homogeneity and completeness.

    Parameters
    ----------
    y_true, y_pred : array-like of labels, shape (n,)
        True labels, and clusters under any names.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there are no labels, or not equally many.

    Examples
    --------
    >>> from skembed.metrics import v_measure
    >>> v_measure(["cat", "cat", "dog"], [1, 1, 0])
    1.0
    """
    return float(v_measure_score(*_check_labels(y_true, y_pred, owner="v_measure")))


def ami(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return the adjusted mutual information, which is 0 on average for random clusters.

    Parameters
    ----------
    y_true, y_pred : array-like of labels, shape (n,)
        True labels, and clusters under any names.

    Returns
    -------
    float
        At most 1.

    Raises
    ------
    ValueError
        If there are no labels, or not equally many.

    Examples
    --------
    >>> from skembed.metrics import ami
    >>> ami(["cat", "cat", "dog", "dog"], [1, 1, 0, 0])
    1.0
    """
    return float(adjusted_mutual_info_score(*_check_labels(y_true, y_pred, owner="ami")))


# Correlation


def spearman(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation.

    Parameters
    ----------
    y_true, y_pred : array-like of float, shape (n,)
        True and predicted scores on any scales, n at least 2.

    Returns
    -------
    float
        In [-1, 1]; NaN where one of the two is constant.

    Raises
    ------
    TypeError, ValueError
        If one holds no finite numbers, there are fewer than two, or not equally many.

    Examples
    --------
    >>> from skembed.metrics import spearman
    >>> round(spearman([1, 2, 3], [0.1, 0.5, 0.4]), 3)
    0.5
    """
    return _correlate(spearmanr, y_true, y_pred, owner="spearman")


def pearson(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return Pearson's linear correlation.

    Parameters
    ----------
    y_true, y_pred : array-like of float, shape (n,)
        True and predicted scores on any scales, n at least 2.

    Returns
    -------
    float
        In [-1, 1]; NaN where one of the two is constant.

    Raises
    ------
    TypeError, ValueError
        If one holds no finite numbers, there are fewer than two, or not equally many.

    Examples
    --------
    >>> from skembed.metrics import pearson
    >>> round(pearson([1, 2, 3], [0.1, 0.5, 0.4]), 3)
    0.721
    """
    return _correlate(pearsonr, y_true, y_pred, owner="pearson")


# Private: labels and numbers


def _check_labels(
    y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, owner: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return two arrays of equal length, (n,), n > 0."""
    true, predicted = np.asarray(y_true), np.asarray(y_pred)
    if true.ndim != 1 or not len(true):
        raise ValueError(
            f"The `y_true` parameter of `{owner}` must be of shape (n,) with n > 0; "
            f"got shape {true.shape}."
        )
    if predicted.shape != true.shape:
        raise ValueError(
            f"The second parameter of `{owner}` must be of the shape of `y_true`, {true.shape}; "
            f"got {predicted.shape}."
        )
    return true, predicted


def _correlate(
    correlation: Any, y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, owner: str
) -> float:
    """Return a correlation of scipy in float64; NaN for a constant, without a warning."""
    pair = [np.asarray(values) for values in _check_labels(y_true, y_pred, owner=owner)]
    if any(values.dtype.kind not in "fiub" for values in pair):
        raise TypeError(f"`{owner}` takes numbers; got {pair[0].dtype} and {pair[1].dtype}.")
    if len(pair[0]) < 2:
        raise ValueError(f"`{owner}` needs at least two scores; got {len(pair[0])}.")
    true, predicted = (values.astype(np.float64) for values in pair)
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        raise ValueError(f"`{owner}` takes finite numbers; got NaN or infinity.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return float(correlation(true, predicted)[0])
