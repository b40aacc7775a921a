"""Texts of every container, one column or two."""

import enum
import random
from collections import UserList, deque, namedtuple

import numpy as np
import pytest
from columns import assert_columns, object_array, run
from scipy import sparse

from skembed._inputs import MISSING_POLICIES, check_texts, replace_surrogates

TEXTS = ["a cat", "", "ein Käse", "日本語 🎉", "nul \0 inside"]
OTHERS = ["b", "d", "ü", "f", "g"]
SECRET = "the patient's name"
Row = namedtuple("Row", ["anchor", "positive"])


# One column


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        UserList,
        deque,
        object_array,
        lambda texts: np.array(texts),
        lambda texts: np.array(texts, dtype=object).reshape(-1, 1),
        lambda texts: np.array(texts, dtype=np.dtypes.StringDType()),
        lambda texts: np.array(texts, dtype=np.dtypes.StringDType()).reshape(-1, 1),
        lambda texts: np.ma.masked_array(np.array(texts, dtype=object)),
        lambda texts: [np.str_(text) for text in texts],
    ],
    ids=[
        *("list", "tuple", "UserList", "deque", "object", "U", "column"),
        *("StringDType", "StringDType column", "masked", "str_ items"),
    ],
)
def test_one_column_of_any_plain_container(convert):
    assert_columns(run(convert(TEXTS)), TEXTS)


def test_matrix_is_a_column():
    with pytest.warns(PendingDeprecationWarning):  # numpy's own, for as long as it has np.matrix
        column = np.matrix([["a"], ["b"]])
    assert_columns(run(column), ["a", "b"])


def test_strided_and_fortran_arrays_keep_row_order():
    grid = np.array([["a", "x", "b"], ["c", "y", "d"]], dtype=object)
    assert_columns(run(grid[:, ::2]), ["a", "c"], ["b", "d"])
    assert_columns(run(np.asfortranarray(grid)[::-1, 0]), ["c", "a"])


@pytest.mark.parametrize("dtype", ["object", "string", "category", "str"])
def test_pandas_series_ignores_its_index(dtype):
    pd = pytest.importorskip("pandas")
    index = [7, 7, -1, 0, 3]
    series = pd.Series(TEXTS, index=index, dtype=dtype, name="text")
    assert_columns(run(series), TEXTS)
    assert_columns(run(series.to_frame()), TEXTS)
    assert_columns(run(pd.Index(series)), TEXTS)


def test_pandas_arrow_strings():
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    series = pd.Series([*TEXTS, None], dtype="string[pyarrow]")
    result = run(series, missing="empty")
    assert result.columns == [[*TEXTS, ""]]
    assert result.missing[0].tolist() == [False] * 5 + [True]


def test_pandas_frame_with_repeated_column_names():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(list(zip(TEXTS, OTHERS, strict=True)), columns=["text", "text"])
    assert_columns(run(frame), TEXTS, OTHERS)


@pytest.mark.parametrize("dtype", ["String", "Categorical", "Object"])
def test_polars_series_and_frames(dtype):
    pl = pytest.importorskip("polars")
    series = pl.Series("a", TEXTS, dtype=getattr(pl, dtype))
    assert_columns(run(series), TEXTS)
    assert_columns(run(series.to_frame()), TEXTS)
    assert_columns(run(pl.DataFrame({"a": series, "b": OTHERS})), TEXTS, OTHERS)


def test_polars_lists_of_two_are_pairs():
    pl = pytest.importorskip("polars")
    assert_columns(run(pl.Series([["a", "b"], ["c", "d"]])), ["a", "c"], ["b", "d"])


# Two columns


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda rows: [list(row) for row in rows],
        lambda rows: [row if i % 2 else list(row) for i, row in enumerate(rows)],
        lambda rows: [Row(*row) for row in rows],
        np.array,
        lambda rows: np.array(rows, dtype=object),
        lambda rows: np.array(rows, dtype=np.dtypes.StringDType()),
        object_array,
    ],
    ids=[
        *("list", "tuple", "lists", "mixed rows", "namedtuples", "U", "object"),
        *("StringDType", "array of tuples"),
    ],
)
def test_pairs(convert):
    assert_columns(run(convert(list(zip(TEXTS, OTHERS, strict=True)))), TEXTS, OTHERS)


