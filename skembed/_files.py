"""Files written in one step, and locks that keep a second writer away.

The operating system releases a lock when its process dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from skembed.exceptions import SkembedWarning

__all__ = ["hold_lock", "replace_file", "sync_folder", "write_bytes", "write_json"]


@contextlib.contextmanager
def replace_file(path: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to, which replaces `path` in one step at the end.

    The content is flushed to the disk first. If the block fails, `path` stays as it was and nothing
    is left behind. Writers that may run at the same time pass a `partial` of their own.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes, *, partial: Path | None = None) -> None:
    """Write a file in one step, as `replace_file` does."""
    with replace_file(path, partial=partial) as new:
        new.write_bytes(content)


def write_json(path: Path, value: Any, *, partial: Path | None = None) -> None:
    """Write a JSON file in one step, with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_bytes(path, text.encode(), partial=partial)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a loss of power, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# One writer at a time

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: BinaryIO) -> None:
        """Lock the file or raise OSError at once."""
        file.seek(1 << 30)  # far behind the holder's name, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(file: BinaryIO) -> None:
        """Lock the file or raise OSError at once."""
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


_LOCKED_ERRNOS = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


@contextlib.contextmanager
def hold_lock(path: Path, *, subject: str) -> Iterator[None]:
    """Hold the lock file `path`, or raise BlockingIOError if another process holds it.

    `subject` begins the sentence of the error. The file is deleted when the block ends; a
    process that was killed holds no lock. Warns if the file system has no locks.
    """
    file = _open_locked(path, subject=subject)
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock file stays empty
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield
    finally:
        # Deleted before it is unlocked, so that a process that opened it meanwhile can tell.
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            file.close()


def _open_locked(path: Path, *, subject: str) -> BinaryIO:
    """Return the open and locked file of that path, not one that its last holder just deleted."""
    while True:
        file: BinaryIO = path.open("a+b")
        try:
            _try_lock(file)
            if _is_same(file, path):
                return file
        except OSError as error:
            if error.errno not in _LOCKED_ERRNOS:
                _warn_unlocked(path, subject=subject)
                return file
            holder = ""
            with contextlib.suppress(OSError):
                holder = path.read_text(encoding="utf-8", errors="replace")
            file.close()
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{subject} is being written by another run ({holder or 'unknown process'}). Wait "
                "for its end, or write to another path",
                str(path),
            ) from None
        file.close()


def _is_same(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _warn_unlocked(path: Path, *, subject: str) -> None:
    """Warn that nothing keeps a second writer away."""
    warnings.warn(
        f"{subject} cannot be locked: the file system of {str(path.parent)!r} has no locks. Make "
        "sure that only one process writes there.",
        SkembedWarning,
        stacklevel=6,
    )
