"""Embeddings kept per text, in memory or in one SQLite file, so that none is computed twice."""

from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache

__all__ = ["EmbeddingCache", "resolve_cache"]
