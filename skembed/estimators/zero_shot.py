"""`ZeroShotClassifier`: classes from their descriptions alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_consistent_length

from skembed._inputs import (
    check_label_items,
    check_labels,
    check_texts,
    name_some,
    read_label_array,
)
from skembed._validation import check_real, check_string, parameter_error
from skembed.embedding import FloatArray, check_text_column, embed
from skembed.estimators.base import (
    TextClassifierMixin,
    check_embeddings,
    check_encoder,
    fit_vectorizer,
    make_vectorizer,
)

__all__ = ["ZeroShotClassifier"]

_Labels = npt.NDArray[Any]  # (n,)


def _check_descriptions(value: Any, *, name: str, owner: str) -> Any:
    """Return a mapping of label to descriptions as it is, or None; `fit` reads what it holds."""
    if isinstance(value, Mapping) and not value:
        raise ValueError(f"The `{name}` parameter of `{owner}` must hold labels; got none.")
    if value is None or isinstance(value, Mapping):
        return value
    expected = "a mapping of label to description, or None"
    raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)


def _check_weight(value: Any, *, name: str, owner: str) -> float:
    """Return the weight of descriptions, which may be infinite."""
    if isinstance(value, (float, np.floating)) and value == math.inf:
        return math.inf
    return check_real(value, name=name, owner=owner, low=0, inclusive="neither")


class ZeroShotClassifier(TextClassifierMixin, BaseEstimator):
    r"""Classifier that gives a text the label whose description is most similar.

    Each label becomes a prototype: the mean direction of its descriptions, moved towards its
    labelled examples, if any. A text gets the label of the nearest prototype.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of texts and descriptions; `fit` uses a clone. A name or path is a frozen model
        of `NVEmbedVectorizer`. An encoder (an object with ``encode``, such as a
        SentenceTransformer, or a callable) is used as it is. None: X and descriptions are
        embeddings.
    descriptions : mapping, optional
        Label -> description or list of descriptions. With it, `fit` takes labelled examples (or
        nothing), so that the classifier can be cross-validated; without it, `fit` takes the
        descriptions.
    label_instruction : str, optional
        Instruction for descriptions, as the vectorizer's `document_instruction`. None leaves
        that parameter unchanged. Texts get the vectorizer's `instruction`.
    description_weight : float, default=3.0
        Weight of the descriptions of a label, in labelled examples. ``float("inf")`` ignores
        examples.
    temperature : float, default=0.05
        Temperature of the softmax in `predict_proba`. Does not change predictions.

    Attributes
    ----------
    classes_ : ndarray, shape (n_classes,)
        The labels, sorted.
    prototypes_ : ndarray of float64, shape (n_classes, dim)
        Unit vectors, in the order of `classes_`.
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
    EmbeddingClassifier : Learns from labelled texts alone.

    Notes
    -----
    With unit vectors :math:`d_c` (mean of the descriptions of class c, scaled to unit length) and
    :math:`x_i` (its n examples), weight w and temperature t,

    .. math::
        p_c \propto w\, d_c + \sum_{i=1}^n x_i, \qquad
        P(c \mid x) = \mathrm{softmax}_c (\cos(x, p_c) / t).

    The probabilities are not calibrated; they rank a text's labels. A label without examples keeps
    its description alone.

    Weight and temperature were chosen on the train parts of four sets
    (`benchmarks/zero_shot.py`).

    Examples
    --------
    >>> from skembed import ZeroShotClassifier
    >>> topics = {"sport": "a game, a match, a team", "money": "shares, banks, the market"}
    >>> ZeroShotClassifier().fit(topics).predict(["The striker scored twice."])
    array(['sport'], dtype='<U5')
    """

    _fitted_mark = "prototypes_"
    _rules = {
        "vectorizer": check_encoder,
        "descriptions": _check_descriptions,
        "label_instruction": partial(check_string, allow_none=True),
        "description_weight": _check_weight,
        "temperature": partial(check_real, low=0, inclusive="neither"),
    }

    def __init__(
        self,
        vectorizer: Any = "skembed-mini",
        *,
        descriptions: Mapping[Any, Any] | None = None,
        label_instruction: str | None = None,
        description_weight: float = 3.0,
        temperature: float = 0.05,
    ) -> None:
        self.vectorizer = vectorizer
        self.descriptions = descriptions
        self.label_instruction = label_instruction
        self.description_weight = description_weight
        self.temperature = temperature

    def fit(self, X: Any = None, y: Any = None) -> ZeroShotClassifier:
        """Embed the descriptions, and the examples if there are any.

        Parameters
        ----------
        X : mapping, or list, tuple, ndarray, Series or one-column frame of str, optional
            Without `descriptions`: label -> description or list of descriptions; or descriptions
            whose labels are `y` (without `y`, each description is its own label). With
            `descriptions`: labelled examples. Embeddings instead of texts where
            ``vectorizer=None``.
        y : array-like, shape (n_texts,), optional
            Labels of the rows of X.

        Returns
        -------
        ZeroShotClassifier
            This estimator.

        Raises
        ------
        TypeError
            If X or a parameter has an invalid type.
        ValueError
            If there are fewer than two labels, a label of an example has no description, or
            a parameter is out of range.
        """
        owner = type(self).__name__
        weight = self._checked().description_weight
        described = X if self.descriptions is None else self.descriptions
        names = y if self.descriptions is None else None
        if names is None and self.vectorizer is not None and not isinstance(described, Mapping):
            names = None if described is None else check_texts(described, owner=owner).columns[0]
        rows, labels = _read_descriptions(described, names, owner=owner)
        classes, codes = np.unique(labels, return_inverse=True)
        example_labels = None
        if self.descriptions is not None and X is not None and y is not None:
            example_labels = _check_example_labels(X, y, classes, owner=owner)
        vectors, example_vectors = self._fit_both(rows, labels, X, example_labels)
        sums = _sum_rows(normalize(vectors), codes, len(classes))
        if example_labels is not None and math.isfinite(weight):
            codes = np.searchsorted(classes, example_labels)
            sums = weight * normalize(sums)
            sums += _sum_rows(normalize(example_vectors), codes, len(classes))
        self.classes_ = classes
        self.prototypes_ = normalize(sums)
        return self

    def predict(self, X: Any) -> _Labels:
        """Predict the label whose prototype is nearest.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts; embeddings where ``vectorizer=None``.

        Returns
        -------
        ndarray, shape (n_texts,)
            One of `classes_` for each text; the first of equally near ones.
        """
        nearest = self._cosines(X).argmax(axis=1)
        return np.asarray(self.classes_[nearest])

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the softmax of the cosines over the temperature; not calibrated.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts; embeddings where ``vectorizer=None``.

        Returns
        -------
        ndarray of float64, shape (n_texts, n_classes)
            Columns in the order of `classes_`; rows sum to 1.
        """
        temperature = self._checked().temperature
        logits = self._cosines(X) / temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the cosine of each text with each prototype.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts; embeddings where ``vectorizer=None``.

        Returns
        -------
        ndarray of float64, shape (n_texts, n_classes), or (n_texts,) for two classes
            Cosines in the order of `classes_`; for two classes, the second minus the first.
        """
        cosines = self._cosines(X)
        return cosines[:, 1] - cosines[:, 0] if len(self.classes_) == 2 else cosines

    def _cosines(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the cosine of each text with each prototype, (n, n_classes)."""
        vectors = normalize(self._embed_vectors(X).astype(np.float64))
        return np.asarray(vectors @ self.prototypes_.T)

    def _fit_both(
        self, rows: Any, labels: _Labels, examples: Any, example_labels: _Labels | None
    ) -> tuple[FloatArray, FloatArray]:
        """Fit the vectorizer and return the vectors of descriptions (n, dim) and examples (m, dim).

        Examples without labels are not looked at.
        """
        owner = type(self).__name__
        vectorizer = make_vectorizer(self.vectorizer, owner=owner)
        example_vectors = None
        if vectorizer is None:
            vectors = self._fit_vectors(rows)
            if example_labels is not None:
                example_vectors = check_embeddings(self, examples)
        else:
            _set_label_instruction(vectorizer, self._checked().label_instruction, owner=owner)
            texts = check_text_column(rows, vectorizer=vectorizer, owner=owner)
            example_texts: list[str | None] = []
            if example_labels is not None:
                example_texts = check_text_column(examples, vectorizer=vectorizer, owner=owner)
                labels = np.concatenate([labels, example_labels])
            fit_vectorizer(vectorizer, texts + example_texts, labels)
            vectors = embed(vectorizer, texts, "document", owner=owner)
            if example_texts:
                example_vectors = embed(vectorizer, example_texts, "query", owner=owner)
            self._set_vectorizer(vectorizer, vectors.shape[1])
        example_vectors = vectors[:0] if example_vectors is None else example_vectors
        return vectors.astype(np.float64), example_vectors.astype(np.float64)


