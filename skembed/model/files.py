"""Files of a model folder: found inside it, read steadily, replaced together.

A folder may come from anywhere. What its files name lies in the folder (or among the blobs of the
hub's cache), a reader waits for no pipe, and a reading that met a writer is taken again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from skembed._files import (
    find_inside,
    hold_lock,
    make_hidden_folder,
    remove_leftovers,
    replace_file,
)
from skembed.exceptions import CheckpointError

__all__ = [
    "find_file",
    "has_file",
    "list_states",
    "read_steadily",
    "replace_together",
    "unpack_folder",
    "wait_for_save",
]

T = TypeVar("T")

LOCK_FILE = ".skembed-save.lock"
SAVE_WAIT_S = 60.0
_PAUSES_S = (0.02, 0.05, 0.1, 0.3, 0.6, 1.0)  # between readings of a folder that changes
_READ_SUFFIXES = (".json", ".safetensors")
_BUNDLED = Path(__file__).resolve().parent.parent / "data"  # installers may link its files


def find_file(folder: Path, name: object, *, subject: str | None = None) -> Path:
    """Return the path of a file of a model folder; raise CheckpointError where it leads out.

    Links of the hub's cache lead to the blobs of the same repository.
    """
    if isinstance(name, str) and folder.parent == _BUNDLED:
        return folder / name
    subject = subject or f"The file {name} of a model"
    return find_inside(folder, name, subject=subject, error=CheckpointError, others=_blobs(folder))


def _blobs(folder: Path) -> list[Path]:
    """Return the folder of blobs beside a snapshot in the hub's cache, if that is what this is."""
    real = Path(os.path.realpath(folder))
    if real.parent.name != "snapshots":
        return []
    blobs = real.parent.parent / "blobs"
    return [blobs] if blobs.is_dir() and not blobs.is_symlink() else []


def has_file(folder: Path, name: str) -> bool:
    """Return whether a folder has an entry of that name, be it one that cannot be read."""
    return os.path.lexists(folder / name)


# Another process may write what this one reads


def read_steadily(folders: Collection[Path], read: Callable[[], T]) -> T:
    """Return what `read` returns from files that stayed as they were meanwhile.

    It is called again where they did not; after some seconds a CheckpointError says so.
    """
    for pause in (*_PAUSES_S, None):
        before = [list_states(folder) for folder in folders]
        problem = None
        try:
            value = read()
        except CheckpointError as error:
            problem = error
        if before == [list_states(folder) for folder in folders]:
            if problem is None:
                return value
            if not any(map(_is_being_saved, folders)):
                raise problem
        if pause is not None:
            time.sleep(pause)
    reason = "" if problem is None else f" ({problem})"
    raise CheckpointError(
        f"The files in {' and '.join(map(str, folders))} change while they are read{reason}. "
        "Another process is writing there: try again when it has finished."
    ) from problem


def wait_for_save(folder: Path) -> None:
    """Wait, for seconds at most, until no other process replaces the files of a folder."""
    for pause in _PAUSES_S:
        if not _is_being_saved(folder):
            return
        time.sleep(pause)


def _is_being_saved(folder: Path) -> bool:
    """Return whether another process, or thread, is replacing files of a folder."""
    if not has_file(folder, LOCK_FILE):
        return False
    try:
        with hold_lock(folder / LOCK_FILE, subject=f"The model folder {str(folder)!r}"):
            return False  # left behind by a process that died; now it is gone
    except BlockingIOError:
        return True
    except OSError:
        return False


