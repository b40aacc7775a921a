"""`EmbeddingQuantizer`: embeddings in 4 or 32 times less memory, as a fitted transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    OneToOneFeatureMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted, validate_data

from skembed._validation import (
    CheckedParameters,
    check_dtype,
    check_int,
    check_real,
    list_items,
    parameter_error,
)
from skembed.search.codes import Codec, Levels, Ranges
from skembed.search.top_k import N_SPARE, rescore_candidates, top_k_rows
from skembed.similarity import Indices, TopK, Vectors, check_vectors, iterate_blocks

__all__ = ["Codes", "EmbeddingQuantizer", "PRECISIONS"]

_OWNER = "EmbeddingQuantizer"
PRECISIONS = ("int8", "uint8", "binary")
_BLOCK_BYTES = 32 * 2**20
_SIGN = np.uint8(0x80)  # 0 ... 255 as unsigned is -128 ... 127 as signed with this bit turned

Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Vectors of documents, read as float32 a few rows at a time."""

    values: Any
    decode: Callable[[Any], Vectors]

    def read(self, rows: slice | Indices) -> Vectors:
        """Return some rows, (n_rows, dim)."""
        return self.decode(self.values[rows])


def _check_percentiles(value: Any, *, name: str, owner: str) -> tuple[float, float]:
    """Return the two percentiles."""
    items = list_items(value)
    if items is None or len(items) != 2:
        expected = "a pair of numbers, such as (0.5, 99.5)"
        raise parameter_error(value, name=name, owner=owner, expected=expected, kind=TypeError)
    low, high = (check_real(each, name=name, owner=owner, low=0, high=100) for each in items)
    if low >= high:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must rise, such as (0.5, 99.5); got "
            f"({low:g}, {high:g})."
        )
    return low, high


