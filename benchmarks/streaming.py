"""A million short texts through `transform_to`: memory, and the same bytes after five kills.

Run: python benchmarks/streaming.py [--texts 1000000] [--kills 5] [--seed 0]
A generator of short texts goes into Parquet shards, ids beside the vectors, in a process of its
own, with a model made here: random weights, one layer of width 32 over the bundled tokenizer, so
small that the time is that of everything around the model. Once undisturbed, its resident memory
sampled; once more with SIGKILL at random moments, each time started again. Then both folders are
compared byte by byte, ids are counted, and a sample of rows is compared with `transform`.
Linux or another system with /proc; about 1 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import make_parser, read_memory, start
from _models import BUNDLED_VOCABULARY, write_random_model
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.model.config import NVEmbedConfig
from skembed.model.network import NVEmbedModel
from skembed.streaming import open_embeddings
from skembed.streaming.stream import ROWS_PER_SHARD

BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": BUNDLED_VOCABULARY,
}
WORDS = (
    "card account loan money bank rate time house river cat dog tax letter paper music train city "
    "winter garden window doctor school market engine bread sugar stone island bridge number"
).split()
SETTLED = 100_000  # texts after which memory must stay as it is
SAMPLE_S = 0.05
N_COMPARED = 1_000
MiB = 2**20


def make_text(i: int) -> str:
    """Text number i: four words and the number, about eight tokens."""
    n = len(WORDS)
    words = (WORDS[(i // n**k + 7 * k) % n] for k in range(4))
    return f"{' '.join(words)} {i}"


def make_texts(n_texts: int) -> Iterator[str]:
    """All texts, one at a time."""
    return (make_text(i) for i in range(n_texts))


def make_model(folder: Path) -> int:
    """Write a model of random weights; their number."""
    config = NVEmbedConfig(backbone=BACKBONE, pooling="mean")
    write_random_model(folder, config)
    return sum(tensor.numel() for tensor in NVEmbedModel(config).state_dict().values())


def make_vectorizer(model: Path) -> NVEmbedVectorizer:
    """The vectorizer of every process here."""
    return NVEmbedVectorizer(model, pooling="mean", device="cpu", dtype="float32", cache=None)


# The writing process


def write(args: argparse.Namespace) -> None:
    """Write the embeddings in this process."""
    make_vectorizer(args.model).transform_to(
        make_texts(args.texts),
        args.write,
        ids=range(args.texts),
        rows_per_shard=args.rows_per_shard,
    )


def start_writer(path: Path, model: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start a process that writes, or goes on writing, to a folder."""
    words = ["--texts", args.texts, "--write", path, "--model", model]
    words += ["--threads", args.threads] if args.threads else []
    return subprocess.Popen([sys.executable, __file__, *map(str, words)])


def count_rows(path: Path, rows_per_shard: int) -> int:
    """Rows in complete shards."""
    return rows_per_shard * len(list(path.glob("part-*.parquet")))


def end_well(process: subprocess.Popen[bytes]) -> None:
    """Wait for a writer; one that failed ends the benchmark."""
    if process.wait():
        sys.exit(f"streaming.py: a writer ended with status {process.returncode}")


