"""An estimator's parameters -> which model, where, in which type, with which adapter.

Reads config.json and hashes files; loads no weights but an adapter's.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skembed._validation import (
    MISSING_POLICIES,
    check_bool,
    check_choice,
    check_int,
    check_string,
)
from skembed.adapters import Adapter, read_pooling_kind
from skembed.cache import resolve_cache
from skembed.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BUNDLED_MODELS,
    POOLING_FILE,
    ModelSource,
    fingerprint_weights,
    read_config,
    read_json,
    resolve_source,
    unpack_folder,
)
from skembed.exceptions import CheckpointError, SkembedWarning
from skembed.instructions import check_template, resolve_instruction
from skembed.model import NVEmbedConfig
from skembed.pooling import POOLINGS
from skembed.registry import (
    DTYPES,
    Lease,
    LoadedModel,
    ModelKey,
    choose_attention_path,
    name_dtype,
    registry,
    resolve_device,
    resolve_devices,
    resolve_dtype,
)

OWNER = "NVEmbedVectorizer"


@dataclass(frozen=True)
class ResolvedModel:
    """What runs.

    Attributes
    ----------
    source : ModelSource
        The folder.
    config : NVEmbedConfig
        Its configuration.
    key : ModelKey
        The base model's key in the registry.
    dim : int
        Width of an embedding after truncation.
    adapter : Adapter or None
        What is put on the base: learned by `fit`, or read from the model's folder.
    replicas : tuple of ModelKey
        Keys of the copies on further devices.
    """

    source: ModelSource
    config: NVEmbedConfig
    key: ModelKey
    dim: int
    adapter: Adapter | None = None
    replicas: tuple[ModelKey, ...] = ()

    @property
    def full_key(self) -> ModelKey:
        """The key with the adapter's fingerprint in it, for the cache."""
        if self.adapter is None:
            return self.key
        fingerprint = f"{self.key.fingerprint}+{self.adapter.fingerprint}"
        return replace(self.key, fingerprint=fingerprint)


def resolve_model(estimator: Any, lease: Lease, *, fitted: Adapter | None) -> ResolvedModel:
    """Resolve the parameters of a vectorizer.

    Parameters
    ----------
    estimator : NVEmbedVectorizer
        Read for its parameters only.
    lease : Lease
        Keeps the adapter of a folder between calls.
    fitted : Adapter or None
        The adapter that `fit` learned; it goes before a folder's.

    Raises
    ------
    ModelNotFoundError, CheckpointError, ValueError
        When there is no such model, its files do not fit, or a parameter is beyond its sizes.
    """
    source = find_source(estimator)
    pooling = estimator.pooling
    if pooling is None and source.adapter_folder is not None:
        pooling = read_pooling_kind(source.adapter_folder)
    config = read_config(source, pooling)
    longest = config.backbone.get("max_position_embeddings")
    if longest is not None:
        check_int(estimator.max_length, name="max_length", owner=OWNER, low=2, high=int(longest))
    width = config.hidden_size
    check_int(
        estimator.truncate_dim,
        name="truncate_dim",
        owner=OWNER,
        low=1,
        high=width,
        allow_none=True,
    )
    devices = _find_devices(estimator)
    _check_jobs(estimator.n_jobs, devices)
    dtypes = {resolve_dtype(estimator.dtype, device) for device in devices}
    # One type on all devices: the older of two GPUs may know no bfloat16.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    key, *replicas = (
        ModelKey(
            fingerprint=fingerprint_weights(source),
            pooling=config.pooling,
            device=str(device),
            dtype=name_dtype(estimator.dtype, dtype),
            attention_path=choose_attention_path(device, dtype),
        )
        for device in devices
    )
    adapter = fitted
    if adapter is not None:
        adapter.check_base(key.fingerprint)
        adapter.check_pooling(config)
    elif source.adapter_folder is not None:
        adapter = _read_adapter(source.adapter_folder, config, key.fingerprint, lease)
    dim = estimator.truncate_dim or width
    return ResolvedModel(source, config, key, dim, adapter, tuple(replicas))


