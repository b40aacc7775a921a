"""Does torch.compile pay for the bundled model on a CPU? Warm-up and rate beside our own pass.

Run: python benchmarks/compile.py [--texts 600] [--repeats 3]
skembed-mini on the engine's own batches of real texts, one pass after the other on all cores: our
fused pass; transformers' own pass as it is; and the same with every decoder layer compiled, for
sizes of any kind (attention over packed texts stays outside: its loop over texts would be compiled
anew for each batch). Warm-up is the time of the first rounds beyond that of a later one. The
vectors must agree.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _common import cosines, describe_lengths, load_texts, make_parser, seconds, start
from _results import Figure, finish
from forward_limits import make_batches
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skembed import NVEmbedVectorizer
from skembed.model import ATTENTION_NAME
from skembed.tokenization import PackedBatch

MIN_COSINE = 0.999
WARM_ROUNDS = 3
OURS, STOCK, COMPILED = "our fused pass", "transformers' own pass", "the same, compiled"


def run(model: Any, batches: list[PackedBatch]) -> list[np.ndarray]:
    """Return the vectors of each batch."""
    with torch.inference_mode():
        return [model(batch)[: batch.n_texts].float().numpy() for batch in batches]


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """Run each decoder layer compiled, its attention function outside."""
    plain = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = torch.compiler.disable(plain)
    layers = model.embedding_model.layers
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = plain
        for layer in layers:
            layer._compiled_call_impl = None


def measure_compiled(
    model: Any, batches: list[PackedBatch], repeats: int
) -> tuple[list[np.ndarray], float, list[float]]:
    """Return vectors, seconds of warm-up, and seconds of each later round."""
    with compiled_layers(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = [seconds(lambda: run(model, batches)) for _ in range(WARM_ROUNDS)]
        times = [seconds(lambda: run(model, batches)) for _ in range(repeats)]
        vectors = run(model, batches)
    return vectors, sum(first) - WARM_ROUNDS * statistics.median(times), times


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=600)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the texts")
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    vectorizer = NVEmbedVectorizer(cache=None, trainer=None, device="cpu")
    vectorizer.fit_transform(texts[:8])
    (loaded,) = vectorizer._lease.models.values()
    model: Any = loaded.model
    batches, _, _ = make_batches(loaded, texts)
    n_tokens = sum(sum(batch.lengths[: batch.n_texts]) for batch in batches)
    expected = run(model, batches)
    times = {OURS: [], STOCK: []}
    model.fuse = False
    others = {STOCK: run(model, batches)}
    for _ in range(args.repeats):
        for name in times:
            model.fuse = name == OURS
            times[name].append(seconds(lambda: run(model, batches)))
    model.fuse = False
    reason, warm_up_s = "", float("nan")
    try:
        others[COMPILED], warm_up_s, times[COMPILED] = measure_compiled(
            model, batches, args.repeats
        )
    except Exception as error:  # no compiler, say: the rest of the result stands
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"torch.compile failed: {reason}", file=sys.stderr)
    model.fuse = True
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    figures = [
        *(Figure(f"{name}, tokens/s", round(n_tokens / s)) for name, s in medians.items()),
        *(
            Figure(f"our fused pass over {name}, times as fast", medians[name] / medians[OURS])
            for name in medians
            if name != OURS
        ),
    ]
    if COMPILED in medians:
        gain_s = medians[STOCK] - medians[COMPILED]  # a round
        figures.append(Figure("warm-up of the compiled pass, s", warm_up_s))
        if gain_s > 0:
            n_texts = round(len(texts) * warm_up_s / gain_s)
            figures.append(Figure("texts after which it is ahead of the uncompiled one", n_texts))
    for name, vectors in others.items():
        worst = float(min(cosines(a, b).min() for a, b in zip(expected, vectors, strict=True)))
        figures.append(Figure(f"smallest cosine of our pass to {name}", worst, MIN_COSINE))
    values = {
        "dtype": loaded.key.dtype,
        "tokens": describe_lengths([n for b in batches for n in b.lengths[: b.n_texts]]),
        "batches": len(batches),
        "times_s": {name: [round(s, 4) for s in spent] for name, spent in times.items()},
        "torch.compile failed": reason,
    }
    title = "torch.compile for the bundled model on a CPU"
    return finish("compile", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
