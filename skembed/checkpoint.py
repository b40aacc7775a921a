"""Model folders and hub ids -> weights, strictly and in bounded memory; and back.

Three layouts load: NV-Embed's (config.json with model_type "nvembed"; v1 and v2), a plain Mistral
folder (model_type "mistral"), and what `save_checkpoint` writes, which is NV-Embed's layout again.
Only safetensors, JSON and tokenizer files are read or downloaded; no code, no pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skembed._files import write_bytes, write_json
from skembed._quantized_layers import make_quantizer
from skembed.exceptions import CheckpointError, FreshPoolingWarning, ModelNotFoundError
from skembed.model import NVEmbedConfig, NVEmbedModel
from skembed.pooling import POOLINGS, LatentAttention
from skembed.tokenization import find_tokenizer_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

BUNDLED_MODELS = ("skembed-mini",)
# The revisions whose embeddings NV-Embed's authors and mteb report.
PINNED_REVISIONS = {
    "nvidia/NV-Embed-v1": "570834afd5fef5bf3a3c2311a2b6e0a66f6f4f2c",
    "nvidia/NV-Embed-v2": "7604d305b621f14095a1aa23d351674c2859553a",
}
DOWNLOADED_FILES = ["*.json", "*.safetensors"]
CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS_FILE = "model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"  # peft's names for its two files
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
POOLING_FILE = "pooling.safetensors"  # beside an adapter that trained the pooling layer
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
WHOLE_HASH_BYTES = 256 * 1024**2
CONTENT_DIGITS = 16  # of a fingerprint: those that copies of a model have in common
_unpacked: dict[str, tempfile.TemporaryDirectory[str]] = {}
_unpacking = threading.Lock()
BACKBONE_PREFIX = "embedding_model."
POOLING_PREFIX = "latent_attention_model."


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine, and what it was asked for by.

    Attributes
    ----------
    name : str
        The `model` parameter that led here.
    folder : Path
        Where the files are.
    revision : str or None
        Commit of the hub repository; None for local folders.
    adapter_folder : Path or None
        Where an adapter is, when that is what was asked for; `folder` is then its base model's.
    """

    name: str
    folder: Path
    revision: str | None = None
    adapter_folder: Path | None = None


