"""A contrastive training step of a random 7B model on a CUDA device: time, memory, share of peak.

Run on a machine with a GPU: python benchmarks/gpu_training.py [--layers 32] [--batch 128]
LoRA r=16 on all linear layers, mean pooling, bfloat16, `--batch` examples of an anchor, a positive
and `--negatives` negatives of `--tokens` tokens each, gradient cache in chunks that fit. Floating
point operations are counted as the products of the backbone's linear layers: forward, the gradient
of the activations, and the second forward pass of each chunk that was not kept.
To see that it runs, without a GPU: python benchmarks/gpu_training.py --device cpu --tiny
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np
import torch
from _common import make_parser, measure_peak
from _models import SEVEN_B, TINY, build_model, start_on_device
from _results import Figure, finish

from skembed.adapters import start_lora
from skembed.batches import BatchPlan, TaskPlan, TextTable
from skembed.examples import Examples
from skembed.history import TrainingHistory
from skembed.lora import LoraSettings
from skembed.registry import LoadedModel
from skembed.training import TrainingSettings, run_training

PEAK_AIM = 0.4


def build_plan(args: argparse.Namespace, vocabulary: int) -> BatchPlan:
    """Random texts of equal length, every one its own."""
    rng = np.random.default_rng(0)
    columns = 2 + args.negatives
    n = args.batch * args.steps
    table = TextTable(None, max_length=args.tokens, mask_prefix=True)  # type: ignore[arg-type]
    table.ids = list(rng.integers(3, vocabulary, size=(n * columns, args.tokens), dtype=np.int32))
    table.pool_starts = [0] * len(table.ids)
    table.string_ids = list(range(len(table.ids)))
    table.freeze()
    rows = np.arange(n * columns).reshape(n, columns)
    examples = Examples("rows", [str(i) for i in range(n * columns)], rows)
    every = np.arange(n * columns)
    task = TaskPlan(examples, "infonce", True, 1.0, every, every)
    return BatchPlan([task], table, batch_size=args.batch, n_negatives=args.negatives, seed=0)


def main() -> int:
    """Train a few steps and write the figures."""
    parser = make_parser(__doc__, data=False)
    parser.add_argument("--layers", type=int, help="fewer layers than 32, for a smaller GPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    args, device = start_on_device(parser)
    if args.tiny:
        args.layers, args.batch, args.tokens = 2, 8, 16
    return run(args, device)


def train(base: LoadedModel, plan: BatchPlan, args: argparse.Namespace) -> TrainingHistory:
    """Train all linear layers' adapters for some steps."""
    lora = LoraSettings(16, 32.0, 0.1, "all-linear")
    settings = TrainingSettings(
        lora=lora,
        n_steps=args.steps,
        temperature=0.05,
        learning_rate=1e-4,
        warmup_steps=1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        batch_tokens=args.batch_tokens,
        gradient_checkpointing=args.checkpointing,
        early_stopping=False,
        patience=1,
        seed=0,
    )
    weights = start_lora(base.config, lora, np.random.SeedSequence(0))
    return run_training(base, plan, settings, lora=weights, pooling={}, progress=False)[1]


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Build, train, write."""
    sizes = TINY if args.tiny else SEVEN_B
    layers = args.layers or sizes["num_hidden_layers"]
    base = build_model({**sizes, "num_hidden_layers": layers}, device)
    plan = build_plan(args, sizes["vocab_size"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history = train(base, plan, args)
    speed = statistics.median(history["examples_per_s"][1:].tolist())  # the first step warms up
    step_s = args.batch / speed
    modules = base.model.embedding_model.modules()
    n_weights = sum(m.weight.numel() for m in modules if isinstance(m, torch.nn.Linear))
    tokens = args.batch * (2 + args.negatives) * args.tokens
    gflop = 3 * 2 * n_weights * tokens / 1e9  # forward twice, activations' gradient once
    sizes = (512,) if args.tiny else (4_096, 8_192)
    peak = measure_peak(sizes=sizes, device=device)["bfloat16"]
    on_cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None
    figures = [
        Figure("time of a step, s", step_s),
        Figure("examples/s", speed),
        Figure("tokens/s", tokens / step_s),
        Figure("share of the bfloat16 matrix peak", gflop / step_s / peak, PEAK_AIM, aim=True),
    ]
    values = {
        "losses": history["loss"].tolist(),
        "device peak, GiB": memory,
        "measured peak, GFLOP/s": peak,
        "tokens of a step": tokens,
    }
    name = "gpu_training_tiny" if args.tiny else "gpu_training"
    title = "A contrastive step of a random 7B model on a GPU"
    return finish(name, title, figures, values, args=args, device=device)


if __name__ == "__main__":
    sys.exit(main())
