"""The validation split of a training run, and the scores on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from skembed._validation import check_int, check_real
from skembed.training.example_input import Ints
from skembed.training.examples import Examples
from skembed.training.trainer import OWNER

__all__ = [
    "BLOCK_SCORES",
    "CENTROID_TEXTS",
    "Embed",
    "MRR_DEPTH",
    "Validation",
    "join_validations",
    "split_validation",
    "validation",
]

# ---------------------------------------------------------------- validation part


def split_validation(
    examples: Examples, fraction: float, random_state: int | None
) -> tuple[Ints, Ints]:
    """Split examples into a training and a validation part.

    Parameters
    ----------
    examples : Examples
        The examples.
    fraction : float
        Share of the validation part, in (0, 1); met as nearly as the rules in Notes allow.
    random_state : int or None
        Seed: the same one gives the same parts. None draws afresh.

    Returns
    -------
    train : ndarray of int64, shape (n_train,)
        Examples to train on, ascending.
    validation : ndarray of int64, shape (n - n_train,)
        The others, ascending.

    Raises
    ------
    TypeError, ValueError
        If `fraction` or `random_state` is of the wrong type or out of range.
    ValueError
        If one part would be empty.

    Notes
    -----
    No text is in both parts as a single text (labels) or as an anchor (rows, scores).
    Labels are split class by class; each class keeps at least two different texts for
    training, and a text that came with several labels stays there.
    """
    owner = "ContrastiveTrainer"
    name = "validation_fraction"
    share = check_real(fraction, name=name, owner=owner, low=0, high=1, inclusive="neither")
    seed = check_int(random_state, name="random_state", owner=owner, low=0, allow_none=True)
    rng = np.random.default_rng(seed)
    draw = _draw_anchors if examples.labels is None else _draw_labelled
    held_out = np.isin(examples.columns[:, 0], draw(examples, share, rng))  # (n,)
    if not held_out.any():
        what = "different anchors" if examples.labels is None else "texts in some class"
        least = 2 if examples.labels is None else 3
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must leave examples to both parts; got {share}, "
            f"where nothing can be held out of {len(examples)} examples without at least {least} "
            f"{what}. Set {name}=0, or add examples."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draw_anchors(examples: Examples, share: float, rng: np.random.Generator) -> Ints:
    """Anchors to hold out: some that fill the share without exceeding it, else the rarest one."""
    n = len(examples)
    anchors, counts = np.unique(examples.columns[:, 0], return_counts=True)
    if len(anchors) < 2:
        return anchors[:0]
    room = min(round(share * n), n - 1)
    order = rng.permutation(len(anchors))
    chosen = []
    for place, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if count <= room:
            chosen.append(place)
            room -= count
    return anchors[chosen or [order[counts[order].argmin()]]]


def _draw_labelled(examples: Examples, share: float, rng: np.random.Generator) -> Ints:
    """Texts to hold out, the same share of each class as far as it can spare them."""
    texts, labels = examples._label_pairs()
    n_classes = int(labels.max()) + 1
    sizes = np.bincount(labels, minlength=n_classes)  # (n_classes,)
    free = np.bincount(texts)[texts] == 1  # (m,)
    texts, labels = texts[free], labels[free]
    spare = np.minimum(np.bincount(labels, minlength=n_classes), np.maximum(sizes - 2, 0))
    quota = share * sizes
    taken = np.minimum(np.floor(quota).astype(np.int64), spare)
    # What rounding down leaves goes to the classes that came nearest to one more, ties by lot.
    order = rng.permutation(n_classes)
    order = order[np.argsort((taken - quota)[order], kind="stable")]
    order = order[(taken < spare)[order]]
    taken[order[: max(0, max(1, round(quota.sum())) - int(taken.sum()))]] += 1
    mixed = rng.permutation(len(texts))
    mixed = mixed[np.argsort(labels[mixed], kind="stable")]
    first = np.searchsorted(labels[mixed], np.arange(n_classes))
    rank = np.arange(len(mixed)) - first[labels[mixed]]  # within the class
    return texts[mixed[rank < taken[labels[mixed]]]]


Embed = Callable[[np.ndarray], np.ndarray]  # rows of the table -> unit vectors (n, D)


@dataclass(frozen=True)
class Validation:
    """How a model is scored while it trains.

    Attributes
    ----------
    metric : str
        Name of the score; higher is better.
    score : callable
        Takes a function from rows of the table to unit vectors (n, D), gives the score.
    """

    metric: str
    score: Callable[[Embed], float]


CENTROID_TEXTS = 4_096  # of the training part, for the validation of classes
MRR_DEPTH = 10
BLOCK_SCORES = 1 << 22  # cosines of the validation of rows held at once


def validation(
    examples: Examples,
    training: np.ndarray,
    held: np.ndarray,
    queries: np.ndarray,
    documents: np.ndarray,
    seed: int,
) -> Validation:
    """The score of one task's held-out part."""
    columns = examples.columns
    if examples.labels is not None:
        some = np.random.default_rng((seed, 3)).permutation(training)[:CENTROID_TEXTS]
        known, unseen = queries[columns[some, 0]], queries[columns[held, 0]]
        return _validate_classes(known, unseen, examples.labels, some, held)
    if examples.scores is not None:
        left, right = queries[columns[held, 0]], documents[columns[held, 1]]
        return _validate_pairs(left, right, examples.scores[held])
    return _validate_ranks(examples, held, queries, documents)


