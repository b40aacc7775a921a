"""One copy of each loaded model per process, and where and how it runs.

Weights are loaded at first use and shared by every estimator that asks for the same model, device
and type. An estimator holds a lease (shared with its clones); a model is freed with the last lease.
In a worker process of joblib, where each task brings an estimator of its own, the two models used
last stay until the worker ends: one load per worker, not one per task.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from skembed._quantized_layers import WEIGHT_FORMATS
from skembed.cache import EmbeddingCache
from skembed.checkpoint import ModelSource, load_model
from skembed.exceptions import CausalLeakError
from skembed.fused import pack_weights
from skembed.model import NVEmbedConfig, NVEmbedModel
from skembed.tokenization import TextTokenizer, pack_texts

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = (*COMPUTE_DTYPES, *WEIGHT_FORMATS)
WORKER_MODELS = 2
LEASE_SETTINGS = 8
StoredModel = tuple[str, str | None, Mapping[str, bytes]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelKey:
    """What makes two loaded models the same one.

    `dtype` is that of weights and activations, or that of weights, a plus sign and that of
    activations: "bfloat16", "int8+bfloat16".
    """

    fingerprint: str
    pooling: str
    device: str
    dtype: str
    attention_path: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of activations."""
        found: torch.dtype = getattr(torch, self.dtype.rpartition("+")[2])
        return found

    @property
    def weight_format(self) -> str | None:
        """How weights are stored, where it is not the type of activations."""
        return self.dtype.rpartition("+")[0] or None


@dataclass(eq=False)
class LoadedModel:
    """A model ready to embed: weights, tokenizer, and the key it is registered under."""

    key: ModelKey
    config: NVEmbedConfig
    model: NVEmbedModel
    tokenizer: TextTokenizer
    base: LoadedModel | None = None  # what an adapter's view runs on
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        """Note where the weights are."""
        self.device = torch.device(self.key.device)

    @property
    def weight_bytes(self) -> int:
        """Memory of weights and folded matrices, in bytes."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.nbytes for tensor in tensors)


class Lease:
    """What an estimator and its clones share, left out of pickles: models, cache and settings.

    One that was unpickled, maybe on another machine, says so; `stored` holds the `model`,
    `revision` and files of the model that came with it.
    """

    def __init__(self, stored: StoredModel | None = None, *, from_pickle: bool = False) -> None:
        self.models: dict[ModelKey, LoadedModel] = {}
        self.cache: EmbeddingCache | None = None  # stays open until another one is used
        self.adapter: tuple[tuple[Any, ...], Any] = ((), None)
        self.from_pickle = from_pickle
        self._stored = stored
        self._settings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._guard = threading.Lock()

    def hold(self, *models: LoadedModel) -> None:
        """Keep these models, one on each device, and no other."""
        if any(self.models.get(model.key) is not model for model in models):
            self.models = {model.key: model for model in models}

    def hold_adapter(self, key: tuple[Any, ...], read: Callable[[], _T]) -> _T:
        """Return the adapter of this key, read if it is not the one held."""
        with self._guard:
            if self.adapter[0] != key:
                self.adapter = (key, read())
            adapter: _T = self.adapter[1]
            return adapter

    def recall(self, key: tuple[Any, ...] | None) -> Any:
        """Return what was remembered under a key; None for nothing."""
        with self._guard:
            settings = None if key is None else self._settings.get(key)
            if settings is not None:
                self._settings.move_to_end(key)  # type: ignore[arg-type]
            return settings

    def remember(self, key: tuple[Any, ...] | None, settings: Any) -> None:
        """Remember settings under a key, beside those of the last few others."""
        if key is None:
            return
        with self._guard:
            self._settings[key] = settings
            self._settings.move_to_end(key)
            while len(self._settings) > LEASE_SETTINGS:
                self._settings.popitem(last=False)

    def find_files(self, model: str, revision: str | None) -> Mapping[str, bytes] | None:
        """Return the model's files from the pickle; None where another model is asked for."""
        if self._stored is None or self._stored[:2] != (model, revision):
            return None
        return self._stored[2]


