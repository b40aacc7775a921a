"""`Retriever`: the best documents of a corpus for each query, exactly or approximately."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from skembed._validation import (
    check_bool,
    check_choice,
    check_dtype,
    check_int,
    check_path,
    parameter_error,
)
from skembed.estimators.base import (
    TextEstimatorMixin,
    check_encoder,
    fit_vectorizer,
    make_vectorizer,
)
from skembed.estimators.saved_index import (
    Saved,
    check_fingerprint,
    fingerprint_model,
    read_settings,
)
from skembed.inference.devices import check_device, choose_search_device
from skembed.metrics.qrels import (
    check_ids,
    check_new_ids,
    find_positions,
    join_titles,
    read_judgments,
    search_to_run,
)
from skembed.metrics.ranking import ndcg_at_k
from skembed.search.index import DocumentIndex, prepare_vectors
from skembed.search.index_file import read_index, write_index
from skembed.search.stored_vectors import STORAGE_KINDS
from skembed.similarity import Ids, TopK

__all__ = ["Retriever"]

_OWNER = "Retriever"
_SAVED_PARAMETERS = ("similarity", "storage", "rescore_storage", "rescore", "algorithm")
_NDCG_CUTOFF = 10


class Retriever(TextEstimatorMixin, BaseEstimator):
    """Retriever of the documents of a corpus that are most similar to each query.

    The search is exact: it compares each query with every document, block by block, in bounded
    memory. Documents can be stored in 2, 4 or 32 times less memory, and an approximate index can
    propose the candidates for exact scores.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of texts: the name of a model, which stays frozen, or an object with
        ``transform`` (and ``encode_query`` and ``encode_document``, if queries and documents
        differ), which `fit` clones and fits. An encoder (an object with ``encode``, such as a
        SentenceTransformer, or a callable) is used as it is. None takes embeddings instead of
        texts.
    similarity : {"cosine", "dot"}, default="cosine"
        Similarity measure.
    storage : {"float32", "float16", "int8", "binary"}, default="float32"
        Storage type of the vectors compared with every query: 4, 2, 1 or 1/8 bytes a component.
    rescore_storage : {"float32", "float16", "int8"}, optional
        Storage type of a second, finer copy, from which the best candidates are scored again. In
        a loaded index it stays on disk. None gives scores of the stored vectors.
    rescore : int, default=4
        Candidates for each result, where there is a second copy or an approximate index.
    algorithm : {"exact", "hnsw"}, default="exact"
        Comparison with every document, or with those that a graph of near neighbours proposes
        (needs usearch: ``pip install skembed[ann]``).
    device : str, default="auto"
        Device of the search: "cpu", "cuda", "cuda:1"; "auto" takes a CUDA device if there is one.
        The vectors stay in the memory of the host and pass through the device block by block.

    Attributes
    ----------
    ids_ : ndarray of object (str) or int64, shape (n_documents,)
        Ids of the documents in the order of `indices`.
    embedding_dim_ : int
        Width of an embedding.
    vectorizer_ : object
        The fitted vectorizer; absent where `vectorizer` is None.
    n_features_in_ : int
        Width of the embeddings seen by `fit`; only where `vectorizer` is None.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, when `fit` saw a frame of embeddings.

    See Also
    --------
    Reranker : Sort given candidates of each query.

    Notes
    -----
    Documents are embedded with ``encode_document`` and queries with ``encode_query``, so that an
    instruction stands in front of queries only, unless `document_instruction` asks for more.

    Each score that is returned is computed from one query and one document alone: equal documents
    have equal scores, and the other queries of a call change nothing. Equal scores are sorted as
    trec_eval does: by descending id; str as text, int as numbers.

    Beside the stored vectors a search on the CPU holds at most about 64 MiB (32 MiB where they are
    stored as float32), and a few times what it returns. float32 embeddings of unit length (any
    float32 under ``similarity="dot"``) are stored without a copy: leave such an array as it is
    after `fit`.

    With "int8", each vector is quantised to 255 levels. With "binary", each component becomes one
    of two values: the mean of the corpus values below its mean, or of those above; the corpus is
    that of `fit`. Queries are never quantised.

    Examples
    --------
    >>> from skembed import Retriever
    >>> corpus = ["The llama is a camelid.", "Faust is a play by Goethe.", "The Sun is hot."]
    >>> retriever = Retriever().fit(corpus, ids=["llama", "faust", "sun"])
    >>> scores, indices = retriever.search(["Who wrote Faust?"], top_k=2)
    >>> scores.shape, retriever.ids_[indices[0, 0]]
    ((1, 2), 'faust')
    """

    _fitted_mark = "ids_"
    _rules = {
        "vectorizer": check_encoder,
        "similarity": partial(check_choice, allowed=("cosine", "dot")),
        "storage": partial(check_dtype, allowed=STORAGE_KINDS),
        "rescore_storage": partial(check_dtype, allowed=(None, *STORAGE_KINDS[:-1])),
        "rescore": partial(check_int, low=1),
        "algorithm": partial(check_choice, allowed=("exact", "hnsw")),
        "device": check_device,
    }

    def __init__(
        self,
        vectorizer: Any = "skembed-mini",
        *,
        similarity: str = "cosine",
        storage: str = "float32",
        rescore_storage: str | None = None,
        rescore: int = 4,
        algorithm: str = "exact",
        device: str = "auto",
    ) -> None:
        self.vectorizer = vectorizer
        self.similarity = similarity
        self.storage = storage
        self.rescore_storage = rescore_storage
        self.rescore = rescore
        self.algorithm = algorithm
        self.device = device

    def fit(self, X: Any, y: Any = None, *, ids: Any = None) -> Retriever:
        """Embed and store a corpus.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or frame of str, or array-like of float, (n_documents, dim)
            The documents. Two columns are title and text, joined by a space; of a frame with a
            column "text", that one and "title" are taken. Embeddings where `vectorizer` is None.
        y : None
            Ignored.
        ids : array-like of str or int, shape (n_documents,), optional
            Ids of the documents, each once; None counts from 0.

        Returns
        -------
        Retriever
            This estimator.

        Raises
        ------
        TypeError, ValueError
            If a parameter, a document or an id has an invalid type or value, or there is no
            document.
        ImportError
            If `algorithm` is "hnsw" and usearch is not installed.
        """
        checked = self._checked()
        choose_search_device(checked.device, owner=_OWNER)  # an error now, not at the first search
        checked_ids = check_ids(ids, owner=_OWNER)
        documents = X if self.vectorizer is None else join_titles(X, owner=_OWNER)
        # On a copy, so that an error leaves an earlier index and its model as they were.
        fresh = clone(self)
        vectors = fresh._fit_vectors(documents, side="document")
        if checked_ids is None:
            checked_ids = np.arange(len(vectors), dtype=np.int64)
        _check_count(checked_ids, len(vectors), owner=_OWNER)
        index = DocumentIndex.build(
            checked_ids,
            prepare_vectors(vectors, checked.similarity, owner=_OWNER),
            storage=checked.storage,
            rescore_storage=checked.rescore_storage,
            hnsw=checked.algorithm == "hnsw",
        )
        for name in ("vectorizer_", "n_features_in_", "feature_names_in_", "embedding_dim_"):
            self.__dict__.pop(name, None)
            if hasattr(fresh, name):
                setattr(self, name, getattr(fresh, name))
        # What was built stays what it is: `set_params` takes effect at the next `fit`.
        self._seen = {name: getattr(checked, name) for name in _SAVED_PARAMETERS}
        self._index, self.ids_, self._has_automatic_ids = index, index.ids, ids is None
        return self

    def search(self, queries: Any, top_k: int = 10) -> TopK:
        """Find the best documents for each query.

        Parameters
        ----------
        queries : list, tuple, ndarray, Series or one-column frame of str, n_queries rows
            The queries; embeddings of shape (n_queries, dim) where `vectorizer` is None.
        top_k : int, default=10
            Number of documents to find; all of them where there are fewer.

        Returns
        -------
        TopK
            `scores`, float32, and `indices`, int64, each of shape (n_queries, k), the best first,
            of equal scores the higher id; ``ids_[indices]`` are the documents' ids. k is `top_k`,
            or the number of documents.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If `top_k` or a query has an invalid type or value, or no document is left.
        """
        check_is_fitted(self)
        n = len(self.ids_)
        if not n:
            raise ValueError(f"This {_OWNER} holds no documents. Call `add` or `fit` first.")
        top_k = min(n, check_int(top_k, name="top_k", owner=_OWNER, low=1))
        checked = self._checked()
        device = choose_search_device(checked.device, owner=_OWNER)
        vectors = self._embed_vectors(queries, name="queries", min_rows=0)
        vectors = prepare_vectors(vectors, self._seen["similarity"], owner=f"{_OWNER}.search")
        return self._index.search(vectors, top_k, rescore=checked.rescore, device=device)

    def add(self, documents: Any, *, ids: Any = None) -> Retriever:
        """Add documents at the end of the index.

        Costs a copy of the stored vectors, so add many at once. An error leaves the index as it
        was.

        Parameters
        ----------
        documents : list, tuple, ndarray, Series or frame of str, n_added rows
            As in `fit`.
        ids : array-like of str or int, shape (n_added,), optional
            New ids, of the type of the present ones. None counts on, where `fit` counted.

        Returns
        -------
        Retriever
            This estimator.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If a document has an invalid type or value, or an id is already in the index.
        """
        check_is_fitted(self)
        owner = f"{_OWNER}.add"
        new_ids = check_ids(ids, owner=owner)
        if new_ids is None and not self._has_automatic_ids:
            raise ValueError(
                f"The `ids` parameter of `{owner}` must hold an id for each document, since `fit` "
                "was given ids; got None."
            )
        if new_ids is not None:
            check_new_ids(new_ids, self.ids_, owner=owner)
        if getattr(self, "vectorizer_", None) is not None:
            documents = join_titles(documents, owner=owner, name="documents")
        vectors = self._embed_vectors(documents, side="document", name="documents")
        vectors = prepare_vectors(vectors, self._seen["similarity"], owner=owner)
        if new_ids is None:
            first = self._index.next_label
            new_ids = np.arange(first, first + len(vectors), dtype=np.int64)
        _check_count(new_ids, len(vectors), owner=owner)
        self._index.add(new_ids, vectors)
        self._has_automatic_ids = self._has_automatic_ids and ids is None
        self.ids_ = self._index.ids
        return self

    def remove(self, ids: Any) -> Retriever:
        """Remove documents; those behind them move up in `indices`.

        Costs a copy of the stored vectors, so remove many at once. An error leaves the index as
        it was.

        Parameters
        ----------
        ids : array-like of str or int, shape (n_removed,)
            Ids in the index.

        Returns
        -------
        Retriever
            This estimator.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If an id is not in the index, or is given twice.
        """
        check_is_fitted(self)
        owner = f"{_OWNER}.remove"
        checked_ids = check_ids(ids, owner=owner)
        if checked_ids is None:
            raise TypeError(f"The `ids` parameter of `{owner}` must be a list of ids; got None.")
        self._index.remove(find_positions(checked_ids, self.ids_, owner=owner))
        self.ids_ = self._index.ids
        return self

    def score(self, X: Any, y: Any, *, query_ids: Any = None) -> float:
        """Return nDCG@10, mean over queries.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_queries rows
            The queries; embeddings where `vectorizer` is None.
        y : sequence of n_queries, or mapping
            Judgments of each query: ``{document_id: grade}``, or a list of the relevant ids, or
            one id. With `query_ids`, a mapping of query ids to any of these.
        query_ids : sequence of n_queries, optional
            The key in `y` of each query.

        Returns
        -------
        float
            In [0, 1].

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If a query has no judged document, or no judged document at all is in the corpus.

        Notes
        -----
        As trec_eval computes it (`skembed.metrics.ndcg_at_k`): gains are linear, and judged
        documents that are not in the corpus count for the best possible ranking. A query without
        judgments is an error, since leaving it out would raise the mean: drop such queries.
        """
        check_is_fitted(self)
        judged = read_judgments(y, query_ids, ids=self.ids_, owner=f"{_OWNER}.score")
        top = self.search(X, _NDCG_CUTOFF)
        if len(top.scores) != len(judged):
            raise ValueError(
                f"The `y` parameter of `{_OWNER}.score` must judge each of {len(top.scores)} "
                f"queries; got {len(judged)}."
            )
        run = search_to_run(*top, document_ids=self.ids_.tolist())
        return ndcg_at_k(judged, run, k=_NDCG_CUTOFF)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder: arrays, and a manifest with the fingerprint of the model.

        The vectorizer itself is not written. The folder holds the old index or the new one,
        wherever writing stops.

        Parameters
        ----------
        path : str or path
            A new or empty folder, or one that holds an index, which is replaced. Files that are no
            part of it stay.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        ValueError
            If the folder holds other files but no index, or an index that cannot be read.
        BlockingIOError
            If another process is writing there.
        OSError
            If the folder cannot be written; its earlier content is kept.
        """
        check_is_fitted(self)
        path = check_path(path, name="path", owner=f"{_OWNER}.save")
        checked = self._checked()
        is_model_name = isinstance(checked.vectorizer, str)
        model, probe = fingerprint_model(getattr(self, "vectorizer_", None), owner=_OWNER)
        settings, arrays = self._index.pack()
        settings |= {
            "parameters": {**self._seen, "rescore": checked.rescore},
            "ids_counted": self._has_automatic_ids,
            "vectorizer": checked.vectorizer if is_model_name else None,
            "model": model,
        }
        if probe is not None:
            arrays["probe"] = np.asarray(probe, dtype=np.float32)
        write_index(path, settings, arrays, owner=f"{_OWNER}.save")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        vectorizer: Any = Saved.NAME,
        mmap: bool = True,
        verify: bool = False,
        device: str = "auto",
    ) -> Retriever:
        """Return a fitted retriever for an index in a folder.

        Parameters
        ----------
        path : str or path
            The folder that `save` wrote.
        vectorizer : str, path, transformer, encoder or None, optional
            Encoder of the queries; used as it is, not cloned. It must be the model that embedded
            the documents. Left out, it is the model that the retriever had by its name.
        mmap : bool, default=True
            Map the vectors from disk, read-only, instead of reading them; `add` and `remove`
            then make copies in memory.
        verify : bool, default=False
            Check all of a mapped index here, which reads it once. Otherwise each part of the mapped
            vectors is checked when a search first uses it, and all else is checked here.
        device : str, default="auto"
            Device of the search.

        Returns
        -------
        Retriever
            A fitted retriever.

        Raises
        ------
        FileNotFoundError
            If there is no index.
        ValueError
            If the index is damaged, of another version or of another model, or `vectorizer`
            is left out and the index was built with an object.
        """
        owner = f"{_OWNER}.load"
        path = check_path(path, name="path", owner=owner)
        mmap = check_bool(mmap, name="mmap", owner=owner)
        verify = check_bool(verify, name="verify", owner=owner)
        saved = read_index(path, owner=owner, mmap=mmap, verify=verify)
        settings = read_settings(saved, _SAVED_PARAMETERS)
        where = f"The index in {str(saved.folder)!r}"
        if vectorizer is Saved.NAME:
            vectorizer = settings["vectorizer"]
            if vectorizer is None and settings["model"] is not None:
                raise ValueError(
                    f"{where} was built with a vectorizer that has no name. Pass it: "
                    f"{_OWNER}.load(path, vectorizer=...)."
                )
        try:
            cls(None, **settings["parameters"])._checked()
        except (TypeError, ValueError) as error:
            raise saved.damaged(str(error)) from error
        retriever = cls(vectorizer, device=device, **settings["parameters"])
        retriever._checked()
        index = DocumentIndex.unpack(saved)
        probe = saved.read("probe", "f4", n_axes=2) if "probe" in saved.arrays else None
        is_model_name = isinstance(vectorizer, (str, os.PathLike))
        model = make_vectorizer(vectorizer, owner=_OWNER) if is_model_name else vectorizer
        if is_model_name:  # so that it notices other weights later
            fit_vectorizer(model, ["text"])
        check_fingerprint(model, settings["model"], probe, where=where, owner=_OWNER)
        retriever._set_vectorizer(model, settings["dim"])
        if model is None:
            retriever.n_features_in_ = settings["dim"]
        checked = retriever._checked()
        retriever._seen = {name: getattr(checked, name) for name in _SAVED_PARAMETERS}
        retriever._index = index
        retriever._has_automatic_ids = settings["ids_counted"]
        retriever.ids_ = index.ids
        return retriever

    def _checked(self) -> Any:
        """Return the parameters as built-in values, also against each other."""
        checked = super()._checked()
        finer, storage = checked.rescore_storage, checked.storage
        if finer is not None and finer not in STORAGE_KINDS[: STORAGE_KINDS.index(storage)]:
            expected = f"finer than storage={storage!r}, or None"
            raise parameter_error(finer, name="rescore_storage", owner=_OWNER, expected=expected)
        return checked


def _check_count(ids: Ids, n: int, *, owner: str) -> None:
    """Raise ValueError unless there are as many ids as documents."""
    if len(ids) != n:
        raise ValueError(
            f"The `ids` parameter of `{owner}` must hold an id for each of {n} documents; "
            f"got {len(ids)}."
        )
