"""Names of clusters: their characteristic terms and their most typical texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import clone
from sklearn.feature_extraction.text import CountVectorizer

__all__ = ["Ints", "compute_class_tfidf", "find_terms", "pick_representatives"]

Ints = npt.NDArray[np.int64]


# What a cluster is about


def pick_representatives(
    cluster: int, labels: Ints, distances: Any, texts: list[str] | None, n: int
) -> list[int]:
    """Return the n rows of a cluster nearest to its centre, no text twice."""
    rows = np.flatnonzero(labels == cluster)
    ordered = rows[np.argsort(distances[rows], kind="stable")].tolist()
    if texts is not None:
        ordered = list({texts[row]: row for row in reversed(ordered)}.values())[::-1]
    return ordered[:n]


def find_terms(
    texts: list[str], labels: Ints, k: int, term_vectorizer: Any, n_terms: int
) -> dict[int, list[str]]:
    """Return the terms of each cluster with the highest class-based TF-IDF."""
    counter = CountVectorizer(stop_words="english")
    counter = counter if term_vectorizer is None else clone(term_vectorizer)
    kept = np.flatnonzero(labels >= 0)
    analyze = counter.build_analyzer()
    if not any(analyze(texts[row]) for row in kept):  # nothing but stop words
        return {cluster: [] for cluster in range(k)}
    counts = counter.fit_transform([texts[row] for row in kept])
    weights = compute_class_tfidf(counts, labels[kept])
    terms = counter.get_feature_names_out()
    found = {}
    for cluster in range(k):
        start, stop = weights.indptr[cluster : cluster + 2]
        columns, values = weights.indices[start:stop], weights.data[start:stop]
        best = np.lexsort((columns, -values))[:n_terms]  # equal weights by the alphabet
        found[cluster] = [str(terms[i]) for i in columns[best]]
    return found


def compute_class_tfidf(counts: Any, labels: npt.ArrayLike) -> Any:
    r"""Weigh the terms of each class by class-based TF-IDF.

    Parameters
    ----------
    counts : sparse matrix or array-like of int, shape (n_texts, n_terms)
        How often each term stands in each text.
    labels : array-like of int, shape (n_texts,)
        Class of each text, from 0.

    Returns
    -------
    CSR matrix of float64, shape (n_classes, n_terms)
        :math:`f_{t,c} \log (1 + A / f_t)`, with :math:`f_{t,c}` the count of term t in class c,
        :math:`f_t` its sum over classes and A the mean number of terms in a class.

    References
    ----------
    M. Grootendorst, BERTopic, arXiv 2203.05794, section 3.3.

    Examples
    --------
    >>> from skembed.estimators.cluster_names import compute_class_tfidf
    >>> compute_class_tfidf([[2, 0], [0, 1], [0, 1]], [0, 1, 1]).toarray().round(3)
    array([[1.386, 0.   ],
           [0.   , 1.386]])
    """
    places = np.asarray(labels, dtype=np.int64)
    cells = (np.ones(len(places)), (places, np.arange(len(places))))
    sums = sparse.csr_matrix(cells) @ sparse.csr_matrix(counts, dtype=np.float64)  # (C, n_terms)
    sums.eliminate_zeros()
    totals = np.asarray(sums.sum(axis=0)).ravel()
    mean_size = totals.sum() / sums.shape[0]
    sums.data *= np.log1p(mean_size / totals[sums.indices])
    return sums
