"""Quantized components: ranges of integers, and levels of single bits.

Every dimension has its own ranges or levels. All work is done in blocks of a few MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from skembed.similarity import Vectors, iterate_blocks

__all__ = ["Codec", "Codes", "Levels", "Ranges"]

_MAX_CODE = 255

Codes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """Converter of vectors to codes and back."""

    def encode(self, vectors: Vectors) -> Codes:
        """Return codes, (n, width), of finite vectors (n, dim)."""

    def decode(self, codes: Codes) -> Vectors:
        """Return the vectors, (n, dim), that codes represent."""


@dataclass(frozen=True, eq=False)
class Ranges:
    """256 equal steps from the lowest to the highest value of each dimension."""

    low: Vectors  # the value of code 0, (dim,)
    step: Vectors  # between two codes, (dim,); 0 for a dimension without extent

    @classmethod
    def between(cls, low: Vectors, high: Vectors) -> Ranges:
        """Return the steps between two bounds of each dimension."""
        return cls(low, (high - low) / np.float32(_MAX_CODE))

    @staticmethod
    def learn(vectors: Vectors, percentiles: tuple[float, float]) -> tuple[Vectors, Vectors]:
        """Return the lower and the upper percentile of each dimension, float32, (dim,) each."""
        n, dim = vectors.shape
        if percentiles == (0.0, 100.0):
            return vectors.min(axis=0), vectors.max(axis=0)
        bounds = np.empty((2, dim), dtype=np.float32)
        for columns in iterate_blocks(dim, n):
            bounds[:, columns] = np.percentile(vectors[:, columns], percentiles, axis=0)
        return bounds[0], bounds[1]

    def encode(self, vectors: Vectors) -> Codes:
        """Return the nearest code of each component, (n, dim); 0 or 255 out of range."""
        codes = np.empty(vectors.shape, dtype=np.uint8)
        steps = np.where(self.step > 0, self.step, np.float32(np.inf))  # no extent: code 0
        for rows in iterate_blocks(*vectors.shape):
            with np.errstate(over="ignore"):  # values far out of range are clipped below
                block = vectors[rows] - self.low
                block /= steps
            np.rint(block, out=block)
            codes[rows] = np.clip(block, 0, _MAX_CODE, out=block)
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """Return the value of each code, (n, dim)."""
        vectors: Vectors = codes.astype(np.float32)
        vectors *= self.step
        vectors += self.low
        return vectors


@dataclass(frozen=True, eq=False)
class Levels:
    """One bit for each dimension, above a threshold or not; eight of them in a byte."""

    table: Vectors  # (3, dim): the threshold, the value of a 0 bit, the value of a 1 bit

    @classmethod
    def learn(cls, vectors: Vectors) -> Levels:
        """Return the mean of each dimension, and the means of the values below and above it."""
        n, dim = vectors.shape
        blocks = list(iterate_blocks(n, dim))
        mean = sum(vectors[rows].sum(axis=0, dtype=np.float64) for rows in blocks) / n
        mean = mean.astype(np.float32)
        count, total, spread = np.zeros(dim), np.zeros(dim), np.zeros(dim)
        for rows in blocks:
            above = vectors[rows] > mean
            count += above.sum(axis=0)
            total += np.where(above, vectors[rows] - mean, 0).sum(axis=0, dtype=np.float64)
            spread += np.abs(vectors[rows] - mean).sum(axis=0, dtype=np.float64)
        below = mean - (spread - total) / np.maximum(n - count, 1)
        table = np.stack([mean, below, mean + total / np.maximum(count, 1)])
        return cls(table.astype(np.float32))

    def encode(self, vectors: Vectors) -> Codes:
        """Return packed bits, (n, ceil(dim / 8))."""
        n, dim = vectors.shape
        bits = np.empty((n, -(-dim // 8)), dtype=np.uint8)
        for rows in iterate_blocks(n, dim):
            bits[rows] = np.packbits(vectors[rows] > self.table[0], axis=1)
        return bits

    def decode(self, codes: Codes) -> Vectors:
        """Return the level of each bit, (n, dim)."""
        _, below, above = self.table
        vectors = np.unpackbits(codes, axis=-1, count=self.table.shape[1]).astype(np.float32)
        vectors *= above - below
        vectors += below
        return vectors
