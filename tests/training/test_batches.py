"""Batches against a slow reference: who meets whom, how often, and who is never a negative."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN

from skembed import ContrastiveTrainer
from skembed.model.sources import read_json
from skembed.model.tokenization import TextTokenizer
from skembed.training.batches import (
    POSITIVES_PER_EPOCH,
    Batch,
    BatchPlan,
    TaskSampler,
    TextTable,
)
from skembed.training.examples import Examples, check_examples
from skembed.training.fit import _mine_task

QUERY, DOCUMENT = "Instruct: find\nQuery: ", ""


@dataclass
class Given:
    """A plan, and what it was made of."""

    plan: BatchPlan
    examples: list[Examples]
    text_of: np.ndarray  # (n rows of the table,), str


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    config = read_json(GOLDEN / "config.json")
    backbone = config.get("text_config", config)
    return TextTokenizer.from_folder(
        GOLDEN, bos_token_id=backbone["bos_token_id"], eos_token_id=backbone["eos_token_id"]
    )


def make_plan(
    tokenizer: TextTokenizer,
    tasks: Sequence[tuple[Any, Any]],
    *,
    in_batch: Sequence[bool] | None = None,
    weights: Sequence[float] | None = None,
    prefixes: tuple[str, str] = (QUERY, DOCUMENT),
    batch_size: int = 8,
    n_negatives: int = 7,
    seed: int = 0,
    blend: bool = True,
) -> Given:
    """As `fit_adapter` makes it."""
    trainer = ContrastiveTrainer(
        batch_size=batch_size, n_negatives=n_negatives, blend_tasks=blend, epochs=12
    )
    table = TextTable(tokenizer, max_length=32, mask_prefix=True)
    parsed, samplers = [], []
    for number, (X, y) in enumerate(tasks):
        examples = check_examples(X, y)
        examples = replace(
            examples,
            query_prefix=prefixes[0],
            document_prefix=prefixes[1],
            in_batch_negatives=True if in_batch is None else in_batch[number],
            weight=1.0 if weights is None else weights[number],
        )
        samplers.append(TaskSampler(examples, table))
        parsed.append(examples)
    table.freeze()
    text_of = np.full(len(table.ids), "", dtype=object)
    for task in samplers:
        for rows in (task.queries, task.documents):
            text_of[rows[rows >= 0]] = np.array(task.examples.texts, dtype=object)[rows >= 0]
    return Given(BatchPlan(samplers, table, trainer, seed), parsed, text_of)


def draw_labels(rng: np.random.Generator, *, n: int = 30, n_texts: int = 16, n_classes: int = 3):
    """Labelled texts, with repeated ones and some under two classes."""
    texts = rng.integers(0, n_texts, n)
    labels = np.where(rng.random(n) < 0.85, texts % n_classes, rng.integers(0, n_classes, n))
    every = np.arange(2 * n_classes)  # two texts of each class, so that the reader takes them
    texts, labels = np.r_[texts, every], np.r_[labels, every % n_classes]
    return [f"text {t}" for t in texts], labels.tolist()


def draw_rows(
    rng: np.random.Generator, *, n: int = 20, n_texts: int = 16, n_negatives: int = 2
) -> tuple[list[tuple[str, ...]], None]:
    """Rows whose anchors, positives and negatives come from one small pool of texts."""
    rows = []
    for _ in range(n):
        chosen = rng.permutation(n_texts)[: 2 + n_negatives]
        rows.append(tuple(f"text {t}" for t in chosen))
    return rows, None


def forbidden(examples: Examples, anchor: str) -> set[str]:
    """Texts that are no negatives of an anchor, by the words of the module: class, known, equal."""
    found = {anchor}
    if examples.labels is not None:
        members = defaultdict(set)
        for (place,), label in zip(examples.columns.tolist(), examples.labels, strict=True):
            members[label].add(examples.texts[place])
        for texts in members.values():
            if anchor in texts:
                found |= texts
        return found
    for first, second, *_ in examples.columns.tolist():
        pair = examples.texts[first], examples.texts[second]
        if anchor in pair:
            found |= set(pair)
    return found


def iterate_batches(given: Given, epochs: int = 1) -> Any:
    """(batch_rows, batch) of each step."""
    plan = given.plan
    for step, batch_rows in islice(plan.iterate_steps(0), epochs * plan.n_batches):
        yield batch_rows, plan.build(step, batch_rows)


def listed_anchors(given: Given, batch_rows: np.ndarray) -> list[tuple[int, int]]:
    """(task, example of its training part) in the order of a contrast's anchors."""
    by_task = [batch_rows[batch_rows[:, 0] == t] for t in range(len(given.examples))]
    return [
        (t, int(example))
        for t, part in enumerate(by_task)
        if given.plan.tasks[t].examples.loss == "infonce"
        for example in part[:, 1]
    ]


