"""Places for names."""

import numpy as np
import pytest
from maps import boxes_overlap

from skembed.plotting.layout import choose_point_size, find_anchors, find_frame, place_boxes

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


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
