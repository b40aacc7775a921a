"""The backbone's forward pass on CPUs: what follows a matrix product is done inside it.

On a CPU the matrix products of a transformer run at the processor's own rate; what costs the rest
is writing and reading activations between them. Here the activation, the product with the other
branch and the residual sum are done by oneDNN while the result of the product is still in the
registers, attention is two batched products over padded groups of texts, and the rotary embedding
is two passes. That leaves per layer: nine products, two norms, two rotations, one softmax.

The weights are those of the stock modules and stay there; up to `MAX_PACKED_BYTES` they are also
kept in the order of oneDNN's kernels, which otherwise comes about anew at each call. A layer that
is no plain `nn.Linear` (with LoRA, or quantised) is called as it is and its sums are done behind
it.

The fused product is the operator that `torch.compile` writes into its own CPU code. Where torch
has none, or the processor none for the type, the same steps run one after the other.
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

MAX_PACKED_BYTES = 1 << 28  # the second copy of larger models would be missed elsewhere
_ACTIVATIONS = {"silu": "swish", "gelu": "gelu"}
_PACKED = "_skembed_packed"  # attribute of a weight
_FUSED_DTYPES = (torch.float32, torch.bfloat16)


def _find_operator() -> Any:
    """Return oneDNN's product with a pointwise step behind it, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_POINTWISE = _find_operator()


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's product takes a type on this processor; it is tried once."""
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
    """Whether products with this tensor may run without a record for gradients, on a CPU."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.dtype in _FUSED_DTYPES


def pack_weights(model: nn.Module) -> None:
    """Keep the matrices of a model in the order of the kernels, beside the layers' own.

    They hang on the weights, go with them, and are passed over once a weight is written to. Those
    of linear layers are packed, and those that a module names in `fused_weights`; nothing is for
    models above `MAX_PACKED_BYTES`, on other devices, and where torch lacks the operator.
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
    weights = [w for w in weights if not w.is_inference()]  # those have no version
    if sum(weight.nbytes for weight in weights) <= MAX_PACKED_BYTES:
        for weight in weights:
            setattr(weight, _PACKED, (weight._version, reorder(weight.detach())))


def _read_packed(weight: Tensor) -> Tensor:
    """Return the packed form of a weight, or itself where there is none of its present values."""
    kept: tuple[int, Tensor] | None = getattr(weight, _PACKED, None)
    return kept[1] if kept is not None and kept[0] == weight._version else weight


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    times: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """``x W^T + b``, then at most one of: an activation, a product, a sum.

    Parameters
    ----------
    x : Tensor, shape (T, in)
        Inputs. On a CPU and without gradients all of it is one operation.
    weight, bias : Tensor, shapes (out, in) and (out,)
        The layer.
    activation : {"silu", "gelu"}, optional
        Applied to the result.
    times, plus : Tensor, shape (T, out), optional
        Multiplied with the result, or added to it.

    Returns
    -------
    Tensor, shape (T, out)
        Of the inputs' type.
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
    """Return a layer of (T, in), fused with the step behind it where it is a plain one."""
    if type(layer) is nn.Linear:
        return fused_linear(
            x, layer.weight, layer.bias, activation=activation, times=times, plus=plus
        )
    return _follow(layer(x), activation, times, plus)


def run_backbone(backbone: Any, batch: PackedBatch, *, all_layers: bool = False) -> list[Tensor]:
    """The forward pass of transformers' `MistralModel` over packed texts.

    Parameters
    ----------
    backbone : MistralModel
        With SiLU as activation; its linear layers may be replaced by others of the same shape.
    batch : PackedBatch
        Of T positions. Rows of its filling hold no meaning in the result.
    all_layers : bool, default=False
        Return the result of every layer, and not of the last one alone.

    Returns
    -------
    list of Tensor, shape (T, D) each
        The last one is behind the final norm.
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
    """Return RMSNorm of (T, D)."""
    return normalise_rms(x, norm.weight, _read_eps(norm))[0]


def _read_eps(norm: Any) -> float:
    """Return the epsilon of our norm or of transformers' own."""
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return eps


def _list_rotation(
    backbone: Any, position_ids: Tensor, scaling: float, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Cosine and sine (T, heads * d) of the rotation of queries, scaled, and of keys.

    The sine of the first half of a head is negative, so that a rotation is ``x cos + swap(x) sin``.
    Both are repeated for all heads here, once, and not in each layer.
    """
    precise = torch.empty(0, device=position_ids.device)  # float32
    cos, sin = (
        part[0] for part in backbone.rotary_emb(precise, position_ids=position_ids.unsqueeze(0))
    )
    half = cos.shape[1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)
    config = backbone.config
    uses = ((config.num_attention_heads, scaling), (config.num_key_value_heads, 1.0))
    return [
        ((cos * factor).to(dtype).repeat(1, heads), (sin * factor).to(dtype).repeat(1, heads))
        for heads, factor in uses
    ]


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Rotary embedding of (T, heads * d), d being `width`."""
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
