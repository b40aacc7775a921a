"""Folders of sentence-transformers: causal models, poolings, other kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoints import TEXTS, embed, rewrite_config
from paths import GOLDEN, copy_checkpoint
from safetensors.torch import load_file, save_file

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError, FreshPoolingWarning, ModelNotFoundError
from skembed.model.modules import CAUSAL_MODELS

WORDS = "causal Mistral embedder"


def make_mistral(folder: Path, **changes: Any) -> Path:
    """Write a plain Mistral of the tiny checkpoint's backbone."""
    copy_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "model_type": "mistral", "_name_or_path": "tiny"}
    (folder / "config.json").write_text(json.dumps({**text, **changes}))
    tensors = load_file(folder / "model.safetensors")
    own = {k: v for k, v in tensors.items() if k.startswith("embedding_model.")}
    save_file(own, folder / "model.safetensors")
    return folder


def write_pooling(folder: Path, values: dict[str, Any], *, modules: bool = True) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for kind, path in kinds.items()
    ]
    if modules:
        (folder / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
        {"pooling_mode": "lasttoken"},
        {"pooling_mode": ["mean", "lasttoken"]},
        {"pooling_mode_weightedmean_tokens": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("modules", [True, False])
def test_pooling_of_the_last_token(modules: bool, pooling: dict[str, Any], tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "plain")
    write_pooling(folder, pooling, modules=modules)
    for parameters in ({}, {"pooling": "mean"}):
        with pytest.raises(CheckpointError, match=f"(?s){folder}.*{WORDS}.*SentenceTransformer"):
            embed(folder, **parameters)


@pytest.mark.parametrize("field", [{"is_causal": True}, {"use_bidirectional_attention": False}])
@pytest.mark.parametrize("kind", ["mistral", "nvembed"])
def test_a_config_that_says_so(kind: str, field: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    copy_checkpoint(folder) if kind == "nvembed" else make_mistral(folder)
    rewrite_config(folder, **field)
    with pytest.raises(CheckpointError, match=f"{WORDS}.*{next(iter(field))}"):
        embed(folder)
    rewrite_config(folder, **dict.fromkeys(field, "no"))
    with pytest.raises(CheckpointError, match=f"`{next(iter(field))}` in .* true or false"):
        embed(folder)


@pytest.mark.parametrize(
    "name",
    ["intfloat/e5-mistral-7b-instruct", "Salesforce/SFR-Embedding-2_R", "me/linq-embed-mistral-ft"],
)
def test_a_name_where_the_files_are_silent(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){WORDS}.*{name}"):
        embed(make_mistral(tmp_path / "plain", _name_or_path=name))
    with pytest.raises(CheckpointError, match=WORDS):
        embed(make_mistral(tmp_path / name.split("/")[1]))
    cached = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / ("a" * 40)
    with pytest.raises(CheckpointError, match=WORDS):
        embed(make_mistral(cached))
    # The files go first.
    folder = make_mistral(tmp_path / "bidirectional", _name_or_path=name, is_causal=False)
    assert np.isfinite(embed(folder, pooling="mean")).all()
    # Around a plain model, such a word is no sign.
    assert np.isfinite(embed(make_mistral(tmp_path / "e5-mistral" / "ok"), pooling="mean")).all()


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_a_known_id_is_refused_before_its_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    for use in (
        lambda: NVEmbedVectorizer(name).transform(TEXTS),
        lambda: NVEmbedVectorizer.from_pretrained(name),
        lambda: NVEmbedVectorizer(name).fit(TEXTS),
    ):
        with pytest.raises(CheckpointError, match=f"{name}.*{WORDS}"):
            use()


def test_plain_mistral_loads_as_before(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "plain", architectures=["MistralForCausalLM"])
    mean = embed(folder, pooling="mean")
    with pytest.warns(FreshPoolingWarning):
        np.testing.assert_allclose(embed(folder), mean, atol=1e-5)
    write_pooling(folder, {"pooling_mode_mean_tokens": True})
    np.testing.assert_allclose(embed(folder), mean, atol=1e-6)  # without a warning
    rewrite_config(folder, is_causal=False)
    write_pooling(folder, {"pooling_mode": "lasttoken"})
    eos = embed(folder, pooling="eos")
    assert np.array_equal(embed(folder), eos)
    write_pooling(folder, {"pooling_mode": "max"})
    with pytest.raises(CheckpointError, match="pooling .* must be one of"):
        embed(folder)
    assert np.array_equal(embed(folder, pooling="eos"), eos)


def test_the_pooling_of_nv_embed_is_its_own(folder: Path) -> None:
    write_pooling(folder, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    assert np.array_equal(embed(folder), embed(GOLDEN))


# Other kinds of models


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3", None])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_another_kind_in_the_cache_of_the_hub(
    revision: str | None,
    branch: bool,
    kind: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real library, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "models--someone--model"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    if branch:
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("a" * 40)
    with pytest.raises(CheckpointError, match=f"got {kind!r}.*Mistral") as caught:
        NVEmbedVectorizer("someone/model", revision=revision).transform(TEXTS)
    assert "ownload" not in str(caught.value)
    shutil.rmtree(home)
    with pytest.raises(ModelNotFoundError, match="If it is a Mistral model"):
        NVEmbedVectorizer("someone/other", revision=revision).transform(TEXTS)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen3"])
def test_another_kind_in_a_folder(kind: str, tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", model_type=kind)
    with pytest.raises(CheckpointError, match=f"{folder}.*got '{kind}'.*SentenceTransformer"):
        embed(folder)
