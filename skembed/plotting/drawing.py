"""A map drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from skembed._validation import import_optional
from skembed.plotting.groups import NOISE_COLOR, MapGroups, shorten_name
from skembed.plotting.layout import (
    Codes,
    Points,
    choose_alpha,
    choose_point_size,
    find_anchors,
    find_frame,
    place_names,
)

__all__ = [
    "LEGEND_LENGTH",
    "MAX_LEGEND_ROWS",
    "NAME_LENGTH",
    "choose_font_size",
    "darken",
    "draw_legend",
    "draw_names",
    "draw_points",
    "find_map_frame",
    "list_legend",
    "make_figure",
    "pick_names",
    "set_frame",
]

# Only the largest groups are in the legend and named on the map.
MAX_LEGEND_ROWS = 24
_MAX_MAP_NAMES = 150
LEGEND_LENGTH, NAME_LENGTH = 32, 26  # characters

# Groups with different signs are drawn in this many turns, or the last would cover the rest.
_N_TURNS = 8
_RASTERIZED_FROM = 3000
_EDGED_UP_TO = 1000
_PADDING = 4.0  # between names and the frame, in points
_PURPOSE = "`EmbeddingMapDisplay.plot`"


def make_figure() -> Any:
    """Return the axes of a new figure."""
    pyplot: Any = import_optional("matplotlib.pyplot", extra="plot", purpose=_PURPOSE)
    return pyplot.subplots(figsize=(10.5, 7), layout="constrained")[1]


def set_frame(axes: Any, positions: Points, groups: MapGroups) -> None:
    """Bound the axes by the frame, and say how many texts lie outside it."""
    low, high = find_map_frame(positions, groups)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.set_box_aspect(1)  # both coordinates on one scale
    n_outside = int(((positions < low) | (positions > high)).any(axis=1).sum())
    if n_outside:
        word = "text lies" if n_outside == 1 else "texts lie"
        axes.set_xlabel(f"{n_outside:,} {word} outside the frame", color="0.35", fontsize=9)
    for side in axes.spines.values():
        side.set_color("0.8")


def find_map_frame(positions: Points, groups: MapGroups) -> tuple[Points, Points]:
    """Return the low and high corner (2,) of the frame around points and groups."""
    anchors = find_anchors(positions, groups.codes, len(groups.names))
    return find_frame(positions, anchors[np.isfinite(anchors).all(axis=1)])


def draw_points(
    axes: Any,
    positions: Points,
    groups: MapGroups,
    *,
    point_size: float | None,
    alpha: float | None,
    cmap: str,
) -> list[Any]:
    """Draw the points, noise below all others; return the collections."""
    n = len(positions)
    box = axes.get_window_extent()
    area = box.width * box.height * (72 / axes.figure.dpi) ** 2
    size = choose_point_size(n, area) if point_size is None else point_size
    options: dict[str, Any] = {
        "s": size,
        "alpha": choose_alpha(n) if alpha is None else alpha,
        "linewidths": 0.4 if n <= _EDGED_UP_TO else 0,
        "edgecolors": "white" if n <= _EDGED_UP_TO else "none",
        "rasterized": n >= _RASTERIZED_FROM,
    }
    if groups.values is not None:
        order = _shuffle(n)
        options.update(c=groups.values[order], cmap=cmap)
        return [axes.scatter(*positions[order].T, **options)]
    drawn = []
    if groups.n_noise:
        noise = positions[groups.codes < 0]
        noise_options = {**options, "s": 0.6 * size, "color": NOISE_COLOR, "edgecolors": "none"}
        drawn.append(axes.scatter(*noise.T, zorder=0.9, **noise_options))
    colors = np.array(groups.colors)
    for marker, rows in _iterate_turns(groups):
        options["c"] = colors[groups.codes[rows]]
        drawn.append(axes.scatter(*positions[rows].T, marker=marker, **options))
    return drawn


def _shuffle(n: int) -> Codes:
    """Return the rows in an order that mixes all groups, the same each time, (n,)."""
    return np.random.default_rng(0).permutation(n)


def _iterate_turns(groups: MapGroups) -> Iterator[tuple[str, Codes]]:
    """Yield (sign, rows), the rows shuffled; several turns where there are several signs."""
    rows = _shuffle(len(groups.codes))
    rows = rows[groups.codes[rows] >= 0]
    kinds = list(dict.fromkeys(groups.markers))
    if len(kinds) <= 1:
        if len(rows):
            yield kinds[0], rows
        return
    kind_of_group = np.array([kinds.index(marker) for marker in groups.markers])
    for turn in np.array_split(rows, _N_TURNS):
        kind_of_row = kind_of_group[groups.codes[turn]]
        for kind in np.unique(kind_of_row):
            yield kinds[kind], turn[kind_of_row == kind]


def draw_legend(axes: Any, groups: MapGroups) -> Any:
    """Name the groups with their counts beside the map, the largest only if there are many."""
    lines: Any = import_optional("matplotlib.lines", extra="plot", purpose=_PURPOSE)
    handles = [
        lines.Line2D([], [], linestyle="", marker=marker, color=color, markersize=6, label=label)
        for label, color, marker in list_legend(groups)
    ]
    if not handles:
        return None
    options: dict[str, Any] = {"loc": "upper right", "frameon": True, "fontsize": 9}
    # Only a figure with a layout engine makes room for a legend outside the axes.
    if axes.figure.figure.get_layout_engine() is not None:
        options.update(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)
    return axes.legend(handles=handles, handletextpad=0.3, labelspacing=0.35, **options)


def list_legend(groups: MapGroups) -> list[tuple[str, str, str]]:
    """Return (text, colour, sign) of the rows of a legend; "none" is no sign."""
    counts = groups.counts
    shown = np.flatnonzero(counts)
    n_rest = len(shown) - MAX_LEGEND_ROWS
    if n_rest > 1:
        shown = np.sort(np.argsort(-counts, kind="stable")[:MAX_LEGEND_ROWS])
    rows = [
        (
            f"{shorten_name(groups.names[i], LEGEND_LENGTH)} ({counts[i]:,})",
            groups.colors[i],
            groups.markers[i],
        )
        for i in shown
    ]
    if n_rest > 1:
        n_texts = int(counts.sum() - counts[shown].sum())
        rows.append((f"and {n_rest:,} more ({n_texts:,})", "none", "none"))
    if groups.n_noise:
        rows.append((f"noise ({groups.n_noise:,})", NOISE_COLOR, "o"))
    return rows


def draw_names(axes: Any, positions: Points, groups: MapGroups) -> list[Any]:
    """Write the names of the groups where they are densest, none over another."""
    effects: Any = import_optional("matplotlib.patheffects", extra="plot", purpose=_PURPOSE)
    anchors, shown = pick_names(positions, groups)
    names = [shorten_name(name, NAME_LENGTH) for name in groups.names]
    options = {"fontsize": choose_font_size(len(shown)), "fontweight": "bold"}
    figure = axes.figure.figure
    figure.draw_without_rendering()  # settles the layout, so that sizes are final
    scale = 72 / figure.dpi
    sizes = np.array([_measure(axes, names[i], options) for i in shown]).reshape(-1, 2) * scale
    pixels = axes.transData.transform(anchors[shown]) * scale
    frame = axes.get_window_extent()
    bounds = (np.array(frame.min) * scale + _PADDING, np.array(frame.max) * scale - _PADDING)
    points = axes.transData.transform(positions) * scale
    halo = [effects.withStroke(linewidth=2.6, foreground="white", alpha=0.85)]
    line = {"arrowstyle": "-", "color": "0.3", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    drawn = []
    for group, offset, far in place_names(
        pixels, sizes + (5, 2), bounds, points, groups.codes, shown
    ):
        note = axes.annotate(
            names[group],
            anchors[group],
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            color=darken(groups.colors[group]),
            path_effects=halo,
            arrowprops=line if far else None,
            zorder=5,
            **options,
        )
        note.set_in_layout(False)
        drawn.append(note)
    return drawn


def pick_names(positions: Points, groups: MapGroups) -> tuple[Points, Codes]:
    """Return the anchors of all groups (n_groups, 2) and the groups to name, the largest."""
    anchors = find_anchors(positions, groups.codes, len(groups.names))
    counts = groups.counts
    largest = np.argsort(-counts, kind="stable")[:_MAX_MAP_NAMES]
    return anchors, np.sort(largest[counts[largest] > 0])


def choose_font_size(n: int) -> float:
    """Return the font size, in points, of n names on one map."""
    return 10.0 if n <= 12 else 8.5 if n <= 30 else 7.0 if n <= 60 else 6.2


def _measure(axes: Any, name: str, options: dict[str, Any]) -> tuple[float, float]:
    """Return the width and height of a name in pixels."""
    text = axes.text(0, 0, name, transform=axes.transAxes, **options)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


def darken(color: str) -> str:
    """Return a colour dark enough to read on white."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    luminance = float(rgb @ [0.2126, 0.7152, 0.0722])
    rgb = rgb * min(1.0, 0.40 / max(luminance, 1e-9))
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
