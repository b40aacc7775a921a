"""The static map."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from maps import boxes_overlap, face_colors

from skembed.plotting.display import EmbeddingMapDisplay
from skembed.plotting.groups import (
    NOISE_COLOR,
    PALETTE,
)

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


def draw(blobs: Any, **options: Any) -> EmbeddingMapDisplay:
    positions, labels = blobs
    return EmbeddingMapDisplay(positions, y=labels, **options).plot()


def test_names_of_77_groups_do_not_overlap(blobs: Any) -> None:
    names = [f"a_rather_long_name_of_{i}" for i in range(77)]
    display = draw(blobs, names=names)
    display.figure_.canvas.draw()
    frames = [note.get_window_extent() for note in display.annotations_]
    assert len(frames) >= 70
    # The extent of an annotation with a leader line covers the line; the text's own does not.
    from matplotlib.text import Text

    frames = [Text.get_window_extent(note) for note in display.annotations_]
    centres = np.array([((f.x0 + f.x1) / 2, (f.y0 + f.y1) / 2) for f in frames])
    sizes = np.array([(f.width, f.height) for f in frames])
    assert not boxes_overlap(centres, sizes)
    box = display.ax_.get_window_extent()
    assert (centres - sizes / 2 >= np.array(box.min) - 1).all()
    assert (centres + sizes / 2 <= np.array(box.max) + 1).all()


def test_every_point_is_drawn_once(blobs: Any) -> None:
    positions, labels = blobs
    display = draw((positions, np.where(labels == 0, -1, labels)))
    drawn = np.concatenate([part.get_offsets() for part in display.points_])
    assert len(drawn) == 600
    assert np.array_equal(np.sort(drawn, axis=0), np.sort(positions, axis=0))
    assert not any(part.get_rasterized() for part in display.points_)


def test_noise_is_grey_smaller_and_below(blobs: Any) -> None:
    positions, labels = blobs
    display = draw((positions, np.where(labels < 40, -1, labels)))
    noise, *others = display.points_
    assert np.array_equal(noise.get_offsets(), positions[labels < 40])
    assert face_colors(display) >= {NOISE_COLOR}
    assert len(noise.get_facecolors()) == 1
    assert noise.get_zorder() < others[0].get_zorder()
    assert noise.get_sizes()[0] < others[0].get_sizes()[0]
    texts = [text.get_text() for text in display.legend_.get_texts()]
    assert texts[-1] == f"noise ({(labels < 40).sum()})"
    assert not any("noise" in note.get_text() for note in display.annotations_)


def test_noise_alone() -> None:
    display = EmbeddingMapDisplay(np.eye(2), y=[-1, -1]).plot()
    assert face_colors(display) == {NOISE_COLOR}
    assert [text.get_text() for text in display.legend_.get_texts()] == ["noise (2)"]


def test_many_points_are_small_and_rasterized(rng: np.random.Generator) -> None:
    positions = rng.normal(size=(50_000, 2))
    display = EmbeddingMapDisplay(positions, y=rng.integers(2, size=50_000)).plot(annotate=False)
    [points] = display.points_
    assert points.get_rasterized()
    assert points.get_sizes()[0] < 4 and points.get_alpha() < 0.65
    assert [text.get_text()[0] for text in display.legend_.get_texts()] == ["0", "1"]
    # Mixed, so that neither label covers the other.
    first = points.get_facecolors()[:1000]
    assert 300 < (first[:, 0] == first[0, 0]).sum() < 700


def test_floats_get_a_scale(blobs: Any, rng: np.random.Generator) -> None:
    values = rng.uniform(size=600)
    display = EmbeddingMapDisplay(blobs[0], y=values).plot(cmap="cividis")
    [points] = display.points_
    assert np.array_equal(np.sort(points.get_array()), np.sort(values))
    assert points.get_cmap().name == "cividis"
    assert display.colorbar_ is not None and display.legend_ is None
    assert display.annotations_ == []
    assert display.plot(legend=False).colorbar_ is None


def test_without_labels_there_is_one_color(blobs: Any) -> None:
    display = EmbeddingMapDisplay(blobs[0]).plot()
    assert face_colors(display) == {PALETTE[0]}
    assert (display.legend_, display.annotations_) == (None, [])


def test_own_axes_and_options(blobs: Any) -> None:
    figure, axes = pyplot.subplots()
    display = EmbeddingMapDisplay(blobs[0], y=blobs[1])
    assert display.plot(axes, annotate=False, legend=False, point_size=5, alpha=0.3) is display
    assert (display.ax_, display.figure_) == (axes, figure)
    assert (display.legend_, display.annotations_) == (None, [])
    assert display.points_[0].get_sizes()[0] == 5 and display.points_[0].get_alpha() == 0.3
    parts = pyplot.figure(layout="constrained").subfigures(1, 2)
    assert display.plot(parts[0].subplots()).figure_ is parts[0]


def test_far_texts_are_counted(rng: np.random.Generator) -> None:
    positions = np.concatenate([rng.normal(size=(1000, 2)), [[500.0, 0.0]] * 3])
    display = EmbeddingMapDisplay(positions).plot()
    assert display.ax_.get_xlabel() == "3 texts lie outside the frame"
    assert EmbeddingMapDisplay(positions[:1000]).plot().ax_.get_xlabel() == ""


def test_map_can_be_saved_and_pickled(blobs: Any, tmp_path: Path) -> None:
    blobs = blobs[0], blobs[1] % 3
    display = draw(blobs)
    for name in ("map.png", "map.svg", "map.pdf"):
        display.figure_.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000
    fresh = EmbeddingMapDisplay(blobs[0], y=blobs[1])
    again = pickle.loads(pickle.dumps(fresh)).plot()
    assert len(again.annotations_) == len(display.annotations_)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"annotate": 2}, TypeError, "`annotate` parameter of `EmbeddingMapDisplay` must be True"),
        ({"point_size": 0}, ValueError, "`point_size` parameter.*got 0"),
        ({"alpha": 1.5}, ValueError, r"`alpha` parameter.*in \(0, 1\].*got 1.5"),
        ({"size": 3}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_plot_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EmbeddingMapDisplay.from_embeddings(np.eye(4), reducer="pca", **options)
