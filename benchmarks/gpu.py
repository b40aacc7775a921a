"""A random 7B model in NV-Embed's layout on a CUDA device: speed, memory, exactness.

Run on a machine with a GPU: python benchmarks/gpu.py [--layers 32] [--texts 2000]
Writes a checkpoint (16 GB with 32 layers; sharded float16) to a temporary folder, then measures
tokens per second and the share of the device's own bfloat16 matrix rate on texts of log-normal
length, 8 to 512 tokens, for each attention path and against sentence-transformers on the same
backbone; time and memory of loading; the leak check of each path; the golden vectors.
To see that it runs, without a GPU: python benchmarks/gpu.py --device cpu --tiny
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    FLOP_FORMULA,
    ROOT,
    compare,
    cosines,
    count_flops,
    describe_lengths,
    make_parser,
    measure_peak,
    read_memory,
    run_child,
    seconds,
)
from _models import SEVEN_B, TINY, load_model, start_on_device, write_random_model
from _results import Figure, finish
from same_weights import export_tokenizer, load_peer, write_plain_config
from transformers import MistralModel

from skembed import NVEmbedVectorizer
from skembed.datasets import load_docstrings
from skembed.exceptions import CausalLeakError
from skembed.inference.engine import EmbedReport, EmbedRequest, embed_texts
from skembed.model.config import NVEmbedConfig
from skembed.model.loaded import LoadedModel, prove_bidirectional
from skembed.model.pooling import MeanPooling

DTYPE = "bfloat16"
# Log-normal, in tokens.
MEDIAN_LENGTH, SIGMA, SHORTEST, LONGEST = 64, 1.0, 8, 512
BATCH_SIZES = (32, 64, 128, 256)
GOLDEN = ROOT / "tests" / "golden" / "nvembed-tiny"


# The checkpoint and the texts


def make_config(args: Any) -> NVEmbedConfig:
    """Return the published sizes, with fewer layers if asked, or toy sizes."""
    backbone = {**(TINY if args.tiny else SEVEN_B), "rope_theta": 10_000.0, "rms_norm_eps": 1e-5}
    backbone["max_position_embeddings"] = 32_768
    if args.layers:
        backbone["num_hidden_layers"] = args.layers
    if not args.tiny:
        return NVEmbedConfig(backbone=backbone)
    return NVEmbedConfig(
        backbone=backbone, num_latents_value=16, num_cross_heads=2, cross_dim_head=64, latent_dim=64
    )


def make_texts(n_texts: int, tokenizer: Any) -> list[str]:
    """Return pieces of real documentation of log-normal length in tokens."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEDIAN_LENGTH), SIGMA, n_texts)
    wanted = np.clip(drawn, SHORTEST, LONGEST).astype(int) - 2
    stream = " ".join(load_docstrings().data)
    offsets = tokenizer.encode(stream, add_special_tokens=False).offsets
    starts = rng.integers(0, len(offsets) - LONGEST, n_texts)
    return [
        stream[offsets[a][0] : offsets[a + n - 1][1]].strip()
        for a, n in zip(starts, wanted, strict=True)
    ]


# Loading


def measure_load(folder: Path, device: torch.device) -> None:
    """Load in this fresh process, and print time and peak memory as JSON."""
    torch.zeros(1, device=device)  # the device's own start is not part of loading
    before = read_memory("VmHWM")
    begin = time.perf_counter()
    loaded = load_model(folder, device, DTYPE)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    found = {
        "seconds": round(time.perf_counter() - begin, 2),
        "folded weights, GiB": gib(loaded.weight_bytes),
        "host peak beyond start, GiB": gib(read_memory("VmHWM") - before),
        "device peak, GiB": gib(torch.cuda.max_memory_allocated(device)) if on_gpu else None,
        "device after loading, GiB": gib(torch.cuda.memory_allocated(device)) if on_gpu else None,
    }
    print(json.dumps(found))


def gib(n_bytes: int) -> float:
    """Return bytes as GiB."""
    return round(n_bytes / 2**30, 3)


# Exactness


def check_leaks(loaded: LoadedModel, paths: tuple[str, ...]) -> dict[str, str]:
    """Run the leak check of each attention path; return the verdicts."""
    found = {}
    for path in paths:
        loaded.model.attention_path = path
        try:
            prove_bidirectional(loaded.model, loaded.device)
            found[path] = "sees the whole text and nothing else"
        except CausalLeakError as error:
            found[path] = str(error)
    return found


