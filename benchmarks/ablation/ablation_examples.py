"""What the ablation trains on: examples of both stages, mined once, tokenised, drawn by a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import common  # noqa: F401 -- first of all: it finds the modules of the recipe
import corpus
import numpy as np

from skembed import NVEmbedVectorizer, mine_hard_negatives
from skembed.instructions import format_instruction, resolve_instruction
from skembed.model.sources import resolve_source
from skembed.model.tokenization import TextTokenizer

TEMPLATE = "Instruct: {instruction}\nQuery: "
PASSAGES = "NQ"  # names known to skembed.instructions stand for their task text
TITLE = "Given a title, retrieve the text that it belongs to"
# Stage 1: pairs as in retrieval; the query carries the task, the document is bare.
RETRIEVAL = {
    "squad_question_sentence": PASSAGES,
    "medquad": "NFCorpus",
    "pubmedqa_labelled": PASSAGES,
    "covid_qa_passages": PASSAGES,
    "wordnet_definitions": "Given a term, retrieve its definition",
    "scitldr": "Given a summary, retrieve the abstract of the paper",
    "acl_title_abstract_2016plus": TITLE,
    "wikipedia_section_paragraph": TITLE,
    "open_trivia_qa": "Given a question, retrieve its answer",
    "snli_dev_test_triplets": "Given a premise, retrieve a hypothesis that it entails",
}
# Stage 2 adds texts of one kind, all with the task in front.
SYMMETRIC = {"botframework_chitchat": "STS", "disfl_qa": "STS", "stsb": "STS"}
LABELLED = {"hwu64": "Given a user utterance as query, find the user intents"}
SIDES = ("sentence1", "sentence2")
ALIKE = 4.0  # lowest STS-B score of a positive pair, as in the paper (section 4)


@dataclass(frozen=True)
class Settings:
    """All that the runs have in common; sizes in the unit that the comment names."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 6
    num_latents: int = 32
    steps: int = 120  # of each stage; one stage takes twice as many
    batch_size: int = 32  # examples
    n_negatives: int = 3
    max_tokens: int = 48  # of a text in training, the instruction not counted
    max_tokens_scored: int = 128
    temperature: float = 0.05
    learning_rate: float = 1e-3
    embedding_learning_rate: float = 3e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_share: float = 0.1

    @property
    def examples_per_set(self) -> int:
        """Return the most examples that a set may give; together more than the runs need."""
        return 10 * self.steps


@dataclass(frozen=True)
class Run:
    """One model to train."""

    pooling: str
    attention: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        """Return its file's name."""
        parts = (self.pooling, self.attention, self.schedule, self.seed)
        return "-".join(str(part) for part in parts).replace(" ", "_")


# Texts


def bundled_folder() -> Path:
    """Return the folder of the bundled model: its tokenizer and word vectors are the start."""
    return resolve_source("skembed-mini").folder