def _read_descriptions(X: Any, y: Any, *, owner: str) -> tuple[Any, _Labels]:
    """Return the rows of descriptions, texts or embeddings, and the label of each, (n,)."""
    if isinstance(X, Mapping) and not hasattr(X, "tocsr"):  # a DOK matrix is a dict
        if y is not None:
            raise ValueError(
                f"The `y` parameter of `{owner}.fit` must be None where X maps labels to "
                "descriptions. To add examples, pass the mapping as `descriptions`."
            )
        check_label_items(list(X), name="descriptions", owner=owner, item="list(descriptions)")
        rows, names = _flatten_mapping(X, owner=owner)
    elif X is None:
        raise ValueError(
            f"{owner} needs descriptions: pass a mapping of label to description to `fit`, or as "
            "`descriptions`."
        )
    else:
        rows, names = X, y
    labels = check_labels(rows, names, owner=owner)
    if labels.ndim != 1:
        raise ValueError(
            f"The `y` parameter of `{owner}` must have one label a row; got shape {labels.shape}."
        )
    return rows, labels


def _flatten_mapping(descriptions: Mapping[Any, Any], *, owner: str) -> tuple[Any, list[Any]]:
    """Return all descriptions in one list (or array of embeddings) and the label of each."""
    rows: list[Any] = []
    labels: list[Any] = []
    for label, described in descriptions.items():
        is_one = isinstance(described, str) or (
            not isinstance(described, (list, tuple)) and np.ndim(described) == 1
        )
        many = [described] if is_one else described
        if not isinstance(many, (list, tuple, np.ndarray)) or not len(many):
            raise TypeError(
                f"The descriptions of `{owner}` must map each label to a text or a list of texts "
                f"(embeddings where vectorizer=None); that of {label!r} is "
                f"{'an empty list' if isinstance(many, (list, tuple)) else type(many).__name__}."
            )
        rows.extend(many)
        labels.extend([label] * len(many))
    if rows and not any(isinstance(row, str) for row in rows):
        return np.asarray(rows), labels
    return rows, labels


