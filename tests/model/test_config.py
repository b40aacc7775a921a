"""Configurations in all the forms that checkpoints have."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import TINY, read

from skembed.exceptions import CheckpointError
from skembed.model.network import NVEmbedModel
from skembed.model.pooling import LatentAttention

# What NV-Embed's config.json says, the fields that are read and some that are not.
TEXT_7B: dict[str, Any] = {
    "model_type": "bidir_mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
NV_EMBED_V1: dict[str, Any] = {
    "_name_or_path": "nvidia/NV-Embed-v1",
    "architectures": ["NVEmbedModel"],
    "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
    "model_type": "nvembed",
    "padding_side": "right",
    "is_mask_instruction": True,
    "add_eos": True,
    "mask_type": "b",
    "latent_attention_config": {"model_type": "latent_attention"},
    "text_config": TEXT_7B,
    "torch_dtype": "float16",
}
NV_EMBED_V2 = {**NV_EMBED_V1, "hidden_size": 4096, "_name_or_path": "nvidia/NV-Embed-v2"}


@pytest.mark.parametrize("values", [NV_EMBED_V1, NV_EMBED_V2], ids=["v1", "v2"])
def test_nv_embed_takes_the_published_latent_sizes(values: Mapping[str, Any]) -> None:
    config = read(values)
    assert config.hidden_size == 4096
    assert config.pooling == "latent"
    assert not config.pooling_is_fresh
    assert (config.num_latents_value, config.num_cross_heads) == (512, 8)
    assert (config.cross_dim_head, config.latent_dim, config.ff_mult) == (4096, 4096, 4)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    with torch.device("meta"):
        model = NVEmbedModel(config)
    sizes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(sizes) == 304
    assert sum(map(math.prod, sizes.values())) == 7_851_016_192  # the released checkpoint's
    blocks = "latent_attention_model.cross_attend_blocks"
    assert sizes[f"{blocks}.0.fn.to_kv.weight"] == (65536, 4096)
    assert sizes[f"{blocks}.1.fn.net.2.weight"] == (4096, 16384)
    assert sizes["embedding_model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)


def test_latent_sizes_that_are_named_are_taken() -> None:
    latent = {"num_latents_value": 6, "num_cross_heads": 2, "latent_dim": 12, "cross_dim_head": 5}
    config = read({**NV_EMBED_V2, "latent_attention_config": latent, "text_config": TINY})
    layer = NVEmbedModel(config).latent_attention_model
    assert isinstance(layer, LatentAttention)
    assert layer.latents.shape == (6, 12)
    assert layer.get_parameter("cross_attend_blocks.0.fn.to_kv.weight").shape == (20, 12)


def test_without_a_latent_section_the_defaults_hold() -> None:
    values = {k: v for k, v in NV_EMBED_V2.items() if k != "latent_attention_config"}
    assert read(values) == read(NV_EMBED_V2)


def test_plain_mistral() -> None:
    config = read({**TINY, "bos_token_id": 5, "eos_token_id": 9})
    assert config.pooling_is_fresh
    assert config.pooling == "latent"
    assert config.latent_dim == config.cross_dim_head == config.hidden_size == 32
    assert (config.bos_token_id, config.eos_token_id) == (5, 9)


def test_instruction_masking_can_be_off() -> None:
    assert read(NV_EMBED_V2).is_mask_instruction
    assert not read({**NV_EMBED_V2, "is_mask_instruction": False}).is_mask_instruction


@pytest.mark.parametrize("kind", ["bert", "llama", "bidir_mistral", None])
def test_another_kind_of_model(kind: str | None) -> None:
    with pytest.raises(CheckpointError, match=rf"the folder must have model_type.*got {kind!r}"):
        read({**TINY, "model_type": kind})


def test_nvembed_without_a_backbone() -> None:
    with pytest.raises(CheckpointError, match="the folder"):
        read({"model_type": "nvembed", "hidden_size": 32})


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_backbone_without_its_sizes(field: str) -> None:
    text = {k: v for k, v in TEXT_7B.items() if k != field}
    with pytest.raises(CheckpointError, match=f"the folder lacks {field}"):
        read({**NV_EMBED_V2, "text_config": text})


@pytest.mark.parametrize("pooling", ["latent", "mean", "eos", "multilayer"])
def test_round_trip(pooling: str) -> None:
    config = replace(
        read({**TINY, "rope_theta": 77.0, "head_dim": 12, "bos_token_id": 3}),
        pooling=pooling,
        num_latents_value=7,
        num_cross_heads=3,
        cross_dim_head=9,
        latent_dim=11,
        ff_mult=2,
        is_mask_instruction=False,
        output_normalize=False,
    )
    again = read(config.to_dict())
    assert again == config
    assert not again.pooling_is_fresh  # what is saved has its pooling's weights
    assert again.to_dict() == config.to_dict()
    shapes = {n: t.shape for n, t in NVEmbedModel(config).state_dict().items()}
    assert shapes == {n: t.shape for n, t in NVEmbedModel(again).state_dict().items()}
