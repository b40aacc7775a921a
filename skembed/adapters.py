"""LoRA adapters (arXiv 2106.09685) on a backbone that several estimators share.

An `Adapter` is what one estimator learned: the LoRA matrices and, where it was trained, the pooling
layer. It never touches the model in the registry. `Adapter.bind` builds a *view* of that model: a
module tree of its own whose parameters are the registered model's own tensors, with `LoraLinear`
in the place of the adapted layers. So any number of adapters run on one copy of the base weights,
also at once in several threads; a view goes with its adapter, and the base is never written to.

peft decides which layers `target_modules` means and owns the file format
(``adapter_config.json``, ``adapter_model.safetensors``). The layer is our own: peft's draws its
dropout from torch's global state, which a gradient cache cannot replay under threads, and keeps its
masks in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skembed._files import replace_file, write_json
from skembed._validation import import_optional
from skembed.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BACKBONE_PREFIX,
    CONTENT_DIGITS,
    POOLING_FILE,
    POOLING_PREFIX,
    ModelSource,
    iterate_tensors,
    read_json,
)
from skembed.exceptions import CheckpointError
from skembed.fused import pack_weights
from skembed.lora import (
    LoraLinear,
    LoraSettings,
    insert_lora,
    share_weights,
)
from skembed.model import NVEmbedConfig, NVEmbedModel, build_pooling
from skembed.pooling import POOLINGS, FoldedLatentAttention, LatentAttention
from skembed.registry import LoadedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

PEFT_PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
# Settings of peft that change the function and that this module does not compute, where they are
# neither null, false, "none" nor empty.
_REFUSED = (
    *("use_dora", "use_rslora", "bias", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "modules_to_save", "fan_in_fan_out", "exclude_modules"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Starts that leave the base weights as they are; others ("pissa", "olora") move a part of them into
# the adapter, which then fits no base on disk.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# In the header of the weights stands as JSON what peft's configuration has no place for: peft
# warns about names it does not know.
_HEADER_KEY = "skembed"


@dataclass(eq=False)
class Adapter:
    """What one estimator learned; small, picklable, on the CPU.

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
    """

    settings: LoraSettings
    lora: dict[str, Tensor]
    pooling: dict[str, Tensor]
    base_fingerprint: str
    _views: list[LoadedModel] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _fits: NVEmbedConfig | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Sizes and weights; no view, no base weights."""
        state = {"settings": self.settings, "base_fingerprint": self.base_fingerprint}
        for name in ("lora", "pooling"):
            state[name] = {key: value.numpy() for key, value in getattr(self, name).items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; arrays become tensors again."""
        self.settings, self.base_fingerprint = state["settings"], state["base_fingerprint"]
        for name in ("lora", "pooling"):
            # Copied: joblib's maps are read-only, and torch's own alignment gives equal bits.
            tensors = {key: torch.tensor(value) for key, value in state[name].items()}
            setattr(self, name, tensors)
        self._views, self._lock, self._fits = [], threading.Lock(), None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what vectors depend on: base model, scale, weights; 32 hexadecimal digits."""
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
        """A view of the base model with this adapter in it, made once; safe under threads.

        Raises
        ------
        CheckpointError
            When the adapter belongs to another model.
        """
        return self.bind_all([base])[0]

    def bind_all(self, bases: Sequence[LoadedModel]) -> list[LoadedModel]:
        """A view, as `bind` gives it, of each of several copies of the base model.

        Raises
        ------
        CheckpointError
            As `bind`.
        """
        for base in bases:
            self.check_base(base.key.fingerprint)
        with self._lock:
            made = {id(view.base): view for view in self._views}
            for base in bases:
                if id(base) not in made:
                    made[id(base)] = self._build_view(base)
            views = [made[id(base)] for base in bases]
            self._views = list(dict.fromkeys(views))  # and no longer those of other devices
            return views

    def check_base(self, fingerprint: str) -> None:
        """Refuse a base model that the adapter was not trained on."""
        if fingerprint[:CONTENT_DIGITS] != self.base_fingerprint[:CONTENT_DIGITS]:
            raise CheckpointError(
                "The adapter was trained on another model: weights, config.json or tokenizer of "
                f"the base differ (fingerprint {self.base_fingerprint[:8]}..., got "
                f"{fingerprint[:8]}...). Pass the model it was trained on as `model`, or train "
                "again."
            )

    def check_pooling(self, config: NVEmbedConfig) -> None:
        """Refuse a model with another pooling than the one that was trained."""
        found = {name: tuple(tensor.shape) for name, tensor in self.pooling.items()}
        if not found or self._fits == config:  # once: at each use it would take a millisecond
            return
        if found != pooling_shapes(config):
            raise CheckpointError(
                "The adapter brings a trained pooling layer that is not of the kind "
                f"{config.pooling!r}. Leave the `pooling` parameter of `NVEmbedVectorizer` as it "
                "was in training, or train again."
            )
        self._fits = config

    def _build_view(self, base: LoadedModel) -> LoadedModel:
        """The base's module tree, its tensors shared, the adapted layers and pooling replaced."""
        model = share_weights(base.model)
        insert_lora(model, self.settings, self._on(base.device, self.lora))
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.freeze()
        if self.pooling:
            pooling = load_pooling(base.config, self._on(base.device, self.pooling))
            if isinstance(pooling, LatentAttention):
                pooling = FoldedLatentAttention(pooling)
            model.latent_attention_model = pooling.to(base.key.compute_dtype)
            pack_weights(model.latent_attention_model)
        model.eval().requires_grad_(False)
        key = replace(base.key, fingerprint=f"{base.key.fingerprint}+{self.fingerprint}")
        return LoadedModel(key, base.config, model, base.tokenizer, base)

    @staticmethod
    def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on a device."""
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    # Files

    def save(
        self,
        folder: Path,
        *,
        base_name: str,
        base_revision: str | None,
        pooling_kind: str | None = None,
    ) -> None:
        """Write peft's two files, and the pooling's beside them; the configuration last."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG_FILE).unlink(missing_ok=True)
        lora = {PEFT_PREFIX + name: tensor for name, tensor in self.lora.items()}
        header = {
            "base_fingerprint": self.base_fingerprint,
            "pooling": pooling_kind,
            "trained_pooling": bool(self.pooling),
        }
        write_tensors(folder / ADAPTER_WEIGHTS_FILE, lora, {_HEADER_KEY: json.dumps(header)})
        if self.pooling:
            pooling = {POOLING_PREFIX + name: tensor for name, tensor in self.pooling.items()}
            write_tensors(folder / POOLING_FILE, pooling)
        else:
            (folder / POOLING_FILE).unlink(missing_ok=True)
        write_json(folder / ADAPTER_CONFIG_FILE, self._peft_config(base_name, base_revision))

    def _peft_config(self, base_name: str, base_revision: str | None) -> dict[str, Any]:
        """The adapter_config.json that peft reads."""
        settings = self.settings
        targets = settings.target_modules
        return {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": base_name,
            "revision": base_revision,
            "inference_mode": True,
            "r": settings.r,
            "lora_alpha": settings.lora_alpha,
            "lora_dropout": settings.lora_dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "bias": "none",
        }

    @classmethod
    def load(cls, folder: Path, config: NVEmbedConfig, base_fingerprint: str) -> Adapter:
        """Read what `save`, or peft on the same backbone, wrote.

        Raises
        ------
        CheckpointError
            When a key is missing, foreign or misshapen, when the adapter was trained on another
            model, or when it uses what this module does not compute.
        """
        values = read_json(folder / ADAPTER_CONFIG_FILE)
        settings = _read_settings(values, folder)
        header = _read_header(folder / ADAPTER_WEIGHTS_FILE)
        lora = {
            _model_layer(name): tensor
            for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS_FILE).items()
        }
        _check_keys(lora, _expected_shapes(config, settings), folder / ADAPTER_WEIGHTS_FILE)
        pooling = {}
        # Without its file a trained pooling must not fall back to the base model's in silence.
        if header.get("trained_pooling") or (folder / POOLING_FILE).is_file():
            stored = read_tensors(folder / POOLING_FILE)
            pooling = {n.removeprefix(POOLING_PREFIX): t for n, t in stored.items()}
            _check_keys(pooling, pooling_shapes(config), folder / POOLING_FILE)
        trained_on = header.get("base_fingerprint", base_fingerprint)
        adapter = cls(settings, lora, pooling, trained_on)
        adapter.check_base(base_fingerprint)
        return adapter


