"""What was tried for the architecture: every variant trained at the same cost, and its speed.

    python benchmarks/ablation/architecture_search.py --work WORK --data DATA [--only NAME ...]
    python benchmarks/ablation/architecture_search.py --work WORK --data DATA --speed

The first command inherits, trains and scores each variant that has no result yet; the second,
on a machine that does nothing else, measures the texts per second of them all in turns. Scores
are of development splits and train folds only. Results gather in
benchmarks/results/architecture.json, and the table in architecture.md.

Cost is counted in multiply-adds, three times the student's forward pass and once the teacher's,
so that a small variant takes more steps than a large one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RESULTS,
    SCORES,
    describe_machine,
    make_record,
    seconds,
    table,
    write_page,
    write_record,
)
from export import export
from prepare import inherit, load_tokenizer, read_texts, write_corpus
from recipe import Recipe, work_paths
from train import Distillation, batches

from skembed import NVEmbedVectorizer

NAME = "architecture"
STEPS = 120  # of the recipe's own architecture
SPEED_TEXTS = 2_000
ROUNDS = 5
CHOSEN = "the bundled model"
VARIANTS: dict[str, dict[str, Any]] = {  # what differs from the recipe
    CHOSEN: {},
    "the same, other texts": {"random_state": 1},
    "3 layers, MLP 1280": {
        "layer_groups": ((0, 1), (2, 3), (4, 5)),
        "intermediate_size": 1_280,
    },
    "6 layers, MLP 512": {
        "layer_groups": tuple((k,) for k in range(6)),
        "intermediate_size": 512,
    },
    "256 wide": {"hidden_size": 256},
    "MLP 1408": {"intermediate_size": 1_408},
    "12 heads": {"num_attention_heads": 12},
    "3 of keys and values": {"heads_per_key": 2},
    "16 latents": {"num_latents_value": 16},
    "8,192 pieces": {"vocab_size": 8_192},
}
TEACHER_PRODUCTS = 6 * (4 * 384 * 384 + 2 * 384 * 1_536)


def find_folder(work: Path, name: str) -> Path:
    """Return the folder of a variant."""
    return work / "search" / name.replace(", ", "-").replace(" ", "_")


def count_products(recipe: Recipe) -> int:
    """Count the multiply-adds of a token's forward pass, but for the few of attention itself."""
    wide, inner = recipe.hidden_size, recipe.head_dim * recipe.num_attention_heads
    shared = inner // recipe.heads_per_key
    layer = 2 * wide * (inner + shared) + 3 * wide * recipe.intermediate_size
    cross = recipe.num_cross_heads * recipe.cross_dim_head
    pooling = 2 * cross * (wide + recipe.num_latents_value) + 3 * wide * wide * recipe.ff_mult
    return len(recipe.layer_groups) * layer + pooling


def step_cost(recipe: Recipe, tokens_per_text: float) -> float:
    """Count the multiply-adds of one step: forward and backward here, forward in the teacher."""
    per_token = 3 * count_products(recipe) + TEACHER_PRODUCTS
    return per_token * tokens_per_text * recipe.batch_size


def mean_tokens(texts: list[str], paths: dict[str, Path], recipe: Recipe) -> float:
    """Return the mean tokens of a text with the tokenizer of `paths`, over the held-out texts."""
    tokenizer = load_tokenizer(paths)
    held = texts[: recipe.held_out_texts]
    return float(tokenizer.encode(held, prefix="", max_length=recipe.max_length).lengths.mean())


