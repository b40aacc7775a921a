"""Examples in containers of every kind."""

import enum
from collections import namedtuple

import numpy as np
import pytest
from columns import object_array
from given_examples import LABELS, PAIRS, ROWS, SCORES, TEXTS, assert_sound, labels_of, rows_of

from skembed.training.examples import check_examples

Row = namedtuple("Row", ["anchor", "positive", "negative"])


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        object_array,
        np.array,
        lambda texts: np.array(texts, dtype=np.dtypes.StringDType()),
        lambda texts: np.array(texts).reshape(-1, 1),
        lambda texts: [np.str_(text) for text in texts],
    ],
    ids=["list", "tuple", "object", "U", "StringDType", "column", "str_ items"],
)
def test_single_texts_of_any_container(convert):
    examples = check_examples(convert(TEXTS), LABELS)
    assert_sound(examples)
    assert rows_of(examples) == [(text,) for text in TEXTS]


@pytest.mark.parametrize("rows", [PAIRS, ROWS], ids=["pairs", "triplets"])
@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        object_array,
        np.array,
        lambda rows: [list(row) for row in rows],
        lambda rows: [list(row) if i % 2 else row for i, row in enumerate(rows)],
        lambda rows: np.array(rows, dtype=object),
        lambda rows: np.array(rows, dtype=np.dtypes.StringDType()),
        lambda rows: np.asfortranarray(np.array(rows, dtype=object)),
        lambda rows: np.ma.masked_array(np.array(rows, dtype=object)),
    ],
    ids=[
        *("tuples", "tuple", "array of tuples", "U", "lists", "mixed", "object"),
        *("StringDType", "Fortran", "masked"),
    ],
)
def test_rows_of_any_container(convert, rows):
    examples = check_examples(convert(rows))
    assert_sound(examples)
    assert rows_of(examples) == rows


def test_named_tuples_and_wide_rows():
    assert rows_of(check_examples([Row(*row) for row in ROWS])) == ROWS
    wide = [tuple(f"{i} {j}" for j in range(9)) for i in range(4)]
    assert rows_of(check_examples(wide)) == wide
    assert rows_of(check_examples(np.array(wide))) == wide


def test_matrix_of_rows():
    with pytest.warns(PendingDeprecationWarning):  # numpy's own, for as long as it has np.matrix
        matrix = np.matrix(ROWS)
    assert rows_of(check_examples(matrix)) == ROWS


@pytest.mark.parametrize("rows", [PAIRS, ROWS], ids=["pairs", "triplets"])
@pytest.mark.parametrize("dtype", ["object", "string", "category", "str"])
def test_pandas_frames(rows, dtype):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(rows, index=[7, 7, -1], columns=["text"] * len(rows[0])).astype(dtype)
    assert rows_of(check_examples(frame)) == rows
    assert rows_of(check_examples(pd.Series(rows, index=[7, 7, -1]))) == rows


@pytest.mark.parametrize("rows", [PAIRS, ROWS], ids=["pairs", "triplets"])
def test_polars_frames(rows):
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame(rows, orient="row")
    assert rows_of(check_examples(frame)) == rows
    assert rows_of(check_examples(pl.Series([list(row) for row in rows]))) == rows


LABEL_VALUES = [
    LABELS,
    [3, 3, -1, -1],
    [True, True, False, False],
    [2.0, 2.0, 0.0, 0.0],
    ["1\0", "1\0", "1", "1"],
    [1, 1, False, False],
]


@pytest.mark.parametrize("y", LABEL_VALUES, ids=repr)
@pytest.mark.parametrize(
    "convert", [list, tuple, object_array, np.array], ids=["list", "tuple", "object", "array"]
)
def test_labels_of_any_container(convert, y):
    if convert is np.array and "1\0" in y:
        convert = object_array  # numpy's own str would drop the NUL before we see it
    examples = check_examples(TEXTS, convert(y))
    assert_sound(examples)
    assert labels_of(examples) == y
    assert examples.classes.tolist() == sorted(set(y))


def test_classes_keep_their_type():
    found = [
        check_examples(TEXTS, y).classes.dtype
        for y in (LABELS, [3, 3, -1, -1], [True, True, False, False], [2.0, 2.0, 0.0, 0.0])
    ]
    assert found == [object, np.int64, np.bool_, np.float64]


def test_labels_of_frames():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    ints = [1, 1, 0, 0]
    for y in (
        pd.Series(LABELS, index=[9, 9, 1, 0]),
        pd.Series(LABELS, dtype="category"),
        pd.Series(LABELS, dtype="string"),
        pd.Index(LABELS),
        pl.Series(LABELS),
        pl.Series(LABELS, dtype=pl.Categorical),
    ):
        assert labels_of(check_examples(TEXTS, y)) == LABELS
    for y in (pd.Series(ints, dtype="Int64"), pl.Series(ints), np.array(ints, dtype=np.uint8)):
        assert labels_of(check_examples(TEXTS, y)) == ints


def test_labels_of_unusual_items():
    class Kind(str, enum.Enum):
        CARD = "card"
        ACCOUNT = "account"

    class Number(enum.IntEnum):
        ONE = 1
        TWO = 2

    texts = [Kind.CARD, Kind.CARD, Kind.ACCOUNT, Kind.ACCOUNT]
    assert labels_of(check_examples(TEXTS, texts)) == LABELS
    assert labels_of(check_examples(TEXTS, [np.str_(label) for label in LABELS])) == LABELS
    numbers = [Number.TWO, np.int8(2), np.float32(1), Number.ONE]
    assert labels_of(check_examples(TEXTS, numbers)) == [2, 2, 1, 1]
    flags = [np.True_, True, np.False_, False]
    assert check_examples(TEXTS, flags).classes.dtype == np.bool_


def test_long_label_does_not_widen_the_others():
    long = "x" * 1000
    examples = check_examples(TEXTS, [long, long, "a", "a"])
    assert examples.classes.dtype == object
    assert labels_of(examples) == [long, long, "a", "a"]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        object_array,
        lambda y: np.array(y, dtype=np.float32),
        lambda y: [np.float16(score) for score in y],
    ],
    ids=["list", "tuple", "object", "float32", "float16 items"],
)
def test_scores_of_any_container(convert):
    assert check_examples(PAIRS, convert(SCORES)).scores.tolist() == SCORES


def test_scores_of_frames_and_numbers_beside_floats():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    for y in (pd.Series(SCORES, index=[5, 5, 0]), pl.Series(SCORES)):
        assert check_examples(PAIRS, y).scores.tolist() == SCORES
    assert check_examples(PAIRS, [0, 3, 5.5]).scores.tolist() == [0.0, 3.0, 5.5]
    whole = np.array([0, 3, 5], dtype=np.float32)
    assert check_examples(PAIRS, whole).scores.tolist() == [0.0, 3.0, 5.0]
    assert check_examples(PAIRS, pd.Series([0.0, 3.0, 5.0])).scores.tolist() == [0.0, 3.0, 5.0]
