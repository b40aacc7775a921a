"""Checked examples: their kinds, fingerprints, known positives, errors, cost."""

import decimal
import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest
from given_examples import (
    EXAMPLES,
    LABELS,
    PAIRS,
    ROWS,
    SCORES,
    TEXTS,
    assert_sound,
    every_kind,
    labels_of,
    random_examples,
    rows_of,
)
from paths import ROOT

from skembed import ContrastiveTrainer
from skembed.training.examples import TrainingTask, check_examples, read_task

SECRET = "the patient's name"


# Three kinds


def test_labels():
    examples = check_examples([*TEXTS, "lost card"], [*LABELS, "card"])
    assert_sound(examples)
    assert examples.kind == "labels"
    assert examples.texts == TEXTS
    assert examples.columns.tolist() == [[0], [1], [2], [3], [0]]
    assert examples.classes.tolist() == ["account", "card"]
    assert examples.labels.tolist() == [1, 1, 0, 0, 1]
    assert examples.scores is None


def test_pairs():
    examples = check_examples(PAIRS)
    assert_sound(examples)
    assert examples.kind == "rows"
    assert examples.texts == ["a cat", "a feline", "a dog", "a hound", "a kitty"]
    assert examples.columns.tolist() == [[0, 1], [2, 3], [0, 4]]
    assert examples.labels is None and examples.scores is None


def test_rows_with_negatives():
    examples = check_examples(ROWS)
    assert_sound(examples)
    assert examples.kind == "rows"
    assert rows_of(examples) == ROWS
    assert examples.columns.shape == (3, 3)


def test_scores():
    examples = check_examples(PAIRS, SCORES)
    assert_sound(examples)
    assert examples.kind == "scores"
    assert rows_of(examples) == PAIRS
    assert examples.scores.tolist() == SCORES
    assert examples.labels is None


def test_scored_pair_may_be_of_equal_texts():
    assert check_examples([("a", "a"), ("a", "b")], [5.0, 1.0]).columns.tolist() == [[0, 0], [0, 1]]


def test_lone_surrogates_are_replaced_and_then_one_text():
    examples = check_examples(["caf\udce9", "caf\ufffd", "bar", "inn", "pub"], [0, 0, 0, 1, 1])
    assert examples.texts == ["caf\ufffd", "bar", "inn", "pub"]
    assert examples.columns.ravel().tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"equal in 1 row, the first X\[1\]"):
        check_examples([("a", "b"), ("caf\udce9", "caf\ufffd")])


def test_input_is_left_alone():
    X, y = [list(row) for row in ROWS], [1.0, 2.0, 3.0]
    check_examples(X)
    assert X == [list(row) for row in ROWS]
    texts = ["caf\udce9", *TEXTS[1:]]
    check_examples(texts, LABELS)
    assert texts[0] == "caf\udce9"
    check_examples(PAIRS, y)
    assert y == [1.0, 2.0, 3.0]


def test_len_and_repr_show_no_texts():
    examples = check_examples([(SECRET, "a"), (SECRET, "b")])
    task = TrainingTask([(SECRET, "a")], [SECRET], name="mine")
    assert len(examples) == 2
    assert SECRET not in repr(examples) + repr(task)
    assert "n=2" in repr(examples) and "mine" in repr(task)


@pytest.mark.parametrize("kind", ["labels", "rows", "scores"])
def test_parsed_examples_are_frozen(kind):
    examples = EXAMPLES[kind]
    with pytest.raises(FrozenInstanceError):
        examples.texts = []
    assert examples == examples and examples != replace(examples)  # by identity, never by arrays


def test_texts_of_several_labels_are_kept():
    texts = ["a", "b", "a", "c", "c", "d", "a"]
    examples = check_examples(texts, [0, 0, 1, 1, 1, 2, 2])
    assert rows_of(examples) == [(text,) for text in texts]
    assert labels_of(examples) == [0, 0, 1, 1, 1, 2, 2]


# Parts and fingerprint


@every_kind
def test_some_examples_over_the_same_texts(kind):
    examples, rows = EXAMPLES[kind], np.array([2, 0])
    kept = examples.take(rows)
    assert rows_of(kept) == [rows_of(examples)[2], rows_of(examples)[0]]
    assert kept.texts is examples.texts
    assert kept.kind == kind
    for name in ("labels", "scores"):
        values = getattr(examples, name)
        np.testing.assert_array_equal(getattr(kept, name), None if values is None else values[rows])
    empty = examples.take(rows[:0])
    assert len(empty) == 0
    assert empty.columns.shape == (0, examples.columns.shape[1])
    assert set(empty.known_positives()[0].tolist()) == {0}