def try_variant(name: str, arguments: argparse.Namespace, shared: dict[str, Path]) -> dict:
    """Inherit, train at the common cost, score on the development splits, and export."""
    base = replace(Recipe(), warmup_steps=10, calibration_tokens=20_000)
    recipe = replace(base, **VARIANTS[name])
    folder = find_folder(arguments.work, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = work_paths(folder)
    for part in ("texts", "long_texts"):
        paths[part] = shared[part]
    if recipe.vocab_size == base.vocab_size:
        for part in ("tokenizer", "teacher_ids"):
            shutil.copyfile(shared[part], paths[part])
    write_corpus(arguments.data, paths, recipe)  # what is missing of it
    texts, long_texts = read_texts(paths), read_texts(paths, "long_texts")
    tokens = mean_tokens(texts, paths, recipe)
    budget = STEPS * step_cost(base, mean_tokens(texts, shared, base))
    steps = round(budget / step_cost(recipe, tokens))
    report = inherit(texts, paths, recipe)
    tokenizer = load_tokenizer(paths)
    first = 300 * recipe.random_state  # other texts for another state
    run = Distillation(recipe, paths, tokenizer)
    run.run(
        lambda step: batches(texts, long_texts, tokenizer, recipe, first + step),
        steps,
        arguments.data,
        score_start=False,
    )
    log = [json.loads(line) for line in paths["log"].open()]
    export(paths, folder / "model", recipe)
    paths["checkpoint"].unlink()
    paths["start"].unlink()
    return {
        "layers": len(recipe.layer_groups),
        "wide": recipe.hidden_size,
        "heads": recipe.num_attention_heads,
        "heads of keys": recipe.num_attention_heads // recipe.heads_per_key,
        "MLP": recipe.intermediate_size,
        "latents": recipe.num_latents_value,
        "pieces": len(np.load(paths["teacher_ids"])),
        "tokens per text": round(tokens, 2),
        "multiply-adds per token": count_products(recipe),
        "MB in bfloat16": round(sum(p.nbytes for p in run.model.parameters()) / 1e6, 1),
        "steps": steps,
        "left of the token vectors": round(report["end"]["token vectors"], 3),
        "end": log[-1],
    }


def measure_speeds(results: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Add texts a second of each exported variant, run in turns; ratios are medians of rounds."""
    texts = read_texts(work_paths(arguments.work))[:SPEED_TEXTS]
    models = {}
    for name in results:
        folder = find_folder(arguments.work, name) / "model"
        if folder.exists():
            model = NVEmbedVectorizer(str(folder), trainer=None, cache=None, verbose=False)
            models[name] = model.fit(["a"])
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            model.transform(texts[:500])  # the weights are there, the products prepared
            spent = seconds(partial(model.transform, texts))
            if turn:
                times[name].append(spent)
    for name, spent in times.items():
        ratios = [b / a for a, b in zip(spent, times[CHOSEN], strict=True)]
        results[name]["texts/s"] = round(len(texts) / statistics.median(spent))
        results[name]["speed"] = round(statistics.median(ratios), 3)


def read_results() -> dict[str, dict]:
    """Return the results so far, by variant."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["values"] if path.exists() else {}


def describe(name: str, result: dict) -> list[str]:
    """Return one row of the table."""
    scores = [result["end"][score] for score in SCORES]
    return [
        name.replace(" ", "&nbsp;"),
        f"{np.mean(scores):.2f}",
        f"{result['speed']:.2f}" if "speed" in result else "",
        f"{result['multiply-adds per token'] / 1e6:.2f}",
        f"{result['MB in bfloat16']:.1f}",
        f"{result['steps']}",
        f"{result['left of the token vectors']:.3f}",
        *(f"{score:.1f}" for score in scores),
    ]


def write_result(results: dict[str, dict]) -> None:
    """Write benchmarks/results/architecture.json, and its page as architecture.md."""
    record = make_record(NAME, "architecture_search", values=results)
    write_record(record, RESULTS)
    write_page(record, render(record), RESULTS)


def render(record: dict) -> list[str]:
    """Return the parts of a record's page."""
    results, chosen = record["values"], Recipe()
    header = ["variant", "mean", "speed", "products", "MB", "steps", "left", *SCORES]
    rows = [describe(name, results[name]) for name in VARIANTS if name in results]
    return [
        "# Architectures tried, each at the same training cost",
        f"`{record['command']}`, {record['date']}. The bundled model: {len(chosen.layer_groups)} "
        f"layers, {chosen.hidden_size} wide, {chosen.num_attention_heads} heads of "
        f"{chosen.head_dim}, as many of keys and values, MLP {chosen.intermediate_size}, "
        f"{chosen.num_latents_value} latents, {chosen.vocab_size:,} pieces; the others differ in "
        "what their name says. Products: millions of multiply-adds a token. Steps: what the cost "
        f"of {STEPS} of the bundled model's pays. Speed: texts a second, as a multiple of the "
        "bundled model's in the same rounds. Left: at the start, share of the variance of the "
        "teacher's token vectors that the student lacks before training. Scores of "
        "development splits and train folds, percent.",
        table(header, rows, "|---|"),
        describe_machine(record),
    ]


def main() -> None:
    """Run the variants that have no result yet, or time those that have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and train/")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--speed", action="store_true", help="time what is there")
    arguments = parser.parse_args()
    shared = work_paths(arguments.work)
    results = read_results()
    if arguments.speed:
        measure_speeds(results, arguments)
        write_result(results)
        return
    write_corpus(arguments.data, shared, Recipe())
    for name in arguments.only:
        if name not in read_results():
            result = try_variant(name, arguments, shared)
            write_result({**read_results(), name: result})  # others may be at work beside us


if __name__ == "__main__":
    main()
