"""Hard negatives chosen from vectors: close to an anchor, but not as close as its own positive."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import check_random_state

from skembed._validation import check_choice, check_int, check_real
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

__all__ = ["SAMPLINGS", "STRATEGIES", "check_rule", "select_negatives"]

# The thresholds that NV-Retriever (arXiv 2407.15831) found best.
STRATEGIES = {"perc_pos": 0.95, "margin_pos": 0.05}
SAMPLINGS = ("top", "random")
# "random" draws from this many times `n_negatives`: NV-Retriever's 4 of the 10 best.
_POOL_FACTOR = 2.5


# Vectors


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
    r"""Choose hard negatives among candidate vectors.

    Parameters
    ----------
    anchors : array-like of float, shape (n, dim)
        Unit vectors.
    positives : array-like of float, shape (n, dim)
        Unit vector of each anchor's positive.
    candidates : array-like of float, shape (m, dim)
        Unit vectors to choose from, one for each distinct text.
    known_positives : (indptr, indices), optional
        Candidates that are no negatives, as in a CSR matrix: those of anchor i are
        ``indices[indptr[i] : indptr[i + 1]]``. The positives themselves belong here, if they are
        candidates.
    anchor_groups, candidate_groups : array-like of int, shape (n,) and (m,), optional
        Classes. An anchor gets no candidate of its own class; -1 is of no class.
    n_negatives : int, default=7
        How many for each anchor.
    strategy : {"perc_pos", "margin_pos"}, default="perc_pos"
        Rule for the highest score that a negative may have; see Notes.
    threshold : float, optional
        The rule's p in (0, 1] or margin in [0, 2]. None is 0.95 or 0.05.
    sampling : {"top", "random"}, default="top"
        The best, or a draw without replacement from the best 2.5 times as many (rounded up).
    random_state : int, RandomState or None, default=None
        Seed of the draw.
    block_bytes : int, default=67108864
        Bound on the working memory in bytes; see `skembed.search.top_k.top_k_blocks`.

    Returns
    -------
    indices : ndarray of int64, shape (n, n_negatives)
        Rows of `candidates`, highest score first, equal scores by lower row; -1 where there are
        not enough.
    scores : ndarray of float32, shape (n, n_negatives)
        Dot products of anchor and negative; NaN beside a -1.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or range.

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

    Examples
    --------
    >>> from skembed.search.negatives import select_negatives
    >>> candidates = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]
    >>> indices, _ = select_negatives([[1.0, 0.0]], [[0.8, 0.6]], candidates, n_negatives=2)
    >>> indices
    array([[ 2, -1]])
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
    # No wider than there are candidates: k counts in the size of a block.
    wanted = n_negatives if sampling == "top" else _pool_size(n_negatives)
    found = top_k_blocks(
        anchors,
        candidates,
        max(1, min(wanted, m)),
        max_scores=_score_bounds(paired_dot(anchors, positives), strategy, threshold),
        excluded=excluded,
        query_groups=None if groups is None else groups[0],
        corpus_groups=None if groups is None else groups[1],
        block_bytes=block_bytes,
    )
    if sampling == "random":
        found = _draw(found, n_negatives, random_state=random_state)
    return _pad_columns(found, n_negatives)


def check_rule(
    n_negatives: Any, strategy: Any, threshold: Any, sampling: Any, *, owner: str
) -> tuple[int, float]:
    """Check what says how to select; return the number and the threshold."""
    n_negatives = check_int(n_negatives, name="n_negatives", owner=owner, low=1)
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


def _pool_size(n_negatives: int) -> int:
    """Return how many of the best "random" draws from."""
    return int(np.ceil(_POOL_FACTOR * n_negatives))


def _draw(
    found: TopK, n_negatives: int, *, random_state: int | np.random.RandomState | None
) -> TopK:
    """Draw `n_negatives` of the columns of each row without replacement, best first."""
    # Row by row from one stream: mining in several calls draws as mining in one.
    order = check_random_state(random_state).random_sample(found.indices.shape)
    order[found.indices < 0] = 2  # behind every number that can be drawn
    columns = np.argsort(order, axis=1, kind="stable")[:, :n_negatives]
    columns.sort(axis=1)
    return TopK(
        np.take_along_axis(found.scores, columns, axis=1),
        np.take_along_axis(found.indices, columns, axis=1),
    )


def _pad_columns(found: TopK, n_negatives: int) -> tuple[Indices, Vectors]:
    """Return indices and scores with exactly `n_negatives` columns."""
    missing = ((0, 0), (0, n_negatives - found.indices.shape[1]))
    return (
        np.pad(found.indices, missing, constant_values=-1),
        np.pad(found.scores, missing, constant_values=np.nan),
    )
