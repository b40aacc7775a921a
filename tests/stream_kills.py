"""Run by streaming/test_stream.py: kills writers of embeddings, at random moments or at every step.

python stream_kills.py random MODEL PATH N_ROWS ROWS_PER_SHARD N_KILLS SEED
    Writes PATH with the model, each time killed by SIGKILL some shards later, then to the end;
    and beside it "undisturbed", in one go.
python stream_kills.py steps MODEL PATH N_ROWS ROWS_PER_SHARD
    Writes PATH.0, PATH.1, ...: killed before step 0, 1, ... (anything that changes the disk), then
    to the end. Vectors are made up, which makes a writer quick.

Prints a JSON list: shards that were complete at each kill, or the paths written. Each writer is a
fork of this process, which never computes itself: imports are paid once.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from skembed import NVEmbedVectorizer
from skembed.inference.encoder import Encoder
from skembed.inference.engine import EmbedReport
from skembed.streaming.targets import make_target


def make_texts(n_rows: int) -> Iterator[str]:
    """Yield distinct texts of several lengths."""
    return (f"text {i}" + " and so on" * (i % 7) for i in range(n_rows))


def write(model: str, path: str, n_rows: int, rows_per_shard: int) -> None:
    """Write embeddings, with ids where there is room for them."""
    ids = None if path.endswith(".npy") else range(n_rows)
    NVEmbedVectorizer(model, device="cpu", dtype="float32").transform_to(
        make_texts(n_rows), path, rows_per_shard=rows_per_shard, ids=ids
    )


def fork(task: Callable[[], None]) -> int:
    """Run a task in a child; its exit status is 0 unless it fails."""
    pid = os.fork()
    if pid:
        return pid
    try:
        task()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def count_shards(path: str) -> int:
    """Complete shards of which the manifest tells."""
    manifest = make_target(path, None, embedding_column="embedding", owner="kills").manifest_path
    return len(json.loads(manifest.read_text())["shards"]) if manifest.exists() else 0


def kill_at_random(task: Callable[[], None], path: str, n_kills: int, seed: int) -> list[int]:
    """Kill writers that have come some shards further, then let one finish."""
    rng = random.Random(seed)
    shards = []
    for _ in range(n_kills):
        goal = count_shards(path) + rng.randint(0, 2)
        pid = fork(task)
        while count_shards(path) < goal:
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                sys.exit("a writer ended before it was killed")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] != signal.SIGKILL:
            sys.exit("a writer ended before it was killed")
        shards.append(count_shards(path))
    finish(task)
    return shards


def finish(task: Callable[[], None]) -> None:
    """Let a writer come to its end."""
    status = os.waitpid(fork(task), 0)[1]
    if status:
        sys.exit(f"a writer failed with status {status}")


def make_up(self: Encoder, columns: Any, sides: Any, *, batch_tokens: Any, progress: Any) -> Any:
    """Return vectors of texts without a model."""
    texts, dim = columns.columns[0], self.settings.dim
    rows = [np.resize(np.frombuffer(text.encode(), np.uint8), dim) for text in texts]
    vectors = np.array(rows, dtype=np.float32).reshape(-1, dim)
    return vectors, EmbedReport(batch_tokens=1)


def die_before(step: int) -> None:
    """Make this process die, as of SIGKILL, before its change of the disk number `step`."""
    count = 0

    def watch(owner: Any, name: str) -> None:
        change = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return change(*args, **kwargs)

        setattr(owner, name, watched)

    for owner, name in ((os, "fsync"), (os, "truncate"), (Path, "replace"), (Path, "unlink")):
        watch(owner, name)


def kill_at_steps(model: str, path: str, n_rows: int, rows_per_shard: int) -> list[str]:
    """One set of embeddings for each step, killed there and finished afterwards."""
    Encoder.embed = make_up  # type: ignore[method-assign]
    paths: list[str] = []
    while True:
        place = Path(path)
        target = str(place.with_name(f"{place.stem}.{len(paths)}{place.suffix}"))
        paths.append(target)

        def die(target: str = target, step: int = len(paths) - 1) -> None:
            die_before(step)
            write(model, target, n_rows, rows_per_shard)

        status = os.waitpid(fork(die), 0)[1]
        if status == 0:  # no step of that number
            return paths
        if status != signal.SIGKILL:
            sys.exit(f"a writer failed with status {status}")
        finish(lambda target=target: write(model, target, n_rows, rows_per_shard))  # type: ignore[misc]


def main() -> None:
    mode, model, path = sys.argv[1:4]
    sizes = [int(word) for word in sys.argv[4:]]
    if mode == "steps":
        print(json.dumps(kill_at_steps(model, path, *sizes)))
        return
    n_rows, rows_per_shard, n_kills, seed = sizes
    other = str(Path(path).with_stem("undisturbed"))
    finish(lambda: write(model, other, n_rows, rows_per_shard))
    done = kill_at_random(lambda: write(model, path, n_rows, rows_per_shard), path, n_kills, seed)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
