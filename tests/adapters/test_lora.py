"""The LoRA layer: peft's function, and dropout that can be drawn again."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from trained import train

from skembed.adapters.lora import (
    DropoutMasks,
    LoraLinear,
    LoraSettings,
    _LoraFunction,
)

TOLERANCE = 1e-5
# peft 0.21 on transformers 5.2; goes when peft asks for the new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# The layer


def make_layer(
    *, p: float = 0.0, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[LoraLinear, nn.Linear]:
    torch_state = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch_state))
    a, b = (
        nn.Parameter(torch.randn(shape, generator=torch_state, dtype=dtype))
        for shape in ((3, 6), (5, 3))
    )
    settings = LoraSettings(3, 7.0, p, "all-linear")
    masks = DropoutMasks(p) if p else None
    return LoraLinear(base, a, b, settings, masks=masks, number=2), base


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_backward_is_the_gradient(masked: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 6), (5, 6), (3, 6), (5, 3))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    mask = (torch.rand(4, 6, generator=generator) < 0.6).double()

    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        offset = torch.arange(5.0, dtype=torch.float64) if bias else None
        draw = (lambda _: mask) if masked else None
        return _LoraFunction.apply(x, weight, offset, a, b, draw, 1.7)

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-6)


def test_no_gradient_for_an_input_that_needs_none() -> None:
    layer, _ = make_layer()
    x = torch.ones(2, 6)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A.grad is not None
    assert layer.weight.grad is None


class FixedMask(nn.Module):
    """Dropout with a given mask, for peft's layer."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.p)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_pefts(p: float, bias: bool) -> None:
    layer, base = make_layer(p=p, bias=bias)
    config = peft.LoraConfig(r=3, lora_alpha=7)
    theirs = PeftLinear(copy.deepcopy(base), "default", config=config, r=3, lora_alpha=7)
    theirs.lora_A["default"].weight.data.copy_(layer.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    if layer.masks is not None:
        mask = layer.masks.draw(2, x.reshape(8, 6)).view(2, 4, 6)
        assert 0 < mask.mean() < 1
        theirs.lora_dropout["default"] = FixedMask(mask, p)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = [module(part) for module, part in zip((layer, theirs), inputs, strict=True)]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=TOLERANCE)
    for part in out:
        (part * torch.arange(5.0)).mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=TOLERANCE)
    for ours, name in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
        expected = getattr(theirs, name)["default"].weight.grad
        torch.testing.assert_close(ours.grad, expected, rtol=0, atol=TOLERANCE)


def test_frozen_layer_computes_the_same() -> None:
    layer, _ = make_layer()
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = layer(x).detach()
    layer.freeze()
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_masks_drop_their_share(p: float, dtype: torch.dtype) -> None:
    like = torch.empty(301, 331, dtype=dtype)
    mask = DropoutMasks(p).draw(0, like)
    assert (mask.shape, mask.dtype) == (like.shape, dtype)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = (p * (1 - p) / like.numel()) ** 0.5
    assert abs(float((mask == 0).double().mean()) - p) < 4 * deviation + 2**-16


def test_masks_depend_on_key_and_number_alone() -> None:
    like = torch.empty(50, 40)
    masks = DropoutMasks(0.5)
    drawn: dict[Any, Tensor] = {}
    for key in ((0,), (1,), (1, 2), (2, 1)):
        for number in (0, 1):
            masks.key = key
            drawn[key, number] = masks.draw(number, like)
    again = DropoutMasks(0.5)
    for (key, number), mask in reversed(drawn.items()):
        again.key = key
        assert torch.equal(again.draw(number, like), mask)
        other = [m for pair, m in drawn.items() if pair != (key, number)]
        assert all(0.4 < float((m != mask).float().mean()) < 0.6 for m in other)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    layer, _ = make_layer(p=0.3)
    before: Any = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    layer(torch.ones(7, 6)).sum().backward()
    train(trainer={"lora_dropout": 0.3, "max_steps": 1})
    after: Any = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][1], after[1][1])
    assert before[1][2] == after[1][2]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_expectation(p: float) -> None:
    layer, _ = make_layer(p=p)
    assert layer.masks is not None
    x = torch.randn(6, generator=torch.Generator().manual_seed(4)).expand(40_000, 6)
    with torch.no_grad():
        out = layer(x)
        layer.masks.active = False
        expected = layer(x[:1])[0]
    deviation = out.std(0) / len(out) ** 0.5
    assert (deviation > 0).all()
    assert ((out.mean(0) - expected).abs() < 4 * deviation).all()
