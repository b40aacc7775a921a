"""Checkpoints: layouts, types, poolings, saving, damaged folders."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES, TEXTS, embed, load, rewrite, rewrite_config, shard
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny import token_states
from torch import Tensor
from transformers import AutoModel, MistralConfig, MistralForCausalLM, MistralModel

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError, FreshPoolingWarning, ModelNotFoundError
from skembed.model import checkpoint, sources
from skembed.model.checkpoint import iterate_tensors, save_checkpoint
from skembed.model.loaded import load_tokenizer
from skembed.model.pooling import LatentAttention, MultiLayerPooling
from skembed.model.sources import (
    read_config,
    resolve_source,
)
from skembed.model.tokenization import PackedBatch, pack_texts

MISTRAL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "sliding_window": 4,
}


@pytest.fixture(scope="session")
def mistral_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return plain Mistral folders as transformers writes them, the same weights in each."""
    parent = tmp_path_factory.mktemp("mistral")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        language_model = MistralForCausalLM(MistralConfig(**MISTRAL))
    folders = {name: parent / name for name in ("MistralModel", "MistralForCausalLM", "shards")}
    language_model.model.save_pretrained(folders["MistralModel"])
    language_model.save_pretrained(folders["MistralForCausalLM"])
    language_model.save_pretrained(folders["shards"], max_shard_size="40KB")
    assert (folders["shards"] / sources.INDEX_FILE).is_file()
    for path in folders.values():
        shutil.copy(GOLDEN / "tokenizer.json", path)
    return folders


def pack(folder: Path) -> PackedBatch:
    """Pack the texts above with the tokenizer of a folder."""
    source = resolve_source(folder)
    tokenizer = load_tokenizer(source.folder, read_config(source))
    return pack_texts(tokenizer.encode(TEXTS, prefix="", max_length=64).ids, 0)


# Layouts and types


@pytest.mark.parametrize("target", sorted(DTYPES))
@pytest.mark.parametrize("stored", sorted(DTYPES))
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_stored_and_target_types(folder: Path, sharded: bool, stored: str, target: str) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.to(DTYPES[stored]) for name, value in tensors.items()})

    rewrite(folder, cast)
    tensors = load_file(folder / sources.WEIGHTS_FILE)
    if sharded:
        shard(folder)
    model = load(folder, dtype=target)
    loaded = model.state_dict()
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == DTYPES[target]
        assert torch.equal(loaded[name], value.to(DTYPES[target]))
    assert not model.training
    everything = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in everything)
    rotary = model.embedding_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32  # in half precision long texts lose their positions
    vectors = embed(folder, dtype=target)
    assert (vectors * embed(GOLDEN)).sum(1).min() > 0.999


def test_float32_from_float32_is_exact(folder: Path) -> None:
    shard(folder)
    assert np.array_equal(embed(folder), embed(GOLDEN))


def reference_states(folder: Path, batch: PackedBatch) -> list[Tensor]:
    """What transformers computes for each text alone under a mask that hides nothing."""
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs.config.sliding_window = None
    states = []
    for ids in batch.input_ids.split(list(batch.lengths)):
        mask = torch.zeros(1, 1, len(ids), len(ids))
        with torch.no_grad():
            out = theirs(input_ids=ids[None], attention_mask=mask, use_cache=False)
        states.append(out.last_hidden_state[0])
    return states


@pytest.mark.parametrize("kind", ["MistralModel", "MistralForCausalLM", "shards"])
def test_plain_mistral(mistral_folders: Mapping[str, Path], kind: str) -> None:
    path = mistral_folders[kind]
    batch = pack(path)
    with pytest.warns(FreshPoolingWarning, match="'latent' pooling.*pooling='mean'"):
        model = load(path)
    assert isinstance(model.embedding_model, MistralModel)
    expected = reference_states(path, batch)
    states = token_states(model, batch)
    with torch.inference_mode():
        vectors = model(batch)
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-5, atol=1e-5)
    means = torch.stack([state.mean(0) for state in expected])
    torch.testing.assert_close(vectors, means, rtol=1e-5, atol=1e-5)


def test_plain_mistral_through_the_vectorizer(mistral_folders: Mapping[str, Path]) -> None:
    path = mistral_folders["MistralForCausalLM"]
    with pytest.warns(FreshPoolingWarning):
        latent = embed(path)
    mean, eos = embed(path, pooling="mean"), embed(path, pooling="eos")  # without a warning
    np.testing.assert_allclose(latent, mean, rtol=0, atol=1e-5)
    assert np.abs(mean - eos).max() > 0.01


