"""Examples per second of `fit` against sentence-transformers with peft on the same weights.

Run: python benchmarks/training_speed.py [--full] [--pairs 128] [--only speed memory]
The backbone of skembed-mini as a plain Mistral folder, mean pooling, LoRA of the same rank, alpha,
dropout and layers, in-batch InfoNCE with the same temperature, AdamW, the same pairs of mixed
length in batches of the same size, each pair once. Each side in a fresh process, in turn. Ours is
the whole `fit`: checks, tokenisation, planning, training. Theirs is a plain loop around
`CachedMultipleNegativesRankingLoss`, without their Trainer's overhead: tokenise the batch, loss,
backward, clip, step. It runs with its default mini-batch of 32 texts and with the best of a sweep
over texts and tokens in a mini-batch. The loss of the first batch, whose adapters are still zero,
must agree first. `--lengths equal` says what is left of the ratio where nothing is padded.

Memory is the peak of the resident set while it trains, above its level once model, adapter and
libraries were there (Linux). Then ours alone at growing batch sizes, with default parameters on
skembed-mini, always over the same pairs. Without the data folder's training pairs, generated ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import describe_lengths, make_parser, read_rows, run_child, start
from _finetuning import Pairs, Results, count_padding, load_pairs, measure_fit
from _results import Figure
from same_weights import MAX_LENGTH, SameIds, cut_equal, export_backbone, load_peer

from skembed import ContrastiveTrainer, NVEmbedVectorizer

MIN_RATIO = 1.5
MAX_GROWTH = 10.0  # percent, from the smallest batch to the largest
MAX_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.02}
BATCH_SIZES = (64, 256, 1_024, 2_048)
DEFAULT_CHUNK = "32 texts"
CHUNKS = ("8 texts", "16 texts", "32 texts", "64 texts", "128 texts", "2048 tokens", "8192 tokens")
SHORT_SWEEP = ("16 texts", "32 texts")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, TEMPERATURE = 5e-4, 0.01, 1.0, 0.05


# One side in a process of its own


def run_ours(task: dict[str, Any], pairs: Pairs) -> dict[str, float]:
    """`fit` as a user calls it; the model is loaded before."""
    options: dict[str, Any] = {}
    if not task["bundled"]:
        options = {"model": Path(task["folder"], "ours"), "pooling": "mean"}
    options = {**options, "dtype": task["dtype"], "cache": None, "max_length": MAX_LENGTH}
    trainer = ContrastiveTrainer(
        **LORA,
        train_pooling=task["bundled"],
        batch_size=task["batch"],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
        temperature=TEMPERATURE,
        random_state=0,
    )
    frozen = NVEmbedVectorizer(**options, trainer=None)
    dim = frozen.transform([pairs[0][0]]).shape[1]

    trained = 0

    def fit(pairs: Pairs) -> float:
        nonlocal trained
        vectorizer = NVEmbedVectorizer(**options, trainer=trainer).fit(pairs)
        adapter = vectorizer.adapter_
        trained = sum(x.numel() for x in [*adapter.lora.values(), *adapter.pooling.values()])
        return float(vectorizer.history_["loss"][0])

    return {**measure_fit(fit, pairs, task["batch"]), "dim": dim, "trained_weights": trained}


def run_theirs(task: dict[str, Any], pairs: Pairs) -> dict[str, float]:
    """A plain loop around sentence-transformers' cached loss, or its plain one."""
    from peft import LoraConfig
    from sentence_transformers.sentence_transformer import losses

    peer = load_peer(Path(task["folder"], "theirs"), task["dtype"])
    peer.add_adapter(
        LoraConfig(**LORA, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    )
    torch.manual_seed(0)
    peer.train()
    size, unit = task["chunk"].split() if task["chunk"] != "uncached" else ("0", "")
    loss_fn: Any = losses.MultipleNegativesRankingLoss(peer, scale=1 / TEMPERATURE)
    if unit:
        chunk: dict[str, Any] = {
            "mini_batch_size" if unit == "texts" else "mini_batch_num_tokens": int(size)
        }
        loss_fn = losses.CachedMultipleNegativesRankingLoss(peer, scale=1 / TEMPERATURE, **chunk)
    parameters = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )

    def fit(pairs: Pairs) -> float:
        first = None
        with torch.no_grad():  # as untrained as ours at each call
            for name, parameter in peer.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        for begin in range(0, len(pairs), task["batch"]):
            columns = zip(*pairs[begin : begin + task["batch"]], strict=True)
            features = [peer.preprocess(list(texts)) for texts in columns]
            loss = loss_fn(features, torch.empty(0))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            first = loss.item() if first is None else first
        return first if first is not None else float("nan")

    found = measure_fit(fit, pairs, task["batch"])
    trained = sum(p.numel() for p in parameters)
    return {**found, "trained_weights": trained, "adapter_bits": parameters[0].itemsize * 8}


