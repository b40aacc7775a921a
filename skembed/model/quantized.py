"""Layers whose weights take one byte or half of one.

Only weights are quantised; they are converted back right before the product. So activations lose
nothing, and a text's vector does not depend on the texts beside it. Memory falls to a half or a
quarter of bfloat16's; speed does not rise.

========= ============== ======================================================================
format    bytes a weight a weight converted back
========= ============== ======================================================================
int8      1              integer times the scale of its row (its output); any device
nf4       0.52           one of 16 quantiles of a normal distribution times the scale of its block
                         of 64 (QLoRA, arXiv 2305.14314); bitsandbytes, CUDA or CPU
========= ============== ======================================================================

Word vectors are int8 in both formats: only the rows that are looked up are converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skembed._validation import import_optional

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "Nf4Linear",
    "QuantizedLinear",
    "WEIGHT_FORMATS",
    "make_quantizer",
    "quantize_rows",
]

WEIGHT_FORMATS = ("int8", "nf4")
_MAX_INT8 = 127
_BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Module):
    """Linear layer ``x W^T`` with a weight that is stored smaller than it is computed with.

    It never changes, so that the views of several adapters share the layer itself.
    """

    bias: None = None  # Mistral's layers have none

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype  # of the weight as it is used, and of activations

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        """Return the layer itself."""
        return self

    @property
    def weight(self) -> Tensor:
        """The weight as a new tensor, (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight)


class Int8Linear(QuantizedLinear):
    """A weight as int8 with a scale for each output."""

    codes: Tensor  # int8 (out, in)
    scales: Tensor  # (out, 1)

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        codes, scales = quantize_rows(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    @property
    def weight(self) -> Tensor:
        """The weight as a new tensor, (out, in)."""
        return self.codes * self.scales  # of the scales' type, in one pass


class Int8Embedding(nn.Module):
    """Word vectors as int8 with a scale for each of them."""

    codes: Tensor  # int8 (vocabulary, D)
    scales: Tensor  # (vocabulary, 1)

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        codes, scales = quantize_rows(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return self.codes[ids] * self.scales[ids]


class Nf4Linear(QuantizedLinear):
    """A weight as NF4, the scales of its blocks quantised once more, by bitsandbytes."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._functional = _import_bitsandbytes()
        packed, state = self._functional.quantize_4bit(
            weight.to(dtype), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scales", state.absmax)  # counts as memory; used through the state
        self._state = state

    @property
    def weight(self) -> Tensor:
        """The weight as a new tensor, (out, in)."""
        weight: Tensor = self._functional.dequantize_4bit(self.packed, self._state)
        return weight


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 (out, in), and the scale of each row, float32 (out, 1).

    The scale is the row's largest magnitude over 127, rounded up to a bfloat16 number: the same in
    every type.
    """
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True) / _MAX_INT8
    scales = ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    codes = (weight / scales.where(scales > 0, 1)).round_().clamp_(-_MAX_INT8, _MAX_INT8)
    return codes.to(torch.int8), scales


def make_quantizer(weight_format: str) -> Callable[[nn.Module, Tensor, torch.dtype], Any]:
    """Return a function that quantises a layer with its weight; other layers give None."""
    linear: type[QuantizedLinear] = {"int8": Int8Linear, "nf4": Nf4Linear}[weight_format]
    if linear is Nf4Linear:
        _import_bitsandbytes()

    def quantize(layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module | None:
        if isinstance(layer, nn.Embedding):
            return Int8Embedding(weight, dtype)
        if isinstance(layer, nn.Linear) and layer.bias is None:
            return linear(weight, dtype)
        return None

    return quantize


def _import_bitsandbytes() -> Any:
    """Return bitsandbytes' functions; raise ImportError where it is not installed."""
    return import_optional("bitsandbytes", extra="quantize", purpose="dtype='nf4'").functional