def list_states(folder: Path, others: Iterable[Path] = ()) -> set[tuple[Any, ...]]:
    """Return path, size, time of change and inode of the files that a model may be read from.

    These are the folder's own, without those of subfolders, and `others`.
    """
    paths = {os.fspath(path) for path in others}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith(_READ_SUFFIXES) and not entry.name.startswith("."):
                paths.add(entry.path)
    states: set[tuple[Any, ...]] = set()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:
            states.add((path,))
        else:
            states.add((path, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return states


@contextmanager
def replace_together(folder: Path, last: str, *, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder; its files, one of them `last`, then replace those of `folder`.

    Everything is written before anything old goes, so that a full disk leaves the old files. Then
    the old `last` goes first and the new one comes last: a folder without it refuses to load, so
    that a kill between leaves no mixture. Old files for which `is_stale` is true go, too. Every
    error of the disk is an OSError that names a path in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with ExitStack() as stack, replace_file(folder / last) as partial:
        yield partial.parent
        names = sorted(set(os.listdir(partial.parent)) - {last})
        for name in names:
            with (partial.parent / name).open("r+b") as file:
                os.fsync(file.fileno())
        _hold_save_lock(stack, folder)  # until `last` is there
        stale = sorted(set(filter(is_stale, os.listdir(folder))) - {*names, last})
        for path in (folder / name for name in (*names, *stale, last)):
            if path.is_dir() and not path.is_symlink():
                raise IsADirectoryError(errno.EISDIR, "A folder stands in its place", str(path))
        (folder / last).unlink(missing_ok=True)
        for name in stale:
            (folder / name).unlink()
        for name in names:
            (partial.parent / name).replace(folder / name)


def _hold_save_lock(stack: ExitStack, folder: Path) -> None:
    """Hold the lock of a folder until the stack ends; wait for another process's short hold."""
    deadline = time.monotonic() + SAVE_WAIT_S
    while True:
        try:
            lock = hold_lock(folder / LOCK_FILE, subject=f"The model folder {str(folder)!r}")
            stack.enter_context(lock)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


# Files that came in a pickle. Their temporary folder goes with the process that made it: at its
# end, by a small watcher where it is killed, and at the latest when another process unpacks a
# model. A fork uses its parent's files, and never removes them.

_UNPACKED_NAME = "skembed-models"
_unpacked: dict[str, Path] = {}  # by the hash of the content
_homes: dict[int, Path] = {}  # by process: a fork inherits its parent's
_lock = threading.Lock()


def unpack_folder(files: Mapping[str, bytes]) -> Path:
    """Return a temporary folder with these files, one per content; the process's end deletes it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(name.encode() + hashlib.blake2b(files[name]).digest())
    key = digest.hexdigest()
    with _lock:
        folder = _unpacked.get(key)
        if folder is None or not folder.is_dir():  # a fork outlived its parent
            folder = _write(_find_home() / key, files)
            _unpacked[key] = folder
        return folder


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files to a new folder."""
    folder.mkdir()
    try:
        for name, content in files.items():
            path = find_inside(folder, name, subject="A file of the pickled model")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _find_home() -> Path:
    """Return this process's folder for unpacked models."""
    home = _homes.get(os.getpid())
    if home is None or not home.is_dir():
        parent = Path(tempfile.gettempdir())
        remove_leftovers(parent, _UNPACKED_NAME)
        home = _homes[os.getpid()] = make_hidden_folder(parent / _UNPACKED_NAME)
        atexit.register(_remove, os.getpid(), home)
        _watch(home)
    return home


def _remove(owner: int, home: Path) -> None:
    """Remove a folder, in the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(home, ignore_errors=True)


# In the background, so that it is no child that a server would wait for.
_WATCHER = '( trap "" HUP INT TERM; read -r _ <&3; rm -rf -- "$1" ) &'


def _watch(home: Path) -> None:
    """Start a shell that removes the folder once this process and its forks are gone.

    A killed process runs no code of its own. The shell waits for the end of a pipe that only they
    hold.
    """
    if not hasattr(os, "posix_spawn") or not os.path.exists("/bin/sh"):
        return
    reading, _ = os.pipe()  # the other end stays open until the process ends, however it ends
    try:
        with contextlib.suppress(OSError):  # no room for another process
            pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _WATCHER, "sh", str(home)],
                {"PATH": os.defpath},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reading, 3),
                    *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)),
                ],
                setpgroup=0,
            )
            os.waitpid(pid, 0)
    finally:
        os.close(reading)


def _renew_lock() -> None:
    """Give a fork a lock of its own: another thread may have held the parent's."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
