"""What the benchmarks of contrastive fitting share: draws, results that grow over several calls.

Nothing here is a benchmark: the name begins with an underscore, so `dev.py bench` does not list it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT, clear_peak, read_memory
from _results import Figure, command_line, describe_machine, finish

Pairs = list[tuple[str, str]]
# Captions and questions up to paragraphs.
PAIR_SETS = (
    "snli_counterfactual",
    "squad_question_sentence",
    "wikipedia_title_lead",
    "medquad",
    "dynamics365_business_docs",
)
N_TINY = 4  # pairs of the fit after which memory is counted: all libraries are there
TRAINING_PACKAGES = ("peft", "setfit", "accelerate", "datasets")


class Results:
    """Results of one benchmark that may come from several calls, written after each part.

    `settings` make results comparable: a file with others, or of another machine, is refused.
    """

    def __init__(
        self,
        name: str,
        title: str,
        args: argparse.Namespace,
        settings: dict[str, Any],
        make_figures: Callable[[dict[str, Any]], list[Figure]],
    ) -> None:
        self.name, self.title, self.args = name, title, args
        self.make_figures = make_figures
        self.parts: dict[str, Any] = {}
        self.calls: dict[str, str] = {}
        settings = {key: value for key, value in settings.items() if value is not None}
        self.settings = json.loads(json.dumps(settings))
        path = args.out / f"{name}.json"
        if path.is_file() and not args.fresh:
            self._continue(path, json.loads(path.read_text(encoding="utf-8")))
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.calls[now] = f"{command_line()}; sources {digest_sources()}"

    def _continue(self, path: Path, record: dict[str, Any]) -> None:
        """Take over what an earlier call measured, if it is comparable."""
        values, machine = record["values"], describe_machine()
        same = ("processor", "cores", "torch_threads")
        if values["settings"] != self.settings or any(
            record["machine"].get(key) != machine.get(key) for key in same
        ):
            sys.exit(
                f"{path.name} holds results of other settings, or of another machine or number of "
                "threads. Pass --fresh to drop them, or another folder as --out."
            )
        self.parts, self.calls = values["results"], values["calls"]

    def has(self, part: str, entry: str) -> bool:
        """Whether an earlier call measured this."""
        return entry in self.parts.get(part, {})

    def add(self, part: str, entry: str, found: dict[str, Any]) -> None:
        """Keep a result and write the files: a later failure costs nothing that is measured."""
        self.parts.setdefault(part, {})[entry] = found
        print(f"{part}, {entry}: {describe(found)}", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            self.finish()

    def finish(self) -> int:
        """Write the files, print the figures, and return the exit status."""
        versions = {package: read_version(package) for package in TRAINING_PACKAGES}
        values = {
            "settings": self.settings,
            "results": self.parts,
            "calls": self.calls,
            "versions of what trains": {k: v for k, v in versions.items() if v},
        }
        figures = self.make_figures(self.parts)
        return finish(self.name, self.title, figures, values, args=self.args)


def describe(found: dict[str, Any]) -> str:
    """Return one result as a line."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` words; a value is JSON where it can be, else a string."""
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def read_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest_sources() -> str:
    """Return a short hash of the package's Python files: which state of the code was measured."""
    found = hashlib.blake2b(digest_size=4)
    for path in sorted((ROOT / "skembed").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def draw_examples(labels: np.ndarray, shots: int, draw: int) -> np.ndarray:
    """Return the rows of one draw: `shots` examples of each class."""
    rng = np.random.default_rng(draw)
    rows = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    return np.concatenate(rows)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN of fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


# Training pairs


def load_pairs(data: Path, keep: Callable[[list[str]], list[str]], n_pairs: int) -> Pairs:
    """Return pairs of distinct texts of mixed length, the same for the same `n_pairs`.

    `keep` says which texts may be used. Equal parts of five sets; generated ones without them.
    """
    folder = data / "train" / "permissive" / "pairs"
    share = n_pairs // len(PAIR_SETS) + 1
    sets = [read_pairs(folder / f"{name}.jsonl.gz", 2 * share) for name in PAIR_SETS]
    if not all(sets):
        print("no training pairs in the data folder; generated ones instead")
        sets = [generate_pairs(2 * n_pairs)] * len(PAIR_SETS)
    seen: set[str] = set()
    pairs: Pairs = []
    for found in sets:
        kept = set(keep(list({text for pair in found for text in pair})))
        fresh = [pair for pair in found if kept.issuperset(pair) and pair[0] != pair[1]]
        pairs += take_distinct(fresh, share, seen)
    if len(pairs) < n_pairs:
        sys.exit(
            f"{Path(sys.argv[0]).name}: {len(pairs)} pairs; {n_pairs} are needed. Lower --pairs."
        )
    order = np.random.default_rng(0).permutation(len(pairs))[:n_pairs]
    return [pairs[i] for i in order]


def take_distinct(pairs: Pairs, n_pairs: int, seen: set[str]) -> Pairs:
    """First pairs whose texts did not occur yet; `seen` grows."""
    taken: Pairs = []
    for pair in pairs:
        if len(taken) < n_pairs and seen.isdisjoint(pair):
            taken.append(pair)
            seen.update(pair)
    return taken


def read_pairs(path: Path, n_pairs: int) -> Pairs:
    """Some pairs of a set, the same each time; empty without the file."""
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(0).permutation(len(rows))[:n_pairs]
    pairs = [(rows[i]["query"].strip(), rows[i]["positive"].strip()) for i in order]
    return [pair for pair in pairs if all(pair)]


def generate_pairs(n_pairs: int) -> Pairs:
    """Pairs of random words: short questions, answers of 4 to 250 words."""
    rng = np.random.default_rng(0)
    words = (
        "account river stone market winter letter engine garden number window paper road".split()
    )
    lengths = np.exp(rng.uniform(np.log(4), np.log(250), n_pairs)).astype(int)
    return [
        (f"{i} {' '.join(rng.choice(words, 8))}", f"{i}: {' '.join(rng.choice(words, n))}")
        for i, n in enumerate(lengths)
    ]


# One fit


def measure_fit(fit: Callable[[Pairs], Any], pairs: Pairs, batch: int) -> dict[str, float]:
    """Seconds and peak memory of a fit, after a small and a full-size warm-up."""
    shortest = sorted(pairs[:batch], key=lambda pair: sum(map(len, pair)))
    fit(shortest[:N_TINY])
    loaded = read_memory("VmRSS")
    first_loss = float(fit(pairs[:batch]))
    clear_peak()
    began = time.perf_counter()
    fit(pairs)
    seconds = time.perf_counter() - began
    peak = read_memory("VmHWM")
    return {
        "seconds": round(seconds, 3),
        "examples_per_s": round(len(pairs) / seconds, 2),
        "loaded_MiB": round(loaded / 2**20, 1),
        "peak_MiB": round(peak / 2**20, 1),
        "used_MiB": round((peak - loaded) / 2**20, 1),
        "first_loss": round(first_loss, 6),
    }


def count_padding(lengths: np.ndarray, batch: int, size: int) -> float:
    """Positions a token, padding included, where `size` texts of a column of pairs run together."""
    positions = 0
    for column in lengths.reshape(-1, 2).T:
        for begin in range(0, len(column), batch):
            step = column[begin : begin + batch]
            chunks = [step[k : k + size] for k in range(0, len(step), size)]
            positions += sum(int(chunk.max()) * len(chunk) for chunk in chunks)
    return round(positions / int(lengths.sum()), 2)
