"""Folders that `NVEmbedVectorizer.save_pretrained` writes and `from_pretrained` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from skembed.adapters.adapter import Adapter, merge_adapter
from skembed.inference.card import SAVED_PARAMETERS
from skembed.inference.settings import OWNER, ResolvedModel, Settings, name_base
from skembed.model.checkpoint import iterate_tensors, save_checkpoint
from skembed.model.sources import (
    BUNDLED_MODELS,
    CONFIG_FILE,
    PROMPTS_FILE,
    SETTINGS_FILE,
)

__all__ = ["save_vectorizer"]


def save_vectorizer(settings: Settings, path: str | os.PathLike[str], *, merge: bool) -> None:
    """Write an adapter's folder, or the whole model's: frozen, or the adapter merged into it."""
    resolved = settings.model
    source, adapter = resolved.source, resolved.adapter
    if isinstance(path, str) and path in BUNDLED_MODELS:
        raise ValueError(
            f"The `path` parameter of `{OWNER}.save_pretrained` must not be the name of a bundled "
            f"model, which `model` would take instead; got {path!r}."
        )
    folder = Path(path).expanduser()
    if folder.exists() and folder.resolve() in (source.folder, source.adapter_folder):
        raise ValueError(
            f"The `path` parameter of `{OWNER}.save_pretrained` must be another folder than "
            f"the one the model is read from; got {str(path)!r}."
        )
    extra = _describe_use(settings)
    if adapter is not None and not merge:
        _save_adapter(adapter, resolved, folder, extra)
        return
    tensors = iterate_tensors(source, resolved.config)
    save_checkpoint(
        folder,
        config=resolved.config,
        tensors=tensors if adapter is None else merge_adapter(adapter, tensors),
        tokenizer_folder=source.folder,
        extra=extra,
    )


def _describe_use(settings: Settings) -> dict[str, Any]:
    """Return the JSON files, by name, that say how the model is to be used.

    Prompts of the folder that it was read from go into a file of sentence-transformers again, as
    a task text cannot express them.
    """
    saved = {name: getattr(settings.parameters, name) for name in SAVED_PARAMETERS}
    saved["instructions"] = settings.learned
    prompts = settings.prompts
    if "query" in prompts:
        del saved["instruction"]
    is_open = "document_instruction" in settings.automatic
    if is_open and saved["document_instruction"] is None:
        del saved["document_instruction"]  # a task named later may bring its own
    if not prompts:
        return {SETTINGS_FILE: saved}
    default = "text" if "text" in prompts else None
    theirs = {"prompts": dict(prompts), "default_prompt_name": default}
    return {SETTINGS_FILE: saved, PROMPTS_FILE: theirs}


def _save_adapter(
    adapter: Adapter, resolved: ResolvedModel, folder: Path, extra: dict[str, Any]
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
        extra=extra,
    )
