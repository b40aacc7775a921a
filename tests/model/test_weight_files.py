"""Safetensors files that say something else than they should: types, names, numbers, sizes."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, embed, load, rewrite, rewrite_config, shard
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from skembed.exceptions import CheckpointError
from skembed.model import loaded
from skembed.model.loaded import ModelKey
from skembed.model.sources import (
    INDEX_FILE,
    WEIGHTS_FILE,
    fingerprint_weights,
    read_config,
    resolve_source,
)
from skembed.model.weight_files import check_finite, read_header

NAME = "embedding_model.layers.0.mlp.up_proj.weight"
LATENTS = "latent_attention_model.latents"
OTHER_DTYPES = [
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and str(dtype).removeprefix("torch.").startswith(("float8_e4m3fn", "float8_e5m2", "float64"))
] + [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", sorted(set(OTHER_DTYPES), key=str), ids=str)
@pytest.mark.parametrize("name", [NAME, LATENTS])
def test_other_types_are_refused_by_name(name: str, dtype: torch.dtype, folder: Path) -> None:
    try:
        rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    except (KeyError, ValueError):
        pytest.skip("safetensors does not write this type")
    with pytest.raises(CheckpointError, match=f"The tensor {name} of .* must be float32, float16"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, -1])
def test_weights_that_are_no_numbers(
    value: float, stored: torch.dtype, place: int, folder: Path
) -> None:
    for name in (NAME, LATENTS, "embedding_model.norm.weight"):

        def spoil(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name] = tensors[name].to(stored)
            tensors[name].view(-1)[place] = value

        def repair(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name] = torch.ones_like(tensors[name])

        rewrite(folder, spoil)
        with pytest.raises(CheckpointError, match=f"The tensor {name} .* NaN or infinite"):
            load(folder)
        rewrite(folder, repair)


def test_both_infinities_do_not_hide_each_other() -> None:
    tensor = torch.tensor([float("inf"), float("-inf"), 1.0])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        check_finite(tensor, "t", Path("f"))
    check_finite(torch.full((10,), 3e38), "t", Path("f"))  # its sum overflows


def test_a_type_too_small_for_the_weights_is_named(folder: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[NAME] = tensors[NAME].clone().fill_(1e5)

    rewrite(folder, enlarge)
    with pytest.raises(CheckpointError, match=r"above the range of torch\.float16.*bfloat16"):
        load(folder, dtype="float16")


def test_two_names_of_one_tensor(folder: Path) -> None:
    bare = NAME.removeprefix("embedding_model.")
    content = (folder / WEIGHTS_FILE).read_bytes()
    for twin in (bare, f"model.{bare}"):
        rewrite(folder, lambda tensors, twin=twin: tensors.update({twin: tensors[NAME] * 2}))
        with pytest.raises(CheckpointError, match=f"{NAME} is there twice"):
            load(folder)
        (folder / WEIGHTS_FILE).write_bytes(content)
    assert np.array_equal(embed(folder), embed(GOLDEN))


def test_one_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(path)
        if NAME not in tensors:
            save_file({**tensors, NAME: torch.zeros(96, 48)}, path)
            break
    with pytest.raises(
        CheckpointError, match=f"{NAME} is there twice.*shard|{NAME} is there twice"
    ):
        load(folder)


def test_one_name_twice_in_a_header(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    entry = json.dumps({NAME: json.loads(header)[NAME]})[1:-1].encode()
    doubled = header[:-1] + b"," + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(doubled)) + doubled + content[8 + size :])
    with pytest.raises(CheckpointError, match="twice"):
        load(folder)


def test_an_index_that_names_the_wrong_shard(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    right = index["weight_map"][NAME]
    index["weight_map"][NAME] = next(n for n in index["weight_map"].values() if n != right)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"names {NAME} in .*, which lacks it"):
        load(folder)


@pytest.mark.parametrize("value", [3, None, ["a"], {"a": 1}, True])
def test_an_index_of_other_values(value: Any, folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][NAME] = value
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json must be the name of a file"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": "wide", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"__metadata__": 3}',
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_headers_of_other_forms(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        read_header(path)


def test_nothing_is_allocated_for_a_size_that_is_only_claimed(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    for size in (17 * 1024**2, 10**9, 2**63):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(CheckpointError, match="header would have"):
            read_header(path)


# Numbers in config.json


def change(folder: Path, section: str, name: str, value: Any) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if section == "top":
        rewrite_config(folder, **{name: value})
    else:
        rewrite_config(folder, **{section: {**values[section], name: value}})


TEXT, LATENT = "text_config", "latent_attention_config"
ABSURD = [0, -1, 10**6, 10**12, 10**40, 1.5, True, "8", [8], float("nan")]
SIZES = [
    *((TEXT, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size", "head_dim")),
    *((TEXT, name) for name in ("intermediate_size", "num_attention_heads")),
    *((TEXT, name) for name in ("num_key_value_heads",)),
    *((LATENT, name) for name in ("num_latents_value", "num_cross_heads", "cross_dim_head")),
    *((LATENT, name) for name in ("latent_dim", "ff_mult")),
]


@pytest.mark.parametrize("value", ABSURD, ids=str)
@pytest.mark.parametrize(("section", "name"), SIZES)
def test_absurd_sizes(section: str, name: str, value: Any, folder: Path) -> None:
    change(folder, section, name, value)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)
    if section == LATENT and name != "latent_dim":  # no weights of it are compared
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(folder, pooling="multilayer")


@pytest.mark.parametrize(
    "value", [0, 0.0, -1e-5, float("nan"), float("inf"), 10**400, "1e-5", True, [1e-5]], ids=str
)
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_numbers_of_norms_and_rotation(name: str, value: Any, folder: Path) -> None:
    change(folder, TEXT, name, value)
    with pytest.raises(CheckpointError, match=f"`{name}` in the config.json of .*above 0"):
        load(folder)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "value",
    [
        [1],
        "linear",
        {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear", "factor": -2.0},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": 10**400},
        {"rope_type": "nonsense", "factor": 2.0},
        {"rope_type": ["linear"], "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [float("inf")], "long_factor": [1.0]},
        {"rope_type": "default", "rope_theta": float("nan")},
        {"rope_type": "default", "rope_theta": -1.0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # transformers warns about what it repairs
def test_rotary_settings(name: str, value: Any, folder: Path) -> None:
    change(folder, TEXT, name, value)
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("top", "model_type", ["nvembed"]),
        ("top", "pooling", ["mean"]),
        ("top", "pooling", 3),
        ("top", "is_mask_instruction", "no"),
        ("top", "text_config", "mistral"),
        (LATENT, "output_normalize", 1),
        (TEXT, "hidden_act", ["silu"]),
        (TEXT, "hidden_act", "no such"),
        (TEXT, "bos_token_id", [1]),
        (TEXT, "eos_token_id", 10**40),
        (TEXT, "eos_token_id", 511 + 1),
    ],
)
def test_other_fields_of_another_type(section: str, name: str, value: Any, folder: Path) -> None:
    change(folder, section, name, value)
    with pytest.raises(CheckpointError):
        embed(folder)


# Weights that do not stay


def key_of(folder: Path) -> tuple[ModelKey, Any, Any]:
    source = resolve_source(folder)
    config = read_config(source)
    return (
        ModelKey(fingerprint_weights(source), config.pooling, "cpu", "float32", "grouped"),
        source,
        config,
    )


def negate(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: -value for name, value in tensors.items() if value.ndim == 2})


@pytest.mark.parametrize(
    "replace",
    [
        lambda folder: rewrite(folder, negate),
        lambda folder: change(folder, TEXT, "rope_theta", 50.0),
    ],
    ids=["weights", "config"],
)
def test_a_model_replaced_before_it_is_loaded(
    replace: Callable[[Path], None], folder: Path
) -> None:
    key, source, config = key_of(folder)
    replace(folder)
    with pytest.raises(CheckpointError, match="were replaced while it was being loaded"):
        loaded.load_registered(key, source, config)


def test_weights_replaced_while_they_load_give_no_mixture(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few tensors another model takes the place; the next call has it whole."""
    from skembed.model.weight_files import WeightFiles

    other = load_file(fresh_dir / WEIGHTS_FILE)
    negate(other)
    read, count = WeightFiles.read, iter(range(10**6))

    def interrupted(self: WeightFiles, name: str) -> Tensor:
        if next(count) == 5:
            save_file(other, fresh_dir / "new")
            (fresh_dir / "new").replace(fresh_dir / WEIGHTS_FILE)
        return read(self, name)

    monkeypatch.setattr(WeightFiles, "read", interrupted)
    with pytest.raises(CheckpointError, match="changed while|were replaced"):
        embed(fresh_dir)
    monkeypatch.undo()
    expected = embed(fresh_dir)
    save_file(other, fresh_dir / WEIGHTS_FILE)
    assert np.array_equal(embed(fresh_dir), expected)
    assert not np.array_equal(embed(GOLDEN), expected)
    assert len(TEXTS) == len(expected)
