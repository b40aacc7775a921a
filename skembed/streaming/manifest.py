"""The manifest of streamed embeddings: their settings, origin and complete shards.

It is replaced in one step after every shard. It holds neither times nor names of processes: after
any number of interruptions its bytes are those of an undisturbed run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skembed._files import write_bytes

__all__ = ["Manifest", "read_manifest", "write_manifest"]

_FORMAT = "skembed-embeddings"
_VERSION = 1
# Setting -> what it is called in an error.
_MEANINGS = {
    "layout": "format",
    "fingerprint": "model (fingerprint)",
    "pooling": "pooling",
    "dtype": "dtype of the model",
    "numerics": "numerics version of skembed",
    "prefixes": "instruction",
    "max_length": "max_length",
    "dim": "truncate_dim (width)",
    "normalize": "normalize",
    "missing": "missing",
    "rows_per_shard": "rows_per_shard",
    "text_columns": "number of text columns",
    "columns": "set of columns carried along",
}
_SHARD_KEYS = {"rows", "bytes", "sha256", "source", "truncated", "missing"}


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
        for name, meaning in _MEANINGS.items():
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


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest, None where there is no file.

    Raises ValueError if it is damaged, foreign, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"The manifest {str(path)!r} is damaged: it is not JSON ({error}). Start over with "
            "overwrite=True, or write to another path."
        ) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"The file {str(path)!r} is not a manifest of embeddings of skembed.")
    if values.get("version") != _VERSION:
        raise ValueError(
            f"The manifest {str(path)!r} is of version {values.get('version')}; this skembed reads "
            f"version {_VERSION}. Install the skembed that wrote it, or start over."
        )
    try:
        return _to_manifest(values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The manifest {str(path)!r} is damaged: an entry is missing or of the wrong kind "
            f"({error}). Start over with overwrite=True, or write to another path."
        ) from error


def _to_manifest(values: dict[str, Any]) -> Manifest:
    """Build the manifest; KeyError or TypeError where a part is missing."""
    names = ("settings", "origin", "shards", "batch_tokens", "complete")
    manifest = Manifest(**{name: values[name] for name in names})
    absent = set(_MEANINGS) - set(manifest.settings)
    for shard in manifest.shards:
        absent |= _SHARD_KEYS - set(shard)
    if absent:
        raise KeyError(*sorted(absent))
    return manifest
