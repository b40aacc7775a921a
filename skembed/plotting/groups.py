"""The groups of the points of a map: labels, clusters with noise, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from skembed._inputs import read_label_array

__all__ = [
    "MARKERS",
    "MapGroups",
    "NOISE_COLOR",
    "N_PLAIN_COLORS",
    "PALETTE",
    "read_groups",
    "shorten",
    "shorten_name",
]

# Seven colours of Okabe and Ito (all but yellow, too pale on white), then colours picked in turn,
# each as far as possible from all earlier ones: the smallest distance in OKLab with normal sight,
# protanopia, deuteranopia and tritanopia (matrices of Machado et al. 2009), contrast with white
# above 2. The tests of the plots measure the distances.
PALETTE = (
    "#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#000000",
    "#552200", "#0000aa", "#884444", "#9966ff", "#7700ee", "#553366",
)  # fmt: skip
N_PLAIN_COLORS = 7
NOISE_COLOR = "#bbbbbb"
# Signs of matplotlib. Their number and that of the colours share no factor, so that a pair of
# colour and sign repeats only after 91 classes.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class MapGroups(NamedTuple):
    """The groups of n points, in the order of their colours."""

    codes: npt.NDArray[np.int64]  # (n,), group of each point; -1 is noise
    names: list[str]  # empty where there is nothing to tell apart
    colors: list[str]  # "#rrggbb"
    markers: list[str]
    values: npt.NDArray[np.float64] | None  # (n,), for a continuous scale; then without groups

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of points of each group, (n_groups,)."""
        n_groups = len(self.names)
        return np.bincount(self.codes[self.codes >= 0], minlength=n_groups)[:n_groups]

    @property
    def n_noise(self) -> int:
        """Number of points that belong to no group."""
        return int((self.codes < 0).sum())


def read_groups(
    y: Any,
    n: int,
    *,
    names: Any = None,
    colors: Any = None,
    noise_label: Any = -1,
    owner: str,
) -> MapGroups:
    """Return the groups of n points by their labels, or the values of a float dtype."""
    if y is None:
        return MapGroups(np.zeros(n, dtype=np.int64), [], [PALETTE[0]], [MARKERS[0]], None)
    labels = _read_labels(y, n, owner=owner)
    if labels.dtype.kind == "f":
        return MapGroups(np.zeros(n, dtype=np.int64), [], [], [], labels.astype(np.float64))
    is_noise = _find_noise(labels, noise_label)
    classes = np.unique(labels[~is_noise]).tolist()
    named = _read_names(names, owner=owner)
    order = [*named, *(label for label in classes if label not in named)]
    code_of = {label: code for code, label in enumerate(order)}
    codes = np.full(n, -1, dtype=np.int64)
    codes[~is_noise] = [code_of[label] for label in labels[~is_noise].tolist()]
    palette = {label: PALETTE[code % len(PALETTE)] for label, code in code_of.items()}
    palette |= _read_colors(colors, owner=owner)
    n_markers = 1 if len(order) <= N_PLAIN_COLORS else len(MARKERS)
    return MapGroups(
        codes,
        [str(named.get(label, label)) for label in order],
        [palette[label] for label in order],
        [MARKERS[code % n_markers] for code in range(len(order))],
        None,
    )


def _read_labels(y: Any, n: int, *, owner: str) -> npt.NDArray[Any]:
    """Return labels of one type, or finite numbers, (n,)."""
    labels = read_label_array(y, name="y", owner=owner)
    subject = f"The `y` parameter of `{owner}`"
    if labels.shape != (n,):
        raise ValueError(
            f"{subject} must be of shape ({n},), one label a text; got shape {labels.shape}."
        )
    return np.array(labels.tolist()) if labels.dtype.kind == "O" else labels


def _find_noise(labels: npt.NDArray[Any], noise_label: Any) -> npt.NDArray[np.bool_]:
    """Return a mask of the labels equal to `noise_label`, (n,), none if it is of another type."""
    number = isinstance(noise_label, (int, np.integer)) and not isinstance(noise_label, bool)
    alike = labels.dtype.kind in "iu" if number else labels.dtype.kind in "UT"
    if noise_label is None or not alike:
        return np.zeros(len(labels), dtype=np.bool_)
    return np.asarray(labels == noise_label, dtype=np.bool_)


def _read_names(names: Any, *, owner: str) -> dict[Any, str]:
    """Return label -> name; a sequence names the labels 0, 1, ..."""
    if names is None:
        return {}
    if isinstance(names, Mapping):
        return {_plain(label): str(name) for label, name in names.items()}
    if isinstance(names, (Sequence, np.ndarray)) and not isinstance(names, (str, bytes)):
        return {label: str(name) for label, name in enumerate(names)}
    raise TypeError(
        f"The `names` parameter of `{owner}` must be a mapping of label to name, or a sequence "
        f"with the names of the labels 0, 1, ...; got {type(names).__name__}."
    )


def _read_colors(colors: Any, *, owner: str) -> dict[Any, str]:
    """Return label -> "#rrggbb"."""
    if colors is None:
        return {}
    if not isinstance(colors, Mapping):
        raise TypeError(
            f"The `colors` parameter of `{owner}` must be a mapping of label to colour; "
            f"got {type(colors).__name__}."
        )
    checked = {}
    for label, color in colors.items():
        digits = str(color).removeprefix("#")
        if len(digits) != 6 or not set(digits) <= set("0123456789abcdefABCDEF"):
            raise ValueError(
                f"The `colors` parameter of `{owner}` must hold colours such as '#0072b2'; "
                f"got {color!r}."
            )
        checked[_plain(label)] = f"#{digits.lower()}"
    return checked


def _plain(label: Any) -> Any:
    """Return a label as Python's own type."""
    return label.item() if isinstance(label, np.generic) else label


def shorten(text: str, length: int) -> str:
    """Return a text cut to at most `length` characters, the last of them an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def shorten_name(name: str, length: int) -> str:
    """Return a name without its middle: names of one family often begin alike."""
    line = " ".join(name.split())
    n_last = length // 2
    return line if len(line) <= length else f"{line[: length - n_last - 1]}…{line[-n_last:]}"