def _validate_classes(
    known: np.ndarray, unseen: np.ndarray, labels: np.ndarray, some: np.ndarray, held: np.ndarray
) -> Validation:
    """Accuracy of the nearest centroid on unseen texts; the centroids are of the known ones.

    `labels` are those of all examples, `some` and `held` the rows of the known and unseen texts.
    """

    def score(embed: Embed) -> float:
        vectors = embed(known)
        centroids = np.zeros((labels.max() + 1, vectors.shape[1]), dtype=np.float32)
        np.add.at(centroids, labels[some], vectors)
        norms = np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids /= np.maximum(norms, np.finfo(np.float32).tiny)
        found = (embed(unseen) @ centroids.T).argmax(axis=1)
        return float((found == labels[held]).mean())

    return Validation("accuracy of the nearest centroid", score)


def _validate_pairs(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> Validation:
    """Spearman correlation of the cosines of pairs with their scores."""
    if np.ptp(scores) == 0:
        raise ValueError(
            f"The `validation_fraction` parameter of `{OWNER}` holds out {len(scores)} pairs "
            "whose scores are all equal: there is no order to check. Raise it."
        )

    def score(embed: Embed) -> float:
        cosines = np.einsum("nd,nd->n", embed(left), embed(right))
        return float(spearmanr(cosines, scores).statistic)

    return Validation("Spearman correlation", score)


def _validate_ranks(
    examples: Examples, held: np.ndarray, queries: np.ndarray, documents: np.ndarray
) -> Validation:
    """Mean reciprocal rank of each held-out anchor's own document among all held-out ones."""
    columns = examples.columns
    candidates = np.unique(columns[held, 1:])
    starts, known = examples.known_positives()
    own = np.searchsorted(candidates, columns[held, 1])

    def score(embed: Embed) -> float:
        anchors, vectors = embed(queries[columns[held, 0]]), embed(documents[candidates])
        rank = np.empty(len(held), dtype=np.int64)
        size = max(1, BLOCK_SCORES // len(candidates))
        for block in (slice(k, k + size) for k in range(0, len(held), size)):
            cosines = anchors[block] @ vectors.T  # (rows of the block, n_candidates)
            best = cosines[np.arange(len(cosines)), own[block]]
            for row, anchor in enumerate(columns[held[block], 0]):
                right = np.append(known[starts[anchor] : starts[anchor + 1]], anchor)
                place = np.searchsorted(candidates, right) % len(candidates)
                # Other right answers are no mistakes.
                cosines[row, place[candidates[place] == right]] = -np.inf
            rank[block] = 1 + (cosines > best[:, None]).sum(axis=1)
        return float(np.where(rank <= MRR_DEPTH, 1.0 / rank, 0.0).mean())

    return Validation(f"mean reciprocal rank at {MRR_DEPTH}", score)


def join_validations(validations: list[Validation]) -> Validation:
    """One score for all tasks: the mean."""
    if len(validations) == 1:
        return validations[0]

    def score(embed: Embed) -> float:
        return float(np.mean([validation.score(embed) for validation in validations]))

    return Validation(f"mean score of {len(validations)} tasks", score)