def test_fingerprint_is_of_the_data_not_the_container():
    pd = pytest.importorskip("pandas")
    prints = {check_examples(X).fingerprint() for X in (ROWS, np.array(ROWS), pd.DataFrame(ROWS))}
    assert len(prints) == 1
    assert len(prints.pop()) == 32
    assert (
        check_examples(PAIRS, [0.0, 1, 2]).fingerprint()
        == check_examples(PAIRS, np.array([-0.0, 1, 2], dtype=np.float32)).fingerprint()
    )


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from skembed.training.examples import check_examples;"
        f"print(check_examples({TEXTS!r}, {LABELS!r}).fingerprint())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == EXAMPLES["labels"].fingerprint()


def test_fingerprint_tells_any_change():
    changed = [
        (TEXTS, LABELS),
        (TEXTS, ["card", "account", "card", "account"]),
        ([*TEXTS[:3], "new accounts"], LABELS),
        (TEXTS[::-1], LABELS),
        ([*TEXTS, TEXTS[0]], [*LABELS, "card"]),
        (["a", "bc", "ab", "c"], LABELS),
        (["a", "b", "cab", "c"], LABELS),
        (PAIRS, None),
        (PAIRS[::-1], None),
        ([row[::-1] for row in PAIRS], None),
        (ROWS, None),
        ([("a", "b", "c"), ("d", "e", "f")], None),
        ([("a", "b"), ("c", "d"), ("e", "f")], None),
        (PAIRS, [1.0, 2.0, 3.0]),
        (PAIRS, [1, 2, 3.5]),
    ]
    prints = [check_examples(X, y).fingerprint() for X, y in changed]
    uses = {"query_prefix": "a", "document_prefix": "a", "weight": 2.0, "in_batch_negatives": False}
    for name, value in uses.items():
        prints.append(replace(EXAMPLES["rows"], **{name: value}).fingerprint())
    assert len(set(prints)) == len(prints)


# Known positives


@pytest.mark.parametrize("seed", range(10))
def test_known_positives_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    X, _ = random_examples(rng, "rows", n=int(rng.integers(2, 80)), n_texts=12)
    examples = check_examples(X)
    starts, found = examples.known_positives()
    assert starts.dtype == found.dtype == np.int64
    assert starts.shape == (len(examples.texts) + 1,)
    assert starts[0] == 0 and starts[-1] == len(found)
    for t, text in enumerate(examples.texts):
        expected = {row[1] for row in X if row[0] == text} | {row[0] for row in X if row[1] == text}
        got = found[starts[t] : starts[t + 1]].tolist()
        assert got == sorted(examples.texts.index(other) for other in expected)


def test_known_positives_leave_negatives_out():
    starts, found = check_examples([("a", "b", "c"), ("d", "b", "a")]).known_positives()
    # a: b; b: a and d; c: none; d: b
    assert starts.tolist() == [0, 1, 3, 3, 4]
    assert found.tolist() == [1, 0, 3, 1]


@pytest.mark.parametrize("kind", ["labels", "scores"])
def test_only_rows_have_known_positives(kind):
    starts, found = EXAMPLES[kind].known_positives()
    assert starts.tolist() == [0] * (len(EXAMPLES[kind].texts) + 1)
    assert found.shape == (0,) and found.dtype == np.int64


# Errors


