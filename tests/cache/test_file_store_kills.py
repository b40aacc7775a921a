"""Eight writers of one cache, killed round after round: nothing that was stored is lost."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from cache_files import find, integrity, start_python

from skembed.cache.embedding_cache import EmbeddingCache

N_WRITERS = 8
N_ROUNDS = 20
ROWS = 20

WRITER = f"""
import sys
import numpy as np
from skembed.cache.embedding_cache import EmbeddingCache
path, seed = sys.argv[1], int(sys.argv[2])
cache = EmbeddingCache(path)
print("ready", flush=True)
for call in range(1_000_000):
    texts = [f"{{seed}} {{call}} {{i}}" for i in range({ROWS})]
    rows = np.random.default_rng([seed, call]).standard_normal(({ROWS}, 384), dtype=np.float32)
    cache.store("model", texts, rows)
    print(call, flush=True)
"""


def run_round(path: Path, number: int, rng: random.Random) -> list[tuple[int, int]]:
    """Start the writers, and kill each at its own moment; return (seed, calls that returned)."""
    seeds = range(number * N_WRITERS, (number + 1) * N_WRITERS)
    writers = [start_python(WRITER, path, seed) for seed in seeds]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    done = []
    for seed, writer in zip(seeds, writers, strict=True):
        time.sleep(rng.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        output, errors = writer.communicate(timeout=120)
        assert not errors, errors
        done.append((seed, len(output.split())))
    return done


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_eight_writers_are_killed_twenty_times(path: Path) -> None:
    rng, done = random.Random(0), []
    for number in range(N_ROUNDS):
        done += run_round(path, number, rng)
    cache = EmbeddingCache(path)
    n_calls = 0
    for seed, calls in done:
        for call in range(calls):
            mask, out = find(cache, [f"{seed} {call} {i}" for i in range(ROWS)], dim=384)
            rows = np.random.default_rng([seed, call]).standard_normal((ROWS, 384), dtype="f4")
            assert all(mask)
            assert np.array_equal(out, rows)
        n_calls += calls
    cache.close()
    assert integrity(path) == "ok"
    print(f"{n_calls} calls, {n_calls * ROWS} rows: all there")
    assert n_calls > N_ROUNDS * N_WRITERS
    assert [file.name for file in path.parent.iterdir()] == [path.name]
