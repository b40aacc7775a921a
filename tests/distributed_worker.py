"""Runs that one process and several do alike, for `test_distributed.py`; a script under torchrun.

Each run is a function of a folder that is given to this process; it returns plain arrays. As a
script, all of them run inside `join_processes`, and each process writes what it found.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paths import GOLDEN
from tiny import weights

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.distributed import active_processes, join_processes
from skembed.training import loop as training
from skembed.training.state import STATE_FILE

WORDS = ["card stolen lost blocked pin chip", "account open new savings branch form"]
Found = dict[str, Any]


def make_rows(n: int = 24) -> list[tuple[str, str, str]]:
    """Rows of an anchor, a positive and a negative, of mixed length."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(n):
        own, other = (WORDS[(k + d) % 2].split() for d in (0, 1))
        texts = [" ".join(rng.choice(words, 1 + (k + j) % 9)) for j, words in enumerate((own, own))]
        rows.append((f"{texts[0]} {k}", f"{texts[1]} please {k}", " ".join(rng.choice(other, 5))))
    return rows


def make(**parameters: Any) -> NVEmbedVectorizer:
    """A vectorizer whose batches are cut into several small chunks."""
    trainer = ContrastiveTrainer(
        **{
            "r": 4,
            "learning_rate": 5e-3,
            "max_steps": 3,
            "batch_size": 12,
            "batch_tokens": 96,
            "random_state": 0,
            **parameters,
        }
    )
    return NVEmbedVectorizer(GOLDEN, device="cpu", dtype="float32", cache=None, trainer=trainer)


@contextmanager
def watch_learner() -> Iterator[Found]:
    """Gradients of each step, and how many texts this process has run with a gradient."""
    seen: Found = {"gradients": [], "losses": [], "n_embedded": 0}
    accumulate, embed = training._Learner.accumulate, training._Learner.embed

    def watched(self: Any, batch: Any, step: int) -> Any:
        loss = accumulate(self, batch, step)
        grads = {n: p.grad.numpy().copy() for n, p in self.parameters.items()}
        seen["gradients"].append(grads)
        seen["losses"].append(float(loss))
        return loss

    def counted(self: Any, rows: np.ndarray) -> Any:
        seen["n_embedded"] += len(rows) * torch.is_grad_enabled()
        return embed(self, rows)

    training._Learner.accumulate, training._Learner.embed = watched, counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        training._Learner.accumulate, training._Learner.embed = accumulate, embed  # type: ignore[method-assign]


def run_exact(folder: Path) -> Found:
    """Dropout on, chunks given: the very same masks in one process and in several."""
    with watch_learner() as seen:
        emb = make(lora_dropout=0.1).fit(make_rows())
    return {**seen, "weights": weights(emb), "loss": list(emb.history_["loss"])}


def run_auto(folder: Path) -> Found:
    """Chunks chosen: as many for each process."""
    with watch_learner() as seen:
        emb = make(lora_dropout=0.0, batch_tokens="auto", max_steps=1).fit(make_rows())
    return {**seen, "weights": weights(emb)}


def run_tiny_batch(folder: Path) -> Found:
    """Two pairs in one chunk: nothing is left for the second process."""
    pairs = [("a", "b"), ("c", "d")]
    with watch_learner() as seen:
        emb = make(batch_size=2, max_steps=1, lora_dropout=0.0, batch_tokens=400).fit(pairs)
    return {**seen, "weights": weights(emb)}


def run_graded(folder: Path) -> Found:
    """CoSENT compares all pairs of a batch, of whichever process."""
    pairs = [row[:2] for row in make_rows()]
    with watch_learner() as seen:
        emb = make(max_steps=1).fit(pairs, np.linspace(0.0, 1.0, len(pairs)))
    return {**seen, "weights": weights(emb)}


def run_full(folder: Path) -> Found:
    """Mining, validation and early stopping, without a seed."""
    emb = make(
        mine_negatives="perc_pos",
        n_negatives=2,
        validation_fraction=0.25,
        early_stopping=True,
        random_state=None,
        epochs=2,
    )
    emb.fit([row[:2] for row in make_rows()])
    return {"weights": weights(emb), "scores": [v["score"] for v in emb.history_.validation]}


def run_checkpoint(folder: Path) -> Found:
    """A finished run is found again, by those too that have no file."""
    trainer = {"checkpoint_dir": folder / "run", "random_state": None}
    first = make(**trainer).fit(make_rows())
    with watch_learner() as seen:
        second = make(**trainer).fit(make_rows())
    files = sorted(path.name for path in folder.rglob("*") if path.is_file())
    return {
        "first": weights(first),
        "second": weights(second),
        "n_steps_again": len(seen["losses"]),
        "files": files,
    }


def run_foreign_checkpoint(folder: Path) -> Found:
    """The first process's folder holds another run's state; all processes say so."""
    state = folder / "run" / STATE_FILE
    if active_processes().is_first:
        state.parent.mkdir(parents=True)
        state.write_bytes(b"no state")
    return {"error": error_of(lambda: make(checkpoint_dir=state.parent).fit(make_rows()))}


def run_unequal_texts(folder: Path) -> Found:
    """A process that was given a part only."""
    rows = make_rows()[active_processes().rank :]
    return {"error": error_of(lambda: make().fit(rows))}


def run_nested(folder: Path) -> Found:
    """A group that runs already is used, and left running."""
    with join_processes() as inner:
        found = repr(inner)
    return {"inner": found, "running": torch.distributed.is_initialized()}


def error_of(task: Callable[[], object]) -> tuple[str, str]:
    """Class and text of the error that a task ends with."""
    try:
        task()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "no error"


RUNS = [
    run_exact,
    run_auto,
    run_tiny_batch,
    run_graded,
    run_full,
    run_checkpoint,
    run_unequal_texts,
    run_foreign_checkpoint,
    run_nested,
]


def main(out: Path) -> None:
    """Run everything and write what this process found."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    found: dict[str, Found] = {}
    with join_processes(timeout_s=300) as processes:
        for run in RUNS:
            folder = out / f"{run.__name__}-{processes.rank}"
            folder.mkdir()
            found[run.__name__] = run(folder)
        found["processes"] = {"rank": processes.rank, "size": processes.size}
    found["after"] = {
        "running": torch.distributed.is_initialized(),
        "size": active_processes().size,
        "pid": os.getpid(),
    }
    path = out / f"found-{processes.rank}.pickle"
    path.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
