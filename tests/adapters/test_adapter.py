"""Adapters: peft's function and files, on shared weights that nothing ever changes."""

import copy
import gc
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import peft
import pytest
import torch
from paths import GOLDEN, ROOT
from peft.tuners.lora import Linear as PeftLinear
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from tiny import base_of, load_base, random_lora
from torch import Tensor, nn
from transformers import AutoModel, MistralConfig

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import (
    DropoutMasks,
    LoraLinear,
    LoraSettings,
    _LoraFunction,
    insert_lora,
    share_weights,
)
from skembed.adapters.targets import expected_shapes, find_targets, start_lora
from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.inference.registry import registry
from skembed.model import sources as checkpoint
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel
from skembed.model.network import NVEmbedModel
from skembed.model.sources import (
    fingerprint_weights,
    read_config,
    resolve_source,
)
from skembed.model.tokenization import pack_texts

TOLERANCE = 1e-5
FILES = ("config.json", "model.safetensors", "tokenizer.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pooling.safetensors")
TEXTS = [
    "My card was stolen at the station",
    "The card is lost",
    "Someone took my card",
    "I cannot find my card anywhere in the house",
    "Open an account",
    "I want a new account, please",
    "How do I get an account?",
    "A second account for my daughter",
]
LABELS = list("ccccaaaa")
OTHER_TEXTS = ["The exchange rate of the euro", "x", "A card for the new account of my brother"]
# peft 0.21 on transformers 5.2; goes when peft asks for the new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
fresh_pooling = pytest.mark.filterwarnings("ignore::skembed.exceptions.FreshPoolingWarning")


def make_vectorizer(folder: Path | str = GOLDEN, **parameters: Any) -> NVEmbedVectorizer:
    defaults = {"device": "cpu", "dtype": "float32", "cache": None, "trainer": None}
    return NVEmbedVectorizer(folder, **{**defaults, **parameters})


def make_trainer(**parameters: Any) -> ContrastiveTrainer:
    """A trainer of three steps that move the vectors far."""
    defaults = {"r": 4, "learning_rate": 1e-2, "max_steps": 3, "batch_size": 8, "random_state": 0}
    return ContrastiveTrainer(**{**defaults, **parameters})


def train(
    folder: Path | str = GOLDEN,
    *,
    trainer: Mapping[str, Any] | None = None,
    labels: list[str] = LABELS,
    **parameters: Any,
) -> NVEmbedVectorizer:
    trainer = make_trainer(**(trainer or {}))
    return make_vectorizer(folder, trainer=trainer, **parameters).fit(TEXTS, labels)


@cache
def trained() -> NVEmbedVectorizer:
    """An estimator that tests read and do not change."""
    return train()


@pytest.fixture(scope="module", autouse=True)
def forget_trained() -> Any:
    yield
    trained.cache_clear()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A trained adapter's folder, pooling included."""
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    return folder


def digest(model: nn.Module) -> str:
    """Hash of all parameters and buffers, bit by bit."""
    found = hashlib.blake2b()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear) for module in model.modules())


# The layer


def make_layer(
    *, p: float = 0.0, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[LoraLinear, nn.Linear]:
    torch_state = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch_state))
    a, b = (
        nn.Parameter(torch.randn(shape, generator=torch_state, dtype=dtype))
        for shape in ((3, 6), (5, 3))
    )
    settings = LoraSettings(3, 7.0, p, "all-linear")
    masks = DropoutMasks(p) if p else None
    return LoraLinear(base, a, b, settings, masks=masks, number=2), base


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_backward_is_the_gradient(masked: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 6), (5, 6), (3, 6), (5, 3))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    mask = (torch.rand(4, 6, generator=generator) < 0.6).double()

    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        offset = torch.arange(5.0, dtype=torch.float64) if bias else None
        draw = (lambda _: mask) if masked else None
        return _LoraFunction.apply(x, weight, offset, a, b, draw, 1.7)

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-6)


