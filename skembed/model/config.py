"""`NVEmbedConfig`: the checked configuration of a model, from its config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import MistralConfig

from skembed.exceptions import CheckpointError
from skembed.model.attention import ATTENTION_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NVEmbedConfig"]

# What no model comes near. Numbers below are compared with the weights before any is allocated;
# these few decide how many modules are built.
_MAX_SIZES = {"num_hidden_layers": 1_000}
_MAX_SIZE = 2**31 - 1
_MAX_NUMBER = 1e30
_BACKBONE_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_BACKBONE_FIELDS = (
    *_BACKBONE_SIZES,
    *("hidden_act", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"),
)
_LATENT_SIZES = ("num_latents_value", "num_cross_heads", "cross_dim_head", "latent_dim", "ff_mult")
_LATENT_FIELDS = (*_LATENT_SIZES, "output_normalize")


@dataclass(frozen=True)
class NVEmbedConfig:
    """Architecture of a checkpoint: the Mistral backbone, the pooling and its sizes.

    Field names equal those of NV-Embed's config.json, which names no latent sizes: the defaults are
    the published ones.
    """

    backbone: dict[str, Any]  # arguments of `MistralConfig`
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
    pooling_is_fresh: bool = field(default=False, compare=False)  # the checkpoint has no weights

    @property
    def hidden_size(self) -> int:
        """Width of token vectors and embeddings."""
        return int(self.backbone["hidden_size"])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> NVEmbedConfig:
        """Read a config.json of the NV-Embed layout or of a plain Mistral model.

        `source` is for messages. Raises CheckpointError for another kind of model.
        """
        kind = cls.check_kind(config, source)
        if kind == "nvembed":
            text_config = _read_section(config, "text_config", source)
            backbone = _read_backbone(text_config, source)
            latent = _read_section(config, "latent_attention_config", source, default={})
            _check_sizes(latent, _LATENT_SIZES, source)
            bos, eos = _read_token_ids(text_config, source)
            return cls(
                backbone=backbone,
                pooling=_read_plain(config, "pooling", str, "latent", source),
                is_mask_instruction=_read_plain(config, "is_mask_instruction", bool, True, source),
                bos_token_id=bos,
                eos_token_id=eos,
                output_normalize=_read_plain(latent, "output_normalize", bool, True, source),
                **{name: latent[name] for name in _LATENT_SIZES if name in latent},
            )
        backbone = _read_backbone(config, source)
        bos, eos = _read_token_ids(config, source)
        width = int(backbone["hidden_size"])
        return cls(
            backbone=backbone,
            num_latents_value=min(512, max(16, width // 8)),
            cross_dim_head=width,
            latent_dim=width,
            bos_token_id=bos,
            eos_token_id=eos,
            pooling_is_fresh=True,
        )

    @staticmethod
    def check_kind(config: Mapping[str, Any], source: str) -> str:
        """Return "nvembed" or "mistral"; raise CheckpointError for another kind of model."""
        kind = config.get("model_type")
        if kind == "nvembed" or kind == "mistral":
            return str(kind)
        raise CheckpointError(
            f"The config.json of {source} must have model_type 'nvembed' or 'mistral'; got "
            f"{kind!r:.60}. skembed runs the NV-Embed architecture (Mistral backbone) only. A "
            "SentenceTransformer of it serves as the `vectorizer` of any estimator."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json of this model in NV-Embed's layout."""
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
                **{name: getattr(self, name) for name in _LATENT_FIELDS},
            },
            "text_config": {
                "model_type": "bidir_mistral",
                **self.backbone,
                "bos_token_id": self.bos_token_id,
                "eos_token_id": self.eos_token_id,
            },
        }

    def mistral_config(self) -> MistralConfig:
        """Return the backbone's configuration: no causal mask or sliding window, our attention."""
        config = MistralConfig(
            **{**self.backbone, "sliding_window": None, "use_cache": False, "pad_token_id": None}
        )
        config.is_causal = False
        # Set after construction: the constructor argument is private to transformers.
        config._attn_implementation = ATTENTION_NAME
        return config


