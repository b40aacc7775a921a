"""The manifest of streamed embeddings: their settings, origin and complete shards.

It is replaced in one step after every shard. It holds neither times nor names of processes: after
any number of interruptions its bytes are those of an undisturbed run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from skembed import _files
from skembed._files import check_fields, write_bytes

__all__ = ["Manifest", "name_shard", "read_manifest", "write_manifest"]

_FORMAT = "skembed-embeddings"
_VERSION = 1
# Setting -> its type, and what it is called in an error.
_SETTINGS: dict[str, tuple[type, str]] = {
    "layout": (str, "format"),
    "fingerprint": (str, "model (fingerprint)"),
    "pooling": (str, "pooling"),
    "dtype": (str, "dtype of the model"),
    "numerics": (int, "numerics version of skembed"),
    "prefixes": (list, "instruction"),
    "max_length": (int, "max_length"),
    "dim": (int, "truncate_dim (width)"),
    "normalize": (bool, "normalize"),
    "missing": (str, "missing"),
    "rows_per_shard": (int, "rows_per_shard"),
    "text_columns": (int, "number of text columns"),
    "columns": (list, "set of columns carried along"),
}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "complete": bool,
    "n_rows": int,
    "n_truncated": int,
    "n_missing": int,
    "batch_tokens": (int, type(None)),
    "settings": dict,
    "origin": dict,
    "shards": list,
}
_SHARD: dict[str, type] = {
    "rows": int,
    "bytes": int,
    "sha256": str,
    "source": str,
    "truncated": int,
    "missing": int,
}
_HASH = re.compile("[0-9a-f]{64}")
_DIGEST = re.compile("[0-9a-f]{32}")
_MAX_DIM = 1 << 24
_ADVICE = "Move it away together with its files, or write to another path."


@dataclass
class Manifest:
    """Settings, origin and complete shards of a set of embeddings.

    Of each complete shard, in order: rows, bytes, sha256, the digest of the source up to its end,
    and its texts that were truncated or missing; the file's name where it has its own.
    """

    settings: dict[str, Any]  # what decides vectors and files; must be equal to go on
    origin: dict[str, Any]  # names and versions, for readers; of the run that began
    shards: list[dict[str, Any]] = field(default_factory=list)
    batch_tokens: int | None = None  # of the first shard, which all others take
    complete: bool = False  # the source was read to its end

    @property
    def n_rows(self) -> int:
        """Rows of all complete shards."""
        return self.count("rows")

    @property
    def is_closed(self) -> bool:
        """Whether no shard can follow: the last one is not full, or the run came to its end."""
        full = self.settings["rows_per_shard"]
        return self.complete or bool(self.shards and self.shards[-1]["rows"] < full)

    def count(self, name: str) -> int:
        """Return the sum of one figure over the shards."""
        return sum(int(shard[name]) for shard in self.shards)

    def to_json(self) -> str:
        """Return the manifest with one shard a line."""
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "complete": self.complete,
            "n_rows": self.n_rows,
            "n_truncated": self.count("truncated"),
            "n_missing": self.count("missing"),
            "batch_tokens": self.batch_tokens,
            "settings": self.settings,
            "origin": self.origin,
        }
        lines = ",\n".join(f"    {json.dumps(shard)}" for shard in self.shards)
        return f'{json.dumps(head, indent=2)[:-2]},\n  "shards": [\n{lines}\n  ]\n}}\n'

    def explain_differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Return each setting that differs, in words; `missing` may be eased after an error."""
        differences = []
        for name, (_, meaning) in _SETTINGS.items():
            then, now = self.settings.get(name), settings.get(name)
            is_eased = name == "missing" and then == "error"
            if then != now and not is_eased:
                differences.append(f"another {meaning} ({_show(then)} there, {_show(now)} now)")
        return differences


def _show(value: Any) -> str:
    """Return a setting as it stands in an error."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step, through to the disk."""
    write_bytes(path, manifest.to_json().encode())


def read_manifest(path: Path, *, layout: str) -> Manifest | None:
    """Return the manifest of embeddings of that layout, None where there is no file.

    Raises ValueError if it is damaged, foreign, or of another version.
    """
    try:
        values = _files.read_manifest(
            path, kind="set of embeddings", form=_FORMAT, version=_VERSION, advice=_ADVICE
        )
    except FileNotFoundError:
        return None
    subject = f"The manifest {str(path)!r}"
    check = partial(check_fields, subject=subject, advice=_ADVICE)
    check(values, _FIELDS)
    check(values["settings"], {name: kind for name, (kind, _) in _SETTINGS.items()})
    check(values["origin"], {"versions": dict, "device": str})
    shard_fields = _SHARD | ({"file": str} if layout == "parquet" else {})
    for index, shard in enumerate(values["shards"]):
        check(shard, shard_fields, subject=f"{subject}, shard {index}:")
    names = ("settings", "origin", "shards", "batch_tokens", "complete")
    manifest = Manifest(**{name: values[name] for name in names})
    problem = _find_contradiction(values, manifest, layout)
    if problem:
        raise ValueError(f"{subject} is damaged: {problem}. {_ADVICE}")
    return manifest


def name_shard(index: int) -> str:
    """Return the name of a shard's file, where it has its own."""
    return f"part-{index:06d}.parquet"


def _find_contradiction(values: dict[str, Any], manifest: Manifest, layout: str) -> str | None:
    """Return what cannot be in a manifest of `transform_to`; None for nothing."""
    settings, shards = manifest.settings, manifest.shards
    dim, full, columns = settings["dim"], settings["rows_per_shard"], settings["columns"]
    if settings["layout"] != layout:
        return f"it is of format {settings['layout']!r:.40}, in the place of one of {layout!r}"
    if not (1 <= dim <= _MAX_DIM and full >= 1 and settings["text_columns"] >= 1):
        return "its width, rows a shard or number of text columns is impossible"
    if manifest.batch_tokens == 0:
        return "its token budget is 0"
    if not all(isinstance(c, list) and [type(part) for part in c] == [str, str] for c in columns):
        return "its columns are no pairs of name and type"
    if layout == "parquet" and (not columns or columns[-1][1] != "float32"):
        return "its last column is not that of the embeddings"
    for name in ("rows", "truncated", "missing"):
        if values[f"n_{name}"] != manifest.count(name):
            return f"its shards do not add up to {values[f'n_{name}']} ({name})"
    for index, shard in enumerate(shards):
        is_last = index == len(shards) - 1
        if shard["rows"] > full or (shard["rows"] < full and not is_last):
            return f"shard {index} has {shard['rows']} rows, of {full} a shard"
        if not _HASH.fullmatch(shard["sha256"]) or not _DIGEST.fullmatch(shard["source"]):
            return f"shard {index} has a checksum that is none"
        if layout == "npy" and shard["bytes"] != shard["rows"] * dim * 4:
            return f"shard {index} has {shard['bytes']} bytes for {shard['rows']} rows"
        if layout == "parquet" and shard["file"] != name_shard(index):
            return f"shard {index} is said to lie in {shard['file']!r:.100}"
    return "it is complete without a shard" if manifest.complete and not shards else None
