"""Configurations, and that each field of them changes what it should and nothing else."""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from tiny import randomize, token_states
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skembed.exceptions import CheckpointError
from skembed.model import attention as model_module
from skembed.model.attention import ATTENTION_NAME, ATTENTION_PATHS
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.pooling import FoldedLatentAttention, LatentAttention, MultiLayerPooling
from skembed.model.tokenization import PackedBatch, pack_texts

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


# Configurations


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


# The backbone


def test_no_sliding_window() -> None:
    """40 tokens, a window of 4: the reference never applies it, and neither does this."""
    plain = make_model(TINY)
    windowed = make_model({**TINY, "sliding_window": 4})
    assert torch.equal(run(plain, 40, 7), run(windowed, 40, 7))
    assert windowed.embedding_model.config.sliding_window is None


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rope_theta_in_both_forms(base: float) -> None:
    text = {k: v for k, v in TINY.items() if k != "rope_theta"}
    old = make_model({**text, "rope_theta": base})
    new = make_model({**text, "rope_parameters": {"rope_type": "default", "rope_theta": base}})
    expected = torch.tensor([base ** (-k / 8) for k in range(0, 8, 2)])  # heads of 8
    for model in (old, new):
        torch.testing.assert_close(model.embedding_model.rotary_emb.inv_freq, expected)
    assert torch.equal(run(old, 30), run(new, 30))


def test_rope_theta_is_used() -> None:
    fast, slow = make_model({**TINY, "rope_theta": 50.0}), make_model(TINY)
    assert (run(fast, 30) - run(slow, 30)).abs().max() > 1e-2


