"""A saved index: arrays as .npy files in a folder, and a manifest that names them.

The manifest is replaced last and in one step, and only the files it names count. So a folder holds
the old index or the new one, never a mixture, wherever writing stops. Files that no manifest names
were left by a killed process; the next writer, which holds the lock, removes them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skembed._files import (
    check_fields,
    find_inside,
    hold_lock,
    name_of_partial,
    read_manifest,
    write_json,
)
from skembed._validation import describe_type
from skembed.search.saved_array import Array, SavedArray, read_array, write_array

__all__ = [
    "MANIFEST_FILE",
    "Array",
    "SavedIndex",
    "pack_strings",
    "read_index",
    "unpack_strings",
    "write_index",
]

MANIFEST_FILE = "manifest.json"
_LOCK_FILE = ".skembed-index.lock"
_FORMAT = "skembed-index"
_VERSION = 2
_ADVICE = "Rebuild the index."
_FIELDS = {"settings": dict, "files": dict, "crc32": int}
_ENTRY_FIELDS = {"file": str, "bytes": int, "dtype": str, "shape": list, "crc32": str}
_ARRAY_FILE = re.compile(r"[a-z.]+-[0-9a-f]{12}\.skembed\.npy")


@dataclass(frozen=True, eq=False)
class SavedIndex:
    """The settings and the arrays of an index in a folder, each right in itself."""

    folder: Path
    settings: dict[str, Any]
    arrays: dict[str, SavedArray]

    def read(self, name: str, dtype: str, *, n_axes: int = 1) -> Array:
        """Return an array of this type, checked; raise ValueError if it is none or damaged."""
        if name not in self.arrays:
            raise self.damaged(f"it has no {name}")
        values = self.arrays[name].values
        if values.dtype != np.dtype(dtype) or values.ndim != n_axes:
            raise self.damaged(f"its {name} are {values.dtype} of shape {values.shape}")
        return self.arrays[name].read()

    def damaged(self, reason: str) -> ValueError:
        """Return the error of parts that do not fit each other."""
        reason = reason.rstrip(" .")
        return ValueError(f"The index in {str(self.folder)!r} is damaged: {reason}. {_ADVICE}")


def write_index(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    arrays: Mapping[str, Array],
    *,
    owner: str,
) -> None:
    """Write an index to a folder in one step, instead of an index that it may hold.

    Raises ValueError if the folder holds other files, BlockingIOError while another process writes
    there, OSError if it cannot be written; an index that it held is then intact.
    """
    folder = _read_path(path, owner=owner)
    _find_files(folder, owner=owner)  # refused before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / _LOCK_FILE, subject=f"The index in {str(folder)!r}"):
        old_files = _find_files(folder, owner=owner)
        _remove_all_but(folder, old_files)
        try:
            _write_files(folder, settings, arrays)
        except OSError as error:
            state = "The old index is still whole. " if old_files else ""
            raise OSError(
                error.errno,
                f"The index cannot be written ({error.strerror or error}). {state}Free some space, "
                "or choose another folder",
                str(folder),
            ) from error
        finally:
            with contextlib.suppress(OSError, ValueError):
                _remove_all_but(folder, _find_files(folder, owner=owner))


def _write_files(folder: Path, settings: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write arrays under new names, and then the manifest."""
    token = secrets.token_hex(6)
    files = {
        name: write_array(folder / f"{name}-{token}.skembed.npy", array)
        for name, array in arrays.items()
    }
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": dict(settings),
        "files": files,
    }
    write_json(folder / MANIFEST_FILE, {**manifest, "crc32": _sum_manifest(manifest)})


def read_index(
    path: str | os.PathLike[str], *, owner: str, mmap: bool = True, verify: bool = False
) -> SavedIndex:
    """Return an index, its arrays mapped from disk or read.

    Of mapped arrays only the first block is checked here, unless `verify`. Raises FileNotFoundError
    if there is no index, ValueError if it is damaged or of another version.
    """
    folder = _read_path(path, owner=owner)
    while True:
        manifest = _read_manifest(folder)
        try:
            arrays = {
                name: _open_array(folder, entry, is_mapped=mmap)
                for name, entry in manifest["files"].items()
            }
        except ValueError:
            if _read_manifest(folder)["files"] == manifest["files"]:
                raise
            continue  # another process has saved meanwhile, and removed the old files
        for array in arrays.values() if verify else ():
            array.check()
        return SavedIndex(folder, manifest["settings"], arrays)


def pack_strings(strings: Array) -> dict[str, Array]:
    """Return strings as bytes of UTF-8 and where each one ends, for a file without pickles."""
    parts = [text.encode("utf-8", "surrogatepass") for text in strings.tolist()]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {"characters": np.frombuffer(b"".join(parts), dtype=np.uint8), "ends": ends}


