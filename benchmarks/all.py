"""Run every benchmark, one after the other, and write the index of the results.

Run: python3 benchmarks/all.py [--gpu] [--only NAME ...] [--skip NAME ...]   (or: dev.py bench all)
Each runs in a process of its own with its default sizes, under five minutes on two cores. One that
lacks its data, a package or a device is skipped, with the reason; one that fails, misses a bar or
takes longer than `--timeout-s` does not keep the others from running. The scripts of a GPU run with
`--gpu` only.

Results go to the folder of `--out`, with an index in its README.md. Where that is the project's own
folder, README and documentation are filled anew (fill_results.py). Results that grow over several
calls go on from there; `--fresh` starts them anew. The exit status is 1 where one failed or missed
a bar. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

import fill_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NOT_BENCHMARKS = {"all", "fill_results"}
EXIT_SKIPPED = 77  # as in _common.py
PASSED, MISSED, SKIPPED, FAILED = "passed", "missed a bar", "skipped", "FAILED"


@dataclass(frozen=True)
class Run:
    """What became of one benchmark."""

    name: str
    verdict: str  # passed, missed a bar, skipped or failed
    seconds: float
    reason: str = ""  # the last line printed, where it was skipped or failed

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.name:24} {self.verdict} after {self.seconds:.0f} s{reason}"


def find_benchmarks(*, gpu: bool) -> list[str]:
    """Return the names of the scripts, those for a GPU last and only if asked for."""
    names = sorted(path.stem for path in HERE.glob("[!_]*.py") if path.stem not in NOT_BENCHMARKS)
    on_gpu = [name for name in names if name.startswith("gpu")]
    return [name for name in names if name not in on_gpu] + (on_gpu if gpu else [])


def run_benchmark(name: str, options: Sequence[str], out: Path, timeout_s: float) -> Run:
    """Run one script, show what it prints, and judge how it ended."""
    print(f"\n== {name}", flush=True)
    began, wall = time.monotonic(), time.time()
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    last, timed_out = "", False
    with start_script(command, out) as child:
        timer = Timer(timeout_s, stop, [child])
        timer.start()
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                last = line.strip() or last
            status = child.wait()
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
            stop(child)
    seconds = time.monotonic() - began
    written = any(path.stat().st_mtime >= wall for path in out.glob("*.json"))
    if timed_out and status < 0:
        return Run(name, FAILED, seconds, f"stopped after {timeout_s:.0f} s (--timeout-s)")
    if status == EXIT_SKIPPED:
        return Run(name, SKIPPED, seconds, last)
    if status == 0 or (status == 1 and written):
        return Run(name, MISSED if status else PASSED, seconds)
    return Run(name, FAILED, seconds, last or f"exit status {status}")


def start_script(command: Sequence[str], out: Path) -> subprocess.Popen[str]:
    """Start a script whose results go to a folder; both its streams come through one pipe."""
    return subprocess.Popen(
        command,
        env={**os.environ, "SKEMBED_BENCH_OUT": str(out), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # to end its own children with it
    )


def stop(child: subprocess.Popen[str]) -> None:
    """End a script and the processes that it started."""
    if not hasattr(os, "killpg"):  # Windows
        child.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def takes_fresh(name: str) -> bool:
    """Whether the results of a script grow over several calls."""
    return '"--fresh"' in (HERE / f"{name}.py").read_text(encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = find_benchmarks(gpu=True)
    parser.add_argument("--gpu", action="store_true", help="those of a CUDA device too")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help="these alone")
    parser.add_argument("--skip", nargs="+", choices=known, metavar="NAME", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--data", type=Path, help="folder with eval/ (or SKEMBED_DATA)")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--fresh", action="store_true", help="drop results of earlier calls")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of each benchmark")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, write the index, print the verdicts; return the exit status."""
    options = parse_arguments(arguments)
    names = options.only or find_benchmarks(gpu=options.gpu)
    if options.data:
        os.environ["SKEMBED_DATA"] = str(options.data.resolve())
    if options.threads:  # before torch is imported; benchmarks whose children do so see it too
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    runs = []
    try:
        for name in names:
            if name not in options.skip:
                extra = ["--fresh"] if options.fresh and takes_fresh(name) else []
                runs.append(run_benchmark(name, extra, options.out, options.timeout_s))
    finally:  # also after Ctrl-C: what is measured is kept
        write_pages(options.out)
        print("", *runs, sep="\n", flush=True)
    return int(any(run.verdict in (MISSED, FAILED) for run in runs))


def write_pages(out: Path) -> None:
    """Write the index of the results, and the pages that show them."""
    if out == RESULTS:
        fill_results.main([])
    else:
        fill_results.write_index(out)


if __name__ == "__main__":
    sys.exit(main())
