"""`Reranker`: the candidates of each query in order, and a score for each pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from skembed._inputs import check_hashable, find_missing, read_items, read_numbers
from skembed._validation import check_choice
from skembed.embedding import check_pair_columns, check_text_column, embed, embed_pairs
from skembed.estimators.base import (
    TextEstimatorMixin,
    check_embeddings,
    check_encoder,
    fit_vectorizer,
    make_vectorizer,
    trains_on_labels,
)
from skembed.metrics.ranking import map_at_k
from skembed.similarity import Indices, Ranking, Vectors, check_vectors, paired_cosine, paired_dot
from skembed.training.trainer import ContrastiveTrainer, check_trainer

__all__ = ["Reranker"]

_OWNER = "Reranker"
_N_NEGATIVES = 7  # where the trainer is "auto", as in ContrastiveTrainer
_MAP_CUT = 1000  # as mteb; no list of candidates is longer


class Reranker(TextEstimatorMixin, BaseEstimator):
    """Reranker of lists of candidates by their similarity to the query.

    Each query has candidates of its own, as many as you like: what a keyword search found, or a
    `Retriever` with a smaller model. Without training it is as good as its vectorizer; `fit` on
    judged pairs trains the vectorizer on them.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of texts: the name of a model, which stays frozen, or an object with
        ``transform`` (and ``encode_query`` and ``encode_document``, if the sides differ), which
        `fit` clones. It is trained where it has a `trainer` that is not None, such as
        ``NVEmbedVectorizer()``. An encoder (an object with ``encode``, such as a
        SentenceTransformer, or a callable) is used as it is. None takes embeddings instead of
        texts.
    similarity : {"cosine", "dot"}, default="cosine"
        Similarity measure.

    Attributes
    ----------
    vectorizer_ : object
        The fitted vectorizer; absent where `vectorizer` is None.
    trained_ : bool
        Whether `fit` has trained it on judged pairs.
    embedding_dim_ : int
        Width of one embedding, where `fit` has seen pairs.
    n_features_in_ : int
        Width of the pairs of embeddings seen by `fit`; only where `vectorizer` is None.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, when `fit` saw a frame of embeddings.

    See Also
    --------
    Retriever : Find candidates in a corpus.

    Notes
    -----
    Trains on rows (query, relevant document, negatives): one for each relevant pair, with as many
    negatives as the trainer's `n_negatives`, drawn by its `random_state` from the documents of
    the same query that are not relevant, then from those of other queries.

    Examples
    --------
    >>> from skembed import Reranker
    >>> reranker = Reranker().fit()
    >>> candidates = [["The Sun is hot.", "Faust is a play by Goethe."], []]
    >>> indices, scores = reranker.rank(["Who wrote Faust?", "What is a llama?"], candidates)
    >>> [ranked.tolist() for ranked in indices]
    [[1, 0], []]
    """

    _fitted_mark = "trained_"
    _rules = {
        "vectorizer": check_encoder,
        "similarity": partial(check_choice, allowed=("cosine", "dot")),
    }

    def __init__(self, vectorizer: Any = "skembed-mini", *, similarity: str = "cosine") -> None:
        self.vectorizer = vectorizer
        self.similarity = similarity

    def fit(self, X: Any = None, y: Any = None, *, groups: Any = None) -> Reranker:
        """Train on judged pairs, if there are any and the vectorizer has a trainer.

        Parameters
        ----------
        X : sequence of (query, document), frame of two columns, or array-like of float, optional
            Pairs of texts, or where `vectorizer` is None embeddings side by side, (n, 2 * dim).
            None: the vectorizer is used as it is.
        y : array-like of float, shape (n,), optional
            Relevance of each document; above 0 is relevant.
        groups : array-like, shape (n,), optional
            The query that each row belongs to; None takes rows with the same query for one.

        Returns
        -------
        Reranker
            This estimator.

        Raises
        ------
        TypeError, ValueError
            If a parameter, a pair or `y` has an invalid type or value, or the vectorizer trains
            and no document is relevant.
        ImportError, SkembedError
            If the vectorizer trains and its `fit` raises them.
        """
        self._checked()
        vectorizer = make_vectorizer(self.vectorizer, owner=_OWNER)
        if X is None:
            return self._set_fitted(vectorizer, None, trained=False)
        if vectorizer is None:
            pairs = check_embeddings(self, X, reset=True)
            dim = _half_width(pairs.shape[1])
            if y is not None:
                read_numbers(y, name="y", owner=_OWNER, n=len(pairs))
            return self._set_fitted(None, dim, trained=False)
        queries, documents = check_pair_columns(X, vectorizer=vectorizer, owner=_OWNER, min_rows=1)
        relevance = None
        if y is not None:
            relevance = read_numbers(y, name="y", owner=_OWNER, n=len(queries))
        trained = relevance is not None and trains_on_labels(vectorizer)
        if relevance is not None and trained:
            numbers = _number_groups(groups, queries, owner=_OWNER, n=len(queries))
            trainer = vectorizer.trainer
            if isinstance(trainer, ContrastiveTrainer):
                trainer = check_trainer(trainer)
            rows = _make_rows(
                queries,
                documents,
                relevance > 0,
                numbers,
                n_negatives=getattr(trainer, "n_negatives", _N_NEGATIVES),
                random_state=getattr(trainer, "random_state", None),
            )
            vectorizer.fit(list(rows))
        else:
            fit_vectorizer(vectorizer, [*queries, *documents])
        dim = embed(vectorizer, queries[:1], "query", owner=_OWNER).shape[1]
        return self._set_fitted(vectorizer, dim, trained=trained)

    def predict(self, X: Any) -> Vectors:
        """Return a score for each pair.

        Parameters
        ----------
        X : sequence of (query, document), frame of two columns, or array-like of float
            Pairs of texts, or where `vectorizer` is None embeddings side by side, (n, 2 * dim).

        Returns
        -------
        ndarray of float32, shape (n,)
            Higher for a document that suits its query better.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If a pair has an invalid type or value.
        """
        check_is_fitted(self)
        vectorizer = getattr(self, "vectorizer_", None)
        if vectorizer is None:
            first = not hasattr(self, "n_features_in_")  # after `fit` without pairs
            pairs = check_embeddings(_Plain() if first else self, X, reset=first)
            dim = _half_width(pairs.shape[1])
            return self._score(pairs[:, :dim], pairs[:, -dim:])
        columns = check_pair_columns(X, vectorizer=vectorizer, owner=_OWNER)
        return self._score(*embed_pairs(vectorizer, columns, owner=_OWNER))

    def rank(self, queries: Any, candidates: Sequence[Any]) -> Ranking:
        """Sort the candidates of each query.

        Parameters
        ----------
        queries : list, tuple, ndarray, Series or one-column frame of str, n_queries rows
            The queries; embeddings of shape (n_queries, dim) where `vectorizer` is None.
        candidates : sequence of n_queries
            A list of documents for each query, of any length, or an array of embeddings
            (n_candidates, dim). An empty list gives an empty ranking.

        Returns
        -------
        Ranking
            `indices` and `scores`, each a list of n_queries arrays, the best first.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If there is not one list for each query, or a text has an invalid type or value; the
            error names the position of the list.
        """
        check_is_fitted(self)
        vectorizer = getattr(self, "vectorizer_", None)
        if vectorizer is None:
            vectors, parts = _check_vector_lists(queries, candidates)
            flat = np.concatenate([*parts, vectors[:0]])
            sizes = np.array([len(part) for part in parts], dtype=np.int64)
        else:
            options = {"vectorizer": vectorizer, "owner": f"{_OWNER}.rank", "min_rows": 0}
            texts = check_text_column(queries, name="queries", **options)
            _check_lists(candidates, len(texts))
            lists = [
                check_text_column(part, name=f"candidates[{i}]", **options)
                for i, part in enumerate(candidates)
            ]
            sizes = np.array([len(part) for part in lists], dtype=np.int64)
            documents = [text for part in lists for text in part]
            if not documents:
                indices = [np.empty(0, dtype=np.int64) for _ in texts]
                return Ranking(indices, [np.empty(0, dtype=np.float32) for _ in texts])
            vectors, flat = embed_pairs(vectorizer, (texts, documents), owner=_OWNER)
        scores = self._score(vectors[np.repeat(np.arange(len(sizes)), sizes)], flat)
        ranked = Ranking([], [])
        for part in np.split(scores, np.cumsum(sizes)[:-1]) if len(sizes) else ():
            order = np.argsort(-part, kind="stable")
            ranked.indices.append(order)
            ranked.scores.append(part[order])
        return ranked

    def score(self, X: Any, y: Any, *, groups: Any = None) -> float:
        """Return the mean average precision over queries.

        Parameters
        ----------
        X : sequence of (query, document), frame of two columns, or array-like of float
            As `predict`.
        y : array-like of float, shape (n,)
            Relevance of each document; above 0 is relevant.
        groups : array-like, shape (n,), optional
            The query that each row belongs to; None takes rows with the same query for one.

        Returns
        -------
        float
            In [0, 1].

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If a pair, `y` or `groups` has an invalid type or value.

        Notes
        -----
        As mteb computes it (`skembed.metrics.map_at_k`): a query without a relevant document
        counts, with 0. Of equal scores the later row goes first, as trec_eval would sort numbered
        documents.
        """
        scores = self.predict(X)
        relevance = read_numbers(y, name="y", owner=f"{_OWNER}.score", n=len(scores))
        vectorizer = getattr(self, "vectorizer_", None)
        keys: Sequence[Any] = ()
        if groups is None and vectorizer is None:
            array = np.asarray(X)
            keys = [row.tobytes() for row in array[:, : array.shape[1] // 2]]
        elif groups is None:
            keys, _ = check_pair_columns(X, vectorizer=vectorizer, owner=_OWNER)
        numbers = _number_groups(groups, keys, owner=f"{_OWNER}.score", n=len(scores))
        judged: dict[int, dict[int, int]] = {}
        run: dict[int, dict[int, float]] = {}
        for row, (group, score, grade) in enumerate(
            zip(numbers.tolist(), scores.tolist(), (relevance > 0).tolist(), strict=True)
        ):
            judged.setdefault(group, {})[row] = int(grade)
            run.setdefault(group, {})[row] = score
        return map_at_k(judged, run, k=_MAP_CUT)

    def _set_fitted(self, vectorizer: Any, dim: int | None, *, trained: bool) -> Reranker:
        """Store what `fit` learned; without pairs no width is known."""
        self._set_vectorizer(vectorizer, dim or 0)
        if dim is None:
            for name in ("n_features_in_", "feature_names_in_", "embedding_dim_"):
                self.__dict__.pop(name, None)
        self.trained_ = trained
        return self

    def _score(self, queries: Any, documents: Any) -> Vectors:
        """Return the similarity of each document with the query of its row, (n,)."""
        compare = paired_cosine if self._checked().similarity == "cosine" else paired_dot
        return compare(queries, documents)


class _Plain(BaseEstimator):
    """An estimator on which scikit-learn checks the width of an array once."""


def _half_width(width: int) -> int:
    """Return the width of one embedding of a pair."""
    if width % 2:
        raise ValueError(
            f"The `X` parameter of `{_OWNER}` must hold two embeddings a row, side by side, so an "
            f"even number of columns; got n_features = {width}."
        )
    return width // 2


def _number_groups(groups: Any, keys: Sequence[Any], *, owner: str, n: int) -> Indices:
    """Return a number for the group of each row, (n,); without groups, of each distinct key."""
    if groups is not None:
        subject = f"The `groups` parameter of `{owner}`"
        keys = read_items(groups, subject=subject, of="groups")
        absent = find_missing(keys)
        if absent:
            raise ValueError(
                f"{subject} must name the query of each row; got {len(absent)} missing, the first "
                f"at groups[{absent[0]}]. Drop these rows."
            )
        check_hashable(keys, subject=subject, of="names of queries")
    if len(keys) != n:
        raise ValueError(
            f"The `groups` parameter of `{owner}` must name the query of each of {n} rows; "
            f"got {len(keys)}."
        )
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _check_vector_lists(
    queries: Any, candidates: Any
) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
    """Return queries (n, dim), and the candidates of each, (n_candidates, dim)."""
    owner = f"{_OWNER}.rank"
    vectors = check_embeddings(_Plain(), queries, reset=True, name="queries", min_rows=0)
    _check_lists(candidates, len(vectors))
    dim, lists = vectors.shape[1], []
    for i, part in enumerate(candidates):
        name = f"candidates[{i}]"
        rows = np.empty((0, dim)) if len(part) == 0 else part
        lists.append(check_vectors(rows, name=name, owner=owner, dim=dim))
        if not np.isfinite(lists[-1]).all():
            raise ValueError(f"The `{name}` parameter of `{owner}` must hold finite numbers.")
    return vectors, lists


def _check_lists(candidates: Any, n: int) -> None:
    """Raise unless there is one list of candidates for each of n queries."""
    subject = f"The `candidates` parameter of `{_OWNER}.rank`"
    if isinstance(candidates, (str, bytes)) or not hasattr(candidates, "__len__"):
        raise TypeError(f"{subject} must be a list of lists; got {type(candidates).__name__}.")
    if len(candidates) != n:
        raise ValueError(
            f"{subject} must hold a list for each of {n} queries; got {len(candidates)}."
        )


def _make_rows(
    queries: Sequence[str | None],
    documents: Sequence[str | None],
    relevant: npt.NDArray[np.bool_],
    groups: Indices,
    *,
    n_negatives: int,
    random_state: Any,
) -> Iterator[tuple[str | None, ...]]:
    """Yield (query, relevant document, negatives...) for each relevant pair, all of one length.

    Without any negative, rows are pairs.
    """
    if not relevant.any():
        raise ValueError(
            f"The `y` parameter of `{_OWNER}` must hold a relevance above 0, to train on; got none."
        )
    seed = random_state
    if isinstance(random_state, np.random.RandomState):
        seed = int(random_state.randint(2**31))
    rng = np.random.default_rng(seed)
    by_group = _list_negatives(queries, documents, relevant, groups)
    distinct = list(dict.fromkeys(documents))
    width = n_negatives if any(irrelevant for irrelevant, _ in by_group.values()) else 0
    for row in np.flatnonzero(relevant).tolist():
        irrelevant, excluded = by_group[int(groups[row])]
        negatives = [irrelevant[i] for i in rng.permutation(len(irrelevant))[:width]]
        # A query whose documents are all relevant, or few, gets those of other queries.
        for i in rng.permutation(len(distinct)) if len(negatives) < width else ():
            if len(negatives) == width:
                break
            if distinct[i] not in excluded and distinct[i] not in negatives:
                negatives.append(distinct[i])
        while negatives and len(negatives) < width:
            negatives.append(negatives[len(negatives) % len(irrelevant or negatives)])
        if len(negatives) == width:
            yield (queries[row], documents[row], *negatives)


def _list_negatives(
    queries: Sequence[str | None],
    documents: Sequence[str | None],
    relevant: npt.NDArray[np.bool_],
    groups: Indices,
) -> dict[int, tuple[list[str | None], set[str | None]]]:
    """Return for each group its distinct negatives, and the texts that are never one of them."""
    excluded: dict[int, set[str | None]] = {}
    for group, query, document, is_relevant in zip(
        groups.tolist(), queries, documents, relevant.tolist(), strict=True
    ):
        excluded.setdefault(group, set()).update([query, document] if is_relevant else [query])
    negatives: dict[int, dict[str | None, None]] = {group: {} for group in excluded}
    for group, document in zip(groups.tolist(), documents, strict=True):
        if document not in excluded[group]:
            negatives[group][document] = None
    return {group: (list(negatives[group]), excluded[group]) for group in excluded}
