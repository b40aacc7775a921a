"""Adapters on disk, in peft's format: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from skembed.adapters.lora import LoraSettings
from skembed.exceptions import CheckpointError
from skembed.model.checkpoint import BACKBONE_PREFIX, open_tensors
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
        raise CheckpointError(f"The peft_type in {path} must be 'LORA'; got {kind!r}.")
    for name in _REFUSED:
        value = values.get(name)
        if value is not None and value is not False and value not in ("none", [], {}):
            raise CheckpointError(
                f"The {name} in {path} is {value!r}, which skembed does not compute. Merge the "
                "adapter into its base with peft (`merge_and_unload`), and load the result."
            )
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"The init_lora_weights in {path} is {values['init_lora_weights']!r}, which changes "
            "the base weights. Convert the adapter with peft (`path_initial_model_for_weight_"
            "conversion` of its `save_pretrained`), and load the result."
        )
    targets = values.get("target_modules")
    try:
        re.compile(targets if isinstance(targets, str) else "")
        targets = targets if isinstance(targets, str) else tuple(sorted(targets or ()))
        settings = LoraSettings(
            int(values["r"]), float(values["lora_alpha"]), float(values["lora_dropout"]), targets
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{path} lacks or misstates r, lora_alpha, lora_dropout or target_modules: {error!r}."
        ) from error
    if settings.r < 1 or not targets:
        raise CheckpointError(f"{path} must have r above 0 and target_modules; got {values!r}.")
    return settings


def model_layer(name: str) -> str:
    """Return the layer's name in `MistralModel` for a key of peft's, however it was wrapped."""
    for prefix in (PEFT_PREFIX, BACKBONE_PREFIX, "model."):
        name = name.removeprefix(prefix)
    return name


def check_keys(
    stored: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Raise CheckpointError where names or shapes differ: nothing is filled in at random."""
    names = {
        "missing": expected.keys() - stored.keys(),
        "unexpected": stored.keys() - expected.keys(),
        "misshapen": {n for n in stored if tuple(stored[n].shape) != expected.get(n)}
        & expected.keys(),
    }
    faults = [f"{len(n)} {what}, such as {min(n)}" for what, n in names.items() if n]
    if faults:
        raise CheckpointError(
            f"The weights in {path} do not fit the base model and {ADAPTER_CONFIG_FILE}: "
            f"{'; '.join(faults)}. The adapter belongs to another model, or the copy is "
            "incomplete."
        )


def read_header(path: Path) -> dict[str, Any]:
    """Return what `Adapter.save` wrote to the header of the weights; empty in peft's files."""
    with open_tensors(path) as file:
        return dict(json.loads((file.metadata() or {}).get(HEADER_KEY, "{}")))


def read_pooling_kind(folder: Path) -> str | None:
    """Return the pooling that an adapter was trained with; None in a folder of peft's."""
    path = folder / ADAPTER_WEIGHTS_FILE
    kind = read_header(path).get("pooling")
    if kind not in (None, *POOLINGS):
        raise CheckpointError(
            f"The pooling in the header of {path} must be one of {list(POOLINGS)}; got {kind!r}."
        )
    return kind
