"""LoRA layers (arXiv 2106.09685) on weights that they share and never write to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from skembed.model.network import NVEmbedModel
from skembed.model.quantized import QuantizedLinear

__all__ = [
    "DropoutMasks",
    "LoraLinear",
    "LoraSettings",
    "TrainablePooling",
    "insert_lora",
    "share_weights",
]


@dataclass(frozen=True)
class LoraSettings:
    """Sizes of an adapter, under peft's names."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | tuple[str, ...]

    @property
    def scaling(self) -> float:
        """Factor of the update: ``lora_alpha / r``."""
        return self.lora_alpha / self.r


class DropoutMasks:
    """Dropout masks that can be drawn again.

    A mask depends only on the key set last and on the layer's number. So a forward pass repeated
    under the same key (gradient cache, gradient checkpointing) sees the same masks, and torch's
    global random state is neither read nor changed.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self.key: tuple[int, ...] = (0,)
        self.active = p > 0

    def draw(self, number: int, like: Tensor, key: tuple[int, ...] | None = None) -> Tensor:
        """Return ones for what the layer of this number keeps, zeros for the rest, as `like`."""
        seed = np.random.SeedSequence((*(self.key if key is None else key), number))
        if like.device.type != "cpu":
            generator = torch.Generator(like.device)
            generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            drawn = torch.rand(like.shape, device=like.device, generator=generator)
            return (drawn >= self.p).to(like.dtype)
        # Sixteen bits per entry, and bfloat16's 1.0 as bits: torch's own masks are slow on CPUs.
        n = like.numel()
        raw = np.random.SFC64(seed).random_raw(-(-n // 4)).view(np.uint16)[:n]
        keep = raw >= np.uint16(min(round(self.p * 65536), 65535))
        if like.dtype == torch.bfloat16:
            bits = np.multiply(keep, np.uint16(0x3F80), dtype=np.uint16)
            return torch.from_numpy(bits).view(torch.bfloat16).view(like.shape)
        return torch.from_numpy(keep.astype(np.float32)).to(like.dtype).view(like.shape)


class _LoraFunction(torch.autograd.Function):
    """``x W^T + b + s * (m * x) A^T B^T`` with gradients for x, A and B.

    It keeps nothing of the size of the result for the backward pass: x is shared with neighbouring
    layers, the mask m is drawn again, and a quantised W is converted again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantizedLinear,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        draw_mask: Callable[[Tensor], Tensor] | None,
        scaling: float,
    ) -> Tensor:
        """X (T, in) in the model's type, A (r, in) and B (out, r) in float32 -> (T, out)."""
        small_a, small_b = a.to(x.dtype), (b * scaling).to(x.dtype)
        inner = (x if draw_mask is None else x * draw_mask(x)) @ small_a.T  # (T, r)
        out = F.linear(x, _read(weight), bias)
        out.addmm_(inner, small_b.T)
        ctx.save_for_backward(x, small_a, small_b, inner)
        ctx.weight, ctx.draw_mask, ctx.scaling = weight, draw_mask, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradient of the result (T, out) -> gradients of x, A and B; A's and B's in float32."""
        x, small_a, small_b, inner = ctx.saved_tensors
        grad = gradients[0]
        mask = None if ctx.draw_mask is None else ctx.draw_mask(x)
        grad_inner = grad @ small_b  # (T, r)
        grad_b = (grad.T @ inner).float() * ctx.scaling
        grad_a = (grad_inner.T @ (x if mask is None else x * mask)).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _read(ctx.weight)
            if mask is None:
                grad_x.addmm_(grad_inner, small_a)
            else:
                grad_x.add_((grad_inner @ small_a).mul_(mask))
        return grad_x, None, None, grad_a, grad_b, None, None


def _read(weight: Tensor | QuantizedLinear) -> Tensor:
    """Return the weight (out, in); that of a quantised layer is a new tensor."""
    return weight if isinstance(weight, Tensor) else weight.weight


class LoraLinear(nn.Module):
    """A linear layer with a low-rank update: ``x W^T + b + (lora_alpha / r) dropout(x) A^T B^T``.

    `base` is shared and stays as it is; A is (r, in) and B (out, r), both float32. There is no
    dropout without `masks`, which are drawn by the layer's `number`.
    """

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        a: nn.Parameter,
        b: nn.Parameter,
        settings: LoraSettings,
        *,
        masks: DropoutMasks | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = a, b
        self.scaling = settings.scaling
        self.masks = masks
        self.number = number
        # For use without gradients: A and B in the model's type, B scaled and transposed.
        self._small: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of the adapted layer."""
        return self.base.weight

    def freeze(self) -> None:
        """Prepare for use without gradients."""
        base = self.base
        with torch.no_grad():
            dtype = base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
            self._small = self.lora_A.to(dtype), (self.lora_B * self.scaling).to(dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        if self._small is not None:
            a, b = self._small
            out = self.base(flat).addmm_(F.linear(flat, a), b)
            return out.view(*x.shape[:-1], -1)
        draw, scaling = None, self.scaling
        masks, base = self.masks, self.base
        if masks is not None and masks.active:
            draw = partial(masks.draw, self.number, key=masks.key)
            scaling /= 1.0 - masks.p
        weight = base if isinstance(base, QuantizedLinear) else base.weight
        out = _LoraFunction.apply(flat, weight, base.bias, self.lora_A, self.lora_B, draw, scaling)
        return out.view(*x.shape[:-1], -1)


class TrainablePooling(nn.Module):
    """A pooling layer with float32 weights that computes in the model's type."""

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, hidden_states: Any, segments: Tensor, counts: Tensor) -> Tensor:
        """Packed pooled tokens (P, D), or one tensor per layer -> (B, D) float32."""
        first = hidden_states if isinstance(hidden_states, Tensor) else hidden_states[0]
        weights = {n: p.to(first.dtype) for n, p in self.pooling.named_parameters()}
        pooled: Tensor = functional_call(self.pooling, weights, (hidden_states, segments, counts))
        return pooled


def share_weights(model: NVEmbedModel) -> NVEmbedModel:
    """Return a second module tree on the same tensors, whose modules can be replaced."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def insert_lora(
    model: NVEmbedModel,
    settings: LoraSettings,
    lora: Mapping[str, Tensor],
    *,
    masks: DropoutMasks | None = None,
) -> dict[str, nn.Parameter]:
    """Replace each layer that `lora` names by a `LoraLinear`; return the new parameters."""
    backbone = model.embedding_model
    parameters = {name: nn.Parameter(tensor.float()) for name, tensor in lora.items()}
    for number, layer in enumerate(sorted({name.rsplit(".", 2)[0] for name in lora})):
        base: Any = backbone.get_submodule(layer)
        a, b = (parameters[f"{layer}.lora_{kind}.weight"] for kind in "AB")
        adapted = LoraLinear(base, a, b, settings, masks=masks, number=number)
        backbone.set_submodule(layer, adapted)
    return parameters