def resolve_source(model: str | os.PathLike[str], revision: str | None = None) -> ModelSource:
    """Find the folder of a bundled model, a local folder or a hub id, downloading if need be.

    Parameters
    ----------
    model : str or path
        ``"skembed-mini"``, a folder, or a hub id such as ``"nvidia/NV-Embed-v2"``.
    revision : str, optional
        Branch, tag or commit of a hub id. None takes the pinned commit of a known model, and the
        main branch of any other, whose commit is then recorded.

    Returns
    -------
    ModelSource
        With the commit that was resolved.

    Raises
    ------
    ModelNotFoundError
        When there is no such folder, or the hub cannot give it.
    """
    name = os.fspath(model)
    if name in BUNDLED_MODELS:
        return ModelSource(name, Path(str(resources.files("skembed") / "data" / name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            return _resolve_adapter(name, folder)
        return ModelSource(name, folder)
    if not _looks_like_hub_id(name):
        raise ModelNotFoundError(
            f"The `model` parameter of `NVEmbedVectorizer` must be one of {list(BUNDLED_MODELS)}, "
            f"a folder, or a hub id such as 'nvidia/NV-Embed-v2'; got {name!r}, and there is no "
            f"such folder (looked for {folder.absolute()})."
        )
    return _download(name, revision or PINNED_REVISIONS.get(name))


def _resolve_adapter(name: str, folder: Path) -> ModelSource:
    """An adapter's folder and the base model it names; a folder may hold both."""
    if (folder / CONFIG_FILE).is_file():
        return ModelSource(name, folder, adapter_folder=folder)
    values = read_json(folder / ADAPTER_CONFIG_FILE)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"The {ADAPTER_CONFIG_FILE} of {folder} must name its base model in "
            f"base_model_name_or_path; got {base!r}."
        )
    try:
        source = resolve_source(base, values.get("revision"))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"The adapter in {folder} was trained on {base!r}, which is not to be found. Put that "
            f"model there, or write its place into base_model_name_or_path of "
            f"{ADAPTER_CONFIG_FILE}. {error}"
        ) from error
    if source.adapter_folder is not None:
        raise CheckpointError(
            f"The base model of the adapter in {folder} is an adapter itself ({base!r}). Merge "
            "that one first (`save_pretrained(path, merge=True)`)."
        )
    return ModelSource(name, source.folder, source.revision, folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    CheckpointError
        When the file is missing, unreadable or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"The model folder {path.parent} must hold a {path.name}; it does not."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(values).__name__}.")
    return values


def _looks_like_hub_id(name: str) -> bool:
    """True for ``owner/name`` that no path would be written as."""
    parts = name.split("/")
    return len(parts) == 2 and all(p and p[0] not in ".~" and "\\" not in p for p in parts)


def _download(name: str, revision: str | None) -> ModelSource:
    """Snapshot of a hub repository: safetensors, JSON and tokenizer files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{name!r} at revision {revision or 'main'!r}"
    # The base classes name the errors of the HTTP library below (proxies, broken transfers), which
    # is another one in every few releases of the hub's.
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    transfer_errors: tuple[type[Exception], ...] = (OSError, ValueError, *bases)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED_FILES))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub model {wanted} asks for consent to its licence. Accept it on the model's "
            "page, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelNotFoundError(
            f"The hub has no model {wanted}, or it is private. Check the spelling and the "
            "`revision` parameter, or pass a local folder."
        ) from error
    except transfer_errors as error:
        raise ModelNotFoundError(
            f"There is no folder {name!r} here, and the hub model {wanted} is neither in the "
            "local hub cache nor could it be downloaded (offline?). Download it on a connected "
            "machine with `hf download`, copy the folder, and pass its path as `model`; or use "
            "the bundled 'skembed-mini'."
        ) from error
    logger.info("hub model %s resolved to commit %s", name, folder.name)
    return ModelSource(name, folder, folder.name)


def read_config(source: ModelSource, pooling: str | None = None) -> NVEmbedConfig:
    """The configuration of a model folder, with another pooling if asked.

    Raises
    ------
    CheckpointError
        When config.json is missing, unreadable or of another kind of model.
    """
    path = source.folder / CONFIG_FILE
    values = read_json(path)
    config = NVEmbedConfig.from_dict(values, str(source.folder))
    if config.pooling not in POOLINGS:
        raise CheckpointError(
            f"The pooling in {path} must be one of {list(POOLINGS)}; got {config.pooling!r}."
        )
    if pooling is None or pooling == config.pooling:
        return config
    return replace(config, pooling=pooling, pooling_is_fresh=pooling in ("latent", "multilayer"))


class WeightFiles:
    """The safetensors files of a folder, seen as one mapping from model keys to tensors.

    Keys are the names of `NVEmbedModel`; those of a plain Mistral folder are translated. Files are
    mapped, not read, and each reading opens its file anew: pages of a closed mapping no longer
    count as this process's memory, so loading needs little more than its result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _find_weight_files(folder)
        self.locations: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            with _open_weights(path) as file:
                for key in file.keys():  # not a mapping: has no __iter__
                    name = _model_key(key)
                    self.locations[name] = (path, key)
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, mapped; copy it before the next one is read."""
        path, key = self.locations[name]
        with _open_weights(path) as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"The tensor {key} of {path} must be float32, float16 or bfloat16; got "
                f"{tensor.dtype}. Quantised checkpoints are not read."
            )
        return tensor

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str]) -> None:
        """Compare names and shapes with the model's, both ways.

        Raises
        ------
        CheckpointError
            Naming what is missing, unexpected or of another shape.
        """
        found = {name for name in self.shapes if not _is_ignored(name, ignored)}
        missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
        wrong = [
            f"{name} has {self.shapes[name]}, expected {expected[name]}"
            for name in sorted(found & set(expected))
            if self.shapes[name] != expected[name]
        ]
        faults = []
        if missing:
            faults.append(f"missing: {_shorten(missing)}")
        if extra:
            faults.append(f"unexpected: {_shorten(extra)}")
        if wrong:
            faults.append(f"wrong shape: {_shorten(wrong)}")
        if faults:
            raise CheckpointError(
                f"The weights in {self.folder} do not fit its {CONFIG_FILE}; "
                + "; ".join(faults)
                + ". The two files belong to different models, or the copy is incomplete."
            )


def _is_ignored(name: str, ignored: Sequence[str]) -> bool:
    """Language-model heads and rotary buffers of older files, and a pooling not asked for."""
    return name.startswith(("lm_head.", *ignored)) or name.endswith("rotary_emb.inv_freq")


def _shorten(items: Sequence[str], limit: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _model_key(key: str) -> str:
    """Key of `NVEmbedModel` for a key of any of the layouts."""
    if key.startswith((BACKBONE_PREFIX, POOLING_PREFIX, "lm_head.")):
        return key
    return BACKBONE_PREFIX + key.removeprefix("model.")


def _find_weight_files(folder: Path) -> list[Path]:
    """The shards of the index file, or the single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error}.") from error
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"The model folder {folder} lacks {_shorten(absent)}, named in {INDEX_FILE}. "
                "Copy or download the folder again."
            )
        return [folder / name for name in shards]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(s))
    if pickled:
        raise CheckpointError(
            f"The model folder {folder} holds pickled weights only ({_shorten(pickled)}), which "
            "can run code when opened. Convert them to safetensors where you trust them "
            "(`save_pretrained(..., safe_serialization=True)` of transformers)."
        )
    raise CheckpointError(
        f"The model folder {folder} must hold {WEIGHTS_FILE} or {INDEX_FILE}; it holds neither."
    )


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file, with the library's errors translated."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def load_model(
    source: ModelSource,
    config: NVEmbedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention_path: str,
    weight_format: str | None = None,
) -> NVEmbedModel:
    """The model of a folder, each tensor converted and moved as it is read.

    Parameters
    ----------
    source : ModelSource
        The folder.
    config : NVEmbedConfig
        Its configuration, as `read_config` gives it.
    device, dtype : torch.device, torch.dtype
        Where and in which type the weights end.
    attention_path : str
        See `skembed.model`.
    weight_format : {"int8", "nf4"}, optional
        How linear layers and word vectors of the backbone are stored; None keeps `dtype`.

    Returns
    -------
    NVEmbedModel
        In evaluation mode, without gradients, pooling in its published (unfolded) form.

    Raises
    ------
    CheckpointError
        When names, shapes or files are not what config.json says.
    ImportError
        When `weight_format` is "nf4" and bitsandbytes is not installed.

    Warns
    -----
    FreshPoolingWarning
        When the folder has no weights for the pooling.
    """
    model = _build_on_meta(source, config, attention_path)
    quantize = None if weight_format is None else make_quantizer(weight_format)
    for name, tensor in iterate_tensors(source, config, model):
        layer = name.rpartition(".")[0]
        if quantize is not None and name.startswith(BACKBONE_PREFIX):
            small = quantize(model.get_submodule(layer), tensor.to(device), dtype)
            if small is not None:
                model.set_submodule(layer, small)
                continue
        target = torch.empty(tensor.shape, dtype=dtype, device=device)
        _set_parameter(model, name, target.copy_(tensor))
    if config.pooling_is_fresh:
        _warn_fresh_pooling(source, config)
    # The rotary table is no weight: it is computed again, in float32, on the target device.
    rotary = model.embedding_model.rotary_emb
    model.embedding_model.rotary_emb = type(rotary)(config=model.embedding_model.config).to(device)
    return model.eval().requires_grad_(False)