NAN = float("nan")
SIX = ["a", "b", "c", "d", "e", "f"]
BAD_X = {
    "bare str": ("a text", None, TypeError, r"a bare str\. Wrap it: \[text\]"),
    "bytes": (b"a text", None, TypeError, r"got a bytes\. Decode and wrap it"),
    "bytes item": (["a", b"b"], [0, 1], TypeError, r"X\[1\] is a bytes\. Decode it"),
    "bytes in a row": ([("a", "b"), ("c", b"d")], None, TypeError, r"X\[1\]\[1\] is a bytes"),
    "bytes array": (np.array([[b"a", b"b", b"c"]]), None, TypeError, "Decode it"),
    "None": (None, None, TypeError, "array or column of texts; got None"),
    "number": (7, None, TypeError, "got an int"),
    "dict": ({"a": "b"}, None, TypeError, r"got a dict\. Pass its texts"),
    "set": ({"a", "b"}, None, TypeError, "It has no order"),
    "iterator": (iter(PAIRS), None, TypeError, "Make it a list first"),
    "int item": (["a", 7], [0, 1], TypeError, r"X\[1\] is an int"),
    "int array": (np.arange(6).reshape(2, 3), None, TypeError, "dtype int64"),
    "int in a row": ([("a", "b", "c"), ("d", 7, "e")], None, TypeError, r"X\[1\]\[1\] is an int"),
    "dict items": ([{"anchor": "a"}] * 2, None, TypeError, r"X\[0\] is a dict"),
    "labels in X": ([("a", 0), ("b", 1)], None, TypeError, r"X\[0\]\[1\] is an int\. .*as `y`"),
    "scores in X": ([("a", "b", 0.5)] * 2, None, TypeError, r"X\[0\]\[2\] is a float\. .*as `y`"),
    "empty": ([], None, ValueError, "at least 2 training examples; got 0"),
    "empty with y": ([], [], ValueError, "at least 2 training examples; got 0"),
    "empty array": (np.empty((0, 3), dtype=object), None, ValueError, "got 0"),
    "one row": ([("a", "b")], None, ValueError, "at least 2 training examples; got 1"),
    "one text": (["a"], [0], ValueError, "at least 2 training examples; got 1"),
    "3-D": (np.array([[["a"]]]), None, ValueError, "got 3 dimensions"),
    "no columns": (np.empty((2, 0), dtype=object), None, ValueError, "got 0 columns"),
    "nested column": ([["a"], ["b"]], [0, 1], ValueError, r"X\[0\] has 1\. Flatten nested lists"),
    "empty row": ([()] * 2, None, ValueError, r"X\[0\] has 0\."),
    "longer row": ([("a", "b"), ("c", "d", "e")], None, ValueError, r"2 texts, but X\[1\] has 3"),
    "shorter row": ([*ROWS, ("c", "d")], None, ValueError, r"3 texts, but X\[3\] has 2"),
    "text among rows": ([("a", "b"), "c"], None, TypeError, r"a tuple, but X\[1\] is a str"),
    "row among texts": (["c", ("a", "b")], None, TypeError, r"X\[1\] is a tuple"),
    "nested rows": ([(("a", "b"), "c")] * 2, None, TypeError, r"X\[0\]\[0\] is a tuple"),
    "None text": (["a", None, NAN], [0] * 3, ValueError, r"got 2, the first at X\[1\]\."),
    "empty text": (["a", "b", ""], [0] * 3, ValueError, r"got 1, the first at X\[2\]\."),
    "blank text": (["a", " \t\n\u3000", "b"], [0] * 3, ValueError, r"got 1, the first at X\[1\]\."),
    "empty member": ([("a", "b"), ("c", "")], None, ValueError, r"at X\[1\]\[1\]"),
    "None member": ([("a", "b"), (None, "c")], None, ValueError, r"at X\[1\]\[0\]"),
    "None negative": ([*ROWS, ("a", "b", None)], None, ValueError, r"at X\[3\]\[2\]"),
    "NaN negative": (
        [("a", "b", NAN), *ROWS],
        None,
        ValueError,
        r"got 1, the first at X\[0\]\[2\]",
    ),
    "blank in a scored pair": ([("a", "b"), ("c", " ")], [1, 2], ValueError, r"at X\[1\]\[1\]"),
    "first by row": ([("a", "b"), ("c", None), ("", "")], None, ValueError, r"got 3.*X\[1\]\[1\]"),
    "row of one text": ([*PAIRS, ("a", "a")], None, ValueError, r"in 1 row, the first X\[3\]"),
    "two of them": ([("a", "a"), ("a", "b"), ("c", "c")], None, ValueError, r"2 rows.*X\[0\]"),
    "twins only": ([("a", "a"), ("b", "b")], None, ValueError, r"equal in every row.*itself"),
    "negative = positive": (
        [*ROWS, ("a", "b", "b")],
        None,
        ValueError,
        r"\[3\]\[2\] equals the pos",
    ),
    "negative = anchor": (
        [("a", "b", "c", "a")] * 2,
        None,
        ValueError,
        r"\[0\]\[3\] equals the anc",
    ),
}


@pytest.mark.parametrize(("X", "y", "error", "message"), BAD_X.values(), ids=BAD_X)
def test_bad_examples(X, y, error, message):
    with pytest.raises(error, match=message) as caught:
        check_examples(X, y, owner="Owner")
    assert str(caught.value).startswith("The `X` parameter of `Owner` must ")


