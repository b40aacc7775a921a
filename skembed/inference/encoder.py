"""Encoder of text columns under resolved settings, and the estimator's part of making it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from skembed._inputs import TextColumns
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
from skembed.exceptions import SkembedWarning, TruncationWarning
from skembed.inference.engine import EmbedReport, embed_texts
from skembed.inference.registry import Lease
from skembed.inference.settings import (
    Parameters,
    Settings,
    check_settings,
    find_settings,
    load_in_worker,
    load_resolved,
    pack_model,
)

__all__ = ["Encoder", "EncoderMixin", "warn_truncated"]


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


class EncoderMixin:
    """Mixin of an estimator with `Parameters`, before scikit-learn's bases: encoder and pickles.

    Clones, shallow copies too, share the lease. A pickle holds the commit of a hub model that was
    used, and the model's files where `store_weights`.
    """

    model: Any
    revision: Any
    store_weights: Any
    cache: Any
    model_: Any

    def __sklearn_clone__(self) -> Any:
        """Return a clone that shares the lease: folds and grid points find the weights loaded."""
        clone = super().__sklearn_clone__()  # type: ignore[misc]
        clone.__dict__["_lease"] = self._shared_lease()
        return clone

    def __copy__(self) -> Any:
        """Return a copy that shares the lease and all fitted values."""
        self._shared_lease()
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return parameters and fitted values; the model's files too where `store_weights`."""
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        lease: Lease | None = state.pop("_lease", None)
        pin = None if lease is None else lease.find_pin(self.model, self.revision)
        if pin is not None:
            state["_pin"] = pin
        if self.store_weights is not False:
            parameters = check_settings(self._parameters())
            if parameters.store_weights:
                state["_stored_files"] = pack_model(parameters, self._shared_lease())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and note that the device may be another machine's."""
        state = dict(state)
        stored, pin = state.pop("_stored_files", None), state.pop("_pin", None)
        super().__setstate__(state)  # type: ignore[misc]
        self.__dict__["_lease"] = lease = Lease(stored, from_pickle=True)
        if pin is not None:
            lease.pins[pin[0]] = pin[1]

    def _make_encoder(
        self, *, stacklevel: int = 3, embeds: bool = False, anew: bool = False
    ) -> Encoder:
        """Return the encoder for the current parameters; loads no base weights.

        Before it `embeds`, warns of an instruction that the model did not learn. Refuses another
        model than `fit` saw, unless that is to be forgotten (`anew`).
        """
        lease = self._shared_lease()
        adapter = getattr(self, "adapter_", None)
        fitted = None
        if not anew and "fingerprint" in getattr(self, "model_", ()):
            fitted = {**self.model_, "auto": getattr(self, "_card", {}).get("auto", {})}
        settings = find_settings(self._parameters(), lease, adapter, fitted)
        if settings.warning:
            warnings.warn(settings.warning, SkembedWarning, stacklevel=stacklevel)
        advice = settings.advice
        if embeds and advice and advice not in lease.warned:
            lease.warned.add(advice)
            warnings.warn(advice, SkembedWarning, stacklevel=stacklevel)
        return Encoder(settings, lease, resolve_cache(self.cache))

    def _parameters(self) -> Parameters:
        """Return the parameters that embedding depends on, unchecked."""
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    def _shared_lease(self) -> Lease:
        """Return the lease that keeps weights loaded while this estimator or a clone lives."""
        lease: Lease | None = self.__dict__.get("_lease")
        return self.__dict__.setdefault("_lease", Lease()) if lease is None else lease


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
