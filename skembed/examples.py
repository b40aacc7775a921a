"""Training examples: what `fit` takes, read into arrays, with every error about them told early.

Three kinds of examples, told apart by the number of columns and by `y`:

======== ================================================ ==================================
kind     examples                                         y
======== ================================================ ==================================
labels   single texts                                     a class label for each
rows     (anchor, positive) or (anchor, positive,         None
         negative, ...)
scores   pairs                                            a number for each: graded similarity
======== ================================================ ==================================

Nothing here loads a model. Time and memory are linear in the number of examples: texts of one
class never become pairs. Labels may be named in an error; texts never are.
"""

import hashlib
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from skembed._inputs import (
    MISSING_POLICIES,
    _clean_column,
    _extract_columns,
    _is_instance_of,
    _is_missing,
)
from skembed._validation import (
    _describe_type,
    _describe_value,
    check_bool,
    check_choice,
    check_int,
    check_real,
    check_string,
)
from skembed.instructions import build_prefix
from skembed.trainer import ContrastiveTrainer

__all__ = ["Examples", "TrainingTask", "check_examples", "read_task", "split_validation"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


# eq=False: arrays and frames have no single truth value to compare by.
@dataclass(frozen=True, eq=False, repr=False)
class TrainingTask:
    """One of several sets of examples that a model is trained on together.

    Holds what it is given; `fit` checks it before any model is loaded, and names a bad
    task by its position.

    Parameters
    ----------
    examples : list, tuple, ndarray, Series or DataFrame of str
        Texts (with class labels `y`), pairs or rows (anchor, positive, negative, ...), or
        pairs with graded scores `y`.
    y : list, tuple, ndarray or Series, optional
        Class labels (str, int, bool) for texts, numbers for pairs; None for rows.
    instruction : str, optional
        Task text, or name of a known task, for single texts and for anchors (the first column
        of rows and pairs). None: no instruction.
    document_instruction : str, optional
        The same for all other columns. None: no instruction.
    in_batch_negatives : bool, optional
        Use the other examples of a batch as negatives. None takes the trainer's setting.
    weight : float, default=1.0
        How often the task's examples are drawn, relative to their number: 2 draws each
        twice in an epoch.
    name : str, optional
        Name to tell the task by, in errors too.

    Examples
    --------
    >>> from skembed.examples import TrainingTask
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
    """Training examples as arrays over a list of distinct texts.

    Parameters
    ----------
    kind : {"labels", "rows", "scores"}
        What the examples are; see the table at the head of the module.
    texts : list of str
        Distinct texts in the order first seen, row by row; lone surrogates replaced.
    columns : ndarray of int64, shape (n, k)
        Indices into `texts`. Labels: k = 1; rows: anchor, positive, negatives, k >= 2;
        scores: k = 2.
    labels : ndarray of int64, shape (n,), or None
        Index into `classes` of each example.
    scores : ndarray of float64, shape (n,), or None
        Graded similarity of each pair; higher is more similar.
    classes : ndarray or None
        The distinct labels as given, sorted; str as objects.
    query_prefix, document_prefix : str
        What stands in front of single texts and anchors, and of all other texts.
    loss : {"infonce", "cosent"}
        What they are trained with.
    in_batch_negatives : bool
        Whether the other candidates of a batch are negatives.
    weight : float
        Draws in one epoch, relative to the number of examples.
    """

    kind: Literal["labels", "rows", "scores"]
    texts: list[str]
    columns: _Ints
    labels: _Ints | None = None
    scores: _Floats | None = None
    classes: npt.NDArray[Any] | None = None
    query_prefix: str = ""
    document_prefix: str = ""
    loss: Literal["infonce", "cosent"] = "infonce"
    in_batch_negatives: bool = True
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.columns)

    def __repr__(self) -> str:
        n_columns = self.columns.shape[1]
        return f"Examples({self.kind}, n={len(self)}, k={n_columns}, n_texts={len(self.texts)})"

    def take(self, rows: _Ints) -> "Examples":
        """Return some of the examples, `rows` in this order, over the same list of texts."""
        return replace(
            self,
            columns=self.columns[rows],
            labels=None if self.labels is None else self.labels[rows],
            scores=None if self.scores is None else self.scores[rows],
        )

    def fingerprint(self) -> str:
        """Return 32 hex digits that depend on all that training sees of the examples.

        Returns
        -------
        str
            BLAKE2b digest: equal for equal data on any machine, whatever the container.
        """
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

    def known_positives(self) -> tuple[_Ints, _Ints]:
        """Return for each text the texts that some row calls its positive, or it theirs.

        Returns
        -------
        starts : ndarray of int64, shape (n_texts + 1,)
            The positives of text t are ``found[starts[t]:starts[t + 1]]``.
        found : ndarray of int64
            Indices into `texts`, sorted and without duplicates within each text. Empty
            for labels and scores.
        """
        n_texts = len(self.texts)
        if self.kind != "rows":
            return np.zeros(n_texts + 1, dtype=np.int64), np.empty(0, dtype=np.int64)
        anchors, positives = self.columns[:, 0], self.columns[:, 1]
        # Both directions as single numbers, so that one sort orders and thins them.
        codes = np.concatenate([anchors * n_texts + positives, positives * n_texts + anchors])
        sources, found = np.divmod(np.unique(codes), n_texts)
        return np.searchsorted(sources, np.arange(n_texts + 1)).astype(np.int64), found

    def _label_pairs(self) -> tuple[_Ints, _Ints]:
        """Distinct (text, label) as two arrays, sorted by text; empty without labels."""
        if self.labels is None or not len(self):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        n_classes = int(self.labels.max()) + 1
        texts, labels = np.divmod(
            np.unique(self.columns[:, 0] * n_classes + self.labels), n_classes
        )
        return texts, labels


def check_examples(
    X: Any, y: Any = None, *, owner: str = "NVEmbedVectorizer", missing: str = "error"
) -> Examples:
    """Read training examples, or say what is wrong with them.

    Parameters
    ----------
    X : list, tuple, ndarray, Series or DataFrame of str
        Single texts, as for `transform`; or rows of two texts and more: a sequence of
        tuples or lists of equal length, an ndarray of shape (n, k), or a frame of k
        columns. Columns are anchor, positive, then negatives.
    y : list, tuple, ndarray or Series, optional
        For single texts, class labels: all str, or all bool or whole numbers. For pairs,
        graded similarity: finite numbers, or bools. Else None.
    owner : str, default="NVEmbedVectorizer"
        Name of the estimator or function to name in errors.
    missing : {"error", "empty", "zero", "nan"}, default="error"
        The estimator's policy for missing texts. It is about what `transform` returns;
        a missing or blank text among training examples is refused under each.

    Returns
    -------
    examples : Examples
        The examples, in input order.

    Raises
    ------
    TypeError
        If `X` is no container of texts or holds other items; if `y` is no container, or
        holds anything but labels (single texts) or numbers (pairs).
    ValueError
        If there are fewer than two examples; if a text is missing or blank; if rows
        differ in length, or a positive or negative equals the row's anchor, or a negative
        the positive; if `y` is needed but None, or given with rows of three and more; if
        it has the wrong length or missing entries; if labels are fractions, or of one
        class only, or a class has fewer than two different texts; if scores are infinite
        or all equal.

    Examples
    --------
    >>> from skembed.examples import check_examples
    >>> examples = check_examples([("a cat", "a feline", "a cap"), ("a dog", "a hound", "a log")])
    >>> examples
    Examples(rows, n=2, k=3, n_texts=6)
    >>> examples.columns.tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return _read_examples(X, y, owner=owner, name="X", missing=missing)


def read_task(
    task: Any,
    trainer: ContrastiveTrainer,
    *,
    template: str,
    owner: str,
    index: int | None = None,
    missing: str = "error",
) -> Examples:
    """Check a task and read its examples, before a model is loaded.

    Parameters
    ----------
    task : TrainingTask
        The task.
    trainer : ContrastiveTrainer
        Checked parameters of the training.
    template : str
        The template of the instructions.
    owner : str
        Name of the estimator that was given the task.
    index : int, optional
        Position of the task, to name in errors; None where `owner` was given the examples
        themselves, as `X` and `y`.
    missing : {"error", "empty", "zero", "nan"}, default="error"
        As in `check_examples`.

    Returns
    -------
    examples : Examples
        The task's examples, with their prefixes, loss and weight.

    Raises
    ------
    TypeError
        If `task` is no `TrainingTask`, if a field of it is of the wrong type, or as
        `check_examples`.
    ValueError
        If the weight is not positive and finite, if the name is empty, if the trainer cannot
        train on such examples, or as `check_examples`.
    """
    place = owner if index is None else f"tasks[{index}]"
    if not isinstance(task, TrainingTask):
        raise TypeError(
            f"The `tasks` parameter of `{owner}` must hold instances of `TrainingTask`; {place} is "
            f"{_describe_type(task)}. Wrap it: TrainingTask(examples, y)."
        )
    name = check_string(task.name, name="name", owner=place, allow_none=True)
    place = place if name is None else f"{place} ({name})"
    weight = check_real(task.weight, name="weight", owner=place, low=0, inclusive="right")
    in_batch = task.in_batch_negatives
    if in_batch is None:
        in_batch = trainer.in_batch_negatives
    check_bool(in_batch, name="in_batch_negatives", owner=place)
    both = task.instruction, task.document_instruction
    query = build_prefix(template, *both, side="query", owner=place)
    document = build_prefix(template, *both, side="document", owner=place)
    name = "X" if index is None else "examples"
    examples = _read_examples(task.examples, task.y, owner=place, name=name, missing=missing)
    examples = replace(
        examples,
        query_prefix=query,
        document_prefix=document,
        in_batch_negatives=bool(in_batch),
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
            f"With `in_batch_negatives=False` every example needs negatives of its own{where}: "
            "pass rows (anchor, positive, negative, ...), `mine_negatives='perc_pos'`, or an "
            "`n_negatives` above 0 for class labels."
        )


def _read_examples(X: Any, y: Any, *, owner: str, name: str, missing: str) -> Examples:
    """Read examples from the parameter `name` of `owner` and its `y`."""
    check_choice(missing, name="missing", owner=owner, allowed=MISSING_POLICIES)
    subject = f"The `{name}` parameter of `{owner}`"
    raw = _extract_rows(X, subject=subject, name=name)
    _clean_texts(raw, subject=subject, name=name, missing=missing)
    n, k = len(raw[0]), len(raw)
    if n < 2:
        raise ValueError(
            f"{subject} must hold at least 2 training examples; got {n}. Add examples."
        )
    targets = _extract_targets(y, n=n, k=k, owner=owner, name=name)
    texts, columns = _index_texts(raw)
    if targets is None:
        _check_rows(columns, subject=subject, name=name)
        return Examples("rows", texts, columns)
    if k == 2:
        scores = _read_scores(targets, owner, name)
        return Examples("scores", texts, columns, scores=scores, loss="cosent")
    labels, classes = _read_labels(targets, owner)
    examples = Examples("labels", texts, columns, labels=labels, classes=classes)
    _check_classes(examples, owner)
    return examples


# ---------------------------------------------------------------- texts


def _extract_rows(X: Any, *, subject: str, name: str) -> list[list[Any]]:
    """Return the columns of any supported container as fresh lists; items unchecked."""
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] > 2:
        parts: list[Any] = [X[:, j] for j in range(X.shape[1])]
    elif _is_instance_of(X, "pandas", "DataFrame") and X.shape[1] > 2:
        parts = [X.iloc[:, j] for j in range(X.shape[1])]
    elif _is_instance_of(X, "polars", "DataFrame") and X.shape[1] > 2:
        parts = [X.to_series(j) for j in range(X.shape[1])]
    else:
        parts = [X]
    columns = [column for part in parts for column in _extract_columns(part, subject=subject)]
    if len(columns) == 1 and columns[0] and isinstance(columns[0][0], (list, tuple)):
        return _transpose(columns[0], subject=subject, name=name)
    return columns


