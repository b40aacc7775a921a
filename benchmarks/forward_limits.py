"""What limits the forward pass on a CPU: arithmetic, bytes, and where the rest of the time goes.

Run: python benchmarks/forward_limits.py [--texts 1000] [--repeats 5]
skembed-mini on real texts of mixed length, in the engine's own batches, one pass after the other on
one core (a call runs one such stream a core). Two limits: the multiplications over the core's own
rate of matrix products, and the bytes that every step reads and writes over the rate of a copy, in
memory and in the cache, where the activations of a batch stay. Then the measured time, by kind of
step: each step is timed alone, without what it calls.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from _common import (
    FLOP_FORMULA,
    count_flops,
    describe_lengths,
    load_texts,
    make_parser,
    measure_peak,
    seconds,
    start,
)
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.inference.engine import CPU_BATCH_TOKENS
from skembed.model import cpu_forward, cpu_kernels, pooling
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel
from skembed.model.tokenization import PackedBatch, iterate_batches, pack_texts

PEAK_SIZES = (1024, 2048)
# Read and written together. The smaller one is about an activation of a batch and its successor.
MEMORY_BYTES, CACHE_BYTES = 1 << 28, 1 << 22
BYTE_FORMULA = (
    "What each step of the fused pass reads and writes, once each, as it is implemented. "
    "Elements a token, each layer: two norms 10 D (length, scaling, weight); queries, keys, "
    "values 3 D + (H + 2 K) d; rotation 9 (H + K) d; attention 6 (H + K) d for gathering, both "
    "products and scattering, and 4 H n for the scores of a text of n tokens; output H d + 2 D; "
    "feed-forward 4 D + 4 I. Once a token: word vectors 2 D, rotation's tables 2 (H + K) d, "
    "last norm 5 D, pooled rows 2 D. Latent pooling: norms 4 D, scores D + 3 h r, values h r + "
    "2 D, feed-forward 2 D + 3 m D, and means of m D and D, each one element and 16 bytes in "
    "float32. Each batch: all weights but the word vectors. D, H, K, d, I, h, r and m as in the "
    "FLOP count. Padding, biases and what happens once a text count as nothing."
)


def count_bytes(config: NVEmbedConfig, lengths: Sequence[int], itemsize: int) -> float:
    """Return the bytes that one batch of texts reads and writes: see `BYTE_FORMULA`."""
    backbone = config.mistral_config()
    wide, heads, layers = (
        backbone.hidden_size,
        backbone.num_attention_heads,
        backbone.num_hidden_layers,
    )
    keys, inner = backbone.num_key_value_heads, backbone.intermediate_size
    width = backbone.head_dim or wide // heads
    queries, shared = heads * width, keys * width
    rotated = queries + shared
    a_layer = 10 * wide + 3 * wide + queries + 2 * shared  # norms, projections
    a_layer += 9 * rotated + 6 * rotated  # rotation, attention
    a_layer += queries + 2 * wide + 4 * wide + 4 * inner  # output, feed-forward
    a_token = layers * a_layer + 9 * wide + 2 * rotated
    weights = layers * (2 * wide * rotated + 3 * wide * inner)
    averaged = wide
    if config.pooling == "latent":
        latents, middle = config.num_cross_heads * config.num_latents_value, config.ff_mult * wide
        a_token += 9 * wide + 4 * latents + 3 * middle
        weights += 2 * latents * wide + 3 * middle * wide
        averaged += middle
    elements = (a_token + averaged) * sum(lengths) + weights
    elements += layers * 4 * heads * sum(n * n for n in lengths)
    return float(itemsize * elements + 16 * averaged * sum(lengths))


def measure_copy(n_bytes: int, *, repeats: int = 15) -> float:
    """Return the bytes a second that a copy reads and writes; the buffer is half as large."""
    source = torch.zeros(n_bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    rounds = max(1, MEMORY_BYTES // n_bytes)

    def copy() -> None:
        for _ in range(rounds):
            target.copy_(source)

    copy()
    return rounds * n_bytes / statistics.median(seconds(copy) for _ in range(repeats))


class Steps:
    """Seconds of functions while they are watched, without what they call among themselves."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # seconds of watched calls inside each open one

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            whole = time.perf_counter() - begin
            self.spent[name] += whole - self._inside.pop()
            if self._inside:
                self._inside[-1] += whole
            return result

        return timed


