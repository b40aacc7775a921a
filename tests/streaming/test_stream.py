"""Streaming: equal bytes after any stop, nothing mixed, every obstacle explained."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from paths import ROOT
from stream_kills import make_texts, make_up

import skembed
from skembed import EmbeddingCache, NVEmbedVectorizer, SkembedWarning
from skembed._files import hold_lock
from skembed.inference.encoder import Encoder
from skembed.streaming import stream as streaming
from skembed.streaming import targets as _shards
from skembed.streaming.stream import StreamReport, open_embeddings

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
dataset = pytest.importorskip("pyarrow.dataset")

N_ROWS = 50
ROWS = 16  # of a shard: three full ones and a rest
DIM = 48
TEXTS = list(make_texts(N_ROWS))
LAYOUTS = ("parquet", "npy")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def vectorizer(golden_dir: Path) -> NVEmbedVectorizer:
    return NVEmbedVectorizer(golden_dir, device="cpu", dtype="float32", cache=None)


@pytest.fixture
def quick(vectorizer: NVEmbedVectorizer, monkeypatch: pytest.MonkeyPatch) -> NVEmbedVectorizer:
    """The vectorizer, its vectors made up."""
    monkeypatch.setattr(Encoder, "embed", make_up)
    return vectorizer


def stream(vectorizer: Any, X: Any, path: Path, **kwargs: Any) -> StreamReport:
    return vectorizer.transform_to(X, path, **{"rows_per_shard": ROWS, **kwargs})


def place(folder: Path, layout: str, name: str = "out") -> Path:
    return folder / (f"{name}.npy" if layout == "npy" else name)


def read_bytes(path: Path) -> dict[str, bytes]:
    """Every file of a set of embeddings."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return {
        file.name.removeprefix(path.name): file.read_bytes()
        for file in path.parent.glob(f"*{path.name}*")
    }


def read_vectors(path: Path) -> np.ndarray:
    found = open_embeddings(path, verify=True)
    if isinstance(found, np.ndarray):
        return found
    column = found.to_table()["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def read_manifest(path: Path) -> dict[str, Any]:
    file = (
        path / "_manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")
    )
    return json.loads(file.read_text(encoding="utf-8"))


def shard_file(path: Path, index: int) -> Path:
    return path / f"part-{index:06d}.parquet"


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
    assert caught[0].filename == __file__
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


# Sources


