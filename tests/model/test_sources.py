"""From a model's name to its files: configurations, fingerprints, the hub."""

import builtins
import fnmatch
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoints import TEXTS, embed, load, rewrite, rewrite_config, shard
from huggingface_hub import errors as hub_errors
from paths import GOLDEN
from torch import Tensor

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.model import sources
from skembed.model.sources import (
    PINNED_REVISIONS,
    fingerprint_weights,
    resolve_source,
    unpack_folder,
)

# Saving


def test_unpacked_files_are_shared_by_content(folder: Path) -> None:
    files = sources.pack_folder(resolve_source(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    one, same = unpack_folder(files), unpack_folder(dict(reversed(files.items())))
    assert one == same
    assert {path.name: path.read_bytes() for path in one.iterdir()} == files
    assert unpack_folder({**files, "config.json": b"{}"}) != one


# Damaged and foreign folders


@pytest.mark.parametrize("value", [[2, 3], "two", True])
def test_token_ids_that_are_no_numbers(folder: Path, value: Any) -> None:
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    rewrite_config(folder, text_config={**text, "eos_token_id": value})
    with pytest.raises(CheckpointError, match="`eos_token_id` in .* must be an int"):
        load(folder)


def test_null_in_the_config_means_the_default(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    rewrite_config(folder, text_config={**text, "bos_token_id": None, "head_dim": None})
    assert np.array_equal(embed(folder), embed(GOLDEN))


def test_custom_code_is_neither_asked_for_nor_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("loading asked a question")

    code = "raise AssertionError('code of the folder was run')"
    for name in ("modeling_nvembed.py", "configuration_nvembed.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
    settings["tokenizer_class"] = "Own"
    path.write_text(json.dumps(settings))
    assert "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(builtins, "input", refuse)
    assert np.array_equal(embed(folder), embed(GOLDEN))


# Fingerprints


def fingerprint(folder: Path) -> str:
    return fingerprint_weights(resolve_source(folder))


def test_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    assert len(first) == 32
    moved = tmp_path / "under another name"
    shutil.copytree(folder, moved)
    os.utime(moved / sources.WEIGHTS_FILE, (1, 1))
    (moved / "README.md").write_text("not part of it")
    assert fingerprint(moved) == first == fingerprint(GOLDEN)

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["embedding_model.norm.weight"][0] += 1e-3

    seen = {first}
    rewrite(folder, nudge)
    seen.add(fingerprint(folder))
    rewrite_config(folder, is_mask_instruction=False)
    seen.add(fingerprint(folder))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_fingerprint_of_shards_covers_each(folder: Path) -> None:
    shard(folder)
    seen = {fingerprint(folder)}
    for path in sorted(folder.glob("model-*.safetensors")):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_fingerprint_of_large_files_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of 64 MB: samples every 16 KiB, and the time of the last change."""
    weights = folder / sources.WEIGHTS_FILE
    os.truncate(weights, 64 * 1024**2)
    monkeypatch.setattr(sources, "MAX_FULL_HASH_BYTES", 1024**2)
    reads = []

    class CountingHash:
        def update(self, block: bytes) -> None:
            reads.append(len(block))

    os.utime(weights, ns=(10**18, 10**18))
    first = fingerprint(folder)
    sources._hash_file(weights, CountingHash())  # type: ignore[arg-type]
    assert sum(reads) < 20 * 1024**2
    assert fingerprint(folder) == first

    def changed_at(place: int) -> str:
        with weights.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.utime(weights, ns=(10**18, 10**18))
            found = fingerprint(folder)
            file.seek(place)
            file.write(byte)
        os.utime(weights, ns=(10**18, 10**18))
        return found

    assert changed_at(100) != first  # the header
    assert changed_at(16_384 * 1_000) != first  # a sampled place
    assert changed_at(16_384 * 1_000 + 10_000) == first  # between two of them
    assert fingerprint(folder) == first
    os.utime(weights, ns=(10**18 + 1, 10**18 + 1))
    assert fingerprint(folder) != first  # what the samples miss, the time tells
    os.truncate(weights, 65 * 1024**2)
    os.utime(weights, ns=(10**18, 10**18))
    assert fingerprint(folder) != first


def test_fingerprint_of_a_folder_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"must hold a tokenizer\.json"):
        fingerprint(folder)


# Names and hub ids


def test_bundled_model() -> None:
    source = resolve_source("skembed-mini")
    assert (source.folder / sources.WEIGHTS_FILE).is_file()
    assert source.revision is None


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "~/a", "a/b/c", "/a/b", "a//b", ""])
def test_no_such_folder_and_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    if name:
        with pytest.raises(ModelNotFoundError, match=r"must be one of \['skembed-mini'\]"):
            resolve_source(name)
    with pytest.raises((ModelNotFoundError, ValueError), match="`model` parameter"):
        NVEmbedVectorizer(name).transform(TEXTS)


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    shutil.copytree(GOLDEN, tmp_path / "nvidia" / "NV-Embed-v2")
    assert resolve_source("nvidia/NV-Embed-v2").folder == tmp_path / "nvidia" / "NV-Embed-v2"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the download by a copy of the golden folder; return the calls."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, **kwargs})
        target = tmp_path / "hub" / "snapshots" / (kwargs["revision"] or "0" * 40)
        if not target.exists():
            shutil.copytree(GOLDEN, target)
        return str(target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("name", ["nvidia/NV-Embed-v1", "nvidia/NV-Embed-v2"])
def test_known_models_are_pinned(name: str, downloads: list[dict[str, Any]]) -> None:
    pinned = PINNED_REVISIONS[name]
    assert len(pinned) == 40
    assert set(pinned) <= set("0123456789abcdef")
    vectorizer = NVEmbedVectorizer(name, device="cpu", dtype="float32", cache=None).fit(TEXTS)
    assert {call["repo_id"] for call in downloads} == {name}
    assert {call["revision"] for call in downloads} == {pinned}
    assert vectorizer.model_["revision"] == pinned
    assert vectorizer.model_["name"] == name
    assert np.array_equal(vectorizer.transform(TEXTS), embed(GOLDEN))


def test_revision_of_the_caller_goes_first(downloads: list[dict[str, Any]]) -> None:
    assert resolve_source("nvidia/NV-Embed-v2", "abc").revision == "abc"
    assert resolve_source("someone/other").revision == "0" * 40  # the commit of the main branch
    assert [call["revision"] for call in downloads] == ["abc", None]


def test_what_is_downloaded(downloads: list[dict[str, Any]]) -> None:
    resolve_source("nvidia/NV-Embed-v2")
    patterns = downloads[0]["allow_patterns"]

    def is_wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    wanted = [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00004.safetensors",
    ]
    unwanted = [
        "modeling_nvembed.py",
        "pytorch_model.bin",
        "model.pt",
        "flax_model.msgpack",
        "README.md",
        "model.onnx",
        "model.gguf",
    ]
    assert [name for name in wanted if not is_wanted(name)] == []
    assert [name for name in unwanted if is_wanted(name)] == []


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, with an empty cache and no network (see conftest)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_source("nvidia/NV-Embed-v2")
    message = str(caught.value)
    for part in ("nvidia/NV-Embed-v2", PINNED_REVISIONS["nvidia/NV-Embed-v2"], "offline?"):
        assert part in message
    assert "hf download" in message  # the next step
    assert isinstance(caught.value, OSError)


def hub_error(kind: type[Exception]) -> Exception:
    """One of the hub's errors, which want a response."""
    response = SimpleNamespace(headers={}, request=None, status_code=403, text="")
    return kind("no", response=response)  # type: ignore[call-arg]


class BrokenTransferError(hub_errors.HfHubHTTPError.__bases__[0]):  # type: ignore[name-defined]
    """A transport error of the hub's HTTP library, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub_errors.GatedRepoError), "is gated.*Accept its licence.*hf auth login"),
        (hub_error(hub_errors.RepositoryNotFoundError), "has no model .* or it is private"),
        (hub_error(hub_errors.RevisionNotFoundError), "has no model .* or it is private"),
        (hub_error(hub_errors.HfHubHTTPError), "offline"),
        (ConnectionError("reset"), "offline"),
        (BrokenTransferError("proxy"), "offline"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub_are_translated(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_source("someone/model", "v7")
    assert "'someone/model' at revision 'v7'" in str(caught.value)
    assert caught.value.__cause__ is error