@contextmanager
def watch_steps(loaded: LoadedModel) -> Iterator[Steps]:
    """Time the kinds of steps of every forward pass."""
    steps = Steps()
    model: Any = loaded.model
    places = [
        (cpu_forward, "fused_linear", "matrix products, with what is fused into them"),
        (pooling, "fused_linear", "matrix products, with what is fused into them"),
        (cpu_forward, "_norm", "norms"),
        (cpu_forward, "_rotate", "rotation"),
        (cpu_forward, "_list_rotation", "rotation"),
        (cpu_forward, "attend_to_buckets", "attention: its two products"),
        (cpu_kernels, "_split", "attention: gathering and scattering"),
        (cpu_kernels, "_merge_into", "attention: gathering and scattering"),
        (cpu_kernels, "_probabilities", "attention: softmax"),
        (model.latent_attention_model, "forward", "pooling: norms, softmax, means"),
        (model.embedding_model.embed_tokens, "forward", "word vectors"),
        (model, "forward", "dispatch between the steps"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, kind in places:
        setattr(owner, name, steps.watch(kind, getattr(owner, name)))
    try:
        yield steps
    finally:
        for owner, name, function in before:
            if isinstance(owner, torch.nn.Module):
                delattr(owner, name)  # the class has it
            else:
                setattr(owner, name, function)


def make_batches(loaded: LoadedModel, texts: list[str]) -> tuple[list[PackedBatch], float, float]:
    """Return the engine's batches, and the seconds of tokenising and of packing."""
    begin = time.perf_counter()
    encoded = loaded.tokenizer.encode(texts, prefix="", max_length=512)
    tokenized = time.perf_counter()
    on_grid = loaded.key.dtype != "float32"
    batches = [
        pack_texts([encoded.ids[i] for i in rows], encoded.pool_start, on_grid=on_grid)
        for rows in iterate_batches(encoded.lengths, CPU_BATCH_TOKENS)
    ]
    return batches, tokenized - begin, time.perf_counter() - tokenized


def load_bundled(texts: list[str]) -> LoadedModel:
    """Return skembed-mini as the vectorizer loads it on the CPU."""
    vectorizer = NVEmbedVectorizer(cache=None, trainer=None, device="cpu")
    vectorizer.fit_transform(texts[:8])
    (loaded,) = vectorizer._lease.models.values()
    return loaded


def time_passes(loaded: LoadedModel, batches: list[PackedBatch], repeats: int) -> dict[str, Any]:
    """Return the rates of this core, the seconds of a pass, and the share of each kind of step."""

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                loaded.model(batch)

    run()
    dtype = loaded.key.dtype
    peaks = [measure_peak(dtypes=[dtype], sizes=PEAK_SIZES)[dtype]]
    rates = {"memory": measure_copy(MEMORY_BYTES), "cache": measure_copy(CACHE_BYTES)}
    measured_s = statistics.median(seconds(run) for _ in range(repeats))
    with watch_steps(loaded) as steps:
        watched_s = seconds(run)
    peaks.append(measure_peak(dtypes=[dtype], sizes=PEAK_SIZES)[dtype])  # its speed changes
    spent = sorted(steps.spent.items(), key=lambda item: -item[1])
    shares = {kind: kind_s / watched_s for kind, kind_s in spent}
    times = {"s": measured_s, "watched_s": watched_s, "shares": shares}
    return {"peaks": peaks, "rates": rates, **times}


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=1_000)
    parser.add_argument("--repeats", type=int, default=5, help="passes over the texts")
    parser.set_defaults(threads=1)
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    loaded = load_bundled(texts)
    batches, tokenize_s, pack_s = make_batches(loaded, texts)
    lengths = [list(batch.lengths[: batch.n_texts]) for batch in batches]
    flat = [n for part in lengths for n in part]
    found = time_passes(loaded, batches, args.repeats)
    peaks, rates, measured_s = found["peaks"], found["rates"], found["s"]
    flops = count_flops(loaded.config, flat)
    itemsize = torch.finfo(loaded.key.compute_dtype).bits // 8
    n_bytes = sum(count_bytes(loaded.config, part, itemsize) for part in lengths)
    arithmetic_s = flops / statistics.mean(peaks) / 1e9
    byte_s, memory_s = n_bytes / rates["cache"], n_bytes / rates["memory"]

    def per_token(name: str, spent_s: float) -> Figure:
        return Figure(f"{name}, microseconds a token", round(1e6 * spent_s / sum(flat), 3))

    share = f"share of the {loaded.key.dtype} matrix peak"
    figures = [
        per_token("arithmetic limit", arithmetic_s),
        per_token("byte limit in the cache", byte_s),
        per_token("byte limit in memory", memory_s),
        per_token("measured", measured_s),
        Figure("measured over the larger of the first two", measured_s / max(arithmetic_s, byte_s)),
        Figure("measured over their sum: nothing overlaps", measured_s / (arithmetic_s + byte_s)),
        Figure(share, arithmetic_s / measured_s, 0.6, aim=True),
        *(Figure(f"share of the time: {kind}", part) for kind, part in found["shares"].items()),
        per_token("tokenising on one core", tokenize_s),
        per_token("packing", pack_s),
    ]
    values = {
        "tokens": describe_lengths(flat),
        "batches": len(batches),
        "measured peaks, GFLOP/s": peaks,
        "measured copies, GB/s, read and written": {k: round(v / 1e9, 1) for k, v in rates.items()},
        "GFLOP": round(flops / 1e9, 2),
        "GB": round(n_bytes / 1e9, 3),
        "FLOP count": FLOP_FORMULA,
        "byte count": BYTE_FORMULA,
        "seconds with the clocks over without": round(found["watched_s"] / measured_s, 3),
    }
    title = "Limits of the forward pass on one core"
    return finish("forward_limits", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
