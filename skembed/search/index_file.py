"""A saved index: arrays as .npy files in a folder, and a manifest that names them.

The manifest is replaced last and in one step, and only the files it names count. So a folder holds
the old index or the new one, never a mixture, wherever writing stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._files import write_json

__all__ = ["Array", "MANIFEST_FILE", "pack_strings", "read_index", "unpack_strings", "write_index"]

MANIFEST_FILE = "manifest.json"
_FORMAT = "skembed-index"
_VERSION = 1

Array = npt.NDArray[Any]


def write_index(
    path: str | os.PathLike[str], settings: Mapping[str, Any], arrays: Mapping[str, Array]
) -> None:
    """Write an index to a folder in one step, instead of an index that it may hold.

    Raises ValueError if the folder holds other files, OSError if it cannot be written; an index
    that it held is then intact.
    """
    folder = Path(path).expanduser()
    token = secrets.token_hex(6)
    files = {name: f"{name}-{token}.npy" for name in arrays}
    old_files = _check_target(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {name: _write_array(folder / files[name], arrays[name]) for name in arrays}
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": dict(settings),
            "files": {name: {"file": files[name], "bytes": sizes[name]} for name in arrays},
        }
        write_json(folder / MANIFEST_FILE, manifest)
    except BaseException as error:
        _delete(folder, files.values())
        if isinstance(error, OSError):
            state = "The old index is still whole. " if old_files else ""
            raise OSError(
                error.errno,
                f"The index cannot be written ({error.strerror or error}). {state}Free some space, "
                "or choose another folder",
                str(folder),
            ) from error
        raise
    _delete(folder, old_files)


def read_index(
    path: str | os.PathLike[str], *, mmap: bool = True
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the settings and the arrays of an index, the arrays mapped from disk or read.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or of another version.
    """
    folder = Path(path).expanduser()
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(
            f"There is no index in {str(folder)!r}: it has no {MANIFEST_FILE}. Write one with "
            "`Retriever.save`."
        )
    manifest = _read_manifest(folder)
    arrays = {
        name: _read_array(folder / entry["file"], entry["bytes"], mmap=mmap)
        for name, entry in manifest["files"].items()
    }
    return manifest["settings"], arrays


def pack_strings(strings: Array) -> dict[str, Array]:
    """Return strings as bytes of UTF-8 and where each one ends, for a file without pickles."""
    parts = [text.encode("utf-8", "surrogatepass") for text in strings.tolist()]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {"characters": np.frombuffer(b"".join(parts), dtype=np.uint8), "ends": ends}


def unpack_strings(characters: Array, ends: Array) -> Array:
    """Return the strings that `pack_strings` packed, (n,), object."""
    data, stops = characters.tobytes(), [0, *ends.tolist()]
    strings = np.empty(len(ends), dtype=object)
    for i, (start, stop) in enumerate(zip(stops[:-1], stops[1:], strict=True)):
        strings[i] = data[start:stop].decode("utf-8", "surrogatepass")
    return strings


def _check_target(folder: Path) -> list[str]:
    """Return the files of the index in the folder; none if the folder is new or empty."""
    if (folder / MANIFEST_FILE).is_file():
        with contextlib.suppress(ValueError):  # a damaged index may be replaced; its files stay
            return [entry["file"] for entry in _read_manifest(folder)["files"].values()]
        return []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            "The `path` parameter of `Retriever.save` must be a new or empty folder, or one that "
            f"holds an index; got {str(folder)!r}."
        )
    return []


def _write_array(path: Path, array: Array) -> int:
    """Write an array to a new file and flush it to the disk; return the file's size."""
    with path.open("xb") as file:
        np.save(file, np.asarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; raise ValueError if it is damaged or of another version."""
    damaged = f"The index in {str(folder)!r} is damaged: {MANIFEST_FILE}"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{damaged} is not JSON ({error}). Rebuild the index.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(
            f"The folder {str(folder)!r} holds no index of skembed, but another {MANIFEST_FILE}."
        )
    if manifest.get("version") != _VERSION:
        raise ValueError(
            f"The index in {str(folder)!r} is of version {manifest.get('version')}; this skembed "
            f"reads version {_VERSION}. Install the skembed that wrote it, or rebuild the index."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"{damaged} lists no files or no settings. Rebuild the index.")
    for entry in files.values():
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name or "bytes" not in entry:
            raise ValueError(f"{damaged} has a bad entry. Rebuild the index.")
    return manifest


def _read_array(path: Path, size: int, *, mmap: bool) -> Array:
    """Return one array; raise ValueError if its file is damaged."""
    damaged = f"The index in {str(path.parent)!r} is damaged: {path.name}"
    if not path.is_file():
        raise ValueError(f"{damaged} is missing. Rebuild the index.")
    n_bytes = path.stat().st_size
    if n_bytes != size:
        raise ValueError(f"{damaged} has {n_bytes} bytes instead of {size}. Rebuild the index.")
    try:
        array = np.load(path, allow_pickle=False)[...] if not mmap else _map_array(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{damaged} is not an array ({error}). Rebuild the index.") from error
    return np.asarray(array)


def _map_array(path: Path) -> Array:
    """Return an array mapped read-only; an empty one cannot be mapped and is read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


def _delete(folder: Path, files: Iterable[str]) -> None:
    """Delete files that no manifest names any more; one in use may stay."""
    for name in files:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
