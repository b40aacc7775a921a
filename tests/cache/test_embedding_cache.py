"""EmbeddingCache: storing and finding, limits, threads, copies."""

import copy
import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_files import (
    Holder,
    find,
    finish,
    integrity,
    make_vectors,
    snapshot,
    start_python,
)
from sklearn.base import clone

from skembed.cache import embedding_cache as cache_module
from skembed.cache import file_store as _cache_file
from skembed.cache import sqlite_layout as _cache_layout
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache

DIM = 16
MemoryOrFile = Callable[..., EmbeddingCache]


@pytest.fixture(params=["memory", "file"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryOrFile]:
    """Return a function that makes a cache of either kind."""
    made: list[EmbeddingCache] = []

    def make(max_bytes: int | None = None) -> EmbeddingCache:
        path = tmp_path / f"cache-{len(made)}.sqlite" if request.param == "file" else None
        made.append(EmbeddingCache(path, max_bytes=max_bytes))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


# Storing and finding


def test_finds_what_was_stored(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    vectors = make_vectors(3)
    cache.store("model", ["a", "b", "c"], vectors)
    mask, out = find(cache, ["c", "unknown", "a", "c"])
    assert mask == [True, False, True, True]
    assert np.array_equal(out, np.stack([vectors[2], np.zeros(DIM), vectors[0], vectors[2]]))
    assert (cache.hits, cache.misses, len(cache)) == (3, 1, 3)


def test_unknown_rows_of_out_stay_as_they_are(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    cache.store("model", ["a"], make_vectors(1))
    out = np.full((2, DIM), 7, dtype=np.float32)
    cache.lookup("model", ["unknown", "a"], out)
    assert (out[0] == 7).all()
    assert (out[1] != 7).all()


def test_out_may_be_part_of_a_larger_array(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    vectors = make_vectors(2)
    cache.store("model", ["a", "b"], vectors)
    whole = np.zeros((4, 2 * DIM), dtype=np.float32)
    cache.lookup("model", ["a", "b"], whole[::2, DIM:])
    assert np.array_equal(whole[::2, DIM:], vectors)
    assert not whole[1::2].any()
    assert not whole[:, :DIM].any()


def test_later_store_replaces(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    first, second = make_vectors(2), make_vectors(3, seed=1)
    cache.store("model", ["a", "b"], first)
    cache.store("model", ["b", "c", "b"], second)
    mask, out = find(cache, ["a", "b", "c"])
    assert all(mask)
    assert np.array_equal(out, np.stack([first[0], second[2], second[1]]))
    assert len(cache) == 3


def test_more_rows_than_one_step_takes(
    make_cache: MemoryOrFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK_ROWS", 700)
    cache = make_cache()
    texts = [f"text {i}" for i in range(2000)]
    vectors = make_vectors(2000)
    cache.store("model", texts[::2], vectors[::2])
    mask, out = find(cache, texts)
    assert mask == [True, False] * 1000
    assert np.array_equal(out[::2], vectors[::2])
    assert (cache.hits, cache.misses, len(cache)) == (1000, 1000, 1000)


def test_namespaces_are_separate(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    one, two = make_vectors(1), make_vectors(1, seed=1)
    cache.store("model 1", ["a"], one)
    cache.store("model 2", ["a"], two)
    assert np.array_equal(find(cache, ["a"], namespace="model 1")[1], one)
    assert np.array_equal(find(cache, ["a"], namespace="model 2")[1], two)
    assert find(cache, ["a"], namespace="")[0] == [False]


def test_namespace_and_text_do_not_run_together(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    cache.store("ab", ["c"], make_vectors(1))
    assert find(cache, ["bc"], namespace="a")[0] == [False]
    assert find(cache, ["abc"], namespace="")[0] == [False]
    assert find(cache, [""], namespace="abc")[0] == [False]
    assert find(cache, ["c"], namespace="ab")[0] == [True]


def test_other_dimension_is_a_miss_and_replaced(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    cache.store("model", ["a"], make_vectors(1))
    mask, out = find(cache, ["a"], dim=8)
    assert mask == [False]
    assert not out.any()
    assert (cache.hits, cache.misses) == (0, 1)
    cache.store("model", ["a"], make_vectors(1, 8))
    assert find(cache, ["a"], dim=8)[0] == [True]
    assert find(cache, ["a"])[0] == [False]
    assert len(cache) == 1


def test_rows_that_are_not_finite_are_left_out(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    vectors = make_vectors(4)
    vectors[0, 3], vectors[1, 0], vectors[2, -1] = np.nan, np.inf, -np.inf
    cache.store("model", ["nan", "inf", "-inf", "fine"], vectors)
    assert find(cache, ["nan", "inf", "-inf", "fine"])[0] == [False, False, False, True]
    cache.store("model", ["nan"], vectors[:1])
    assert len(cache) == 1


def test_empty_input(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    cache.store("model", [], np.empty((0, DIM), dtype=np.float32))
    mask, out = find(cache, [])
    assert (mask, out.shape, len(cache)) == ([], (0, DIM), 0)
    assert (cache.hits, cache.misses) == (0, 0)
    assert cache.lookup("model", [], np.empty((0, DIM), np.float32)).dtype == np.bool_
    assert bool(cache), "an empty cache is not None"


def test_odd_texts_are_told_apart(make_cache: MemoryOrFile) -> None:
    texts = ["", "\0", "\0\0", "a\0b", "a", "\U0001f600", "\ud83d", "\ude00", "\ud83d\ude00"]
    texts += ["é", "e\u0301", " ", "\n", "x" * 1_000_000, "x" * 1_000_001]
    cache = make_cache()
    vectors = make_vectors(len(texts))
    cache.store("\ud800 \0", texts, vectors)
    mask, out = find(cache, texts, namespace="\ud800 \0")
    assert all(mask)
    assert np.array_equal(out, vectors)


def test_vectors_longer_than_a_page(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    vectors = make_vectors(20, 4096)
    cache.store("model", [str(i) for i in range(20)], vectors)
    mask, out = find(cache, [str(i) for i in range(20)], dim=4096)
    assert all(mask)
    assert np.array_equal(out, vectors)


def test_store_takes_what_numpy_can_turn_into_float32(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    vectors = make_vectors(4).astype(np.float64)
    cache.store("model", ["a", "b"], vectors[::2])
    assert np.array_equal(find(cache, ["a", "b"])[1], vectors[::2].astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", "bare", np.zeros((4, 2), np.float32)), TypeError, "`texts` .* bare str"),
        (("model", ["a", 3.0], np.zeros((2, 2), np.float32)), TypeError, r"texts\[1\] is a float"),
        ((None, ["a"], np.zeros((1, 2), np.float32)), TypeError, "`namespace` .* must be a str"),
        (("model", ["a"], np.zeros((2, 2), np.float32)), ValueError, r"shape \(1, dim\)"),
        (("model", ["a"], np.zeros(2, np.float32)), ValueError, r"shape \(1, dim\)"),
    ],
)
@pytest.mark.parametrize("method", ["lookup", "store"])
def test_wrong_arguments(
    arguments: tuple[object, ...], error: type[Exception], message: str, method: str
) -> None:
    cache = EmbeddingCache()
    with pytest.raises(error, match=message):
        getattr(cache, method)(*arguments)
    assert len(cache) == 0


def test_out_must_be_float32() -> None:
    with pytest.raises(TypeError, match="`out` .* float32; got float64"):
        EmbeddingCache().lookup("model", ["a"], np.zeros((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`out` .* must be an ndarray; got a list"):
        EmbeddingCache().lookup("model", ["a"], [[0.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1])
def test_limit_must_be_positive(value: int) -> None:
    with pytest.raises(ValueError, match="`max_bytes` parameter of `EmbeddingCache`"):
        EmbeddingCache(max_bytes=value)


def test_clear_and_stats(make_cache: MemoryOrFile) -> None:
    cache = make_cache(50_000_000)
    texts = [str(i) for i in range(500)]
    cache.store("model", texts, make_vectors(500, 256))
    find(cache, ["0", "unknown"], dim=256)
    stats = cache.stats()
    assert stats == {
        "path": None if cache.path is None else str(cache.path),
        "max_bytes": 50_000_000,
        "dtype": "float32",
        "n_rows": 500,
        "size_bytes": cache.size_bytes,
        "hits": 1,
        "misses": 1,
    }
    assert cache.size_bytes > 500 * 256 * 4
    cache.clear()
    assert (len(cache), cache.hits, cache.misses) == (0, 0, 0)
    assert cache.size_bytes < 50_000
    assert find(cache, ["0"], dim=256)[0] == [False]
    cache.store("model", ["0"], make_vectors(1, 256))
    assert len(cache) == 1
    if cache.path is not None:
        assert cache.path.stat().st_size < 50_000


# Limits


@pytest.mark.parametrize("dim", [64, 384, 1024, 4096])
def test_file_keeps_to_its_limit(path: Path, dim: int) -> None:
    limit = 1_000_000
    cache = EmbeddingCache(path, max_bytes=limit)
    for block in range(12):
        n_rows = 250_000 // (dim * 4)
        texts = [f"{block} {i}" for i in range(n_rows)]
        cache.store("model", texts, make_vectors(n_rows, dim, seed=block))
        assert all(find(cache, texts, dim=dim)[0]), "the newest rows are there"
        assert cache.size_bytes <= limit
    assert cache.size_bytes > limit / 2
    cache.close()
    assert path.stat().st_size <= limit
    assert integrity(path) == "ok"


def test_file_evicts_the_least_recently_used(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=800_000)
    texts = [str(i) for i in range(300)]
    cache.store("model", texts, make_vectors(300, 384))
    used = texts[:100]
    find(cache, used, dim=384)  # the oldest by place in the file, the youngest by use
    cache.store("model", [f"new {i}" for i in range(250)], make_vectors(250, 384))
    assert sum(find(cache, used, dim=384)[0]) == 100
    assert sum(find(cache, texts[100:200], dim=384)[0]) < 100
    assert all(find(cache, [f"new {i}" for i in range(250)], dim=384)[0])


def test_close_records_what_was_used(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=800_000)
    cache.store("model", [str(i) for i in range(300)], make_vectors(300, 384))
    find(cache, [str(i) for i in range(100)], dim=384)
    cache.close()
    other = EmbeddingCache(path, max_bytes=800_000)
    other.store("model", [f"new {i}" for i in range(250)], make_vectors(250, 384))
    assert all(find(other, [str(i) for i in range(100)], dim=384)[0])


def test_lookup_does_not_write(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=1_000_000)
    cache.store("model", ["a"], make_vectors(1))
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")  # whoever wants to write has to wait for this
    before = writer.execute("SELECT * FROM entries").fetchall()
    assert find(cache, ["a"])[0] == [True]
    assert writer.execute("SELECT * FROM entries").fetchall() == before
    writer.execute("ROLLBACK")
    writer.close()
    cache.close()


def test_smaller_limit_shrinks_an_existing_file(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", [str(i) for i in range(1000)], make_vectors(1000, 384))
    cache.close()
    assert path.stat().st_size > 1_500_000
    cache = EmbeddingCache(path, max_bytes=500_000)
    cache.store("model", ["new"], make_vectors(1, 384))
    assert cache.size_bytes <= 500_000
    assert find(cache, ["new", "999", "0"], dim=384)[0] == [True, True, False]
    cache.close()
    assert path.stat().st_size <= 500_000
    assert integrity(path) == "ok"


@pytest.mark.parametrize("dim", [64, 384, 1000, 1024, 4096])
def test_estimate_of_a_row_is_close(path: Path, dim: int) -> None:
    cache = EmbeddingCache(path)
    before = cache.size_bytes
    cache.store("model", [str(i) for i in range(2000)], make_vectors(2000, dim))
    per_row = (cache.size_bytes - before) / 2000
    assert 0.85 < per_row / _cache_layout.estimate_row_bytes(dim * 4) < 1.02


def test_file_does_not_outgrow_its_limit_in_passing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = _cache_file.insert_rows
    peaks: list[int] = []

    def watched(connection: sqlite3.Connection, *args: Any) -> None:
        insert(connection, *args)
        peaks.append(_cache_layout.used_bytes(connection))

    monkeypatch.setattr(_cache_file, "insert_rows", watched)
    cache = EmbeddingCache(path, max_bytes=1_000_000)
    for block in range(10):
        cache.store("model", [f"{block} {i}" for i in range(150)], make_vectors(150, 384))
    assert 700_000 < max(peaks) <= 1_000_000


def test_call_larger_than_the_limit_keeps_what_fits(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=300_000)
    cache.store("model", [str(i) for i in range(1000)], make_vectors(1000, 384))
    assert 50 < len(cache) < 200
    assert cache.size_bytes <= 300_000
    assert find(cache, ["999"], dim=384)[0] == [True]


def test_limit_too_small_for_any_row(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=1)
    cache.store("model", ["a"], make_vectors(1))
    assert len(cache) == 0


# Threads and processes


def hammer(cache: EmbeddingCache, n_threads: int = 6, n_rounds: int = 15) -> int:
    """Store and find from several threads; return the number of lookups' texts."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(n_threads)

    def work(seed: int) -> None:
        try:
            barrier.wait()
            rng = np.random.default_rng(seed)
            for _ in range(n_rounds):
                numbers = rng.integers(0, 200, size=50)
                texts = [str(i) for i in numbers]
                expected = np.repeat(numbers[:, None], DIM, axis=1).astype(np.float32)
                cache.store("model", texts[:25], expected[:25])
                mask, out = find(cache, texts)
                assert np.array_equal(out[mask], expected[mask])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return n_threads * n_rounds * 50


def test_threads(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    n_lookups = hammer(cache)
    assert cache.hits + cache.misses == n_lookups
    assert len(cache) <= 200


def test_threads_under_eviction(make_cache: MemoryOrFile) -> None:
    cache = make_cache(90_000 if make_cache().path else 20_000)
    hammer(cache)
    assert cache.size_bytes <= (cache.max_bytes or 0)
    assert len(cache) > 0


# Copies, pickles, and what `cache=` may be


def test_copies_are_the_cache_itself(make_cache: MemoryOrFile) -> None:
    cache = make_cache()
    assert copy.copy(cache) is cache
    assert copy.deepcopy(cache) is cache
    assert clone(Holder(cache)).cache is cache
    assert cache == cache
    assert cache != make_cache()


def test_pickle_of_a_memory_cache_arrives_empty() -> None:
    cache = EmbeddingCache(max_bytes=10_000_000)
    cache.store("model", ["a"] * 1000, make_vectors(1000))
    data = pickle.dumps(cache)
    assert len(data) < 500
    copied = pickle.loads(data)
    assert (copied.max_bytes, copied.path, len(copied)) == (10_000_000, None, 0)
    assert copied is not cache


def test_pickle_of_a_file_cache_opens_the_file(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=10_000_000)
    cache.store("model", ["a"], make_vectors(1))
    find(cache, ["a"])
    data = pickle.dumps(cache)
    one, two = pickle.loads(data), pickle.loads(data)
    assert one is two, "one connection, however many estimators a worker receives"
    assert (one.path, one.max_bytes, one.hits) == (path, 10_000_000, 0)
    assert find(one, ["a"])[0] == [True]


def test_pickle_of_the_default_cache_is_the_default_there() -> None:
    default = resolve_cache("memory")
    data = pickle.dumps(default)
    assert pickle.loads(data) is default
    code = (
        "import pickle, sys; from skembed.cache import resolve_cache\n"
        "cache = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "print(cache is resolve_cache('memory'), len(cache))"
    )
    assert finish(start_python(code, data.hex())) == "True 0"


def test_repr_shows_path_and_limit(path: Path) -> None:
    assert repr(EmbeddingCache(max_bytes=5)) == "EmbeddingCache(max_bytes=5)"
    assert repr(EmbeddingCache(path)) == f"EmbeddingCache({str(path)!r}, max_bytes=None)"
    assert not path.exists(), "making and showing a cache touches no disk"


def test_resolve_cache(path: Path) -> None:
    cache = EmbeddingCache()
    assert resolve_cache(None) is None
    assert resolve_cache(cache) is cache
    assert resolve_cache("memory") is resolve_cache("memory")
    shared = resolve_cache(path)
    assert shared is not None
    assert shared.path == path
    assert resolve_cache(str(path)) is shared
    assert resolve_cache(path.parent / "x" / ".." / path.name) is shared
    assert resolve_cache(path.with_name("other.sqlite")) is not shared


def test_paths_are_resolved_when_given(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert EmbeddingCache("cache.sqlite").path == path
    assert EmbeddingCache("~/cache.sqlite").path == path
    (tmp_path / "link").symlink_to(path)
    shared = resolve_cache(path)
    assert resolve_cache("link") is shared


@pytest.mark.parametrize("name", ["a b?c=d#e%20.sqlite", ":memory:", "\U0001f600.sqlite"])
def test_odd_file_names(tmp_path: Path, name: str) -> None:
    cache = EmbeddingCache(tmp_path / name)
    cache.store("model", ["a"], make_vectors(1))
    cache.close()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert find(EmbeddingCache(tmp_path / name), ["a"])[0] == [True]


def test_registry_does_not_keep_caches_alive(path: Path) -> None:
    cache = resolve_cache(path)
    assert cache is not None
    assert len(cache) == 0
    del cache
    assert len(cache_module._file_caches) == 0


def test_default_cache_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_default_cache", None)
    barrier = threading.Barrier(8)
    found: list[object] = []

    def work() -> None:
        barrier.wait()
        found.append(resolve_cache("memory"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(cache) for cache in found}) == 1


@pytest.mark.parametrize("value", [3, 1, b"bytes", ["memory"], EmbeddingCache])
def test_resolve_cache_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError, match="The `cache` parameter of .* must be None, 'memory', a"):
        resolve_cache(value)


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_resolve_cache_refuses_bad_paths(value: str) -> None:
    with pytest.raises(ValueError, match="The `cache` parameter of"):
        resolve_cache(value)
    with pytest.raises(ValueError, match="The `path` parameter of"):
        EmbeddingCache(value)


def test_file_holds_no_text(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("the model's name", ["a secret sentence"], make_vectors(1))
    content = b"".join(snapshot(path.parent).values())
    assert b"secret" not in content
    assert b"model's" not in content
