"""The recipe of the bundled model."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scripts import RECIPE, import_script

from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch, pack_texts


@pytest.fixture(scope="module")
def inherit() -> Iterator[ModuleType]:
    for prepare in import_script(RECIPE, "prepare"):
        assert prepare
        yield sys.modules["inherit"]


def make_teacher(inherit: ModuleType, wide: int, n_words: int, seed: int = 0) -> Any:
    """A BERT of random weights with the teacher's heads and layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = {
        "embeddings.word_embeddings": (n_words, wide),
        "embeddings.position_embeddings": (64, wide),
        "embeddings.token_type_embeddings": (2, wide),
    }
    state = {f"{name}.weight": 0.3 * draw(*size) for name, size in sizes.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
        linear = {
            "attention.self.query": (wide, wide),
            "attention.self.key": (wide, wide),
            "attention.self.value": (wide, wide),
            "attention.output.dense": (wide, wide),
            "intermediate.dense": (2 * wide, wide),
            "output.dense": (wide, 2 * wide),
        }
        for part, (out, into) in linear.items():
            state[f"{name}.{part}.weight"] = draw(out, into) / into**0.5
            state[f"{name}.{part}.bias"] = 0.1 * draw(out)
    for norm in norms:
        state[f"{norm}.weight"] = 1 + 0.2 * draw(wide)
        state[f"{norm}.bias"] = 0.1 * draw(wide)
    teacher = inherit.PackedTeacher.__new__(inherit.PackedTeacher)
    teacher.weights, teacher.hidden_size = state, wide
    return teacher


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 36},
        {"heads_per_key": 2},
        {"layer_groups": ((0, 1), (2, 3), (4, 5))},
    ],
    ids=["as wide", "narrower", "shared keys", "groups of layers"],
)
def test_a_student_inherits_its_teachers_token_vectors(
    inherit: ModuleType, changes: dict[str, Any]
) -> None:
    wide, n_words = 48, 200
    recipe = sys.modules["recipe"].Recipe(
        vocab_size=n_words,
        intermediate_size=96,
        num_attention_heads=12,
        head_dim=4,
        num_latents_value=4,
        cross_dim_head=8,
        **{"hidden_size": wide, "layer_groups": tuple((k,) for k in range(6)), **changes},
    )
    teacher = make_teacher(inherit, wide, n_words)
    rng = np.random.default_rng(0)

    def draw(n_texts: int) -> PackedBatch:
        lengths = np.sort(rng.integers(3, 30, n_texts))
        return pack_texts([rng.integers(3, n_words, n).astype(np.int32) for n in lengths], 0)

    seen, others = draw(500), draw(100)

    def left(student: Any) -> float:
        """Share of the variance of the teacher's vectors of other texts that is not met."""
        theirs = student.project(teacher.hidden_states(others.input_ids, others))
        with torch.inference_mode():
            hidden = student.model.hidden_states(others)
            ours = student.model.latent_attention_model.transform_tokens(hidden)
        rest = (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()
        return float(rest)

    def begin() -> Any:
        torch.manual_seed(0)
        model = NVEmbedModel(sys.modules["prepare"].build_config(recipe))
        return inherit.Inheritance(model, teacher, np.arange(n_words), seen, recipe)

    words_only, student = begin(), begin()
    with torch.no_grad():
        words_only._words()
        for layer in words_only.model.embedding_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words_only._head()
    student.run()
    assert student.model.fuse, "what comes after runs the fast pass again"
    seen_left = student.report["end"]["token vectors"]
    assert seen_left < left(student) < 0.75 * left(words_only)
