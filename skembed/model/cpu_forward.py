"""The backbone's forward pass on CPUs, with the steps after each matrix product fused into it.

On a CPU much of a transformer's time goes into writing and reading activations between matrix
products. Here oneDNN applies the activation, the gate or the residual sum while the result of the
product is still in the registers; attention is two batched products over padded groups of texts.

The weights are those of the stock modules. Models up to `MAX_PACKED_BYTES` also keep them in the
order of oneDNN's kernels, which each call would otherwise make again. A layer other than a plain
`nn.Linear` (with LoRA, or quantised) is called as it is.

The fused product is the operator that `torch.compile` writes into its own CPU code. Where torch or
the processor lacks it for a type, the same steps run one after the other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skembed.model.cpu_kernels import attend_to_buckets, normalise_rms
from skembed.model.tokenization import PackedBatch

__all__ = ["MAX_PACKED_BYTES", "can_fuse", "fused_linear", "pack_weights", "run_backbone"]

MAX_PACKED_BYTES = 1 << 28  # a second copy of larger models takes too much memory
_ACTIVATIONS = {"silu": "swish", "gelu": "gelu"}
_PACKED = "_skembed_packed"  # attribute of a weight
_FUSED_DTYPES = (torch.float32, torch.bfloat16)


# oneDNN's product with a pointwise step behind it, where torch has it.
_POINTWISE: Any = None
if torch.backends.mkldnn.is_available():
    _POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's product takes a type on this processor."""
    if _POINTWISE is None or dtype not in _FUSED_DTYPES:
        return False
    try:  # bfloat16 is refused by processors without AVX512 or AMX
        with torch.no_grad():
            matrix = torch.ones(16, 16, dtype=dtype)
            _POINTWISE(matrix, matrix, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def can_fuse(x: Tensor) -> bool:
    """Return whether products with this tensor run on a CPU and need no gradients."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.dtype in _FUSED_DTYPES


def pack_weights(model: nn.Module) -> None:
    """Keep a copy of each matrix in the order of oneDNN's kernels, as an attribute of the weight.

    These are the weights of linear layers and those that a module names in `fused_weights`. A copy
    is ignored once its weight is written to. Nothing is packed in models above `MAX_PACKED_BYTES`,
    on other devices, and where torch lacks the operator.
    """
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if reorder is None:
        return
    weights: list[Tensor] = []
    for module in model.modules():
        if type(module) is nn.Linear:
            weights.append(module.weight)
        weights.extend(getattr(module, name) for name in getattr(module, "fused_weights", ()))
    weights = [w for w in weights if w.device.type == "cpu" and _has_product(w.dtype)]
    weights = [w for w in weights if not w.is_inference()]  # inference tensors have no version
    if sum(weight.nbytes for weight in weights) <= MAX_PACKED_BYTES:
        for weight in weights:
            setattr(weight, _PACKED, (weight._version, reorder(weight.detach())))


def _read_packed(weight: Tensor) -> Tensor:
    """Return the packed copy of a weight, or the weight where there is no current copy."""
    version, packed = getattr(weight, _PACKED, (None, weight))
    return packed if version is not None and version == weight._version else weight


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + b``, (T, out), after at most one of: an activation, a product, a sum.

    `activation` is "silu" or "gelu"; `times` and `plus` are (T, out). On a CPU and without
    gradients all of it is one operation.
    """
    if can_fuse(x) and _has_product(x.dtype):
        weight = _read_packed(weight)
        if activation is not None:
            algorithm = "none" if activation == "gelu" else ""
            return _POINTWISE(x, weight, bias, _ACTIVATIONS[activation], [], algorithm)
        if times is not None:
            return _POINTWISE.binary(x, times, weight, bias, "mul")
        if plus is not None:
            return _POINTWISE.binary(x, plus, weight, bias, "add")
        return _POINTWISE(x, weight, bias, "none", [], "")
    return _follow(F.linear(x, weight, bias), activation, times, plus)


def _follow(
    out: Tensor, activation: str | None, times: Tensor | None, plus: Tensor | None
) -> Tensor:
    """Return `out` after the step behind a product."""
    if activation is not None:
        return F.silu(out) if activation == "silu" else F.gelu(out)
    if times is not None:
        return out * times
    return out if plus is None else out + plus


def _apply(
    layer: nn.Module,
    x: Tensor,
    *,
    activation: str | None = None,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """Return a layer's result (T, out), fused with the step behind it if the layer is plain."""
    if type(layer) is nn.Linear:
        return fused_linear(
            x, layer.weight, layer.bias, activation=activation, times=times, plus=plus
        )
    return _follow(layer(x), activation, times, plus)


def run_backbone(backbone: Any, batch: PackedBatch, *, all_layers: bool = False) -> list[Tensor]:
    """Run transformers' `MistralModel` with SiLU over packed texts.

    Its linear layers may be replaced by others of the same shape. Returns the (T, D) result of the
    last layer, or of every layer, the last one after the final norm. Rows of filling are
    meaningless.
    """
    hidden = backbone.embed_tokens(batch.input_ids)
    scaling: float = backbone.layers[0].self_attn.scaling
    rotation = _list_rotation(backbone, batch.position_ids, scaling, hidden.dtype)
    lengths = batch.lengths[: batch.n_texts]
    results = []
    for layer in backbone.layers:
        hidden = _run_attention(layer, hidden, rotation, lengths)
        hidden = _run_feed_forward(layer, hidden)
        if all_layers:
            results.append(hidden)
    return [*results[:-1], _norm(backbone.norm, hidden)]


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Return the RMSNorm, ours or transformers', of (T, D)."""
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return normalise_rms(x, norm.weight, eps)[0]


def _list_rotation(
    backbone: Any, position_ids: Tensor, scaling: float, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return cosine and sine (T, heads * d) of the rotation of queries, scaled, and of keys.

    The sine of the first half of a head is negative, so that a rotation is ``x cos + swap(x) sin``.
    Both are repeated for all heads once, not in each layer.
    """
    precise = torch.empty(0, device=position_ids.device)  # float32
    cos, sin = (
        part[0] for part in backbone.rotary_emb(precise, position_ids=position_ids.unsqueeze(0))
    )
    half = cos.shape[1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)
    config = backbone.config
    sides = ((config.num_attention_heads, scaling), (config.num_key_value_heads, 1.0))
    return [
        ((cos * factor).to(dtype).repeat(1, heads), (sin * factor).to(dtype).repeat(1, heads))
        for heads, factor in sides
    ]


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Return the rotary embedding of (T, heads * d), where d is `width`."""
    cos, sin = rotation
    swapped = x.view(len(x), -1, width).roll(width // 2, dims=-1).view(x.shape)
    return (x * cos).addcmul_(swapped, sin)


def _run_attention(
    layer: Any, hidden: Tensor, rotation: list[tuple[Tensor, Tensor]], lengths: tuple[int, ...]
) -> Tensor:
    """Return (T, D) after the attention half of a layer."""
    attention = layer.self_attn
    normed = _norm(layer.input_layernorm, hidden)
    width: int = attention.head_dim
    q, k, v = (
        _apply(projection, normed)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rows = [_rotate(q, rotation[0], width), _rotate(k, rotation[1], width), v]
    rows = [x.view(len(hidden), -1, width) for x in rows]  # (T, heads, d)
    attended = attend_to_buckets(rows, lengths)
    return _apply(attention.o_proj, attended.view(len(hidden), -1), plus=hidden)


def _run_feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """Return (T, D) after the feed-forward half of a layer."""
    mlp = layer.mlp
    normed = _norm(layer.post_attention_layernorm, hidden)
    gate = _apply(mlp.gate_proj, normed, activation="silu")
    return _apply(mlp.down_proj, _apply(mlp.up_proj, normed, times=gate), plus=hidden)
