"""`NVEmbedConfig`: what config.json says of a model, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import MistralConfig

from skembed.exceptions import CheckpointError
from skembed.model.attention import ATTENTION_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NVEmbedConfig", "NV_EMBED_LATENT_DEFAULTS"]

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
