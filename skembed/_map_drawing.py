"""Draw the groups of a map: with matplotlib, and with plotly for a page."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._map_groups import NOISE_COLOR, MapGroups, shorten, shorten_name
from skembed._map_layout import (
    choose_alpha,
    choose_point_size,
    find_anchors,
    find_frame,
    place_names,
)
from skembed._validation import import_optional

__all__ = ["draw_legend", "draw_names", "draw_points", "make_figure", "make_plotly", "set_frame"]

# A legend longer than this names the largest groups only; no map has more names than that.
MAX_LEGEND_ROWS = 24
MAX_MAP_NAMES = 150
_LEGEND_LENGTH, _NAME_LENGTH = 32, 26

# Groups that differ in their signs are drawn in this many turns, or the last would cover the rest.
_N_TURNS = 8
_RASTERIZED_FROM = 3000
_EDGED_UP_TO = 1000
_PADDING = 4.0  # between names and the frame, in points

_Points = npt.NDArray[np.floating[Any]]
_Codes = npt.NDArray[np.int64]


# matplotlib


def make_figure() -> Any:
    """Return the axes of a new figure."""
    purpose = "`EmbeddingMapDisplay.plot`"
    pyplot: Any = import_optional("matplotlib.pyplot", extra="plot", purpose=purpose)
    return pyplot.subplots(figsize=(10.5, 7), layout="constrained")[1]


def set_frame(axes: Any, positions: _Points, groups: MapGroups) -> None:
    """Bound the axes by the frame, and say how many texts lie outside it."""
    anchors = _find_shown_anchors(positions, groups)
    low, high = find_frame(positions, anchors[np.isfinite(anchors).all(axis=1)])
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.set_box_aspect(1)  # both coordinates on one scale
    n_outside = int(((positions < low) | (positions > high)).any(axis=1).sum())
    if n_outside:
        word = "text lies" if n_outside == 1 else "texts lie"
        axes.set_xlabel(f"{n_outside:,} {word} outside the frame", color="0.35", fontsize=9)
    for side in axes.spines.values():
        side.set_color("0.8")


def _find_shown_anchors(positions: _Points, groups: MapGroups) -> _Points:
    """Return the densest place of each group, (n_groups, 2)."""
    return find_anchors(positions, groups.codes, len(groups.names))


def draw_points(
    axes: Any,
    positions: _Points,
    groups: MapGroups,
    *,
    point_size: float | None,
    alpha: float | None,
    cmap: str,
) -> list[Any]:
    """Draw the points, noise below all others; return what was drawn."""
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
        options_noise = {**options, "s": 0.6 * size, "color": NOISE_COLOR, "edgecolors": "none"}
        drawn.append(axes.scatter(*noise.T, zorder=0.9, **options_noise))
    colors = np.array(groups.colors)
    for marker, rows in _iterate_turns(groups):
        options["c"] = colors[groups.codes[rows]]
        drawn.append(axes.scatter(*positions[rows].T, marker=marker, **options))
    return drawn


def _shuffle(n: int) -> _Codes:
    """Return the rows in an order that mixes all groups, the same each time, (n,)."""
    return np.random.default_rng(0).permutation(n)


def _iterate_turns(groups: MapGroups) -> Iterator[tuple[str, _Codes]]:
    """Yield (sign, rows), the rows shuffled; several turns where there are several signs."""
    rows = _shuffle(len(groups.codes))
    rows = rows[groups.codes[rows] >= 0]
    kinds = list(dict.fromkeys(groups.markers))
    if len(kinds) <= 1:
        if len(rows):
            yield kinds[0], rows
        return
    places = np.array([kinds.index(marker) for marker in groups.markers])
    for turn in np.array_split(rows, _N_TURNS):
        of_turn = places[groups.codes[turn]]
        for place in np.unique(of_turn):
            yield kinds[place], turn[of_turn == place]


def draw_legend(axes: Any, groups: MapGroups) -> Any:
    """Name the groups with their counts beside the map, the largest only if there are many."""
    lines: Any = import_optional(
        "matplotlib.lines", extra="plot", purpose="`EmbeddingMapDisplay.plot`"
    )
    handles = [
        lines.Line2D([], [], linestyle="", marker=marker, color=color, markersize=6, label=label)
        for label, color, marker in list_legend(groups)
    ]
    if not handles:
        return None
    # Only a figure that arranges its parts makes room for a legend outside the axes.
    arranged = axes.figure.figure.get_layout_engine() is not None
    place = {"loc": "center left", "bbox_to_anchor": (1.005, 0.5)} if arranged else {}
    options = {"loc": "upper right", "frameon": not arranged, "fontsize": 9, **place}
    return axes.legend(handles=handles, handletextpad=0.3, labelspacing=0.35, **options)


def list_legend(groups: MapGroups) -> list[tuple[str, str, str]]:
    """List (text, colour, sign) of the rows of a legend; "none" is no sign."""
    counts = groups.counts
    kept = np.flatnonzero(counts)
    n_rest = len(kept) - MAX_LEGEND_ROWS
    if n_rest > 1:
        largest = np.argsort(-counts, kind="stable")[:MAX_LEGEND_ROWS]
        kept = np.sort(largest)
    rows = [
        (
            f"{shorten_name(groups.names[i], _LEGEND_LENGTH)} ({counts[i]:,})",
            groups.colors[i],
            groups.markers[i],
        )
        for i in kept
    ]
    if n_rest > 1:
        n_texts = int(counts.sum() - counts[kept].sum())
        rows.append((f"and {n_rest:,} more ({n_texts:,})", "none", "none"))
    if groups.n_noise:
        rows.append((f"noise ({groups.n_noise:,})", NOISE_COLOR, "o"))
    return rows


def draw_names(axes: Any, positions: _Points, groups: MapGroups) -> list[Any]:
    """Write the names of the groups where they are densest, none over another."""
    effects: Any = import_optional(
        "matplotlib.patheffects", extra="plot", purpose="`EmbeddingMapDisplay.plot`"
    )
    anchors, shown = _pick_names(positions, groups)
    names = [shorten_name(groups.names[i], _NAME_LENGTH) for i in shown]
    options = {"fontsize": _choose_font_size(len(shown)), "fontweight": "bold"}
    figure = axes.figure.figure
    figure.draw_without_rendering()  # settles the layout, so that sizes are final
    scale = 72 / figure.dpi
    sizes = np.array([_measure(axes, name, options) for name in names]).reshape(-1, 2) * scale
    pixels = axes.transData.transform(anchors[shown]) * scale
    frame = axes.get_window_extent()
    bounds = (np.array(frame.min) * scale + _PADDING, np.array(frame.max) * scale - _PADDING)
    points = axes.transData.transform(positions) * scale
    halo = [effects.withStroke(linewidth=2.6, foreground="white", alpha=0.85)]
    line = {"arrowstyle": "-", "color": "0.3", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    drawn = []
    for place, offset, far in place_names(
        pixels, sizes + (5, 2), bounds, points, groups.codes, shown
    ):
        note = axes.annotate(
            names[place],
            anchors[shown[place]],
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            color=darken(groups.colors[shown[place]]),
            path_effects=halo,
            arrowprops=line if far else None,
            zorder=5,
            **options,
        )
        note.set_in_layout(False)
        drawn.append(note)
    return drawn


def _pick_names(positions: _Points, groups: MapGroups) -> tuple[_Points, _Codes]:
    """Return the anchors of all groups (n_groups, 2) and the groups to name, the largest."""
    anchors = _find_shown_anchors(positions, groups)
    counts = groups.counts
    largest = np.argsort(-counts, kind="stable")[:MAX_MAP_NAMES]
    return anchors, np.sort(largest[counts[largest] > 0])


def _choose_font_size(n: int) -> float:
    """Return the size in points of n names on one map."""
    return 10.0 if n <= 12 else 8.5 if n <= 30 else 7.0 if n <= 60 else 6.2


def _measure(axes: Any, name: str, options: dict[str, Any]) -> tuple[float, float]:
    """Return the width and height of a name in pixels."""
    text = axes.text(0, 0, name, transform=axes.transAxes, **options)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


def darken(color: str) -> str:
    """Return a colour dark enough to read on white.

    >>> from skembed._map_drawing import darken
    >>> darken("#f0e442"), darken("#000000")
    ('#706a1f', '#000000')
    """
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    luminance = float(rgb @ [0.2126, 0.7152, 0.0722])
    rgb = rgb * min(1.0, 0.40 / max(luminance, 1e-9))
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


# plotly

_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}
_SIDE, _LEGEND_WIDTH, _EDGE = 800, 300, 20  # pixels; the frame is a square
_PLOTLY_FONT = 1.25  # pixels of a name for each point in the static map
_HOVER_WIDTH = 70


def make_plotly(
    positions: _Points,
    groups: MapGroups,
    texts: list[str] | None,
    *,
    annotate: bool,
    text_length: int,
    title: str | None,
) -> Any:
    """Return a plotly Figure, one trace a group; hovering shows the text."""
    graph_objects: Any = import_optional(
        "plotly.graph_objects", extra="interactive", purpose="`EmbeddingMapDisplay.to_plotly`"
    )
    hover = _write_hover(texts, text_length)
    size = 1.6 * np.sqrt(choose_point_size(len(positions), 0.3 * _SIDE**2))
    marker = {"size": size, "opacity": choose_alpha(len(positions))}
    traces = []
    for name, rows, look in _iterate_traces(groups):
        # Text is looked up only where there is some: an empty one would still open a box.
        trace = {"customdata": hover[rows]} if hover is not None else {}
        traces.append(
            graph_objects.Scattergl(
                x=positions[rows, 0],
                y=positions[rows, 1],
                mode="markers",
                name=html.escape(name),
                marker={**marker, **look},
                hovertemplate=_make_template(groups, has_text=hover is not None),
                **trace,
            )
        )
    figure = graph_objects.Figure(traces)
    _set_plotly_layout(figure, positions, groups, title)
    if annotate and groups.names:
        _annotate_plotly(figure, positions, groups)
    return figure


def _iterate_traces(groups: MapGroups) -> Iterator[tuple[str, _Codes, dict[str, Any]]]:
    """Yield (name, rows, look of the marker) of each trace, noise first, so that it lies below."""
    if groups.values is not None:
        look = {"color": groups.values, "colorscale": "Viridis", "showscale": True}
        yield "", np.arange(len(groups.codes)), look
        return
    if groups.n_noise:
        noise = np.flatnonzero(groups.codes < 0)
        yield f"noise ({groups.n_noise:,})", noise, {"color": NOISE_COLOR}
    for code, count in enumerate(np.bincount(groups.codes[groups.codes >= 0])):
        if count:
            name = groups.names[code] if groups.names else ""
            label = f"{shorten_name(name, _LEGEND_LENGTH)} ({count:,})"
            rows = np.flatnonzero(groups.codes == code)
            look = {"color": groups.colors[code], "symbol": _SYMBOLS[groups.markers[code]]}
            yield label if groups.names else "", rows, look


def _write_hover(texts: list[str] | None, length: int) -> npt.NDArray[Any] | None:
    """Return the texts cut, wrapped and escaped, (n,); plotly reads them as HTML."""
    if texts is None:
        return None
    wrapped = (textwrap.wrap(shorten(text, length), _HOVER_WIDTH) for text in texts)
    return np.array(["<br>".join(map(html.escape, lines)) for lines in wrapped], dtype=object)


def _make_template(groups: MapGroups, *, has_text: bool) -> str:
    """Return what a box shows: the group or the value, then the text."""
    if groups.values is not None:
        head = "<b>%{marker.color:.4g}</b>"
    else:
        head = "<b>%{fullData.name}</b>" if groups.names else ""
    body = "%{customdata}" if has_text else ""
    return f"{head}{'<br>' if head and body else ''}{body}<extra></extra>"


def _set_plotly_layout(figure: Any, positions: _Points, groups: MapGroups, title: Any) -> None:
    """Set sizes, frame and legend."""
    anchors = _find_shown_anchors(positions, groups)
    low, high = find_frame(positions, anchors[np.isfinite(anchors).all(axis=1)])
    axis = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    axis.update(showline=True, linecolor="lightgrey", mirror=True)
    top = _EDGE if title is None else 3 * _EDGE
    figure.update_layout(
        template="plotly_white",
        width=_SIDE + _EDGE + _LEGEND_WIDTH,
        height=_SIDE + top + _EDGE,
        title=None if title is None else {"text": html.escape(title)},
        margin={"l": _EDGE, "r": _LEGEND_WIDTH, "t": top, "b": _EDGE},
        xaxis={**axis, "range": [low[0], high[0]]},
        yaxis={**axis, "range": [low[1], high[1]]},
        legend={"itemsizing": "constant"},
        showlegend=bool(groups.names) or groups.n_noise > 0,
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": "black"}},
        hovermode="closest",
        dragmode="pan",
    )


def _annotate_plotly(figure: Any, positions: _Points, groups: MapGroups) -> None:
    """Write the names of the groups where they are densest, none over another."""
    anchors, shown = _pick_names(positions, groups)
    names = [shorten_name(groups.names[i], _NAME_LENGTH) for i in shown]
    layout = figure.layout
    low = np.array([layout.xaxis.range[0], layout.yaxis.range[0]])
    high = np.array([layout.xaxis.range[1], layout.yaxis.range[1]])
    area = np.array([_SIDE, _SIDE])
    pixels = (anchors[shown] - low) / (high - low) * area
    # A bold character of the font is about this wide; what is measured is in the browser.
    font_size = _PLOTLY_FONT * _choose_font_size(len(shown))
    sizes = np.array([(0.62 * font_size * len(name) + 8, 1.35 * font_size) for name in names])
    points = (positions - low) / (high - low) * area
    bounds = ((0, 0), area)
    notes = []
    for place, (right, up), far in place_names(
        pixels, sizes.reshape(-1, 2), bounds, points, groups.codes, shown
    ):
        shift = {"ax": right, "ay": -up} if far else {"xshift": right, "yshift": up}
        note = dict(
            x=anchors[shown[place], 0],
            y=anchors[shown[place], 1],
            text=f"<b>{html.escape(names[place])}</b>",
            font={"size": font_size, "color": darken(groups.colors[shown[place]])},
            bgcolor="rgba(255, 255, 255, 0.6)",
            showarrow=far,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor="grey",
            borderpad=0,
            **shift,
        )
        notes.append(note)
    figure.update_layout(annotations=notes)  # one by one, their cost grows with the square
