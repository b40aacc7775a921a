"""What a model's folder says of its use: the values of "auto", and whether it knows instructions.

skembed.json goes first, then sentence-transformers' files; what an adapter's folder says goes
before its base model's. A file can set what is listed here and nothing else: no path, no device.
Other keys are ignored, so that a later release may add some.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skembed._inputs import MISSING_POLICIES, replace_surrogates
from skembed._validation import check_bool, check_choice, check_int
from skembed.exceptions import CheckpointError
from skembed.instructions import check_template, is_task_name, resolve_instruction
from skembed.model.config import NVEmbedConfig
from skembed.model.modules import read_modules, read_object
from skembed.model.sources import (
    CONFIG_FILE,
    LENGTH_FILE,
    PROMPTS_FILE,
    SETTINGS_FILE,
    ModelSource,
)

__all__ = [
    "AUTO",
    "AUTO_DEFAULTS",
    "ModelCard",
    "SAVED_PARAMETERS",
    "is_auto",
    "read_card",
    "read_settings",
]

logger = logging.getLogger(__name__)

AUTO = "auto"
# Of each parameter that may be "auto": its value where the folder says nothing.
AUTO_DEFAULTS: Mapping[str, Any] = {
    "instruction": None,
    "document_instruction": None,
    "instruction_template": "Instruct: {instruction}\nQuery: ",
    "max_length": 512,
    "truncate_dim": None,
    "normalize": True,
}
SAVED_PARAMETERS = (*AUTO_DEFAULTS, "missing")
_LEARNED = "instructions"  # the key that says whether the model learned any
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first there is, as in their library


@dataclass(frozen=True)
class ModelCard:
    """What a folder says; empty where it says nothing."""

    values: Mapping[str, Any] = field(default_factory=dict)  # of parameters
    prompts: Mapping[str, str] = field(default_factory=dict)  # whole text in front, by side
    learned: bool | None = None  # whether the model learned instructions

    def over(self, base: ModelCard) -> ModelCard:
        """Return this card with what it leaves open taken from another one."""
        sides = {"text": "instruction", "query": "instruction", "document": "document_instruction"}
        prompts = {s: p for s, p in base.prompts.items() if sides[s] not in self.values}
        values = {**base.values, **self.values}
        for side in self.prompts:
            values.pop(sides[side], None)
        learned = base.learned if self.learned is None else self.learned
        return ModelCard(values, {**prompts, **self.prompts}, learned)

    def fill(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of each parameter that is "auto" among those given."""
        values = {
            name: self.values.get(name, default)
            for name, default in AUTO_DEFAULTS.items()
            if is_auto(given[name])
        }
        task = values.get("instruction", given["instruction"])
        is_open = "document_instruction" not in self.values and "document" not in self.prompts
        if "document_instruction" in values and is_open and is_task_name(task):
            values["document_instruction"] = task  # a known task has both of its sides
        return values

    def find_prompts(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the folder's own prompts, by side, that no given parameter replaces."""
        prompts = dict(self.prompts)
        if "text" in prompts:
            prompts.setdefault("query", prompts["text"])
        owners = {"instruction": ("text", "query"), "document_instruction": ("document",)}
        for name, sides in owners.items():
            if not is_auto(given[name]):
                for side in sides:
                    prompts.pop(side, None)
        return prompts


def is_auto(value: Any) -> bool:
    """Return whether a parameter leaves its value to the model's folder."""
    return isinstance(value, str) and value == AUTO


def read_card(source: ModelSource, config: NVEmbedConfig) -> ModelCard:
    """Return what the folder of a model, and of its adapter, says; raises CheckpointError.

    NV-Embed's own folders, which have its architecture and no skembed.json, learned instructions;
    so did a model whose folder has prompts.
    """
    card = _read_folder(source.folder, config)
    kind = read_object(source.folder / CONFIG_FILE).get("model_type")
    is_original = kind == "nvembed" and not (source.folder / SETTINGS_FILE).is_file()
    card = card.over(ModelCard(learned=is_original))
    if source.adapter_folder is None or source.adapter_folder == source.folder:
        return card
    return _read_folder(source.adapter_folder, config).over(card)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a skembed.json says, checked as parameters are; empty where there is none.

    Raises CheckpointError naming the file and the key.
    """
    path = folder / SETTINGS_FILE
    values = read_object(path)
    ignored = sorted(values.keys() - {*SAVED_PARAMETERS, _LEARNED})
    if ignored:
        logger.debug("%s: ignored %s", path, ", ".join(ignored))
    try:
        return {
            name: _check_value(name, values[name], path) for name in values if name not in ignored
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{error} Correct or delete it in that file.") from error


def _check_value(name: str, value: Any, path: Path) -> Any:
    """Return one value of a skembed.json, checked by the parameter's own rules."""
    owner = str(path)
    if name in ("instruction", "document_instruction"):
        resolve_instruction(value, name=name, owner=owner)
        return value
    if name == "instruction_template":
        return check_template(value, owner=owner)
    if name == "missing":
        return check_choice(value, name=name, owner=owner, allowed=MISSING_POLICIES)
    if name in ("normalize", _LEARNED):
        return check_bool(value, name=name, owner=owner)
    is_dim = name == "truncate_dim"
    return check_int(value, name=name, owner=owner, low=1 if is_dim else 2, allow_none=is_dim)


def _read_folder(folder: Path, config: NVEmbedConfig) -> ModelCard:
    """Return what one folder says."""
    saved = read_settings(folder)
    learned = saved.pop(_LEARNED, None)
    longest = config.backbone.get("max_position_embeddings")
    for name, most in (("max_length", longest), ("truncate_dim", config.hidden_size)):
        value = saved.get(name)
        if value is not None and most is not None and value > most:
            raise CheckpointError(
                f"The `{name}` in {folder / SETTINGS_FILE} must be at most {most}, which the model "
                f"of that folder allows; got {value}. Correct or delete it in that file."
            )
    theirs = _read_sentence_transformers(folder, longest)
    return ModelCard(saved, {}, learned).over(theirs)


def _read_sentence_transformers(folder: Path, longest: Any) -> ModelCard:
    """Return what the files of sentence-transformers say."""
    values: dict[str, Any] = {}
    length = read_object(folder / LENGTH_FILE).get("max_seq_length")
    if length is not None:
        try:
            length = check_int(
                length, name="max_seq_length", owner=str(folder / LENGTH_FILE), low=2
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{error} Correct or delete it in that file.") from error
        values["max_length"] = length if longest is None else min(length, int(longest))
    normalize = read_modules(folder).normalize
    if normalize is not None:
        values["normalize"] = normalize
    named, default = _read_prompts(folder / PROMPTS_FILE)
    document = next((named[name] for name in _DOCUMENT_PROMPTS if name in named), "")
    prompts = {"text": default, "query": named.get("query", ""), "document": document}
    prompts = {side: prompt for side, prompt in prompts.items() if prompt}
    return ModelCard(values, prompts, True if any(named.values()) else None)


def _read_prompts(path: Path) -> tuple[dict[str, str], str]:
    """Return the prompts by name, and the default one."""
    values = read_object(path)
    named = values.get("prompts") or {}
    if not isinstance(named, dict) or not all(
        isinstance(prompt, str) or prompt is None for prompt in named.values()
    ):
        raise CheckpointError(
            f"The `prompts` in {path} must map names to texts; got {type(named).__name__}. Correct "
            "or delete it in that file."
        )
    named = {name: replace_surrogates(prompt or "") for name, prompt in named.items()}
    default = values.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in named):
        raise CheckpointError(
            f"The `default_prompt_name` in {path} must name one of its prompts; got "
            f"{default!r:.60}. Correct or delete it in that file."
        )
    return named, named[default] if default else ""
