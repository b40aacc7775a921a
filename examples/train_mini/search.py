"""What was tried before the architecture was chosen: each variant trained for the same minutes.

    python examples/train_mini/search.py --work WORK --data DATA --minutes 3 [--only NAME ...]

Chosen by development splits and train folds only. Results gather in WORK/search.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from prepare import inherit, load_tokenizer, read_texts, write_corpus
from recipe import Recipe, work_paths
from train import Distillation

FOUR = ((0,), (1, 2), (3, 4), (5,))
SIX = tuple((k,) for k in range(6))
# Name: what differs from the recipe.
VARIANTS = {
    "4 layers, 8 heads, MLP 1024": {
        "layer_groups": FOUR,
        "num_attention_heads": 8,
        "intermediate_size": 1_024,
    },
    "6 layers, 8 heads, MLP 512": {
        "layer_groups": SIX,
        "num_attention_heads": 8,
        "intermediate_size": 512,
    },
    "5 layers, 8 heads, MLP 704": {
        "layer_groups": ((0,), (1,), (2, 3), (4,), (5,)),
        "num_attention_heads": 8,
        "intermediate_size": 704,
    },
    "3 layers, 8 heads, MLP 1472": {
        "layer_groups": ((0, 1), (2, 3), (4, 5)),
        "num_attention_heads": 8,
        "intermediate_size": 1_472,
    },
    "4 layers, 8 heads, MLP 704": {
        "layer_groups": FOUR,
        "num_attention_heads": 8,
        "intermediate_size": 704,
    },
    "3 layers, 8 heads, MLP 1088": {
        "layer_groups": ((0, 1), (2, 3), (4, 5)),
        "num_attention_heads": 8,
        "intermediate_size": 1_088,
    },
    "4 layers, 12 heads, MLP 848": {
        "layer_groups": FOUR,
        "num_attention_heads": 12,
        "intermediate_size": 848,
    },
    "4 layers, 6 heads, MLP 896": {"layer_groups": FOUR, "num_attention_heads": 6},
    "6 layers, 6 heads, MLP 576": {
        "layer_groups": SIX,
        "num_attention_heads": 6,
        "intermediate_size": 576,
    },
}


def try_variant(name: str, arguments: argparse.Namespace, shared: dict[str, Path]) -> dict:
    """Inherit, train for the given minutes, and score on the development splits."""
    recipe = replace(Recipe(), **VARIANTS[name])
    folder = arguments.work / "search" / name.replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = work_paths(folder)
    for part in ("texts", "tokenizer", "teacher_ids"):
        paths[part] = shared[part]
    texts, tokenizer = read_texts(paths), load_tokenizer(paths)
    model, report = inherit(texts, tokenizer, np.load(paths["teacher_ids"]), recipe)
    torch.save(model.state_dict(), paths["start"])
    Distillation(recipe, paths, texts, tokenizer).run(arguments.minutes, arguments.data)
    log = [json.loads(line) for line in paths["log"].open()]
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    return {
        "parameters without word vectors": body,
        "left of the token vectors": round(report["end"]["token vectors"], 3),
        "start": log[0],
        "end": log[-1],
    }


def main() -> None:
    """Run the variants that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and train/")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    shared = work_paths(arguments.work)
    write_corpus(arguments.data / "train" / "permissive", shared, Recipe())
    path = arguments.work / "search.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.only:
        if name not in results:
            results[name] = try_variant(name, arguments, shared)
            path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
