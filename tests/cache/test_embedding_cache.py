"""EmbeddingCache: limits, threads, processes, kills, foreign and damaged files."""

import copy
import os
import pickle
import signal
import sqlite3
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_files import (
    Holder,
    file_connection,
    find,
    finish,
    finish_all,
    integrity,
    make_vectors,
    snapshot,
    start_python,
)
from sklearn.base import clone

from skembed.cache import embedding_cache as cache_module
from skembed.cache import file_store as _cache_file
from skembed.cache import sqlite_layout as _cache_layout
from skembed.cache import stores as _cache_memory
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
from skembed.exceptions import CacheError

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


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


OPENER = """
import sys
from skembed.cache.embedding_cache import EmbeddingCache
caches = [EmbeddingCache(f"{sys.argv[1]}-{i}") for i in range(40)]
print("ready", flush=True)
sys.stdin.readline()
for cache in caches:
    assert len(cache) == 0
"""


def test_processes_race_to_make_the_file(path: Path) -> None:
    openers = [start_python(OPENER, path) for _ in range(4)]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("\n")
        opener.stdin.flush()
    finish_all(openers)


WRITER = """
import sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
path, name, n_calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache = EmbeddingCache(path)
for call in range(n_calls):
    texts = [f"{name} {call} {i}" for i in range(20)]
    cache.store("model", texts, np.full((20, 16), call, dtype=np.float32))
    cache.store("model", ["shared"], np.full((1, 16), call, dtype=np.float32))
    print(call, flush=True)
"""


def test_processes_write_at_once(path: Path) -> None:
    writers = [start_python(WRITER, path, name, 40) for name in "abcd"]
    for output in finish_all(writers):
        assert output.split() == [str(call) for call in range(40)]
    assert integrity(path) == "ok"
    cache = EmbeddingCache(path)
    assert len(cache) == 4 * 40 * 20 + 1
    for name in "abcd":
        mask, out = find(cache, [f"{name} {call} 7" for call in range(40)])
        assert all(mask)
        assert np.array_equal(out[:, 0], np.arange(40))


@pytest.mark.parametrize("max_bytes", [None, 400_000])
def test_two_caches_on_one_file_see_each_other(path: Path, max_bytes: int | None) -> None:
    one, two = EmbeddingCache(path, max_bytes=max_bytes), EmbeddingCache(path)
    one.store("model", ["a"], make_vectors(1))
    assert find(two, ["a"])[0] == [True]
    two.store("model", ["b"], make_vectors(1))
    assert find(one, ["a", "b"])[0] == [True, True]
    one.clear()
    assert find(two, ["a", "b"])[0] == [False, False]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_writer_loses_no_committed_row(path: Path) -> None:
    writer = start_python(WRITER, path, "a", 1_000_000)
    assert writer.stdout is not None
    committed = -1
    for line in writer.stdout:
        committed = int(line)
        if committed >= 60:
            break
    writer.send_signal(signal.SIGKILL)
    committed = max([committed, *map(int, writer.stdout.read().split("\n")[:-1])])
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert path.with_name("cache.sqlite-wal").stat().st_size > 0, "killed with an open log"
    cache = EmbeddingCache(path)
    texts = [f"a {call} {i}" for call in range(committed + 1) for i in range(20)]
    mask, out = find(cache, texts)
    assert all(mask)
    assert np.array_equal(out[:, 0], np.repeat(np.arange(committed + 1), 20))
    # The call that was killed is there as a whole or not at all.
    assert len(set(find(cache, [f"a {committed + 1} {i}" for i in range(20)])[0])) == 1
    cache.store("model", ["after"], make_vectors(1))
    cache.close()
    assert integrity(path) == "ok"


