"""Losses against formulas written again; the gradient cache against one graph, dropout on."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import load_base, random_lora
from torch import Tensor
from torch.nn import functional as F

from skembed import ContrastiveTrainer
from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import LoraSettings
from skembed.model.checkpoint import read_pooling
from skembed.model.sources import ModelSource
from skembed.training import loop as training
from skembed.training.batches import Batch, TextTable
from skembed.training.loop import _Learner
from skembed.training.losses import backward_in_chunks, batch_loss, cosent, info_nce

TOLERANCE = 1e-5
TEMPERATURE = 0.5  # of the model's losses: gradients of the order of 1


def unit_rows(n: int, dim: int, seed: int) -> Tensor:
    """Random unit vectors, float64 (n, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)


# InfoNCE


def reference_info_nce(
    anchors: np.ndarray,
    candidates: np.ndarray,
    positive: np.ndarray,
    allowed: np.ndarray,
    temperature: float,
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and its gradients for anchors and candidates, one anchor after the other."""
    total, n = 0.0, 0
    d_anchors, d_candidates = np.zeros_like(anchors), np.zeros_like(candidates)
    for i, anchor in enumerate(anchors):
        others = [j for j in range(len(candidates)) if allowed[i, j] and j != positive[i]]
        if not others:
            continue
        n += 1
        members = [int(positive[i]), *others]
        weights = [math.exp(float(anchor @ candidates[j]) / temperature) for j in members]
        total -= math.log(weights[0] / sum(weights))
        for place, (j, weight) in enumerate(zip(members, weights, strict=True)):
            slope = (weight / sum(weights) - (place == 0)) / temperature
            d_anchors[i] += slope * candidates[j]
            d_candidates[j] += slope * anchor
    return total / max(n, 1), d_anchors / max(n, 1), d_candidates / max(n, 1)


CONTRASTS = {
    "all": np.ones((5, 8), dtype=bool),
    "none": np.zeros((5, 8), dtype=bool),
    "one row without": np.array([[1] * 8] * 2 + [[0] * 8] + [[1] * 8] * 2, dtype=bool),
    "random": np.random.default_rng(3).random((5, 8)) < 0.4,
}


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("case", CONTRASTS)
def test_info_nce_is_its_formula(case: str, temperature: float) -> None:
    anchors, candidates = unit_rows(5, 6, 0), unit_rows(8, 6, 1)
    positive, allowed = np.array([0, 3, 3, 7, 1]), CONTRASTS[case]
    expected, *slopes = reference_info_nce(
        anchors.numpy(), candidates.numpy(), positive, allowed, temperature
    )
    leaves = anchors.clone().requires_grad_(), candidates.clone().requires_grad_()
    loss = info_nce(
        *leaves, torch.from_numpy(positive), torch.from_numpy(allowed), temperature=temperature
    )
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-10)
    for found, slope in zip(torch.autograd.grad(loss, leaves), slopes, strict=True):
        np.testing.assert_allclose(found.numpy(), slope, rtol=0, atol=1e-10)
    assert (expected == 0) == (case == "none")


def test_info_nce_of_a_negative_that_equals_the_positive() -> None:
    """Two equal candidates share the probability: the loss is log 2 whatever the temperature."""
    anchor, candidates = unit_rows(1, 6, 0), unit_rows(1, 6, 1).repeat(2, 1)
    for temperature in (0.01, 0.05, 1.0):
        loss = info_nce(
            anchor,
            candidates,
            torch.tensor([1]),
            torch.ones(1, 2, dtype=torch.bool),
            temperature=temperature,
        )
        assert float(loss) == pytest.approx(math.log(2), abs=1e-12)


# CoSENT


def reference_cosent(
    left: np.ndarray, right: np.ndarray, scores: np.ndarray, temperature: float
) -> float:
    """The loss by a double loop."""
    cosines = [float(a @ b) for a, b in zip(left, right, strict=True)]
    total = 1.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if scores[i] > scores[j]:
                total += math.exp((cosines[j] - cosines[i]) / temperature)
    return math.log(total)


@pytest.mark.parametrize(
    "scores", [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.0, 5.0], [2.0, 2.0, 2.0, 2.0]], ids=str
)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_cosent_is_its_formula(scores: list[float], temperature: float) -> None:
    left, right = unit_rows(4, 6, 2), unit_rows(4, 6, 3)
    graded = torch.tensor(scores, dtype=torch.float64)
    expected = reference_cosent(left.numpy(), right.numpy(), np.array(scores), temperature)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return cosent(a, b, graded, temperature=temperature)

    assert float(loss(left, right)) == pytest.approx(expected, abs=1e-10)
    leaves = left.clone().requires_grad_(), right.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    assert (expected == 0) == (len(set(scores)) == 1)


def test_cosent_of_one_pair_is_zero() -> None:
    vectors = unit_rows(1, 6, 0)
    assert float(cosent(vectors, vectors, torch.ones(1), temperature=0.05)) == 0.0


# The gradient cache, on any function


class Chunks:
    """Chunks of rows through a small network, with a log of the passes."""

    def __init__(self, sizes: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes = sizes
        self.rows = torch.randn(sum(sizes), 4, generator=generator).split(sizes)
        self.weight = torch.randn(3, 4, generator=generator).requires_grad_()
        self.log: list[tuple[int, bool]] = []

    def embed(self, k: int) -> Tensor:
        self.log.append((k, torch.is_grad_enabled()))
        return F.normalize((self.rows[k] @ self.weight.T).tanh(), dim=1)

    @staticmethod
    def loss(vectors: Tensor) -> Tensor:
        """Every row meets every other."""
        return (vectors @ vectors.T / 0.1).logsumexp(1).mean()


@pytest.mark.parametrize("n_kept", [0, 1, 2, 4, 9])
def test_chunks_give_the_gradient_of_the_whole(n_kept: int) -> None:
    whole = Chunks([10])
    expected = whole.loss(whole.embed(0))
    expected.backward()
    cut = Chunks([3, 1, 4, 2])
    loss = backward_in_chunks(cut.embed, cut.sizes, cut.loss, n_kept=n_kept)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(cut.weight.grad, whole.weight.grad, rtol=0, atol=1e-6)
    # The first pass holds the last chunks' graphs only; the others are embedded twice.
    kept = min(max(1, n_kept), 4)
    first = [(k, k >= 4 - kept) for k in range(4)]
    assert cut.log == first + [(k, True) for k in reversed(range(4 - kept))]


@pytest.mark.parametrize("n_kept", [1, 2, 3])
def test_no_more_activations_are_alive_than_said(n_kept: int) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts = []

    class Saved:
        """A tensor that a graph keeps for its backward pass."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output that a graph keeps would keep the graph
            alive.add(self)

    cut = Chunks([2] * 6)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        vectors = cut.embed(0)
        of_one_chunk = len(alive)
        del vectors
        assert not alive

        def embed(k: int) -> Tensor:
            vectors = cut.embed(k)
            counts.append(len(alive))
            return vectors

        backward_in_chunks(embed, cut.sizes, lambda x: x.sum(), n_kept=n_kept)
    assert max(counts) == n_kept * of_one_chunk > 0
    assert not alive


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_gradient_of_a_loss_that_is_not_finite(bad: float) -> None:
    cut = Chunks([2, 3])
    loss = backward_in_chunks(cut.embed, cut.sizes, lambda x: x.sum() * bad, n_kept=1)
    assert not math.isfinite(float(loss))
    assert cut.weight.grad is None


def test_gradients_are_added() -> None:
    cut = Chunks([2, 3])
    backward_in_chunks(cut.embed, cut.sizes, cut.loss, n_kept=1)
    assert cut.weight.grad is not None
    once = cut.weight.grad.clone()
    backward_in_chunks(cut.embed, cut.sizes, cut.loss, n_kept=2)
    torch.testing.assert_close(cut.weight.grad, 2 * once)


def test_each_pass_is_prepared() -> None:
    """Before any forward or backward pass of a chunk, kept or not."""
    cut = Chunks([1, 1, 1, 1])
    prepared: list[int] = []
    embedded: list[int] = []

    def embed(k: int) -> Tensor:
        assert prepared[-1] == k
        vectors = cut.embed(k)
        if vectors.requires_grad:
            vectors.register_hook(lambda _: embedded.append(prepared[-1] == k))
        return vectors

    backward_in_chunks(embed, cut.sizes, cut.loss, n_kept=2, prepare=prepared.append)
    assert prepared == [0, 1, 2, 3, 3, 2, 1, 0]
    assert embedded == [True] * 4


# The gradient cache, on the model


TEXTS = [
    "A card was lost.",
    "The card has been stolen somewhere between the station and the market",
    "I want to open a new account, please",
    "account",
    "How long does a transfer to another country take, and what does it cost me?",
    "transfer abroad",
    "An unrelated text",
    "x",
    "The exchange rate of last week",
    "rates",
]
PREFIXES = ("", "Instruct: Find the same question\nQuery: ")


@dataclass
class Setup:
    """A model and a batch."""

    base: Any
    source: ModelSource
    table: TextTable
    batch: Batch


@pytest.fixture(scope="module")
def setups(golden_dir: Path) -> Iterator[dict[str, Setup]]:
    """The tiny model with a batch for InfoNCE, for CoSENT, and for both."""
    base, source = load_base(golden_dir)
    table = TextTable(base.tokenizer, max_length=64, mask_prefix=True)
    queries, documents = table.add(TEXTS[:5], PREFIXES[1]), table.add(TEXTS, PREFIXES[0])
    table.freeze()
    rows = np.sort(np.concatenate([queries, documents]))
    allowed = np.random.default_rng(0).random((5, 10)) < 0.7
    contrast = (
        np.searchsorted(rows, queries),
        np.searchsorted(rows, documents),
        np.array([1, 0, 3, 2, 5]),
        allowed,
    )
    nothing = np.empty(0, dtype=np.int64)
    no_contrast = (nothing, nothing, nothing, np.empty((0, 0), dtype=bool))
    scores = np.array([0.0, 4.0, 2.0, 2.0, 5.0])
    left, right = (np.searchsorted(rows, part) for part in (queries, documents[5:]))
    graded = [(left, right, scores)]
    yield {
        "infonce": Setup(base, source, table, Batch(rows, *contrast, [], 5)),
        "cosent": Setup(base, source, table, Batch(rows, *no_contrast, graded, 5)),
        "both": Setup(base, source, table, Batch(rows, *contrast, graded, 10)),
    }


def make_learner(setup: Setup, **parameters: Any) -> _Learner:
    """A learner whose weights are all away from their start."""
    config = setup.base.config
    settings = LoraSettings(4, 8.0, 0.2, "all-linear")
    pooling = read_pooling(setup.source, config)
    start = Adapter(settings, random_lora(config, settings), pooling, setup.base.key.fingerprint)
    trainer = ContrastiveTrainer(temperature=TEMPERATURE, **parameters)
    return _Learner(setup.base, setup.table, trainer, start, seed=7)


def gradients(learner: _Learner) -> dict[str, Tensor]:
    """All gradients, none of which may be missing."""
    found = {}
    for name, parameter in learner.parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def plain_step(
    setup: Setup, batch_tokens: int, *, step: int, dropout: bool = True
) -> tuple[float, dict[str, Tensor]]:
    """The loss and gradients of the same chunks under the same keys, in one graph."""
    learner = make_learner(setup)
    learner.masks.active = dropout
    texts = setup.batch.texts
    chunks = setup.table.cut(texts, batch_tokens)
    parts = []
    for k, chunk in enumerate(chunks):
        learner.masks.key = (7, step, k)
        parts.append(learner.embed(texts[chunk]))
    order = torch.from_numpy(np.argsort(np.concatenate(chunks)))
    loss = batch_loss(torch.cat(parts)[order], setup.batch, TEMPERATURE)
    loss.backward()
    return float(loss.detach()), gradients(learner)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference between two sets of gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kept_tokens", [40, 80, 10_000], ids=["1", "2", "all"])
@pytest.mark.parametrize("loss", ["infonce", "cosent", "both"])
def test_gradient_cache_equals_the_plain_step(
    setups: dict[str, Setup],
    loss: str,
    kept_tokens: int,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = setups[loss]
    monkeypatch.setattr(training, "CPU_CHUNK_TOKENS", 40)
    monkeypatch.setattr(training, "CPU_KEPT_TOKENS", kept_tokens)
    n_chunks = len(setup.table.cut(setup.batch.texts, 40))
    assert n_chunks > 4
    learner = make_learner(setup, gradient_checkpointing=checkpointing)
    found_loss = learner.accumulate(setup.batch, step=3)
    found = gradients(learner)
    expected_loss, expected = plain_step(setup, 40, step=3)
    assert float(found_loss) == pytest.approx(expected_loss, abs=TOLERANCE)
    assert distance(found, expected) <= TOLERANCE
    # What the equality rests on: the masks, and the key they are drawn with.
    assert distance(found, plain_step(setup, 40, step=4)[1]) > 1e-3
    assert distance(found, plain_step(setup, 40, step=3, dropout=False)[1]) > 1e-3


def test_without_dropout_the_chunks_do_not_matter(setups: dict[str, Setup]) -> None:
    found = []
    for batch_tokens in (1, 30, 100, 10_000):
        learner = make_learner(setups["both"], batch_tokens=batch_tokens)
        learner.masks.active = False
        learner.accumulate(setups["both"].batch, step=0)
        found.append(gradients(learner))
    assert all(distance(one, found[0]) <= TOLERANCE for one in found)


def test_validation_sees_no_dropout_and_leaves_it_on(setups: dict[str, Setup]) -> None:
    setup = setups["infonce"]
    learner = make_learner(setup)
    vectors = learner.embed_all(setup.batch.texts)
    np.testing.assert_array_equal(learner.embed_all(setup.batch.texts), vectors)
    assert learner.masks.active
    learner.masks.active = False
    with torch.no_grad():
        for k in range(len(setup.batch.texts)):
            one = learner.embed(setup.batch.texts[k : k + 1]).numpy()
            np.testing.assert_allclose(one, vectors[k : k + 1], rtol=0, atol=TOLERANCE)
