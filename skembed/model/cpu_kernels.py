"""Forward and backward passes of the backbone's small steps on CPUs.

Besides the large matrix products, a training step on a CPU spends its time on norms, activations
and attention over short texts, and its memory on what autograd records of them. Each function here
computes what the stock module does and keeps only its inputs for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "GatedSiluFunction",
    "LONGEST_PRODUCT",
    "LeanMLP",
    "LeanRMSNorm",
    "ProductAttention",
    "RMSNormFunction",
    "attend_to_buckets",
    "normalise_rms",
    "plan_buckets",
]


class LeanRMSNorm(nn.Module):
    """RMSNorm in two passes over the data, where the stock one takes six, on the stock weight.

    In bfloat16 the scale of a row is rounded once more than in the stock module.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed: Tensor = RMSNormFunction.apply(hidden_states, self.weight, self.eps)
        return normed


class LeanMLP(nn.Module):
    """The stock SiLU MLP on the same three layers; it keeps fewer activations for training."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        product = GatedSiluFunction.apply(self.gate_proj(x), self.up_proj(x))  # (..., I)
        projected: Tensor = self.down_proj(product)
        return projected


# Share of a bucket's length that each of its texts has; the rest is padding. Without gradients
# padding costs more than preparing products of other sizes.
_SHORTEST_SHARE = 0.6
_SHORTEST_SHARE_TIGHT = 0.85
LONGEST_PRODUCT = 1_024  # tokens; the matrix of scores grows with their square


def normalise_rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of (..., D) and the scale of each row, (..., 1), at least float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale.to(x.dtype)).mul_(weight), scale


class RMSNormFunction(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w``, the mean at least in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., D), (D,) -> (..., D)."""
        normed, scale = normalise_rms(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

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
    """``silu(gate) * up``; keeps its two inputs for the backward pass."""

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
    """Neighbouring texts of similar length, padded to one length L."""

    start: int  # first row in the pack
    stop: int  # behind the last row
    count: int  # texts, possibly with a few empty ones, so that sizes repeat
    length: int  # padded length L
    gather: Tensor  # int64 (count, L): the row, counted from `start`, of each padded position
    kept: Tensor  # int64 (stop - start,): the padded position of each row
    mask: Tensor  # bool (count, 1, L - shortest): True where a key from `shortest` on is padding
    shortest: int  # tokens of the shortest text; L where nothing is padded

    @cached_property
    def _rows(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def find_rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return the row of (rows * heads, d) at each position of (count, heads, L, d), and back.

        Both are int64, of shapes (count * heads * L,) and (rows * heads,).
        """
        if heads not in self._rows:
            head = torch.arange(heads)
            padded = self.gather[:, None] * heads + head[:, None]  # (count, heads, length)
            text, position = self.kept // self.length, self.kept % self.length
            packed = (text[:, None] * heads + head) * self.length + position[:, None]
            self._rows[heads] = padded.reshape(-1), packed.reshape(-1)
        return self._rows[heads]


@lru_cache(maxsize=64)
def plan_buckets(lengths: tuple[int, ...], *, tight: bool = False) -> tuple[_Bucket, ...]:
    """Return the buckets of a pack whose texts have these lengths, sorted or not.

    `tight` buckets hold less padding and come in more sizes.
    """
    share = _SHORTEST_SHARE_TIGHT if tight else _SHORTEST_SHARE
    buckets, first, start = [], 0, 0
    while first < len(lengths):
        step = 8 if lengths[first] <= 64 else 32  # each new length costs preparation
        length = -(-lengths[first] // step) * step
        least = min(share * length, length - step + 1)
        last = first + 1
        while last < len(lengths) and least <= lengths[last] <= length:
            last += 1
        sizes = np.array(lengths[first:last])
        count = _round_count(len(sizes), tight=tight)
        shortest = int(sizes.min())
        inside = np.arange(length) < sizes[:, None]  # (n, L)
        gather = np.zeros((count, length), dtype=np.int64)
        gather[: len(sizes)][inside] = np.arange(sizes.sum())
        mask = np.zeros((count, 1, length - shortest), dtype=bool)
        mask[: len(sizes), 0] = ~inside[:, shortest:]
        stop = start + int(sizes.sum())
        buckets.append(
            _Bucket(
                start,
                stop,
                count,
                length,
                torch.from_numpy(gather),
                torch.from_numpy(np.flatnonzero(inside)),
                torch.from_numpy(mask),
                shortest,
            )
        )
        first, start = last, stop
    return tuple(buckets)


def _round_count(count: int, *, tight: bool) -> int:
    """Return the next of four numbers per octave; below 8 any number if `tight`, else a power of 2.

    oneDNN keeps code and memory for each size that it meets.
    """
    if count < 8:
        return count if tight else 1 << (count - 1).bit_length()
    step = max(1, 1 << (count - 1).bit_length() >> 3)
    return -(-count // step) * step


def attend_to_buckets(rows: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """Return attention inside each text, (T, H, d), for tensors without gradients.

    `rows` are scaled queries (T, H, d), keys and values (T, K, d). Rows behind the last text are
    zeros in the result.
    """
    out = torch.empty_like(rows[0])
    for bucket in plan_buckets(lengths, tight=True):
        q, k, v = _split(rows, bucket)
        if bucket.length > LONGEST_PRODUCT:
            attended = _attend_in_blocks(q, k, v, bucket)
        else:
            scores = torch.bmm(q, k.transpose(1, 2))
            attended = torch.bmm(_probabilities(scores, bucket), v)
        _merge_into(out, attended, bucket)
    out[sum(lengths) :].zero_()
    return out


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, bucket: _Bucket) -> Tensor:
    """Return attention, (n K, G L, d), by torch's fused kernel, which never holds all scores."""
    by_head = [x.view(bucket.count, -1, bucket.length, x.shape[2]) for x in (q, k, v)]
    mask = None
    if bucket.shortest < bucket.length:
        mask = q.new_zeros(bucket.count, 1, 1, bucket.length)
        mask[..., bucket.shortest :].masked_fill_(bucket.mask[:, None], float("-inf"))
    groups = by_head[0].shape[1] // by_head[1].shape[1]
    k4, v4 = (x.repeat_interleave(groups, dim=1) for x in by_head[1:])
    return F.scaled_dot_product_attention(by_head[0], k4, v4, mask, scale=1.0).view(q.shape)


class ProductAttention(torch.autograd.Function):
    """Attention inside each text of a pack, from plain matrix products.

    The backward pass of torch's fused CPU kernel is slow on short texts in bfloat16. This one
    recomputes the scores. Heads that share keys are rows of one product.
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
            attended = torch.bmm(_probabilities(_scores(q_b, k_b, scaling), bucket), v_b)
            _merge_into(out, attended, bucket)
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
            p = _probabilities(_scores(q_b, k_b, ctx.scaling), bucket)  # (n K, G L, L)
            grad_v = torch.bmm(p.transpose(1, 2), grad_b)
            grad_p = torch.bmm(grad_b, v_b.transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_s = grad_s.mul_(ctx.scaling)
            pieces = torch.bmm(grad_s, k_b), torch.bmm(grad_s.transpose(1, 2), q_b), grad_v
            for out, piece in zip(outs, pieces, strict=True):
                _merge_into(out, piece, bucket)
        grad_q, grad_k, grad_v = (out.transpose(0, 1) for out in outs)
        return grad_q, grad_k, grad_v, None, None


def _split(
    rows: list[Tensor], bucket: _Bucket, shared: int = 0, *, zero: bool = False
) -> list[Tensor]:
    """Return the bucket's rows of each (T, heads, d) as (n K, G L, d): G query heads per key head.

    `shared` is K; 0 reads it from the last of `rows`. `zero` clears padded positions.
    """
    shared = shared or rows[-1].shape[1]
    split = []
    for x in rows:
        heads, width = x.shape[1:]
        padded = x[bucket.start : bucket.stop].flatten(0, 1)
        padded = padded.index_select(0, bucket.find_rows(heads)[0])
        if zero:
            empty = torch.ones(bucket.count * bucket.length, dtype=torch.bool)
            empty[bucket.kept] = False
            by_text = padded.view(bucket.count, heads, bucket.length, width)
            by_text.masked_fill_(empty.view(bucket.count, 1, bucket.length, 1), 0)
        split.append(padded.view(bucket.count * shared, -1, width))
    return split


def _scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """Return the scaled scores (n K, G L, L) of (n K, G L, d) and (n K, L, d)."""
    return torch.bmm(q, k.transpose(1, 2)).mul_(scaling)


def _probabilities(scores: Tensor, bucket: _Bucket) -> Tensor:
    """Return the softmax of scores (n K, G L, L), in place, over all but padded keys."""
    if bucket.shortest < bucket.length:
        by_text = scores.view(bucket.count, -1, bucket.length)
        by_text[..., bucket.shortest :].masked_fill_(bucket.mask, float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _merge_into(out: Tensor, x: Tensor, bucket: _Bucket) -> None:
    """Write (n K, G L, d) to the bucket's rows of `out`, (T, heads, d): the inverse of `_split`."""
    heads, width = out.shape[1:]
    target = out[bucket.start : bucket.stop].view(-1, width)
    torch.index_select(x.view(-1, width), 0, bucket.find_rows(heads)[1], out=target)
