"""Does torch.compile pay for the bundled model on a CPU? Warm-up and rate beside our own pass.

Run: python benchmarks/compile.py [--texts 300] [--repeats 3]
skembed-mini on the engine's own batches of real texts, one pass after the other on one core (a call
runs one such stream a core): our fused pass; transformers' own pass over our norms and activations,
which is the package's without the fused one; transformers' pass with nothing of ours but attention
over packed texts; and that one compiled, as one graph, once for sizes of any kind and once for each
size of a batch. Attention is an operator inside the graph: its loop over texts would be compiled
anew for each batch. The pooling is the same on all sides. Warm-up is the time of the first rounds
beyond that of later ones, from an empty cache of compiled code, and again from a filled one. The
vectors must agree.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import cosines, describe_lengths, load_texts, make_parser, seconds, start
from _results import Figure, finish
from forward_limits import load_bundled, make_batches
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, MistralModel

from skembed.model.attention import ATTENTION_NAME
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch

MIN_COSINE = 0.999
WARM_ROUNDS = 2
MOST_SIZES = 64  # torch gives up after 8
OURS, LEAN, PLAIN = "our fused pass", "transformers' pass, our norms", "transformers' pass"
COMPILED = {"compiled for any size": True, "compiled for each size": False}  # name -> `dynamic`
OPERATOR = "skembed_bench_attention"
Pass = Callable[[PackedBatch], Tensor]


def register_operator() -> None:
    """Make our attention over packed texts an operator that a graph can hold, under `OPERATOR`."""
    ours: Any = AttentionInterface()[ATTENTION_NAME]

    @torch.library.custom_op("skembed_bench::attend", mutates_args=())
    def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float) -> Tensor:
        """(1, H, T, d) -> (1, T, H, d)."""
        sizes = tuple(borders.diff().tolist())
        packed = PackedBatch(*[borders] * 2, sizes, len(sizes), *[borders] * 4)  # lengths count
        attended: Tensor = ours(
            None, q, k, v, None, scaling=scaling, packed=packed, path="grouped"
        )[0]
        return attended

    @attend.register_fake
    def describe(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])

    def run_operator(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, borders: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        return attend(q, k, v, borders, options["scaling"]), None

    AttentionInterface.register(OPERATOR, run_operator)
    AttentionMaskInterface.register(OPERATOR, lambda *_, **__: None)


def copy_backbone(model: NVEmbedModel) -> MistralModel:
    """Return transformers' model of the same weights, with its own norms and activations."""
    config = model.config.mistral_config()
    config._attn_implementation = OPERATOR
    weight = model.embedding_model.norm.weight
    backbone = MistralModel(config).to(weight.dtype).eval()
    backbone.rotary_emb = type(backbone.rotary_emb)(config)  # its frequencies stay float32
    backbone.load_state_dict(model.embedding_model.state_dict())
    return backbone


def make_pass(model: NVEmbedModel, backbone: Any, **options: Any) -> Pass:
    """Return transformers' pass and our pooling; with options for `torch.compile`, compiled."""

    def run_backbone(ids: Tensor, positions: Tensor, borders: Tensor) -> Tensor:
        output = backbone(input_ids=ids, position_ids=positions, use_cache=False, borders=borders)
        hidden: Tensor = output.last_hidden_state
        return hidden

    run: Any = torch.compile(run_backbone, fullgraph=True, **options) if options else run_backbone

    def embed(batch: PackedBatch) -> Tensor:
        hidden = run(batch.input_ids[None], batch.position_ids[None], batch.cu_seqlens)[0]
        vectors: Tensor = model.latent_attention_model(
            hidden[batch.pool_index], batch.pool_segments, batch.pool_counts
        )
        return vectors

    return embed


def run_all(embed: Pass, batches: list[PackedBatch]) -> np.ndarray:
    """Return the vectors of all batches."""
    with torch.inference_mode():
        return np.vstack([embed(batch)[: batch.n_texts].numpy() for batch in batches])


