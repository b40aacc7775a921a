"""Folder, configuration and fingerprint of a model, found by its name.

A name is that of a bundled model, a local folder or a hub id. Only safetensors and JSON files are
read or downloaded: no code, no pickles.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from skembed import _files
from skembed._files import open_file, read_file
from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.model.config import NVEmbedConfig
from skembed.model.files import find_file, has_file, read_steadily, unpack_folder, wait_for_save
from skembed.model.modules import (
    MODULE_FILES,
    find_pooling,
    read_modules,
    refuse_causal,
    refuse_causal_name,
)
from skembed.model.pooling import POOLINGS
from skembed.model.tokenization import MAX_TOKENIZER_BYTES, find_tokenizer_file
from skembed.model.weight_files import check_file, join_first

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_FILES",
    "ADAPTER_WEIGHTS_FILE",
    "BUNDLED_MODELS",
    "CARD_FILES",
    "CONFIG_FILE",
    "CONTENT_DIGITS",
    "DOWNLOADED_FILES",
    "INDEX_FILE",
    "LENGTH_FILE",
    "MAX_FULL_HASH_BYTES",
    "ModelSource",
    "PINNED_REVISIONS",
    "POOLING_FILE",
    "PROMPTS_FILE",
    "SETTINGS_FILE",
    "TOKENIZER_FILES",
    "WEIGHTS_FILE",
    "find_weight_files",
    "fingerprint_weights",
    "has_same_content",
    "holds_files",
    "pack_folder",
    "read_config",
    "read_index",
    "read_json",
    "resolve_source",
    "unpack_folder",
]

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
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, POOLING_FILE)
INDEX_FILE = "model.safetensors.index.json"
SETTINGS_FILE = "skembed.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
CARD_FILES = (SETTINGS_FILE, PROMPTS_FILE, LENGTH_FILE, *MODULE_FILES)  # how a model is to be used
MAX_FULL_HASH_BYTES = 256 * 1024**2
CONTENT_DIGITS = 16  # of a fingerprint: equal for all copies of a model
_found: dict[tuple[Any, ...], ModelSource] = {}  # hub models of this process


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine."""

    name: str  # the `model` parameter that led here
    folder: Path
    revision: str | None = None  # commit of the hub repository
    adapter_folder: Path | None = None  # of an adapter; `folder` is then its base model's


