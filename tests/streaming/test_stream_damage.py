"""Streamed embeddings as damaged or foreign bytes: never a wrong vector, nothing of others lost."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import assert_ours, mutate
from paths import GOLDEN, ROOT
from stream_kills import make_up
from streams import (
    LAYOUTS,
    N_ROWS,
    TEXTS,
    every_layout,
    place,
    read_bytes,
    read_manifest,
    read_vectors,
    stream,
)

from skembed import NVEmbedVectorizer, SkembedWarning
from skembed.inference.encoder import Encoder
from skembed.streaming.stream import open_embeddings

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
DIM = 48
TRUTH = np.array(
    [np.resize(np.frombuffer(text.encode(), np.uint8), DIM) for text in TEXTS], dtype=np.float32
)
# Every function of these two folders that reads or writes files, and what holds it to the rules:
# the damage of which file, or the tests of which kind.
GATES = {"hold_lock", "open_file", "read_file", "read_json", "read_manifest", "replace_file"}
GATES |= {"write_bytes", "write_json", "connect", "_sqlite_connect", "open", "_open_new", "load"}
GATES |= {"ParquetFile", "dataset", "unlink", "rmdir", "truncate", "replace"}
COVERED = {
    "cache.file_store._create": "cache",
    "cache.file_store._open": "cache",
    "cache.file_store._open_as_it_is": "cache",
    "cache.file_store._sqlite_connect": "cache",
    "cache.sqlite_log._read_marks": "cache, -wal, -shm",
    "cache.sqlite_log.remove_foreign_log": "test_sqlite_log",
    "streaming.manifest.read_manifest": "manifest",
    "streaming.manifest.write_manifest": "links",
    "streaming.sources._open_parquet": "source",
    "streaming.stream.begin": "manifest",
    "streaming.stream.open_embeddings": "manifest, npy, parquet",
    "streaming.stream.write_embeddings": "links",
    "streaming.targets._hash_range": "npy, parquet",
    "streaming.targets._is_own": "npy",
    "streaming.targets._is_stamped": "parquet",
    "streaming.targets._open_new": "links",
    "streaming.targets.clear": "others",
    "streaming.targets.drop_after": "others",
    "streaming.targets.find_other_content": "npy, parquet",
    "streaming.targets.finish": "npy",
    "streaming.targets.tidy": "others",
    "streaming.targets.write": "links",
}


def test_every_reader_and_writer_is_covered() -> None:
    found = set()
    for folder in ("cache", "streaming"):
        for file in (ROOT / "skembed" / folder).glob("*.py"):
            for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(function, ast.FunctionDef) and GATES & set(_list_calls(function)):
                    found.add(f"{folder}.{file.stem}.{function.name}")
    not_files = {
        "cache.embedding_cache._get_default_cache",
        "streaming.manifest._show",
        "streaming.sources.open_source",  # replaces a field
        "streaming.stream._start",
    }
    assert found - not_files == set(COVERED)


def _list_calls(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr


def manifest_file(path: Path) -> Path:
    return path / "_manifest.json" if path.suffix != ".npy" else Path(f"{path}.manifest.json")


def data_files(path: Path) -> list[Path]:
    return [path] if path.suffix == ".npy" else sorted(path.glob("part-*"))


@pytest.fixture(params=LAYOUTS)
def whole(request: Any, quick: NVEmbedVectorizer, tmp_path: Path) -> Path:
    """Return the path of a complete set."""
    path = place(tmp_path, request.param)
    stream(quick, TEXTS, path)
    return path


# Files of others


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Return the content of everything under a folder; of a link, where it leads."""
    return {
        str(file.relative_to(folder)): os.readlink(file) if file.is_symlink() else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_symlink() or file.is_file()
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("index", [2, 4, 99, 1_000_000, "0000001"])
def test_foreign_shard_is_refused(
    quick: NVEmbedVectorizer, tmp_path: Path, overwrite: bool, is_complete: bool, index: int | str
) -> None:
    """Beyond the manifest, or with the number of the next shard."""
    path = tmp_path / "out"
    _write_some(quick, path, N_ROWS if is_complete else 40)
    name = f"part-{index:06d}.parquet" if isinstance(index, int) else f"part-{index}.parquet"
    if (path / name).exists():
        pytest.skip("is one of ours")
    parquet.write_table(pa.table({"mine": [1]}), path / name)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"does not name it, but '{name}'. Nothing was changed"):
        stream(quick, TEXTS, path, overwrite=overwrite)
    assert snapshot(tmp_path) == before
    (path / name).unlink()
    assert stream(quick, TEXTS, path, overwrite=overwrite).n_rows == N_ROWS


