"""Layers whose weights take one byte, or half of one, and are read at each use.

Only weights are quantised. They become numbers of the layer's type again right before the product,
which then runs as always: activations lose nothing, and a text's vector does not depend on the
texts beside it. Memory falls to a half or a quarter of bfloat16's; speed does not rise.

========= ============== ======================================================================
format    bytes a weight a weight read back
========= ============== ======================================================================
int8      1              integer times the scale of its row (its output); any device
nf4       0.52           one of 16 quantiles of a normal distribution times the scale of its block
                         of 64 (QLoRA, arXiv 2305.14314); bitsandbytes, CUDA or CPU
========= ============== ======================================================================

Word vectors are int8 in both formats: only the rows that are looked up are read back.
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
    """``x W^T`` with a weight that is stored smaller than it is computed with.

    It never changes, so that the views of several adapters share the layer itself.

    Attributes
    ----------
    in_features, out_features : int
        As of `torch.nn.Linear`.
    dtype : torch.dtype
        Type of the weight as it is read, and of activations.
    bias : None
        Mistral's layers have none.
    """

    bias: None = None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype

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

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), dtype)
        codes, scales = quantize_rows(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    @property
    def weight(self) -> Tensor:
        """The weight as a new tensor, (out, in)."""
        codes: Any = self.codes
        read: Tensor = codes * self.scales  # of the scales' type, in one pass
        return read


class Int8Embedding(nn.Module):
    """Word vectors as int8 with a scale for each of them."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        codes, scales = quantize_rows(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        codes: Any = self.codes
        scales: Any = self.scales
        found: Tensor = codes[ids] * scales[ids]
        return found


class Nf4Linear(QuantizedLinear):
    """A weight as NF4, the scales of its blocks quantised once more, by bitsandbytes."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), dtype)
        self._functional = _import_bitsandbytes()
        packed, state = self._functional.quantize_4bit(
            weight.to(dtype), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scales", state.absmax)  # counted as memory; read through the state
        self._state = state

    @property
    def weight(self) -> Tensor:
        """The weight as a new tensor, (out, in)."""
        read: Tensor = self._functional.dequantize_4bit(self.packed, self._state)
        return read


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 (out, in), and the scale of each row, float32 (out, 1).

    The scale is the row's largest magnitude over 127, rounded up to a number of bfloat16, so that
    every type reads the same scale, and a row has no error that all its weights share.
    """
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True) / _MAX_INT8
    scales = ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    codes = (weight / scales.where(scales > 0, 1)).round_().clamp_(-_MAX_INT8, _MAX_INT8)
    return codes.to(torch.int8), scales


def make_quantizer(weight_format: str) -> Callable[[nn.Module, Tensor, torch.dtype], Any]:
    """Return what turns a layer and its weight into a quantised layer, or None for other layers.

    Raises
    ------
    ImportError
        When the format needs bitsandbytes and it is not installed.
    """
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
    """The functions of bitsandbytes."""
    return import_optional("bitsandbytes", extra="quantize", purpose="dtype='nf4'").functional