BAD_Y = {
    "texts without": (TEXTS, None, ValueError, "a class label for each text.*got None.*or pairs"),
    "rows with": (ROWS, [1, 2, 3], ValueError, "must be None for rows.*rows of 3 texts"),
    "too short": (TEXTS, LABELS[:3], ValueError, "as there are examples, 4; got 3"),
    "too long": (PAIRS, [*SCORES, 1.0], ValueError, "as there are examples, 3; got 4"),
    "bare str": (TEXTS, "card", TypeError, "got a bare str"),
    "bytes": (TEXTS, b"card", TypeError, "got a bytes"),
    "number": (TEXTS, 1, TypeError, "got an int"),
    "dict": (TEXTS, dict(zip(TEXTS, LABELS, strict=True)), TypeError, "got a dict"),
    "set": (TEXTS, set(LABELS), TypeError, "got a set"),
    "iterator": (TEXTS, iter(LABELS), TypeError, "Make it a list"),
    "2-D": (TEXTS, np.zeros((4, 2), dtype=int), ValueError, r"one dimension; .*shape \(4, 2\)"),
    "0-D": (TEXTS, np.array(1), ValueError, r"shape \(\)"),
    "None label": (TEXTS, ["a", None, "b", None], ValueError, r"got 2, the first at y\[1\]"),
    "NaN label": (TEXTS, ["a", "a", "b", NAN], ValueError, r"got 1, the first at y\[3\]"),
    "NaN in floats": (TEXTS, np.array([NAN, 0, 1, 1]), ValueError, r"the first at y\[0\]"),
    "NaN score": (PAIRS, [0.5, NAN, 1], ValueError, r"no missing.*the first at y\[1\]"),
    "None score": (PAIRS, [0.5, 1, None], ValueError, r"no missing.*the first at y\[2\]"),
    "inf score": (PAIRS, [0.5, float("inf"), -float("inf")], ValueError, r"got 2.*at y\[1\]"),
    "huge score": (PAIRS, [0, 1.5, 10**400], ValueError, r"finite numbers; got 1.*y\[2\]"),
    "equal scores": (PAIRS, [2.5] * 3, ValueError, r"all 3 are 2\.5.*Leave out `y`"),
    "labels on pairs": (PAIRS, list("abc"), TypeError, r"y\[0\] is a str.*go with single texts"),
    "whole numbers on pairs": (PAIRS, [0, 1, 2], TypeError, r"y\[0\] is an int.*dtype=float"),
    "bools on pairs": (PAIRS, [0.5, 1.5, True], TypeError, r"y\[2\] is a bool.*' '\.join\(row\)"),
    "digits on pairs": (PAIRS, [1, 2, "3"], TypeError, r"y\[2\] is a str"),
    "complex on pairs": (PAIRS, [1, 2, 3j], TypeError, r"y\[2\] is a complex"),
    "fraction": (TEXTS, [1.0, 1.0, 0.5, 0.5], ValueError, r"y\[2\] is 0\.5.*scores go with pairs"),
    "infinite label": (TEXTS, [1.0, 1.0, 0, float("inf")], ValueError, r"y\[3\] is inf"),
    "a Fraction": (TEXTS, [1, 1, 0, Fraction(10**400, 3)], TypeError, r"y\[3\] is a Fraction"),
    "tuple label": (TEXTS, [("a",)] * 4, TypeError, r"one label a text; y\[0\] is a tuple"),
    "bytes label": (TEXTS, np.array([b"a", b"a", b"b", b"b"]), TypeError, r"y\[0\] is a bytes"),
    "date": (TEXTS, np.arange(4).astype("M8[ns]"), TypeError, r"y\[0\] is a datetime64"),
    "decimal": (TEXTS, [decimal.Decimal(1)] * 4, TypeError, r"y\[0\] is a Decimal"),
    "mixed": (TEXTS, ["a", "a", 1, 1], TypeError, r"y\[0\] is a str, but y\[2\] is an int"),
    "mixed, number first": (TEXTS, [0, 0, 1, "1"], TypeError, r"an int, but y\[3\] is a str"),
    "one class": (TEXTS, ["card"] * 4, ValueError, r"at least 2 classes.*got 1, 'card'"),
    "one class of ints": (TEXTS, np.ones(4, int), ValueError, "at least 2 classes.*got 1, 1"),
    "class of one": (SIX, list("xxyzzw"), ValueError, r"got 2 of 4 classes.*'w' \(y\[5\]\)"),
    "all of one": (SIX, range(6), ValueError, r"got 6 of 6 classes.*such as 0 \(y\[0\]\)"),
    "class of one text": (
        ["a", "a", "b", "c"],
        [0, 0, 1, 1],
        ValueError,
        r"got 1 of 2.*0 \(y\[0\]",
    ),
}