def bare_instruction(text: str) -> str | None:
    """Return the task text of an instruction that stands in the template already."""
    return text.removeprefix("Instruct: ").removesuffix("\nQuery: ") or None


def check_golden(args: Any) -> dict[str, float]:
    """Return the smallest cosine to the golden float32 vectors, over all blocks and texts."""
    golden = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    found = {}
    for dtype in ("float32", DTYPE):
        smallest = 1.0
        for block, expected in golden["embeddings"].items():
            name, max_length = block.rsplit("/", 1)
            vectorizer = NVEmbedVectorizer(
                GOLDEN,
                instruction=bare_instruction(golden["instructions"][name]),
                max_length=int(max_length),
                dtype=dtype,
                device=args.device,
                cache=None,
                trainer=None,
            )
            vectors = vectorizer.transform(golden["texts"])
            smallest = min(smallest, float(cosines(vectors, np.array(expected)).min()))
        found[dtype] = smallest
    return found


# Speed


class Encoder:
    """Texts through one loaded model, on a chosen path."""

    def __init__(self, loaded: LoadedModel, texts: list[str], batch_tokens: int | None) -> None:
        self.loaded, self.texts, self.batch_tokens = loaded, texts, batch_tokens
        self.report = EmbedReport()
        self.vectors = np.empty((0, 0), dtype=np.float32)

    def __call__(self) -> None:
        """Embed all texts; the result is on the host when this returns."""
        width = self.loaded.config.hidden_size
        request = EmbedRequest(prefix="", max_length=512, dim=width, namespace="benchmark")
        self.vectors, self.report = embed_texts(
            self.texts,
            request,
            get_models=lambda: [self.loaded],
            cache=None,
            batch_tokens=self.batch_tokens,
            progress=False,
        )


def measure_path(encoder: Encoder, path: str, gflop: float, peak: float, args: Any) -> Any:
    """Return speed, share of the peak and memory of one attention path."""
    device = encoder.loaded.device
    encoder.loaded.model.attention_path = path
    encoder()  # warm
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wall_s = statistics.median(seconds(encoder) for _ in range(args.repeats))
    report = encoder.report
    return {
        "seconds": round(wall_s, 3),
        "texts_per_s": round(report.n_texts / wall_s, 1),
        "tokens_per_s": round(report.n_tokens / wall_s),
        "share_of_peak": round(gflop / wall_s / peak, 4),
        "batch_tokens": report.batch_tokens,
        "attention positions per token": round(report.n_positions / report.n_tokens, 3),
        "device peak, GiB": gib(torch.cuda.max_memory_allocated(device))
        if device.type == "cuda"
        else None,
    }


def make_peer(loaded: LoadedModel, folder: Path) -> Any:
    """Return sentence-transformers on the very weights of `loaded`: no second copy is made."""
    config = loaded.config.mistral_config()
    config._attn_implementation = "sdpa"  # the peer's default
    with torch.device("meta"):
        backbone = MistralModel(config)
    backbone.load_state_dict(loaded.model.embedding_model.state_dict(), assign=True)
    rotary = backbone.rotary_emb
    backbone.rotary_emb = type(rotary)(config=config).to(loaded.device)
    # The folder brings the tokenizer; its own toy weights are put aside.
    small = NVEmbedConfig(backbone={**TINY, "num_hidden_layers": 1})
    MistralModel(small.mistral_config()).save_pretrained(folder)
    write_plain_config(folder, small)
    export_tokenizer(folder)
    return load_peer(folder, DTYPE, str(loaded.device), backbone.eval())


def best_batch(encode: Callable[[int], object]) -> int:
    """Return the batch size of the shortest time; one that does not fit is left out."""
    times = {}
    for size in BATCH_SIZES:
        try:
            times[size] = seconds(partial(encode, size))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return min(times, key=times.__getitem__)


