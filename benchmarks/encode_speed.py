"""Texts per second of skembed-mini against sentence-transformers with all-MiniLM-L6-v2.

Run: python benchmarks/encode_speed.py [--texts 2000] [--repeats 3]
Both sides with their default settings, the same real texts, in turn, no cache; then the same with
bfloat16 weights in the peer. For information: where our time goes, and the share of the processor's
own matrix-product rate, measured in the same run, that the encode reaches.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from _common import (
    FLOP_FORMULA,
    Comparison,
    compare,
    count_flops,
    describe_lengths,
    load_minilm,
    load_texts,
    make_parser,
    measure_peak,
    seconds,
    start,
    watch_model,
)
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.checkpoint import read_config, resolve_source

MIN_RATIO = 3.0
MIN_BFLOAT16_RATIO = 1.5
PEAK_SHARE_AIM = 0.6


def measure_share(
    vectorizer: NVEmbedVectorizer, texts: list[str], dtype: str, repeats: int
) -> dict[str, Any]:
    """Return the share of the matrix-product peak in one encode, and where its time went.

    Median of several, between two measurements of the peak: a shared machine changes its speed.
    """
    peaks = [measure_peak(dtypes=[dtype])[dtype]]
    walls, activities = [], []
    for _ in range(repeats):
        with watch_model() as activity:
            walls.append(seconds(lambda: vectorizer.transform(texts)))
        activities.append(activity)
    peaks.append(measure_peak(dtypes=[dtype])[dtype])
    wall_s, activity = statistics.median(walls), activities[-1]
    gflop = count_flops(read_config(resolve_source(vectorizer.model)), activity.lengths) / 1e9
    return {
        "tokens": describe_lengths(activity.lengths),
        "gflop": round(gflop, 1),
        "measured peaks, GFLOP/s": peaks,
        "tokens_per_s": round(activity.n_tokens / wall_s),
        "share_of_peak": round(gflop / wall_s / statistics.mean(peaks), 4),
        "times_s": [round(wall, 3) for wall in walls],
        # The passes of several streams, and the tokenising of the next texts, run side by side.
        "forward_s, all streams, of the last": round(activity.forward_s, 3),
        "tokenize_s, of the last": round(activity.tokenize_s, 3),
    }


def compare_with_peer(
    vectorizer: NVEmbedVectorizer, texts: list[str], dtype: str | None, repeats: int
) -> Comparison:
    """Time both sides in turn, warmed up on the first texts; `dtype` None is the peer's default."""
    peer = load_minilm(dtype)
    name = "sentence-transformers MiniLM" + ("" if dtype is None else f" {dtype}")
    print(f"skembed-mini against {name}", flush=True)
    vectorizer.transform(texts[:64])
    peer.encode(texts[:64])
    return compare(
        ("skembed-mini", name),
        lambda: vectorizer.transform(texts),
        lambda: peer.encode(texts),
        repeats=repeats,
    )


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=2_000)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    # Frozen, and no cache: every repetition runs every text through the model.
    vectorizer = NVEmbedVectorizer(cache=None, trainer=None).fit(texts[:8])
    default = compare_with_peer(vectorizer, texts, None, args.repeats)
    bfloat16 = compare_with_peer(vectorizer, texts, "bfloat16", args.repeats)
    dtype = vectorizer.model_["dtype"]
    share = measure_share(vectorizer, texts, dtype, args.repeats)
    n = len(texts)
    figures = [
        Figure(f"skembed-mini ({dtype}), texts/s", n / default.median_s(0)),
        Figure("sentence-transformers, all-MiniLM-L6-v2, texts/s", n / default.median_s(1)),
        Figure("ratio, both with default settings", default.ratio, MIN_RATIO),
        Figure("ratio, the peer in bfloat16 too", bfloat16.ratio, MIN_BFLOAT16_RATIO),
        Figure(
            f"share of the {dtype} matrix peak", share["share_of_peak"], PEAK_SHARE_AIM, aim=True
        ),
    ]
    values = {
        "default": default.to_dict(len(texts)),
        "peer in bfloat16": bfloat16.to_dict(len(texts)),
        "model": vectorizer.model_,
        "encode": share,
        "FLOP count": FLOP_FORMULA,
    }
    title = "Texts per second against all-MiniLM-L6-v2"
    return finish("encode_speed", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