@pytest.mark.parametrize(("X", "y", "error", "message"), BAD_Y.values(), ids=BAD_Y)
def test_bad_targets(X, y, error, message):
    with pytest.raises(error, match=message) as caught:
        check_examples(X, y, owner="Owner")
    assert str(caught.value).startswith("The `y` parameter of `Owner` must ")


def test_missing_of_frames_is_found():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    for frame in (
        pd.DataFrame({"a": ["x", "y"], "b": ["p", "q"], "c": ["s", None]}),
        pd.DataFrame({"a": ["x", "y"], "b": ["p", "q"], "c": ["s", pd.NA]}, dtype="string"),
        pl.DataFrame({"a": ["x", "y"], "b": ["p", "q"], "c": ["s", None]}),
        np.ma.masked_array([["x", "p", "s"], ["y", "q", "t"]], [[0, 0, 0], [0, 0, 1]], object),
    ):
        with pytest.raises(ValueError, match=r"the first at X\[1\]\[2\]"):
            check_examples(frame)
    for y in (
        pd.Series([1, 1, 0, None], dtype="Int64"),
        pl.Series(["a", "a", "b", None]),
        np.array(["2020", "2020", "2021", "NaT"], dtype="M8[D]"),
        np.ma.masked_array([1, 1, 0, 0], [0, 0, 0, 1]),
    ):
        with pytest.raises(ValueError, match=r"got 1, the first at y\[3\]"):
            check_examples(TEXTS, y)


def test_unknown_missing_policy_is_refused():
    with pytest.raises(ValueError, match="`missing` parameter of `NVEmbedVectorizer` must be one"):
        check_examples(PAIRS, missing="drop")


@pytest.mark.parametrize("missing", ["empty", "zero", "nan"])
def test_no_policy_lets_missing_texts_be_trained_on(missing):
    assert rows_of(check_examples(PAIRS, missing=missing)) == PAIRS
    with pytest.raises(ValueError, match=f"missing='{missing}' is for `transform` only"):
        check_examples([*PAIRS, ("a", None)], missing=missing)


def test_errors_never_quote_texts():
    s = SECRET
    for X, y in [
        (s, None),
        ([s, 7], [0, 1]),
        ([s, None], [0, 1]),
        ([s, ""], [0, 1]),
        ([s, s + "!"], None),
        ([s, s + "!"], [0.5, 1.5]),
        ([s, s + "!"], [0, 0]),
        ([s, s + "!"], [0, 1]),
        ([[s], [s]], None),
        ([(s, s), (s, s)], None),
        ([(s, "a", s), (s, "b", "c")], None),
        ([(s, "a"), (s, "b", "c")], None),
        ([(s, "a"), s], None),
        ([(s, "a"), (s, "b")], [s, s]),
        ([(s, "a", "b"), (s, "b", "c")], [s, s]),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            check_examples(X, y)
        assert s not in str(caught.value)


def test_a_long_label_is_not_quoted():
    with pytest.raises(ValueError, match=r"such as a str of 500 characters \(y\[0\]\)"):
        check_examples(["a", "b", "c"], ["x" * 500, "b", "b"])


# Tasks


def read(task, index, owner="NVEmbedVectorizer", **parameters):
    """Read a task as `fit_tasks` does."""
    trainer = ContrastiveTrainer(**parameters)
    return read_task(task, trainer, template="Instruct: {instruction}\n", owner=owner, index=index)


def test_task_is_read_and_frozen():
    task = TrainingTask(TEXTS, LABELS, instruction="Banking77Classification", weight=np.float32(2))
    examples, plain = read(task, 0), check_examples(TEXTS, LABELS)
    assert (examples.texts, examples.weight) == (plain.texts, 2.0)
    np.testing.assert_array_equal(examples.labels, plain.labels)
    assert examples.query_prefix.startswith("Instruct: Given a online banking query")
    assert examples.fingerprint() != plain.fingerprint()
    rows = read(TrainingTask(ROWS, in_batch_negatives=False), 0)
    assert (rows.kind, rows.loss, rows.in_batch_negatives) == ("rows", "infonce", False)
    assert not read(TrainingTask(ROWS), 0, in_batch_negatives=False).in_batch_negatives
    scores = read(TrainingTask(PAIRS, y=np.array(SCORES)), 0)
    assert (scores.kind, scores.loss, scores.in_batch_negatives) == ("scores", "cosent", True)
    with pytest.raises(FrozenInstanceError):
        task.weight = 1.0
    with pytest.raises(TypeError, match="positional"):
        TrainingTask(TEXTS, LABELS, "an instruction")


def test_tasks_of_arrays_compare_by_identity():
    task = TrainingTask(np.array(TEXTS), np.array(LABELS))
    assert task == task
    assert task != TrainingTask(np.array(TEXTS), np.array(LABELS))
    assert len({task, task}) == 1


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("weight", 0, ValueError, r"a finite number in \(0, inf\); got 0"),
        ("weight", -1.5, ValueError, r"got -1\.5"),
        ("weight", NAN, ValueError, "got nan"),
        ("weight", float("inf"), ValueError, "got inf"),
        ("weight", True, TypeError, "got True"),
        ("weight", "2", TypeError, "got '2'"),
        ("weight", None, TypeError, "got None"),
        ("in_batch_negatives", 2, TypeError, "True or False; got 2"),
        ("in_batch_negatives", "no", TypeError, "True or False; got 'no'"),
        ("instruction", 7, TypeError, "a str or None; got 7"),
        ("document_instruction", ["a"], TypeError, "a str or None; got a list"),
    ],
)
def test_bad_fields_of_a_task(field, value, error, message):
    task = TrainingTask(PAIRS, **{field: value})
    with pytest.raises(error, match=message) as caught:
        read(task, 2)
    assert str(caught.value).startswith(f"The `{field}` parameter of `tasks[2]` must be ")
    named = replace(task, name="nli")
    with pytest.raises(error) as caught:
        read(named, 2)
    assert str(caught.value).startswith(f"The `{field}` parameter of `tasks[2] (nli)` must be ")


