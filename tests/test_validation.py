"""Checks of parameters, and optional imports."""

import subprocess
import sys

import numpy as np
import pytest
from columns import assert_columns, run

from skembed._validation import (
    check_bool,
    check_choice,
    check_int,
    check_path,
    check_real,
    check_seed,
    check_string,
    import_optional,
    list_items,
    parameter_error,
)

# Parameters


def test_check_choice():
    allowed = ["latent", "mean", None, 1, False]
    for value in allowed:
        assert check_choice(value, name="pooling", owner="Owner", allowed=allowed) is value
    assert type(check_choice(np.str_("mean"), name="p", owner="O", allowed=allowed)) is str
    with pytest.raises(
        ValueError,
        match=r"^The `pooling` parameter of `Owner` must be one of 'latent', 'mean', None, 1, "
        r"False; got 'Laten'\. Did you mean 'latent'\?$",
    ):
        check_choice("Laten", name="pooling", owner="Owner", allowed=allowed)
    with pytest.raises(ValueError, match=r"got 'xyz'\.$"):
        check_choice("xyz", name="pooling", owner="Owner", allowed=allowed)
    with pytest.raises(ValueError, match="got a str of 500 characters"):
        check_choice("x" * 500, name="pooling", owner="Owner", allowed=allowed)
    with pytest.raises(ValueError, match=r"got True"):
        check_choice(True, name="pooling", owner="Owner", allowed=allowed)


@pytest.mark.parametrize("value", [None, 3, ["mean"], np.array(["mean", "eos"]), True])
def test_check_choice_of_another_type(value):
    with pytest.raises(TypeError, match="must be one of 'mean', 'eos'; got "):
        check_choice(value, name="pooling", owner="Owner", allowed=["mean", "eos"])


@pytest.mark.parametrize("value", [1, 42, np.int64(5), np.uint8(7), np.array(3)])
def test_check_int_accepts(value):
    result = check_int(value, name="top_k", owner="Retriever", low=1, high=42)
    assert result == value
    assert type(result) is int


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        ({"low": 1, "high": 42}, 0, r"must be an int in \[1, 42\]; got 0\.$"),
        ({"low": 1, "high": 42}, 43, r"must be an int in \[1, 42\]; got 43\.$"),
        ({"low": 1}, np.int64(-1), r"must be an int in \[1, inf\); got -1\.$"),
        ({"high": 0}, 1, r"must be an int in \(-inf, 0\]; got 1\.$"),
        ({"low": 1, "allow_none": True}, 0, r"must be an int in \[1, inf\) or None; got 0\.$"),
        ({"low": 1}, 2**70, r"must be an int in \[1, 9223372036854775807\]; got 1180591620717"),
    ],
)
def test_check_int_range(bounds, value, message):
    with pytest.raises(ValueError, match=r"^The `top_k` parameter of `Retriever` " + message):
        check_int(value, name="top_k", owner="Retriever", **bounds)


def test_an_int_that_str_refuses_is_described():
    with pytest.raises(ValueError, match=r"must be an int in \[1, 5\]; got an int of 16610 bits"):
        check_int(10**5000, name="top_k", owner="Retriever", low=1, high=5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((True, "True"), (np.True_, "True"), (1.0, "1.0"), (np.float32(1), "1.0")),
        *(("1", "'1'"), (None, "None"), ([1], "a list")),
    ],
)
def test_check_int_type(value, shown):
    with pytest.raises(TypeError) as info:
        check_int(value, name="top_k", owner="Retriever")
    assert str(info.value) == f"The `top_k` parameter of `Retriever` must be an int; got {shown}."


def test_none_passes_only_where_allowed():
    kwargs = {"name": "p", "owner": "O"}
    assert check_int(None, allow_none=True, low=1, **kwargs) is None
    assert check_real(None, allow_none=True, low=1, **kwargs) is None
    assert check_string(None, allow_none=True, **kwargs) is None
    for check in (check_int, check_real, check_string, check_bool):
        with pytest.raises(TypeError, match="got None"):
            check(None, **kwargs)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.5), np.int8(1), np.array(0.5)])
def test_check_real_accepts(value):
    result = check_real(value, name="p", owner="O", low=0, high=1)
    assert result == value
    assert type(result) is float


