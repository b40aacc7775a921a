"""Training examples, checked before any model is loaded.

Three kinds of examples, told apart by the number of columns and by `y`:

======== ================================================ ==================================
kind     examples                                         y
======== ================================================ ==================================
labels   single texts                                     a class label for each
rows     tuples (anchor, positive) or (anchor, positive,  None
         negative, ...)
scores   tuples of two texts                              a float for each: graded similarity
======== ================================================ ==================================

Nothing here loads a model. Time and memory are linear in the number of examples: texts of one
class never become pairs. An error may quote a label, never a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from skembed._inputs import MISSING_POLICIES
from skembed._validation import (
    check_bool,
    check_choice,
    check_real,
    check_string,
    describe_type,
    describe_value,
)
from skembed.instructions import build_prefix, format_instruction
from skembed.similarity import Floats, Ints
from skembed.training.example_input import (
    check_rows,
    clean_texts,
    extract_rows,
    extract_targets,
    index_labels,
    index_texts,
    read_scores,
)
from skembed.training.trainer import ContrastiveTrainer

__all__ = ["Examples", "TrainingTask", "check_examples", "find_comparable", "read_task"]


# eq=False: arrays and frames have no single truth value to compare by.
@dataclass(frozen=True, eq=False, repr=False)
class TrainingTask:
    """One of several sets of examples that a model is trained on together.

    Holds what it is given; `fit` checks it before any model is loaded, and names a bad
    task by its position.

    Parameters
    ----------
    examples : list, tuple, ndarray or Series of str, or list of tuple of str
        Texts (with class labels `y`); tuples: pairs or rows (anchor, positive, negative, ...), or
        pairs with graded scores `y`. Not a table of several columns, which are features.
    y : list, tuple, ndarray or Series, optional
        Class labels (str, int, bool) for texts, floats for pairs; None for rows.
    instruction : str, optional
        Task text, or name of a known task, for single texts and for anchors (the first column
        of rows and pairs). None: no instruction.
    document_instruction : str, optional
        The same for all other columns. None: no instruction.
    in_batch_negatives : bool, optional
        Use the other examples of a batch as negatives. None takes the trainer's setting.
    weight : float, default=1.0
        Draws of the task's examples, relative to their number: 2 draws each twice in an epoch.
    name : str, optional
        Name to tell the task by, in errors too.

    Examples
    --------
    >>> from skembed import TrainingTask
    >>> TrainingTask([("a cat", "a feline"), ("a dog", "a hound")], name="synonyms", weight=2)
    TrainingTask(name='synonyms', weight=2)
    """

    examples: Any
    y: Any = None
    _: KW_ONLY
    instruction: str | None = None
    document_instruction: str | None = None
    in_batch_negatives: bool | None = None
    weight: float = 1.0
    name: str | None = None

    def __repr__(self) -> str:
        return f"TrainingTask(name={self.name!r}, weight={self.weight!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Training examples as arrays over a list of distinct texts."""

    kind: Literal["labels", "rows", "scores"]  # see the table at the head of the module
    texts: list[str]  # distinct, in the order first seen, row by row; lone surrogates replaced
    columns: Ints  # (n, k), indices into `texts`
    labels: Ints | None = None  # (n,), index into `classes` of each example
    scores: Floats | None = None  # (n,), graded similarity of each pair
    classes: npt.NDArray[Any] | None = None  # the distinct labels as given, sorted; str as objects
    query_prefix: str = ""  # in front of single texts and anchors
    document_prefix: str = ""  # in front of all other texts
    loss: Literal["infonce", "cosent"] = "infonce"
    in_batch_negatives: bool = True
    weight: float = 1.0  # draws in one epoch, relative to the number of examples

    def __len__(self) -> int:
        return len(self.columns)

    def __repr__(self) -> str:
        n_columns = self.columns.shape[1]
        return f"Examples({self.kind}, n={len(self)}, k={n_columns}, n_texts={len(self.texts)})"

    def take(self, rows: Ints) -> Examples:
        """Return some of the examples, `rows` in this order, over the same list of texts."""
        return replace(
            self,
            columns=self.columns[rows],
            labels=None if self.labels is None else self.labels[rows],
            scores=None if self.scores is None else self.scores[rows],
        )

    def complete_prefixes(self, template: str, own: Mapping[str, str] | None) -> Examples:
        """Return these examples with prefixes in full, where they are bare task texts now.

        `own` are those of a vectorizer, by side, to take instead.
        """
        if own is None:
            texts = self.query_prefix, self.document_prefix
            query, document = (format_instruction(template, text) for text in texts)
        else:
            query, document = own["text" if self.kind == "labels" else "query"], own["document"]
        return replace(self, query_prefix=query, document_prefix=document)

    def fingerprint(self) -> str:
        """Return 32 hex digits of all that training sees: the same on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        use = (self.loss, self.in_batch_negatives, self.weight)
        digest.update(repr(use).encode())
        for text in (self.query_prefix, self.document_prefix, *self.texts):
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little"))  # so that no two lists run together
            digest.update(data)
        digest.update(np.array(self.columns.shape, dtype="<i8").tobytes())
        digest.update(self.columns.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        if self.scores is not None:
            digest.update((self.scores + 0.0).astype("<f8").tobytes())  # -0.0 equals 0.0
        return digest.hexdigest()

    def known_positives(self) -> tuple[Ints, Ints]:
        """Return starts (n_texts + 1,) and positives of each text, in both directions of a row.

        Those of text t are ``positives[starts[t]:starts[t + 1]]``, sorted; none for labels and
        scores.
        """
        n_texts = len(self.texts)
        if self.kind != "rows":
            return np.zeros(n_texts + 1, dtype=np.int64), np.empty(0, dtype=np.int64)
        anchors, positives = self.columns[:, 0], self.columns[:, 1]
        # Both directions as single numbers, so that one sort orders and thins them.
        codes = np.concatenate([anchors * n_texts + positives, positives * n_texts + anchors])
        sources, targets = np.divmod(np.unique(codes), n_texts)
        return np.searchsorted(sources, np.arange(n_texts + 1)).astype(np.int64), targets

    def label_pairs(self) -> tuple[Ints, Ints]:
        """Return distinct (text, label) as two arrays, sorted by text; empty without labels."""
        if self.labels is None or not len(self):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        n_classes = int(self.labels.max()) + 1
        texts, labels = np.divmod(
            np.unique(self.columns[:, 0] * n_classes + self.labels), n_classes
        )
        return texts, labels


def find_comparable(examples: Examples) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows whose anchor has a negative among all positives of the task, (n,).

    A text is no negative of an anchor that it belongs to in any row, nor of itself.
    """
    anchors, texts = examples.columns[:, 0], np.unique(examples.columns[:, 1])
    starts, known = examples.known_positives()
    is_candidate = np.append(0, np.cumsum(np.isin(known, texts)))
    n_own = is_candidate[starts[anchors + 1]] - is_candidate[starts[anchors]]
    return np.asarray(n_own + np.isin(anchors, texts) < len(texts))


