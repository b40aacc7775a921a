"""What the scripts of this folder share: the recipe's modules, result files and tables.

Import it first: it puts the benchmarks' folder and that of the recipe on the path.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples" / "train_mini")]

from _common import seconds  # noqa: E402
from _results import RESULTS, describe_run  # noqa: E402
from recipe import write_whole  # noqa: E402

SCORES = ("stsb", "sickr", "banking77", "hwu64", "emotion", "trecqa", "scifact")


def make_record(name: str, script: str, **fields: Any) -> dict[str, Any]:
    """Return a result: where and when it was measured by which script, and the fields."""
    return {**describe_run(name, f"python benchmarks/ablation/{script}.py"), **fields}


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """Write a result as JSON, under its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{record['benchmark']}.json", json.dumps(record, indent=1) + "\n")


def write_page(record: Mapping[str, Any], parts: Sequence[str], folder: Path) -> None:
    """Write the page of a result, part by part."""
    write_whole(folder / f"{record['benchmark']}.md", "\n\n".join(parts) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "| --- |") -> str:
    """Return a table in Markdown; `rule` draws the line below one column."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], f"{rule[:-1] * len(header)}|", *lines[1:]])


def describe_machine(record: Mapping[str, Any]) -> str:
    """Return where a result was measured, as a sentence."""
    return f"Machine: {record['machine']['processor']}, {record['machine']['cores']} cores."


__all__ = ["RESULTS", "ROOT", "SCORES", "seconds", "write_whole"]
