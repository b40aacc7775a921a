"""Metrics of rankings as trec_eval computes them; users import them from `skembed.metrics`.

Documents of equal score are ranked in descending order of their ids, average precision is divided
by all judged positives, gains are linear. `ranking_metrics` gives one value a query, all others are
means over queries; `ranking_summary` rounds as mteb does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._validation import check_int, describe_type
from skembed.metrics.qrels import check_grades
from skembed.similarity import Floats, Ints

__all__ = [
    "K_VALUES",
    "RANKING_METRICS",
    "hit_rate_at_k",
    "map_at_k",
    "mrr_at_k",
    "ndcg_at_k",
    "precision_at_k",
    "ranking_metrics",
    "ranking_summary",
    "recall_at_k",
    "round_means",
]

K_VALUES = (1, 3, 5, 10, 20, 100, 1000)
"""The cut-offs that mteb reports."""

RANKING_METRICS = ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
"""The metrics of a ranking; "ndcg_at_10" is one of them at a cut-off."""

_DIGITS = 5  # mteb rounds means over queries to these, except the reciprocal rank

_Grades = Mapping[Any, Mapping[Any, int]]  # {query id: {document id: grade}}
_Run = Mapping[Any, Mapping[Any, float]]  # {query id: {document id: score}}
_Relevance = _Grades | npt.ArrayLike
_Scores = _Run | npt.ArrayLike


def ndcg_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 10) -> float:
    """Return the normalised discounted cumulative gain, mean over queries.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
        Gains are linear in the grade.
    k : int, default=10
        Number of documents of each ranking that count.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import ndcg_at_k
    >>> ndcg_at_k({"q": {"a": 2, "b": 1}}, {"q": {"a": 0.5, "b": 0.9, "c": 0.1}}, k=2)
    0.8597186998521972
    """
    return _mean_at_k("ndcg", relevance, scores, k)


def map_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 1000) -> float:
    """Return the mean average precision; each is divided by all judged positives of its query.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
    k : int, default=1000
        Number of documents of each ranking that count.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import map_at_k
    >>> map_at_k({"q": {"a": 1, "b": 1}}, {"q": {"a": 0.5, "c": 0.1}})
    0.5
    """
    return _mean_at_k("map", relevance, scores, k)


def mrr_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 10) -> float:
    """Return the reciprocal rank of the first positive, mean over queries.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
    k : int, default=10
        Number of documents of each ranking that count.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import mrr_at_k
    >>> mrr_at_k([[0, 1, 0]], [[0.9, 0.8, 0.1]])
    0.5
    """
    return _mean_at_k("mrr", relevance, scores, k)


def recall_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 10) -> float:
    """Return the share of all judged positives that were found, mean over queries.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
    k : int, default=10
        Number of documents of each ranking that count.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import recall_at_k
    >>> recall_at_k([[0, 1, 1]], [[0.9, 0.8, 0.1]], k=2)
    0.5
    """
    return _mean_at_k("recall", relevance, scores, k)


def precision_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 10) -> float:
    """Return the share of positives among the first k places, mean over queries.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
    k : int, default=10
        Divided by k, also where a ranking is shorter.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import precision_at_k
    >>> precision_at_k([[0, 1, 1]], [[0.9, 0.8, 0.1]], k=2)
    0.5
    """
    return _mean_at_k("precision", relevance, scores, k)


def hit_rate_at_k(relevance: _Relevance, scores: _Scores, *, k: int = 10) -> float:
    """Return the share of queries with a positive among the first k places.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        Grades, and scores that are higher for better documents, as `ranking_metrics` takes them.
    k : int, default=10
        Number of documents of each ranking that count.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import hit_rate_at_k
    >>> hit_rate_at_k([[0, 1], [1, 0]], [[0.9, 0.8], [0.9, 0.8]], k=1)
    0.5
    """
    return _mean_at_k("hit_rate", relevance, scores, k)


def ranking_metrics(
    relevance: _Relevance, scores: _Scores, *, k_values: Iterable[int] = K_VALUES
) -> dict[str, Floats]:
    """Return every ranking metric at every cut-off, one value a query.

    Parameters
    ----------
    relevance : mapping or array-like of int, shape (n_queries, n_documents)
        ``{query_id: {document_id: grade}}``, or a matrix of grades. Grades above 0 are positive;
        a document without a grade is not.
    scores : mapping or array-like of float, shape (n_queries, n_documents)
        ``{query_id: {document_id: score}}`` for the same queries, or a matrix. A document that a
        mapping leaves out was not found.
    k_values : iterable of int, default=(1, 3, 5, 10, 20, 100, 1000)
        The cut-offs.

    Returns
    -------
    dict of str to ndarray of float64, shape (n_queries,)
        "ndcg_at_1" and so on, for `RANKING_METRICS` and `k_values`; queries in the order of
        `scores`.

    Raises
    ------
    TypeError
        If one argument is a mapping and the other is not, a grade is not an int, or ids are of
        several types.
    ValueError
        If there are no queries, a query has no judged document or no ranking, a score is NaN,
        or the shapes differ.

    Notes
    -----
    A query whose judged documents are all of grade 0 counts, with 0, as in trec_eval. pytrec_eval
    skips queries without judgments or without a ranking; here both are errors, since a skipped
    query raises the mean. Pass ``{}`` as the ranking of a query that found nothing.

    Scores are compared in float32, as trec_eval does. Where they are equal, the greater id comes
    first: ids of str as text ("9" before "10"), ids of int as numbers, columns of a matrix by
    their position.

    References
    ----------
    C. Van Gysel and M. de Rijke, Pytrec_eval, arXiv 1805.01597.

    Examples
    --------
    >>> from skembed.metrics import ranking_metrics
    >>> values = ranking_metrics({"q": {"a": 1}}, {"q": {"a": 0.7, "b": 0.7}}, k_values=[1, 2])
    >>> float(values["ndcg_at_1"][0]), float(values["mrr_at_2"][0])
    (0.0, 0.5)
    """
    owner = "ranking_metrics"
    cuts = np.array([check_int(k, name="k_values", owner=owner, low=1) for k in k_values])
    if not len(cuts):
        raise ValueError(f"The `k_values` parameter of `{owner}` must hold a cut-off; got none.")
    values = _compute_rankings(relevance, scores, cuts, owner=owner)  # (Q, M, K)
    return {
        f"{name}_at_{k}": values[:, i, j].copy()
        for i, name in enumerate(RANKING_METRICS)
        for j, k in enumerate(cuts.tolist())
    }


def ranking_summary(
    relevance: _Relevance, scores: _Scores, *, k_values: Iterable[int] = K_VALUES
) -> dict[str, float]:
    """Return every ranking metric at every cut-off, mean over queries, rounded as mteb rounds.

    Parameters
    ----------
    relevance, scores : mapping or array-like, shape (n_queries, n_documents)
        As `ranking_metrics`.
    k_values : iterable of int, default=(1, 3, 5, 10, 20, 100, 1000)
        The cut-offs.

    Returns
    -------
    dict of str to float
        Means to 5 decimals; "mrr_at_k" is not rounded.

    Raises
    ------
    TypeError, ValueError
        If `ranking_metrics` would raise them.

    Examples
    --------
    >>> from skembed.metrics import ranking_summary
    >>> ranking_summary({"q": {"a": 1}}, {"q": {"a": 0.7, "b": 0.9}}, k_values=[2])["ndcg_at_2"]
    0.63093
    """
    return round_means(ranking_metrics(relevance, scores, k_values=k_values))


def round_means(metrics: Mapping[str, Floats]) -> dict[str, float]:
    """Return the means of what `ranking_metrics` returns, rounded as mteb rounds."""
    means = {name: _mean(values) for name, values in metrics.items()}
    return {k: mean if k.startswith("mrr") else round(mean, _DIGITS) for k, mean in means.items()}


def _mean(values: Floats) -> float:
    """Return the mean as mteb computes it: a plain sum, divided."""
    return float(sum(values.tolist()) / len(values))


class _Ranking(NamedTuple):
    """Grades of one query."""

    gains: Ints  # of the documents found, in the order of the ranking, (R,)
    positives: Ints  # of all positive documents, descending


def _mean_at_k(name: str, relevance: _Relevance, scores: _Scores, k: int) -> float:
    """Return one metric at one cut-off, mean over queries, not rounded."""
    owner = f"{name}_at_k"
    cut = check_int(k, name="k", owner=owner, low=1)
    values = _compute_rankings(relevance, scores, np.array([cut]), owner=owner)  # (Q, M, 1)
    return _mean(values[:, RANKING_METRICS.index(name), 0])


def _compute_rankings(relevance: _Relevance, scores: _Scores, cuts: Ints, *, owner: str) -> Floats:
    """Return all metrics of all queries at all cut-offs, (Q, M, K)."""
    if isinstance(relevance, Mapping) and isinstance(scores, Mapping):
        rankings = _rank_mappings(relevance, scores, owner=owner)
    elif isinstance(relevance, Mapping) or isinstance(scores, Mapping):
        raise TypeError(
            f"The `relevance` and `scores` parameters of `{owner}` must be two mappings or two "
            f"arrays; got {type(relevance).__name__} and {type(scores).__name__}."
        )
    else:
        rankings = _rank_arrays(relevance, scores, owner=owner)
    listed = list(rankings)
    longest = max(max(len(each.gains), len(each.positives)) for each in listed)
    # The same logarithm as C's, so that sums are equal to the last bit.
    discounts = np.array([math.log2(rank + 2) for rank in range(min(longest, cuts.max()))])
    return np.array([_score_ranking(ranking, cuts, discounts) for ranking in listed])


def _score_ranking(ranking: _Ranking, cuts: Ints, discounts: Floats) -> list[Floats]:
    """Return the metrics of one query in the order of `RANKING_METRICS`, each (K,)."""
    gains, positives = ranking.gains[: cuts.max()], ranking.positives
    is_positive = gains > 0
    n_found = np.cumsum(is_positive)  # (R,)
    precisions = np.where(is_positive, n_found / np.arange(1, len(gains) + 1), 0.0)
    dcg = _at(np.cumsum(np.maximum(gains, 0) / discounts[: len(gains)]), cuts)
    best = positives[: cuts.max()]
    ideal = _at(np.cumsum(best / discounts[: len(best)]), cuts)
    hits, n_positives = _at(n_found, cuts), max(len(positives), 1)
    first = int(is_positive.argmax()) + 1 if is_positive.any() else math.inf
    return [
        np.divide(dcg, ideal, out=np.zeros(len(cuts)), where=ideal > 0),
        _at(np.cumsum(precisions), cuts) / n_positives,
        hits / n_positives,
        hits / cuts,
        np.where(cuts >= first, 1.0 / first, 0.0),
        (hits > 0).astype(np.float64),
    ]


def _at(curve: npt.NDArray[Any], cuts: Ints) -> Floats:
    """Return a running sum (R,) at each cut-off, its last value beyond the end, (K,)."""
    if not len(curve):
        return np.zeros(len(cuts))
    return curve[np.minimum(cuts, len(curve)) - 1].astype(np.float64)


def _rank_mappings(relevance: _Grades, scores: _Run, *, owner: str) -> Iterator[_Ranking]:
    """Yield the ranking of each query of two mappings, in the order of `scores`."""
    _check_mappings(relevance, name="relevance", owner=owner)
    _check_mappings(scores, name="scores", owner=owner)
    _check_queries(relevance, scores, owner=owner)
    for query, run in scores.items():
        grades = check_grades(list(relevance[query].values()), owner=owner)
        judged = dict(zip(relevance[query], grades.tolist(), strict=True))
        try:
            documents = sorted(run, reverse=True)
        except TypeError as error:
            raise TypeError(
                f"The `scores` parameter of `{owner}` must have document ids of one type, str or "
                f"int; got several for query {query!r}."
            ) from error
        values = np.array([run[document] for document in documents])
        if values.size and values.dtype.kind not in "fiub":
            raise TypeError(
                f"The `scores` parameter of `{owner}` must hold numbers; got {values.dtype} in "
                f"query {query!r}."
            )
        order = _descending(values.astype(np.float64), owner=owner, where=f"query {query!r}")
        gains = np.array([judged.get(documents[i], 0) for i in order.tolist()], dtype=np.int64)
        yield _Ranking(gains, _sort_positives(grades))


def _rank_arrays(
    relevance: npt.ArrayLike, scores: npt.ArrayLike, *, owner: str
) -> Iterator[_Ranking]:
    """Yield the ranking of each row of two matrices."""
    matrix = np.asarray(scores)
    grades = check_grades(relevance, owner=owner)
    if matrix.ndim != 2 or not matrix.size or grades.shape != matrix.shape:
        raise ValueError(
            f"The `relevance` and `scores` parameters of `{owner}` must be of one shape "
            f"(n_queries, n_documents), not empty; got {grades.shape} and {matrix.shape}."
        )
    for row, (values, line) in enumerate(zip(matrix[:, ::-1], grades[:, ::-1], strict=True)):
        order = _descending(values.astype(np.float64), owner=owner, where=f"row {row}")
        yield _Ranking(line[order], _sort_positives(line))


def _descending(values: Floats, *, owner: str, where: str) -> Ints:
    """Return the stable order of descending scores, in float32 as in trec_eval."""
    if np.isnan(values).any():
        raise ValueError(
            f"The `scores` parameter of `{owner}` must hold no NaN; got one in {where}. "
            "Leave out what was not found."
        )
    with np.errstate(over="ignore"):
        return np.argsort(-values.astype(np.float32), kind="stable")


def _sort_positives(grades: Ints) -> Ints:
    """Return the grades above 0, highest first."""
    return np.sort(grades[grades > 0])[::-1]


def _check_mappings(values: Mapping[Any, Any], *, name: str, owner: str) -> None:
    """Raise TypeError unless each query has a mapping of its documents."""
    for query, documents in values.items():
        if not isinstance(documents, Mapping):
            raise TypeError(
                f"The `{name}` parameter of `{owner}` must map each query to a mapping of document "
                f"ids to numbers; that of {query!r} is {describe_type(documents)}."
            )


def _check_queries(relevance: _Grades, scores: _Run, *, owner: str) -> None:
    """Raise unless both mappings hold the same queries, each with a judged document."""
    if not scores:
        raise ValueError(f"The `scores` parameter of `{owner}` must hold a query; got none.")
    unjudged = [query for query in scores if not relevance.get(query)]
    if unjudged:
        raise ValueError(
            f"The `relevance` parameter of `{owner}` must judge a document for every query; "
            f"{len(unjudged)} of {len(scores)} have none, the first is {unjudged[0]!r}. Drop them."
        )
    absent = [query for query in relevance if query not in scores]
    if absent:
        raise ValueError(
            f"The `scores` parameter of `{owner}` must rank every judged query; {len(absent)} of "
            f"{len(relevance)} are absent, the first is {absent[0]!r}. Pass {{}} for a query that "
            "found nothing."
        )
