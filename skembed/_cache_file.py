"""Rows of the embedding cache in one SQLite file, shared by processes.

The file side of ``skembed.cache``: layout, transactions, eviction, and the refusal of
files that are not ours. Every error of SQLite leaves here as a ``CacheError``.
"""

import contextlib
import ctypes
import pathlib
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from skembed.exceptions import CacheError

__all__ = ["FileStore"]

_APPLICATION_ID = 0x736B656D  # "skem" in ASCII
_SCHEMA_VERSION = 1
# Two tables: uses and evictions change small index pages only, and vectors append in order.
# One table keyed by the digest inserts 4 times slower, as every row lands on a random page.
_SCHEMA = (
    "CREATE TABLE entries (key BLOB PRIMARY KEY, id INTEGER NOT NULL, tick INTEGER NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TABLE vectors (id INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE clock (tick INTEGER NOT NULL)",
    "INSERT INTO clock VALUES (0)",
)
_TABLES = {"entries", "vectors", "clock"}
_PAGE_BYTES = 4096
_EMPTY_FILE_BYTES = 16 * _PAGE_BYTES  # headers, roots and slack of a file without rows
_ENTRY_BYTES = 48  # one row of `entries`, in pages that are on average 70 % full
_LOG_BYTES = 8000 * _PAGE_BYTES  # the write-ahead log is moved into the file at this size
_SELECT_SIZES = (8, 64, 512)  # few distinct statements, so that each is compiled once
_LOCK_TIMEOUT_S = 30.0
_MAX_TOUCHED = 1 << 18

_T = TypeVar("_T")


