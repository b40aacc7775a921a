"""Long texts: only what matters is tokenised, and the token ids are those of the whole."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from skembed.model import tokenization
from skembed.model.sources import resolve_source
from skembed.model.tokenization import TextCutter, TextTokenizer

# Pieces of which texts are made: words, spaces of all kinds, accents, scripts, controls, tokens.
PIECES = [
    *("cat", "Dog", "running", "x", "7", "1999", "a1b2", "don't", "I'm", "end."),
    *(" ", " ", " ", " ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u2581"),
    *("\u0301", "e\u0301\u0323", "\u00e9", "\ufb01", "\u0130", "\u03a3", "\u1e9e", "\u3000"),
    "\uac01",
    *("\u65e5\u672c\u8a9e", "\U0001f469\u200d\U0001f52c", "\u0645\u0631", "\x00"),
    *("\x07", "\ufeff", "\ufffd"),
    *("</s>", "<s>", "<unk>", "<0x20>", "\u0120", "!", "...", "--", "(", "_", "</", "s>"),
]  # fmt: skip
PROSE = ["".join(random.Random(seed).choices(PIECES, k=4_000)) for seed in range(3)] + [
    "The cat sat on the mat, 7 times. " * 300,
    "caf\u00e9 na\u00efve " * 500,
]


def make_text(seed: int, size: int = 6_000) -> str:
    """Return a text of one of several tempers: mostly words, mostly rarities, hardly any space."""
    rng = random.Random(seed)
    mix = rng.choice([PIECES, PIECES[:16], PIECES[:10] + [" "] * 10, PIECES[10:], ["cat", " "]])
    text = "".join(rng.choices(mix, k=size))
    return text[: rng.randrange(size // 2, size)] if rng.random() < 0.5 else text


def train(model: Any, normalizer: Any, pre_tokenizer: Any, trainer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


SPECIAL = ["<unk>", "<s>", "</s>"]


def bpe(**options: Any) -> Any:
    return trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, show_progress=False, **options
    )


def make_foreign() -> dict[str, tuple[bool, Tokenizer]]:
    """Return tokenizers of many families, and whether a text may be cut for them."""
    bytes_ = pre_tokenizers.ByteLevel
    alphabet = bytes_.alphabet()
    metaspace = pre_tokenizers.Metaspace
    prepend = normalizers.Prepend("\u2581")
    llama = normalizers.Sequence([prepend, normalizers.Replace(" ", "\u2581")])
    words = trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    unigram = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )

    def one(model: Any, normalizer: Any, pre: Any, trainer: Any) -> Tokenizer:
        return train(model, normalizer, pre, trainer)

    unk = models.BPE(unk_token="<unk>", fuse_unk=True)
    return {
        "byte level": (True, one(models.BPE(), None, bytes_(), bpe(initial_alphabet=alphabet))),
        "byte level, NFC": (
            True,
            one(models.BPE(), normalizers.NFC(), bytes_(), bpe(initial_alphabet=alphabet)),
        ),
        "metaspace": (True, one(models.BPE(unk_token="<unk>"), None, metaspace(), bpe())),
        "bert": (
            True,
            one(
                models.WordPiece(unk_token="<unk>"),
                normalizers.BertNormalizer(),
                pre_tokenizers.BertPreTokenizer(),
                words,
            ),
        ),
        "unigram": (True, one(models.Unigram(), normalizers.NFKC(), metaspace(), unigram)),
        "words": (
            True,
            one(
                models.WordLevel(unk_token="<unk>"),
                normalizers.Lowercase(),
                pre_tokenizers.Whitespace(),
                trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
            ),
        ),
        # Whole texts as one word: a cut is right where no token reaches over it.
        "llama": (True, one(unk, llama, None, bpe(max_token_length=2))),
        "spaces lost": (
            False,
            one(
                models.BPE(unk_token="<unk>"),
                normalizers.Replace(" ", ""),
                pre_tokenizers.Whitespace(),
                bpe(),
            ),
        ),
        "a regular expression": (
            False,
            one(
                models.BPE(unk_token="<unk>"),
                None,
                pre_tokenizers.Split(Regex(r"cat (?=.*Dog)"), "isolated"),
                bpe(),
            ),
        ),
        "a long replacement": (
            False,
            one(
                models.BPE(unk_token="<unk>"),
                normalizers.Replace("t s", "q"),
                pre_tokenizers.WhitespaceSplit(),
                bpe(),
            ),
        ),
        "strip": (
            False,
            one(models.BPE(unk_token="<unk>"), normalizers.Strip(), metaspace(), bpe()),
        ),
    }


@pytest.fixture(scope="module")
def foreign() -> dict[str, tuple[bool, Tokenizer]]:
    return make_foreign()


def count_cuts(tokenizer: Tokenizer, seeds: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare token ids of texts cut and whole; return how many were cut."""
    ids = [tokenizer.token_to_id(name) for name in ("<s>", "</s>")]
    cutting = TextTokenizer(tokenizer, bos_token_id=ids[0], eos_token_id=ids[1])
    whole = TextTokenizer(tokenizer, bos_token_id=ids[0], eos_token_id=ids[1])
    whole.cutter.cut = lambda *_: None  # type: ignore[method-assign]
    monkeypatch.setattr(tokenization, "LONG_TEXT", 0)
    n_cuts = 0
    for seed in seeds:
        text, max_length = make_text(seed), random.Random(seed).choice([2, 3, 8, 30, 100])
        prefix = random.Random(seed).choice(["", "Instruct: find cats\nQuery: ", "x"])
        if cutting.count_prefix(prefix) >= max_length:
            prefix = ""
        n_cuts += cutting.cutter.cut(prefix, text, max_length) is not None
        found, expected = (
            t.encode([text, "short"], prefix=prefix, max_length=max_length)
            for t in (cutting, whole)
        )
        assert found.n_truncated == expected.n_truncated
        assert found.pool_start == expected.pool_start
        for one, other in zip(found.ids, expected.ids, strict=True):
            assert np.array_equal(one, other), (seed, prefix, max_length)
    return n_cuts


