"""The network: backbone and poolings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import TINY, make_batch, make_model, run
from tiny import randomize, token_states

from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_kernels import LeanMLP
from skembed.model.network import NVEmbedModel
from skembed.model.pooling import FoldedLatentAttention, MultiLayerPooling
from skembed.model.tokenization import pack_texts

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
    with torch.no_grad():
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


def test_lean_mlp_equals_the_stock_one() -> None:
    model = NVEmbedModel(tiny_config_of_32())
    tokens = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    mlp = model.embedding_model.layers[1].mlp
    expected = mlp(tokens)
    names = list(model.state_dict())
    model.use_lean_modules()
    stock, mlp = mlp, model.embedding_model.layers[1].mlp
    assert isinstance(mlp, LeanMLP)
    assert mlp.gate_proj is stock.gate_proj
    assert list(model.state_dict()) == names  # the checkpoint's keys stay
    torch.testing.assert_close(mlp(tokens), expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp(tokens), expected)
    mlp(tokens).sum().backward()
    assert mlp.gate_proj.weight.grad is not None