def check_examples(
    X: Any,
    y: Any = None,
    *,
    owner: str = "NVEmbedVectorizer",
    name: str = "X",
    missing: str = "error",
    allow_columns: bool = True,
) -> Examples:
    """Read training examples from the parameter `name` of `owner` and its `y`.

    Pairs and rows are a list of tuples, or with `allow_columns` the columns of a table. Raises
    TypeError and ValueError for whatever cannot be trained on. `missing` is the estimator's policy
    for `transform`: each of them refuses missing or blank training texts.
    """
    check_choice(missing, name="missing", owner=owner, allowed=MISSING_POLICIES)
    subject = f"The `{name}` parameter of `{owner}`"
    raw = extract_rows(X, subject=subject, name=name, allow_columns=allow_columns)
    clean_texts(raw, subject=subject, name=name, missing=missing)
    n, k = len(raw[0]), len(raw)
    if n < 2:
        raise ValueError(
            f"{subject} must hold at least 2 training examples; got {n}. Add examples."
        )
    targets = extract_targets(y, n=n, k=k, owner=owner, name=name)
    texts, columns = index_texts(raw)
    if targets is None:
        check_rows(columns, subject=subject, name=name)
        return Examples("rows", texts, columns)
    if k == 2:
        scores = read_scores(targets, owner, name)
        return Examples("scores", texts, columns, scores=scores, loss="cosent")
    labels, classes = index_labels(targets, owner)
    examples = Examples("labels", texts, columns, labels=labels, classes=classes)
    _check_classes(labels, classes, np.bincount(examples.label_pairs()[1]), owner)
    return examples


