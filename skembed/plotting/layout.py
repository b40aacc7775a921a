"""The geometry of a map: what its frame shows, and where the names of the groups go."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

__all__ = [
    "Codes",
    "PlacedName",
    "Points",
    "choose_alpha",
    "choose_point_size",
    "find_anchors",
    "find_frame",
    "place_boxes",
    "place_names",
]

Points = npt.NDArray[np.floating[Any]]  # (n, 2)
Codes = npt.NDArray[np.int64]  # (n,)

# Bins along each side of the density grid, and the width of its smoothing, in bins.
_N_BINS = 64
_SMOOTHING = 2.0
# The frame reaches this much farther from the median than all but 0.5 % of the points.
_FRAME_QUANTILE = 0.005
_FRAME_STRETCH = 1.6
_MARGIN = 0.04

# Share of the area for points to cover, and the smallest and largest point (points squared).
_COVERAGE = 0.25
_SMALLEST, _LARGEST = 2.0, 36.0

_N_AVOIDED = 1500  # names avoid this many of the points
_LEADER_FROM = 0.8  # heights of the name between it and the nearest point of its group
# Names are wide: a step sideways looks shorter than a step up.
_STRETCH = np.array([1.6, 1.0])
_GROWTH = 0.06  # from ring to ring
# Covering one point costs as much as this many heights of distance; covering many, at most that.
_COVER_COST, _MAX_COVER_COST = 0.7, 3.5


def find_frame(positions: Points, anchors: Points) -> tuple[Points, Points]:
    """Return the low and high corner (2,) of the frame, a square with a margin.

    Islands of less than a percent of the points, far from all others, would shrink the rest. They
    stay outside unless they hold an anchor.
    """
    quantiles = [_FRAME_QUANTILE, 0.5, 1 - _FRAME_QUANTILE]
    low, middle, high = np.quantile(positions, quantiles, axis=0)
    low, high = middle + _FRAME_STRETCH * (low - middle), middle + _FRAME_STRETCH * (high - middle)
    inside = ((positions >= low) & (positions <= high)).all(axis=1)
    shown = np.concatenate([positions[inside], anchors])
    low, high = shown.min(axis=0), shown.max(axis=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2 or 1.0
    half *= 1 + 2 * _MARGIN
    return middle - half, middle + half


def find_anchors(positions: Points, codes: Codes, n_groups: int) -> Points:
    """Return the position where each group is densest, (n_groups, 2); NaN for an empty group.

    A mean would fall between the islands of a group that has several.
    """
    anchors = np.full((n_groups, 2), np.nan)
    if not n_groups:
        return anchors
    low = positions.min(axis=0)
    scaled = (positions - low) / (float(np.ptp(positions, axis=0).max()) or 1.0)
    cells = np.minimum((scaled * _N_BINS).astype(np.int64), _N_BINS - 1)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(n_groups + 1))
    for group in range(n_groups):
        rows = order[bounds[group] : bounds[group + 1]]
        if len(rows):
            anchors[group] = _find_densest(positions[rows], cells[rows])
    return anchors


def _find_densest(positions: Points, cells: Codes) -> Points:
    """Return the mean of the points (n, 2) around the densest cell of the grid, (2,)."""
    grid = np.zeros((_N_BINS, _N_BINS))
    np.add.at(grid, (cells[:, 0], cells[:, 1]), 1.0)
    peak = np.unravel_index(gaussian_filter(grid, _SMOOTHING).argmax(), grid.shape)
    distances = np.abs(cells - np.array(peak)).max(axis=1)
    return np.asarray(positions[distances <= max(_SMOOTHING, distances.min())].mean(axis=0))


def choose_point_size(n: int, area: float) -> float:
    """Return the size of n points on an area, both in points squared (1/72 inch)."""
    return float(np.clip(_COVERAGE * area / max(n, 1), _SMALLEST, _LARGEST))


def choose_alpha(n: int) -> float:
    """Return the opacity of n points: 0.85 up to a thousand, 0.5 from a hundred thousand."""
    share = np.clip((np.log10(max(n, 1)) - 3) / 2, 0, 1)
    return round(float(0.85 - 0.35 * share), 3)


class PlacedName(NamedTuple):
    """The group of a name, its offset (2,) from the anchor, and whether a line joins the two."""

    group: int
    offset: Points
    far: bool


def place_names(
    anchors: Points,
    sizes: Points,
    bounds: tuple[Any, Any],
    points: Points,
    codes: Codes,
    shown: Codes,
) -> list[PlacedName]:
    """Place the names of the groups `shown`, the largest first, so that none overlaps another.

    `anchors` and `sizes` (n_shown, 2), `bounds` and `points` (n, 2) are in one unit. Names that
    find no room are left out.
    """
    avoided = points[np.random.default_rng(0).permutation(len(points))[:_N_AVOIDED]]
    counts = np.bincount(codes[codes >= 0], minlength=int(shown.max(initial=-1)) + 1)[shown]
    centres = place_boxes(anchors, sizes, bounds, counts, avoided)
    names = []
    for group, anchor, centre, size in zip(shown.tolist(), anchors, centres, sizes, strict=True):
        if np.isfinite(centre).all():
            gaps = np.maximum(np.abs(points[codes == group] - centre) - size / 2, 0)  # (n, 2)
            far = bool(np.hypot(*gaps.T).min() > _LEADER_FROM * size[1])
            names.append(PlacedName(group, centre - anchor, far))
    return names


def place_boxes(
    anchors: Points,
    sizes: Points,
    bounds: tuple[Any, Any],
    priority: npt.NDArray[Any],
    points: Points | None = None,
) -> Points:
    """Place boxes near their anchors so that none overlaps another.

    The box with the highest priority goes first (equal ones in input order), to the best free
    centre: near its anchor, and covering few points. `anchors` and `sizes` (width, height) are
    (n, 2); centres stay in `bounds` (low and high corner), and are NaN where nothing is free.
    """
    low, high = np.asarray(bounds[0], dtype=float), np.asarray(bounds[1], dtype=float)
    placed = np.full(anchors.shape, np.nan)
    step = float(np.median(sizes[:, 1])) if len(sizes) else 1.0
    points = np.empty((0, 2)) if points is None else points
    offsets = _make_offsets(step, reach=0.25 * float((high - low).max()))
    done: list[int] = []
    for box in np.argsort(-np.asarray(priority), kind="stable"):
        half = sizes[box] / 2
        if (2 * half > high - low).any() or not np.isfinite(anchors[box]).all():
            continue
        tries = np.clip(anchors[box] + offsets, low + half, high - half)  # (C, 2)
        free = _count_within(tries, placed[done], (sizes[done] + sizes[box]) / 2) == 0
        if free.any():
            cost = np.linalg.norm((tries - anchors[box]) / _STRETCH, axis=1)
            near = (points > tries.min(axis=0) - half) & (points < tries.max(axis=0) + half)
            covered = _count_within(tries, points[near.all(axis=1)], half)
            cost += step * np.minimum(_COVER_COST * covered, _MAX_COVER_COST)
            placed[box] = tries[np.where(free, cost, np.inf).argmin()]
            done.append(int(box))
    return placed


def _count_within(tries: Points, points: Points, half: Points) -> npt.NDArray[np.int64]:
    """Count the points (n, 2) less than `half`, (2,) or (n, 2), away from each try, (C,)."""
    gaps = np.abs(tries[:, None] - points[None])  # (C, n, 2)
    return np.asarray((gaps < half).all(axis=-1).sum(axis=1))


def _make_offsets(step: float, *, reach: float) -> Points:
    """Return offsets (C, 2) on ellipses around 0, half a step apart and then wider."""
    n_rings = int(np.log1p(2 * _GROWTH * reach / step) / np.log1p(_GROWTH)) + 1
    radii = step / 2 * np.expm1(np.arange(1, n_rings + 1) * np.log1p(_GROWTH)) / _GROWTH
    angles = np.arange(16) * (2 * np.pi / 16)
    rings = radii[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1) * _STRETCH
    return np.asarray(np.concatenate([np.zeros((1, 2)), rings.reshape(-1, 2)]))
