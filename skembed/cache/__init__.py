"""Keep embeddings per text, in memory or in one SQLite file, so that none is computed twice.

``EmbeddingCache`` is what ``NVEmbedVectorizer(cache=...)`` uses and what a user can
open to read the counters, set a limit or empty it; ``resolve_cache`` turns that
parameter into a cache. A cache holds digests and vectors, never the texts.
"""

from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache

__all__ = ["EmbeddingCache", "resolve_cache"]