def check_contrast(given: Given, batch_rows: np.ndarray, batch: Batch) -> int:
    """Compare a batch with the reference; the number of negatives it allows."""
    n_negatives = 0
    anchors = given.text_of[batch.texts[batch.anchors]]
    candidates = given.text_of[batch.texts[batch.candidates]]
    order = listed_anchors(given, batch_rows)
    assert len(order) == len(anchors)
    for i, (t, example) in enumerate(order):
        task, examples = given.plan.tasks[t], given.examples[t]
        columns = task.examples.columns[example]
        assert anchors[i] == task.examples.texts[columns[0]]
        positive = candidates[batch.positive[i]]
        never = forbidden(examples, anchors[i]) | {positive}
        allowed = set(candidates[batch.allowed[i]])
        assert allowed & never == {positive}, "the positive alone"
        own = {task.examples.texts[c] for c in columns[2:]} - never
        if task.examples.in_batch_negatives:
            assert allowed - {positive} == set(candidates) - never
        elif task.classes is None:
            assert allowed - {positive} == own
        assert own <= allowed or task.classes is not None
        n_negatives += len(allowed) - 1
    return n_negatives


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("in_batch", [(True, True, True), (True, False, True), (False,) * 3])
def test_negatives_are_those_of_the_reference(
    in_batch: tuple[bool, ...], seed: int, tokenizer: TextTokenizer
) -> None:
    # All tasks share one pool of texts: what one task forbids comes in through the others.
    rng = np.random.default_rng(seed)
    tasks = [draw_labels(rng), draw_rows(rng), draw_labels(rng, n_classes=2)]
    given = make_plan(tokenizer, tasks, in_batch=in_batch, n_negatives=2, seed=seed)
    n_negatives = sum(check_contrast(given, *pair) for pair in iterate_batches(given))
    assert n_negatives > 50, "a reference that has nothing to compare shows nothing"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefixes", [("", ""), (QUERY, QUERY), (QUERY, DOCUMENT)])
def test_pairs_in_one_batch(prefixes: tuple[str, str], seed: int, tokenizer: TextTokenizer) -> None:
    rng = np.random.default_rng(seed)
    given = make_plan(tokenizer, [draw_rows(rng, n_negatives=0)], prefixes=prefixes, batch_size=20)
    assert given.plan.n_batches == 1
    (pair,) = iterate_batches(given)
    assert check_contrast(given, *pair) > 20


def test_candidates_stand_once_and_texts_are_on_their_side(tokenizer: TextTokenizer) -> None:
    rows = [("a", "b", "c"), ("d", "b", "c"), ("e", "f", "a")]
    given = make_plan(tokenizer, [(rows, None)])
    ((_, batch),) = iterate_batches(given)
    table = given.plan.table
    for rows_of, start in (
        (batch.anchors, tokenizer.count_prefix(QUERY)),
        (batch.candidates, 0),
    ):
        assert set(table.pool_start_of[batch.texts[rows_of]]) == {start}
    candidates = given.text_of[batch.texts[batch.candidates]]
    assert sorted(candidates) == ["a", "b", "c", "f"]
    assert len(np.unique(batch.texts)) == len(batch.texts) == 7
    assert batch.n_examples == 3