def _read_section(
    config: Mapping[str, Any],
    name: str,
    source: str,
    *,
    default: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """Return an object inside config.json, or the default if it is absent."""
    section = config.get(name, default)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"The `{name}` in the config.json of {source} must be an object; got "
            f"{type(section).__name__}."
        )
    return section


def _read_plain(config: Mapping[str, Any], name: str, kind: type, default: Any, source: str) -> Any:
    """Return a field of one type; absent or null is the default."""
    value = default if config.get(name) is None else config[name]
    if type(value) is not kind:
        raise CheckpointError(
            f"The `{name}` in the config.json of {source} must be a {kind.__name__}; got "
            f"{value!r:.60}."
        )
    return value


def _check_sizes(values: Mapping[str, Any], names: Sequence[str], source: str) -> None:
    """Refuse sizes that are not positive ints, or absurd, before torch fails on them."""
    for name in names:
        value, most = values.get(name, 1), _MAX_SIZES.get(name, _MAX_SIZE)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"The `{name}` in the config.json of {source} must be an int in [1, {most:,}]; got "
                f"{_show(value)}."
            )


def _check_heads(backbone: Mapping[str, Any], source: str) -> None:
    """Refuse heads of odd width, and groups of them that differ."""
    heads = backbone.get("num_attention_heads", 32)  # of `MistralConfig`, as are the next two
    width = backbone.get("head_dim", backbone["hidden_size"] // heads)
    groups = backbone.get("num_key_value_heads", 8)
    if width < 2 or width % 2 or heads % groups:
        raise CheckpointError(
            f"The config.json of {source} must have heads of an even width (`head_dim`), and "
            "`num_attention_heads` must be a multiple of `num_key_value_heads`; got a width of "
            f"{width}, {heads} and {groups}."
        )


def _show(value: object) -> str:
    """Return a value for an error; a number of thousands of digits has no decimal form."""
    return f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 2**200 else "more"


def _check_numbers(backbone: Mapping[str, Any], source: str) -> None:
    """Refuse a norm's epsilon and rotary settings that are no finite numbers above 0."""
    for name in ("rms_norm_eps", "rope_theta"):
        value = backbone.get(name, 1.0)
        is_number = type(value) in (int, float)
        if not is_number or not 0 < value <= _MAX_NUMBER:
            raise CheckpointError(
                f"The `{name}` in the config.json of {source} must be a finite number above 0; got "
                f"{_show(value)}."
            )
    for name in ("rope_parameters", "rope_scaling"):
        values = backbone.get(name, {})
        numbers = _list_numbers(values) if isinstance(values, dict) else [math.nan]
        if not all(0 <= number <= _MAX_NUMBER for number in numbers):
            raise CheckpointError(
                f"The `{name}` in the config.json of {source} must be an object of finite numbers "
                "from 0 on."
            )


def _list_numbers(values: Mapping[str, Any]) -> list[float]:
    """Return the numbers in an object and in its lists."""
    flat = [x for value in values.values() for x in (value if isinstance(value, list) else [value])]
    return [number for number in flat if isinstance(number, (int, float))]


def _read_token_ids(config: Mapping[str, Any], source: str) -> tuple[int, int]:
    """Return the ids of the begin and end tokens; null is the default, as in transformers."""
    ids = []
    for name, default in (("bos_token_id", 1), ("eos_token_id", 2)):
        value = default if config.get(name) is None else config[name]
        if type(value) is not int or not 0 <= value <= _MAX_SIZE:
            raise CheckpointError(
                f"The `{name}` in the config.json of {source} must be an int from 0 on; got "
                f"{_show(value)}."
            )
        ids.append(value)
    return ids[0], ids[1]


def _read_backbone(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the arguments of `MistralConfig` that change the function computed."""
    backbone = {name: config[name] for name in _BACKBONE_FIELDS if config.get(name) is not None}
    missing = sorted({"vocab_size", "hidden_size", "num_hidden_layers"} - set(backbone))
    if missing:
        raise CheckpointError(f"The config.json of {source} lacks {', '.join(missing)}.")
    _check_sizes(backbone, _BACKBONE_SIZES, source)
    _check_heads(backbone, source)
    _check_numbers(backbone, source)
    return backbone
