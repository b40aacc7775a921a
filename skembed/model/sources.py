"""Folder, configuration and fingerprint of a model, found by its name.

A name is that of a bundled model, a local folder or a hub id. Only safetensors and JSON files are
read or downloaded: no code, no pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.model.config import NVEmbedConfig
from skembed.model.modules import (
    MODULE_FILES,
    find_pooling,
    read_modules,
    refuse_causal,
    refuse_causal_name,
)
from skembed.model.pooling import POOLINGS
from skembed.model.tokenization import find_tokenizer_file

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ADAPTER_CONFIG_FILE",
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
    "join_first",
    "pack_folder",
    "read_config",
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
INDEX_FILE = "model.safetensors.index.json"
SETTINGS_FILE = "skembed.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
CARD_FILES = (SETTINGS_FILE, PROMPTS_FILE, LENGTH_FILE, *MODULE_FILES)  # how a model is to be used
MAX_FULL_HASH_BYTES = 256 * 1024**2
CONTENT_DIGITS = 16  # of a fingerprint: equal for all copies of a model
_found: dict[tuple[Any, ...], ModelSource] = {}  # hub models of this process
_unpacked: dict[str, tempfile.TemporaryDirectory[str]] = {}
_unpack_lock = threading.Lock()


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
        if (folder / ADAPTER_CONFIG_FILE).is_file():
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
    values = read_json(path)
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


def join_first(items: Sequence[str], limit: int = 5) -> str:
    """Return the first few of many names, joined."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def find_weight_files(folder: Path) -> list[Path]:
    """Return the shards of the index file, or the single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error}.") from error
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"The model folder {folder} lacks {join_first(absent)}, named in {INDEX_FILE}. "
                "Copy or download the folder again."
            )
        return [folder / name for name in shards]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
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
    content = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    state = hashlib.blake2b(digest_size=CONTENT_DIGITS // 2)
    small = [source.folder / CONFIG_FILE, find_tokenizer_file(source.folder)]
    for path in [*small, *find_weight_files(source.folder)]:
        try:
            _hash_file(path, content)
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
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
    with open(path, "rb") as file:
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
    names = (CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES, *CARD_FILES)
    paths = {path: source.folder for path in find_weight_files(source.folder)}
    paths |= {source.folder / name: source.folder for name in names}
    if source.adapter_folder is not None:
        adapter = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, POOLING_FILE, *CARD_FILES)
        paths |= {source.adapter_folder / name: source.adapter_folder for name in adapter}
    return {p.relative_to(home).as_posix(): p for p, home in paths.items() if p.is_file()}


def pack_folder(source: ModelSource) -> dict[str, bytes]:
    """Return path and content of all files of a model and its adapter, for a pickle."""
    return {name: path.read_bytes() for name, path in _list_packed(source).items()}


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
    with path.open("rb") as file:
        if size <= MAX_FULL_HASH_BYTES:
            return file.read() == content
        for position in range(0, size, size // 4_096):
            file.seek(position)
            if file.read(4_096) != content[position : position + 4_096]:
                return False
    return True


def unpack_folder(files: Mapping[str, bytes]) -> Path:
    """Return a temporary folder with these files, one per content; the process's end deletes it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(name.encode() + hashlib.blake2b(files[name]).digest())
    with _unpack_lock:
        folder = _unpacked.get(digest.hexdigest())
        if folder is None:
            folder = tempfile.TemporaryDirectory(prefix="skembed-")
            for name, content in files.items():
                path = Path(folder.name) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            _unpacked[digest.hexdigest()] = folder
        return Path(folder.name)
