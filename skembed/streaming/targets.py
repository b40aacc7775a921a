"""Targets of streamed embeddings: numbered Parquet files, or one .npy file.

A shard is complete before the manifest names it. The next run overwrites or removes what a killed
process leaves beyond the manifest; nobody reads it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from skembed._files import name_of_partial, remove_leftovers, replace_file, sync_folder
from skembed._validation import check_choice, check_path, import_optional

__all__ = [
    "Array",
    "ArrayTarget",
    "Entry",
    "LAYOUTS",
    "ParquetTarget",
    "Target",
    "explain_write_error",
    "find_target",
    "make_target",
]

LAYOUTS = ("parquet", "npy")
_MANIFEST_FILE = "_manifest.json"  # readers of Parquet folders skip names that begin with "_"
_LOCK_FILE = ".lock"
_SHARD = re.compile(r"part-(\d{6,})\.parquet")
_WRITTEN = re.compile(r"part-\d{6,}\.parquet|_manifest\.json")
_HEADER_BYTES = 128
_ITEM_BYTES = 4
_READ_BYTES = 1 << 20

Array = npt.NDArray[np.float32]
Entry = dict[str, Any]


class ParquetTarget:
    """A folder of Parquet files ``part-000000.parquet``, ...; each is renamed once complete."""

    layout = "parquet"

    def __init__(self, folder: Path, embedding_column: str = "embedding") -> None:
        self.path = folder
        self.embedding_column = embedding_column
        self.manifest_path = folder / _MANIFEST_FILE
        self.lock_path = folder / _LOCK_FILE

    def prepare(self, *, owner: str) -> None:
        """Make the folder; raise ValueError if the path is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"The `path` parameter of `{owner}` must be a folder for format='parquet'; got "
                f"the file {str(self.path)!r}."
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def find_foreign(self) -> list[str]:
        """Return names that no run without a manifest leaves."""
        names = (path.name for path in self.path.iterdir())
        return sorted(n for n in names if n != _LOCK_FILE and not _is_partial(n))

    def clear(self) -> None:
        """Remove shards, and the manifest last: without it the shards would count as foreign."""
        self.drop_after(0, 0)
        self.manifest_path.unlink(missing_ok=True)

    def drop_after(self, n_shards: int, n_bytes: int) -> None:
        """Remove what no manifest names: later shards and partial files."""
        for path in list(self.path.iterdir()):
            shard = _SHARD.fullmatch(path.name)
            if shard and int(shard[1]) >= n_shards:
                path.unlink(missing_ok=True)
        remove_leftovers(self.path)

    def tidy(self) -> None:
        """Remove the folder if nothing was written to it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def find_damage(self, offset: int, entry: Entry, *, verify: bool = True) -> str | None:
        """Return what is wrong with a shard's file; None for nothing."""
        path = self.path / str(entry["file"])
        if not path.is_file():
            return f"{path.name} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size} bytes instead of {entry['bytes']}"
        if verify and _hash_range(path, 0, size) != entry["sha256"]:
            return f"{path.name} is not what was written (its SHA-256 differs)"
        return None

    def write(self, index: int, offset: int, vectors: Array, carried: Any) -> Entry:
        """Write one shard, vectors (n, dim) beside the columns carried along."""
        path = self.path / f"part-{index:06d}.parquet"
        table, options = self._make_table(vectors, carried)
        parquet = import_optional(
            "pyarrow.parquet", extra="stream", purpose="Writing embeddings as Parquet"
        )
        with replace_file(path) as partial:
            with _open_new(partial) as file:
                parquet.write_table(table, file, **options)
            size = partial.stat().st_size
            return {"file": path.name, "bytes": size, "sha256": _hash_range(partial, 0, size)}

    def _make_table(self, vectors: Array, carried: Any) -> tuple[Any, dict[str, Any]]:
        """Return the table of a shard, and how its columns are stored."""
        pa = import_optional("pyarrow", extra="stream", purpose="Writing embeddings as Parquet")
        names = [] if carried is None else list(carried.column_names)
        flat = pa.array(vectors.reshape(-1), type=pa.float32())
        rows = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        columns = [*(carried.column(name) for name in names), rows]
        table = pa.table(dict(zip([*names, self.embedding_column], columns, strict=True)))
        # Not for the embeddings: to a compressor and to a dictionary they are noise.
        return table, {
            "compression": dict.fromkeys(names, "zstd"),
            "use_dictionary": names,
            "write_statistics": names,
            "row_group_size": max(1, table.num_rows),
        }

    def finish(self, n_rows: int, dim: int) -> None:
        """Do nothing: the manifest makes the set complete."""


