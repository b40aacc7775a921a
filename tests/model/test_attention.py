"""Attention paths against each other and against plain attention."""

import numpy as np
import pytest
import torch
from networks import TINY, make_model, run
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skembed.model import attention as model_module
from skembed.model.attention import ATTENTION_NAME, ATTENTION_PATHS
from skembed.model.tokenization import pack_texts


@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_grouped_queries(path: str) -> None:
    """Two key heads for four query heads equal four key heads that are pairwise the same."""
    few = make_model(TINY)
    many = make_model({**TINY, "num_key_value_heads": 4})
    weights = few.state_dict()
    for name, value in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = value.unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    few.attention_path = many.attention_path = path
    torch.testing.assert_close(run(few, 9, 9, 4), run(many, 9, 9, 4), rtol=1e-5, atol=1e-5)


def test_paths_agree() -> None:
    model = make_model(TINY, pooling="latent")
    grouped = run(model, 20, 5, 5, 31, 1)
    model.attention_path = "padded"
    torch.testing.assert_close(run(model, 20, 5, 5, 31, 1), grouped, rtol=1e-5, atol=1e-5)


def test_attention_is_registered_publicly() -> None:
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    model = make_model(TINY)
    kind = type(model.embedding_model)
    assert kind.__module__.startswith("transformers.")  # the stock class, unchanged
    assert kind.__name__ == "MistralModel"


def test_an_unknown_path_is_an_error() -> None:
    model = make_model(TINY)
    model.attention_path = "flash"
    with pytest.raises(KeyError, match="flash"):
        run(model, 3)
    assert set(ATTENTION_PATHS) == {"grouped", "varlen", "padded"}


def test_runs_of_equal_lengths() -> None:
    assert model_module._runs([5, 5, 3, 5]) == [(5, 2), (3, 1), (5, 1)]
    assert model_module._runs([4]) == [(4, 1)]


@pytest.mark.parametrize("lengths", [(5, 5, 16, 3), (17,), (32, 31)])
def test_attention_in_bfloat16_equals_plain_attention(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    batch = pack_texts([np.ones(n, dtype=np.int32) for n in lengths], 0)
    found = model_module._grouped(q, k, v, batch, 0.3, 0.0)
    expected = model_module._padded(q.float(), k.float(), v.float(), batch, 0.3, 0.0)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
