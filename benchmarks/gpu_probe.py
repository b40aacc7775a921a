"""What a GPU and its torch can do for skembed: a diagnosis in about two minutes, no result.

Run on a machine with a GPU, first of all: python benchmarks/gpu_probe.py [--layers 4]
Prints one line for each probe and goes on where one fails: attention paths against each other with
their gradients, attention over shared heads, norms and dropout masks, forward passes and training
steps of a random model of 7B width with their time and memory a token, where a pass spends its
time, and search. To see that it runs, without a GPU, at toy sizes: python benchmarks/gpu_probe.py
--cpu
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _common import seconds, skip
from _models import SEVEN_B, build_model
from gpu_training import build_plan, train
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from skembed import Retriever
from skembed.adapters.lora import DropoutMasks
from skembed.inference.engine import default_batch_tokens
from skembed.model.attention import ATTENTION_NAME
from skembed.model.loaded import LoadedModel
from skembed.model.tokenization import PackedBatch, pack_texts

SMALL = {**SEVEN_B, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
Probe = tuple[str, Callable[[], object]]


class Bench:
    """The device and the sizes of a random model."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self.device, self.on_cpu = device, device.type == "cpu"
        self.sizes = {**(SMALL if self.on_cpu else SEVEN_B), "num_hidden_layers": layers}
        self.n_tokens = 512 if self.on_cpu else 16_384
        self.heads = self.sizes["num_attention_heads"]
        self.shared = self.sizes["num_key_value_heads"]
        self.width = self.sizes["hidden_size"] // self.heads

    def draw(self, *shape: int) -> Tensor:
        """Return random bfloat16 values on the device."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def pack(self, n_tokens: int) -> PackedBatch:
        """Return texts of log-normal length, so many tokens at least, the longest first."""
        rng = np.random.default_rng(0)
        lengths: list[int] = []
        while sum(lengths) < n_tokens:
            lengths.append(int(np.clip(rng.lognormal(np.log(64), 1), 8, 512)))
        most = self.sizes["vocab_size"]
        texts = [rng.integers(3, most, n, dtype=np.int32) for n in sorted(lengths, reverse=True)]
        return pack_texts(texts, 0).to(self.device)

    def milliseconds(self, task: Callable[[], object], repeats: int = 5) -> float:
        """Return the mean time of a task after one call that warms up."""
        task()
        self.wait()
        return 1e3 * seconds(lambda: [*(task() for _ in range(repeats)), self.wait()]) / repeats

    def wait(self) -> None:
        """Wait for the device."""
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)

    def start_memory(self) -> int:
        """Let the peak of the device's memory start again; return the bytes held now."""
        gc.collect()
        if self.on_cpu:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        """Return the most bytes of the device since `start_memory`."""
        return 0 if self.on_cpu else int(torch.cuda.max_memory_allocated(self.device))


# The parts


def differ(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> list[float]:
    """Return the largest differences of values and gradients, relative to the largest value."""
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad(x, inputs, weights, retain_graph=True) for x in (ours, theirs)]
    pairs = [(ours, theirs), *zip(*gradients, strict=True)]
    return [round(((a - b).abs().max() / b.abs().max()).detach().item(), 4) for a, b in pairs]


def compare_paths(bench: Bench, path: str) -> dict[int, list[float]]:
    """Compare an attention path with the padded one: values, then gradients of q, k and v."""
    attend: Any = AttentionInterface()[ATTENTION_NAME]
    batch, found = bench.pack(256 if bench.on_cpu else 4_096), {}
    for shared in (bench.heads, bench.shared):
        q, k, v = (
            bench.draw(1, n, len(batch.input_ids), bench.width).requires_grad_()
            for n in (bench.heads, shared, shared)
        )
        ours, theirs = (
            attend(None, q, k, v, None, scaling=bench.width**-0.5, packed=batch, path=name)[0]
            for name in (path, "padded")
        )
        found[shared] = differ(ours, theirs, (q, k, v))
    return found


