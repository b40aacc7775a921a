"""Folders of models: saved while read, killed while saved, on full disks; unpacked from pickles."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TEXTS, embed, rewrite, shard
from leftovers import leave_partial
from paths import GOLDEN, ROOT, copy_checkpoint
from tiny import make_vectorizer
from torch import Tensor
from trained import train, trained

from skembed.exceptions import CheckpointError
from skembed.model import files
from skembed.model.checkpoint import iterate_tensors, save_checkpoint
from skembed.model.files import read_steadily, replace_together, unpack_folder
from skembed.model.sources import read_config, resolve_source

if sys.platform == "win32":
    pytest.skip("forks and signals", allow_module_level=True)


def save(origin: Path, target: Path) -> None:
    """Write a folder's model to another folder."""
    source = resolve_source(origin)
    config = read_config(source)
    save_checkpoint(
        target,
        config=config,
        tensors=iterate_tensors(source, config),
        tokenizer_folder=source.folder,
        extra={},
    )


def make_other(folder: Path) -> Path:
    """Return a model of the same shapes with other weights."""

    def negate(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: -value for name, value in tensors.items() if value.ndim == 2})

    copy_checkpoint(folder)
    rewrite(folder, negate)
    return folder


# A full disk


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = sys.argv[1:3]
import tiny, trained
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, kind = Path(sys.argv[3]), sys.argv[4]
emb = tiny.make_vectorizer() if kind == "model" else trained.train()
emb.transform(["a"])
before = {path.name: path.read_bytes() for path in folder.iterdir()}
for limit in (0, 100, 3_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        emb.save_pretrained(folder, merge=kind == "merged")
    except OSError as error:
        assert str(folder) in str(error), error
    else:
        raise AssertionError(limit)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, limit
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
emb.save_pretrained(folder, merge=kind == "merged")
assert {path.name: path.read_bytes() for path in folder.iterdir()} != before
print("done")
"""


@pytest.mark.parametrize("kind", ["model", "adapter", "merged"])
def test_a_full_disk_is_named_and_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    """The system refuses to write more than a few bytes into a file, libraries in Rust too."""
    folder = tmp_path / "saved"
    if kind == "model":
        save(make_other(tmp_path / "other"), folder)
    else:
        train(trainer={"random_state": 5}).save_pretrained(folder)
    command = [sys.executable, "-c", FULL_DISK, str(ROOT), str(ROOT / "tests"), str(folder), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_folder_in_place_of_a_file_is_seen_before_anything_goes(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(GOLDEN, folder)
    for name in ("model.safetensors", "tokenizer.json", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        names = {path.name for path in folder.iterdir()}
        with pytest.raises(IsADirectoryError, match=name):
            save(GOLDEN, folder)
        assert {path.name for path in folder.iterdir()} == names
        (folder / name).rmdir()


# Kills


def test_what_killed_saves_left_goes_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(GOLDEN, folder)
    names = {path.name for path in folder.iterdir()}
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        leave_partial(folder / name, b"x" * 1_000)
    (folder / files.LOCK_FILE).write_bytes(b"process 1 on another")
    assert np.array_equal(embed(folder), embed(GOLDEN))
    save(GOLDEN, folder)
    assert {path.name for path in folder.iterdir()} == names


def test_a_save_keeps_foreign_files_and_removes_only_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(GOLDEN, folder)
    shard(folder)
    foreign = {"model_notes.safetensors", "model-best.safetensors", "README.md", ".partial-mine"}
    for name in foreign:
        (folder / name).write_bytes(b"mine")
    save(GOLDEN, folder)
    left = {path.name for path in folder.iterdir()}
    assert foreign <= left
    assert not [name for name in left if "-of-" in name or "index" in name]
    assert np.array_equal(embed(folder), embed(GOLDEN))


# Two processes


def keep_saving(origins: list[Path], folder: Path, n: int) -> None:
    for k in range(n):
        save(origins[k % len(origins)], folder)
        time.sleep(0.05)  # a reader needs a moment between two saves


def keep_saving_adapters(folder: Path, n: int) -> None:
    embs = [trained(), train(trainer={"random_state": 5})]
    for k in range(n):
        embs[k % 2].save_pretrained(folder)
        time.sleep(0.05)


@pytest.fixture
def started() -> Iterator[list[BaseProcess]]:
    """List processes to end with the test."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def run_beside(process: BaseProcess, read: Any, started: list[BaseProcess]) -> list[Any]:
    """Return what `read` gave, again and again, while a process was at work; None for refusals."""
    process.start()
    started.append(process)
    found = []
    while process.is_alive():
        try:
            found.append(read())
        except CheckpointError as error:
            assert "chang" in str(error) or "replaced" in str(error), error
            found.append(None)
    process.join()
    assert process.exitcode == 0
    return [*found, read()]


def assert_one_of(both: list[Any], found: list[Any]) -> None:
    """Check that each result is one of two far apart; other numbers of threads round otherwise."""
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert all(min(np.abs(x - one).max() for one in both) < 1e-6 for x in found)


def test_a_model_that_is_saved_again_and_again_is_read_whole(
    tmp_path: Path, started: list[BaseProcess]
) -> None:
    """Never a mixture of two models, and never called damaged."""
    other, folder = make_other(tmp_path / "other"), tmp_path / "saved"
    save(GOLDEN, folder)
    both = [embed(GOLDEN), embed(other)]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=keep_saving, args=([GOLDEN, other], folder, 60))
    found = [x for x in run_beside(process, lambda: embed(folder), started) if x is not None]
    assert found
    assert_one_of(both, found)


