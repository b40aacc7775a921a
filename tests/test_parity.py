"""The model against the published reference's vectors, stock transformers and itself."""

import json
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny import TINY, double_weights, make_tiny_model, reference_latent, token_states
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, MistralConfig

from skembed import NVEmbedVectorizer
from skembed.exceptions import CausalLeakError, TruncationWarning
from skembed.inference import registry as registry_module
from skembed.model import attention as attention_module
from skembed.model import cpu_forward as fused
from skembed.model import loaded as loaded_module
from skembed.model.checkpoint import load_model
from skembed.model.network import NVEmbedModel
from skembed.model.sources import read_config, resolve_source
from skembed.model.tokenization import TextTokenizer, pack_texts

GOLDEN_VECTORS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
TEXTS: list[str] = GOLDEN_VECTORS["texts"]
BLOCKS = sorted(GOLDEN_VECTORS["embeddings"])
# "stock" is the grouped path in transformers' own forward pass, "grouped" the fused one.
CPU_PATHS = ("grouped", "stock", "padded")
TOLERANCE = 1e-5
LONG_TEXT = "An unrelated neighbour, much longer than any of the others. " * 12
SENTENCES = [
    "The bridge was closed for repairs after last week's flood.",
    "Engineers shut the crossing because high water had damaged it.",
    "My new phone does not charge when I plug it in overnight.",
    "How do I reset the password of my online banking account?",
    "A cat sleeps on the warm bonnet of a parked car.",
    "Vaccination reduced hospital admissions among adults over sixty-five.",
    "He scored twice in the second half, and the home side won 3-1.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "What a waste of two hours; the plot made no sense at all.",
    "The committee will publish its report on interest rates on Thursday.",
    "Stir the flour into the melted butter, then add the milk slowly.",
    "I would like to return the shoes I bought, they are a size too small.",
]


@cache
def load(
    folder: Path = GOLDEN, path: str = "grouped", dtype: str = "float32", folded: bool = True
) -> tuple[NVEmbedModel, TextTokenizer]:
    """Return a model of a folder on an attention path, and its tokenizer."""
    source = resolve_source(folder)
    config = read_config(source)
    model = load_model(
        source,
        config,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        attention_path="grouped" if path == "stock" else path,
    )
    model.fuse = path != "stock"
    if folded:
        model.fold_pooling()
    return model, loaded_module.load_tokenizer(source.folder, config)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embed(
    loaded: tuple[NVEmbedModel, TextTokenizer],
    texts: Sequence[str],
    *,
    prefix: str = "",
    max_length: int = 512,
) -> np.ndarray:
    """Embed texts in one pack, in the order given; unit rows."""
    model, tokenizer = loaded
    encoded = tokenizer.encode(texts, prefix=prefix, max_length=max_length)
    with torch.inference_mode():
        return unit(model(pack_texts(encoded.ids, encoded.pool_start)).numpy())


def compositions() -> dict[str, list[list[int]]]:
    """Batches of golden rows; -1 stands for a long text of no interest."""
    shuffled = np.random.default_rng(0).permutation(len(TEXTS)).tolist()
    return {
        "all": [list(range(10))],
        "singles": [[k] for k in range(10)],
        "subsets": [[0, 7], [4, 3, 9], [1, 2, 5, 6, 8]],
        "shuffled": [shuffled],
        "repeated": [[3, 3, 4, 4, 4, 0], [7, 7]],
        "long_neighbours": [[-1, 3, -1, 4, 0], [-1, 7], [9, 8, -1], [1, -1, 2, -1, 5, 6]],
    }


