"""Every choice behind the bundled model, in one place."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Both are scraped third-party text under a repository licence: not for weights we give away.
LEFT_OUT = ("news_and_clickbait_headlines", "covid_faq")

SCHOLARLY_FILES = (  # abstracts, textbooks, medical answers: long texts full of terms
    "acl_title_abstract_2016plus",
    "covid_qa_passages",
    "d2l_deep_learning_book",
    "medquad",
    "openstax_heading_paragraph",
    "pubmedqa_labelled",
    "scitldr",
)


@dataclass(frozen=True)
class Refinement:
    """One pass of refine.py; its rate falls to nothing."""

    steps: int
    learning_rate: float = 1e-4  # half of it for the word vectors
    token_weight: float = 1.0
    max_length: int = 256  # tokens
    related_words: int = 200  # words, cap of a text of the block


@dataclass(frozen=True)
class Recipe:
    """One training run of the bundled model; sizes in the unit the comment names."""

    # Corpus
    texts_per_file: int = 30_000  # cap, so that no source dominates
    max_texts: int = 1_000_000
    long_share: float = 0.25  # of the texts above `span_words` kept long instead of cut to a span
    span_words: tuple[int, int] = (6, 48)  # words of a span cut from a long text
    long_words: int = 180  # words, cap of the texts kept long
    long_texts_per_file: int = 6_000  # of those used late in training
    held_out_texts: int = 4_096  # never trained on, to measure agreement with the teacher
    random_state: int = 0

    # Tokenizer
    vocab_size: int = 24_576

    # Architecture (Mistral names)
    hidden_size: int = 384  # = the teacher's dimension: no map between the two is needed
    intermediate_size: int = 896
    num_attention_heads: int = 6
    heads_per_key: int = 1  # attention heads that share one head of keys and values
    head_dim: int = 32  # = the teacher's, so that its heads can be inherited
    rope_theta: float = 1e6
    # The teacher's layers that each of ours stands for.
    layer_groups: tuple[tuple[int, ...], ...] = ((0,), (1, 2), (3, 4), (5,))
    num_latents_value: int = 64
    num_cross_heads: int = 2
    cross_dim_head: int = 96
    ff_mult: int = 1
    max_length: int = 256  # tokens, the teacher's own limit

    # Inheritance: least squares on the teacher's own activations
    calibration_tokens: int = 40_000
    ridge: float = 1e-3  # relative to the mean variance of the inputs

    # Distillation
    steps: int = 1_330
    long_from_step: int = 694  # from here on, half of a batch's texts give way to long ones
    long_per_batch: int = 24
    batch_size: int = 256  # texts
    learning_rate: float = 4e-4
    embedding_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 60
    max_grad_norm: float = 1.0
    similarity_weight: float = 20.0  # of the similarity-matrix loss beside 1 - cosine
    token_weight: float = 1.0  # of 1 - cosine of each token vector
    checkpoint_every_s: float = 120.0

    # Refinement: distillation goes on, with a block of related texts in every batch
    refinements: tuple[Refinement, ...] = (
        Refinement(steps=900, learning_rate=1.5e-4),
        Refinement(steps=300, token_weight=0.0, max_length=512, related_words=350),
        Refinement(steps=480, token_weight=0.0, max_length=512, related_words=350),
    )
    averaged: int = 2  # of the last refinements: their weights' mean is the model
    refine_texts: int = 64
    refine_long_texts: int = 12
    related_texts: int = 64  # at most, of one source
    related_tokens: int = 3_000  # at most, all together
    related_favoured: tuple[str, ...] = SCHOLARLY_FILES  # drawn three times as often
    ranking_weight: float = 0.2
    ranking_temperature: float = 0.05

    def for_refinement(self, number: int) -> Recipe:
        """Return this recipe with the rates and weights of a refinement."""
        chosen = self.refinements[number]
        return replace(
            self,
            learning_rate=chosen.learning_rate,
            embedding_learning_rate=chosen.learning_rate / 2,
            token_weight=chosen.token_weight,
            max_length=chosen.max_length,
        )

    @property
    def taught_length(self) -> int:
        """Tokens of the longest text that any part of the run has seen."""
        return max(self.max_length, *(part.max_length for part in self.refinements))

    def to_dict(self) -> dict[str, object]:
        """Return the recipe as plain values, for the model card and the checkpoint."""
        return asdict(self)


def work_paths(work: Path) -> dict[str, Path]:
    """Return the files of one run below the folder `work` (kept out of git)."""
    names = "texts.jsonl long_texts.jsonl tokenizer.json teacher_ids.npy basis.npy start.pt"
    return {Path(n).stem: work / n for n in [*names.split(), "checkpoint.pt", "log.jsonl"]}


def refine_paths(paths: dict[str, Path], number: int) -> dict[str, Path]:
    """Return the same files for a refinement, with a start, a checkpoint and a log of its own."""
    renamed = {
        name: paths[name].with_stem(f"{paths[name].stem}-refine-{number + 1}")
        for name in ("start", "checkpoint", "log")
    }
    return {**paths, **renamed}


def parse_folders(description: str, **more: str) -> argparse.Namespace:
    """Read `--work` and the folders `more`, each with its help, from the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, text in {"work": "folder of the training run", **more}.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    return parser.parse_args()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
