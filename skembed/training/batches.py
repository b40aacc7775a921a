"""Training batches: the texts embedded together, and the comparisons among them.

A plan knows every example of every task. The batches of an epoch depend on the seed, the epoch and
the batch's number alone, so training resumes anywhere. Memory is linear in the number of examples:
pairs of texts of one class are drawn, never listed.

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skembed.model.tokenization import PackedBatch, TextTokenizer, pack_texts
from skembed.training.examples import Examples
from skembed.training.trainer import ContrastiveTrainer

__all__ = ["Batch", "BatchPlan", "ClassIndex", "POSITIVES_PER_EPOCH", "TaskSampler", "TextTable"]

# Positives that a text of a class meets in one epoch, where its class has as many: few-shot data
# then give enough steps in one epoch (benchmarks/fewshot.py), and large data do not explode.
POSITIVES_PER_EPOCH = 8


class ClassIndex:
    """Labelled examples sorted by class."""

    def __init__(self, examples: Examples) -> None:
        self.labels = labels = np.asarray(examples.labels)  # (n,)
        self.n_classes = int(labels.max()) + 1
        self.order = np.argsort(labels, kind="stable")  # (n,), examples class by class
        self.position = np.empty_like(self.order)  # (n,), of each example in `order`
        self.position[self.order] = np.arange(len(self.order))
        # (n_classes + 1,), where each class begins in `order`
        self.starts = np.searchsorted(labels[self.order], np.arange(self.n_classes + 1))
        # (n_texts,), class of each text, the first of several; -1 for none
        self.of_text = np.full(len(examples.texts), -1, dtype=np.int64)
        self.of_text[examples.columns[::-1, 0]] = labels[::-1]


class TaskSampler:
    """One task, tokenised in a table and ready to draw from: from some `rows`, or all."""

    def __init__(
        self, examples: Examples, table: TextTable, rows: np.ndarray | None = None
    ) -> None:
        # Row of the table of each text as a query and as a document, (n_texts,); -1 for none.
        query, document = examples.query_prefix, examples.document_prefix
        # Texts of a class are all queries: that is how `transform` embeds them.
        if examples.labels is not None or query == document:
            self.queries = self.documents = table.add(examples.texts, query)
        else:
            self.queries = _add_side(table, examples, examples.columns[:, :1], query)
            self.documents = _add_side(table, examples, examples.columns[:, 1:], document)
        examples = examples if rows is None else examples.take(rows)
        self.mined: np.ndarray | None = None  # (n, k), text indices of negatives; -1 for none
        self.classes: ClassIndex | None = None
        if examples.labels is not None:
            # Each text once a class: no text is its own positive.
            pairs = np.stack([examples.columns[:, 0], examples.labels], axis=1)
            examples = examples.take(np.sort(np.unique(pairs, axis=0, return_index=True)[1]))
            self.classes = ClassIndex(examples)
        self.examples = examples
        self._known = examples.known_positives()

    def draw_epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return examples of one epoch in any order, and the number of each one's repetition."""
        n = len(self.examples.columns)
        repeats = np.ones(n, dtype=np.int64)
        if self.classes is not None:
            sizes = np.diff(self.classes.starts)[self.classes.labels]
            repeats = np.minimum(sizes - 1, POSITIVES_PER_EPOCH)
        rows = np.repeat(np.arange(n), repeats)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        numbers += rng.integers(0, 1 << 20, size=n)[rows]  # other positives in each epoch
        # At least two: a light task never vanishes, and always has something to compare.
        n_drawn = max(min(2, len(rows)), round(self.examples.weight * len(rows)))
        n_copies, n_rest = divmod(n_drawn, len(rows))
        rest = rng.permutation(len(rows))[:n_rest]
        drawn = np.concatenate([np.tile(np.arange(len(rows)), n_copies), rest])
        copy = np.arange(n_drawn) // len(rows)  # goes on where the copy before it ended
        return rows[drawn], numbers[drawn] + copy * repeats[rows[drawn]]

    def draw(
        self, rows: np.ndarray, numbers: np.ndarray, n_negatives: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return text indices of anchors (b,), positives (b,) and negatives (b, k; -1 for none).

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
            if self.examples.in_batch_negatives and not (given >= 0).any():
                given = self._draw_missing(rows, rng)
            return columns[rows, 0], columns[rows, 1], given
        positive, negatives = self._draw_classes(self.classes, rows, numbers, n_negatives, rng)
        return columns[rows, 0], columns[positive, 0], negatives

    def _draw_missing(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a negative text of each example (b, 1), or none (b, 0) where the batch has some.

        With few distinct positives, those of a batch may be known positives of all its anchors.
        """
        anchors, in_batch = self.examples.columns[rows, 0], self.examples.columns[rows, 1]
        distinct = np.unique(in_batch)
        position, known = self.known_of(anchors)
        n_known = np.bincount(position[np.isin(known, distinct)], minlength=len(rows))
        if (n_known + np.isin(anchors, distinct) < len(distinct)).any():
            return np.empty((len(rows), 0), dtype=np.int64)
        candidates = np.unique(self.examples.columns[:, 1])
        starts, forbidden = self.forbidden_candidates(candidates)
        negatives = np.full((len(rows), 1), -1)
        for i, row in enumerate(rows.tolist()):
            others = np.delete(candidates, forbidden[starts[row] : starts[row + 1]])
            if len(others):
                negatives[i] = rng.choice(others)
        return negatives

    def _draw_classes(
        self,
        classes: ClassIndex,
        rows: np.ndarray,
        numbers: np.ndarray,
        n_negatives: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positive examples (b,) and negative texts (b, k) of labelled examples."""
        order, starts = classes.order, classes.starts
        labels = classes.labels[rows]
        first, size = starts[labels], starts[labels + 1] - starts[labels]
        # One further in the circle of the class at each repetition, from a start that differs by
        # example: never the example itself, and no positive twice before all were met.
        step = 1 + (rows * 2_654_435_761 + numbers) % (size - 1)
        positive = order[first + (classes.position[rows] - first + step) % size]
        if self.mined is not None:
            return positive, self.mined[rows][:, :n_negatives]
        if self.examples.in_batch_negatives:
            if len(np.unique(labels)) > 1:  # the batch itself holds examples of other classes
                return positive, np.empty((len(rows), 0), dtype=np.int64)
            n_negatives = max(1, n_negatives)
        others = len(order) - size
        drawn = rng.integers(0, others[:, None], size=(len(rows), n_negatives))
        drawn += (drawn >= first[:, None]) * size[:, None]
        return positive, self.examples.columns[order[drawn], 0]

    def draw_scored(
        self, rows: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return both texts of pairs as rows of the table, and the scores, all (b,).

        Adds a pair if all their scores are equal.
        """
        scores = np.asarray(self.examples.scores)
        if np.ptp(scores[rows]) == 0:
            other = np.flatnonzero(scores != scores[rows[0]])
            rows = np.append(rows, rng.permutation(other)[:1])
        left, right = self.examples.columns[rows].T
        return self.queries[left], self.documents[right], scores[rows]

    def forbidden_candidates(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each example the candidates (sorted texts) no miner may return, as CSR arrays.

        These are the anchor itself, its positive and all known positives of its text.
        """
        columns = self.examples.columns
        row, known = self.known_of(columns[:, 0])
        every = np.arange(len(columns))
        row = np.concatenate([row, every, every])
        known = np.concatenate([known, columns[:, 0], columns[:, 1]])
        index = np.searchsorted(candidates, known)
        is_candidate = candidates[np.minimum(index, len(candidates) - 1)] == known
        pairs = np.stack([row[is_candidate], index[is_candidate]], axis=1)
        pairs = np.unique(pairs, axis=0)
        starts = np.searchsorted(pairs[:, 0], np.arange(len(columns) + 1))
        return starts, pairs[:, 1]

    def known_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return known positives of texts: position in `texts`, and index of the positive."""
        starts, known = self._known
        counts = starts[texts + 1] - starts[texts]
        position = np.repeat(np.arange(len(texts)), counts)
        inside = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        return position, known[np.repeat(starts[texts], counts) + inside]


def _add_side(table: TextTable, examples: Examples, columns: np.ndarray, prefix: str) -> np.ndarray:
    """Return rows of the table of the texts in some columns, (n_texts,); -1 for all others."""
    used = np.unique(columns)
    rows = np.full(len(examples.texts), -1, dtype=np.int64)
    rows[used] = table.add([examples.texts[i] for i in used.tolist()], prefix)
    return rows


@dataclass(frozen=True)
class Batch:
    """One optimiser step; all but `texts` are indices into these."""

    texts: np.ndarray  # (m,), rows of the `TextTable`, each once
    anchors: np.ndarray  # (b,), of all InfoNCE examples
    candidates: np.ndarray  # (c,)
    positive: np.ndarray  # (b,), each anchor's positive among the candidates
    allowed: np.ndarray  # bool (b, c): the positive and what counts as a negative
    # CoSENT examples, task by task: both texts of each pair, and its score.
    graded: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    n_examples: int


class TextTable:
    """Token ids of all texts of all tasks, each (prefix, text) once."""

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
        """Return rows of texts behind a prefix, (n,); tokenise new ones."""
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
        """Turn the lists that batches read into arrays; no text can be added afterwards."""
        self.lengths = np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))
        self.pool_start_of = np.array(self.pool_starts, dtype=np.int64)
        self.string_of = np.array(self.string_ids, dtype=np.int64)
        del self._rows, self._strings, self.pool_starts, self.string_ids

    def cut(self, texts: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """Return positions in `texts` in chunks of one prefix, similar length and a budget."""
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
        """Return rows, of one prefix, as the model takes them."""
        ids = [self.ids[row] for row in texts]
        return pack_texts(ids, int(self.pool_start_of[texts[0]]), on_grid=on_grid)


class BatchPlan:
    """All batches of a training run, over a frozen table."""

    def __init__(
        self,
        tasks: Sequence[TaskSampler],
        table: TextTable,
        trainer: ContrastiveTrainer,
        seed: int,
    ) -> None:
        self.tasks = list(tasks)
        self.table = table
        self.trainer = trainer
        self.seed = seed
        labelled = any(task.classes is not None for task in self.tasks)
        self.groups = _GroupIndex(self.tasks, table) if labelled else None
        self.n_batches = len(self.list_epoch(0))
        self.n_steps = self.n_batches * trainer.epochs
        if trainer.max_steps is not None:
            self.n_steps = min(self.n_steps, trainer.max_steps)

    def list_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch, each (b, 3): task, example, number of its repetition."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        drawn = []
        for number, task in enumerate(self.tasks):
            rows, numbers = task.draw_epoch(rng)
            drawn.append(np.stack([np.full_like(rows, number), rows, numbers], axis=1))
        blend, batch_size = self.trainer.blend_tasks, self.trainer.batch_size
        groups = [np.concatenate(drawn)] if blend else [part for part in drawn if len(part)]
        batches = []
        for group in groups:
            # No example is left alone with nothing to compare it with.
            most = len(group) // min(2, batch_size)
            n = max(1, min(most, round(len(group) / batch_size)))
            batches.extend(np.array_split(rng.permutation(group), n))
        if not blend:
            rng.shuffle(batches)
        return batches

    def starts_epoch(self, step: int) -> bool:
        """Return whether a step, counted from 0, is the first of its epoch."""
        return step % self.n_batches == 0

    def iterate_steps(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield steps from `first` on, each with its batch as `list_epoch` gives it."""
        epoch, batches = -1, []
        for step in range(first, self.n_steps):
            if step // self.n_batches != epoch:
                epoch = step // self.n_batches
                batches = self.list_epoch(epoch)
            yield step, batches[step % self.n_batches]

    def build(self, step: int, batch_rows: np.ndarray) -> Batch:
        """Build the batch of a step."""
        rng = np.random.default_rng((self.seed, 1, step))
        drawn, graded = {}, []
        for number, task in enumerate(self.tasks):
            _, rows, numbers = batch_rows[batch_rows[:, 0] == number].T
            if not len(rows):
                continue
            if task.examples.scores is not None:
                graded.append(task.draw_scored(rows, rng))
            else:
                drawn[number] = task.draw(rows, numbers, self.trainer.n_negatives, rng)
        anchors, candidates, positive, allowed = self._contrast(drawn)
        sides = [side for left, right, _ in graded for side in (left, right)]
        texts = np.unique(np.concatenate([anchors, candidates, *sides]))
        anchors, candidates, *sides = (
            np.searchsorted(texts, rows) for rows in (anchors, candidates, *sides)
        )
        scores = [scores for _, _, scores in graded]
        graded = list(zip(sides[::2], sides[1::2], scores, strict=True))
        return Batch(texts, anchors, candidates, positive, allowed, graded, len(batch_rows))

    def _contrast(
        self, drawn: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return anchors, candidates, positive and allowed of a `Batch`, over rows of the table.

        `drawn` holds what `TaskSampler.draw` gave for each task, by its number.
        """
        parts, n = [[np.empty(0, dtype=np.int64)] * 7], 0
        for number, (anchor, positive, negatives) in drawn.items():
            task = self.tasks[number]
            rows, columns = np.nonzero(negatives >= 0)
            known_rows, known = task.known_of(anchor)
            queries, documents = task.queries[known], task.documents[known]
            parts.append(
                [
                    np.full(len(anchor), number),
                    task.queries[anchor],
                    task.documents[positive],
                    task.documents[negatives[rows, columns]],
                    n + rows,
                    np.where(documents < 0, queries, documents),
                    n + known_rows,
                ]
            )
            n += len(anchor)
        tasks, anchors, positives, negatives, rows, known, known_rows = map(
            np.concatenate, zip(*parts, strict=True)
        )
        candidates, index = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
        in_batch = np.array([task.examples.in_batch_negatives for task in self.tasks])
        allowed = np.repeat(in_batch[tasks, None], len(candidates), axis=1)
        allowed[rows, index[n:]] = True
        # False negatives: the anchor's text, its known positives or its classes; the texts equal
        # to its positive are among these.
        strings, anchor_strings = self.table.string_of[candidates], self.table.string_of[anchors]
        allowed &= strings[None] != anchor_strings[:, None]
        order = np.argsort(strings)
        i, j = _match(self.table.string_of[known], strings[order])
        allowed[known_rows[i], order[j]] = False
        if self.groups is not None:
            self.groups.forbid(allowed, anchor_strings, tasks, strings)
        allowed[np.arange(n), index[:n]] = True
        return anchors, candidates, index[:n], allowed


class _GroupIndex:
    """Classes of each labelled text, sorted by text; classes counted over all tasks."""

    def __init__(self, tasks: Sequence[TaskSampler], table: TextTable) -> None:
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
        """Clear in `allowed` (b, c) the texts that share a class of the anchor's task with it."""
        i, at = _match(anchors, self.strings)
        groups, task = self.groups[at], tasks[i]
        of_task = (groups >= self.first[task]) & (groups < self.first[task + 1])
        i, groups = i[of_task], groups[of_task]
        j, at = _match(candidates, self.strings)
        for group in np.unique(groups):
            allowed[np.ix_(i[groups == group], j[self.groups[at] == group])] = False


def _match(values: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all (i, j) with values[i] == ordered[j], by i."""
    first = np.searchsorted(ordered, values, side="left")
    counts = np.searchsorted(ordered, values, side="right") - first
    i = np.repeat(np.arange(len(values)), counts)
    return i, first[i] + np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
