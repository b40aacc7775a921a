"""Maps: colours that all eyes tell apart, names that do not overlap, texts embedded once."""

import copy
import itertools
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import FakeVectorizer
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skembed.estimators.classification import EmbeddingClassifier
from skembed.estimators.clustering import EmbeddingClusterer
from skembed.estimators.zero_shot import ZeroShotClassifier
from skembed.exceptions import SkembedWarning
from skembed.plotting.display import EmbeddingMapDisplay
from skembed.plotting.drawing import MAX_LEGEND_ROWS, list_legend
from skembed.plotting.groups import (
    MARKERS,
    N_PLAIN_COLORS,
    NOISE_COLOR,
    PALETTE,
    read_groups,
    shorten_name,
)
from skembed.plotting.layout import choose_point_size, find_anchors, find_frame, place_boxes
from skembed.plotting.projection import read_hover_texts

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")

ANIMALS = [f"cat dog horse {word}" for word in "fur paw tail bark purr tooth".split()]
MONEY = [f"bank loan interest {word}" for word in "rate debt fee cash coin bond".split()]
TEXTS = [*ANIMALS, *MONEY]
LABELS = ["animals"] * 6 + ["money"] * 6


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture
def blobs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two-dimensional blobs of 77 labels, (600, 2) and (600,)."""
    centres = rng.uniform(0, 20, size=(77, 2))
    labels = np.concatenate([np.arange(77), rng.integers(77, size=523)])
    return centres[labels] + 0.5 * rng.normal(size=(600, 2)), labels


def fitted(estimator: Any, y: Any = LABELS) -> Any:
    estimator = estimator.fit(TEXTS, y)
    FakeVectorizer.n_texts = 0
    return estimator


def face_colors(display: EmbeddingMapDisplay) -> set[str]:
    from matplotlib.colors import to_hex

    return {to_hex(color) for part in display.points_ for color in part.get_facecolors()}


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
        ([[1], [2], [3]], ValueError, r"got shape \(3, 1\)"),
        (["a", None, "b"], ValueError, r"no missing labels.*first at y\[1\]"),
        ([1.0, np.nan, 2.0], ValueError, r"no missing labels.*first at y\[1\]"),
        ([1.0, 2.0, np.inf], ValueError, r"finite numbers; y\[2\]"),
        (["a", 1, "b"], TypeError, "labels of one type"),
        ([1j, 2j, 3j], TypeError, "got dtype complex128"),
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


# Layout


def boxes_overlap(centres: np.ndarray, sizes: np.ndarray) -> bool:
    gaps = np.abs(centres[:, None] - centres[None]) - (sizes[:, None] + sizes[None]) / 2
    touching = (gaps < -1e-9).all(axis=-1)
    return bool(touching[np.triu_indices(len(centres), 1)].any())


def test_boxes_find_places_that_do_not_overlap(rng: np.random.Generator) -> None:
    anchors = rng.uniform(0, 500, size=(77, 2))
    sizes = np.column_stack([rng.uniform(30, 110, 77), np.full(77, 9.0)])
    assert boxes_overlap(anchors, sizes)
    placed = place_boxes(anchors, sizes, ((0, 0), (500, 500)), np.ones(77))
    assert np.isfinite(placed).all()
    assert not boxes_overlap(placed, sizes)
    assert (placed - sizes / 2 >= 0).all() and (placed + sizes / 2 <= 500).all()
    # Near: half of them hardly move.
    assert np.median(np.linalg.norm(placed - anchors, axis=1)) < 20


def test_boxes_without_room_are_left_out_by_priority() -> None:
    sizes = np.array([[10.0, 10.0]] * 3)
    anchors = np.array([[5.0, 5.0]] * 3)
    placed = place_boxes(anchors, sizes, ((0, 0), (10, 10)), np.array([1, 3, 2]))
    assert np.isfinite(placed).all(axis=1).tolist() == [False, True, False]
    wide = place_boxes(anchors, sizes + (1, 0), ((0, 0), (10, 10)), np.array([1, 3, 2]))
    assert np.isnan(wide).all()


def test_boxes_avoid_points() -> None:
    anchors, sizes = np.array([[50.0, 50.0]]), np.array([[20.0, 6.0]])
    points = anchors + np.random.default_rng(0).uniform(-3, 3, size=(30, 2))
    [plain] = place_boxes(anchors, sizes, ((0, 0), (100, 100)), np.ones(1))
    [beside] = place_boxes(anchors, sizes, ((0, 0), (100, 100)), np.ones(1), points)
    assert plain.tolist() == [50, 50]
    covered = (np.abs(points - beside) < sizes / 2).all(axis=1)
    assert covered.sum() <= 3 and np.linalg.norm(beside - anchors) < 25


def test_anchor_is_where_a_group_is_densest(rng: np.random.Generator) -> None:
    large = rng.normal(size=(60, 2)) * 0.1
    small = rng.normal(size=(40, 2)) * 0.1 + (10, 0)
    anchors = find_anchors(np.concatenate([large, small]), np.zeros(100, dtype=np.int64), 2)
    assert np.linalg.norm(anchors[0]) < 0.2  # the mean would be (4, 0), where there is nothing
    assert np.isnan(anchors[1]).all()


def test_frame_leaves_out_far_islands_without_a_name(rng: np.random.Generator) -> None:
    points = np.concatenate([rng.normal(size=(1000, 2)), [[500.0, 0.0]] * 3])
    low, high = find_frame(points, np.zeros((1, 2)))
    assert high[0] < 10 and (points[:1000] >= low).all() and (points[:1000] <= high).all()
    low, high = find_frame(points, np.array([[500.0, 0.0]]))
    assert high[0] > 500
    low, high = find_frame(np.zeros((3, 2)), np.empty((0, 2)))
    assert (low < 0).all() and (high > 0).all()


def test_points_shrink_as_they_grow_in_number() -> None:
    sizes = [choose_point_size(n, 250_000.0) for n in (200, 5_000, 50_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 25 and 1.5 <= sizes[-1] <= 4


# The static map


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
        ({"annotate": 1}, TypeError, "`annotate` parameter of `EmbeddingMapDisplay` must be True"),
        ({"point_size": 0}, ValueError, "`point_size` parameter.*got 0"),
        ({"alpha": 1.5}, ValueError, r"`alpha` parameter.*in \(0, 1\].*got 1.5"),
        ({"size": 3}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_plot_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EmbeddingMapDisplay.from_embeddings(np.eye(4), reducer="pca", **options)


# From embeddings


def test_coordinates_are_reused(rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(30, 5))
    first = EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca")
    again = EmbeddingMapDisplay.from_embeddings(
        vectors, rng.integers(3, size=30), coordinates=first.coordinates, reducer=first.reducer_
    )
    assert np.array_equal(again.coordinates, first.coordinates)
    np.testing.assert_allclose(again.place(vectors), first.coordinates, atol=1e-12)
    bare = EmbeddingMapDisplay.from_embeddings(vectors, coordinates=first.coordinates)
    assert bare.reducer_ is None
    with pytest.raises(ValueError, match="must have `transform` to place new texts; there is none"):
        bare.place(vectors)


@pytest.mark.parametrize("n", [2, 9])
def test_few_texts_fall_back_to_pca_and_say_so(n: int, rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(n, 6))
    with pytest.warns(SkembedWarning, match=rf"UMAP needs at least 10 texts; got {n}\."):
        display = EmbeddingMapDisplay.from_embeddings(vectors)
    silent = EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca")
    assert np.array_equal(display.coordinates, silent.coordinates)


def test_one_dimension_makes_a_line(rng: np.random.Generator) -> None:
    display = EmbeddingMapDisplay.from_embeddings(rng.normal(size=(20, 1)), reducer="pca")
    assert (display.coordinates[:, 1] == 0).all() and np.ptp(display.coordinates[:, 0]) > 1
    assert display.place([[0.5]]).shape == (1, 2)


def test_equal_embeddings_make_a_point() -> None:
    vectors = np.ones((20, 4), dtype=np.float32)
    display = EmbeddingMapDisplay.from_embeddings(
        vectors, ["a", "b"] * 10, reducer=FunctionTransformer(lambda X: X[:, :2])
    )
    assert len(display.annotations_) == 2


def test_reducer_is_cloned(rng: np.random.Generator) -> None:
    reducer = FunctionTransformer(lambda X: X[:, :2] * 2)
    vectors = rng.normal(size=(12, 4))
    display = EmbeddingMapDisplay.from_embeddings(vectors, reducer=reducer)
    assert np.array_equal(display.coordinates, 2 * vectors[:, :2])
    assert display.reducer_ is not reducer
    with pytest.raises(ValueError, match=r"finite coordinates of shape \(12, 2\); got \(12, 4\)"):
        EmbeddingMapDisplay.from_embeddings(vectors, reducer=FunctionTransformer())


BAD = np.eye(12)
BAD[3, 3] = np.nan


@pytest.mark.parametrize(
    ("X", "options", "error", "message"),
    [
        (BAD, {}, ValueError, "finite numbers; row 3 holds NaN"),
        (TEXTS, {}, TypeError, "array of numbers.*use `from_estimator`"),
        (np.empty((0, 3)), {}, ValueError, "at least one text"),
        (np.eye(1), {"reducer": "pca"}, ValueError, "at least 2 texts to make a map; got 1"),
        (np.eye(3), {"reducer": "tsne"}, ValueError, "`reducer` parameter.*'umap', 'pca'"),
        (np.eye(3), {"reducer": 3}, TypeError, "transformer with `fit_transform`"),
        (np.eye(3), {"random_state": "zero"}, ValueError, "seed"),
        (np.eye(3), {"texts": ["a", "b"]}, ValueError, "must hold 3 texts, one a point; got 2"),
        (np.eye(3), {"texts": "abc"}, TypeError, "`texts` parameter.*bare str"),
        (np.eye(3), {"y": [0, 1]}, ValueError, "one label a text"),
        (np.eye(3), {"coordinates": np.eye(2)}, ValueError, r"shape \(3, 2\).*got shape \(2, 2\)"),
        (np.eye(3), {"coordinates": np.eye(3)}, ValueError, r"shape \(n_texts, 2\)"),
    ],
)
def test_bad_input_is_refused_before_the_reduction(
    X: Any, options: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # what gets so far fails in another way
    with pytest.raises(error, match=message):
        EmbeddingMapDisplay.from_embeddings(X, **options)


def test_sparse_embeddings_are_refused() -> None:
    from scipy import sparse

    with pytest.raises(TypeError, match=r"dense array; got a sparse matrix.*TruncatedSVD"):
        EmbeddingMapDisplay.from_embeddings(sparse.eye(12).tocsr())


def test_missing_umap_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"`EmbeddingMapDisplay` needs `umap`.*skembed\[plot\]"):
        EmbeddingMapDisplay.from_embeddings(np.eye(12))


# From estimators


def make_map(estimator: Any, X: Any = TEXTS, y: Any = None, **options: Any) -> EmbeddingMapDisplay:
    return EmbeddingMapDisplay.from_estimator(estimator, X, y, reducer="pca", **options)


def clf_pipeline() -> Pipeline:
    return make_pipeline(FakeVectorizer(), StandardScaler(), LogisticRegression())


PREDICTORS = {
    "classifier": lambda: EmbeddingClassifier(FakeVectorizer()),
    "zero-shot": lambda: ZeroShotClassifier(
        FakeVectorizer(), descriptions={"animals": "cat dog horse", "money": "bank loan interest"}
    ),
    "pipeline": clf_pipeline,
    "pipeline of embeddings": lambda: make_pipeline(
        FakeVectorizer(), EmbeddingClassifier(vectorizer=None)
    ),
    "pipeline of a classifier of texts": lambda: make_pipeline(
        FunctionTransformer(lambda X: [text.upper() for text in X]),
        EmbeddingClassifier(FakeVectorizer()),
    ),
    "search": lambda: GridSearchCV(clf_pipeline(), {"logisticregression__C": [1.0]}, cv=2),
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictions_color_and_texts_are_embedded_once(kind: str) -> None:
    estimator = fitted(PREDICTORS[kind]())
    before = copy.deepcopy(vars(estimator)).keys()
    display = make_map(estimator)
    assert FakeVectorizer.n_texts == len(TEXTS)
    assert np.asarray(display.y).tolist() == estimator.predict(TEXTS).tolist() == LABELS
    assert display.texts == TEXTS
    assert vars(estimator).keys() == before
    assert np.ptp(display.coordinates, axis=0).min() > 0
    # New texts take the same way.
    placed = display.place(TEXTS[:3])
    np.testing.assert_allclose(placed, display.coordinates[:3], atol=1e-5)


def test_labels_win_over_predictions() -> None:
    estimator = fitted(EmbeddingClassifier(FakeVectorizer()))
    display = make_map(estimator, y=np.arange(12) % 3)
    assert [name for name, *_ in list_legend(display._read()[1])] == ["0 (4)", "1 (4)", "2 (4)"]


def test_classes_fix_the_colors_where_one_is_not_predicted() -> None:
    estimator = fitted(EmbeddingClassifier(FakeVectorizer()))
    display = make_map(estimator, MONEY)
    assert set(display.y) == {"money"}
    assert face_colors(display) == {PALETTE[1]}


@pytest.mark.parametrize(
    "vectorizer", [FakeVectorizer(), Pipeline([("emb", FakeVectorizer()), ("all", "passthrough")])]
)
def test_vectorizer_alone(vectorizer: Any) -> None:
    FakeVectorizer.n_texts = 0
    display = make_map(vectorizer)
    assert FakeVectorizer.n_texts == len(TEXTS)
    assert display.y is None and display.place(MONEY).shape == (6, 2)


def test_regressor_gives_a_scale() -> None:
    estimator = make_pipeline(FakeVectorizer(), Ridge()).fit(TEXTS, np.arange(12.0))
    assert make_map(estimator).colorbar_ is not None


def test_clusterer_shows_its_labels_for_the_texts_of_fit() -> None:
    found = fitted(EmbeddingClusterer(FakeVectorizer(), n_clusters=2, random_state=0), None)
    # No nearest centre would say this, so the labels must come from `labels_`.
    found.labels_ = np.where(np.arange(12) == 11, -1, found.labels_)
    display = make_map(found)
    assert np.array_equal(display.y, found.labels_)
    assert {note.get_text() for note in display.annotations_} <= set(found.cluster_names_.values())
    assert [text.get_text() for text in display.legend_.get_texts()][-1] == "noise (1)"
    # Other texts, or the same in another order, are predicted.
    assert np.array_equal(make_map(found, TEXTS[::-1]).y, found.predict(TEXTS[::-1]))
    assert np.array_equal(make_map(found, TEXTS[:10]).y, found.predict(TEXTS[:10]))
    # Labels of one's own are not clusters, so they get no cluster's name.
    assert make_map(found, y=np.arange(12) % 2).names is None
    assert make_map(found, y=found.labels_).names == found.cluster_names_


def test_clusterer_without_predict_shows_the_texts_of_fit() -> None:
    found = make_pipeline(FakeVectorizer(), AgglomerativeClustering(2)).fit(TEXTS)
    assert np.array_equal(make_map(found).y, found[-1].labels_)
    with pytest.raises(ValueError, match=r"only the 12 texts that it was fitted on; got 6. Pass y"):
        make_map(found, MONEY)
    assert make_map(found, MONEY, y=["a"] * 6).y == ["a"] * 6


def test_estimator_of_embeddings() -> None:
    vectors = FakeVectorizer().transform(TEXTS)
    estimator = KMeans(2, random_state=0, n_init=1).fit(vectors)
    display = make_map(estimator, vectors)
    assert np.array_equal(display.y, estimator.labels_)
    assert display.texts is None and display.vectorizer_ is None
    assert display.place(vectors[:2]).shape == (2, 2)


def test_frames_go_into_a_pipeline_as_they_are() -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": TEXTS, "year": np.arange(12)})
    pick = FunctionTransformer(lambda X: X["text"].tolist())
    display = make_map(make_pipeline(pick, FakeVectorizer()), frame)
    assert display.texts is None and display.coordinates.shape == (12, 2)


def test_missing_texts_follow_the_vectorizer() -> None:
    texts = [*TEXTS, None]
    display = make_map(FakeVectorizer(missing="zero"), texts)
    assert display.texts == [*TEXTS, ""]
    with pytest.raises(ValueError, match=r"no missing texts.*X\[12\]"):
        make_map(FakeVectorizer(), texts)


@pytest.mark.parametrize(
    ("estimator", "X", "error", "message"),
    [
        (EmbeddingClassifier(FakeVectorizer()), TEXTS, NotFittedError, "not fitted"),
        (
            object(),
            TEXTS,
            TypeError,
            "`estimator` parameter of `EmbeddingMapDisplay`.*got an object of type object",
        ),
        (FakeVectorizer, TEXTS, TypeError, "`estimator` parameter"),
        (FakeVectorizer(), "a text", TypeError, "bare str"),
        (FakeVectorizer(), [("a", "b")], ValueError, "got pairs"),
        (FakeVectorizer(), np.eye(3), TypeError, "must hold texts"),
    ],
)
def test_bad_estimators(estimator: Any, X: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_map(estimator, X)


def test_place_refuses_what_the_map_does_not_know() -> None:
    display = make_map(FakeVectorizer())
    with pytest.raises(ValueError, match=r"shape \(n_texts, 64\); got shape \(2, 3\)"):
        display.place(np.ones((2, 3)))
    with pytest.raises(TypeError, match="bare str"):
        display.place("a text")
    vectors = FakeVectorizer().transform(TEXTS)
    with pytest.raises(TypeError, match="array of numbers"):
        EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca").place(TEXTS)


def test_hover_texts_are_one_column() -> None:
    assert read_hover_texts(np.array(["a", "b"])) == ["a", "b"]
    assert read_hover_texts([("a", "b")]) is None
    assert read_hover_texts(np.eye(2)) is None


# UMAP itself (its functions compile at first use: one fit for all)


@pytest.fixture(scope="module")
def umap_map() -> EmbeddingMapDisplay:
    """A map of two groups that differ in direction, not in length."""
    pytest.importorskip("umap", reason="needs umap-learn: skembed[plot]")
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(2, 8), 20, axis=0) + 0.1 * rng.normal(size=(40, 8))
    vectors *= rng.uniform(0.1, 10, size=(40, 1))
    return EmbeddingMapDisplay.from_embeddings(vectors, np.repeat(["x", "y"], 20))


def test_umap_is_seeded_and_by_cosine(umap_map: EmbeddingMapDisplay) -> None:
    reducer = umap_map.reducer_
    assert (reducer.metric, reducer.random_state, reducer.n_jobs) == ("cosine", 0, 1)
    assert np.array_equal(reducer.embedding_, umap_map.coordinates.astype(np.float32))
    from umap import UMAP

    again = UMAP(metric="cosine", n_neighbors=15, random_state=0, n_jobs=1)
    assert np.array_equal(again.fit_transform(reducer._raw_data), reducer.embedding_)


def test_umap_keeps_directions_together(umap_map: EmbeddingMapDisplay) -> None:
    x, y = umap_map.coordinates[:20], umap_map.coordinates[20:]
    inner = max(np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in (x, y))
    assert np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)) > 2 * inner


def test_umap_places_new_vectors_with_their_own(umap_map: EmbeddingMapDisplay) -> None:
    new = np.eye(2, 8) * 3 + 0.05
    placed = umap_map.place(new)
    centres = umap_map.coordinates.reshape(2, 20, 2).mean(axis=1)
    distances = np.linalg.norm(placed[:, None] - centres[None], axis=-1)
    assert distances.argmin(axis=1).tolist() == [0, 1]
    assert distances.min(axis=1).max() < 0.25 * distances.max(axis=1).min()
    assert np.array_equal(umap_map.place(new), placed)


# The interactive map


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
