"""Targets of streamed embeddings: numbered Parquet files, or one .npy file.

A shard is complete before the manifest names it. The next run overwrites or removes what a killed
process leaves beyond the manifest; nobody reads it. What others put there is refused, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from skembed._files import (
    name_of_partial,
    open_file,
    remove_leftovers,
    replace_file,
    sync_folder,
)
from skembed._validation import check_choice, check_path, import_optional
from skembed.streaming.manifest import Manifest, name_shard

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
_SHARD = re.compile(r"part-\d+\.parquet")
_STAMP = {b"skembed": b"a shard of transform_to"}  # in the metadata of each
_FOOTER_BYTES = 1 << 20
_HEADER_BYTES = 128
_UNFINISHED = b"skembed: embeddings that are not complete.".ljust(_HEADER_BYTES - 1) + b"\n"
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

    def find_foreign(self, manifest: Manifest | None) -> list[str]:
        """Return names that no run leaves: any without a manifest, else of shards beyond it."""
        names = sorted(path.name for path in self.path.iterdir())
        if manifest is None:
            return [n for n in names if n != _LOCK_FILE and not _is_partial(n)]
        known = {name_shard(index) for index in range(len(manifest.shards))}
        following = self._find_unnamed(manifest)
        return [n for n in names if _SHARD.fullmatch(n) and n not in known and n != following]

    def _find_unnamed(self, manifest: Manifest) -> str | None:
        """Return the shard that a run had written when it was killed, before it was named."""
        name = name_shard(len(manifest.shards))
        return name if not manifest.is_closed and _is_stamped(self.path / name) else None

    def clear(self, manifest: Manifest) -> None:
        """Remove the shards, and the manifest last: without it they would count as foreign."""
        self.drop_after(manifest)
        for index in range(len(manifest.shards)):
            (self.path / name_shard(index)).unlink(missing_ok=True)
        self.manifest_path.unlink(missing_ok=True)

    def drop_after(self, manifest: Manifest) -> None:
        """Remove what killed runs left beyond the manifest."""
        unnamed = self._find_unnamed(manifest)
        if unnamed:
            (self.path / unnamed).unlink(missing_ok=True)
        for name in filter(_is_partial, os.listdir(self.path)):
            remove_leftovers(self.path, name_of_partial(name))

    def tidy(self) -> None:
        """Remove the folder if nothing was written to it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def find_damage(self, offset: int, entry: Entry, *, verify: bool = True) -> str | None:
        """Return what is wrong with a shard's file; None for nothing."""
        path = self.path / entry["file"]
        problem = _find_no_file(path)
        if problem:
            return problem
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size} bytes instead of {entry['bytes']}"
        if verify and _hash_range(path, 0, size) != entry["sha256"]:
            return f"{path.name} is not what was written (its SHA-256 differs)"
        return None

    def find_other_content(self, manifest: Manifest) -> str | None:
        """Return what the files say, other than the manifest; None for nothing."""
        parquet = import_optional(
            "pyarrow.parquet", extra="stream", purpose="Opening embeddings in Parquet"
        )
        names = [name for name, _ in manifest.settings["columns"]]
        width = f"fixed_size_list<element: float>[{manifest.settings['dim']}]"
        first = None
        for entry in manifest.shards:
            try:
                with open_file(self.path / entry["file"]) as file:
                    shard = parquet.ParquetFile(file)
                    schema, n_rows = shard.schema_arrow, shard.metadata.num_rows
                    first = first or schema
                    is_same = schema.names == names and schema.types == first.types
                    is_same &= str(schema.types[-1]) == width
            except Exception as error:  # of many classes; pyarrow's words are about its own parts
                return f"{entry['file']} cannot be read as Parquet ({type(error).__name__})"
            if n_rows != entry["rows"]:
                return f"{entry['file']} has {n_rows} rows instead of {entry['rows']}"
            if not is_same:
                return f"{entry['file']} has other columns than the manifest says"
        return None

    def write(self, index: int, offset: int, vectors: Array, carried: Any) -> Entry:
        """Write one shard, vectors (n, dim) beside the columns carried along."""
        path = self.path / name_shard(index)
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
        table = table.replace_schema_metadata(_STAMP)
        # Not for the embeddings: to a compressor and to a dictionary they are noise.
        return table, {
            "compression": dict.fromkeys(names, "zstd"),
            "use_dictionary": names,
            "write_statistics": names,
            "row_group_size": max(1, table.num_rows),
        }

    def finish(self, manifest: Manifest) -> str | None:
        """Do nothing: the manifest makes the set complete."""
        return None


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

    def find_foreign(self, manifest: Manifest | None) -> list[str]:
        """Return the names of files that no run leaves: any without a manifest."""
        there = [path for path in (self.path, self.partial) if os.path.lexists(path)]
        if manifest is None:
            return [path.name for path in there]
        if len(there) == 2:  # a run has one or the other
            return [self.partial.name if manifest.complete else self.path.name]
        return [path.name for path in there if not self._is_own(path, manifest)]

    def _is_own(self, path: Path, manifest: Manifest) -> bool:
        """Return whether a file begins as a run leaves it, or holds a shard of the manifest."""
        if _find_no_file(path):
            return False
        with open_file(path) as file:
            head = file.read(_HEADER_BYTES)
        whole = _make_header(manifest.n_rows, manifest.settings["dim"])
        if _UNFINISHED.startswith(head) or whole.startswith(head):
            return True
        offset = 0
        for entry in manifest.shards:
            if entry["rows"] and self.find_damage(offset, entry) is None:
                return True
            offset += entry["bytes"]
        return False

    def clear(self, manifest: Manifest) -> None:
        """Remove array, and the manifest last: without it the array would count as foreign."""
        for path in (self.path, self.partial, self.manifest_path):
            path.unlink(missing_ok=True)

    def drop_after(self, manifest: Manifest) -> None:
        """Cut off what the manifest does not name."""
        size = _HEADER_BYTES + manifest.count("bytes")
        with contextlib.suppress(FileNotFoundError):
            if self.partial.stat().st_size > size:
                os.truncate(self.partial, size)

    def tidy(self) -> None:
        """Do nothing: the file has no folder of its own."""

    def find_damage(self, offset: int, entry: Entry, *, verify: bool = True) -> str | None:
        """Return what is wrong with a shard's rows, which begin at byte `offset` of all rows."""
        path = self.partial if self.partial.exists() else self.path
        problem = _find_no_file(path)
        if problem:
            return problem
        end, size = _HEADER_BYTES + offset + entry["bytes"], path.stat().st_size
        if size < end:
            return f"{path.name} has {size} bytes instead of {end} or more"
        start = _HEADER_BYTES + offset
        if verify and _hash_range(path, start, entry["bytes"]) != entry["sha256"]:
            return f"{path.name} is not what was written (the SHA-256 of a shard differs)"
        return None

    def find_other_content(self, manifest: Manifest) -> str | None:
        """Return what the file says, other than the manifest; None for nothing."""
        problem = _find_no_file(self.path)
        if problem:
            return problem
        header = _make_header(manifest.n_rows, manifest.settings["dim"])
        with open_file(self.path) as file:
            if file.read(_HEADER_BYTES) != header:
                return f"{self.path.name} has another header (shape or type) than was written"
            size, expected = os.fstat(file.fileno()).st_size, len(header) + manifest.count("bytes")
        return None if size == expected else f"{self.path.name} has {size} bytes, not {expected}"

    def write(self, index: int, offset: int, vectors: Array, carried: Any) -> Entry:
        """Write the rows of one shard, (n, dim), at their offset."""
        if self.path.exists() and not self.partial.exists():  # complete once, and damaged since
            self.path.replace(self.partial)
        data = np.ascontiguousarray(vectors, dtype="<f4").reshape(-1).view(np.uint8).data
        with _open_new(self.partial, keep=True) as file:
            file.write(_UNFINISHED)
            file.seek(_HEADER_BYTES + offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def finish(self, manifest: Manifest) -> str | None:
        """Write the header and rename the file to its path; return damage that this mends."""
        damage = None
        if not self.partial.exists():  # renamed already, before the manifest could say so
            damage = self.find_other_content(manifest)
            if damage is None:
                return None
            self.path.replace(self.partial)
        header = _make_header(manifest.n_rows, manifest.settings["dim"])
        with _open_new(self.partial, keep=True) as file:
            file.write(header)
            file.truncate(len(header) + manifest.count("bytes"))
            file.flush()
            os.fsync(file.fileno())
        self.partial.replace(self.path)
        sync_folder(self.path.parent)
        return damage


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
    return written == _MANIFEST_FILE or bool(written and _SHARD.fullmatch(written))


def _is_stamped(path: Path) -> bool:
    """Return whether a file is a Parquet file that a run wrote."""
    if _find_no_file(path):
        return False
    with open_file(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _FOOTER_BYTES))
        footer = file.read()
    return footer.endswith(b"PAR1") and all(part in footer for part in next(iter(_STAMP.items())))


def _find_no_file(path: Path) -> str | None:
    """Return why there is no regular file of that very path; None if there is one."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    return None if stat.S_ISREG(mode) else f"{path.name} is a link, or no regular file"


def _open_new(path: Path, *, keep: bool = False) -> BinaryIO:
    """Open a file to write, empty or (with `keep`) as it is; never through a link or to a pipe."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0) | (0 if keep else os.O_TRUNC)
    return os.fdopen(os.open(path, flags, 0o666), "r+b")


def _hash_range(path: Path, start: int, size: int) -> str:
    """Return the SHA-256 of a part of a file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
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