FORK = """
import os, sys, threading
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
cache = EmbeddingCache(sys.argv[1], max_bytes=10_000_000)
memory = resolve_cache("memory")
out = np.zeros((1, 16), dtype=np.float32)
one = np.ones((1, 16), dtype=np.float32)
for each in (cache, memory):
    each.store("model", ["before"], one)
    each.lookup("model", ["before"], out)
stop = threading.Event()
def keep_busy():
    n = 0
    while not stop.is_set():
        n += 1
        cache.store("model", [f"busy {n % 50}"], one)
        memory.store("model", [f"busy {n % 50}"], one)
thread = threading.Thread(target=keep_busy)
thread.start()
children = []
for child in range(8):
    pid = os.fork()
    if pid == 0:
        assert cache._store._connection is None
        for each in (cache, memory):
            assert each.lookup("model", ["before"], out).all()
            each.store("model", [f"child {child}"], one)
        sys.exit(0)  # through the interpreter's clean-up, which must not close the parent's file
    children.append(pid)
codes = [os.waitpid(pid, 0)[1] for pid in children]
stop.set()
thread.join()
assert codes == [0] * 8, codes
found = [cache.lookup("model", [f"child {child}"], out).all() for child in range(8)]
assert all(found), found
assert not memory.lookup("model", ["child 0"], out).any()
cache.close()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_open_their_own_connection(path: Path) -> None:
    code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + FORK
    assert finish(start_python(code, path)) == "fine"
    assert integrity(path) == "ok"


def test_nothing_is_left_open_at_exit(path: Path) -> None:
    code = (
        "import sys; from skembed.cache import EmbeddingCache\n"
        "cache = EmbeddingCache(sys.argv[1]); print(len(cache))"
    )
    process = start_python(code, path)
    output, errors = process.communicate(timeout=60)
    assert (output.strip(), errors) == ("0", "")
    assert [file.name for file in path.parent.iterdir()] == [path.name], "the log is gone"


def test_connection_closes_with_its_last_reference(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    assert path.with_name("cache.sqlite-wal").exists()
    del cache
    assert not path.with_name("cache.sqlite-wal").exists()


# Files that cannot serve


def assert_refused(path: Path, message: str) -> None:
    """Hold that every use is a CacheError, and that all files stay as they were."""
    before = snapshot(path.parent)
    cache = EmbeddingCache(path)
    uses: list[Callable[[], object]] = [
        lambda: find(cache, ["a"]),
        lambda: cache.store("model", ["a"], make_vectors(1)),
        lambda: len(cache),
        lambda: cache.size_bytes,
        cache.stats,
        cache.clear,
    ]
    for use in uses:
        with pytest.raises(CacheError, match=message) as caught:
            use()
        assert str(path) in str(caught.value)
        assert str(caught.value).startswith("The `path` parameter of `EmbeddingCache` must be ")
    cache.close()
    assert snapshot(path.parent) == before


@pytest.mark.parametrize(
    "content", [b"x", b"text,label\n" * 1000, b"\0" * 4096, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_file_of_another_kind_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert_refused(path, "not an SQLite file|SQLite file of another program")


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_foreign_database_is_refused(path: Path, journal_mode: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {journal_mode}")
    connection.execute("CREATE TABLE entries (key BLOB)")
    connection.execute("INSERT INTO entries VALUES (x'00')")
    connection.commit()
    # Left open: in WAL mode the rows are still in the log, which must not be touched either.
    assert_refused(path, "another program.*choose another path")
    connection.close()


def test_empty_database_of_another_program_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("VACUUM")
    connection.close()
    assert path.stat().st_size > 0
    assert_refused(path, "another program")


def test_our_mark_with_other_tables_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id = {_cache_file._APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {_cache_layout.SCHEMA_VERSION}")
    connection.execute("CREATE TABLE other (key BLOB)")
    connection.close()
    assert_refused(path, "other tables")


@pytest.mark.parametrize(
    ("version", "message"), [(1, "layout 1.*Delete it"), (3, "layout 3.*Upgrade skembed")]
)
def test_other_layout_is_refused(path: Path, version: int, message: str) -> None:
    EmbeddingCache(path).store("model", ["a"], make_vectors(1))
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    assert_refused(path, f"{message}.*or choose another path")


@pytest.mark.parametrize("keep", [50, 100, 4096, 5000, 40_000])
def test_truncated_file_is_refused(path: Path, keep: int) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", [str(i) for i in range(200)], make_vectors(200, 384))
    cache.close()
    os.truncate(path, keep)
    assert_refused(path, "damaged file|SQLite file of another program")


def test_damaged_pages_are_an_error(path: Path) -> None:
    cache = EmbeddingCache(path)
    texts = [str(i) for i in range(200)]
    cache.store("model", texts, make_vectors(200, 384))
    cache.close()
    content = bytearray(path.read_bytes())
    content[4096 : len(content)] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(CacheError, match="damaged file.*-wal and -shm"):
        find(cache, texts, dim=384)
    with pytest.raises(CacheError, match="damaged file"):
        cache.store("model", ["new"], make_vectors(1, 384))
    cache.close()
    assert path.read_bytes() == content
    path.unlink()
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True], "the advice of the message works"


def test_empty_file_is_taken(path: Path) -> None:
    path.touch()
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True]


def test_file_caught_in_a_checkpoint_opens(path: Path) -> None:
    # The moment between the header and the other pages: shorter than the header says, and
    # everything still in the log.
    cache = EmbeddingCache(path)
    cache.store("model", [str(i) for i in range(200)], make_vectors(200, 384))
    log = path.with_name("cache.sqlite-wal").read_bytes()
    cache.close()
    header = path.read_bytes()[:4096]
    path.write_bytes(header)
    path.with_name("cache.sqlite-wal").write_bytes(log)
    other = EmbeddingCache(path)
    assert all(find(other, [str(i) for i in range(200)], dim=384)[0])
    other.close()
    assert integrity(path) == "ok"


def test_log_of_a_deleted_file_is_not_replayed(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["old"], make_vectors(1))
    log = path.with_name("cache.sqlite-wal").read_bytes()
    cache.close()
    path.unlink()
    path.with_name("cache.sqlite-wal").write_bytes(log)
    cache.store("model", ["new"], make_vectors(1))
    assert find(cache, ["old", "new"])[0] == [False, True]
    cache.close()
    assert integrity(path) == "ok"


def test_deleted_file_is_made_anew(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    for name in ("cache.sqlite", "cache.sqlite-wal", "cache.sqlite-shm"):
        path.with_name(name).unlink()
    assert find(cache, ["a"])[0] == [False]
    cache.store("model", ["b"], make_vectors(1))
    assert path.exists()
    assert find(EmbeddingCache(path), ["b"])[0] == [True]


def test_replaced_file_is_opened_anew(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    other = EmbeddingCache(path.with_name("other.sqlite"))
    other.store("model", ["b"], make_vectors(1))
    other.close()
    for suffix in ("-wal", "-shm"):
        path.with_name(f"cache.sqlite{suffix}").unlink()
    path.with_name("other.sqlite").replace(path)
    assert find(cache, ["a", "b"])[0] == [False, True]


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="a folder. Name a file in it"):
        len(EmbeddingCache(tmp_path))


def test_missing_folder_is_refused_and_works_once_made(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "none" / "cache.sqlite")
    with pytest.raises(CacheError, match="its folder does not exist. Create it: mkdir -p"):
        cache.store("model", ["a"], make_vectors(1))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "none").mkdir()
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True]


def test_path_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CacheError, match="Not a directory.*Choose another path"):
        len(EmbeddingCache(tmp_path / "file" / "cache.sqlite"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_refused_without_waiting(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(CacheError, match="not a regular file"):
        len(EmbeddingCache(path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(CacheError, match="cannot be opened|read-only"):
        len(EmbeddingCache(folder / "cache.sqlite"))


def test_read_only_file(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    file_connection(cache).execute("PRAGMA query_only = ON")
    with pytest.raises(CacheError, match="read-only. Allow writing"):
        cache.store("model", ["b"], make_vectors(1))
    assert find(cache, ["a", "b"])[0] == [True, False]


def test_no_room_on_the_disk(path: Path) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    (n_pages,) = file_connection(cache).execute("PRAGMA page_count").fetchone()
    file_connection(cache).execute(f"PRAGMA max_page_count = {n_pages + 5}")
    texts = [str(i) for i in range(100)]
    with pytest.raises(CacheError, match="no room left on the disk.*Free some space"):
        cache.store("model", texts, make_vectors(100, 384))
    assert find(cache, ["a"])[0] == [True]
    assert find(cache, texts, dim=384)[0] == [False] * 100, "all of a call, or nothing"
    cache.store("model", texts, make_vectors(100, 384))
    assert all(find(cache, texts, dim=384)[0]), "the caller can go on afterwards"
    cache.close()
    assert integrity(path) == "ok"


def test_writer_waits_for_a_lock(path: Path) -> None:
    cache = EmbeddingCache(path)
    len(cache)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, other.execute, ["COMMIT"])
    timer.start()
    cache.store("model", ["a"], make_vectors(1))
    timer.join()
    other.close()
    assert find(cache, ["a"])[0] == [True]


def test_lock_that_sqlite_does_not_wait_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _cache_file._open
    failures = [sqlite3.OperationalError("database is locked")] * 2

    def open_when_free(path: Path, dtype: str | None) -> tuple[sqlite3.Connection, Any]:
        if failures:
            raise failures.pop()
        return opened(path, dtype)

    monkeypatch.setattr(_cache_file, "_open", open_when_free)
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True]


def test_lock_held_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache_file, "_LOCK_TIMEOUT_S", 0.1)
    cache = EmbeddingCache(path)
    len(cache)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CacheError, match="another process has kept locked.*Try again"):
        cache.store("model", ["a"], make_vectors(1))
    other.execute("ROLLBACK")
    other.close()
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True]


def test_interrupt_rolls_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    insert = _cache_file.insert_rows

    def interrupted(*args: Any) -> None:
        insert(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_cache_file, "insert_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.store("model", ["b"], make_vectors(1))
    assert find(cache, ["a", "b"])[0] == [True, False]
    cache.store("model", ["b"], make_vectors(1))
    assert find(cache, ["a", "b"])[0] == [True, True]


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


@pytest.mark.parametrize("value", [3, True, b"bytes", ["memory"], EmbeddingCache])
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
