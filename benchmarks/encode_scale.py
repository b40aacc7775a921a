"""Cost of a token and memory from a thousand texts to 200,000, and the share of the matrix peak.

Run: python benchmarks/encode_scale.py [--texts 20000] [--sizes 1000 10000 50000 200000]
skembed-mini at its defaults, frozen, no cache. First `--texts` mixed texts (bank questions,
captions, titles, news, abstracts): the share of the processor's own matrix-product rate that one
encode reaches. Then short distinct texts (spans of the mixed ones) in growing numbers, each size in
a process of its own: microseconds a token, median of passes, and the most resident memory beyond
what there was before the call and the output itself. Linux or another system with /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from typing import Any

import numpy as np
from _common import (
    FLOP_FORMULA,
    describe_lengths,
    load_texts,
    make_parser,
    read_memory,
    run_child,
    seconds,
    start,
    time_share_of_peak,
    watch_model,
)
from _results import Figure, finish

from skembed import NVEmbedVectorizer

PEAK_SHARE_BAR = 0.6
SPREAD_BAR = 1.15  # dearest token over cheapest
GROWTH_BAR = 64.0  # MiB from the second size to the last, beyond the output
SIZES = [1_000, 10_000, 50_000, 200_000]
SPAN_WORDS = (5, 21)  # words of a short text
TIMED_TEXTS = 10_000  # smaller sizes are passed over several times, up to so many texts
SAMPLE_S = 0.02
MiB = 2**20


def make_spans(texts: list[str], n_texts: int) -> list[str]:
    """Return distinct spans of whole words, the first of them the same for any number."""
    rng = np.random.default_rng(0)
    words = [text.split() for text in texts]
    words = [row for row in words if len(row) >= SPAN_WORDS[0]]
    spans: dict[str, None] = {}
    while len(spans) < n_texts:
        row = words[rng.integers(len(words))]
        begin = rng.integers(len(row) - SPAN_WORDS[0] + 1)
        spans[" ".join(row[begin : begin + rng.integers(*SPAN_WORDS)])] = None
    return list(spans)


def make_vectorizer() -> NVEmbedVectorizer:
    """Return the bundled model, frozen: every pass runs every text."""
    return NVEmbedVectorizer(cache=None, trainer=None, verbose=False).fit(["a text"])


class MemoryPeak:
    """Most resident bytes while a block runs."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.most = max(self.most, read_memory("VmRSS"))

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, read_memory("VmRSS"))
        self._stop.set()
        self._thread.join()


def measure_size(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one size, in this process."""
    texts = make_spans(load_texts(args.data, args.texts), args.measure)
    vectorizer = make_vectorizer()
    with watch_model() as activity:
        vectorizer.transform(texts[:1_000])  # prepares the matrix products
    before = read_memory("VmRSS")
    with MemoryPeak() as memory, watch_model() as activity:
        first_s = seconds(lambda: vectorizer.transform(texts))
    output = len(texts) * activity_width(vectorizer) * 4
    times = [first_s]
    for _ in range(min(9, TIMED_TEXTS // len(texts) - 1) if len(texts) < TIMED_TEXTS else 0):
        times.append(seconds(lambda: vectorizer.transform(texts)))
    return {
        "texts": len(texts),
        "tokens": activity.n_tokens,
        "times_s": [round(time, 4) for time in times],
        "us_per_token": round(1e6 * statistics.median(times) / activity.n_tokens, 3),
        "texts_per_s": round(len(texts) / statistics.median(times)),
        "output_MiB": round(output / MiB, 1),
        "beyond_output_MiB": round((memory.most - before - output) / MiB, 1),
    }


def activity_width(vectorizer: NVEmbedVectorizer) -> int:
    """Return the number of components of a vector."""
    return int(len(vectorizer.get_feature_names_out()))


def run_size(n_texts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one size in a process of its own."""
    words = ["--data", args.data, "--texts", args.texts, "--measure", n_texts]
    words += ["--threads", args.threads] if args.threads else []
    found = run_child(__file__, *words)
    print(found, flush=True)
    return found


def measure_share(texts: list[str]) -> dict[str, Any]:
    """Return the share of the measured matrix peak that one encode of the texts reaches."""
    vectorizer = make_vectorizer()
    vectorizer.transform(texts[:2_000])
    share = time_share_of_peak(vectorizer, texts)
    return {
        "dtype": vectorizer.model_["dtype"],
        "tokens": describe_lengths(share.activity.lengths),
        "wall_s": round(share.wall_s, 2),
        "texts_per_s": round(len(texts) / share.wall_s, 1),
        "gflop_per_s": round(share.gflop / share.wall_s, 1),
        "measured peaks, GFLOP/s": share.peaks,
        "share_of_peak": round(share.of_peak, 4),
    }


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=20_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of texts")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = start(parser)
    if args.measure is not None:
        print(json.dumps(measure_size(args)))
        return 0
    texts = load_texts(args.data, args.texts)
    share = measure_share(texts)
    print(share, flush=True)
    sizes = [run_size(n, args) for n in args.sizes]
    costs = [size["us_per_token"] for size in sizes]
    growth = sizes[-1]["beyond_output_MiB"] - sizes[min(1, len(sizes) - 1)]["beyond_output_MiB"]
    figures = [
        Figure(
            f"share of the {share['dtype']} matrix peak, {len(texts):,} mixed texts",
            share["share_of_peak"],
            PEAK_SHARE_BAR,
        ),
        Figure("mixed texts/s", share["texts_per_s"]),
        Figure(
            "dearest token over cheapest, all sizes", max(costs) / min(costs), SPREAD_BAR, False
        ),
        *(
            Figure(f"{size['texts']:,} short texts: microseconds a token", size["us_per_token"])
            for size in sizes
        ),
        *(
            Figure(
                f"{size['texts']:,} short texts: MiB beyond the output", size["beyond_output_MiB"]
            )
            for size in sizes
        ),
        Figure(
            f"MiB more for {sizes[-1]['texts']:,} than for "
            f"{sizes[min(1, len(sizes) - 1)]['texts']:,}",
            growth,
            GROWTH_BAR,
            at_least=False,
        ),
    ]
    values = {"mixed texts": share, "short texts": sizes, "FLOP count": FLOP_FORMULA}
    title = "Cost of a token and memory, from a thousand texts to many"
    return finish("encode_scale", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