@pytest.mark.parametrize("composition", sorted(compositions()))
@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_golden_vectors(block: str, path: str, composition: str) -> None:
    instruction, max_length = block.split("/")
    expected = np.array(GOLDEN_VECTORS["embeddings"][block])
    for rows in compositions()[composition]:
        found = embed(
            load(path=path),
            [TEXTS[row] if row >= 0 else LONG_TEXT for row in rows],
            prefix=GOLDEN_VECTORS["instructions"][instruction],
            max_length=int(max_length),
        )
        known = [k for k, row in enumerate(rows) if row >= 0]
        np.testing.assert_allclose(
            found[known], expected[[rows[k] for k in known]], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("path", CPU_PATHS)
def test_golden_vectors_of_the_plain_pooling(path: str) -> None:
    for block in BLOCKS:
        instruction, max_length = block.split("/")
        found = embed(
            load(path=path, folded=False),
            TEXTS,
            prefix=GOLDEN_VECTORS["instructions"][instruction],
            max_length=int(max_length),
        )
        expected = np.array(GOLDEN_VECTORS["embeddings"][block])
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_golden_blocks_differ() -> None:
    """Guards the tests above: the blocks must not be reproducible by ignoring the settings."""
    blocks = [np.array(GOLDEN_VECTORS["embeddings"][block]) for block in BLOCKS]
    for k, one in enumerate(blocks):
        for other in blocks[:k]:
            assert np.abs(one - other).max() > 1e-2


@pytest.mark.filterwarnings("ignore::skembed.exceptions.TruncationWarning")
@pytest.mark.parametrize("batch_tokens", ["auto", 1, 100])
@pytest.mark.parametrize("block", BLOCKS)
def test_golden_vectors_through_the_vectorizer(block: str, batch_tokens: int | str) -> None:
    name, max_length = block.split("/")
    template = "Instruct: {instruction}\nQuery: "
    written = GOLDEN_VECTORS["instructions"][name]
    instruction = written.removeprefix("Instruct: ").removesuffix("\nQuery: ") or None
    assert not instruction or template.format(instruction=instruction) == written
    vectorizer = NVEmbedVectorizer(
        GOLDEN,
        instruction=instruction,
        max_length=int(max_length),
        batch_tokens=batch_tokens,
        device="cpu",
        dtype="float32",
        cache=None,
    )
    expected = np.array(GOLDEN_VECTORS["embeddings"][block])
    found = vectorizer.fit_transform(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 2))
    found = vectorizer.transform([TEXTS[k] for k in order])
    np.testing.assert_allclose(found, expected[order], rtol=0, atol=TOLERANCE)


def test_documents_are_bare() -> None:
    vectorizer = NVEmbedVectorizer(
        GOLDEN,
        instruction="Given a question, retrieve passages that answer the question",
        device="cpu",
        dtype="float32",
        cache=None,
    )
    for encode, block in (
        (vectorizer.encode_document, "none/512"),
        (vectorizer.encode_query, "retrieval/512"),
    ):
        expected = np.array(GOLDEN_VECTORS["embeddings"][block])
        np.testing.assert_allclose(encode(TEXTS), expected, rtol=0, atol=TOLERANCE)


def test_truncation_is_warned_about_once_with_its_count() -> None:
    vectorizer = NVEmbedVectorizer(GOLDEN, max_length=24, device="cpu", dtype="float32", cache=None)
    with pytest.warns(TruncationWarning, match=r"^4 of 10 texts") as caught:
        vectorizer.transform(TEXTS)
    assert len(caught) == 1


# bfloat16


@pytest.mark.parametrize("instruction", ["", "Instruct: Retrieve similar text\nQuery: "])
@pytest.mark.parametrize("model", ["golden", "skembed-mini"])
def test_bfloat16_is_near_float32(model: str, instruction: str) -> None:
    folder = GOLDEN if model == "golden" else resolve_source(model).folder
    texts = [*SENTENCES, *TEXTS] if model == "golden" else SENTENCES
    exact = embed(load(folder), texts, prefix=instruction)
    half = embed(load(folder, dtype="bfloat16"), texts, prefix=instruction)
    cosine = (exact * half).sum(1)
    assert cosine.min() >= 0.999
    assert cosine.max() < 1 - 1e-9  # it did run in bfloat16


