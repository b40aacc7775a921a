"""The fused forward pass on CPUs against transformers' own, layer by layer and step by step."""

import copy
from typing import Any

import pytest
import torch
from tiny import make_tiny_model
from torch import nn
from torch.nn import functional as F

from skembed.adapters.lora import LoraLinear, LoraSettings, insert_lora
from skembed.model import cpu_forward as fused
from skembed.model.cpu_forward import fused_linear, pack_weights, run_backbone
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch, pack_texts

STEPS: list[dict[str, Any]] = [
    {},
    {"activation": "silu"},
    {"activation": "gelu"},
    {"times": True},
    {"plus": True},
]


@pytest.fixture(params=["operator", "chain"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With oneDNN's operator, and as where torch has none."""
    if request.param == "chain":
        monkeypatch.setattr(fused, "_has_product", lambda dtype: False)
    elif not fused._has_product(torch.float32):
        pytest.skip("this torch has no fused product")
    return str(request.param)


def make_batch(*lengths: int) -> PackedBatch:
    """Texts of these lengths."""
    return pack_texts([(torch.arange(n) * 7 + n).numpy() % 50 for n in lengths], 0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_the_step_behind_it(
    step: dict[str, Any], packed: bool, biased: bool, dtype: torch.dtype, product: str
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=biased).to(dtype)
    x, other = torch.randn(21, 48).to(dtype), torch.randn(21, 80).to(dtype)
    if packed:
        pack_weights(layer)
    step = {name: other if value is True else value for name, value in step.items()}
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if biased else None)
    if step.get("activation"):
        expected = getattr(F, step["activation"])(expected)
    expected = expected * step["times"].double() if "times" in step else expected
    expected = expected + step["plus"].double() if "plus" in step else expected
    with torch.no_grad():
        found = fused_linear(x, layer.weight, layer.bias, **step)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_gradients_flow_where_they_are_wanted() -> None:
    layer = nn.Linear(8, 4)
    x, other = torch.randn(3, 8, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    fused_linear(x, layer.weight, layer.bias, times=other).sum().backward()
    for tensor in (x, other, layer.weight, layer.bias):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("lengths", [(1,), (9, 9, 9), (40, 31, 8, 3, 3), (3, 17, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_every_layer_equals_transformers(
    lengths: tuple[int, ...], packed: bool, product: str
) -> None:
    model = make_tiny_model()
    if packed:
        pack_weights(model)
    batch = make_batch(*lengths)
    with torch.inference_mode():
        found = model.hidden_states(batch, all_layers=True)
        model.fuse = False
        expected = model.hidden_states(batch, all_layers=True)
    assert len(found) == len(expected) == model.config.backbone["num_hidden_layers"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_who_runs_the_pass(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused pass without gradients, transformers' own with them; or these tests see nothing."""
    calls = []
    monkeypatch.setattr(
        "skembed.model.network.run_backbone",
        lambda *args, **kwargs: calls.append(1) or run_backbone(*args, **kwargs),
    )
    model, batch = make_tiny_model(), make_batch(5, 4)
    model.fuse = fuse
    with torch.inference_mode():
        model(batch)
    assert len(calls) == fuse
    model.train()
    model(batch).sum().backward()
    assert len(calls) == fuse


def test_filling_changes_nothing() -> None:
    model = make_tiny_model().to(torch.bfloat16)
    ids = [(torch.arange(n) * 7 + n).numpy() % 50 for n in (9, 6)]
    with torch.inference_mode():
        plain = model(pack_texts(ids, 0))
        filled = model(pack_texts(ids, 0, on_grid=True))[:2]
    torch.testing.assert_close(filled, plain, rtol=1e-2, atol=1e-2)
    assert torch.isfinite(filled).all()


def test_a_weight_that_is_written_to_is_read_anew() -> None:
    layer = nn.Linear(16, 16, bias=False)
    pack_weights(layer)
    x = torch.randn(4, 16)
    with torch.no_grad():
        fused_linear(x, layer.weight)
        layer.weight.mul_(2.0)
        torch.testing.assert_close(fused_linear(x, layer.weight), F.linear(x, layer.weight))


def test_a_type_that_the_processor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX512 or AMX, oneDNN raises for bfloat16: the steps run one after the other."""
    fused._has_product.cache_clear()

    def refuse(*args: Any) -> Any:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(fused, "_POINTWISE", refuse)
    try:
        layer = nn.Linear(16, 8).bfloat16()
        pack_weights(layer)
        assert not hasattr(layer.weight, fused._PACKED)
        with torch.no_grad():
            x = torch.ones(4, 16, dtype=torch.bfloat16)
            torch.testing.assert_close(fused_linear(x, layer.weight), F.linear(x, layer.weight))
    finally:
        fused._has_product.cache_clear()


def test_packed_weights_stay_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_weights(model)
    after = model.state_dict()
    assert before.keys() == after.keys(), "nothing new to save"
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name])
    copied = copy.deepcopy(model)
    batch = make_batch(5, 4)
    with torch.inference_mode():
        torch.testing.assert_close(copied(batch), model(batch), rtol=1e-6, atol=1e-6)
    if fused._has_product(torch.float32):
        assert hasattr(model.embedding_model.layers[0].mlp.gate_proj.weight, fused._PACKED)
    monkeypatch.setattr(fused, "MAX_PACKED_BYTES", 100)
    large = make_tiny_model()
    pack_weights(large)
    assert not any(hasattr(weight, fused._PACKED) for weight in large.parameters())


def test_lora_layers_run_as_they_are() -> None:
    def adapt(model: NVEmbedModel) -> NVEmbedModel:
        settings = LoraSettings(r=2, lora_alpha=4.0, lora_dropout=0.0, target_modules=("q_proj",))
        generator = torch.Generator().manual_seed(3)
        lora = {}
        for name, module in model.embedding_model.named_modules():
            if name.endswith(("q_proj", "up_proj", "down_proj")):
                assert isinstance(module, nn.Linear)
                for kind, shape in (
                    ("A", (2, module.in_features)),
                    ("B", (module.out_features, 2)),
                ):
                    lora[f"{name}.lora_{kind}.weight"] = torch.randn(shape, generator=generator) / 4
        insert_lora(model, settings, lora)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.freeze()
        return model

    batch = make_batch(9, 5)
    adapted, plain = adapt(make_tiny_model()), make_tiny_model()
    with torch.inference_mode():
        found = adapted(batch)
        adapted.fuse = False
        torch.testing.assert_close(found, adapted(batch), rtol=1e-5, atol=1e-5)
        assert (found - plain(batch)).abs().max() > 1e-2, "the adapter does something"
