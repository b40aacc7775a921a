"""Scorers ``(estimator, X, y) -> float`` for ``scoring=`` in scikit-learn; higher is better."""

from __future__ import annotations

from typing import Any

import numpy as np

from skembed._inputs import check_texts, read_items
from skembed.embedding import FloatArray
from skembed.metrics.agreement import spearman, v_measure
from skembed.metrics.qrels import read_judged, search_to_run
from skembed.metrics.ranking import map_at_k, ndcg_at_k
from skembed.similarity import normalize_rows, paired_cosine

__all__ = ["clustering_scorer", "reranking_scorer", "retrieval_scorer", "sts_scorer"]


def sts_scorer(estimator: Any, X: Any, y: Any) -> float:
    """Return Spearman's correlation of predicted and true similarity of pairs.

    Parameters
    ----------
    estimator : object with `predict`, or with `transform` of pairs
        A fitted estimator of pairs such as `SimilarityRegressor`; or a vectorizer such as
        `NVEmbedVectorizer`, of which the cosine is taken.
    X : list of 2-tuples, array or frame of str, n_pairs rows
        Pairs of texts.
    y : array-like of float, shape (n_pairs,)
        True similarity.

    Returns
    -------
    float
        In [-1, 1]; NaN where all predictions are equal.

    Raises
    ------
    TypeError, ValueError
        If the estimator has neither method, or `transform` does not return two vectors a row.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.evaluation import sts_scorer
    >>> pairs = [("a cat", "a kitten"), ("a cat", "a tiger"), ("a cat", "the stock market")] * 2
    >>> scores = [5.0, 3.5, 0.0] * 2
    >>> frozen = NVEmbedVectorizer(trainer=None)
    >>> cross_val_score(frozen, pairs, scores, cv=2, scoring=sts_scorer).shape
    (2,)
    """
    return spearman(y, _score_pairs(estimator, X, owner="sts_scorer"))


def clustering_scorer(estimator: Any, X: Any, y: Any) -> float:
    """Return the V-measure of predicted clusters.

    Parameters
    ----------
    estimator : object with `predict`
        A fitted clusterer.
    X : texts or embeddings, n rows
        Input of the clusterer.
    y : array-like of labels, shape (n,)
        True clusters.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError
        If the estimator has no `predict`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.cluster import KMeans
    >>> from skembed.evaluation import clustering_scorer
    >>> X, y = np.array([[0.0], [0.1], [5.0], [5.1]]), ["low", "low", "high", "high"]
    >>> clustering_scorer(KMeans(2, random_state=0).fit(X), X, y)
    1.0
    """
    if not hasattr(estimator, "predict"):
        raise TypeError(
            "`clustering_scorer` needs an estimator with `predict`; "
            f"got {type(estimator).__name__}."
        )
    return v_measure(y, estimator.predict(X))


def reranking_scorer(estimator: Any, X: Any, y: Any) -> float:
    """Return the mean average precision of the documents of each query.

    Parameters
    ----------
    estimator : object with `predict`, or with `transform` of pairs
        A fitted estimator of (query, document) rows such as `Reranker`; or a vectorizer.
    X : list of 2-tuples, array or frame of str, n_rows rows
        Query and document of each row. Rows of one query text belong together.
    y : array-like of int, shape (n_rows,)
        Grade of the document for the query; above 0 is relevant.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If the estimator has neither method, or a grade is not an int.

    Notes
    -----
    Split by query, with ``GroupKFold`` and the query as group: else the documents of a query are
    torn apart.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.evaluation import reranking_scorer
    >>> rows = [("a pet", "the stock market rose"), ("a pet", "a cat sleeps on the sofa")]
    >>> reranking_scorer(NVEmbedVectorizer(trainer=None), rows, [0, 1])
    1.0
    """
    scores = _score_pairs(estimator, X, owner="reranking_scorer")
    queries, _ = _read_pairs(X, owner="reranking_scorer")
    relevance: dict[str, dict[int, Any]] = {}
    run: dict[str, dict[int, float]] = {}
    for row, (query, grade) in enumerate(zip(queries, _read_grades(y, len(queries)), strict=True)):
        relevance.setdefault(query, {})[row] = grade
        run.setdefault(query, {})[row] = float(scores[row])
    return map_at_k(relevance, run)


