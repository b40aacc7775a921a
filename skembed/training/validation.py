"""The validation split of a training run, and the scores on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from skembed._validation import check_int, check_real
from skembed.similarity import Ints
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


def split_validation(
    examples: Examples, fraction: float, random_state: int | None
) -> tuple[Ints, Ints]:
    """Return the examples of the training and of the validation part, ascending.

    `fraction` is met as nearly as these rules allow: no text is in both parts as a single text
    (labels) or as an anchor (rows, scores); labels are split class by class, each class keeps at
    least two different texts for training, and a text of several classes stays there. Raises
    ValueError if a part would be empty.
    """
    name = "validation_fraction"
    share = check_real(fraction, name=name, owner=OWNER, low=0, high=1, inclusive="neither")
    seed = check_int(random_state, name="random_state", owner=OWNER, low=0, allow_none=True)
    rng = np.random.default_rng(seed)
    draw = _draw_anchors if examples.labels is None else _draw_labelled
    held_out = np.isin(examples.columns[:, 0], draw(examples, share, rng))  # (n,)
    if not held_out.any():
        what = "different anchors" if examples.labels is None else "texts in some class"
        least = 2 if examples.labels is None else 3
        raise ValueError(
            f"The `{name}` parameter of `{OWNER}` must leave examples to both parts; got {share}, "
            f"where nothing can be held out of {len(examples)} examples without at least {least} "
            f"{what}. Set {name}=0, or add examples."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draw_anchors(examples: Examples, share: float, rng: np.random.Generator) -> Ints:
    """Return anchors to hold out: some that just fill the share, else the rarest one."""
    n = len(examples)
    anchors, counts = np.unique(examples.columns[:, 0], return_counts=True)
    if len(anchors) < 2:
        return anchors[:0]
    room = min(round(share * n), n - 1)
    order = rng.permutation(len(anchors))
    chosen = []
    for index, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if count <= room:
            chosen.append(index)
            room -= count
    return anchors[chosen or [order[counts[order].argmin()]]]


def _draw_labelled(examples: Examples, share: float, rng: np.random.Generator) -> Ints:
    """Return texts to hold out, the same share of each class as far as it can spare them."""
    texts, labels = examples.label_pairs()
    n_classes = int(labels.max()) + 1
    sizes = np.bincount(labels, minlength=n_classes)  # (n_classes,)
    free = np.bincount(texts)[texts] == 1  # (m,)
    texts, labels = texts[free], labels[free]
    spare = np.minimum(np.bincount(labels, minlength=n_classes), np.maximum(sizes - 2, 0))
    quota = share * sizes
    n_held = np.minimum(np.floor(quota).astype(np.int64), spare)  # (n_classes,)
    # What rounding down leaves goes to the classes that came nearest to one more, ties by lot.
    order = rng.permutation(n_classes)
    order = order[np.argsort((n_held - quota)[order], kind="stable")]
    order = order[(n_held < spare)[order]]
    n_held[order[: max(0, max(1, round(quota.sum())) - int(n_held.sum()))]] += 1
    mixed = rng.permutation(len(texts))
    mixed = mixed[np.argsort(labels[mixed], kind="stable")]
    first = np.searchsorted(labels[mixed], np.arange(n_classes))
    rank = np.arange(len(mixed)) - first[labels[mixed]]  # within the class
    return texts[mixed[rank < n_held[labels[mixed]]]]


Embed = Callable[[np.ndarray], np.ndarray]  # rows of the table -> unit vectors (n, D)


@dataclass(frozen=True)
class Validation:
    """Score of a model while it trains; higher is better."""

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
    """Return the score on one task's held-out part."""
    columns = examples.columns
    if examples.labels is not None:
        some = np.random.default_rng((seed, 3)).permutation(training)[:CENTROID_TEXTS]
        seen, unseen = queries[columns[some, 0]], queries[columns[held, 0]]
        labels = examples.labels
        n_classes = int(labels.max()) + 1
        return _validate_classes(seen, unseen, labels[some], labels[held], n_classes)
    if examples.scores is not None:
        left, right = queries[columns[held, 0]], documents[columns[held, 1]]
        return _validate_pairs(left, right, examples.scores[held])
    return _validate_ranks(examples, held, queries, documents)


def _validate_classes(
    seen: np.ndarray,
    unseen: np.ndarray,
    seen_labels: np.ndarray,
    unseen_labels: np.ndarray,
    n_classes: int,
) -> Validation:
    """Return the accuracy on unseen texts of the nearest centroid of seen texts."""

    def score(embed: Embed) -> float:
        vectors = embed(seen)
        centroids = np.zeros((n_classes, vectors.shape[1]), dtype=np.float32)
        np.add.at(centroids, seen_labels, vectors)
        norms = np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids /= np.maximum(norms, np.finfo(np.float32).tiny)
        predicted = (embed(unseen) @ centroids.T).argmax(axis=1)
        return float((predicted == unseen_labels).mean())

    return Validation("accuracy of the nearest centroid", score)


def _validate_pairs(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> Validation:
    """Return the Spearman correlation of the cosines of pairs with their scores."""
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
    """Return the mean reciprocal rank of each anchor's own document among all held-out ones."""
    columns = examples.columns
    candidates = np.unique(columns[held, 1:])
    starts, known = examples.known_positives()
    positives = np.searchsorted(candidates, columns[held, 1])

    def score(embed: Embed) -> float:
        anchors, vectors = embed(queries[columns[held, 0]]), embed(documents[candidates])
        rank = np.empty(len(held), dtype=np.int64)
        size = max(1, BLOCK_SCORES // len(candidates))
        for block in (slice(k, k + size) for k in range(0, len(held), size)):
            cosines = anchors[block] @ vectors.T  # (rows of the block, n_candidates)
            best = cosines[np.arange(len(cosines)), positives[block]]
            for row, anchor in enumerate(columns[held[block], 0]):
                right = np.append(known[starts[anchor] : starts[anchor + 1]], anchor)
                index = np.searchsorted(candidates, right) % len(candidates)
                # Other right answers do not count as mistakes.
                cosines[row, index[candidates[index] == right]] = -np.inf
            rank[block] = 1 + (cosines > best[:, None]).sum(axis=1)
        return float(np.where(rank <= MRR_DEPTH, 1.0 / rank, 0.0).mean())

    return Validation(f"mean reciprocal rank at {MRR_DEPTH}", score)


def join_validations(validations: list[Validation]) -> Validation:
    """Return one score for all tasks: the mean."""
    if len(validations) == 1:
        return validations[0]

    def score(embed: Embed) -> float:
        return float(np.mean([validation.score(embed) for validation in validations]))

    return Validation(f"mean score of {len(validations)} tasks", score)