class ModelRegistry:
    """Loaded models of this process; safe under threads."""

    def __init__(self) -> None:
        self.n_loads = 0  # how often weights were read since the process began
        self._models: weakref.WeakValueDictionary[ModelKey, LoadedModel]
        self._models = weakref.WeakValueDictionary()
        self._in_worker: OrderedDict[ModelKey, LoadedModel] = OrderedDict()
        self._guard = threading.Lock()
        self._loading: dict[ModelKey, threading.Lock] = {}

    def __len__(self) -> int:
        """Number of models alive."""
        return len(self._models)

    def get(self, key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> LoadedModel:
        """The model of this key, loaded if no one holds it; one thread loads, others wait."""
        with self._guard:
            lock = self._loading.setdefault(key, threading.Lock())
        with lock:
            loaded = self._models.get(key)
            if loaded is None:
                loaded = _load(key, source, config)
                self.n_loads += 1
                self._models[key] = loaded
            if multiprocessing.parent_process() is not None:
                self.keep(loaded)
            return loaded

    def keep(self, loaded: LoadedModel) -> None:
        """Hold a model for as long as this process lives, or until `WORKER_MODELS` came after it.

        For worker processes, where each task brings an estimator of its own.
        """
        loaded = loaded.base or loaded
        with self._guard:
            self._in_worker[loaded.key] = loaded
            self._in_worker.move_to_end(loaded.key)
            while len(self._in_worker) > WORKER_MODELS:
                self._in_worker.popitem(last=False)


registry = ModelRegistry()


def _load(key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> LoadedModel:
    """Read, check and fold a model."""
    device = torch.device(key.device)
    tokenizer = load_tokenizer(source.folder, config)
    model = load_model(
        source,
        config,
        device=device,
        dtype=key.compute_dtype,
        attention_path=key.attention_path,
        weight_format=key.weight_format,
    )
    if device.type == "cpu":
        model.use_lean_modules()
    prove_bidirectional(model, device)
    model.fold_pooling()
    pack_weights(model)
    logger.info("loaded %s: %s", source.name, key)
    return LoadedModel(key, config, model, tokenizer)


def load_tokenizer(folder: Path, config: NVEmbedConfig) -> TextTokenizer:
    """The tokenizer of a model folder with the ids that config.json names."""
    return TextTokenizer.from_folder(
        folder, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )


def resolve_device(device: str) -> torch.device:
    """The torch device of a `device` parameter; "auto" takes CUDA, then MPS, then the CPU.

    Raises ValueError for an unknown name, or a device that is not available on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    owner = "The `device` parameter of `NVEmbedVectorizer`"
    allowed = "'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner} must be {allowed}; got {device!r}.") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{owner} must be {allowed}; got {device!r}.")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(
                f"{owner} is {device!r}, but torch sees {count} CUDA devices here. Pass "
                "device='auto' or 'cpu'."
            )
        # Without a number the current one: under torchrun each process has its own.
        index = torch.cuda.current_device() if found.index is None else found.index
        return torch.device("cuda", index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{owner} is 'mps', which this machine has not. Pass device='auto'.")
    return torch.device(found.type)


def resolve_devices(device: str | Sequence[str]) -> list[torch.device]:
    """The torch devices of a `device` parameter: one, or each of a list of one kind.

    Raises ValueError as `resolve_device`, and for a list that is empty, mixes kinds, says "auto",
    or names a GPU twice.
    """
    if isinstance(device, str):
        return [resolve_device(device)]
    rule = "The `device` parameter of `NVEmbedVectorizer` must, as a list, "
    if not device:
        raise ValueError(f"{rule}name at least one device, such as ['cuda:0', 'cuda:1']; got [].")
    if "auto" in device:
        raise ValueError(
            f"{rule}name each device, such as ['cuda:0', 'cuda:1']; got {list(device)!r}."
        )
    found = [resolve_device(name) for name in device]
    if len({one.type for one in found}) > 1:
        raise ValueError(f"{rule}name devices of one kind; got {list(device)!r}.")
    if found[0].type != "cpu" and len(set(found)) < len(found):
        raise ValueError(
            f"{rule}name each GPU once: a second copy of the model on it brings nothing; got "
            f"{list(device)!r}."
        )
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type activations are held in, and weights unless quantised; "auto" asks the device.

    bfloat16 where it is native (CUDA from compute capability 8.0, CPUs with AVX512-BF16, AMX or
    Arm's BF16 instructions), else float32. "int8" and "nf4", which are there to save memory, take
    float16 on older CUDA devices. Raises ValueError where a device has no kernels for the type.
    """
    if dtype in COMPUTE_DTYPES:
        found: torch.dtype = getattr(torch, dtype)
        return found
    if dtype == "nf4" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            "The `dtype` parameter of `NVEmbedVectorizer` is 'nf4', which runs on 'cuda' and "
            f"'cpu'; got device {str(device)!r}. Pass dtype='int8', which runs everywhere."
        )
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if not native and dtype != "auto":
            return torch.float16
    else:
        native = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def name_dtype(dtype: str, compute_dtype: torch.dtype) -> str:
    """The `dtype` of a `ModelKey` for a `dtype` parameter: "bfloat16", or "int8+bfloat16".

    >>> from skembed.registry import name_dtype
    >>> name_dtype("auto", torch.float32), name_dtype("int8", torch.bfloat16)
    ('float32', 'int8+bfloat16')
    """
    computed = str(compute_dtype).removeprefix("torch.")
    return f"{dtype}+{computed}" if dtype in WEIGHT_FORMATS else computed


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices natively."""
    wanted = {"avx512_bf16", "amx_bf16", "sve_bf16", "bf16"}
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return any(ask().get(name, False) for name in wanted)
    try:  # older torch, on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(wanted & set(flags.split()))


def choose_attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """The attention path without padding that a device has, else "padded"."""
    if device.type == "cpu":
        return "grouped"
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return "padded"
        if "scale" in inspect.signature(varlen_attn).parameters:
            return "varlen"
    return "padded"


_proven: set[tuple[str, str, torch.dtype, str]] = set()


def prove_bidirectional(model: NVEmbedModel, device: torch.device) -> None:
    """Check once per process that an attention path sees the whole text and nothing else.

    For one text, two of equal length, and texts of different lengths: changing the last token of a
    text must change its first position, and must not change its neighbour. Raises CausalLeakError
    for a path that is causal, or mixes texts.
    """
    dtype = next(model.embedding_model.parameters()).dtype
    proof = (model.attention_path, device.type, dtype, transformers.__version__)
    if proof in _proven:
        return
    try:
        for model.fuse in (True, False):  # one pass for use, the other for training
            _prove_pass(model, device)
    finally:
        model.fuse = True
    _proven.add(proof)


def _prove_pass(model: NVEmbedModel, device: torch.device) -> None:
    """What `prove_bidirectional` says, for the forward pass that the model is set to."""
    dtype = next(model.embedding_model.parameters()).dtype
    vocabulary = int(model.config.backbone["vocab_size"])
    for lengths in ((6,), (6, 6), (9, 4)):
        texts = [(torch.arange(n) * 7 + 11 * k + 5) % vocabulary for k, n in enumerate(lengths)]
        before = _first_positions(model, texts, device)
        texts[0] = texts[0].clone()
        texts[0][-1] = (texts[0][-1] + 1) % vocabulary
        moved = (_first_positions(model, texts, device) - before).abs().amax(dim=1)
        noise = 0.02 * before.abs().max()  # of rounding in bfloat16; the neighbour's moves by 0
        if not moved[0] > 0 or (moved[1:] > noise).any():
            fault = "mixes neighbouring texts" if moved[0] > 0 else "is causal"
            raise CausalLeakError(
                f"The attention path {model.attention_path!r} on {device} in {dtype} {fault} with "
                f"transformers {transformers.__version__} and torch {torch.__version__} (texts of "
                f"{lengths} tokens). Embeddings would be wrong; install another release of either."
            )


def _first_positions(
    model: NVEmbedModel, texts: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Last hidden state of each text's first token, float32 (B, D)."""
    batch = pack_texts([text.numpy() for text in texts], 0).to(device)
    with torch.inference_mode():
        hidden = model.hidden_states(batch)
    return hidden[batch.cu_seqlens[:-1].long()].float().cpu()
