"""Scores before and after a fit on graded pairs, on pairs, and on rows with negatives.

Run: python benchmarks/finetune.py [--full] [--only stsb trecqa trecqa-negatives scifact]
STS-B: pairs with scores, Spearman correlation. TREC-QA: question and right sentence, alone or with
listed wrong sentences; mean average precision. SciFact: claim and abstract; nDCG@10. Each is fitted
on its train part and scored on its test part by the protocols of quality.py; then the same fitted
model is scored on a set it was not fitted for, where a fit may well cost something. By default the
first two run, with --full all.

Settings were chosen with `--held-out`, which never reads a test part: STS-B and TREC-QA are scored
on their dev parts, SciFact on a fifth of its training claims, left out of the fit; no result is
written.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import make_parser, read_rows, start
from _finetuning import Results, describe, parse_options
from _results import Figure
from quality import SCORERS

from skembed import ContrastiveTrainer, NVEmbedVectorizer

Rows = list[dict[str, Any]]
Examples = tuple[list[tuple[str, ...]], list[float] | None]
MIN_GAIN_STSB = 3.0  # points
MIN_GAIN = 0.01  # "up", at the precision of the table
N_NEGATIVES = 7
HELD_OUT_EVERY = 5
SHORT = ("stsb", "trecqa")  # five minutes


def read_stsb(train: Path, args: argparse.Namespace) -> Examples:
    """Pairs and their scores."""
    rows = read_rows(train, "sts/stsb", "train")
    return [(r["sentence1"], r["sentence2"]) for r in rows], [float(r["score"]) for r in rows]


def read_trecqa(train: Path, args: argparse.Namespace) -> Examples:
    """Each question with each of its right sentences."""
    rows = read_rows(train, "reranking/trecqa", "train")
    return [(r["query"], positive) for r in rows for positive in r["positive"]], None


def read_trecqa_negatives(train: Path, args: argparse.Namespace) -> Examples:
    """The same with wrong sentences of the question, drawn anew for each right one.

    Questions with fewer wrong sentences than the rows have places show some of them again; the
    loss counts equal texts once.
    """
    rng = np.random.default_rng(0)
    examples = []
    for row in read_rows(train, "reranking/trecqa", "train"):
        wrong = row["negative"]
        for positive in row["positive"]:
            drawn = np.resize(rng.permutation(len(wrong)), N_NEGATIVES)
            examples.append((row["query"], positive, *(wrong[i] for i in drawn)))
    return examples, None


def read_scifact(train: Path, args: argparse.Namespace) -> Examples:
    """Claims of the train part with each abstract that supports or refutes them."""
    name = "retrieval/scifact"
    documents = {
        str(row["id"]): f"{row.get('title') or ''} {row.get('text') or ''}".strip()
        for row in read_rows(train, name, "corpus")
    }
    claims = {str(row["id"]): row["text"] for row in read_rows(train, name, "queries_train")}
    judged = [r for r in read_rows(train, name, "qrels_train") if float(r["score"]) > 0]
    return [(claims[str(r["query_id"])], documents[str(r["doc_id"])]) for r in judged], None


@dataclass(frozen=True)
class Part:
    """A set to fit on, how it is scored, and where else the fitted model is scored."""

    task: str
    dataset: str
    metric: str
    read: Callable[[Path, argparse.Namespace], Examples]
    bar: float  # points that the fit must add
    elsewhere: tuple[str, str]  # task and set, for information
    trainer: dict[str, Any]  # what differs from the defaults


PARTS = {
    "stsb": Part(
        "sts",
        "stsb",
        "Spearman",
        read_stsb,
        MIN_GAIN_STSB,
        ("reranking", "trecqa"),
        {"epochs": 3},
    ),
    "trecqa": Part("reranking", "trecqa", "MAP", read_trecqa, MIN_GAIN, ("sts", "stsb"), {}),
    "trecqa-negatives": Part(
        "reranking",
        "trecqa",
        "MAP",
        read_trecqa_negatives,
        MIN_GAIN,
        ("sts", "stsb"),
        {"epochs": 4},
    ),
    "scifact": Part(
        "retrieval", "scifact", "nDCG@10", read_scifact, MIN_GAIN, ("retrieval", "cranfield"), {}
    ),
}


# Held-out parts in the place of test parts


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as the data folder has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def hold_out(data: Path, folder: Path) -> Path:
    """Write a data folder whose test parts are dev parts, or a fifth of the training claims."""
    for name in ("sts/stsb", "reranking/trecqa"):
        for part, source in (("train", "train"), ("test", "dev")):
            write_rows(folder / "eval" / name / f"{part}.jsonl.gz", read_rows(data, name, source))
    name = "retrieval/scifact"
    claims = read_rows(data, name, "queries_train")
    held = {str(row["id"]) for row in claims[::HELD_OUT_EVERY]}
    parts = {"corpus": read_rows(data, name, "corpus")}
    for kind, rows, key in (
        ("queries", claims, "id"),
        ("qrels", read_rows(data, name, "qrels_train"), "query_id"),
    ):
        parts[kind] = [row for row in rows if str(row[key]) in held]
        parts[f"{kind}_train"] = [row for row in rows if str(row[key]) not in held]
    for part, rows in parts.items():
        write_rows(folder / "eval" / name / f"{part}.jsonl.gz", rows)
    return folder


# One part


def score(data: Path, task: str, dataset: str, vectorizer: NVEmbedVectorizer) -> float:
    """Score in points."""
    return round(100 * SCORERS[task](data, f"{task}/{dataset}", vectorizer.transform), 3)


def fit(vectorizer: NVEmbedVectorizer, examples: Examples) -> float:
    """Fit and return the seconds it took; the model is loaded already."""
    pairs, scores = examples
    began = time.perf_counter()
    vectorizer.fit(pairs, scores)
    return time.perf_counter() - began


def run_part(part: Part, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Score, fit, and score again."""
    frozen = NVEmbedVectorizer(args.model, trainer=None)
    before = score(data, part.task, part.dataset, frozen)
    pairs, scores = part.read(data, args)
    kept = slice(None, args.examples)
    options = {**part.trainer, **parse_options(args.trainer)}
    trainer = ContrastiveTrainer(random_state=0, **options)
    fitted = NVEmbedVectorizer(args.model, trainer=trainer)
    fit_s = fit(fitted, (pairs[kept], None if scores is None else scores[kept]))
    after = score(data, part.task, part.dataset, fitted)
    found = {
        "metric": part.metric,
        "before": before,
        "after": after,
        "gain": round(after - before, 3),
        "fit_s": round(fit_s, 1),
        "examples": len(pairs[kept]),
        "steps": len(fitted.history_),
        "trainer": ", ".join(f"{k}={v}" for k, v in options.items()) or "defaults",
    }
    if not args.held_out:
        found["elsewhere"] = score_elsewhere(part, data, frozen, fitted)
    return found


