"""Folders that `NVEmbedVectorizer.save_pretrained` writes and `from_pretrained` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skembed.adapters.adapter import Adapter, merge_adapter
from skembed.inference.settings import OWNER, ResolvedModel, Settings, name_base
from skembed.model.checkpoint import iterate_tensors, save_checkpoint
from skembed.model.sources import CONFIG_FILE, resolve_source

__all__ = ["SAVED_PARAMETERS", "SETTINGS_FILE", "read_settings", "save_vectorizer"]

SETTINGS_FILE = "skembed.json"
# Saved beside the weights: what belongs to the model's use, not to this machine.
SAVED_PARAMETERS = (
    "instruction",
    "document_instruction",
    "instruction_template",
    "max_length",
    "truncate_dim",
    "normalize",
    "missing",
)


def save_vectorizer(settings: Settings, path: str | os.PathLike[str], *, merge: bool) -> None:
    """Write an adapter's folder, or the whole model's: frozen, or the adapter merged into it."""
    resolved, parameters = settings.model, settings.parameters
    source, adapter = resolved.source, resolved.adapter
    folder = Path(path).expanduser()
    if folder.exists() and folder.resolve() in (source.folder, source.adapter_folder):
        raise ValueError(
            f"The `path` parameter of `{OWNER}.save_pretrained` must be another folder than "
            f"the one the model is read from; got {str(path)!r}."
        )
    saved = {name: getattr(parameters, name) for name in SAVED_PARAMETERS}
    if adapter is not None and not merge:
        _save_adapter(adapter, resolved, folder, {**saved, "pooling": parameters.pooling})
        return
    tensors = iterate_tensors(source, resolved.config)
    save_checkpoint(
        folder,
        config=resolved.config,
        tensors=tensors if adapter is None else merge_adapter(adapter, tensors),
        tokenizer_folder=source.folder,
        extra={SETTINGS_FILE: saved},
    )


def _save_adapter(
    adapter: Adapter, resolved: ResolvedModel, folder: Path, settings: dict[str, Any]
) -> None:
    """Write the adapter alone, in peft's format; the base model is named, not copied."""
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"The `path` parameter of `{OWNER}.save_pretrained` names a folder that holds "
            f"a whole model ({CONFIG_FILE}); got {str(folder)!r}. Pass an empty folder for "
            "the adapter, or merge=True."
        )
    adapter.save(
        folder,
        base_name=name_base(resolved.source),
        base_revision=resolved.source.revision,
        pooling_kind=resolved.config.pooling,
        extra={SETTINGS_FILE: settings},
    )


def read_settings(path: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    """Return the parameters saved in a model's folder; empty where it has none."""
    source = resolve_source(path, revision)
    settings = (source.adapter_folder or source.folder) / SETTINGS_FILE
    return json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
