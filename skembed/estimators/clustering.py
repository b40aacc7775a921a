"""`EmbeddingClusterer`: clusters of texts, with names, and the cluster of a new text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin, clone
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin_min, silhouette_score, v_measure_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from skembed._inputs import read_label_array
from skembed._validation import (
    check_choice,
    check_int,
    check_real,
    check_seed,
    import_optional,
    list_items,
    or_word,
    parameter_error,
)
from skembed.embedding import FloatArray, check_text_column
from skembed.estimators.base import TextEstimatorMixin, check_encoder
from skembed.estimators.cluster_names import (
    find_terms,
    name_clusters,
    pick_representatives,
)
from skembed.exceptions import SkembedWarning
from skembed.similarity import Ints

__all__ = ["EmbeddingClusterer", "MAX_SILHOUETTE_ROWS"]

_CLUSTERERS = ("kmeans", "minibatch_kmeans", "agglomerative", "hdbscan")
# Silhouettes are computed on at most this many texts: their cost grows with the square.
MAX_SILHOUETTE_ROWS = 4000
_MAX_AUTO_CLUSTERS = 64


def _check_clusterer(value: Any, *, name: str, owner: str) -> Any:
    """Return the name of a clusterer, or a clusterer as it is."""
    if isinstance(value, str):
        return check_choice(value, name=name, owner=owner, allowed=_CLUSTERERS)
    if isinstance(value, type) or not hasattr(value, "fit"):
        names = ", ".join(map(repr, _CLUSTERERS))
        expected = f"one of {names}, or a scikit-learn clusterer"
        raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)
    return value


def _check_counts(value: Any, *, name: str, owner: str) -> Any:
    """Return None, "auto", a number of clusters, or several to try, in order."""
    items = list_items(value)
    if items is not None:
        if not items:
            raise ValueError(
                f"The `{name}` parameter of `{owner}` must hold at least one int; got none."
            )
        return sorted({check_int(k, name=name, owner=owner, low=2) for k in items})
    return or_word("auto", partial(check_int, low=1, allow_none=True))(
        value, name=name, owner=owner
    )


def _check_reducer(value: Any, *, name: str, owner: str) -> Any:
    """Return "umap", a transformer as it is, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        return check_choice(value, name=name, owner=owner, allowed=("umap",))
    if isinstance(value, type) or not callable(getattr(value, "fit_transform", None)):
        expected = "'umap', a transformer with `fit_transform`, or None"
        raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)
    return value


def _check_counter(value: Any, *, name: str, owner: str) -> Any:
    """Return a counter of terms as it is, or None."""
    needed = ("build_analyzer", "fit_transform", "get_feature_names_out")
    usable = all(callable(getattr(value, method, None)) for method in needed)
    if value is None or (usable and not isinstance(value, type)):
        return value
    expected = "a CountVectorizer or None"
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


