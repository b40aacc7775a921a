"""Rows per second that EmbeddingCache stores and finds, in memory and in a file.

Run: python benchmarks/cache_throughput.py [--rows 100000] [--dim 384] [--batch 4096]
Under a minute with the defaults. A file found "cold" has just been opened anew (the
operating system still holds its pages); "random" asks in an order unlike that of storing.
"""

import argparse
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from skembed.cache import EmbeddingCache


def measure(task: Callable[[], None], n_rows: int, *, repeats: int = 3) -> float:
    """Return the median rows per second."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return n_rows / statistics.median(times)


def make_texts(n_rows: int) -> list[str]:
    """Return distinct texts of ordinary length (about 80 characters)."""
    return [
        f"Sentence {i}: a few plain words that stand for a real text, here." for i in range(n_rows)
    ]


def run_cache(name: str, cache: EmbeddingCache, args: argparse.Namespace) -> None:
    """Print the rates of one cache."""
    rng = np.random.default_rng(0)
    texts = make_texts(args.rows)
    block = rng.standard_normal((args.batch, args.dim), dtype=np.float32)
    out = np.empty((args.batch, args.dim), dtype=np.float32)
    shuffled = [texts[i] for i in rng.permutation(args.rows)]
    absent = [f"absent {text}" for text in texts]

    def batches(source: list[str]) -> list[list[str]]:
        return [source[start : start + args.batch] for start in range(0, args.rows, args.batch)]

    def store() -> None:
        for batch in batches(texts):
            cache.store("benchmark", batch, block[: len(batch)])

    def find(source: list[str], *, expected: bool = True) -> Callable[[], None]:
        def task() -> None:
            for batch in batches(source):
                mask = cache.lookup("benchmark", batch, out[: len(batch)])
                assert mask.all() if expected else not mask.any()

        return task

    def find_one() -> None:
        for text in shuffled[:1000]:
            cache.lookup("benchmark", [text], out[:1])

    def show(label: str, rate: float, unit: str = "rows/s") -> None:
        print(f"{name:8} {label:16} {rate:>10,.0f} {unit}")

    show("insert", measure(store, args.rows, repeats=1))
    cache.close()
    show("lookup, cold", measure(find(texts), args.rows, repeats=1))
    show("lookup", measure(find(texts), args.rows))
    show("lookup, random", measure(find(shuffled), args.rows))
    show("lookup, absent", measure(find(absent, expected=False), args.rows))
    show("lookup, 1 text", 1e6 / measure(find_one, 1000), "us/call")
    show("size", cache.size_bytes / args.rows, "bytes/row")


def main() -> None:
    """Measure both kinds and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--max-bytes", type=int, default=None, help="limit of the file")
    args = parser.parse_args()
    print(
        f"{args.rows:,} rows of {args.dim}, batches of {args.batch}; {os.cpu_count()} CPUs, "
        f"{platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )
    memory = EmbeddingCache(max_bytes=args.rows * (args.dim * 4 + 1024))
    run_cache("memory", memory, args)
    memory.clear()
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(Path(folder) / "cache.sqlite", max_bytes=args.max_bytes)
        run_cache("file", cache, args)
        cache.close()


if __name__ == "__main__":
    main()