def unpack_strings(characters: Array, ends: Array) -> Array:
    """Return the strings that `pack_strings` packed, (n,), object; ValueError if they are none."""
    data, stops = characters.tobytes(), [0, *ends.tolist()]
    if stops[-1] != len(data) or (np.diff(stops) < 0).any():
        raise ValueError("the ends of its ids do not follow each other")
    strings = np.empty(len(ends), dtype=object)
    parts = zip(stops[:-1], stops[1:], strict=True)
    try:
        if data.isascii():
            text = data.decode()
            strings[:] = [text[start:stop] for start, stop in parts]
        else:
            strings[:] = [
                data[start:stop].decode("utf-8", "surrogatepass") for start, stop in parts
            ]
    except UnicodeDecodeError:
        raise ValueError("its ids are no text in UTF-8") from None
    return strings


def _read_path(path: str | os.PathLike[str], *, owner: str) -> Path:
    """Return the folder that a parameter names."""
    subject = f"The `path` parameter of `{owner}` must be the name of a folder"
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{subject}; got {describe_type(path)}.")
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"{subject}; got {str(path)!r:.100}.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(f"{subject}; got {str(path)!r:.100} ({error}).") from error


def _find_files(folder: Path, *, owner: str) -> set[str]:
    """Return the array files of the index in a folder, none where it is new or empty.

    Raises ValueError for a folder of other files, or of an index that cannot be read.
    """
    subject = f"The `path` parameter of `{owner}` must be a new or empty folder, or one that holds"
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        if not folder.exists():
            return set()
        if not folder.is_dir():
            raise ValueError(f"{subject} an index; got the file {str(folder)!r}.") from None
        foreign = sorted(name for name in os.listdir(folder) if not _is_ours(name))
        if foreign:
            raise ValueError(
                f"{subject} an index; got {str(folder)!r}, which holds {foreign[0]!r}."
            ) from None
        return set()
    except ValueError as error:
        raise ValueError(
            f"{subject} an index that can be read. {error} Delete the folder, or choose another."
        ) from error
    return {entry["file"] for entry in manifest["files"].values()}


def _is_ours(name: str) -> bool:
    """Return whether a file is what a writer that was killed may leave."""
    return (
        name == _LOCK_FILE
        or _ARRAY_FILE.fullmatch(name) is not None
        or name_of_partial(name) == MANIFEST_FILE
    )


def _remove_all_but(folder: Path, files: set[str]) -> None:
    """Delete arrays of an index but these; on Windows one in use stays, for the next writer."""
    with os.scandir(folder) as entries:
        arrays = [e for e in entries if _ARRAY_FILE.fullmatch(e.name) and e.name not in files]
    for entry in arrays:
        if entry.is_file(follow_symlinks=False):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; FileNotFoundError where there is none, ValueError if it is damaged."""
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"There is no index in {str(folder)!r}: it has no {MANIFEST_FILE}. Write one with "
            "`Retriever.save`."
        )
    subject = f"The index in {str(folder)!r} is damaged: {MANIFEST_FILE}"
    if path.is_symlink():
        find_inside(folder, MANIFEST_FILE, subject=subject)
    manifest = read_manifest(path, kind="index", form=_FORMAT, version=_VERSION, advice=_ADVICE)
    check_fields(manifest, _FIELDS, subject=subject, advice=_ADVICE)
    for name, entry in manifest["files"].items():
        where = f"{subject}, in its entry {name!r:.40},"
        check_fields(entry, _ENTRY_FIELDS, subject=where, advice=_ADVICE)
        if _ARRAY_FILE.fullmatch(entry["file"]) is None:
            raise ValueError(
                f"{where} must name a file of an index; got {entry['file']!r:.100}. {_ADVICE}"
            )
    if _sum_manifest(manifest) != manifest["crc32"]:
        raise ValueError(
            f"{subject} was changed after it was written: its checksum is wrong. {_ADVICE}"
        )
    return manifest


def _sum_manifest(manifest: Mapping[str, Any]) -> int:
    """Return the checksum of a manifest's content."""
    content = {name: value for name, value in manifest.items() if name != "crc32"}
    try:
        return zlib.crc32(json.dumps(content, sort_keys=True).encode())
    except RecursionError:  # what was just read may be too deep to be written
        return -1


def _open_array(folder: Path, entry: dict[str, Any], *, is_mapped: bool) -> SavedArray:
    """Return one array; raise ValueError if its file is damaged."""
    damaged = f"The index in {str(folder)!r} is damaged: {entry['file']}"
    path = folder / entry["file"]
    if path.is_symlink():
        path = find_inside(folder, entry["file"], subject=damaged)
    try:
        return read_array(path, entry, is_mapped=is_mapped, damaged=damaged)
    except FileNotFoundError:
        raise ValueError(f"{damaged} is missing. {_ADVICE}") from None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ELOOP):
            raise
        raise ValueError(f"{damaged} is not a file. {_ADVICE}") from error