def iterate_tensors(
    source: ModelSource, config: NVEmbedConfig, model: NVEmbedModel | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All weights of a folder under the model's names, checked first, fresh pooling included.

    Parameters
    ----------
    source, config : ModelSource, NVEmbedConfig
        The folder and its configuration.
    model : NVEmbedModel, optional
        The model on the meta device, when it is at hand.

    Yields
    ------
    name, tensor
        In the stored type, mapped from the file: copy before taking the next.

    Raises
    ------
    CheckpointError
        When names, shapes or files are not what config.json says.
    """
    files = WeightFiles(source.folder)
    model = _build_on_meta(source, config) if model is None else model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fresh = config.pooling_is_fresh
    stored = [n for n in shapes if not (fresh and n.startswith(POOLING_PREFIX))]
    unused = fresh or config.pooling in ("mean", "eos")
    files.check({n: shapes[n] for n in stored}, ignored=(POOLING_PREFIX,) if unused else ())
    for name in stored:
        yield name, files.read(name)
    if fresh:
        pooling = _start_pooling(model.latent_attention_model)
        yield from ((POOLING_PREFIX + name, value) for name, value in pooling.items())


def _build_on_meta(
    source: ModelSource, config: NVEmbedConfig, attention_path: str = "grouped"
) -> NVEmbedModel:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return NVEmbedModel(config, attention_path=attention_path)
    except Exception as error:  # transformers and torch raise what they like
        raise CheckpointError(
            f"The {CONFIG_FILE} of {source.folder} describes no model that can be built: "
            f"{type(error).__name__}: {error}."
        ) from error


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter on the meta device."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def _start_pooling(pooling: nn.Module) -> dict[str, Tensor]:
    """Fresh float32 weights from a fixed seed, without touching the global random state.

    Output projections of a latent layer start at zero, so that it equals mean pooling until it is
    trained.
    """
    generator = torch.Generator().manual_seed(0)
    starts_at_zero = isinstance(pooling, LatentAttention)
    fresh = {}
    for name, parameter in pooling.named_parameters():
        value = torch.zeros(parameter.shape)
        if name == "latents":
            value.normal_(generator=generator)
        elif "norm" in name and name.endswith("weight"):
            value.fill_(1.0)
        elif starts_at_zero and name.endswith(("to_out.weight", "net.2.weight")):
            pass
        elif parameter.ndim == 2 and name != "layer_weights":
            value.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        fresh[name] = value
    return fresh


def _warn_fresh_pooling(source: ModelSource, config: NVEmbedConfig) -> None:
    """Say that the pooling has not been trained, and what it equals."""
    start = "weights that equal mean pooling" if config.pooling == "latent" else "random weights"
    warnings.warn(
        f"{source.name!r} has no weights for {config.pooling!r} pooling: it starts with {start} "
        "and wants training. Pass `pooling='mean'` for untrained use, or silence this with "
        "warnings.filterwarnings('ignore', category=skembed.FreshPoolingWarning).",
        FreshPoolingWarning,
        stacklevel=2,
    )


def fingerprint_weights(source: ModelSource) -> str:
    """Hash of what the folder's vectors depend on: weights, configuration, tokenizer.

    Files up to 256 MiB are hashed whole. Of larger ones the header, the first 4 KiB of each of
    4,096 evenly spaced places, the size and the time of the last change are: reading 16 GB to look
    up one vector would cost more than the vector.

    Returns
    -------
    str
        32 hexadecimal digits. The first 16 are a hash of the content alone (of the samples, in a
        large file): equal for copies on two machines. The others depend on the times as well.
    """
    content = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    state = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    small = [source.folder / CONFIG_FILE, find_tokenizer_file(source.folder)]
    for path in [*small, *_find_weight_files(source.folder)]:
        try:
            _hash_file(path, content)
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        if stat.st_size > WHOLE_HASH_BYTES:
            state.update(f"{stat.st_mtime_ns}:".encode())
    state.update(content.digest())
    return content.hexdigest() + state.hexdigest()


def _hash_file(path: Path, digest: hashlib.blake2b) -> None:
    """Add one file's name and content, or samples of it, to a hash."""
    stat = path.stat()
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    digest.update(f"{path.name}:{stat.st_size}:".encode())
    digest.update(_content_hash(str(path), state))


@lru_cache(maxsize=256)
def _content_hash(path: str, state: tuple[int, int, int, int]) -> bytes:
    """Hash of a file in the state given (size, change times, inode), remembered."""
    size = state[0]
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for place in range(0, size, size // 4_096):
                file.seek(place)
                digest.update(file.read(4_096))
    return digest.digest()


def save_checkpoint(
    folder: Path,
    *,
    config: NVEmbedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: Path,
    extra: Mapping[str, Any],
) -> None:
    """Write a folder that `load_model` reads, config.json last.

    An existing folder's config.json is removed first: a kill in between leaves a folder that
    refuses to load, never a mixture of two models.

    Parameters
    ----------
    folder : Path
        Made if need be.
    config : NVEmbedConfig
        The architecture.
    tensors : iterable of (name, tensor)
        All weights under `NVEmbedModel`'s names, in the types to store; taken one shard (5 GB) at
        a time.
    tokenizer_folder : Path
        Where the tokenizer files are copied from.
    extra : mapping
        File name -> JSON value to write beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        name: (tokenizer_folder / name).read_bytes()
        for name in TOKENIZER_FILES
        if (tokenizer_folder / name).is_file()
    }
    _remove_partial(folder)  # those of a save that was killed
    try:
        shards = list(_write_shards(folder, tensors))
    except BaseException:
        _remove_partial(folder)
        raise
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        stale.unlink(missing_ok=True)
    weight_map = {}
    for k, (partial, names) in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        file = WEIGHTS_FILE if len(shards) == 1 else file
        partial.replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    for name, content in tokenizer.items():
        write_bytes(folder / name, content)
    for name, value in extra.items():
        write_json(folder / name, value)
    write_json(folder / CONFIG_FILE, config.to_dict())


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Path, list[str]]]:
    """Shards of at most 5 GB under temporary names, and the keys in each."""
    shard: dict[str, Tensor] = {}
    number, size = 0, 0

    def flush() -> tuple[Path, list[str]]:
        path = folder / f".partial-{os.getpid()}-{number}"
        save_file(shard, path, metadata={"format": "pt"})
        return path, list(shard)

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield flush()
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    yield flush()


def _remove_partial(folder: Path) -> None:
    """Delete shards that did not become part of a model; each may hold gigabytes."""
    for path in folder.glob(".partial-*"):
        path.unlink(missing_ok=True)


def pack_folder(source: ModelSource) -> dict[str, bytes]:
    """Content of all files that make a model, its adapter's too, to travel in a pickle."""
    names = [CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES]
    paths = [source.folder / name for name in names]
    if source.adapter_folder is not None:
        adapter = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, POOLING_FILE)
        paths += [source.adapter_folder / name for name in adapter]
    paths = [path for path in paths if path.is_file()]
    return {path.name: path.read_bytes() for path in [*paths, *_find_weight_files(source.folder)]}


def unpack_folder(files: Mapping[str, bytes]) -> Path:
    """A temporary folder with these files, one per content and process, gone at its end."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(name.encode() + hashlib.blake2b(files[name]).digest())
    with _unpacking:
        folder = _unpacked.get(digest.hexdigest())
        if folder is None:
            folder = tempfile.TemporaryDirectory(prefix="skembed-")
            for name, content in files.items():
                (Path(folder.name) / name).write_bytes(content)
            _unpacked[digest.hexdigest()] = folder
        return Path(folder.name)
