"""`transform_to` and `open_embeddings`: one run over a source, and its result."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from skembed._files import hold_lock
from skembed._inputs import TextColumns
from skembed._validation import (
    check_bool,
    check_choice,
    check_int,
    check_string,
    import_optional,
    list_items,
    parameter_error,
)
from skembed.exceptions import SkembedWarning
from skembed.inference.encoder import Encoder, warn_truncated
from skembed.inference.engine import NUMERICS_VERSION
from skembed.inference.settings import OWNER, SIDES
from skembed.progress import progress_bar
from skembed.streaming.manifest import Manifest, read_manifest, write_manifest
from skembed.streaming.sources import (
    ID_COLUMN,
    Block,
    TextSource,
    check_block,
    extend_digest,
    open_source,
)
from skembed.streaming.targets import (
    ParquetTarget,
    Target,
    explain_write_error,
    find_target,
    make_target,
)

__all__ = ["METHOD", "ROWS_PER_SHARD", "StreamReport", "open_embeddings", "write_embeddings"]

METHOD = f"{OWNER}.transform_to"
ROWS_PER_SHARD = 16_384  # two chunks of the engine; 25 MB at 384 dimensions, 268 MB at 4,096
_PACKAGES = ("skembed", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class StreamReport:
    """Result of one call of `transform_to`.

    Parameters
    ----------
    path : Path
        The folder of Parquet files, or the .npy file.
    n_rows : int
        Rows of the whole set.
    dim : int
        Width of a row.
    n_shards : int
        Shards of the whole set.
    n_skipped : int
        Rows that an earlier call had embedded and whose texts have not changed.
    """

    path: Path
    n_rows: int
    dim: int
    n_shards: int
    n_skipped: int


def write_embeddings(
    encoder: Encoder,
    X: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None,
    column: str | Sequence[str] | None,
    keep_columns: Sequence[str],
    ids: Iterable[Any] | None,
    side: str,
    rows_per_shard: int,
    embedding_column: str,
    use_cache: bool,
    overwrite: bool,
) -> StreamReport:
    """Do the work of `NVEmbedVectorizer.transform_to` for the encoder of a vectorizer."""
    rows = check_int(rows_per_shard, name="rows_per_shard", owner=METHOD, low=1)
    side = check_choice(side, name="side", owner=METHOD, allowed=SIDES)
    use_cache = check_bool(use_cache, name="use_cache", owner=METHOD)
    overwrite = check_bool(overwrite, name="overwrite", owner=METHOD)
    embedding_column = check_string(embedding_column, name="embedding_column", owner=METHOD)
    target = make_target(path, format, embedding_column=embedding_column, owner=METHOD)
    keep = _check_keep(keep_columns, ids, target)
    source = open_source(X, column=column, keep_columns=keep, ids=ids, owner=METHOD)
    target.prepare(owner=METHOD)
    encoder = encoder if use_cache else replace(encoder, cache=None)
    run = _Run(encoder, source, target, side=side, rows=rows)
    try:
        with hold_lock(target.lock_path, subject=f"{str(target.path)!r}"):
            run.begin(overwrite=overwrite)
            report = run.read()
    finally:
        target.tidy()
    max_length = encoder.settings.parameters.max_length
    warn_truncated(run.n_truncated, run.n_embedded, max_length, stacklevel=4)
    return report


class _Run:
    """One call of `transform_to`, inside the lock."""

    def __init__(
        self,
        encoder: Encoder,
        source: TextSource,
        target: Target,
        *,
        side: str,
        rows: int,
    ) -> None:
        self.encoder = encoder
        self.source = source
        self.target = target
        self.sides = (side, "document")  # the second for pairs only
        self.rows = rows
        self.stored: Manifest | None = None
        self.manifest: Manifest | None = None
        self.digest = b""
        self.n_skipped = self.n_truncated = self.n_embedded = 0

    def begin(self, *, overwrite: bool) -> None:
        """Read the manifest if there is one; refuse what no call of `transform_to` wrote."""
        self.stored = read_manifest(self.target.manifest_path, layout=self.target.layout)
        foreign = self.target.find_foreign(self.stored)
        if foreign:
            names = ", ".join(map(repr, foreign[:5])) + (", ..." if len(foreign) > 5 else "")
            manifest = "no manifest" if self.stored is None else "a manifest that does not name it"
            raise ValueError(
                f"The `path` parameter of `{METHOD}` must be new, empty, or written by an earlier "
                f"call; {str(self.target.path)!r} has {manifest}, but {names}. Nothing was "
                "changed. Choose another path, or move what is there."
            )
        if overwrite and self.stored is not None:
            self.target.clear(self.stored)
            self.stored = None

    def read(self) -> StreamReport:
        """Go through the source: compare complete shards, embed all others."""
        parameters = self.encoder.settings.parameters
        start, index = 0, -1
        total = self.source.n_rows
        with progress_bar(parameters.verbose, total=total, unit="text", desc="streaming") as bar:
            for index, block in enumerate(self.source.read(self.rows)):
                columns = check_block(block, start, owner=METHOD, missing=parameters.missing)
                self.digest = extend_digest(self.digest, columns, block.carried)
                manifest = self.manifest or self._start(block, columns)
                self._check_width(manifest, start, len(columns.columns))
                if not self._is_done(manifest, index, start, columns):
                    self._embed(manifest, index, start, columns, block.carried)
                start += len(columns.columns[0])
                bar.update(len(columns.columns[0]))
        return self._finish(index + 1, start)

    def _start(self, block: Block, columns: TextColumns) -> Manifest:
        """Return the manifest to go on with: a new one, or the stored one if it fits."""
        settings = self._describe_settings(block, columns)
        origin = self._describe_origin()
        if self.stored is None:
            budget = self.encoder.settings.parameters.batch_tokens
            self.manifest = Manifest(
                settings, origin, batch_tokens=budget if isinstance(budget, int) else None
            )
            self._save(self.manifest, 0)
            return self.manifest
        self.manifest = self.stored
        differences = self.manifest.explain_differences(settings)
        if differences:
            raise ValueError(
                f"The `path` parameter of `{METHOD}` must be new, or hold embeddings made the same "
                f"way; {str(self.target.path)!r} holds some with {'; '.join(differences)}. Nothing "
                "was changed. Use the same parameters, another path, or overwrite=True to begin "
                "anew."
            )
        self.manifest.settings = settings
        self._warn_other_versions(self.stored.origin, origin)
        self.target.drop_after(self.manifest)
        return self.manifest

    def _check_width(self, manifest: Manifest, start: int, n_columns: int) -> None:
        """Refuse a source that changes from texts to pairs, or back, between two blocks."""
        before = manifest.settings["text_columns"]
        if n_columns != before:
            raise ValueError(
                f"The `X` parameter of `{METHOD}` must hold either texts or pairs of texts; "
                f"X[{start}] begins rows of {n_columns} texts, those before have {before}. Make "
                "every row a pair, or none."
            )

    def _describe_settings(self, block: Block, columns: TextColumns) -> dict[str, Any]:
        """Return everything that decides vectors and files."""
        encoding = self.encoder.settings
        n_columns = len(columns.columns)
        if n_columns > 1 and self.sides[0] != "query":
            raise ValueError(
                f"The `side` parameter of `{METHOD}` must be 'query' for pairs, which are embedded "
                f"as a query and a document; got {self.sides[0]!r}."
            )
        settings: dict[str, Any] = {
            "layout": self.target.layout,
            "fingerprint": encoding.model.full_key.fingerprint,
            "pooling": encoding.model.key.pooling,
            "dtype": encoding.model.key.dtype,
            "numerics": NUMERICS_VERSION,
            "prefixes": [encoding.requests[side].prefix for side in self.sides[:n_columns]],
            "max_length": encoding.parameters.max_length,
            "dim": encoding.dim * n_columns,
            "normalize": encoding.parameters.normalize,
            "missing": encoding.parameters.missing,
            "rows_per_shard": self.rows,
            "text_columns": n_columns,
            "columns": [],
        }
        if isinstance(self.target, ParquetTarget):
            fields = [] if block.carried is None else block.carried.schema
            carried = [[field.name, str(field.type)] for field in fields]
            settings["columns"] = [*carried, [self.target.embedding_column, "float32"]]
        return settings

    def _describe_origin(self) -> dict[str, Any]:
        """Return names and versions, which decide nothing but the last bits."""
        model, parameters = self.encoder.settings.model, self.encoder.settings.parameters
        packages = [*_PACKAGES, "pyarrow"] if self.target.layout == "parquet" else _PACKAGES
        return {
            "model": model.source.name,
            "revision": model.source.revision,
            "instruction": parameters.instruction,
            "document_instruction": parameters.document_instruction,
            "side": self.sides[0],
            "truncate_dim": parameters.truncate_dim,
            "device": model.key.device.partition(":")[0],
            "versions": {name: metadata.version(name) for name in packages},
        }

    def _warn_other_versions(self, stored: dict[str, Any], origin: dict[str, Any]) -> None:
        """Warn if the rest may differ from what is stored in the last bits."""
        then = {**stored["versions"], "device": stored["device"]}
        now = {**origin["versions"], "device": origin["device"]}
        changed = [f"{n} {then.get(n)} (now {v})" for n, v in now.items() if then.get(n) != v]
        if changed:
            warnings.warn(
                f"The embeddings in {str(self.target.path)!r} were begun with "
                f"{', '.join(changed)}. The rest may differ in the last bits; overwrite=True "
                "starts over.",
                SkembedWarning,
                stacklevel=6,
            )

    def _is_done(self, manifest: Manifest, index: int, start: int, columns: TextColumns) -> bool:
        """Return whether a shard is complete and undamaged; raise if the source changed."""
        n_rows = len(columns.columns[0])
        if index >= len(manifest.shards):
            if manifest.is_closed:
                raise self._changed(f"it goes on after {start} rows, where it ended then")
            return False
        entry = manifest.shards[index]
        if entry["rows"] != n_rows:
            if n_rows > entry["rows"]:
                ended = start + entry["rows"]
                raise self._changed(f"it goes on after {ended} rows, where it ended then")
            raise self._changed(
                f"it ends after {start + n_rows} rows, of {manifest.n_rows} that were embedded"
            )
        if entry["source"] != self.digest.hex():
            raise self._changed(
                f"rows {start} to {start + n_rows - 1} are not those that shard {index} was made of"
            )
        damage = self.target.find_damage(start * manifest.settings["dim"] * 4, entry)
        if damage is None:
            self.n_skipped += n_rows
            return True
        warnings.warn(
            f"Shard {index} of {str(self.target.path)!r} (rows {start} to {start + n_rows - 1}) is "
            f"damaged: {damage}. It is embedded again.",
            SkembedWarning,
            stacklevel=5,
        )
        manifest.complete = False
        return False

    def _changed(self, how: str) -> ValueError:
        """Return the error of a source that has changed."""
        again = " A generator must start at its first row again." if self.source.is_one_shot else ""
        return ValueError(
            f"The source has changed since {str(self.target.path)!r} was begun: {how}. No row of "
            f"both was mixed.{again} Give the same rows in the same order, write to another path, "
            "or start over with overwrite=True."
        )

    def _embed(
        self, manifest: Manifest, index: int, start: int, columns: TextColumns, carried: Any
    ) -> None:
        """Embed one block, write it, and name it in the manifest."""
        # All shards alike: on a GPU, "auto" would follow the memory that is free just then.
        budget = manifest.batch_tokens
        vectors, done = self.encoder.embed(columns, self.sides, batch_tokens=budget, progress=False)
        manifest.batch_tokens = budget or done.batch_tokens or None
        self.n_truncated += done.n_truncated
        self.n_embedded += done.n_embedded
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        try:
            offset = start * manifest.settings["dim"] * 4
            entry = self.target.write(index, offset, vectors, carried)
        except OSError as error:
            raise explain_write_error(error, self.target, index, start) from error
        manifest.shards[index : index + 1] = [
            {
                "rows": len(vectors),
                **entry,
                "source": self.digest.hex(),
                "truncated": done.n_truncated,
                "missing": sum(int(mask.sum()) for mask in columns.missing),
            }
        ]
        self._save(manifest, index)

    def _save(self, manifest: Manifest, index: int) -> None:
        """Write the manifest; if that fails, the shard does not count."""
        try:
            write_manifest(self.target.manifest_path, manifest)
        except OSError as error:
            start = index * manifest.settings["rows_per_shard"]
            raise explain_write_error(error, self.target, index, start) from error

    def _finish(self, n_shards: int, n_rows: int) -> StreamReport:
        """Mark the set as complete; return what the call did."""
        manifest = self.manifest
        if manifest is None:  # a source gives one block at least
            raise RuntimeError(f"`{METHOD}` read no block; please report this.")
        if n_shards < len(manifest.shards):
            raise self._changed(
                f"it ends after {n_rows} rows, of {manifest.n_rows} that were embedded"
            )
        try:
            damage = self.target.finish(manifest)
        except OSError as error:
            raise explain_write_error(error, self.target, n_shards, n_rows) from error
        if damage:
            warnings.warn(
                f"The embeddings in {str(self.target.path)!r} were damaged: {damage}. That is "
                "mended; no text was embedded again for it.",
                SkembedWarning,
                stacklevel=5,
            )
        if not manifest.complete:
            manifest.complete = True
            self._save(manifest, n_shards)
        dim = manifest.settings["dim"]
        return StreamReport(self.target.path, n_rows, dim, n_shards, self.n_skipped)


def _check_keep(keep_columns: Any, ids: Any, target: Target) -> list[str]:
    """Return the names of the columns to carry along; only Parquet has room for them."""
    columns = list_items(keep_columns)
    if columns is None or not all(isinstance(column, str) for column in columns):
        expected, kind = "a list of column names", TypeError
        raise parameter_error(
            keep_columns, name="keep_columns", owner=METHOD, expected=expected, kind=kind
        )
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise ValueError(
            f"The `keep_columns` parameter of `{METHOD}` must name each column once; got "
            f"{repeated[0]!r} again."
        )
    for name, given in (("keep_columns", bool(columns)), ("ids", ids is not None)):
        if given and target.layout == "npy":
            raise ValueError(
                f"The `{name}` parameter of `{METHOD}` needs format='parquet': a .npy file has no "
                "room for it. Its rows are in the order of the source."
            )
    if isinstance(target, ParquetTarget) and target.embedding_column in columns:
        raise ValueError(
            f"The `embedding_column` parameter of `{METHOD}` must be no column of `keep_columns`; "
            f"got {target.embedding_column!r}."
        )
    is_taken = isinstance(target, ParquetTarget) and target.embedding_column == ID_COLUMN
    if is_taken and ids is not None:
        raise ValueError(
            f"The `embedding_column` parameter of `{METHOD}` must differ from {ID_COLUMN!r}, the "
            "column of `ids`. Choose another name."
        )
    return columns


def open_embeddings(path: str | os.PathLike[str], *, verify: bool = False) -> Any:
    """Open what `NVEmbedVectorizer.transform_to` wrote, after a check of its manifest.

    Parameters
    ----------
    path : str or path
        The folder or the .npy file.
    verify : bool, default=False
        Also read every byte and compare the checksums of the shards.

    Returns
    -------
    ndarray of float32, shape (n_rows, dim), or pyarrow.dataset.Dataset
        A .npy file as an array mapped from disk, read-only. Parquet as a data set of the shards
        that the manifest names, in order, with a column of lists of `dim` float32.

    Raises
    ------
    FileNotFoundError
        If there is no manifest.
    ValueError
        If the run has not finished, the manifest is damaged, or a file is missing, cut short, of
        other rows or columns, or (with `verify`) changed.
    ImportError
        If Parquet is to be read and pyarrow is not installed.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer, open_embeddings
    >>> done = NVEmbedVectorizer().transform_to(["a cat", "a dog"], "animals.npy")
    >>> open_embeddings("animals.npy", verify=True).shape
    (2, 384)
    """
    check_bool(verify, name="verify", owner="open_embeddings")
    target = find_target(path, owner="open_embeddings")
    manifest = read_manifest(target.manifest_path, layout=target.layout)
    if manifest is None or not manifest.complete or not target.path.exists():
        n_rows = 0 if manifest is None else manifest.n_rows
        raise ValueError(
            f"The embeddings in {str(target.path)!r} are not complete: {n_rows} rows are there. "
            "Call `transform_to` again with the same source and parameters to finish them."
        )
    damage = _find_damage(target, manifest, verify=verify)
    if damage is not None:
        raise ValueError(
            f"The embeddings in {str(target.path)!r} are damaged: {damage}. Call `transform_to` "
            "again with the same source and parameters to mend them."
        )
    if isinstance(target, ParquetTarget):
        dataset = import_optional(
            "pyarrow.dataset", extra="stream", purpose="Opening embeddings in Parquet"
        )
        files = [str(target.path / entry["file"]) for entry in manifest.shards]
        return dataset.dataset(files, format="parquet")
    # What has no elements cannot be mapped.
    return np.load(target.path, mmap_mode="r" if manifest.n_rows else None, allow_pickle=False)


def _find_damage(target: Target, manifest: Manifest, *, verify: bool) -> str | None:
    """Return the first damage of a complete set; None for nothing."""
    offset = 0
    for entry in manifest.shards:
        damage = target.find_damage(offset, entry, verify=verify)
        if damage is not None:
            return damage
        offset += entry["rows"] * manifest.settings["dim"] * 4
    return target.find_other_content(manifest)
