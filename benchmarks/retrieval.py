"""Time and peak memory of an exact search, beside sentence-transformers and scikit-learn.

Run: python benchmarks/retrieval.py [--full] [--documents 200000] [--queries 1000] [--top-k 100]
Random unit vectors. Each side searches in a process of its own, and the sides take turns
(`--rounds`), so that a change of the machine's speed meets all. A process makes the vectors, warms
up on a small part, and then fits and searches; "peak" is the largest resident memory from there on,
above the level before: the vectors themselves are not in it, the result is. Linux only.

Peers: semantic_search of sentence-transformers with its default chunks, by cosine (its default) and
by dot product; NearestNeighbors(algorithm="brute") of scikit-learn by cosine and by Euclidean
distance, whose order is the same for unit vectors and which has a faster code path. Smaller storage
of ours is shown with its recall. With --large, the same search among a million documents, ours
alone.

Bars: at least as fast as the fastest peer, with less memory than that peer; less than 3 GB for a
million documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import clear_peak, make_parser, read_memory, run_child, seconds, start
from _results import Figure, finish

Vectors = np.ndarray
Search = Callable[[Vectors, Vectors, int], tuple[Vectors, Vectors]]  # scores, indices

OURS = "skembed"
STORAGE: dict[str, dict[str, Any]] = {
    "skembed": {},
    "skembed int8": {"storage": "int8"},
    "skembed binary": {"storage": "binary"},
    "skembed binary + int8": {"storage": "binary", "rescore_storage": "int8"},
}
PEERS = (
    "sentence-transformers cosine",
    "sentence-transformers dot",
    "scikit-learn cosine",
    "scikit-learn euclidean",
)


def make_vectors(n: int, dim: int, seed: int) -> Vectors:
    """Return random unit vectors, made in blocks so that the peak is theirs alone."""
    rng = np.random.default_rng(seed)
    vectors = np.empty((n, dim), dtype=np.float32)
    for first in range(0, n, 8192):
        block = rng.standard_normal((min(8192, n - first), dim), dtype=np.float32)
        vectors[first : first + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def make_search(side: str) -> Search:
    """Return the search of a side: corpus, queries, k -> scores and indices."""
    if side in STORAGE:
        from skembed.estimators.retrieval import Retriever

        def search_ours(corpus: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Vectors]:
            return Retriever(None, device="cpu", **STORAGE[side]).fit(corpus).search(queries, k)

        return search_ours
    package, _, kind = side.partition(" ")
    if package == "scikit-learn":
        from sklearn.neighbors import NearestNeighbors

        def search_sklearn(corpus: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Vectors]:
            index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=kind).fit(corpus)
            distances, indices = index.kneighbors(queries)
            return (1 - distances if kind == "cosine" else 1 - distances**2 / 2), indices

        return search_sklearn
    import torch
    from sentence_transformers import util

    function = util.cos_sim if kind == "cosine" else util.dot_score

    def search_st(corpus: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Vectors]:
        hits = util.semantic_search(
            torch.from_numpy(queries), torch.from_numpy(corpus), top_k=k, score_function=function
        )
        scores = np.array([[hit["score"] for hit in row] for row in hits])
        return scores, np.array([[hit["corpus_id"] for hit in row] for row in hits])

    return search_st


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Search in this process; its times, its peak, and the indices in the file of `--keep`."""
    corpus = make_vectors(args.documents, args.dim, seed=0)
    queries = make_vectors(args.queries, args.dim, seed=1)
    search = make_search(args.side)
    # Imports, thread pools and compiled kernels belong to the process, not to this search.
    search(corpus[:2000], queries[:20], min(args.top_k, 10))
    before = read_memory("VmRSS")
    clear_peak()
    found: list[Any] = []

    def task() -> None:
        found[:] = search(corpus, queries, args.top_k)

    times = [seconds(task) for _ in range(args.repeats)]
    peak = read_memory("VmHWM") - before
    np.save(args.keep, np.stack([np.asarray(part, dtype=np.float64) for part in found]))
    return {"times_s": times, "peak_MiB": peak / 2**20}


