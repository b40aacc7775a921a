"""Forward and backward passes of the backbone's small steps, written for CPUs.

Beside the large matrix products, a training step on a CPU spends its time on norms, activations and
attention on short texts, and its memory on autograd's records of them. Each function here computes
what the stock module does and keeps only its inputs for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_SHORTEST_SHARE = 0.6  # of a bucket's length that each of its texts has; the rest is padding


class RMSNormFunction(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w``; the mean in float32 at the least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., D), (D,) -> (..., D)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradient of the result -> gradients of x and w."""
        x, weight, scale = ctx.saved_tensors
        grad = gradients[0]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed = x * scale.to(x.dtype)
            grad_weight = (grad * normed).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        weighted = grad * weight
        shift = (weighted * x).sum(-1, keepdim=True, dtype=scale.dtype)
        shift *= scale.pow(3) / -x.shape[-1]
        grad_x = weighted.mul_(scale.to(x.dtype)).addcmul_(x, shift.to(x.dtype))
        return grad_x, grad_weight, None


class GatedSiluFunction(torch.autograd.Function):
    """``silu(gate) * up``, keeping the two and not their product's parts."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """(..., I), (..., I) -> (..., I)."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradient of the result -> gradients of gate and up."""
        gate, up = ctx.saved_tensors
        grad = gradients[0]
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


@dataclass(frozen=True)
class _Bucket:
    """Neighbouring texts of similar length, padded to one length L.

    Attributes
    ----------
    start, stop : int
        Their rows in the pack.
    count, length : int
        Texts and padded length; `count` may hold a few of nothing, so that sizes repeat.
    gather : Tensor of int64, shape (count * length,)
        Row, from `start`, that stands at each padded place.
    kept : Tensor of int64, shape (stop - start,)
        Padded place of each row.
    mask : Tensor of bool, shape (count, 1, length)
        True where a key is padding.
    """

    start: int
    stop: int
    count: int
    length: int
    gather: Tensor
    kept: Tensor
    mask: Tensor


@lru_cache(maxsize=64)
def plan_buckets(lengths: tuple[int, ...]) -> tuple[_Bucket, ...]:
    """Buckets of a pack whose texts have these lengths, sorted or not."""
    buckets, first, start = [], 0, 0
    while first < len(lengths):
        length = _round_length(lengths[first])
        last = first + 1
        while last < len(lengths) and _SHORTEST_SHARE * length <= lengths[last] <= length:
            last += 1
        sizes = np.array(lengths[first:last])
        count = _round_count(len(sizes))
        inside = np.arange(length) < sizes[:, None]  # (n, L)
        gather = np.zeros((count, length), dtype=np.int64)
        gather[: len(sizes)][inside] = np.arange(sizes.sum())
        mask = np.zeros((count, 1, length), dtype=bool)
        mask[: len(sizes), 0] = ~inside
        stop = start + int(sizes.sum())
        buckets.append(
            _Bucket(
                start,
                stop,
                count,
                length,
                torch.from_numpy(gather.reshape(-1)),
                torch.from_numpy(np.flatnonzero(inside)),
                torch.from_numpy(mask),
            )
        )
        first, start = last, stop
    return tuple(buckets)


def _round_length(length: int) -> int:
    """Up to a multiple of 8, of 32 above 64: each new size of a product costs preparation."""
    step = 8 if length <= 64 else 32
    return -(-length // step) * step


def _round_count(count: int) -> int:
    """Up to a power of two below 8, to a multiple of 8 above."""
    return 1 << (count - 1).bit_length() if count < 8 else -(-count // 8) * 8


class ProductAttention(torch.autograd.Function):
    """Attention inside each text of a pack, from plain matrix products.

    The backward pass of torch's fused CPU kernel is slow on short texts in bfloat16. Scores
    are computed again in the backward pass instead of kept; heads that share keys stand in the rows
    of one product.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float
    ) -> Tensor:
        """Queries (H, T, d), keys and values (K, T, d) -> (T, H, d)."""
        rows = [x.transpose(0, 1).contiguous() for x in (q, k, v)]  # (T, heads, d)
        ctx.save_for_backward(*rows)
        ctx.lengths, ctx.scaling = lengths, scaling
        out = torch.empty_like(rows[0])
        for bucket in plan_buckets(lengths):
            q_b, k_b, v_b = _split(rows, bucket)
            attended = torch.bmm(_probabilities(q_b, k_b, bucket, scaling), v_b)
            out[bucket.start : bucket.stop] = _merge(attended, bucket, rows[0].shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradient of the result (T, H, d) -> gradients of q, k and v."""
        rows: list[Tensor] = list(ctx.saved_tensors)
        grad = gradients[0].contiguous()
        outs = [torch.empty_like(x) for x in rows]
        for bucket in plan_buckets(ctx.lengths):
            q_b, k_b, v_b = _split(rows, bucket)
            (grad_b,) = _split([grad], bucket, rows[1].shape[1], zero=True)
            p = _probabilities(q_b, k_b, bucket, ctx.scaling)  # (n K, G L, L)
            grad_v = torch.bmm(p.transpose(1, 2), grad_b)
            grad_p = torch.bmm(grad_b, v_b.transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_s = grad_s.mul_(ctx.scaling)
            pieces = torch.bmm(grad_s, k_b), torch.bmm(grad_s.transpose(1, 2), q_b), grad_v
            for out, piece in zip(outs, pieces, strict=True):
                out[bucket.start : bucket.stop] = _merge(piece, bucket, out.shape[1])
        grad_q, grad_k, grad_v = (out.transpose(0, 1) for out in outs)
        return grad_q, grad_k, grad_v, None, None


def _split(
    rows: list[Tensor], bucket: _Bucket, shared: int = 0, *, zero: bool = False
) -> list[Tensor]:
    """Rows (T, heads, d) of a bucket as (n K, G L, d): G query heads a key head."""
    shared = shared or rows[-1].shape[1]
    split = []
    for x in rows:
        padded = x[bucket.start : bucket.stop].flatten(1).index_select(0, bucket.gather)
        padded = padded.view(bucket.count, bucket.length, shared, -1, x.shape[2])
        if zero:
            padded.masked_fill_(_rows_of_nothing(bucket), 0)
        padded = padded.permute(0, 2, 3, 1, 4)  # (n, K, G, L, d)
        split.append(padded.reshape(bucket.count * shared, -1, x.shape[2]))
    return split


def _rows_of_nothing(bucket: _Bucket) -> Tensor:
    """True at padded places, (n, L, 1, 1, 1)."""
    empty = torch.ones(bucket.count * bucket.length, dtype=torch.bool)
    empty[bucket.kept] = False
    return empty.view(bucket.count, bucket.length, 1, 1, 1)


def _probabilities(q: Tensor, k: Tensor, bucket: _Bucket, scaling: float) -> Tensor:
    """Softmax of the scores, padded keys left out: (n K, G L, d), (n K, L, d) -> (n K, G L, L)."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    by_text = scores.view(bucket.count, -1, bucket.length)
    by_text.masked_fill_(bucket.mask, float("-inf"))
    return scores.softmax(-1)


def _merge(x: Tensor, bucket: _Bucket, heads: int) -> Tensor:
    """The inverse of `_split`: (n K, G L, d) -> rows (stop - start, heads, d)."""
    width = x.shape[2]
    grouped = x.view(bucket.count, -1, heads // (x.shape[0] // bucket.count), bucket.length, width)
    merged = grouped.permute(0, 3, 1, 2, 4).reshape(-1, heads * width)  # (n L, H d)
    return merged.index_select(0, bucket.kept).view(-1, heads, width)
