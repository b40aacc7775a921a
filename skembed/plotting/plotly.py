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
    LEGEND_LENGTH,
    NAME_LENGTH,
    choose_font_size,
    darken,
    find_map_frame,
    pick_names,
)
from skembed.plotting.groups import MARKERS, NOISE_COLOR, MapGroups, shorten, shorten_name
from skembed.plotting.layout import Codes, Points, choose_alpha, choose_point_size, place_names

__all__ = ["make_plotly"]

_SIDE, _LEGEND_WIDTH, _EDGE = 800, 300, 20  # pixels; the frame is a square
_NAMES_OF_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
_SYMBOLS = dict(zip(MARKERS, _NAMES_OF_MARKERS, strict=True))
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
    size = 1.6 * np.sqrt(choose_point_size(len(positions), 0.3 * _SIDE**2))
    marker = {"size": size, "opacity": choose_alpha(len(positions))}
    traces = []
    for name, rows, look in _iterate_traces(groups):
        # Without texts there is no `customdata`: an empty text would still open a box.
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
    """Return the template of a hover box: the group or the value, then the text."""
    if groups.values is not None:
        head = "<b>%{marker.color:.4g}</b>"
    else:
        head = "<b>%{fullData.name}</b>" if groups.names else ""
    body = "%{customdata}" if has_text else ""
    return f"{head}{'<br>' if head and body else ''}{body}<extra></extra>"


def _set_plotly_layout(figure: Any, positions: Points, groups: MapGroups, title: Any) -> None:
    """Set sizes, frame and legend."""
    low, high = find_map_frame(positions, groups)
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


def _annotate_plotly(figure: Any, positions: Points, groups: MapGroups) -> None:
    """Write the names of the groups where they are densest, none over another."""
    anchors, shown = pick_names(positions, groups)
    names = [shorten_name(name, NAME_LENGTH) for name in groups.names]
    low, high = np.array([figure.layout.xaxis.range, figure.layout.yaxis.range]).T
    area = np.array([_SIDE, _SIDE])
    pixels = (anchors[shown] - low) / (high - low) * area
    # Estimated from the width of a bold character: only the browser knows the true sizes.
    font_size = _PLOTLY_FONT * choose_font_size(len(shown))
    widths = [0.62 * font_size * len(names[i]) + 8 for i in shown]
    sizes = np.column_stack([widths, np.full(len(shown), 1.35 * font_size)])
    points = (positions - low) / (high - low) * area
    notes = []
    for group, (right, up), far in place_names(
        pixels, sizes, ((0, 0), area), points, groups.codes, shown
    ):
        shift = {"ax": right, "ay": -up} if far else {"xshift": right, "yshift": up}
        note = dict(
            x=anchors[group, 0],
            y=anchors[group, 1],
            text=f"<b>{html.escape(names[group])}</b>",
            font={"size": font_size, "color": darken(groups.colors[group])},
            bgcolor="rgba(255, 255, 255, 0.6)",
            showarrow=far,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor="grey",
            borderpad=0,
            **shift,
        )
        notes.append(note)
    # In one call: adding them one by one takes quadratic time.
    figure.update_layout(annotations=notes)
