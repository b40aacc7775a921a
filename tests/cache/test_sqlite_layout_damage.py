"""The cache's file and what lies beside it as damaged or foreign bytes: never a wrong vector."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_files import file_connection, find, finish, integrity, make_vectors, start_python
from fuzz import assert_ours, mutate

from skembed.cache import sqlite_layout, sqlite_log
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError

TEXTS = [str(i) for i in range(60)]
DIM = 48
VECTORS = make_vectors(len(TEXTS), DIM)
every_type = pytest.mark.parametrize("dtype", ["float32", "float16"])


def fill(path: Path, dtype: str = "float32") -> EmbeddingCache:
    cache = EmbeddingCache(path, dtype=dtype)
    cache.store("model", TEXTS, VECTORS)
    cache.close()
    return cache


def check_found(cache: EmbeddingCache, texts: list[str] = TEXTS) -> list[bool]:
    """Return what was found; hold that each row of it is the right one."""
    mask, out = find(cache, texts, dim=DIM)
    truth = VECTORS[[TEXTS.index(text) for text in texts]]
    rounded = truth.astype(cache.stats()["dtype"]).astype(np.float32)
    assert np.array_equal(out[mask], rounded[mask])
    assert not out[~np.array(mask)].any(), "a row that was not found was touched"
    return mask


# One row


@every_type
@pytest.mark.parametrize("n_texts", [1, len(TEXTS)])
def test_flipped_bit_is_a_miss_and_is_mended(path: Path, dtype: str, n_texts: int) -> None:
    """Wherever the bit lies: in the vector, the digest, or the checksum."""
    rng = np.random.default_rng(0)
    cache = fill(path, dtype)
    connection, n_lost = file_connection(cache), 0
    for column in ["vectors", "heads"] * 20:
        rows = connection.execute(f"SELECT id, {column} FROM blocks").fetchall()
        block, content = rows[rng.integers(len(rows))]
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        connection.execute(f"UPDATE blocks SET {column} = ? WHERE id = ?", (changed, block))
        if n_texts == 1:
            mask = [check_found(cache, [text])[0] for text in TEXTS]
        else:
            mask = check_found(cache)
        n_lost += mask.count(False)
        if not all(mask):  # else that row was replaced before
            text = TEXTS[mask.index(False)]
            cache.store("model", [text], VECTORS[[TEXTS.index(text)]])
            assert all(check_found(cache)), "one row, and no other, was lost"
    assert n_lost > 20
    assert integrity(path) == "ok"


def test_rows_that_change_places_are_misses(path: Path) -> None:
    cache = fill(path)
    connection = file_connection(cache)
    (first, a), (second, b) = connection.execute("SELECT id, vectors FROM blocks LIMIT 2")
    connection.execute("UPDATE blocks SET vectors = ? WHERE id = ?", (b, first))
    connection.execute("UPDATE blocks SET vectors = ? WHERE id = ?", (a, second))
    assert check_found(cache).count(False) == 2 * sqlite_layout.count_block_rows(DIM * 4)
    row = DIM * 4
    connection.execute(
        "UPDATE blocks SET vectors = ? WHERE id = ?", (a[row : 2 * row] + a[:row] + a[2 * row :], 1)
    )
    for text in TEXTS[:2]:
        assert check_found(cache, [text]) == [False]


def test_checksum_covers_type_and_width() -> None:
    digests = np.arange(4).reshape(2, 2)
    rows = make_vectors(2, 8)
    check = sqlite_layout.compute_checks(digests, rows)
    assert len({*check.tolist()}) == 2
    others = [rows.view("<f2"), rows.reshape(-1, 4)[:2], rows[::-1].copy()]
    assert not any(
        (sqlite_layout.compute_checks(digests, other) == check).any() for other in others
    )
    assert (sqlite_layout.compute_checks(digests[::-1].copy(), rows) != check).all()


def test_type_of_a_file_cannot_be_changed(path: Path) -> None:
    cache = fill(path)
    connection = file_connection(cache)
    connection.execute("UPDATE state SET dtype = 'float16'")
    cache.close()
    mask, _ = find(EmbeddingCache(path), TEXTS, dim=2 * DIM)
    assert not any(mask)


# Any value of any table is any other


VALUES: tuple[Any, ...] = (
    *(None, "text", "\0", b"", b"x" * 20, -1, 0, 7, 2**62, -(2**63), 2**63 - 1, 0.5, 1e300),
    float("inf"),
)


def list_columns() -> list[tuple[str, str]]:
    connection = sqlite3.connect(":memory:")
    for statement in sqlite_layout.SCHEMA:
        connection.execute(statement)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
    return [(t, row[1]) for t in tables for row in connection.execute(f"PRAGMA table_info({t})")]


@pytest.mark.parametrize(("table", "column"), list_columns())
def test_any_value_anywhere(path: Path, table: str, column: str) -> None:
    """Columns may hold any type: SQLite does not check them when it reads."""
    whole = fill(path)
    content = path.read_bytes()
    assert all(check_found(whole))
    whole.close()
    for value in VALUES:
        path.write_bytes(content)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA writable_schema = ON")  # without NOT NULL, as damage would be
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(replace(sql, ' NOT NULL', ''), "
            "'INTEGER,', 'BLOB,')"
        )
        connection.commit()
        connection.close()
        connection = sqlite3.connect(path)
        first = connection.execute(f"SELECT min(rowid) FROM {table}").fetchone()[0]
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, first))
        except sqlite3.Error:  # a key that can be no such value
            connection.close()
            continue
        connection.execute("PRAGMA writable_schema = ON")
        for statement in sqlite_layout.SCHEMA:
            name = statement.split()[2]
            connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (statement, name))
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.close()
        use_all(path)


def use_all(path: Path) -> None:
    """Use a file in every way; each ends well or with an error of the cache."""
    cache = EmbeddingCache(path, max_bytes=200_000)
    uses: list[Callable[[], object]] = [
        lambda: check_found(cache),
        lambda: [check_found(cache, [text]) for text in TEXTS[:8]],
        lambda: cache.store("model", TEXTS[:10], VECTORS[:10]),
        lambda: check_found(cache),
        lambda: cache.store("model", [f"more {i}" for i in range(100)], make_vectors(100, 384)),
        lambda: len(cache),
        cache.stats,
        cache.close,
        lambda: check_found(cache),
        cache.clear,
    ]
    for use in uses:
        assert_ours(use)
    cache.close()


# Damage of the file, the log and its index


def check_damage(path: Path, beside: Path, content: bytes, seed: int) -> None:
    """Use a cache of which one file is damaged."""
    beside.write_bytes(mutate(content, seed))
    use_all(path)


FUZZ = """
import sys
sys.path[:0] = ["tests", "tests/cache"]
from pathlib import Path
from test_sqlite_layout_damage import fuzz
fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""
SUFFIXES = ("", "-wal", "-shm")


