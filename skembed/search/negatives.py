"""Hard negatives chosen from vectors: close to an anchor, but less close than its positive."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import check_random_state

from skembed._validation import check_choice, check_int, check_real, check_seed
from skembed.search.top_k import BLOCK_BYTES, top_k_blocks
from skembed.similarity import (
    Indices,
    PairIndices,
    TopK,
    Vectors,
    check_groups,
    check_index_pairs,
    check_vectors,
    paired_dot,
)

__all__ = ["MAX_NEGATIVES", "SAMPLINGS", "STRATEGIES", "check_rule", "select_negatives"]

# The thresholds that NV-Retriever (arXiv 2407.15831) found best.
STRATEGIES = {"perc_pos": 0.95, "margin_pos": 0.05}
SAMPLINGS = ("top", "random")
MAX_NEGATIVES = 1_000_000  # of one anchor; each takes memory, found or not
# "random" draws from this many times `n_negatives`: NV-Retriever's 4 of the 10 best.
_POOL_FACTOR = 2.5


def select_negatives(
    anchors: npt.ArrayLike,
    positives: npt.ArrayLike,
    candidates: npt.ArrayLike,
    *,
    known_positives: PairIndices | None = None,
    anchor_groups: npt.ArrayLike | None = None,
    candidate_groups: npt.ArrayLike | None = None,
    n_negatives: int = 7,
    strategy: str = "perc_pos",
    threshold: float | None = None,
    sampling: str = "top",
    random_state: int | np.random.RandomState | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Indices, Vectors]:
    r"""Return rows and scores of the hard negatives of each anchor, (n, n_negatives) each.

    The vectors have unit length. Scores are dot products; the highest comes first, of equal ones
    the lower row. -1 and NaN stand where too few candidates are left. `known_positives` are pairs
    (indptr, indices) that are never negatives, as in a CSR matrix; a positive that is a candidate
    belongs there. An anchor gets no candidate of its own group; group -1 is of no class.
    ``sampling="random"`` draws without replacement from the best 2.5 times as many. Raises
    TypeError and ValueError for wrong arguments.

    Notes
    -----
    With s+ the score of anchor and positive, a candidate is kept if its score s holds

    .. math::

        s \le s_+ - (1 - p) |s_+| \quad \text{(perc_pos)}, \qquad
        s \le s_+ - \text{margin} \quad \text{(margin_pos)}.

    For s+ >= 0 the first is the paper's p * s+. For s+ < 0 the paper's bound would lie above the
    positive; this one lies below it by the same share. So no negative is ever closer than the
    positive.

    References
    ----------
    G. Moreira et al., NV-Retriever, arXiv 2407.15831; C. Lee et al., NV-Embed, arXiv 2405.17428,
    section 4.1.1.
    """
    owner = "select_negatives"
    anchors = check_vectors(anchors, name="anchors", owner=owner)
    n, dim = anchors.shape
    positives = check_vectors(positives, name="positives", owner=owner, dim=dim)
    if len(positives) != n:
        raise ValueError(
            f"The `positives` parameter of `{owner}` must have {n} rows, one for each anchor; "
            f"got {len(positives)}."
        )
    candidates = check_vectors(candidates, name="candidates", owner=owner, dim=dim)
    m = len(candidates)
    n_negatives, threshold = check_rule(n_negatives, strategy, threshold, sampling, owner=owner)
    groups = check_groups(
        anchor_groups,
        candidate_groups,
        names=("anchor_groups", "candidate_groups"),
        owner=owner,
        n=n,
        m=m,
    )
    excluded = check_index_pairs(
        known_positives, name="known_positives", owner=owner, n_rows=n, n_columns=m
    )
    pool_size = n_negatives if sampling == "top" else int(np.ceil(_POOL_FACTOR * n_negatives))
    best = top_k_blocks(
        anchors,
        candidates,
        max(1, min(pool_size, m)),  # a larger k would make the blocks smaller
        max_scores=_score_bounds(paired_dot(anchors, positives), strategy, threshold),
        excluded=excluded,
        query_groups=None if groups is None else groups[0],
        corpus_groups=None if groups is None else groups[1],
        block_bytes=block_bytes,
    )
    if sampling == "random":
        best = _draw(best, n_negatives, random_state=random_state)
    missing = ((0, 0), (0, n_negatives - best.indices.shape[1]))
    return (
        np.pad(best.indices, missing, constant_values=-1),
        np.pad(best.scores, missing, constant_values=np.nan),
    )


def check_rule(
    n_negatives: Any, strategy: Any, threshold: Any, sampling: Any, *, owner: str
) -> tuple[int, float]:
    """Check the parameters of a selection; return `n_negatives` and the threshold in force."""
    n_negatives = check_int(n_negatives, name="n_negatives", owner=owner, low=1, high=MAX_NEGATIVES)
    strategy = check_choice(strategy, name="strategy", owner=owner, allowed=tuple(STRATEGIES))
    check_choice(sampling, name="sampling", owner=owner, allowed=SAMPLINGS)
    if threshold is None:
        return n_negatives, STRATEGIES[strategy]
    if strategy == "perc_pos":
        return n_negatives, check_real(
            threshold, name="threshold", owner=owner, low=0, high=1, inclusive="right"
        )
    return n_negatives, check_real(threshold, name="threshold", owner=owner, low=0, high=2)


def _score_bounds(positive_scores: Vectors, strategy: str, threshold: float) -> Vectors:
    """Return the highest score that a negative of each anchor may have, (n,)."""
    if strategy == "margin_pos":
        return positive_scores - np.float32(threshold)
    # s - (1 - p) |s|, written so that p = 1 gives s to the last bit.
    share = np.where(positive_scores >= 0, threshold, 2 - threshold).astype(np.float32)
    return share * positive_scores


def _draw(
    best: TopK, n_negatives: int, *, random_state: int | np.random.RandomState | None
) -> TopK:
    """Return `n_negatives` columns of each row, drawn without replacement, best first."""
    # Row by row from one stream: mining in several calls draws as mining in one.
    seed = check_seed(random_state, name="random_state", owner="select_negatives")
    order = check_random_state(seed).random_sample(best.indices.shape)
    order[best.indices < 0] = 2  # after every number that can be drawn
    columns = np.argsort(order, axis=1, kind="stable")[:, :n_negatives]
    columns.sort(axis=1)
    return TopK(
        np.take_along_axis(best.scores, columns, axis=1),
        np.take_along_axis(best.indices, columns, axis=1),
    )
