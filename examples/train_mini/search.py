"""What was tried for the architecture: each variant trained on the same texts, and its speed.

    python examples/train_mini/search.py --work WORK --data DATA [--steps 80] [--only NAME ...]

Scores are of development splits and train folds only. A variant that has a result is not run
again; results gather in benchmarks/results/architecture.json, and the table in architecture.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from prepare import inherit, load_tokenizer, read_texts, write_corpus
from recipe import Recipe, work_paths
from train import Distillation, batches, embedder

from skembed.model import NVEmbedModel
from skembed.tokenization import TextTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _results import RESULTS, describe_machine, package_versions

NAME = "architecture"
SCORES = ("stsb", "sickr", "banking77", "hwu64", "emotion", "trecqa", "scifact")
MAX_TOKENS = 512
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


def measure_speed(model: NVEmbedModel, tokenizer: TextTokenizer, texts: list[str]) -> int:
    """Tokens a second of the folded model in bfloat16, best of three passes over the texts."""
    model.to(torch.bfloat16)
    model.use_lean_modules()
    model.fold_pooling()
    embed = embedder(model, tokenizer, MAX_TOKENS)
    count = int(tokenizer.encode(texts, prefix="", max_length=MAX_TOKENS).lengths.sum())
    times = []
    for _ in range(4):  # the first prepares the matrix products
        begin = time.perf_counter()
        embed(texts)
        times.append(time.perf_counter() - begin)
    return round(count / min(times[1:]))


def write_table(results: dict[str, dict], steps: int) -> None:
    """benchmarks/results/architecture.json, and its table as architecture.md."""
    record = {
        "benchmark": NAME,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python examples/train_mini/search.py",
        "machine": describe_machine(),
        "versions": package_versions(),
        "steps": steps,
        "values": results,
    }
    (RESULTS / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    names = [name for name in next(iter(results.values()))["end"] if name in SCORES]
    lines = [
        f"# Architectures tried, {steps} steps each",
        "",
        f"`{record['command']}`, {record['date']}. Scores of development splits, percent.",
        "",
        f"| variant | M weights | tokens/s | mean at the start | {' | '.join(names)} | mean |",
        "|---" * (len(names) + 5) + "|",
    ]
    for variant, result in results.items():
        scores = [result["end"][name] for name in names]
        start = [value for name, value in result["start"].items() if name in SCORES]
        cells = [
            variant,
            f"{result['parameters without word vectors'] / 1e6:.1f}",
            f"{result['tokens/s']:,}",
            f"{sum(start) / len(start):.1f}",
            *(f"{score:.1f}" for score in scores),
            f"{sum(scores) / len(scores):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machine = record["machine"]
    lines += ["", f"Machine: {machine['processor']}, {machine['cores']} cores.", ""]
    (RESULTS / f"{NAME}.md").write_text("\n".join(lines), encoding="utf-8")


def try_variant(name: str, arguments: argparse.Namespace, shared: dict[str, Path]) -> dict:
    """Inherit, train for the given minutes, and score on the development splits."""
    recipe = replace(Recipe(), **VARIANTS[name])
    folder = arguments.work / "search" / name.replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = work_paths(folder)
    for part in ("texts", "long_texts", "tokenizer", "teacher_ids"):
        paths[part] = shared[part]
    texts, tokenizer = read_texts(paths), load_tokenizer(paths)
    model, report = inherit(texts, tokenizer, np.load(paths["teacher_ids"]), recipe)
    torch.save(model.state_dict(), paths["start"])
    long_texts = read_texts(paths, "long_texts")
    Distillation(recipe, paths, tokenizer).run(
        lambda step: batches(texts, long_texts, tokenizer, recipe, step),
        arguments.steps,
        arguments.data,
    )
    log = [json.loads(line) for line in paths["log"].open()]
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    return {
        "parameters without word vectors": body,
        "tokens/s": measure_speed(model, tokenizer, texts[: recipe.held_out_texts]),
        "left of the token vectors": round(report["end"]["token vectors"], 3),
        "start": log[0],
        "end": log[-1],
    }


def main() -> None:
    """Run the variants that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and train/")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    shared = work_paths(arguments.work)
    write_corpus(arguments.data / "train" / "permissive", shared, Recipe())
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["values"] if path.exists() else {}
    for name in arguments.only:
        if name not in results:
            results[name] = try_variant(name, arguments, shared)
            write_table(results, arguments.steps)


if __name__ == "__main__":
    main()