def _transpose(rows: list[Any], *, subject: str, name: str) -> list[list[Any]]:
    """Turn n rows of k texts into k columns of n."""
    k = len(rows[0])
    if k < 2:
        raise ValueError(
            f"{subject} must hold texts, pairs, or rows of anchor, positive and negatives; "
            f"{name}[0] is {_describe_type(rows[0])} of {k}. Pass single texts as a flat list."
        )
    for position, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise TypeError(
                f"{subject} must hold either texts or rows of texts; {name}[0] is "
                f"{_describe_type(rows[0])}, but {name}[{position}] is {_describe_type(row)}. "
                "Make every item a row, or none."
            )
        if len(row) != k:
            raise ValueError(
                f"{subject} must hold rows of equal length; {name}[0] has {k} texts, but "
                f"{name}[{position}] has {len(row)}. Give each row as many negatives, or train on "
                "rows of different lengths as different tasks."
            )
    return [list(column) for column in zip(*rows, strict=True)]


def _clean_texts(raw: list[list[Any]], *, subject: str, name: str, missing: str) -> None:
    """Make every item a clean str, in place; refuse missing and blank ones."""
    if len(raw) > 1 and raw[-1] and isinstance(raw[-1][0], (numbers.Number, np.bool_)):
        if not _is_missing(raw[-1][0]):
            raise TypeError(
                f"{subject} must hold texts (str); {name}[0][{len(raw) - 1}] is "
                f"{_describe_type(raw[-1][0])}. Pass labels or scores as `y`."
            )
    suffixes = [""] if len(raw) == 1 else [f"[{j}]" for j in range(len(raw))]
    blank = np.zeros((len(raw[0]), len(raw)), dtype=np.bool_)  # (n, k)
    for j, (column, suffix) in enumerate(zip(raw, suffixes, strict=True)):
        _clean_column(column, subject=subject, name=name, suffix=suffix)  # missing turn into ""
        blank[:, j] = np.fromiter((not text.strip() for text in column), np.bool_, len(column))
    if blank.any():
        row, j = divmod(int(blank.argmax()), blank.shape[1])
        step = "Fill them, or drop their rows"
        step += "." if missing == "error" else f"; missing={missing!r} is for `transform` only."
        raise ValueError(
            f"{subject} must hold no missing or blank texts to train on; got {int(blank.sum())}, "
            f"the first at {name}[{row}]{suffixes[j]}. {step}"
        )


