"""Rows of the embedding cache in one SQLite file, shared by processes.

The connection, transactions, the limit, and the refusal of foreign files are here; the tables are
in ``skembed.cache.sqlite_layout``. Every error of SQLite or of the disk is a ``CacheError``.
"""

from __future__ import annotations

import contextlib
import errno
import pathlib
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from skembed._files import hold_lock, remove_leftovers, replace_file
from skembed.cache.sqlite_layout import (
    SCHEMA,
    SCHEMA_VERSION,
    count_rows,
    delete_all,
    estimate_row_bytes,
    evict,
    fetch_rows,
    insert_rows,
    touch,
    used_bytes,
)
from skembed.cache.sqlite_log import NEXT_MARK, PAGE_BYTES, lock_path, remove_foreign_log
from skembed.cache.stores import DTYPES, find_storable
from skembed.exceptions import CacheError

__all__ = ["FileStore"]

_APPLICATION_ID = 0x736B656D  # "skem" in ASCII
_EMPTY_FILE_BYTES = 16 * PAGE_BYTES  # headers, roots and slack of a file without rows
_LOG_BYTES = 8000 * PAGE_BYTES  # the write-ahead log is moved into the file at this size
_MAP_BYTES = 1 << 31
_LOCK_TIMEOUT_S = 30.0
_MAX_TOUCHED = 1 << 18

_T = TypeVar("_T")


