"""Work spread over threads, devices and joblib's backends: the same rows, one model a process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
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
from sklearn.base import clone

from skembed import ContrastiveTrainer, EmbeddingCache
from skembed.exceptions import CheckpointError, ModelNotFoundError, SkembedWarning
from skembed.inference import engine
from skembed.inference import registry as registry_module
from skembed.inference import workers as _workers
from skembed.inference.devices import resolve_devices
from skembed.inference.registry import registry
from skembed.inference.settings import ResolvedModel, load_in_worker
from skembed.inference.workers import (
    name_process,
    run_ahead,
    run_tasks,
    share_cores,
    spread,
)
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch

TOLERANCE = 1e-5  # stated for float32: the same text in any batch, order or subset
TWO = ["cpu", "cpu"]
# From Python 3.12 on, forking a process that has threads warns; joblib's "multiprocessing" forks.
may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The rows of one process."""
    return make_vectorizer().transform(make_texts())


def model_of(emb: Any) -> ResolvedModel:
    """What an estimator runs."""
    return emb._make_encoder().settings.model


@pytest.fixture
def n_threads() -> Iterator[int]:
    """Torch's number of threads, which must be the same afterwards."""
    before = torch.get_num_threads()
    yield before
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Thread, texts and torch's threads of each forward pass of this process."""
    seen: list[tuple[int, int, int]] = []
    forward = NVEmbedModel.forward

    def watched(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        seen.append((threading.get_ident(), batch.n_texts, torch.get_num_threads()))
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", watched)
    return seen


# ---------------------------------------------------------------- threads


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


# ---------------------------------------------------------------- several devices


def test_two_devices_give_exactly_the_rows_of_one(n_threads: int) -> None:
    texts = make_texts()
    torch.set_num_threads(1)  # as many as each of the two has
    one, two = (make_vectorizer(device=d, batch_tokens=256) for d in ("cpu", TWO))
    np.testing.assert_array_equal(two.transform(texts), one.transform(texts))
    torch.set_num_threads(n_threads)


def test_both_devices_work(
    expected: np.ndarray,
    passes: list[tuple[int, int, int]],
    n_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2, timeout=60)
    forward, waited = NVEmbedModel.forward, set()

    def waiting(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        if threading.get_ident() not in waited:  # no pass ends before the other device has one
            waited.add(threading.get_ident())
            both.wait()
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", waiting)
    emb = make_vectorizer(device=TWO)
    np.testing.assert_allclose(emb.transform(make_texts()), expected, atol=TOLERANCE)
    threads = {thread for thread, _, _ in passes}
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert sum(n for _, n, _ in passes) == len(set(make_texts())), "each distinct text once"
    assert {n for _, _, n in passes} == {max(1, n_threads // 2)}


def test_few_texts_keep_both_devices_busy(passes: list[tuple[int, int, int]]) -> None:
    texts = make_texts(16)[:16]
    found = make_vectorizer(device=TWO).transform(texts)
    assert len(passes) >= 2
    np.testing.assert_allclose(found, make_vectorizer().transform(texts), atol=TOLERANCE)


@pytest.mark.parametrize("texts", [[], ["one"], [""]])
def test_very_few_texts(texts: list[str]) -> None:
    found = make_vectorizer(device=TWO).transform(texts)
    np.testing.assert_allclose(found, make_vectorizer().transform(texts), atol=TOLERANCE)


def test_devices_share_the_cache() -> None:
    cache = EmbeddingCache()
    texts = make_texts()
    first = make_vectorizer(device=TWO).set_params(cache=cache).transform(texts)
    hits = cache.hits
    second = make_vectorizer().set_params(cache=cache).transform(texts)
    assert cache.hits - hits == len(set(texts))
    np.testing.assert_array_equal(first, second)


def test_adapter_on_each_device(n_threads: int) -> None:
    trainer = ContrastiveTrainer(max_steps=2, random_state=0)
    pairs = [("a card", "the card"), ("an account", "my account")]
    emb = make_vectorizer(device=TWO, trainer=trainer).fit(pairs)
    texts = make_texts(40)
    torch.set_num_threads(1)
    found = emb.set_params(batch_tokens=32).transform(texts)
    np.testing.assert_array_equal(found, emb.set_params(device="cpu").transform(texts))
    frozen = make_vectorizer().transform(texts)
    assert np.abs(found - frozen).max() > 1e-3
    torch.set_num_threads(n_threads)


def test_devices_survive_cloning_and_are_named() -> None:
    emb = clone(make_vectorizer(device=("cpu", "cpu"))).fit(["a"])
    assert emb.device == ("cpu", "cpu")
    assert emb.model_["device"] == "cpu, cpu"
    again = pickle.loads(pickle.dumps(emb))
    np.testing.assert_array_equal(again.transform(["a"]), emb.transform(["a"]))
    assert make_vectorizer(device=["cpu"]).fit(["a"]).model_["device"] == "cpu"


def test_out_of_memory_on_one_device_halves_the_batches(
    expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []
    forward = NVEmbedModel.forward

    def failing(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        if not failures:
            failures.append(batch.n_texts)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", failing)
    found = make_vectorizer(device=TWO).transform(make_texts())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert failures


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has three GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)


@pytest.mark.usefixtures("three_gpus")
def test_gpus_by_number() -> None:
    assert resolve_devices(["cuda:0", "cuda:2"]) == [torch.device("cuda", k) for k in (0, 2)]
    assert resolve_devices("cuda") == [torch.device("cuda", 2)], "the current one"


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ([], r"name at least one device.*got \[\]"),
        (["cuda:0", "cuda:0"], "name each GPU once"),
        (["cuda", "cuda:2"], "name each GPU once"),
        (["cpu", "cuda:0"], r"devices of one kind; got \['cpu', 'cuda:0'\]"),
        (["auto", "cuda:0"], "name each device"),
        (["cuda:0", "cuda:3"], "'cuda:3', but torch sees 3 CUDA devices"),
        (["cuda:0", "gpu"], "got 'gpu'"),
    ],
)
def test_wrong_lists_of_devices(device: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vectorizer().set_params(device=device).fit(["a"])


@pytest.mark.parametrize("device", [0, [0, 1], ["cpu", None], {"cpu"}, None])
def test_devices_of_a_wrong_type(device: Any) -> None:
    with pytest.raises(TypeError, match="`device` parameter of `NVEmbedVectorizer` must be a str"):
        make_vectorizer().set_params(device=device).fit(["a"])


def test_worker_processes_beside_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="`n_jobs`.* must be None or 1 with several devices"):
        make_vectorizer(device=TWO, n_jobs=2).transform(["a"])


def test_a_pickle_of_several_gpus_opens_on_a_cpu() -> None:
    emb = pickle.loads(pickle.dumps(make_vectorizer().set_params(device=["cuda:0", "cuda:1"])))
    if torch.cuda.device_count() > 1:
        pytest.skip("this machine has the GPUs")
    with pytest.warns(SkembedWarning, match=r"pickled with device=\['cuda:0', 'cuda:1'\]"):
        found = emb.transform(["a card"])
    np.testing.assert_allclose(found, make_vectorizer().transform(["a card"]), atol=TOLERANCE)


@pytest.mark.gpu
def test_every_gpu_gives_the_rows_of_the_first() -> None:
    """Also a single device that is not the current one."""
    names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    texts = make_texts()
    emb = make_vectorizer()
    first = emb.set_params(device=names[0], dtype="float32").transform(texts)
    for device in (names[-1], names):
        found = clone(emb).set_params(device=device).transform(texts)
        np.testing.assert_allclose(found, first, atol=TOLERANCE)


# ---------------------------------------------------------------- joblib


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


def power(base: int, exponent: int) -> int:
    return base**exponent


@may_fork
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing", "sequential"])
def test_tasks_keep_their_order(backend: str) -> None:
    calls = [(base, 2) for base in range(20)]
    with joblib.parallel_config(backend):
        assert list(run_tasks(power, iter(calls), 2)) == [base**2 for base in range(20)]


# ---------------------------------------------------------------- cores of a worker


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


# ---------------------------------------------------------------- models of a worker


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