def load_tokenizer() -> TextTokenizer:
    """Return the bundled model's tokenizer."""
    return TextTokenizer.from_folder(bundled_folder(), bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text and its first pooled position."""

    ids: np.ndarray
    pool_start: int


def encode(
    tokenizer: TextTokenizer, texts: Sequence[str], instruction: str | None, max_tokens: int
) -> list[Tokens]:
    """Return token ids behind the instruction; a text that is cut keeps its end token.

    The package cuts the end token off, as the published model does. Here so many texts are cut
    that end-of-sequence pooling would be another thing than in the paper.
    """
    prefix = format_instruction(TEMPLATE, resolve_instruction(instruction))
    encoded = tokenizer.encode(texts, prefix=prefix, max_length=100_000)
    limit = encoded.pool_start + max_tokens
    return [
        Tokens(
            ids if len(ids) <= limit else np.append(ids[: limit - 1], ids[-1]), encoded.pool_start
        )
        for ids in encoded.ids
    ]


def encode_sides(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    instructions: Sequence[str | None],
    max_tokens: int,
) -> list[Tokens]:
    """Encode each text behind an instruction of its own, in the order of the texts."""
    tokens: dict[int, Tokens] = {}
    for instruction in dict.fromkeys(instructions):
        rows = [i for i, own in enumerate(instructions) if own == instruction]
        encoded = encode(tokenizer, [texts[i] for i in rows], instruction, max_tokens)
        tokens.update(zip(rows, encoded, strict=True))
    return [tokens[i] for i in range(len(texts))]


# Examples


def read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """Return the rows of a file; a fixed random choice where there are more than `limit`."""
    rows = list(corpus.read_rows(path))
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit]]


def pair_rows(data: Path, name: str, limit: int) -> list[tuple[str, ...]]:
    """Return distinct rows (anchor, positive) or (anchor, positive, negative)."""
    if name == "stsb":
        rows = read_rows(data / "eval/sts/stsb/train.jsonl.gz", 1_000_000)
        rows = [row for row in rows if row["score"] >= ALIKE]
        texts = [(row[a], row[b]) for row in rows for a, b in (SIDES, SIDES[::-1])][:limit]
    else:
        rows = read_rows(data / f"train/permissive/pairs/{name}.jsonl.gz", limit)
        keys = ("query", "positive", "negative")
        texts = [tuple(row[key] for key in keys if row.get(key)) for row in rows]
    stripped = [tuple(text.strip() for text in row) for row in texts]
    return list(dict.fromkeys(row for row in stripped if all(row) and len(set(row)) == len(row)))


def with_negatives(rows: list[tuple[str, ...]], n: int) -> list[tuple[str, ...]]:
    """Return rows of n negatives: the given one, then mined ones (arXiv 2407.15831's rule)."""
    mined = mine_hard_negatives(
        [row[:2] for row in rows], vectorizer=NVEmbedVectorizer(), n_negatives=n
    )
    complete = []
    for position, chosen in zip(mined.positions, mined.indices, strict=True):
        row = rows[position]
        more = [mined.corpus[i] for i in chosen if i >= 0]
        negatives = list(dict.fromkeys([*row[2:], *more]))[:n]
        if len(negatives) == n and not set(negatives) & set(row[:2]):
            complete.append((*row[:2], *negatives))
    return complete


def labelled_rows(data: Path, name: str, n: int, limit: int) -> list[tuple[str, ...]]:
    """Return rows by example (section 4.2): a text of the same class, n of other classes."""
    rows = read_rows(data / f"eval/classification/{name}/train.jsonl.gz", 1_000_000)
    texts = np.array([row["text"].strip() for row in rows])
    labels = np.array([row["label"] for row in rows])
    rng = np.random.default_rng(0)
    examples = []
    for i in range(min(limit, len(texts))):
        same = np.flatnonzero((labels == labels[i]) & (texts != texts[i]))
        others = rng.choice(np.flatnonzero(labels != labels[i]), n, replace=False)
        if len(same):
            examples.append((str(texts[i]), str(texts[rng.choice(same)]), *map(str, texts[others])))
    return examples


def collect_examples(data: Path, settings: Settings) -> list[dict[str, Any]]:
    """Return all examples that the seeds draw from."""
    n, limit = settings.n_negatives, settings.examples_per_set
    examples = []
    for name, instruction in {**RETRIEVAL, **SYMMETRIC, **LABELLED}.items():
        if name in LABELLED:
            rows = labelled_rows(data, name, n, limit)
        else:
            rows = with_negatives(pair_rows(data, name, limit), n)
        print(f"{name}: {len(rows)} examples", flush=True)
        kind = {"set": name, "instruction": instruction, "retrieval": name in RETRIEVAL}
        examples += [{**kind, "texts": row} for row in rows]
    return examples


@dataclass(frozen=True)
class Example:
    """Anchor, positive and negatives, tokenised."""

    retrieval: bool
    texts: list[Tokens]


@lru_cache(maxsize=1)
def load_examples(path: Path, settings: Settings) -> list[Example]:
    """Return the examples of a file, tokenised; documents of retrieval bare."""
    tokenizer = load_tokenizer()
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    sides = [
        None if row["retrieval"] and k else row["instruction"]
        for row in rows
        for k in range(len(row["texts"]))
    ]
    texts = [text for row in rows for text in row["texts"]]
    tokens = iter(encode_sides(tokenizer, texts, sides, settings.max_tokens))
    return [Example(row["retrieval"], [next(tokens) for _ in row["texts"]]) for row in rows]


@dataclass(frozen=True)
class Stage:
    """A pass over examples with one optimizer."""

    name: str
    examples: list[Example]
    in_batch: bool


def plan_stages(examples: list[Example], run: Run, settings: Settings) -> list[Stage]:
    """Return the stages of a run; the examples of a seed are the same in all its runs."""
    rng = np.random.default_rng(run.seed)
    size = settings.steps * settings.batch_size
    retrieval = rng.permutation([i for i, example in enumerate(examples) if example.retrieval])
    first = retrieval[:size]
    second = rng.permutation(np.setdiff1d(np.arange(len(examples)), first))[:size]
    if len(second) < size:
        raise ValueError(f"{len(examples)} examples are too few for {2 * size}; lower --steps")
    if run.schedule == "two stages":
        return [
            Stage("stage 1", [examples[i] for i in first], in_batch=True),
            Stage("stage 2", [examples[i] for i in second], in_batch=False),
        ]
    blended = rng.permutation(np.concatenate([first, second]))
    in_batch = run.schedule == "in-batch on"
    return [Stage(run.schedule, [examples[i] for i in blended], in_batch)]
