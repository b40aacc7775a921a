"""The CPU's own forward and backward passes against autograd on the plain formulas."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from skembed.model.cpu_kernels import (
    GatedSiluFunction,
    ProductAttention,
    RMSNormFunction,
    attend_to_buckets,
    plan_buckets,
)

LENGTHS = [(1,), (7,), (5, 5, 5), (19, 18, 12, 11, 3, 1), (70, 33, 9, 9, 2), (3, 9, 4, 50)]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float
) -> Tensor:
    """Text by text, through torch's own function."""
    groups = q.shape[0] // k.shape[0]
    parts = []
    for q_t, k_t, v_t in zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True):
        k_t, v_t = (x.repeat_interleave(groups, dim=0) for x in (k_t, v_t))
        parts.append(F.scaled_dot_product_attention(q_t, k_t, v_t, scale=scaling))
    return torch.cat(parts, dim=1).transpose(0, 1)


def random(*shape: int, dtype: Any = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (3, 3), (4, 1)])
def test_attention_equals_torch_and_so_do_its_gradients(
    lengths: tuple[int, ...], heads: int, shared: int
) -> None:
    tokens = sum(lengths)
    inputs = [random(n, tokens, 8, seed=i) for i, n in enumerate((heads, shared, shared))]
    expected = plain_attention(*inputs, lengths, 0.3)
    found = ProductAttention.apply(*inputs, lengths, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = random(*expected.shape, seed=9).detach()
    wanted = torch.autograd.grad(expected, inputs, upstream)
    given = torch.autograd.grad(found, inputs, upstream)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_attention_in_bfloat16_is_as_near_as_torchs() -> None:
    lengths = (33, 31, 20, 12, 12, 12, 5)
    exact = [random(n, sum(lengths), 16, seed=i) for i, n in enumerate((4, 2, 2))]
    small = [x.detach().to(torch.bfloat16).requires_grad_() for x in exact]
    upstream = random(sum(lengths), 4, 16, seed=9).detach()
    wanted = torch.autograd.grad(plain_attention(*exact, lengths, 0.25), exact, upstream)
    given = torch.autograd.grad(
        ProductAttention.apply(*small, lengths, 0.25), small, upstream.to(torch.bfloat16)
    )
    stock = torch.autograd.grad(
        plain_attention(*small, lengths, 0.25), small, upstream.to(torch.bfloat16)
    )
    for ours, theirs, right in zip(given, stock, wanted, strict=True):
        error = (ours.double() - right).norm() / right.norm()
        assert error < 2 * (theirs.double() - right).norm() / right.norm()


def test_a_text_does_not_see_its_neighbours() -> None:
    lengths = (9, 8, 6)
    q, k, v = (random(2, 23, 4, seed=i) for i in range(3))
    out = ProductAttention.apply(q, k, v, lengths, 0.5)
    (grad,) = torch.autograd.grad(out[9:17].sum(), k)
    assert (grad[:, 9:17].abs() > 0).any()
    assert not grad[:, :9].any()
    assert not grad[:, 17:].any()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_buckets_hold_every_row_once_and_little_padding(lengths: tuple[int, ...]) -> None:
    check_buckets(plan_buckets(lengths))
    check_buckets(plan_buckets(lengths, tight=True))


def test_buckets_end_with_the_pack() -> None:
    for lengths in LENGTHS:
        assert plan_buckets(lengths)[-1].stop == sum(lengths)
        assert plan_buckets(lengths, tight=True)[-1].stop == sum(lengths)


def test_texts_of_similar_length_share_a_bucket() -> None:
    """One product for many short texts, though they are far shorter than a bucket's length."""
    assert len(plan_buckets((9,) * 40 + (8,) * 40, tight=True)) == 2
    assert len(plan_buckets((500, 490, 470, 450), tight=True)) == 1
    assert len(plan_buckets((500, 300), tight=True)) == 2, "padding would cost more"
    assert [b.count for b in plan_buckets((500, 499, 498), tight=True)] == [3]


@pytest.mark.parametrize("lengths", [*LENGTHS, (1_030, 1_027, 40)])
@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (3, 3)])
def test_attention_without_gradients_equals_torch(
    lengths: tuple[int, ...], heads: int, shared: int
) -> None:
    """Also above LONGEST_PRODUCT, and with rows of filling behind the texts."""
    tokens, filling = sum(lengths), 5
    shapes = ((heads, tokens + filling, 8), *2 * ((shared, tokens + filling, 8),))
    q, k, v = (random(*shape, seed=i).detach() for i, shape in enumerate(shapes))
    texts = (x[:, :tokens] for x in (q, k, v))
    expected = plain_attention(*texts, lengths, 1.0)
    with torch.inference_mode():
        found = attend_to_buckets([x.transpose(0, 1).contiguous() for x in (q, k, v)], lengths)
    torch.testing.assert_close(found[:tokens], expected, atol=1e-12, rtol=1e-12)
    assert not found[tokens:].any()


def check_buckets(buckets: Sequence[Any]) -> None:
    assert [b.start for b in buckets] == [0, *(b.stop for b in buckets)][:-1]
    for bucket in buckets:
        rows = bucket.gather.reshape(-1)[bucket.kept]
        assert rows.tolist() == list(range(bucket.stop - bucket.start))
        assert bucket.gather.shape == (bucket.count, bucket.length)
        assert bucket.mask.shape == (bucket.count, 1, bucket.length - bucket.shortest)
        filled = torch.zeros(bucket.count * bucket.length, dtype=torch.bool)
        filled[bucket.kept] = True
        filled = filled.view(bucket.count, bucket.length)
        texts = filled.any(1)
        assert filled[texts, : bucket.shortest].all()
        assert torch.equal(bucket.mask[texts, 0], ~filled[texts, bucket.shortest :])


def test_attention_gradcheck() -> None:
    inputs = [random(n, 9, 3, seed=i) for i, n in enumerate((4, 2, 2))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ProductAttention.apply(q, k, v, (5, 3, 1), 0.7), inputs
    )


def test_norm_equals_the_formula_and_so_do_its_gradients() -> None:
    x, weight = random(2, 5, 8), random(8, seed=1)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5), expected)
    assert torch.autograd.gradcheck(lambda a, b: RMSNormFunction.apply(a, b, 1e-5), (x, weight))


def test_gated_silu_gradcheck() -> None:
    gate, up = random(3, 7), random(3, 7, seed=1)
    torch.testing.assert_close(GatedSiluFunction.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(GatedSiluFunction.apply, (gate, up))
