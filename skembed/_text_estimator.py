"""What the task estimators share: texts through a vectorizer of their own, or embeddings.

An estimator with a ``vectorizer`` parameter takes `TextEstimatorMixin` and gets its vectors from
two methods: `_fit_vectors` in ``fit`` and `_embed_vectors` afterwards. Of a vectorizer they need
``transform(texts) -> (n_texts, dim)`` only; where there are ``encode_query`` and
``encode_document``, each side goes through its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from skembed._validation import MISSING_POLICIES, check_texts
from skembed.vectorizer import NVEmbedVectorizer

__all__ = [
    "TextEstimatorMixin",
    "check_embeddings",
    "check_labels",
    "check_pair_columns",
    "check_text_column",
    "embed_side",
    "fit_vectorizer",
    "make_vectorizer",
    "name_some",
    "refuse_foreign_labels",
    "refuse_missing_labels",
    "trains_on_labels",
]

Vectors = npt.NDArray[np.floating[Any]]
_Texts = Sequence[str | None]


class TextEstimatorMixin:
    """Mixin of estimators that take texts through `vectorizer`, or embeddings without one.

    Put it first among the bases. `_fit_vectors` sets ``embedding_dim_`` and, on texts,
    ``vectorizer_`` (a fitted clone); on embeddings, scikit-learn's ``n_features_in_`` and
    ``feature_names_in_``.
    """

    vectorizer: Any
    vectorizer_: Any
    embedding_dim_: int

    def _fit_vectors(self, X: Any, y: Any = None, *, side: str = "query") -> Vectors:
        """Fit a clone of the vectorizer and return the vectors of X, (n, dim)."""
        owner = type(self).__name__
        vectorizer = make_vectorizer(self.vectorizer, owner=owner)
        if vectorizer is None:
            vectors = check_embeddings(self, X, reset=True)
        else:
            texts = check_text_column(X, vectorizer=vectorizer, owner=owner)
            fit_vectorizer(vectorizer, texts, y)
            vectors = embed_side(vectorizer, texts, side, owner=owner)
        self._set_vectorizer(vectorizer, vectors.shape[1])
        return vectors

    def _embed_vectors(self, X: Any, *, side: str = "query", name: str = "X") -> Vectors:
        """Return the vectors of X as the fitted vectorizer sees it, (n, dim)."""
        check_is_fitted(self)
        owner = type(self).__name__
        vectorizer = getattr(self, "vectorizer_", None)
        if vectorizer is None:
            return check_embeddings(self, X, name=name)
        texts = check_text_column(X, vectorizer=vectorizer, owner=owner, name=name)
        return embed_side(vectorizer, texts, side, owner=owner, dim=self.embedding_dim_)

    def _set_vectorizer(self, vectorizer: Any, dim: int) -> None:
        """Keep what `fit` learned of the input, and nothing of an earlier `fit` on the other."""
        stale = ("n_features_in_", "feature_names_in_") if vectorizer is not None else ()
        for name in (*stale, "vectorizer_"):
            if name in vars(self):
                delattr(self, name)
        if vectorizer is not None:
            self.vectorizer_ = vectorizer
        self.embedding_dim_ = dim

    def __sklearn_tags__(self) -> Any:
        """Texts with a vectorizer, a two-dimensional array without."""
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.string = self.vectorizer is not None
        tags.input_tags.two_d_array = self.vectorizer is None
        return tags


# Vectorizers


def make_vectorizer(vectorizer: Any, *, owner: str) -> Any:
    """Return a vectorizer that `fit` may change: a clone, a frozen named model, or None for None.

    A str or path names a model of `NVEmbedVectorizer`, which stays frozen. Raises TypeError for
    what has no ``transform``.

    >>> from skembed._text_estimator import make_vectorizer
    >>> make_vectorizer("skembed-mini", owner="EmbeddingClassifier")
    NVEmbedVectorizer(trainer=None)
    """
    if vectorizer is None:
        return None
    if isinstance(vectorizer, (str, os.PathLike)):
        return NVEmbedVectorizer(vectorizer, trainer=None)
    if isinstance(vectorizer, type) or not callable(getattr(vectorizer, "transform", None)):
        got = (
            f"the class {vectorizer.__name__}, not an instance"
            if isinstance(vectorizer, type)
            else f"an object of type {type(vectorizer).__name__}"
        )
        raise TypeError(
            f"The `vectorizer` parameter of `{owner}` must be None, the name of a model, or an "
            f"object with `transform`, such as NVEmbedVectorizer(); got {got}."
        )
    return clone(vectorizer, safe=False)


def trains_on_labels(vectorizer: Any) -> bool:
    """Tell whether `fit` of a vectorizer may learn from labels, pairs or scores.

    >>> from skembed._text_estimator import trains_on_labels
    >>> trains_on_labels(NVEmbedVectorizer(trainer=None))
    False
    """
    return getattr(vectorizer, "trainer", None) is not None


def fit_vectorizer(vectorizer: Any, texts: _Texts, y: Any = None) -> None:
    """Fit a vectorizer in place, where it has `fit`; a frozen model checks its parameters."""
    if hasattr(vectorizer, "fit"):
        vectorizer.fit(texts, y)


def embed_side(
    vectorizer: Any, texts: _Texts, side: str, *, owner: str, dim: int | None = None
) -> Vectors:
    """Embed texts as "query" or "document" and check what comes back, float32, (n_texts, dim).

    Takes ``encode_query`` or ``encode_document`` where the vectorizer has it, else ``transform``.
    Raises ValueError for another shape, another width than `dim`, and NaN or infinity.
    """
    embed = getattr(vectorizer, f"encode_{side}", None) or vectorizer.transform
    vectors = embed(texts)
    subject = f"The `vectorizer` of `{owner}` must turn {len(texts)} texts into"
    if hasattr(vectors, "tocsr"):
        raise TypeError(
            f"{subject} a dense array; got a sparse matrix. Reduce it, for example with "
            "make_pipeline(TfidfVectorizer(), TruncatedSVD(256))."
        )
    array = np.asarray(vectors, dtype=np.float32)
    expected = f"({len(texts)}, {'dim' if dim is None else dim})"
    if array.ndim != 2 or len(array) != len(texts) or dim not in (None, array.shape[1]):
        raise ValueError(f"{subject} an array of shape {expected}; got shape {array.shape}.")
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise ValueError(
            f"{subject} finite numbers; the vector of texts[{row}] is not finite. Drop missing "
            "texts, or embed them as zeros: missing='zero'."
        )
    return array


# Input


def check_embeddings(
    estimator: Any, X: Any, *, reset: bool = False, name: str = "X", min_rows: int = 1
) -> Vectors:
    """Check given embeddings by scikit-learn's rules, float32 or float64, (n, dim).

    With `reset` the width and column names are kept as ``n_features_in_`` and
    ``feature_names_in_``, else they are compared. Raises TypeError for texts, ValueError for NaN,
    infinity, fewer rows than `min_rows` and another width.
    """
    if _holds_text(X):
        raise TypeError(
            f"The `{name}` parameter of `{type(estimator).__name__}` must be an array of "
            "embeddings, since `vectorizer` is None; got texts. Pass a vectorizer, such as "
            "vectorizer='skembed-mini', or embed the texts first."
        )
    options = {"dtype": [np.float64, np.float32], "ensure_min_samples": min_rows}
    return cast("Vectors", validate_data(estimator, X, reset=reset, **options))


def check_text_column(
    X: Any, *, vectorizer: Any, owner: str, name: str = "X", min_rows: int = 1
) -> list[str | None]:
    """Return the texts of one column as a list, None where one is missing and may be.

    Raises as `check_texts`, and ValueError for pairs and for fewer texts than `min_rows`.
    """
    _refuse_numbers(X, owner=owner, name=name)
    (texts, *others) = _clean_columns(X, vectorizer=vectorizer, owner=owner, name=name)
    if others:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must have one text a row; got pairs."
        )
    _check_rows(len(texts), min_rows, owner=owner, name=name)
    return texts


def check_pair_columns(
    X: Any, *, vectorizer: Any, owner: str, name: str = "X", min_rows: int = 1
) -> tuple[list[str | None], list[str | None]]:
    """Return the two columns of pairs of texts as lists, None where one is missing and may be.

    Raises as `check_texts`, and ValueError for single texts and fewer pairs than `min_rows`.
    """
    _refuse_numbers(X, owner=owner, name=name)
    columns = _clean_columns(X, vectorizer=vectorizer, owner=owner, name=name)
    _check_rows(len(columns[0]), min_rows, owner=owner, name=name)
    if len(columns) != 2:
        if not columns[0]:
            return [], []
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must hold pairs of texts, such as "
            "[(text, text), ...] or two columns; got one text a row."
        )
    return columns[0], columns[1]


def _clean_columns(X: Any, *, vectorizer: Any, owner: str, name: str) -> list[list[str | None]]:
    """Return one or two columns of texts; missing ones by the vectorizer's own rule."""
    missing = getattr(vectorizer, "missing", "error")
    policy = missing if missing in MISSING_POLICIES else "error"
    found = check_texts(X, owner=owner, missing=policy, name=name)
    return [
        [None if absent else text for text, absent in zip(texts, mask, strict=True)]
        for texts, mask in zip(found.columns, found.missing, strict=True)
    ]