def _check_example_labels(X: Any, y: Any, classes: _Labels, *, owner: str) -> _Labels:
    """Return the labels of the examples X, each one of the classes, (n,)."""
    labels: _Labels = read_label_array(y, name="y", owner=owner)
    check_consistent_length(X, labels)
    described = set(classes.tolist())
    unknown = [i for i, label in enumerate(labels.tolist()) if label not in described]
    if unknown:
        raise ValueError(
            f"The `y` parameter of `{owner}` must hold labels that have a description, "
            f"{name_some(classes)}; got {len(unknown)} without, the first at y[{unknown[0]}]: "
            f"{name_some(labels[unknown[0] :][:1])}."
        )
    return labels


def _set_label_instruction(vectorizer: Any, instruction: str | None, *, owner: str) -> None:
    """Give the vectorizer the instruction for descriptions."""
    if instruction is None:
        return
    parameters = vectorizer.get_params() if hasattr(vectorizer, "get_params") else {}
    if "document_instruction" not in parameters:
        raise ValueError(
            f"The `label_instruction` parameter of `{owner}` must be None for a vectorizer "
            f"without `document_instruction`; {type(vectorizer).__name__} has none."
        )
    vectorizer.set_params(document_instruction=instruction)


def _sum_rows(vectors: FloatArray, codes: _Labels, n_classes: int) -> npt.NDArray[np.float64]:
    """Return the sum of the rows of each class, (n_classes, dim)."""
    sums = np.zeros((n_classes, vectors.shape[1]))
    np.add.at(sums, codes, vectors)
    return sums