def start_lora(
    config: NVEmbedConfig, settings: LoraSettings, seed: np.random.SeedSequence
) -> dict[str, Tensor]:
    """Fresh matrices: A uniform in ±1/sqrt(in) as in peft, B zero, so that nothing changes yet.

    Raises
    ------
    ImportError
        When peft is not installed.
    ValueError
        When `target_modules` names no linear layer of the backbone.
    """
    backbone = _backbone_on_meta(config)
    generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint32)[0]))
    lora = {}
    for layer in find_targets(config, settings):
        base: Any = backbone.get_submodule(layer)
        bound = base.in_features**-0.5
        a = torch.empty(settings.r, base.in_features).uniform_(-bound, bound, generator=generator)
        lora[f"{layer}.lora_A.weight"] = a
        lora[f"{layer}.lora_B.weight"] = torch.zeros(base.out_features, settings.r)
    return lora


def find_targets(config: NVEmbedConfig, settings: LoraSettings) -> list[str]:
    """Names of the layers that peft adapts under `target_modules`, sorted."""
    peft = import_optional("peft", extra="train", purpose="training adapters")
    backbone = _backbone_on_meta(config)
    targets = settings.target_modules
    lora_config = peft.LoraConfig(
        r=1, target_modules=targets if isinstance(targets, str) else list(targets)
    )
    names = {name for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    refusal = (
        "The `target_modules` parameter of `ContrastiveTrainer` must name linear layers of the "
        f"backbone, of {kinds}, or be 'all-linear'; got {targets!r}"
    )
    try:
        with torch.device("meta"):
            peft.inject_adapter_in_model(lora_config, backbone)
    except (ValueError, re.error) as error:
        raise ValueError(f"{refusal}, which peft refuses: {error}") from error
    found = [name for name, layer in backbone.named_modules() if hasattr(layer, "lora_A")]
    # peft passes over a name that matches nothing, and adapts embeddings, too.
    bad = sorted(set(found) - names)
    if not isinstance(targets, str):
        bad += [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if bad:
        raise ValueError(f"{refusal}, of which {bad[0]!r} is none.")
    return sorted(found)


def _backbone_on_meta(config: NVEmbedConfig) -> nn.Module:
    """The backbone without memory for its weights."""
    with torch.device("meta"):
        return NVEmbedModel(replace(config, pooling="mean")).embedding_model


def read_pooling(source: ModelSource, config: NVEmbedConfig) -> dict[str, Tensor]:
    """The checkpoint's pooling weights in their published form, float32; empty if it has none."""
    return {
        name.removeprefix(POOLING_PREFIX): tensor.float().clone()
        for name, tensor in iterate_tensors(source, config)
        if name.startswith(POOLING_PREFIX)
    }


def pooling_shapes(config: NVEmbedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a configuration's pooling in its published form."""
    with torch.device("meta"):
        return {n: tuple(tensor.shape) for n, tensor in build_pooling(config).state_dict().items()}


def load_pooling(config: NVEmbedConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """A pooling layer in its published form with these weights as its own parameters."""
    with torch.device("meta"):
        pooling = build_pooling(config)
    pooling.load_state_dict(dict(weights), assign=True)
    return pooling


def merge_adapter(
    adapter: Adapter, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors with the update added and the pooling replaced.

    Computed in float32 and rounded once to the type each tensor is stored in.
    """
    layers = set(adapter.targets)
    for name, tensor in tensors:
        layer = name.removeprefix(BACKBONE_PREFIX).removesuffix(".weight")
        pooled = adapter.pooling.get(name.removeprefix(POOLING_PREFIX))
        if name.startswith(BACKBONE_PREFIX) and layer in layers:
            a, b = (adapter.lora[f"{layer}.lora_{kind}.weight"] for kind in "AB")
            merged = tensor.float() + adapter.settings.scaling * (b @ a)
            yield name, merged.to(tensor.dtype)
        elif name.startswith(POOLING_PREFIX) and pooled is not None:
            yield name, pooled.to(tensor.dtype)
        else:
            yield name, tensor


def _read_settings(values: Mapping[str, Any], folder: Path) -> LoraSettings:
    """The sizes in an adapter_config.json, and no setting that would change the function."""
    path = folder / ADAPTER_CONFIG_FILE
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"The peft_type in {path} must be 'LORA'; got {kind!r}.")
    for name in _REFUSED:
        value = values.get(name)
        if value is not None and value is not False and value not in ("none", [], {}):
            raise CheckpointError(
                f"The {name} in {path} is {value!r}, which skembed does not compute. Merge the "
                "adapter into its base with peft (`merge_and_unload`), and load the result."
            )
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"The init_lora_weights in {path} is {values['init_lora_weights']!r}, which changes "
            "the base weights. Convert the adapter with peft (`path_initial_model_for_weight_"
            "conversion` of its `save_pretrained`), and load the result."
        )
    targets = values.get("target_modules")
    try:
        re.compile(targets if isinstance(targets, str) else "")
        targets = targets if isinstance(targets, str) else tuple(sorted(targets or ()))
        settings = LoraSettings(
            int(values["r"]), float(values["lora_alpha"]), float(values["lora_dropout"]), targets
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{path} lacks or misstates r, lora_alpha, lora_dropout or target_modules: {error!r}."
        ) from error
    if settings.r < 1 or not targets:
        raise CheckpointError(f"{path} must have r above 0 and target_modules; got {values!r}.")
    return settings


def _expected_shapes(config: NVEmbedConfig, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """The matrices an adapter must have, by peft's rule of names (which a test holds to peft)."""
    targets = settings.target_modules
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _backbone_on_meta(config).named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if isinstance(targets, str):
            wanted = targets.lower() == ALL_LINEAR or re.fullmatch(targets, name) is not None
        else:
            wanted = any(name == target or name.endswith(f".{target}") for target in targets)
        if wanted:
            shapes[f"{name}.lora_A.weight"] = (settings.r, layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, settings.r)
    return shapes


def _model_layer(name: str) -> str:
    """Layer name in `MistralModel` for a key of peft's, wherever the backbone was wrapped."""
    name = name.removeprefix(PEFT_PREFIX)
    return name.removeprefix(BACKBONE_PREFIX).removeprefix("model.")


def _check_keys(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Names and shapes, both ways: nothing is filled in at random."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [n for n in found if n in expected and tuple(found[n].shape) != expected[n]]
    faults = [
        f"{len(names)} {what}, such as {sorted(names)[0]}"
        for what, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"The weights in {path} do not fit the base model and {ADAPTER_CONFIG_FILE}: "
            f"{'; '.join(faults)}. The adapter belongs to another model, or the copy is "
            "incomplete."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, float32, on the CPU.

    Raises
    ------
    CheckpointError
        When the file is missing or damaged.
    """
    with _open_tensors(path) as file:
        # Copied: nothing hangs on the file, and torch's own alignment gives equal bits.
        return {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}


def _read_header(path: Path) -> dict[str, Any]:
    """What `Adapter.save` noted in the header of the weights; empty in a file of peft's."""
    with _open_tensors(path) as file:
        return dict(json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}")))


def read_pooling_kind(folder: Path) -> str | None:
    """The pooling that an adapter was trained with; None in a folder of peft's."""
    path = folder / ADAPTER_WEIGHTS_FILE
    kind = _read_header(path).get("pooling")
    if kind not in (None, *POOLINGS):
        raise CheckpointError(
            f"The pooling in the header of {path} must be one of {list(POOLINGS)}; got {kind!r}."
        )
    return kind


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file of an adapter, with the library's errors translated."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"The adapter folder lacks {path.name} ({path}).") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}). Copy it again."
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as partial:
        save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})
