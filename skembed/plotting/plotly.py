"""An interactive map, drawn with plotly."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._validation import import_optional
from skembed.plotting.drawing import (
    EDGE,
    LEGEND_LENGTH,
    LEGEND_WIDTH,
    NAME_LENGTH,
    SIDE,
    Codes,
    Points,
    choose_font_size,
    darken,
    find_shown_anchors,
    pick_names,
)
from skembed.plotting.groups import NOISE_COLOR, MapGroups, shorten, shorten_name
from skembed.plotting.layout import choose_alpha, choose_point_size, find_frame, place_names

__all__ = ["make_plotly"]

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
_PLOTLY_FONT = 1.25  # pixels of a name for each point in the static map
_HOVER_WIDTH = 70


def make_plotly(
    positions: Points,
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
    size = 1.6 * np.sqrt(choose_point_size(len(positions), 0.3 * SIDE**2))
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


def _iterate_traces(groups: MapGroups) -> Iterator[tuple[str, Codes, dict[str, Any]]]:
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
            label = f"{shorten_name(name, LEGEND_LENGTH)} ({count:,})"
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


def _set_plotly_layout(figure: Any, positions: Points, groups: MapGroups, title: Any) -> None:
    """Set sizes, frame and legend."""
    anchors = find_shown_anchors(positions, groups)
    low, high = find_frame(positions, anchors[np.isfinite(anchors).all(axis=1)])
    axis = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    axis.update(showline=True, linecolor="lightgrey", mirror=True)
    top = EDGE if title is None else 3 * EDGE
    figure.update_layout(
        template="plotly_white",
        width=SIDE + EDGE + LEGEND_WIDTH,
        height=SIDE + top + EDGE,
        title=None if title is None else {"text": html.escape(title)},
        margin={"l": EDGE, "r": LEGEND_WIDTH, "t": top, "b": EDGE},
        xaxis={**axis, "range": [low[0], high[0]]},
        yaxis={**axis, "range": [low[1], high[1]]},
        legend={"itemsizing": "constant"},
        showlegend=bool(groups.names) or groups.n_noise > 0,
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": "black"}},
        hovermode="closest",
        dragmode="pan",
    )


def _annotate_plotly(figure: Any, positions: Points, groups: MapGroups) -> None:
    """Write the names of the groups where they are densest, none over another."""
    anchors, shown = pick_names(positions, groups)
    names = [shorten_name(groups.names[i], NAME_LENGTH) for i in shown]
    layout = figure.layout
    low = np.array([layout.xaxis.range[0], layout.yaxis.range[0]])
    high = np.array([layout.xaxis.range[1], layout.yaxis.range[1]])
    area = np.array([SIDE, SIDE])
    pixels = (anchors[shown] - low) / (high - low) * area
    # A bold character of the font is about this wide; what is measured is in the browser.
    font_size = _PLOTLY_FONT * choose_font_size(len(shown))
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
