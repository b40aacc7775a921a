"""Adapter: the weights that one estimator learned for a backbone that several share.

`Adapter.bind` builds a *view* of the registered model: a second module tree on the same tensors,
with `LoraLinear` in place of the adapted layers. So any number of adapters run on one copy of the
base weights, also at once in several threads. A view goes with its adapter; the base is never
written to.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skembed._files import write_json
from skembed.adapters.lora import LoraLinear, LoraSettings, insert_lora, share_weights
from skembed.adapters.peft_files import (
    HEADER_KEY,
    PEFT_PREFIX,
    check_keys,
    model_layer,
    read_header,
    read_settings,
)
from skembed.adapters.targets import expected_shapes
from skembed.exceptions import CheckpointError
from skembed.model.checkpoint import (
    BACKBONE_PREFIX,
    POOLING_PREFIX,
    read_tensors,
    write_tensors,
)
from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_forward import pack_weights
from skembed.model.files import find_file, has_file, read_steadily, replace_together
from skembed.model.loaded import LoadedModel
from skembed.model.network import load_pooling, pooling_shapes, without_autocast
from skembed.model.pooling import FoldedLatentAttention, LatentAttention
from skembed.model.sources import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS_FILE,
    CONTENT_DIGITS,
    POOLING_FILE,
    read_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Adapter", "merge_adapter"]


@dataclass(eq=False)
class Adapter:
    """Weights that one estimator learned: small, picklable, on the CPU.

    Attributes
    ----------
    settings : LoraSettings
        Sizes, under peft's names.
    lora : dict of str to Tensor
        ``<layer>.lora_A.weight`` (r, in) and ``<layer>.lora_B.weight`` (out, r), float32, layer
        names as in `MistralModel`.
    pooling : dict of str to Tensor
        Weights of the pooling layer where it was trained, else empty.
    base_fingerprint : str
        The model it was trained on.
    instructions : bool
        Whether it was trained with instructions; a folder says so in its skembed.json.
    """

    settings: LoraSettings
    lora: dict[str, Tensor]
    pooling: dict[str, Tensor]
    base_fingerprint: str
    instructions: bool = False
    _views: list[LoadedModel] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _fits: NVEmbedConfig | None = field(default=None, repr=False)  # checked by `check_pooling`

    def __getstate__(self) -> dict[str, Any]:
        """Return sizes and weights, without views and base weights."""
        state: dict[str, Any] = {"settings": self.settings, "instructions": self.instructions}
        state["base_fingerprint"] = self.base_fingerprint
        for name in ("lora", "pooling"):
            state[name] = {key: value.numpy() for key, value in getattr(self, name).items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the adapter; arrays become tensors again."""
        self.settings, self.base_fingerprint = state["settings"], state["base_fingerprint"]
        self.instructions = state["instructions"]
        for name in ("lora", "pooling"):
            # Copied: joblib maps files read-only, and torch's own alignment gives equal bits.
            tensors = {key: torch.tensor(value) for key, value in state[name].items()}
            setattr(self, name, tensors)
        self._views, self._lock, self._fits = [], threading.Lock(), None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of base model, scale and weights, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        scale = [self.settings.r, float(self.settings.lora_alpha)]
        digest.update(json.dumps([self.base_fingerprint[:CONTENT_DIGITS], *scale]).encode())
        for group in (self.lora, self.pooling):
            for name in sorted(group):
                digest.update(name.encode())
                digest.update(group[name].contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def targets(self) -> list[str]:
        """Names of the adapted layers, sorted."""
        return sorted({name.rsplit(".", 2)[0] for name in self.lora})

    @property
    def size_bytes(self) -> int:
        """Memory of the weights."""
        return sum(tensor.nbytes for tensor in (*self.lora.values(), *self.pooling.values()))

    def bind(self, base: LoadedModel) -> LoadedModel:
        """Return a view of the base model with this adapter in it, built once; thread-safe.

        Raises
        ------
        CheckpointError
            If the adapter belongs to another model.
        """
        return self.bind_all([base])[0]

    def bind_all(self, bases: Sequence[LoadedModel]) -> list[LoadedModel]:
        """Return a view, as `bind` does, of each of several copies of the base model.

        Raises
        ------
        CheckpointError
            As for `bind`.
        """
        for base in bases:
            self.check_base(base.key.fingerprint)
        with self._lock:
            by_base = {id(view.base): view for view in self._views}
            for base in bases:
                if id(base) not in by_base:
                    by_base[id(base)] = self._build_view(base)
            views = [by_base[id(base)] for base in bases]
            self._views = list(dict.fromkeys(views))  # drops those of other devices
            return views

    def check_base(self, fingerprint: str) -> None:
        """Raise CheckpointError for a base model that the adapter was not trained on."""
        if fingerprint[:CONTENT_DIGITS] != self.base_fingerprint[:CONTENT_DIGITS]:
            raise CheckpointError(
                "The adapter was trained on another model: weights, config.json or tokenizer of "
                f"the base differ (fingerprint {self.base_fingerprint[:8]}..., got "
                f"{fingerprint[:8]}...). Pass the model it was trained on as `model`, or train "
                "again."
            )

    def check_pooling(self, config: NVEmbedConfig) -> None:
        """Raise CheckpointError for a model whose pooling is not the one that was trained."""
        if not self.pooling or self._fits == config:  # once, because it takes a millisecond
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.pooling.items()}
        if shapes != pooling_shapes(config):
            raise CheckpointError(
                "The adapter brings a trained pooling layer that is not of the kind "
                f"{config.pooling!r}. Leave the `pooling` parameter of `NVEmbedVectorizer` as it "
                "was in training, or train again."
            )
        self._fits = config

    @without_autocast()
    def _build_view(self, base: LoadedModel) -> LoadedModel:
        """Return a tree on the base's tensors, with adapted layers and pooling replaced."""
        model = share_weights(base.model)
        lora = {name: tensor.to(base.device) for name, tensor in self.lora.items()}
        insert_lora(model, self.settings, lora)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.freeze()
        if self.pooling:
            weights = {name: tensor.to(base.device) for name, tensor in self.pooling.items()}
            pooling = load_pooling(base.config, weights)
            if isinstance(pooling, LatentAttention):
                pooling = FoldedLatentAttention(pooling)
            model.latent_attention_model = pooling.to(base.key.compute_dtype)
            pack_weights(model.latent_attention_model)
        model.eval().requires_grad_(False)
        key = replace(base.key, fingerprint=f"{base.key.fingerprint}+{self.fingerprint}")
        return LoadedModel(key, base.config, model, base.tokenizer, base)

    def save(
        self,
        folder: Path,
        *,
        base_name: str,
        base_revision: str | None,
        pooling_kind: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write peft's two files, and the pooling's if it was trained.

        All is written before an older adapter goes; `extra` maps the names of further JSON files
        to their values.
        """
        lora = {PEFT_PREFIX + name: tensor for name, tensor in self.lora.items()}
        header = {
            "base_fingerprint": self.base_fingerprint,
            "pooling": pooling_kind,
            "trained_pooling": bool(self.pooling),
        }
        targets = self.settings.target_modules
        config = {
            **asdict(self.settings),
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": base_name,
            "revision": base_revision,
            "inference_mode": True,
            "bias": "none",
        }
        last = ADAPTER_CONFIG_FILE
        with replace_together(folder, last, is_stale=ADAPTER_FILES.__contains__) as staged:
            write_tensors(staged / ADAPTER_WEIGHTS_FILE, lora, {HEADER_KEY: json.dumps(header)})
            if self.pooling:
                pooling = {POOLING_PREFIX + name: tensor for name, tensor in self.pooling.items()}
                write_tensors(staged / POOLING_FILE, pooling)
            for name, value in (extra or {}).items():
                write_json(staged / name, value)
            write_json(staged / ADAPTER_CONFIG_FILE, config)

    @classmethod
    def load(cls, folder: Path, config: NVEmbedConfig, base_fingerprint: str) -> Adapter:
        """Read what `save`, or peft on the same backbone, wrote.

        Raises
        ------
        CheckpointError
            If a key is missing, unexpected or of another shape, if the adapter was trained on
            another model, or if it uses settings that skembed does not compute.
        """
        return read_steadily([folder], lambda: cls._load(folder, config, base_fingerprint))

    @classmethod
    def _load(cls, folder: Path, config: NVEmbedConfig, base_fingerprint: str) -> Adapter:
        """Read the files as they are now."""
        settings = read_settings(read_json(folder / ADAPTER_CONFIG_FILE), folder)
        header = read_header(folder)
        shapes = expected_shapes(config, settings)
        lora = read_tensors(
            find_file(folder, ADAPTER_WEIGHTS_FILE),
            model_layer,
            lambda stored, path: check_keys(stored, shapes, path),
        )
        pooling = {}
        # A trained pooling without its file must not fall back silently to the base model's.
        if header.get("trained_pooling") or has_file(folder, POOLING_FILE):
            pooling = read_tensors(
                find_file(folder, POOLING_FILE),
                lambda name: name.removeprefix(POOLING_PREFIX),
                lambda stored, path: check_keys(stored, pooling_shapes(config), path),
            )
        adapter = cls(settings, lora, pooling, header.get("base_fingerprint") or base_fingerprint)
        adapter.check_base(base_fingerprint)
        return adapter


def merge_adapter(
    adapter: Adapter, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors with the update added and the pooling replaced.

    The sums are in float32 and rounded once to the type each tensor is stored in.
    """
    layers = set(adapter.targets)
    for name, tensor in tensors:
        layer = name.removeprefix(BACKBONE_PREFIX).removesuffix(".weight")
        trained = adapter.pooling.get(name.removeprefix(POOLING_PREFIX))
        if name.startswith(BACKBONE_PREFIX) and layer in layers:
            a, b = (adapter.lora[f"{layer}.lora_{kind}.weight"] for kind in "AB")
            with without_autocast():
                merged = tensor.float() + adapter.settings.scaling * (b @ a)
            yield name, merged.to(tensor.dtype)
        elif name.startswith(POOLING_PREFIX) and trained is not None:
            yield name, trained.to(tensor.dtype)
        else:
            yield name, tensor