class EmbeddingQuantizer(CheckedParameters, TransformerMixin, BaseEstimator):
    """Quantizer of embeddings to 8-bit integers or single bits, with a search among them.

    `fit` learns what the codes of each dimension represent, so that all later vectors get the same
    codes, one at a time or a million; a pickle keeps it.

    Parameters
    ----------
    precision : {"int8", "uint8", "binary"}, default="int8"
        "int8" and "uint8" cut the range of each dimension into 255 steps: 1 byte a component.
        "binary" keeps whether a component lies above its mean: 1/8 byte, eight to a byte.
    quantile_range : tuple (float, float), default=(0.0, 100.0)
        Percentiles of each dimension between which the steps of "int8" and "uint8" lie; what is
        outside is clipped. (0, 100) takes lowest and highest value; a narrower range makes finer
        steps where a few values are far out. As in scikit-learn's `RobustScaler`.

    Attributes
    ----------
    ranges_ : ndarray of float32, shape (2, n_features_in_)
        Lowest and highest value of each dimension; of "int8" and "uint8".
    levels_ : ndarray of float32, shape (3, n_features_in_)
        Threshold of each dimension (its mean), and the means of the values below and above it;
        only with "binary".
    n_features_in_ : int
        Width of an embedding.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, when `fit` saw a frame.

    See Also
    --------
    Retriever : Stores a corpus as int8 or binary by itself (``storage=``).

    Notes
    -----
    With the bounds a and b of a dimension, a code is the integer c in [0, 255] nearest to
    ``255 (x - a) / (b - a)``, minus 128 for "int8", and stands for ``a + c (b - a) / 255``: within
    the range, half a step is lost at the most. A dimension that never changed has one code, and
    comes back exactly. Values out of range become the nearest code. `quantize_embeddings` of
    sentence-transformers takes the same ranges, rounds down, and cuts bits at zero.

    Bits are packed as by `numpy.packbits`: the first dimension is the highest bit of the first
    byte, and the last byte is filled with zeros.

    `fit` reads all embeddings; percentiles other than (0, 100) copy a few MiB of columns at a time.

    References
    ----------
    B. Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv 1712.05877, section 2.1. I. Yamada et al., Efficient
    Passage Retrieval with Hashing for Open-domain Question Answering, arXiv 2106.00882 (bits
    first, then exact scores).

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed import EmbeddingQuantizer
    >>> texts = ["a llama", "a camel", "the Sun", "a star", "a theatre play"]
    >>> embeddings = NVEmbedVectorizer().transform(texts)
    >>> quantizer = EmbeddingQuantizer().fit(embeddings)
    >>> codes = quantizer.transform(embeddings)
    >>> codes.dtype, codes.nbytes / embeddings.nbytes
    (dtype('int8'), 0.25)
    >>> found = quantizer.search(embeddings[2:3], codes, top_k=2, finer=embeddings)
    >>> [texts[i] for i in found.indices[0]]
    ['the Sun', 'a star']
    """

    _rules = {
        "precision": partial(check_dtype, allowed=PRECISIONS),
        "quantile_range": _check_percentiles,
    }

    def __init__(
        self,
        precision: str = "int8",
        *,
        quantile_range: tuple[float, float] = (0.0, 100.0),
    ) -> None:
        self.precision = precision
        self.quantile_range = quantile_range

    def fit(self, X: Any, y: Any = None) -> EmbeddingQuantizer:
        """Learn the range, or the two levels, of each dimension.

        Parameters
        ----------
        X : array-like of float, shape (n, dim)
            Embeddings like those that will come; a sample of some ten thousand is enough.
        y : None
            Ignored.

        Returns
        -------
        EmbeddingQuantizer
            This estimator.

        Raises
        ------
        TypeError, ValueError
            If a parameter has an invalid type or value, or X is not two-dimensional and finite,
            or has fewer than two rows.
        """
        checked = self._checked()
        vectors = self._check_embeddings(X, reset=True, ensure_min_samples=2)
        for name in ("ranges_", "levels_"):
            self.__dict__.pop(name, None)
        if checked.precision == "binary":
            self.levels_ = Levels.learn(vectors).table
            return self
        low, high = Ranges.learn(vectors, checked.quantile_range)
        with np.errstate(over="ignore"):
            extent = high - low
        if not np.isfinite(extent).all():
            column = int(np.argmin(np.isfinite(extent)))
            raise ValueError(
                f"The `X` parameter of `{_OWNER}` must have dimensions whose extent is a number of "
                f"float32; got [{low[column]:g}, {high[column]:g}] in column {column}. Scale the "
                "embeddings first."
            )
        self.ranges_ = np.stack([low, high])
        return self

    def transform(self, X: Any) -> Codes:
        """Return the codes of embeddings.

        Parameters
        ----------
        X : array-like of float, shape (n, dim)
            Embeddings; no rows give no rows.

        Returns
        -------
        ndarray of int8 or uint8, shape (n, dim), or of uint8, shape (n, ceil(dim / 8))
            One code a component, or for "binary" packed bits.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If X is not two-dimensional and finite, or of another width than in `fit`.
        """
        check_is_fitted(self)
        vectors = self._check_embeddings(X, reset=False, ensure_min_samples=0)
        codes = self._codec.encode(vectors)
        if self._code_dtype == np.uint8:
            return codes
        codes ^= _SIGN
        return codes.view(np.int8)

    def inverse_transform(self, X: Any) -> Vectors:
        """Return the embeddings that codes represent.

        Parameters
        ----------
        X : array-like of int8 or uint8, shape (n, n_features_out)
            Codes as `transform` returns them.

        Returns
        -------
        ndarray of float32, shape (n, dim)
            Embeddings; those of unit length come back almost of unit length.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If X is of another type or width than what `transform` returns.
        """
        check_is_fitted(self)
        codes = self._check_codes(X, name="X", owner=f"{_OWNER}.inverse_transform")
        vectors = np.empty((len(codes), self.n_features_in_), dtype=np.float32)
        for rows in iterate_blocks(*vectors.shape):
            vectors[rows] = self._decode(codes[rows])
        return vectors

    def search(
        self,
        queries: Any,
        codes: Any,
        top_k: int = 10,
        *,
        finer: Any = None,
        rescore: int = 4,
    ) -> TopK:
        """Find the documents with the highest dot product with each query, among their codes.

        Queries stay exact: each is compared with what the codes represent. With `finer`, the best
        ``rescore * top_k`` candidates are scored again from it, and only their rows are read.
        Memory is bounded: about 32 MiB, and a few times what is returned.

        Parameters
        ----------
        queries : array-like of float, shape (n_queries, dim)
            Embeddings as they come from a vectorizer, not quantised.
        codes : ndarray of int8 or uint8, shape (n_documents, n_features_out)
            The documents, from `transform`; may be mapped from a file.
        top_k : int, default=10
            Number of documents to find; all of them where there are fewer.
        finer : ndarray of float, shape (n_documents, dim), or tuple, optional
            The same documents as embeddings, or as a pair of another fitted EmbeddingQuantizer and
            its codes; may be mapped from a file (``numpy.load(path, mmap_mode="r")``). None gives
            scores of the codes.
        rescore : int, default=4
            Candidates for each result, where there is `finer`.

        Returns
        -------
        TopK
            `scores`, float32, and `indices`, int64, each of shape (n_queries, top_k), the best
            first. As with a `Retriever`, a score depends on one query and one document alone, and
            of equal scores the document with the higher index comes first.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        TypeError, ValueError
            If an array has an invalid type, shape or width, or is not finite.
        """
        check_is_fitted(self)
        owner = f"{_OWNER}.search"
        vectors = _check_queries(queries, self.n_features_in_, owner=owner)
        coarse = _Rows(self._check_codes(codes, name="codes", owner=owner), self._decode)
        n = len(coarse.values)
        if not n:
            raise ValueError(f"The `codes` parameter of `{owner}` must hold documents; got none.")
        top_k = min(n, check_int(top_k, name="top_k", owner=owner, low=1))
        rescore = check_int(rescore, name="rescore", owner=owner, low=1)
        finest = coarse if finer is None else self._check_finer(finer, n, owner=owner)
        n_candidates = min(n, top_k * (1 if finer is None else rescore) + N_SPARE)
        ranks = np.arange(n, dtype=np.int64)
        candidates = top_k_rows(vectors, coarse.read, ranks, n_candidates, block_bytes=_BLOCK_BYTES)
        return rescore_candidates(vectors, candidates.indices, finest.read, ranks, top_k)

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[Any]:
        """Return the names of the columns of `transform`: those of the input, or of the bytes.

        Parameters
        ----------
        input_features : array-like of str, optional
            Names of the dimensions; None takes those that `fit` saw, or ``"x0"``, ``"x1"``, ...

        Returns
        -------
        ndarray of object (str), shape (n_features_out,)
            For "binary" ``"embeddingquantizer0"``, ..., one for each byte.

        Raises
        ------
        NotFittedError
            If called before `fit`.
        ValueError
            If `input_features` are not those of `fit`.
        """
        check_is_fitted(self)
        packed = hasattr(self, "levels_")
        mixin = ClassNamePrefixFeaturesOutMixin if packed else OneToOneFeatureMixin
        return np.asarray(mixin.get_feature_names_out(self, input_features))

    def __sklearn_tags__(self) -> Any:
        """Return tags for integers as output, whatever the input."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self) -> int:
        """Number of columns of `transform`."""
        dim = int(self.n_features_in_)
        return -(-dim // 8) if hasattr(self, "levels_") else dim

    @property
    def _code_dtype(self) -> np.dtype[Any]:
        """Dtype of the codes."""
        signed = self._checked().precision == "int8" and not hasattr(self, "levels_")
        return np.dtype(np.int8 if signed else np.uint8)

    @property
    def _codec(self) -> Codec:
        """The codec with what `fit` learned."""
        if hasattr(self, "levels_"):
            return Levels(self.levels_)
        return Ranges.between(*self.ranges_)

    def _decode(self, codes: Any) -> Vectors:
        """Return the vectors of a block of checked codes, (n_rows, dim)."""
        unsigned = codes.view(np.uint8)
        if self._code_dtype == np.int8:
            unsigned = unsigned ^ _SIGN
        return self._codec.decode(unsigned)

    def _check_embeddings(self, X: Any, **options: Any) -> Vectors:
        """Return embeddings checked by scikit-learn's rules, float32, (n, dim)."""
        with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
            return np.asarray(validate_data(self, X, dtype=np.float32, **options))

    def _check_codes(self, codes: Any, *, name: str, owner: str) -> npt.NDArray[Any]:
        """Return codes as an array, (n, n_features_out); an array is not copied."""
        subject = f"The `{name}` parameter of `{owner}`"
        array = np.asarray(codes)
        if array.dtype != self._code_dtype:
            raise TypeError(
                f"{subject} must hold codes of `transform`, of dtype {self._code_dtype}; got dtype "
                f"{array.dtype}."
            )
        if array.ndim != 2 or array.shape[1] != self._n_features_out:
            raise ValueError(
                f"{subject} must be of shape (n, {self._n_features_out}), as `transform` returns; "
                f"got shape {array.shape}."
            )
        return array

    def _check_finer(self, finer: Any, n: int, *, owner: str) -> _Rows:
        """Return the rows of a finer copy of n documents, without reading them."""
        subject = f"The `finer` parameter of `{owner}`"
        if isinstance(finer, tuple):
            if len(finer) != 2 or not isinstance(finer[0], EmbeddingQuantizer):
                raise TypeError(
                    f"{subject} must be an array of embeddings, or a pair of a fitted {_OWNER} and "
                    f"its codes; got a tuple of {len(finer)}."
                )
            quantizer, codes = finer
            check_is_fitted(quantizer)
            rows = _Rows(
                quantizer._check_codes(codes, name="finer", owner=owner), quantizer._decode
            )
            dim = quantizer.n_features_in_
        else:
            array = np.asarray(finer)
            if array.dtype.kind != "f" or array.ndim != 2:
                raise TypeError(
                    f"{subject} must be a two-dimensional array of floats; got dtype "
                    f"{array.dtype} and shape {array.shape}."
                )
            rows = _Rows(array, _read_finite)
            dim = array.shape[1]
        if (len(rows.values), dim) != (n, self.n_features_in_):
            raise ValueError(
                f"{subject} must hold the {n} documents of `codes`, of width "
                f"{self.n_features_in_}; got {len(rows.values)} of width {dim}."
            )
        return rows


def _check_queries(queries: Any, dim: int, *, owner: str) -> Vectors:
    """Return queries as finite float32, (n_queries, dim)."""
    vectors = check_vectors(queries, name="queries", owner=owner, dim=dim)
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise ValueError(
            f"The `queries` parameter of `{owner}` must be finite numbers of float32; queries"
            f"[{row}] has others."
        )
    return vectors


def _read_finite(rows: Any) -> Vectors:
    """Return rows of embeddings as float32; refuse NaN, which has no order."""
    vectors: Vectors = rows.astype(np.float32, copy=False)
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"The `finer` parameter of `{_OWNER}.search` must hold finite numbers; the vector of a "
            "candidate has others."
        )
    return vectors