def compare_with_peer(encoder: Encoder, folder: Path, args: Any) -> tuple[float, dict[str, Any]]:
    """Return the smaller ratio (the peer's best batch size), and all values; mean pooling."""
    loaded = encoder.loaded
    latent, loaded.model.latent_attention_model = (
        loaded.model.latent_attention_model,
        MeanPooling(),
    )
    peer = make_peer(loaded, folder)
    texts = encoder.texts
    encoder()
    theirs = peer.encode(texts)
    values: dict[str, Any] = {"smallest cosine": float(cosines(encoder.vectors, theirs).min())}
    best = best_batch(lambda size: peer.encode(texts[: len(texts) // 4], batch_size=size))
    ratio = np.inf
    for label, size in {"default": 32, "best": best}.items():
        result = compare(
            ("skembed", "sentence-transformers"),
            encoder,
            partial(peer.encode, texts, batch_size=size),
            repeats=args.repeats,
        )
        values[f"peer's {label} batch size ({size})"] = result.to_dict(len(texts))
        ratio = min(ratio, result.ratio)
    loaded.model.latent_attention_model = latent
    return float(ratio), values


def run(args: Any, device: torch.device, folder: Path) -> int:
    """Make the checkpoint, measure all, write the result, and return the exit status."""
    config = make_config(args)
    print("writing the checkpoint ...", flush=True)
    checkpoint = folder / "nvembed"
    write_random_model(checkpoint, config, device)
    print("loading, in a process of its own ...", flush=True)
    loading = run_child(__file__, "--device", args.device, "--load-only", checkpoint)
    print("the machine's peak ...", flush=True)
    sizes = (512, 1024) if args.tiny else (4096, 8192, 16384)
    peak = measure_peak(device, dtypes=(DTYPE,), sizes=sizes)[DTYPE]
    loaded = load_model(checkpoint, device, DTYPE)
    paths = tuple(dict.fromkeys([native := loaded.model.attention_path, "padded"]))
    leaks, golden = check_leaks(loaded, paths), check_golden(args)
    texts = make_texts(args.texts, loaded.tokenizer.tokenizer)
    lengths = loaded.tokenizer.encode(texts, prefix="", max_length=512).lengths
    gflop = count_flops(config, lengths) / 1e9
    encoder = Encoder(loaded, texts, args.batch_tokens)
    speed = {}
    for path in paths:
        print(f"path {path} ...", flush=True)
        speed[path] = measure_path(encoder, path, gflop, peak, args)
    loaded.model.attention_path = native
    print("against sentence-transformers ...", flush=True)
    ratio, peer = compare_with_peer(encoder, folder / "peer", args)
    added = loading["host peak beyond start, GiB"] / loading["folded weights, GiB"]
    share = speed[native]["share_of_peak"]
    leaking = sum("sees the whole" not in verdict for verdict in leaks.values())
    figures = [
        *(Figure(f"tokens/s, path {path}", speed[path]["tokens_per_s"]) for path in paths),
        Figure("loading, s", loading["seconds"]),
        Figure("golden vectors, bfloat16: smallest cosine", golden[DTYPE], 0.999),
        Figure("attention paths that leak", leaking, 0, at_least=False),
        Figure("host peak of loading / weights", added, 1.2, at_least=False, aim=args.tiny),
        Figure(f"share of the bfloat16 peak, {native}", share, 0.6, aim=True),
        Figure("times sentence-transformers, same backbone, its best batch", ratio, 1.5, aim=True),
    ]
    values = {
        "backbone": config.backbone,
        "pooling": "latent, folded (mean against the peer)",
        "lengths, tokens": describe_lengths(lengths),
        "measured bfloat16 peak, TFLOP/s": round(peak / 1e3, 1),
        "TFLOP of one pass": round(gflop / 1e3, 2),
        "paths": speed,
        "against sentence-transformers, mean pooling": peer,
        "loading": loading,
        "leak check": leaks,
        "golden vectors, smallest cosine to float32": golden,
        "FLOP count": FLOP_FORMULA,
    }
    name = "gpu_tiny" if args.tiny else "gpu"
    return finish(name, "A random 7B model on a GPU", figures, values, args=args, device=device)


def main() -> int:
    """Check the device, and run."""
    parser = make_parser(__doc__, texts=2_000, data=False)
    parser.add_argument("--layers", type=int, help="fewer layers than 32, for a smaller GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes, instead of /tmp")
    parser.add_argument("--load-only", type=Path, help="measure loading of this folder, and stop")
    args, device = start_on_device(parser)
    if args.load_only:
        measure_load(args.load_only, device)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return run(args, device, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
