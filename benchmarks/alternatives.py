"""skembed-mini beside what one would otherwise use: the table of the README.

Run: python benchmarks/alternatives.py [--peers FOLDER] [--texts 2000] [--repeats 3]
Quality by the protocols of quality.py, as the mean over the sets of each kind of task; texts per
second on the same mixed real texts, each side in a process of its own with its defaults, in turn,
the median of the rounds. FOLDER, made by _make_peers.py, holds the environment of
sentence-transformers with OpenVINO; without it, those two rows are left out. `--keep` takes the
scores of all-MiniLM-L6-v2 in its default form, which no change here moves and which take longest,
from the results of quality.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import load_texts, make_parser, start
from _results import Figure, finish
from quality import SCORERS, find_sets
from sklearn.feature_extraction.text import TfidfVectorizer

NAME = "alternatives"
WORKER = Path(__file__).with_name("_embed_worker.py")
PEER = "sentence-transformers, all-MiniLM-L6-v2"
SIDES = {
    "skembed-mini": "skembed",
    PEER: "default",
    "the same with OpenVINO, int8": "openvino-int8",
}
TFIDF = "TF-IDF"
TASKS = {
    "classification": "classify, 8 a class",
    "sts": "similarity",
    "retrieval": "search",
    "reranking": "rerank",
    "clustering": "group",
}
SPEED = "texts/s"


class Side:
    """A process that embeds, and the vectors of what it has seen."""

    def __init__(self, kind: str, python: Path, folder: Path, scratch: Path) -> None:
        command = [str(python), str(WORKER), kind, str(folder)]
        self._log = (scratch / f"{kind}.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._path = scratch / f"{kind}.json"
        self._vectors: dict[str, np.ndarray] = {}
        self.versions: dict[str, str] = json.loads(self._read())

    def _read(self) -> str:
        line = self._process.stdout.readline().strip() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            sys.exit(f"{self._path.stem} ended: {self._log.read()[-1000:]}")
        return line

    def run(self, texts: list[str]) -> float:
        """Embed texts into the file beside the process's own; return the seconds."""
        self._path.write_text(json.dumps(texts), encoding="utf-8")
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        print(self._path, file=self._process.stdin, flush=True)
        return float(self._read())

    def embed(self, texts: list[str]) -> np.ndarray:
        """Vectors of texts, (n, dim); one that was embedded before is not embedded again."""
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if new:
            self.run(new)
            self._vectors.update(zip(new, np.load(self._path.with_suffix(".npy")), strict=True))
        return np.stack([self._vectors[text] for text in texts])


def embed_words(texts: list[str]) -> Any:
    """TF-IDF of the texts of one set, sparse."""
    return TfidfVectorizer(sublinear_tf=True).fit_transform(texts)


def start_sides(args: argparse.Namespace, scratch: Path) -> dict[str, Side]:
    """Start the processes that this machine has environments for."""
    sides = {}
    for name, kind in SIDES.items():
        python = Path(sys.executable) if kind == "skembed" else args.peers / "venv" / "bin/python"
        if python.exists():
            sides[name] = Side(kind, python, args.peers, scratch)
    return sides


def read_kept(args: argparse.Namespace) -> dict[str, float]:
    """Return the peer's scores in the results of quality.py, by set."""
    path = args.out / "quality.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"values": {}}
    scores = record["values"].get("scores", {})
    return {name: row["minilm"] for name, row in scores.items() if "minilm" in row}


def score(args: argparse.Namespace, sides: Mapping[str, Side]) -> dict[str, dict[str, float]]:
    """Score every set with every side, in percent."""
    scores: dict[str, dict[str, float]] = {}
    embedders = {**{name: side.embed for name, side in sides.items()}, TFIDF: embed_words}
    kept = read_kept(args) if args.keep else {}
    for name in find_sets(args.data, args.only):
        for side, embed in embedders.items():
            if side == PEER and name in kept:
                value = kept[name]
            else:
                value = 100 * SCORERS[name.split("/")[0]](args.data, name, embed)
            scores.setdefault(side, {})[name] = round(value, 2)
            print(f"{name}, {side}: {value:.2f}", flush=True)
    return scores


def time_sides(sides: Mapping[str, Side], texts: list[str], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each round, the sides in turn."""
    rounds: dict[str, list[float]] = {name: [] for name in [*sides, TFIDF]}
    for _ in range(repeats):
        for name, side in sides.items():
            rounds[name].append(side.run(texts))
        begin = time.perf_counter()
        embed_words(texts)
        rounds[TFIDF].append(time.perf_counter() - begin)
    return rounds


def summarize(
    scores: Mapping[str, Mapping[str, float]], rates: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return the row of each side: the mean of each kind of task, and its texts per second."""
    rows = {}
    for side, found in scores.items():
        row = {}
        for task, title in TASKS.items():
            values = [value for name, value in found.items() if name.startswith(f"{task}/")]
            if values:
                row[title] = float(np.mean(values))
        rows[side] = {**row, SPEED: rates[side]}
    return rows


def render(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table: a row a side, the best of each column bold."""
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    best = {name: max(row[name] for row in rows.values()) for name in columns}
    for side, row in rows.items():
        cells = []
        for name in columns:
            cell = f"{row[name]:,.0f}" if name == SPEED else f"{row[name]:.1f}"
            cells.append(f"**{cell}**" if row[name] == best[name] else cell)
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Score, time, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="made by _make_peers.py")
    parser.add_argument("--texts", type=int, default=2_000, help="texts of a timed round")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--only", nargs="*", help="names of sets, such as stsb")
    parser.add_argument("--keep", action="store_true", help="the peer's scores of quality.py")
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    with tempfile.TemporaryDirectory() as scratch:
        sides = start_sides(args, Path(scratch))
        rounds = time_sides(sides, texts, args.repeats)
        scores = score(args, sides)
        versions = {name: side.versions for name, side in sides.items()}
    rates = {side: len(texts) / statistics.median(seconds) for side, seconds in rounds.items()}
    rows = summarize(scores, rates)
    table = render(rows)
    figures = [
        Figure(f"{side}: {column}", value)
        for side, row in rows.items()
        for column, value in row.items()
    ]
    values = {"scores": scores, "seconds": rounds, "n_texts": len(texts), "versions": versions}
    status = finish(
        NAME, "skembed-mini beside what one would otherwise use", figures, values, args=args
    )
    page = args.out / f"{NAME}.md"
    title, command, rest = page.read_text(encoding="utf-8").split("\n\n", 2)
    page.write_text("\n\n".join([title, command, table, rest]), encoding="utf-8")
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
