"""Poolings: token vectors of packed texts -> one vector per text.

All poolings take hidden states of the *pooled* tokens only, packed one text after the other:
NV-Embed's latent layer works on each token by itself, so instruction tokens never reach it.
Attribute names equal the keys of the published checkpoints.

Sources: NV-Embed, arXiv 2405.17428, section 3.2; multi-layer trainable pooling, arXiv 2409.02727.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skembed.model.cpu_forward import fused_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CrossAttention",
    "EosPooling",
    "FoldedLatentAttention",
    "GatedFeedForward",
    "LatentAttention",
    "MeanPooling",
    "MultiLayerPooling",
    "POOLINGS",
    "PreNorm",
    "segment_mean",
]

POOLINGS = ("latent", "mean", "eos", "multilayer")


def segment_mean(values: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of packed rows per text, in float32: (P, D), (P,), (B,) -> (B, D)."""
    total = values.new_zeros(len(counts), values.shape[-1], dtype=torch.float32)
    total.index_add_(0, segments, values.float())
    return total / counts.clamp(min=1).unsqueeze(1)


class PreNorm(nn.Module):
    """A block with its LayerNorm(s) in front; holds the checkpoint's names, computes nothing."""

    fn: nn.Module
    norm: nn.LayerNorm
    norm_context: nn.LayerNorm | None

    def __init__(self, dim: int, fn: nn.Module, context_dim: int | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)


def _blocks(layer: nn.Module) -> tuple[Any, Any]:
    """Return the attention and the feed-forward block of a layer."""
    attend, feed_forward = layer.get_submodule("cross_attend_blocks").children()
    return attend, feed_forward


class CrossAttention(nn.Module):
    """Projections of a multi-head cross-attention without biases."""

    def __init__(self, query_dim: int, context_dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, query_dim, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., N, H * d_h) -> (..., H, N, d_h); channels are head-major."""
        return x.unflatten(-1, (self.heads, self.dim_head)).transpose(-3, -2)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend from (..., N, query_dim) to (..., M, context_dim) -> (..., N, query_dim)."""
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (self.split_heads(x) for x in (self.to_q(queries), k, v))
        attended = (q @ k.transpose(-1, -2) * self.dim_head**-0.5).softmax(-1) @ v
        return self.to_out(attended.transpose(-3, -2).flatten(-2))