def make_sources(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The same texts in every shape, and the keywords that go with it."""
    table = pa.table({"n": range(N_ROWS), "text": TEXTS})
    files = folder / "parts"
    files.mkdir()
    for k, (start, stop) in enumerate([(0, 7), (7, 7), (7, 40), (40, N_ROWS)]):
        part = table.slice(start, stop - start)
        parquet.write_table(part, files / f"{k}.parquet", row_group_size=5)
    parquet.write_table(table, folder / "one.parquet")
    frame = table.to_pandas()
    named = {"column": "text"}
    return {
        "list": (TEXTS, {}),
        "tuple": (tuple(TEXTS), {}),
        "generator": ((text for text in TEXTS), {}),
        "array": (np.array(TEXTS), {}),
        "Series": (pd.Series(TEXTS, index=range(N_ROWS, 0, -1)), {}),
        "Index": (pd.Index(TEXTS), {}),
        "polars Series": (pl.Series(TEXTS), {}),
        "map": (map(str, TEXTS), {}),
        "Arrow array": (pa.chunked_array([TEXTS[:9], TEXTS[9:]]), {}),
        "pandas": (frame, named),
        "pandas, one column": (frame[["text"]], {}),
        "pandas, category": (frame.astype({"text": "category"}), named),
        "polars": (pl.from_arrow(table), named),
        "polars, category": (
            pl.from_arrow(table).with_columns(pl.col("text").cast(pl.Categorical)),
            named,
        ),
        "table": (table, named),
        "batch": (table.combine_chunks().to_batches()[0], named),
        "reader": (table.to_reader(max_chunksize=11), named),
        "data set": (dataset.dataset(files), named),
        "table as data set": (dataset.dataset(table), named),
        "Parquet file": (folder / "one.parquet", named),
        "Parquet folder": (str(files), named),
    }


def test_every_source_gives_the_same_bytes(vectorizer: NVEmbedVectorizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sources = make_sources(tmp_path / "in")
    stream(vectorizer, TEXTS, tmp_path / "first")
    expected = read_bytes(tmp_path / "first")
    for name, (X, kwargs) in sources.items():
        stream(vectorizer, X, tmp_path / name, **kwargs)
        assert read_bytes(tmp_path / name) == expected, name


def test_columns_are_carried_along(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": TEXTS,
            "key": [f"k{i}" for i in range(N_ROWS)],
            "price": [None if i % 4 == 0 else i * 1.5 for i in range(N_ROWS)],
            "at": pa.array(range(N_ROWS), pa.timestamp("ns")),
            "kind": pa.array(["a", "b"] * (N_ROWS // 2)).dictionary_encode(),
            "tags": [[i, None] for i in range(N_ROWS)],
            "nested": [{"x": i, "y": ["z"]} for i in range(N_ROWS)],
        }
    )
    names = ["text", "key", "price", "at", "kind", "tags", "nested"]
    kwargs = {"column": "text", "keep_columns": names, "embedding_column": "vector"}
    stream(quick, table, tmp_path / "out", **kwargs)
    found = open_embeddings(tmp_path / "out").to_table()
    assert found.column_names == [*names, "vector"]
    for name in names:
        expected = table[name].cast(pa.string()) if name == "kind" else table[name]
        assert found[name].combine_chunks() == expected.combine_chunks(), name
    again = stream(quick, table.to_reader(max_chunksize=3), tmp_path / "out", **kwargs)
    assert again.n_skipped == N_ROWS


@pytest.mark.parametrize("ids", [np.arange(N_ROWS), pd.Series(map(str, range(N_ROWS)))])
def test_ids_stand_beside_the_vectors(quick: NVEmbedVectorizer, tmp_path: Path, ids: Any) -> None:
    stream(quick, iter(TEXTS), tmp_path / "out", ids=ids)
    assert open_embeddings(tmp_path / "out").to_table()["id"].to_pylist() == ids.tolist()


@pytest.mark.parametrize("n_ids", [0, ROWS - 1, ROWS, N_ROWS - 1, N_ROWS + 1, N_ROWS + ROWS])
def test_ids_must_be_as_many(quick: NVEmbedVectorizer, tmp_path: Path, n_ids: int) -> None:
    with pytest.raises(ValueError, match="must have one id for each row"):
        stream(quick, TEXTS, tmp_path / "out", ids=range(n_ids))
    with pytest.raises((FileNotFoundError, ValueError), match="no embeddings|not complete"):
        open_embeddings(tmp_path / "out")


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
@every_layout
def test_killed_at_every_step(golden_dir: Path, tmp_path: Path, layout: str) -> None:
    paths = [Path(path) for path in run_kills("steps", golden_dir, place(tmp_path, layout), 7, 4)]
    assert len(paths) > 15
    expected = read_bytes(paths[-1])  # never killed
    for step, path in enumerate(paths):
        assert read_bytes(path) == expected, step
        assert read_vectors(path).shape == (7, DIM)


# What has changed since


@pytest.fixture(params=LAYOUTS)
def begun(request: Any, quick: NVEmbedVectorizer, tmp_path: Path) -> Path:
    """A run that ended in its third shard."""
    path = place(tmp_path, request.param)

    def texts() -> Iterator[str]:
        yield from TEXTS[:40]
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        stream(quick, texts(), path)
    assert read_manifest(path)["n_rows"] == 2 * ROWS
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: TEXTS[:20] + ["new"] + TEXTS[21:], "rows 16 to 31 are not those that shard 1"),
        (lambda: TEXTS[1:], "rows 0 to 15 are not those that shard 0"),
        (lambda: TEXTS[:30], "it ends after 30 rows, of 32 that were embedded"),
        (lambda: TEXTS[:16], "it ends after 16 rows, of 32 that were embedded"),
        (lambda: [], "it ends after 0 rows, of 32 that were embedded"),
        (lambda: iter(TEXTS[5:]), "A generator must start at its first row again"),
    ],
)
def test_changed_source_is_told(
    quick: NVEmbedVectorizer, begun: Path, change: Callable[[], Any], message: str
) -> None:
    before = read_bytes(begun)
    with pytest.raises(ValueError, match=f"The source has changed since .*{message}"):
        stream(quick, change(), begun)
    assert read_bytes(begun) == before
    assert stream(quick, TEXTS, begun).n_skipped == 2 * ROWS


@pytest.mark.parametrize("n_rows", [N_ROWS, 3 * ROWS])
@every_layout
def test_grown_source_is_told(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, n_rows: int
) -> None:
    path = place(tmp_path, layout)
    stream(quick, make_texts(n_rows), path)
    with pytest.raises(ValueError, match=f"it goes on after {n_rows} rows, where it ended then"):
        stream(quick, make_texts(n_rows + 1), path)


def test_changed_carried_column_is_told(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    stream(quick, TEXTS, tmp_path / "out", ids=range(N_ROWS))
    with pytest.raises(ValueError, match="rows 32 to 47 are not those"):
        stream(quick, TEXTS, tmp_path / "out", ids=[*range(40), 99, *range(41, N_ROWS)])


def test_missing_text_is_not_the_empty_one(golden_dir: Path, tmp_path: Path) -> None:
    vectorizer = NVEmbedVectorizer(golden_dir, missing="zero", device="cpu", dtype="float32")
    stream(vectorizer, ["a", None], tmp_path / "out.npy")
    with pytest.raises(ValueError, match="The source has changed"):
        stream(vectorizer, ["a", ""], tmp_path / "out.npy")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "skembed-mini"}, "another model"),
        ({"instruction": "find it"}, r'instruction \(\[""\] there, \["Instruct: find it'),
        ({"pooling": "mean"}, r'another pooling \("latent" there, "mean" now\)'),
        ({"dtype": "bfloat16"}, r'dtype of the model \("float32" there, "bfloat16" now\)'),
        ({"truncate_dim": 8}, r"truncate_dim \(width\) \(48 there, 8 now\)"),
        ({"normalize": False}, "another normalize"),
        ({"max_length": 9}, r"another max_length \(512 there, 9 now\)"),
    ],
)
def test_another_model_is_told(
    vectorizer: NVEmbedVectorizer,
    quick: NVEmbedVectorizer,
    begun: Path,
    parameters: dict[str, Any],
    message: str,
) -> None:
    before = read_bytes(begun)
    other = NVEmbedVectorizer(**{**vectorizer.get_params(), **parameters})
    with pytest.raises(ValueError, match=message):
        stream(other, TEXTS, begun)
    assert read_bytes(begun) == before
    stream(other, TEXTS, begun, overwrite=True)
    dim = parameters.get("truncate_dim", 384 if "model" in parameters else DIM)
    assert read_vectors(begun).shape == (N_ROWS, dim)


def test_another_shard_size_is_told(quick: NVEmbedVectorizer, begun: Path) -> None:
    with pytest.raises(ValueError, match=r"another rows_per_shard \(16 there, 8 now\)"):
        stream(quick, TEXTS, begun, rows_per_shard=8)


def test_missing_may_be_eased_after_an_error(
    vectorizer: NVEmbedVectorizer, quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    texts = [*TEXTS[:40], None, *TEXTS[41:]]
    with pytest.raises(ValueError, match=r"got 1 missing, the first at X\[40\]"):
        stream(quick, texts, tmp_path / "out")
    eased = NVEmbedVectorizer(**{**vectorizer.get_params(), "missing": "empty"})
    monkey = read_bytes(tmp_path / "out")
    assert stream(eased, texts, tmp_path / "out").n_skipped == 2 * ROWS
    assert len(read_bytes(tmp_path / "out")) == len(monkey) + 2
    with pytest.raises(ValueError, match=r'another missing \("empty" there, "error" now\)'):
        stream(quick, TEXTS, tmp_path / "out")


def test_other_versions_are_warned_about(quick: NVEmbedVectorizer, begun: Path) -> None:
    file = begun / "_manifest.json" if begun.is_dir() else Path(f"{begun}.manifest.json")
    text = file.read_text(encoding="utf-8")
    versions = json.loads(text)["origin"]["versions"]
    file.write_text(text.replace(f'"torch": "{versions["torch"]}"', '"torch": "1.0"'))
    with pytest.warns(SkembedWarning, match=r"begun with torch 1\.0 \(now ") as caught:
        stream(quick, TEXTS, begun)
    assert caught[0].filename == __file__


# Damage


def damage_array(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@every_layout
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_damaged_shard_is_told_and_mended(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, how: str
) -> None:
    path = place(tmp_path, layout)
    stream(quick, TEXTS, path)
    whole = read_bytes(path)
    file = path if layout == "npy" else shard_file(path, 1)
    middle = 128 + (ROWS + 3) * DIM * 4 if layout == "npy" else file.stat().st_size // 2
    if how == "cut":
        file.write_bytes(file.read_bytes()[:middle])
    elif how == "changed":
        damage_array(file, middle)
    else:
        file.unlink()
    with pytest.raises((ValueError), match="damaged|not complete"):
        open_embeddings(path, verify=True)
    with pytest.warns(SkembedWarning, match="is damaged: .* It is embedded again") as caught:
        report = stream(quick, TEXTS, path)
    n_lost = 1 if layout == "parquet" or how == "changed" else {"cut": 3, "missing": 4}[how]
    assert len(caught) == n_lost
    assert "Shard 1 " in str(caught[0].message) or how == "missing"
    assert caught[0].filename == __file__
    assert report.n_skipped == N_ROWS - (ROWS if n_lost == 1 else N_ROWS - (4 - n_lost) * ROWS)
    assert read_bytes(path) == whole


def test_open_checks_sizes_always_and_contents_when_asked(
    quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    stream(quick, TEXTS, tmp_path / "out.npy")
    damage_array(tmp_path / "out.npy", 1000)
    assert open_embeddings(tmp_path / "out.npy").shape == (N_ROWS, DIM)
    with pytest.raises(ValueError, match=r"damaged: out\.npy is not what was written"):
        open_embeddings(tmp_path / "out.npy", verify=True)


def test_open_reads_no_shard_that_the_manifest_does_not_name(
    quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    stream(quick, TEXTS, tmp_path / "out")
    shard_file(tmp_path / "out", 9).write_bytes(shard_file(tmp_path / "out", 0).read_bytes())
    assert open_embeddings(tmp_path / "out").count_rows() == N_ROWS
    stream(quick, TEXTS, tmp_path / "out")
    assert not shard_file(tmp_path / "out", 9).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: it is not JSON"),
        ("{}", "is no manifest of embeddings"),
        ('{"format": "skembed-embeddings", "version": 9}', "is of version 9"),
        ('{"format": "skembed-embeddings", "version": 1}', "is damaged: an entry is missing"),
    ],
)
def test_bad_manifest_is_told(
    quick: NVEmbedVectorizer, begun: Path, content: str, message: str
) -> None:
    file = begun / "_manifest.json" if begun.is_dir() else Path(f"{begun}.manifest.json")
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        stream(quick, TEXTS, begun)
    with pytest.raises(ValueError, match=message):
        open_embeddings(begun)
    assert stream(quick, TEXTS, begun, overwrite=True).n_skipped == 0


@every_layout
def test_what_others_wrote_is_left_alone(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str
) -> None:
    path = place(tmp_path, layout)
    if layout == "parquet":
        path.mkdir()
    foreign = path if layout == "npy" else path / "thesis.parquet"
    foreign.write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="has no manifest, but"):
            stream(quick, TEXTS, path, overwrite=overwrite)
    assert foreign.read_bytes() == b"mine"
    assert len(list(tmp_path.rglob("*"))) == (1 if layout == "npy" else 2)


# The disk, and other processes


class FullDisk:
    """Files that take so many bytes in all."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, **kwargs: Any) -> Any:
        file, disk = open_new(path, **kwargs), self

        class Limited:
            def write(self, data: Any) -> int:
                disk.room -= len(data)
                if disk.room < 0:
                    file.write(bytes(data)[: disk.room])  # a part still fits
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *args: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Limited()


open_new = _shards._open_new


@every_layout
def test_full_disk(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = place(tmp_path, layout), place(tmp_path, layout, "undisturbed")
    stream(quick, TEXTS, other)
    shard = (other if layout == "npy" else shard_file(other, 0)).stat().st_size
    room = shard // 2 if layout == "npy" else 5 * shard // 2
    monkeypatch.setattr(_shards, "_open_new", FullDisk(room).open)
    with pytest.raises(OSError, match="the disk is full. The (16|32) rows before it") as caught:
        stream(quick, TEXTS, path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert "Free some space, and call `transform_to` again" in str(caught.value)
    kept = read_manifest(path)["n_rows"]
    assert kept in (ROWS, 2 * ROWS)
    if layout == "parquet":
        assert not list(path.glob(".*"))
    monkeypatch.setattr(_shards, "_open_new", open_new)
    assert stream(quick, TEXTS, path).n_skipped == kept
    assert read_bytes(path) == read_bytes(other)


@every_layout
def test_full_disk_at_the_manifest(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = place(tmp_path, layout), []
    write = streaming.write_manifest

    def fail(*args: Any) -> None:
        written.append(args)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(streaming, "write_manifest", fail)
    with pytest.raises(OSError, match="Shard 1 .* the disk is full. The 16 rows before it"):
        stream(quick, TEXTS, path)
    assert read_manifest(path)["n_rows"] == ROWS
    assert stream(quick, TEXTS, path).n_skipped == ROWS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device(
    quick: NVEmbedVectorizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The system's own error, not a patched one."""
    monkeypatch.setattr(_shards, "_open_new", lambda *_, **__: open("/dev/full", "wb"))
    with pytest.raises(OSError, match="Shard 0 .* the disk is full") as caught:
        stream(quick, TEXTS, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC


HOLD = """
import sys
from pathlib import Path
from skembed._files import hold_lock
with hold_lock(Path(sys.argv[1]), subject="It"):
    print("held", flush=True)
    sys.stdin.read()
"""


@every_layout
def test_second_process_is_refused(quick: NVEmbedVectorizer, tmp_path: Path, layout: str) -> None:
    path = place(tmp_path, layout)
    target = _shards.make_target(path, None, embedding_column="embedding", owner="test")
    target.prepare(owner="test")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, target.lock_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match=f"another run .process {holder.pid} on "):
            stream(quick, TEXTS, path)
        holder.kill()  # the lock file stays, the lock does not
        holder.wait()
        assert target.lock_path.exists()
        stream(quick, TEXTS, path)
    assert not target.lock_path.exists()


def test_second_run_of_this_process_is_refused(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        stream(quick, TEXTS, tmp_path / "out.npy")

    with pytest.raises(BlockingIOError, match="is being written by another run"):
        stream(quick, texts(), tmp_path / "out.npy")


def test_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("skembed._files._try_lock", refuse)
    with (
        pytest.warns(SkembedWarning, match="cannot be locked"),
        hold_lock(tmp_path / "lock", subject="It"),
    ):
        pass


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
        (np.zeros((2, 3)), {}, ValueError, "must have one column"),
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
        (TEXTS, {"ids": "abc"}, TypeError, "must be an iterable of int or str"),
        (TEXTS, {"ids": [0.5] * N_ROWS}, TypeError, r"ids\[0\] is a float"),
        (TEXTS, {"ids": [*range(20), "x"] * 3}, TypeError, r"ids\[20\] is a str instead of int"),
        (TEXTS, {"side": "both"}, ValueError, "must be one of 'query', 'document'"),
        (TEXTS, {"rows_per_shard": 0}, ValueError, r"must be an int in \[1, inf\)"),
        (TEXTS, {"format": "csv"}, ValueError, "`format` .* must be one of"),
        (TEXTS, {"format": "npy", "ids": range(N_ROWS)}, ValueError, "needs format='parquet'"),
        (TEXTS, {"overwrite": 1}, TypeError, "must be True or False"),
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


@pytest.mark.parametrize("path", ["", 3, None])
def test_bad_path(quick: NVEmbedVectorizer, path: Any) -> None:
    with pytest.raises(TypeError, match="`path` parameter .* must be a path"):
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
