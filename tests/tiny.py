"""Tiny models with random weights, and the formulas of their poolings from scratch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paths import GOLDEN
from torch import Tensor, nn

from skembed import NVEmbedVectorizer
from skembed.adapters.lora import LoraSettings
from skembed.adapters.targets import expected_shapes
from skembed.inference.registry import registry
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel, ModelKey
from skembed.model.network import NVEmbedModel
from skembed.model.sources import ModelSource, fingerprint_weights, read_config, resolve_source
from skembed.model.tokenization import PackedBatch

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill all parameters, LayerNorms included, with values far from their usual start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        value = torch.randn(parameter.shape, generator=generator) * scale
        if name.endswith("latents"):
            value = value * 3 + 1
        if "norm" in name and name.endswith("weight"):
            value = value + 1
        parameter.data.copy_(value)


def make_tiny_model(path: str = "grouped") -> NVEmbedModel:
    """Return a model of odd sizes whose random weights make attention far from uniform."""
    config = NVEmbedConfig(
        backbone=TINY,
        num_latents_value=10,
        num_cross_heads=3,
        cross_dim_head=20,
        latent_dim=24,
        ff_mult=2,
    )
    model = NVEmbedModel(config, attention_path="grouped" if path == "stock" else path).eval()
    model.fuse = path != "stock"
    randomize(model.embedding_model)
    randomize(model.latent_attention_model, seed=1)
    return model


def token_states(model: NVEmbedModel, batch: PackedBatch) -> Tensor:
    """Return the last hidden states (T, D) of a pack."""
    with torch.inference_mode():
        states = model.hidden_states(batch)
    assert isinstance(states, Tensor)
    return states


def make_vectorizer(model: Path | str = GOLDEN, **parameters: Any) -> NVEmbedVectorizer:
    """Return an estimator of the tiny checkpoint, exact and without a cache by default."""
    defaults = {"device": "cpu", "dtype": "float32", "cache": None}
    return NVEmbedVectorizer(model, **{**defaults, **parameters})


def base_of(emb: NVEmbedVectorizer) -> LoadedModel:
    """Return the one model that an estimator holds."""
    (loaded,) = emb._lease.models.values()
    return loaded


def weights(emb: NVEmbedVectorizer) -> dict[str, np.ndarray]:
    """Return all that an estimator has learned."""
    adapter = emb.adapter_
    return {name: t.numpy().copy() for name, t in {**adapter.lora, **adapter.pooling}.items()}


def load_base(
    folder: Path, *, dtype: str = "float32", pooling: str | None = None
) -> tuple[LoadedModel, ModelSource]:
    """Return a model of the registry and its source."""
    source = resolve_source(folder)
    config = read_config(source, pooling)
    key = ModelKey(fingerprint_weights(source), config.pooling, "cpu", dtype, "grouped")
    return registry.get(key, source, config), source


def random_lora(config: NVEmbedConfig, settings: LoraSettings, seed: int = 0) -> dict[str, Tensor]:
    """Return matrices that are all away from zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_shapes(config, settings).items()
    }


# The poolings


def reference_norm(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Compute LayerNorm over the last axis by its definition."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(variance + 1e-5)
    return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def reference_attend(
    queries: Tensor, context: Tensor, weights: Mapping[str, Tensor], heads: int
) -> Tensor:
    """Compute cross-attention of (n, D) over (m, C) by einsum on weights split into heads."""
    to_q = weights["cross_attend_blocks.0.fn.to_q.weight"]
    to_kv = weights["cross_attend_blocks.0.fn.to_kv.weight"]
    to_out = weights["cross_attend_blocks.0.fn.to_out.weight"]
    width = to_q.shape[0] // heads
    w_q = to_q.reshape(heads, width, -1)
    w_k = to_kv[: heads * width].reshape(heads, width, -1)
    w_v = to_kv[heads * width :].reshape(heads, width, -1)
    w_out = to_out.reshape(-1, heads, width)
    q = torch.einsum("nd,hwd->hnw", queries, w_q)
    k = torch.einsum("mc,hwc->hmw", context, w_k)
    v = torch.einsum("mc,hwc->hmw", context, w_v)
    scores = torch.einsum("hnw,hmw->hnm", q, k) / math.sqrt(width)
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.einsum("hnm,hmw,dhw->nd", shares, v, w_out)


def reference_feed_forward(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute GEGLU with the exact GELU on the second half."""
    prefix = "cross_attend_blocks.1.fn.net"
    u = x @ weights[f"{prefix}.0.weight"].T + weights[f"{prefix}.0.bias"]
    value, gate = u[..., : u.shape[-1] // 2], u[..., u.shape[-1] // 2 :]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return (value * gelu) @ weights[f"{prefix}.2.weight"].T + weights[f"{prefix}.2.bias"]


def reference_latent(tokens: Tensor, weights: Mapping[str, Tensor], heads: int) -> Tensor:
    """Apply NV-Embed's latent layer to the pooled tokens (n, D) of one text -> (D,)."""
    queries = reference_norm(tokens, weights, "cross_attend_blocks.0.norm")
    context = reference_norm(weights["latents"], weights, "cross_attend_blocks.0.norm_context")
    x = reference_attend(queries, context, weights, heads) + tokens
    normed = reference_norm(x, weights, "cross_attend_blocks.1.norm")
    return (reference_feed_forward(normed, weights) + x).mean(0)


def reference_multilayer(
    layers: Sequence[Tensor], weights: Mapping[str, Tensor], heads: int
) -> Tensor:
    """Pool the layers' token means of one text, each (n, D) -> (D,)."""
    states = torch.stack([layer.mean(0) for layer in layers]) + weights["layer_weights"]
    context = reference_norm(states, weights, "cross_attend_blocks.0.norm_context")
    latents = weights["latents"]
    queries = reference_norm(latents, weights, "cross_attend_blocks.0.norm")
    x = reference_attend(queries, context, weights, heads) + latents
    normed = reference_norm(x, weights, "cross_attend_blocks.1.norm")
    return (reference_feed_forward(normed, weights) + x).mean(0)


def double_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return weights in float64, so that the reference adds no rounding of its own."""
    return {name: value.double() for name, value in module.state_dict().items()}


def make_key(folder: Path, **changes: str) -> tuple[ModelKey, ModelSource, Any]:
    source = ModelSource(str(folder), folder)
    config = read_config(source, changes.get("pooling"))
    key = ModelKey(fingerprint_weights(source), config.pooling, "cpu", "float32", "grouped")
    return replace(key, **changes), source, config