def run_task(task: dict[str, Any]) -> None:
    """Measure what the parent asks for and say so in one line."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    pairs = [
        tuple(pair)
        for pair in json.loads(Path(task["folder"], "pairs.json").read_text(encoding="utf-8"))
    ]
    runner = run_ours if task["side"] == "skembed" else run_theirs
    print(json.dumps(runner(task, pairs[: task["n_pairs"]])))


# The parent


def run_task_apart(task: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a fresh process."""
    return run_child(__file__, "--child", json.dumps(task))


def compare_sides(task: dict[str, Any], chunk: str, repeats: int) -> dict[str, Any]:
    """Run both sides in turn; ratios, and of each side the medians."""
    runs: dict[str, list[dict[str, float]]] = {"skembed": [], "sentence-transformers": []}
    ratios = []
    for _ in range(repeats):
        pair = [run_task_apart({**task, "side": side, "chunk": chunk}) for side in runs]
        for side, found in zip(runs, pair, strict=True):
            runs[side].append(found)
        ours, theirs = pair
        check_same_task(ours, theirs, task["dtype"])
        ratios.append(round(theirs["seconds"] / ours["seconds"], 3))
        print(f"  peer's {chunk}: ratio {ratios[-1]:.2f}", flush=True)
    sides = {
        side: {key: float(np.median([run[key] for run in found])) for key in found[0]}
        for side, found in runs.items()
    }
    return {
        "mini-batch": chunk,
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        **sides,
    }


def check_same_task(ours: dict[str, float], theirs: dict[str, float], dtype: str) -> None:
    """End the benchmark where the sides train other weights, or begin with another loss."""
    first, other = ours["first_loss"], theirs["first_loss"]
    if abs(first - other) > MAX_LOSS_DIFFERENCE[dtype]:
        sys.exit(f"training_speed.py: first loss {first} here, {other} there: not the same task.")
    if ours["trained_weights"] != theirs["trained_weights"]:
        sys.exit("training_speed.py: the two sides train different numbers of weights.")