def _write_some(quick: NVEmbedVectorizer, path: Path, n_rows: int) -> None:
    """Write a set, or a part of it."""

    def texts() -> Iterator[str]:
        yield from TEXTS[:n_rows]
        if n_rows < N_ROWS:
            raise RuntimeError("the source broke off")

    try:
        stream(quick, texts(), path)
    except RuntimeError:
        assert n_rows < N_ROWS


def test_shard_of_a_killed_run_is_our_own(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    """It was renamed, and the manifest did not name it yet."""
    other = tmp_path / "other"
    for overwrite in (False, True):
        path = tmp_path / f"out{overwrite}"
        stream(quick, TEXTS, other)
        _write_some(quick, path, 40)
        (other / "part-000002.parquet").replace(path / "part-000002.parquet")
        stream(quick, TEXTS, path, overwrite=overwrite)
        stream(quick, TEXTS, other, overwrite=True)
        assert read_bytes(path) == read_bytes(other)


@every_layout
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_stay(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, overwrite: bool
) -> None:
    path = place(tmp_path, layout)
    stream(quick, TEXTS, path)
    folder = path if layout == "parquet" else tmp_path
    others = ["notes.txt", "thesis.parquet", "part-1.txt", ".hidden.lock", "a.npy.partial"]
    for name in others:
        (folder / name).write_bytes(b"mine")
    (folder / "part-folder").mkdir()
    stream(quick, TEXTS[:20], path, overwrite=True)
    stream(quick, TEXTS[:20], path, overwrite=overwrite)
    for name in others:
        assert (folder / name).read_bytes() == b"mine"
    assert (folder / "part-folder").is_dir()
    assert read_vectors(path).shape == (20, DIM)


@every_layout
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [b"mine", b"{}", b'{"format": "skembed-index", "version": 1}'])
def test_foreign_manifest_is_refused(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, overwrite: bool, content: bytes
) -> None:
    path = place(tmp_path, layout)
    manifest_file(path).parent.mkdir(exist_ok=True)
    manifest_file(path).write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="set of embeddings"):
        stream(quick, TEXTS, path, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_foreign_array_is_refused(
    quick: NVEmbedVectorizer, tmp_path: Path, overwrite: bool, is_complete: bool, suffix: str
) -> None:
    """In the place of the array or of its unfinished file, beside it or instead of it."""
    path = tmp_path / "out.npy"
    _write_some(quick, path, N_ROWS if is_complete else 40)
    own = path if is_complete else Path(f"{path}.partial")
    foreign = Path(f"{path}{suffix}")
    if foreign == own:
        own.unlink()
    np.save(tmp_path / "theirs.npy", np.arange(12.0))
    (tmp_path / "theirs.npy").replace(foreign)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"does not name it, but '{foreign.name}'"):
        stream(quick, TEXTS, path, overwrite=overwrite)
    assert snapshot(tmp_path) == before
    foreign.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkembedWarning)  # what they replaced is missing
        assert stream(quick, TEXTS, path, overwrite=overwrite).n_rows == N_ROWS
    assert np.array_equal(read_vectors(path), TRUTH)


# Links, pipes and folders