@pytest.mark.parametrize("name", ["golden", "skembed-mini"])
def test_the_models_at_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GOLDEN if name == "golden" else resolve_source(name).folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert count_cuts(tokenizer, range(300), monkeypatch) > 60


FAMILIES = [
    *("byte level", "byte level, NFC", "metaspace", "bert", "unigram", "words", "llama"),
    *("spaces lost", "a regular expression", "a long replacement", "strip"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(
    name: str, foreign: dict[str, tuple[bool, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_cut, tokenizer = foreign[name]
    n_cuts = count_cuts(tokenizer, range(150), monkeypatch)
    assert (n_cuts > 20) == may_cut, n_cuts


def test_added_tokens_that_hold_a_space_forbid_a_cut(
    foreign: dict[str, tuple[bool, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_str(foreign["metaspace"][1].to_str())
    tokenizer.add_tokens([AddedToken("cat Dog", normalized=False)])
    assert count_cuts(tokenizer, range(40), monkeypatch) == 0
    tokenizer = Tokenizer.from_str(foreign["metaspace"][1].to_str())
    sides = [AddedToken("cat", lstrip=True, rstrip=True), AddedToken("x", single_word=True)]
    tokenizer.add_tokens(sides)
    assert count_cuts(tokenizer, range(150), monkeypatch) > 20


def test_dropout_and_merges_over_spaces_forbid_a_cut(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    text = "cat dog big fog log bag " * 1_000

    def cuts(**changes: Any) -> bool:
        changed = {**values, "model": {**values["model"], **changes}}
        cutter = TextCutter(Tokenizer.from_str(json.dumps(changed)))
        return cutter.cut("", text, 8) is not None

    assert cuts()
    assert not cuts(dropout=0.1)
    assert not cuts(ignore_merges=True)
    vocab = values["model"]["vocab"]
    letters = {
        f"{letter}\u2581": 1_000 + k for k, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
    }
    assert not cuts(vocab={**vocab, **letters})


def test_a_very_long_text_is_not_tokenised_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_source("skembed-mini").folder
    tokenizer = TextTokenizer.from_folder(folder, bos_token_id=1, eos_token_id=2)
    seen: list[int] = []
    cut = tokenizer.cutter.cut

    def spy(prefix: str, text: str, n_tokens: int) -> str | None:
        part = cut(prefix, text, n_tokens)
        seen.append(len(part or text))
        return part

    monkeypatch.setattr(tokenizer.cutter, "cut", spy)
    encoded = tokenizer.encode(["The cat sat. " * 400_000], prefix="", max_length=512)
    assert encoded.lengths.tolist() == [512]
    assert encoded.n_truncated == 1
    assert seen[0] < 20_000
    tokenizer.encode(["The cat sat. " * 1_000], prefix="", max_length=512)
    assert len(seen) == 1, "a text of usual size takes the usual way"