def _index_texts(raw: Sequence[list[str]]) -> tuple[list[str], _Ints]:
    """Return the distinct texts, first seen first, and the columns (n, k) as indices."""
    index: dict[str, int] = {}
    rows = zip(*raw, strict=True)
    places = (index.setdefault(text, len(index)) for text in chain.from_iterable(rows))
    columns = np.fromiter(places, dtype=np.int64, count=len(raw) * len(raw[0]))
    return list(index), columns.reshape(-1, len(raw))


def _check_rows(columns: _Ints, *, subject: str, name: str) -> None:
    """Refuse rows (n, k) whose positive equals the anchor, or a negative either of them."""
    same = columns[:, 0] == columns[:, 1]  # (n,)
    if same.any():
        count = int(same.sum())
        where = "every row" if same.all() else "1 row" if count == 1 else f"{count} rows"
        raise ValueError(
            f"{subject} must hold positives that differ from their anchors; they are equal in "
            f"{where}, the first {name}[{int(same.argmax())}]. Drop such rows: there is nothing to "
            "learn from a text and itself."
        )
    for other, role in enumerate(("anchor", "positive")):
        wrong = columns[:, 2:] == columns[:, other, None]  # (n, k - 2)
        if wrong.any():
            row, negative = divmod(int(wrong.argmax()), wrong.shape[1])
            raise ValueError(
                f"{subject} must hold negatives that differ from the row's anchor and positive; "
                f"{name}[{row}][{negative + 2}] equals the {role} of its row, the first of "
                f"{int(wrong.sum())}. Replace these negatives, or drop the rows."
            )