@pytest.mark.parametrize("n_negatives", [0, 1, 3, 9])
def test_no_more_negatives_of_its_own_than_asked_for(
    n_negatives: int, tokenizer: TextTokenizer
) -> None:
    rows = [tuple(f"{kind} {i}" for kind in ("a", "p", "n", "m", "o")) for i in range(6)]
    given = make_plan(tokenizer, [(rows, None)], in_batch=[False], n_negatives=n_negatives)
    seen: Counter[str] = Counter()
    for _, batch in iterate_batches(given, epochs=12):
        assert (batch.allowed.sum(1) - 1 == min(n_negatives, 3)).all()
        for i, allowed in enumerate(batch.allowed):
            allowed = allowed.copy()
            allowed[batch.positive[i]] = False
            seen.update(given.text_of[batch.texts[batch.candidates[allowed]]])
    if n_negatives:
        assert len(seen) == 18, "each of a row's negatives takes its turn"
    assert sum(seen.values()) == 12 * 6 * min(n_negatives, 3)


def test_negatives_drawn_from_other_classes(tokenizer: TextTokenizer) -> None:
    texts = [f"text {i}" for i in range(40)]
    labels = [0] * 20 + [1] * 15 + [2] * 5
    given = make_plan(tokenizer, [(texts, labels)], in_batch=[False], n_negatives=4)
    class_of = dict(zip(texts, labels, strict=True))
    met: dict[int, Counter[int]] = defaultdict(Counter)
    for batch_rows, batch in iterate_batches(given, epochs=4):
        check_contrast(given, batch_rows, batch)
        assert (batch.allowed.sum(1) <= 5).all()
        assert (batch.allowed.sum(1) >= 2).all()
        candidates = given.text_of[batch.texts[batch.candidates]]
        anchors = given.text_of[batch.texts[batch.anchors]]
        for i, allowed in enumerate(batch.allowed):
            for text in candidates[allowed]:
                met[class_of[anchors[i]]][class_of[text]] += 1
    # Drawn in proportion to the classes' sizes: class 0's negatives are 3 of class 1 to 1 of 2.
    assert met[0][1] / met[0][2] == pytest.approx(3, rel=0.2)
    assert met[2][0] / met[2][1] == pytest.approx(20 / 15, rel=0.25)


# Positives and draws


@pytest.mark.parametrize("weight", [1, 2])
def test_positives_of_a_class_differ_over_its_repetitions(
    weight: float, tokenizer: TextTokenizer
) -> None:
    sizes = {"large": 40, "just": POSITIVES_PER_EPOCH + 1, "small": 4, "pair": 2}
    texts, labels = [], []
    for name, size in sizes.items():
        texts += [f"{name} {i}" for i in range(size)]
        labels += [name] * size
    given = make_plan(tokenizer, [(texts, labels)], weights=[weight], batch_size=16)
    met: dict[str, list[str]] = defaultdict(list)
    for _, batch in iterate_batches(given):
        anchors = given.text_of[batch.texts[batch.anchors]]
        positives = given.text_of[batch.texts[batch.candidates[batch.positive]]]
        for anchor, positive in zip(anchors, positives, strict=True):
            met[anchor].append(positive)
    assert set(met) == set(texts)
    for anchor, positives in met.items():
        name = anchor.split()[0]
        n = weight * min(POSITIVES_PER_EPOCH, sizes[name] - 1)
        assert len(positives) == n
        assert {p.split()[0] for p in positives} == {name}
        assert anchor not in positives
        # As many different ones as the class has to give.
        assert len(set(positives)) == min(n, sizes[name] - 1)


def test_positives_differ_between_epochs_and_examples(tokenizer: TextTokenizer) -> None:
    texts = [f"text {i}" for i in range(60)]
    given = make_plan(tokenizer, [(texts, [i % 2 for i in range(60)])], batch_size=60)
    task, chosen = given.plan.tasks[0], []
    for epoch in range(2):
        epoch_rows = np.concatenate(given.plan.list_epoch(epoch))
        _, positive, _ = task.draw(epoch_rows[:, 1], epoch_rows[:, 2], 0, np.random.default_rng(0))
        pairs = set(zip(epoch_rows[:, 1].tolist(), positive.tolist(), strict=True))
        assert len(pairs) == len(epoch_rows) == 60 * POSITIVES_PER_EPOCH
        chosen.append(pairs)
    # By chance 8 of 29 positives would be those of the epoch before, for each text.
    assert len(chosen[0] & chosen[1]) / len(chosen[0]) == pytest.approx(8 / 29, abs=0.1)
    counts = Counter(positive for _, positive in chosen[0])
    assert max(counts.values()) < 3 * POSITIVES_PER_EPOCH, "no text is everybody's positive"


