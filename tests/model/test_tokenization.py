"""Token ids, the pool's start, batches by token budget, and packs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from skembed.exceptions import CheckpointError
from skembed.model.sources import resolve_source
from skembed.model.tokenization import TextTokenizer, iterate_batches, pack_texts, round_up

TEXTS: list[str] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))["texts"]
PREFIXES = [
    "Instruct: Retrieve semantically similar text\nQuery: ",
    "Instruct: Given a question, retrieve passages that answer the question\nQuery: ",
    "Instruct: tell 3 things apart (again)\nQuery:",
    "query: ",
    "x",
]
WORDS = ["[unk]", "one", "two", "three", "four", "</e>", "five", "<b>"]
FOREIGN_BOS, FOREIGN_EOS = 7, 5


@pytest.fixture(scope="module", params=["golden", "skembed-mini"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    """Return both tokenizers at hand: byte fallback without pre-tokenizer, and word pieces."""
    folder = GOLDEN if request.param == "golden" else resolve_source(request.param).folder
    return TextTokenizer.from_folder(folder, bos_token_id=1, eos_token_id=2)


def make_words(*, adds_bos: bool) -> Tokenizer:
    """Return a tokenizer of whole words whose begin token is 7 and end token 5."""
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.normalizer = normalizers.Lowercase()
    words.add_special_tokens(["</e>", "<b>"])
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", FOREIGN_BOS)]
        )
    return words


def encode_words(words: Tokenizer, texts: list[str], max_length: int = 9) -> list[list[int]]:
    """Token ids by the tokenizer of whole words."""
    tokenizer = TextTokenizer(words, bos_token_id=FOREIGN_BOS, eos_token_id=FOREIGN_EOS)
    return [row.tolist() for row in tokenizer.encode(texts, prefix="", max_length=max_length).ids]


def test_begin_in_front_and_end_behind_every_text(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode(TEXTS, prefix="", max_length=512)
    assert encoded.pool_start == 0
    assert encoded.n_truncated == 0
    assert encoded.lengths.tolist() == [len(row) for row in encoded.ids]
    for row in encoded.ids:
        assert row.dtype == np.int32
        assert row[0] == 1
        assert row[-1] == 2
        assert row[1] != 1  # the begin token stands once


def test_ids_are_those_of_the_whole_string(tokenizer: TextTokenizer) -> None:
    """The end string is appended before tokenisation, the prefix put in front of it."""
    plain = tokenizer.tokenizer
    for prefix in ("", *PREFIXES):
        encoded = tokenizer.encode(TEXTS, prefix=prefix, max_length=512)
        for text, row in zip(TEXTS, encoded.ids, strict=True):
            assert row.tolist() == plain.encode(prefix + text + "</s>").ids


def test_empty_text(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode([""], prefix="", max_length=8)
    assert encoded.ids[0].tolist() == [1, 2]
    for prefix in PREFIXES:
        encoded = tokenizer.encode([""], prefix=prefix, max_length=64)
        assert encoded.lengths[0] > encoded.pool_start  # at least the end token is pooled


def test_no_text_at_all(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode([], prefix="", max_length=8)
    assert encoded.ids == []
    assert encoded.lengths.shape == (0,)


def test_literal_end_token_in_the_text(tokenizer: TextTokenizer) -> None:
    (row,) = tokenizer.encode(["before </s> after"], prefix="", max_length=64).ids
    assert row[-1] == 2
    assert (row == 2).sum() == 2
    assert row[-2] != 2  # what stands behind the literal token stays


# Instructions


@pytest.mark.parametrize("prefix", [p for p in PREFIXES if p.endswith(" ")])
def test_pool_start_is_the_prefix_alone(prefix: str) -> None:
    """As the reference counts, with a tokenizer to which a space at the end is a token."""
    tokenizer = TextTokenizer.from_folder(GOLDEN, bos_token_id=1, eos_token_id=2)
    alone = tokenizer.tokenizer.encode(prefix, add_special_tokens=False).ids
    assert tokenizer.encode(TEXTS, prefix=prefix, max_length=512).pool_start == len(alone)


@pytest.mark.parametrize("prefix", [p for p in PREFIXES if not p.endswith(" ")])
def test_pool_start_without_the_trailing_space(tokenizer: TextTokenizer, prefix: str) -> None:
    alone = tokenizer.tokenizer.encode(prefix, add_special_tokens=False).ids
    assert tokenizer.encode(TEXTS, prefix=prefix, max_length=512).pool_start == len(alone) + 1


def test_pool_start_where_a_trailing_space_is_no_token() -> None:
    words = TextTokenizer(
        make_words(adds_bos=True), bos_token_id=FOREIGN_BOS, eos_token_id=FOREIGN_EOS
    )
    for prefix in ("one two ", "one two"):
        assert words.count_prefix(prefix) == 3
    encoded = words.encode(["four"], prefix="one two ", max_length=9)
    assert encoded.ids[0][encoded.pool_start :].tolist() == [4, FOREIGN_EOS]


@pytest.mark.parametrize("prefix", [p for p in PREFIXES if len(p) > 1])
@pytest.mark.parametrize("text", ["who won?", "7 of 9", "(a)", "日本語", "élan", "a\tb\nc"])
def test_begin_and_instruction_are_masked_and_nothing_else(prefix: str, text: str) -> None:
    """Needs a tokenizer whose tokens end at spaces, as that of NV-Embed does."""
    tokenizer = TextTokenizer.from_folder(
        resolve_source("skembed-mini").folder, bos_token_id=1, eos_token_id=2
    )
    spaced = text if prefix.endswith(" ") else " " + text
    encoded = tokenizer.encode([spaced], prefix=prefix, max_length=512)
    pooled = encoded.ids[0][encoded.pool_start :].tolist()
    assert pooled == tokenizer.tokenizer.encode(text + "</s>", add_special_tokens=False).ids


def test_pool_can_keep_the_instruction(tokenizer: TextTokenizer) -> None:
    masked = tokenizer.encode(TEXTS, prefix=PREFIXES[0], max_length=512)
    whole = tokenizer.encode(TEXTS, prefix=PREFIXES[0], max_length=512, mask_prefix=False)
    assert whole.pool_start == 0 < masked.pool_start
    for one, other in zip(masked.ids, whole.ids, strict=True):
        assert one.tolist() == other.tolist()


def test_instruction_that_fills_max_length(tokenizer: TextTokenizer) -> None:
    start = tokenizer.count_prefix(PREFIXES[0])
    for max_length in (2, start - 1, start):
        with pytest.raises(ValueError, match=rf"takes {start} tokens .* max_length is") as caught:
            tokenizer.encode(["a text"], prefix=PREFIXES[0], max_length=max_length)
        assert "shorten `instruction`" in str(caught.value)
    encoded = tokenizer.encode(["a text"], prefix=PREFIXES[0], max_length=start + 1)
    assert encoded.lengths.tolist() == [start + 1]  # one token left to pool


# Truncation


def test_truncation_cuts_the_end_token(tokenizer: TextTokenizer) -> None:
    whole = tokenizer.encode(TEXTS, prefix="", max_length=512)
    limit = int(np.median(whole.lengths))
    cut = tokenizer.encode(TEXTS, prefix="", max_length=limit)
    assert cut.n_truncated == (whole.lengths > limit).sum() > 0
    assert cut.lengths.max() == limit
    for before, after in zip(whole.ids, cut.ids, strict=True):
        assert after.tolist() == before[:limit].tolist()


def test_a_text_that_just_fits_is_not_truncated(tokenizer: TextTokenizer) -> None:
    n = int(tokenizer.encode([TEXTS[0]], prefix="", max_length=512).lengths[0])
    assert tokenizer.encode([TEXTS[0]], prefix="", max_length=n).n_truncated == 0
    cut = tokenizer.encode([TEXTS[0]], prefix="", max_length=n - 1)
    assert cut.n_truncated == 1
    assert cut.ids[0][-1] != 2


# Tokenizers


@pytest.mark.parametrize("adds_bos", [False, True])
def test_foreign_begin_and_end_ids(adds_bos: bool) -> None:
    words = make_words(adds_bos=adds_bos)
    found = encode_words(words, ["One two", "", "other </e>"])
    assert found == [[7, 1, 2, 5], [7, 5], [7, 0, 5, 5]]


def test_stored_padding_and_truncation_are_switched_off() -> None:
    words = make_words(adds_bos=True)
    words.enable_truncation(3)
    words.enable_padding(length=6)
    assert encode_words(words, ["one", "one two three four"]) == [[7, 1, 5], [7, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("bos", "eos"), [(99, 5), (7, 99)])
def test_ids_the_tokenizer_does_not_have(bos: int, eos: int) -> None:
    with pytest.raises(CheckpointError, match=r"no token of id .*99.*config\.json"):
        TextTokenizer(make_words(adds_bos=True), bos_token_id=bos, eos_token_id=eos)


def test_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold a tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path, bos_token_id=1, eos_token_id=2)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        TextTokenizer.from_folder(tmp_path, bos_token_id=1, eos_token_id=2)


def test_threads_share_a_tokenizer(tokenizer: TextTokenizer) -> None:
    jobs = [(prefix, limit) for prefix in ("", PREFIXES[0]) for limit in (40, 512)] * 8

    def run(job: tuple[str, int]) -> list[list[int]]:
        encoded = tokenizer.encode(TEXTS, prefix=job[0], max_length=job[1])
        return [row.tolist() for row in encoded.ids]

    expected = {job: run(job) for job in set(jobs)}
    with ThreadPoolExecutor(8) as pool:
        for job, found in zip(jobs, pool.map(run, jobs), strict=True):
            assert found == expected[job]


# Batches and packs


@pytest.mark.parametrize("budget", [1, 7, 64, 100, 10_000])
def test_batches_by_budget(rng: np.random.Generator, budget: int) -> None:
    lengths = rng.integers(1, 70, size=200)
    batches = list(iterate_batches(lengths, budget))
    order = np.concatenate(batches)
    assert sorted(order) == list(range(200))  # a partition
    assert (np.diff(lengths[order]) <= 0).all()  # longest first
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        total = lengths[batch].sum()
        assert total <= budget or len(batch) == 1
        if following is not None:  # no batch is smaller than it must be
            assert total + lengths[following[0]] > budget


def test_batches_keep_the_order_of_equal_lengths() -> None:
    batches = list(iterate_batches(np.array([3, 5, 3, 5, 3]), 8))
    assert [batch.tolist() for batch in batches] == [[1], [3, 0], [2, 4]]


def test_no_batches_of_nothing() -> None:
    assert list(iterate_batches(np.array([], dtype=np.int64), 8)) == []


@pytest.mark.parametrize("pool_start", [0, 2])
def test_pack(pool_start: int) -> None:
    ids = [np.array(row, dtype=np.int32) for row in ([1, 9, 8, 2], [1, 7, 2], [1, 6, 5, 4, 2])]
    batch = pack_texts(ids, pool_start)
    assert batch.lengths == (4, 3, 5)
    assert batch.input_ids.tolist() == [1, 9, 8, 2, 1, 7, 2, 1, 6, 5, 4, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 12]
    starts, pooled, segments = (0, 4, 7), [], []
    for text, (start, length) in enumerate(zip(starts, batch.lengths, strict=True)):
        for k in range(pool_start, length):
            pooled.append(start + k)
            segments.append(text)
    assert batch.pool_index.tolist() == pooled
    assert batch.pool_segments.tolist() == segments
    assert batch.pool_counts.tolist() == [4 - pool_start, 3 - pool_start, 5 - pool_start]
    dtypes = {name: getattr(batch, name).dtype for name in ("input_ids", "position_ids")}
    assert set(dtypes.values()) == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.pool_counts.dtype == torch.float32


@pytest.mark.parametrize("pool_start", [0, 2])
def test_pack_on_the_grid_adds_padding_behind_the_texts(pool_start: int) -> None:
    ids = [np.arange(3, 3 + n, dtype=np.int32) for n in (9, 4, 7)]
    plain, grid = pack_texts(ids, pool_start), pack_texts(ids, pool_start, on_grid=True)
    assert (plain.n_texts, grid.n_texts) == (3, 3)
    assert grid.lengths == (9, 4, 7, 12)  # 20 tokens, filled up to 32
    assert len(grid.input_ids) == len(grid.position_ids) == grid.cu_seqlens[-1] == 32
    n_pooled = len(plain.pool_index)
    assert len(grid.pool_index) == len(grid.pool_segments) == round_up(n_pooled) > n_pooled
    assert (grid.pool_segments[n_pooled:] == 3).all()  # a row of its own, behind the texts'
    assert len(grid.pool_counts) == 16
    for name in ("input_ids", "position_ids", "pool_index", "pool_segments"):
        part = getattr(plain, name)
        assert torch.equal(getattr(grid, name)[: len(part)], part)
    assert torch.equal(grid.pool_counts[:3], plain.pool_counts)


def test_coarse_grid_fills_up_everything_to_powers_of_two() -> None:
    ids = [np.arange(3, 3 + n, dtype=np.int32) for n in [9, 4, 7] * 30]  # 600 tokens
    plain, coarse = pack_texts(ids, 2), pack_texts(ids, 2, on_grid=True, coarse=True)
    assert coarse.lengths == (*plain.lengths, 424)
    assert len(coarse.input_ids) == coarse.cu_seqlens[-1] == 1_024
    assert (len(plain.pool_index), len(coarse.pool_index)) == (420, 512)
    assert (plain.n_texts, coarse.n_texts, len(coarse.pool_counts)) == (90, 90, 128)
    assert torch.equal(coarse.pool_index[:420], plain.pool_index)
    assert torch.equal(coarse.pool_counts[:90], plain.pool_counts)


def test_grid_has_few_sizes() -> None:
    sizes = [round_up(n) for n in range(1, 2_049)]
    assert all(n <= size for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 44
    assert max(size / n for n, size in enumerate(sizes, start=1) if n >= 1_024) < 1.07
    coarse = {round_up(n, coarse=True) for n in range(1, 2_049)}
    assert coarse == {16, 32, 64, 128, 256, 512, 1_024, 2_048}


def test_pack_moves_as_a_whole() -> None:
    batch = pack_texts([np.array([1, 3, 2])], 1)
    moved = batch.to(torch.device("meta"))
    assert moved.lengths == batch.lengths
    names = [n for n in batch.__dataclass_fields__ if n not in ("lengths", "n_texts")]
    assert all(getattr(moved, name).device.type == "meta" for name in names)