def test_any_number_of_columns():
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    rows = [("a", "b", "c"), ("d", "e", "f")]
    names = ["x", "y", "z"]
    for X in (rows, np.array(rows), pd.DataFrame(rows, columns=names)):
        assert_columns(run(X), ["a", "d"], ["b", "e"], ["c", "f"])
    frame = pl.DataFrame(rows, schema=names, orient="row")
    assert_columns(run(frame), ["a", "d"], ["b", "e"], ["c", "f"])
    assert_columns(run(np.empty((0, 5))), [], [], [], [], [])


def test_two_texts_are_not_a_pair():
    assert_columns(run(["ab", "cd"]), ["ab", "cd"])
    assert_columns(run(("ab", "cd")), ["ab", "cd"])


# Empty input


@pytest.mark.parametrize(
    "X", [[], (), np.array([]), np.empty((0, 1)), np.empty(0, dtype=object), np.empty(0, "U3")]
)
def test_empty_input_is_one_empty_column(X):
    assert_columns(run(X), [])


def test_empty_input_of_two_columns():
    assert_columns(run(np.empty((0, 2))), [], [])
    pd = pytest.importorskip("pandas")
    assert_columns(run(pd.DataFrame({"a": [], "b": []})), [], [])
    assert_columns(run(pd.Series([], dtype=float)), [])
    pl = pytest.importorskip("polars")
    assert_columns(run(pl.Series([])), [])
    assert_columns(run(pl.DataFrame({"a": [], "b": []})), [], [])


# Ownership, surrogates


def test_input_is_neither_changed_nor_shared():
    texts = ["a\ud800", None, "b"]
    result = run(texts, missing="zero")
    assert texts == ["a\ud800", None, "b"]
    result.columns[0][2] = "changed"
    assert texts[2] == "b"
    array = object_array(texts)
    run(array, missing="zero")
    assert array[1] is None


def test_strings_are_shared_not_copied():
    text = "x" * 1000
    assert run([text]).columns[0][0] is text


def test_str_subclasses_become_their_content():
    class Label(str, enum.Enum):
        CAT = "a cat"

    assert_columns(run([Label.CAT, "dog"]), ["a cat", "dog"])


def test_lone_surrogates_become_the_replacement_character():
    low, high = "\udce9", "\ud83d"
    assert_columns(run([f"caf{low}", f"{high} end", high, "ok"]), ["caf�", "� end", "�", "ok"])
    assert_columns(run([("a" + low, "b"), ("c", high)]), ["a�", "c"], ["b", "�"])


def test_surrogate_pairs_are_joined_and_a_leading_bom_is_kept():
    assert replace_surrogates("\ud83c\udf89\ud83c") == "🎉�"
    assert replace_surrogates("\ufeffa\ud800") == "\ufeffa�"
    clean = "日本語 🎉"
    assert replace_surrogates(clean) is clean


def test_replace_surrogates_against_a_plain_definition():
    def by_hand(text):
        out, i = [], 0
        while i < len(text):
            code = ord(text[i])
            following = ord(text[i + 1]) if i + 1 < len(text) else 0
            if 0xD800 <= code < 0xDC00 and 0xDC00 <= following < 0xE000:
                out.append(chr(0x10000 + ((code - 0xD800) << 10) + following - 0xDC00))
                i += 1
            else:
                out.append("�" if 0xD800 <= code < 0xE000 else text[i])
            i += 1
        return "".join(out)

    rng = random.Random(0)
    alphabet = ["a", "é", "語", "🎉", "\ud800", "\udbff", "\udc00", "\udfff", "\ufeff", "\0"]
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(8)))
        assert replace_surrogates(text) == by_hand(text)


# Missing texts


MISSING = [
    None,
    float("nan"),
    np.nan,
    np.float32("nan"),
    np.datetime64("NaT"),
    np.timedelta64("NaT"),
    np.ma.masked,
]


