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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import make_parser, skip, start
from _results import Figure, finish
from safetensors.torch import save_file
from torch import Tensor

from skembed.checkpoint import INDEX_FILE, read_config, resolve_source
from skembed.model import NVEmbedConfig, NVEmbedModel
from skembed.registry import ModelKey, choose_attention_path, registry

MAX_PEAK = 1.2
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
    "vocab_size": 24_576,  # the tokenizer is that of the bundled model
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


def make_tensors(config: NVEmbedConfig) -> Iterator[tuple[str, Tensor]]:
    """Random float16 weights under the checkpoint's names, one at a time."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in NVEmbedModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.float16)
        if "norm" in name and name.endswith("weight"):
            value.fill_(1.0)
        else:
            value.normal_(std=1.0 if name.endswith("latents") else 0.03, generator=generator)
        yield name, value


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write shards, index, config and tokenizer; bytes of all weights."""
    config = make_config(gigabytes)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total, number = 0, 1

    def flush() -> None:
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, value in make_tensors(config):
        if shard and sum(t.nbytes for t in shard.values()) + value.nbytes > SHARD_BYTES:
            flush()
            number += 1
        shard[name] = value
        total += value.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(resolve_source("skembed-mini").folder / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return total


def read_memory(field: str) -> int:
    """A line of this process's status in bytes: VmRSS (now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    skip(f"/proc/self/status has no {field}: needs Linux")


def load_one(name: str | Path, dtype: str) -> tuple[Any, float]:
    """Load a model as the vectorizer does; the model and the seconds it took."""
    source = resolve_source(name)
    config = read_config(source)
    device = torch.device("cpu")
    key = ModelKey(
        fingerprint=str(name),
        pooling=config.pooling,
        device="cpu",
        dtype=dtype,
        attention_path=choose_attention_path(device, getattr(torch, dtype)),
    )
    began = time.perf_counter()
    loaded = registry.get(key, source, config)
    return loaded, time.perf_counter() - began


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Load in this process and return what it took; called in a fresh one."""
    source = resolve_source(folder)
    with torch.device("meta"):
        model = NVEmbedModel(read_config(source))
    numel = sum(tensor.numel() for tensor in model.state_dict().values())
    weights = numel * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # Imports, thread pools and kernels belong to the process, not to this checkpoint.
    load_one("skembed-mini", dtype)
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    loaded, seconds = load_one(folder, dtype)
    peak, after = read_memory("VmHWM") - before, read_memory("VmRSS") - before
    return {
        "dtype": dtype,
        "weights_bytes": weights,
        "folded_bytes": loaded.weight_bytes,
        "peak_bytes": peak,
        "after_bytes": after,
        "peak_ratio": round(peak / weights, 4),
        "after_ratio": round(after / weights, 4),
        "seconds": round(seconds, 2),
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
        total = make_checkpoint(Path(temporary), args.gigabytes)
        print(f"made {total / 1e9:.2f} GB", flush=True)
        for dtype in args.dtypes:
            command = [sys.executable, __file__, "--measure", temporary, dtype]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[dtype] = json.loads(done.stdout.splitlines()[-1])
    figures = [Figure("weights of the checkpoint, float16, GB", total / 1e9)]
    for dtype, row in found.items():
        title = f"peak of loading as {dtype} / weights"
        figures.append(Figure(title, row["peak_ratio"], MAX_PEAK, at_least=False))
        figures.append(Figure(f"loading as {dtype}, s", row["seconds"]))
    title = "Peak memory of loading a checkpoint"
    return finish("load_memory", title, figures, {"by type": found}, args=args)


if __name__ == "__main__":
    sys.exit(main())