class FileStore:
    """Rows in an SQLite file, through one connection per process.

    One connection, guarded by the lock of the cache, rather than one per thread: threads
    of one process then never wait for each other inside SQLite, and nothing is left open
    when a thread ends.
    """

    def __init__(self, path: pathlib.Path, max_bytes: int | None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None
        self._file_id: tuple[int, int] | None = None
        self._touched: set[bytes] = set()

    def fetch(self, keys: list[bytes], row_bytes: int) -> list[bytes | None]:
        """Return the row of each key, None where there is none of that length."""
        sql = (
            "SELECT e.key, e.tick, v.vector FROM entries e CROSS JOIN vectors v ON v.id = e.id"
            " WHERE e.key IN ({})"
        )

        def work(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            (clock,) = connection.execute("SELECT tick FROM clock").fetchone()
            rows = {}
            for key, tick, vector in _select_by_key(connection, sql, keys):
                if len(vector) == row_bytes:
                    rows[key] = vector
                    if self._max_bytes is not None and tick <= clock:
                        self._touch(key)
            return rows

        get = self._run(work, write=False).get
        return [get(key) for key in keys]

    def _touch(self, key: bytes) -> None:
        """Note the use of a row, for the next transaction that writes."""
        if len(self._touched) < _MAX_TOUCHED:
            self._touched.add(key)

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Insert row `position` of `vectors` under each key, in one transaction."""

        def work(connection: sqlite3.Connection) -> None:
            self._write_touched(connection)
            connection.execute("UPDATE clock SET tick = tick + 2")
            kept = self._make_room(connection, items, vectors.shape[1] * vectors.itemsize)
            _insert(connection, kept, vectors)
            # The estimate may have fallen short, or the limit may be new to this file.
            if self._max_bytes is not None and _used_bytes(connection) > self._max_bytes:
                _evict(connection, self._max_bytes - self._max_bytes // 10)

        self._run(work, write=True)
        self._touched.clear()
        if self._max_bytes is not None:
            self._shrink(self._max_bytes)

    def _write_touched(self, connection: sqlite3.Connection) -> None:
        """Mark the rows used since the last ``store`` as younger than all that it wrote."""
        # `store` leaves an even tick behind, uses get the odd one after it.
        connection.executemany(
            "UPDATE entries SET tick = (SELECT tick + 1 FROM clock) WHERE key = ?",
            [(key,) for key in self._touched],
        )

    def _make_room(
        self, connection: sqlite3.Connection, items: dict[bytes, int], row_bytes: int
    ) -> dict[bytes, int]:
        """Evict before inserting, so that the file never outgrows the limit; return what fits."""
        if self._max_bytes is None:
            return items
        row_cost = _estimate_row_bytes(row_bytes)
        capacity = max(0, self._max_bytes - _EMPTY_FILE_BYTES) // row_cost
        if len(items) > capacity:
            items = dict(list(items.items())[len(items) - capacity :])
        target = self._max_bytes - len(items) * row_cost
        if items and _used_bytes(connection) > target:
            # A tenth more than needed: finding the oldest rows reads the whole index.
            _evict(connection, target - self._max_bytes // 10)
        return items

    def _shrink(self, limit_bytes: int) -> None:
        """Cut free pages off the end of a file longer than `limit_bytes`, if nobody is in the way.

        Space that stays is used by later rows, so a failure is no error.
        """
        if self._connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            (n_pages,) = self._connection.execute("PRAGMA page_count").fetchone()
            excess = n_pages - limit_bytes // _PAGE_BYTES
            if excess > 0:
                # The statement frees one page a step. `execute` makes only one step of a
                # statement without columns; `executescript` makes all, outside a transaction.
                self._connection.executescript(f"PRAGMA incremental_vacuum({excess})")

    def count(self) -> int:
        """Return the number of rows; reads the whole index (20 ms for a million rows)."""
        return self._run(_count_entries, write=False)

    def size_bytes(self) -> int:
        """Return the bytes of the pages in use."""
        return self._run(_used_bytes, write=False)

    def clear(self) -> None:
        """Drop every row and give the pages back to the disk (20 s for a file of 2 GB)."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM entries")
            connection.execute("DELETE FROM vectors")

        self._run(work, write=True)
        self._touched.clear()
        if self._connection is not None:
            # The rows are gone; only giving back the space can fail, as others may be reading.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("VACUUM")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Record the uses not yet written, if that is possible at once, and close."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if self._touched:
                connection.execute("PRAGMA busy_timeout = 100")
                with _transaction(connection, "IMMEDIATE"):
                    self._write_touched(connection)
        self._touched.clear()
        connection.close()

    def after_fork(self) -> None:
        """Let go of the parent's connection without closing it."""
        # SQLite forbids a child even to close it: that could undo work of the parent. One
        # reference too many keeps the interpreter from closing it at exit.
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        self._connection = None
        self._touched.clear()

    def _run(self, work: Callable[[sqlite3.Connection], _T], *, write: bool) -> _T:
        """Do `work` in a transaction; wait for other processes, translate SQLite's errors."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                connection = self._connect()
                with _transaction(connection, "IMMEDIATE" if write else "DEFERRED"):
                    return work(connection)
            except sqlite3.Error as error:
                # SQLite waits by itself in most places, not while the file becomes a WAL file.
                if "locked" in str(error) and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                self._touched.clear()
                self.close()
                raise _translate(error, self._path) from error

    def _connect(self) -> sqlite3.Connection:
        """Return the open connection, or a new one if the file was moved, deleted or replaced."""
        file_id = _stat_file_id(self._path)
        if self._connection is None or file_id is None or file_id != self._file_id:
            self.close()
            self._connection = _open(self._path)
            self._file_id = _stat_file_id(self._path)
        return self._connection


def _open(path: pathlib.Path) -> sqlite3.Connection:
    """Open the file, making it if it does not exist; refuse any that is not ours."""
    if _check_place(path) > 0:
        _check_application(path)
    connection = _sqlite_connect(path, "mode=rwc")
    try:
        identity = _read_identity(connection)
        if identity == (0, 0, set()):
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            with _transaction(connection, "DEFERRED"):
                # This writes the first page: not before the transaction, where another process
                # would find a file without our mark; nor after a BEGIN that writes it itself.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                _create_schema(connection)
            identity = _read_identity(connection)
        _check_identity(identity, path)
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = NORMAL")
        # 8000 pages: most calls of `store` change pages all over the index, and a checkpoint
        # writes each once for many calls. A million rows are stored 1.5 times faster than
        # with SQLite's own 1000.
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // _PAGE_BYTES}")
        connection.execute(f"PRAGMA journal_size_limit = {2 * _LOG_BYTES}")
        connection.execute("PRAGMA cache_size = -16384")  # KiB; more gained nothing
    except BaseException:
        connection.close()
        raise
    return connection


def _sqlite_connect(path: pathlib.Path, query: str) -> sqlite3.Connection:
    """Connect without Python's implicit transactions; `query` holds SQLite's URI parameters."""
    return sqlite3.connect(
        f"{path.as_uri()}?{query}",
        uri=True,
        timeout=_LOCK_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _check_place(path: pathlib.Path) -> int:
    """Return the size of the file, 0 if there is none; refuse what cannot be a file."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise _path_error(
                path, "its folder does not exist", f"Create it: mkdir -p {str(path.parent)!r}."
            ) from None
        return 0
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _path_error(path, reason, "Choose another path.") from error
    if stat.S_ISDIR(info.st_mode):
        raise _path_error(path, "a folder", "Name a file in it, such as 'embeddings.sqlite'.")
    if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait forever
        raise _path_error(path, "not a regular file", "Choose another path.")
    return info.st_size


