"""Base of the task estimators: texts through a vectorizer of their own, or embeddings."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from sklearn.base import ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data

from skembed._inputs import check_known_labels, read_columns, read_weights
from skembed._validation import CheckedParameters, check_path, unwrap
from skembed.embedding import FloatArray, check_text_column, check_vectorizer, embed, is_transformer
from skembed.vectorizer import NVEmbedVectorizer

__all__ = [
    "TextClassifierMixin",
    "TextEstimatorMixin",
    "check_embeddings",
    "check_encoder",
    "fit_vectorizer",
    "make_vectorizer",
    "trains_on_labels",
]


class TextEstimatorMixin(CheckedParameters):
    """Mixin of estimators that take texts through `vectorizer`, or embeddings without one.

    Put it first among the bases, list the checks of all parameters in `_rules` and read them with
    `_checked`. Vectors come from `_fit_vectors` in ``fit``, which sets ``embedding_dim_`` and, on
    texts, ``vectorizer_``; and from `_embed_vectors` afterwards.
    """

    vectorizer: Any
    vectorizer_: Any
    embedding_dim_: int
    _fitted_mark: str  # name of the attribute that `fit` sets last

    def _fit_vectors(self, X: Any, y: Any = None, *, side: str = "query") -> FloatArray:
        """Fit a clone of the vectorizer and return the vectors of X, (n, dim)."""
        owner = type(self).__name__
        vectorizer = make_vectorizer(self.vectorizer, owner=owner)
        if vectorizer is None:
            vectors = check_embeddings(self, X, reset=True)
        else:
            texts = check_text_column(X, vectorizer=vectorizer, owner=owner)
            fit_vectorizer(vectorizer, texts, y)
            vectors = embed(vectorizer, texts, side, owner=owner)
        self._set_vectorizer(vectorizer, vectors.shape[1])
        return vectors

    def _embed_vectors(
        self, X: Any, *, side: str = "query", name: str = "X", min_rows: int = 1
    ) -> FloatArray:
        """Return the vectors of X as the fitted vectorizer sees it, (n, dim)."""
        check_is_fitted(self)
        owner = type(self).__name__
        vectorizer = getattr(self, "vectorizer_", None)
        if vectorizer is None:
            return check_embeddings(self, X, name=name, min_rows=min_rows)
        options = {"vectorizer": vectorizer, "owner": owner, "name": name, "min_rows": min_rows}
        texts = check_text_column(X, **options)
        return embed(vectorizer, texts, side, owner=owner, dim=self.embedding_dim_)

    def _set_vectorizer(self, vectorizer: Any, dim: int) -> None:
        """Store what `fit` learned of the input; drop what an earlier `fit` on the other left."""
        stale = ("n_features_in_", "feature_names_in_") if vectorizer is not None else ()
        for name in (*stale, "vectorizer_"):
            if name in vars(self):
                delattr(self, name)
        if vectorizer is not None:
            self.vectorizer_ = vectorizer
        self.embedding_dim_ = dim

    def __sklearn_clone__(self) -> Any:
        """Clone all parameters, but pass on an encoder as it is."""
        vectorizer = self.vectorizer
        if vectorizer is None or isinstance(vectorizer, str) or is_transformer(vectorizer):
            return super().__sklearn_clone__()  # type: ignore[misc]
        bare = copy.copy(self)
        bare.vectorizer = None
        return clone(bare).set_params(vectorizer=vectorizer)

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether `fit` has come to its end."""
        return hasattr(self, self._fitted_mark)

    def __sklearn_tags__(self) -> Any:
        """Return tags for texts with a vectorizer, for a two-dimensional array without."""
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.string = self.vectorizer is not None
        tags.input_tags.two_d_array = self.vectorizer is None
        return tags


