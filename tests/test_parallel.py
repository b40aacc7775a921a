"""`EmbeddingMapper`: its contract, and the engines it is for, really started."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engines_worker as worker
import numpy as np
import pytest
from fake_vectorizer import FakeVectorizer

from skembed.inference.registry import registry
from skembed.parallel import EmbeddingMapper

pd = pytest.importorskip("pandas")

TEXTS = ["a card was stolen", "", "open an account", "a card was stolen"]
TOLERANCE = 1e-5  # stated for float32: the same text in any batch, order or subset


@pytest.fixture
def mapper() -> EmbeddingMapper:
    """A mapper of the tiny checkpoint."""
    return EmbeddingMapper(worker.make_vectorizer(), column="title")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The rows of one process."""
    return worker.make_vectorizer().transform(worker.make_texts())


# Batches of every kind


def test_dict_of_arrays(mapper: EmbeddingMapper) -> None:
    batch = {"id": np.arange(4), "title": np.array(TEXTS, dtype=object)}
    found = mapper(batch)
    assert list(found) == ["id", "title", "embedding"]
    assert list(batch) == ["id", "title"], "the batch itself stays as it was"
    assert found["embedding"].shape == (4, 48)
    assert found["embedding"].dtype == np.float32
    np.testing.assert_array_equal(found["embedding"], mapper.vectorizer.transform(TEXTS))


def test_pandas_frame_keeps_its_index(mapper: EmbeddingMapper) -> None:
    frame = pd.DataFrame({"title": TEXTS, "id": range(4)}, index=list("abca"))
    found = mapper(frame)
    assert found.columns.tolist() == ["title", "id", "embedding"]
    assert found.index.tolist() == list("abca")
    assert frame.columns.tolist() == ["title", "id"]
    assert {vector.dtype for vector in found["embedding"]} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        np.stack(found["embedding"].to_list()), mapper.vectorizer.transform(TEXTS)
    )


def test_arrow_table() -> None:
    pa = pytest.importorskip("pyarrow")
    mapper = EmbeddingMapper(worker.make_vectorizer(), column="title", output_column="v")
    found = mapper(pa.table({"title": TEXTS, "id": range(4)}))
    assert found.column_names == ["title", "id", "v"]
    assert found.schema.field("v").type == pa.list_(pa.float32(), 48)
    np.testing.assert_array_equal(
        np.array(found["v"].to_pylist(), dtype=np.float32), mapper.vectorizer.transform(TEXTS)
    )


def test_iterator_is_consumed_batch_by_batch(mapper: EmbeddingMapper) -> None:
    taken: list[int] = []

    def frames() -> Iterator[Any]:
        for k in range(3):
            taken.append(k)
            yield pd.DataFrame({"title": TEXTS[k:]})

    results = mapper(frames())
    assert taken == []
    assert len(next(results)) == 4
    assert taken == [0]
    assert [len(frame) for frame in results] == [3, 2]


def test_predict_function_of_spark(mapper: EmbeddingMapper) -> None:
    predict = mapper.make_predict_fn()
    found = predict(np.array(TEXTS, dtype=object))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, mapper.vectorizer.transform(TEXTS))


@pytest.mark.parametrize("kind", ["dict", "pandas", "pyarrow"])
def test_empty_batch_loads_nothing(
    kind: str, mapper: EmbeddingMapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*args: Any) -> Any:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(type(registry), "get", get)
    if kind == "dict":
        found = mapper({"title": np.array([], dtype=object)})
        assert found["embedding"].shape == (0, 48)
    elif kind == "pandas":
        found = mapper(pd.DataFrame({"title": pd.Series([], dtype=object)}))
        assert (len(found), found["embedding"].dtype) == (0, np.dtype(object))
    else:
        pa = pytest.importorskip("pyarrow")
        found = mapper(pa.table({"title": pa.array([], pa.string())}))
        assert (found.num_rows, found.column_names) == (0, ["title", "embedding"])


def test_sides_are_those_of_the_vectorizer() -> None:
    emb = worker.make_vectorizer(instruction="STS", document_instruction="Describe it")
    for method in ("transform", "encode_query", "encode_document"):
        found = EmbeddingMapper(emb, method=method)({"text": np.array(TEXTS, dtype=object)})
        np.testing.assert_array_equal(found["embedding"], getattr(emb, method)(TEXTS))


def test_any_text_transformer_will_do() -> None:
    fake = FakeVectorizer().fit(TEXTS)
    found = EmbeddingMapper(fake)({"text": np.array(TEXTS)})
    np.testing.assert_allclose(found["embedding"], fake.transform(TEXTS))
    assert found["embedding"].dtype == np.float32


def test_default_is_the_bundled_model() -> None:
    assert EmbeddingMapper().vectorizer.model == "skembed-mini"


# Pickles


