"""Rows per second into and out of EmbeddingCache, bytes a row, float16's rounding, a warm search.

Run: python benchmarks/cache_throughput.py [--rows 1000000] [--dim 384] [--texts 2000]
A million rows go into a file in float32 and one in float16, and come back in the order of storing
and in random order; a fifth as many go through memory. Then the real vectors of `--texts` passages
are rounded to float16, and GridSearchCV (5 folds, 3 values of C) over a Pipeline of vectorizer and
LogisticRegression, all texts cached, runs in turn with the same search on the finished matrix.
Files lie in the system's temporary folder (2.6 GB). Without data of its own: passages of the
documentation of numpy, scipy and scikit-learn.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import Comparison, compare, cosines, make_parser, seconds, start, watch_model
from _results import Figure, finish
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from skembed import NVEmbedVectorizer
from skembed.cache import EmbeddingCache
from skembed.datasets import load_docstrings

MIN_LOOKUP = 100_000  # rows/s from a file, in any order
MAX_HALF_SIZE = 0.55  # of the float32 file
MAX_ANGLE = 1e-6  # 1 - cosine, of float16 to float32
MEMORY_SHARE = 5  # one row in five goes through memory
GRID = {"clf__C": [0.1, 1.0, 10.0]}
N_FITS = 5 * len(GRID["clf__C"]) + 1  # with the refit


# Rows per second


class Workload:
    """The texts, their order, and what is stored under them."""

    def __init__(self, n_rows: int, dim: int, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.n_rows, self.batch = n_rows, batch
        self.texts = [
            f"Sentence {i}: a few plain words that stand for a real text, here."
            for i in range(n_rows)
        ]
        self.shuffled = [self.texts[i] for i in rng.permutation(n_rows)]
        self.absent = [f"absent {text}" for text in self.texts]
        vectors = rng.standard_normal((batch, dim), dtype=np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.out = np.empty_like(self.vectors)

    def store(self, cache: EmbeddingCache) -> None:
        """Store every text."""
        for texts in self.batches(self.texts):
            cache.store("benchmark", texts, self.vectors[: len(texts)])

    def find(self, cache: EmbeddingCache, texts: list[str], *, expected: bool = True) -> None:
        """Look texts up, and end the benchmark where one is wrongly found or missed."""
        for part in self.batches(texts):
            mask = cache.lookup("benchmark", part, self.out[: len(part)])
            if not (mask.all() if expected else not mask.any()):
                sys.exit("cache_throughput.py: a row was not found, or one that was never stored.")

    def batches(self, texts: list[str]) -> Iterator[list[str]]:
        """Yield the texts in calls."""
        for begin in range(0, len(texts), self.batch):
            yield texts[begin : begin + self.batch]

    def rate(self, task: Callable[[], object], repeats: int = 1) -> dict[str, float]:
        """Return rows/s of a task over all rows: the median, and the spread of several runs."""
        rates = [self.n_rows / seconds(task) for _ in range(repeats)]
        found: dict[str, float] = {"rows_per_s": round(statistics.median(rates))}
        if repeats > 1:
            found |= {"low": round(min(rates)), "high": round(max(rates))}
        return found


def measure_cache(name: str, cache: EmbeddingCache, work: Workload, repeats: int) -> dict[str, Any]:
    """Return rates, bytes a row and microseconds of a single text for one cache."""
    found: dict[str, Any] = {"rows": work.n_rows, "insert": work.rate(lambda: work.store(cache))}
    if cache.path is not None:
        cache.close()  # the log goes into the file; the system still holds its pages
        found["lookup, just opened"] = work.rate(lambda: work.find(cache, work.texts))
    found["lookup, in order"] = work.rate(lambda: work.find(cache, work.texts), repeats)
    found["lookup, random"] = work.rate(lambda: work.find(cache, work.shuffled), repeats)
    found["lookup, absent"] = work.rate(
        lambda: work.find(cache, work.absent, expected=False), repeats
    )
    singles = work.shuffled[:2000]
    one = seconds(lambda: [cache.lookup("benchmark", [text], work.out[:1]) for text in singles])
    found["lookup, 1 text, us"] = round(one / len(singles) * 1e6, 1)
    found["bytes a row"] = round(cache.size_bytes / len(cache), 1)
    found["clear, s"] = round(seconds(cache.clear), 2)
    for label in ("insert", "lookup, in order", "lookup, random"):
        print(f"  {name}: {label} {found[label]['rows_per_s']:,} rows/s", flush=True)
    return found


def measure_rates(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of a file of either type, and of memory."""
    found = {}
    work = Workload(args.rows, args.dim, args.batch)
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            cache = EmbeddingCache(Path(folder) / "cache.sqlite", dtype=dtype)
            name = f"file, {dtype}"
            found[name] = measure_cache(name, cache, work, args.repeats)
            cache.close()
    work = Workload(max(1, args.rows // MEMORY_SHARE), args.dim, args.batch)
    for dtype in ("float32", "float16"):
        cache = EmbeddingCache(max_bytes=work.n_rows * (args.dim * 4 + 1024), dtype=dtype)
        found[f"memory, {dtype}"] = measure_cache(f"memory, {dtype}", cache, work, args.repeats)
    return found


# float16


def measure_rounding(vectors: np.ndarray) -> dict[str, float]:
    """Return what real vectors (n, dim) lose in a float16 cache."""
    cache = EmbeddingCache(dtype="float16")
    texts = [str(i) for i in range(len(vectors))]
    cache.store("rounding", texts, vectors)
    rounded = np.zeros_like(vectors)
    if not cache.lookup("rounding", texts, rounded).all():
        sys.exit("cache_throughput.py: a vector does not fit float16.")
    error = np.abs(rounded.astype(np.float64) - vectors)
    largest = float(np.abs(vectors).max())
    normal = np.abs(vectors) >= 2.0**-14  # smaller ones have an absolute error of 2**-25
    return {
        "largest component": largest,
        "largest error": float(error.max()),
        "largest error, of the largest component": float(error.max()) / largest,
        "largest relative error, components of 2**-14 and more": float(
            (error[normal] / np.abs(vectors[normal])).max()
        ),
        "smallest cosine": float(cosines(rounded, vectors).min()),
    }


# A warm grid search


def measure_search(args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Return what a warm search costs beyond the same search on a matrix, and the raw vectors."""
    docs = load_docstrings()
    texts, labels = list(docs.data[: args.texts]), docs.target[: args.texts]
    found: dict[str, Any] = {"texts": len(texts), "fits": N_FITS}
    matrix = NVEmbedVectorizer().fit_transform(texts)
    raw = NVEmbedVectorizer(normalize=False).transform(texts)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("memory", "memory"), ("file", str(Path(folder) / "cache.sqlite"))):
            vectorizer = NVEmbedVectorizer(cache=kind)
            vectorizer.fit_transform(texts)  # warm
            clf = LogisticRegression(max_iter=100)
            pipe = Pipeline([("emb", vectorizer), ("clf", clf)])
            ours = GridSearchCV(pipe, GRID, cv=5)
            bare = GridSearchCV(Pipeline([("clf", clf)]), GRID, cv=5)
            names = (f"pipeline, cache in {name}", "on the matrix")
            # One thread of BLAS: for a classifier this small, more only wait for each other.
            with watch_model() as activity, threadpool_limits(1, user_api="blas"):
                times = compare(
                    names,
                    partial(ours.fit, texts, labels),
                    partial(bare.fit, matrix, labels),
                    repeats=args.repeats,
                )
            if activity.n_texts or not np.isclose(ours.best_score_, bare.best_score_):
                sys.exit("cache_throughput.py: the search was not warm, or its score differs.")
            found[name] = describe_search(times, vectorizer, texts)
            vectorizer.cache = None
    return found, raw


def describe_search(
    times: Comparison, vectorizer: NVEmbedVectorizer, texts: list[str]
) -> dict[str, Any]:
    """Return the difference of a warm search and the bare one, a fit and as a share."""
    more = [ours - bare for ours, bare in times.times]
    shares = [(ours - bare) / ours for ours, bare in times.times]
    warm = [seconds(lambda: vectorizer.transform(texts)) for _ in range(5)]
    return {
        "search_s": round(times.median_s(0), 3),
        "search_on_the_matrix_s": round(times.median_s(1), 3),
        "more_ms_a_fit": round(statistics.median(more) / N_FITS * 1e3, 2),
        "more_ms_a_fit_low": round(min(more) / N_FITS * 1e3, 2),
        "more_ms_a_fit_high": round(max(more) / N_FITS * 1e3, 2),
        "share": round(statistics.median(shares), 4),
        "transform_us_a_text": round(statistics.median(warm) / len(texts) * 1e6, 2),
    }


def make_figures(
    rates: dict[str, Any], rounding: dict[str, float], search: dict[str, Any]
) -> list[Figure]:
    """Return the main figures with their bars."""
    figures = []
    for dtype in ("float32", "float16"):
        found = rates[f"file, {dtype}"]
        figures.append(Figure(f"file, {dtype}: insert, rows/s", found["insert"]["rows_per_s"]))
        figures += [
            Figure(
                f"file, {dtype}: warm lookup, {order}, rows/s",
                found[f"lookup, {order}"]["rows_per_s"],
                MIN_LOOKUP,
            )
            for order in ("in order", "random")
        ]
        figures.append(Figure(f"file, {dtype}: bytes a row", found["bytes a row"]))
    sizes = [rates[f"file, {dtype}"]["bytes a row"] for dtype in ("float16", "float32")]
    share = sizes[0] / sizes[1]
    figures.append(Figure("file, float16: share of the bytes", share, MAX_HALF_SIZE, False))
    figures.append(
        Figure(
            "float16: 1 - smallest cosine to float32",
            1 - rounding["smallest cosine"],
            MAX_ANGLE,
            at_least=False,
        )
    )
    figures.append(
        Figure(
            "float16: largest relative error",
            rounding["largest relative error, components of 2**-14 and more"],
            2.0**-11,
            at_least=False,
        )
    )
    figures.append(Figure("float16: largest error of a component", rounding["largest error"]))
    for name in ("memory", "file"):
        part = search[name]
        figures.append(
            Figure(f"warm search, cache in {name}: ms a fit beyond it", part["more_ms_a_fit"])
        )
        figures.append(Figure(f"warm search, cache in {name}: share of the time", part["share"]))
    return figures


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__ or "", texts=2_000, data=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each file")
    parser.add_argument("--dim", type=int, default=384, help="width of the vectors")
    parser.add_argument("--batch", type=int, default=4096, help="rows of one call")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each lookup and search")
    args = start(parser)
    search, vectors = measure_search(args)
    rounding = measure_rounding(vectors)
    rates = measure_rates(args)
    values = {
        "dim": args.dim,
        "batch": args.batch,
        "SQLite": sqlite3.sqlite_version,
        **rates,
        "float16": rounding,
        "warm search": search,
    }
    title = "Embedding cache: rows per second, bytes a row, and a warm grid search"
    figures = make_figures(rates, rounding, search)
    return finish("cache_throughput", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