class EmbeddingClusterer(TextEstimatorMixin, ClusterMixin, BaseEstimator):
    r"""Clusterer of texts by their embeddings, which says what each cluster is about.

    One call embeds the texts, finds the clusters (and, if asked, their number) and names them by
    their terms. Texts that a density method leaves out have the label -1 and belong to no cluster.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of the texts; `fit` uses a clone. A name or path is a frozen model of
        `NVEmbedVectorizer`. An encoder (an object with ``encode``, such as a SentenceTransformer,
        or a callable) is used as it is. None: X holds embeddings, as in the last step of a
        Pipeline.
    clusterer : str or clusterer, default="kmeans"
        "kmeans", "minibatch_kmeans" (faster from some ten thousand texts), "agglomerative" (Ward;
        memory grows with the square of the texts), "hdbscan" (finds the number itself and leaves
        noise out; best with ``reducer="umap"``), or a scikit-learn clusterer.
    n_clusters : int, "auto" or sequence of int, optional
        Number of clusters; "auto" tries a range of up to 64 and takes the best silhouette, a
        sequence tries these. None is "auto" for a name, and leaves an instance as it is. Density
        methods take None only. Never more than there are different embeddings: identical texts
        are one cluster.
    reducer : "umap", transformer or None, default=None
        Reduction of the embeddings before they are clustered. "umap" is UMAP to 5 dimensions by
        cosine, as the extra ``plot`` installs it.
    min_cluster_size : int, default=10
        Smallest cluster of "hdbscan", in texts.
    noise_quantile : float, default=0.9
        After a fit that left noise: `predict` calls a text noise when it is farther from the
        nearest centre than this share of that cluster's own texts.
    n_terms : int, default=10
        Length of `top_terms_`.
    n_representatives : int, default=3
        Length of `representative_texts_`.
    term_vectorizer : CountVectorizer, optional
        Counter of terms; `fit` uses a clone. None is ``CountVectorizer(stop_words="english")``.
    random_state : int, RandomState instance or None, default=None
        Seed of clusterer, reducer, and the texts that silhouettes are taken of.

    Attributes
    ----------
    labels_ : ndarray of int64, shape (n_texts,)
        Cluster of each text, from 0; -1 is noise.
    n_clusters_ : int
        Number of clusters, without noise.
    cluster_centers_ : ndarray of float, shape (n_clusters_, dim)
        In the space of the embeddings: the clusterer's own where it has them and nothing was
        reduced, else the means of the clusters.
    top_terms_ : dict of int to list of str
        The terms that set each cluster apart, best first. Absent where `fit` saw no texts.
    cluster_names_ : dict of int to str
        The first three of them.
    representative_indices_ : dict of int to list of int
        The rows nearest to each centre, nearest first, no text twice.
    representative_texts_ : dict of int to list of str
        Their texts. Absent where `fit` saw no texts.
    silhouettes_ : dict of int to float
        Number of clusters tried -> mean silhouette; empty where the number was given.
    noise_radii_ : ndarray of float, shape (n_clusters_,)
        Distance from each centre beyond which `predict` finds noise; infinite without noise.
    clusterer_ : clusterer
        The fitted clusterer; its labels may be numbered otherwise.
    reducer_ : transformer or None
        The fitted reducer.
    vectorizer_ : transformer
        The fitted vectorizer; absent where ``vectorizer=None``.
    embedding_dim_ : int
        Width of the embeddings.
    n_features_in_ : int
        The same, where ``vectorizer=None``.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Column names, where embeddings came as a frame with names.

    See Also
    --------
    EmbeddingClassifier : Where there are labels.

    Notes
    -----
    Terms are weighed by class-based TF-IDF: with :math:`f_{t,c}` the count of term t in cluster c,
    :math:`f_t` its count in all clusters and A the mean number of terms in a cluster,

    .. math:: W_{t,c} = f_{t,c} \log (1 + A / f_t).

    Noise is in none of the counts.

    Distances are Euclidean, which orders unit vectors as cosine does. Given embeddings are not
    scaled.

    `predict` takes the nearest centre, so after "agglomerative" and "hdbscan", or with a reducer,
    it may differ from `labels_` on the same texts.

    References
    ----------
    M. Grootendorst, BERTopic, arXiv 2203.05794, section 3.3 (class-based TF-IDF).

    P. J. Rousseeuw, Silhouettes, Journal of Computational and Applied Mathematics 20, 1987.

    Examples
    --------
    >>> from skembed import EmbeddingClusterer
    >>> texts = ["my card was stolen", "card lost", "the stolen card", "open an account"]
    >>> texts += ["a new account please", "which account to open"]
    >>> found = EmbeddingClusterer(n_clusters=2, random_state=0).fit(texts)
    >>> sorted(found.cluster_names_.values())
    ['account, open, new', 'card, stolen, lost']
    >>> found.cluster_names_[found.predict(["another account"])[0]]
    'account, open, new'
    """

    _fitted_mark = "noise_radii_"
    _rules = {
        "vectorizer": check_encoder,
        "clusterer": _check_clusterer,
        "n_clusters": _check_counts,
        "reducer": _check_reducer,
        "min_cluster_size": partial(check_int, low=2),
        "noise_quantile": partial(check_real, low=0, high=1, inclusive="right"),
        "n_terms": partial(check_int, low=1),
        "n_representatives": partial(check_int, low=1),
        "term_vectorizer": _check_counter,
        "random_state": check_seed,
    }

    def __init__(
        self,
        vectorizer: Any = "skembed-mini",
        *,
        clusterer: Any = "kmeans",
        n_clusters: int | str | Sequence[int] | None = None,
        reducer: Any = None,
        min_cluster_size: int = 10,
        noise_quantile: float = 0.9,
        n_terms: int = 10,
        n_representatives: int = 3,
        term_vectorizer: Any = None,
        random_state: Any = None,
    ) -> None:
        self.vectorizer = vectorizer
        self.clusterer = clusterer
        self.n_clusters = n_clusters
        self.reducer = reducer
        self.min_cluster_size = min_cluster_size
        self.noise_quantile = noise_quantile
        self.n_terms = n_terms
        self.n_representatives = n_representatives
        self.term_vectorizer = term_vectorizer
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, texts: Any = None) -> EmbeddingClusterer:
        """Embed the texts, find the clusters and name them.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts; embeddings of shape (n_texts, dim) where ``vectorizer=None``.
        y : array-like, optional
            Ignored; here for scikit-learn.
        texts : list, tuple, ndarray, Series or one-column frame of str, optional
            With embeddings: the texts behind them, for `top_terms_` and `representative_texts_`.

        Returns
        -------
        EmbeddingClusterer
            This estimator.

        Raises
        ------
        TypeError
            If X is not texts (or embeddings), or a parameter is of the wrong type.
        ValueError
            If `n_clusters` exceeds the number of texts, a parameter is out of range, or
            embeddings are not finite.
        ImportError
            If `reducer` is "umap" and umap-learn is not installed.
        """
        owner = type(self).__name__
        checked = self._checked()
        words = self._read_texts(X, texts, owner=owner)
        vectors = self._fit_vectors(X)
        seed = int(check_random_state(checked.random_state).randint(2**31 - 1))
        reducer = _make_reducer(checked.reducer, len(vectors), seed=seed, owner=owner)
        space = vectors if reducer is None else np.asarray(reducer.fit_transform(vectors))
        clusterer, labels, silhouettes = self._find_clusters(space, checked, seed=seed)
        self.labels_ = _number_labels(labels)
        self.n_clusters_ = int(self.labels_.max(initial=-1)) + 1
        if not self.n_clusters_:
            warnings.warn(
                f"All {len(vectors)} texts are noise. Lower `min_cluster_size`, or set "
                "reducer='umap'. Silence this with warnings.filterwarnings('ignore', "
                "category=skembed.SkembedWarning).",
                SkembedWarning,
                stacklevel=2,
            )
        self.clusterer_, self.reducer_, self.silhouettes_ = clusterer, reducer, silhouettes
        centers = getattr(clusterer, "cluster_centers_", None) if reducer is None else None
        if centers is None or np.shape(centers) != (self.n_clusters_, vectors.shape[1]):
            centers = _compute_means(vectors, self.labels_, self.n_clusters_)
        self.cluster_centers_ = np.asarray(centers)
        self._describe(vectors, words, checked)
        return self

    def predict(self, X: Any) -> Ints:
        """Place new texts into the clusters.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.

        Returns
        -------
        ndarray of int64, shape (n_texts,)
            The cluster of the nearest centre; -1 where `fit` left noise and the text is beyond
            the cluster's radius in `noise_radii_`.
        """
        vectors = self._embed_vectors(X)
        if not self.n_clusters_:
            return np.full(len(vectors), -1, dtype=np.int64)
        centers = self.cluster_centers_
        rows, _ = pairwise_distances_argmin_min(vectors, centers.astype(vectors.dtype))
        nearest = rows.astype(np.int64)
        distances = np.linalg.norm(vectors - centers[nearest], axis=1)
        nearest[distances > self.noise_radii_[nearest]] = -1
        return nearest

    def score(self, X: Any, y: Any) -> float:
        """Return the V-measure of the predicted clusters against true labels.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.
        y : array-like, shape (n_texts,)
            True labels: str, int or bool.

        Returns
        -------
        float
            In [0, 1]; noise counts as one more cluster.

        Raises
        ------
        TypeError, ValueError
            If there are no labels, or not as many as texts; or one is missing, or they are of
            several types.
        """
        check_is_fitted(self)
        if y is None:
            raise ValueError(
                f"{type(self).__name__}.score requires y to be passed, but the target y is None."
            )
        labels = read_label_array(y, name="y", owner=f"{type(self).__name__}.score")
        check_consistent_length(X, labels)
        return float(v_measure_score(labels, self.predict(X)))

    def plot_silhouettes(self, ax: Any = None) -> Any:
        """Draw the mean silhouette by number of clusters, the chosen one marked.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Axes to draw on; None makes a figure.

        Returns
        -------
        matplotlib Axes
            With a line for `silhouettes_`.

        Raises
        ------
        ValueError
            If `fit` was given the number of clusters, so that there is nothing to draw.
        ImportError
            If matplotlib is not installed.
        """
        check_is_fitted(self)
        if not self.silhouettes_:
            raise ValueError(
                "There are no silhouettes to draw: the number of clusters was not searched. Fit "
                "with n_clusters='auto'."
            )
        purpose = "`EmbeddingClusterer.plot_silhouettes`"
        pyplot = import_optional("matplotlib.pyplot", extra="plot", purpose=purpose)
        axes = pyplot.subplots()[1] if ax is None else ax
        counts, values = list(self.silhouettes_), list(self.silhouettes_.values())
        axes.plot(counts, values, marker="o")
        axes.axvline(counts[int(np.argmax(values))], linestyle="--", color="0.5")
        axes.set(xlabel="number of clusters", ylabel="mean silhouette")
        return axes

    def _read_texts(self, X: Any, texts: Any, *, owner: str) -> list[str] | None:
        """Return the texts that name the clusters; None where there are none."""
        if self.vectorizer is not None and texts is not None:
            raise ValueError(
                f"The `texts` parameter of `{owner}.fit` must be None, since X holds the texts."
            )
        if self.vectorizer is None and texts is None:
            return None
        column, name = (X, "X") if texts is None else (texts, "texts")
        checked = check_text_column(column, vectorizer=self.vectorizer, owner=owner, name=name)
        if texts is not None:
            check_consistent_length(X, checked)
        return [text or "" for text in checked]

    def _find_clusters(
        self, space: FloatArray, checked: Any, *, seed: int
    ) -> tuple[Any, Ints, dict[int, float]]:
        """Return the clusterer fitted with the best number, its labels and the silhouettes."""
        counts, silhouettes = self._list_counts(len(space), checked), {}
        sample = space
        if len(counts) > 1 and len(space) > MAX_SILHOUETTE_ROWS:
            rng = np.random.default_rng(seed)
            sample = space[rng.choice(len(space), MAX_SILHOUETTE_ROWS, replace=False)]
        counts = self._limit_counts(counts, sample, checked)
        count = counts[0]
        if len(counts) > 1:
            for k in counts:
                labels = _fit_labels(self._make_clusterer(k, seed, checked), sample)
                silhouettes[int(k or 0)] = _compute_silhouette(sample, labels)
            count = max(silhouettes, key=lambda k: silhouettes[k])
        clusterer = self._make_clusterer(count, seed, checked)
        return clusterer, _fit_labels(clusterer, space), silhouettes

    def _list_counts(self, n: int, checked: Any) -> list[int | None]:
        """Return the numbers of clusters to try; [None] leaves it to the clusterer."""
        owner, asked, clusterer = type(self).__name__, checked.n_clusters, checked.clusterer
        subject = f"The `n_clusters` parameter of `{owner}`"
        named = isinstance(clusterer, str)
        takes = clusterer != "hdbscan" if named else _has_param(clusterer, "n_clusters")
        if not takes:
            if named and n < checked.min_cluster_size:
                raise ValueError(
                    f"The `min_cluster_size` parameter of `{owner}` must be at most the number of "
                    f"texts, {n}; got {checked.min_cluster_size}."
                )
            if asked is not None:
                name = clusterer if named else type(clusterer).__name__
                raise ValueError(
                    f"{subject} must be None for {name}, which finds the number itself; "
                    f"got {asked!r}."
                )
            return [None]
        if asked is None and not named:
            return [None]
        if asked in (None, "auto"):
            return _auto_counts(n, owner=owner)
        counts = asked if isinstance(asked, list) else [asked]
        if counts[-1] > n:
            raise ValueError(
                f"{subject} must be at most the number of texts, {n}; got {counts[-1]}."
            )
        return list(counts)

    def _limit_counts(
        self, counts: list[int | None], space: FloatArray, checked: Any
    ) -> list[int | None]:
        """Return the numbers of clusters that there are different embeddings for.

        Without any, as many as there are; with a warning where `n_clusters` asked for more.
        """
        asked = [k for k in counts if k is not None]
        if not asked:
            return counts
        n_distinct = _count_distinct(space, asked[-1])
        possible = [k for k in asked if k <= n_distinct]
        if possible != asked and checked.n_clusters not in (None, "auto"):
            warnings.warn(
                f"The texts have {n_distinct} different embeddings, fewer than the "
                f"{asked[-1]} clusters asked for, so there are {n_distinct} clusters at most. "
                "Lower `n_clusters`, or silence this with warnings.filterwarnings('ignore', "
                "category=skembed.SkembedWarning).",
                SkembedWarning,
                stacklevel=4,
            )
        return [*possible] or [n_distinct]

    def _make_clusterer(self, n_clusters: int | None, seed: int, checked: Any) -> Any:
        """Return a fresh clusterer, its number of clusters and seed set."""
        named = isinstance(checked.clusterer, str)
        if named and checked.clusterer == "hdbscan":
            # `copy` is named since its default changes in scikit-learn 1.10.
            return HDBSCAN(min_cluster_size=checked.min_cluster_size, copy=True)
        if named:
            kinds: dict[str, Any] = {
                "kmeans": KMeans(n_init="auto"),
                "minibatch_kmeans": MiniBatchKMeans(n_init="auto"),
                "agglomerative": AgglomerativeClustering(),
            }
            clusterer = kinds[checked.clusterer]
        else:
            clusterer = clone(checked.clusterer)
        changes: dict[str, Any] = {} if n_clusters is None else {"n_clusters": n_clusters}
        if _has_param(clusterer, "random_state") and (named or checked.random_state is not None):
            changes["random_state"] = seed
        return clusterer.set_params(**changes) if changes else clusterer

    def _describe(self, vectors: FloatArray, texts: list[str] | None, checked: Any) -> None:
        """Set noise radii, representatives and, with texts, terms and names."""
        k, labels = self.n_clusters_, self.labels_
        distances = np.linalg.norm(vectors - self.cluster_centers_[labels], axis=1) if k else None
        self.noise_radii_ = np.full(k, np.inf)
        if k and (labels == -1).any():
            members = [distances[labels == c] for c in range(k)]  # type: ignore[index]
            self.noise_radii_ = np.array([np.quantile(m, checked.noise_quantile) for m in members])
        n_representatives = checked.n_representatives
        representatives = pick_representatives(labels, k, distances, texts, n_representatives)
        self.representative_indices_ = representatives
        for name in ("top_terms_", "cluster_names_", "representative_texts_"):
            self.__dict__.pop(name, None)
        if texts is not None:
            self.representative_texts_ = {
                c: [texts[row] for row in rows] for c, rows in representatives.items()
            }
            self.top_terms_ = find_terms(texts, labels, k, checked.term_vectorizer, checked.n_terms)
            self.cluster_names_ = name_clusters(self.top_terms_)