@pytest.mark.parametrize("pooling", ["latent", "multilayer"])
def test_fresh_pooling_is_the_same_each_time(
    mistral_folders: Mapping[str, Path], pooling: str
) -> None:
    before = torch.get_rng_state()
    with pytest.warns(FreshPoolingWarning):
        first = load(mistral_folders["MistralModel"], pooling=pooling)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        with pytest.warns(FreshPoolingWarning):
            second = load(mistral_folders["MistralModel"], pooling=pooling)
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    latents = weights["latent_attention_model.latents"]
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)


# Another pooling than the checkpoint's


def test_pooling_override() -> None:
    batch = pack(GOLDEN)
    latent = load(GOLDEN)
    with torch.inference_mode():
        states = token_states(latent, batch).split(list(batch.lengths))
        expected = {
            "mean": torch.stack([state.mean(0) for state in states]),
            "eos": torch.stack([state[-1] for state in states]),
        }
        for pooling, vectors in expected.items():
            model = load(GOLDEN, pooling=pooling)  # without a warning: nothing is fresh
            torch.testing.assert_close(model(batch), vectors, rtol=1e-5, atol=1e-6)
            assert not list(model.latent_attention_model.parameters())
        assert (latent(batch) - expected["mean"]).abs().max() > 0.01
    assert isinstance(latent.latent_attention_model, LatentAttention)


def test_pooling_override_with_fresh_weights(folder: Path) -> None:
    with pytest.warns(FreshPoolingWarning, match="'multilayer' pooling.*random weights"):
        model = load(folder, pooling="multilayer")
    assert isinstance(model.latent_attention_model, MultiLayerPooling)
    with torch.inference_mode():
        vectors = model(pack(folder))
    assert torch.isfinite(vectors).all()
    assert vectors.std(0).max() > 1e-3


def test_unknown_pooling_in_the_file(folder: Path) -> None:
    rewrite_config(folder, pooling="max")
    with pytest.raises(CheckpointError, match=r"must be one of \['latent', .*'max'"):
        load(folder)


# Saving


@pytest.mark.filterwarnings("ignore::skembed.exceptions.FreshPoolingWarning")
@pytest.mark.parametrize("pooling", [None, "mean", "eos", "multilayer"])
def test_save_and_load_again(tmp_path: Path, pooling: str | None) -> None:
    settings: dict[str, Any] = {
        "instruction": "Retrieve similar text",
        "document_instruction": "Keep this",
        "instruction_template": "Task: {instruction}\nText: ",
        "max_length": 64,
        "truncate_dim": 20,
        "normalize": False,
        "missing": "nan",
    }
    run: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache": None}
    vectorizer = NVEmbedVectorizer(GOLDEN, pooling=pooling, **settings, **run)
    expected = vectorizer.transform([*TEXTS, None])
    vectorizer.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is saved is no longer fresh
        again = NVEmbedVectorizer.from_pretrained(tmp_path / "saved", **run)
        found = again.transform([*TEXTS, None])
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(again.encode_document(TEXTS), vectorizer.encode_document(TEXTS)), (
        "document side"
    )
    assert {name: again.get_params()[name] for name in settings} == settings
    changed = NVEmbedVectorizer.from_pretrained(tmp_path / "saved", max_length=32, **run)
    assert changed.max_length == 32  # what the caller passes goes first


def save(source_folder: Path, target: Path, **changes: Any) -> None:
    """Save a folder's model to another folder."""
    source = resolve_source(source_folder)
    config = read_config(source)
    arguments: dict[str, Any] = {
        "config": config,
        "tensors": iterate_tensors(source, config),
        "tokenizer_folder": source.folder,
        "extra": {},
        **changes,
    }
    save_checkpoint(target, **arguments)


