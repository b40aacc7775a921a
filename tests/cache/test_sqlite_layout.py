"""EmbeddingCache's file: float16, blocks, writers that are killed."""

import copy
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cache_files import (
    DIM,
    Holder,
    file_connection,
    find,
    finish,
    integrity,
    make_vectors,
    snapshot,
    start_python,
)
from sklearn.base import clone

from skembed import NVEmbedVectorizer
from skembed.cache import embedding_cache as cache_module
from skembed.cache import stores as _cache_memory
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
from skembed.cache.sqlite_layout import estimate_row_bytes
from skembed.cache.stores import DTYPES, find_storable
from skembed.exceptions import CacheError

Vectors = npt.NDArray[np.float32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture(params=["memory", "file"])
def half(request: pytest.FixtureRequest, path: Path) -> EmbeddingCache:
    """An empty float16 cache of either kind."""
    return EmbeddingCache(path if request.param == "file" else None, dtype="float16")


# float16


def test_float16_gives_float32_rounded_once(half: EmbeddingCache) -> None:
    vectors = make_vectors(200, 384) * np.geomspace(1e-9, 1e4, 200, dtype=np.float32)[:, None]
    texts = [str(i) for i in range(200)]
    half.store("model", texts, vectors)
    mask, out = find(half, texts, dim=384)
    assert all(mask)
    assert out.dtype == np.float32
    assert np.array_equal(out, vectors.astype(np.float16).astype(np.float32))
    # What the documentation promises.
    error = np.abs(out.astype(np.float64) - vectors)
    assert (error <= np.maximum(np.abs(vectors) * 2.0**-11, 2.0**-25)).all()
    again = np.zeros_like(out)
    half.store("model", texts, out)
    half.lookup("model", texts, again)
    assert np.array_equal(again, out), "what is rounded already stays as it is"


def test_float16_leaves_out_what_would_be_infinite(half: EmbeddingCache) -> None:
    vectors = make_vectors(6)
    largest = np.nextafter(np.float32(65520), np.float32(0))
    vectors[0, 3], vectors[1, 0], vectors[2, 5] = 65504, largest, -largest
    vectors[3, 1], vectors[4, 2], vectors[5, 0] = 65520, -1e30, np.nan
    texts = list("abcdef")
    half.store("model", texts, vectors)
    mask, out = find(half, texts)
    assert mask == [True, True, True, False, False, False]
    assert (out[0, 3], out[1, 0], out[2, 5]) == (65504, 65504, -65504)
    assert len(half) == 3
    half.store("model", texts[3:5], vectors[3:5])
    assert len(half) == 3


def test_row_too_large_for_float16_keeps_the_one_before(half: EmbeddingCache) -> None:
    half.store("model", ["a"], np.ones((1, DIM)))
    half.store("model", ["a"], np.full((1, DIM), 1e6))
    mask, out = find(half, ["a"])
    assert mask == [True]
    assert (out == 1).all()


def test_storable_is_what_rounds_to_something_finite() -> None:
    values = np.array([0, -0.0, 1e-45, 65504, 65519.996, 65520, 1e38, np.inf, -np.inf, np.nan])
    rows = values.astype(np.float32)[:, None]
    for dtype in DTYPES.values():
        with np.errstate(over="ignore"):
            expected = np.isfinite(rows.astype(dtype))[:, 0]
        assert find_storable(rows, dtype).tolist() == expected.tolist()


def test_float16_takes_half_the_space(tmp_path: Path) -> None:
    texts = [str(i) for i in range(3000)]
    sizes = {}
    for dtype in ("float32", "float16"):
        with_file = EmbeddingCache(tmp_path / dtype, dtype=dtype)
        in_memory = EmbeddingCache(dtype=dtype)
        for cache in (with_file, in_memory):
            cache.store("model", texts, make_vectors(3000, 384))
        sizes[dtype] = with_file.size_bytes / 3000
        payload = 384 * DTYPES[dtype].itemsize
        assert in_memory.size_bytes == 3000 * (payload + _cache_memory.ROW_OVERHEAD_BYTES)
    assert sizes["float32"] < 1650
    assert sizes["float16"] < 0.54 * sizes["float32"]


def test_float16_keeps_to_its_limit(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=400_000, dtype="float16")
    for block in range(10):
        texts = [f"{block} {i}" for i in range(150)]
        cache.store("model", texts, make_vectors(150, 384, seed=block))
        assert all(find(cache, texts, dim=384)[0])
        assert cache.size_bytes <= 400_000
    assert len(cache) > 200


def test_file_keeps_its_type(path: Path) -> None:
    EmbeddingCache(path, dtype="float16").store("model", ["a"], np.full((1, DIM), 0.1))
    follows = EmbeddingCache(path)
    assert follows.dtype is None
    assert follows.stats()["dtype"] == "float16"
    follows.store("model", ["b"], np.full((1, DIM), 0.1))
    mask, out = find(follows, ["a", "b"])
    assert mask == [True, True]
    assert (out == np.float32(np.float16(0.1))).all()
    follows.clear()
    follows.close()
    assert EmbeddingCache(path).stats()["dtype"] == "float16"
    assert find(EmbeddingCache(path, dtype="float16"), ["a"])[0] == [False]


@pytest.mark.parametrize(("kept", "asked"), [("float16", "float32"), ("float32", "float16")])
def test_another_type_is_refused(path: Path, kept: str, asked: str) -> None:
    cache = EmbeddingCache(path, dtype=kept)
    cache.store("model", ["a"], make_vectors(1))
    cache.close()
    before = snapshot(path.parent)
    other = EmbeddingCache(path, dtype=asked)
    uses: list[Callable[[], object]] = [
        lambda: find(other, ["a"]),
        lambda: other.store("model", ["a"], make_vectors(1)),
        lambda: len(other),
        other.stats,
        other.clear,
    ]
    for use in uses:
        with pytest.raises(
            CacheError, match=f"cache of {kept} vectors, not of {asked}.*Leave `dtype` out"
        ):
            use()
    assert snapshot(path.parent) == before
    assert find(cache, ["a"])[0] == [True]


def test_default_type(path: Path) -> None:
    assert EmbeddingCache().stats()["dtype"] == "float32"
    assert EmbeddingCache(path).stats()["dtype"] == "float32"


@pytest.mark.parametrize(
    ("value", "error"),
    [("float64", ValueError), ("Float16", ValueError), (np.float64, ValueError), (16, TypeError)],
)
def test_other_types_do_not_exist(value: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="`dtype` parameter of `EmbeddingCache` must be one of"):
        EmbeddingCache(dtype=value)


def test_type_is_shown_and_copied(path: Path) -> None:
    assert repr(EmbeddingCache(max_bytes=5, dtype="float16")) == (
        "EmbeddingCache(max_bytes=5, dtype='float16')"
    )
    cache = EmbeddingCache(path, dtype="float16")
    assert repr(cache) == f"EmbeddingCache({str(path)!r}, max_bytes=None, dtype='float16')"
    assert not path.exists()
    assert copy.deepcopy(cache) is cache
    assert clone(Holder(cache)).cache is cache


def test_type_is_in_the_pickle(path: Path) -> None:
    memory = pickle.loads(pickle.dumps(EmbeddingCache(dtype="float16")))
    assert (memory.dtype, memory.stats()["dtype"]) == ("float16", "float16")
    data = pickle.dumps(EmbeddingCache(path, dtype="float16"))
    one, two = pickle.loads(data), pickle.loads(data)
    assert one is two
    assert one.dtype == "float16"
    assert resolve_cache(path) is not one, "a plain path follows the file"


def test_vectorizer_uses_files_of_either_type(path: Path, golden_dir: Path) -> None:
    texts = ["a cat", "a dog", "some tax"]
    make = partial(NVEmbedVectorizer, golden_dir, device="cpu", dtype="float32")
    expected = make(cache=None).transform(texts)
    files = EmbeddingCache(path, dtype="float16")
    assert np.array_equal(make(cache=files).transform(texts), expected), "as the model gave them"
    files.close()
    found = make(cache=path).transform(texts)
    assert resolve_cache(path) is not None
    assert len(files) == 3
    assert 0 < np.abs(found - expected).max() < 2.0**-10 * np.abs(expected).max()


# Blocks


@pytest.mark.parametrize("dim", [1, 16, 100, 384, 768, 1024, 1536, 4096])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_every_width(path: Path, dim: int, dtype: str) -> None:
    cache = EmbeddingCache(path, dtype=dtype)
    texts = [str(i) for i in range(107)]
    vectors = make_vectors(107, dim)
    for start, stop in ((0, 1), (1, 60), (60, 107)):  # blocks that are not full
        cache.store("model", texts[start:stop], vectors[start:stop])
    order = np.random.default_rng(0).permutation(107)
    order = np.concatenate([order, order[:20]])
    mask, out = find(cache, [*(texts[i] for i in order), "unknown"], dim=dim)
    assert mask == [True] * 127 + [False]
    assert np.array_equal(out[:127], vectors.astype(dtype).astype(np.float32)[order])


def test_widths_side_by_side(path: Path) -> None:
    cache = EmbeddingCache(path)
    wide, narrow = make_vectors(40, 24), make_vectors(40)
    cache.store("model", [f"wide {i}" for i in range(40)], wide)
    cache.store("model", [f"narrow {i}" for i in range(40)], narrow)
    texts = [f"{kind} {i}" for i in range(40) for kind in ("narrow", "wide")]
    mask, out = find(cache, texts)
    assert mask == [True, False] * 40
    assert np.array_equal(out[::2], narrow)


@pytest.mark.parametrize(("dim", "spare"), [(384, 1.35), (768, 1.1), (1024, 1.1), (4096, 1.05)])
def test_pages_are_well_filled(dim: int, spare: float) -> None:
    assert estimate_row_bytes(dim * 4) < spare * dim * 4 + 100


def test_rows_stored_again_take_no_more_space(path: Path) -> None:
    cache = EmbeddingCache(path)
    texts = [str(i) for i in range(300)]
    sizes = []
    for seed in range(6):
        cache.store("model", texts, make_vectors(300, 384, seed=seed))
        cache.store("model", ["one"], make_vectors(1, 384, seed=seed))
        sizes.append(cache.size_bytes)
    assert max(sizes[1:]) < 1.1 * sizes[0]
    mask, out = find(cache, texts, dim=384)
    assert all(mask)
    assert np.array_equal(out, make_vectors(300, 384, seed=5))
    assert len(cache) == 301


def test_replacing_a_part_of_a_block_keeps_the_rest(path: Path) -> None:
    cache = EmbeddingCache(path)
    texts = [str(i) for i in range(90)]
    first, second = make_vectors(90, 384), make_vectors(90, 384, seed=1)
    cache.store("model", texts, first)
    cache.store("model", texts[::3], second[::3])
    expected = first.copy()
    expected[::3] = second[::3]
    assert np.array_equal(find(cache, texts, dim=384)[1], expected)
    cache.store("model", texts[1::3] + texts[2::3], np.vstack([second[1::3], second[2::3]]))
    assert np.array_equal(find(cache, texts, dim=384)[1], second)
    (n_blocks,) = file_connection(cache).execute("SELECT count(*) FROM blocks").fetchone()
    (n_uses,) = file_connection(cache).execute("SELECT count(*) FROM uses").fetchone()
    assert n_blocks == n_uses == 30, "blocks without a row are gone"


def test_eviction_leaves_rows_that_have_moved_to_younger_blocks(path: Path) -> None:
    cache = EmbeddingCache(path, max_bytes=800_000)
    texts = [str(i) for i in range(300)]
    cache.store("model", texts, make_vectors(300, 384))
    moved = texts[:100:3]
    cache.store("model", moved, make_vectors(len(moved), 384, seed=1))
    cache.store("model", [f"new {i}" for i in range(250)], make_vectors(250, 384))
    assert all(find(cache, moved, dim=384)[0])
    assert not all(find(cache, texts[:100], dim=384)[0])
    connection = file_connection(cache)
    pointed = {slot // 16 for (slot,) in connection.execute("SELECT slot FROM entries")}
    assert pointed == {block for (block,) in connection.execute("SELECT id FROM blocks")}
    assert pointed == {block for (block,) in connection.execute("SELECT block FROM uses")}


def test_digests_that_begin_alike_are_told_apart(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_keys(namespace: str, texts: list[str], *, owner: str) -> list[bytes]:
        return [b"the same" + text.encode().ljust(8) for text in texts]

    monkeypatch.setattr(cache_module, "_make_keys", make_keys)
    cache = EmbeddingCache(path)
    vectors = make_vectors(3)
    cache.store("model", ["a"], vectors[:1])
    assert find(cache, ["a", "b"])[0] == [True, False]
    cache.store("model", ["b", "c"], vectors[1:])
    mask, out = find(cache, ["a", "b", "c"])
    assert mask == [False, False, True], "the last one stays, the others are misses"
    assert np.array_equal(out[2], vectors[2])
    assert len(cache) == 1


CUT = """
import os, sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError
cache = EmbeddingCache(sys.argv[1])
texts = [str(i) for i in range(2000)]
out = np.zeros((2000, 384), dtype=np.float32)
cache.store("model", texts, np.ones((2000, 384)))
cache.close()  # the log is in the file
assert cache.lookup("model", texts, out).all()
os.truncate(sys.argv[1], 40_000)
try:
    cache.lookup("model", texts, out)
except CacheError as error:
    print("damaged file" in str(error))
"""


def test_file_cut_off_while_open_is_an_error(path: Path) -> None:
    assert finish(start_python(CUT, path)) == "True"


# Writers that are killed

KILLED = """
import sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
path, name = sys.argv[1], int(sys.argv[2])
cache = EmbeddingCache(path)
print("ready", flush=True)
sys.stdin.readline()
for call in range(1_000_000):
    texts = [f"{name} {call} {i}" for i in range(40)]
    rows = np.random.default_rng([name, call]).standard_normal((40, 384), dtype=np.float32)
    cache.store("model", texts, rows)
    cache.store("model", ["shared"], np.full((1, 384), name, dtype=np.float32))
    print(call, flush=True)
"""
N_KILLS = 5


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_writers_killed_beside_another(path: Path, dtype: str) -> None:
    EmbeddingCache(path, dtype=dtype).stats()
    writers = [start_python(KILLED, path, name) for name in range(N_KILLS + 1)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    rng = random.Random(0)
    survivor, victims = writers[-1], writers[:-1]
    _go(survivor)
    committed = []
    for victim in victims:
        _go(victim)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "0\n"
        time.sleep(rng.uniform(0.02, 0.25))  # in the middle of a call, or between two
        victim.send_signal(signal.SIGKILL)
        committed.append(1 + len(victim.communicate()[0].split()))
        # What was committed is there at once, for whoever opens the file next.
        _check_committed(path, len(committed) - 1, committed[-1], dtype)
    assert survivor.poll() is None, "the other writer goes on"
    n_before = _count_calls(path, N_KILLS)
    deadline = time.monotonic() + 60
    while _count_calls(path, N_KILLS) == n_before:
        assert time.monotonic() < deadline, "the other writer hangs"
    survivor.send_signal(signal.SIGKILL)
    committed.append(len(survivor.communicate()[0].split()))
    for name, n_calls in enumerate(committed):
        _check_committed(path, name, n_calls, dtype)
    mask, out = find(EmbeddingCache(path), ["shared"], dim=384)
    assert mask == [True]
    assert len(set(out[0].tolist())) == 1
    assert integrity(path) == "ok"


def _go(process: "subprocess.Popen[str]") -> None:
    """Let a waiting writer begin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _count_calls(path: Path, name: int) -> int:
    """Return how many calls of a writer are in the file."""
    mask, _ = find(EmbeddingCache(path), [f"{name} {call} 0" for call in range(5000)], dim=384)
    return sum(mask)


def _check_committed(path: Path, name: int, n_calls: int, dtype: str) -> None:
    """Hold that each row of `n_calls` calls is there bit for bit, and the next whole or not."""
    cache = EmbeddingCache(path)
    for call in range(n_calls + 1):
        mask, out = find(cache, [f"{name} {call} {i}" for i in range(40)], dim=384)
        rows = np.random.default_rng([name, call]).standard_normal((40, 384), dtype=np.float32)
        if call < n_calls:
            assert all(mask)
        assert len(set(mask)) == 1, "a call is there as a whole or not at all"
        if all(mask):
            assert out.tobytes() == rows.astype(dtype).astype(np.float32).tobytes()
    cache.close()