def list_places(layout: str) -> list[str]:
    """Return the names of all files that a run writes, and of those beside them."""
    if layout == "npy":
        return ["out.npy", "out.npy.partial", "out.npy.lock", "out.npy.manifest.json"]
    return ["out/.lock", "out/_manifest.json", "out/part-000000.parquet", "out/part-000002.parquet"]


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
@pytest.mark.parametrize("stage", ["new", "begun", "complete"])
@pytest.mark.parametrize("name", [name for layout in LAYOUTS for name in list_places(layout)])
def test_nothing_is_written_through_a_link(
    quick: NVEmbedVectorizer, tmp_path: Path, name: str, stage: str, kind: str
) -> None:
    path = tmp_path / name.split("/")[0].split(".npy")[0]
    path = path.with_suffix(".npy") if ".npy" in name else path
    if stage != "new":
        _write_some(quick, path, N_ROWS if stage == "complete" else 40)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"mine" * 1000)
    spot = tmp_path / name
    spot.parent.mkdir(exist_ok=True)
    spot.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(spot)
    elif kind == "folder":
        spot.mkdir()
        (spot / "mine").touch()
    else:
        spot.symlink_to(outside / ("victim" if kind == "link" else "nothing"))
    for overwrite in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkembedWarning)
            report = assert_ours(lambda o=overwrite: stream(quick, TEXTS, path, overwrite=o))
        assert snapshot(outside) == {"victim": b"mine" * 1000}
        if report is not None:
            assert np.array_equal(read_vectors(path), TRUTH)
    if kind == "folder":
        assert (spot / "mine").exists()


@pytest.mark.parametrize(
    "file", ["../secret.parquet", "/etc/passwd", "part-000001.parquet", "a/../../x", "", "..\\x"]
)
def test_manifest_that_names_another_file_is_damaged(
    quick: NVEmbedVectorizer, tmp_path: Path, file: str
) -> None:
    path = tmp_path / "out"
    stream(quick, TEXTS, path)
    (path / "part-000000.parquet").rename(tmp_path / "secret.parquet")
    manifest = read_manifest(path)
    manifest["shards"][0]["file"] = file
    manifest_file(path).write_text(json.dumps(manifest))
    before = snapshot(tmp_path)
    for use in (
        lambda: open_embeddings(path),
        lambda: stream(quick, TEXTS, path),
        lambda: stream(quick, TEXTS, path, overwrite=True),
    ):
        with pytest.raises(ValueError, match="is damaged: shard 0 is said to lie in"):
            use()
    assert snapshot(tmp_path) == before


