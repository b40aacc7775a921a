"""Files: read as what they should be, written in one step, locked against a second writer.

A name that a file holds leads nowhere but into its folder, a reader never waits for a pipe, and a
writer follows no link. The operating system releases a lock when its process dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from skembed.exceptions import SkembedWarning

__all__ = [
    "check_fields",
    "find_inside",
    "hold_lock",
    "make_hidden_folder",
    "name_of_partial",
    "open_file",
    "read_file",
    "read_json",
    "read_manifest",
    "remove_leftovers",
    "replace_file",
    "sync_folder",
    "write_bytes",
    "write_json",
]

MAX_JSON_BYTES = 64 * 1024**2

# Reading


def find_inside(
    folder: Path,
    name: object,
    *,
    subject: str,
    error: Callable[[str], Exception] = ValueError,
    others: Sequence[Path] = (),
) -> Path:
    """Return the path of a file that was named by a file of `folder`, which must lie inside.

    A link may lead elsewhere in the folder, or into one of `others`. `subject` begins the sentence
    of the error. Raises `error` for anything else; whether there is such a file is not asked.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise error(f"{subject} must be the name of a file; got {name!r:.100}.")
    pure = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.anchor or ".." in path.parts for path in pure) or "\\" in name:
        raise error(
            f"{subject} must be the name of a file in {str(folder)!r}; got {name!r:.100}, which "
            "may lead out of it. Do not use this folder unless you know why it says so."
        )
    path = folder / name
    real = Path(os.path.realpath(path))
    homes = [Path(os.path.realpath(home)) for home in (folder, *others)]
    if not any(real.is_relative_to(home) for home in homes):
        raise error(
            f"{subject} must lie in {str(folder)!r}; {name!r:.100} is a link that leads out of it, "
            f"to {str(real)!r}. Replace the link by the file if you trust it."
        )
    return path


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; never waits for the other end of a pipe.

    Raises OSError if the file is missing, or a folder, a pipe, a socket or a device.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "It is not a regular file", os.fspath(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: str | os.PathLike[str], *, limit: int | None = None) -> bytes:
    """Return the content of a regular file; raises OSError above `limit` bytes, as `open_file`."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(
                errno.EFBIG, f"It has {size:,} bytes, more than {limit:,}", os.fspath(path)
            )
        return file.read()


def read_json(path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most `limit` bytes.

    Raises OSError as `read_file`, ValueError for anything but a JSON object in UTF-8.
    """
    content = read_file(path, limit=limit)
    try:
        values = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds no JSON object, but {type(values).__name__}")
    return values


def read_manifest(path: Path, *, kind: str, form: str, version: int, advice: str) -> dict[str, Any]:
    """Return the manifest of a folder that skembed wrote, of this `form` and version.

    `kind` names what lies there, such as "index"; `advice` is the next step after damage. Raises
    FileNotFoundError where there is no file, ValueError if it is damaged, foreign or of another
    version. Its further fields are the caller's to check, with `check_fields`.
    """
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"The {kind} in {str(path.parent)!r} is damaged: {path.name} cannot be read ({reason})."
            f" {advice}"
        ) from error
    if values.get("format") != form:
        raise ValueError(
            f"The folder {str(path.parent)!r} holds no {kind} of skembed, but another {path.name}."
        )
    if values.get("version") != version or isinstance(values["version"], bool):
        raise ValueError(
            f"The {kind} in {str(path.parent)!r} is of version {values.get('version')!r:.40}; this "
            f"skembed reads version {version}. Install the skembed that wrote it. {advice}"
        )
    return values


def check_fields(
    values: object,
    fields: Mapping[str, type | tuple[type, ...]],
    *,
    subject: str,
    error: Callable[[str], Exception] = ValueError,
    advice: str = "",
) -> dict[str, Any]:
    """Return a mapping read from a file, if it has these fields, of these types.

    An int must not be negative, and a bool is none; `type(None)` allows null. Further fields pass.
    `subject` begins the sentence of the error, `advice` ends it.
    """
    if not isinstance(values, dict):
        raise error(f"{subject} must be a JSON object; got {type(values).__name__}. {advice}")
    for name, types in fields.items():
        allowed = types if isinstance(types, tuple) else (types,)
        value = values.get(name)
        if name not in values or type(value) not in allowed or (type(value) is int and value < 0):
            got = f"{value!r:.60}" if name in values else "no such field"
            names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            raise error(f"{subject} must have a field {name!r} ({names}); got {got}. {advice}")
    return values


