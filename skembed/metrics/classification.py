"""Metrics of class labels: accuracy, F1 and average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
)

from skembed._inputs import read_label_array
from skembed._validation import check_choice

__all__ = ["accuracy", "average_precision", "check_label_pair", "classification_metrics", "f1"]


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
        If there are no labels, or the lengths differ.

    Examples
    --------
    >>> from skembed.metrics import accuracy
    >>> accuracy(["cat", "dog", "dog"], ["cat", "dog", "cat"])
    0.6666666666666666
    """
    return float(accuracy_score(*check_label_pair(y_true, y_pred, owner="accuracy")))


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
        If there are no labels, the lengths differ, or `average` is unknown.

    Examples
    --------
    >>> from skembed.metrics import f1
    >>> f1(["cat", "dog", "dog"], ["cat", "dog", "cat"])
    0.6666666666666666
    """
    check_choice(average, name="average", owner="f1", allowed=("macro", "weighted", "micro"))
    labels = check_label_pair(y_true, y_pred, owner="f1")
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
    true, scores = check_label_pair(y_true, y_score, owner="average_precision")
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
        If there are no labels, or the lengths differ.

    Notes
    -----
    mteb computes `ap` from predicted labels, as numbers. It fails for labels without a 1, such as
    str; here the greater label is positive then.

    Examples
    --------
    >>> from skembed.metrics import classification_metrics
    >>> classification_metrics([0, 1, 1], [0, 1, 0])["ap"]
    0.8333333333333333
    """
    true, predicted = check_label_pair(y_true, y_pred, owner="classification_metrics")
    values = {"accuracy": float(accuracy_score(true, predicted))}
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        for average, suffix in (("macro", ""), ("weighted", "_weighted")):
            value = score(true, predicted, average=average, zero_division=0)
            values[name + suffix] = float(value)
    classes = np.unique(true)
    if len(classes) == 2:
        scores = predicted if 1 in classes.tolist() else predicted == classes[1]
        values["ap"] = values["ap_weighted"] = average_precision(true, scores)
    return values


def check_label_pair(
    y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, owner: str, are_scores: bool = False
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return two arrays of equal shape (n,), n > 0; raise ValueError for other shapes."""
    if are_scores:
        true, predicted = np.asarray(y_true), np.asarray(y_pred)
    else:
        true, predicted = (
            np.asarray(values)
            if _is_plain(values)
            else read_label_array(values, name=name, owner=owner)
            for name, values in (("y_true", y_true), ("y_pred", y_pred))
        )
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


def _is_plain(values: Any) -> bool:
    """Return whether labels are an array in which none can be missing, or of a shape to refuse."""
    return isinstance(values, np.ndarray) and (values.dtype.kind in "iubU" or values.ndim != 1)
