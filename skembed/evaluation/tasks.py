"""Tasks of an evaluation: dataclasses around a user's own arrays, lists and frames, unchecked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

__all__ = [
    "CLASSIFICATION_METRICS",
    "CLUSTERING_METRICS",
    "ClassificationTask",
    "ClusteringTask",
    "RerankingTask",
    "RetrievalTask",
    "STSTask",
    "STS_METRICS",
    "Task",
]

CLASSIFICATION_METRICS = (
    *("accuracy", "f1", "f1_weighted", "precision", "precision_weighted"),
    *("recall", "recall_weighted", "ap", "ap_weighted"),
)
CLUSTERING_METRICS = ("v_measure", "ami")
STS_METRICS = tuple(
    f"{similarity}_{correlation}"
    for similarity in ("cosine", "manhattan", "euclidean")
    for correlation in ("pearson", "spearman")
)


class Task:
    """A task of `evaluate`."""

    name: str
    metric: str
    random_state: int

    def __repr__(self) -> str:
        """Return class and name alone: texts may be many, long or private."""
        return f"{type(self).__name__}(name={self.name!r})"


# eq=False: arrays and frames have no single truth value to compare by.
@dataclass(frozen=True, eq=False, repr=False)
class ClassificationTask(Task):
    """Classification of texts from few labelled ones, drawn several times, by a linear classifier.

    Parameters
    ----------
    texts : list, tuple, ndarray, Series or one-column frame of str
        Texts to draw the training samples from.
    labels : array-like of str, int or bool, shape (n_texts,)
        Their labels.
    test_texts : as `texts`, optional
        Texts to test on. None tests each draw on the texts it left over.
    test_labels : as `labels`, optional
        Their labels, given together with `test_texts`.
    name : str, default="classification"
        Name of the task in the results.
    samples_per_label : int, default=8
        Most texts of a label in a draw.
    n_experiments : int, default=10
        Number of draws.
    classifier : scikit-learn classifier, optional
        None takes ``LogisticRegression(max_iter=100)``.
    metric : str, default="accuracy"
        The main score, one of `CLASSIFICATION_METRICS`.
    random_state : int, default=42
        Seed of draws and classifier.

    Notes
    -----
    With `test_texts` this is the protocol of mteb: draw k shuffles the order of draw k - 1 with the
    same permutation, and takes the first texts of each label.

    Examples
    --------
    >>> from skembed.evaluation import ClassificationTask
    >>> ClassificationTask(["a cat", "a dog"] * 20, ["cat", "dog"] * 20, name="pets")
    ClassificationTask(name='pets')
    """

    texts: Any
    labels: Any
    _: KW_ONLY
    test_texts: Any = None
    test_labels: Any = None
    name: str = "classification"
    samples_per_label: int = 8
    n_experiments: int = 10
    classifier: Any = None
    metric: str = "accuracy"
    random_state: int = 42


@dataclass(frozen=True, eq=False, repr=False)
class ClusteringTask(Task):
    """Clustering of samples of the texts with k-means, as many clusters as labels.

    Parameters
    ----------
    texts : list, tuple, ndarray, Series or one-column frame of str
        Texts to cluster.
    labels : array-like of str, int or bool, shape (n_texts,), or list of list
        Their true clusters; or one list a text, from the top of a hierarchy down. Each level is
        scored on its own, on the texts that reach it.
    name : str, default="clustering"
        Name of the task in the results.
    n_experiments : int, default=10
        Number of samples a level.
    sample_size : int, default=16384
        Size of a sample, drawn with replacement.
    max_fraction : float, optional
        Share of the texts to embed, drawn once. mteb takes 0.04 unless a task says otherwise; None
        embeds all.
    max_texts : int, optional
        Number of texts to embed instead.
    max_depth : int, optional
        Levels of the hierarchy to score; None scores all.
    metric : {"v_measure", "ami"}, default="v_measure"
        The main score.
    random_state : int, default=42
        Seed of draws and of k-means.

    Notes
    -----
    The protocol is that of mteb's fast clustering. There, a label -1 marks a text that does not
    reach a level, and so it does here; but mteb takes the mark for a label where labels are str,
    and here shorter lists are left out for any labels.

    Examples
    --------
    >>> from skembed.evaluation import ClusteringTask
    >>> ClusteringTask(["a cat", "a dog"] * 20, ["cat", "dog"] * 20, name="pets")
    ClusteringTask(name='pets')
    """

    texts: Any
    labels: Any
    _: KW_ONLY
    name: str = "clustering"
    n_experiments: int = 10
    sample_size: int = 16_384
    max_fraction: float | None = None
    max_texts: int | None = None
    max_depth: int | None = None
    metric: str = "v_measure"
    random_state: int = 42


@dataclass(frozen=True, eq=False, repr=False)
class STSTask(Task):
    """Correlation of the similarity of pairs of texts with graded scores.

    Parameters
    ----------
    pairs : list of 2-tuples, ndarray of shape (n_pairs, 2), or two-column frame of str
        Pairs of texts.
    scores : array-like of float, shape (n_pairs,)
        True similarity on any scale, higher is more similar.
    name : str, default="sts"
        Name of the task in the results.
    metric : str, default="cosine_spearman"
        The main score, one of `STS_METRICS`.
    random_state : int, default=42
        Seed of the bootstrap.

    Notes
    -----
    mteb also reports `spearman` and `pearson` of a model's own similarity; there is none here.

    Examples
    --------
    >>> from skembed.evaluation import STSTask
    >>> STSTask([("a cat", "a feline"), ("a cat", "a car")], [5.0, 0.5])
    STSTask(name='sts')
    """

    pairs: Any
    scores: Any
    _: KW_ONLY
    name: str = "sts"
    metric: str = "cosine_spearman"
    random_state: int = 42


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalTask(Task):
    """Retrieval of the relevant documents of a corpus for each query.

    Parameters
    ----------
    queries : list, tuple, ndarray, Series of str, or mapping
        Texts, or ``{query_id: text}``.
    corpus : list, tuple, ndarray, Series of str, or mapping
        Texts, or ``{document_id: text}``; a value may also be ``{"title": ..., "text": ...}``.
    relevance : mapping, sequence, array or frame
        ``{query_id: {document_id: grade}}`` or ``{query_id: [document_id, ...]}``; or a sequence of
        such values, one a query; or a matrix of grades (n_queries, n_documents), 0 for not judged;
        or a frame of three columns, query id, document id and grade.
    query_ids, document_ids : sequence of str or of int, optional
        Ids of the texts, unless those are a mapping. None takes their positions.
    name : str, default="retrieval"
        Name of the task in the results.
    top_k : int, default=1000
        Documents to find for a query.
    ignore_identical_ids : bool, default=False
        Drop a document whose id is that of the query.
    metric : str, default="ndcg_at_10"
        The main score: a metric of `skembed.metrics.RANKING_METRICS` at one of `K_VALUES`.
    random_state : int, default=42
        Seed of the bootstrap.

    Notes
    -----
    Documents of equal score come in descending order of their ids, ids of str as text. Judged
    documents that are not in the corpus count as not found.

    Examples
    --------
    >>> from skembed.evaluation import RetrievalTask
    >>> RetrievalTask({"q": "a pet"}, {"d1": "a cat", "d2": "a car"}, {"q": ["d1"]})
    RetrievalTask(name='retrieval')
    """

    queries: Any
    corpus: Any
    relevance: Any
    _: KW_ONLY
    query_ids: Sequence[Any] | None = None
    document_ids: Sequence[Any] | None = None
    name: str = "retrieval"
    top_k: int = 1000
    ignore_identical_ids: bool = False
    metric: str = "ndcg_at_10"
    random_state: int = 42


@dataclass(frozen=True, eq=False, repr=False)
class RerankingTask(Task):
    """Reranking of the candidates of each query.

    Parameters
    ----------
    queries : list, tuple, ndarray, Series of str, or mapping
        Texts, or ``{query_id: text}``.
    candidates : sequence of sequence, or mapping
        The texts of each query's candidates, one list a query. With a `corpus`: their ids, as
        ``{query_id: [document_id, ...]}`` or one list a query.
    relevance : sequence of sequence of int, or as `RetrievalTask`
        The grades of the candidates, list by list. With a `corpus`: by id, as for `RetrievalTask`;
        average precision then counts all judged positives, even those that are not candidates.
    corpus : list, tuple, ndarray, Series of str, or mapping, optional
        As `RetrievalTask`, where candidates have ids.
    query_ids, document_ids : sequence of str or of int, optional
        Ids of the texts, unless those are a mapping. None takes their positions.
    name : str, default="reranking"
        Name of the task in the results.
    top_k : int, default=1000
        Candidates of a query that count.
    metric : str, default="map_at_1000"
        The main score: a metric of `skembed.metrics.RANKING_METRICS` at one of `K_VALUES`.
    random_state : int, default=42
        Seed of the bootstrap.

    Examples
    --------
    >>> from skembed.evaluation import RerankingTask
    >>> RerankingTask(["a pet"], [["a car", "a cat"]], [[0, 1]])
    RerankingTask(name='reranking')
    """

    queries: Any
    candidates: Any
    relevance: Any
    _: KW_ONLY
    corpus: Any = None
    query_ids: Sequence[Any] | None = None
    document_ids: Sequence[Any] | None = None
    name: str = "reranking"
    top_k: int = 1000
    metric: str = "map_at_1000"
    random_state: int = 42
