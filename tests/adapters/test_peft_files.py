"""Adapter folders: peft reads ours, we read peft's, and what does not fit is refused."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from paths import GOLDEN
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from tiny import base_of, load_base, random_lora
from torch import Tensor
from trained import (
    LABELS,
    OTHER_TEXTS,
    TEXTS,
    make_trainer,
    make_vectorizer,
    stock_backbone,
    train,
    trained,
)

from skembed import NVEmbedVectorizer
from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import (
    LoraSettings,
    insert_lora,
    share_weights,
)
from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.model import sources as checkpoint
from skembed.model.loaded import LoadedModel
from skembed.model.network import NVEmbedModel
from skembed.model.sources import (
    fingerprint_weights,
    resolve_source,
)
from skembed.model.tokenization import pack_texts

TOLERANCE = 1e-5
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pooling.safetensors")
# peft 0.21 on transformers 5.2; goes when peft asks for the new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
fresh_pooling = pytest.mark.filterwarnings("ignore::skembed.exceptions.FreshPoolingWarning")


# peft on the stock backbone


def encode(loaded: LoadedModel, texts: list[str]) -> list[np.ndarray]:
    return loaded.tokenizer.encode(texts, prefix="", max_length=64).ids


def stock_states(model: Any, ids: list[np.ndarray]) -> list[Tensor]:
    """Last hidden states (L, D) of each text, each alone, every token seeing all."""
    states = []
    for row in ids:
        n = len(row)
        out = model(
            input_ids=torch.from_numpy(row.astype(np.int64))[None],
            attention_mask=torch.zeros(1, 1, n, n),
            use_cache=False,
        )
        states.append(out.last_hidden_state[0])
    return states


def own_states(model: NVEmbedModel, ids: list[np.ndarray]) -> Tensor:
    """Last hidden states (T, D) of a pack."""
    states = model.hidden_states(pack_texts(ids, 0))
    assert isinstance(states, Tensor)
    return states


def test_model_equals_pefts() -> None:
    """Forward and gradients of the same matrices on the stock backbone."""
    base, _ = load_base(GOLDEN)
    settings = LoraSettings(4, 8.0, 0.0, "all-linear")
    lora = random_lora(base.config, settings)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(stock_backbone(base.config, base.model), config)
    named = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    result = set_peft_model_state_dict(theirs, named)
    assert not result.unexpected_keys
    ours = share_weights(base.model)
    parameters = insert_lora(ours, settings, lora)
    ids = encode(base, TEXTS)
    states = own_states(ours, ids)
    expected = torch.cat(stock_states(theirs, ids))
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE)
    plain = own_states(base.model, ids)
    assert (states - plain).abs().max() > 0.1
    slope = torch.randn(states.shape, generator=torch.Generator().manual_seed(5)) / len(states)
    for part in (states, expected):
        (part * slope).sum().backward()
    found = dict(theirs.named_parameters())
    assert len(parameters) == 28
    for name, parameter in parameters.items():
        gradient = found[f"base_model.model.{name.replace('.weight', '.default.weight')}"].grad
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "q_proj"], r".*\.1\..*_proj"])
def test_peft_reads_what_we_save(targets: Any, tmp_path: Path) -> None:
    emb = train(trainer={"target_modules": targets, "r": 3, "lora_alpha": 5})
    emb.save_pretrained(tmp_path)
    base = base_of(emb)
    # A missing or foreign key, or a setting peft does not know, is a warning of peft's: an error.
    theirs = peft.PeftModel.from_pretrained(stock_backbone(base.config, base.model), tmp_path)
    ids = encode(base, [*TEXTS, *OTHER_TEXTS])
    with torch.no_grad():
        expected = torch.cat(stock_states(theirs, ids))
        found = own_states(emb.adapter_.bind(base).model, ids)
        assert (found - own_states(base.model, ids)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    result = set_peft_model_state_dict(theirs, load_peft_weights(str(tmp_path), device="cpu"))
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "q_proj"], r".*\.1\..*_proj"])
def test_we_read_what_peft_saves(targets: Any, tmp_path: Path) -> None:
    base, _ = load_base(GOLDEN)
    stock = stock_backbone(base.config, base.model)
    stock.name_or_path = str(GOLDEN)  # what transformers notes when it reads a folder
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    theirs = peft.get_peft_model(stock, config)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    emb = make_vectorizer(tmp_path)
    vectors = emb.transform(TEXTS)
    adapter = Adapter.load(tmp_path, base.config, base.key.fingerprint)
    ids = encode(base, TEXTS)
    with torch.no_grad():
        found = own_states(adapter.bind(base).model, ids)
        expected = torch.cat(stock_states(theirs, ids))
        packed = pack_texts(ids, 0)
        pooled = base.model.latent_attention_model(
            expected[packed.pool_index], packed.pool_segments, packed.pool_counts
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    pooled = torch.nn.functional.normalize(pooled, dim=1).numpy()
    np.testing.assert_allclose(vectors, pooled, rtol=0, atol=TOLERANCE)
    assert np.abs(vectors - make_vectorizer().transform(TEXTS)).max() > 1e-2


def test_training_without_peft_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install skembed\[train\]"):
        train()
    vectors = make_vectorizer(saved).transform(TEXTS)
    assert np.array_equal(vectors, trained().transform(TEXTS))


# Saving and loading


@fresh_pooling
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_pooling", [True, False])
@pytest.mark.parametrize("pooling", ["latent", "mean", "eos", "multilayer"])
def test_saved_adapters_give_the_same_vectors(
    pooling: str, train_pooling: bool, dtype: str, tmp_path: Path
) -> None:
    emb = train(pooling=pooling, dtype=dtype, trainer={"train_pooling": train_pooling})
    texts = [*TEXTS, *OTHER_TEXTS]
    expected = emb.transform(texts)
    assert np.abs(expected - clone(emb).set_params(trainer=None).transform(texts)).max() > 1e-2
    emb.save_pretrained(tmp_path)
    has_weights = pooling in ("latent", "multilayer")
    names = {path.name for path in tmp_path.iterdir()}
    written = set(ADAPTER_FILES if train_pooling and has_weights else ADAPTER_FILES[:2])
    assert names == written | {"skembed.json"}
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "cache": None, "trainer": None}
    loaded = NVEmbedVectorizer.from_pretrained(tmp_path, **options)
    assert np.array_equal(loaded.transform(texts), expected)
    # As `model`, the folder brings the pooling it was trained with.
    by_name = NVEmbedVectorizer(tmp_path, **options)
    assert np.array_equal(by_name.transform(texts), expected)
    assert by_name.fit(texts).model_["fingerprint"] == emb.model_["fingerprint"]
    assert by_name.model_["pooling"] == pooling


def test_saving_again_and_merging_keep_the_vectors(saved: Path, tmp_path: Path) -> None:
    expected = trained().transform(TEXTS)
    loaded = make_vectorizer(saved)
    loaded.save_pretrained(tmp_path / "again")
    assert np.array_equal(make_vectorizer(tmp_path / "again").transform(TEXTS), expected)
    for k, emb in enumerate((trained(), loaded)):
        folder = tmp_path / f"merged{k}"
        emb.save_pretrained(folder, merge=True)
        assert not (folder / "adapter_config.json").exists()
        merged = make_vectorizer(folder).transform(TEXTS)
        np.testing.assert_allclose(merged, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(make_vectorizer().transform(TEXTS) - expected).max() > 1e-2


@fresh_pooling
@pytest.mark.parametrize("pooling", ["mean", "multilayer"])
def test_merging_keeps_another_pooling(pooling: str, tmp_path: Path) -> None:
    emb = train(pooling=pooling)
    emb.save_pretrained(tmp_path, merge=True)
    merged = make_vectorizer(tmp_path).transform(TEXTS)
    np.testing.assert_allclose(merged, emb.transform(TEXTS), rtol=0, atol=TOLERANCE)


def test_settings_do_not_depend_on_the_order_of_targets(tmp_path: Path) -> None:
    emb = train(trainer={"target_modules": ["v_proj", "down_proj", "q_proj"]})
    emb.save_pretrained(tmp_path)
    assert make_vectorizer(tmp_path).fit(TEXTS).model_["fingerprint"] == emb.model_["fingerprint"]


def test_matrices_are_saved_bit_by_bit(saved: Path) -> None:
    base, _ = load_base(GOLDEN)
    loaded = Adapter.load(saved, base.config, base.key.fingerprint)
    own = trained().adapter_
    for found, expected in ((loaded.lora, own.lora), (loaded.pooling, own.pooling)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.fingerprint == own.fingerprint
    assert loaded.settings == own.settings
    assert loaded.size_bytes == own.size_bytes > 0
    assert loaded.targets == own.targets
    assert len(own.targets) == 14


# What does not fit is refused


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file, its header kept."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.zeros(2)


def widen(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name], tensors[name]])


@pytest.mark.parametrize("file", ADAPTER_FILES[1:])
@pytest.mark.parametrize(
    ("change", "fault"), [(drop, "1 missing"), (add, "1 unexpected"), (widen, "1 misshapen")]
)
def test_wrong_keys_are_refused(
    file: str, change: Callable[[dict[str, Tensor]], None], fault: str, saved: Path
) -> None:
    rewrite(saved / file, change)
    with pytest.raises(CheckpointError, match=f"{file}.*{fault}"):
        make_vectorizer(saved).transform(TEXTS)


@pytest.mark.parametrize("file", ADAPTER_FILES)
def test_a_folder_cut_short_is_refused(file: str, saved: Path) -> None:
    content = (saved / file).read_bytes()
    for part in (content[: len(content) // 2], content[:5], b""):
        (saved / file).write_bytes(part)
        with pytest.raises(CheckpointError, match=file):
            make_vectorizer(saved).transform(TEXTS)
    (saved / file).unlink()
    with pytest.raises(CheckpointError):
        make_vectorizer(saved).transform(TEXTS)
    (saved / file).write_bytes(content)
    assert np.array_equal(make_vectorizer(saved).transform(TEXTS), trained().transform(TEXTS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["norm"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["q_proj"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
        ("r", 0),
        ("r", "many"),
        ("lora_alpha", None),
        ("target_modules", None),
        ("target_modules", "("),
        ("target_modules", "nothing"),
    ],
)
def test_configurations_that_are_not_computed(name: str, value: Any, saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, name: value}))
    with pytest.raises(CheckpointError, match="adapter_"):
        make_vectorizer(saved).transform(TEXTS)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(init: Any, saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "init_lora_weights": init}))
    assert np.array_equal(make_vectorizer(saved).transform(TEXTS), trained().transform(TEXTS))


@pytest.fixture
def other_base(fresh_dir: Path) -> Path:
    """The tiny checkpoint with one weight changed."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["embedding_model.norm.weight"][0] += 1e-3

    rewrite(fresh_dir / "model.safetensors", nudge)
    return fresh_dir


