"""Names of clusters: their characteristic terms and their most typical texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import clone
from sklearn.feature_extraction.text import CountVectorizer

from skembed.similarity import Ints

__all__ = ["compute_class_tfidf", "find_terms", "name_clusters", "pick_representatives"]

_N_NAME_TERMS = 3


def pick_representatives(
    labels: Ints, k: int, distances: Any, texts: list[str] | None, n: int
) -> dict[int, list[int]]:
    """Return the n rows of each cluster nearest to its centre, no text twice."""
    representatives = {}
    for cluster in range(k):
        rows = np.flatnonzero(labels == cluster)
        nearest = rows[np.argsort(distances[rows], kind="stable")].tolist()
        if texts is not None:
            first: dict[str, int] = {}
            for row in nearest:
                first.setdefault(texts[row], row)  # in the order of the nearest row of each text
            nearest = list(first.values())
        representatives[cluster] = nearest[:n]
    return representatives


def find_terms(
    texts: list[str], labels: Ints, k: int, term_vectorizer: Any, n_terms: int
) -> dict[int, list[str]]:
    """Return the terms of each cluster with the highest class-based TF-IDF, best first."""
    counter = CountVectorizer(stop_words="english")
    counter = counter if term_vectorizer is None else clone(term_vectorizer)
    rows = np.flatnonzero(labels >= 0)
    analyze = counter.build_analyzer()
    if not any(analyze(texts[row]) for row in rows):  # nothing but stop words
        return {cluster: [] for cluster in range(k)}
    counts = counter.fit_transform([texts[row] for row in rows])
    weights = compute_class_tfidf(counts, labels[rows])
    terms = counter.get_feature_names_out()
    best_terms = {}
    for cluster in range(k):
        start, stop = weights.indptr[cluster : cluster + 2]
        columns, values = weights.indices[start:stop], weights.data[start:stop]
        best = np.lexsort((columns, -values))[:n_terms]  # equal weights by the alphabet
        best_terms[cluster] = [str(terms[i]) for i in columns[best]]
    return best_terms


def name_clusters(terms: dict[int, list[str]]) -> dict[int, str]:
    """Return the first terms of each cluster as its name."""
    return {
        cluster: ", ".join(best[:_N_NAME_TERMS]) or f"cluster {cluster}"
        for cluster, best in terms.items()
    }


def compute_class_tfidf(counts: Any, labels: npt.ArrayLike) -> sparse.csr_matrix:
    r"""Return class-based TF-IDF weights as CSR of float64, (n_classes, n_terms).

    :math:`f_{t,c} \log (1 + A / f_t)`, with :math:`f_{t,c}` the count of term t in class c,
    :math:`f_t` its sum over classes and A the mean number of terms in a class: M. Grootendorst,
    BERTopic, arXiv 2203.05794, section 3.3. `counts` are (n_texts, n_terms), `labels` (n_texts,).
    """
    classes = np.asarray(labels, dtype=np.int64)
    cells = (np.ones(len(classes)), (classes, np.arange(len(classes))))
    sums = sparse.csr_matrix(cells) @ sparse.csr_matrix(counts, dtype=np.float64)  # (C, n_terms)
    sums.eliminate_zeros()
    totals = np.asarray(sums.sum(axis=0)).ravel()
    mean_size = totals.sum() / sums.shape[0]
    sums.data *= np.log1p(mean_size / totals[sums.indices])
    return sums
