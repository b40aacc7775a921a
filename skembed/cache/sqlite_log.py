"""The write-ahead log beside the cache's file, which must continue that file.

SQLite replays any log of the right name. A killed process leaves one, and if the file is replaced
afterwards, the log of the old file would be replayed into the new one. So every transaction writes
a random mark and the one before it: a log continues a file if it knows the file's own mark.

References: https://www.sqlite.org/fileformat2.html, section 4.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from skembed._files import hold_lock, open_file

__all__ = ["MARK_PAGE", "NEXT_MARK", "PAGE_BYTES", "lock_path", "remove_foreign_log"]

PAGE_BYTES = 4096
MARK_PAGE = 3  # the root of the first table in a file whose second page maps pointers
NEXT_MARK = "UPDATE mark SET previous = current, current = randomblob(8)"

_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, two salts, two checksums
_FRAME = struct.Struct(">6I")  # page, pages of the file after a commit, two salts, two checksums
_MAGIC = (0x377F0682, 0x377F0683)
_CELL = b"\x13\x01\x03\x1c\x1c"  # 19 bytes, row 1: a header of 3 bytes, two blobs of 8
_LOOKS = 100
_PAUSE_S = 0.02


def lock_path(path: Path) -> Path:
    """Return the lock of those who make the file, or remove a log."""
    return path.with_name(f"{path.name}.lock")


def remove_foreign_log(path: Path, read_mark: Callable[[], bytes]) -> None:
    """Remove the log beside a file if it belongs to another one.

    `read_mark` reads the mark in the file itself. Raises BlockingIOError while another process does
    the same, OSError for a log that is no file and for a rollback journal, which no cache makes.
    """
    journal = path.with_name(f"{path.name}-journal")
    if os.path.lexists(journal):
        raise OSError(errno.EEXIST, "A journal of another file lies beside it", str(journal))
    log = path.with_name(f"{path.name}-wal")
    if not _is_foreign(log, read_mark):
        return
    with hold_lock(lock_path(path), subject=f"The cache {str(path)!r}"):
        if _is_foreign(log, read_mark):  # another process may have been here
            # The index of the log first: killed in between, the log is still known as foreign.
            path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
            log.unlink(missing_ok=True)


def _is_foreign(log: Path, read_mark: Callable[[], bytes]) -> bool:
    """Return whether a log has transactions, of which none follows the file's mark.

    The file and its log may change meanwhile: only two looks at what stood still count.
    """
    n_foreign = 0
    for _ in range(_LOOKS):
        mark = read_mark()
        marks, is_still = _read_marks(log)
        if marks is None or mark in marks:
            return False
        n_foreign += is_still and read_mark() == mark
        if n_foreign == 2:
            return True
        time.sleep(_PAUSE_S)
    return False  # a process is writing it all the time


def _read_marks(log: Path) -> tuple[set[bytes] | None, bool]:
    """Return the marks of a log's transactions, and whether the log stood still.

    None stands for a log without any transaction, which changes nothing.
    """
    try:
        file = open_file(log)
    except FileNotFoundError:
        return None, True
    with file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or _HEADER.unpack(head)[0] not in _MAGIC:
            return None, True
        _, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(head)
        if page_bytes != PAGE_BYTES:
            return set(), True
        committed: set[bytes] | None = None
        pending: set[bytes] = set()
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            page, n_pages, *found, _, _ = _FRAME.unpack(frame)
            if found != salts:  # left of an earlier round
                break
            if page == MARK_PAGE:
                pending |= _parse_marks(file.read(PAGE_BYTES))
            else:
                file.seek(PAGE_BYTES, os.SEEK_CUR)
            if n_pages:  # the end of a transaction
                committed = (committed or set()) | pending
        file.seek(0)
        return committed, file.read(_HEADER.size) == head


def _parse_marks(page: bytes) -> set[bytes]:
    """Return both marks on a page of the table `mark`."""
    start = int.from_bytes(page[8:10], "big")  # where its only row lies
    row = page[start : start + len(_CELL) + 16]
    if len(row) < len(_CELL) + 16 or not row.startswith(_CELL):
        return set()
    return {row[-16:-8], row[-8:]}
