"""Work spread over joblib's workers and this process's threads; free memory given back."""

from __future__ import annotations

import ctypes
import os
import platform
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from joblib import Parallel, cpu_count, delayed

__all__ = [
    "SharedIterator",
    "name_process",
    "release_free_memory",
    "run_ahead",
    "run_tasks",
    "share_cores",
    "spread",
    "use_one_thread_in_forks",
]

_T = TypeVar("_T")
_R = TypeVar("_R")
_END: Any = object()


def run_tasks(task: Callable[..., _R], calls: Iterable[tuple[Any, ...]], n: int) -> Iterator[_R]:
    """Yield results of a picklable `task`, in order, from `n` workers of joblib's backend."""
    use_one_thread_in_forks()
    try:  # results as they come, where the backend can
        parallel = Parallel(n_jobs=n, return_as="generator")
    except ValueError:  # "multiprocessing", and what is built on it
        parallel = Parallel(n_jobs=n)
    before = torch.get_num_threads()
    try:
        yield from parallel(delayed(task)(*call) for call in calls)
    finally:  # under the "threading" backend, what a task sets is the default of the next threads
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def use_one_thread_in_forks() -> None:
    """Give every later fork of this process, whoever forks it, a single thread of torch.

    A fork has none of the threads that its OpenMP library believes it has: with more than one,
    its first parallel loop would wait for them for ever. Called before a model is loaded or workers
    start, not at import. Python cannot unregister it, so only the first call does anything.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def name_process() -> tuple[str, int]:
    """Return what tells this process from those of its workers, on this machine or another."""
    return platform.node(), os.getpid()


@contextmanager
def share_cores(n_workers: int, home: tuple[str, int]) -> Iterator[None]:
    """Let torch use a worker's part of the cores inside: cores // workers, at least one.

    Never more than torch is set to already: joblib, Dask, Ray and torchrun each set
    OMP_NUM_THREADS. On a machine other than the caller's (`home` is its `name_process`) the number
    of workers says nothing, and that setting stands.
    """
    before = torch.get_num_threads()
    if home[0] == platform.node():
        torch.set_num_threads(min(before, max(1, cpu_count() // n_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_ahead(task: Callable[[_T], _R], items: Iterable[_T]) -> Generator[_R, None, None]:
    """Yield results of `task`, in order; compute the next one while the caller uses the last.

    Starts one thread, and that only for a second item. At most two results exist at a time. The
    caller's thread draws the items. An error of `task` arrives in place of its result; a caller
    that stops waits for the task at work.
    """
    source = iter(items)
    item: Any = next(source, _END)
    if item is _END:
        return
    upcoming: Any = next(source, _END)
    if upcoming is _END:
        yield task(item)
        return
    result = task(item)
    with ThreadPoolExecutor(max_workers=1) as pool:
        while upcoming is not _END:
            future = pool.submit(task, upcoming)
            yield result
            del result  # not held beside the next but one
            upcoming = next(source, _END)
            result = future.result()
        yield result


class SharedIterator(Iterator[_T]):
    """An iterator that several threads draw from; each item goes to one of them."""

    def __init__(self, items: Iterable[_T]) -> None:
        self._items = iter(items)
        self._guard = threading.Lock()
        self._stopped = False

    def __next__(self) -> _T:
        """Return the next item, unless `stop` was called."""
        with self._guard:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        """Give no thread another item."""
        with self._guard:
            self._stopped = True


def spread(
    items: Iterable[_T],
    workers: Sequence[Callable[[Iterator[_T]], Iterator[_R]]],
    *,
    n_threads: int | None = None,
) -> Iterator[_R]:
    """Yield results of workers that share the items, one thread each, as they come, in no order.

    A worker draws its next item when it is done with the last, so a faster one does more. At an
    error, or when the caller stops, no worker draws another item, and all have ended when the error
    arrives. One thread at a time draws. `n_threads`: those of torch in each worker.
    """
    shared = SharedIterator(items)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    before = torch.get_num_threads()

    def run(worker: Callable[[Iterator[_T]], Iterator[_R]]) -> None:
        try:
            if n_threads is not None:
                torch.set_num_threads(n_threads)
            for result in worker(shared):
                results.put((result, None))
        except BaseException as error:  # handed to the caller's thread
            shared.stop()
            results.put((_END, error))
        else:
            results.put((_END, None))

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    failure: BaseException | None = None
    n_running = len(threads)
    for thread in threads:
        thread.start()
    try:
        while n_running:
            result, error = results.get()
            failure = failure or error
            if result is _END:
                n_running -= 1
            else:
                yield result
    finally:
        shared.stop()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)  # what a thread sets is the default of the next ones
    if failure is not None:
        raise failure


@lru_cache(maxsize=1)
def _find_trim() -> Any:
    """Return the C library's `malloc_trim`, or None where it has none (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def release_free_memory() -> bool:
    """Give free pages of the heap back to the system; return whether there were any."""
    trim = _find_trim()
    return trim is not None and bool(trim(0))
