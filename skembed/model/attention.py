"""Attention over packed texts on three paths, none of them causal.

========= =================================================================================
path      attention of packed texts
========= =================================================================================
grouped   texts of equal length side by side, one scaled-dot-product call per length: nothing
          is padded (CPU); without gradients `skembed.model.cpu_forward` runs the whole pass
varlen    torch's variable-length attention on cumulative lengths: nothing is padded (CUDA)
padded    queries, keys and values padded to the longest text, with a key mask, inside the
          attention function only (any device; the fallback)
========= =================================================================================

transformers knows them as `ATTENTION_NAME`. `skembed.model.loaded` proves each one: changing the
last token of a text must change its first position, and no other text.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from skembed.model.cpu_kernels import LONGEST_PRODUCT, ProductAttention, attend_to_buckets
from skembed.model.tokenization import PackedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ATTENTION_NAME", "ATTENTION_PATHS"]

ATTENTION_NAME = "skembed"
ATTENTION_PATHS = ("grouped", "varlen", "padded")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packed: PackedBatch,
    path: str,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention inside each text of a pack: (1, H, T, d_h) -> (1, T, H, d_h).

    transformers passes more keywords (sliding window, position ids, cache); they are ignored.
    """
    attend = {"grouped": _grouped, "varlen": _varlen, "padded": _padded}[path]
    return attend(query[0], key[0], value[0], packed, scaling, dropout).unsqueeze(0), None


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """Attend (H, T, d_h) -> (T, H, d_h), one call for each run of texts of equal length."""
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.requires_grad and max(packed.lengths) <= LONGEST_PRODUCT:
        attended: Tensor = ProductAttention.apply(q, k, v, packed.lengths, scaling)
        return attended
    if on_cpu and q.dtype == torch.bfloat16 and not any(x.requires_grad for x in (q, k, v)):
        # torch's kernel takes up to twice as long where a length is no multiple of 16.
        rows = [x.transpose(0, 1).contiguous() for x in (q * scaling, k, v)]
        return attend_to_buckets(rows, packed.lengths[: packed.n_texts])
    heads, _, width = q.shape
    groups = heads // k.shape[0]
    if groups > 1:  # explicit: the CPU kernel takes equal head counts only
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    runs = _runs(packed.lengths)
    sizes = [length * count for length, count in runs]
    # `split`, not slices: the backward of a slice writes a whole zero tensor for each run.
    pieces = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
    parts = []
    for (length, count), piece in zip(runs, pieces, strict=True):
        q_run, k_run, v_run = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
        out = F.scaled_dot_product_attention(
            q_run, k_run, v_run, dropout_p=dropout, scale=scaling
        )  # (count, H, length, d_h)
        parts.append(out.transpose(1, 2).reshape(length * count, heads, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return runs of equal neighbours: [5, 5, 3] -> [(5, 2), (3, 1)]."""
    return [(length, len(list(run))) for length, run in groupby(lengths)]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """Attend (H, T, d_h) -> (T, H, d_h) with torch's variable-length kernel (CUDA, half)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))  # (T, H, d_h)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    longest = max(packed.lengths)
    cu_seqlens = packed.cu_seqlens
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling)
    return out


def _padded(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """Attend (H, T, d_h) -> (T, H, d_h) by padding to the longest text, with a key mask."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    lengths = (packed.cu_seqlens[1:] - packed.cu_seqlens[:-1]).long()
    mask = torch.arange(max(packed.lengths), device=q.device) < lengths.unsqueeze(1)  # (B, L)

    def pad(x: Tensor) -> Tensor:  # (H, T, d_h) -> (B, H, L, d_h)
        out = x.new_zeros(*mask.shape, x.shape[0], x.shape[2])
        out[mask] = x.transpose(0, 1)
        return out.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), attn_mask=mask[:, None, None, :], dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2)[mask]


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: the attention function knows where texts begin and end."""


AttentionInterface.register(ATTENTION_NAME, _packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
