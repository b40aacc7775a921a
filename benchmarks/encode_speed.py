"""Texts per second of skembed-mini against sentence-transformers with all-MiniLM-L6-v2.

Run: python benchmarks/encode_speed.py [--texts 2000] [--repeats 3]
Both sides with their default settings, the same real texts, in turn, no cache; then the same with
bfloat16 weights in the peer. For information: where our time goes, and the share of the processor's
own matrix-product rate, measured in the same run, that the encode reaches.
"""

from __future__ import annotations

import sys
from typing import Any

from _common import (
    FLOP_FORMULA,
    Comparison,
    compare,
    describe_lengths,
    load_minilm,
    load_texts,
    make_parser,
    start,
    time_share_of_peak,
)
from _results import Figure, finish

from skembed import NVEmbedVectorizer

MIN_RATIO = 3.0
MIN_BFLOAT16_RATIO = 1.5
PEAK_SHARE_AIM = 0.6


def measure_share(vectorizer: NVEmbedVectorizer, texts: list[str], repeats: int) -> dict[str, Any]:
    """Return the share of the matrix-product peak in one encode, and where its time went."""
    share = time_share_of_peak(vectorizer, texts, repeats)
    activity = share.activity
    return {
        "tokens": describe_lengths(activity.lengths),
        "gflop": round(share.gflop, 1),
        "measured peaks, GFLOP/s": share.peaks,
        "tokens_per_s": round(activity.n_tokens / share.wall_s),
        "share_of_peak": round(share.of_peak, 4),
        "times_s": [round(time, 3) for time in share.times_s],
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
    share = measure_share(vectorizer, texts, args.repeats)
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