def test_an_adapter_that_is_saved_again_and_again_is_read_whole(
    tmp_path: Path, started: list[BaseProcess]
) -> None:
    folder = tmp_path / "saved"
    embs = [trained(), train(trainer={"random_state": 5})]
    embs[0].save_pretrained(folder)
    both = [emb.transform(TEXTS) for emb in embs]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=keep_saving_adapters, args=(folder, 60))
    read = lambda: make_vectorizer(folder, trainer=None).transform(TEXTS)  # noqa: E731
    found = [x for x in run_beside(process, read, started) if x is not None]
    assert found
    assert_one_of(both, found)


def test_several_writers_leave_one_whole_model(tmp_path: Path, started: list[BaseProcess]) -> None:
    other, folder = make_other(tmp_path / "other"), tmp_path / "saved"
    context = multiprocessing.get_context("fork")
    for origin in (GOLDEN, other, GOLDEN, other):
        started.append(context.Process(target=keep_saving, args=([origin], folder, 10)))
        started[-1].start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    found = embed(folder)
    assert any(np.array_equal(found, embed(one)) for one in (GOLDEN, other))


def test_a_folder_that_never_rests_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PAUSES_S", (0.0, 0.0))
    path = tmp_path / "config.json"
    calls = []

    def read() -> int:
        calls.append(1)
        path.write_text("x" * len(calls))
        return 1

    with pytest.raises(CheckpointError, match="change while they are read.*try again"):
        read_steadily([tmp_path], read)
    assert len(calls) == 3
    assert read_steadily([tmp_path], lambda: 7) == 7
    with pytest.raises(KeyError):
        read_steadily([tmp_path], {}.popitem)


def test_an_error_inside_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with (
        pytest.raises(CheckpointError, match="why"),
        replace_together(tmp_path, "config.json", is_stale=lambda name: True) as staged,
    ):
        (staged / "new").write_text("new")
        raise CheckpointError("why")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old"}


# Models that came in a pickle


UNPACK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from skembed.model.files import _homes, unpack_folder
mode = sys.argv[2]
folder = unpack_folder({"config.json": b"{}", "parts/a.safetensors": b"x" * 1_000})
home = _homes[os.getpid()]
print(home, flush=True)
if mode == "fork":
    child = os.fork()
    if child == 0:
        sys.exit(0)  # with all that is registered for the end
    os.waitpid(child, 0)
    assert (folder / "config.json").exists()
    assert unpack_folder({"config.json": b"{}", "parts/a.safetensors": b"x" * 1_000}) == folder
    try:
        os.wait()
    except ChildProcessError:
        pass  # nothing of ours is in the way of a server that waits for its children
    else:
        raise AssertionError
elif mode == "fork that unpacks":
    child = os.fork()
    if child == 0:
        assert unpack_folder({"config.json": b"another"}).parent != home
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert home.is_dir()
    time.sleep(1)  # the watcher of the child
elif mode == "wait":
    time.sleep(600)
"""


def start(mode: str, temporary: Path) -> subprocess.Popen[str]:
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", UNPACK, str(ROOT), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def test_a_fork_leaves_its_parents_model(tmp_path: Path) -> None:
    """As in a server that forks its workers after the model was unpickled."""
    folder = copy_checkpoint(tmp_path / "model")
    pickled = pickle.dumps(make_vectorizer(folder, store_weights=True))
    folder.rename(tmp_path / "away")
    emb = pickle.loads(pickled)
    expected = emb.transform(TEXTS)
    process = multiprocessing.get_context("fork").Process(target=sys.exit)
    process.start()
    process.join()
    found = emb.set_params(dtype="bfloat16").transform(TEXTS)  # which reads the files again
    np.testing.assert_allclose(found, expected, atol=0.05)


def wait_until_gone(folder: Path) -> bool:
    """Wait for the watcher, which has a moment's work."""
    for _ in range(600):
        if not folder.exists():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("mode", ["end", "fork", "fork that unpacks"])
def test_unpacked_models_go_at_the_end_and_not_with_a_fork(mode: str, tmp_path: Path) -> None:
    process = start(mode, tmp_path / "tmp")
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    assert out.startswith(str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_unpacked_models_go_with_a_killed_process(number: int, tmp_path: Path) -> None:
    process = start("wait", tmp_path / "tmp")
    assert process.stdout is not None
    home = Path(process.stdout.readline().strip())
    assert home.is_dir()
    assert home.stat().st_mode & 0o777 == 0o700
    process.send_signal(number)
    process.communicate(timeout=300)
    assert wait_until_gone(home)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_a_watcher_the_next_process_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "_homes", {})
    monkeypatch.setattr(files, "_unpacked", {})
    left = leave_partial(tmp_path / files._UNPACKED_NAME, b"the model of a killed process")
    alive = tmp_path / left.parent.name.replace(left.parent.name.split("-")[-2], str(os.getpid()))
    alive.mkdir()
    folder = unpack_folder({"a": b"1", "parts/b": b"2"})
    assert (folder / "parts" / "b").read_bytes() == b"2"
    assert not left.parent.exists()
    assert alive.exists()
    assert folder == unpack_folder({"parts/b": b"2", "a": b"1"})


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", ""])
def test_a_pickled_file_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="must be the name of a file"):
        unpack_folder({name: b"x"})
