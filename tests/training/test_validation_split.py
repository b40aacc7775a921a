"""The part of the examples that is held out."""

import numpy as np
import pytest
from given_examples import EXAMPLES, LABELS, TEXTS, every_kind, random_examples

from skembed.training.examples import check_examples
from skembed.training.validation import split_validation


def assert_parts(examples, train, validation):
    """Two ascending parts of everything, with no first text in common."""
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(len(examples)))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    assert len(train) and len(validation)
    first = examples.columns[:, 0]
    assert not set(first[train]) & set(first[validation])


@every_kind
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.1, 0.5, 0.98, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_split_is_a_partition_by_text(kind, fraction, seed):
    rng = np.random.default_rng(seed)
    X, y = random_examples(rng, kind)
    if kind == "labels":  # most texts there have several labels, and would all stay for training
        drawn = rng.integers(200, size=90)
        X, y = [f"w{i}" for i in drawn], drawn % 4
    examples = check_examples(X, y)
    train, validation = split_validation(examples, fraction, seed)
    assert_parts(examples, train, validation)
    again = split_validation(examples, fraction, seed)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(validation, again[1])


@every_kind
def test_split_differs_by_seed_and_without_one(kind):
    n = 400
    X = {
        "labels": ([f"w{i}" for i in range(n)], [i % 5 for i in range(n)]),
        "rows": ([(f"w{i}", f"p{i}") for i in range(n)], None),
        "scores": ([(f"w{i}", f"p{i}") for i in range(n)], np.arange(n, dtype=float)),
    }[kind]
    examples = check_examples(*X)
    parts = [split_validation(examples, 0.1, seed)[1] for seed in (0, 1, None, None)]
    assert [len(part) for part in parts] == [40] * 4
    assert len({tuple(part) for part in parts}) == 4


@pytest.mark.parametrize("seed", range(5))
def test_split_of_labels_is_stratified(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 60, size=12)
    y = np.repeat(np.arange(12), sizes)
    examples = check_examples([f"text {i}" for i in range(len(y))], y)
    train, validation = split_validation(examples, 0.2, seed)
    taken = np.bincount(y[validation], minlength=12)
    assert (sizes - taken >= 2).all()
    assert len(validation) == round(0.2 * len(y))
    assert (np.abs(taken - 0.2 * sizes) < 1).all() or (sizes < 4).any()
    assert (taken[sizes == 2] == 0).all()


def test_split_of_few_examples_per_class_takes_from_some_classes():
    y = np.repeat(np.arange(77), 4)
    examples = check_examples([f"text {i}" for i in range(len(y))], y)
    validation = split_validation(examples, 0.1, 0)[1]
    taken = np.bincount(y[validation], minlength=77)
    assert taken.sum() == 31
    assert taken.max() == 1
    other = np.bincount(y[split_validation(examples, 0.1, 1)[1]], minlength=77)
    assert (taken != other).any()  # ties are broken by lot, not by class number


def test_split_leaves_two_different_texts_to_each_class():
    # Of class 0 only "c" and "d" could go: its other examples are one text.
    X = ["a"] * 6 + ["b", "c", "d", "p", "q"]
    examples = check_examples(X, [0] * 9 + [1] * 2)
    for seed in range(20):
        train, validation = split_validation(examples, 0.9, seed)
        assert_parts(examples, train, validation)
        assert len({X[i] for i in train if i < 9}) == 2
        assert {9, 10} <= set(train.tolist())


def test_split_keeps_texts_of_several_labels_for_training():
    X = [f"both {i}" for i in range(10)] * 2 + [f"one {i}" for i in range(8)]
    y = [0] * 10 + [1] * 10 + [0] * 8
    train, validation = split_validation(check_examples(X, y), 0.4, 0)
    assert len(validation) == 8 and min(validation) >= 20
    assert len(train) == 20


def test_split_of_rows_fills_the_share_around_a_large_group():
    X = [("hub", f"p{i}") for i in range(80)] + [(f"a{i}", f"q{i}") for i in range(20)]
    examples = check_examples(X)
    for seed in range(10):
        validation = split_validation(examples, 0.1, seed)[1]
        assert len(validation) == 10
        assert min(validation) >= 80


def test_split_of_two_anchors_holds_out_the_rarer():
    examples = check_examples([("a", "b"), ("a", "c"), ("a", "d"), ("e", "f"), ("e", "g")])
    for seed in range(5):
        assert split_validation(examples, 0.2, seed)[1].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (TEXTS, LABELS),
        ([("a", "b"), ("a", "c")], None),
        ([("a", "b"), ("a", "c")], [1.0, 2.0]),
        (["a", "b", "a", "b"], [0, 0, 1, 1]),
    ],
    ids=["two of each class", "one anchor", "one anchor, scored", "conflicts only"],
)
def test_split_that_would_leave_a_part_empty(X, y):
    examples = check_examples(X, y)
    with pytest.raises(
        ValueError,
        match=r"`validation_fraction` parameter of `ContrastiveTrainer` must leave examples.*"
        r"got 0\.5.*Set validation_fraction=0",
    ):
        split_validation(examples, 0.5, 0)


@pytest.mark.parametrize(
    ("fraction", "seed", "error", "name"),
    [
        (0.0, 0, ValueError, "validation_fraction"),
        (1.0, 0, ValueError, "validation_fraction"),
        (float("nan"), 0, ValueError, "validation_fraction"),
        ("0.1", 0, TypeError, "validation_fraction"),
        (True, 0, TypeError, "validation_fraction"),
        (0.1, -1, ValueError, "random_state"),
        (0.1, 0.5, TypeError, "random_state"),
    ],
)
def test_split_checks_its_parameters(fraction, seed, error, name):
    with pytest.raises(error, match=f"`{name}` parameter of `ContrastiveTrainer` must be"):
        split_validation(EXAMPLES["rows"], fraction, seed)