def measure_speed(results: Results, task: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare with the peer's default mini-batch, sweep, and compare with its best."""
    part = f"speed, {args.lengths} lengths, {args.dtype}, batch {args.batch}"
    if not results.has(part, "peer's default"):
        results.add(part, "peer's default", compare_sides(task, DEFAULT_CHUNK, args.repeats))
    if not results.has(part, "sweep"):
        fewer = {
            **task,
            "side": "sentence-transformers",
            "n_pairs": max(args.batch, task["n_pairs"] // 4),
        }
        runs = {c: run_task_apart({**fewer, "chunk": c}) for c in (*args.chunks, "uncached")}
        fields = ("examples_per_s", "used_MiB")
        results.add(part, "sweep", {c: {f: run[f] for f in fields} for c, run in runs.items()})
    swept = results.parts[part]["sweep"]
    best = max(args.chunks, key=lambda chunk: float(swept[chunk]["examples_per_s"]))
    if best != DEFAULT_CHUNK and not results.has(part, "peer's best"):
        results.add(part, "peer's best", compare_sides(task, best, args.repeats))


def measure_memory(results: Results, task: dict[str, Any], args: argparse.Namespace) -> None:
    """Our peak at each batch size, the same pairs each time, default parameters."""
    part = f"memory, {args.lengths} lengths, {args.dtype}"
    for batch in args.batches:
        if not results.has(part, f"batch {batch}"):
            asked = {**task, "side": "skembed", "bundled": True, "batch": batch}
            found = run_task_apart({**asked, "n_pairs": args.memory_pairs})
            # A vector of each text of the batch, and its gradient.
            found["embeddings_MiB"] = round(2 * batch * found["dim"] * 2 * 4 / 2**20, 1)
            results.add(part, f"batch {batch}", found)


def make_figures(parts: dict[str, Any]) -> list[Figure]:
    """Rates, ratios and peaks with their bars."""
    figures = []
    for part, entries in parts.items():
        if part.startswith("memory"):
            figures += summarise_memory(part, entries)
            continue
        for name in ("peer's default", "peer's best"):
            if name in entries:
                figures += summarise_comparison(f"{part}, {name}", entries[name])
    return figures


def summarise_comparison(name: str, found: dict[str, Any]) -> list[Figure]:
    """Both rates, their ratio, and the memory of both."""
    ours, theirs = found["skembed"], found["sentence-transformers"]
    # The bar is for mixed lengths; without padding there is less to win.
    bar = MIN_RATIO if "mixed" in name else None
    name = f"{name} ({found['mini-batch']})"
    return [
        Figure(f"{name}: skembed, pairs/s", ours["examples_per_s"]),
        Figure(f"{name}: sentence-transformers, pairs/s", theirs["examples_per_s"]),
        Figure(f"{name}: ratio", found["ratio"], bar),
        Figure(f"{name}: skembed, peak MiB", ours["used_MiB"], theirs["used_MiB"], at_least=False),
    ]


def summarise_memory(part: str, entries: dict[str, Any]) -> list[Figure]:
    """Peak of each batch size, and its growth without the embeddings."""
    figures = [
        Figure(f"{part}, {name}: peak MiB above the loaded model", found["used_MiB"])
        for name, found in entries.items()
    ]
    found = sorted(entries.values(), key=lambda run: float(run["embeddings_MiB"]))
    if len(found) > 1:
        low, high = (run["used_MiB"] - run["embeddings_MiB"] for run in (found[0], found[-1]))
        name = f"{part}: growth beyond the embeddings, smallest to largest batch, %"
        figures.append(Figure(name, 100 * (high / low - 1), MAX_GROWTH, at_least=False))
    return figures


def choose_pairs(args: argparse.Namespace, ids: SameIds, n_pairs: int) -> Pairs:
    """Pairs of mixed length, or pieces of abstracts that are all of one length."""
    if args.lengths == "mixed":
        return load_pairs(args.data, lambda texts: ids.keep(texts)[0], n_pairs)
    abstracts = [row["text"] for row in read_rows(args.data, "retrieval/scifact", "corpus")]
    pieces = cut_equal(abstracts, ids, 2 * n_pairs)
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def parse_arguments() -> argparse.Namespace:
    """Read the options; a child's task wins over all else."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("speed", "memory"), default=("speed",))
    parser.add_argument("--pairs", type=int, default=128, help="pairs of a timed fit")
    parser.add_argument("--batch", type=int, default=64, help="pairs of an optimiser step")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--lengths", default="mixed", choices=("mixed", "equal"))
    parser.add_argument("--repeats", type=int, default=2, help="pairs of runs")
    parser.add_argument("--chunks", nargs="+", default=SHORT_SWEEP, help="the peer's sweep")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--memory-pairs", type=int, default=4_096)
    parser.add_argument("--fresh", action="store_true", help="drop earlier results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    full = {"pairs": 640, "batch": 128, "repeats": 3, "chunks": CHUNKS}
    return start(parser, full=full)


def main() -> int:
    """Measure, write the result, and return the exit status."""
    args = parse_arguments()
    if args.child:
        run_task(json.loads(args.child))
        return 0
    n_pairs = max(args.pairs, args.memory_pairs)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = (Path(temporary) / name for name in ("ours", "theirs"))
        export_backbone(ours, theirs)
        ids = SameIds(load_peer(theirs, args.dtype))
        # Always as many, so that a part measured alone reads the same pairs.
        pairs = choose_pairs(args, ids, n_pairs)
        Path(temporary, "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
        tokens = ids.ours.encode([t for p in pairs for t in p], prefix="", max_length=MAX_LENGTH)
        settings = {
            "pairs": args.pairs,
            "memory pairs": args.memory_pairs,
            "generated": None if (args.data / "train").is_dir() else True,
        }
        title = "Training speed and memory against sentence-transformers with peft"
        results = Results("training_speed", title, args, settings, make_figures)
        task = {
            "folder": temporary,
            "bundled": False,
            "n_pairs": args.pairs,
            "batch": args.batch,
            "dtype": args.dtype,
            "threads": args.threads,
        }
        lengths = describe_lengths(tokens.lengths)
        lengths["peer's positions a token"] = count_padding(
            tokens.lengths, args.batch, int(DEFAULT_CHUNK.split()[0])
        )
        results.parts.setdefault("tokens of a text", {})[f"{args.lengths} lengths"] = lengths
        measures = {"speed": measure_speed, "memory": measure_memory}
        for name in args.only:
            measures[name](results, task, args)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