# Writing


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, in a hidden folder beside `path`, which replaces it at the end.

    The content is flushed to the disk first. If the block fails, `path` stays as it was and nothing
    is left behind; what a killed process left, the next writer removes. Writers may run at the same
    time: the last one stays. Every error of the disk is an OSError that names `path`.
    """
    remove_leftovers(path.parent, path.name)
    folder = _name_hidden(path)
    try:
        folder.mkdir(mode=0o700)
        partial = folder / path.name
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        problem = _as_disk_error(error, path, folder)
        if problem is error:
            raise
        raise problem from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(path.parent)


def make_hidden_folder(path: Path) -> Path:
    """Make a hidden folder beside `path`, for this process alone, as `replace_file` does.

    The caller removes it; what a killed process left, `remove_leftovers` does.
    """
    folder = _name_hidden(path)
    folder.mkdir(mode=0o700)
    return folder


def _name_hidden(path: Path) -> Path:
    """Return the path of a hidden folder beside `path` that no other call returns."""
    token = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{token}.partial")


_PARTIAL = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial", re.DOTALL
)


def name_of_partial(name: str) -> str | None:
    """Return the name of the file that a hidden folder of `replace_file` belongs to, or None."""
    match = _PARTIAL.fullmatch(name)
    return match["name"] if match else None


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left of `replace_file`, of one file or all."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = _PARTIAL.fullmatch(entry.name)
            if match is None or match["name"] != (name or match["name"]):
                continue
            is_dead = match["host"] == _host() and not _is_alive(match["pid"])
            if is_dead and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)


def _host() -> str:
    """Return eight hexadecimal digits for the machine, or container, that runs this."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_alive(pid: str) -> bool:
    """Return whether a process of that number may run."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _as_disk_error(error: Exception, path: Path, folder: Path) -> Exception:
    """Return an OSError about `path` for an error of the disk in any form; else the error."""
    if isinstance(error, OSError):
        names = [os.fspath(name) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(str(name).startswith(str(folder)) for name in names):
            return error  # of something else
        number, reason = error.errno, error.strerror or str(error)
    else:  # libraries in Rust write the number into the sentence
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            return error
        number = int(match[1])
        reason = os.strerror(number)
    return OSError(number or errno.EIO, reason, str(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, as `replace_file` does."""
    with replace_file(path) as new:
        new.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, with sorted keys."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_bytes(path, text.encode())


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


_HOLDER = "process"  # a lock file is empty or begins so
_LOCKED_ERRNOS = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


@contextlib.contextmanager
def hold_lock(path: Path, *, subject: str) -> Iterator[None]:
    """Hold the lock file `path`, or raise BlockingIOError if another process holds it.

    `subject` begins the sentence of the error. The file is deleted when the block ends; a
    process that was killed holds no lock. Warns if the file system has no locks. Raises OSError if
    `path` is a link, no regular file, or a file that no lock made, which then stays as it is.
    """
    file = _open_locked(path, subject=subject)
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock file stays empty
            file.truncate(0)
            file.write(f"{_HOLDER} {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield
    finally:
        # Deleted before it is unlocked, so that a process that opened it meanwhile can tell.
        suppress = contextlib.suppress(OSError)
        with suppress, contextlib.closing(file), contextlib.suppress(OSError):
            path.unlink()


def _open_locked(path: Path, *, subject: str) -> BinaryIO:
    """Return the open and locked file of that path, not one that its last holder just deleted."""
    while True:
        file = _open_lock(path)
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


def _open_lock(path: Path) -> BinaryIO:
    """Open a lock file, made where there is none; refuse a link and any other file."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        message = "A link stands where the lock belongs; remove it"
        raise OSError(error.errno, message, str(path)) from error
    if stat.S_ISREG(os.fstat(handle).st_mode):
        file = os.fdopen(handle, "a+b")
        file.seek(0)
        if file.read(len(_HOLDER)) in (b"", _HOLDER.encode()):
            return file
        file.close()
    else:
        os.close(handle)
    raise FileExistsError(
        errno.EEXIST, "Another file stands where the lock belongs; move it", str(path)
    )


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
