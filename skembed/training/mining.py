"""Hard negatives for pairs and labelled texts: `mine_hard_negatives`."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from skembed._validation import check_bool, check_int, check_seed
from skembed.embedding import check_vectorizer, embed, embed_pairs
from skembed.exceptions import SkembedWarning
from skembed.progress import progress_bar
from skembed.search.negatives import check_rule, select_negatives
from skembed.search.top_k import BLOCK_BYTES
from skembed.similarity import Indices, Vectors, normalize_rows, paired_dot
from skembed.training.mining_task import OWNER, MiningTask, read_task

__all__ = ["MinedNegatives", "mine_hard_negatives"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class MinedNegatives:
    """Hard negatives found by `mine_hard_negatives`.

    Parameters
    ----------
    anchors : list of str
        One text per anchor, n_anchors in all.
    positives : list of str
        The positive of each anchor.
    positions : ndarray of int64, shape (n_anchors,)
        Row of X of each anchor, ascending.
    indices : ndarray of int64, shape (n_anchors, n_negatives)
        Positions in `corpus`, most similar first; -1 where there are not enough.
    scores : ndarray of float32, shape (n_anchors, n_negatives)
        Cosine similarity of anchor and negative; NaN beside a -1.
    positive_scores : ndarray of float32, shape (n_anchors,)
        Cosine similarity of anchor and positive.
    corpus : list of str
        The texts that `indices` point into: the corpus given, the distinct positives of the pairs,
        or the labelled texts. Of equal texts only the first is pointed to.

    See Also
    --------
    mine_hard_negatives : Function that finds them.

    Examples
    --------
    >>> import numpy as np
    >>> from skembed import MinedNegatives
    >>> mined = MinedNegatives(
    ...     anchors=["lost card"],
    ...     positives=["my card is gone"],
    ...     positions=np.array([0]),
    ...     indices=np.array([[1]]),
    ...     scores=np.array([[0.5]], dtype=np.float32),
    ...     positive_scores=np.array([0.8], dtype=np.float32),
    ...     corpus=["my card is gone", "open an account"],
    ... )
    >>> mined.to_rows()
    [('lost card', 'my card is gone', 'open an account')]
    """

    anchors: list[str]
    positives: list[str]
    positions: Indices
    indices: Indices
    scores: Vectors
    positive_scores: Vectors
    corpus: list[str]

    def __repr__(self) -> str:
        """Show sizes only: texts may be many, long or private."""
        n_anchors, n_negatives = self.indices.shape
        return (
            f"MinedNegatives(n_anchors={n_anchors}, n_negatives={n_negatives}, "
            f"n_found={int(self.n_found.sum())}, n_corpus={len(self.corpus)})"
        )

    @property
    def n_found(self) -> Indices:
        """Number of negatives of each anchor, int64 of shape (n_anchors,)."""
        return np.count_nonzero(self.indices >= 0, axis=1).astype(np.int64)

    def to_rows(self, *, min_negatives: int = 1) -> list[tuple[str, ...]]:
        """Return training rows (anchor, positive, negative, ...) of equal length.

        An anchor with fewer than `min_negatives` negatives is left out. One with fewer than
        n_negatives repeats its own in turn, so that all rows have one length.

        Parameters
        ----------
        min_negatives : int, default=1
            Fewest negatives that an anchor must have, in [1, n_negatives]. The upper bound keeps
            complete rows only: none repeats a negative.

        Returns
        -------
        list of tuple of str
            At most n_anchors rows of 2 + n_negatives texts, in the order of the anchors.

        Raises
        ------
        TypeError
            If `min_negatives` is not an int.
        ValueError
            If it is out of range, or no anchor has that many.

        Warns
        -----
        SkembedWarning
            With the number of anchors left out and of rows with repeated negatives, if any.

        Notes
        -----
        The loss takes a negative twice as seriously if a row repeats it.
        """
        owner = "MinedNegatives.to_rows"
        width = self.indices.shape[1]
        least = check_int(min_negatives, name="min_negatives", owner=owner, low=1, high=width)
        n_found = self.n_found
        anchors = np.flatnonzero(n_found >= least)
        if not len(anchors):
            raise ValueError(
                f"The `min_negatives` parameter of `{owner}` must be at most "
                f"{n_found.max(initial=0)}, the most that an anchor has; got {least}. "
                "Lower it, or mine with a larger `corpus`."
            )
        n_dropped = len(n_found) - len(anchors)
        n_padded = np.count_nonzero(n_found[anchors] < width)
        if n_dropped or n_padded:
            warnings.warn(
                f"Of {len(self.anchors)} anchors, {n_dropped} had too few negatives and were left "
                f"out, and {n_padded} had fewer than {width} and repeat their own. "
                "Ask for fewer `n_negatives` or mine in a larger `corpus`, or silence this with "
                "warnings.filterwarnings('ignore', category=skembed.SkembedWarning).",
                SkembedWarning,
                stacklevel=2,
            )
        chosen = self.indices[anchors[:, None], np.arange(width) % n_found[anchors, None]]
        return [
            (self.anchors[i], self.positives[i], *(self.corpus[j] for j in row))
            for i, row in zip(anchors.tolist(), chosen.tolist(), strict=True)
        ]


def mine_hard_negatives(
    X: Any,
    y: Any = None,
    *,
    vectorizer: Any,
    corpus: Any = None,
    n_negatives: int = 7,
    strategy: str = "perc_pos",
    threshold: float | None = None,
    sampling: str = "top",
    random_state: int | np.random.RandomState | None = None,
    verbose: bool = False,
) -> MinedNegatives:
    """Find texts that a model puts close to an anchor although they are not its positives.

    Rows with hard negatives teach more than rows without. The rules are positive-aware: a text as
    close as the positive is probably a positive that nobody has marked, so it is left out.

    Costs one embedding of every distinct text and n_anchors * n_corpus * dim multiplications.

    Parameters
    ----------
    X : list, tuple, ndarray or frame of str, n_samples rows
        Pairs (anchor, positive) in two columns; or, with `y`, single texts.
    y : list, ndarray or Series of str, int or bool, shape (n_samples,), optional
        Class labels. The positive of a text is then the next other text of its class, in the
        order of first appearance; that of the last is the first.
    vectorizer : object with `transform` or `encode`, or callable
        The model to train, or any other as teacher: fitted, or frozen; a SentenceTransformer, too.
        With `encode_query` and `encode_document`, anchors and all labelled texts are embedded as
        queries, positives and corpus as documents. A scikit-learn transformer must return dense
        vectors. They may have any length.
    corpus : list, tuple, ndarray, Series or one-column frame of str, optional
        Texts to search for negatives. None searches the distinct positives, or the labelled
        texts. Not with `y`: the class of its texts would be unknown.
    n_negatives : int, default=7
        Number of negatives for each anchor.
    strategy : {"perc_pos", "margin_pos"}, default="perc_pos"
        A negative's score is at most p times, or a margin below, that of the positive.
    threshold : float, optional
        The p in (0, 1] or the margin in [0, 2]. None is 0.95 or 0.05.
    sampling : {"top", "random"}, default="top"
        The most similar; or a draw without replacement from 2.5 times as many.
    random_state : int, RandomState or None, default=None
        Seed of the draw.
    verbose : bool, default=False
        Show a progress bar of the search. The vectorizer has its own.

    Returns
    -------
    MinedNegatives
        Indices, scores and texts; `to_rows` makes them rows for `NVEmbedVectorizer.fit`.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, or the vectorizer cannot embed or returns a sparse
        matrix.
    ValueError
        If an argument is out of range or does not fit the others; if `fit` would not train on X
        and y (fewer than two rows, one class only, a class with a single text, a positive equal
        to its anchor, an empty text); if no anchor has a negative.

    Warns
    -----
    SkembedWarning
        If labelled texts are left out because they occur under several classes.

    See Also
    --------
    NVEmbedVectorizer : Estimator that trains on the rows.

    Notes
    -----
    By exact equality of texts, a negative is never the anchor, one of its positives in any of
    the pairs with this anchor on either side, a text of its class, or given twice.

    A labelled text that occurs under several classes is left out altogether.

    For a positive with a negative score, see `select_negatives`, which differs from the paper.

    Every text is embedded by the vectorizer at the time of the call, so after training the new
    weights decide. Its cache, if it has one, must tell models apart, as `EmbeddingCache` does.

    Memory: the vectors of all distinct texts (twice, while they are scaled to unit length), the
    result (12 bytes a negative), and about 128 MiB, whatever the number of anchors and
    candidates.

    References
    ----------
    G. Moreira et al., NV-Retriever, arXiv 2407.15831; C. Lee et al., NV-Embed, arXiv 2405.17428,
    section 4.1.1.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer, mine_hard_negatives
    >>> pairs = [
    ...     ("my card was stolen", "report a stolen card"),
    ...     ("I want an account", "open an account"),
    ...     ("my card does not work", "replace a broken card"),
    ... ]
    >>> mined = mine_hard_negatives(pairs, vectorizer=NVEmbedVectorizer(), n_negatives=1)
    >>> mined.to_rows()[0]
    ('my card was stolen', 'report a stolen card', 'replace a broken card')
    """
    n_negatives, threshold = check_rule(n_negatives, strategy, threshold, sampling, owner=OWNER)
    verbose = check_bool(verbose, name="verbose", owner=OWNER)
    seed = check_seed(random_state, name="random_state", owner=OWNER)
    check_vectorizer(vectorizer, subject=f"The `vectorizer` parameter of `{OWNER}`")
    rule = {
        "n_negatives": n_negatives,
        "strategy": strategy,
        "threshold": threshold,
        "sampling": sampling,
        "random_state": check_random_state(seed),
    }
    task = read_task(X, y, corpus)
    mined = _mine(task, vectorizer, rule=rule, verbose=verbose)
    n_found = mined.n_found
    if not n_found.any():
        raise ValueError(_explain_none(task, strategy, threshold))
    _logger.info("%d of %d anchors have a negative", np.count_nonzero(n_found), len(n_found))
    return mined


def _embed_task(
    task: MiningTask, vectorizer: Any
) -> tuple[Vectors, Vectors, tuple[Indices, Indices]]:
    """Embed each text once a side; return queries, documents, and the row of each id in the two.

    The first documents are the candidates, in their order, so they need no copy.
    """
    others = np.setdiff1d(task.positives, task.candidates)
    documents = np.concatenate([task.candidates, others])
    queries = np.unique(task.anchors)
    n_texts = len(task.texts)
    has_sides = all(hasattr(vectorizer, f"encode_{side}") for side in ("query", "document"))
    if task.groups is not None or not has_sides:
        ids = np.concatenate([documents, np.setdiff1d(queries, documents)])
        texts = [task.texts[i] for i in ids.tolist()]
        side = "query" if has_sides else None
        vectors = normalize_rows(embed(vectorizer, texts, side, owner=OWNER))
        rows = _invert(ids, n_texts)
        return vectors, vectors, (rows, rows)
    pairs = [[task.texts[i] for i in ids.tolist()] for ids in (queries, documents)]
    left, right = map(normalize_rows, embed_pairs(vectorizer, pairs, owner=OWNER))
    return left, right, (_invert(queries, n_texts), _invert(documents, n_texts))


def _invert(ids: Indices, n_texts: int) -> Indices:
    """Return the position of each id in `ids`, -1 for none, (n_texts,)."""
    positions = np.full(n_texts, -1)
    positions[ids] = np.arange(len(ids))
    return positions


def _mine(
    task: MiningTask, vectorizer: Any, *, rule: dict[str, Any], verbose: bool
) -> MinedNegatives:
    """Select negatives for some anchors at a time, so that no copy of all their vectors exists."""
    queries, documents, (query_rows, document_rows) = _embed_task(task, vectorizer)
    candidates = documents[: len(task.candidates)]
    n, width = len(task.anchors), rule["n_negatives"]
    indices = np.full((n, width), -1, dtype=np.int64)
    scores = np.full((n, width), np.nan, dtype=np.float32)
    positive_scores = np.empty(n, dtype=np.float32)
    with progress_bar(verbose, total=n, desc="mining", unit="anchor") as bar:
        for rows in _cut_anchors(task, dim=documents.shape[1]):
            anchors = queries[query_rows[task.anchors[rows]]]
            positives = documents[document_rows[task.positives[rows]]]
            indices[rows], scores[rows] = select_negatives(
                anchors, positives, candidates, **task.cut_rules(rows), **rule
            )
            positive_scores[rows] = paired_dot(anchors, positives)
            bar.update(rows.stop - rows.start)
    return MinedNegatives(
        anchors=[task.texts[i] for i in task.anchors.tolist()],
        positives=[task.texts[i] for i in task.positives.tolist()],
        positions=task.positions,
        indices=np.where(indices >= 0, task.first[indices], -1),
        scores=scores,
        positive_scores=positive_scores,
        corpus=task.corpus,
    )


def _cut_anchors(task: MiningTask, *, dim: int) -> list[slice]:
    """Cut the anchors into parts whose vectors and known positives take about BLOCK_BYTES."""
    # Two float32 vectors; and each known positive as indices, then sorted with its row.
    n_bytes = 8 * dim + 40 * task.count_known()
    parts = np.cumsum(n_bytes) // BLOCK_BYTES
    starts = np.flatnonzero(np.diff(parts, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]


def _explain_none(task: MiningTask, strategy: str, threshold: float) -> str:
    """Say why no anchor has a negative: nothing else in the corpus, or all of it too similar."""
    # With labels there always is another class; with pairs, each row lists what it cannot have.
    if task.count_known().min() >= len(task.candidates):
        return (
            f"`{OWNER}` found no negatives: each of the {len(task.candidates)} distinct texts to "
            "mine from is the anchor itself or one of its positives, for every anchor. Pass a "
            "larger `corpus`."
        )
    return (
        f"`{OWNER}` found no negatives: every candidate is more similar to its anchor than "
        f"strategy={strategy!r} with threshold={threshold} allows. Pass a larger `corpus`, "
        "a weaker `threshold`, or another `vectorizer`."
    )
