"""dtype="int8" and "nf4" beside bfloat16: memory of the weights, scores, and time.

Run: python benchmarks/quantized_weights.py [--texts 2000] [--repeats 3]
skembed-mini: bytes of the loaded model, Spearman's correlation of cosines on STS-B dev, and
texts/s, each type in turn with bfloat16. Then one linear layer of the model's widest shape alone,
on one thread: bfloat16, int8 weights read back before the product (what skembed does), and torch's
product of integers, alone and with what turns activations into integers and back: what int8
arithmetic would bring. nf4 needs bitsandbytes and is left out without it.

Bars: int8 keeps 99 % of bfloat16's score in at most 0.55 of its memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from _common import compare, load_texts, make_parser, start
from _results import Figure, finish
from quality import score_sts
from torch.nn import functional as F

from skembed import NVEmbedVectorizer
from skembed.model.quantized import Int8Linear

BASE = "bfloat16"
TOKENS, IN, OUT = 4096, 384, 896


def weight_bytes(vectorizer: NVEmbedVectorizer) -> int:
    """Return the memory of the loaded model."""
    (loaded,) = vectorizer._lease.models.values()
    return int(loaded.weight_bytes)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes and the scale of each row, as dynamic quantisation needs them."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min_(1e-12) / 127
    return (x / scale.to(x.dtype)).round_().to(torch.int8), scale


def make_layers() -> dict[str, Callable[[], object]]:
    """Return ways to compute one linear layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN, generator=generator)
    weight = torch.randn(OUT, IN, generator=generator) * 0.05
    small, dense, layer = x.bfloat16(), weight.bfloat16(), Int8Linear(weight, torch.bfloat16)
    codes: Any = layer.codes
    columns: Any = codes.t().contiguous()
    scales: Any = layer.scales
    tokens, _ = quantize_tokens(small)

    def dynamic() -> torch.Tensor:
        found, scale = quantize_tokens(small)
        product = torch._int_mm(found, columns)
        return (product.float().mul_(scale) * scales.float().T).bfloat16()

    ways: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: F.linear(small, dense),
        "int8 weights, read back": lambda: layer(small),
        "product of integers alone": lambda: torch._int_mm(tokens, columns),
        "the same with activations to int8 and back": dynamic,
    }
    return ways


def time_layers(repeats: int = 25) -> dict[str, float]:
    """Return the median milliseconds of this thread for each way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    with torch.inference_mode():
        for name, task in make_layers().items():
            task()
            times = []
            for _ in range(repeats):
                begin = time.thread_time()
                task()
                times.append(time.thread_time() - begin)
            found[name] = 1000 * statistics.median(times)
    torch.set_num_threads(threads)
    return found


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=2_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    base = NVEmbedVectorizer(cache=None, dtype=BASE)
    score = 100 * score_sts(args.data, "sts/stsb", base.transform, "dev")
    exact = base.transform(texts)
    layers = time_layers()
    figures = [Figure(f"{BASE}: STS-B dev, Spearman", score)]
    values: dict[str, Any] = {
        "texts": len(texts),
        BASE: {"weights, MiB": weight_bytes(base) / 2**20, "STS-B dev": round(score, 3)},
    }
    for dtype in ("int8", *(("nf4",) if find_spec("bitsandbytes") else ())):
        vectorizer = NVEmbedVectorizer(cache=None, dtype=dtype)
        found = vectorizer.transform(texts)
        own = 100 * score_sts(args.data, "sts/stsb", vectorizer.transform, "dev")
        share = weight_bytes(vectorizer) / weight_bytes(base)
        pair = compare(
            (dtype, BASE),
            lambda v=vectorizer: v.transform(texts),
            lambda: base.transform(texts),
            repeats=args.repeats,
        )
        asked = dtype == "int8"
        figures += [
            Figure(f"{dtype}: STS-B dev, Spearman", own),
            Figure(f"{dtype}: share of {BASE}'s score", own / score, 0.99 if asked else None),
            Figure(f"{dtype}: share of its memory", share, 0.55 if asked else None, at_least=False),
            Figure(f"{dtype}: times as fast", pair.ratio),
        ]
        cosine = (found * exact).sum(1)
        values[dtype] = {
            "weights, MiB": weight_bytes(vectorizer) / 2**20,
            "STS-B dev": round(own, 3),
            "cosine to bfloat16": {"min": float(cosine.min()), "mean": float(np.mean(cosine))},
            **pair.to_dict(len(texts)),
        }
    figures += [
        Figure(f"one layer, {name}: times as fast as bfloat16", layers["bfloat16"] / layers[name])
        for name in list(layers)[1:]
    ]
    values[f"one layer, {TOKENS} x {IN} -> {OUT}, one thread, ms"] = layers
    title = "Quantised weights: memory, scores and time"
    return finish("quantized_weights", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
