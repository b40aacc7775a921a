"""Time of one short text, and of `import skembed`.

Run: python benchmarks/latency.py [--calls 200] [--imports 15]
One text: `transform` of a new short text each call, model loaded, no cache. Import: fresh
processes that import scikit-learn first and then skembed; the second import is timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
from _common import make_parser, seconds, start
from _results import Figure, finish

from skembed import NVEmbedVectorizer

MAX_LATENCY_MS = 5.0
MAX_IMPORT_S = 0.3
# Prints seconds of both imports, and whether torch came along.
IMPORT_CODE = """
import json, sys, time
begin = time.perf_counter()
import sklearn
import sklearn.base, sklearn.pipeline
middle = time.perf_counter()
import skembed
end = time.perf_counter()
dir(skembed)
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([middle - begin, end - middle, heavy]))
"""
# From nothing to a first vector, for information.
FIRST_CODE = """
import time
begin = time.perf_counter()
from skembed import NVEmbedVectorizer
NVEmbedVectorizer(cache=None).transform(["a first text"])
print(time.perf_counter() - begin)
"""


def measure_calls(n_calls: int, cache: str | None) -> list[float]:
    """Return milliseconds of each call with one short text; with a cache, a known one."""
    vectorizer = NVEmbedVectorizer(cache=cache)
    same = "Where is my new card number 0?"
    for k in range(20):
        vectorizer.transform([f"Is this warm yet, number {k}?"])
    vectorizer.transform([same])
    times = []
    for k in range(n_calls):
        text = same if cache else f"Where is my new card number {k}?"
        times.append(1e3 * seconds(partial(vectorizer.transform, [text])))
    return times


def describe(times: list[float]) -> dict[str, float]:
    """Return median and quantiles."""
    return {
        "median": round(statistics.median(times), 4),
        "p10": round(float(np.percentile(times, 10)), 4),
        "p90": round(float(np.percentile(times, 90)), 4),
        "calls": len(times),
    }


def run_fresh(code: str) -> Any:
    """Return what a fresh interpreter prints, read as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"latency.py: a fresh interpreter failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, data=False)
    parser.add_argument("--calls", type=int, default=200, help="timed calls with one text")
    parser.add_argument("--imports", type=int, default=15, help="fresh processes")
    args = start(parser)
    fresh = measure_calls(args.calls, None)
    known = measure_calls(args.calls, "memory")
    run_fresh(IMPORT_CODE)  # fills the disk cache and writes bytecode
    imports = [run_fresh(IMPORT_CODE) for _ in range(args.imports)]
    heavy = sorted({name for _, _, found in imports for name in found})
    import_s = statistics.median(ours for _, ours, _ in imports)
    figures = [
        Figure("one short text, ms", statistics.median(fresh), MAX_LATENCY_MS, at_least=False),
        Figure("import beyond scikit-learn's, s", import_s, MAX_IMPORT_S, at_least=False),
        Figure("torch or transformers imported", len(heavy), 0, at_least=False),
    ]
    values = {
        "new text, ms": describe(fresh),
        "text in the memory cache, ms (for information)": describe(known),
        "import of scikit-learn, s": describe([theirs for theirs, _, _ in imports]),
        "import of skembed after it, s": describe([ours for _, ours, _ in imports]),
        "heavy modules imported": heavy or "none",
        "fresh process to first vector, s (for information)": round(
            statistics.median(run_fresh(FIRST_CODE) for _ in range(3)), 2
        ),
    }
    title = "Latency of one text, and of the import"
    return finish("latency", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
