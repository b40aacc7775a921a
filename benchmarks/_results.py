"""The machine a benchmark ran on, its figures, and the two files of its result.

Nothing here is a benchmark: the name begins with an underscore, so `dev.py bench` does not list it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
STARTED = time.monotonic()  # this module is among the first that a benchmark imports
PACKAGES = (
    "skembed",
    "torch",
    "transformers",
    "tokenizers",
    "scikit-learn",
    "numpy",
    "sentence-transformers",
)
INSTRUCTION_SETS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "bf16",
    "sve_bf16",
)


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a reader needs to judge a time: processor, cores, instruction sets, threads."""
    device = torch.device(device)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    machine: dict[str, Any] = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cores_online": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if able.get(name)],
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        machine["memory_GiB"] = round(memory / 2**30, 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_GiB"] = round(properties.total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda
    return machine


def processor_name() -> str:
    """Return the processor's name as the system gives it, with family and model on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    pairs: list[tuple[str, str]] = re.findall(
        r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE
    )
    found = dict(pairs)
    name = found.get("model name", platform.machine())
    return f"{name}, family {found.get('cpu family', '?')} model {found.get('model', '?')}"


@dataclass(frozen=True)
class Figure:
    """A measured figure, and the bar it is held against if there is one."""

    name: str
    value: float
    bar: float | None = None
    at_least: bool = True
    aim: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure meets its bar; true without one."""
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def asked(self) -> str:
        """The bar in words, such as ``"bar >= 3"``; empty without one."""
        if self.bar is None:
            return ""
        return f"{'aim' if self.aim else 'bar'} {'>=' if self.at_least else '<='} {self.bar:g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the figure to four digits, its bar, and whether it holds."""
        verdict = "" if self.bar is None else "yes" if self.holds else "no"
        value = float(f"{self.value:.4g}")
        return {"name": self.name, "value": value, "bar": self.asked, "holds": verdict}


def describe_run(name: str, command: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what every result begins with: its name, when, by which command and where."""
    return {
        "benchmark": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": describe_machine(device),
        "versions": package_versions(),
    }


def finish(
    name: str,
    title: str,
    figures: Sequence[Figure],
    values: dict[str, Any],
    *,
    args: argparse.Namespace,
    device: torch.device | str = "cpu",
) -> int:
    """Write NAME.json and NAME.md, print the figures; return 1 where a bar (no aim) is missed."""
    record: dict[str, Any] = {
        **describe_run(name, command_line(), device),
        "seconds": round(time.monotonic() - STARTED, 1),
        "figures": [figure.to_dict() for figure in figures],
        "values": values,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, default=float) + "\n"
    (args.out / f"{name}.json").write_text(text, encoding="utf-8")
    (args.out / f"{name}.md").write_text(to_markdown(title, record), encoding="utf-8")
    for figure in figures:
        verdict = f"  ({figure.asked}: {'holds' if figure.holds else 'MISSED'})"
        print(f"{figure.name}: {figure.value:,.4g}{verdict if figure.asked else ''}")
    return int(any(not figure.holds and not figure.aim for figure in figures))


def command_line() -> str:
    """Return the command that was run, without this machine's folders."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        if hidden:
            hidden = False
        elif word.split("=")[0] in ("--data", "--out", "--folder", "--peers"):
            hidden = "=" not in word
        else:
            words.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that take part."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def to_markdown(title: str, record: dict[str, Any]) -> str:
    """Return a result as a page: what ran, the figures with their bars, where, and all values."""
    machine = record["machine"]
    gpu = f", {machine['gpu']} ({machine['gpu_memory_GiB']} GiB)" if "gpu" in machine else ""
    figures = [
        f"| {row['name']} | {row['value']:,g} | {row['bar']} | {row['holds']} |"
        for row in record["figures"]
    ]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"`{record['command']}`, {record['date']}.",
            "",
            "| measured | value | bar or aim | holds |",
            "|---|---|---|---|",
            *figures,
            "",
            f"Machine: {machine['processor']}, {machine['cores']} cores in use, "
            f"{machine['torch_threads']} torch threads, "
            f"{', '.join(machine['instruction_sets'])}{gpu}; "
            f"{machine['system']}, Python {machine['python']}.",
            "",
            "Versions: " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
            "",
            "| value | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in flatten(record["values"])),
            "",
        ]
    )


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf of a nested dictionary with the path to it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}, ")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{name}", f"{value:g}" if isinstance(value, float) else str(value)