def run_undisturbed(path: Path, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write once; memory by rows that were complete, and the time from the first shard on."""
    process = start_writer(path, model, args)
    samples: list[tuple[int, int]] = []
    first = 0.0
    while process.poll() is None:
        rows, memory = count_rows(path, args.rows_per_shard), read_memory("VmRSS", process.pid)
        if memory:
            samples.append((rows, memory))
        if rows and not first:
            first = time.perf_counter()
        time.sleep(SAMPLE_S)
    elapsed = time.perf_counter() - first
    end_well(process)
    settled = min(SETTLED, args.texts // 10)
    after = [memory for rows, memory in samples if rows >= settled]
    if not first or not after:
        sys.exit("streaming.py: too few texts to sample memory; raise --texts.")
    return {
        "seconds_behind_the_first_shard": round(elapsed, 1),
        "texts_per_s": round((args.texts - args.rows_per_shard) / elapsed, 1),
        "memory_MiB": {
            "settled_after_texts": settled,
            "then": round(after[0] / MiB, 1),
            "lowest": round(min(after) / MiB, 1),
            "highest": round(max(after) / MiB, 1),
            "end": round(after[-1] / MiB, 1),
            "samples": len(after),
        },
    }


def run_with_kills(
    path: Path, model: Path, args: argparse.Namespace, texts_per_s: float
) -> list[int]:
    """Write, killed at random moments and started again; rows complete at each kill."""
    rng = np.random.default_rng(args.seed)
    rows = args.rows_per_shard
    last = max(args.texts // rows - 2 * args.kills, args.kills + 1)
    goals = np.sort(rng.choice(np.arange(1, last), args.kills, replace=False)) * rows
    kills: list[int] = []
    for goal in goals.tolist():
        goal = max(goal, (kills[-1] if kills else 0) + rows)
        process = start_writer(path, model, args)
        while process.poll() is None and count_rows(path, rows) < goal:
            time.sleep(SAMPLE_S / 10)
        time.sleep(rng.uniform(0, 2 * rows / texts_per_s))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            sys.exit("streaming.py: a writer ended before it was killed; raise --texts.")
        kills.append(count_rows(path, rows))
        print(f"  killed with {kills[-1]:,} rows complete", flush=True)
    end_well(start_writer(path, model, args))
    return kills


# The comparison


def hash_files(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, hidden ones too."""
    found = {}
    for file in sorted(path.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(MiB):
                digest.update(part)
        found[file.name] = digest.hexdigest()
    return found


def check_rows(path: Path, model: Path, n_texts: int) -> tuple[int, float]:
    """Rows lost, doubled or out of place, and the largest difference to `transform` in a sample.

    Vectors of the sample that are equal count as doubled: every text has a number of its own.
    """
    dataset = open_embeddings(path, verify=True)
    ids = dataset.to_table(columns=["id"])["id"].to_numpy()
    n_wrong = abs(len(ids) - n_texts) + int((ids[:n_texts] != np.arange(len(ids[:n_texts]))).sum())
    sample = np.sort(np.random.default_rng(0).permutation(n_texts)[:N_COMPARED])
    column = dataset.take(sample.tolist())["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(sample), -1)
    n_wrong += len(sample) - len(np.unique(vectors, axis=0))
    expected = make_vectorizer(model).transform([make_text(i) for i in sample.tolist()])
    return n_wrong, float(np.abs(vectors - expected).max())


def main() -> int:
    """Run both, compare, and write the result."""
    parser = make_parser(__doc__ or "", texts=1_000_000, data=False)
    parser.add_argument("--kills", type=int, default=5, help="times that the second run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where to write; default: temporary")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = start(parser)
    # The default of transform_to; smaller for a short try, so that there are shards to kill in.
    args.rows_per_shard = min(ROWS_PER_SHARD, max(1, args.texts // 60))
    if args.write:
        write(args)
        return 0
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=args.folder) as temporary:
        folder = Path(temporary)
        model = folder / "model"
        n_weights = make_model(model)
        print(f"{args.texts:,} texts, {n_weights:,} weights", flush=True)
        undisturbed = run_undisturbed(folder / "undisturbed", model, args)
        kills = run_with_kills(folder / "killed", model, args, undisturbed["texts_per_s"])
        one, other = hash_files(folder / "undisturbed"), hash_files(folder / "killed")
        differing = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
        n_wrong, difference = check_rows(folder / "killed", model, args.texts)
        size = sum(file.stat().st_size for file in (folder / "killed").iterdir())
    memory = undisturbed["memory_MiB"]
    change = max(memory["highest"] - memory["then"], memory["then"] - memory["lowest"])
    figures = [
        Figure("kills survived", len(kills), bar=args.kills),
        Figure("files that differ from the undisturbed run", len(differing), 0, at_least=False),
        Figure("rows lost, doubled or out of place", n_wrong, 0, at_least=False),
        Figure("largest difference to transform", difference, 1e-5, at_least=False),
        Figure(
            f"memory after {memory['settled_after_texts']:,} texts: largest change, MB",
            change * MiB / 1e6,
            50,
            at_least=False,
        ),
        Figure("texts/s", undisturbed["texts_per_s"]),
    ]
    values = {
        "texts": args.texts,
        "rows per shard": args.rows_per_shard,
        "model": {"weights": n_weights, "layers": 1, "width": BACKBONE["hidden_size"]},
        "files": len(other),
        "bytes written": size,
        "undisturbed": undisturbed,
        "rows complete at each kill": kills,
        "seed": args.seed,
    }
    title = f"{args.texts:,} texts through transform_to, killed {len(kills)} times"
    return finish("streaming", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
