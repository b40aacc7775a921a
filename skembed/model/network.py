"""The embedding model: a bidirectional Mistral backbone and a pooling layer.

The backbone is transformers' own `MistralModel`, unchanged. Two things make it bidirectional and
free of padding, both through transformers' public registries:

- an attention function that never applies a causal mask or a sliding window
  (`skembed.model.attention`), and
- packed input: all texts of a batch stand one after the other in one row, positions restart at 0
  with each text, and the attention function alone knows where a text begins and ends.

So every linear layer and norm sees real tokens only.

Source: arXiv 2405.17428, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralModel

from skembed.model.attention import ATTENTION_NAME
from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_forward import can_fuse, run_backbone
from skembed.model.cpu_kernels import LeanActivation, LeanRMSNorm
from skembed.model.pooling import (
    EosPooling,
    FoldedLatentAttention,
    LatentAttention,
    MeanPooling,
    MultiLayerPooling,
)
from skembed.model.tokenization import PackedBatch

__all__ = ["NVEmbedModel", "backbone_on_meta", "build_pooling", "load_pooling", "pooling_shapes"]


def build_pooling(config: NVEmbedConfig) -> nn.Module:
    """The pooling module of a configuration, with fresh weights."""
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
    """Token ids of packed texts -> one raw vector per text (not yet normalised).

    `embedding_model` is transformers' `MistralModel`, `latent_attention_model` the pooling;
    both names are those of the published checkpoints.

    Parameters
    ----------
    config : NVEmbedConfig
        The architecture.
    attention_path : {"grouped", "varlen", "padded"}
        How packed texts attend; see the module's table.
    """

    def __init__(self, config: NVEmbedConfig, *, attention_path: str = "grouped") -> None:
        super().__init__()
        self.config = config
        self.attention_path = attention_path
        self.embedding_model = MistralModel(config.mistral_config())
        self.fuse = True  # False: transformers' own forward pass on the CPU, too
        self.is_silu = self.embedding_model.config.hidden_act in ("silu", "swish")
        self.latent_attention_model = build_pooling(config)

    def hidden_states(
        self, batch: PackedBatch, *, all_layers: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Last hidden states (T, D) of a pack, or those of every layer, in a tuple."""
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
        """Whether a pass would be the fused one; while gradients are recorded it is not."""
        ours = self.embedding_model.config._attn_implementation == ATTENTION_NAME
        known = self.fuse and ours and self.attention_path == "grouped" and self.is_silu
        return known and can_fuse(self.embedding_model.norm.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw vectors, float32 (B, D), of a pack of B texts."""
        if self.config.pooling == "multilayer":
            layers = self.hidden_states(batch, all_layers=True)
            hidden: Any = [layer[batch.pool_index] for layer in layers]
        else:
            hidden = self.hidden_states(batch)[batch.pool_index]  # (P, D)
        return self.latent_attention_model(hidden, batch.pool_segments, batch.pool_counts)

    def use_lean_modules(self) -> None:
        """Replace the backbone's RMSNorms and activations by lean ones on the same weights."""
        eps = self.embedding_model.config.rms_norm_eps
        stock = type(self.embedding_model.norm)
        for name, module in list(self.embedding_model.named_modules()):
            if isinstance(module, stock):
                self.embedding_model.set_submodule(name, LeanRMSNorm(module.weight, eps))
        for k in range(len(self.embedding_model.layers)):
            mlp = self.embedding_model.get_submodule(f"layers.{k}.mlp")
            mlp.act_fn = LeanActivation(mlp.get_submodule("act_fn"), is_silu=self.is_silu)

    def fold_pooling(self) -> None:
        """Replace a latent layer by its inference form; other poolings stay."""
        if isinstance(self.latent_attention_model, LatentAttention):
            self.latent_attention_model = FoldedLatentAttention(self.latent_attention_model)


def backbone_on_meta(config: NVEmbedConfig) -> nn.Module:
    """The backbone without memory for its weights."""
    with torch.device("meta"):
        return NVEmbedModel(replace(config, pooling="mean")).embedding_model


def pooling_shapes(config: NVEmbedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a configuration's pooling in its published form."""
    with torch.device("meta"):
        return {n: tuple(tensor.shape) for n, tensor in build_pooling(config).state_dict().items()}


def load_pooling(config: NVEmbedConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """A pooling layer in its published form with these weights as its own parameters."""
    with torch.device("meta"):
        pooling = build_pooling(config)
    pooling.load_state_dict(dict(weights), assign=True)
    return pooling
