"""One copy of each loaded model per process.

Weights are loaded at first use and shared by every estimator that asks for the same model, device
and type. An estimator holds a lease (shared with its clones); a model is freed with the last lease.
In a worker process of joblib, where each task brings an estimator of its own, the two models used
last stay until the worker ends: one load per worker, not one per task.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from skembed.adapters.adapter import Adapter
from skembed.cache.embedding_cache import EmbeddingCache
from skembed.inference.workers import use_one_thread_in_forks
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel, ModelKey, load_registered
from skembed.model.sources import ModelSource

__all__ = ["LEASE_SETTINGS", "Lease", "ModelRegistry", "StoredModel", "WORKER_MODELS", "registry"]

logger = logging.getLogger(__name__)
WORKER_MODELS = 2
LEASE_SETTINGS = 8
StoredModel = tuple[str, str | None, Mapping[str, bytes]]  # `model`, `revision`, files


class Lease:
    """Models, cache and settings that an estimator and its clones share; left out of pickles.

    `pins` holds the commit that a hub name means here, by (`model`, `revision`); pickles keep it.

    `from_pickle`: the estimator was unpickled, maybe on another machine; `stored` is the model
    that came with it.
    """

    def __init__(self, stored: StoredModel | None = None, *, from_pickle: bool = False) -> None:
        self.models: dict[ModelKey, LoadedModel] = {}
        self.cache: EmbeddingCache | None = None  # stays open until another one is used
        self.adapter: tuple[tuple[Any, ...], Adapter] | None = None
        self.from_pickle = from_pickle
        self.pins: dict[tuple[str, str | None], str] = {}
        self.warned: set[str] = set()  # what need not be said again
        self._stored = stored
        self._settings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._guard = threading.Lock()

    def hold(self, *models: LoadedModel) -> None:
        """Keep these models, one on each device, and no other."""
        if any(self.models.get(model.key) is not model for model in models):
            self.models = {model.key: model for model in models}

    def hold_adapter(self, key: tuple[Any, ...], read: Callable[[], Adapter]) -> Adapter:
        """Return the adapter of this key, read if it is not the one held."""
        with self._guard:
            if self.adapter is None or self.adapter[0] != key:
                self.adapter = (key, read())
            return self.adapter[1]

    def recall(self, key: tuple[Any, ...]) -> Any:
        """Return the settings cached under a key; None for none."""
        with self._guard:
            settings = self._settings.get(key)
            if settings is not None:
                self._settings.move_to_end(key)
            return settings

    def remember(self, key: tuple[Any, ...], settings: Any) -> None:
        """Cache settings under a key, beside those of the last few others."""
        with self._guard:
            self._settings[key] = settings
            self._settings.move_to_end(key)
            if len(self._settings) > LEASE_SETTINGS:
                self._settings.popitem(last=False)

    def find_pin(self, model: Any, revision: Any) -> tuple[tuple[str, str | None], str] | None:
        """Return a name of the hub, its revision and the commit used for them; None for none."""
        for key, commit in self.pins.items():
            if key == (model, revision):
                return key, commit
        return None

    def find_files(self, model: str, revision: str | None) -> Mapping[str, bytes] | None:
        """Return the model's files from the pickle; None where another model is asked for."""
        if self._stored is None or self._stored[:2] != (model, revision):
            return None
        return self._stored[2]


class ModelRegistry:
    """Loaded models of this process; safe under threads."""

    def __init__(self) -> None:
        self.n_loads = 0  # how often weights were read since the process began
        self._models: weakref.WeakValueDictionary[ModelKey, LoadedModel]
        self._models = weakref.WeakValueDictionary()
        self._in_worker: OrderedDict[ModelKey, LoadedModel] = OrderedDict()
        self._guard = threading.Lock()
        self._loading: dict[ModelKey, threading.Lock] = {}

    def __len__(self) -> int:
        """Number of models alive."""
        return len(self._models)

    def get(self, key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> LoadedModel:
        """Return the model of this key, loaded if nobody holds it: by one thread, others wait."""
        use_one_thread_in_forks()
        with self._guard:
            lock = self._loading.setdefault(key, threading.Lock())
        with lock:
            loaded = self._models.get(key)
            if loaded is None:
                loaded = load_registered(key, source, config)
                self.n_loads += 1
                self._models[key] = loaded
            if multiprocessing.parent_process() is not None:
                self.keep(loaded)
            return loaded

    def keep(self, loaded: LoadedModel) -> None:
        """Hold a model while this process lives, or until `WORKER_MODELS` others have come.

        For worker processes, where each task brings an estimator of its own.
        """
        loaded = loaded.base or loaded
        with self._guard:
            self._in_worker[loaded.key] = loaded
            self._in_worker.move_to_end(loaded.key)
            if len(self._in_worker) > WORKER_MODELS:
                self._in_worker.popitem(last=False)


registry = ModelRegistry()