def test_rope_scaling_is_used() -> None:
    scaled = make_model({**TINY, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    plain = make_model(TINY)
    ratio = plain.embedding_model.rotary_emb.inv_freq / scaled.embedding_model.rotary_emb.inv_freq
    torch.testing.assert_close(ratio, torch.full((4,), 4.0))


@pytest.mark.parametrize("fuse", [True, False])
def test_position_ids_restart_with_each_text(fuse: bool) -> None:
    """Looked at where they arrive: rotary attention gives nearly the same without a restart."""
    model, seen = make_model(TINY), []
    model.fuse = fuse

    def note(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].tolist())

    model.embedding_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    run(model, 3, 2, 4)
    assert seen == [[[0, 1, 2, 0, 1, 0, 1, 2, 3]]]


def test_order_counts_and_place_does_not() -> None:
    """The order of the tokens in a text counts, its place in the pack does not."""
    model = make_model(TINY)
    ids = make_batch(12).input_ids.numpy()
    with torch.inference_mode():
        vectors = model(pack_texts([ids, ids[::-1].copy(), ids], 0))
    torch.testing.assert_close(vectors[0], vectors[2], rtol=1e-5, atol=1e-6)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-2


@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_grouped_queries(path: str) -> None:
    """Two key heads for four query heads equal four key heads that are pairwise the same."""
    few = make_model(TINY)
    many = make_model({**TINY, "num_key_value_heads": 4})
    weights = few.state_dict()
    for name, value in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = value.unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    few.attention_path = many.attention_path = path
    torch.testing.assert_close(run(few, 9, 9, 4), run(many, 9, 9, 4), rtol=1e-5, atol=1e-5)


def test_paths_agree() -> None:
    model = make_model(TINY, pooling="latent")
    grouped = run(model, 20, 5, 5, 31, 1)
    model.attention_path = "padded"
    torch.testing.assert_close(run(model, 20, 5, 5, 31, 1), grouped, rtol=1e-5, atol=1e-5)


def test_attention_is_registered_publicly() -> None:
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    model = make_model(TINY)
    kind = type(model.embedding_model)
    assert kind.__module__.startswith("transformers.")  # the stock class, unchanged
    assert kind.__name__ == "MistralModel"


def test_no_private_imports() -> None:
    """From transformers' top level only, and no name with a leading underscore."""
    for path in sorted((ROOT / "skembed").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert node.module == "transformers", path.name
                assert not [alias.name for alias in node.names if alias.name.startswith("_")]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert not [n for n in names if n.startswith("transformers.")], path.name


def test_an_unknown_path_is_an_error() -> None:
    model = make_model(TINY)
    model.attention_path = "flash"
    with pytest.raises(KeyError, match="flash"):
        run(model, 3)
    assert set(ATTENTION_PATHS) == {"grouped", "varlen", "padded"}


def test_runs_of_equal_lengths() -> None:
    assert model_module._runs([5, 5, 3, 5]) == [(5, 2), (3, 1), (5, 1)]
    assert model_module._runs([4]) == [(4, 1)]


# Poolings in the model


def test_mean_pools_behind_the_instruction() -> None:
    model = make_model(TINY)
    ids = [row.numpy() for row in make_batch(9, 6).input_ids.split([9, 6])]
    states = token_states(model, pack_texts(ids, 0)).split([9, 6])
    with torch.inference_mode():
        found = model(pack_texts(ids, 4))
    expected = torch.stack([state[4:].mean(0) for state in states])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_eos_takes_the_last_token() -> None:
    model = make_model(TINY, pooling="eos")
    states = token_states(model, make_batch(9, 6, 6))
    torch.testing.assert_close(run(model, 9, 6, 6), states[[8, 14, 20]])


def test_multilayer_sees_every_layer_but_the_word_vectors() -> None:
    model = make_model(TINY, pooling="multilayer")
    pooling = model.latent_attention_model
    assert isinstance(pooling, MultiLayerPooling)
    assert pooling.layer_weights.shape == (2, 32)
    batch = make_batch(9, 6)
    with torch.inference_mode():
        layers = model.hidden_states(batch, all_layers=True)
        assert len(layers) == 2
        expected = pooling(layers, batch.pool_segments, batch.pool_counts)
    torch.testing.assert_close(run(model, 9, 6), expected)


def test_folding_the_model() -> None:
    model = make_model(TINY, pooling="latent")
    before = run(model, 9, 6)
    model.fold_pooling()
    assert isinstance(model.latent_attention_model, FoldedLatentAttention)
    torch.testing.assert_close(run(model, 9, 6), before, rtol=1e-5, atol=1e-5)
    model.fold_pooling()  # a second time changes nothing
    assert isinstance(model.latent_attention_model, FoldedLatentAttention)
    for pooling in ("mean", "eos", "multilayer"):
        other = make_model(TINY, pooling=pooling)
        kind = type(other.latent_attention_model)
        other.fold_pooling()
        assert type(other.latent_attention_model) is kind


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lean_norms_equal_the_stock_ones(dtype: torch.dtype, tolerance: float) -> None:
    model = NVEmbedModel(tiny_config_of_32())
    generator = torch.Generator().manual_seed(0)
    stock = model.embedding_model.layers[0].input_layernorm.to(dtype)
    stock.weight.data = torch.rand(32, generator=generator).to(dtype) + 0.5
    tokens = (5 * torch.randn(7, 32, generator=generator)).to(dtype)
    expected = stock(tokens)
    model.use_lean_modules()
    lean = model.embedding_model.layers[0].input_layernorm
    assert lean.weight is stock.weight
    assert type(lean) is type(model.embedding_model.norm) is not type(stock)
    torch.testing.assert_close(lean(tokens), expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():  # in place only where no gradient is asked for
        torch.testing.assert_close(lean(tokens), expected, rtol=tolerance, atol=tolerance)
    lean(tokens.requires_grad_()).sum().backward()
    assert tokens.grad is not None and lean.weight.grad is not None


@pytest.mark.parametrize("pooling", ["latent", "mean", "eos", "multilayer"])
@pytest.mark.parametrize("pool_start", [0, 2])
def test_padding_up_to_the_grid_changes_nothing(pooling: str, pool_start: int) -> None:
    config = replace(tiny_config_of_32(), pooling=pooling)
    model = NVEmbedModel(config).eval()
    randomize(model)
    if pooling == "latent":
        model.fold_pooling()
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 50, n) for n in (9, 9, 4, 7)]
    for path in ("grouped", "padded"):
        model.attention_path = path
        with torch.inference_mode():
            plain = model(pack_texts(ids, pool_start))
            grid = model(pack_texts(ids, pool_start, on_grid=True))
        assert len(grid) > len(plain) == 4
        assert torch.isfinite(grid).all()
        torch.testing.assert_close(grid[:4], plain, rtol=1e-5, atol=1e-5)


def tiny_config_of_32() -> NVEmbedConfig:
    backbone = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    return NVEmbedConfig.from_dict({"model_type": "mistral"} | backbone | heads, "test")


def test_lean_activation_leaves_the_mlp_as_it_is() -> None:
    model = NVEmbedModel(tiny_config_of_32())
    tokens = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    mlp = model.embedding_model.layers[1].mlp
    stock_forward = type(mlp).forward
    expected = mlp(tokens)
    names = list(model.state_dict())
    model.use_lean_modules()
    assert model.embedding_model.layers[1].mlp is mlp
    assert type(mlp).forward is stock_forward
    assert list(model.state_dict()) == names  # the checkpoint's keys stay
    torch.testing.assert_close(mlp(tokens), expected)
    with torch.no_grad():  # in place only where no gradient is asked for
        torch.testing.assert_close(mlp(tokens), expected)
    mlp(tokens).sum().backward()
    assert mlp.gate_proj.weight.grad is not None


@pytest.mark.parametrize("lengths", [(5, 5, 16, 3), (17,), (32, 31)])
def test_attention_on_tiles_equals_plain_attention(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    batch = pack_texts([np.ones(n, dtype=np.int32) for n in lengths], 0)
    found = model_module._grouped_on_tiles(q, k, v, batch, 0.3)
    expected = model_module._padded(q.float(), k.float(), v.float(), batch, 0.3, 0.0)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