def test_no_gradient_for_an_input_that_needs_none() -> None:
    layer, _ = make_layer()
    x = torch.ones(2, 6)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A.grad is not None
    assert layer.weight.grad is None


class FixedMask(nn.Module):
    """Dropout with a given mask, for peft's layer."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.p)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_pefts(p: float, bias: bool) -> None:
    layer, base = make_layer(p=p, bias=bias)
    config = peft.LoraConfig(r=3, lora_alpha=7)
    theirs = PeftLinear(copy.deepcopy(base), "default", config=config, r=3, lora_alpha=7)
    theirs.lora_A["default"].weight.data.copy_(layer.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    if layer.masks is not None:
        mask = layer.masks.draw(2, x.reshape(8, 6)).view(2, 4, 6)
        assert 0 < mask.mean() < 1
        theirs.lora_dropout["default"] = FixedMask(mask, p)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = [module(part) for module, part in zip((layer, theirs), inputs, strict=True)]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=TOLERANCE)
    for part in out:
        (part * torch.arange(5.0)).mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=TOLERANCE)
    for ours, name in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
        expected = getattr(theirs, name)["default"].weight.grad
        torch.testing.assert_close(ours.grad, expected, rtol=0, atol=TOLERANCE)


def test_frozen_layer_computes_the_same() -> None:
    layer, _ = make_layer()
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = layer(x).detach()
    layer.freeze()
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_masks_drop_their_share(p: float, dtype: torch.dtype) -> None:
    like = torch.empty(301, 331, dtype=dtype)
    mask = DropoutMasks(p).draw(0, like)
    assert (mask.shape, mask.dtype) == (like.shape, dtype)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = (p * (1 - p) / like.numel()) ** 0.5
    assert abs(float((mask == 0).double().mean()) - p) < 4 * deviation + 2**-16


def test_masks_depend_on_key_and_number_alone() -> None:
    like = torch.empty(50, 40)
    masks = DropoutMasks(0.5)
    drawn: dict[Any, Tensor] = {}
    for key in ((0,), (1,), (1, 2), (2, 1)):
        for number in (0, 1):
            masks.key = key
            drawn[key, number] = masks.draw(number, like)
    again = DropoutMasks(0.5)
    for (key, number), mask in reversed(drawn.items()):
        again.key = key
        assert torch.equal(again.draw(number, like), mask)
        other = [m for pair, m in drawn.items() if pair != (key, number)]
        assert all(0.4 < float((m != mask).float().mean()) < 0.6 for m in other)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    layer, _ = make_layer(p=0.3)
    before: Any = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    layer(torch.ones(7, 6)).sum().backward()
    train(trainer={"lora_dropout": 0.3, "max_steps": 1})
    after: Any = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1][1], after[1][1])
    assert before[1][2] == after[1][2]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_expectation(p: float) -> None:
    layer, _ = make_layer(p=p)
    assert layer.masks is not None
    x = torch.randn(6, generator=torch.Generator().manual_seed(4)).expand(40_000, 6)
    with torch.no_grad():
        out = layer(x)
        layer.masks.active = False
        expected = layer(x[:1])[0]
    deviation = out.std(0) / len(out) ** 0.5
    assert (deviation > 0).all()
    assert ((out.mean(0) - expected).abs() < 4 * deviation).all()


# Which layers


TARGETS: list[str | tuple[str, ...]] = [
    "all-linear",
    "All-Linear",
    ("q_proj",),
    ("q_proj", "down_proj"),
    ("self_attn.q_proj", "layers.1.mlp.up_proj"),
    r".*\.1\..*_proj",
    r"layers\.\d\.mlp\.(up|down)_proj",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_pefts(targets: str | tuple[str, ...]) -> None:
    config = read_config(resolve_source(GOLDEN))
    settings = LoraSettings(3, 6.0, 0.0, targets)
    stock = stock_backbone(config)
    wanted = targets if isinstance(targets, str) else list(targets)
    adapted = peft.get_peft_model(stock, peft.LoraConfig(r=3, target_modules=wanted))
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    assert expected
    assert expected_shapes(config, settings) == expected
    assert find_targets(config, settings) == sorted({n.rsplit(".", 2)[0] for n in expected})
    fresh = start_lora(config, settings, np.random.SeedSequence(0))
    assert {name: tuple(tensor.shape) for name, tensor in fresh.items()} == expected


@pytest.mark.parametrize(
    "targets",
    [("nope",), ("q_proj", "nope"), ("mlp",), ("q_proj", "embed_tokens"), ".*norm", "(", ()],
    ids=str,
)
def test_targets_that_are_no_linear_layers(targets: str | tuple[str, ...]) -> None:
    config = read_config(resolve_source(GOLDEN))
    with pytest.raises(ValueError, match="`target_modules` parameter of `ContrastiveTrainer`"):
        find_targets(config, LoraSettings(3, 6.0, 0.0, targets))


def test_fresh_matrices_change_nothing_and_follow_the_seed() -> None:
    config = read_config(resolve_source(GOLDEN))
    settings = LoraSettings(3, 6.0, 0.0, "all-linear")
    one, same, other = (
        start_lora(config, settings, np.random.SeedSequence(seed)) for seed in (0, 0, 1)
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.abs().max() <= tensor.shape[1] ** -0.5


# peft on the stock backbone


def stock_backbone(config: NVEmbedConfig, model: NVEmbedModel | None = None) -> Any:
    """transformers' own MistralModel, with a model's weights."""
    backbone = MistralConfig(**{**config.backbone, "sliding_window": None})
    stock = AutoModel.from_config(backbone, attn_implementation="eager").eval()
    if model is not None:
        stock.load_state_dict(model.embedding_model.state_dict())
    return stock


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


# Shared weights


def shared_pointers(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_a_view_shares_every_tensor() -> None:
    base, _ = load_base(GOLDEN)
    before = digest(base.model)
    view = share_weights(base.model)
    assert shared_pointers(view) == shared_pointers(base.model)
    tensors = dict(view.named_parameters()), dict(base.model.named_parameters())
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name] is tensors[1][name] for name in tensors[0])
    insert_lora(view, LoraSettings(2, 2.0, 0.0, "x"), random_lora(base.config, ALL))
    view.latent_attention_model = nn.Identity()
    assert has_lora(view)
    assert not has_lora(base.model)
    assert digest(base.model) == before


ALL = LoraSettings(2, 2.0, 0.0, "all-linear")


@fresh_pooling
@pytest.mark.parametrize(
    ("pooling", "train_pooling"),
    [("latent", True), ("latent", False), ("mean", True), ("multilayer", True)],
)
def test_clones_share_the_base_and_own_an_adapter(
    pooling: str, train_pooling: bool, fresh_dir: Path
) -> None:
    n_loads = registry.n_loads
    frozen = make_vectorizer(fresh_dir, pooling=pooling)
    expected = frozen.transform(TEXTS)
    base = base_of(frozen)
    before = digest(base.model)
    first = clone(frozen).set_params(trainer=make_trainer(train_pooling=train_pooling))
    second = clone(first).fit(TEXTS, LABELS)
    first.fit(TEXTS[1:] + TEXTS[:1], LABELS)
    views = []
    for emb in (first, second):
        assert np.abs(emb.transform(TEXTS) - expected).max() > 1e-2
        assert base_of(emb) is base
        views.append(emb.adapter_.bind(base))
    assert registry.n_loads == n_loads + 1
    of_base = shared_pointers(base.model.embedding_model)
    for view in views:
        assert of_base < shared_pointers(view.model.embedding_model)
        pooled = shared_pointers(base.model.latent_attention_model)
        assert (pooled <= shared_pointers(view.model)) == (not train_pooling or not pooled)
    own = [shared_pointers(view.model) - shared_pointers(base.model) for view in views]
    assert own[0]
    assert not own[0] & own[1]
    assert first.adapter_.fingerprint != second.adapter_.fingerprint
    assert digest(base.model) == before
    assert not has_lora(base.model)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert np.array_equal(frozen.transform(TEXTS), expected)


def test_a_view_is_made_once() -> None:
    emb = train()
    base = base_of(emb)
    barrier = threading.Barrier(8)

    def bind(_: int) -> LoadedModel:
        barrier.wait()
        return emb.adapter_.bind(base)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(view) for view in pool.map(bind, range(8))}) == 1


def test_a_view_follows_its_base() -> None:
    emb = train()
    exact = emb.transform(TEXTS)
    half = emb.set_params(dtype="bfloat16").transform(TEXTS)
    assert 0 < np.abs(half - exact).max() < 5e-2
    assert np.array_equal(pickle.loads(pickle.dumps(emb)).transform(TEXTS), half)
    assert np.array_equal(emb.set_params(dtype="float32").transform(TEXTS), exact)


def test_adapters_are_freed_with_their_estimator(fresh_dir: Path) -> None:
    frozen = make_vectorizer(fresh_dir)
    frozen.transform(TEXTS)
    emb = clone(frozen).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    emb.transform(TEXTS)
    view = emb.adapter_.bind(base_of(emb))
    watched = [weakref.ref(thing) for thing in (emb.adapter_, view, view.model)]
    base = weakref.ref(base_of(frozen))
    del view
    emb.fit(TEXTS, LABELS)  # the first adapter goes with the second fit
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    watched = [weakref.ref(emb.adapter_)]
    del emb
    gc.collect()
    assert watched[0]() is None
    assert base() is not None
    del frozen
    gc.collect()
    assert base() is None


def test_threads_never_see_anothers_adapter(fresh_dir: Path) -> None:
    n_loads = registry.n_loads
    frozen = make_vectorizer(fresh_dir)
    first = clone(frozen).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    second = clone(frozen).set_params(trainer=make_trainer(random_state=1, train_pooling=False))
    second.fit(TEXTS, LABELS)
    estimators = [first, second, frozen]
    expected = [emb.transform(TEXTS) for emb in estimators]
    for k in range(3):
        assert np.abs(expected[k] - expected[k - 1]).max() > 1e-2
    # Views are built again, by all threads at once.
    first, second = (pickle.loads(pickle.dumps(emb)) for emb in (first, second))
    estimators = [first, second, frozen]
    barrier = threading.Barrier(8)

    def run(number: int) -> bool:
        barrier.wait()
        order = [(number + k) % 3 for k in range(9)]
        return all(np.array_equal(estimators[k].transform(TEXTS), expected[k]) for k in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))
    assert registry.n_loads == n_loads + 1


def test_fits_in_threads_equal_fits_alone() -> None:
    frozen = make_vectorizer()
    expected = frozen.transform(TEXTS)
    alone = [train(trainer={"random_state": seed}) for seed in range(3)]
    barrier = threading.Barrier(4)

    def run(seed: int) -> bool:
        barrier.wait()
        if seed == 3:
            return all(np.array_equal(frozen.transform(TEXTS), expected) for _ in range(20))
        found = train(trainer={"random_state": seed})
        return found.adapter_.fingerprint == alone[seed].adapter_.fingerprint

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))
    assert len({emb.adapter_.fingerprint for emb in alone}) == 3


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
    with pytest.raises(ModelNotFoundError, match="not to be found"):
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
    monkeypatch.setattr(checkpoint, "WHOLE_HASH_BYTES", 20_000)
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
@pytest.mark.parametrize("n_written", range(4))
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
    loaded = NVEmbedVectorizer.from_pretrained(
        tmp_path, device="cpu", dtype="float32", cache=None, trainer=None
    )
    try:
        found = loaded.transform(TEXTS)
    except CheckpointError:
        new.save_pretrained(tmp_path)
        found = make_vectorizer(tmp_path).transform(TEXTS)
        assert np.array_equal(found, new.transform(TEXTS))
    else:
        complete = new if after and n_written == 3 else old
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


# Copies, pickles, other processes


def test_copies_are_equal_and_apart() -> None:
    expected = trained().transform(TEXTS)
    for emb in (copy.deepcopy(trained()), copy.copy(trained())):
        assert np.array_equal(emb.transform(TEXTS), expected)
        emb.fit(TEXTS[::-1], LABELS)
        assert np.abs(emb.transform(TEXTS) - expected).max() > 1e-3
    assert np.array_equal(trained().transform(TEXTS), expected)


@pytest.mark.parametrize("train_pooling", [True, False])
def test_pickles_are_of_the_adapters_size(train_pooling: bool) -> None:
    emb = train(trainer={"train_pooling": train_pooling})
    emb.transform(TEXTS)
    size = len(pickle.dumps(emb))
    assert emb.adapter_.size_bytes < size < emb.adapter_.size_bytes + 64 * 1024


def test_adapters_in_shared_memory(tmp_path: Path) -> None:
    """joblib hands large arrays to its workers as read-only maps of a file."""
    joblib.dump(trained(), tmp_path / "emb.joblib")
    expected = trained().transform(TEXTS)
    for mode in (None, "r"):
        emb = joblib.load(tmp_path / "emb.joblib", mmap_mode=mode)
        assert np.array_equal(emb.transform(TEXTS), expected)
        again = emb.set_params(trainer=make_trainer(warm_start=True)).fit(TEXTS, LABELS)
        assert np.abs(again.transform(TEXTS) - expected).max() > 1e-3


OPEN_PICKLES = """
import pickle, sys
from pathlib import Path
import joblib, numpy as np
sys.modules["peft"] = None  # use needs no peft
folder = Path(sys.argv[1])
texts = pickle.loads((folder / "texts").read_bytes())
for path in sorted(folder.glob("*.pickle")):
    emb = joblib.load(path) if "joblib" in path.name else pickle.loads(path.read_bytes())
    np.save(path.with_suffix(".npy"), emb.transform(texts))
