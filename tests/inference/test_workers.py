"""Worker threads and processes, their cores and their models."""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from engines_worker import make_texts, make_vectorizer

from skembed.exceptions import CheckpointError, ModelNotFoundError
from skembed.inference import engine
from skembed.inference import registry as registry_module
from skembed.inference import workers as _workers
from skembed.inference.registry import registry
from skembed.inference.settings import ResolvedModel, load_in_worker
from skembed.inference.workers import (
    name_process,
    run_ahead,
    run_tasks,
    share_cores,
    spread,
)

TOLERANCE = 1e-5  # stated for float32: the same text in any batch, order or subset
# From Python 3.12 on, forking a process that has threads warns; joblib's "multiprocessing" forks.
may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def model_of(emb: Any) -> ResolvedModel:
    """What an estimator runs."""
    return emb._make_encoder().settings.model


# Threads


def double(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        yield 2 * item


@pytest.mark.usefixtures("n_threads")
@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_spread_does_each_item_once(n_workers: int) -> None:
    results = list(spread(range(200), [double] * n_workers))
    assert sorted(results) == list(range(0, 400, 2))


def test_a_faster_worker_does_more() -> None:
    done = {"fast": 0, "slow": 0}
    has_begun, may_end = threading.Event(), threading.Event()

    def fast(items: Iterator[int]) -> Iterator[int]:
        has_begun.wait(60)
        for item in items:
            done["fast"] += 1
            yield item
        may_end.set()

    def slow(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            has_begun.set()
            may_end.wait(60)
            done["slow"] += 1
            yield item

    assert sorted(spread(range(20), [fast, slow])) == list(range(20))
    assert done == {"fast": 19, "slow": 1}


def test_an_error_stops_all_workers_and_arrives() -> None:
    started = threading.active_count()

    def fail(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == 5:
                raise MemoryError("no room")
            yield item

    drawn: list[int] = []
    items = (drawn.append(k) or time.sleep(0.001) or k for k in range(10_000))
    with pytest.raises(MemoryError, match="no room"):
        list(spread(items, [fail, fail]))
    assert len(drawn) < 10_000
    assert threading.active_count() == started


def test_closing_early_ends_the_threads() -> None:
    started = threading.active_count()
    drawn: list[int] = []
    items = (drawn.append(k) or time.sleep(0.001) or k for k in range(10_000))
    results = spread(items, [double, double])
    next(results)
    results.close()
    assert threading.active_count() == started
    assert len(drawn) < 10_000


@pytest.mark.usefixtures("n_threads")
def test_threads_of_torch_are_set_inside_and_restored_outside() -> None:
    def report(items: Iterator[int]) -> Iterator[int]:
        for _ in items:
            yield torch.get_num_threads()

    assert set(spread(range(10), [report, report], n_threads=3)) == {3}


@pytest.mark.parametrize("n_items", [0, 1, 2, 7])
def test_running_ahead_keeps_the_order(n_items: int) -> None:
    started = threading.active_count()
    assert list(run_ahead(lambda k: 2 * k, range(n_items))) == list(range(0, 2 * n_items, 2))
    assert threading.active_count() == started


def test_the_next_item_is_worked_on_while_the_last_is_used() -> None:
    begun = [threading.Event() for _ in range(4)]

    def task(k: int) -> int:
        begun[k].set()
        return k

    for k in run_ahead(task, range(4)):
        if k < 3:
            assert begun[k + 1].wait(60), "it would wait for ever"
        assert not any(event.is_set() for event in begun[k + 2 :]), "one ahead, not more"


def test_one_item_needs_no_thread() -> None:
    assert list(run_ahead(lambda k: threading.get_ident(), [0])) == [threading.get_ident()]


def test_an_error_ahead_arrives_in_its_turn_and_closing_waits() -> None:
    started = threading.active_count()

    def task(k: int) -> int:
        if k == 1:
            raise MemoryError("no room")
        return k

    results = run_ahead(task, range(3))
    assert next(results) == 0
    with pytest.raises(MemoryError, match="no room"):
        next(results)
    results = run_ahead(task, iter([0, 2, 3]))
    next(results)
    results.close()
    assert threading.active_count() == started


# Joblib


@may_fork
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_backends_of_joblib_give_the_same_rows(
    backend: str, expected: np.ndarray, n_threads: int
) -> None:
    emb = make_vectorizer(n_jobs=2)
    with joblib.parallel_config(backend):
        found = emb.transform(make_texts())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_each_distinct_text_is_embedded_once_by_the_workers(
    expected: np.ndarray, passes: list[tuple[int, int, int]], n_threads: int
) -> None:
    with joblib.parallel_config("threading"):  # whose passes this process can count
        make_vectorizer(n_jobs=2).transform(make_texts())
    assert sum(n for _, n, _ in passes) == len(set(make_texts()))
    assert {n for _, _, n in passes} == {min(n_threads, max(1, joblib.cpu_count() // 2))}


def test_one_job_needs_no_joblib(expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("workers were asked for")

    monkeypatch.setattr(engine, "run_tasks", refuse)
    for n_jobs in (None, 1):
        found = make_vectorizer(n_jobs=n_jobs).transform(make_texts())
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.raises(AssertionError, match="workers were asked for"):
        make_vectorizer(n_jobs=2).transform(make_texts())


def test_many_workers_get_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 10)
    texts = [str(k) for k in range(95)]
    sizes = [len(rows) for rows in engine._chunks(texts, np.arange(95))]
    assert sizes == [10] * 9 + [5]
    assert [len(rows) for rows in engine._chunks(texts, np.arange(95), 4)] == [40, 40, 15]


@may_fork
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing", "sequential"])
def test_tasks_keep_their_order(backend: str) -> None:
    calls = [(base, 2) for base in range(20)]
    with joblib.parallel_config(backend):
        assert list(run_tasks(pow, iter(calls), 2)) == [base**2 for base in range(20)]


# Cores of a worker


@pytest.mark.parametrize(
    ("n_cores", "n_workers", "set_to", "expected"),
    [(16, 4, 16, 4), (16, 3, 16, 5), (2, 8, 2, 1), (16, 4, 2, 2)],
)
def test_workers_of_this_machine_share_its_cores(
    n_cores: int,
    n_workers: int,
    set_to: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    n_threads: int,
) -> None:
    monkeypatch.setattr(_workers, "cpu_count", lambda: n_cores)
    torch.set_num_threads(set_to)
    with share_cores(n_workers, name_process()):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == set_to
    with share_cores(n_workers, ("another machine", 1)):
        assert torch.get_num_threads() == set_to
    torch.set_num_threads(n_threads)


@may_fork
@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="new processes are no forks here"
)
def test_a_forked_process_uses_one_thread(n_threads: int) -> None:
    """With more it would wait for threads that the fork has not brought along."""
    torch.set_num_threads(2)
    torch.nn.functional.layer_norm(torch.ones(512, 512), (512,))  # starts the threads
    with joblib.parallel_config("multiprocessing"):
        assert set(run_tasks(normalise, [()] * 4, 2)) == {1}
    torch.set_num_threads(n_threads)


def normalise() -> int:
    torch.nn.functional.layer_norm(torch.ones(512, 512), (512,))
    return torch.get_num_threads()


# Models of a worker


def test_a_task_from_elsewhere_leaves_its_model_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_in_worker", type(registry._in_worker)())
    emb = make_vectorizer().fit(["a"])
    request = engine.EmbedRequest("", 512, 48, "test")
    arguments: Any = (["a"], request, lambda: load_in_worker(model_of(emb)), None, 2)
    engine._embed_in_worker(*arguments, name_process())
    assert not registry._in_worker, "a thread of this process leaves nothing behind"
    engine._embed_in_worker(*arguments, (platform.node(), os.getpid() + 1))
    assert [loaded.key for loaded in registry._in_worker.values()] == [model_of(emb).key]


def test_kept_models_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_in_worker", type(registry._in_worker)())
    emb = make_vectorizer()
    emb.transform(["a"])
    (loaded,) = emb._lease.models.values()
    for k in range(5):
        registry.keep(replace(loaded, key=replace(loaded.key, fingerprint=str(k))))
    kept = [key.fingerprint for key in registry._in_worker]
    assert kept == ["3", "4"]
    assert len(kept) == registry_module.WORKER_MODELS


def test_a_worker_looks_for_the_model_by_its_name() -> None:
    resolved = model_of(make_vectorizer().fit(["a"]))
    gone = replace(resolved.source, folder=Path("/no/such/folder"))
    loaded = load_in_worker(replace(resolved, source=gone))
    assert loaded.key == resolved.key
    other = replace(resolved.key, fingerprint="0" * 32)
    with pytest.raises(CheckpointError, match="has another model under the name"):
        load_in_worker(replace(resolved, source=gone, key=other))
    nowhere = replace(gone, name="/no/such/folder/either")
    with pytest.raises(ModelNotFoundError):
        load_in_worker(replace(resolved, source=nowhere))