def _holds_text(X: Any) -> bool:
    """Tell whether X looks like texts: a str, an array of str, or a first item that is one."""
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if isinstance(X, (str, bytes)) or kind in ("U", "T"):
        return True
    if hasattr(X, "to_numpy"):  # a frame or a column, of pandas or polars
        X = X[:1].to_numpy()
    first = X[0] if isinstance(X, (list, tuple, np.ndarray)) and len(X) else None
    if isinstance(first, (list, tuple, np.ndarray)):
        first = first[0] if np.ndim(first) and len(first) else None
    return isinstance(first, str) and not _is_number(first)


def _is_number(text: str) -> bool:
    """Tell whether scikit-learn would read a str as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_numbers(X: Any, *, owner: str, name: str) -> None:
    """Raise TypeError for an array of numbers where texts are expected."""
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if kind in ("f", "i", "u") and getattr(X, "ndim", 0) == 2:
        raise TypeError(
            f"The `{name}` parameter of `{owner}` must hold texts, since it has a `vectorizer`; "
            f"got an array of {X.dtype}. Set vectorizer=None to pass embeddings."
        )


def _check_rows(n: int, min_rows: int, *, owner: str, name: str) -> None:
    """Raise ValueError for fewer rows than the estimator needs."""
    if n < min_rows:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must hold at least {min_rows} "
            f"text{'s' if min_rows > 1 else ''}; got {n}."
        )


# Labels


def check_labels(X: Any, y: Any, *, owner: str) -> npt.NDArray[Any]:
    """Return the labels of the rows of X, (n,) or (n, n_labels); at least two classes."""
    if y is None:
        raise ValueError(
            f"{owner} requires y to be passed, but the target y is None. Pass one label a text."
        )
    labels = np.asarray(y)
    if labels.ndim != 2 or labels.shape[1] == 1:
        labels = column_or_1d(y, warn=True)
        refuse_missing_labels(labels, owner=owner)
        if len(labels) and len(np.unique(labels)) < 2:
            raise ValueError(
                f"The `y` parameter of `{owner}` must hold at least 2 classes; got 1 class: "
                f"{name_some(labels[:1])}."
            )
        if labels.dtype.kind == "f" and (labels != np.rint(labels)).any():
            raise ValueError(
                f"Unknown label type: continuous. The `y` parameter of `{owner}` must hold class "
                "labels; got fractions."
            )
    else:
        check_classification_targets(labels)
    # A bare str has a length, too; it and what has none get errors of their own.
    if not isinstance(X, (str, bytes)) and (hasattr(X, "__len__") or hasattr(X, "shape")):
        check_consistent_length(X, labels)
    return labels


def refuse_missing_labels(labels: npt.NDArray[Any], *, owner: str) -> None:
    """Raise ValueError for None and NaN among labels, TypeError for labels of several types."""
    if labels.dtype.kind == "O":
        absent = [i for i, label in enumerate(labels) if _is_missing(label)]
        kinds = {isinstance(label, str) for label in labels}
        if not absent and len(kinds) > 1:
            raise TypeError(
                f"The `y` parameter of `{owner}` must hold labels of one type; got str and others."
            )
    else:
        absent = np.flatnonzero(np.isnan(labels)).tolist() if labels.dtype.kind == "f" else []
    if absent:
        raise ValueError(
            f"The `y` parameter of `{owner}` must hold no missing labels, such as None or NaN; "
            f"got {len(absent)}, the first at y[{absent[0]}]. Drop these rows."
        )


def _is_missing(label: Any) -> bool:
    """Tell whether a label is None, NaN or pandas' NA."""
    return label is None or type(label).__name__ == "NAType" or label != label


def refuse_foreign_labels(y: Any, classes: Any, *, owner: str) -> None:
    """Raise ValueError if `fit` saw none of the labels: they are of another kind."""
    labels = np.asarray(y)
    if labels.ndim != 1 or not len(labels) or isinstance(classes, list):
        return
    known = set(np.asarray(classes).tolist())
    if not known.intersection(labels.tolist()):
        raise ValueError(
            f"The `y` parameter of `{owner}.score` must hold labels that `fit` saw, at least "
            f"some; got none of them. They are {name_some(classes)}, of dtype "
            f"{np.asarray(classes).dtype}; those in y are of dtype {labels.dtype}."
        )


def name_some(labels: Any) -> str:
    """Name the first few labels."""
    shown = ", ".join(repr(label) for label in np.asarray(labels)[:3].tolist())
    return f"{shown}, ..." if len(labels) > 3 else shown