def run_side(side: str, args: argparse.Namespace, documents: int, keep: Path) -> dict[str, Any]:
    """Measure a side in a fresh process."""
    options = {
        "--documents": documents,
        "--queries": args.queries,
        "--dim": args.dim,
        "--top-k": args.top_k,
        "--repeats": args.repeats,
        "--side": side,
        "--keep": keep,
        **({"--threads": args.threads} if args.threads else {}),
    }
    result = run_child(__file__, *(word for pair in options.items() for word in pair))
    times = ", ".join(f"{t:.2f}" for t in result["times_s"])
    print(f"  {side}: {times} s, peak {result['peak_MiB']:.0f} MiB", flush=True)
    return result


def compare_results(ours: Path, theirs: Path) -> dict[str, float]:
    """Return the share of our documents that they found too, and how far scores are apart."""
    (a, i), (b, j) = np.load(ours), np.load(theirs)
    shared = [len(set(x) & set(y)) / len(x) for x, y in zip(i, j, strict=True)]
    return {"recall": float(np.mean(shared)), "largest_difference": float(np.abs(a - b).max())}


def run_sides(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """Run all sides in turn: runs and agreement with ours by side, and the run of the large one."""
    sides = (*STORAGE, *PEERS)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="retrieval-") as temporary:
        files = {side: Path(temporary) / f"{k}.npy" for k, side in enumerate(sides)}
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(run_side(side, args, args.documents, files[side]))
        agreement = {side: compare_results(files[OURS], files[side]) for side in sides}
        large = [run_side(OURS, args, args.large, files[OURS])] if args.large else []
    return runs, agreement, large


def main() -> None:
    """Run all sides in turn, compare what they found, and write the result."""
    parser = make_parser(__doc__, data=False)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2, help="searches of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--large", type=int, default=1_000_000, help="0: without")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    args = start(parser, full={"repeats": 3, "rounds": 3})
    if args.side:
        print(json.dumps(measure(args)))
        return
    runs, agreement, large = run_sides(args)
    times_s = {side: [t for run in found for t in run["times_s"]] for side, found in runs.items()}
    times = {side: statistics.median(spent) for side, spent in times_s.items()}
    peaks = {side: max(run["peak_MiB"] for run in found) for side, found in runs.items()}
    fastest = min(PEERS, key=times.__getitem__)
    ratios = [
        statistics.median(theirs["times_s"]) / statistics.median(ours["times_s"])
        for ours, theirs in zip(runs[OURS], runs[fastest], strict=True)
    ]
    figures = [Figure(f"{side}: time, s", times[side]) for side in (OURS, *PEERS)]
    figures += [Figure(f"{side}: peak, MiB", peaks[side]) for side in (OURS, *PEERS)]
    figures += [
        Figure(f"times as fast as the fastest peer ({fastest})", statistics.median(ratios), 1.0),
        Figure("peak, share of that peer's", peaks[OURS] / peaks[fastest], 1.0, at_least=False),
    ]
    for side in list(STORAGE)[1:]:
        figures.append(Figure(f"{side}: time, s", times[side]))
        figures.append(Figure(f"{side}: recall of the exact search", agreement[side]["recall"]))
    for run in large:
        name, peak_gb = f"{args.large:,} documents", run["peak_MiB"] * 2**20 / 1e9
        figures.append(Figure(f"{name}: time, s", statistics.median(run["times_s"])))
        figures.append(Figure(f"{name}: peak, GB", peak_gb, 3.0, at_least=False))
    described = {
        side: {
            "times_s": [round(t, 4) for t in times_s[side]],
            "peaks_MiB": [round(run["peak_MiB"], 1) for run in runs[side]],
            **agreement[side],
        }
        for side in runs
    }
    values = {
        "search": {key: getattr(args, key) for key in ("documents", "queries", "dim", "top_k")},
        "times as fast, each round": [round(ratio, 3) for ratio in ratios],
        "runs": described,
    }
    sys.exit(finish("retrieval", "Exact search: time and peak memory", figures, values, args=args))


if __name__ == "__main__":
    main()
