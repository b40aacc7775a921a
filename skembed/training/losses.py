"""Contrastive losses on embeddings, and their gradient in bounded memory.

- `info_nce`: InfoNCE (arXiv 1807.03748) with in-batch and hard negatives, masked.
- `cosent`: CoSENT, for pairs with graded scores.
- `backward_in_chunks`: the gradient cache (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from skembed.exceptions import TrainingError
from skembed.training.batches import Batch

__all__ = ["backward_in_chunks", "batch_loss", "cosent", "info_nce"]


def batch_loss(embeddings: Tensor, batch: Batch, temperature: float) -> Tensor:
    """Return the loss of a batch, its parts weighted by their examples; (m, D) -> scalar.

    Raises TrainingError if no example of the batch has a negative.
    """
    device = embeddings.device
    losses, weights = [], []
    if (batch.allowed.sum(1) > 1).any():
        anchors, candidates, positive, allowed = (
            torch.from_numpy(values).to(device)
            for values in (batch.anchors, batch.candidates, batch.positive, batch.allowed)
        )
        anchors, candidates = embeddings[anchors], embeddings[candidates]
        losses.append(info_nce(anchors, candidates, positive, allowed, temperature=temperature))
        weights.append(len(anchors))
    for pairs in batch.graded:
        left, right, scores = (torch.from_numpy(values).to(device) for values in pairs)
        if scores.min() < scores.max():
            left, right = embeddings[left], embeddings[right]
            losses.append(cosent(left, right, scores, temperature=temperature))
            weights.append(len(scores))
    if not losses:
        raise TrainingError(
            f"A batch of {batch.n_examples} examples has no negative left: all its candidates are "
            "of one class, known positives or equal texts (or all its scores are equal). Raise "
            "`batch_size`, give negatives, or mine them (`mine_negatives`)."
        )
    total = sum(weights)
    return torch.stack([x * (w / total) for x, w in zip(losses, weights, strict=True)]).sum()


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    allowed: Tensor,
    *,
    temperature: float,
) -> Tensor:
    r"""Return the mean InfoNCE loss of the anchors that have a negative; 0 if none has.

    .. math:: -\log \frac{e^{s(a, p) / t}}{e^{s(a, p) / t} + \sum_{n \in N(a)} e^{s(a, n) / t}}

    Unit vectors (B, D) and (C, D); `positive` (B,) is an index into the candidates, `allowed`
    (B, C) says which stand in an anchor's denominator; the positive always does.
    Source: arXiv 1807.03748, eq. 4; NV-Embed, arXiv 2405.17428, section 4.
    """
    allowed = allowed.scatter(1, positive.unsqueeze(1), True)
    effective = allowed.sum(1) > 1
    logits = (anchors @ candidates.T / temperature).masked_fill(~allowed, float("-inf"))
    losses = F.cross_entropy(logits, positive, reduction="none")
    return (losses * effective).sum() / effective.sum().clamp(min=1)


def cosent(left: Tensor, right: Tensor, scores: Tensor, *, temperature: float) -> Tensor:
    r"""Return the CoSENT loss: a pair of a higher score should have a higher cosine.

    .. math:: \log \Bigl(1 + \sum_{y_i > y_j} e^{(c_j - c_i) / t}\Bigr)

    c is the cosine of two unit vectors (B, D), y the score (B,), of which only the order counts.
    Source: J. Su, CoSENT (2022).
    """
    cosines = (left * right).sum(1) / temperature
    differences = cosines.unsqueeze(0) - cosines.unsqueeze(1)  # (B, B): c_j - c_i
    higher = scores.unsqueeze(1) > scores.unsqueeze(0)
    terms = differences.masked_fill(~higher, float("-inf")).flatten()
    return torch.cat([terms.new_zeros(1), terms]).logsumexp(0)


def backward_in_chunks(
    embed: Callable[[int], Tensor],
    sizes: Sequence[int],
    compute_loss: Callable[[Tensor], Tensor],
    *,
    n_kept: int,
    prepare: Callable[[int], None] | None = None,
) -> Tensor:
    """Add the gradient of a loss over chunks of some `sizes`; return the loss, detached.

    First pass: embed every chunk, (rows, D), the last `n_kept` with their graph, the others
    without, and take the loss and its gradient at the embeddings. Second pass: run each chunk's
    rows of that gradient back through its graph, kept or built again. No more than `n_kept` chunks
    have activations at a time. Exact as long as `embed` gives a chunk the same vectors again,
    dropout included. A loss that is not finite adds no gradient.

    `prepare` gets a chunk's number before each of its passes: gradient checkpointing runs a chunk
    forward again in its backward pass, when what `embed` depends on, such as the key of the dropout
    masks, must be the chunk's own again. Source: L. Gao et al., arXiv 2101.06983.
    """
    kept: dict[int, Tensor] = {}
    rows = []
    # The chunks kept are the last ones embedded: what comes before is gone by then.
    first_kept = max(0, len(sizes) - max(1, n_kept))
    for k in range(len(sizes)):
        if prepare is not None:
            prepare(k)
        with torch.set_grad_enabled(k >= first_kept):
            vectors = embed(k)
        if k >= first_kept:
            kept[k] = vectors
        rows.append(vectors.detach())
    leaf = torch.cat(rows).requires_grad_()
    with torch.enable_grad():
        loss = compute_loss(leaf)
    if not torch.isfinite(loss):
        return loss.detach()
    (gradient,) = torch.autograd.grad(loss, leaf)
    pieces = gradient.split(list(sizes))
    for k in reversed(range(len(sizes))):
        if prepare is not None:
            prepare(k)
        with torch.enable_grad():
            vectors = kept.pop(k) if k in kept else embed(k)
            vectors.backward(pieces[k])
        del vectors
    return loss.detach()