@pytest.mark.parametrize("policy", MISSING_POLICIES[1:])
@pytest.mark.parametrize("item", MISSING, ids=repr)
def test_missing_items_are_marked_and_emptied(item, policy):
    result = run(["a", item, "", item], missing=policy)
    assert result.columns == [["a", "", "", ""]]
    assert result.missing[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("item", MISSING, ids=repr)
def test_missing_items_are_refused_by_default(item):
    with pytest.raises(ValueError, match=r"got 2 missing, the first at X\[1\]\.") as info:
        run([SECRET, item, "b", item])
    for policy in ("'empty'", "'zero'", "'nan'"):
        assert f"missing={policy}" in str(info.value)
    assert SECRET not in str(info.value)


def test_pandas_missing_items():
    pd = pytest.importorskip("pandas")
    items = ["a", pd.NA, pd.NaT, None]
    expected = [False, True, True, True]
    assert run(items, missing="nan").missing[0].tolist() == expected
    for dtype in ("object", "string", "category", "str"):
        series = pd.Series(["a", None, None, None], index=list("wxyz"), dtype=dtype)
        result = run(series, missing="nan")
        assert result.columns == [["a", "", "", ""]]
        assert result.missing[0].tolist() == expected
        with pytest.raises(ValueError, match=r"got 3 missing, the first at X\[1\]"):
            run(series)


def test_polars_missing_items():
    pl = pytest.importorskip("polars")
    result = run(pl.Series([None, "a"]), missing="empty")
    assert result.columns == [["", "a"]]
    assert result.missing[0].tolist() == [True, False]
    assert run(pl.Series([None, None]), missing="empty").missing[0].all()


def test_numpy_missing_items():
    strings = np.array(["a", np.nan], dtype=np.dtypes.StringDType(na_object=np.nan))
    assert run(strings, missing="nan").missing[0].tolist() == [False, True]
    masked = np.ma.masked_array(np.array(["a", SECRET]), mask=[False, True])
    result = run(masked, missing="nan")
    assert result.columns == [["a", ""]]
    assert result.missing[0].tolist() == [False, True]
    assert run(np.full(3, np.nan), missing="zero").missing[0].all()


def test_missing_items_in_pairs():
    rows = [("a", "b"), ("c", None), (None, "d"), (None, None)]
    result = run(rows, missing="zero")
    assert result.columns == [["a", "c", "", ""], ["b", "", "d", ""]]
    assert [mask.tolist() for mask in result.missing] == [
        [False, False, True, True],
        [False, True, False, True],
    ]
    with pytest.raises(ValueError, match=r"got 4 missing, the first at X\[1\]\[1\]"):
        run(rows)


def test_a_wrong_type_is_refused_under_every_policy():
    for policy in MISSING_POLICIES:
        with pytest.raises(TypeError, match=r"X\[2\] is a float"):
            run(["a", None, 1.5], missing=policy)


def test_unknown_policy():
    with pytest.raises(ValueError, match=r"`missing` .*'nan'; got 'zeros'\. Did you mean 'zero'\?"):
        run(["a"], missing="zeros")
    with pytest.raises(TypeError, match="`missing` parameter of `Owner`"):
        run(["a"], missing=None)


# Wrong containers


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (SECRET, r"got a bare str\. Wrap it: \[text\]\."),
        (np.str_(SECRET), r"got a bare str"),
        (b"abc", r"got a bytes\. Decode and wrap it"),
        (bytearray(b"abc"), r"got a bytearray\. Decode"),
        (memoryview(b"abc"), r"got a memoryview\. Decode"),
        (None, r"got None\."),
        (3, r"got an int\."),
        (2.5, r"got a float\."),
        ({"a": SECRET}, r"got a dict\. Pass its texts: list\(X\.values\(\)\)"),
        ({SECRET}, r"got a set\. It has no order"),
        (frozenset({SECRET}), r"got a frozenset\. It has no order"),
        ((text for text in [SECRET]), r"got a generator\. Make it a list first: list\(X\)"),
        (iter([SECRET]), r"got a list_iterator\. Make it a list first"),
        (map(str, [1]), r"got a map\. Make it a list first"),
        ({"a": SECRET}.values(), r"got a dict_values\. Make it a list first"),
        (sparse.csr_matrix(np.eye(2)), r"got a csr_matrix\. .*not a sparse matrix"),
        (sparse.csr_array(np.eye(2)), r"got a csr_array\. .*not a sparse matrix"),
        (object(), r"got an object\. Pass the raw texts as a list"),
        (np.arange(3), r"must be an array of str; got an array of dtype int64"),
        (np.ones((3, 2)), r"got an array of dtype float64"),
        (np.array([np.nan, 1.0]), r"got an array of dtype float64"),
        (np.array([True]), r"got an array of dtype bool"),
        (np.array([b"abc"]), r"got an array of dtype \|S3\. Decode it: np\.char\.decode"),
        (np.array(["2024-01-01"], dtype="M8[D]"), r"dtype datetime64\[D\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_wrong_containers(X, message):
    with pytest.raises(TypeError, match=message) as info:
        run(X)
    assert str(info.value).startswith("The `X` parameter of `Owner` must be ")
    assert SECRET not in str(info.value)


def test_a_generator_is_not_consumed():
    generator = iter(["a", "b"])
    with pytest.raises(TypeError):
        run(generator)
    assert next(generator) == "a"


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.array(SECRET), r"got 0 dimensions, shape \(\)"),
        (np.full((2, 2, 2), SECRET), r"got 3 dimensions, shape \(2, 2, 2\)"),
        (np.empty((2, 0), dtype=object), r"got 0 columns"),
    ],
)
def test_wrong_array_shapes(X, message):
    with pytest.raises(ValueError, match=message) as info:
        run(X)
    assert SECRET not in str(info.value)


