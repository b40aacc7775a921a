"""Configuration, bidirectional Mistral and the embedding model.

The backbone is transformers' own `MistralModel`, unchanged. Two things make it bidirectional and
free of padding, both through transformers' public registries:

- an attention function that never applies a causal mask or a sliding window, and
- packed input: all texts of a batch stand one after the other in one row, positions restart at 0
  with each text, and the attention function alone knows where a text begins and ends.

So every linear layer and norm sees real tokens only, on each of the three attention paths:

========= =================================================================================
path      attention of packed texts
========= =================================================================================
grouped   texts of equal length side by side, one scaled-dot-product call per length: nothing
          is padded (CPU); without gradients `fused` runs the whole pass
varlen    torch's variable-length attention on cumulative lengths: nothing is padded (CUDA)
padded    queries, keys and values padded to the longest text, with a key mask, inside the
          attention function only (any device; the fallback)
========= =================================================================================

Sources: arXiv 2405.17428, section 3.1; facts of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig, MistralModel

from skembed.exceptions import CheckpointError
from skembed.fused import can_fuse, run_backbone
from skembed.lean import LONGEST_PRODUCT, GatedSiluFunction, ProductAttention, RMSNormFunction
from skembed.pooling import (
    EosPooling,
    FoldedLatentAttention,
    LatentAttention,
    MeanPooling,
    MultiLayerPooling,
)
from skembed.tokenization import PackedBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ATTENTION_NAME = "skembed"
ATTENTION_PATHS = ("grouped", "varlen", "padded")
# NV-Embed's config.json names no latent sizes; these are the published defaults.
NV_EMBED_LATENT_DEFAULTS = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "output_normalize": True,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "cross_dim_head": 4096,
}


@dataclass(frozen=True)
class NVEmbedConfig:
    """What a checkpoint is: the Mistral backbone, the pooling and its sizes.

    Field names equal those of NV-Embed's config.json. `backbone` holds the arguments of
    `MistralConfig`; `pooling_is_fresh` says that the checkpoint has no pooling weights.
    """

    backbone: dict[str, Any]
    pooling: str = "latent"
    num_latents_value: int = 512
    num_cross_heads: int = 8
    cross_dim_head: int = 4096
    latent_dim: int = 4096
    ff_mult: int = 4
    output_normalize: bool = True
    is_mask_instruction: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 2
    pooling_is_fresh: bool = field(default=False, compare=False)

    @property
    def hidden_size(self) -> int:
        """Width of token vectors and embeddings."""
        return int(self.backbone["hidden_size"])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> NVEmbedConfig:
        """Read a config.json of the NV-Embed layout or of a plain Mistral model.

        Parameters
        ----------
        config : mapping
            The parsed file.
        source : str
            Where it was read, for messages.

        Raises
        ------
        CheckpointError
            When it describes another kind of model.
        """
        kind = config.get("model_type")
        if kind == "nvembed":
            backbone = _read_backbone(_read_section(config, "text_config", source), source)
            latent = {
                **NV_EMBED_LATENT_DEFAULTS,
                **_read_section(config, "latent_attention_config", source, default={}),
            }
            _check_sizes(latent, _LATENT_SIZES, source)
            return cls(
                backbone=backbone,
                pooling=config.get("pooling", "latent"),
                is_mask_instruction=bool(config.get("is_mask_instruction", True)),
                ff_mult=int(latent.get("ff_mult", 4)),
                bos_token_id=_read_token_id(config["text_config"], "bos_token_id", 1, source),
                eos_token_id=_read_token_id(config["text_config"], "eos_token_id", 2, source),
                **{
                    name: latent[name]
                    for name in (
                        "num_latents_value",
                        "num_cross_heads",
                        "cross_dim_head",
                        "latent_dim",
                        "output_normalize",
                    )
                },
            )
        if kind == "mistral":
            backbone = _read_backbone(config, source)
            width = int(backbone["hidden_size"])
            return cls(
                backbone=backbone,
                num_latents_value=min(512, max(16, width // 8)),
                cross_dim_head=width,
                latent_dim=width,
                bos_token_id=_read_token_id(config, "bos_token_id", 1, source),
                eos_token_id=_read_token_id(config, "eos_token_id", 2, source),
                pooling_is_fresh=True,
            )
        raise CheckpointError(
            f"The config.json of {source} must have model_type 'nvembed' or 'mistral'; got "
            f"{kind!r}. skembed runs the NV-Embed architecture (Mistral backbone) only."
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model in NV-Embed's layout."""
        values = asdict(self)
        latent_names = (
            "num_latents_value",
            "num_cross_heads",
            "cross_dim_head",
            "latent_dim",
            "ff_mult",
            "output_normalize",
        )
        latent = {name: values[name] for name in latent_names}
        return {
            "model_type": "nvembed",
            "architectures": ["NVEmbedModel"],
            "hidden_size": self.hidden_size,
            "padding_side": "right",
            "add_eos": True,
            "mask_type": "b",
            "is_mask_instruction": self.is_mask_instruction,
            "pooling": self.pooling,
            "latent_attention_config": {
                "model_type": "latent_attention",
                "hidden_dim": self.hidden_size,
                **latent,
            },
            "text_config": {
                "model_type": "bidir_mistral",
                **self.backbone,
                "bos_token_id": self.bos_token_id,
                "eos_token_id": self.eos_token_id,
            },
        }

    def mistral_config(self) -> MistralConfig:
        """Configuration of the backbone: no causal mask, no sliding window, our attention."""
        config = MistralConfig(
            **{**self.backbone, "sliding_window": None, "use_cache": False, "pad_token_id": None}
        )
        config.is_causal = False
        # Set after construction: the constructor argument is private to transformers.
        config._attn_implementation = ATTENTION_NAME
        return config