class ArrayTarget:
    """One .npy file, written beside its path and renamed once complete."""

    layout = "npy"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.manifest_path = path.with_name(f"{path.name}.manifest.json")
        self.lock_path = path.with_name(f"{path.name}.lock")

    def prepare(self, *, owner: str) -> None:
        """Make the folder around the file; raise ValueError if the path is a folder."""
        if self.path.is_dir():
            raise ValueError(
                f"The `path` parameter of `{owner}` must be a file for format='npy'; got the "
                f"folder {str(self.path)!r}."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def find_foreign(self) -> list[str]:
        """Return the names of the files, which are foreign without a manifest."""
        return [path.name for path in (self.path, self.partial) if path.exists()]

    def clear(self) -> None:
        """Remove array, and the manifest last: without it the array would count as foreign."""
        for path in (self.path, self.partial, self.manifest_path):
            path.unlink(missing_ok=True)

    def drop_after(self, n_shards: int, n_bytes: int) -> None:
        """Cut off what the manifest does not name."""
        with contextlib.suppress(FileNotFoundError):
            if self.partial.stat().st_size > _HEADER_BYTES + n_bytes:
                os.truncate(self.partial, _HEADER_BYTES + n_bytes)

    def tidy(self) -> None:
        """Do nothing: the file has no folder of its own."""

    def find_damage(self, offset: int, entry: Entry, *, verify: bool = True) -> str | None:
        """Return what is wrong with a shard's rows, which begin at byte `offset` of all rows."""
        path = self.partial if self.partial.exists() else self.path
        if not path.is_file():
            return f"{path.name} is missing"
        end, size = _HEADER_BYTES + offset + entry["bytes"], path.stat().st_size
        if size < end:
            return f"{path.name} has {size} bytes instead of {end} or more"
        start = _HEADER_BYTES + offset
        if verify and _hash_range(path, start, entry["bytes"]) != entry["sha256"]:
            return f"{path.name} is not what was written (the SHA-256 of a shard differs)"
        return None

    def write(self, index: int, offset: int, vectors: Array, carried: Any) -> Entry:
        """Write the rows of one shard, (n, dim), at their offset."""
        if self.path.exists() and not self.partial.exists():  # complete once, and damaged since
            self.path.replace(self.partial)
        data = np.ascontiguousarray(vectors, dtype="<f4").reshape(-1).view(np.uint8).data
        with _open_new(self.partial, keep=True) as file:
            file.seek(_HEADER_BYTES + offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def finish(self, n_rows: int, dim: int) -> None:
        """Write the header and rename the file to its path."""
        if not self.partial.exists():  # renamed already, before the manifest could say so
            return
        with _open_new(self.partial, keep=True) as file:
            file.write(_make_header(n_rows, dim))
            file.truncate(_HEADER_BYTES + n_rows * dim * _ITEM_BYTES)
            file.flush()
            os.fsync(file.fileno())
        self.partial.replace(self.path)
        sync_folder(self.path.parent)


Target = ParquetTarget | ArrayTarget


def make_target(path: Any, layout: str | None, *, embedding_column: str, owner: str) -> Target:
    """Return the target to write; without `layout`, a path that ends in .npy is a file."""
    absolute = _check_path(path, owner=owner)
    check_choice(layout, name="format", owner=owner, allowed=(None, *LAYOUTS))
    if layout == "npy" or (layout is None and absolute.suffix == ".npy"):
        return ArrayTarget(absolute)
    import_optional("pyarrow", extra="stream", purpose="Writing embeddings as Parquet")
    return ParquetTarget(absolute, embedding_column)


def find_target(path: Any, *, owner: str) -> Target:
    """Return the target that was written; raise FileNotFoundError if there is no manifest."""
    absolute = _check_path(path, owner=owner)
    targets: tuple[Target, ...] = (ParquetTarget(absolute), ArrayTarget(absolute))
    for target in targets:
        if target.manifest_path.is_file():
            return target
    raise FileNotFoundError(
        errno.ENOENT,
        "There are no embeddings with a manifest. Write them with `NVEmbedVectorizer.transform_to`",
        str(absolute),
    )


def explain_write_error(error: OSError, target: Target, index: int, n_rows: int) -> OSError:
    """Return the error of a write with what was lost, what was kept, and how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else (error.strerror or str(error))
    step = "Free some space" if full else "Mend that"
    return OSError(
        error.errno,
        f"Shard {index} of the embeddings cannot be written: {reason}. The {n_rows} rows before "
        f"it are kept. {step}, and call `transform_to` again with the same source and parameters: "
        "it goes on there",
        str(target.path),
    )


def _check_path(path: Any, *, owner: str) -> Path:
    """Return the absolute path; raise TypeError or ValueError for anything else."""
    text = check_path(path, name="path", owner=owner)
    return Path(os.path.abspath(os.path.expanduser(text)))


def _is_partial(name: str) -> bool:
    """Return whether a name is that of an unfinished shard or manifest."""
    written = name_of_partial(name)
    return written is not None and _WRITTEN.fullmatch(written) is not None


def _open_new(path: Path, *, keep: bool = False) -> BinaryIO:
    """Open a file to write, empty or (with `keep`) as it is."""
    if not keep:
        return path.open("wb")
    path.touch()
    return path.open("r+b")


def _hash_range(path: Path, start: int, size: int) -> str:
    """Return the SHA-256 of a part of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while size > 0 and (part := file.read(min(size, _READ_BYTES))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


def _make_header(n_rows: int, dim: int) -> bytes:
    """Return the header of a .npy file; numpy pads it to one size for any number of rows."""
    header = io.BytesIO()
    values = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, dim)}
    np.lib.format.write_array_header_1_0(header, values)
    return header.getvalue()
