"""Networks of any configuration, their weights random."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tiny import randomize
from torch import Tensor

from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch, pack_texts

TINY: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(values: Mapping[str, Any]) -> NVEmbedConfig:
    """Read a configuration as `read_config` does after parsing."""
    return NVEmbedConfig.from_dict(json.loads(json.dumps(values)), "the folder")


def make_model(values: Mapping[str, Any], *, pooling: str = "mean", seed: int = 0) -> NVEmbedModel:
    """Return a model with random weights that depend on the seed and the shapes alone."""
    model = NVEmbedModel(replace(read(values), pooling=pooling)).eval()
    randomize(model.embedding_model, seed)
    randomize(model.latent_attention_model, seed + 1)
    return model


def make_batch(*lengths: int) -> PackedBatch:
    """Return a pack of texts with seeded token ids below 64."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 64, (n,), generator=generator).numpy() for n in lengths]
    return pack_texts(ids, 0)


def run(model: NVEmbedModel, *lengths: int) -> Tensor:
    """Raw vectors of the pack above."""
    with torch.inference_mode():
        return model(make_batch(*lengths))
