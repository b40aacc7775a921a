"""Encoder of text columns under resolved settings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from skembed._inputs import TextColumns
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import TruncationWarning
from skembed.inference.engine import EmbedReport, embed_texts
from skembed.inference.registry import Lease
from skembed.inference.settings import Settings, load_in_worker, load_resolved

__all__ = ["Encoder", "warn_truncated"]


@dataclass(frozen=True)
class Encoder:
    """Encoder of text columns; cheap to make: weights are loaded at first use."""

    settings: Settings
    lease: Lease  # keeps weights loaded and the cache open
    cache: EmbeddingCache | None

    def embed(
        self,
        columns: TextColumns,
        sides: Sequence[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> tuple[np.ndarray, EmbedReport]:
        """Embed each column for its side: float32 (n_texts, n_columns * dim), and the counts.

        The last of the `sides` is that of all further columns, too. `batch_tokens` applies where
        the parameter is "auto"; `progress` overrides `verbose`.
        """
        # The lease outlives this encoder, and keeps the cache open for the next call.
        self.lease.cache = self.cache
        missing = self.settings.parameters.missing
        parts, total = [], EmbedReport()
        for i, (texts, absent) in enumerate(zip(columns.columns, columns.missing, strict=True)):
            side = sides[min(i, len(sides) - 1)]
            vectors, report = self._embed_column(texts, side, batch_tokens, progress)
            if missing in ("zero", "nan"):
                vectors[absent] = 0.0 if missing == "zero" else np.nan
            parts.append(vectors)
            total.add(report)
        return parts[0] if len(parts) == 1 else np.hstack(parts), total

    def _embed_column(
        self, texts: list[str], side: str, batch_tokens: int | None, progress: bool | None
    ) -> tuple[np.ndarray, EmbedReport]:
        """Embed one column, then truncate and normalise, (n_texts, dim); and the counts."""
        settings, parameters = self.settings, self.settings.parameters
        budget = parameters.batch_tokens
        vectors, report = embed_texts(
            texts,
            settings.requests[side],
            get_models=partial(load_resolved, settings.model, self.lease),
            load_in_worker=partial(load_in_worker, settings.model),
            cache=self.cache,
            batch_tokens=budget if isinstance(budget, int) else batch_tokens,
            progress=parameters.verbose if progress is None else progress,
            n_jobs=parameters.n_jobs,
        )
        if settings.dim < vectors.shape[1]:
            vectors = np.ascontiguousarray(vectors[:, : settings.dim])
        if parameters.normalize:
            norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
            vectors /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
        return vectors, report


def warn_truncated(n_cut: int, n_texts: int, max_length: int, *, stacklevel: int) -> None:
    """Warn if texts were cut, once for all of them; the level is the public caller's."""
    if n_cut:
        warnings.warn(
            f"{n_cut} of {n_texts} texts were longer than max_length={max_length} tokens "
            "and were cut there. Raise `max_length`, or silence this with "
            "warnings.filterwarnings('ignore', category=skembed.TruncationWarning).",
            TruncationWarning,
            stacklevel=stacklevel,
        )