def fuzz(folder: Path, start: int, stop: int) -> None:
    """Damage the file, its log, or the index of that, as a killed process left them."""
    path = folder / "cache.sqlite"
    cache = EmbeddingCache(path)
    cache.store("model", TEXTS[:40], VECTORS[:40])
    cache.close()
    cache.store("model", TEXTS[40:], VECTORS[40:])
    contents = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in SUFFIXES}
    cache.close()
    for seed in range(start, stop):
        for suffix, content in contents.items():
            Path(f"{path}{suffix}").write_bytes(content)
        suffix = SUFFIXES[seed % 4 % 3]  # the file twice as often
        check_damage(path, Path(f"{path}{suffix}"), contents[suffix], seed)
        for name in SUFFIXES:
            Path(f"{path}{name}").unlink(missing_ok=True)
    print("fine")


def test_damaged_bytes(tmp_path: Path) -> None:
    assert finish(start_python(FUZZ, tmp_path, 0, 50)) == "fine"


@pytest.mark.slow
def test_damaged_bytes_many_times(tmp_path: Path) -> None:
    for start in range(0, 2000, 250):  # each in little time: a hang is an error
        folder = tmp_path / str(start)
        folder.mkdir()
        assert finish(start_python(FUZZ, folder, start, start + 250)) == "fine"


