"""Groups of points, and colours that every eye can tell apart."""

import itertools
from typing import Any

import numpy as np
import pytest

from skembed.plotting.drawing import MAX_LEGEND_ROWS, list_legend
from skembed.plotting.groups import (
    MARKERS,
    N_PLAIN_COLORS,
    NOISE_COLOR,
    PALETTE,
    read_groups,
    shorten_name,
)

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


# Colours


# Colours as they look with no cones of one kind (Machado et al. 2009, severity 1), linear RGB.
EYES = {
    "most": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def to_linear(colors: list[str]) -> np.ndarray:
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def to_oklab(linear: np.ndarray) -> np.ndarray:
    cones = [[0.4122214708, 0.5363325363, 0.0514459929],
             [0.2119034982, 0.6806995451, 0.1073969566],
             [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    axes = [[0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.cbrt(np.clip(linear, 0, 1) @ np.transpose(cones)) @ np.transpose(axes)


def smallest_distance(colors: list[str], eye: str) -> float:
    lab = to_oklab(to_linear(colors) @ EYES[eye].T)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(distances[np.triu_indices(len(colors), 1)].min())


@pytest.mark.parametrize("eye", EYES)
def test_colors_differ_for_every_eye(eye: str) -> None:
    assert smallest_distance(list(PALETTE[:2]), eye) > 0.28
    # As far apart as the nearest of Okabe and Ito's own: the longer palette loses nothing.
    assert smallest_distance(list(PALETTE), eye) > 0.075
    assert smallest_distance([NOISE_COLOR, *PALETTE], eye) > 0.075
    if eye == "most":
        assert smallest_distance(list(PALETTE), eye) > 0.13


def test_colors_stand_out_from_white() -> None:
    luminance = to_linear([*PALETTE]) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05) > 2).all()


@pytest.mark.parametrize("n", [2, N_PLAIN_COLORS, 10, 77, 91])
def test_groups_differ_in_color_or_sign(n: int) -> None:
    groups = read_groups(np.arange(n), n, owner="Test")
    looks = list(zip(groups.colors, groups.markers, strict=True))
    assert len(set(looks)) == n
    # Few groups need no signs; more of them get one more way to be told apart.
    assert (set(groups.markers) == {"o"}) == (n <= N_PLAIN_COLORS)
    if n > N_PLAIN_COLORS:
        assert all(a[1] != b[1] for a, b in itertools.pairwise(looks)), (
            "neighbours in the legend share a sign"
        )
    assert len(MARKERS) == 7


# Groups


def test_groups_are_sorted_labels_and_noise_apart() -> None:
    groups = read_groups([2, -1, 0, 2, -1], 5, owner="Test")
    assert groups.codes.tolist() == [1, -1, 0, 1, -1]
    assert (groups.names, groups.counts.tolist(), groups.n_noise) == (["0", "2"], [1, 2], 2)


def test_noise_label_can_be_another_or_none() -> None:
    assert read_groups([-1, 1], 2, noise_label=None, owner="Test").names == ["-1", "1"]
    groups = read_groups(["other", "a"], 2, noise_label="other", owner="Test")
    assert (groups.names, groups.n_noise) == (["a"], 1)
    assert read_groups([True, False], 2, noise_label=1, owner="Test").n_noise == 0


@pytest.mark.parametrize("names", [["cat", "dog", "cow"], {0: "cat", 1: "dog", 2: "cow"}])
def test_names_fix_the_order_of_the_colors(names: Any) -> None:
    every = read_groups([0, 1, 2], 3, names=names, owner="Test")
    some = read_groups(np.array([2, 0]), 2, names=names, owner="Test")
    assert every.colors == some.colors
    assert [some.names[code] for code in some.codes] == ["cow", "cat"]
    assert [row[0] for row in list_legend(some)] == ["cat (1)", "cow (1)"]


def test_colors_can_be_given() -> None:
    groups = read_groups(["a", "b"], 2, colors={"b": "#FF0000", "z": "#000000"}, owner="Test")
    assert groups.colors == [PALETTE[0], "#ff0000"]


def test_objects_that_hold_labels() -> None:
    import pandas as pd

    y = pd.Series(["b", "a", "b"], dtype="category")
    assert read_groups(y, 3, owner="Test").names == ["a", "b"]
    assert read_groups(np.array([1, 0], dtype=object), 2, owner="Test").names == ["0", "1"]


def test_legend_of_many_groups_names_the_largest() -> None:
    y = np.repeat(np.arange(77), np.arange(77) + 1)
    rows = list_legend(read_groups(y, len(y), owner="Test"))
    assert len(rows) == MAX_LEGEND_ROWS + 1
    assert rows[0][0] == "53 (54)"
    assert rows[-1] == (f"and {77 - MAX_LEGEND_ROWS} more ({sum(range(1, 54)):,})", "none", "none")


def test_long_names_keep_both_ends() -> None:
    first, second = (shorten_name(f"balance_not_updated_after_{end}", 26) for end in ("pin", "atm"))
    assert first != second
    assert len(first) == len(second) == 26


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([1, 2], ValueError, r"`y` parameter of `Test` must be of shape \(3,\).*got shape \(2,\)"),
        ([[1], [2], [3]], TypeError, r"one label a text; y\[0\] is a list"),
        (["a", None, "b"], ValueError, r"no missing labels.*first at y\[1\]"),
        ([1.0, np.nan, 2.0], ValueError, r"no missing labels.*first at y\[1\]"),
        ([1.0, 2.0, np.inf], ValueError, r"finite numbers; y\[2\]"),
        (["a", 1, "b"], TypeError, "labels of one type"),
        ([1j, 2j, 3j], TypeError, r"y\[0\] is a complex"),
        (["a", np.nan, "b"], ValueError, r"no missing labels.*first at y\[1\]"),
    ],
)
def test_bad_labels(y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_groups(y, 3, owner="Test")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": "cats"}, TypeError, "`names` parameter of `Test` must be a mapping"),
        ({"colors": ["#000000"]}, TypeError, "`colors` parameter of `Test` must be a mapping"),
        ({"colors": {0: "red"}}, ValueError, r"such as '#0072b2'; got 'red'"),
    ],
)
def test_bad_names_and_colors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_groups([0, 1], 2, owner="Test", **options)
