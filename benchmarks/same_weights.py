"""Texts per second against sentence-transformers on the very same Mistral weights.

Run: python benchmarks/same_weights.py [--full] [--texts 1200] [--dtype bfloat16] [--repeats 3]
The backbone of skembed-mini, written as a plain Mistral folder with `is_causal` false, mean
pooling, the same token ids on both sides, the same type. Mixed lengths, and equal lengths, where
nothing is padded on either side. The peer runs with its default batch size and with its best.
Vectors are compared first: a comparison of different functions would say nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    compare,
    cosines,
    describe_lengths,
    load_texts,
    make_parser,
    read_rows,
    seconds,
    skip,
    start,
)
from _results import Figure, finish
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from skembed import NVEmbedVectorizer
from skembed.model.checkpoint import BACKBONE_PREFIX
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import load_tokenizer
from skembed.model.sources import read_config, resolve_source

MIN_RATIO = {"mixed lengths": 1.5, "equal lengths": 1.0}
BATCH_SIZES = (32, 64, 128, 256)
MAX_LENGTH = 512
EQUAL_LENGTH = 64
MIN_COSINE = 0.999
MAX_DIFFERENCE = 1e-4  # of a component of unit vectors, in float32


def write_plain_config(folder: Path, config: NVEmbedConfig) -> None:
    """Write config.json of the backbone as a plain Mistral model that looks both ways."""
    values = {
        **config.mistral_config().to_dict(),
        "model_type": "mistral",
        "architectures": ["MistralModel"],
        "is_causal": False,
        "sliding_window": None,
        "pad_token_id": None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")


def export_backbone(ours: Path, theirs: Path) -> None:
    """Write the backbone of skembed-mini as a plain Mistral folder for each side.

    Weights and configuration are the same; the peer's tokenizer puts the end token itself.
    """
    source = resolve_source("skembed-mini")
    weights = load_file(source.folder / "model.safetensors")
    kept = {
        name.removeprefix(BACKBONE_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(BACKBONE_PREFIX)
    }
    for folder in (ours, theirs):
        folder.mkdir()
        write_plain_config(folder, read_config(source))
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source.folder / "tokenizer.json", ours / "tokenizer.json")
    export_tokenizer(theirs)


def export_tokenizer(folder: Path) -> None:
    """Write the tokenizer of skembed-mini for the peer, with begin and end token around a text."""
    source = resolve_source("skembed-mini")
    config = read_config(source)
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    ids = (config.bos_token_id, config.eos_token_id)
    bos, eos = (tokenizer.id_to_token(number) for number in ids)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=list(zip((bos, eos), ids, strict=True))
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(folder)


def load_peer(folder: Path, dtype: str, device: str = "cpu", backbone: Any = None) -> Any:
    """Return sentence-transformers on a plain folder: mean pooling, unit length.

    `backbone`, a `MistralModel`, takes the place of the folder's own weights.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import (
            Normalize,
            Pooling,
            Transformer,
        )
    except ImportError as error:
        skip(f"{error}. The peers come with the extra: pip install skembed[bench]")
    transformer = Transformer(str(folder), model_kwargs={"dtype": getattr(torch, dtype)})
    if backbone is not None:
        transformer.model = backbone
    pooling = Pooling(transformer.model.config.hidden_size, "mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)


class SameIds:
    """Both sides' token ids, to choose texts on which they agree."""

    def __init__(self, peer: Any) -> None:
        source = resolve_source("skembed-mini")
        self.ours = load_tokenizer(source.folder, read_config(source))
        self.theirs = peer.tokenizer

    def keep(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        """Texts that neither side cuts, and their token counts; other ids end the benchmark."""
        # The two sides cut differently (NV-Embed drops the end token), so no text is cut.
        mine = self.ours.encode(texts, prefix="", max_length=100 * MAX_LENGTH)
        short = np.flatnonzero(mine.lengths < MAX_LENGTH)
        theirs = self.theirs([texts[i] for i in short])["input_ids"]
        for i, ids in zip(short, theirs, strict=True):
            if list(mine.ids[i]) != list(ids):
                sys.exit(f"same_weights.py: the two sides read other token ids in text {i}.")
        return [texts[i] for i in short], mine.lengths[short]


def cut_equal(texts: list[str], ids: SameIds, n_texts: int) -> list[str]:
    """Return distinct pieces of texts that are `EQUAL_LENGTH` tokens long, both ends counted."""
    inner = EQUAL_LENGTH - 2
    pieces: dict[str, None] = {}
    for encoding, text in zip(ids.ours.tokenizer.encode_batch(texts), texts, strict=True):
        offsets = [pair for pair in encoding.offsets if pair[1] > pair[0]]
        for k in range(0, len(offsets) - inner + 1, inner):
            pieces[text[offsets[k][0] : offsets[k + inner - 1][1]].strip()] = None
    candidates = list(pieces)
    lengths = ids.ours.encode(candidates, prefix="", max_length=MAX_LENGTH).lengths
    kept = [text for text, n in zip(candidates, lengths, strict=True) if n == EQUAL_LENGTH]
    if len(kept) < n_texts:
        sys.exit(f"same_weights.py: {len(kept)} pieces of equal length; {n_texts} are needed.")
    return kept[:n_texts]


def find_best_batch(peer: Any, texts: list[str]) -> tuple[int, dict[int, float]]:
    """Return the peer's fastest batch size on a part of the texts, and the seconds of each."""
    part = texts[: max(256, len(texts) // 4)]
    times = {
        size: round(seconds(partial(peer.encode, part, batch_size=size)), 3) for size in BATCH_SIZES
    }
    return min(times, key=times.__getitem__), times


def check_vectors(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> dict[str, float]:
    """Return how close both sides' vectors are; end the benchmark where they differ."""
    found = {
        "smallest cosine": float(cosines(ours, theirs).min()),
        "largest difference": float(np.abs(ours - theirs).max()),
    }
    exact = dtype == "float32"
    if found["smallest cosine"] < MIN_COSINE or (
        exact and found["largest difference"] > MAX_DIFFERENCE
    ):
        sys.exit(f"same_weights.py: the two sides compute different vectors: {found}.")
    return found


def run_case(
    name: str, texts: list[str], sides: tuple[NVEmbedVectorizer, Any], dtype: str, repeats: int
) -> tuple[list[Figure], dict[str, Any]]:
    """Compare both sides on one set of texts."""
    vectorizer, peer = sides
    agreement = check_vectors(vectorizer.transform(texts), peer.encode(texts), dtype)
    best, times = find_best_batch(peer, texts)
    values: dict[str, Any] = {"vectors": agreement, "peer, s by batch size": times}
    figures = []
    for label, size in (("default batch size", 32), ("best batch size", best)):
        print(f"{name}, {dtype}, peer's {label} ({size})", flush=True)
        result = compare(
            ("skembed", "sentence-transformers"),
            partial(vectorizer.transform, texts),
            partial(peer.encode, texts, batch_size=size),
            repeats=repeats,
        )
        values[f"peer's {label} ({size})"] = result.to_dict(len(texts))
        figures.append(
            Figure(f"ratio, {name}, peer's {label} ({size})", result.ratio, MIN_RATIO[name])
        )
        if best == 32:  # its default is its best: one comparison says both
            break
    return figures, values


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=1_200)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    args = start(parser, full={"texts": 2_000})
    mixed = load_texts(args.data, args.texts)
    abstracts = [row["text"] for row in read_rows(args.data, "retrieval/scifact", "corpus")]
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = (Path(temporary) / name for name in ("ours", "theirs"))
        export_backbone(ours, theirs)
        peer = load_peer(theirs, args.dtype)
        vectorizer = NVEmbedVectorizer(
            ours, pooling="mean", dtype=args.dtype, cache=None, trainer=None
        )
        ids = SameIds(peer)
        mixed, lengths = ids.keep(mixed)
        equal = cut_equal(abstracts, ids, args.texts)
        equal, equal_lengths = ids.keep(equal)
        figures: list[Figure] = []
        values: dict[str, Any] = {
            "dtype": args.dtype,
            "mixed lengths, tokens": describe_lengths(lengths),
            "equal lengths, tokens": describe_lengths(equal_lengths),
        }
        for name, texts in (("mixed lengths", mixed), ("equal lengths", equal)):
            found, values[name] = run_case(
                name, texts, (vectorizer, peer), args.dtype, args.repeats
            )
            figures += found
    title = f"Against sentence-transformers on the same weights, {args.dtype}"
    return finish(f"same_weights_{args.dtype}", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
