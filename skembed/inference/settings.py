"""Settings resolved from parameters: model, device, type, adapter and prefixes.

Reads JSON files and hashes all files; loads no weights but an adapter's. A lease caches the
settings until a parameter, the adapter or a local file changes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skembed._inputs import MISSING_POLICIES
from skembed._validation import (
    Rule,
    check_bool,
    check_choice,
    check_dtype,
    check_int,
    check_parameters,
    check_path,
    check_string,
    or_word,
    parameter_error,
)
from skembed.adapters.adapter import Adapter
from skembed.adapters.peft_files import read_pooling_kind
from skembed.exceptions import CheckpointError
from skembed.inference.card import AUTO, ModelCard, is_auto, read_card
from skembed.inference.devices import (
    DTYPES,
    check_device,
    choose_attention_path,
    name_dtype,
    resolve_device,
    resolve_devices,
    resolve_dtype,
)
from skembed.inference.engine import EmbedRequest, cache_namespace
from skembed.inference.fitted import describe_change
from skembed.inference.registry import Lease, StoredModel, registry
from skembed.instructions import build_prefix, check_template, resolve_instruction
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel, ModelKey
from skembed.model.pooling import POOLINGS
from skembed.model.sources import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BUNDLED_MODELS,
    CARD_FILES,
    CONFIG_FILE,
    CONTENT_DIGITS,
    INDEX_FILE,
    POOLING_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    ModelSource,
    fingerprint_weights,
    has_same_content,
    holds_files,
    pack_folder,
    read_config,
    read_json,
    resolve_source,
    unpack_folder,
)

__all__ = [
    "FileStates",
    "OWNER",
    "Parameters",
    "RULES",
    "ResolvedModel",
    "SIDES",
    "Settings",
    "WATCHED_FILES",
    "check_settings",
    "describe_card",
    "describe_model",
    "find_settings",
    "list_local_files",
    "load_in_worker",
    "load_resolved",
    "name_base",
    "pack_model",
    "read_states",
]

OWNER = "NVEmbedVectorizer"
SIDES = ("query", "document")
WATCHED_FILES = (
    *(CONFIG_FILE, TOKENIZER_FILES[0], INDEX_FILE, WEIGHTS_FILE),
    *(ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, POOLING_FILE),
    *CARD_FILES,
)
FileStates = dict[str, tuple[int, ...] | None]


class Parameters(NamedTuple):
    """Parameters of an `NVEmbedVectorizer`, as given; `trainer` and `cache` change no vector."""

    model: str | os.PathLike[str]
    instruction: str | None
    document_instruction: str | None
    instruction_template: str
    pooling: str | None
    max_length: Any  # an int, or "auto" until the model's folder was read; as the next two
    truncate_dim: Any
    normalize: Any
    missing: str
    device: str | Sequence[str]
    dtype: str
    batch_tokens: int | str
    revision: str | None
    store_weights: bool
    n_jobs: int | None
    verbose: bool


@dataclass(frozen=True)
class ResolvedModel:
    """Model to run, its devices and its adapter."""

    source: ModelSource
    config: NVEmbedConfig
    key: ModelKey
    replicas: tuple[ModelKey, ...] = ()  # copies on further devices
    adapter: Adapter | None = None  # learned by `fit`, or read from the model's folder

    @property
    def full_key(self) -> ModelKey:
        """The key with the adapter's fingerprint in it, for the cache."""
        if self.adapter is None:
            return self.key
        fingerprint = f"{self.key.fingerprint}+{self.adapter.fingerprint}"
        return replace(self.key, fingerprint=fingerprint)


@dataclass(frozen=True)
class Settings:
    """All that embedding needs besides the texts and the cache."""

    parameters: Parameters  # checked, as built-in values; none is "auto" that a folder decides
    model: ResolvedModel
    requests: Mapping[str, EmbedRequest]  # of each side: prefix and namespace in the cache
    automatic: Mapping[str, Any]  # what the folder gave for parameters that are "auto"
    prompts: Mapping[str, str]  # the folder's, by side, where no parameter replaces them
    learned: bool  # whether the model learned instructions
    dim: int  # after truncation
    files: FileStates  # of the local files that all this was read from
    warning: str = ""  # what the user is to know of the device at each use
    advice: str = ""  # and once, of the model


