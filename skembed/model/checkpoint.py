"""Weights in and out of a model's folder, strictly and in bounded memory.

Two layouts load: NV-Embed's (config.json with model_type "nvembed"), which `save_checkpoint` also
writes, and a plain Mistral folder (model_type "mistral").
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skembed._files import read_file, replace_file, write_json
from skembed.exceptions import CheckpointError, FreshPoolingWarning
from skembed.model.config import NVEmbedConfig
from skembed.model.files import find_file, has_file, list_states, replace_together
from skembed.model.network import NVEmbedModel, describe_sizes
from skembed.model.pooling import LatentAttention
from skembed.model.quantized import make_quantizer
from skembed.model.sources import (
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    ModelSource,
    find_weight_files,
    read_index,
)
from skembed.model.tokenization import MAX_TOKENIZER_BYTES
from skembed.model.weight_files import WeightFiles, check_finite

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BACKBONE_PREFIX",
    "POOLING_PREFIX",
    "SHARD_BYTES",
    "iterate_tensors",
    "load_model",
    "read_pooling",
    "read_tensors",
    "save_checkpoint",
    "write_tensors",
]


SHARD_BYTES = 5_000_000_000
BACKBONE_PREFIX = "embedding_model."
POOLING_PREFIX = "latent_attention_model."


def read_pooling(source: ModelSource, config: NVEmbedConfig) -> dict[str, Tensor]:
    """Return the pooling's weights in their published form, float32; empty if there are none."""
    weights = {
        name.removeprefix(POOLING_PREFIX): tensor.float().clone()
        for name, tensor in iterate_tensors(source, config)
        if name.startswith(POOLING_PREFIX)
    }
    for name, tensor in weights.items():
        check_finite(tensor, POOLING_PREFIX + name, source.folder)
    return weights


def read_tensors(
    path: Path,
    rename: Callable[[str], str],
    check: Callable[[Mapping[str, tuple[int, ...]], Path], None],
) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file under new names, finite, float32, on the CPU.

    `check` sees names and shapes before anything of that size is read.
    """
    files = WeightFiles([path], rename)
    check(files.shapes, path)
    tensors = {}
    for name in files.shapes:
        # Copied, so that the file can close; torch's own alignment gives equal bits.
        tensors[name] = files.read(name).to(torch.float32, copy=True)
        check_finite(tensors[name], files.locations[name][1], path)
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as partial:
        save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})


def _model_key(key: str) -> str:
    """Return `NVEmbedModel`'s name for a key of any of the layouts."""
    if key.startswith((BACKBONE_PREFIX, POOLING_PREFIX, "lm_head.")):
        return key
    return BACKBONE_PREFIX + key.removeprefix("model.")


def load_model(
    source: ModelSource,
    config: NVEmbedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention_path: str,
    weight_format: str | None = None,
) -> NVEmbedModel:
    """Return the model of a folder in evaluation mode, its pooling unfolded.

    Each tensor is converted and moved as it is read. `weight_format` is one of
    `skembed.model.quantized.WEIGHT_FORMATS`. Raises CheckpointError where the files do not fit
    config.json; warns with FreshPoolingWarning where there are no weights for the pooling.
    """
    model = _build_on_meta(source, config, attention_path)
    quantize = None if weight_format is None else make_quantizer(weight_format)
    for name, tensor in iterate_tensors(source, config, model):
        layer = name.rpartition(".")[0]
        if quantize is not None and name.startswith(BACKBONE_PREFIX):
            moved = tensor.to(device)
            check_finite(moved, name, source.folder)
            quantized = quantize(model.get_submodule(layer), moved, dtype)
            if quantized is not None:
                model.set_submodule(layer, quantized)
                continue
        target = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        check_finite(target, name, source.folder, stored=tensor)
        parameter = nn.Parameter(target, requires_grad=False)
        setattr(model.get_submodule(layer), name.rpartition(".")[2], parameter)
    if config.pooling_is_fresh:
        _warn_fresh_pooling(source, config)
    # The rotary table is not a weight: compute it again, in float32, on the target device.
    rotary = model.embedding_model.rotary_emb
    rotary = type(rotary)(config=model.embedding_model.config).to(device)
    check_finite(rotary.inv_freq, "of rotary frequencies (see rope_theta)", source.folder)
    model.embedding_model.rotary_emb = rotary
    return model.eval().requires_grad_(False)