def resolve_source(model: str | os.PathLike[str], revision: str | None = None) -> ModelSource:
    """Find the folder of a bundled model, a local folder or a hub id, downloading if need be.

    Without a revision, a known model gets its pinned commit and any other the main branch's. A
    name of the hub means the same commit while the process lives. Raises ModelNotFoundError, and
    CheckpointError for a model that cannot run here.
    """
    name = os.fspath(model)
    if name in BUNDLED_MODELS:
        return ModelSource(name, Path(str(resources.files("skembed") / "data" / name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        if not has_file(folder, CONFIG_FILE) and not has_file(folder, ADAPTER_CONFIG_FILE):
            wait_for_save(folder)
            if has_file(folder, ADAPTER_WEIGHTS_FILE):
                return _resolve_adapter(name, folder)
        if has_file(folder, ADAPTER_CONFIG_FILE):
            return _resolve_adapter(name, folder)
        return ModelSource(name, folder)
    if not _looks_like_hub_id(name):
        raise ModelNotFoundError(
            f"The `model` parameter of `NVEmbedVectorizer` must be one of {list(BUNDLED_MODELS)}, "
            f"a folder, or a hub id such as 'nvidia/NV-Embed-v2'; got {name!r}, and there is no "
            f"such folder (looked for {folder.absolute()})."
        )
    refuse_causal_name(name)
    return _download(name, revision or PINNED_REVISIONS.get(name))


def _resolve_adapter(name: str, folder: Path) -> ModelSource:
    """Return an adapter's folder and its base model's, which may be the same."""
    if (folder / CONFIG_FILE).is_file():
        return ModelSource(name, folder, adapter_folder=folder)
    values = read_json(folder / ADAPTER_CONFIG_FILE)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base or "\0" in base:
        raise CheckpointError(
            f"The {ADAPTER_CONFIG_FILE} of {folder} must name its base model in "
            f"base_model_name_or_path; got {base!r:.100}."
        )
    if revision is not None and not isinstance(revision, str):
        raise CheckpointError(
            f"The revision in the {ADAPTER_CONFIG_FILE} of {folder} must be a str or null; got "
            f"{revision!r:.100}."
        )
    base_folder = Path(base).expanduser()
    if has_file(base_folder, ADAPTER_CONFIG_FILE):  # before it is followed: it may lead back here
        raise CheckpointError(
            f"The base model of the adapter in {folder} is an adapter itself ({base!r:.100}). "
            "Merge that one first (`save_pretrained(path, merge=True)`)."
        )
    try:
        source = resolve_source(base, revision)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"The adapter in {folder} was trained on {base!r}, which could not be found. Put that "
            f"model there, or write its path into base_model_name_or_path of "
            f"{ADAPTER_CONFIG_FILE}. {error}"
        ) from error
    if source.adapter_folder is not None:
        raise CheckpointError(
            f"The base model of the adapter in {folder} is an adapter itself ({base!r}). Merge "
            "that one first (`save_pretrained(path, merge=True)`)."
        )
    return ModelSource(name, source.folder, source.revision, folder)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise CheckpointError if the file is missing or anything else."""
    find_file(path.parent, path.name)
    try:
        return _files.read_json(path)
    except FileNotFoundError as error:
        article = "an" if path.name.startswith("a") else "a"
        raise CheckpointError(
            f"The model folder {path.parent} must hold {article} {path.name}; it does not."
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}.") from error


def _looks_like_hub_id(name: str) -> bool:
    """Return whether a name is ``owner/name`` and not written like a path."""
    parts = name.split("/")
    return len(parts) == 2 and all(p and p[0] not in ".~" and "\\" not in p for p in parts)


def _download(name: str, revision: str | None) -> ModelSource:
    """Return a hub repository's folder: asked for once in a process, so that it cannot change."""
    from huggingface_hub import constants, snapshot_download

    hub = (snapshot_download, constants.HF_HUB_CACHE, name)  # with another client, another hub
    found = _found.get((*hub, revision))
    if found is None:
        fetched = _fetch(name, revision)
        found = _found.setdefault((*hub, revision), fetched)  # of two threads, the first decides
        _found.setdefault((*hub, found.revision), found)
    elif not (found.folder / CONFIG_FILE).is_file():  # the cache was cleaned
        _fetch(name, found.revision)
    return found


def _fetch(name: str, revision: str | None) -> ModelSource:
    """Download safetensors and JSON files of a hub repository, or find them in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = f"{name!r} at revision {revision or 'main'!r}"
    # The base classes are errors of the HTTP library below (proxies, broken transfers), which
    # changes between releases of huggingface_hub.
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    transfer_errors: tuple[type[Exception], ...] = (OSError, ValueError, *bases)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED_FILES))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub model {repository} is gated. Accept its licence on the model's page, "
            "then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelNotFoundError(
            f"The hub has no model {repository}, or it is private. Check the spelling and the "
            "`revision` parameter, or pass a local folder."
        ) from error
    except transfer_errors as error:
        _refuse_cached(name)
        raise ModelNotFoundError(
            f"There is no folder {name!r} here, and the hub model {repository} is not in the "
            "local hub cache and could not be downloaded (offline?). If it is a Mistral model (no "
            "other kind runs), download it on a connected machine with `hf download`, copy the "
            "folder, and pass its path as `model`; or use the bundled 'skembed-mini'."
        ) from error
    logger.info("hub model %s resolved to commit %s", name, folder.name)
    return ModelSource(name, folder, folder.name)


def _refuse_cached(name: str) -> None:
    """Raise CheckpointError if any copy in the hub's cache shows that a model is no Mistral."""
    from huggingface_hub import constants

    copies = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    for path in sorted(copies.glob(f"*/{CONFIG_FILE}")):
        values = read_json(path)
        NVEmbedConfig.check_kind(values, f"the hub model {name!r} ({path.parent})")


def read_config(source: ModelSource, pooling: str | None = None) -> NVEmbedConfig:
    """Return the configuration of a model folder, with another pooling if asked.

    Raises CheckpointError where config.json is unreadable or of another kind of model.
    """
    path = source.folder / CONFIG_FILE
    values = read_steadily([source.folder], lambda: read_json(path))
    config = NVEmbedConfig.from_dict(values, str(source.folder))
    modules = read_modules(source.folder)
    refuse_causal(source.name, source.folder, values, modules)
    if pooling is None and values.get("model_type") == "mistral":
        pooling = find_pooling(modules, source.folder)
    if config.pooling not in POOLINGS:
        raise CheckpointError(
            f"The pooling in {path} must be one of {list(POOLINGS)}; got {config.pooling!r}."
        )
    if pooling is None or pooling == config.pooling:
        return config
    return replace(config, pooling=pooling, pooling_is_fresh=pooling in ("latent", "multilayer"))


def read_index(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor that the index file names; empty without an index."""
    if not has_file(folder, INDEX_FILE):
        return {}
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} is not a safetensors index: its weight_map must be a JSON object that names "
            f"the file of each tensor; got {type(weight_map).__name__}."
        )
    subject = f"A file in the weight_map of {path}"
    files = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in files:
            files[name] = find_file(folder, name, subject=subject)
    absent = sorted(name for name, file in files.items() if not file.is_file())
    if absent:
        raise CheckpointError(
            f"The model folder {folder} lacks {join_first(absent)}, named in {INDEX_FILE}. "
            "Copy or download the folder again."
        )
    return {key: files[name] for key, name in weight_map.items()}


def find_weight_files(folder: Path) -> list[Path]:
    """Return the shards of the index file, or the single file."""
    index = read_index(folder)
    if index:
        return sorted(set(index.values()))
    if has_file(folder, WEIGHTS_FILE):
        return [find_file(folder, WEIGHTS_FILE)]
    pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(s))
    if pickled:
        raise CheckpointError(
            f"The model folder {folder} holds pickled weights only ({join_first(pickled)}), which "
            "can run code when opened. Convert them to safetensors where you trust them "
            "(`save_pretrained(..., safe_serialization=True)` of transformers)."
        )
    raise CheckpointError(
        f"The model folder {folder} must hold {WEIGHTS_FILE} or {INDEX_FILE}; it holds neither."
    )


def fingerprint_weights(source: ModelSource) -> str:
    """Return a hash, 32 hexadecimal digits, of weights, configuration and tokenizer.

    Of files above 256 MiB only 4,096 evenly spaced samples of 4 KiB, the size and the time of the
    last change are hashed: reading 16 GB to look up one vector would cost more than the vector.
    The first 16 digits depend on the content (or samples) alone, and are equal for copies on two
    machines; the others depend on the times as well.
    """
    return read_steadily([source.folder], lambda: _hash_folder(source.folder))


def _hash_folder(folder: Path) -> str:
    """Return the hash of a model's files as they are now."""
    content = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    state = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    small = [find_file(folder, CONFIG_FILE), find_tokenizer_file(folder)]
    for path in [*small, *find_weight_files(folder)]:
        try:
            _hash_file(path, content)
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if stat.st_size > MAX_FULL_HASH_BYTES:
            state.update(f"{stat.st_mtime_ns}:".encode())
    state.update(content.digest())
    return content.hexdigest() + state.hexdigest()


def has_same_content(fingerprint: str, other: str) -> bool:
    """Return whether two fingerprints, of a model or with an adapter's, are of the same content.

    Times of files do not count: they differ between copies on two machines.
    """
    parts = fingerprint.partition("+"), other.partition("+")
    (base, _, adapter), (other_base, _, other_adapter) = parts
    return base[:CONTENT_DIGITS] == other_base[:CONTENT_DIGITS] and adapter == other_adapter


def _hash_file(path: Path, digest: hashlib.blake2b) -> None:
    """Add one file's name and content, or samples of it, to a hash."""
    stat = path.stat()
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    digest.update(f"{path.name}:{stat.st_size}:".encode())
    digest.update(_content_hash(str(path), state))


@lru_cache(maxsize=256)
def _content_hash(path: str, state: tuple[int, int, int, int]) -> bytes:
    """Return the hash of a file in this state (size, change times, inode), cached."""
    size = state[0]
    digest = hashlib.blake2b(digest_size=16)
    with open_file(path) as file:
        if size <= MAX_FULL_HASH_BYTES:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for position in range(0, size, size // 4_096):
                file.seek(position)
                digest.update(file.read(4_096))
    return digest.digest()


def _list_packed(source: ModelSource) -> dict[str, Path]:
    """Return the files of a model and its adapter that a pickle holds, by path in the folder.

    What the adapter's folder has goes before the model's.
    """
    base, adapter = source.folder, source.adapter_folder or source.folder
    wanted = [(base, name) for name in (CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES, *CARD_FILES)]
    if source.adapter_folder is not None:
        wanted += [(adapter, name) for name in (*ADAPTER_FILES, *CARD_FILES)]
    paths = {name: find_file(of, name) for of, name in wanted if has_file(of, name)}
    return paths | {p.relative_to(base).as_posix(): p for p in find_weight_files(base)}


def pack_folder(source: ModelSource) -> dict[str, bytes]:
    """Return path in the folder and content of all files of a model and its adapter."""
    limits = {".json": MAX_TOKENIZER_BYTES}

    def pack() -> dict[str, bytes]:
        paths = _list_packed(source)
        for path in paths.values():
            if path.suffix == ".safetensors":  # a file as large as its content
                check_file(path)
        try:
            return {name: read_file(p, limit=limits.get(p.suffix)) for name, p in paths.items()}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error

    return read_steadily({source.folder, source.adapter_folder or source.folder}, pack)


def holds_files(source: ModelSource, files: Mapping[str, bytes]) -> bool:
    """Return whether a model on this machine is the one that `pack_folder` put into a pickle.

    Of files above 256 MiB samples are compared, as in a fingerprint.
    """
    try:
        paths = _list_packed(source)
        return paths.keys() == files.keys() and all(
            _holds(path, files[name]) for name, path in paths.items()
        )
    except (OSError, CheckpointError):  # damaged, or just being replaced
        return False


def _holds(path: Path, content: bytes) -> bool:
    """Return whether a file has this content."""
    size = path.stat().st_size
    if size != len(content):
        return False
    with open_file(path) as file:
        if size <= MAX_FULL_HASH_BYTES:
            return file.read() == content
        for position in range(0, size, size // 4_096):
            file.seek(position)
            if file.read(4_096) != content[position : position + 4_096]:
                return False
    return True
