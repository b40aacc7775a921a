"""The layers that LoRA adapts, as peft names them, and their fresh weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skembed._validation import import_optional
from skembed.adapters.lora import LoraSettings
from skembed.adapters.patterns import NamePattern
from skembed.model.config import NVEmbedConfig
from skembed.model.network import backbone_on_meta

__all__ = ["ALL_LINEAR", "expected_shapes", "find_targets", "start_lora"]

ALL_LINEAR = "all-linear"


def start_lora(
    config: NVEmbedConfig, settings: LoraSettings, seed: np.random.SeedSequence
) -> dict[str, Tensor]:
    """Return fresh matrices: A uniform in ±1/sqrt(in) as in peft, B zero.

    Raises ImportError without peft, ValueError for bad `target_modules`.
    """
    backbone = backbone_on_meta(config)
    generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint32)[0]))
    lora = {}
    for layer in find_targets(config, settings):
        base: Any = backbone.get_submodule(layer)
        bound = base.in_features**-0.5
        a = torch.empty(settings.r, base.in_features)
        lora[f"{layer}.lora_A.weight"] = a.uniform_(-bound, bound, generator=generator)
        lora[f"{layer}.lora_B.weight"] = torch.zeros(base.out_features, settings.r)
    return lora


def find_targets(config: NVEmbedConfig, settings: LoraSettings) -> list[str]:
    """Return the names of the layers that peft adapts under `target_modules`, sorted."""
    peft = import_optional("peft", extra="train", purpose="training adapters")
    backbone = backbone_on_meta(config)
    targets = settings.target_modules
    names = {name for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    refusal = (
        "The `target_modules` parameter of `ContrastiveTrainer` must name linear layers of the "
        f"backbone, of {kinds}, or be 'all-linear'; got {targets!r:.200}"
    )
    try:
        matched = _find_matches((name for name, _ in backbone.named_modules()), targets)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}.") from error
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        # By name: peft's own match of a pattern may never end.
        wanted: str | list[str] = matched
    else:
        wanted = targets if isinstance(targets, str) else list(targets)
    try:
        with torch.device("meta"):
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=wanted), backbone)
    except ValueError as error:
        raise ValueError(f"{refusal}, which peft refuses: {error}") from error
    adapted = sorted(name for name, layer in backbone.named_modules() if hasattr(layer, "lora_A"))
    # peft ignores a name that matches nothing, and adapts embeddings too.
    bad = [name for name in adapted if name not in names]
    if not isinstance(targets, str):
        bad += [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if bad:
        raise ValueError(f"{refusal}; {bad[0]!r} is not one of them.")
    return adapted


def expected_shapes(config: NVEmbedConfig, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of an adapter's matrices, by peft's rule of names.

    Raises ValueError for a pattern that has no matcher of bounded time.
    """
    layers = {
        name: layer
        for name, layer in backbone_on_meta(config).named_modules()
        if isinstance(layer, nn.Linear)
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _find_matches(layers, settings.target_modules):
        shapes[f"{name}.lora_A.weight"] = (settings.r, layers[name].in_features)
        shapes[f"{name}.lora_B.weight"] = (layers[name].out_features, settings.r)
    return shapes


def _find_matches(names: Iterable[str], targets: str | tuple[str, ...]) -> list[str]:
    """Return the names that `target_modules` means, by peft's rule; any but of linear layers too.

    A str is a pattern of the whole name; the names of a tuple may leave out what stands in front.
    """
    if not isinstance(targets, str):
        ends = tuple(f".{target}" for target in targets)
        return [name for name in names if f".{name}".endswith(ends)]
    if targets.lower() == ALL_LINEAR:
        return list(names)
    pattern = NamePattern(targets)
    return [name for name in names if pattern.matches(name)]
