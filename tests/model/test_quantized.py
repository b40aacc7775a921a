"""Quantised weights: dtype="int8" and "nf4" in the vectorizer, in the registry, under LoRA."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.base import clone
from torch import Tensor, nn
from torch.nn import functional as F

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import LoraLinear, LoraSettings
from skembed.inference import devices
from skembed.inference.devices import name_dtype, resolve_dtype
from skembed.inference.registry import registry
from skembed.model.loaded import LoadedModel, ModelKey
from skembed.model.quantized import (
    Int8Embedding,
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    make_quantizer,
    quantize_rows,
)

CPU = torch.device("cpu")
TEXTS = ["a card was stolen", "open an account", "a fee for a transfer", "lost my card", "the sun"]
PAIRS = [(TEXTS[0], TEXTS[3]), (TEXTS[1], "a new account"), (TEXTS[2], "costs"), ("sun", TEXTS[4])]
has_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes: pip install skembed[quantize]",
)
every_format = pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("nf4", marks=has_bitsandbytes)]
)
every_format_class = pytest.mark.parametrize(
    "kind", [Int8Linear, pytest.param(Nf4Linear, marks=has_bitsandbytes)]
)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16: activations stay in float32, and small differences are seen."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)


def make_vectorizer(folder: Path | str, dtype: str, **parameters: Any) -> NVEmbedVectorizer:
    options = {"device": "cpu", "cache": None, "trainer": None, **parameters}
    return NVEmbedVectorizer(folder, dtype=dtype, **options)


def loaded_of(emb: NVEmbedVectorizer) -> LoadedModel:
    (loaded,) = emb._lease.models.values()
    return loaded


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def train(seed: int = 0, **parameters: Any) -> ContrastiveTrainer:
    return ContrastiveTrainer(r=4, epochs=3, batch_size=4, random_state=seed, **parameters)


# Layers


def random_weight(rows: int = 48, columns: int = 64) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * torch.logspace(-3, 1, rows).unsqueeze(1)  # rows of very different size


def test_half_a_step_of_its_row_is_lost() -> None:
    weight = random_weight()
    codes, scales = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == 127
    assert ((codes * scales - weight).abs() <= 0.5001 * scales).all()
    exact = weight.abs().amax(1, keepdim=True) / 127
    assert (scales >= exact).all()
    assert (scales <= exact * (1 + 2**-7)).all()
    torch.testing.assert_close(scales.to(torch.bfloat16).float(), scales, rtol=0, atol=0)


def test_rows_of_zeros() -> None:
    weight = random_weight()
    weight[3] = 0
    layer = Int8Linear(weight, torch.float32)
    assert (layer.weight[3] == 0).all()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_format_class
def test_layer_is_the_product_with_the_weight_it_reads(kind: Any, dtype: torch.dtype) -> None:
    weight = random_weight()
    layer, x = kind(weight, dtype), torch.randn(7, 5, 64).to(dtype)
    read = layer.weight
    assert (read.shape, read.dtype) == (weight.shape, dtype)
    torch.testing.assert_close(layer(x), F.linear(x, read), rtol=0, atol=0)
    error = (read.float() - weight).norm() / weight.norm()
    assert 0 < error < (0.02 if kind is Int8Linear else 0.15)


def test_word_vectors() -> None:
    weight = random_weight()
    layer, ids = Int8Embedding(weight, torch.float32), torch.tensor([[3, 0], [47, 3]])
    codes, scales = quantize_rows(weight)
    torch.testing.assert_close(layer(ids), (codes * scales)[ids], rtol=0, atol=0)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == weight.numel() + 4 * 48


@has_bitsandbytes
def test_nf4_is_that_of_bitsandbytes() -> None:
    import bitsandbytes

    weight, x = random_weight(), torch.randn(9, 64)
    theirs = bitsandbytes.nn.Linear4bit(
        64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), quant_type="nf4").to("cpu")
    with torch.no_grad():
        torch.testing.assert_close(Nf4Linear(weight, torch.float32)(x), theirs(x))


@has_bitsandbytes
def test_int8_codes_are_those_of_bitsandbytes() -> None:
    import bitsandbytes

    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(random_weight())
    ours, scales = quantize_rows(random_weight())
    assert int((codes.int() - ours.int()).abs().max()) <= 1  # our scales are rounded up
    torch.testing.assert_close(scales[:, 0], largest / 127, rtol=2**-7, atol=0)


def test_layers_that_stay() -> None:
    quantize = make_quantizer("int8")
    weight = torch.ones(4, 4)
    assert quantize(nn.LayerNorm(4), torch.ones(4), torch.float32) is None
    assert quantize(nn.Linear(4, 4), weight, torch.float32) is None  # has a bias
    assert isinstance(quantize(nn.Linear(4, 4, bias=False), weight, torch.float32), Int8Linear)


# Models


@every_format
def test_all_linear_layers_and_word_vectors(dtype: str, golden_dir: Path) -> None:
    emb = make_vectorizer(golden_dir, dtype)
    emb.transform(TEXTS)
    backbone = loaded_of(emb).model.embedding_model
    left = [
        name for name, m in backbone.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))
    ]
    assert left == []
    kind = Int8Linear if dtype == "int8" else Nf4Linear
    layers = len(backbone.layers)
    assert sum(isinstance(m, kind) for m in backbone.modules()) == 7 * layers
    assert isinstance(backbone.embed_tokens, Int8Embedding)
    assert all(parameter.ndim == 1 for parameter in backbone.parameters())  # the norms


@every_format
def test_equals_a_model_of_the_weights_it_reads(
    dtype: str, golden_dir: Path, in_float32: None
) -> None:
    emb, dense = make_vectorizer(golden_dir, dtype), make_vectorizer(golden_dir, "float32")
    found, exact = emb.transform(TEXTS), dense.transform(TEXTS)
    small, large = (loaded_of(e).model.embedding_model for e in (emb, dense))
    stored = {name: p.detach().clone() for name, p in large.named_parameters()}
    try:
        with torch.no_grad():
            for name, module in small.named_modules():
                if isinstance(module, QuantizedLinear):
                    large.get_parameter(f"{name}.weight").copy_(module.weight)
            codes, scales = quantize_rows(stored["embed_tokens.weight"])
            large.get_parameter("embed_tokens.weight").copy_(codes * scales)
        np.testing.assert_allclose(found, dense.transform(TEXTS), atol=2e-6)
    finally:
        with torch.no_grad():
            for name, tensor in stored.items():
                large.get_parameter(name).copy_(tensor)
    gap = np.abs(found - exact).max()
    assert gap > 1e-4, "the format changes the vectors, or this test sees nothing"
    if dtype == "int8":  # four bits are too few for random weights of width 48
        assert cosines(found, exact).min() > 0.99


@every_format
def test_a_text_alone_and_among_others(dtype: str, golden_dir: Path, in_float32: None) -> None:
    emb = make_vectorizer(golden_dir, dtype)
    together = emb.transform([*TEXTS, "a much longer text " * 20])
    for k, text in enumerate(TEXTS):
        np.testing.assert_allclose(emb.transform([text])[0], together[k], atol=1e-5)


def test_weights_take_half_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)  # for the scales of int8
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        emb = make_vectorizer("skembed-mini", dtype)
        emb.transform(TEXTS[:1])
        sizes[dtype] = loaded_of(emb).weight_bytes
    assert 0.5 < sizes["int8"] / sizes["bfloat16"] < 0.53


@every_format
def test_the_type_is_told(dtype: str, golden_dir: Path, in_float32: None) -> None:
    assert make_vectorizer(golden_dir, dtype).fit(TEXTS).model_["dtype"] == f"{dtype}+float32"


@every_format
def test_vectors_of_two_types_never_meet_in_a_cache(dtype: str, golden_dir: Path) -> None:
    cache = EmbeddingCache()
    dense = make_vectorizer(golden_dir, "bfloat16", cache=cache).transform(TEXTS)
    emb = make_vectorizer(golden_dir, dtype, cache=cache)
    found = emb.transform(TEXTS)
    assert not np.array_equal(found, dense)
    np.testing.assert_array_equal(found, make_vectorizer(golden_dir, dtype).transform(TEXTS))
    n_loads = registry.n_loads
    again = make_vectorizer(golden_dir, dtype, cache=cache)
    np.testing.assert_array_equal(again.transform(TEXTS), found)
    assert again._lease.models == {}, "all came from the cache"
    assert registry.n_loads == n_loads


@every_format
def test_clones_and_pickles(dtype: str, golden_dir: Path) -> None:
    emb = make_vectorizer(golden_dir, dtype).fit(TEXTS)
    vectors = emb.transform(TEXTS)
    n_loads, stored = registry.n_loads, pickle.dumps(emb)
    assert len(stored) < 5000
    np.testing.assert_array_equal(clone(emb).transform(TEXTS), vectors)
    np.testing.assert_array_equal(pickle.loads(stored).transform(TEXTS), vectors)
    assert registry.n_loads == n_loads


def test_saving_writes_the_weights_as_they_were(golden_dir: Path, tmp_path: Path) -> None:
    emb = make_vectorizer(golden_dir, "int8")
    emb.transform(TEXTS)
    emb.save_pretrained(tmp_path / "saved")
    again = make_vectorizer(tmp_path / "saved", "float32").transform(TEXTS)
    exact = make_vectorizer(golden_dir, "float32").transform(TEXTS)
    np.testing.assert_array_equal(again, exact)


# Adapters


@every_format
def test_lora_on_top(dtype: str, golden_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    frozen = make_vectorizer(golden_dir, dtype)
    before = frozen.transform(TEXTS)
    base = loaded_of(frozen)
    stored = {name: tensor.clone() for name, tensor in base.model.named_buffers()}
    emb = make_vectorizer(golden_dir, dtype, trainer=train()).fit(PAIRS)
    after = emb.transform(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    assert emb.history_["loss"][-1] < emb.history_["loss"][0]
    for name, tensor in base.model.named_buffers():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)
    np.testing.assert_array_equal(frozen.transform(TEXTS), before)
    again = pickle.loads(pickle.dumps(emb))
    np.testing.assert_array_equal(again.transform(TEXTS), after)
    emb.save_pretrained(tmp_path / "adapter")
    saved = make_vectorizer(tmp_path / "adapter", dtype)
    np.testing.assert_array_equal(saved.transform(TEXTS), after)
    dense = make_vectorizer(tmp_path / "adapter", "bfloat16").transform(TEXTS)  # the same base
    assert dense.shape == after.shape
    if dtype == "int8":
        assert cosines(dense, after).min() > 0.98


@every_format
def test_a_view_holds_no_second_copy(dtype: str, golden_dir: Path) -> None:
    pytest.importorskip("peft")
    emb = make_vectorizer(golden_dir, dtype, trainer=train()).fit(PAIRS)
    emb.transform(TEXTS)
    adapter: Adapter = emb.adapter_
    base = loaded_of(emb)
    view = adapter.bind(base).model.embedding_model
    adapted = [m for m in view.modules() if isinstance(m, LoraLinear)]
    assert len(adapted) == 7 * len(view.layers)
    own = {id(m) for m in base.model.embedding_model.modules()}
    assert all(id(m.base) in own for m in adapted)


@every_format_class
def test_gradients_are_those_of_the_weight_it_reads(kind: Any) -> None:
    layer = kind(random_weight(), torch.float32)
    dense = nn.Linear(64, 48, bias=False)
    dense.weight = nn.Parameter(layer.weight, requires_grad=False)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(4, 64, generator=generator), torch.randn(48, 4, generator=generator)]
    x0 = torch.randn(9, 64, generator=generator)
    found = []
    for base in (layer, dense):
        x, a, b = (tensor.clone().requires_grad_() for tensor in (x0, *start))
        settings = LoraSettings(4, 8, 0.0, ("q_proj",))
        module = LoraLinear(base, nn.Parameter(a), nn.Parameter(b), settings)
        module(x).square().sum().backward()
        found.append((x.grad, module.lora_A.grad, module.lora_B.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# Choosing the type


def test_type_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda native=native: native)
        assert resolve_dtype("int8", CPU) == resolve_dtype("nf4", CPU) == dtype
    assert resolve_dtype("int8", torch.device("mps")) == torch.float32
    for capability, dtype in (((8, 6), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert resolve_dtype("int8", cuda) == resolve_dtype("nf4", cuda) == dtype


def test_names_of_types() -> None:
    assert name_dtype("nf4", torch.float16) == "nf4+float16"
    key = ModelKey("f", "latent", "cpu", name_dtype("int8", torch.bfloat16), "grouped")
    assert (key.weight_format, key.compute_dtype) == ("int8", torch.bfloat16)
    plain = ModelKey("f", "latent", "cpu", name_dtype("auto", torch.float32), "grouped")
    assert (plain.weight_format, plain.compute_dtype) == (None, torch.float32)


def test_nf4_where_it_does_not_run() -> None:
    with pytest.raises(ValueError, match="'nf4', which runs on 'cuda' and 'cpu'; got device 'mps'"):
        resolve_dtype("nf4", torch.device("mps"))


def test_nf4_without_bitsandbytes(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"dtype='nf4' needs `bitsandbytes`, .* Run: pip install skembed\[quantize\]"
    with pytest.raises(ImportError, match=message):
        # Another length than in other tests: the model may be loaded already, the pooling not.
        make_vectorizer(golden_dir, "nf4", pooling="mean").transform(TEXTS)


@pytest.mark.parametrize("dtype", ["int4", "8bit"])
def test_unknown_type(dtype: str, golden_dir: Path) -> None:
    with pytest.raises(ValueError, match="'float16', 'int8', 'nf4'; got"):
        make_vectorizer(golden_dir, dtype).fit(TEXTS)


# Quality


@pytest.mark.slow
def test_int8_keeps_99_percent_on_sts(shared_data_dir: Path) -> None:
    path = shared_data_dir / "eval" / "sts" / "stsb" / "dev.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    scores = {}
    for dtype in ("bfloat16", "int8"):
        emb = make_vectorizer("skembed-mini", dtype)
        a, b = (emb.transform([row[f"sentence{k}"] for row in rows]) for k in (1, 2))
        scores[dtype] = spearmanr((a * b).sum(1), [row["score"] for row in rows]).statistic
    assert scores["int8"] >= 0.99 * scores["bfloat16"], scores
