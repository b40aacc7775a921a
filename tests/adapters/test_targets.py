"""Which layers get matrices: peft's choice; fresh matrices."""

import numpy as np
import peft
import pytest
import torch
from paths import GOLDEN
from trained import stock_backbone

from skembed.adapters.lora import (
    LoraSettings,
)
from skembed.adapters.targets import expected_shapes, find_targets, start_lora
from skembed.model.sources import (
    read_config,
    resolve_source,
)

# peft 0.21 on transformers 5.2; goes when peft asks for the new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TARGETS: list[str | tuple[str, ...]] = [
    "all-linear",
    "All-Linear",
    ("q_proj",),
    ("q_proj", "down_proj"),
    ("self_attn.q_proj", "layers.1.mlp.up_proj"),
    r".*\.1\..*_proj",
    r"layers\.\d\.mlp\.(up|down)_proj",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_pefts(targets: str | tuple[str, ...]) -> None:
    config = read_config(resolve_source(GOLDEN))
    settings = LoraSettings(3, 6.0, 0.0, targets)
    stock = stock_backbone(config)
    wanted = targets if isinstance(targets, str) else list(targets)
    adapted = peft.get_peft_model(stock, peft.LoraConfig(r=3, target_modules=wanted))
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    assert expected
    assert expected_shapes(config, settings) == expected
    assert find_targets(config, settings) == sorted({n.rsplit(".", 2)[0] for n in expected})
    fresh = start_lora(config, settings, np.random.SeedSequence(0))
    assert {name: tuple(tensor.shape) for name, tensor in fresh.items()} == expected


@pytest.mark.parametrize(
    "targets",
    [("nope",), ("q_proj", "nope"), ("mlp",), ("q_proj", "embed_tokens"), ".*norm", "(", ()],
    ids=str,
)
def test_targets_that_are_no_linear_layers(targets: str | tuple[str, ...]) -> None:
    config = read_config(resolve_source(GOLDEN))
    with pytest.raises(ValueError, match="`target_modules` parameter of `ContrastiveTrainer`"):
        find_targets(config, LoraSettings(3, 6.0, 0.0, targets))


def test_fresh_matrices_change_nothing_and_follow_the_seed() -> None:
    config = read_config(resolve_source(GOLDEN))
    settings = LoraSettings(3, 6.0, 0.0, "all-linear")
    one, same, other = (
        start_lora(config, settings, np.random.SeedSequence(seed)) for seed in (0, 0, 1)
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.abs().max() <= tensor.shape[1] ** -0.5
