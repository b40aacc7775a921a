"""The cache's file: processes, kills, locks, foreign and damaged files."""

import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_files import (
    file_connection,
    find,
    finish,
    finish_all,
    integrity,
    make_vectors,
    snapshot,
    start_python,
)

from skembed.cache import file_store as _cache_file
from skembed.cache import sqlite_layout as _cache_layout
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError

# Threads and processes


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
    ("version", "message"),
    [(1, "layout 1.*Delete it"), (2, "layout 2.*Delete it"), (4, "layout 4.*Upgrade skembed")],
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
    assert len(cache) == 0
    empty = path.read_bytes()
    cache.store("model", [str(i) for i in range(200)], make_vectors(200, 384))
    log = path.with_name("cache.sqlite-wal").read_bytes()
    cache.close()
    path.write_bytes(path.read_bytes()[:4096] + empty[4096:])
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
