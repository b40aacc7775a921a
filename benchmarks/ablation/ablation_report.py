"""Tables of the ablation beside the paper's: benchmarks/results/ablation.* and docs/ablation.md.

A difference is taken within a seed, where both runs had the same start and examples. Its interval
is Student's t of the seeds' differences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, ROOT, describe_machine, make_record, table, write_page, write_record
from fill_results import fill
from scipy.stats import t as student

NAME = "ablation"
PAGE = ROOT / "docs" / "ablation.md"
CONFIDENCE = 0.95
# Type of task -> our development sets of it.
TYPES = {
    "Retrieval": ("scifact",),
    "Reranking": ("trecqa",),
    "Classification": ("banking77",),
    "STS": ("stsb", "sickr"),
}
MEAN = "Mean"
COLUMNS = (*TYPES, MEAN)
Cell = tuple[str, str, str]  # pooling, attention, schedule
TWO = "two stages"

# arXiv 2405.17428v3: mean over 56 tasks. Table 2, model of v1's data, after stage 1 and stage 2.
PAPER_V1 = {
    ("eos", "bidirectional"): (62.68, 67.85),
    ("eos", "causal"): (60.06, 66.50),
    ("mean", "bidirectional"): (64.00, 68.97),
    ("mean", "causal"): (62.32, 68.13),
    ("latent", "bidirectional"): (64.18, 69.32),
    ("latent", "causal"): (63.39, 68.47),
}
# Table 3, v2's data, after both: retrieval, reranking, classification, STS, and the mean.
PAPER_V2 = {
    ("eos", "bidirectional"): (62.13, 60.02, 90.10, 82.27, 71.63),
    ("eos", "causal"): (60.30, 59.13, 90.01, 81.65, 70.85),
    ("mean", "bidirectional"): (61.81, 60.65, 89.49, 84.35, 71.71),
    ("mean", "causal"): (61.01, 59.10, 89.85, 84.35, 71.38),
    ("latent", "bidirectional"): (62.65, 60.65, 90.37, 84.31, 72.31),
    ("latent", "causal"): (61.15, 59.36, 90.49, 84.13, 71.61),
}
PAPER_SCHEDULES = {  # Table 4
    TWO: (62.65, 60.65, 90.37, 84.31, 72.31),
    "in-batch on": (61.25, 60.64, 86.6, 83.7, 70.83),
    "in-batch off": (61.37, 60.81, 90.2, 84.5, 71.94),
}
SCHEDULE_NAMES = {
    TWO: "two stages",
    "in-batch on": "one stage, in-batch negatives on",
    "in-batch off": "one stage, in-batch negatives off",
}


def paper_scores(cell: Cell) -> tuple[float, ...]:
    """Return the paper's scores of a cell: v2's data, the finished model."""
    pooling, attention, schedule = cell
    return PAPER_V2[pooling, attention] if schedule == TWO else PAPER_SCHEDULES[schedule]


class Claim(NamedTuple):
    """What the paper says: the first cell is ahead of the second."""

    text: str
    better: Cell
    worse: Cell


BEST: Cell = ("latent", "bidirectional", TWO)
CLAIMS = (
    *(
        Claim(
            f"bidirectional over causal, {pooling} pooling",
            (pooling, "bidirectional", TWO),
            (pooling, "causal", TWO),
        )
        for pooling in ("eos", "mean", "latent")
    ),
    Claim("mean over eos pooling", ("mean", "bidirectional", TWO), ("eos", "bidirectional", TWO)),
    Claim("latent over mean pooling", BEST, ("mean", "bidirectional", TWO)),
    *(
        Claim(f"two stages over {name}", BEST, ("latent", "bidirectional", schedule))
        for schedule, name in SCHEDULE_NAMES.items()
        if schedule != TWO
    ),
)


# Results


def by_type(scores: Mapping[str, float]) -> dict[str, float]:
    """Turn scores of sets into those of types, and the mean of the types."""
    means = {name: float(np.mean([scores[key] for key in sets])) for name, sets in TYPES.items()}
    return {**means, MEAN: float(np.mean(list(means.values())))}


def write_results(
    records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], folder: Path
) -> None:
    """Write the runs, what they have in common, and where they ran."""
    record = make_record(NAME, NAME, settings=dict(settings), runs=list(records))
    record["machine"]["torch_threads"] = 1  # of each run
    write_record(record, folder)


class Scores:
    """The runs of a result file by cell."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.runs: dict[Cell, dict[int, list[dict[str, float]]]] = {}
        for run in runs:
            cell = (run["pooling"], run["attention"], run["schedule"])
            stages = [by_type(stage["scores"]) for stage in run["stages"]]
            self.runs.setdefault(cell, {})[run["seed"]] = stages

    def of(self, cell: Cell, column: str, stage: int = -1) -> np.ndarray:
        """Return the scores of a cell, one for each seed in ascending order."""
        seeds = self.runs[cell]
        return np.array([seeds[seed][stage][column] for seed in sorted(seeds)])

    def difference(self, claim: Claim, column: str) -> np.ndarray:
        """Return better less worse within each seed."""
        return self.of(claim.better, column) - self.of(claim.worse, column)


