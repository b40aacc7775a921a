"""The interactive map."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skembed.plotting.display import EmbeddingMapDisplay
from skembed.plotting.groups import (
    NOISE_COLOR,
)

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


@pytest.fixture
def page_map(blobs: Any) -> EmbeddingMapDisplay:
    pytest.importorskip("plotly", reason="needs plotly: skembed[interactive]")
    labels = np.where(blobs[1] == 0, -1, blobs[1])
    texts = [f"text {i}" for i in range(600)]
    texts[5] = "<b>not bold</b> & </script> " + "long " * 200
    names = {i: f"name {i} <i>" for i in range(77)}
    return EmbeddingMapDisplay(blobs[0], y=labels, texts=texts, names=names)


def test_page_has_a_trace_for_each_group(page_map: EmbeddingMapDisplay) -> None:
    figure = page_map.to_plotly(title="a < b")
    noise, *others = figure.data
    groups = page_map._read()[1]
    assert noise.name == f"noise ({groups.n_noise})" and noise.marker.color == NOISE_COLOR
    assert len(others) == 76
    assert others[0].name == f"name 1 &lt;i&gt; ({groups.counts[1]})"
    assert [trace.marker.color for trace in others] == groups.colors[1:]
    for trace, code in zip(others, range(1, 77), strict=True):
        rows = np.flatnonzero(groups.codes == code)
        assert np.array_equal(np.column_stack([trace.x, trace.y]), page_map.coordinates[rows])
    assert figure.layout.title.text == "a &lt; b"
    shown = [note.text for note in figure.layout.annotations]
    assert len(shown) == len(set(shown)) >= 60


def test_hover_shows_texts_cut_and_escaped(page_map: EmbeddingMapDisplay) -> None:
    group = page_map._read()[1].codes[5]
    figure = page_map.to_plotly(text_length=80)
    trace = next(t for t in figure.data if f"name {group} " in t.name)
    [text] = [text for text in trace.customdata if "bold" in text]
    assert text.startswith("&lt;b&gt;not bold&lt;/b&gt; &amp; &lt;/script&gt; long")
    assert text.endswith("…")
    plain = text.replace("<br>", " ")
    assert len(re.sub(r"&\w+;", "?", plain)) <= 80 and "<br>" in text
    assert trace.hovertemplate == "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>"


def test_page_needs_no_network(page_map: EmbeddingMapDisplay, tmp_path: Path) -> None:
    file = page_map.to_html(tmp_path / "map.html", annotate=False)
    page = file.read_text(encoding="utf-8")
    assert file == tmp_path / "map.html"
    linked = re.compile(r"<script[^>]{0,99}\bsrc=")
    assert not linked.search(page)
    assert "text 599" in page and "not bold</b>" not in page
    small = page_map.to_html(str(tmp_path / "small.html"), include_plotlyjs="cdn")
    assert small.stat().st_size < 500_000 < file.stat().st_size
    assert linked.search(small.read_text(encoding="utf-8"))


def test_page_of_floats_and_of_nothing(blobs: Any) -> None:
    pytest.importorskip("plotly", reason="needs plotly: skembed[interactive]")
    [trace] = EmbeddingMapDisplay(blobs[0], y=np.arange(600.0)).to_plotly().data
    assert list(trace.marker.color) == list(range(600)) and trace.marker.showscale
    figure = EmbeddingMapDisplay(blobs[0]).to_plotly()
    assert len(figure.data) == 1 and not figure.layout.showlegend
    assert json.loads(figure.to_json())["data"][0]["hovertemplate"] == "<extra></extra>"


def test_bad_page_options(page_map: EmbeddingMapDisplay) -> None:
    with pytest.raises(ValueError, match="`text_length` parameter.*got 0"):
        page_map.to_plotly(text_length=0)
    with pytest.raises(TypeError, match="`title` parameter"):
        page_map.to_plotly(title=3)


def test_missing_plotly_says_what_to_install(blobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"needs `plotly`.*skembed\[interactive\]"):
        EmbeddingMapDisplay(blobs[0]).to_plotly()