# ---------------------------------------------------------------- y


def _extract_targets(y: Any, *, n: int, k: int, owner: str, name: str) -> list[Any] | None:
    """Return `y` as a list of n, none missing; None where k columns need none."""
    subject = f"The `y` parameter of `{owner}`"
    if y is None and k == 1:
        raise ValueError(
            f"{subject} must hold a class label for each text, to train on single texts; got None. "
            f"Pass `y`, or pairs or rows (anchor, positive, negative, ...) as `{name}`."
        )
    if y is None:
        return None
    if k > 2:
        raise ValueError(
            f"{subject} must be None for rows of anchor, positive and negatives; "
            f"got {_describe_type(y)}, and rows of {k} texts. Labels go with single texts, scores "
            "with pairs."
        )
    targets = _list_targets(y, subject=subject)
    if len(targets) != n:
        raise ValueError(
            f"{subject} must have as many entries as there are examples, {n}; got {len(targets)}. "
            f"Pass one for each item of `{name}`."
        )
    absent = [position for position, item in enumerate(targets) if _is_missing(item)]
    if absent:
        raise ValueError(
            f"{subject} must hold no missing entries (None, NaN); got {len(absent)}, the first at "
            f"y[{absent[0]}]. Fill them, or drop their examples."
        )
    return targets


def _list_targets(y: Any, *, subject: str) -> list[Any]:
    """Return the items of any supported container of targets as a list."""
    if isinstance(y, np.ndarray):
        if y.ndim != 1:
            raise ValueError(
                f"{subject} must have one dimension; got an array of shape {y.shape}. "
                "Pass one label or score for each example."
            )
        # As a list, dates would turn into ints, which pass for labels.
        return list(y) if y.dtype.kind in "mM" else y.tolist()
    if _is_instance_of(y, "pandas", "Series") or _is_instance_of(y, "pandas", "Index"):
        return list(y.tolist())
    if _is_instance_of(y, "polars", "Series"):
        return list(y.to_list())
    if isinstance(y, Sequence) and not isinstance(y, (str, bytes, bytearray, memoryview)):
        return list(y)
    raise TypeError(
        f"{subject} must be a list, array or column of labels or scores; "
        f"got {_describe_type(y)}. Make it a list: one entry for each example."
    )


