"""A vectorizer without a model: each word has a random direction of its own, fixed by its hash."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin


class FakeVectorizer(TransformerMixin, BaseEstimator):
    """Unit vectors of summed word vectors; `n_texts` counts what all instances embedded."""

    n_texts: ClassVar[int] = 0

    def __init__(self, dim: int = 64, *, lowercase: bool = True, missing: str = "error") -> None:
        self.dim = dim
        self.lowercase = lowercase
        self.missing = missing

    def fit(self, X: Any, y: Any = None) -> FakeVectorizer:
        self.n_fitted_ = len(X)
        return self

    def transform(self, X: Sequence[str]) -> np.ndarray:
        type(self).n_texts += len(X)
        return np.array([self._embed(text) for text in X], np.float32).reshape(len(X), self.dim)

    def _embed(self, text: str | None) -> np.ndarray:
        if text is None:
            return np.zeros(self.dim) if self.missing == "zero" else np.full(self.dim, np.nan)
        words = (text.lower() if self.lowercase else text).split()
        seeds = [zlib.crc32(word.encode()) for word in words]
        vector = sum((np.random.default_rng(s).normal(size=self.dim) for s in seeds), 0.0)
        norm = np.linalg.norm(vector)
        return np.zeros(self.dim) + vector / (norm or 1.0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        return tags


class TwoSidedVectorizer(FakeVectorizer):
    """Also has the two sides of retrieval, documents with a word of their own in front."""

    def __init__(
        self,
        dim: int = 64,
        *,
        lowercase: bool = True,
        missing: str = "error",
        document_instruction: str | None = None,
    ) -> None:
        super().__init__(dim, lowercase=lowercase, missing=missing)
        self.document_instruction = document_instruction

    def encode_query(self, X: Sequence[str]) -> np.ndarray:
        return self.transform(X)

    def encode_document(self, X: Sequence[str]) -> np.ndarray:
        front = f"{self.document_instruction} " if self.document_instruction else ""
        return self.transform([front + text for text in X])


class EncodeOnly:
    """An encoder that is no transformer; a copy or a fit of it is an error."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return FakeVectorizer().transform(texts)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("an encoder that is used as it is was fitted")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise AssertionError("an encoder that is used as it is was copied")


class TwoSidedEncoder(EncodeOnly):
    """Has the two sides as well, documents with a word of their own in front."""

    def encode_query(self, texts: Sequence[str]) -> np.ndarray:
        return self.encode(texts)

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        return self.encode([f"document {text}" for text in texts])


class SentenceTransformerLike(EncodeOnly):
    """The signatures of sentence-transformers 6.2; it can be called, as any module of torch."""

    def encode(
        self,
        inputs: Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **kwargs: Any,
    ) -> np.ndarray:
        return FakeVectorizer().transform([f"{prompt or ''}{text}" for text in inputs])

    def encode_query(self, inputs: Sequence[str], **kwargs: Any) -> np.ndarray:
        return self.encode(inputs, **kwargs)

    def encode_document(self, inputs: Sequence[str], **kwargs: Any) -> np.ndarray:
        return self.encode(inputs, prompt="document ", **kwargs)

    def __call__(self, features: dict[str, Any]) -> None:
        raise AssertionError("the forward pass takes token ids")


def call_fake(texts: Sequence[str]) -> np.ndarray:
    """Embed as `FakeVectorizer` does, as a plain function."""
    return FakeVectorizer().transform(texts)


def unit_rows(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Draw vectors of length 1 and of any direction, float32 (n, dim)."""
    vectors = rng.standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Table:
    """A transformer that looks vectors up, scales them at will and notes what it was asked."""

    def __init__(self, vectors: dict[str, Any], scale: float = 1.0) -> None:
        self.vectors, self.scale = vectors, scale
        self.calls: list[tuple[str, list[str]]] = []

    def _look_up(self, side: str, texts: list[str]) -> np.ndarray:
        self.calls.append((side, list(texts)))
        return self.scale * np.array([self.vectors[text] for text in texts], dtype=np.float64)

    def transform(self, texts: list[str]) -> np.ndarray:
        return self._look_up("transform", texts)


class LetterVectorizer:
    """Counts of letters; a query says so with a component of its own."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.calls: list[str] = []

    def transform(self, texts: list[str]) -> np.ndarray:
        rows = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return np.array(rows, dtype=np.float32).reshape(-1, 26) + np.float32(self.shift)

    def encode_query(self, texts: list[str]) -> np.ndarray:
        self.calls.append("query")
        return self.transform(texts)

    def encode_document(self, texts: list[str]) -> np.ndarray:
        self.calls.append("document")
        return self.transform(texts)