def test_bfloat16_does_not_depend_on_the_batch() -> None:
    folder = resolve_source("skembed-mini").folder
    for path in CPU_PATHS:
        loaded = load(folder, path, "bfloat16")
        together = embed(loaded, [*SENTENCES, LONG_TEXT])[:-1]
        alone = np.concatenate([embed(loaded, [text]) for text in SENTENCES])
        assert np.abs(together - alone).max() <= 5e-3


# Leaks


def last_states(model: NVEmbedModel, texts: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
    """Last hidden states (L, D) of each text of one pack."""
    batch = pack_texts([text.numpy() for text in texts], 0).to(torch.device(device))
    return list(token_states(model, batch).float().cpu().split(list(batch.lengths)))


def check_leaks(model: NVEmbedModel, lengths: Sequence[int], device: str, noise: float) -> None:
    """The last token must reach all positions of its text, and none of another."""
    generator = torch.Generator().manual_seed(sum(lengths))
    vocabulary = model.config.backbone["vocab_size"]
    texts = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
    before = last_states(model, texts, device)
    for changed in range(len(texts)):
        altered = [text.clone() for text in texts]
        altered[changed][-1] = (altered[changed][-1] + 1) % vocabulary
        after = last_states(model, altered, device)
        moved = [(a - b).abs().amax(dim=1) for a, b in zip(after, before, strict=True)]
        for k, change in enumerate(moved):
            if k == changed:
                assert change.min() > max(noise, 1e-5)
            else:
                assert change.max() <= noise


LEAK_LENGTHS = [(7,), (7, 7), (5, 5, 5), (9, 4), (4, 9), (2, 30, 2, 11)]


@pytest.mark.parametrize("lengths", LEAK_LENGTHS, ids=str)
@pytest.mark.parametrize("path", CPU_PATHS)
def test_no_leak(path: str, lengths: tuple[int, ...]) -> None:
    check_leaks(load(path=path)[0], lengths, "cpu", noise=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "dtype"), [("padded", "float32"), ("varlen", "bfloat16")])
def test_no_leak_on_cuda(path: str, dtype: str) -> None:
    source = resolve_source("skembed-mini")
    model = load_model(
        source,
        read_config(source),
        device=torch.device("cuda"),
        dtype=getattr(torch, dtype),
        attention_path=path,
    )
    for lengths in LEAK_LENGTHS:
        check_leaks(model, lengths, "cuda", noise=1e-4 if dtype == "float32" else 1e-2)


def causal_attention(*args: Any) -> Tensor:
    """What a wrong mask would give: each position sees those before it."""
    q, k, v, packed, scaling, _ = args
    groups = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    parts = [
        F.scaled_dot_product_attention(q_text, k_text, v_text, scale=scaling, is_causal=True)
        for q_text, k_text, v_text in zip(
            *(x.split(list(packed.lengths), dim=1) for x in (q, k, v)), strict=True
        )
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def borderless_attention(*args: Any) -> Tensor:
    """What a lost border would give: each position sees the whole pack."""
    q, k, v, _, scaling, _ = args
    groups = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)


