"""Adapters on disk, in peft's format: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skembed.adapters.lora import LoraSettings
from skembed.adapters.patterns import NamePattern
from skembed.exceptions import CheckpointError
from skembed.model import weight_files
from skembed.model.checkpoint import BACKBONE_PREFIX
from skembed.model.files import find_file
from skembed.model.pooling import POOLINGS
from skembed.model.sources import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE

__all__ = [
    "HEADER_KEY",
    "PEFT_PREFIX",
    "check_keys",
    "model_layer",
    "read_header",
    "read_pooling_kind",
    "read_settings",
]

PEFT_PREFIX = "base_model.model."
_MAX_RANK = 1 << 20
# Settings of peft that change the function, and that skembed does not compute, unless they are
# null, false, "none" or empty.
_REFUSED = (
    *("use_dora", "use_rslora", "bias", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "modules_to_save", "fan_in_fan_out", "exclude_modules"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initialisations that leave the base weights as they are; others ("pissa", "olora") move a part of
# them into the adapter, which then fits no base on disk.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# JSON in the header of the weights, for what peft's configuration has no names: peft warns about
# names that it does not know.
HEADER_KEY = "skembed"


def read_settings(values: Mapping[str, Any], folder: Path) -> LoraSettings:
    """Return the sizes in an adapter_config.json; raise CheckpointError for other settings."""
    path = folder / ADAPTER_CONFIG_FILE
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"The peft_type in {path} must be 'LORA'; got {kind!r:.60}.")
    for name in _REFUSED:
        value = values.get(name)
        if value is not None and value is not False and value not in ("none", [], {}):
            raise CheckpointError(
                f"The {name} in {path} is {value!r:.60}, which skembed does not compute. Merge the "
                "adapter into its base with peft (`merge_and_unload`), and load the result."
            )
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"The init_lora_weights in {path} is {values['init_lora_weights']!r:.60}, which "
            "changes the base weights. Convert the adapter with peft "
            "(`path_initial_model_for_weight_conversion` of its `save_pretrained`), and load the "
            "result."
        )
    targets = _read_targets(values.get("target_modules"), path)
    r = values.get("r")
    if type(r) is not int or not 1 <= r <= _MAX_RANK:
        raise CheckpointError(f"The r in {path} must be an int in [1, {_MAX_RANK}]; got {r!r:.60}.")
    for name, low, high in (("lora_alpha", -1e6, 1e6), ("lora_dropout", 0.0, 1.0)):
        value = values.get(name)
        if type(value) is int:
            value = float(min(max(value, -(2**60)), 2**60))
        if not isinstance(value, float) or not low <= value <= high:
            raise CheckpointError(
                f"The {name} in {path} must be a number in [{low:g}, {high:g}]; got {value!r:.60}."
            )
    return LoraSettings(r, float(values["lora_alpha"]), float(values["lora_dropout"]), targets)


def _read_targets(targets: Any, path: Path) -> str | tuple[str, ...]:
    """Return the target_modules of an adapter_config.json."""
    problem = f"got {type(targets).__name__}"
    if isinstance(targets, str) and targets:
        try:
            NamePattern(targets)
        except ValueError as error:
            problem = str(error)
        else:
            return targets
    elif isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets):
        return tuple(sorted(targets))
    raise CheckpointError(
        f"The target_modules in {path} must be a pattern or a list of names of layers; {problem}."
    )


def model_layer(name: str) -> str:
    """Return the layer's name in `MistralModel` for a key of peft's, however it was wrapped."""
    for prefix in (PEFT_PREFIX, BACKBONE_PREFIX, "model."):
        name = name.removeprefix(prefix)
    return name


def check_keys(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Raise CheckpointError where names or shapes differ: nothing is filled in at random."""
    names = {
        "missing": expected.keys() - stored.keys(),
        "unexpected": stored.keys() - expected.keys(),
        "misshapen": {n for n in stored if stored[n] != expected.get(n)} & expected.keys(),
    }
    faults = [f"{len(n)} {what}, such as {min(n):.200}" for what, n in names.items() if n]
    if faults:
        raise CheckpointError(
            f"The weights in {path} do not fit the base model and {ADAPTER_CONFIG_FILE}: "
            f"{'; '.join(faults)}. The adapter belongs to another model, or the copy is "
            "incomplete."
        )


def read_header(folder: Path) -> dict[str, Any]:
    """Return what `Adapter.save` wrote to the header of the weights; empty in peft's files."""
    path = find_file(folder, ADAPTER_WEIGHTS_FILE)
    text = weight_files.read_header(path).metadata.get(HEADER_KEY, "{}")
    try:
        header = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"The {HEADER_KEY!r} in the header of {path} must be a JSON object. Copy the adapter "
            "again."
        )
    kinds = {"base_fingerprint": str, "pooling": str, "trained_pooling": bool}
    for name, kind in kinds.items():
        if type(header.get(name)) not in (kind, type(None)):
            raise CheckpointError(
                f"The {name} in the header of {path} must be a {kind.__name__}; got "
                f"{header[name]!r:.60}."
            )
    return header


def read_pooling_kind(folder: Path) -> str | None:
    """Return the pooling that an adapter was trained with; None in a folder of peft's."""
    kind = read_header(folder).get("pooling")
    if kind not in (None, *POOLINGS):
        raise CheckpointError(
            f"The pooling in the header of {folder / ADAPTER_WEIGHTS_FILE} must be one of "
            f"{list(POOLINGS)}; got {kind!r:.60}."
        )
    return kind
