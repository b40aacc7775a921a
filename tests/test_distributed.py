"""`fit` in two processes of torchrun (gloo, loopback) is the `fit` of one process."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed_worker as worker
import numpy as np
import pytest
import torch

from skembed.distributed import Processes, active_processes, join_processes
from skembed.training.state import STATE_FILE

SIZE = 2
Found = dict[str, Any]


def free_port() -> int:
    """A port of this machine that no one listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each of two processes found in each run; started once for all tests."""
    out = tmp_path_factory.mktemp("launch")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={SIZE}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", worker.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [*command, str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-8_000:]
    return [pickle.loads((out / f"found-{rank}.pickle").read_bytes()) for rank in range(SIZE)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the launched processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flatten(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All arrays as one vector of float64."""
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def relative_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    wanted = flatten(expected)
    return float(np.linalg.norm(flatten(found) - wanted) / np.linalg.norm(wanted))


# The gradient


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "run", [worker.run_exact, worker.run_auto, worker.run_graded, worker.run_tiny_batch]
)
def test_gradient_is_that_of_one_process(
    run: Callable[[Path], Found], launched: list[dict[str, Found]], tmp_path: Path
) -> None:
    expected = run(tmp_path)
    several = [found[run.__name__] for found in launched]
    for found in several:
        # Of the first step; later ones start from weights that differ by rounding.
        assert relative_error(found["gradients"][0], expected["gradients"][0]) < 1e-6
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    for first, second in zip(*(found["gradients"] for found in several), strict=True):
        np.testing.assert_array_equal(flatten(first), flatten(second))
    assert any(np.abs(g).max() > 0 for g in expected["gradients"][0].values())


@pytest.mark.parametrize("run", ["run_exact", "run_auto", "run_graded", "run_full"])
def test_all_processes_end_with_the_same_adapter(
    run: str, launched: list[dict[str, Found]]
) -> None:
    first, second = (found[run]["weights"] for found in launched)
    assert first.keys() == second.keys()
    np.testing.assert_array_equal(flatten(first), flatten(second))


@pytest.mark.usefixtures("one_thread")
def test_adapter_is_that_of_one_process(launched: list[dict[str, Found]], tmp_path: Path) -> None:
    expected = worker.run_exact(tmp_path)
    assert relative_error(launched[0]["run_exact"]["weights"], expected["weights"]) < 1e-4
    np.testing.assert_allclose(launched[0]["run_exact"]["loss"], expected["loss"], rtol=1e-4)


# Who does what


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("run", [worker.run_exact, worker.run_auto])
def test_processes_share_the_texts(
    run: Callable[[Path], Found], launched: list[dict[str, Found]], tmp_path: Path
) -> None:
    alone = run(tmp_path)["n_embedded"]
    counts = [found[run.__name__]["n_embedded"] for found in launched]
    assert sum(counts) == alone
    assert min(counts) > 0.3 * alone


def test_validation_scores_are_the_same_in_all(launched: list[dict[str, Found]]) -> None:
    first, second = (found["run_full"]["scores"] for found in launched)
    assert len(first) > 1
    assert first == second


def test_first_process_alone_writes_the_state(launched: list[dict[str, Found]]) -> None:
    files = [found["run_checkpoint"]["files"] for found in launched]
    assert files == [[STATE_FILE], []]


def test_all_processes_resume_from_the_first_ones_state(launched: list[dict[str, Found]]) -> None:
    for found in launched:
        run = found["run_checkpoint"]
        assert run["n_steps_again"] == 0
        np.testing.assert_array_equal(flatten(run["first"]), flatten(run["second"]))
    first, second = (found["run_checkpoint"]["first"] for found in launched)
    np.testing.assert_array_equal(flatten(first), flatten(second))


# Faults


def test_unequal_texts_are_refused_in_all_processes(launched: list[dict[str, Found]]) -> None:
    for found in launched:
        name, text = found["run_unequal_texts"]["error"]
        assert name == "ValueError"
        assert "process 1 has another set of examples or instruction than process 0" in text


def test_an_error_of_the_first_process_ends_all(launched: list[dict[str, Found]]) -> None:
    for found in launched:
        name, text = found["run_foreign_checkpoint"]["error"]
        assert name == "CheckpointError"
        assert "cannot be read" in text


# Joining


def test_torchrun_starts_and_ends_the_group(launched: list[dict[str, Found]]) -> None:
    assert [found["processes"] for found in launched] == [
        {"rank": rank, "size": SIZE} for rank in range(SIZE)
    ]
    for rank, found in enumerate(launched):
        assert found["run_nested"] == {
            "inner": f"Processes(rank={rank}, size={SIZE})",
            "running": True,
        }
        assert (found["after"]["running"], found["after"]["size"]) == (False, 1)


def test_without_a_launch_there_is_one_process() -> None:
    with join_processes() as processes:
        assert (processes.rank, processes.size, processes.is_first) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**place, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"), join_processes():
        pass
    assert active_processes().size == 1


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 40])
def test_shares_are_complete_and_even(size: int, n: int, rng: np.random.Generator) -> None:
    costs = rng.integers(1, 100, n).tolist()
    shares = Processes(0, size).share(costs)
    assert sorted(item for share in shares for item in share) == list(range(n))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert Processes(size - 1, size).share(costs) == shares


@pytest.mark.parametrize(
    ("total", "budget", "size", "expected"),
    [(1_000, 2_048, 1, 2_048), (1_000, 2_048, 2, 500), (5_000, 1_000, 2, 834), (3, 64, 8, 1)],
)
def test_chunks_are_cut_so_that_no_process_is_idle(
    total: int, budget: int, size: int, expected: int
) -> None:
    found = Processes(0, size).fair_budget(total, budget)
    assert found == expected
    assert found <= budget