# Modes, names, disks


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o377])
def test_new_files_are_private(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        cache = EmbeddingCache(path)
        cache.store("model", ["a"], make_vectors(1))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    names = ("cache.sqlite", "cache.sqlite-wal", "cache.sqlite-shm")
    assert modes == dict.fromkeys(names, 0o600)
    cache.close()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_existing_files_keep_their_mode(path: Path) -> None:
    path.touch()
    path.chmod(0o640)
    for _ in range(2):
        cache = EmbeddingCache(path)
        cache.store("model", ["a"], make_vectors(1))
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert modes == {0o640}
        cache.close()


@pytest.mark.parametrize("name", [":memory:", ":MEMORY:", "memory", "file::memory:", "file:a.db"])
def test_names_that_mean_memory_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`path` parameter of "):
        EmbeddingCache(name)
    assert not list(tmp_path.iterdir())
    assert EmbeddingCache(f"./{name}").path == tmp_path / name
    assert EmbeddingCache("memory.sqlite").path == tmp_path / "memory.sqlite"


FULL = """
import resource, sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError
path, limit = sys.argv[1], int(sys.argv[2])
cache = EmbeddingCache(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
texts = [str(i) for i in range(400)]
try:
    cache.store("model", texts, np.ones((400, 384)))
    print("stored", flush=True)
except CacheError as error:
    assert path in str(error), error
    print("refused", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs limits of POSIX")
@pytest.mark.parametrize("limit", [0, 10, 5000, 30_000, 100_000, 300_000])
@pytest.mark.parametrize("is_new", [True, False])
def test_limit_of_file_sizes(path: Path, limit: int, is_new: bool) -> None:
    if not is_new:
        fill(path)
    assert finish(start_python(FULL, path, limit)) == "refused"
    if not is_new:
        assert all(check_found(EmbeddingCache(path)))
    assert not list(path.parent.glob(".*"))
    cache = EmbeddingCache(path)
    cache.store("model", ["a"], make_vectors(1))
    assert find(cache, ["a"])[0] == [True]


def test_leftovers_of_killed_processes_go(path: Path) -> None:
    process = start_python("import os; print(os.getpid())")
    pid = finish(process)
    litter = path.with_name(f".cache.sqlite.{_host()}-{pid}-0123abcd.partial")
    other = path.with_name(f".other.sqlite.{_host()}-{pid}-0123abcd.partial")
    for folder in (litter, other):
        folder.mkdir()
    len(EmbeddingCache(path))
    assert not litter.exists()
    assert other.exists()


def _host() -> str:
    from skembed import _files

    return _files._host()


def test_foreign_database_with_our_names_is_not_touched(path: Path) -> None:
    connection = sqlite3.connect(path)
    for statement in sqlite_layout.SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {sqlite_layout.SCHEMA_VERSION}")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(CacheError, match="another program"):
        len(EmbeddingCache(path))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA application_id = 1936418157")
    connection.execute("CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM blocks; END")
    connection.close()
    assert path.read_bytes() != before
    before = path.read_bytes()
    with pytest.raises(CacheError, match="other tables"):
        len(EmbeddingCache(path))
    assert path.read_bytes() == before


def test_forks_leave_no_connection_behind(path: Path) -> None:
    """A connection of the parent's in a child would stand in for the child's own locks."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    assert finish(start_python(FORK, path)) == "fine"
    cache = EmbeddingCache(path)
    mask, _ = find(cache, ["parent", "child", "late"])
    assert mask == [True, True, True]
    assert integrity(path) == "ok"
    assert sqlite_log.lock_path(path).exists() is False


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
cache = EmbeddingCache(sys.argv[1])
one = np.ones((1, 16), dtype=np.float32)
cache.store("model", ["parent"], one)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    cache.store("model", ["child"], one)
    os.read(read, 1)  # until the parent has closed the file
    cache.store("model", ["late"], one)
    os._exit(0)  # as killed: what was stored must be there
import time
time.sleep(0.5)
cache.close()
os.write(write, b"x")
assert os.waitpid(pid, 0)[1] == 0
print("fine")
"""