"""


def test_pickles_open_in_another_process(fresh_dir: Path, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    lost = tmp_path / "lost"
    train(fresh_dir).save_pretrained(lost)
    estimators = {
        "fitted": trained(),
        "joblib": trained(),
        "bfloat16": train(dtype="bfloat16"),
        "folder": make_vectorizer(saved),
        "stored": make_vectorizer(lost, store_weights=True),
        "stored_and_fitted": train(fresh_dir, store_weights=True, trainer={"random_state": 2}),
        "fitted_on_folder": train(saved, trainer={"max_steps": 1}),
    }
    texts = [*TEXTS, *OTHER_TEXTS]
    expected = {name: emb.transform(texts) for name, emb in estimators.items()}
    for name, emb in estimators.items():
        if name == "joblib":
            joblib.dump(emb, folder / f"{name}.pickle")
        else:
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(emb))
    (folder / "texts").write_bytes(pickle.dumps(texts))
    shutil.rmtree(lost)
    shutil.rmtree(fresh_dir)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", OPEN_PICKLES, folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        timeout=120,
    )
    for name, vectors in expected.items():
        assert np.array_equal(np.load(folder / f"{name}.npy"), vectors), name
    assert len({vectors.tobytes() for vectors in expected.values()}) == 4


# An adapter's folder as `model`


def test_cross_validation_of_a_saved_adapter(saved: Path, embedded: list[int]) -> None:
    emb = make_vectorizer(saved, cache=EmbeddingCache())
    texts = [f"{text} ({k})" for text in TEXTS for k in range(3)]
    labels = np.repeat([0, 1], 12)
    n_loads = registry.n_loads
    scores = cross_val_score(make_pipeline(emb, LogisticRegression()), texts, labels, cv=3)
    assert scores.shape == (3,)
    assert sum(embedded) == 24
    assert registry.n_loads <= n_loads + 1
    twin = clone(emb)
    assert np.array_equal(twin.transform(TEXTS), trained().transform(TEXTS))
    assert np.abs(twin.transform(TEXTS) - make_vectorizer().transform(TEXTS)).max() > 1e-2


def test_a_changed_folder_is_read_again(saved: Path) -> None:
    emb = make_vectorizer(saved)
    before = emb.transform(TEXTS)
    other = train(trainer={"random_state": 5})
    other.save_pretrained(saved)
    found = emb.transform(TEXTS)
    assert np.array_equal(found, other.transform(TEXTS))
    assert np.abs(found - before).max() > 1e-3


def test_training_goes_on_from_a_folder_and_leaves_it(saved: Path) -> None:
    files = {name: (saved / name).read_bytes() for name in ADAPTER_FILES}
    start = make_vectorizer(saved)
    base, _ = load_base(GOLDEN)
    loaded = Adapter.load(saved, base.config, base.key.fingerprint)
    # No step worth the name: what is trained starts at the folder's adapter.
    emb = train(saved, trainer={"max_steps": 1, "learning_rate": 1e-9})
    np.testing.assert_allclose(emb.transform(TEXTS), start.transform(TEXTS), rtol=0, atol=1e-5)
    emb.set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    assert emb.adapter_.fingerprint != loaded.fingerprint
    # A clone shares the lease, and with it the adapter that training starts from.
    twin = clone(start).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    assert twin.adapter_.fingerprint == emb.adapter_.fingerprint
    assert {name: (saved / name).read_bytes() for name in ADAPTER_FILES} == files
    assert np.array_equal(start.transform(TEXTS), trained().transform(TEXTS))


def test_a_folder_may_hold_base_and_adapter(saved: Path, tmp_path: Path) -> None:
    """What is trained on top of it names the base, not a folder that is an adapter itself."""
    both = tmp_path / "both"
    shutil.copytree(saved, both)
    for name in FILES:
        shutil.copy(GOLDEN / name, both / name)
    assert np.array_equal(make_vectorizer(both).transform(TEXTS), trained().transform(TEXTS))
    emb = train(both, trainer={"max_steps": 1})
    emb.save_pretrained(tmp_path / "next")
    found = make_vectorizer(tmp_path / "next").transform(TEXTS)
    assert np.array_equal(found, emb.transform(TEXTS))


def test_an_adapter_of_stored_files_names_the_base_it_was_trained_on(
    fresh_dir: Path, tmp_path: Path
) -> None:
    """Not the temporary folder that a pickle's files were unpacked into."""
    lost = tmp_path / "lost"
    train(fresh_dir).save_pretrained(lost)
    content = pickle.dumps(make_vectorizer(lost, store_weights=True))
    shutil.rmtree(lost)
    pickle.loads(content).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(fresh_dir)


def test_adapters_name_their_base(tmp_path: Path) -> None:
    copied = tmp_path / "skembed-mini"  # a folder of that name is not the bundled model
    shutil.copytree(GOLDEN, copied)
    models: list[Path | str] = [GOLDEN, copied, "skembed-mini"]
    for k, model in enumerate(models):
        emb = train(model, trainer={"max_steps": 1, "train_pooling": False})
        for folder in (tmp_path / f"first{k}", tmp_path / f"second{k}"):
            emb.save_pretrained(folder)
            written = json.loads((folder / "adapter_config.json").read_text())
            assert written["base_model_name_or_path"] == str(model)
            loaded = make_vectorizer(folder)
            assert np.array_equal(loaded.transform(TEXTS), emb.transform(TEXTS))
            emb = loaded


def test_an_adapter_knows_its_base_only() -> None:
    adapter = trained().adapter_
    base, _ = load_base(GOLDEN)
    other = replace(base, key=replace(base.key, fingerprint="0" * 32))
    with pytest.raises(CheckpointError, match="trained on another model"):
        adapter.bind(other)
    assert adapter.bind(base).key.fingerprint == f"{base.key.fingerprint}+{adapter.fingerprint}"
