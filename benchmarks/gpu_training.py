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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _common import make_parser, measure_peak
from _models import SEVEN_B, TINY, build_model, start_on_device
from _results import Figure, finish

from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import LoraSettings
from skembed.adapters.targets import start_lora
from skembed.history import TrainingHistory
from skembed.model.loaded import LoadedModel
from skembed.model.tokenization import EncodedTexts
from skembed.training.batches import BatchPlan, TaskSampler, TextTable
from skembed.training.examples import Examples
from skembed.training.loop import run_training
from skembed.training.trainer import ContrastiveTrainer

PEAK_AIM = 0.4


@dataclass
class RandomTokenizer:
    """Gives every text `max_length` random tokens."""

    vocabulary: int

    def encode(self, texts: list[str], *, max_length: int, **_: Any) -> EncodedTexts:
        size = (len(texts), max_length)
        ids = np.random.default_rng(0).integers(3, self.vocabulary, size=size, dtype=np.int32)
        return EncodedTexts(list(ids), np.full(len(texts), max_length), 0, 0)


def build_plan(args: argparse.Namespace, vocabulary: int) -> BatchPlan:
    """Return batches of random texts of equal length, every one its own."""
    columns = np.arange(args.batch * args.steps * (2 + args.negatives)).reshape(
        args.batch * args.steps, -1
    )
    tokenizer: Any = RandomTokenizer(vocabulary)
    table = TextTable(tokenizer, max_length=args.tokens, mask_prefix=True)
    task = TaskSampler(Examples("rows", [str(i) for i in range(columns.size)], columns), table)
    table.freeze()
    trainer = ContrastiveTrainer(
        batch_size=args.batch,
        n_negatives=args.negatives,
        max_steps=args.steps,
        gradient_checkpointing=args.checkpointing,
        learning_rate=1e-4,
        train_pooling=False,
    )
    return BatchPlan([task], table, trainer, 0)


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


def train(base: LoadedModel, plan: BatchPlan) -> TrainingHistory:
    """Train all linear layers' adapters for some steps."""
    settings = LoraSettings(16, 32.0, 0.1, "all-linear")
    weights = start_lora(base.config, settings, np.random.SeedSequence(0))
    start = Adapter(settings, weights, {}, base.key.fingerprint)
    return run_training(base, plan, start, show_progress=False)[1]


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Build, train, write."""
    sizes = TINY if args.tiny else SEVEN_B
    layers = args.layers or sizes["num_hidden_layers"]
    base = build_model({**sizes, "num_hidden_layers": layers}, device)
    plan = build_plan(args, sizes["vocab_size"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history = train(base, plan)
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
