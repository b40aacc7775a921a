"""`EmbeddingClassifier`: a scikit-learn classifier on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, clone, is_clusterer, is_regressor
from sklearn.linear_model import LogisticRegression
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import has_fit_parameter

from skembed._inputs import check_labels, read_weights
from skembed._validation import parameter_error
from skembed.estimators.base import TextClassifierMixin, check_encoder

__all__ = ["DEFAULT_C", "EmbeddingClassifier"]

# Best or within 0.2 points of the best fixed C with 8, 16 and all examples of a class, and clearly
# lower log loss than C=1 and 3: benchmarks/classification_heads.py.
DEFAULT_C = 10.0


def _head_has(method: str) -> Callable[[Any], bool]:
    """Return the check of `available_if`: whether the head, fitted or not, has a method."""

    def check(self: Any) -> bool:
        head = getattr(self, "head_", self.head)
        getattr(LogisticRegression if head is None else head, method)  # its error is the reason
        return True

    return check


def _make_head(value: Any, *, name: str, owner: str) -> Any:
    """Return a fresh head; raise TypeError for what is not a classifier."""
    if value is None:
        return LogisticRegression(C=DEFAULT_C, max_iter=1000)
    usable = all(callable(getattr(value, method, None)) for method in ("fit", "predict"))
    if isinstance(value, type) or not usable or is_regressor(value) or is_clusterer(value):
        expected = "a classifier of scikit-learn's kind, such as LogisticRegression(), or None"
        raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)
    return clone(value)


class EmbeddingClassifier(TextClassifierMixin, BaseEstimator):
    """Classifier of texts: a scikit-learn classifier on their embeddings.

    Fitting costs one embedding of each text and the fit of the head.

    Parameters
    ----------
    vectorizer : str, path, transformer, encoder or None, default="skembed-mini"
        Encoder of the texts; `fit` uses a clone. A name or path is a frozen model of
        `NVEmbedVectorizer`; an instance trains if its `trainer` says so. An encoder (an object with
        ``encode``, such as a SentenceTransformer, or a callable) is used as it is. None: X holds
        embeddings, as in the last step of a Pipeline.
    head : classifier, optional
        Any scikit-learn classifier; `fit` uses a clone. None is
        ``LogisticRegression(C=10, max_iter=1000)``.

    Attributes
    ----------
    classes_ : ndarray, shape (n_classes,)
        The labels, sorted.
    head_ : classifier
        The fitted head.
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
    ZeroShotClassifier : Needs no labelled texts.
    NVEmbedVectorizer : Trains on labels with a `trainer`.

    Notes
    -----
    The default head was chosen on the train parts of six sets, with 8 and 16 examples a class and
    with all (`benchmarks/classification_heads.py`).

    `predict_proba` is the head's own. Logistic regression fits probabilities, but with few
    examples and this regularisation they are too low for the predicted class: they are not
    calibrated. Where they matter, pass ``head=CalibratedClassifierCV(...)``.

    To search over ``head__C`` or ``vectorizer__instruction``, pass instances: None and names have
    no parameters.

    Examples
    --------
    >>> from skembed import EmbeddingClassifier
    >>> texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
    >>> clf = EmbeddingClassifier().fit(texts, ["card", "card", "account", "account"])
    >>> clf.predict(["I lost my card"])
    array(['card'], dtype='<U7')
    """

    _fitted_mark = "classes_"
    _rules = {"vectorizer": check_encoder, "head": _make_head}

    def __init__(self, vectorizer: Any = "skembed-mini", *, head: Any = None) -> None:
        self.vectorizer = vectorizer
        self.head = head

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> EmbeddingClassifier:
        """Embed the texts and fit the head.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts; embeddings of shape (n_texts, dim) where ``vectorizer=None``.
        y : array-like, shape (n_texts,)
            Their labels; an indicator matrix of shape (n_texts, n_labels) where the head takes
            several labels a text.
        sample_weight : array-like of float, shape (n_texts,), optional
            Weights, where the head takes them.

        Returns
        -------
        EmbeddingClassifier
            This estimator.

        Raises
        ------
        TypeError
            If X is not texts (or embeddings), the head is not a classifier, or takes no weights.
        ValueError
            If labels are missing, of one class only, or not as many as texts; embeddings are not
            finite; or a weight is negative.
        """
        head = self._checked().head
        labels = check_labels(X, y, owner=type(self).__name__)
        _check_several(head, labels)
        options = {}
        weights = read_weights(sample_weight, owner="EmbeddingClassifier.fit")
        if weights is not None:
            if not has_fit_parameter(head, "sample_weight"):
                raise TypeError(
                    "The `sample_weight` parameter of `EmbeddingClassifier.fit` must be None for "
                    f"a head that takes no weights; {type(head).__name__} takes none."
                )
            options["sample_weight"] = weights
        vectors = self._fit_vectors(X, labels)
        self.head_ = head.fit(vectors, labels, **options)
        self.classes_ = self.head_.classes_
        return self

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Predict the label of each text.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.

        Returns
        -------
        ndarray, shape (n_texts,)
            One of `classes_` for each text, in input order.
        """
        vectors = self._embed_vectors(X)
        return np.asarray(self.head_.predict(vectors))

    @available_if(_head_has("predict_proba"))
    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return the probability of each label, as the head gives it; not calibrated (see Notes).

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.

        Returns
        -------
        ndarray of float, shape (n_texts, n_classes)
            Columns in the order of `classes_`; rows sum to 1.
        """
        vectors = self._embed_vectors(X)
        return np.asarray(self.head_.predict_proba(vectors))

    @available_if(_head_has("decision_function"))
    def decision_function(self, X: Any) -> npt.NDArray[Any]:
        """Return the score of each label, as the head gives it.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The texts, or embeddings; as `fit` got them.

        Returns
        -------
        ndarray of float, shape (n_texts, n_classes), or (n_texts,) for two classes
            Higher is more likely; of two classes, positive is ``classes_[1]``.
        """
        vectors = self._embed_vectors(X)
        return np.asarray(self.head_.decision_function(vectors))


def _check_several(head: Any, labels: npt.NDArray[Any]) -> None:
    """Raise ValueError for several labels a text and a head of scikit-learn that takes one."""
    if labels.ndim == 1 or not type(head).__module__.startswith("sklearn."):
        return
    tags = get_tags(head)
    if not tags.target_tags.multi_output and not tags.classifier_tags.multi_label:
        raise ValueError(
            "The `head` parameter of `EmbeddingClassifier` must take several labels a text, as `y` "
            f"is of shape {labels.shape}; {type(head).__name__} takes one. Wrap it: "
            "head=sklearn.multiclass.OneVsRestClassifier(LogisticRegression())."
        )