def _read_scores(targets: list[Any], owner: str, name: str) -> _Floats:
    """Return the graded similarities as float64 (n,): finite, and not all equal."""
    subject = f"The `y` parameter of `{owner}`"
    for position, item in enumerate(targets):
        if not isinstance(item, (numbers.Real, np.bool_)):
            raise TypeError(
                f"{subject} must hold numbers (graded similarity) where `{name}` holds pairs; "
                f"y[{position}] is {_describe_type(item)}. Class labels go with single texts."
            )
    scores = np.fromiter(map(_to_float, targets), dtype=np.float64, count=len(targets))
    finite = np.isfinite(scores)
    if not finite.all():
        raise ValueError(
            f"{subject} must hold finite scores; got {int((~finite).sum())} that are not, the "
            f"first at y[{int(finite.argmin())}]. Drop or clip them."
        )
    if (scores == scores[0]).all():
        raise ValueError(
            f"{subject} must hold scores that differ, so that there is something to rank; all "
            f"{len(scores)} are {scores[0]:g}. Leave out `y` to train on pairs as positives."
        )
    return scores


def _to_float(value: Any) -> float:
    """Return a real number as a float, one beyond its range as an infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _read_labels(targets: list[Any], owner: str) -> tuple[_Ints, npt.NDArray[Any]]:
    """Return the index of each label (n,) and the distinct labels, sorted."""
    if set(map(type, targets)) not in ({str}, {int}, {bool}):
        targets = list(_iterate_labels(targets, owner))
    distinct = sorted(set(targets))
    index = {label: place for place, label in enumerate(distinct)}
    labels = np.fromiter(map(index.__getitem__, targets), dtype=np.int64, count=len(targets))
    # As objects: numpy's own str pads all labels to the longest and drops closing NULs.
    classes = np.array(distinct, dtype=object if isinstance(distinct[0], str) else None)
    return labels, classes


def _iterate_labels(targets: list[Any], owner: str) -> Iterator[str | bool | int | float]:
    """Yield each label as a built-in value; refuse what is no label, and a mixture."""
    subject = f"The `y` parameter of `{owner}`"
    is_text = isinstance(targets[0], str)
    for position, item in enumerate(targets):
        if not isinstance(item, (str, numbers.Real, np.bool_)):
            raise TypeError(
                f"{subject} must hold class labels (str, int or bool) for single texts; "
                f"y[{position}] is {_describe_type(item)}. Convert the labels to str."
            )
        if isinstance(item, str) != is_text:
            raise TypeError(
                f"{subject} must hold labels of one type; y[0] is {_describe_type(targets[0])}, "
                f"but y[{position}] is {_describe_type(item)}. Convert the labels to str."
            )
        if isinstance(item, str):
            yield str.__str__(item)
        elif isinstance(item, np.bool_):
            yield bool(item)
        elif isinstance(item, numbers.Integral):
            yield item if isinstance(item, bool) else int(item)
        elif (number := _to_float(item)).is_integer():
            yield number
        else:
            raise ValueError(
                f"{subject} must hold class labels for single texts, and numbers among them must "
                f"be whole; y[{position}] is {number:g}. Graded scores go with pairs of texts."
            )


def _check_classes(examples: Examples, owner: str) -> None:
    """Refuse a single class, and classes in which a text has no other as its positive."""
    subject = f"The `y` parameter of `{owner}`"
    if examples.labels is None or examples.classes is None:
        return
    if len(examples.classes) < 2:
        raise ValueError(
            f"{subject} must hold at least 2 classes, so that there is something to tell apart; "
            f"got 1, {_describe_value(examples.classes[0])}. Add examples of other classes."
        )
    sizes = np.bincount(examples._label_pairs()[1])  # (n_classes,)
    lonely = np.flatnonzero(sizes < 2)
    if len(lonely):
        position = int((examples.labels == lonely[0]).argmax())
        raise ValueError(
            f"{subject} must give each class at least 2 different texts, so that each has a "
            f"positive; got {len(lonely)} of {len(sizes)} classes with a single one, such as "
            f"{_describe_value(examples.classes[lonely[0]])} (y[{position}]). Add examples, or "
            "drop or merge these classes."
        )


# ---------------------------------------------------------------- validation part


def split_validation(
    examples: Examples, fraction: float, random_state: int | None
) -> tuple[_Ints, _Ints]:
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


def _draw_anchors(examples: Examples, share: float, rng: np.random.Generator) -> _Ints:
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


def _draw_labelled(examples: Examples, share: float, rng: np.random.Generator) -> _Ints:
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