def test_shard_that_is_a_link_is_damage(quick: NVEmbedVectorizer, tmp_path: Path) -> None:
    path = tmp_path / "out"
    stream(quick, TEXTS, path)
    content = (path / "part-000001.parquet").read_bytes()
    (path / "part-000001.parquet").rename(tmp_path / "elsewhere")
    (path / "part-000001.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"part-000001.parquet is a link, or no regular file"):
        open_embeddings(path)
    with pytest.warns(SkembedWarning, match="is a link"):
        stream(quick, TEXTS, path)
    assert (tmp_path / "elsewhere").read_bytes() == content
    assert not (path / "part-000001.parquet").is_symlink()


# A disk without room

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@needs_posix
@every_layout
@pytest.mark.parametrize("limit", [0, 1000, 2500])
def test_limit_of_file_sizes(
    quick: NVEmbedVectorizer, tmp_path: Path, layout: str, limit: int
) -> None:
    import resource

    path, other = place(tmp_path, layout), place(tmp_path, layout, "other")
    stream(quick, TEXTS, other)
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large") as caught:
            stream(quick, TEXTS, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert not list(tmp_path.rglob("*.partial/*"))
    stream(quick, TEXTS, path)
    assert read_bytes(path) == read_bytes(other)


# Headers and schemas


def change_header(shape: tuple[int, ...], descr: str = "<f4", fortran: bool = False) -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + head.ljust(117).encode() + b"\n"


HEADERS = {
    "shape": change_header((DIM, N_ROWS)),
    "fewer rows": change_header((N_ROWS - 1, DIM)),
    "flat": change_header((N_ROWS * DIM,)),
    "dtype": change_header((N_ROWS, DIM), "<i4"),
    "byte order": change_header((N_ROWS, DIM), ">f4"),
    "fortran order": change_header((N_ROWS, DIM), fortran=True),
    "object": change_header((N_ROWS, DIM), "|O"),
    "length": b"\x93NUMPY\x01\x00\x10\x00" + change_header((N_ROWS, DIM))[10:],
    "version": b"\x93NUMPY\x09\x00" + change_header((N_ROWS, DIM))[8:],
    "nothing": b"\0" * 128,
}


@pytest.mark.parametrize("name", HEADERS)
def test_changed_header_is_told_and_mended(
    quick: NVEmbedVectorizer, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "out.npy"
    stream(quick, TEXTS, path)
    content = path.read_bytes()
    assert len(HEADERS[name]) == 128
    path.write_bytes(HEADERS[name] + content[128:])
    for verify in (False, True):
        with pytest.raises(ValueError, match=r"damaged: out\.npy has another header"):
            open_embeddings(path, verify=verify)
    with pytest.warns(SkembedWarning, match="another header .* is mended") as caught:
        assert stream(quick, TEXTS, path).n_skipped == N_ROWS
    assert len(caught) == 1
    assert path.read_bytes() == content


def test_bytes_behind_the_array_are_told_and_cut_off(
    quick: NVEmbedVectorizer, tmp_path: Path
) -> None:
    path = tmp_path / "out.npy"
    stream(quick, TEXTS, path)
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match=f"has {len(content) + 4} bytes, not {len(content)}"):
        open_embeddings(path)
    with pytest.warns(SkembedWarning, match="is mended"):
        stream(quick, TEXTS, path)
    assert path.read_bytes() == content


def other_tables() -> dict[str, Callable[[Any], Any]]:
    """Return changes of a shard that leave it a sound Parquet file."""

    def narrow(table: Any) -> Any:
        flat = table["embedding"].combine_chunks().flatten()
        rows = pa.FixedSizeListArray.from_arrays(flat, DIM // 2)
        return pa.table({"id": list(range(len(rows))), "embedding": rows})

    return {
        "rows": lambda table: table.slice(1),
        "name": lambda table: table.rename_columns(["id", "vectors"]),
        "order": lambda table: table.select(["embedding", "id"]),
        "columns": lambda table: table.select(["embedding"]),
        "width": narrow,
        "type": lambda table: table.set_column(0, "id", table["id"].cast("string")),
    }


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", other_tables())
def test_changed_table_is_told(
    quick: NVEmbedVectorizer, tmp_path: Path, name: str, index: int
) -> None:
    path = tmp_path / "out"
    stream(quick, TEXTS, path, ids=range(N_ROWS))
    file = path / f"part-00000{index}.parquet"
    parquet.write_table(other_tables()[name](parquet.read_table(file)), file)
    with pytest.raises(ValueError, match="damaged: part-.* has .* bytes instead of"):
        open_embeddings(path)
    # The manifest agrees about the size, say: the table itself does not.
    manifest = read_manifest(path)
    manifest["shards"][index]["bytes"] = file.stat().st_size
    manifest_file(path).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"damaged: part-.* has (\d+ rows instead|other columns)"):
        open_embeddings(path)


# Every field of a manifest


def list_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value in a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from list_fields(inner, (*path, key))


OTHERS = (None, True, -1, 0, 1, 10**30, 0.5, float("nan"), "", "x", "../x", [], [1], {})


def test_any_value_in_any_field(quick: NVEmbedVectorizer, whole: Path) -> None:
    """It opens with the right vectors, or is refused in our words; nothing else happens."""
    manifest = read_manifest(whole)
    n_refused = n_fields = 0
    for place_ in list_fields(manifest):
        for other in (*OTHERS, "absent"):
            changed = copy.deepcopy(manifest)
            inner = changed
            for key in place_[:-1]:
                inner = inner[key]
            if other == "absent":
                del inner[place_[-1]]
            else:
                inner[place_[-1]] = other
            manifest_file(whole).write_text(json.dumps(changed))
            n_fields += 1
            found = assert_ours(lambda: read_vectors(whole))
            n_refused += found is None
            if found is not None:
                assert np.array_equal(found, TRUTH), (place_, other)
    assert n_refused > n_fields / 2


def test_any_value_in_any_field_is_taken_or_refused_by_the_next_run(
    quick: NVEmbedVectorizer, whole: Path
) -> None:
    manifest, data = read_manifest(whole), {f: f.read_bytes() for f in data_files(whole)}
    fields = list(list_fields(manifest))
    assert len(fields) > 40
    for position, place_ in enumerate(fields):
        changed = copy.deepcopy(manifest)
        inner = changed
        for key in place_[:-1]:
            inner = inner[key]
        inner[place_[-1]] = OTHERS[position % len(OTHERS)]
        manifest_file(whole).write_text(json.dumps(changed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkembedWarning)
            assert_ours(lambda: stream(quick, TEXTS, whole))
        assert {f: f.read_bytes() for f in data_files(whole)} == data, place_


# Damaged bytes, in a process of its own: libraries below are not in Python


def fuzz(folder: Path, start: int, stop: int) -> None:
    """Damage one file of a set, open it, and go on with it."""
    Encoder.embed = make_up  # type: ignore[method-assign]
    quick = NVEmbedVectorizer(GOLDEN, device="cpu", dtype="float32", cache=None)
    warnings.simplefilter("ignore", SkembedWarning)
    source = folder / "source.parquet"
    parquet.write_table(pa.table({"text": TEXTS}), source)
    sets = []
    for layout in LAYOUTS:
        path = place(folder, layout)
        stream(quick, TEXTS, path)
        sets.append((path, {file: file.read_bytes() for file in (*data_files(path),)}))
        sets[-1][1][manifest_file(path)] = manifest_file(path).read_bytes()
    for seed in range(start, stop):
        path, contents = sets[seed % 2]
        for file, content in contents.items():
            file.write_bytes(content)
        victim = [*contents][seed // 2 % len(contents)]
        victim.write_bytes(mutate(contents[victim], seed))
        found = assert_ours(lambda path=path: read_vectors(path))  # type: ignore[misc]
        assert found is None or np.array_equal(found, TRUTH), seed
        assert_ours(lambda path=path: open_embeddings(path))  # type: ignore[misc]
        before = snapshot(folder)
        if assert_ours(lambda path=path: stream(quick, TEXTS, path)) is None:  # type: ignore[misc]
            assert snapshot(folder) == before, seed
        else:
            assert {file: file.read_bytes() for file in data_files(path)} == {
                file: contents[file] for file in data_files(path)
            }, seed
        content = source.read_bytes()
        source.write_bytes(mutate(content, seed))
        for file in (folder / "copy").glob("*") if (folder / "copy").is_dir() else ():
            file.unlink()
        assert_ours(
            lambda: stream(quick, source, folder / "copy", column="text"), names="`X` parameter"
        )
        source.write_bytes(content)


def run_fuzz(folder: Path, start: int, stop: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, folder, str(start), str(stop)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * (stop - start),
        cwd=ROOT,
        env={
            **os.environ,
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_damaged_bytes(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 0, 50)


@pytest.mark.slow
def test_damaged_bytes_many_times(tmp_path: Path) -> None:
    for start in range(0, 2000, 200):
        folder = tmp_path / str(start)
        folder.mkdir()
        run_fuzz(folder, start, start + 200)


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
