"""States of training on disk: resumed, refused, damaged; runs that are killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import leave_partial
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny import weights
from training_runs import (
    LABELS,
    PAIRS,
    RUNS,
    TEXTS,
    assert_same,
    make,
    read_state,
    train_in_child,
)

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError
from skembed.inference.registry import registry
from skembed.model import checkpoint
from skembed.training import loop
from skembed.training.state import STATE_FILE

# States on disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NVEmbedVectorizer]:
    """A folder of a finished run of four steps, and what it gave."""
    folder = tmp_path_factory.mktemp("finished") / "deeper" / "run"
    return folder, make(checkpoint_dir=folder, checkpoint_steps=2).fit(TEXTS, LABELS)


@pytest.fixture
def run(finished: tuple[Path, NVEmbedVectorizer], tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_given_again_at_once(
    run: Path, finished: tuple[Path, NVEmbedVectorizer], steps: list[int]
) -> None:
    # What does not change the adapter may differ: where, how often, how loud; numpy's numbers.
    emb = make(checkpoint_dir=str(run), checkpoint_steps=3, max_steps=np.int64(4), verbose=True)
    emb.fit(TEXTS, LABELS)
    assert steps == []
    assert_same(weights(emb), weights(finished[1]))
    assert asdict(emb.history_) == asdict(finished[1].history_)
    assert sorted(path.name for path in run.iterdir()) == [STATE_FILE]


def test_checkpoints_change_nothing(finished: tuple[Path, NVEmbedVectorizer]) -> None:
    assert_same(weights(make().fit(TEXTS, LABELS)), weights(finished[1]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.1}, "trainer"),
        ({"r": 4}, "trainer"),
        ({"random_state": 1}, "trainer"),
        ({"vectorizer": {"instruction": "Find the like"}}, "set of examples or instruction"),
        ({"vectorizer": {"max_length": 100}}, "max_length"),
        ({"vectorizer": {"dtype": "bfloat16"}}, "data type"),
        ({"vectorizer": {"pooling": "mean"}, "train_pooling": True}, "pooling"),
        ({"texts": [*TEXTS[:-1], "another text"]}, "set of examples or instruction"),
        ({"labels": [*LABELS[:-1], "card"]}, "set of examples or instruction"),
    ],
    ids=str,
)
def test_the_state_of_another_run_is_refused(
    change: dict[str, Any], named: str, run: Path, steps: list[int]
) -> None:
    change = dict(change)
    texts, labels = change.pop("texts", TEXTS), change.pop("labels", LABELS)
    emb = make(**{"checkpoint_dir": run, **change})
    with pytest.raises(CheckpointError, match=f"`checkpoint_dir`.*written with another {named}"):
        emb.fit(texts, labels)
    assert steps == []
    assert not hasattr(emb, "adapter_")


def test_the_state_of_another_model_is_refused(run: Path, tmp_path: Path, steps: list[int]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    emb = make(vectorizer={"model": folder}, checkpoint_dir=run)
    with pytest.raises(CheckpointError, match="written with another model.*Name another folder"):
        emb.fit(TEXTS, LABELS)
    assert steps == []


def test_a_state_to_go_on_from_is_part_of_the_run(run: Path, steps: list[int]) -> None:
    emb = make(checkpoint_dir=run, warm_start=True)
    with pytest.raises(CheckpointError, match="another trainer"):
        emb.fit(TEXTS, LABELS)
    emb.set_params(trainer__checkpoint_dir=run.parent / "warm").fit(TEXTS, LABELS)
    with pytest.raises(CheckpointError, match="another model"):  # now there is an adapter below
        emb.fit(TEXTS, LABELS)
    assert len(steps) == 4


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "header cut": lambda data: data[:20],
    "empty": lambda data: b"",
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage: str, run: Path, steps: list[int]) -> None:
    path = run / STATE_FILE
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    n_loads = registry.n_loads
    with pytest.raises(CheckpointError, match="cannot be read.*Delete the file"):
        make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert (steps, registry.n_loads) == ([], n_loads)


@pytest.mark.parametrize("header", [None, "[]", '{"version": 99}', '{"version": 1}', "{"])
def test_a_foreign_file_is_refused(header: str | None, run: Path, steps: list[int]) -> None:
    tensors = load_file(run / STATE_FILE)
    metadata = {"format": "pt"} if header is None else {"skembed": header}
    save_file(tensors, run / STATE_FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match="cannot be read|is damaged|of version (99|1;)"):
        make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert steps == []


@pytest.mark.parametrize("place", ["file", "below a file", "read only"])
def test_a_folder_that_cannot_be_written_is_said_early(
    place: str, tmp_path: Path, fresh_dir: Path
) -> None:
    folder = tmp_path / "run"
    if place == "read only":
        folder.mkdir()
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        folder.write_text("")
        folder = folder / "deeper" if place == "below a file" else folder
    n_loads = registry.n_loads
    emb = make(vectorizer={"model": fresh_dir}, checkpoint_dir=folder)
    with pytest.raises(OSError, match="`checkpoint_dir` parameter of `ContrastiveTrainer`"):
        emb.fit(TEXTS, LABELS)
    assert registry.n_loads == n_loads


def test_a_write_that_fails_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "run", make().fit(TEXTS, LABELS)
    save, calls = checkpoint.save_file, []

    def failing(tensors: Any, path: Path, **rest: Any) -> None:
        save(tensors, path, **rest)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(path, 1_000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", failing)
        with pytest.raises(OSError, match="No space left"):
            make(checkpoint_dir=folder, checkpoint_steps=1).fit(TEXTS, LABELS)
    assert read_state(folder)["values"]["step"] == 2
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
    emb = make(checkpoint_dir=folder, checkpoint_steps=1).fit(TEXTS, LABELS)
    assert_same(weights(emb), weights(whole))


@pytest.mark.parametrize("before", [True, False])
def test_half_a_file_of_a_killed_write_is_passed_over(before: bool, run: Path) -> None:
    data = (run / STATE_FILE).read_bytes()
    leave_partial(run / STATE_FILE, data[: len(data) // 3])
    if not before:  # killed in the first write of all
        (run / STATE_FILE).unlink()
    emb = make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert len(emb.history_) == 4
    assert [path.name for path in run.iterdir()] == [STATE_FILE]


def test_a_state_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, bool]] = []
    write = loop.Checkpoints.write

    def recording(self: Any, tensors: Any, values: Any) -> None:
        written.append((values["step"], values["done"]))
        write(self, tensors, values)

    monkeypatch.setattr(loop.Checkpoints, "write", recording)
    make(checkpoint_dir=tmp_path / "a", checkpoint_steps=3, max_steps=7, epochs=9).fit(PAIRS)
    assert written == [(3, False), (6, False), (7, True)]
    written.clear()
    make(checkpoint_dir=tmp_path / "b").fit(PAIRS)
    assert written == [(2, True)], "by the clock, and this one was short"
    written.clear()
    monkeypatch.setattr("skembed.training.state.INTERVAL_S", 0.0)
    make(checkpoint_dir=tmp_path / "c").fit(PAIRS)
    assert written == [(1, False), (2, False), (2, True)]


# Killed, and resumed


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Starts processes that have torch imported and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skembed.vectorizer", "peft", "scipy.stats", "sklearn"])
    started: list[BaseProcess] = []

    def start(*args: Any) -> BaseProcess:
        process = context.Process(target=train_in_child, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def wait_for(process: BaseProcess) -> int | None:
    process.join(timeout=120)
    return process.exitcode


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(
    request: pytest.FixtureRequest, processes: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any]:
    """A run's name, and what it gives when it is left alone."""
    result = tmp_path_factory.mktemp("whole") / "result"
    assert wait_for(processes(request.param, None, result)) == 0
    return request.param, pickle.loads(result.read_bytes())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("least", [1, 6])
def test_a_killed_run_ends_in_the_same_adapter(
    least: int, uninterrupted: tuple[str, Any], processes: Any, tmp_path: Path
) -> None:
    name, (expected, history) = uninterrupted
    folder, result = tmp_path / "run", tmp_path / "result"
    process = processes(name, folder, None)
    deadline = time.monotonic() + 120
    while read_state(folder).get("values", {"step": 0})["step"] < least:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL
    state = read_state(folder)["values"]
    assert least <= state["step"] < len(history["steps"])
    assert not state["done"]
    assert wait_for(processes(name, folder, result)) == 0
    found, resumed = pickle.loads(result.read_bytes())
    assert_same(found, expected)
    assert resumed == history
    assert read_state(folder)["values"]["done"]