@pytest.mark.parametrize(
    ("inclusive", "accepted", "interval"),
    [
        ("both", {0, 1}, r"\[0, 1\]"),
        ("left", {0}, r"\[0, 1\)"),
        ("right", {1}, r"\(0, 1\]"),
        ("neither", set(), r"\(0, 1\)"),
    ],
)
def test_check_real_bounds(inclusive, accepted, interval):
    kwargs = {"name": "p", "owner": "O", "low": 0, "high": 1, "inclusive": inclusive}
    assert check_real(0.5, **kwargs) == 0.5
    for value in (0, 1, -0.1, 1.1):
        if value in accepted:
            assert check_real(value, **kwargs) == value
        else:
            with pytest.raises(ValueError, match=f"must be a finite number in {interval}; got"):
                check_real(value, **kwargs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan"), 10**400])
def test_check_real_must_be_finite(value):
    with pytest.raises(ValueError, match="must be a finite number; got"):
        check_real(value, name="p", owner="O")


@pytest.mark.parametrize("value", [True, np.False_, "1", 1j, [1.0], np.array([1.0, 2.0])])
def test_check_real_type(value):
    with pytest.raises(TypeError, match="must be a finite number; got"):
        check_real(value, name="p", owner="O")


def test_check_bool():
    for value in (True, False, np.True_, np.False_, 0, 1, np.int64(1), np.array(True)):
        result = check_bool(value, name="normalize", owner="O")
        assert type(result) is bool
        assert result == value
    for value in (2, -1, 1.0, "True", None, np.array([True, False])):
        with pytest.raises(TypeError, match="`normalize` parameter of `O` must be True or False"):
            check_bool(value, name="normalize", owner="O")


def test_check_string():
    assert check_string("a", name="model", owner="O") == "a"
    assert type(check_string(np.str_("a"), name="model", owner="O")) is str
    assert check_string("", name="model", owner="O", allow_empty=True) == ""
    with pytest.raises(ValueError, match="must be a non-empty str; got ''"):
        check_string("", name="model", owner="O")
    with pytest.raises(TypeError, match="must be a non-empty str or None; got a bytes"):
        check_string(b"a", name="model", owner="O", allow_none=True)
    with pytest.raises(TypeError, match="must be a str; got 3"):
        check_string(3, name="model", owner="O", allow_empty=True)


def test_check_path(tmp_path):
    for value in (tmp_path, str(tmp_path), np.str_(tmp_path), np.array(str(tmp_path))):
        found = check_path(value, name="path", owner="O")
        assert type(found) is str
        assert found == str(tmp_path)
    assert check_path(None, name="path", owner="O", allow_none=True) is None
    for value, error in (("", ValueError), ("a\0", ValueError), (b"a", TypeError), (3, TypeError)):
        with pytest.raises(error, match="`path` parameter of `O` must be a path; got"):
            check_path(value, name="path", owner="O")


def test_check_seed():
    generator = np.random.RandomState(0)
    for value in (None, generator, np.random):
        assert check_seed(value, name="random_state", owner="O") is value
    assert type(check_seed(np.uint32(2**32 - 1), name="random_state", owner="O")) is int
    for value, error in (
        (2**32, ValueError),
        (-1, ValueError),
        (True, TypeError),
        ("0", TypeError),
    ):
        with pytest.raises(error, match="`random_state` parameter of `O` must be an int in"):
            check_seed(value, name="random_state", owner="O")


def test_list_items():
    for value in ([1, 2], (1, 2), range(1, 3), np.array([1, 2])):
        assert list_items(value) == [1, 2]
        assert type(list_items(value)[0]) is int
    for value in ("ab", b"ab", 3, None, np.array(3), {1, 2}):
        assert list_items(value) is None


def test_parameter_error():
    error = parameter_error(3, name="a", owner="O", expected="none", advice="Go.", kind=TypeError)
    assert type(error) is TypeError
    assert str(error) == "The `a` parameter of `O` must be none; got 3. Go."


# Optional imports


def test_import_optional_returns_the_leaf_module():
    assert import_optional("os.path", extra="plot", purpose="`A`").__name__ in sys.modules
    assert import_optional("xml.dom", extra="plot", purpose="`A`") is sys.modules["xml.dom"]


@pytest.mark.parametrize("module", ["skembed_absent", "skembed_absent.pyplot"])
def test_import_optional_of_an_absent_module(module):
    with pytest.raises(ImportError) as info:
        import_optional(module, extra="plot", purpose="`EmbeddingMapDisplay.plot`")
    assert str(info.value) == (
        "`EmbeddingMapDisplay.plot` needs `skembed_absent`, which is not installed. "
        "Run: pip install skembed[plot]"
    )


def test_import_optional_of_a_hidden_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs `pandas`, which is not installed"):
        import_optional("pandas", extra="plot", purpose="`A`")
    assert_columns(run(["a"]), ["a"])  # the duck typing minds no hidden module


def test_import_optional_names_the_dependency_that_is_absent(tmp_path, monkeypatch):
    (tmp_path / "skembed_needy.py").write_text("import skembed_absent\n")
    (tmp_path / "skembed_broken.py").write_text("from math import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"needs `skembed_absent` \(imported by `skembed_needy`\), which is not"
    ):
        import_optional("skembed_needy", extra="plot", purpose="`A`")
    with pytest.raises(ImportError, match="`skembed_broken`, which is installed but cannot be"):
        import_optional("skembed_broken", extra="plot", purpose="`A`")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import skembed.exceptions, skembed.instructions\n"
        "from skembed._inputs import check_texts\n"
        "check_texts(['a', None], owner='O', missing='nan')\n"
        "print([m for m in ('torch', 'pandas', 'polars', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
