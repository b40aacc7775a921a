"""Every choice behind the bundled model, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

# Both are scraped third-party text under a repository licence: not for weights we give away.
LEFT_OUT = ("news_and_clickbait_headlines", "covid_faq")


@dataclass(frozen=True)
class Recipe:
    """One training run of the bundled model; sizes in the unit the comment names."""

    # Corpus
    texts_per_file: int = 11_000  # cap, so that no source dominates
    max_texts: int = 425_984  # of all, at random: what one hour of two cores can make use of
    long_share: float = 0.2  # of the texts above `span_words` kept long instead of cut to a span
    span_words: tuple[int, int] = (8, 48)  # words of a span cut from a long text
    long_words: int = 170  # words, cap of the texts kept long
    teacher_max_length: int = 256  # tokens, the teacher's own limit
    random_state: int = 0

    # Tokenizer
    vocab_size: int = 24_576

    # Architecture (Mistral names)
    hidden_size: int = 384  # = the teacher's dimension: the static start and the loss need no map
    intermediate_size: int = 1_024
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    num_latents_value: int = 64
    num_cross_heads: int = 4
    cross_dim_head: int = 96
    ff_mult: int = 2
    max_length: int = 512  # tokens

    # Optimisation
    batch_size: int = 256  # texts
    learning_rate: float = 1.5e-3
    embedding_learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 150
    passes: float = 0.9  # over the corpus
    similarity_weight: float = 20.0  # of the similarity-matrix loss beside 1 - cosine
    max_grad_norm: float = 1.0
    checkpoint_every_s: float = 120.0
    dtype: str = field(default="bfloat16")
    # What a reader of the card must know of the run that made the bundled weights.
    run_note: str = (
        "planned for 1.3 passes and shortened twice while it ran (at steps 280 and 983), so the "
        "learning rate fell in three pieces"
    )

    def to_dict(self) -> dict[str, object]:
        """The recipe as plain values, for the model card and the checkpoint."""
        return asdict(self)


def work_paths(work: Path) -> dict[str, Path]:
    """Files of one run below the folder `work` (kept out of git)."""
    return {
        "texts": work / "texts.jsonl",
        "tokenizer": work / "tokenizer.json",
        "teacher": work / "teacher.npy",
        "teacher_done": work / "teacher_done.json",
        "vocabulary": work / "vocabulary_vectors.npy",
        "checkpoint": work / "checkpoint.pt",
        "log": work / "log.jsonl",
    }