def test_another_base_is_refused(saved: Path, other_base: Path, tmp_path: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(other_base)}))
    emb = make_vectorizer(saved)
    for use in (
        lambda: emb.transform(TEXTS),
        lambda: emb.fit(TEXTS),
        lambda: clone(emb).set_params(trainer=make_trainer()).fit(TEXTS, LABELS),
        lambda: emb.save_pretrained(tmp_path / "merged", merge=True),
        lambda: emb.save_pretrained(tmp_path / "again"),
    ):
        with pytest.raises(CheckpointError, match="trained on another model"):
            use()
    assert not (tmp_path / "merged" / "config.json").exists()
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "none")}))
    with pytest.raises(ModelNotFoundError, match="could not be found"):
        make_vectorizer(saved).transform(TEXTS)


def test_another_model_after_fit_is_refused(other_base: Path) -> None:
    emb = train()
    expected = emb.transform(TEXTS)
    emb.set_params(model=other_base)
    with pytest.raises(CheckpointError, match="trained on another model"):
        emb.transform(TEXTS)
    emb.set_params(model=GOLDEN)
    assert np.array_equal(emb.transform(TEXTS), expected)
    other = emb.set_params(model=other_base).fit(TEXTS, LABELS).adapter_
    assert other.base_fingerprint == fingerprint_weights(resolve_source(other_base))