def test_bad_name_of_a_task():
    for name, error in ((7, TypeError), ("", ValueError)):
        with pytest.raises(
            error, match=r"`name` parameter of `tasks\[1\]` must be a non-empty str"
        ):
            read(TrainingTask(PAIRS, name=name), 1)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([], None, r"`examples` parameter of `tasks\[2\]` must hold at least 2.*got 0"),
        ([("a", "b"), ("c", "")], None, r"`examples` parameter of.*at examples\[1\]\[1\]"),
        ([("a", "b"), ("c", "c")], None, r"`examples` parameter of.*first examples\[1\]"),
        (TEXTS, None, r"`y` parameter of `tasks\[2\]`.*as `examples`"),
        (TEXTS, [0, 0, 0, 1], r"`y` parameter of `tasks\[2\]`.*1 of 2 classes"),
        (PAIRS, [1.0, 1.0, 1.0], r"`y` parameter of `tasks\[2\]`.*all 3 are 1"),
    ],
)
def test_bad_examples_of_a_task(X, y, message):
    with pytest.raises(ValueError, match=f"^The {message}"):
        read(TrainingTask(X, y), 2)
    with pytest.raises(ValueError, match=r"^The `\w+` parameter of `tasks\[2\] \(nli\)` must"):
        read(TrainingTask(X, y, name="nli"), 2)


def test_what_is_no_task():
    with pytest.raises(
        TypeError,
        match=r"`tasks` parameter of `Owner` must hold.*; tasks\[1\] is a tuple\. Wrap it: Tr",
    ):
        read((TEXTS, LABELS), 1, owner="Owner")


# Cost


def measure_peak(X, y):
    """Bytes that reading takes at its peak, beyond its input."""
    tracemalloc.start()
    try:
        examples = check_examples(X, y)
        return tracemalloc.get_traced_memory()[1], examples
    finally:
        tracemalloc.stop()


def test_memory_is_linear_in_labelled_texts():
    # Two classes of 10,000 hold 100 million pairs: even one byte for each would be 100 MB.
    X = [f"text {i}" for i in range(20_000)]
    y = [i % 2 for i in range(20_000)]
    peak, examples = measure_peak(X, y)
    tenth, _ = measure_peak(X[:2_000], y[:2_000])
    assert len(examples) == 20_000
    assert peak < 20_000 * 250  # bytes for each example: lists, a dict's entry, two int64
    assert peak < 15 * tenth


def test_memory_of_known_positives_is_linear_in_rows():
    # One anchor with 5,000 positives: its positives are not each other's.
    examples = check_examples([("hub", f"p{i}") for i in range(5_000)])
    tracemalloc.start()
    try:
        _, found = examples.known_positives()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 10_000
    assert peak < 5_000 * 400