def test_save_over_an_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistral_folders: Mapping[str, Path]
) -> None:
    target = tmp_path / "saved"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 50_000)
        save(GOLDEN, target)
    assert len(list(target.glob("model-*.safetensors"))) > 3
    assert np.array_equal(embed(target), embed(GOLDEN))
    other = mistral_folders["MistralModel"]
    save(other, target)
    names = {path.name for path in target.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in names if "-of-" in name or "index" in name or "partial" in name]
    assert np.array_equal(embed(target, pooling="mean"), embed(other, pooling="mean"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 50_000)
        save(GOLDEN, target)
    assert not (target / "model.safetensors").exists()
    assert np.array_equal(embed(target), embed(GOLDEN))


def test_saved_weights_keep_their_type(folder: Path, tmp_path: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.half() for name, value in tensors.items()})

    rewrite(folder, cast)
    save(folder, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / sources.WEIGHTS_FILE)
    assert {value.dtype for value in stored.values()} == {torch.float16}


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over"])
def test_a_kill_at_any_write_never_leaves_a_mixture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Stop before the n-th file operation, for every n: old model, new model or a refusal.

    Both models have the same shapes and shard names, so that any mixture of theirs would load.
    """

    def negate(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: -value for name, value in tensors.items() if value.ndim == 2})

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    rewrite(folder, negate)
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    rewrite_config(folder, text_config={**text, "rope_theta": 50.0})
    old = tmp_path / "old"
    save(folder, old)
    before, after = embed(old), embed(GOLDEN)
    outcomes = []
    for limit in range(100):
        target = tmp_path / f"saved-{limit}"
        if existing:
            shutil.copytree(old, target)
        count = iter(range(limit))
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "replace"), (checkpoint, "save_file")):
                patch.setattr(owner, name, stop_after(count, getattr(owner, name)))
            try:
                save(GOLDEN, target)
                finished = True
            except KilledError:
                finished = False
        try:
            vectors = embed(target)
        except (CheckpointError, ModelNotFoundError):
            outcomes.append("refused")
        else:
            is_old = np.array_equal(vectors, before)
            assert is_old or np.array_equal(vectors, after)
            outcomes.append("old" if is_old else "new")
        if finished:
            break
    assert finished
    assert outcomes[-1] == "new"
    assert "refused" in outcomes
    assert ("old" in outcomes) == existing
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)


def stop_after(count: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it raises when the shared count is used up."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise KilledError
        return function(*args, **kwargs)

    return counted


def test_a_failed_save_leaves_the_old_model_and_no_rubbish(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mistral_folders: Mapping[str, Path]
) -> None:
    before, names = embed(folder), {path.name for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10_000)
    calls = iter(range(2))

    def full_disk(*args: Any, **kwargs: Any) -> None:
        if next(calls, None) is None:
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(mistral_folders["MistralModel"], folder)
    assert {path.name for path in folder.iterdir()} == names
    assert np.array_equal(embed(folder), before)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.json"
    checkpoint.write_json(path, {"a": 1})

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_json(path, {"a": 2})
    assert [child.name for child in tmp_path.iterdir()] == ["settings.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_pickle_with_weights_opens_without_the_model(folder: Path) -> None:
    shard(folder)
    vectorizer = NVEmbedVectorizer(
        folder, device="cpu", dtype="float32", cache=None, store_weights=True
    )
    expected = vectorizer.transform(TEXTS)
    pickled = pickle.dumps(vectorizer)
    shutil.rmtree(folder)
    assert np.array_equal(pickle.loads(pickled).transform(TEXTS), expected)


# Damaged and foreign folders


def test_missing_unexpected_and_wrong_tensors_are_named(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["embedding_model.norm.weight"]
        tensors["embedding_model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["latent_attention_model.latents"] = torch.zeros(16, 7)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "missing: embedding_model.norm.weight" in message
    assert "unexpected: embedding_model.layers.7.mlp.up_proj.weight" in message
    assert "latent_attention_model.latents has (16, 7), expected (16, 48)" in message
    assert str(folder) in message


def test_no_pooling_weights_where_config_promises_them(folder: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("latent_attention_model.")]:
            del tensors[name]

    rewrite(folder, strip)
    with pytest.raises(CheckpointError, match=r"missing: latent_attention_model\."):
        load(folder)
    load(folder, pooling="mean")  # needs none


def test_heads_and_rotary_buffers_are_ignored(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(512, 48)
        tensors["embedding_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(folder, add)
    assert np.array_equal(embed(folder), embed(GOLDEN))


def test_quantised_weights(folder: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        name = "embedding_model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    rewrite(folder, quantise)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight .*int8\. Quantised"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["", "not json", "[]", "{}", '{"weight_map": []}', '{"weight_map": ["a"]}']
)
def test_damaged_index(folder: Path, content: str) -> None:
    shard(folder)
    (folder / sources.INDEX_FILE).write_text(content)
    with pytest.raises(
        CheckpointError,
        match=r"index\.json (is not a safetensors index|cannot be read as JSON)",
    ):
        load(folder)