def compare_shared_heads(bench: Bench) -> list[float]:
    """Compare torch's attention over shared heads with the same over repeated ones."""
    from torch.nn.attention.varlen import varlen_attn

    batch = bench.pack(4_096)
    shares = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": True} if shares else {}
    q, k, v = (
        bench.draw(len(batch.input_ids), n, bench.width).requires_grad_()
        for n in (bench.heads, bench.shared, bench.shared)
    )
    borders = (batch.cu_seqlens, batch.cu_seqlens, max(batch.lengths), max(batch.lengths))
    repeated = (x.repeat_interleave(bench.heads // bench.shared, 1) for x in (k, v))
    return differ(
        varlen_attn(q, k, v, *borders, **options), varlen_attn(q, *repeated, *borders), (q, k, v)
    )


def time_norms(bench: Bench) -> list[float]:
    """Time RMSNorm as transformers writes it, and torch's own."""
    wide = bench.sizes["hidden_size"]
    x, weight = bench.draw(bench.n_tokens, wide), torch.ones_like(bench.draw(wide))

    def stock() -> Tensor:
        y = x.float()
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def own() -> Tensor:
        return F.rms_norm(x, (wide,), weight, 1e-5)

    return [bench.milliseconds(task) for task in (stock, own)]


def time_masks(bench: Bench) -> list[float]:
    """Time our replayable dropout of LoRA, and a plain Bernoulli mask."""
    x = bench.draw(bench.n_tokens, bench.sizes["intermediate_size"])
    masks, generator = DropoutMasks(0.1), torch.Generator(bench.device).manual_seed(1)

    def plain() -> Tensor:
        mask = torch.empty(x.shape, dtype=torch.bool, device=bench.device)
        return x * mask.bernoulli_(0.9, generator=generator)

    return [bench.milliseconds(task) for task in (lambda: x * masks.draw(0, x), plain)]


# The whole model


def time_forward(bench: Bench, base: LoadedModel, path: str) -> dict[str, float]:
    """Time a pass on an attention path, and its memory."""
    batch, n_tokens = bench.pack(bench.n_tokens), bench.n_tokens

    def run() -> None:
        with torch.inference_mode():
            base.model(batch)

    base.model.attention_path, before = path, bench.start_memory()
    first, spent = bench.milliseconds(run, 1), bench.milliseconds(run)
    layers = bench.sizes["num_hidden_layers"]
    return {
        "first, ms": round(first, 2),
        "ms": round(spent, 2),
        "us a token and layer": round(1e3 * spent / n_tokens / layers, 3),
        "bytes a token": (bench.peak() - before) // n_tokens,
    }


def profile_pass(bench: Bench, base: LoadedModel) -> str:
    """Return the kernels that a pass spends most time in."""
    from torch.profiler import ProfilerActivity, profile

    batch = bench.pack(bench.n_tokens)
    gpu = [] if bench.on_cpu else [ProfilerActivity.CUDA]
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as record:
        with torch.inference_mode():
            base.model(batch)
        bench.wait()
    key = "self_cpu_time_total" if bench.on_cpu else "self_device_time_total"
    return "\n" + str(record.key_averages().table(sort_by=key, row_limit=18))


def time_products(bench: Bench) -> float:
    """Return the TFLOP/s of the model's widest product."""
    m, k, n = bench.n_tokens, bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    a, b = bench.draw(m, k), bench.draw(k, n)
    return round(2 * m * k * n / bench.milliseconds(lambda: a @ b, 20) / 1e9, 2)


def time_training(bench: Bench, base: LoadedModel, checkpointing: bool) -> dict[str, float]:
    """Time contrastive steps on texts of equal length, and their memory."""
    length = 16 if bench.on_cpu else 128
    options = argparse.Namespace(batch=max(2, bench.n_tokens // 8 // length), negatives=0)
    options.steps, options.tokens, options.checkpointing = 3, length, checkpointing
    options.batch_tokens = None
    n_tokens = 2 * options.batch * length
    before = bench.start_memory()
    history = train(base, build_plan(options, bench.sizes["vocab_size"]))
    layers = bench.sizes["num_hidden_layers"]
    step_s = options.batch / float(history["examples_per_s"][1:].mean())
    return {
        "us a token and layer": round(1e6 * step_s / n_tokens / layers, 3),
        "bytes a token": (bench.peak() - before) // n_tokens,
    }


def time_search(bench: Bench, device: str) -> list[float]:
    """Time a search of one query and of 2,000, in seconds."""
    n = 2_000 if bench.on_cpu else 200_000
    rows = np.random.default_rng(0).standard_normal((n, 1024), dtype=np.float32)
    retriever = Retriever(None, device=device).fit(rows)
    retriever.search(rows[:1], 10)
    return [round(seconds(lambda m=m: retriever.search(rows[:m], 10)), 4) for m in (1, 2_000)]


def list_probes(bench: Bench) -> Iterator[Probe]:
    """Yield name and task of each probe, the parts before the whole model."""
    path = "grouped" if bench.on_cpu else "varlen"
    yield f"{path} against padded by key heads", lambda: compare_paths(bench, path)
    if not bench.on_cpu:
        yield "shared heads: values, dq, dk, dv", lambda: compare_shared_heads(bench)
    yield "RMSNorm, transformers' and torch's, ms", lambda: time_norms(bench)
    yield "LoRA dropout, replayable and plain, ms", lambda: time_masks(bench)
    yield "widest product, TFLOP/s", lambda: time_products(bench)
    base = build_model(bench.sizes, bench.device)  # ends with the leak check
    own = base.model.attention_path
    yield "attention path, leak check passed", lambda: own
    yield "tokens of a batch, our choice", lambda: default_batch_tokens(base)
    for name in dict.fromkeys(("padded", own)):  # the model's own last: it stays
        yield f"forward, {name}", lambda name=name: time_forward(bench, base, name)
    one = bench.pack(1)
    yield "one short text, ms", lambda: bench.milliseconds(lambda: base.model(one), 20)
    yield "forward by kernel", lambda: profile_pass(bench, base)
    for checkpointing in (False, True):
        name = f"training, gradient checkpointing {checkpointing}"
        yield name, lambda on=checkpointing: time_training(bench, base, on)
    for device in dict.fromkeys(("cpu", str(bench.device))):
        yield f"search on {device}, s", lambda device=device: time_search(bench, device)


def show(found: object) -> str:
    """Return what a probe found, its floats to four digits."""
    if isinstance(found, list):
        return ", ".join(map(show, found))
    return f"{found:.4g}" if isinstance(found, float) else str(found)


def main() -> int:
    """Run every probe; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--layers", type=int, help="of the random model; default: 4, with --cpu 2")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        skip("needs a CUDA device, and torch sees none here. To see that it runs, pass --cpu.")
    device, layers = ("cpu", 2) if args.cpu else ("cuda:0", 4)
    bench = Bench(torch.device(device), args.layers or layers)
    card = None if args.cpu else (torch.cuda.get_device_name(), torch.cuda.mem_get_info())
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {card}", flush=True)
    failed = 0
    for name, task in list_probes(bench):
        try:
            print(f"{name}: {show(task())}", flush=True)
        except Exception as error:  # the other probes still say something
            failed += 1
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