@pytest.mark.parametrize(
    ("weight", "n_drawn"), [(1, 10), (0.5, 5), (2, 20), (2.5, 25), (0.04, 2), (0.0001, 2)]
)
def test_draws_follow_the_weight(weight: float, n_drawn: int, tokenizer: TextTokenizer) -> None:
    rows = [(f"a {i}", f"b {i}", f"c {i}") for i in range(10)]
    given = make_plan(tokenizer, [(rows, None)], weights=[weight], batch_size=1)
    for epoch in range(3):
        epoch_rows = np.concatenate(given.plan.list_epoch(epoch))
        counts = np.bincount(epoch_rows[:, 1], minlength=10)
        assert counts.sum() == n_drawn == given.plan.n_batches
        assert counts.max() - counts.min() <= 1, "spread over the examples"


def test_each_example_once_an_epoch_in_another_order(tokenizer: TextTokenizer) -> None:
    rows = [(f"a {i}", f"b {i}") for i in range(37)]
    given = make_plan(tokenizer, [(rows, None)], batch_size=8)
    orders = []
    for epoch in range(3):
        batches = given.plan.list_epoch(epoch)
        assert len(batches) == given.plan.n_batches
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 12
        orders.append(np.concatenate(batches)[:, 1].tolist())
        assert sorted(orders[-1]) == list(range(37))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("blend", [True, False])
def test_no_example_is_alone_in_a_batch(
    blend: bool, n: int, batch_size: int, tokenizer: TextTokenizer
) -> None:
    rows = [(f"a {i}", f"b {i}") for i in range(n)]
    given = make_plan(tokenizer, [(rows, None)], batch_size=batch_size, blend=blend)
    for batch_rows, batch in iterate_batches(given, epochs=3):
        assert check_contrast(given, batch_rows, batch) >= 2
        assert len(batch_rows) <= max(3, 1.5 * batch_size)


@pytest.mark.parametrize("blend", [True, False])
def test_blended_or_of_one_task(blend: bool, tokenizer: TextTokenizer) -> None:
    pairs = [[(f"a {t} {i}", f"b {t} {i}") for i in range(48)] for t in range(2)]
    tasks = [(pairs[0], None), (pairs[1], np.arange(48.0))]
    given = make_plan(tokenizer, tasks, batch_size=8, blend=blend)
    kinds = []
    for batch_rows, batch in iterate_batches(given):
        kinds.append(len(np.unique(batch_rows[:, 0])))
        assert bool(len(batch.anchors)) == (0 in batch_rows[:, 0])
        assert bool(batch.graded) == (1 in batch_rows[:, 0])
        assert batch.n_examples == len(batch_rows)
    assert len(kinds) == 12
    assert set(kinds) == {1} if not blend else sum(k == 2 for k in kinds) >= 10
    if not blend:  # not one task after the other
        first = [int(batch_rows[0, 0]) for batch_rows in given.plan.list_epoch(0)]
        assert sorted(first) != first


def test_rankings_hold_their_pairs_and_scores(tokenizer: TextTokenizer) -> None:
    pairs = [(f"a {i}", f"b {i}") for i in range(20)]
    given = make_plan(tokenizer, [(pairs, np.arange(20.0))], batch_size=5)
    seen = []
    for _, batch in iterate_batches(given):
        ((lefts, rights, scores),) = batch.graded
        left, right = (given.text_of[batch.texts[rows]] for rows in (lefts, rights))
        for a, b, score in zip(left, right, scores, strict=True):
            assert (a, b) == pairs[int(score)]
            seen.append(int(score))
        starts = given.plan.table.pool_start_of[batch.texts]
        assert set(starts[lefts]) == {tokenizer.count_prefix(QUERY)}
        assert set(starts[rights]) == {0}
    assert sorted(seen) == list(range(20))


