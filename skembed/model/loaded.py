"""A loaded model, and the proof that its attention sees whole texts and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from skembed.exceptions import CausalLeakError, CheckpointError
from skembed.model.checkpoint import load_model
from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_forward import pack_weights
from skembed.model.files import read_steadily
from skembed.model.network import NVEmbedModel, without_autocast
from skembed.model.sources import CONTENT_DIGITS, ModelSource, fingerprint_weights, read_config
from skembed.model.tokenization import TextTokenizer, pack_texts

__all__ = ["LoadedModel", "ModelKey", "load_registered", "load_tokenizer", "prove_bidirectional"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelKey:
    """Identity of a loaded model: two models of equal keys are one."""

    fingerprint: str
    pooling: str
    device: str
    dtype: str  # of weights and activations; "int8+bfloat16" where the two differ
    attention_path: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of activations."""
        dtype: torch.dtype = getattr(torch, self.dtype.rpartition("+")[2])
        return dtype

    @property
    def weight_format(self) -> str | None:
        """Storage format of the weights; None if it is the type of activations."""
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
        """Set `device` from the key."""
        self.device = torch.device(self.key.device)

    @property
    def weight_bytes(self) -> int:
        """Memory of weights and folded matrices, in bytes."""
        return sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers()))


@without_autocast()
def load_registered(key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> LoadedModel:
    """Read, check and fold a model.

    Raises CheckpointError if its files are not, or do not stay, those that the key was made of.
    """
    return read_steadily([source.folder], lambda: _load(key, source, config))


def _load(key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> LoadedModel:
    """Read, check and fold the model that the folder holds now."""
    _check_same(key, source, config)
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
    """Return the tokenizer of a model folder with the ids that config.json names."""
    return TextTokenizer.from_folder(
        folder,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        vocab_size=int(config.backbone["vocab_size"]),
    )


def _check_same(key: ModelKey, source: ModelSource, config: NVEmbedConfig) -> None:
    """Raise CheckpointError if a folder's files were replaced after the key was made of them."""
    found = fingerprint_weights(source)
    same = found[:CONTENT_DIGITS] == key.fingerprint[:CONTENT_DIGITS]
    if not same or read_config(source, config.pooling) != config:
        raise CheckpointError(
            f"The files of the model in {source.folder} were replaced while it was being loaded. "
            "Call again, to load what is there now."
        )


_proven: set[tuple[str, str, torch.dtype, str]] = set()


def prove_bidirectional(model: NVEmbedModel, device: torch.device) -> None:
    """Check once per process that an attention path sees the whole text and nothing else.

    Changing the last token of a text must change its first position, and must not change its
    neighbour. Raises CausalLeakError for a path that is causal or mixes texts.
    """
    dtype = model.embedding_model.norm.weight.dtype
    proof = (model.attention_path, device.type, dtype, transformers.__version__)
    if proof in _proven:
        return
    try:
        for fuse in (True, False):  # one pass for use, the other for training
            model.fuse = fuse
            _prove_pass(model, device, dtype)
    finally:
        model.fuse = True
    _proven.add(proof)


def _prove_pass(model: NVEmbedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Check the forward pass that the model is set to, as `prove_bidirectional` says."""
    vocabulary = int(model.config.backbone["vocab_size"])
    for lengths in ((6,), (6, 6), (9, 4)):
        texts = [(torch.arange(n) * 7 + 11 * k + 5) % vocabulary for k, n in enumerate(lengths)]
        before = _first_positions(model, texts, device)
        if not before.isfinite().all():
            raise CheckpointError(
                f"The model gives NaN or infinite vectors in {dtype}: its weights are damaged, or "
                "too large for this type."
            )
        texts[0] = texts[0].clone()
        texts[0][-1] = (texts[0][-1] + 1) % vocabulary
        moved = (_first_positions(model, texts, device) - before).abs().amax(dim=1)
        noise = 0.02 * before.abs().max()  # rounding in bfloat16
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
    """Return the last hidden state of each text's first token, float32 (B, D)."""
    batch = pack_texts([text.numpy() for text in texts], 0).to(device)
    with torch.inference_mode():
        hidden = model.hidden_states(batch)
    return hidden[batch.cu_seqlens[:-1].long()].float().cpu()