def _check_application(path: pathlib.Path) -> None:
    """Refuse a file that is not ours, without touching it or any log beside it."""
    # Opened the usual way, SQLite would first replay a foreign file's log into it. Reading
    # the header with `open` instead would drop this process's locks on the file at `close`.
    connection = _sqlite_connect(path, "mode=ro&immutable=1")
    try:
        # A file caught between two steps of a checkpoint is shorter than its header says;
        # this setting lets the header be read all the same.
        connection.execute("PRAGMA writable_schema = ON")
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    finally:
        connection.close()
    if application_id != _APPLICATION_ID:
        raise _path_error(path, "an SQLite file of another program", _LEFT_ALONE)


def _read_identity(connection: sqlite3.Connection) -> tuple[int, int, set[str]]:
    """Return application id, schema version and tables, as of one moment."""
    with _transaction(connection, "DEFERRED"):
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return application_id, version, {name for (name,) in tables}


def _create_schema(connection: sqlite3.Connection) -> None:
    """Make the tables, unless another process was faster; the caller has begun to write."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id == 0:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _check_identity(identity: tuple[int, int, set[str]], path: pathlib.Path) -> None:
    """Refuse a file with another layout than this release writes."""
    application_id, version, tables = identity
    if application_id == _APPLICATION_ID and version > _SCHEMA_VERSION:
        raise _path_error(
            path,
            f"a cache of layout {version}, which this release (layout {_SCHEMA_VERSION}) "
            "does not know",
            "Upgrade skembed, or choose another path.",
        )
    if application_id != _APPLICATION_ID or version != _SCHEMA_VERSION or tables != _TABLES:
        raise _path_error(path, "an SQLite file with other tables", _LEFT_ALONE)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """Commit on success, roll back on any exception, Ctrl-C included."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