def time_passes(
    passes: dict[str, Pass], batches: list[PackedBatch], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each round of each pass, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, embed in passes.items():
            times[name].append(seconds(lambda embed=embed: run_all(embed, batches)))  # type: ignore[misc]
    return times


def warm_up(embed: Pass, batches: list[PackedBatch]) -> list[float]:
    """Return the seconds of the first rounds of a pass whose graphs were forgotten."""
    torch.compiler.reset()
    return [seconds(lambda: run_all(embed, batches)) for _ in range(WARM_ROUNDS)]


def count_texts_to_pay(warm_up_s: float, before_s: float, after_s: float, n_texts: int) -> float:
    """Return the texts after which a warm-up is paid back; infinite where nothing is gained."""
    gain_s = before_s - after_s
    return n_texts * warm_up_s / gain_s if gain_s > 0 else math.inf


def measure_compiled(
    name: str, ours: Pass, embed: Pass, batches: list[PackedBatch], repeats: int
) -> dict[str, Any]:
    """Return vectors, seconds of both warm-ups, and of each round beside our pass."""
    first = warm_up(embed, batches)
    again = warm_up(embed, batches)
    vectors = run_all(embed, batches)
    times = time_passes({OURS: ours, name: embed}, batches, repeats)
    steady_s = statistics.median(times[name])
    return {
        "vectors": vectors,
        "warm_up_s": max(0.0, sum(first) - WARM_ROUNDS * steady_s),
        "warm_up_from_cache_s": max(0.0, sum(again) - WARM_ROUNDS * steady_s),
        "times_s": times,
    }


def report_compiled(
    name: str, found: dict[str, Any], plain_over_ours: float, n_texts: int
) -> list[Figure]:
    """Return the figures of a compiled pass; our pass and it ran in turn."""
    ours_s, own_s = (statistics.median(found["times_s"][key]) for key in (OURS, name))
    paid = {
        other: count_texts_to_pay(found["warm_up_s"], other_s, own_s, n_texts)
        for other, other_s in ((OURS, ours_s), (PLAIN, plain_over_ours * ours_s))
    }
    never = [other for other, n in paid.items() if math.isinf(n)]
    lost = f", never paid back against {' nor '.join(never)}" if never else ""
    return [
        Figure(f"{OURS} over {name}, times as fast", own_s / ours_s),
        Figure(f"{name}: s of warm-up{lost}", found["warm_up_s"]),
        Figure(f"{name}: s of warm-up, code from the cache", found["warm_up_from_cache_s"]),
        *(
            Figure(f"{name}: texts until it is paid back against {other}", round(n))
            for other, n in paid.items()
            if other not in never
        ),
    ]


def try_compiled(
    name: str, model: NVEmbedModel, backbone: Any, batches: list[PackedBatch], repeats: int
) -> dict[str, Any] | str:
    """Measure a compiled pass that begins with no code; say why where it cannot run."""
    embed = make_pass(model, backbone, dynamic=COMPILED[name])
    with (
        tempfile.TemporaryDirectory() as folder,
        torch._dynamo.config.patch(recompile_limit=MOST_SIZES),
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            return measure_compiled(name, model, embed, batches, repeats)
        except Exception as error:  # no C++ compiler, say: the rest of the result stands
            line = next(iter(str(error).splitlines()), "")
            reason = f"skipped: {type(error).__name__}: {line}"
            print(f"{name}, {reason}", file=sys.stderr)
            return reason


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=300)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the texts")
    parser.set_defaults(threads=1)
    args = start(parser)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
    texts = load_texts(args.data, args.texts)
    loaded = load_bundled(texts)
    model, (batches, _, _) = loaded.model, make_batches(loaded, texts)
    register_operator()
    backbone = copy_backbone(model)

    def run_lean(batch: PackedBatch) -> Tensor:
        model.fuse = False
        try:
            return model(batch)
        finally:
            model.fuse = True

    passes: dict[str, Pass] = {OURS: model, LEAN: run_lean, PLAIN: make_pass(model, backbone)}
    vectors = {name: run_all(embed, batches) for name, embed in passes.items()}  # warm
    times = time_passes(passes, batches, args.repeats)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    lengths = [n for batch in batches for n in batch.lengths[: batch.n_texts]]
    figures = [Figure(f"{name}, tokens/s", sum(lengths) / s) for name, s in medians.items()]
    compiled: dict[str, Any] = {}
    for name in COMPILED:
        compiled[name] = found = try_compiled(name, model, backbone, batches, args.repeats)
        if isinstance(found, str):
            continue
        vectors[name] = found.pop("vectors")
        median_s = statistics.median(found["times_s"][name])
        figures.append(Figure(f"{name}, tokens/s", sum(lengths) / median_s))
        figures += report_compiled(name, found, medians[PLAIN] / medians[OURS], len(texts))
    for name in list(vectors)[1:]:
        worst = float(cosines(vectors[OURS], vectors[name]).min())
        figures.append(Figure(f"smallest cosine of our pass to {name}", worst, MIN_COSINE))
    values = {
        "dtype": loaded.key.dtype,
        "tokens": describe_lengths(lengths),
        "batches": len(batches),
        "sizes of a batch": sorted({len(batch.input_ids) for batch in batches}),
        "times_s": {name: [round(s, 4) for s in spent] for name, spent in times.items()},
        "compiled": compiled,
    }
    title = "torch.compile for the bundled model on a CPU"
    return finish("compile", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
