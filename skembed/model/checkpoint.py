"""Weights in and out of a model's folder, strictly and in bounded memory.

Two layouts load: NV-Embed's (config.json with model_type "nvembed"), which `save_checkpoint` also
writes, and a plain Mistral folder (model_type "mistral").
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skembed._files import replace_file, write_bytes, write_json
from skembed.exceptions import CheckpointError, FreshPoolingWarning
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.pooling import LatentAttention
from skembed.model.quantized import make_quantizer
from skembed.model.sources import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    ModelSource,
    find_weight_files,
    join_first,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "BACKBONE_PREFIX",
    "POOLING_PREFIX",
    "SHARD_BYTES",
    "WeightFiles",
    "iterate_tensors",
    "load_model",
    "open_tensors",
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
    return {
        name.removeprefix(POOLING_PREFIX): tensor.float().clone()
        for name, tensor in iterate_tensors(source, config)
        if name.startswith(POOLING_PREFIX)
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, float32, on the CPU."""
    with open_tensors(path) as file:
        # Copied, so that the file can close; torch's own alignment gives equal bits.
        return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raise CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"The folder {path.parent} lacks {path.name}.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as partial:
        save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})


class WeightFiles:
    """The safetensors files of a folder as one mapping from `NVEmbedModel`'s names to tensors.

    Each reading maps its file again: pages of a closed mapping no longer count as this process's
    memory, so loading needs little more than its result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.locations: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in find_weight_files(folder):
            with open_tensors(path) as file:
                for key in file.keys():  # not a mapping: has no __iter__
                    name = _model_key(key)
                    self.locations[name] = (path, key)
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped; copy it before reading the next one."""
        path, key = self.locations[name]
        with open_tensors(path) as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"The tensor {key} of {path} must be float32, float16 or bfloat16; got "
                f"{tensor.dtype}. Quantised checkpoints are not read."
            )
        return tensor

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str]) -> None:
        """Raise CheckpointError naming what is missing, unexpected or of another shape.

        Language-model heads and rotary buffers of older files are ignored, too.
        """
        stored = {
            name
            for name in self.shapes
            if not name.startswith(("lm_head.", *ignored))
            and not name.endswith("rotary_emb.inv_freq")
        }
        faults = {
            "missing": sorted(set(expected) - stored),
            "unexpected": sorted(stored - set(expected)),
            "wrong shape": [
                f"{name} has {self.shapes[name]}, expected {expected[name]}"
                for name in sorted(stored & set(expected))
                if self.shapes[name] != expected[name]
            ],
        }
        if any(faults.values()):
            raise CheckpointError(
                f"The weights in {self.folder} do not fit its {CONFIG_FILE}; "
                + "; ".join(
                    f"{fault}: {join_first(names)}" for fault, names in faults.items() if names
                )
                + ". The two files belong to different models, or the copy is incomplete."
            )


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
            quantized = quantize(model.get_submodule(layer), tensor.to(device), dtype)
            if quantized is not None:
                model.set_submodule(layer, quantized)
                continue
        target = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        parameter = nn.Parameter(target, requires_grad=False)
        setattr(model.get_submodule(layer), name.rpartition(".")[2], parameter)
    if config.pooling_is_fresh:
        _warn_fresh_pooling(source, config)
    # The rotary table is not a weight: compute it again, in float32, on the target device.
    rotary = model.embedding_model.rotary_emb
    model.embedding_model.rotary_emb = type(rotary)(config=model.embedding_model.config).to(device)
    return model.eval().requires_grad_(False)


def iterate_tensors(
    source: ModelSource, config: NVEmbedConfig, model: NVEmbedModel | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of a folder under the model's names, fresh pooling included.

    Names and shapes are checked first. Tensors are in the stored type and mapped from the file:
    copy one before taking the next. `model` is on the meta device.
    """
    files = WeightFiles(source.folder)
    model = _build_on_meta(source, config) if model is None else model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fresh = config.pooling_is_fresh
    stored = [n for n in shapes if not (fresh and n.startswith(POOLING_PREFIX))]
    unused = fresh or config.pooling in ("mean", "eos")
    files.check({n: shapes[n] for n in stored}, ignored=(POOLING_PREFIX,) if unused else ())
    for name in stored:
        yield name, files.read(name)
    if fresh:
        pooling = _start_pooling(model.latent_attention_model)
        yield from ((POOLING_PREFIX + name, value) for name, value in pooling.items())


def _build_on_meta(
    source: ModelSource, config: NVEmbedConfig, attention_path: str = "grouped"
) -> NVEmbedModel:
    """Return the model without memory for its weights."""
    try:
        with torch.device("meta"):
            return NVEmbedModel(config, attention_path=attention_path)
    except Exception as error:  # transformers and torch raise all kinds
        raise CheckpointError(
            f"The {CONFIG_FILE} of {source.folder} describes no model that can be built: "
            f"{type(error).__name__}: {error}."
        ) from error


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


def save_checkpoint(
    folder: Path,
    *,
    config: NVEmbedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: Path,
    extra: Mapping[str, Any],
) -> None:
    """Write a folder that `load_model` reads, config.json last.

    An existing folder's config.json is removed first, so that an interrupted save leaves a folder
    that refuses to load, never a mixture of two models. `tensors` are consumed one shard (5 GB) at
    a time; `extra` maps the names of other JSON files to their values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        name: (tokenizer_folder / name).read_bytes()
        for name in TOKENIZER_FILES
        if (tokenizer_folder / name).is_file()
    }
    _remove_partial(folder)  # of an interrupted save
    try:
        shards = list(_write_shards(folder, tensors))
    except BaseException:
        _remove_partial(folder)
        raise
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        stale.unlink(missing_ok=True)
    weight_map = {}
    for k, (partial, names) in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        file = WEIGHTS_FILE if len(shards) == 1 else file
        partial.replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    for name, content in tokenizer.items():
        write_bytes(folder / name, content)
    for name, value in extra.items():
        write_json(folder / name, value)
    write_json(folder / CONFIG_FILE, config.to_dict())


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[Path, list[str]]]:
    """Write shards of at most 5 GB under temporary names; yield each path and its keys."""
    shard: dict[str, Tensor] = {}
    number, size = 0, 0

    def flush() -> tuple[Path, list[str]]:
        path = folder / f".partial-{os.getpid()}-{number}"
        save_file(shard, path, metadata={"format": "pt"})
        return path, list(shard)

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield flush()
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    yield flush()


def _remove_partial(folder: Path) -> None:
    """Delete shards that did not become part of a model; each may hold gigabytes."""
    for path in folder.glob(".partial-*"):
        path.unlink(missing_ok=True)
