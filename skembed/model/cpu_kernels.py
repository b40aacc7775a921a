"""Forward and backward passes of the backbone's small steps, written for CPUs.

Beside the large matrix products, a training step on a CPU spends its time on norms, activations and
attention on short texts, and its memory on autograd's records of them. Each function here computes
what the stock module does and keeps only its inputs for the backward pass.
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
    "LeanActivation",
    "LeanRMSNorm",
    "ProductAttention",
    "RMSNormFunction",
    "attend_to_buckets",
    "normalise_rms",
    "plan_buckets",
]


class LeanRMSNorm(nn.Module):
    """RMSNorm in two passes over the data, for CPUs, where stock RMSNorm takes six.

    The mean of squares is taken in float32 as in the stock module; in bfloat16 the scale of a row
    is rounded once more. Shares the stock module's weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed: Tensor = RMSNormFunction.apply(hidden_states, self.weight, self.eps)
        return normed


class LeanActivation(nn.Module):
    """The stock MLP's activation, fused with the product with the other branch.

    On CPUs writing into newly allocated memory costs more than the arithmetic on it. The stock
    MLP's own forward stays; it multiplies what this returns.
    """

    def __init__(self, stock: nn.Module, *, is_silu: bool = False) -> None:
        super().__init__()
        self.stock = stock
        self.is_silu = is_silu

    def forward(self, gate: Tensor) -> Any:
        """(..., I) -> a factor to multiply with the other branch, or the plain activation."""
        if gate.requires_grad:
            return _GatedFactor(gate) if self.is_silu else self.stock(gate)
        return _InPlaceFactor(self.stock(gate))


class _InPlaceFactor:
    """A tensor that may be overwritten by its product."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __mul__(self, other: Tensor) -> Tensor:
        if other.requires_grad:
            return self.tensor * other
        return self.tensor.mul_(other)

    __rmul__ = __mul__


class _GatedFactor:
    """A gate whose product with the other branch keeps its inputs only."""

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def __mul__(self, other: Tensor) -> Tensor:
        product: Tensor = GatedSiluFunction.apply(self.gate, other)
        return product

    __rmul__ = __mul__


# Share of a bucket's length that each of its texts has; the rest is padding. Without gradients
# padding costs more than preparing products of other sizes.
_SHORTEST_SHARE = 0.6
_SHORTEST_SHARE_TIGHT = 0.85
LONGEST_PRODUCT = 1_024  # tokens; the matrix of scores grows with their square


def normalise_rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of (..., D), and the scale of each row (..., 1), at least in float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale.to(x.dtype)).mul_(weight), scale


class RMSNormFunction(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * w``; the mean in float32 at the least."""

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
    gather : Tensor of int64, shape (count, length)
        Row, from `start`, that stands at each padded place.
    kept : Tensor of int64, shape (stop - start,)
        Padded place of each row.
    mask : Tensor of bool, shape (count, 1, length - shortest)
        True where a key from position `shortest` on is padding.
    shortest : int
        Tokens that each text has at the least; `length` where nothing is padded.
    """

    start: int
    stop: int
    count: int
    length: int
    gather: Tensor
    kept: Tensor
    mask: Tensor
    shortest: int

    @cached_property
    def _rows(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def find_rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where heads come from and go to, when each is a row of its own.

        Returns
        -------
        padded : Tensor of int64, shape (count * heads * length,)
            Row of (rows * heads, d) that stands at each place of (count, heads, length, d).
        packed : Tensor of int64, shape (rows * heads,)
            The way back.
        """
        if heads not in self._rows:
            head = torch.arange(heads)
            padded = self.gather[:, None] * heads + head[:, None]  # (count, heads, length)
            text, place = self.kept // self.length, self.kept % self.length
            packed = (text[:, None] * heads + head) * self.length + place[:, None]
            self._rows[heads] = padded.reshape(-1), packed.reshape(-1)
        return self._rows[heads]


@lru_cache(maxsize=64)
def plan_buckets(lengths: tuple[int, ...], *, tight: bool = False) -> tuple[_Bucket, ...]:
    """Buckets of a pack whose texts have these lengths, sorted or not.

    `tight` ones hold less padding and have more different sizes.
    """
    share = _SHORTEST_SHARE_TIGHT if tight else _SHORTEST_SHARE
    buckets, first, start = [], 0, 0
    while first < len(lengths):
        length, step = _round_length(lengths[first])
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


def _round_length(length: int) -> tuple[int, int]:
    """Up to a multiple of 8, of 32 above 64, and that step: each new size costs preparation."""
    step = 8 if length <= 64 else 32
    return -(-length // step) * step, step


def _round_count(count: int, *, tight: bool) -> int:
    """Up to one of four numbers an octave: oneDNN keeps code and memory for each size it meets.

    Below 8 any number if `tight`, else a power of two.
    """
    if count < 8:
        return count if tight else 1 << (count - 1).bit_length()
    step = max(1, 1 << (count - 1).bit_length() >> 3)
    return -(-count // step) * step


def attend_to_buckets(rows: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """Attention inside each text of a pack, without a record for gradients.

    Parameters
    ----------
    rows : list of Tensor
        Queries (T, H, d), already scaled, keys and values (T, K, d).
    lengths : tuple of int
        Tokens of each text; rows behind the last text come out as zeros.

    Returns
    -------
    Tensor, shape (T, H, d)
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
    """Attention by torch's fused kernel, which never holds all scores: (n K, G L, d) -> same."""
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
    """Rows (T, heads, d) of a bucket as (n K, G L, d): G query heads a key head."""
    shared = shared or rows[-1].shape[1]
    split = []
    for x in rows:
        heads, width = x.shape[1:]
        padded = x[bucket.start : bucket.stop].flatten(0, 1)
        padded = padded.index_select(0, bucket.find_rows(heads)[0])
        if zero:
            by_text = padded.view(bucket.count, heads, bucket.length, width)
            by_text.masked_fill_(_rows_of_nothing(bucket), 0)
        split.append(padded.view(bucket.count * shared, -1, width))
    return split


def _rows_of_nothing(bucket: _Bucket) -> Tensor:
    """True at padded places, (n, 1, L, 1)."""
    empty = torch.ones(bucket.count * bucket.length, dtype=torch.bool)
    empty[bucket.kept] = False
    return empty.view(bucket.count, 1, bucket.length, 1)


def _scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """(n K, G L, d), (n K, L, d) -> (n K, G L, L)."""
    return torch.bmm(q, k.transpose(1, 2)).mul_(scaling)


def _probabilities(scores: Tensor, bucket: _Bucket) -> Tensor:
    """Softmax of the scores (n K, G L, L) in their place, padded keys left out."""
    if bucket.shortest < bucket.length:
        by_text = scores.view(bucket.count, -1, bucket.length)
        by_text[..., bucket.shortest :].masked_fill_(bucket.mask, float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _merge_into(out: Tensor, x: Tensor, bucket: _Bucket) -> None:
    """The inverse of `_split`: (n K, G L, d) -> the bucket's rows of `out` (T, heads, d)."""
    heads, width = out.shape[1:]
    target = out[bucket.start : bucket.stop].view(-1, width)
    torch.index_select(x.view(-1, width), 0, bucket.find_rows(heads)[1], out=target)