_BACKBONE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
)


_BACKBONE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_LATENT_SIZES = ("num_latents_value", "num_cross_heads", "cross_dim_head", "latent_dim", "ff_mult")


def _read_section(
    config: Mapping[str, Any],
    name: str,
    source: str,
    *,
    default: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """An object inside config.json; where it is absent, the default if there is one."""
    section = config.get(name, default)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"The `{name}` in the config.json of {source} must be an object; got "
            f"{type(section).__name__}."
        )
    return section


def _check_sizes(values: Mapping[str, Any], names: Sequence[str], source: str) -> None:
    """Refuse sizes that are no positive ints, before torch stumbles over them."""
    for name in names:
        value = values.get(name, 1)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"The `{name}` in the config.json of {source} must be an int above 0; got "
                f"{value!r}."
            )


def _read_token_id(config: Mapping[str, Any], name: str, default: int, source: str) -> int:
    """The id of a special token; null stands for the default, as in transformers."""
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"The `{name}` in the config.json of {source} must be an int from 0 on; got {value!r}."
        )
    return value


def _read_backbone(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arguments of `MistralConfig` that change the function computed."""
    kept = {name: config[name] for name in _BACKBONE_FIELDS if config.get(name) is not None}
    missing = sorted({"vocab_size", "hidden_size", "num_hidden_layers"} - set(kept))
    if missing:
        raise CheckpointError(f"The config.json of {source} lacks {', '.join(missing)}.")
    _check_sizes(kept, _BACKBONE_SIZES, source)
    return kept


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packed: PackedBatch,
    path: str,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each text of a pack: (1, H, T, d_h) -> (1, T, H, d_h).

    The keywords that transformers passes and this function has no use for (sliding window,
    position ids, cache) end in `_`.
    """
    attend = {"grouped": _grouped, "varlen": _varlen, "padded": _padded}[path]
    return attend(query[0], key[0], value[0], packed, scaling, dropout).unsqueeze(0), None


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """(H, T, d_h) -> (T, H, d_h), one call for each run of texts of equal length."""
    if q.device.type == "cpu" and q.requires_grad and max(packed.lengths) <= LONGEST_PRODUCT:
        attended: Tensor = ProductAttention.apply(q, k, v, packed.lengths, scaling)
        return attended
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not q.requires_grad:
        return _grouped_on_tiles(q, k, v, packed, scaling)
    heads, _, width = q.shape
    groups = heads // k.shape[0]
    if groups > 1:  # explicit: the CPU kernel takes equal head counts only
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    runs = _runs(packed.lengths)
    sizes = [length * count for length, count in runs]
    # `split`, not slices: the backward of a slice writes a whole zero tensor for each run.
    pieces = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
    parts = []
    for (length, count), piece in zip(runs, pieces, strict=True):
        q_run, k_run, v_run = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
        out = F.scaled_dot_product_attention(
            q_run, k_run, v_run, dropout_p=dropout, scale=scaling
        )  # (count, H, length, d_h)
        parts.append(out.transpose(1, 2).reshape(length * count, heads, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _grouped_on_tiles(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float
) -> Tensor:
    """As `_grouped`, each run padded to a multiple of 16 positions with masked keys.

    The processor's bfloat16 matrix units work on tiles of 16 rows; off the tiles the attention
    kernel takes up to twice as long.
    """
    heads, _, width = q.shape
    runs = _runs(packed.lengths)
    sizes = [length * count for length, count in runs]
    out = q.new_empty(q.shape[1], heads, width)
    pieces = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), out.split(sizes), strict=True)
    for (length, count), (*piece, target) in zip(runs, pieces, strict=True):
        filling = -length % 16
        q_run, k_run, v_run = (
            F.pad(x.unflatten(1, (count, length)).transpose(0, 1), (0, 0, 0, filling))
            for x in piece
        )  # (count, H, length + filling, d_h)
        mask = None
        if filling:
            mask = q.new_zeros(1, 1, 1, length + filling)
            mask[..., length:] = float("-inf")
        attended = F.scaled_dot_product_attention(
            q_run, k_run, v_run, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        target.view(count, length, heads, width).copy_(attended[:, :, :length].transpose(1, 2))
    return out


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of equal neighbours: [5, 5, 3] -> [(5, 2), (3, 1)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """(H, T, d_h) -> (T, H, d_h) by torch's variable-length attention (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))  # (T, H, d_h)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    longest = max(packed.lengths)
    cu_seqlens = packed.cu_seqlens
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling)
    return out


def _padded(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scaling: float, dropout: float
) -> Tensor:
    """(H, T, d_h) -> (T, H, d_h) by padding to the longest text, with a key mask."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    lengths = (packed.cu_seqlens[1:] - packed.cu_seqlens[:-1]).long()
    mask = torch.arange(max(packed.lengths), device=q.device) < lengths.unsqueeze(1)  # (B, L)

    def pad(x: Tensor) -> Tensor:  # (H, T, d_h) -> (B, H, L, d_h)
        out = x.new_zeros(*mask.shape, x.shape[0], x.shape[2])
        out[mask] = x.transpose(0, 1)
        return out.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), attn_mask=mask[:, None, None, :], dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2)[mask]


def _no_mask(*_: Any, **__: Any) -> None:
    """Mask of the packed attention: none; the attention function knows the texts' borders."""


AttentionInterface.register(ATTENTION_NAME, _packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


class LeanRMSNorm(nn.Module):
    """RMSNorm in two passes over the data, for CPUs, where stock RMSNorm takes six.

    The mean of squares is taken in float32 as in the stock module; in bfloat16 the scale of a row
    is rounded once more. Shares the stock module's weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed: Tensor = RMSNormFunction.apply(hidden_states, self.weight, self.eps)
        return normed


class LeanActivation(nn.Module):
    """The stock MLP's activation, fused with the product with the other branch.

    On CPUs writing into newly allocated memory costs more than the arithmetic on it. The stock
    MLP's own forward stays; it multiplies what this returns.
    """

    def __init__(self, stock: nn.Module, *, is_silu: bool = False) -> None:
        super().__init__()
        self.stock = stock
        self.is_silu = is_silu

    def forward(self, gate: Tensor) -> Any:
        """(..., I) -> a factor to multiply with the other branch, or the plain activation."""
        if gate.requires_grad:
            return _GatedFactor(gate) if self.is_silu else self.stock(gate)
        return _InPlaceFactor(self.stock(gate))


class _InPlaceFactor:
    """A tensor that may be overwritten by its product."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __mul__(self, other: Tensor) -> Tensor:
        if other.requires_grad:
            return self.tensor * other
        return self.tensor.mul_(other)

    __rmul__ = __mul__


class _GatedFactor:
    """A gate whose product with the other branch keeps its inputs only."""

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def __mul__(self, other: Tensor) -> Tensor:
        product: Tensor = GatedSiluFunction.apply(self.gate, other)
        return product

    __rmul__ = __mul__


def build_pooling(config: NVEmbedConfig) -> nn.Module:
    """The pooling module of a configuration, with fresh weights."""
    sizes = {
        "num_latents": config.num_latents_value,
        "num_heads": config.num_cross_heads,
        "dim_head": config.cross_dim_head,
        "ff_mult": config.ff_mult,
    }
    if config.pooling == "latent":
        return LatentAttention(config.hidden_size, latent_dim=config.latent_dim, **sizes)
    if config.pooling == "multilayer":
        layers = int(config.backbone["num_hidden_layers"])
        return MultiLayerPooling(config.hidden_size, num_layers=layers, **sizes)
    return MeanPooling() if config.pooling == "mean" else EosPooling()


class NVEmbedModel(nn.Module):
    """Token ids of packed texts -> one raw vector per text (not yet normalised).

    `embedding_model` is transformers' `MistralModel`, `latent_attention_model` the pooling;
    both names are those of the published checkpoints.

    Parameters
    ----------
    config : NVEmbedConfig
        The architecture.
    attention_path : {"grouped", "varlen", "padded"}
        How packed texts attend; see the module's table.
    """

    def __init__(self, config: NVEmbedConfig, *, attention_path: str = "grouped") -> None:
        super().__init__()
        self.config = config
        self.attention_path = attention_path
        self.embedding_model = MistralModel(config.mistral_config())
        self.fuse = True  # False: transformers' own forward pass on the CPU, too
        self.is_silu = self.embedding_model.config.hidden_act in ("silu", "swish")
        self.latent_attention_model = build_pooling(config)

    def hidden_states(
        self, batch: PackedBatch, *, all_layers: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Last hidden states (T, D) of a pack, or those of every layer, in a tuple."""
        if self.runs_fused:
            results = run_backbone(self.embedding_model, batch, all_layers=all_layers)
            return tuple(results) if all_layers else results[-1]
        output = self.embedding_model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            output_hidden_states=all_layers,
            packed=batch,
            path=self.attention_path,
        )
        if all_layers:  # the first entry is the word vectors, which the paper leaves out
            return tuple(hidden[0] for hidden in output.hidden_states[1:])
        return output.last_hidden_state[0]

    @property
    def runs_fused(self) -> bool:
        """Whether a pass would be the fused one; while gradients are recorded it is not."""
        ours = self.embedding_model.config._attn_implementation == ATTENTION_NAME
        known = self.fuse and ours and self.attention_path == "grouped" and self.is_silu
        return known and can_fuse(self.embedding_model.norm.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw vectors, float32 (B, D), of a pack of B texts."""
        if self.config.pooling == "multilayer":
            layers = self.hidden_states(batch, all_layers=True)
            hidden: Any = [layer[batch.pool_index] for layer in layers]
        else:
            hidden = self.hidden_states(batch)[batch.pool_index]  # (P, D)
        return self.latent_attention_model(hidden, batch.pool_segments, batch.pool_counts)

    def use_lean_modules(self) -> None:
        """Replace the backbone's RMSNorms and activations by lean ones on the same weights."""
        eps = self.embedding_model.config.rms_norm_eps
        stock = type(self.embedding_model.norm)
        for name, module in list(self.embedding_model.named_modules()):
            if isinstance(module, stock):
                self.embedding_model.set_submodule(name, LeanRMSNorm(module.weight, eps))
        for k in range(len(self.embedding_model.layers)):
            mlp = self.embedding_model.get_submodule(f"layers.{k}.mlp")
            mlp.act_fn = LeanActivation(mlp.get_submodule("act_fn"), is_silu=self.is_silu)

    def fold_pooling(self) -> None:
        """Replace a latent layer by its inference form; other poolings stay."""
        if isinstance(self.latent_attention_model, LatentAttention):
            self.latent_attention_model = FoldedLatentAttention(self.latent_attention_model)