class TextClassifierMixin(TextEstimatorMixin, ClassifierMixin):
    """Mixin of classifiers of texts or embeddings."""

    classes_: Any

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy of the predictions.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.
        y : array-like, shape (n_texts,)
            Their labels. A label that `fit` did not see counts as an error.
        sample_weight : array-like of float, shape (n_texts,), optional
            Weights of the texts.

        Returns
        -------
        float
            Share of right predictions, in [0, 1].

        Raises
        ------
        TypeError, ValueError
            If `fit` saw none of the labels, or a weight is not allowed.
        """
        check_is_fitted(self)
        labels = check_known_labels(y, self.classes_, owner=type(self).__name__)
        weights = read_weights(sample_weight, owner=f"{type(self).__name__}.score")
        return float(super().score(X, labels, weights))


def check_encoder(value: Any, *, name: str, owner: str) -> Any:
    """Return what may be a `vectorizer` as it is: None, the name of a model, or an encoder."""
    if isinstance(value, (str, os.PathLike)):
        return check_path(value, name=name, owner=owner, expected="None, a model or an encoder")
    if value is not None:
        subject = f"The `{name}` parameter of `{owner}`"
        check_vectorizer(value, subject=subject, others="None, the name of a model, ")
    return value


def make_vectorizer(vectorizer: Any, *, owner: str) -> Any:
    """Return a vectorizer that `fit` may change: a clone, a frozen named model, or None for None.

    What has no ``transform``, such as a SentenceTransformer, comes back as it is: its own ``fit``
    does something else.
    """
    vectorizer = unwrap(vectorizer)
    check_encoder(vectorizer, name="vectorizer", owner=owner)
    if vectorizer is None:
        return None
    if isinstance(vectorizer, (str, os.PathLike)):
        return NVEmbedVectorizer(vectorizer, trainer=None)
    return clone(vectorizer, safe=False) if is_transformer(vectorizer) else vectorizer


def trains_on_labels(vectorizer: Any) -> bool:
    """Return whether `fit` of a vectorizer may learn from labels, pairs or scores."""
    return is_transformer(vectorizer) and getattr(vectorizer, "trainer", None) is not None


def fit_vectorizer(vectorizer: Any, texts: Sequence[str | None], y: Any = None) -> None:
    """Fit a transformer in place if it has `fit`; a frozen model only checks its parameters."""
    if is_transformer(vectorizer) and hasattr(vectorizer, "fit"):
        vectorizer.fit(texts, y)


def check_embeddings(
    estimator: Any, X: Any, *, reset: bool = False, name: str = "X", min_rows: int = 1
) -> FloatArray:
    """Return embeddings checked by scikit-learn's rules, float32 or float64, (n, dim).

    `reset` stores the width and the column names on the estimator; without it they are compared.
    """
    if _holds_text(X):
        raise TypeError(
            f"The `{name}` parameter of `{type(estimator).__name__}` must be an array of "
            "embeddings, since `vectorizer` is None; got texts. Pass a vectorizer, such as "
            "vectorizer='skembed-mini', or embed the texts first."
        )
    options = {"dtype": [np.float64, np.float32], "ensure_min_samples": min_rows}
    return cast("FloatArray", validate_data(estimator, X, reset=reset, **options))


def _holds_text(X: Any) -> bool:
    """Return whether X looks like texts: a str, an array of str, or a first item that is one."""
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if isinstance(X, (str, bytes)) or kind in ("U", "T"):
        return True
    if kind in ("f", "i", "u", "b"):
        return False
    if not isinstance(X, (list, tuple)):
        try:
            columns, _ = read_columns(X[:1], subject="X")
        except (TypeError, ValueError, KeyError, IndexError):  # no container of texts
            return False
        X = [item for column in columns for item in column[:1]]
    first = X[0] if len(X) else None
    if isinstance(first, (list, tuple, np.ndarray)):
        first = first[0] if np.ndim(first) and len(first) else None
    return isinstance(first, str) and not _is_number(first)


def _is_number(text: str) -> bool:
    """Return whether scikit-learn would read a str as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
