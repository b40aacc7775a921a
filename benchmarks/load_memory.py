"""Peak memory and time of loading a checkpoint, as multiples of its weights in the target type.

Run: python benchmarks/load_memory.py [--gigabytes 2.0] [--dtypes bfloat16 float32] [--folder DIR]
Makes a checkpoint in NV-Embed's layout and proportions (random weights, float16, shards with an
index; one shard in memory at a time), then loads it in a fresh process per target type the way
NVEmbedVectorizer does: read, convert, check for leaks, fold the latent layer. "Peak" is the
largest resident memory above the level before loading, mapped file pages included. The files have
just been written, so that the time is that of a warm page cache. Linux only; needs 2 GB of disk
and 5 GB of memory with the defaults.

The bar of the project is a peak of at most 1.2 times the weights; exit status 1 when it is missed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import clear_peak, make_parser, read_memory, run_child, seconds, start
from _models import BUNDLED_VOCABULARY, load_model, write_random_model
from _results import Figure, finish

import skembed.model.checkpoint
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.sources import read_config, resolve_source

MAX_PEAK = 1.2
CPU = torch.device("cpu")
SHARD_BYTES = 400_000_000
# The proportions of the 7B model at hidden 1,536: head width of the latent layer = hidden width,
# a tenth of all weights in it, the largest tensor 3.6 % of the whole.
BACKBONE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": BUNDLED_VOCABULARY,
}
BYTES_PER_LAYER = 2 * (2 * 1536 * 1536 + 2 * 512 * 1536 + 3 * 4096 * 1536)


def make_config(gigabytes: float) -> NVEmbedConfig:
    """Return a configuration whose weights take at least that much in float16."""
    for layers in range(1, 1_000):
        config = NVEmbedConfig(
            backbone={**BACKBONE, "num_hidden_layers": layers},
            num_latents_value=256,
            num_cross_heads=8,
            cross_dim_head=1536,
            latent_dim=1536,
        )
        if layers * BYTES_PER_LAYER + 280_000_000 >= gigabytes * 1e9:
            return config
    raise SystemExit(f"{gigabytes} GB is more than this makes")


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Load in this process and return what it took; called in a fresh one."""
    source = resolve_source(folder)
    with torch.device("meta"):
        model = NVEmbedModel(read_config(source))
    numel = sum(tensor.numel() for tensor in model.state_dict().values())
    weights = numel * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # Imports, thread pools and kernels belong to the process, not to this checkpoint.
    load_model("skembed-mini", CPU, dtype)
    before = read_memory("VmRSS")
    clear_peak()
    loaded: list[Any] = []
    spent = seconds(lambda: loaded.append(load_model(folder, CPU, dtype)))
    peak, after = read_memory("VmHWM") - before, read_memory("VmRSS") - before
    return {
        "dtype": dtype,
        "weights_bytes": weights,
        "folded_bytes": loaded[0].weight_bytes,
        "peak_bytes": peak,
        "after_bytes": after,
        "peak_ratio": round(peak / weights, 4),
        "after_ratio": round(after / weights, 4),
        "seconds": round(spent, 2),
    }


def main() -> int:
    """Make the checkpoint, measure each type, write the result, and return the exit status."""
    parser = make_parser(__doc__, data=False)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the float16 weights")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--folder", type=Path, help="where to make it; default: temporary")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = start(parser)
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return 0
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="load-memory-", dir=args.folder) as temporary:
        skembed.model.checkpoint.SHARD_BYTES = SHARD_BYTES  # several shards, as NV-Embed has
        write_random_model(Path(temporary), make_config(args.gigabytes))
        total = sum(file.stat().st_size for file in Path(temporary).glob("*.safetensors"))
        print(f"made {total / 1e9:.2f} GB", flush=True)
        for dtype in args.dtypes:
            found[dtype] = run_child(__file__, "--measure", temporary, dtype)
    figures = [Figure("weights of the checkpoint, float16, GB", total / 1e9)]
    for dtype, row in found.items():
        title = f"peak of loading as {dtype} / weights"
        figures.append(Figure(title, row["peak_ratio"], MAX_PEAK, at_least=False))
        figures.append(Figure(f"loading as {dtype}, s", row["seconds"]))
    title = "Peak memory of loading a checkpoint"
    return finish("load_memory", title, figures, {"by type": found}, args=args)


if __name__ == "__main__":
    sys.exit(main())
