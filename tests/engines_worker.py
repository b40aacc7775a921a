"""Really starts Dask, Ray and Spark for `test_parallel.py` and `test_workers.py`: a script.

In a process of its own: these engines start servers and threads, look up this machine's address and
warn about much that is not ours. Everything stays on the loopback address.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from paths import GOLDEN

from skembed import NVEmbedVectorizer
from skembed.parallel import EmbeddingMapper

N_WORKERS = 2
Found = dict[str, Any]


def make_texts(n: int = 320) -> list[str]:
    """Return texts of mixed length, the last fifty of them repeated."""
    rng = np.random.default_rng(0)
    words = np.array("card account bank open lost money the a of to transfer fee wrong".split())
    sizes = rng.lognormal(2.0, 0.8, n).astype(int) + 1
    texts = [f"{k} " + " ".join(rng.choice(words, size)) for k, size in enumerate(sizes)]
    return texts + texts[:50]


def make_vectorizer(**parameters: Any) -> NVEmbedVectorizer:
    """Return an estimator of the tiny checkpoint."""
    given = {"device": "cpu", "dtype": "float32", "cache": None}
    return NVEmbedVectorizer(GOLDEN, **{**given, **parameters})


def make_frame() -> pd.DataFrame:
    """Return the texts and their numbers."""
    texts = make_texts()
    return pd.DataFrame({"id": np.arange(len(texts)), "title": texts})


class CountingMapper(EmbeddingMapper):
    """Says for each row which process has embedded it, and how often that had read weights."""

    def __call__(self, batch: Any) -> Any:
        """Embed, then add two columns to a dict."""
        from skembed.inference.registry import registry

        found = super().__call__(batch)
        n = len(found["id"])
        return {**found, "pid": np.full(n, os.getpid()), "loads": np.full(n, registry.n_loads)}


def count_loads() -> tuple[int, int, int]:
    """Of this process: its number, its loads, torch's threads."""
    import torch

    from skembed.inference.registry import registry

    return os.getpid(), registry.n_loads, torch.get_num_threads()


def run_dask() -> Found:
    """Joblib's backend twice, and `map_partitions`, on two worker processes."""
    import dask.dataframe as dd
    import joblib
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=N_WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    found: Found = {}
    with cluster, Client(cluster) as client:
        with joblib.parallel_config("dask"):
            for name in ("joblib", "joblib again"):
                found[name] = make_vectorizer(n_jobs=-1).transform(make_texts())
        found["workers after joblib"] = list(client.run(count_loads).values())
        mapper = EmbeddingMapper(make_vectorizer(), column="title")
        frame = dd.from_pandas(make_frame(), npartitions=6)
        meta = mapper(make_frame().iloc[:0])
        result = frame.map_partitions(mapper, meta=meta).compute()
        found["ids"] = result["id"].to_numpy()
        found["rows"] = np.stack(result["embedding"].to_list())
        found["workers"] = list(client.run(count_loads).values())
    found["client"] = count_loads()
    return found


def run_ray() -> Found:
    """`map_batches` of Ray Data: two actors, then tasks with the callable itself."""
    import ray

    ray.init(
        num_cpus=N_WORKERS,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    emb = make_vectorizer()
    data = ray.data.from_pandas(make_frame()).repartition(8).materialize()
    actors = data.map_batches(
        CountingMapper,
        fn_constructor_kwargs={"vectorizer": emb, "column": "title"},
        compute=ray.data.ActorPoolStrategy(size=N_WORKERS),
        batch_size=32,
    )
    tasks = data.map_batches(CountingMapper(emb, column="title"), batch_size=32)
    arrow = data.map_batches(
        EmbeddingMapper(emb, column="title"), batch_format="pyarrow", batch_size=None
    )
    pandas = data.map_batches(
        EmbeddingMapper(emb, column="title"), batch_format="pandas", batch_size=None
    )
    found = {
        name: collect(part)
        for name, part in {
            "actors": actors,
            "tasks": tasks,
            "arrow": arrow,
            "pandas": pandas,
        }.items()
    }
    ray.shutdown()
    return found


def collect(data: Any) -> Found:
    """Columns of a Ray data set, in its order."""
    rows = data.take_all()
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def run_spark() -> Found:
    """`mapInPandas` and `predict_batch_udf` on a local session of two threads."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col
    from pyspark.sql.types import ArrayType, FloatType

    session = (
        SparkSession.builder.master(f"local[{N_WORKERS}]")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.memory", "1g")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "64")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    rows = make_frame().to_dict("records")
    frame = session.createDataFrame(rows, "id bigint, title string").repartition(4)
    mapper = EmbeddingMapper(make_vectorizer(), column="title")
    mapped = frame.mapInPandas(mapper, "id bigint, title string, embedding array<float>")
    predict = predict_batch_udf(
        mapper.make_predict_fn, return_type=ArrayType(FloatType()), batch_size=64
    )
    predicted = frame.withColumn("embedding", predict(col("title")))
    found: Found = {}
    for name, part in {"mapInPandas": mapped, "predict_batch_udf": predicted}.items():
        rows = part.orderBy("id").collect()
        found[name] = {
            "id": np.array([row["id"] for row in rows]),
            "embedding": np.array([row["embedding"] for row in rows], dtype=np.float32),
        }
    session.stop()
    return found


RUNS = {"dask": run_dask, "ray": run_ray, "spark": run_spark}

if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(pickle.dumps(RUNS[sys.argv[1]]()))