def spread(values: np.ndarray) -> str:
    """Return mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def verdict(differences: np.ndarray, paper: float) -> str:
    """Say whether the seeds show the paper's sign, the other one, or neither."""
    n = len(differences)
    if n < 2:
        return "one seed"
    error = differences.std(ddof=1) / n**0.5
    reach = student.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    if abs(differences.mean()) <= reach:
        return "not told apart"
    return "agrees" if differences.mean() * paper > 0 else "disagrees"


# Tables


def claims_table(scores: Scores) -> str:
    """Compare the paper with what came out here: differences of the means over types."""
    rows = []
    for claim in CLAIMS:
        ours = scores.difference(claim, MEAN)
        paper = paper_scores(claim.better)[-1] - paper_scores(claim.worse)[-1]
        rows.append([claim.text, spread(ours), f"{paper:+.2f}", verdict(ours, paper)])
    return table(["difference of the mean, points", "here", "paper", ""], rows)


def differences_table(scores: Scores) -> str:
    """Return the same by type of task, the paper's difference in brackets."""
    rows = []
    for claim in CLAIMS:
        row = [claim.text]
        for k, column in enumerate(TYPES):
            paper = paper_scores(claim.better)[k] - paper_scores(claim.worse)[k]
            row.append(f"{spread(scores.difference(claim, column))} ({paper:+.2f})")
        rows.append(row)
    return table(["difference, points: here (paper)", *TYPES], rows)


def pooling_table(scores: Scores, stage: int) -> str:
    """Return the six cells after a stage, and the paper's means beside them."""
    rows = []
    for (pooling, attention), means in PAPER_V1.items():
        cell = (pooling, attention, TWO)
        ours = [spread(scores.of(cell, column, stage)) for column in COLUMNS]
        theirs = [means[stage], *([PAPER_V2[pooling, attention][-1]] if stage else [])]
        rows.append([f"{pooling}, {attention}", *ours, *(f"{mean:.2f}" for mean in theirs)])
    names = ("v1", "v2") if stage else ("v1",)
    header = [f"after stage {stage + 1}", *COLUMNS, *(f"paper's mean, {name}" for name in names)]
    return table(header, rows)


def schedules_table(scores: Scores) -> str:
    """Return the table of two stages and one."""
    rows = []
    for schedule, paper in PAPER_SCHEDULES.items():
        cell = ("latent", "bidirectional", schedule)
        ours = [spread(scores.of(cell, column)) for column in COLUMNS]
        rows.append([SCHEDULE_NAMES[schedule], *ours, f"{paper[-1]:.2f}"])
    return table(["latent, bidirectional", *COLUMNS, "paper's mean"], rows)


def describe_runs(result: Mapping[str, Any]) -> str:
    """Say what the runs cost and where they ran, in a few sentences."""
    stages = [stage for run in result["runs"] for stage in run["stages"]]
    seconds = sum(stage["seconds"] + stage["scoring_s"] for stage in stages)
    tokens = np.mean([sum(s["tokens"] for s in run["stages"]) for run in result["runs"]])
    steps = np.mean([sum(s["steps"] for s in run["stages"]) for run in result["runs"]])
    layers = max(run["weights"]["layers"] for run in result["runs"]) / 1e6
    pooling = max(run["weights"]["pooling"] for run in result["runs"]) / 1e6
    return (
        f"{len(result['runs'])} runs of {steps:,.0f} steps and {tokens / 1e6:.2f} million tokens "
        f"each, {seconds / 60:.0f} minutes of one thread in all, {result['date']}. Beside the word "
        f"vectors {layers:.2f} million weights; latent attention adds {pooling:.2f} million. "
        f"{describe_machine(result)}"
    )


def render(result: Mapping[str, Any]) -> dict[str, str]:
    """Return every table by name."""
    scores = Scores(result["runs"])
    return {
        "claims": claims_table(scores),
        "differences": differences_table(scores),
        "stage-1": pooling_table(scores, 0),
        "stage-2": pooling_table(scores, 1),
        "schedules": schedules_table(scores),
        "runs": describe_runs(result),
    }


def fill_page(text: str, tables: Mapping[str, str]) -> str:
    """Write each table between its two comments; KeyError where a page asks for another."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- ablation:{name} -->\n\n{tables[name]}\n\n<!-- /ablation -->"

    marker = r"^<!-- ablation:(?P<name>[\w-]+) -->\n.*?^<!-- /ablation -->$"
    return re.sub(marker, replace, text, flags=re.DOTALL | re.MULTILINE)


def write_docs(folder: Path) -> None:
    """Write NAME.md beside the results; of the project's own also the tables of the page."""
    result = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    tables = render(result)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    parts = ["# The paper's ablation in small", f"`{result['command']}`. {tables.pop('runs')}"]
    parts += [*tables.values(), f"Settings: {settings}.", f"Versions: {versions}."]
    write_page(result, parts, folder)
    if folder.resolve() == RESULTS:
        text = fill_page(PAGE.read_text(encoding="utf-8"), render(result))
        PAGE.write_text(fill(text, PAGE, ROOT), encoding="utf-8")
