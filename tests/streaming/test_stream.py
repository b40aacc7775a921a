"""Embeddings written to disk: what is written, equal bytes, kills, errors, bounds."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import streams
from paths import ROOT
from stream_kills import make_texts
from streams import (
    N_ROWS,
    ROWS,
    TEXTS,
    every_layout,
    place,
    read_bytes,
    read_manifest,
    read_vectors,
    stream,
)
from tiny import make_vectorizer

import skembed
from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.inference.encoder import Encoder
from skembed.streaming.stream import StreamReport, open_embeddings

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
dataset = pytest.importorskip("pyarrow.dataset")
DIM = 48


# What is written


@every_layout
def test_vectors_are_those_of_transform(
    vectorizer: NVEmbedVectorizer, tmp_path: Path, layout: str
) -> None:
    path = place(tmp_path, layout)
    report = stream(vectorizer, iter(TEXTS), path)
    assert report == StreamReport(path, N_ROWS, DIM, n_shards=4, n_skipped=0)
    np.testing.assert_allclose(read_vectors(path), vectorizer.transform(TEXTS), atol=1e-5)


def test_array_is_mapped_and_plain_numpy_reads_it(
    vectorizer: NVEmbedVectorizer, tmp_path: Path
) -> None:
    stream(vectorizer, TEXTS, tmp_path / "out.npy")
    found = open_embeddings(tmp_path / "out.npy")
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert np.array_equal(np.load(tmp_path / "out.npy"), found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "out.npy.manifest.json"]


def test_other_readers_take_the_folder(vectorizer: NVEmbedVectorizer, tmp_path: Path) -> None:
    stream(vectorizer, TEXTS, tmp_path / "out", ids=range(N_ROWS))
    assert pd.read_parquet(tmp_path / "out").shape == (N_ROWS, 2)
    assert pl.read_parquet(tmp_path / "out" / "*.parquet").shape == (N_ROWS, 2)


@pytest.mark.parametrize("n_rows", [0, 1, ROWS, ROWS + 1, 2 * ROWS])
@every_layout
def test_any_number_of_rows(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, n_rows: int
) -> None:
    path = place(tmp_path, layout)
    report = stream(quick, make_texts(n_rows), path)
    assert (report.n_rows, report.n_shards) == (n_rows, max(1, -(-n_rows // ROWS)))
    assert read_vectors(path).shape == (n_rows, DIM)
    assert stream(quick, make_texts(n_rows), path).n_skipped == n_rows


def test_sides_and_pairs(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(
        golden_dir, instruction="a query of sorts", device="cpu", dtype="float32", truncate_dim=8
    )
    pairs = [(text, text.upper()) for text in TEXTS]
    for name, X, kwargs, expected in [
        ("q", TEXTS, {}, vectorizer.encode_query(TEXTS)),
        ("d", TEXTS, {"side": "document"}, vectorizer.encode_document(TEXTS)),
        ("p", iter(pairs), {}, vectorizer.transform(pairs)),
    ]:
        stream(vectorizer, X, tmp_path / f"{name}.npy", **kwargs)
        np.testing.assert_allclose(read_vectors(tmp_path / f"{name}.npy"), expected, atol=1e-5)
    with pytest.raises(ValueError, match="`side` parameter .* must be 'query' for pairs"):
        stream(vectorizer, pairs, tmp_path / "x.npy", side="document")


def test_missing_texts_are_counted(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, missing="nan", device="cpu", dtype="float32")
    path = tmp_path / "out.npy"
    stream(vectorizer, [*TEXTS, None], path)
    assert np.isnan(read_vectors(path)).any(axis=1).tolist() == [False] * N_ROWS + [True]
    manifest = read_manifest(path)
    assert (manifest["n_missing"], manifest["settings"]["missing"]) == (1, "nan")


def test_one_truncation_warning_for_all_shards(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, max_length=8, device="cpu", dtype="float32")
    with pytest.warns(skembed.TruncationWarning) as expected:
        vectorizer.transform(TEXTS)
    with pytest.warns(skembed.TruncationWarning) as caught:
        stream(vectorizer, TEXTS, tmp_path / "out.npy")
    assert [str(w.message) for w in caught] == [str(w.message) for w in expected]
    assert caught[0].filename == streams.__file__
    n_truncated = read_manifest(tmp_path / "out.npy")["n_truncated"]
    assert str(caught[0].message).startswith(f"{n_truncated} of {N_ROWS} texts")


def test_manifest_tells_what_made_the_vectors(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(
        golden_dir, instruction="find it", truncate_dim=8, device="cpu", dtype="float32"
    ).fit(TEXTS)
    stream(vectorizer, TEXTS, tmp_path / "out", ids=map(str, range(N_ROWS)))
    manifest = read_manifest(tmp_path / "out")
    settings, origin = manifest["settings"], manifest["origin"]
    assert settings["fingerprint"] == vectorizer.model_["fingerprint"]
    assert settings["prefixes"] == ["Instruct: find it\nQuery: "]
    assert (settings["dim"], settings["dtype"], settings["normalize"]) == (8, "float32", True)
    assert settings["columns"] == [["id", "string"], ["embedding", "float32"]]
    assert (origin["instruction"], origin["truncate_dim"]) == ("find it", 8)
    assert (manifest["complete"], manifest["n_rows"]) == (True, N_ROWS)
    for shard in manifest["shards"]:
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]


# Equal bytes


def test_shard_depends_on_its_own_texts_alone(
    vectorizer: NVEmbedVectorizer, golden_dir: Path, tmp_path: Path
) -> None:
    stream(vectorizer, TEXTS, tmp_path / "all.npy")
    expected = [shard["sha256"] for shard in read_manifest(tmp_path / "all.npy")["shards"]]
    for k in range(4):
        part = tmp_path / f"{k}.npy"
        stream(vectorizer, TEXTS[k * ROWS : (k + 1) * ROWS], part)
        assert read_manifest(part)["shards"][0]["sha256"] == expected[k]
    # Neither does it depend on a cache that knows some of them.
    cached = NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", cache=EmbeddingCache())
    cached.transform(TEXTS[::3])
    stream(cached, TEXTS, tmp_path / "cached.npy")
    assert (tmp_path / "cached.npy").read_bytes() == (tmp_path / "all.npy").read_bytes()


def test_cache_is_left_alone_unless_asked_for(golden_dir: Path, tmp_path: Path) -> None:
    cache = EmbeddingCache()
    vectorizer = NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", cache=cache)
    stream(vectorizer, TEXTS, tmp_path / "out.npy")
    assert len(cache) == 0
    stream(vectorizer, TEXTS, tmp_path / "kept.npy", use_cache=True)
    assert len(cache) == N_ROWS
    assert vectorizer.cache is cache


@every_layout
def test_interrupted_run_goes_on(
    vectorizer: NVEmbedVectorizer, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = place(tmp_path, layout), place(tmp_path, layout, "undisturbed")
    stream(vectorizer, TEXTS, other)
    embedded: list[str] = []
    embed = Encoder.embed

    def watched(self: Any, columns: Any, *args: Any, **kwargs: Any) -> Any:
        if len(embedded) >= stop_after:
            raise KeyboardInterrupt
        embedded.extend(columns.columns[0])
        return embed(self, columns, *args, **kwargs)

    monkeypatch.setattr(Encoder, "embed", watched)
    for limit in (1, 2 * ROWS):
        stop_after = limit
        with pytest.raises(KeyboardInterrupt):
            stream(vectorizer, iter(TEXTS), path)
        with pytest.raises(ValueError, match="are not complete: "):
            open_embeddings(path)
    stop_after = N_ROWS
    assert stream(vectorizer, iter(TEXTS), path).n_skipped == 2 * ROWS
    assert embedded == TEXTS  # each once
    assert read_bytes(path) == read_bytes(other)


def run_kills(mode: str, golden_dir: Path, path: Path, *sizes: int) -> Any:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "stream_kills.py",
            mode,
            golden_dir,
            path,
            *map(str, sizes),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # not a warning either
    return json.loads(done.stdout)


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@needs_fork
@every_layout
def test_killed_at_random_moments(
    vectorizer: NVEmbedVectorizer, golden_dir: Path, tmp_path: Path, layout: str
) -> None:
    n_rows, rows, n_kills = 700, 32, 5
    path, other = place(tmp_path, layout), place(tmp_path, layout, "undisturbed")
    shards = run_kills("random", golden_dir, path, n_rows, rows, n_kills, 0)
    assert len(shards) == n_kills
    assert shards == sorted(shards)
    assert 0 < shards[-1] < n_rows / rows  # killed in the middle
    assert read_bytes(path) == read_bytes(other)
    vectors = vectorizer.transform(list(make_texts(n_rows)))
    np.testing.assert_allclose(read_vectors(path), vectors, atol=1e-5)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@every_layout
def test_killed_at_random_moments_often(
    golden_dir: Path, tmp_path: Path, layout: str, seed: int
) -> None:
    path, other = place(tmp_path, layout), place(tmp_path, layout, "undisturbed")
    assert len(run_kills("random", golden_dir, path, 2000, 16, 20, seed)) == 20
    assert read_bytes(path) == read_bytes(other)


@needs_fork
@every_layout
def test_killed_at_every_step(golden_dir: Path, tmp_path: Path, layout: str) -> None:
    paths = [Path(path) for path in run_kills("steps", golden_dir, place(tmp_path, layout), 7, 4)]
    assert len(paths) > 15
    expected = read_bytes(paths[-1])  # never killed
    for step, path in enumerate(paths):
        assert read_bytes(path) == expected, step
        assert read_vectors(path).shape == (7, DIM)


# Errors


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (3, TypeError, r"X\[40\] is an int\. Convert it, or drop the row\. The 32 rows before"),
        (b"x", TypeError, r"X\[40\] is a bytes"),
        (None, ValueError, r"got 1 missing, the first at X\[40\]"),
        (("a", "b"), TypeError, r"X\[40\] is a tuple"),
    ],
)
def test_error_names_the_row_of_the_source(
    quick: NVEmbedVectorizer, tmp_path: Path, bad: Any, error: type, message: str
) -> None:
    texts = iter([*TEXTS[:40], bad, *TEXTS[41:]])
    with pytest.raises(error, match=message):
        stream(quick, texts, tmp_path / "out.npy")
    assert stream(quick, TEXTS, tmp_path / "out.npy").n_skipped == 2 * ROWS


def test_error_names_the_row_of_a_pair(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    pairs = [(text, text) for text in TEXTS]
    with pytest.raises(TypeError, match=r"X\[16\] is a tuple, but X\[20\] is a str"):
        stream(quick, [*pairs[:20], "a", *pairs[21:]], tmp_path / "out.npy")


def test_change_from_texts_to_pairs_is_told(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    X = [*TEXTS[:ROWS], *((text, text) for text in TEXTS[ROWS:])]
    with pytest.raises(ValueError, match=r"X\[16\] begins rows of 2 texts"):
        stream(quick, X, tmp_path / "out.npy")


TABLE = pa.table({"text": TEXTS, "n": range(N_ROWS)})


@pytest.mark.parametrize(
    ("X", "kwargs", "error", "message"),
    [
        ("a text", {}, TypeError, r"got a str that is none\. Wrap it"),
        (Path("nowhere"), {}, TypeError, "Check the path"),
        (b"a text", {}, TypeError, "got a bytes. Decode and wrap it"),
        (3, {}, TypeError, "got an int"),
        ({"a": 1}, {}, TypeError, "got a dict. Pass its texts"),
        ({"a", "b"}, {}, TypeError, "It has no order"),
        (np.array("a"), {}, ValueError, "0 dimensions"),
        (np.zeros((2, 3)), {}, TypeError, "must be an array of str"),
        (TEXTS, {"column": "text"}, ValueError, "is for sources with named columns"),
        (TEXTS, {"keep_columns": ["n"]}, ValueError, "`keep_columns` .* is for sources with"),
        (TABLE, {}, ValueError, "got None, and X has several: 'text', 'n'"),
        (TABLE, {"column": "txt"}, ValueError, "got 'txt'. X has 'text', 'n'"),
        (TABLE, {"column": "n"}, TypeError, "'n' is of type int64"),
        (TABLE, {"column": ["n", "n", "n"]}, ValueError, "one column of texts, or two of pairs"),
        (TABLE, {"column": "text", "keep_columns": "n"}, TypeError, "list of column names"),
        (TABLE, {"column": "text", "keep_columns": ["m"]}, ValueError, "got 'm'"),
        (
            TABLE,
            {"column": "text", "keep_columns": ["n"], "embedding_column": "n"},
            ValueError,
            "must be no column of `keep_columns`",
        ),
        (
            TEXTS,
            {"ids": range(N_ROWS), "embedding_column": "id"},
            ValueError,
            "`embedding_column` .* must differ from 'id', the column of `ids`",
        ),
        (
            TABLE,
            {"column": "text", "keep_columns": ["n", "n"]},
            ValueError,
            "must name each column once; got 'n' again",
        ),
        (TEXTS, {"ids": "abc"}, TypeError, "must be an iterable of int or str"),
        (TEXTS, {"ids": [0.5] * N_ROWS}, TypeError, r"ids\[0\] is a float"),
        (TEXTS, {"ids": [*range(20), "x"] * 3}, TypeError, r"ids\[20\] is a str instead of int"),
        (TEXTS, {"side": "both"}, ValueError, "must be one of 'query', 'document'"),
        (TEXTS, {"rows_per_shard": 0}, ValueError, r"must be an int in \[1, inf\)"),
        (TEXTS, {"format": "csv"}, ValueError, "`format` .* must be one of"),
        (TEXTS, {"format": "npy", "ids": range(N_ROWS)}, ValueError, "needs format='parquet'"),
        (TEXTS, {"overwrite": 2}, TypeError, "must be True or False"),
    ],
)
def test_bad_arguments(
    quick: NVEmbedVectorizer,
    tmp_path: Path,
    X: Any,
    kwargs: dict[str, Any],
    error: type,
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        stream(quick, X, tmp_path / "out", **kwargs)


def test_rows_of_three_texts(tmp_path: Path) -> None:
    emb = make_vectorizer()
    rows = [(text, f"{text} b", f"{text} c") for text in TEXTS[:5]]
    emb.transform_to(rows, tmp_path / "out.npy", rows_per_shard=2)
    found = open_embeddings(tmp_path / "out.npy")
    np.testing.assert_allclose(found, emb.transform(rows), atol=1e-5)


@pytest.mark.parametrize("path", ["", "a\0b", 3, None])
def test_bad_path(quick: NVEmbedVectorizer, path: Any) -> None:
    error = ValueError if isinstance(path, str) else TypeError
    with pytest.raises(error, match="`path` parameter .* must be a path"):
        quick.transform_to(TEXTS, path)


def test_nothing_is_left_where_nothing_was_written(
    quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    for path in (tmp_path / "out", tmp_path / "out.npy"):
        with pytest.raises(TypeError):
            stream(quick, [3], path)
    assert not list(tmp_path.iterdir())


def test_vectorizer_with_a_trainer_must_be_fitted(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, trainer=skembed.ContrastiveTrainer())
    with pytest.raises(Exception, match="Call `fit` first"):
        stream(vectorizer, TEXTS, tmp_path / "out")


def test_array_needs_no_pyarrow(
    quick: NVEmbedVectorizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # type: ignore[arg-type]
    stream(quick, iter(TEXTS), tmp_path / "out.npy")
    assert open_embeddings(tmp_path / "out.npy").shape == (N_ROWS, DIM)
    with pytest.raises(ImportError, match=r"pip install skembed\[stream\]"):
        stream(quick, TEXTS, tmp_path / "out")


# Bounds


def measure_peak(task: Callable[[], object]) -> int:
    tracemalloc.start()
    task()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@every_layout
def test_memory_does_not_grow_with_the_rows(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str
) -> None:
    def run(n_rows: int) -> int:
        path = place(tmp_path, layout, str(n_rows))
        ids = None if layout == "npy" else iter(range(n_rows))
        peak = measure_peak(
            lambda: stream(quick, make_texts(n_rows), path, rows_per_shard=500, ids=ids)
        )
        assert pa.total_allocated_bytes() < 1_000_000
        return peak

    run(1_000)  # imports
    # Ten times the rows: 3.5 MB more of vectors and 1 MB of texts, and only the manifest grows.
    assert run(20_000) < run(2_000) + 100_000


def test_token_budget_of_the_first_shard_holds_for_all(
    vectorizer: NVEmbedVectorizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, "auto" follows the memory that is free at the moment."""
    budgets = iter([300, 200, 100, 90])
    monkeypatch.setattr(
        "skembed.inference.engine.default_batch_tokens", lambda loaded: next(budgets)
    )
    embed, seen = Encoder.embed, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["batch_tokens"])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return embed(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "embed", watched)
    with pytest.raises(KeyboardInterrupt):
        stream(vectorizer, TEXTS, tmp_path / "out.npy")
    stream(vectorizer, TEXTS, tmp_path / "out.npy")
    assert seen == [None, 300, 300, 300, 300]
    assert vectorizer.batch_tokens == "auto"


def test_progress_bar(golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", verbose=True)
    stream(vectorizer, TEXTS, tmp_path / "out.npy")
    shown = capsys.readouterr().err
    assert f"{N_ROWS}/{N_ROWS}" in shown
    assert "embedding" not in shown  # one bar, not one more a shard


def test_loading_and_fitted_state_stay(vectorizer: NVEmbedVectorizer, tmp_path: Path) -> None:
    before = {name: value for name, value in vars(vectorizer).items() if name != "_lease"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(vectorizer, TEXTS, tmp_path / "out.npy")
    after = {name: value for name, value in vars(vectorizer).items() if name != "_lease"}
    assert after == before
