"""Training examples -> batches: which texts are embedded together, and what is compared with what.

A plan knows every example of every task and gives the batches of an epoch as a function of the
seed, the epoch and the batch's number alone; nothing is kept between batches, so training resumes
anywhere. Memory is linear in the number of examples: pairs of texts of one class are drawn, never
listed.

Which candidates count as negatives of an anchor:

================== ================================================================================
in-batch negatives every other positive and negative of the batch, of any task
(stage 1)
its own negatives  those given, mined, or (class labels) drawn from other classes
(stage 2: only)
never              a text of a class that the anchor's text has, a known positive of that text,
                   and one that equals the anchor or its positive; whichever task it comes from
================== ================================================================================

Source: NV-Embed, arXiv 2405.17428, sections 4.1 and 4.2 (blended batches; example-based classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from skembed.examples import Examples
from skembed.tokenization import PackedBatch, TextTokenizer, pack_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

# Positives that a text of a class meets in one epoch, where its class has as many: few-shot data
# then give enough steps in one epoch (benchmarks/fewshot.py), and large data do not explode.
POSITIVES_PER_EPOCH = 8


class ClassIndex:
    """Labelled examples sorted by class.

    Attributes
    ----------
    labels : ndarray of int64, shape (n,)
        Class of each example.
    order, place : ndarray of int64, shape (n,)
        Examples class by class, and where each of them stands in that order.
    starts : ndarray of int64, shape (n_classes + 1,)
        Where each class begins.
    of_text : ndarray of int64, shape (n_texts,)
        Class of each text, the first one where it came with several; -1 for none.
    """

    def __init__(self, examples: Examples, labels: np.ndarray) -> None:
        self.labels = labels
        self.order = np.argsort(labels, kind="stable")
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(self.order))
        self.starts = np.searchsorted(labels[self.order], np.arange(labels.max() + 2))
        self.of_text = np.full(len(examples.texts), -1, dtype=np.int64)
        self.of_text[examples.columns[::-1, 0]] = labels[::-1]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.starts) - 1


@dataclass(eq=False)
class TaskPlan:
    """One task, ready for drawing.

    Attributes
    ----------
    examples : Examples
        The training part.
    loss : {"infonce", "cosent"}
        The loss of its batches.
    in_batch_negatives : bool
        Whether the other candidates of a batch are negatives.
    weight : float
        Draws in one epoch, relative to the number of examples.
    queries, documents : ndarray of int64, shape (n_texts,)
        Row of the `TextTable` of each text as a query and as a document; -1 where it is none.
    mined : ndarray of int64, shape (n, k), optional
        Mined negatives of each example as indices into its texts; -1 for none.
    """

    examples: Examples
    loss: str
    in_batch_negatives: bool
    weight: float
    queries: np.ndarray
    documents: np.ndarray
    mined: np.ndarray | None = None
    classes: ClassIndex | None = field(default=None, init=False)
    _known: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Sort labelled examples by class; find the known positives of rows."""
        if self.examples.labels is not None:
            self.classes = ClassIndex(self.examples, self.examples.labels)
        elif self.loss == "infonce":
            self._known = self.examples.known_positives()

    def draw_epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Examples of one epoch, and for each the number of its repetition; any order."""
        n = len(self.examples)
        repeats = np.ones(n, dtype=np.int64)
        if self.classes is not None:
            sizes = np.diff(self.classes.starts)[self.classes.labels]
            repeats = np.minimum(sizes - 1, POSITIVES_PER_EPOCH)
        rows = np.repeat(np.arange(n), repeats)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        numbers += rng.integers(0, 1 << 20, size=n)[rows]  # other positives in each epoch
        # Two at the least: a light task never vanishes, nor has nothing to compare.
        n_drawn = max(min(2, len(rows)), round(self.weight * len(rows)))
        whole, rest = divmod(n_drawn, len(rows))
        some = rng.permutation(len(rows))[:rest]
        picked = np.concatenate([np.tile(np.arange(len(rows)), whole), some])
        copy = np.arange(n_drawn) // len(rows)  # goes on where the copy before it ended
        return rows[picked], numbers[picked] + copy * repeats[rows[picked]]

    def draw(
        self, rows: np.ndarray, numbers: np.ndarray, n_negatives: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Anchor (b,), positive (b,) and negatives (b, k; -1 none) of examples, as text indices.

        `numbers` counts the repetitions of an example within its epoch.
        """
        columns = self.examples.columns
        if self.classes is None:
            given = columns[rows, 2:]
            if self.mined is not None:
                given = np.hstack([given, self.mined[rows]])
            if given.shape[1] > n_negatives:  # another choice at each draw
                keys = rng.random(given.shape) + (given < 0)
                chosen = np.argsort(keys, axis=1)[:, :n_negatives]
                given = np.take_along_axis(given, chosen, axis=1)
            return columns[rows, 0], columns[rows, 1], given
        positive, negatives = self._draw_classes(self.classes, rows, numbers, n_negatives, rng)
        return columns[rows, 0], columns[positive, 0], negatives

    def _draw_classes(
        self,
        classes: ClassIndex,
        rows: np.ndarray,
        numbers: np.ndarray,
        n_negatives: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positive example (b,) and negative texts (b, k) of labelled examples."""
        order, place, starts = classes.order, classes.place, classes.starts
        labels = classes.labels[rows]
        first, size = starts[labels], starts[labels + 1] - starts[labels]
        # One further in the circle of the class at each repetition, from a place that differs by
        # example: never the example itself, and no positive twice before all were met.
        step = 1 + (rows * 2_654_435_761 + numbers) % (size - 1)
        positive = order[first + (place[rows] - first + step) % size]
        if self.mined is not None:
            return positive, self.mined[rows][:, :n_negatives]
        if self.in_batch_negatives:
            if len(np.unique(labels)) > 1:  # the batch itself holds examples of other classes
                return positive, np.empty((len(rows), 0), dtype=np.int64)
            n_negatives = max(1, n_negatives)
        others = len(order) - size
        drawn = rng.integers(0, others[:, None], size=(len(rows), n_negatives))
        drawn += (drawn >= first[:, None]) * size[:, None]
        return positive, self.examples.columns[order[drawn], 0]

    def draw_scored(
        self, rows: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Columns (b, 2) and scores (b,) of examples; one more where all their scores are equal."""
        scores: Any = self.examples.scores
        if np.ptp(scores[rows]) == 0:
            other = np.flatnonzero(scores != scores[rows[0]])
            rows = np.append(rows, rng.permutation(other)[:1])
        return self.examples.columns[rows], scores[rows]

    def forbidden_candidates(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each example the candidates (sorted texts) no miner may return, as CSR arrays.

        The anchor itself, its positive and all known positives of its text.
        """
        columns = self.examples.columns
        row, known = self.known_of(columns[:, 0])
        every = np.arange(len(columns))
        row = np.concatenate([row, every, every])
        known = np.concatenate([known, columns[:, 0], columns[:, 1]])
        place = np.searchsorted(candidates, known)
        found = candidates[np.minimum(place, len(candidates) - 1)] == known
        pairs = np.unique(np.stack([row[found], place[found]], axis=1), axis=0)
        starts = np.searchsorted(pairs[:, 0], np.arange(len(columns) + 1))
        return starts, pairs[:, 1]

    def known_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Known positives of texts: position in `texts`, and index of the known text."""
        if self._known is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        starts, known = self._known
        counts = starts[texts + 1] - starts[texts]
        position = np.repeat(np.arange(len(texts)), counts)
        inside = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        return position, known[np.repeat(starts[texts], counts) + inside]


@dataclass(frozen=True)
class Contrast:
    """Rows of a batch for InfoNCE.

    Attributes
    ----------
    anchors, candidates : ndarray of int64, shapes (b,) and (c,)
        Rows of the batch's embeddings.
    positive : ndarray of int64, shape (b,)
        Each anchor's positive, as an index into `candidates`.
    allowed : ndarray of bool, shape (b, c)
        The positive and what counts as a negative.
    """

    anchors: np.ndarray
    candidates: np.ndarray
    positive: np.ndarray
    allowed: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Rows of a batch for CoSENT: both texts of each pair (b,), and the scores (b,)."""

    left: np.ndarray
    right: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One optimiser step.

    Attributes
    ----------
    texts : ndarray of int64, shape (m,)
        Rows of the `TextTable`, each once.
    contrast : Contrast or None
        All InfoNCE examples of the batch.
    rankings : list of Ranking
        CoSENT examples, task by task.
    n_examples : int
        Examples in the batch.
    """

    texts: np.ndarray
    contrast: Contrast | None
    rankings: list[Ranking]
    n_examples: int


class TextTable:
    """Token ids of all texts of all tasks, each (prefix, text) once.

    Parameters
    ----------
    tokenizer : TextTokenizer
        The model's.
    max_length : int
        Tokens, prefix included.
    mask_prefix : bool
        Whether the prefix stays out of the pool.
    """

    def __init__(self, tokenizer: TextTokenizer, *, max_length: int, mask_prefix: bool) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_prefix = mask_prefix
        self.ids: list[np.ndarray] = []
        self.pool_starts: list[int] = []
        self.string_ids: list[int] = []
        self.n_truncated = 0
        self._rows: dict[tuple[str, int], int] = {}
        self._strings: dict[str, int] = {}

    def add(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        """Rows of these texts behind this prefix, (n,); new ones are tokenised."""
        strings = [self._strings.setdefault(text, len(self._strings)) for text in texts]
        new = {}
        for text, string in zip(texts, strings, strict=True):
            if (prefix, string) not in self._rows:
                self._rows[prefix, string] = len(self._rows)
                new[string] = text
        encoded = self.tokenizer.encode(
            list(new.values()),
            prefix=prefix,
            max_length=self.max_length,
            mask_prefix=self.mask_prefix,
        )
        self.ids.extend(encoded.ids)
        self.string_ids.extend(new)
        self.pool_starts.extend([encoded.pool_start] * len(new))
        self.n_truncated += encoded.n_truncated
        return np.array([self._rows[prefix, string] for string in strings], dtype=np.int64)

    def freeze(self) -> None:
        """Turn the lists that batches look things up in into arrays; no text follows."""
        self.lengths = np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))
        self.pool_start_of = np.array(self.pool_starts, dtype=np.int64)
        self.string_of = np.array(self.string_ids, dtype=np.int64)
        del self._rows, self._strings, self.pool_starts, self.string_ids

    def cut(self, texts: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """Positions in `texts` in chunks of one prefix, of similar length, within a budget."""
        starts, lengths = self.pool_start_of[texts], self.lengths[texts]
        order = np.lexsort((-lengths, starts))
        chunks: list[list[int]] = []
        used, start = 0, -1
        for position in order.tolist():
            if not chunks or starts[position] != start or used + lengths[position] > batch_tokens:
                chunks.append([])
                used, start = 0, starts[position]
            chunks[-1].append(position)
            used += lengths[position]
        return [np.array(chunk, dtype=np.int64) for chunk in chunks]

    def pack(self, texts: np.ndarray, *, on_grid: bool) -> PackedBatch:
        """These rows, of one prefix, as the model takes them."""
        ids = [self.ids[row] for row in texts]
        return pack_texts(ids, int(self.pool_start_of[texts[0]]), on_grid=on_grid)


class BatchPlan:
    """All batches of a training run.

    Parameters
    ----------
    tasks : sequence of TaskPlan
        The tasks.
    table : TextTable
        Their texts, frozen.
    batch_size : int
        Examples of one step.
    n_negatives : int
        Negatives of its own that an example brings, at most.
    seed : int
        Of the whole run.
    blend : bool
        Mix all tasks in every batch (the paper's way), or keep each batch to one task.
    """

    def __init__(
        self,
        tasks: Sequence[TaskPlan],
        table: TextTable,
        *,
        batch_size: int,
        n_negatives: int,
        seed: int,
        blend: bool = True,
    ) -> None:
        self.tasks = list(tasks)
        self.table = table
        self.batch_size = batch_size
        self.n_negatives = n_negatives
        self.seed = seed
        self.blend = blend
        self.groups = _GroupIndex(self.tasks, table)
        self.n_batches = len(self.list_epoch(0))

    def list_epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each (b, 3): task, example, number of its repetition."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        drawn = []
        for number, task in enumerate(self.tasks):
            rows, numbers = task.draw_epoch(rng)
            drawn.append(np.stack([np.full_like(rows, number), rows, numbers], axis=1))
        groups = [np.concatenate(drawn)] if self.blend else [part for part in drawn if len(part)]
        batches = []
        for group in groups:
            # No example is left alone with nothing to be told from.
            most = len(group) // min(2, self.batch_size)
            n = max(1, min(most, round(len(group) / self.batch_size)))
            batches.extend(np.array_split(rng.permutation(group), n))
        if not self.blend:
            rng.shuffle(batches)
        return batches

    def starts_epoch(self, step: int) -> bool:
        """Whether a step, counted from 0, is the first of its epoch."""
        return step % self.n_batches == 0

    def iterate_steps(self, first: int, n_steps: int) -> Iterator[tuple[int, np.ndarray]]:
        """Steps from `first` on, each with its batch as `list_epoch` gives it."""
        epoch, listed = -1, []
        for step in range(first, n_steps):
            if step // self.n_batches != epoch:
                epoch = step // self.n_batches
                listed = self.list_epoch(epoch)
            yield step, listed[step % self.n_batches]

    def build(self, step: int, listed: np.ndarray) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((self.seed, 1, step))
        parts, rankings, rows = [], [], []
        for t, task in enumerate(self.tasks):
            chosen = listed[listed[:, 0] == t]
            if not len(chosen):
                continue
            if task.examples.scores is not None:
                columns, scores = task.draw_scored(chosen[:, 1], rng)
                left, right = task.queries[columns[:, 0]], task.documents[columns[:, 1]]
                rankings.append((left, right, scores))
                rows += [left, right]
            else:
                parts.append(self._draw_part(t, chosen, rng))
        drawn = _join(parts, self.table, self.groups) if parts else None
        if drawn is not None:
            rows += [drawn.anchors, drawn.candidates]
        texts = np.unique(np.concatenate(rows))

        def place(values: np.ndarray) -> np.ndarray:
            return np.searchsorted(texts, values)

        contrast = None
        if drawn is not None:
            contrast = Contrast(
                place(drawn.anchors), place(drawn.candidates), drawn.positive, drawn.allowed
            )
        ranked = [Ranking(place(a), place(b), scores) for a, b, scores in rankings]
        return Batch(texts, contrast, ranked, len(listed))

    def _draw_part(self, t: int, chosen: np.ndarray, rng: np.random.Generator) -> _Part:
        """What the InfoNCE examples of one task bring into a batch."""
        task = self.tasks[t]
        anchor, positive, negatives = task.draw(chosen[:, 1], chosen[:, 2], self.n_negatives, rng)
        rows, columns = np.nonzero(negatives >= 0)
        known_row, known = task.known_of(anchor)
        return _Part(
            tasks=np.full(len(anchor), t),
            anchors=task.queries[anchor],
            positives=task.documents[positive],
            negatives=task.documents[negatives[rows, columns]],
            negative_rows=rows,
            known_rows=known_row,
            known=np.where(task.documents[known] < 0, task.queries[known], task.documents[known]),
            in_batch=np.full(len(anchor), task.in_batch_negatives),
        )


class _GroupIndex:
    """Which classes each labelled text has, sorted by text; classes counted over all tasks."""

    def __init__(self, tasks: Sequence[TaskPlan], table: TextTable) -> None:
        counts = [task.classes.n_classes if task.classes else 0 for task in tasks]
        self.first = np.cumsum([0, *counts])
        pairs = [np.empty((2, 0), dtype=np.int64)]
        for first, task in zip(self.first, tasks, strict=False):
            if task.classes is not None:
                rows = task.queries[task.examples.columns[:, 0]]
                pairs.append(np.stack([table.string_of[rows], first + task.classes.labels]))
        strings, groups = np.concatenate(pairs, axis=1)
        order = np.argsort(strings, kind="stable")
        self.strings, self.groups = strings[order], groups[order]

    def forbid(
        self,
        allowed: np.ndarray,
        anchors: np.ndarray,
        tasks: np.ndarray,
        candidates: np.ndarray,
    ) -> None:
        """Take from `allowed` (b, c) the texts that share a class of the anchor's task with it."""
        i, at = _match(anchors, self.strings)
        groups, task = self.groups[at], tasks[i]
        own = (groups >= self.first[task]) & (groups < self.first[task + 1])
        i, groups = i[own], groups[own]
        j, at = _match(candidates, self.strings)
        for group in np.unique(groups):
            allowed[np.ix_(i[groups == group], j[self.groups[at] == group])] = False


@dataclass(frozen=True)
class _Part:
    """InfoNCE examples of one task in one batch; texts as rows of the table."""

    tasks: np.ndarray
    anchors: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray  # of all anchors, one after the other
    negative_rows: np.ndarray
    known_rows: np.ndarray
    known: np.ndarray
    in_batch: np.ndarray


def _join(parts: Sequence[_Part], table: TextTable, index: _GroupIndex) -> Contrast:
    """The parts of a batch as one contrast, texts still as rows of the table."""
    offsets = np.cumsum([0, *(len(part.anchors) for part in parts)])

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_rows(name: str) -> np.ndarray:
        pairs = zip(offsets, parts, strict=False)
        return np.concatenate([offset + getattr(part, name) for offset, part in pairs])

    anchors, positives = join("anchors"), join("positives")
    columns, place = np.unique(np.concatenate([positives, join("negatives")]), return_inverse=True)
    positive, own = place[: len(positives)], place[len(positives) :]
    allowed = np.repeat(join("in_batch")[:, None], len(columns), axis=1)
    allowed[join_rows("negative_rows"), own] = True
    # False negatives: the anchor's text, its known positives or its classes; the texts equal to
    # its positive are among these.
    strings, anchor_strings = table.string_of[columns], table.string_of[anchors]
    allowed &= strings[None] != anchor_strings[:, None]
    order = np.argsort(strings)
    rows, hits = _match(table.string_of[join("known")], strings[order])
    allowed[join_rows("known_rows")[rows], order[hits]] = False
    index.forbid(allowed, anchor_strings, join("tasks"), strings)
    allowed[np.arange(len(anchors)), positive] = True
    return Contrast(anchors, columns, positive, allowed)


def _match(wanted: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with wanted[i] == ordered[j], by i."""
    first = np.searchsorted(ordered, wanted, side="left")
    counts = np.searchsorted(ordered, wanted, side="right") - first
    i = np.repeat(np.arange(len(wanted)), counts)
    return i, first[i] + np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