def _select_by_key(
    connection: sqlite3.Connection, sql: str, keys: Sequence[bytes]
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of `sql`, whose ``{}`` stands for the keys, in any order."""
    largest = _SELECT_SIZES[-1]
    for start in range(0, len(keys), largest):
        batch: list[bytes | None] = list(keys[start : start + largest])
        size = next(size for size in _SELECT_SIZES if size >= len(batch))
        batch += [None] * (size - len(batch))  # NULL is never IN anything
        yield from connection.execute(sql.format(",".join("?" * size)), batch)


def _insert(
    connection: sqlite3.Connection, items: dict[bytes, int], vectors: npt.NDArray[np.float32]
) -> None:
    """Write row `position` of `vectors` under each key; known keys keep their place."""
    sql = "SELECT key, id FROM entries WHERE key IN ({})"
    ids: dict[bytes, int] = dict(_select_by_key(connection, sql, list(items)))
    (next_id,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM vectors").fetchone()
    for key in items:
        if key not in ids:
            ids[key] = next_id
            next_id += 1
    (tick,) = connection.execute("SELECT tick FROM clock").fetchone()
    # Sorted, rows that share a page of the index are written one after the other.
    connection.executemany(
        "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)",
        [(key, ids[key], tick) for key in sorted(items)],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
        ((ids[key], vectors[position].data) for key, position in items.items()),
    )


def _evict(connection: sqlite3.Connection, target_bytes: int) -> None:
    """Delete the least recently used rows until at most `target_bytes` are in use."""
    while (used := _used_bytes(connection)) > target_bytes and (
        n_rows := _count_entries(connection)
    ):
        share = min(1.0, (used - max(target_bytes, 0)) / used)
        n_doomed = max(1, int(n_rows * share))
        doomed = connection.execute(
            "SELECT key, id FROM entries ORDER BY tick, id LIMIT ?", (n_doomed,)
        ).fetchall()
        connection.executemany("DELETE FROM entries WHERE key = ?", ((key,) for key, _ in doomed))
        connection.executemany("DELETE FROM vectors WHERE id = ?", ((id_,) for _, id_ in doomed))


def _count_entries(connection: sqlite3.Connection) -> int:
    """Return the number of rows."""
    (n_rows,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    return int(n_rows)


def _used_bytes(connection: sqlite3.Connection) -> int:
    """Return the bytes of all pages that are not free."""
    (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
    (n_free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return (int(n_pages) - int(n_free)) * _PAGE_BYTES


def _estimate_row_bytes(row_bytes: int) -> int:
    """Return what a row takes in the file, by SQLite's rules for long rows.

    References: https://www.sqlite.org/fileformat2.html, section 1.6.
    """
    payload = row_bytes + 8  # with the record's header
    smallest, largest, per_page = 489, _PAGE_BYTES - 35, _PAGE_BYTES - 4
    local = payload
    if payload > largest:
        local = smallest + (payload - smallest) % per_page
        local = local if local <= largest else smallest
    n_overflow = -(-(payload - local) // per_page)
    n_on_page = max(1, (_PAGE_BYTES - 8) // (local + 10))
    return n_overflow * _PAGE_BYTES + -(-_PAGE_BYTES // n_on_page) + _ENTRY_BYTES


_LEFT_ALONE = "It was left as it is: choose another path, or move it away."

_REASONS = (
    ("not a database", "not an SQLite file", _LEFT_ALONE),
    (
        "malformed",
        "a damaged file",
        "It was left as it is: move or delete it, together with the files of the same name "
        "that end in -wal and -shm, and a new one is made at next use.",
    ),
    (
        "is full",
        "no room left on the disk",
        "Rows stored before are kept. Free some space, choose a path on another disk, or set "
        "`max_bytes`.",
    ),
    (
        "readonly",
        "a file or folder that is read-only",
        "Allow writing to both, or choose another path.",
    ),
    (
        "unable to open",
        "a file that cannot be opened",
        "Check that you may read and write the file and its folder, or choose another path.",
    ),
    (
        "locked",
        f"a file that another process has kept locked for {_LOCK_TIMEOUT_S:.0f} s",
        "Try again, or end that process.",
    ),
)


def _translate(error: sqlite3.Error, path: pathlib.Path) -> CacheError:
    """Return the CacheError that says what happened and what to do about it."""
    # The numeric codes would be surer, but Python has them only from 3.11 on.
    for fragment, reason, next_step in _REASONS:
        if fragment in str(error):
            return _path_error(path, reason, next_step)
    return _path_error(
        path, f"an error of SQLite ({error})", "Check the disk, or choose another path."
    )


def _path_error(path: pathlib.Path, reason: str, next_step: str) -> CacheError:
    """Return a CacheError in the shape of every other parameter error."""
    return CacheError(
        "The `path` parameter of `EmbeddingCache` must be a cache file that can be read and "
        f"written, or a new name in an existing folder; got {str(path)!r}: {reason}. {next_step}"
    )


def _stat_file_id(path: pathlib.Path) -> tuple[int, int] | None:
    """Return what tells a file from another of the same name, or None if there is none."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