# A rare batch must not end a run


@pytest.mark.parametrize("seed", range(3))
def test_each_batch_of_labels_has_something_to_compare(seed: int, tokenizer: TextTokenizer) -> None:
    # 58 to 2: most batches of four hold one class only.
    texts = [f"text {i}" for i in range(60)]
    given = make_plan(
        tokenizer, [(texts, [0] * 58 + [1] * 2)], batch_size=4, n_negatives=0, seed=seed
    )
    for batch_rows, batch in iterate_batches(given):
        check_contrast(given, batch_rows, batch)
        assert (batch.allowed.sum(1) > 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_each_batch_of_scores_has_something_to_compare(seed: int, tokenizer: TextTokenizer) -> None:
    pairs = [(f"a {i}", f"b {i}") for i in range(60)]
    given = make_plan(tokenizer, [(pairs, [1.0] * 58 + [0.0] * 2)], batch_size=4, seed=seed)
    known = dict(zip(pairs, [1.0] * 58 + [0.0] * 2, strict=True))
    for _, batch in iterate_batches(given):
        ((lefts, rights, scores),) = batch.graded
        assert np.ptp(scores) > 0
        left, right = (given.text_of[batch.texts[rows]] for rows in (lefts, rights))
        assert [known[pair] for pair in zip(left, right, strict=True)] == scores.tolist()


# Seeds, memory, chunks


def as_plain(batch: Batch) -> list[Any]:
    """Everything in a batch."""
    parts: list[Any] = [batch.texts, batch.n_examples, batch.anchors, batch.candidates]
    parts += [batch.positive, batch.allowed, *(part for pairs in batch.graded for part in pairs)]
    return [np.asarray(part).tolist() for part in parts]


def test_batches_depend_on_seed_and_step_alone(tokenizer: TextTokenizer) -> None:
    def make(seed: int) -> BatchPlan:
        rng = np.random.default_rng(0)
        pairs = [(f"a {i}", f"b {i}") for i in range(20)]
        tasks = [draw_labels(rng), draw_rows(rng, n_negatives=3), (pairs, np.arange(20.0))]
        in_batch = [False, True, True]
        return make_plan(tokenizer, tasks, in_batch=in_batch, n_negatives=2, seed=seed).plan

    def build(plan: BatchPlan, first: int, last: int) -> list[list[Any]]:
        steps = islice(plan.iterate_steps(first), last - first)
        return [as_plain(plan.build(step, x)) for step, x in steps]

    plan, n = make(0), 3 * make(0).n_batches
    whole = build(plan, 0, n)
    assert build(plan, 0, n) == whole, "nothing is kept from one pass to the next"
    for first in (1, plan.n_batches - 1, plan.n_batches, n - 1):
        assert build(make(0), first, n) == whole[first:]
    assert [plan.starts_epoch(step) for step in range(n)].count(True) == 3
    other = build(make(1), 0, n)
    assert all(a != b for a, b in zip(whole, other, strict=True))
    assert len({str(batch) for batch in whole}) == n


def test_torch_and_numpy_global_states_are_left_alone(tokenizer: TextTokenizer) -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    given = make_plan(tokenizer, [draw_labels(np.random.default_rng(0))])
    assert sum(1 for _ in iterate_batches(given)) == given.plan.n_batches
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_memory_is_linear_in_the_texts(tokenizer: TextTokenizer) -> None:
    peaks = []
    for n in (1_600, 3_200):
        texts, labels = [f"text {i}" for i in range(n)], [i % 2 for i in range(n)]
        tracemalloc.start()
        given = make_plan(tokenizer, [(texts, labels)], batch_size=64)
        for _ in iterate_batches(given):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The pairs of one class alone would be 800 * 800 * 8 = 5 million bytes; as booleans of all
    # texts, 2.5 million.
    assert peaks[0] < 2_000_000
    assert peaks[1] < 2.5 * peaks[0]


@pytest.mark.parametrize("budget", [1, 10, 40, 2_000])
@pytest.mark.parametrize("mask_prefix", [True, False])
def test_cuts_fill_the_budget_with_texts_of_one_prefix(
    mask_prefix: bool, budget: int, tokenizer: TextTokenizer, rng: np.random.Generator
) -> None:
    table = TextTable(tokenizer, max_length=32, mask_prefix=mask_prefix)
    texts = ["word " * int(size) for size in rng.integers(1, 12, 30)]
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    prefixes = ("", QUERY, "Instruct: another and longer one\nQuery: ")
    rows = np.concatenate([table.add(texts, prefix) for prefix in prefixes])
    assert table.add(texts[:3], QUERY).tolist() == rows[30:33].tolist(), "each once"
    table.freeze()
    chosen = rng.permutation(rows)[:60]
    chunks = table.cut(chosen, budget)
    assert sorted(np.concatenate(chunks)) == list(range(60))
    for chunk in chunks:
        lengths = table.lengths[chosen[chunk]]
        assert lengths.sum() <= budget or len(chunk) == 1
        assert len(set(table.pool_start_of[chosen[chunk]])) == 1
        assert (np.diff(lengths) <= 0).all(), "similar lengths side by side"
        packed = table.pack(chosen[chunk], on_grid=False)
        assert packed.n_texts == len(chunk)
        pooled = lengths - table.pool_start_of[chosen[chunk]]
        assert packed.pool_counts.tolist() == pooled.tolist()
    if budget == 2_000:
        assert len(chunks) == (3 if mask_prefix else 1)


def test_texts_cut_at_max_length_are_counted_once(tokenizer: TextTokenizer) -> None:
    rows = [("short", "also short"), ("word " * 60, "brief"), ("tiny", "small " * 60)]
    given = make_plan(tokenizer, [(rows, None)])
    table = given.plan.table
    # Three texts as queries, three as documents: none is read for a side it is never on.
    assert len(table.ids) == 6
    assert table.n_truncated == 2
    assert table.lengths.max() == 32


# Mined negatives


@pytest.mark.parametrize("strategy", ["perc_pos", "margin_pos"])
@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("seed", range(4))
def test_mined_negatives_obey_the_rules(
    seed: int, kind: str, strategy: str, tokenizer: TextTokenizer
) -> None:
    rng = np.random.default_rng(seed)
    drawn = draw_labels(rng) if kind == "labels" else draw_rows(rng, n_negatives=0)
    given = make_plan(tokenizer, [drawn], n_negatives=3, in_batch=[False])
    task = given.plan.tasks[0]
    table = rng.normal(size=(len(given.plan.table.ids), 4)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    trainer = ContrastiveTrainer(mine_negatives=strategy, n_negatives=3)
    task.mined = _mine_task(task, lambda rows: table[rows], trainer)
    texts, examples = given.examples[0].texts, task.examples
    assert task.mined.shape == (len(examples), 3)
    n_mined = 0
    for row, mined in zip(examples.columns, task.mined, strict=True):
        mined = mined[mined >= 0]
        n_mined += len(mined)
        names = [texts[i] for i in mined]
        assert len(set(names)) == len(names)
        assert not set(names) & forbidden(given.examples[0], texts[row[0]])
        if kind == "rows":
            anchor = table[task.queries[row[0]]]
            limit = anchor @ table[task.documents[row[1]]]
            limit = limit - 0.05 if strategy == "margin_pos" else limit - 0.05 * abs(limit)
            assert (table[task.documents[mined]] @ anchor <= limit + 1e-6).all()
    assert n_mined > len(examples) / 2
    for batch_rows, batch in iterate_batches(given):
        order = listed_anchors(given, batch_rows)
        candidates = given.text_of[batch.texts[batch.candidates]]
        for i, (_, example) in enumerate(order):
            allowed = batch.allowed[i].copy()
            allowed[batch.positive[i]] = False
            mined = {texts[j] for j in task.mined[example] if j >= 0}
            positive = candidates[batch.positive[i]]
            assert set(candidates[allowed]) == mined - {positive}
