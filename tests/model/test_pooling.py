"""Poolings against formulas written again from scratch, and the folded latent layer."""

from collections.abc import Sequence

import pytest
import torch
from tiny import double_weights, randomize, reference_latent, reference_multilayer
from torch import Tensor

from skembed.model.pooling import (
    EosPooling,
    FoldedLatentAttention,
    LatentAttention,
    MeanPooling,
    MultiLayerPooling,
    segment_mean,
)

SIZES = [
    # hidden, latent, latents, heads, head width, widening
    (32, 32, 16, 4, 32, 4),  # NV-Embed's proportions: head as wide as the hidden state
    (32, 24, 10, 3, 20, 4),
    (24, 40, 7, 1, 8, 2),
    (16, 16, 1, 2, 48, 1),  # a single latent: the softmax is constant
]


def make_latent(sizes: Sequence[int], seed: int = 0) -> LatentAttention:
    """Return a latent layer with random weights."""
    hidden, latent, latents, heads, width, mult = sizes
    layer = LatentAttention(
        hidden,
        latent_dim=latent,
        num_latents=latents,
        num_heads=heads,
        dim_head=width,
        ff_mult=mult,
    )
    randomize(layer, seed)
    return layer


def pack(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Text of each packed row, and rows of each text."""
    counts = torch.tensor(lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), counts), counts.float()


@pytest.mark.parametrize("sizes", SIZES)
def test_latent_layer_equals_the_formula(sizes: Sequence[int]) -> None:
    layer = make_latent(sizes)
    tokens = torch.randn(9, sizes[0], generator=torch.Generator().manual_seed(1)) * 2
    segments, counts = pack([4, 1, 4])
    with torch.no_grad():
        found = layer(tokens, segments, counts)
    weights = double_weights(layer)
    expected = [reference_latent(t.double(), weights, sizes[3]) for t in tokens.split([4, 1, 4])]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
def test_folded_equals_plain(sizes: Sequence[int], seed: int) -> None:
    layer = make_latent(sizes, seed)
    tokens = torch.randn(23, sizes[0], generator=torch.Generator().manual_seed(2)) * 2
    segments, counts = pack([1, 7, 12, 3])
    with torch.no_grad():
        plain = layer(tokens, segments, counts)
        folded = FoldedLatentAttention(layer)(tokens, segments, counts)
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        "latents",
        "cross_attend_blocks.0.norm.weight",
        "cross_attend_blocks.0.norm.bias",
        "cross_attend_blocks.0.norm_context.weight",
        "cross_attend_blocks.0.norm_context.bias",
        "cross_attend_blocks.0.fn.to_q.weight",
        "cross_attend_blocks.0.fn.to_kv.weight",
        "cross_attend_blocks.0.fn.to_out.weight",
        "cross_attend_blocks.1.norm.weight",
        "cross_attend_blocks.1.norm.bias",
        "cross_attend_blocks.1.fn.net.0.weight",
        "cross_attend_blocks.1.fn.net.0.bias",
        "cross_attend_blocks.1.fn.net.2.weight",
        "cross_attend_blocks.1.fn.net.2.bias",
    ],
)
def test_every_weight_reaches_the_folded_form(part: str) -> None:
    """Guards the equality above: it would also hold for weights that neither form uses."""
    layer = make_latent(SIZES[1])
    tokens = torch.randn(6, SIZES[1][0], generator=torch.Generator().manual_seed(3))
    segments, counts = pack([6])
    before = FoldedLatentAttention(layer)(tokens, segments, counts)
    parameter = layer.get_parameter(part)
    parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    after = FoldedLatentAttention(layer)(tokens, segments, counts)
    assert (after - before).abs().max() > 1e-3


def test_folded_form_is_smaller_and_trains_nothing() -> None:
    layer = make_latent((64, 64, 8, 8, 64, 4))
    folded = FoldedLatentAttention(layer)
    assert not list(folded.parameters())
    attend = layer.get_submodule("cross_attend_blocks.0.fn")
    attention = sum(p.numel() for p in attend.parameters())
    folded_attention = folded.keys.numel() + folded.values.numel()
    assert folded_attention * 8 <= attention


def test_folded_form_in_bfloat16_is_near() -> None:
    layer = make_latent(SIZES[0])
    tokens = torch.randn(40, 32, generator=torch.Generator().manual_seed(5))
    segments, counts = pack([10, 30])
    with torch.no_grad():
        exact = layer(tokens, segments, counts)
        half = FoldedLatentAttention(layer.bfloat16())(tokens.bfloat16(), segments, counts)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, exact).min() > 0.999


def test_gradients_reach_every_weight_of_the_plain_form() -> None:
    layer = make_latent(SIZES[1])
    tokens = torch.randn(5, SIZES[1][0], requires_grad=True)
    segments, counts = pack([2, 3])
    layer(tokens, segments, counts).square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()} | {"tokens": tokens.grad}
    silent = [n for n, g in gradients.items() if g is None or not g.abs().max() > 1e-6]
    assert not silent


def test_start_as_mean() -> None:
    layer = make_latent(SIZES[1])
    tokens = torch.randn(8, SIZES[1][0], generator=torch.Generator().manual_seed(6))
    segments, counts = pack([5, 3])
    mean = MeanPooling()(tokens, segments, counts)
    assert (layer(tokens, segments, counts) - mean).abs().max() > 1e-2
    layer.start_as_mean()
    torch.testing.assert_close(layer(tokens, segments, counts), mean, rtol=0, atol=1e-6)
    layer(tokens, segments, counts).sum().backward()  # and it can leave that start
    gradient = layer.get_parameter("cross_attend_blocks.0.fn.to_out.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-6


def test_mean_of_packed_rows() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0], [0.0, 1.0]])
    segments, counts = pack([2, 1, 1])
    expected = torch.tensor([[2.0, 4.0], [5.0, 5.0], [0.0, 1.0]])
    torch.testing.assert_close(segment_mean(rows, segments, counts), expected)
    torch.testing.assert_close(MeanPooling()(rows, segments, counts), expected)


def test_mean_of_bfloat16_is_taken_in_float32() -> None:
    """1,000 times 1.0 and once 300.0: a bfloat16 sum stops growing at 256."""
    rows = torch.ones(1_001, 1, dtype=torch.bfloat16)
    rows[0] = 300.0
    segments, counts = pack([1_001])
    found = segment_mean(rows, segments, counts)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1_300 / 1_001, abs=1e-5)


def test_eos_pooling_takes_the_last_row() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    segments, counts = pack([3, 1, 2])
    found = EosPooling()(rows.bfloat16(), segments, counts)
    assert found.dtype == torch.float32
    assert found.tolist() == [[4.0, 5.0], [6.0, 7.0], [10.0, 11.0]]


def make_multilayer() -> MultiLayerPooling:
    """Return a multi-layer pooling of 3 layers with random weights."""
    pooling = MultiLayerPooling(
        20, num_layers=3, num_latents=6, num_heads=2, dim_head=12, ff_mult=2
    )
    randomize(pooling)
    return pooling


def test_multilayer_equals_the_formula() -> None:
    pooling = make_multilayer()
    generator = torch.Generator().manual_seed(7)
    layers = [torch.randn(9, 20, generator=generator) for _ in range(3)]
    segments, counts = pack([4, 5])
    with torch.no_grad():
        found = pooling(layers, segments, counts)
    weights = double_weights(pooling)
    expected = [
        reference_multilayer([layer[rows].double() for layer in layers], weights, 2)
        for rows in (slice(0, 4), slice(4, 9))
    ]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_multilayer_uses_the_order_of_the_layers() -> None:
    pooling = make_multilayer()
    layers = [torch.full((2, 20), float(k)) + torch.arange(20) for k in range(3)]
    layers = [layer * (k + 1) for k, layer in enumerate(layers)]
    segments, counts = pack([2])
    there = pooling(layers, segments, counts)
    back = pooling(layers[::-1], segments, counts)
    assert (there - back).abs().max() > 1e-3
    pooling.layer_weights.data.zero_()  # without the layer matrix the layers are a set
    torch.testing.assert_close(
        pooling(layers, segments, counts), pooling(layers[::-1], segments, counts)
    )


def test_gradients_reach_every_weight_of_multilayer() -> None:
    pooling = make_multilayer()
    layers = [torch.randn(4, 20) for _ in range(3)]
    segments, counts = pack([4])
    pooling(layers, segments, counts).square().sum().backward()
    silent = [
        n for n, p in pooling.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6
    ]
    assert not silent
