"""From an estimator and texts to vectors, and from vectors to the plane of a map."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skembed._inputs import check_texts
from skembed._validation import check_choice, check_seed, import_optional
from skembed.embedding import FloatArray, check_text_column, check_vectorizer, embed
from skembed.exceptions import SkembedWarning

__all__ = [
    "Responder",
    "check_coordinates",
    "check_vectors",
    "embed_input",
    "is_matrix",
    "knows_rows",
    "place_vectors",
    "predict_groups",
    "project",
    "read_hover_texts",
    "split_estimator",
]

# With fewer, each text would be a neighbour of nearly all others.
_MIN_UMAP_ROWS = 10

_Coordinates = npt.NDArray[np.float64]  # (n, 2)


class Responder(NamedTuple):
    """The part that embeds texts and the part that predicts from vectors, each or None."""

    vectorizer: Any
    predictor: Any


def split_estimator(estimator: Any, *, owner: str) -> Responder:
    """Return the parts of a fitted estimator, vectorizer or Pipeline."""
    best = getattr(estimator, "best_estimator_", None)  # of a search over parameters
    if best is not None:
        return split_estimator(best, owner=owner)
    if isinstance(estimator, Pipeline):
        return _split_pipeline(estimator, owner=owner)
    if hasattr(estimator, "vectorizer"):  # a task estimator of skembed, or one like it
        check_is_fitted(estimator)
        predicts = hasattr(estimator, "predict") or hasattr(estimator, "labels_")
        return Responder(getattr(estimator, "vectorizer_", None), estimator if predicts else None)
    if hasattr(estimator, "predict") or hasattr(estimator, "labels_"):
        return Responder(None, estimator)
    subject = f"The `estimator` parameter of `{owner}`"
    others = "a fitted estimator, a Pipeline that embeds, "
    check_vectorizer(estimator, subject=subject, others=others)
    return Responder(estimator, None)


def _split_pipeline(pipeline: Pipeline, *, owner: str) -> Responder:
    """Return the steps before the predictor, with the vectorizer inside it, and the predictor."""
    is_empty = pipeline[-1] is None or isinstance(pipeline[-1], str)  # "passthrough"
    last = None if is_empty else split_estimator(pipeline[-1], owner=owner)
    if last is None or last.predictor is None:
        return Responder(pipeline, None)
    steps = list(pipeline.steps[:-1])
    if last.vectorizer is not None:
        steps.append((f"{pipeline.steps[-1][0]}__vectorizer", last.vectorizer))
    return Responder(Pipeline(steps) if steps else None, last.predictor)


def embed_input(vectorizer: Any, X: Any, *, owner: str) -> FloatArray:
    """Return the vectors (n, dim) of texts through a vectorizer, or of embeddings without one."""
    if vectorizer is None:
        return check_vectors(X, owner=owner, name="X")
    if not isinstance(vectorizer, Pipeline):  # its first step may take frames and more
        X = check_text_column(X, vectorizer=vectorizer, owner=owner)
    return embed(vectorizer, X, "query", owner=owner)


class _Precomputed:
    """A vectorizer that returns precomputed vectors, whatever the texts."""

    def __init__(self, vectors: FloatArray, missing: str) -> None:
        self.vectors = vectors
        self.missing = missing

    def transform(self, texts: Any) -> FloatArray:
        """Return the vectors, (n, dim)."""
        return self.vectors


def predict_groups(predictor: Any, X: Any, vectors: FloatArray, *, owner: str) -> Any:
    """Return the predictions for X, (n,), from its vectors; None without a predictor."""
    if predictor is None:
        return None
    if knows_rows(predictor, X):
        return predictor.labels_
    if not hasattr(predictor, "predict"):
        raise ValueError(
            f"`{owner}` can colour by {type(predictor).__name__}, which has no `predict`, only "
            f"the {len(predictor.labels_)} texts that it was fitted on; got {len(vectors)}. Pass y."
        )
    if getattr(predictor, "vectorizer_", None) is None:
        return predictor.predict(vectors)
    copied = copy.copy(predictor)  # which does not embed X again
    copied.vectorizer_ = _Precomputed(vectors, getattr(predictor.vectorizer_, "missing", "error"))
    return copied.predict(X)


def knows_rows(predictor: Any, X: Any) -> bool:
    """Return whether X holds the rows that a clusterer was fitted on, so that it has their labels.

    Its representative texts must be in the same rows; without them, and without `predict`, the
    number of rows must do.
    """
    labels = getattr(predictor, "labels_", None)
    if labels is None or len(labels) != len(X):
        return False
    texts = getattr(predictor, "representative_texts_", None)
    if texts is None:
        return not hasattr(predictor, "predict")
    column = read_hover_texts(X)
    rows = predictor.representative_indices_
    return column is not None and all(
        [column[row] for row in rows[cluster]] == typical for cluster, typical in texts.items()
    )


def read_hover_texts(X: Any) -> list[str] | None:
    """Return one column of texts as a list; None for anything else."""
    try:
        columns = check_texts(X, owner="EmbeddingMapDisplay", missing="empty").columns
    except (TypeError, ValueError):
        return None
    return columns[0] if len(columns) == 1 else None


def is_matrix(X: Any) -> bool:
    """Return whether X is an array or frame of numbers."""
    try:
        array = np.asarray(X)
    except ValueError:  # ragged
        return False
    return array.ndim == 2 and array.dtype.kind in "fiu"


def check_vectors(X: Any, *, owner: str, name: str, dim: int | None = None) -> FloatArray:
    """Return a matrix of finite numbers, float32 or float64, (n, dim), not empty."""
    subject = f"The `{name}` parameter of `{owner}`"
    if hasattr(X, "tocsr"):
        raise TypeError(
            f"{subject} must be a dense array; got a sparse matrix. Reduce it, for example with "
            "TruncatedSVD(256)."
        )
    if not is_matrix(X):
        kind = getattr(X, "shape", type(X).__name__)
        raise TypeError(
            f"{subject} must be an array of numbers of shape (n_texts, dim); got {kind}. Embed "
            "texts first, or use `from_estimator`."
        )
    array = np.asarray(X)
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    if not array.size or dim not in (None, array.shape[1]):
        width = "dim" if dim is None else dim
        raise ValueError(
            f"{subject} must be of shape (n_texts, {width}), at least one text; "
            f"got shape {array.shape}."
        )
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise ValueError(f"{subject} must hold finite numbers; row {row} holds NaN or infinity.")
    return array


def check_coordinates(coordinates: Any, n: int | None, *, owner: str) -> _Coordinates:
    """Return the coordinates of n points as float64, (n, 2)."""
    array = check_vectors(coordinates, owner=owner, name="coordinates", dim=2)
    if n is not None and len(array) != n:
        raise ValueError(
            f"The `coordinates` parameter of `{owner}` must be of shape ({n}, 2), one row a text; "
            f"got shape {array.shape}."
        )
    return array.astype(np.float64)


def project(
    vectors: FloatArray, reducer: Any, *, random_state: Any, owner: str
) -> tuple[_Coordinates, Any]:
    """Fit a reducer to vectors and return their coordinates (n, 2) and the fitted reducer."""
    model = _make_reducer(reducer, vectors.shape, random_state=random_state, owner=owner)
    coordinates = model.fit_transform(vectors)
    return _check_plane(coordinates, len(vectors), model, owner=owner), model


def place_vectors(reducer: Any, vectors: FloatArray, *, owner: str) -> _Coordinates:
    """Return the coordinates of new vectors on a fitted map, (n, 2)."""
    if not callable(getattr(reducer, "transform", None)):
        kind = "there is none" if reducer is None else f"{type(reducer).__name__} has none"
        raise ValueError(
            f"The `reducer_` of `{owner}` must have `transform` to place new texts; {kind}. "
            "Make the map with reducer='umap', or pass its fitted reducer beside `coordinates`."
        )
    return _check_plane(reducer.transform(vectors), len(vectors), reducer, owner=owner)


def _check_plane(coordinates: Any, n: int, reducer: Any, *, owner: str) -> _Coordinates:
    """Return the output of a reducer as float64, (n, 2); a missing second column is zero."""
    array = np.asarray(coordinates, dtype=np.float64)
    if isinstance(reducer, PCA) and array.shape == (n, 1):
        array = np.column_stack([array, np.zeros(n)])
    if array.shape != (n, 2) or not np.isfinite(array).all():
        got = array.shape if array.shape != (n, 2) else "NaN or infinity"
        raise ValueError(
            f"The `reducer` of `{owner}` must make finite coordinates of shape ({n}, 2); got {got}."
        )
    return array


def _make_reducer(reducer: Any, shape: tuple[int, ...], *, random_state: Any, owner: str) -> Any:
    """Return a fresh reducer to two dimensions."""
    random_state = check_seed(random_state, name="random_state", owner=owner)
    n, dim = shape
    if isinstance(reducer, str):
        check_choice(reducer, name="reducer", owner=owner, allowed=("umap", "pca"))
        if reducer == "umap" and n >= _MIN_UMAP_ROWS:
            umap = import_optional("umap", extra="plot", purpose=f"`{owner}`")
            # With a seed UMAP runs on one thread, and warns if it may use more.
            options = {"metric": "cosine", "n_jobs": -1 if random_state is None else 1}
            return umap.UMAP(n_neighbors=min(15, n - 1), random_state=random_state, **options)
        if reducer == "umap":
            warnings.warn(
                f"`{owner}` shows a PCA: UMAP needs at least {_MIN_UMAP_ROWS} texts; got {n}. "
                "Silence this with reducer='pca'.",
                SkembedWarning,
                stacklevel=4,
            )
        if n < 2:
            raise ValueError(f"`{owner}` needs at least 2 texts to make a map; got {n}.")
        return PCA(min(2, n, dim), random_state=random_state)
    if isinstance(reducer, type) or not callable(getattr(reducer, "fit_transform", None)):
        raise TypeError(
            f"The `reducer` parameter of `{owner}` must be 'umap', 'pca', or a transformer with "
            f"`fit_transform`; got an object of type {type(reducer).__name__}."
        )
    return clone(reducer, safe=False)