def score_elsewhere(
    part: Part, data: Path, frozen: NVEmbedVectorizer, fitted: NVEmbedVectorizer
) -> dict[str, Any]:
    """Scores on a set that the fit was not for."""
    before, after = (score(data, *part.elsewhere, model) for model in (frozen, fitted))
    return {
        "set": "/".join(part.elsewhere),
        "before": before,
        "after": after,
        "gain": round(after - before, 3),
    }


def make_figures(parts: dict[str, Any]) -> list[Figure]:
    """Scores before and after with the bars, seconds, and the scores elsewhere."""
    figures = []
    for name, entries in parts.items():
        found = entries["fit"]
        title = f"{name}, {found['metric']} on test"
        figures += [
            Figure(f"{title}: before", found["before"]),
            Figure(f"{title}: after", found["after"]),
            Figure(f"{title}: gain, points", found["gain"], PARTS[name].bar),
            Figure(f"{name}: fit of {found['examples']:,} examples, s", found["fit_s"]),
        ]
        other = found["elsewhere"]
        figures.append(Figure(f"{name}: gain on {other['set']}, not fitted for", other["gain"]))
    return figures


def main() -> int:
    """Fit part by part, write the result, and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="skembed-mini")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=SHORT)
    parser.add_argument("--trainer", nargs="+", default=[], help="name=value of ContrastiveTrainer")
    parser.add_argument("--examples", type=int, help="fit on the first ones only: a short try")
    parser.add_argument("--held-out", action="store_true", help="score without the test parts")
    parser.add_argument("--fresh", action="store_true", help="drop earlier results")
    args = start(parser, full={"only": tuple(PARTS)})
    if args.held_out:
        with tempfile.TemporaryDirectory() as folder:
            data = hold_out(args.data, Path(folder))
            for name in args.only:
                print(f"{name}, held out: {describe(run_part(PARTS[name], data, args))}")
        return 0
    settings = {"model": args.model, "trainer": args.trainer or None, "examples": args.examples}
    title = "Scores before and after a contrastive fit"
    results = Results("finetune", title, args, settings, make_figures)
    for name in args.only:
        if not results.has(name, "fit"):
            results.add(name, "fit", run_part(PARTS[name], args.data, args))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