def find_settings(
    parameters: Parameters,
    lease: Lease,
    adapter: Adapter | None,
    fitted: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of an estimator, from its lease where nothing has changed.

    An `adapter` that `fit` learned replaces that of the model's folder; `fitted` is what it was
    fitted with: `model_`, and `auto` of `_card`. Raises TypeError and ValueError for parameters,
    ModelNotFoundError and CheckpointError for the model's files, also for others than `fit` saw.
    """
    key = _make_key(parameters, adapter)
    try:
        settings: Settings | None = lease.recall(key)
    except TypeError:  # a value without a hash: an array without dimensions has a built-in one
        parameters = check_settings(parameters)
        settings = lease.recall(key := _make_key(parameters, adapter))
    if settings is None or read_states(settings.files) != settings.files:
        settings = _resolve(parameters, lease, adapter, fitted)
        lease.remember(key, settings)
    folder = settings.model.source.adapter_folder
    if adapter is None and folder is not None:
        adapter = _read_adapter(folder, settings.model, settings.files, lease)
    if adapter is not None:
        # The lease caches no adapter: that would keep its weights, and the base it is bound to.
        settings = replace(settings, model=replace(settings.model, adapter=adapter))
    if fitted is not None:
        _check_fitted(fitted, settings)
    return settings


def _check_fitted(fitted: Mapping[str, Any], settings: Settings) -> None:
    """Raise CheckpointError for other weights, or settings of the folder, than `fit` saw."""
    base, _, learned = fitted["fingerprint"].partition("+")
    now, adapter = settings.model.key.fingerprint, settings.model.adapter
    own = "" if adapter is None else adapter.fingerprint
    same = base[:CONTENT_DIGITS] == now[:CONTENT_DIGITS] and learned == own
    then = fitted["auto"]
    changed = [n for n, value in settings.automatic.items() if n in then and then[n] != value]
    if changed or not same:
        raise describe_change(fitted, settings.model.source, now, own, changed if same else ())


def _make_key(parameters: Parameters, adapter: Adapter | None) -> tuple[Any, ...]:
    """Return values and types (True equals 1) as they are now."""
    values = [tuple(value) if isinstance(value, list) else value for value in parameters]
    values[0] = os.fspath(values[0]) if isinstance(values[0], os.PathLike) else values[0]
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # "cuda" means it
    fingerprint = None if adapter is None else adapter.fingerprint
    return (*values, *map(type, parameters), gpu, fingerprint)


def _resolve(
    given: Parameters,
    lease: Lease,
    adapter: Adapter | None,
    fitted: Mapping[str, Any] | None,
) -> Settings:
    """Check parameters and answer every question; the adapter itself is left out."""
    parameters = check_settings(given)
    source = _find_source(parameters, lease)
    files = read_states(list_local_files(source))  # before they are read
    pooling = parameters.pooling
    if pooling is None and source.adapter_folder is not None:
        pooling = read_pooling_kind(source.adapter_folder)
    read = _read_bundled if source.name in BUNDLED_MODELS else _read_folder
    config, card = read(source, pooling)
    automatic, prompts = _fill_parameters(parameters, card, config)
    parameters = parameters._replace(**automatic)
    _check_sizes(parameters, config)
    devices, warning = _find_devices(parameters.device, from_pickle=lease.from_pickle)
    _check_jobs(parameters.n_jobs, devices)
    keys = _make_model_keys(fingerprint_weights(source), config, devices, parameters.dtype)
    model = ResolvedModel(source, config, keys[0], tuple(keys[1:]))
    if adapter is not None:
        now = model.key.fingerprint
        if fitted is not None and not has_same_content(adapter.base_fingerprint, now):
            raise describe_change(fitted, source, now, adapter.fingerprint)
        adapter.check_base(model.key.fingerprint)
        adapter.check_pooling(config)
        learned = card.learned or adapter.instructions
    else:
        learned = bool(card.learned)
        if source.adapter_folder is not None:
            adapter = _read_adapter(source.adapter_folder, model, files, lease)
    requests = _make_requests(parameters, prompts, replace(model, adapter=adapter))
    advice = "" if learned else _advise_instructions(source, requests)
    shown = _show_automatic(automatic, prompts, card)
    dim = parameters.truncate_dim or config.hidden_size
    return Settings(
        parameters, model, requests, shown, prompts, learned, dim, files, warning, advice
    )


def _read_folder(source: ModelSource, pooling: str | None) -> tuple[NVEmbedConfig, ModelCard]:
    """Return what a model's folder says of its parts and of its use."""
    config = read_config(source, pooling)
    return config, read_card(source, config)


_read_bundled = lru_cache(maxsize=16)(_read_folder)  # its files stay as they are


def _advise_instructions(source: ModelSource, requests: Mapping[str, EmbedRequest]) -> str:
    """Return the warning of an instruction for a model that learned none; "" without one."""
    if not any(request.prefix for request in requests.values()):
        return ""
    return (
        f"The model {source.name!r} learned no instructions: one in front of the texts makes its "
        "vectors worse as a rule. Pass instruction=None, or train with it (`fit` on pairs); or "
        "silence this with warnings.filterwarnings('ignore', message='The model .* learned no "
        "instructions')."
    )


def _fill_parameters(
    parameters: Parameters, card: ModelCard, config: NVEmbedConfig
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of "auto", and the folder's own prompts where they are used."""
    given = parameters._asdict()
    values = card.fill(given)
    longest = config.backbone.get("max_position_embeddings")
    if "max_length" in values and longest is not None:
        values["max_length"] = min(values["max_length"], int(longest))
    return values, card.find_prompts(given)


def _show_automatic(
    automatic: Mapping[str, Any], prompts: Mapping[str, str], card: ModelCard
) -> dict[str, Any]:
    """Return the values of "auto", with the folder's own word on instructions."""
    shown = dict(automatic)
    if "document_instruction" in shown:  # not that of a task which the user named
        shown["document_instruction"] = card.values.get("document_instruction")
    queries = {side: prompt for side, prompt in prompts.items() if side != "document"}
    if queries:
        shown["instruction"] = queries
    if "document" in prompts:
        shown["document_instruction"] = prompts["document"]
    return shown


def _make_requests(
    parameters: Parameters, prompts: Mapping[str, str], model: ResolvedModel
) -> dict[str, EmbedRequest]:
    """Return prefix and namespace of each side; "text" is that of `transform`."""
    key, length, width = model.full_key, parameters.max_length, model.config.hidden_size
    template = parameters.instruction_template
    requests = {}
    for side in ("text", *SIDES):
        prefix = prompts.get(side)
        if prefix is None and side == "document":  # a task's own text was looked up before
            document = parameters.document_instruction
            prefix = build_prefix(template, None, document, side=side, owner=OWNER)
        elif prefix is None:
            prefix = build_prefix(template, parameters.instruction, None, side="query", owner=OWNER)
        requests[side] = EmbedRequest(prefix, length, width, cache_namespace(key, prefix, length))
    return requests


def list_local_files(source: ModelSource) -> list[str]:
    """Return the files, there or not yet, that decide what a local folder gives.

    None for a bundled model or the commit of a hub model: what they give does not change.
    """
    if source.name in BUNDLED_MODELS or (source.revision and source.adapter_folder is None):
        return []
    folders = [os.path.expanduser(source.name)]  # as given: it may be relative, and that changes
    if source.adapter_folder is not None:
        folders.append(str(source.folder))
    shards = (path.name for path in source.folder.glob("*.safetensors"))
    names = sorted({*WATCHED_FILES, *shards})
    return [os.path.join(folder, name) for folder in folders for name in names]


def read_states(paths: Iterable[str]) -> FileStates:
    """Return size, times of change and inode of each file; None where there is no file."""
    states: FileStates = {}
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:
            states[path] = None
        else:
            states[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return states


def _check_sizes(parameters: Parameters, config: NVEmbedConfig) -> None:
    """Refuse lengths and widths that the model does not have."""
    length, dim = parameters.max_length, parameters.truncate_dim
    longest, width = config.backbone.get("max_position_embeddings"), config.hidden_size
    if longest is not None:
        check_int(length, name="max_length", owner=OWNER, low=2, high=int(longest))
    check_int(dim, name="truncate_dim", owner=OWNER, low=1, high=width, allow_none=True)


def _make_model_keys(
    fingerprint: str, config: NVEmbedConfig, devices: Sequence[torch.device], dtype: str
) -> list[ModelKey]:
    """Return the key of the model on each device, all of one type."""
    dtypes = {resolve_dtype(dtype, device) for device in devices}
    # The older of two GPUs may know no bfloat16.
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    name = name_dtype(dtype, common)
    paths = [choose_attention_path(device, common) for device in devices]
    return [
        ModelKey(fingerprint, config.pooling, str(device), name, path)
        for device, path in zip(devices, paths, strict=True)
    ]


def _find_devices(
    device: str | Sequence[str], *, from_pickle: bool
) -> tuple[list[torch.device], str]:
    """Return the devices, and a warning where an unpickled estimator's are not on this machine."""
    try:
        return resolve_devices(device), ""
    except ValueError:
        names = [device] if isinstance(device, str) else list(device)
        kinds = {name.split(":")[0] for name in names}
        if not from_pickle or not kinds or kinds - {"cuda", "mps"}:
            raise
    available = resolve_device("auto")
    shown = device if isinstance(device, str) else names
    return [available], (
        f"This {OWNER} was pickled with device={shown!r}, which is not available on this machine; "
        f"it runs on {str(available)!r}. Silence this with set_params(device='auto')."
    )


def _check_jobs(n_jobs: int | None, devices: list[torch.device]) -> None:
    """Refuse worker processes on GPUs, and beside a list of devices."""
    if n_jobs in (None, 1):
        return
    names = [str(device) for device in devices]
    if len(devices) > 1:
        raise ValueError(
            f"The `n_jobs` parameter of `{OWNER}` must be None or 1 with several devices; got "
            f"{n_jobs} with device={names}. The devices share the work in this process already."
        )
    if devices[0].type != "cpu":
        raise ValueError(
            f"The `n_jobs` parameter of `{OWNER}` must be None or 1 on {names[0]!r}; got "
            f"{n_jobs}. Every worker would put a copy of the model on the one device."
        )


def _read_adapter(folder: Path, model: ResolvedModel, files: FileStates, lease: Lease) -> Adapter:
    """Return the adapter of a folder, read once while its files stay as they are."""
    config, fingerprint = model.config, model.key.fingerprint
    key = (str(folder), fingerprint, config.pooling, tuple(files.values()))
    return lease.hold_adapter(key, lambda: Adapter.load(folder, config, fingerprint))


def _find_source(parameters: Parameters, lease: Lease) -> ModelSource:
    """Return the model's folder, of the commit used before; or the pickle's, if that has another.

    What came in a pickle goes before a download.
    """
    name, revision = os.fspath(parameters.model), parameters.revision
    files = lease.find_files(name, revision)
    is_local = name in BUNDLED_MODELS or Path(name).expanduser().is_dir()
    if files is None:
        source = resolve_source(name, lease.pins.get((name, revision), revision))
        if not is_local and source.revision is not None:
            lease.pins.setdefault((name, revision), source.revision)
        return source
    if is_local:
        source = resolve_source(name, revision)
        if holds_files(source, files):
            return source
    return replace(resolve_source(unpack_folder(files)), name=name)


def pack_model(parameters: Parameters, lease: Lease) -> StoredModel:
    """Return what a pickle holds of the model: its name, revision and files."""
    name, revision = os.fspath(parameters.model), parameters.revision
    files = lease.find_files(name, revision) or pack_folder(_find_source(parameters, lease))
    return name, revision, files


def name_base(source: ModelSource) -> str:
    """Return the base model's name in an adapter: the user's, or a folder's full path."""
    if source.adapter_folder is not None:  # as that adapter does: the folder may be a temporary one
        values = read_json(source.adapter_folder / ADAPTER_CONFIG_FILE)
        return str(values.get("base_model_name_or_path") or source.folder)
    for name in BUNDLED_MODELS:
        if source.folder == resolve_source(name).folder:
            return name
    return str(source.folder) if Path(source.name).expanduser().is_dir() else source.name


def describe_model(resolved: ResolvedModel) -> dict[str, Any]:
    """Return the `model_` attribute of an estimator."""
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
        "device": ", ".join(each.device for each in (key, *resolved.replicas)),
        "attention_path": key.attention_path,
    }


def describe_card(settings: Settings) -> dict[str, Any]:
    """Return the `_card` attribute of an estimator."""
    return {"instructions": settings.learned, "auto": dict(settings.automatic)}


def load_resolved(resolved: ResolvedModel, lease: Lease | None = None) -> list[LoadedModel]:
    """Return the model on each of its devices, with its adapter; a lease holds the bases."""
    keys = (resolved.key, *resolved.replicas)
    loaded = [registry.get(key, resolved.source, resolved.config) for key in keys]
    if lease is not None:
        lease.hold(*loaded)
    return loaded if resolved.adapter is None else resolved.adapter.bind_all(loaded)


def load_in_worker(resolved: ResolvedModel) -> LoadedModel:
    """Return the loaded model in a process that may be on another machine.

    Looks for the model by its name if its folder is missing; raises ModelNotFoundError if there
    is none, CheckpointError if it is another model.
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
    return load_resolved(replace(resolved, source=source))[0]


def check_settings(parameters: Parameters) -> Parameters:
    """Return the parameters as built-in values; those that are "auto" stay so.

    Touches neither files nor devices.
    """
    return Parameters(**check_parameters(parameters._asdict(), RULES, owner=OWNER))


def _check_model(value: Any, *, name: str, owner: str) -> str:
    """Return the name of a model; a path object is a folder, whatever its name."""
    path = check_path(value, name=name, owner=owner, expected="a model name, a folder or a hub id")
    is_folder = path in BUNDLED_MODELS and not isinstance(value, str)
    return os.path.join(os.curdir, path) if is_folder else path


def _or_auto(rule: Rule) -> Rule:
    """Return the rule of a parameter that may be left to the model's folder."""

    def check(value: Any, *, name: str, owner: str) -> Any:
        return AUTO if is_auto(value) else rule(value, name=name, owner=owner)

    return check


def _check_instruction(value: Any, *, name: str, owner: str) -> str | None:
    """Return an instruction as it is given."""
    text = check_string(value, name=name, owner=owner, allow_empty=True, allow_none=True)
    resolve_instruction(text, name=name, owner=owner)
    return text


def _check_template(value: Any, *, name: str, owner: str) -> str:
    """Return a template; its check names the parameter itself."""
    return check_template(value, owner=owner)


def _check_n_jobs(value: Any, *, name: str, owner: str) -> int | None:
    """Return a number of workers, as joblib counts them."""
    n_jobs = check_int(value, name=name, owner=owner, allow_none=True)
    if n_jobs == 0:
        expected = "None, a positive int, or a negative one that counts from all cores (-1)"
        raise parameter_error(n_jobs, name=name, owner=owner, expected=expected)
    return n_jobs


RULES: dict[str, Rule] = {
    "model": _check_model,
    "instruction": _or_auto(_check_instruction),
    "document_instruction": _or_auto(_check_instruction),
    "instruction_template": _or_auto(_check_template),
    "pooling": partial(check_choice, allowed=(None, *POOLINGS)),
    "max_length": _or_auto(partial(check_int, low=2)),
    "truncate_dim": _or_auto(partial(check_int, low=1, allow_none=True)),
    "normalize": _or_auto(check_bool),
    "missing": partial(check_choice, allowed=MISSING_POLICIES),
    "device": partial(check_device, several=True),
    "dtype": partial(check_dtype, allowed=("auto", *DTYPES)),
    "batch_tokens": or_word("auto", partial(check_int, low=1)),
    "revision": partial(check_string, allow_none=True),
    "store_weights": check_bool,
    "n_jobs": _check_n_jobs,
    "verbose": check_bool,
}
