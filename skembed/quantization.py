"""`EmbeddingQuantizer` under its documented path."""

from skembed import EmbeddingQuantizer

__all__ = ["EmbeddingQuantizer"]
