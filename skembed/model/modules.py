"""What sentence-transformers' files in a model's folder say of pooling, scaling and attention.

A causal embedder is refused: the bidirectional forward pass would give other vectors than the
model's own, without an error. Its files decide, and its name where they are silent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skembed._files import find_inside, read_file, read_json
from skembed.exceptions import CheckpointError

__all__ = [
    "CAUSAL_MODELS",
    "MODULES_FILE",
    "MODULE_FILES",
    "Modules",
    "find_pooling",
    "read_modules",
    "read_object",
    "refuse_causal",
    "refuse_causal_name",
]

_LIST_BYTES = 1 << 20
MODULES_FILE = "modules.json"
_POOLING_CONFIG = "1_Pooling/config.json"
MODULE_FILES = (MODULES_FILE, _POOLING_CONFIG)
# Mistral embedders whose attention is causal, by hub id.
CAUSAL_MODELS = (
    "intfloat/e5-mistral-7b-instruct",
    "Salesforce/SFR-Embedding-Mistral",
    "Salesforce/SFR-Embedding-2_R",
    "Linq-AI-Research/Linq-Embed-Mistral",
    "BAAI/bge-en-icl",
)
_CAUSAL_NAME = re.compile(r"e5-mistral|sfr-embedding|linq-embed|bge-en-icl|echo-mistral", re.I)
_RUN = ("Transformer", "Pooling", "Normalize", "Dropout")  # dropout does nothing in use
_OLD_MODES = {  # flags of older files
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_CAUSAL_MODES = ("lasttoken", "weightedmean")  # they make sense only where the last token sees all
_POOLINGS = {"mean": "mean", "lasttoken": "eos"}


@dataclass(frozen=True)
class Modules:
    """The modules of a sentence-transformers folder."""

    modes: tuple[str, ...]  # of the pooling; more than one are concatenated
    normalize: bool | None  # None where there is no modules.json


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; empty where there is none.

    Raises CheckpointError for anything else.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}. Copy the folder again.") from error


def read_modules(folder: Path) -> Modules:
    """Return what modules.json and the pooling's file say; raise CheckpointError if they can't be.

    Modules that skembed does not run, such as a Dense layer, are refused.
    """
    entries = _read_entries(folder / MODULES_FILE)
    kinds = [str(entry["type"]).rpartition(".")[2] for entry in entries or ()]
    foreign = sorted(set(kinds) - set(_RUN))
    if foreign:
        raise CheckpointError(
            f"{folder / MODULES_FILE} names modules that skembed does not run: "
            f"{', '.join(foreign)}. Its vectors would be others; pass a SentenceTransformer of the "
            "folder as the `vectorizer` of an estimator."
        )
    pooling = _POOLING_CONFIG
    for kind, entry in zip(kinds, entries or (), strict=True):
        if kind == "Pooling":
            where = f"The path of the pooling in {folder / MODULES_FILE}"
            place = find_inside(folder, entry.get("path"), subject=where, error=CheckpointError)
            pooling = f"{place.relative_to(folder).as_posix()}/config.json"
    values = read_object(folder / pooling)
    named = values.get("pooling_mode")
    modes = [mode for flag, mode in _OLD_MODES.items() if values.get(flag) is True]
    if named is not None:
        modes = list(named) if isinstance(named, list) else [named]
    normalize = None if entries is None else "Normalize" in kinds
    return Modules(tuple(map(str, modes)), normalize)


def _read_entries(path: Path) -> list[dict[str, Any]] | None:
    """Return the list in a modules.json; None where there is no such file."""
    try:
        entries = json.loads(read_file(path, limit=_LIST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON. Copy the folder again.") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries
    ):
        raise CheckpointError(f"{path} must hold a list of objects, each with a `type`.")
    return entries


def find_pooling(modules: Modules, folder: Path) -> str | None:
    """Return the pooling of skembed that the files of a plain Mistral ask for; None for none.

    Raises CheckpointError for one that skembed does not compute.
    """
    if not modules.modes:
        return None
    mode = modules.modes[0] if len(modules.modes) == 1 else "+".join(modules.modes)
    if mode not in _POOLINGS:
        raise CheckpointError(
            f"The pooling in {folder} must be one of {list(_POOLINGS)}; got {mode!r:.60}. Pass the "
            "`pooling` parameter, or another model."
        )
    return _POOLINGS[mode]


def refuse_causal_name(name: str) -> None:
    """Raise CheckpointError for the hub id of a causal model, before it is downloaded."""
    known = {each.casefold(): each for each in CAUSAL_MODELS}
    if name.casefold() in known:
        raise _refusal(name, "it is known by its name")


def refuse_causal(name: str, folder: Path, config: Mapping[str, Any], modules: Modules) -> None:
    """Raise CheckpointError for a Mistral model that attends to earlier tokens only.

    `config` is its config.json. What the files say goes before the name.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for field, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
            value = section.get(field)
            if value is not None and not isinstance(value, bool):
                raise CheckpointError(
                    f"The `{field}` in the config.json of {folder} must be true or false; got "
                    f"{value!r:.60}."
                )
            if value is causal:
                said = "true" if causal else "false"
                raise _refusal(name, f"its config.json has {field}: {said}")
            if value is not None:
                return
    if config.get("model_type") != "mistral":  # NV-Embed's layout is bidirectional
        return
    mode = next((mode for mode in modules.modes if mode in _CAUSAL_MODES), None)
    if mode is not None:
        raise _refusal(name, f"its pooling is {mode!r}")
    original = config.get("_name_or_path")
    for each in (name, original if isinstance(original, str) else ""):
        parts = each.replace("\\", "/").rstrip("/").split("/")
        cached = [part for part in parts if part.startswith("models--")]  # of the hub's cache
        if any(_CAUSAL_NAME.search(part) for part in (parts[-1], *cached)):
            raise _refusal(name, f"{each!r} is such a model's name")


def _refusal(name: str, reason: str) -> CheckpointError:
    """Return the error for a causal model."""
    return CheckpointError(
        f"The model {name!r} is a causal Mistral embedder ({reason}). skembed runs Mistral with "
        "the bidirectional attention of NV-Embed only, and would give other vectors than the "
        "model's own. Pass SentenceTransformer(...) of sentence-transformers as the `vectorizer` "
        "of an estimator, or take 'nvidia/NV-Embed-v2'."
    )
