"""The task of `mine_hard_negatives`: pairs or labelled texts as ids of distinct texts.

Says for each anchor which candidates can never be its negatives; embeds no text.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from skembed._inputs import check_texts, read_columns
from skembed.exceptions import SkembedWarning
from skembed.similarity import Indices
from skembed.training.examples import Examples, check_examples

__all__ = ["MiningTask", "OWNER", "read_task"]

OWNER = "mine_hard_negatives"


@dataclass(frozen=True, eq=False, repr=False)
class MiningTask:
    """Anchors, positives and candidates of a search, as ids of distinct texts."""

    texts: list[str]
    anchors: Indices  # (n_anchors,), ids
    positives: Indices  # (n_anchors,), ids
    positions: Indices  # (n_anchors,), rows of X
    candidates: Indices  # (n_candidates,), ids, distinct
    corpus: list[str]
    first: Indices  # (n_candidates,), position of each candidate in `corpus`
    # Pairs: sparse matrix (n_texts, n_candidates) of candidates that cannot be a text's negatives.
    known: Any | None
    groups: tuple[Indices, Indices] | None  # labels: class of each anchor, of each candidate

    def count_known(self) -> Indices:
        """Return how many candidates the pairs rule out as negatives, (n_anchors,)."""
        if self.known is None:
            return np.zeros(len(self.anchors), dtype=np.int64)
        return np.diff(self.known.indptr)[self.anchors].astype(np.int64)

    def cut_rules(self, rows: slice) -> dict[str, Any]:
        """Return what `select_negatives` must not choose for some of the anchors."""
        if self.known is not None:
            # Only now: an anchor in many pairs lists all its positives once for each of them.
            part = self.known[self.anchors[rows]]
            return {"known_positives": (part.indptr, part.indices)}
        if self.groups is not None:
            return {"anchor_groups": self.groups[0][rows], "candidate_groups": self.groups[1]}
        return {}


def read_task(X: Any, y: Any, corpus: Any) -> MiningTask:
    """Return the task for pairs or for labelled texts, whichever X and y hold."""
    columns, _ = read_columns(X, subject=f"The `X` parameter of `{OWNER}`")
    if len(columns) > 1 and y is not None:
        raise ValueError(
            f"The `y` parameter of `{OWNER}` must be None for pairs, whose second text is the "
            "positive; got scores or labels. Keep the pairs with high scores, and leave out `y`."
        )
    examples = check_examples(X, y, owner=OWNER)
    if examples.labels is not None:
        if corpus is not None:
            raise ValueError(
                f"The `corpus` parameter of `{OWNER}` must be None where `y` is given, because its "
                "texts have no known class. Add them to `X` and `y`, or mine with pairs."
            )
        return _read_labelled(examples, examples.labels)
    if examples.columns.shape[1] != 2:
        raise ValueError(
            f"The `X` parameter of `{OWNER}` must hold pairs (anchor, positive) or single texts; "
            f"got rows of {examples.columns.shape[1]} texts. Leave out their negatives."
        )
    return _read_pairs(examples, corpus)


def _read_pairs(examples: Examples, corpus: Any) -> MiningTask:
    """Return the task for pairs: to search the corpus, or the distinct positives."""
    ids = {text: i for i, text in enumerate(examples.texts)}
    anchors, positives = examples.columns.T
    if corpus is None:
        candidates = np.unique(positives)
        texts = [examples.texts[i] for i in candidates.tolist()]
        first = np.arange(len(candidates))
    else:
        texts = _read_corpus(corpus)
        corpus_ids = np.array([ids.setdefault(text, len(ids)) for text in texts], dtype=np.int64)
        # In the order of the corpus, so that of equal scores its first text wins.
        first = np.sort(np.unique(corpus_ids, return_index=True)[1])
        candidates = corpus_ids[first]
    return MiningTask(
        texts=list(ids),
        anchors=anchors,
        positives=positives,
        positions=np.arange(len(anchors)),
        candidates=candidates,
        corpus=texts,
        first=first,
        known=_find_known(anchors, positives, candidates, n_texts=len(ids)),
        groups=None,
    )


def _read_corpus(corpus: Any) -> list[str]:
    """Return the corpus as a list of texts."""
    columns = check_texts(corpus, owner=OWNER, name="corpus").columns
    if len(columns) != 1 or not columns[0]:
        got = "pairs" if len(columns) != 1 else "none"
        raise ValueError(
            f"The `corpus` parameter of `{OWNER}` must hold at least one text, one a row; "
            f"got {got}."
        )
    return columns[0]


def _find_known(anchors: Indices, positives: Indices, candidates: Indices, *, n_texts: int) -> Any:
    """Return a CSR matrix (n_texts, n_candidates): the candidates that are or pair with a text."""
    column = np.full(n_texts, -1)
    column[candidates] = np.arange(len(candidates))
    # Both directions, and each text with itself.
    texts = np.concatenate([anchors, positives, anchors])
    others = column[np.concatenate([positives, anchors, anchors])]
    inside = others >= 0
    ones = np.ones(np.count_nonzero(inside), dtype=np.bool_)
    shape = (n_texts, len(candidates))
    return sparse.csr_matrix((ones, (texts[inside], others[inside])), shape=shape)


def _read_labelled(examples: Examples, labels: Indices) -> MiningTask:
    """Return the task for labelled texts: to search the texts of other classes."""
    texts = examples.columns[:, 0]
    ids, first, counts = np.unique(texts, return_index=True, return_counts=True)
    classes = labels[first]  # of each distinct text, by id
    # A text is of one class if all its rows have the label of its first.
    is_clear = np.bincount(texts[labels == classes[texts]], minlength=len(ids)) == counts
    candidates = ids[is_clear]
    positives = np.full(len(ids), -1)
    if len(candidates):
        positives[candidates] = _follow(candidates, classes[candidates])
    positions = np.flatnonzero(positives[texts] >= 0)
    _check_left(len(positions), classes[candidates], n_texts=len(texts))
    return MiningTask(
        texts=examples.texts,
        anchors=texts[positions],
        positives=positives[texts[positions]],
        positions=positions,
        candidates=candidates,
        corpus=[examples.texts[i] for i in texts.tolist()],
        first=first[is_clear],
        known=None,  # the anchor and its positive are of its class
        groups=(labels[positions], classes[candidates]),
    )


def _follow(texts: Indices, classes: Indices) -> Indices:
    """Return for each text the next of its class, for the last the first, -1 if alone, (n,)."""
    order = np.lexsort((texts, classes))
    is_first = np.diff(classes[order], prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    following = np.arange(1, len(order) + 1)
    following[np.append(starts[1:], len(order)) - 1] = starts  # the last goes back to the first
    result = np.empty_like(texts)
    result[order] = np.where(following == np.arange(len(order)), -1, texts[order][following])
    return result


def _check_left(n_anchors: int, classes: Indices, *, n_texts: int) -> None:
    """Warn about labelled texts that cannot be anchors; raise if the others cannot be mined."""
    if not n_anchors or len(np.unique(classes)) < 2:
        raise ValueError(
            f"The `y` parameter of `{OWNER}` must leave two classes and two texts of one class "
            "when texts that occur under several classes are left out; got less. Correct their "
            "labels."
        )
    if n_anchors < n_texts:
        warnings.warn(
            f"{n_texts - n_anchors} of {n_texts} texts cannot be anchors: they occur under several "
            "classes, or all other texts of their class do. Correct their labels, or silence this "
            "with warnings.filterwarnings('ignore', category=skembed.SkembedWarning).",
            SkembedWarning,
            stacklevel=5,  # the caller of `mine_hard_negatives`
        )
