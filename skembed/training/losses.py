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
    """Loss of a batch, its parts weighted by their examples; (m, D) -> scalar.

    Raises
    ------
    TrainingError
        When no example of the batch has anything to be told from.
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
    r"""Mean InfoNCE loss of the anchors that have at least one negative.

    .. math:: -\log \frac{e^{s(a, p) / t}}{e^{s(a, p) / t} + \sum_{n \in N(a)} e^{s(a, n) / t}}

    Parameters
    ----------
    anchors : Tensor, shape (B, D)
        Unit vectors.
    candidates : Tensor, shape (C, D)
        Unit vectors: positives and negatives of all anchors.
    positive : Tensor of int64, shape (B,)
        Each anchor's positive among the candidates.
    allowed : Tensor of bool, shape (B, C)
        Which candidates stand in an anchor's denominator; the positive always does.
    temperature : float
        Divisor t of the cosines.

    Returns
    -------
    Tensor, scalar
        Zero where no anchor has a negative.

    References
    ----------
    arXiv 1807.03748, eq. 4; NV-Embed, arXiv 2405.17428, section 4.
    """
    allowed = allowed.scatter(1, positive.unsqueeze(1), True)
    effective = allowed.sum(1) > 1
    logits = (anchors @ candidates.T / temperature).masked_fill(~allowed, float("-inf"))
    losses = F.cross_entropy(logits, positive, reduction="none")
    return (losses * effective).sum() / effective.sum().clamp(min=1)


def cosent(left: Tensor, right: Tensor, scores: Tensor, *, temperature: float) -> Tensor:
    r"""CoSENT: every pair of a higher score should have a higher cosine.

    .. math:: \log \Bigl(1 + \sum_{y_i > y_j} e^{(c_j - c_i) / t}\Bigr)

    Parameters
    ----------
    left, right : Tensor, shape (B, D)
        Unit vectors of the two texts of each pair; c is their cosine.
    scores : Tensor, shape (B,)
        Graded similarity y; only its order counts.
    temperature : float
        Divisor t of the cosines.

    Returns
    -------
    Tensor, scalar
        Zero where all scores are equal.

    References
    ----------
    J. Su, CoSENT (2022).
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
    """Gradient of a loss over all rows, never holding more than `n_kept` chunks' activations.

    First pass: every chunk is embedded, the first `n_kept` with their graph, the others without.
    The loss and its gradient are taken at the embeddings. Second pass: each chunk's graph, kept or
    built again, takes its rows of that gradient. Exact, as long as `embed` gives the same vectors
    when called again for the same chunk, dropout included.

    Parameters
    ----------
    embed : callable
        Number of a chunk -> its rows of the embeddings, (rows, D).
    sizes : sequence of int
        Rows of each chunk.
    compute_loss : callable
        Embeddings of all rows (sum of sizes, D), in the chunks' order -> scalar.
    n_kept : int
        Chunks whose activations fit into memory together; 1 at the least.
    prepare : callable, optional
        Called with a chunk's number before each of its forward and backward passes. A backward
        pass under gradient checkpointing runs the chunk forward once more, after other chunks
        have been embedded: what `embed` depends on, such as the key of the dropout masks, must be
        that of the chunk again.

    Returns
    -------
    Tensor, scalar
        The loss, detached. Gradients are added to the leaves of `embed`'s graph; where the loss is
        not finite, they are left alone.

    References
    ----------
    L. Gao et al., arXiv 2101.06983.
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
