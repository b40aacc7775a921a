"""The best k rows of a corpus on a GPU, which holds one block of the corpus at a time.

The keys are those of `skembed.search.top_k`, so that equal scores are ordered as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from skembed.similarity import Indices, TopK, Vectors

__all__ = ["top_k_rows_on_device"]

# What one score costs: the score (4), its key and the key's parts (24), and a sorted copy (16).
_BYTES_PER_SCORE = 48
_MIN_COLUMNS = 8192
_NO_KEY = np.iinfo(np.int64).min


def top_k_rows_on_device(
    queries: Vectors,
    read_rows: Callable[[slice], Vectors],
    ranks: Indices,
    k: int,
    *,
    device: torch.device,
    block_bytes: int,
) -> TopK:
    """Return what `skembed.search.top_k.top_k_rows` returns, computed with torch on `device`.

    `block_bytes` bounds the working memory on the device.
    """
    n, m = len(queries), len(ranks)
    rows_by_rank = np.empty(m, dtype=np.int64)
    rows_by_rank[ranks] = np.arange(m)
    scores = np.empty((n, k), dtype=np.float32)
    indices = np.empty((n, k), dtype=np.int64)
    budget = max(1, block_bytes // _BYTES_PER_SCORE)
    max_width = block_bytes // (8 * max(1, queries.shape[1]))  # the block and its copy on the CPU
    width = max(1, min(m, budget, max(_MIN_COLUMNS, 2 * k), max_width))
    height = max(1, min(n, budget // (width + k)))
    for first in range(0, n, height):
        rows = slice(first, min(first + height, n))
        block = torch.from_numpy(np.array(queries[rows])).to(device)
        keys = _find_keys(block, read_rows, ranks, k, width=width).cpu()
        scores[rows] = _unpack_scores(keys).numpy()
        indices[rows] = rows_by_rank[(keys & 0xFFFFFFFF).numpy()]
    return TopK(scores, indices)


def _find_keys(
    queries: torch.Tensor,
    read_rows: Callable[[slice], Vectors],
    ranks: Indices,
    k: int,
    *,
    width: int,
) -> torch.Tensor:
    """Return the k largest keys of each query, descending, (B, k)."""
    device, m = queries.device, len(ranks)
    best = torch.full((len(queries), 0), _NO_KEY, dtype=torch.int64, device=device)
    for first in range(0, m, width):
        columns = slice(first, min(first + width, m))
        # A copy, since torch warns about read-only arrays.
        block = torch.from_numpy(np.array(read_rows(columns))).to(device)  # (C, D)
        with torch.autocast(device.type, enabled=False):
            scores = queries @ block.T  # (B, C)
        keys = _pack_keys(scores, torch.from_numpy(ranks[columns]).to(device))
        best = torch.cat([best, keys], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return best


def _pack_keys(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return scores (B, C) and ranks (C,) as int64 that sort by score, then rank, (B, C)."""
    # A sum that overflowed both ways is the worst score, not the best.
    bits = (scores.nan_to_num(nan=-torch.inf) + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(torch.int64) << 32) | ranks


def _unpack_scores(keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of keys, float32."""
    bits = (keys >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