class GatedFeedForward(nn.Module):
    """GEGLU: ``net.0`` doubles as value and gate (second half), ``net.2`` projects back."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        # "1" is the activation in the checkpoint's numbering.
        self.net = nn.ModuleDict(
            {"0": nn.Linear(dim, 2 * mult * dim), "2": nn.Linear(mult * dim, dim)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        value, gate = self.net["0"](x).chunk(2, dim=-1)
        return self.net["2"](value * F.gelu(gate))


class LatentAttention(nn.Module):
    """NV-Embed's latent-attention layer (arXiv 2405.17428, section 3.2) in its published form.

    Tokens are the queries; ``num_latents`` trained vectors are keys and values. With
    ``H`` the token vectors and ``Z`` the latents::

        H1 = H + concat_i softmax(q_i k_i^T / sqrt(d_h)) v_i W_out
        q = LN(H) W_q,   [k | v] = LN_c(Z) W_kv
        H2 = H1 + GEGLU(LN_ff(H1))
        e  = mean of H2 over the pooled tokens of a text        (float32)

    In NV-Embed a head is as wide (``dim_head``) as the token vectors.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        latent_dim: int,
        num_latents: int,
        num_heads: int,
        dim_head: int,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        attention = CrossAttention(hidden_dim, latent_dim, num_heads, dim_head)
        feed_forward = GatedFeedForward(hidden_dim, ff_mult)
        self.cross_attend_blocks = nn.ModuleList(
            [PreNorm(hidden_dim, attention, latent_dim), PreNorm(hidden_dim, feed_forward)]
        )

    def transform_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the token vectors after the layer: (P, D) -> (P, D)."""
        attend, feed_forward = _blocks(self)
        context = attend.norm_context(self.latents)
        hidden_states = attend.fn(attend.norm(hidden_states), context) + hidden_states
        return feed_forward.fn(feed_forward.norm(hidden_states)) + hidden_states

    def forward(self, hidden_states: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
        """Packed pooled tokens (P, D), their text (P,), tokens per text (B,) -> (B, D) float32."""
        return segment_mean(self.transform_tokens(hidden_states), segments, counts)

    def start_as_mean(self) -> None:
        """Zero the two output projections: a fresh layer then equals mean pooling exactly."""
        attend, feed_forward = _blocks(self)
        nn.init.zeros_(attend.fn.to_out.weight)
        nn.init.zeros_(feed_forward.fn.net["2"].weight)
        nn.init.zeros_(feed_forward.fn.net["2"].bias)


class FoldedLatentAttention(nn.Module):
    r"""Inference form of `LatentAttention`: the same function with far fewer multiplications.

    Keys and values depend on the latents alone, so they fold into the matrices around them. For
    head i, with rows as vectors, ``x`` the normalised token without the affine part of LN_q
    (weight ``w``, bias ``b``), ``W_q,i`` of shape (d_h, D) and ``k_i``, ``v_i`` of shape (r, d_h)::

        scores_i = ((x * w + b) W_q,i^T) k_i^T / sqrt(d_h)
                 = x A_i^T + c_i,    A_i = (k_i W_q,i / sqrt(d_h)) * w   (r, D),
                                     c_i = (k_i W_q,i / sqrt(d_h)) b     (r,)
        out_i    = softmax(scores_i) v_i W_out,i^T
                 = softmax(scores_i) U_i,  U_i = v_i W_out,i^T           (r, D)

    so a token costs ``2 H r D`` multiplications instead of ``2 H d_h (D + r)``. For 512 latents
    and 8 heads of 4,096 that is 33.6 million against 302 million, and A and U hold 33.6 million
    weights where W_q, W_kv and W_out hold 537 million.
    The affine part of LN_ff folds into the first feed-forward matrix in the same way. The last
    matrix moves behind the mean over tokens, where it meets one vector per text::

        mean_t (W_2 g_t + b_2) = W_2 (mean_t g_t) + b_2
    """

    keys: Tensor  # (H * r, D)
    keys_bias: Tensor  # (H * r,)
    values: Tensor  # (D, H * r)
    value: Tensor  # (mult * D, D), first half of the feed-forward block's first matrix
    value_bias: Tensor
    gate: Tensor  # (mult * D, D), its second half
    gate_bias: Tensor
    last: Tensor  # (D, mult * D)
    last_bias: Tensor
    fused_weights = ("keys", "values", "value", "gate")

    def __init__(self, layer: LatentAttention) -> None:
        super().__init__()
        attend, feed_forward = _blocks(layer)
        with torch.no_grad():
            keys, bias, values = _fold_attention(layer)
            norm, first = feed_forward.norm, feed_forward.fn.net["0"]
            first_bias = first.bias.float() + first.weight.float() @ norm.bias.float()
            value, gate = (first.weight * norm.weight).chunk(2)
            value_bias, gate_bias = first_bias.chunk(2)
            last = feed_forward.fn.net["2"]
            dtype = first.weight.dtype
            self.heads = attend.fn.heads
            buffers = {
                "keys": keys,
                "keys_bias": bias,
                "values": values.T,
                "value": value,
                "value_bias": value_bias,
                "gate": gate,
                "gate_bias": gate_bias,
                "last": last.weight.detach(),
                "last_bias": last.bias.detach(),
            }
            for name, tensor in buffers.items():
                self.register_buffer(name, tensor.to(dtype).contiguous())
        self.eps: float = attend.norm.eps

    def forward(self, hidden_states: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
        """Packed pooled tokens (P, D), their text (P,), tokens per text (B,) -> (B, D) float32."""
        width = (hidden_states.shape[-1],)
        x = F.layer_norm(hidden_states, width, eps=self.eps)
        scores = fused_linear(x, self.keys, self.keys_bias).unflatten(-1, (self.heads, -1))
        attention = scores.softmax(-1).flatten(-2)  # (P, H * r)
        hidden_states = fused_linear(attention, self.values, plus=hidden_states)  # (P, D)
        x = F.layer_norm(hidden_states, width, eps=self.eps)
        gate = fused_linear(x, self.gate, self.gate_bias, activation="gelu")
        gated = fused_linear(x, self.value, self.value_bias, times=gate)  # (P, mult * D)
        activated = segment_mean(gated, segments, counts)  # (B, mult * D)
        projected = F.linear(activated.to(self.last.dtype), self.last, self.last_bias)
        return segment_mean(hidden_states, segments, counts) + projected.float()


def _fold_attention(layer: LatentAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (H * r, D), c (H * r,) and U (H * r, D) of `FoldedLatentAttention`, in float32."""
    attend, _ = _blocks(layer)
    attention: CrossAttention = attend.fn
    width = attention.dim_head
    norm_weight, norm_bias = attend.norm.weight.float(), attend.norm.bias.float()
    context = F.layer_norm(
        layer.latents.float(),
        layer.latents.shape[-1:],
        attend.norm_context.weight.float(),
        attend.norm_context.bias.float(),
        attend.norm_context.eps,
    )
    kv = attention.to_kv.weight
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for head in range(attention.heads):
        rows = slice(head * width, (head + 1) * width)
        value_rows = slice((attention.heads + head) * width, (attention.heads + head + 1) * width)
        k = context @ kv[rows].float().T  # (r, d_h)
        v = context @ kv[value_rows].float().T
        unscaled = k @ attention.to_q.weight[rows].float() * width**-0.5  # (r, D)
        parts[0].append(unscaled * norm_weight)
        parts[1].append(unscaled @ norm_bias)
        parts[2].append(v @ attention.to_out.weight[:, rows].float().T)
    keys, bias, values = (torch.cat(part) for part in parts)
    return keys, bias, values