class FileStore:
    """Rows in an SQLite file, through one connection per process.

    The lock of the cache guards the connection. One per thread would make the threads of a process
    wait for each other inside SQLite, and leave something open when a thread ends.
    """

    def __init__(self, path: pathlib.Path, max_bytes: int | None, dtype: str | None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._requested_dtype = dtype
        self._dtype = DTYPES["float32"]  # the file's own, once it is open
        self._connection: sqlite3.Connection | None = None
        self._file_id: tuple[int, int] | None = None
        self._file_bytes = 0
        self._touched: set[int] = set()

    def fetch(self, keys: list[bytes], out: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Fill the rows of `out` (n, dim) whose keys are stored; return which, (n,)."""
        digests = _to_digests(keys)

        def work(connection: sqlite3.Connection) -> npt.NDArray[np.bool_]:
            mask, blocks = fetch_rows(connection, digests, out, self._dtype)
            if self._max_bytes is not None and len(self._touched) < _MAX_TOUCHED:
                self._touched.update(blocks.tolist())  # for the next transaction that writes
            return mask

        return self._run(work, write=False)

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Store row ``items[key]`` of `vectors` under each key, in one transaction."""
        digests = _to_digests(list(items))
        positions = np.fromiter(items.values(), dtype=np.int64, count=len(items))

        def work(connection: sqlite3.Connection) -> None:
            touch(connection, list(self._touched))
            connection.execute("UPDATE state SET tick = tick + 2")
            rows = np.arange(len(items))
            if self._dtype.itemsize < vectors.itemsize:  # some may be too large for it
                rows = np.flatnonzero(find_storable(vectors, self._dtype)[positions])
            row_bytes = vectors.shape[1] * self._dtype.itemsize
            rows = rows[len(rows) - self._make_room(connection, len(rows), row_bytes) :]
            if len(rows):
                insert_rows(connection, digests[rows], vectors, positions[rows], self._dtype)
            # The estimate may have fallen short, or the limit may be new to this file.
            if self._max_bytes is not None and used_bytes(connection) > self._max_bytes:
                evict(connection, self._max_bytes - self._max_bytes // 10)

        self._run(work, write=True)
        self._touched.clear()
        if self._max_bytes is not None:
            self._shrink(self._max_bytes)

    def _make_room(self, connection: sqlite3.Connection, n_rows: int, row_bytes: int) -> int:
        """Evict before an insertion, so that the file stays below its limit; return what fits."""
        if self._max_bytes is None:
            return n_rows
        row_cost = estimate_row_bytes(row_bytes)
        n_rows = min(n_rows, max(0, self._max_bytes - _EMPTY_FILE_BYTES) // row_cost)
        target = self._max_bytes - n_rows * row_cost
        if n_rows and used_bytes(connection) > target:
            # A tenth more than needed: finding the oldest rows reads all of `uses`.
            evict(connection, target - self._max_bytes // 10)
        return n_rows

    def _shrink(self, limit_bytes: int) -> None:
        """Cut free pages off the end of a file longer than `limit_bytes`.

        Later rows use the space that stays, so a failure is not an error.
        """
        if self._connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            (n_pages,) = self._connection.execute("PRAGMA page_count").fetchone()
            excess = n_pages - limit_bytes // PAGE_BYTES
            if excess > 0:
                # The statement frees one page a step. `execute` makes only one step of a
                # statement without columns; `executescript` makes all.
                vacuum = f"PRAGMA incremental_vacuum({excess})"
                try:
                    self._connection.executescript(
                        f"BEGIN IMMEDIATE; {NEXT_MARK}; {vacuum}; COMMIT"
                    )
                finally:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")

    def count(self) -> int:
        """Return the number of rows; reads the whole index (20 ms for a million rows)."""
        return self._run(count_rows, write=False)

    def dtype(self) -> str:
        """Return the type that vectors are stored in."""
        return self._run(lambda _: self._dtype.name, write=False)

    def size_bytes(self) -> int:
        """Return the bytes of the pages in use."""
        return self._run(used_bytes, write=False)

    def clear(self) -> None:
        """Drop all rows and free their pages (a second for a million rows)."""
        self._run(delete_all, write=True)
        self._touched.clear()
        if self._connection is not None:
            # The rows are gone; only freeing the space can fail, as others may be reading.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("VACUUM")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Record the uses not yet written, if that is possible at once, and close the file."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if self._touched:
                connection.execute("PRAGMA busy_timeout = 100")
                with _transaction(connection, write=True):
                    touch(connection, list(self._touched))
        self._touched.clear()
        connection.close()

    def _run(self, work: Callable[[sqlite3.Connection], _T], *, write: bool) -> _T:
        """Return what `work` does in a transaction; wait for other processes, translate errors."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                connection = self._connect()
                with _transaction(connection, write=write):
                    return work(connection)
            except CacheError:
                raise
            except (sqlite3.Error, OSError) as error:
                # SQLite itself waits in most places, but not while it opens a file or its log.
                if _is_locked(error) and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                self._touched.clear()
                self.close()
                raise _translate(error, self._path) from error

    def _connect(self) -> sqlite3.Connection:
        """Return the open connection, or a new one if the file was moved, deleted or replaced.

        A shorter file is opened again, too: reading a memory map beyond its end would kill the
        process, while opening a file that was cut off is an error.
        """
        file_id, size_bytes = _stat_file(self._path)
        is_same = file_id is not None and file_id == self._file_id
        if self._connection is None or not is_same or size_bytes < self._file_bytes:
            self.close()
            self._connection, self._dtype = _open(self._path, self._requested_dtype)
            self._file_id, size_bytes = _stat_file(self._path)
        self._file_bytes = size_bytes
        return self._connection


def _to_digests(keys: list[bytes]) -> npt.NDArray[np.int64]:
    """Return digests as int64 (n, 2), the form of the file's index."""
    digests: npt.NDArray[np.int64] = np.frombuffer(b"".join(keys), dtype="<i8").reshape(-1, 2)
    return digests


def _open(path: pathlib.Path, dtype: str | None) -> tuple[sqlite3.Connection, np.dtype[Any]]:
    """Return a connection to the file, created if absent, and the type of its vectors."""
    remove_leftovers(path.parent, path.name)
    if _check_path(path) == 0:
        _create(path, dtype or "float32")
    _check_head(path)
    remove_foreign_log(path, lambda: _read_mark(path))
    connection = _sqlite_connect(path, "mode=rw")
    try:
        file_dtype = _read_dtype(connection, path)
        if dtype is not None and dtype != file_dtype:
            raise _path_error(
                path,
                f"a cache of {file_dtype} vectors, not of {dtype}, which `dtype` asks for",
                "Leave `dtype` out to use the file as it is, or choose another path.",
            )
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = NORMAL")
        # 8000 pages: most calls of `store` change pages all over the index, and a checkpoint
        # writes each once for many calls. A million rows are stored 1.5 times faster than
        # with SQLite's own 1000.
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // PAGE_BYTES}")
        connection.execute(f"PRAGMA journal_size_limit = {2 * _LOG_BYTES}")
        # KiB. The system caches the file's pages, too; a larger copy of them here only pushes
        # others out of the processor's cache.
        connection.execute("PRAGMA cache_size = -8192")
        # Read through a memory map (of 2 GiB at most, SQLite's limit): a quarter more rows a
        # second in random order.
        if sys.maxsize > 1 << 32:
            connection.execute(f"PRAGMA mmap_size = {_MAP_BYTES}")
        # Some builds of SQLite overwrite what is deleted: `clear` takes ten times as long.
        connection.execute("PRAGMA secure_delete = OFF")
    except BaseException:
        connection.close()
        raise
    return connection, DTYPES[file_dtype]


def _read_dtype(connection: sqlite3.Connection, path: pathlib.Path) -> str:
    """Return the name of the type of the file's vectors."""
    row = connection.execute("SELECT dtype FROM state").fetchone()
    if row is None or row[0] not in DTYPES:
        raise _path_error(path, "an SQLite file with other tables", _LEFT_ALONE)
    return str(row[0])


def _sqlite_connect(path: pathlib.Path, query: str) -> sqlite3.Connection:
    """Connect without Python's implicit transactions; `query` holds SQLite's URI parameters."""
    return sqlite3.connect(
        f"{path.as_uri()}?{query}",
        uri=True,
        timeout=_LOCK_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _check_path(path: pathlib.Path) -> int:
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


def _create(path: pathlib.Path, dtype: str) -> None:
    """Make an empty cache, which only its owner may read, unless another process made it."""
    with hold_lock(lock_path(path), subject=f"The cache {str(path)!r}"):
        mode = 0o600
        with contextlib.suppress(FileNotFoundError):
            info = path.stat()
            if info.st_size > 0:
                return
            mode = stat.S_IMODE(info.st_mode)
        # Elsewhere and renamed: a process that is killed here leaves nothing to mend, and SQLite
        # gives log and index the mode of the file.
        with replace_file(path) as new:
            connection = _sqlite_connect(new, "mode=rwc")
            try:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                for statement in SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO mark VALUES (zeroblob(8), randomblob(8))")
                connection.execute("INSERT INTO state VALUES (0, ?)", (dtype,))
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            finally:
                connection.close()
            new.chmod(mode)


@contextlib.contextmanager
def _open_as_it_is(path: pathlib.Path) -> Iterator[sqlite3.Connection]:
    """Open the file without touching it or any log beside it."""
    # Opened in the usual way, SQLite would first replay a foreign file's log into it. Reading
    # the file with `open` instead would drop this process's locks on it at `close`.
    connection = _sqlite_connect(path, "mode=ro&immutable=1")
    try:
        # A file caught between two steps of a checkpoint is shorter than its header says;
        # with this setting its first pages can still be read.
        connection.execute("PRAGMA writable_schema = ON")
        yield connection
    finally:
        connection.close()


def _check_head(path: pathlib.Path) -> None:
    """Raise if the file is not ours, of another layout, or has anything beside our tables."""
    with _open_as_it_is(path) as connection:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        is_ours = (application_id, version) == (_APPLICATION_ID, SCHEMA_VERSION)
        query = "SELECT sql FROM sqlite_master"
        tables = connection.execute(query).fetchall() if is_ours else []
    if application_id != _APPLICATION_ID:
        raise _path_error(path, "an SQLite file of another program", _LEFT_ALONE)
    if version != SCHEMA_VERSION:
        step = "Upgrade skembed" if version > SCHEMA_VERSION else "Delete it to start again"
        raise _path_error(
            path,
            f"a cache of layout {version}, which this release (layout {SCHEMA_VERSION}) "
            "does not know",
            f"{step}, or choose another path.",
        )
    if {sql for (sql,) in tables} != set(SCHEMA):
        raise _path_error(path, "an SQLite file with other tables", _LEFT_ALONE)


def _read_mark(path: pathlib.Path) -> bytes:
    """Return the mark in the file itself, whatever a log says."""
    with _open_as_it_is(path) as connection:
        row = connection.execute("SELECT current FROM mark").fetchone()
    if row is None or not isinstance(row[0], bytes):
        raise sqlite3.DatabaseError("malformed: there is no mark")
    return row[0]


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, *, write: bool) -> Iterator[None]:
    """Commit on success, roll back on any exception, Ctrl-C included."""
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN DEFERRED")
    try:
        if write:
            connection.execute(NEXT_MARK)
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


_LEFT_ALONE = "It was left as it is: choose another path, or move it away."
_DELETE_IT = (
    "It was left as it is: move or delete it, together with the files of the same name "
    "that end in -wal and -shm, and a new one is created at next use."
)

_REASONS = (
    ("not a database", "not an SQLite file", _LEFT_ALONE),
    ("malformed", "a damaged file", _DELETE_IT),
    ("not decode", "a damaged file", _DELETE_IT),
    (
        "disk I/O error",
        "the disk failed, or has no room left",
        "Check the disk and its free space, or choose another path.",
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
# What the disk says -> what SQLite says.
_FRAGMENTS = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "readonly")
_FRAGMENTS |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "is full")


def _is_locked(error: Exception) -> bool:
    """Return whether another process is in the way, for a while."""
    return isinstance(error, BlockingIOError) or "locked" in str(error)


def _translate(error: sqlite3.Error | OSError, path: pathlib.Path) -> CacheError:
    """Return the CacheError that says what happened and what to do about it."""
    text = str(error)
    if isinstance(error, OSError):
        text = "locked" if _is_locked(error) else _FRAGMENTS.get(error.errno or 0, "")
    # The numeric codes would be surer, but Python has them only from 3.11 on.
    for fragment, reason, next_step in _REASONS:
        if fragment in text:
            return _path_error(path, reason, next_step)
    if isinstance(error, OSError):
        name = "" if error.filename in (None, str(path)) else f" ({str(error.filename)!r})"
        reason = f"{error.strerror or error}{name}"
        return _path_error(path, reason, "Mend that, or choose another path.")
    return _path_error(
        path, f"an error of SQLite ({error})", "Check the disk, or choose another path."
    )


def _path_error(path: pathlib.Path, reason: str, next_step: str) -> CacheError:
    """Return a CacheError in the shape of every other parameter error."""
    return CacheError(
        "The `path` parameter of `EmbeddingCache` must be a cache file that can be read and "
        f"written, or a new name in an existing folder; got {str(path)!r}: {reason}. {next_step}"
    )


def _stat_file(path: pathlib.Path) -> tuple[tuple[int, int] | None, int]:
    """Return device and inode of the file, None if there is none, and its size."""
    try:
        info = path.stat()
    except OSError:
        return None, 0
    return (info.st_dev, info.st_ino), info.st_size