def test_pickle_holds_no_weights(mapper: EmbeddingMapper) -> None:
    first = mapper.embed(TEXTS)
    data = pickle.dumps(mapper)
    assert len(data) < 10_000
    np.testing.assert_array_equal(pickle.loads(data).embed(TEXTS), first)


def test_a_copy_in_a_worker_leaves_its_model_for_the_next_task(
    mapper: EmbeddingMapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_in_worker", type(registry._in_worker)())
    data = pickle.dumps(mapper)
    mapper.embed(TEXTS)
    assert not registry._in_worker, "the one made here holds its model itself"
    pickle.loads(data).embed(TEXTS)
    (kept,) = registry._in_worker.values()
    before = registry.n_loads
    del mapper
    pickle.loads(data).embed(TEXTS)
    assert registry.n_loads == before
    assert list(registry._in_worker.values()) == [kept]


# Bad input


@pytest.mark.parametrize(
    "batch",
    [{"text": np.array(["a"])}, pd.DataFrame({"text": ["a"]})],
    ids=["dict", "pandas"],
)
def test_absent_column_is_named(batch: Any, mapper: EmbeddingMapper) -> None:
    with pytest.raises(ValueError, match=r"`column`.*got 'title', and the batch has \['text'\]"):
        mapper(batch)


def test_nothing_is_written_over(mapper: EmbeddingMapper) -> None:
    with pytest.raises(ValueError, match="`output_column`.*'embedding', which the batch has"):
        mapper({"title": np.array(["a"]), "embedding": np.array([1])})


@pytest.mark.parametrize("batch", [["a"], np.array(["a"]), "a", None], ids=type)
def test_other_batches_are_refused(batch: Any, mapper: EmbeddingMapper) -> None:
    with pytest.raises(TypeError, match="takes a dict of arrays.*got .*make_predict_fn"):
        mapper(batch)


def test_wrong_item_is_named(mapper: EmbeddingMapper) -> None:
    with pytest.raises(TypeError, match=r"X\[1\] is"):
        mapper({"title": np.array(["a", 7], dtype=object)})


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"column": 3}, TypeError, "`column` parameter of `EmbeddingMapper`"),
        ({"output_column": ""}, ValueError, "`output_column` parameter of `EmbeddingMapper`"),
        ({"method": "predict"}, ValueError, "`method` parameter of `EmbeddingMapper`"),
        ({"vectorizer": 3}, TypeError, "`vectorizer` .* must have a method `transform`; got int"),
    ],
)
def test_wrong_parameters(parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EmbeddingMapper(**parameters)


# Engines


def start_engine(engine: str, module: str, out: Path) -> Any:
    """What a run of `engines_worker.py` found, in a process of its own."""
    if find_spec(module) is None:
        pytest.skip(f"needs `{module}`: pip install skembed[{engine}]")
    environment = {
        **os.environ,
        "HOME": str(out.parent),  # for what an engine leaves behind
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "300s",  # a busy machine starts slowly
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    command = [sys.executable, worker.__file__, engine, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if engine == "spark" and "JAVA_GATEWAY_EXITED" in done.stderr:
        pytest.skip("needs a Java runtime that Spark can start")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8_000:]
    return pickle.loads(out.read_bytes())


def assert_rows(ids: np.ndarray, rows: np.ndarray, expected: np.ndarray) -> None:
    """All rows, in order, as one process gives them."""
    np.testing.assert_array_equal(ids, np.arange(len(expected)))
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def test_dask_workers_load_once_and_give_the_same_rows(
    expected: np.ndarray, tmp_path: Path
) -> None:
    found = start_engine("dask", "distributed", tmp_path / "found")
    for name in ("joblib", "joblib again"):
        np.testing.assert_allclose(found[name], expected, atol=TOLERANCE)
    assert_rows(found["ids"], found["rows"], expected)
    for workers in (found["workers after joblib"], found["workers"]):
        pids, loads, threads = zip(*workers, strict=True)
        assert len(set(pids)) == worker.N_WORKERS
        # Two calls and six partitions: a load for each task would show.
        assert loads == (1, 1)
        assert threads == (1, 1)
    assert found["client"][1] == 0, "the process that asks loads no weights"


def test_ray_actors_load_once_and_give_the_same_rows(expected: np.ndarray, tmp_path: Path) -> None:
    found = start_engine("ray", "ray", tmp_path / "found")
    for part in found.values():
        assert_rows(part["id"], part["embedding"], expected)
    for name in ("actors", "tasks"):
        part = found[name]
        assert part["loads"].max() == 1
        assert len(np.unique(part["pid"])) <= worker.N_WORKERS
    assert len(np.unique(found["actors"]["pid"])) == worker.N_WORKERS


@pytest.mark.slow
def test_spark_gives_the_same_rows(expected: np.ndarray, tmp_path: Path) -> None:
    found = start_engine("spark", "pyspark", tmp_path / "found")
    for part in found.values():
        assert_rows(part["id"], part["embedding"], expected)