def _check_classes(labels: Ints, classes: npt.NDArray[Any], sizes: Ints, owner: str) -> None:
    """Refuse a single class, and classes of one text only; `sizes` counts their texts."""
    subject = f"The `y` parameter of `{owner}`"
    if len(classes) < 2:
        raise ValueError(
            f"{subject} must hold at least 2 classes, so that there is something to tell apart; "
            f"got 1, {describe_value(classes[0])}. Add examples of other classes."
        )
    lonely = np.flatnonzero(sizes < 2)
    if len(lonely):
        position = int((labels == lonely[0]).argmax())
        raise ValueError(
            f"{subject} must give each class at least 2 different texts, so that each has a "
            f"positive; got {len(lonely)} of {len(sizes)} classes with a single one, such as "
            f"{describe_value(classes[lonely[0]])} (y[{position}]). Add examples, or "
            "drop or merge these classes."
        )


def read_task(
    task: Any,
    trainer: ContrastiveTrainer,
    *,
    template: str,
    owner: str,
    index: int | None = None,
    missing: str = "error",
) -> Examples:
    """Check a task and read its examples with prefixes, loss and weight; loads no model.

    `index` is the task's position in `fit_tasks`, None where `owner` was given the examples
    themselves, as `X` and `y`. Raises TypeError and ValueError.
    """
    owner_of_task = owner if index is None else f"tasks[{index}]"
    if not isinstance(task, TrainingTask):
        raise TypeError(
            f"The `tasks` parameter of `{owner}` must hold instances of `TrainingTask`; "
            f"{owner_of_task} is {describe_type(task)}. Wrap it: TrainingTask(examples, y)."
        )
    name = check_string(task.name, name="name", owner=owner_of_task, allow_none=True)
    owner = owner_of_task if name is None else f"{owner_of_task} ({name})"
    weight = check_real(task.weight, name="weight", owner=owner, low=0, inclusive="right")
    in_batch = task.in_batch_negatives
    if in_batch is None:
        in_batch = trainer.in_batch_negatives
    in_batch = check_bool(in_batch, name="in_batch_negatives", owner=owner)
    instructions = task.instruction, task.document_instruction
    query = build_prefix(template, *instructions, side="query", owner=owner)
    document = build_prefix(template, *instructions, side="document", owner=owner)
    name = "X" if index is None else "examples"
    examples = replace(
        check_examples(
            task.examples, task.y, owner=owner, name=name, missing=missing, allow_columns=False
        ),
        query_prefix=query,
        document_prefix=document,
        in_batch_negatives=in_batch,
        weight=weight,
    )
    _check_loss(examples, trainer, "" if index is None else f" (tasks[{index}])")
    return examples


def _check_loss(examples: Examples, trainer: ContrastiveTrainer, where: str) -> None:
    """Refuse examples that the trainer's loss does not take, or that have no negatives."""
    if trainer.loss not in ("auto", examples.loss):
        raise ValueError(
            "The `loss` parameter of `ContrastiveTrainer` must be 'auto' or fit the examples: "
            "'cosent' takes pairs with graded scores, 'infonce' all else; got "
            f"{trainer.loss!r} with {examples.kind}{where}."
        )
    mines, in_batch = trainer.mine_negatives is not None, examples.in_batch_negatives
    if examples.loss == "cosent":
        has_own = False
    elif examples.labels is not None:
        has_own = mines or not in_batch
    else:
        has_own = mines or examples.columns.shape[1] > 2
    has_own = has_own and trainer.n_negatives > 0
    if trainer.batch_size == 1 and not has_own:
        raise ValueError(
            "The `batch_size` parameter of `ContrastiveTrainer` must be above 1 where an example "
            f"has no negatives of its own{where}: alone in a batch it has nothing to be told from; "
            "got 1."
        )
    if examples.loss == "infonce" and not has_own and not in_batch:
        raise ValueError(
            "The `in_batch_negatives` parameter of `ContrastiveTrainer` is False, so every example "
            f"needs negatives of its own{where}: pass rows (anchor, positive, negative, ...), "
            "`mine_negatives='perc_pos'`, or an `n_negatives` above 0 for class labels."
        )