def test_wrong_frames():
    pd = pytest.importorskip("pandas")
    pl = pytest.importorskip("polars")
    for frame_type in (pd.DataFrame, pl.DataFrame):
        with pytest.raises(ValueError, match="got 0 columns"):
            run(frame_type())
        with pytest.raises(TypeError, match=r"X\[0\]\[1\] is an int"):
            run(frame_type({"a": ["x", "y"], "b": [2, 3]}))
    with pytest.raises(TypeError, match=r"got a LazyFrame\. Collect it first"):
        run(pl.LazyFrame({"a": ["x"]}))
    with pytest.raises(TypeError, match=r"X\[0\] is an int"):
        run(pd.Series([1, 2]))
    with pytest.raises(TypeError, match=r"X\[0\] is an int"):
        run(pd.Series([1, 2], dtype="category"))


# Wrong items


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, r"X\[1\] is an int\. Convert it"),
        (1.5, r"X\[1\] is a float"),
        (True, r"X\[1\] is a bool"),
        (float("inf"), r"X\[1\] is a float"),
        (b"abc", r"X\[1\] is a bytes\. Decode it"),
        ({"text": SECRET}, r"X\[1\] is a dict"),
        (np.array([SECRET]), r"X\[1\] is an ndarray"),
        ((SECRET, "b"), r"X\[1\] is a tuple\. Give either texts or pairs"),
        ([SECRET], r"X\[1\] is a list\. Give either texts or pairs"),
    ],
    ids=repr,
)
def test_wrong_items(item, message):
    with pytest.raises(TypeError, match=message) as info:
        run([SECRET, item])
    assert SECRET not in str(info.value)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ([(SECRET, "b"), SECRET], TypeError, r"X\[0\] is a tuple, but X\[1\] is a str"),
        ([(SECRET, "b"), None], TypeError, r"X\[0\] is a tuple, but X\[1\] is None"),
        ([(SECRET, "b"), ("c",)], ValueError, r"X\[1\] has 1\."),
        ([[SECRET], ["b"]], ValueError, r"a pair has two texts; X\[0\] has 1\. Flatten"),
        ([[]], ValueError, r"X\[0\] has 0"),
        ([(SECRET, ["b"])], TypeError, r"X\[0\]\[1\] is a list"),
        ([("a", "b"), (SECRET, 7)], TypeError, r"X\[1\]\[1\] is an int"),
        ([(b"a", "b")], TypeError, r"X\[0\]\[0\] is a bytes"),
    ],
)
def test_wrong_pairs(X, error, message):
    with pytest.raises(error, match=message) as info:
        run(X)
    assert SECRET not in str(info.value)


def test_name_and_owner_are_those_given():
    with pytest.raises(TypeError, match=r"^The `queries` parameter of `Retriever` .*queries\[0\]"):
        check_texts([1], owner="Retriever", name="queries")
