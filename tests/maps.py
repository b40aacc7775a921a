"""Texts of two topics, and what a map shows."""

import numpy as np

from skembed.plotting.display import EmbeddingMapDisplay

ANIMALS = [f"cat dog horse {word}" for word in "fur paw tail bark purr tooth".split()]
MONEY = [f"bank loan interest {word}" for word in "rate debt fee cash coin bond".split()]
TEXTS = [*ANIMALS, *MONEY]


def face_colors(display: EmbeddingMapDisplay) -> set[str]:
    from matplotlib.colors import to_hex

    return {to_hex(color) for part in display.points_ for color in part.get_facecolors()}


def boxes_overlap(centres: np.ndarray, sizes: np.ndarray) -> bool:
    gaps = np.abs(centres[:, None] - centres[None]) - (sizes[:, None] + sizes[None]) / 2
    touching = (gaps < -1e-9).all(axis=-1)
    return bool(touching[np.triu_indices(len(centres), 1)].any())
