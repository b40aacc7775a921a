"""A training `fit`: every kind of examples, several tasks, mined negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from training_examples import (
    DIM,
    GRADED,
    KINDS,
    LABELS,
    PAIRS,
    ROWS,
    SCORES,
    TEXTS,
    make,
    make_texts,
    make_trainer,
)

from skembed import ContrastiveTrainer
from skembed.exceptions import TruncationWarning
from skembed.instructions import resolve_instruction
from skembed.model.tokenization import TextTokenizer
from skembed.training import fit as contrastive
from skembed.training.batches import BatchPlan
from skembed.training.examples import TrainingTask

TEMPLATE = "Instruct: {}\nQuery: "


# What is learned


def separation(vectors: np.ndarray, labels: list[str]) -> float:
    """Mean cosine of two texts of a class less that of two classes."""
    cosines, names = vectors @ vectors.T, np.array(labels)
    same = names[:, None] == names[None]
    off = ~np.eye(len(names), dtype=bool)
    return float(cosines[same & off].mean() - cosines[~same].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_examples_is_learned(kind: str) -> None:
    X, y = KINDS[kind]
    trainer = make_trainer(max_steps=20, epochs=20, learning_rate=1e-2, temperature=0.2)
    emb = make(trainer).fit(X, y)
    frozen = make(None)
    loss = emb.history_["loss"]
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    # The effect on vectors, of new texts too.
    new, their_labels = make_texts(8, seed=1)
    for texts, labels, gain in ((TEXTS, LABELS, 0.2), (new, their_labels, 0.05)):
        before, after = (separation(e.transform(texts), labels) for e in (frozen, emb))
        assert after > before + gain
    if kind == "scores":
        cosines = [np.einsum("nd,nd->n", *np.split(e.transform(X), 2, 1)) for e in (frozen, emb)]
        before, after = (spearmanr(c, y).statistic for c in cosines)
        assert after > before + 0.2
    assert emb.n_features_in_ == {"labels": 1, "rows": len(ROWS[0])}.get(kind, 2)
    assert emb.embedding_dim_ == DIM


def test_the_base_model_stays_as_it_was() -> None:
    frozen = make(None)
    before = frozen.transform(TEXTS)
    (base,) = frozen._lease.models.values()
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    emb = make(make_trainer(learning_rate=0.1)).fit(TEXTS, LABELS)
    assert np.abs(emb.transform(TEXTS) - before).max() > 0.01
    np.testing.assert_array_equal(make(None).transform(TEXTS), before)
    for name, tensor in base.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name].numpy())
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize(
    ("trainer", "kind", "trains"),
    [
        ("auto", "labels", False),
        ("auto", "pairs", True),
        ("auto", "rows", True),
        ("auto", "scores", True),
        (None, "labels", False),
        (None, "pairs", False),
        (None, "scores", False),
    ],
)
def test_auto_trains_on_pairs_and_rows(trainer: Any, kind: str, trains: bool) -> None:
    X, y = KINDS[kind]
    emb = make(trainer).fit(X[:8], None if y is None else y[:8])
    assert hasattr(emb, "adapter_") == hasattr(emb, "history_") == trains
    if trains:
        assert emb.adapter_.settings.r == ContrastiveTrainer().r
        assert emb.trainer == "auto"


INSTRUCTIONS = [
    ({}, "", ""),
    ({"instruction": "Find the like"}, TEMPLATE.format("Find the like"), ""),
    (
        {"instruction": "Find the like", "document_instruction": "Say it"},
        TEMPLATE.format("Find the like"),
        TEMPLATE.format("Say it"),
    ),
    ({"instruction": "STS"}, "known", "known"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parameters", "query", "document"), INSTRUCTIONS)
def test_training_puts_the_instructions_of_transform_in_front(
    parameters: dict[str, Any],
    query: str,
    document: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if query == "known":
        query = document = TEMPLATE.format(resolve_instruction("STS"))
    seen: dict[str, set[str]] = {}
    encode = TextTokenizer.encode

    def spying(self: Any, texts: Any, *, prefix: str, **rest: Any) -> Any:
        if texts:
            seen.setdefault(prefix, set()).update(texts)
        return encode(self, texts, prefix=prefix, **rest)

    monkeypatch.setattr(TextTokenizer, "encode", spying)
    X, y = KINDS[kind]
    emb = make(make_trainer(max_steps=1), **parameters).fit(X, y)
    trained = {prefix: set(texts) for prefix, texts in seen.items()}
    seen.clear()
    if kind == "rows":  # anchors are queries, positives and negatives documents
        emb.encode_query([row[0] for row in X])
        emb.encode_document([text for row in X for text in row[1:]])
    else:
        emb.transform(X)
    assert trained == seen
    assert set(seen) == ({query} if kind == "labels" else {query, document})


def test_texts_cut_in_training_are_warned_about() -> None:
    X = [("word " * 40, "b"), ("c", "d"), ("e", "f")]
    with pytest.warns(TruncationWarning, match="1 of 6 texts were longer than max_length=20"):
        make(make_trainer(max_steps=1), max_length=20, instruction="a b").fit(X)


# Several tasks


def test_tasks_are_trained_together(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = set()
    encode = TextTokenizer.encode

    def spying(self: Any, texts: Any, *, prefix: str, **rest: Any) -> Any:
        prefixes.add(prefix)
        return encode(self, texts, prefix=prefix, **rest)

    drawn = []
    build = BatchPlan.build

    def counting(self: Any, step: int, batch_rows: np.ndarray) -> Any:
        drawn.append(np.bincount(batch_rows[:, 0], minlength=3))
        return build(self, step, batch_rows)

    monkeypatch.setattr(TextTokenizer, "encode", spying)
    monkeypatch.setattr(BatchPlan, "build", counting)
    tasks = [
        TrainingTask(TEXTS, LABELS, instruction="Say the topic"),
        TrainingTask(ROWS, instruction="Find the like", in_batch_negatives=False, weight=3),
        TrainingTask(GRADED, SCORES, document_instruction="Rate it", name="rating", weight=0.5),
    ]
    trainer = make_trainer(max_steps=None, batch_size=40, learning_rate=1e-2, temperature=0.2)
    emb = make(trainer, instruction="My own").fit_tasks(tasks)
    assert prefixes == {
        "",
        *(TEMPLATE.format(text) for text in ("Say the topic", "Find the like", "Rate it")),
    }
    # Each text with 8 others of its class; three times the rows; half the pairs.
    np.testing.assert_array_equal(np.sum(drawn, axis=0), [8 * 36, 3 * 18, len(GRADED) / 2])
    assert (np.array(drawn) > 0).all(), "blended"
    assert emb.n_features_in_ == 1
    frozen = make(None, instruction="My own")
    assert separation(emb.transform(TEXTS), LABELS) > separation(frozen.transform(TEXTS), LABELS)
    loss = emb.history_["loss"]
    assert loss[-3:].mean() < loss[:3].mean()


def test_tasks_can_keep_to_their_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    build = BatchPlan.build

    def counting(self: Any, step: int, batch_rows: np.ndarray) -> Any:
        drawn.append(set(batch_rows[:, 0].tolist()))
        return build(self, step, batch_rows)

    monkeypatch.setattr(BatchPlan, "build", counting)
    trainer = make_trainer(blend_tasks=False, max_steps=None, batch_size=9, train_pooling=False)
    emb = make(trainer).fit_tasks([TrainingTask(PAIRS), TrainingTask(GRADED, SCORES)])
    assert sorted(map(sorted, drawn)) == [[0]] * 2 + [[1]] * round(len(GRADED) / 9)
    assert len(emb.history_) == len(drawn)


def test_one_task_is_a_fit() -> None:
    names = {"instruction": "Find the like", "document_instruction": "Say it"}
    task = TrainingTask(PAIRS, **names)
    one, other = make(**names).fit(PAIRS), make().fit_tasks((task,))
    assert one.adapter_.fingerprint == other.adapter_.fingerprint


BAD_TASKS = {
    "no task": ([(PAIRS, None)], {}, TypeError, r"tasks\[0\] is a tuple"),
    "none": ([], {}, TypeError, "must be a list of TrainingTask; got an empty one"),
    "not a list": (TrainingTask(PAIRS), {}, TypeError, "list of TrainingTask; got TrainingTask"),
    "empty text": (
        [TrainingTask(PAIRS), TrainingTask([*PAIRS, ("", "b")])],
        {},
        ValueError,
        r"`examples` parameter of `tasks\[1\]`.*blank",
    ),
    "named": (
        [TrainingTask(TEXTS, LABELS[:-1], name="topics")],
        {},
        ValueError,
        r"`y` parameter of `tasks\[0\] \(topics\)` must have as many",
    ),
    "weight": ([TrainingTask(PAIRS, weight=0)], {}, ValueError, r"`weight`.*`tasks\[0\]`"),
    "instruction": (
        [TrainingTask(PAIRS), TrainingTask(PAIRS, document_instruction="Bankng77")],
        {},
        ValueError,
        r"tasks\[1\]",
    ),
    "loss": (
        [TrainingTask(GRADED, SCORES), TrainingTask(PAIRS, name="pairs")],
        {"loss": "cosent"},
        ValueError,
        r"`loss` parameter.*got 'cosent' with rows \(tasks\[1\]\)",
    ),
    "negatives": (
        [TrainingTask(ROWS), TrainingTask(PAIRS, in_batch_negatives=False)],
        {},
        ValueError,
        r"needs negatives of its own \(tasks\[1\]\)",
    ),
    "alone": (
        [TrainingTask(ROWS), TrainingTask(PAIRS)],
        {"batch_size": 1},
        ValueError,
        r"no negatives of its own \(tasks\[1\]\)",
    ),
}


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_tasks_are_named_by_position(name: str, unloaded: Path) -> None:
    tasks, parameters, error, message = BAD_TASKS[name]
    emb = make(make_trainer(**parameters), model=unloaded)
    with pytest.raises(error, match=message):
        emb.fit_tasks(tasks)
    assert not hasattr(emb, "adapter_")


@pytest.mark.usefixtures("nothing_done")
def test_tasks_need_a_trainer(unloaded: Path) -> None:
    with pytest.raises(ValueError, match="`trainer`.*for `fit_tasks`; got None, which never"):
        make(None, model=unloaded).fit_tasks([TrainingTask(PAIRS)])


# Mined negatives


@pytest.mark.parametrize("rule", ["perc_pos", "margin_pos"])
@pytest.mark.parametrize("kind", ["labels", "pairs", "rows"])
@pytest.mark.parametrize("remine", [False, True])
def test_negatives_are_mined_with_the_model_at_hand(
    remine: bool, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mined: list[np.ndarray] = []
    mine = contrastive._mine_task

    def recording(task: Any, embed: Any, trainer: ContrastiveTrainer) -> np.ndarray:
        mined.append(mine(task, embed, trainer))
        return mined[-1]

    monkeypatch.setattr(contrastive, "_mine_task", recording)
    trainer = make_trainer(
        mine_negatives=rule,
        remine=remine,
        n_negatives=3,
        in_batch_negatives=False,
        max_steps=None,
        epochs=3,
        batch_size=100,
        learning_rate=1e-2,
    )
    X, y = KINDS[kind]
    emb = make(trainer).fit(X, y)
    assert len(emb.history_) == 3 * (3 if kind == "labels" else 1)
    assert len(mined) == (3 if remine else 1)
    assert all((found >= 0).any() for found in mined)
    if remine:
        assert (mined[0] != mined[1]).any()
        assert (mined[1] != mined[2]).any()
    class_of = dict(zip(TEXTS, LABELS, strict=True))
    for found in mined:
        for row, negatives in enumerate(found):
            names = [TEXTS[i] for i in negatives if i >= 0] if kind == "labels" else []
            assert all(class_of[name] != LABELS[row] for name in names)
