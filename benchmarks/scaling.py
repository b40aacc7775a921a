"""One process against joblib, two device replicas, Dask and Ray Data on the same texts.

Run: python benchmarks/scaling.py [--texts 2000] [--workers 2] [--repeats 3]
What it costs to go through an engine on one machine, where torch uses all cores already: a ratio
below 1 is the price, and what several machines or GPUs then multiply. Workers are started and have
loaded their model before the clock runs; only Ray Data starts its actors anew in each run, as its
users' jobs do. The rows must be those of one process. Engines that are not installed are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import joblib
import numpy as np
from _common import compare, load_texts, make_parser, start
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.parallel import EmbeddingMapper

TOLERANCE = 1e-5  # stated for float32
Task = Callable[[], np.ndarray]


def make(**parameters: Any) -> NVEmbedVectorizer:
    """Return the bundled model in float32, without a cache."""
    return NVEmbedVectorizer(dtype="float32", device="cpu", cache=None).set_params(**parameters)


def through_joblib(texts: list[str], backend: str, workers: int) -> Task:
    """Return a task for joblib's workers of a backend."""
    emb = make(n_jobs=workers)

    def run() -> np.ndarray:
        with joblib.parallel_config(backend):
            return emb.transform(texts)

    return run


@contextmanager
def dask_cluster(workers: int) -> Iterator[None]:
    """Run a cluster of this machine's processes, one thread each."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    with cluster, Client(cluster):
        yield


@contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Run Ray on this machine, one core a worker."""
    import ray

    ray.init(
        num_cpus=workers,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def through_ray(texts: list[str], workers: int) -> Task:
    """Return a task for actors of Ray Data."""
    import ray

    data = ray.data.from_items([{"text": text} for text in texts])
    data = data.repartition(4 * workers).materialize()

    def run() -> np.ndarray:
        rows = data.map_batches(
            EmbeddingMapper,
            fn_constructor_kwargs={"vectorizer": make()},
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=None,
        ).take_all()
        return np.stack([row["embedding"] for row in rows])

    return run


def make_tasks(texts: list[str], workers: int, stack: ExitStack) -> Iterator[tuple[str, Task]]:
    """Yield each engine that is installed, started."""
    devices = make(device=["cpu"] * workers)
    yield f"device=['cpu'] * {workers}", lambda: devices.transform(texts)
    yield f"joblib, n_jobs={workers}", through_joblib(texts, "loky", workers)
    if find_spec("distributed") is not None:
        stack.enter_context(dask_cluster(workers))
        yield f"Dask, {workers} workers", through_joblib(texts, "dask", -1)
    if find_spec("ray") is not None:
        stack.enter_context(ray_session(workers))
        yield f"Ray Data, {workers} actors, start included", through_ray(texts, workers)


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=2_000)
    parser.add_argument("--workers", type=int, default=2, help="processes, actors or replicas")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    emb = make()
    expected = emb.transform(texts)
    figures, values = [], {}
    worst = 0.0
    with ExitStack() as stack:
        for name, task in make_tasks(texts, args.workers, stack):
            print(name, flush=True)
            worst = max(worst, float(np.abs(task() - expected).max()))  # warms the workers, too
            measured = compare(
                (name, "one process"), task, lambda: emb.transform(texts), repeats=args.repeats
            )
            figures.append(Figure(f"one process / {name}, time", measured.ratio))
            values[name] = measured.to_dict(len(texts))
    figures.append(Figure("largest difference of a component", worst, TOLERANCE, at_least=False))
    title = "Several processes, replicas and engines on one machine"
    return finish("scaling", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