def retrieval_scorer(estimator: Any, X: Any, y: Any = None) -> float:
    """Return nDCG@10 of the documents found for each query.

    Parameters
    ----------
    estimator : object with `search`, or with `transform` of pairs
        A fitted `Retriever`; or a vectorizer, in which case the distinct second texts of `X` are
        the corpus.
    X : list of str, or of 2-tuples of str
        Queries for a retriever; pairs (query, relevant document) for a vectorizer.
    y : sequence, optional
        For a retriever, one entry a query: ``{position in the corpus: grade}`` or a list of
        positions. For a vectorizer, the grade of each pair; None is 1 for all.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If the estimator has neither method, or the entries do not fit the queries.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.evaluation import retrieval_scorer
    >>> pairs = [("a pet", "a cat sleeps on the sofa"), ("money", "the stock market rose")]
    >>> retrieval_scorer(NVEmbedVectorizer(trainer=None), pairs)
    1.0
    """
    if hasattr(estimator, "search"):
        return _score_search(estimator, X, y)
    left, right = _embed_pairs(estimator, X, owner="retrieval_scorer")
    queries, documents = _read_pairs(X, owner="retrieval_scorer")
    rows = {query: row for row, query in reversed(list(enumerate(queries)))}
    columns = {document: row for row, document in reversed(list(enumerate(documents)))}
    grades = [1] * len(queries) if y is None else _read_grades(y, len(queries))
    relevance: dict[str, dict[str, Any]] = {query: {} for query in rows}
    for query, document, grade in zip(queries, documents, grades, strict=True):
        relevance[query][document] = max(grade, relevance[query].get(document, grade))
    left, right = left[list(rows.values())], right[list(columns.values())]
    scores = (normalize_rows(left) @ normalize_rows(right).T).tolist()
    run = {q: dict(zip(columns, row, strict=True)) for q, row in zip(rows, scores, strict=True)}
    return ndcg_at_k(relevance, run)


def _score_search(estimator: Any, queries: Any, y: Any) -> float:
    """Return nDCG@10 of a retriever."""
    if y is None or len(y) != len(queries):
        raise ValueError(
            f"`retrieval_scorer` needs one entry of `y` a query, {len(queries)}; "
            f"got {'None' if y is None else len(y)}."
        )
    relevance = {
        i: read_judged(entry, i, subject="The `y` parameter of `retrieval_scorer`")
        for i, entry in enumerate(y)
    }
    scores, indices = estimator.search(queries, top_k=10)
    return ndcg_at_k(relevance, search_to_run(scores, indices))


def _score_pairs(estimator: Any, X: Any, *, owner: str) -> FloatArray:
    """Return the prediction for each row, or the cosine of its texts, (n,)."""
    if hasattr(estimator, "predict"):
        return np.asarray(estimator.predict(X))
    return paired_cosine(*_embed_pairs(estimator, X, owner=owner))


def _embed_pairs(estimator: Any, X: Any, *, owner: str) -> tuple[FloatArray, FloatArray]:
    """Return the vectors of the first and of the second texts, (n, dim) each."""
    if not hasattr(estimator, "transform"):
        raise TypeError(
            f"`{owner}` needs an estimator with `predict`, `search` or `transform`; "
            f"got {type(estimator).__name__}."
        )
    vectors = np.asarray(estimator.transform(X))
    if vectors.ndim != 2 or vectors.shape[1] % 2:
        raise ValueError(
            f"`{owner}` needs two vectors of one width side by side for each pair; `transform` of "
            f"{type(estimator).__name__} returned an array of shape {vectors.shape}."
        )
    half = vectors.shape[1] // 2
    return vectors[:, :half], vectors[:, half:]


def _read_grades(y: Any, n: int) -> list[Any]:
    """Return the grade of each of n rows."""
    grades = read_items(y, subject="The `y` parameter of a scorer", of="grades")
    if len(grades) != n:
        raise ValueError(
            f"The `y` parameter of a scorer must hold a grade for each of {n} rows; "
            f"got {len(grades)}."
        )
    return grades


def _read_pairs(X: Any, *, owner: str) -> list[list[str]]:
    """Return the two columns of pairs of texts, n each."""
    columns = check_texts(X, owner=owner).columns
    if len(columns) != 2:
        raise ValueError(f"The `X` parameter of `{owner}` must hold pairs of texts.")
    return columns