def as_fused(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn an attention of (heads, T, d) into one of the fused pass: rows, scaled queries."""

    def attend_to_rows(rows: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in rows)
        return attend(q, k, v, SimpleNamespace(lengths=lengths), 1.0, 0.0).contiguous()

    return attend_to_rows


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [(causal_attention, "is causal"), (borderless_attention, "mixes neighbouring texts")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leak_stops_the_load(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    wrong: Callable[..., Tensor],
    message: str,
    dtype: str,
) -> None:
    monkeypatch.setattr(loaded_module, "_proven", set())
    model = load(path=path, dtype=dtype)[0]
    loaded_module.prove_bidirectional(model, torch.device("cpu"))
    monkeypatch.setattr(loaded_module, "_proven", set())
    if path == "grouped":
        monkeypatch.setattr(fused, "attend_to_buckets", as_fused(wrong))
    else:
        monkeypatch.setattr(attention_module, "_grouped" if path == "stock" else "_padded", wrong)
    with pytest.raises(CausalLeakError, match=message):
        loaded_module.prove_bidirectional(model, torch.device("cpu"))
    assert not loaded_module._proven  # a fault is found again at the next load


def test_the_vectorizer_proves_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_module, "_proven", set())
    # What another test still holds is loaded, and proven, already.
    monkeypatch.setattr(registry_module.registry, "_models", weakref.WeakValueDictionary())
    vectorizer = NVEmbedVectorizer(GOLDEN, device="cpu", dtype="float32", cache=None)
    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "_grouped", causal_attention)
        with pytest.raises(CausalLeakError, match="is causal"):
            vectorizer.transform(TEXTS)
    assert vectorizer.transform(TEXTS).shape == (10, 48)  # usable after it


# An independent reference: stock Mistral, eager attention, an explicit mask, the pooling by einsum


def reference_states(model: NVEmbedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """Last hidden states in float64 by transformers alone, right-padded, one (L, D) a text."""
    theirs = AutoModel.from_config(
        MistralConfig(**TINY, sliding_window=None), attn_implementation="eager"
    )
    theirs.load_state_dict(model.embedding_model.state_dict())
    theirs = theirs.double().eval()
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), 2)
    mask = torch.full((len(texts), 1, longest, longest), -torch.inf, dtype=torch.float64)
    for k, text in enumerate(texts):
        ids[k, : len(text)] = text
        mask[k, :, :, : len(text)] = 0.0
    with torch.no_grad():
        states = theirs(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.arange(longest).expand(len(texts), -1),
            use_cache=False,
        ).last_hidden_state
    return [states[k, : len(text)] for k, text in enumerate(texts)]


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("pool_start", [0, 3])
def test_whole_model_equals_stock_transformers(path: str, folded: bool, pool_start: int) -> None:
    model = make_tiny_model(path)
    generator = torch.Generator().manual_seed(2)
    lengths = (17, 5, 5, 40, 4)
    texts = [torch.randint(0, 96, (n,), generator=generator) for n in lengths]
    weights = double_weights(model.latent_attention_model)
    expected = torch.stack(
        [
            reference_latent(states[pool_start:], weights, heads=3)
            for states in reference_states(model, texts)
        ]
    )
    if folded:
        model.fold_pooling()
    with torch.inference_mode():
        found = model(pack_texts([text.numpy() for text in texts], pool_start)).double()
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < TOLERANCE
    expected, found = F.normalize(expected, dim=1), F.normalize(found, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (expected @ expected.T).min() < 0.99  # texts the model can tell apart


@pytest.mark.parametrize("path", CPU_PATHS)
def test_every_layer_equals_stock_transformers(path: str) -> None:
    model = make_tiny_model(path)
    texts = [torch.arange(9) * 5, torch.arange(6) * 11, torch.arange(9) * 7]
    batch = pack_texts([text.numpy() for text in texts], 0)
    with torch.inference_mode():
        layers = model.hidden_states(batch, all_layers=True)
    last = token_states(model, batch)
    assert len(layers) == TINY["num_hidden_layers"]
    torch.testing.assert_close(layers[-1], last)  # the last one is behind the final norm
    expected = torch.cat(reference_states(model, texts))
    torch.testing.assert_close(last.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_weight() -> None:
    """Training uses the plain pooling; both paths must carry the same gradients."""
    gradients = []
    for path in CPU_PATHS:
        model = make_tiny_model(path).train()
        texts = [np.arange(1, 9), np.arange(20, 28), np.arange(40, 45)]
        model(pack_texts(texts, 2)).square().mean().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        silent = [n for n, g in found.items() if g is None or not g.abs().max() > 1e-9]
        assert not silent
        gradients.append(found)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