def test_a_copy_of_a_large_base_is_the_same_base(
    fresh_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the files' times differ; of large files they are in the fingerprint."""
    monkeypatch.setattr(checkpoint, "MAX_FULL_HASH_BYTES", 20_000)
    checkpoint._content_hash.cache_clear()
    emb = train(fresh_dir)
    vectors = emb.transform(TEXTS)
    emb.save_pretrained(tmp_path / "adapter")
    content = pickle.dumps(emb)
    os.utime(fresh_dir / "model.safetensors", ns=(10**18, 10**18))
    for found in (make_vectorizer(tmp_path / "adapter"), pickle.loads(content)):
        assert np.array_equal(found.transform(TEXTS), vectors)
    checkpoint._content_hash.cache_clear()


@fresh_pooling
def test_another_pooling_after_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    """A trained pooling layer cannot become another one, and is not dropped in silence."""
    emb = train()
    for other in ("mean", "multilayer"):
        emb.set_params(pooling=other)
        for use in (
            lambda: emb.transform(TEXTS),
            lambda: emb.save_pretrained(tmp_path / "merged", merge=True),
            lambda other=other: make_vectorizer(saved, pooling=other).transform(TEXTS),
        ):
            with pytest.raises(CheckpointError, match="pooling"):
                use()
    assert emb.fit(TEXTS, LABELS).transform(TEXTS).shape == (8, 48)
    lora_only = train(trainer={"train_pooling": False}).set_params(pooling="mean")
    assert lora_only.transform(TEXTS).shape == (8, 48)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("n_written", range(8))
def test_a_save_that_is_killed_leaves_no_mixture(
    n_written: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over another adapter: the folder holds the old one, the new one, or refuses to load."""
    old = train(trainer={"random_state": 1}, truncate_dim=8)
    new = trained()
    old.save_pretrained(tmp_path)
    done: list[Any] = []
    move = Path.replace

    def replace_file(self: Path, target: Any) -> Path:
        done.append(target)
        if len(done) == n_written + 1:
            if after:
                move(self, target)
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_file)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache": None}
    try:
        loaded = NVEmbedVectorizer.from_pretrained(tmp_path, trainer=None, **options)
        found = loaded.transform(TEXTS)
    except CheckpointError:
        new.save_pretrained(tmp_path)
        found = make_vectorizer(tmp_path).transform(TEXTS)
        assert np.array_equal(found, new.transform(TEXTS))
    else:
        complete = new if after and n_written == 7 else old
        assert np.array_equal(found, complete.transform(TEXTS))


def test_folders_that_hold_something_else_are_not_overwritten(saved: Path, fresh_dir: Path) -> None:
    before = (fresh_dir / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds a whole model"):
        trained().save_pretrained(fresh_dir)
    assert (fresh_dir / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="must be another folder"):
        make_vectorizer(saved).save_pretrained(saved)
    assert np.array_equal(make_vectorizer(saved).transform(TEXTS), trained().transform(TEXTS))


def test_a_stale_pooling_goes_with_the_next_save(saved: Path) -> None:
    emb = train(trainer={"train_pooling": False})
    emb.save_pretrained(saved)
    assert not (saved / "pooling.safetensors").exists()
    assert np.array_equal(make_vectorizer(saved).transform(TEXTS), emb.transform(TEXTS))
