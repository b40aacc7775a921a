"""The embedding model: a bidirectional Mistral backbone and a pooling layer.

The backbone is transformers' own `MistralModel`, unchanged. Two things make it bidirectional and
free of padding, both through transformers' public registries: an attention function without a
causal mask or a sliding window (`skembed.model.attention`), and packed input. All texts of a batch
stand one after the other in one row, positions restart at 0 with each text, and the attention
function alone knows where a text begins and ends.

Source: arXiv 2405.17428, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralModel

from skembed.exceptions import CheckpointError
from skembed.model.attention import ATTENTION_NAME
from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_forward import can_fuse, run_backbone
from skembed.model.cpu_kernels import LeanMLP, LeanRMSNorm
from skembed.model.pooling import (
    EosPooling,
    FoldedLatentAttention,
    LatentAttention,
    MeanPooling,
    MultiLayerPooling,
)
from skembed.model.tokenization import PackedBatch

__all__ = [
    "NVEmbedModel",
    "backbone_on_meta",
    "build_pooling",
    "describe_sizes",
    "load_pooling",
    "pooling_shapes",
    "without_autocast",
]


_DEVICE_TYPES = ("cpu", "cuda", "mps")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch torch's autocast off inside the block or the decorated function.

    A model's own `dtype` decides. Autocast would mix types that the kernels take in one only, and
    round the matrices that are folded, merged or trained.
    """
    with ExitStack() as stack:
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def build_pooling(config: NVEmbedConfig) -> nn.Module:
    """Return the pooling module of a configuration, with fresh weights."""
    sizes = {
        "num_latents": config.num_latents_value,
        "num_heads": config.num_cross_heads,
        "dim_head": config.cross_dim_head,
        "ff_mult": config.ff_mult,
    }
    if config.pooling == "latent":
        return LatentAttention(config.hidden_size, latent_dim=config.latent_dim, **sizes)
    if config.pooling == "multilayer":
        layers = int(config.backbone["num_hidden_layers"])
        return MultiLayerPooling(config.hidden_size, num_layers=layers, **sizes)
    return MeanPooling() if config.pooling == "mean" else EosPooling()


class NVEmbedModel(nn.Module):
    """Token ids of packed texts -> one raw vector per text, not yet normalised.

    Its two parts bear the names of the published checkpoints' keys. `attention_path` is one of
    `skembed.model.attention.ATTENTION_PATHS`.
    """

    def __init__(self, config: NVEmbedConfig, *, attention_path: str = "grouped") -> None:
        super().__init__()
        self.config = config
        self.attention_path = attention_path
        self.embedding_model = MistralModel(config.mistral_config())
        self.fuse = True  # False: transformers' own forward pass on CPUs too
        self.is_silu = self.embedding_model.config.hidden_act in ("silu", "swish")
        self.latent_attention_model = build_pooling(config)

    @without_autocast()
    def hidden_states(
        self, batch: PackedBatch, *, all_layers: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the last hidden states (T, D) of a pack, or a tuple of every layer's."""
        if self.runs_fused:
            results = run_backbone(self.embedding_model, batch, all_layers=all_layers)
            return tuple(results) if all_layers else results[-1]
        output = self.embedding_model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            output_hidden_states=all_layers,
            packed=batch,
            path=self.attention_path,
        )
        if all_layers:  # the first entry is the word vectors, which the paper leaves out
            return tuple(hidden[0] for hidden in output.hidden_states[1:])
        return output.last_hidden_state[0]

    @property
    def runs_fused(self) -> bool:
        """Whether a pass would be the fused one, which records no gradients."""
        is_stock = self.embedding_model.config._attn_implementation != ATTENTION_NAME
        fusible = self.fuse and self.is_silu and self.attention_path == "grouped"
        return fusible and not is_stock and can_fuse(self.embedding_model.norm.weight)

    @without_autocast()
    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the raw vectors, float32 (B, D), of a pack of B texts."""
        if self.config.pooling == "multilayer":
            layers = self.hidden_states(batch, all_layers=True)
            hidden: Any = [layer[batch.pool_index] for layer in layers]
        else:
            hidden = self.hidden_states(batch)[batch.pool_index]  # (P, D)
        return self.latent_attention_model(hidden, batch.pool_segments, batch.pool_counts)

    def use_lean_modules(self) -> None:
        """Replace the backbone's RMSNorms and SiLU MLPs by lean ones on the same weights."""
        eps = self.embedding_model.config.rms_norm_eps
        stock = type(self.embedding_model.norm)
        for name, module in list(self.embedding_model.named_modules()):
            if isinstance(module, stock):
                self.embedding_model.set_submodule(name, LeanRMSNorm(module.weight, eps))
        layers: Any = self.embedding_model.layers
        for layer in layers if self.is_silu else ():
            layer.mlp = LeanMLP(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)

    def fold_pooling(self) -> None:
        """Replace a latent layer by its inference form; other poolings stay."""
        if isinstance(self.latent_attention_model, LatentAttention):
            self.latent_attention_model = FoldedLatentAttention(self.latent_attention_model)


@contextmanager
def describe_sizes(subject: str = "The config.json of the model") -> Iterator[None]:
    """Raise CheckpointError for what fails while a model is built without memory for weights."""
    try:
        yield
    except Exception as error:  # transformers and torch raise all kinds
        raise CheckpointError(
            f"{subject} describes no model that can be built: {type(error).__name__}: {error}."
        ) from error


def backbone_on_meta(config: NVEmbedConfig) -> nn.Module:
    """Return the backbone without memory for its weights."""
    with describe_sizes(), torch.device("meta"):
        return NVEmbedModel(replace(config, pooling="mean")).embedding_model


def pooling_shapes(config: NVEmbedConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the pooling's weights in their published form."""
    with describe_sizes(), torch.device("meta"):
        return {n: tuple(tensor.shape) for n, tensor in build_pooling(config).state_dict().items()}


def load_pooling(config: NVEmbedConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a pooling layer in its published form whose parameters are these weights."""
    with torch.device("meta"):
        pooling = build_pooling(config)
    pooling.load_state_dict(dict(weights), assign=True)
    return pooling