def iterate_tensors(
    source: ModelSource, config: NVEmbedConfig, model: NVEmbedModel | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of a folder under the model's names, fresh pooling included.

    Names and shapes are checked first. Tensors are in the stored type and mapped from the file:
    copy one before taking the next. `model` is on the meta device.
    """
    folder = source.folder
    index, paths = read_index(folder), find_weight_files(folder)
    before = list_states(folder, paths)
    files = WeightFiles(paths, _model_key)
    files.check_index(index, folder / INDEX_FILE)
    model = _build_on_meta(source, config) if model is None else model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fresh = config.pooling_is_fresh
    stored = [n for n in shapes if not (fresh and n.startswith(POOLING_PREFIX))]
    unused = (POOLING_PREFIX,) if fresh or config.pooling in ("mean", "eos") else ()
    expected = {name: shapes[name] for name in stored}
    files.check(expected, unused, folder=folder, config_file=CONFIG_FILE)
    if fresh:
        _check_fresh_size(sum(map(math.prod, shapes.values())), files, folder)
    for name in stored:
        yield name, files.read(name)
    if list_states(folder, paths) != before:
        raise CheckpointError(
            f"The files of the model in {folder} changed while they were read: another process "
            "writes there. Try again when it has finished."
        )
    if fresh:
        pooling = _start_pooling(model.latent_attention_model)
        yield from ((POOLING_PREFIX + name, value) for name, value in pooling.items())


def _check_fresh_size(n_weights: int, files: WeightFiles, folder: Path) -> None:
    """Refuse a pooling without weights that config.json makes far larger than the model."""
    n_stored = sum(map(math.prod, files.shapes.values()))
    if n_weights > max(4 * n_stored, 1 << 22):
        raise CheckpointError(
            f"The {CONFIG_FILE} of {folder} describes a pooling of absurd size: {n_weights:,} "
            f"weights with it, where the folder holds {n_stored:,}."
        )


def _build_on_meta(
    source: ModelSource, config: NVEmbedConfig, attention_path: str = "grouped"
) -> NVEmbedModel:
    """Return the model without memory for its weights."""
    with describe_sizes(f"The {CONFIG_FILE} of {source.folder}"), torch.device("meta"):
        return NVEmbedModel(config, attention_path=attention_path)


def _start_pooling(pooling: nn.Module) -> dict[str, Tensor]:
    """Return fresh float32 weights from a fixed seed.

    Output projections of a latent layer start at zero, so that it equals mean pooling until it is
    trained.
    """
    generator = torch.Generator().manual_seed(0)
    starts_at_zero = isinstance(pooling, LatentAttention)
    fresh = {}
    for name, parameter in pooling.named_parameters():
        value = torch.zeros(parameter.shape)
        if name == "latents":
            value.normal_(generator=generator)
        elif "norm" in name and name.endswith("weight"):
            value.fill_(1.0)
        elif starts_at_zero and name.endswith(("to_out.weight", "net.2.weight")):
            pass
        elif parameter.ndim == 2 and name != "layer_weights":
            value.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        fresh[name] = value
    return fresh


def _warn_fresh_pooling(source: ModelSource, config: NVEmbedConfig) -> None:
    """Warn that the pooling has not been trained, and say how it starts."""
    start = "weights that equal mean pooling" if config.pooling == "latent" else "random weights"
    warnings.warn(
        f"{source.name!r} has no weights for {config.pooling!r} pooling: it starts with {start} "
        "and needs training first. Pass `pooling='mean'` for untrained use, or silence this with "
        "warnings.filterwarnings('ignore', category=skembed.FreshPoolingWarning).",
        FreshPoolingWarning,
        stacklevel=2,
    )


_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_checkpoint(
    folder: Path,
    *,
    config: NVEmbedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: Path,
    extra: Mapping[str, Any],
) -> None:
    """Write a folder that `load_model` reads; all of it first, then in place of what is there.

    An interrupted save leaves the old model, or a folder that refuses to load, never a mixture of
    two. An adapter in the folder goes. `tensors` are consumed one shard (5 GB) at a time; `extra`
    maps the names of other JSON files to their values.
    """
    with replace_together(folder, CONFIG_FILE, is_stale=_is_of_model) as staged:
        shards = list(_write_shards(staged, tensors))
        weight_map = {}
        for k, (partial, names) in enumerate(shards, start=1):
            file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
            file = WEIGHTS_FILE if len(shards) == 1 else file
            partial.replace(staged / file)
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            write_json(staged / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
        for name in TOKENIZER_FILES:
            if has_file(tokenizer_folder, name):
                content = read_file(find_file(tokenizer_folder, name), limit=MAX_TOKENIZER_BYTES)
                (staged / name).write_bytes(content)
        for name, value in extra.items():
            write_json(staged / name, value)
        write_json(staged / CONFIG_FILE, config.to_dict())


def _is_of_model(name: str) -> bool:
    """Return whether a file would be read as a part of another model or an adapter."""
    known = (WEIGHTS_FILE, INDEX_FILE, *TOKENIZER_FILES, *ADAPTER_FILES)
    return name in known or _SHARD_NAME.fullmatch(name) is not None


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Path, list[str]]]:
    """Write shards of at most 5 GB under temporary names; yield each path and its keys."""
    shard: dict[str, Tensor] = {}
    number, size = 0, 0

    def flush() -> tuple[Path, list[str]]:
        path = folder / f"shard-{number}"
        save_file(shard, path, metadata={"format": "pt"})
        return path, list(shard)

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield flush()
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    yield flush()
