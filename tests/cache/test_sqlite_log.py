"""The cache's file replaced while a log of another one lies beside it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_files import file_connection, find, finish, integrity, make_vectors, start_python

from skembed.cache import sqlite_log
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError

needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
N_ROWS = 3000

# Stores rows, says so, and looks one up for each line that it is sent.
USER = """
import sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
path, name, n_rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache = EmbeddingCache(path)
for start in range(0, n_rows, 500):
    texts = [f"{name} {i}" for i in range(start, start + 500)]
    cache.store("model", texts, np.repeat(np.arange(start, start + 500.0)[:, None], 16, axis=1))
len(cache)
print("ready", flush=True)
for line in sys.stdin:
    if not line.strip():
        break
    out = np.zeros((1, 16), dtype=np.float32)
    found = cache.lookup("model", [line.strip()], out)[0]
    cache.store("model", [f"seen {line.strip()}"], np.ones((1, 16)))
    print(found, int(out[0, 0]), flush=True)
"""


def start_user(path: Path, name: str, n_rows: int = N_ROWS) -> subprocess.Popen[str]:
    user = start_python(USER, path, name, n_rows)
    assert user.stdout is not None
    assert user.stdout.readline() == "ready\n"
    return user


def ask(user: subprocess.Popen[str], text: str) -> str:
    assert user.stdin is not None
    assert user.stdout is not None
    user.stdin.write(f"{text}\n")
    user.stdin.flush()
    return user.stdout.readline().strip()


def leave_log(path: Path, name: str = "old") -> None:
    """Let a process be killed that has stored rows."""
    user = start_user(path, name)
    user.kill()
    user.communicate()
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


def make_file(path: Path, name: str, n_rows: int = N_ROWS) -> Path:
    finish(start_python(USER, path, name, n_rows))
    return path


def check_whole(path: Path, name: str, *, others: str | None = None) -> None:
    """Hold that a file has its rows, none of another one, and that it is sound."""
    cache = EmbeddingCache(path)
    mask, out = find(cache, [f"{name} {i}" for i in range(N_ROWS)])
    assert sum(mask) == N_ROWS
    assert np.array_equal(out[:, 0], np.arange(N_ROWS))
    if others:
        assert not any(find(cache, [f"{others} {i}" for i in range(N_ROWS)])[0])
    cache.store("model", ["one more"], make_vectors(1))
    cache.close()
    assert integrity(path) == "ok"


def move(new: Path, path: Path) -> None:
    new.replace(path)


def copy_over(new: Path, path: Path) -> None:
    shutil.copyfile(new, path)


def delete_and_copy(new: Path, path: Path) -> None:
    path.unlink()  # the new file may well get the same inode
    shutil.copyfile(new, path)


every_way = pytest.mark.parametrize("replace", [move, copy_over, delete_and_copy])


@needs_kill
@every_way
def test_log_of_a_killed_process_stays_out_of_a_new_file(
    path: Path, replace: Callable[[Path, Path], None]
) -> None:
    leave_log(path)
    replace(make_file(path.with_name("new.sqlite"), "new"), path)
    check_whole(path, "new", others="old")


@needs_kill
@every_way
def test_log_of_a_killed_process_stays_out_of_a_backup(
    path: Path, replace: Callable[[Path, Path], None]
) -> None:
    """A backup has the origin of the file, and an older content."""
    make_file(path, "first")
    shutil.copyfile(path, path.with_name("backup.sqlite"))
    make_file(path, "between")
    leave_log(path, "second")
    replace(path.with_name("backup.sqlite"), path)
    check_whole(path, "first", others="second")


@needs_kill
def test_log_of_a_killed_process_is_replayed_into_its_own_file(path: Path) -> None:
    make_file(path, "first")
    for name in ("second", "third"):
        leave_log(path, name)
    leave_log(path, "fourth")
    for name in ("first", "second", "third", "fourth"):
        check_whole(path, name)


@needs_kill
def test_log_over_an_equal_copy_is_replayed(path: Path) -> None:
    """The copy was made when the log began: nothing is wrong with it."""
    make_file(path, "first")
    shutil.copyfile(path, path.with_name("backup.sqlite"))
    user = start_user(path, "none", 0)
    assert ask(user, "first 5") == "True 5"
    user.kill()
    user.communicate()
    path.with_name("backup.sqlite").replace(path)
    check_whole(path, "first")
    assert find(EmbeddingCache(path), ["seen first 5"])[0] == [True]


def test_file_is_replaced_under_processes_that_use_it(path: Path) -> None:
    users = [start_user(path, name) for name in ("old", "older")]
    for user in users:
        assert ask(user, "old 7") == "True 7"
    make_file(path.with_name("new.sqlite"), "new").replace(path)
    check_whole(path, "new", others="old")
    for user in users:
        assert ask(user, "old 8") == "False 0"
        assert ask(user, "new 9") == "True 9"
    for user in users:
        user.communicate("\n", timeout=60)
    check_whole(path, "new", others="older")
    assert all(find(EmbeddingCache(path), ["seen old 8", "seen new 9"])[0])


def test_processes_replace_a_log_at_once(path: Path) -> None:
    leave_log(path)
    make_file(path.with_name("new.sqlite"), "new").replace(path)
    users = [start_python(USER, path, f"user{i}", 500) for i in range(4)]
    for user in users:
        _, errors = user.communicate("\n", timeout=120)
        assert user.returncode == 0, errors
    check_whole(path, "new", others="old")
    for i in range(4):
        assert all(find(EmbeddingCache(path), [f"user{i} {k}" for k in range(500)])[0])


@pytest.fixture
def used(path: Path) -> Iterator[EmbeddingCache]:
    """Yield a cache with rows in its file and in its log."""
    cache = EmbeddingCache(path)
    cache.store("model", [f"old {i}" for i in range(200)], make_vectors(200))
    cache.close()
    cache.store("model", ["in the log"], make_vectors(1))
    yield cache
    cache.close()


def test_marks_stay_where_they_are(path: Path, used: EmbeddingCache) -> None:
    """On one page, after everything that rewrites the file."""
    used.clear()
    used.store("model", [str(i) for i in range(2000)], make_vectors(2000, 384))
    used.clear()  # with VACUUM
    small = EmbeddingCache(path, max_bytes=200_000)
    for seed in range(3):
        small.store("model", [f"{seed} {i}" for i in range(200)], make_vectors(200, 384))
    connection = file_connection(small)
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'mark'"
    assert connection.execute(query).fetchone() == (sqlite_log.MARK_PAGE,)
    marks = set(connection.execute("SELECT previous, current FROM mark").fetchone())
    read, is_still = sqlite_log._read_marks(path.with_name("cache.sqlite-wal"))
    assert is_still
    assert read is not None
    assert marks <= read
    small.close()
    used.close()
    page = path.read_bytes()[2 * 4096 : 3 * 4096]
    assert marks & sqlite_log._parse_marks(page)


def test_every_transaction_changes_the_mark(path: Path, used: EmbeddingCache) -> None:
    def read() -> bytes:
        (mark,) = file_connection(used).execute("SELECT current FROM mark").fetchone()
        return bytes(mark)

    seen = {read()}
    used.store("model", ["another"], make_vectors(1))
    seen.add(read())
    used.clear()
    seen.add(read())
    limited = EmbeddingCache(path, max_bytes=10_000_000)
    limited.store("model", ["a"], make_vectors(1))
    seen.add(read())
    find(limited, ["a"])
    limited.close()  # records the use
    seen.add(read())
    assert len(seen) == 5


def test_a_journal_is_never_rolled_back(path: Path, used: EmbeddingCache) -> None:
    used.close()
    before = path.read_bytes()
    path.with_name("other.sqlite").touch()
    other = sqlite3.connect(path.with_name("other.sqlite"), isolation_level=None)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO t VALUES (1)")
    journal = path.with_name("other.sqlite-journal").read_bytes()
    other.close()
    path.with_name("cache.sqlite-journal").write_bytes(journal)
    with pytest.raises(CacheError, match="A journal of another file lies beside it"):
        len(used)
    assert path.read_bytes() == before
    path.with_name("cache.sqlite-journal").unlink()
    assert len(used) == 201


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", ".lock"])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_file_beside_it_is_refused(path: Path, suffix: str, kind: str) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(b"mine")
    beside = path.with_name(f"cache.sqlite{suffix}")
    if suffix != ".lock":  # which is needed only to make the file
        make_file(path, "old")
    if kind == "link":
        beside.symlink_to(victim)
    elif kind == "folder":
        beside.mkdir()
    else:
        os.mkfifo(beside)
    cache = EmbeddingCache(path)
    with pytest.raises(CacheError, match="The `path` parameter of `EmbeddingCache` must be"):
        cache.store("model", ["a"], make_vectors(1))
    assert victim.read_bytes() == b"mine"
    assert os.path.lexists(beside)


def test_foreign_lock_file_is_left_alone(path: Path) -> None:
    path.with_name("cache.sqlite.lock").write_bytes(b"mine")
    with pytest.raises(CacheError, match="Another file stands where the lock belongs"):
        len(EmbeddingCache(path))
    assert path.with_name("cache.sqlite.lock").read_bytes() == b"mine"


def test_log_without_a_transaction_is_nothing(path: Path) -> None:
    log = path.with_name("cache.sqlite-wal")
    for content in (b"", b"x" * 20, b"x" * 5000):
        log.write_bytes(content)
        assert sqlite_log._read_marks(log) == (None, True)


def test_log_that_changes_all_the_time_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_log, "_PAUSE_S", 0)
    log = path.with_name("cache.sqlite-wal")
    marks: Iterator[bytes] = (bytes([i]) for i in range(256))
    monkeypatch.setattr(sqlite_log, "_read_marks", lambda _: ({b"other"}, True))
    assert not sqlite_log._is_foreign(log, lambda: next(marks))
    assert sqlite_log._is_foreign(log, lambda: b"mine")
    monkeypatch.setattr(sqlite_log, "_read_marks", lambda _: ({b"other"}, False))
    assert not sqlite_log._is_foreign(log, lambda: b"mine")
