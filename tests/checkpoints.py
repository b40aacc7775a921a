"""Folders of checkpoints: loaded, embedded with, changed, cut into shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skembed import NVEmbedVectorizer
from skembed.model import sources
from skembed.model.checkpoint import load_model
from skembed.model.network import NVEmbedModel
from skembed.model.sources import (
    read_config,
    resolve_source,
)

TEXTS = ["a text", "another and longer text, with a comma", "", "a third of them"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder: Path, *, pooling: str | None = None, dtype: str = "float32") -> NVEmbedModel:
    """Load a folder on the CPU."""
    source = resolve_source(folder)
    return load_model(
        source,
        read_config(source, pooling),
        device=torch.device("cpu"),
        dtype=DTYPES[dtype],
        attention_path="grouped",
    )


def embed(folder: Path, **parameters: Any) -> np.ndarray:
    """Embed the texts above through the public class, in float32 unless told otherwise."""
    settings = {"device": "cpu", "dtype": "float32", "cache": None, **parameters}
    return NVEmbedVectorizer(folder, **settings).transform(TEXTS)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a single-file folder."""
    tensors = load_file(folder / sources.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / sources.WEIGHTS_FILE)


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = folder / sources.CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def shard(folder: Path, n_shards: int = 3) -> None:
    """Spread a single file over shards with an index, as NV-Embed's repositories do."""
    tensors = load_file(folder / sources.WEIGHTS_FILE)
    (folder / sources.WEIGHTS_FILE).unlink()
    weight_map = {}
    for k in range(n_shards):
        name = f"model-{k + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[k::n_shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / sources.INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
