"""Cached vectors in memory, and their limit."""

import tracemalloc
from pathlib import Path

from cache_files import (
    find,
    make_vectors,
)

from skembed.cache import stores as _cache_memory
from skembed.cache.embedding_cache import EmbeddingCache

DIM = 16


def test_memory_is_counted_honestly() -> None:
    vectors = make_vectors(1000, 64)
    texts = [[f"{block} {i}" for i in range(1000)] for block in range(30)]
    limit = 2_000_000
    cache = EmbeddingCache(max_bytes=limit)
    tracemalloc.start()
    try:
        for block in texts:
            cache.store("model", block, vectors)
            assert cache.size_bytes <= limit
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limit - 1000 < cache.size_bytes
    assert 0.75 * limit < held < 1.1 * limit


def test_default_limit_of_memory_is_a_gibibyte(path: Path) -> None:
    assert EmbeddingCache().max_bytes == 1 << 30
    assert EmbeddingCache(path).max_bytes is None


def test_memory_evicts_the_least_recently_used() -> None:
    row = DIM * 4 + _cache_memory.ROW_OVERHEAD_BYTES
    cache = EmbeddingCache(max_bytes=3 * row)
    cache.store("model", ["a", "b", "c"], make_vectors(3))
    find(cache, ["a"])
    cache.store("model", ["d"], make_vectors(1))
    assert find(cache, ["a", "b", "c", "d"])[0] == [True, False, True, True]
    assert len(cache) == 3


def test_row_beyond_the_limit_of_memory_evicts_nothing() -> None:
    cache = EmbeddingCache(max_bytes=1000)
    cache.store("model", ["a"], make_vectors(1))
    cache.store("model", ["huge"], make_vectors(1, 1000))
    assert find(cache, ["a"])[0] == [True]
    assert find(cache, ["huge"], dim=1000)[0] == [False]