def _check_jobs(n_jobs: int | None, devices: list[torch.device]) -> None:
    """Refuse worker processes on GPUs, and beside a list of devices."""
    if n_jobs in (None, 1):
        return
    where = [str(device) for device in devices]
    if len(devices) > 1:
        raise ValueError(
            f"The `n_jobs` parameter of `{OWNER}` must be None or 1 with several devices; got "
            f"{n_jobs} with device={where}. The devices share the work in this process already."
        )
    if devices[0].type != "cpu":
        raise ValueError(
            f"The `n_jobs` parameter of `{OWNER}` must be None or 1 on {where[0]!r}; got "
            f"{n_jobs}. Every worker would put a copy of the model on the one device."
        )


def _read_adapter(folder: Path, config: NVEmbedConfig, fingerprint: str, lease: Lease) -> Adapter:
    """The adapter of a folder, read once while its files stay as they are."""
    names = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, POOLING_FILE)
    state: list[Any] = [str(folder), fingerprint, config.pooling]
    for path in (folder / name for name in names):
        if path.is_file():
            stat = path.stat()
            state += [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return lease.hold_adapter(tuple(state), lambda: Adapter.load(folder, config, fingerprint))


def find_source(estimator: Any) -> ModelSource:
    """The model's folder; that of the pickle, before any download, when there is none here."""
    files = stored_files(estimator)
    name = os.fspath(estimator.model)
    if files is None or name in BUNDLED_MODELS or Path(name).expanduser().is_dir():
        return resolve_source(estimator.model, estimator.revision)
    return replace(resolve_source(unpack_folder(files)), name=name)


def name_base(source: ModelSource) -> str:
    """How an adapter names its base model: as the user did, folders by their full path."""
    if source.adapter_folder is not None:  # as that adapter does: the folder may be a temporary one
        values = read_json(source.adapter_folder / ADAPTER_CONFIG_FILE)
        return str(values.get("base_model_name_or_path") or source.folder)
    for name in BUNDLED_MODELS:
        if source.folder == resolve_source(name).folder:
            return name
    return str(source.folder) if Path(source.name).expanduser().is_dir() else source.name


def stored_files(estimator: Any) -> Mapping[str, bytes] | None:
    """The model's files that came with the pickle, unless `model` has changed since."""
    model, revision, files = estimator.__dict__.get("_stored_files", (None, None, None))
    wanted = (os.fspath(estimator.model), estimator.revision)
    return files if (model, revision) == wanted else None


def _find_devices(estimator: Any) -> list[torch.device]:
    """The devices; an unpickled estimator falls back from those this machine has not."""
    try:
        return resolve_devices(estimator.device)
    except ValueError:
        named = [estimator.device] if isinstance(estimator.device, str) else estimator.device
        kinds = {name.split(":")[0] for name in named}
        if not estimator.__dict__.get("_from_pickle") or not kinds or kinds - {"cuda", "mps"}:
            raise
    found = resolve_device("auto")
    warnings.warn(
        f"This {OWNER} was pickled with device={estimator.device!r}, which this machine has not; "
        f"it runs on {str(found)!r}. Silence this with set_params(device='auto').",
        SkembedWarning,
        stacklevel=6,
    )
    return [found]


def describe_model(resolved: ResolvedModel) -> dict[str, Any]:
    """The `model_` attribute of an estimator."""
    key, backbone = resolved.key, resolved.config.backbone
    layers = backbone["num_hidden_layers"]
    return {
        "name": resolved.source.name,
        "revision": resolved.source.revision,
        "fingerprint": resolved.full_key.fingerprint,
        "architecture": f"bidirectional Mistral, {layers} layers",
        "pooling": key.pooling,
        "hidden_size": resolved.config.hidden_size,
        "dtype": key.dtype,
        "device": ", ".join(one.device for one in (key, *resolved.replicas)),
        "attention_path": key.attention_path,
    }


def load_resolved(resolved: ResolvedModel, lease: Lease | None = None) -> LoadedModel:
    """The loaded model, its adapter in place; the base is held by the lease if there is one."""
    loaded = registry.get(resolved.key, resolved.source, resolved.config)
    if lease is not None:
        lease.hold(loaded)
    return loaded if resolved.adapter is None else resolved.adapter.bind(loaded)


def load_replicas(resolved: ResolvedModel, lease: Lease) -> list[LoadedModel]:
    """The loaded model on each of its devices, adapters in place; held by the lease."""
    keys = (resolved.key, *resolved.replicas)
    loaded = [registry.get(key, resolved.source, resolved.config) for key in keys]
    lease.hold(*loaded)
    return loaded if resolved.adapter is None else resolved.adapter.bind_all(loaded)


def load_in_worker(resolved: ResolvedModel) -> LoadedModel:
    """The loaded model in a process that may be on another machine; the argument pickles small.

    Where the model's folder is not, the model is looked for by its name, as here.

    Raises
    ------
    ModelNotFoundError
        When the worker finds no such model.
    CheckpointError
        When it finds another one under the name.
    """
    source = resolved.source
    if not source.folder.is_dir():
        source = resolve_source(source.name, source.revision)
        if fingerprint_weights(source) != resolved.key.fingerprint:
            raise CheckpointError(
                f"The worker on {platform.node()} has another model under the name "
                f"{source.name!r}: weights, config.json or tokenizer differ. Install the same "
                "release of skembed, or copy the model's folder to the same place on each machine."
            )
    return load_resolved(replace(resolved, source=source))


def check_parameters(estimator: Any) -> None:
    """Types and values of all parameters, without touching files or devices."""
    if not isinstance(estimator.model, (str, os.PathLike)) or not os.fspath(estimator.model):
        raise TypeError(
            f"The `model` parameter of `{OWNER}` must be a model name, a folder or a hub id; "
            f"got {type(estimator.model).__name__}."
        )
    check_template(estimator.instruction_template, owner=OWNER)
    resolve_instruction(estimator.instruction)
    resolve_instruction(estimator.document_instruction, name="document_instruction")
    check_choice(estimator.pooling, name="pooling", allowed=(None, *POOLINGS), owner=OWNER)
    check_int(estimator.max_length, name="max_length", low=2, owner=OWNER)
    check_int(estimator.truncate_dim, name="truncate_dim", low=1, allow_none=True, owner=OWNER)
    check_bool(estimator.normalize, name="normalize", owner=OWNER)
    check_choice(estimator.missing, name="missing", allowed=MISSING_POLICIES, owner=OWNER)
    _check_device(estimator.device)
    check_choice(estimator.dtype, name="dtype", allowed=("auto", *DTYPES), owner=OWNER)
    if estimator.batch_tokens != "auto":
        check_int(estimator.batch_tokens, name="batch_tokens", low=1, owner=OWNER)
    check_string(estimator.revision, name="revision", allow_none=True, owner=OWNER)
    check_bool(estimator.store_weights, name="store_weights", owner=OWNER)
    check_int(estimator.n_jobs, name="n_jobs", allow_none=True, owner=OWNER)
    if estimator.n_jobs == 0:
        raise ValueError(
            f"The `n_jobs` parameter of `{OWNER}` must be None, a positive int, or a negative "
            "one that counts from all cores (-1); got 0."
        )
    check_bool(estimator.verbose, name="verbose", owner=OWNER)
    resolve_cache(estimator.cache)  # touches no file


def _check_device(device: Any) -> None:
    """A name, or a list of names; whether there are such devices is seen later."""
    if isinstance(device, (list, tuple)) and all(isinstance(name, str) for name in device):
        return
    if not isinstance(device, str):
        raise TypeError(
            f"The `device` parameter of `{OWNER}` must be a str, or a list of str for several "
            f"devices; got {type(device).__name__}."
        )
