"""Random models for benchmarks: their sizes, weights, checkpoints, and how they are loaded.

Nothing here is a benchmark: the name begins with an underscore, so `dev.py bench` does not list it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import skip, start
from _results import RESULTS

from skembed.inference.devices import choose_attention_path, cpu_has_bfloat16
from skembed.inference.registry import registry
from skembed.model.checkpoint import save_checkpoint
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel, ModelKey, prove_bidirectional
from skembed.model.network import NVEmbedModel
from skembed.model.sources import (
    ModelSource,
    fingerprint_weights,
    read_config,
    resolve_source,
)

BUNDLED_VOCABULARY = 24_576  # of the bundled model, whose tokenizer the checkpoints carry
SEVEN_B = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": BUNDLED_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def start_on_device(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """Add the options of a GPU benchmark, parse, and return them with the device."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a pass; default: our choice")
    args = start(parser)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        skip(
            "needs a CUDA device, and torch sees none here. To see that it runs, pass "
            "--device cpu --tiny."
        )
    if args.tiny and args.out == RESULTS:
        args.out = RESULTS.parent / "output"  # says nothing about speed: not to be published
    device = torch.device(args.device)
    return args, torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def random_tensors(
    config: NVEmbedConfig, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield float16 weights one after the other, scaled so that activations stay of order one."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in NVEmbedModel(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = torch.full(shape, float(name.endswith("weight")), device=device)
        else:
            value = torch.randn(shape, generator=generator, device=device)
            value *= 1.0 if "latents" in name or "embed_tokens" in name else shape[-1] ** -0.5
        yield name, value.half().cpu()


def write_random_model(
    folder: Path, config: NVEmbedConfig, device: torch.device | str = "cpu"
) -> None:
    """Write a checkpoint of random weights with the tokenizer of the bundled model."""
    save_checkpoint(
        folder,
        config=config,
        tensors=random_tensors(config, device),
        tokenizer_folder=resolve_source("skembed-mini").folder,
        extra={},
    )


def load_model(folder: str | Path, device: torch.device, dtype: str) -> LoadedModel:
    """Load the model of a folder, or of a bundled name, as the vectorizer would."""
    source = resolve_source(folder) if isinstance(folder, str) else ModelSource(folder.name, folder)
    config = read_config(source)
    path = choose_attention_path(device, getattr(torch, dtype))
    key = ModelKey(fingerprint_weights(source), config.pooling, str(device), dtype, path)
    return registry.get(key, source, config)


def build_model(backbone: dict[str, Any], device: torch.device) -> LoadedModel:
    """Return a model of random weights with mean pooling, made on the device itself.

    In bfloat16, but for a processor that lacks it.
    """
    config = NVEmbedConfig(backbone=backbone, pooling="mean")
    native = device.type != "cpu" or cpu_has_bfloat16()
    dtype = torch.bfloat16 if native else torch.float32
    path = choose_attention_path(device, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = NVEmbedModel(config, attention_path=path)
        torch.set_default_dtype(torch.float32)
    rotary = model.embedding_model.rotary_emb  # its table stays float32
    model.embedding_model.rotary_emb = type(rotary)(config=model.embedding_model.config).to(device)
    model.eval().requires_grad_(False)
    prove_bidirectional(model, device)
    key = ModelKey("random", "mean", str(device), str(dtype).removeprefix("torch."), path)
    return LoadedModel(key, config, model, None)  # type: ignore[arg-type]