class MeanPooling(nn.Module):
    """Mean over the pooled tokens."""

    def forward(self, hidden_states: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
        """Packed pooled tokens (P, D), their text (P,), tokens per text (B,) -> (B, D) float32."""
        return segment_mean(hidden_states, segments, counts)


class EosPooling(nn.Module):
    """Last token of each text: end-of-sequence, or the last one before the cut."""

    def forward(self, hidden_states: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
        """Packed pooled tokens (P, D), their text (P,), tokens per text (B,) -> (B, D) float32."""
        last = counts.long().cumsum(0) - 1
        return hidden_states[last.clamp(max=len(hidden_states) - 1)].float()


class MultiLayerPooling(nn.Module):
    """Trainable pooling over the layers of the backbone (arXiv 2409.02727).

    Each layer is averaged over the pooled tokens, which gives S of shape (B, layers, D). A trained
    matrix W of one row per layer is added. Then the latents are the queries and the layers the keys
    and values, the opposite of NV-Embed::

        X = softmax(LN(Z) W_q ([k | v] = LN(S + W) W_kv)_k^T / sqrt(d_h)) v W_out + Z
        X = GEGLU(LN(X)) + X;   e = mean of X over the latents

    The paper's code has 768 latents and 32 heads of 2,048.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        num_layers: int,
        num_latents: int,
        num_heads: int,
        dim_head: int,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(num_layers, hidden_dim))
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_dim))
        attention = CrossAttention(hidden_dim, hidden_dim, num_heads, dim_head)
        feed_forward = GatedFeedForward(hidden_dim, ff_mult)
        self.cross_attend_blocks = nn.ModuleList(
            [PreNorm(hidden_dim, attention, hidden_dim), PreNorm(hidden_dim, feed_forward)]
        )

    def forward(self, layers: Sequence[Tensor], segments: Tensor, counts: Tensor) -> Tensor:
        """One (P, D) tensor per layer, text of each token (P,), counts (B,) -> (B, D) float32."""
        attend, feed_forward = _blocks(self)
        means = [segment_mean(layer, segments, counts) for layer in layers]
        states = torch.stack(means, dim=1).to(self.latents.dtype)  # (B, layers, D)
        context = attend.norm_context(states + self.layer_weights)
        x = attend.fn(attend.norm(self.latents), context) + self.latents  # (B, r, D)
        x = feed_forward.fn(feed_forward.norm(x)) + x
        return x.float().mean(1)