def _has_param(estimator: Any, name: str) -> bool:
    """Return whether an estimator has a parameter."""
    return hasattr(estimator, "get_params") and name in estimator.get_params(deep=False)


def _auto_counts(n: int, *, owner: str) -> list[int | None]:
    """Return about a dozen numbers of clusters, in equal ratios, from 2 up to 64 or n / 2."""
    if n < 3:
        raise ValueError(
            f"`{owner}` must have at least 3 texts to choose the number of clusters; got "
            f"n_samples={n}. Pass n_clusters."
        )
    highest = max(2, min(_MAX_AUTO_CLUSTERS, n // 2))
    return [int(k) for k in np.unique(np.rint(np.geomspace(2, highest, 14)))]


def _count_distinct(space: FloatArray, most: int) -> int:
    """Return the number of different rows, counted up to `most`."""
    seen: set[bytes] = set()
    for row in space:
        seen.add((row + 0.0).tobytes())  # -0.0 equals 0.0
        if len(seen) >= most:
            break
    return len(seen)


def _make_reducer(reducer: Any, n: int, *, seed: int, owner: str) -> Any:
    """Return a fresh reducer, or None."""
    if reducer is None:
        return None
    if isinstance(reducer, str):
        umap = import_optional("umap", extra="plot", purpose=f"`{owner}` with reducer='umap'")
        if n < 8:
            raise ValueError(
                f"`{owner}` must have at least 8 texts for reducer='umap'; got {n}. Set "
                "reducer=None."
            )
        # With a seed UMAP runs on one thread, and warns if it may use more.
        options = {"n_components": 5, "min_dist": 0.0, "metric": "cosine", "n_jobs": 1}
        return umap.UMAP(n_neighbors=min(15, n - 1), random_state=seed, **options)
    return clone(reducer)


def _fit_labels(clusterer: Any, space: FloatArray) -> Ints:
    """Fit a clusterer and return its labels, (n,)."""
    clusterer.fit(space)
    return np.asarray(clusterer.labels_, dtype=np.int64)


def _number_labels(labels: Ints) -> Ints:
    """Number the clusters 0, 1, ... in the order of their labels; all below 0 become -1."""
    numbers = np.full(len(labels), -1, dtype=np.int64)
    clustered = labels >= 0
    numbers[clustered] = np.unique(labels[clustered], return_inverse=True)[1]
    return numbers


def _compute_silhouette(space: FloatArray, labels: Ints) -> float:
    """Return the mean silhouette; -1, the lowest value, where it is not defined."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return -1.0
    return float(silhouette_score(space, labels))


def _compute_means(vectors: FloatArray, labels: Ints, k: int) -> FloatArray:
    """Return the mean of each cluster, (k, dim)."""
    clustered = labels >= 0
    sums = np.zeros((k, vectors.shape[1]), dtype=np.float64)
    np.add.at(sums, labels[clustered], vectors[clustered])
    sums /= np.bincount(labels[clustered], minlength=k)[:, None]
    return sums.astype(vectors.dtype)
