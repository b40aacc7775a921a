"""Agreement of two assignments or two lists of scores: V-measure, AMI, correlations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import adjusted_mutual_info_score, v_measure_score

from skembed.metrics.classification import check_label_pair

__all__ = ["ami", "pearson", "spearman", "v_measure"]


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
        If there are no labels, or the lengths differ.

    Examples
    --------
    >>> from skembed.metrics import v_measure
    >>> v_measure(["cat", "cat", "dog"], [1, 1, 0])
    1.0
    """
    return float(v_measure_score(*check_label_pair(y_true, y_pred, owner="v_measure")))


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
        If there are no labels, or the lengths differ.

    Examples
    --------
    >>> from skembed.metrics import ami
    >>> ami(["cat", "cat", "dog", "dog"], [1, 1, 0, 0])
    1.0
    """
    return float(adjusted_mutual_info_score(*check_label_pair(y_true, y_pred, owner="ami")))


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
        If there are fewer than two scores, one is not a finite number, or the lengths differ.

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
        If there are fewer than two scores, one is not a finite number, or the lengths differ.

    Examples
    --------
    >>> from skembed.metrics import pearson
    >>> round(pearson([1, 2, 3], [0.1, 0.5, 0.4]), 3)
    0.721
    """
    return _correlate(pearsonr, y_true, y_pred, owner="pearson")


def _correlate(
    correlation: Callable[..., Any], y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, owner: str
) -> float:
    """Return one of scipy's correlations in float64; NaN for a constant, without a warning."""
    pair = check_label_pair(y_true, y_pred, owner=owner, are_scores=True)
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
