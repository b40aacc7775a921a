"""Files of a saved index: damaged in every way, foreign, and written while others write or read."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import assert_ours, mutate
from paths import ROOT
from saved_indexes import (
    DAMAGES,
    DIM,
    KINDS,
    flip_bit,
    list_files,
    load_and_search,
    read_manifest,
    replace_array,
    save_index,
    search,
    sign_manifest,
)

from skembed._files import hold_lock
from skembed.estimators.retrieval import Retriever
from skembed.search import index_file

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """An index of each kind: its folder, and what it finds."""
    root = tmp_path_factory.mktemp("indexes")
    return {kind: (root / kind, search(save_index(kind, root / kind))) for kind in KINDS}


@pytest.fixture
def folder(kind: str, saved: dict[str, tuple[Path, list[Any]]], tmp_path: Path) -> Path:
    """A copy of the index of a kind."""
    return shutil.copytree(saved[kind][0], tmp_path / "index")


# Damage


@every_kind
@pytest.mark.parametrize("mmap", [True, False])
def test_an_index_is_read_as_it_was(kind: str, mmap: bool, saved: Any) -> None:
    folder, found = saved[kind]
    assert load_and_search(folder, mmap=mmap) == found
    assert load_and_search(folder, mmap=mmap, verify=True) == found


@every_kind
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_is_read(kind: str, damage: str, folder: Path, tmp_path: Path) -> None:
    files = [*list_files(folder), folder / "manifest.json"]
    for number, path in enumerate(files):
        if damage == "another shape" and path.suffix == ".json":
            continue
        copy = shutil.copytree(folder, tmp_path / f"copy{number}") / path.name
        DAMAGES[damage](copy)
        for mmap in (True, False):
            found = assert_ours(lambda at=copy.parent, m=mmap: load_and_search(at, mmap=m))
            assert found is None, path.name
            if path.suffix != ".json":
                with pytest.raises(ValueError, match=r"The index in .*copy\d+' is damaged.*"):
                    Retriever.load(copy.parent, mmap=mmap)


@every_kind
def test_files_in_each_others_place(kind: str, folder: Path, saved: Any) -> None:
    files = list_files(folder)
    for one, other in zip(files, files[1:], strict=False):
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        found = assert_ours(lambda: load_and_search(folder))
        assert found is None or contents[0] == contents[1]
        one.write_bytes(contents[0])
        other.write_bytes(contents[1])
    assert load_and_search(folder) == saved[kind][1]


@pytest.mark.parametrize("kind", ["int8+float16"])
def test_a_link_within_the_folder_may_stand_for_a_file(kind: str, folder: Path, saved: Any) -> None:
    (folder / "sub").mkdir()
    for path in list_files(folder):
        shutil.move(path, folder / "sub" / path.name)
        path.symlink_to(Path("sub") / path.name)
    assert load_and_search(folder) == saved[kind][1]


def check_seeds(folder: Path, found: list[Any], seeds: range) -> None:
    """Damage each file of an index at random; it is refused, or finds what it found."""
    for seed in seeds:
        files = [*list_files(folder), folder / "manifest.json"]
        path = files[seed % len(files)]
        content = path.read_bytes()
        path.write_bytes(mutate(content, seed))
        now = assert_ours(lambda s=seed: load_and_search(folder, mmap=s % 2 == 0))
        assert now in (None, found), seed
        path.write_bytes(content)


FUZZED = pytest.mark.parametrize("kind", ["float32", "int8+float16", "hnsw binary", "binary"])


@FUZZED
def test_random_damage(kind: str, folder: Path, saved: Any) -> None:
    check_seeds(folder, saved[kind][1], range(50))


@pytest.mark.slow
@FUZZED
def test_much_random_damage(kind: str, folder: Path, saved: Any) -> None:
    check_seeds(folder, saved[kind][1], range(50, 2_050))


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "float32", "binary", "<f4", "|O8", [], [0], {}, {"x": 1}),
]


def change_everywhere(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value, each with one part changed, removed or added."""
    if isinstance(value, dict):
        for name in value:
            rest = {key: each for key, each in value.items() if key != name}
            yield rest
            yield from ({**rest, name: changed} for changed in change_everywhere(value[name]))
        yield {**value, "foreign": 1}
    yield from VALUES


def find_changes(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Yield the names of parts in which two JSON values differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        yield from [name] if one != other else []
        return
    for key in one.keys() | other.keys():
        yield from find_changes(one.get(key), other.get(key), key)


@pytest.mark.parametrize("kind", ["float16", "binary+int8", "hnsw int8"])
def test_a_forged_manifest(kind: str, folder: Path, saved: Any) -> None:
    """Any change with a checksum that fits is refused, or one that leads to the same result."""
    good, n_read = read_manifest(folder), 0
    # Settings that a user may choose, or that only later calls see; a graph is of no consequence.
    harmless = {"ids_counted", "n_seen", "vectorizer", "model", "crc32", "foreign", "graph"}
    harmless |= {*good["settings"]["parameters"]}
    for changed in change_everywhere(good):
        if not isinstance(changed, dict):
            (folder / "manifest.json").write_text(json.dumps(changed))
        else:
            sign_manifest(folder, changed)
        if assert_ours(lambda: load_and_search(folder)) is not None:
            n_read += 1
            parts = {*find_changes(good, changed)}
            assert parts <= harmless, (parts, changed)
    assert n_read


ARRAYS: dict[str, Any] = {
    "labels": lambda a: [a[::-1], a * 0, -a, a[:-1], a + 2**62, a.astype("i4"), a[:, None]],
    "ids": lambda a: [a * 0, a[:-1], a.astype("f4"), a[:, None]],
    "ends": lambda a: [a[::-1], a * 0, -a, a + 1, a[:-1], a * 2**40],
    "characters": lambda a: [a * 0 + 255, a[:-1], a.astype("i8"), a * 0 + 65],
    "stored.values": lambda a: [a[:-1], a[:, :-1], a.astype("f8"), a.T, a[0], a[:0]],
    "fine.values": lambda a: [a[:-1], a[:, :-1], a.T, a[0], a[:0]],
    "stored.scales": lambda a: [a[:-1], a[:, None], a.astype("f2")],
    "fine.scales": lambda a: [a[:-1], a[:, None], a.astype("f2")],
    "stored.levels": lambda a: [a[:-1], a[:, :-1], a.astype("f2")],
    "graph": lambda a: [a[:0], a[:-1], a[:111], a[::-1], a * 0, np.append(a, a)],
}


@every_kind
def test_forged_arrays(kind: str, folder: Path) -> None:
    """Arrays that do not fit each other are refused, whatever their checksums say."""
    for name, entry in read_manifest(folder)["files"].items():
        good = np.load(folder / entry["file"])
        for bad in ARRAYS[name](good):
            replace_array(folder, name, bad)
            with pytest.raises(
                ValueError, match="The index in .* is damaged: .* Rebuild the index"
            ):
                Retriever.load(folder)
        replace_array(folder, name, good)
    Retriever.load(folder)


def test_there_is_a_forgery_of_every_array(saved: Any) -> None:
    names = {name for folder, _ in saved.values() for name in read_manifest(folder)["files"]}
    assert names == {*ARRAYS}


def test_foreign_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no index in"):
        Retriever.load(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="There is no index in"):
        Retriever.load(tmp_path / "file")
    retriever = Retriever(None).fit(np.eye(3))
    for path in (None, 3, "", b"x", ["x"], "a\0b", "~no such user/x"):
        with pytest.raises((TypeError, ValueError), match=r"`path` .* of `Retriever.load`"):
            Retriever.load(path)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match=r"`path` .* of `Retriever.save`"):
            retriever.save(path)  # type: ignore[arg-type]


# Mapped vectors are checked where they are used


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder of an index whose vectors have several blocks, of which the last is damaged."""
    folder = tmp_path / "large"
    save_index("float32", folder, n=3_000)
    flip_bit(next(folder.glob("stored.values*")), 8 * 250_000)
    return folder


@pytest.mark.parametrize("options", [{"verify": True}, {"mmap": False}])
def test_all_is_checked_on_demand(options: dict[str, bool], large: Path) -> None:
    with pytest.raises(ValueError, match=r"stored.values.* was changed .* from 196,608 is wrong"):
        Retriever.load(large, **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda r, _: search(r),
        lambda r, _: r.add(np.ones((1, DIM))),
        lambda r, _: r.remove([5]),
        lambda r, _: pickle.dumps(r),
        lambda r, folder: r.save(folder),
        lambda r, folder: r.save(folder / "other"),
    ],
    ids=["search", "add", "remove", "pickle", "save", "save elsewhere"],
)
def test_mapped_vectors_are_checked_before_they_are_used(use: Any, large: Path) -> None:
    loaded = Retriever.load(large)
    for _ in range(2):
        with pytest.raises(ValueError, match="stored.values.* was changed after it was written"):
            use(loaded, large)
    assert len(loaded.ids_) == 3_000


def test_rows_far_from_the_damage_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    whole = save_index("binary+float32", folder, n=3_000)
    best = whole.search(np.eye(DIM)[:1], 1).indices[0, 0]
    place = 128 + (best + 1_500) % 3_000 * DIM * 4
    flip_bit(next(folder.glob("fine.values*")), 8 * int(place))
    top = Retriever.load(folder, verify=False)
    top.set_params(rescore=1)
    np.testing.assert_array_equal(
        top._index.fine.read_rows(np.array([[best]])), whole._index.fine.read_rows([[best]])
    )
    with pytest.raises(ValueError, match="fine.values.* was changed"):
        top._index.fine.read_rows(slice(None))


# Writing


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FOREIGN = {
    "another manifest": {"manifest.json": b'{"format": "vite", "files": {"a": {"file": "b.js"}}}'},
    "a manifest that is no JSON": {"manifest.json": b"name: mine"},
    "a list": {"manifest.json": b"[]"},
    "a manifest of another release": {
        "manifest.json": b'{"format": "skembed-index", "version": 1, "files": {"a": "b.js"}}'
    },
    "files": {"thesis.txt": b"mine"},
    "arrays": {"labels-0123456789ab.npy": b"mine"},
    "hidden": {".git": b"gitdir"},
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_folder_is_left_alone(content: str, tmp_path: Path) -> None:
    files = {**FOREIGN[content], "b.js": b"mine"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="`path` .* must be a new or empty folder, or one that"):
        Retriever(None).fit(np.eye(3)).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("kind", ["int8"])
def test_a_manifest_that_names_foreign_files(kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (folder / "thesis.npy").write_text("mine")
    for name in ("../outside", "thesis.npy", str(tmp_path / "outside")):
        manifest = read_manifest(folder)
        manifest["files"]["labels"]["file"] = name
        sign_manifest(folder, manifest)
        with pytest.raises(ValueError, match="must name a file of an index"):
            save_index(kind, folder)
    assert (tmp_path / "outside").read_text() == (folder / "thesis.npy").read_text() == "mine"


@pytest.mark.parametrize("kind", ["int8"])
def test_foreign_files_beside_an_index_stay(kind: str, folder: Path) -> None:
    old = names_of(folder)
    (folder / "notes.npy").write_text("mine")
    (folder / "stored.values-0123456789ab.skembed.npy").mkdir()  # no file: not ours
    save_index(kind, folder)
    kept = {"notes.npy", "stored.values-0123456789ab.skembed.npy"}
    assert names_of(folder) & (old | kept) == {"manifest.json", *kept}


@pytest.mark.parametrize("kind", ["hnsw int8"])
def test_one_writer_at_a_time(kind: str, folder: Path, saved: Any) -> None:
    before = names_of(folder)
    with hold_lock(folder / index_file._LOCK_FILE, subject="It"):
        with pytest.raises(BlockingIOError, match=rf"is being written .*process {os.getpid()}"):
            save_index(kind, folder, seed=1)
        assert load_and_search(folder) == saved[kind][1]  # readers need no lock
    assert names_of(folder) == before


def test_many_writers_and_readers(tmp_path: Path) -> None:
    """Whatever is read was written whole by one of them."""
    folder = tmp_path / "index"
    results = [search(save_index("int8", folder, seed=seed)) for seed in range(3)]
    stop, problems = threading.Event(), []

    def write(seed: int) -> None:
        retriever = save_index("int8", tmp_path / str(seed), seed=seed)
        while not stop.is_set():
            try:
                retriever.save(folder)
            except BlockingIOError:
                pass
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for k in range(200):
            assert load_and_search(folder, mmap=k % 2 == 0) in results
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert len(names_of(folder)) == 1 + len(read_manifest(folder)["files"])


@pytest.mark.parametrize("kind", ["binary"])
def test_a_save_while_an_index_is_opened(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has read the old manifest, whose files are gone."""
    real, left = index_file.read_array, [2]

    def read_array(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            save_index(kind, folder, seed=7)
        return real(*args, **options)

    monkeypatch.setattr(index_file, "read_array", read_array)
    found = load_and_search(folder)
    assert found == search(save_index(kind, folder.parent / "other", seed=7))


@pytest.mark.parametrize("kind", ["float32"])
def test_an_open_index_outlives_the_next_save(kind: str, folder: Path, saved: Any) -> None:
    loaded = Retriever.load(folder)
    save_index(kind, folder, seed=5)
    assert search(loaded) == saved[kind][1]


@pytest.mark.parametrize("kind", ["float32"])
@pytest.mark.parametrize("there", [True, False])
def test_a_real_full_disk(kind: str, there: bool, folder: Path, saved: Any) -> None:
    target = folder if there else folder.parent / "new"
    before = names_of(folder)
    large = Retriever(None).fit(np.random.default_rng(0).normal(size=(2_000, DIM)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limit[1]))  # no file above 64 KiB
    try:
        with pytest.raises(OSError, match="The index cannot be written") as error:
            large.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.filename == str(target)
    assert ("still whole" in str(error.value)) is there
    assert names_of(target) == (before if there else set())
    assert load_and_search(folder) == saved[kind][1]


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3), np.uint8(3)])
def test_numbers_of_numpy_are_saved(value: Any, tmp_path: Path) -> None:
    Retriever(None, rescore=value).fit(np.eye(3)).save(tmp_path)
    assert Retriever.load(tmp_path).rescore == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_a_save_that_is_killed_anywhere(tmp_path: Path) -> None:
    """Before each change of the disk; then the index is the old one or the new, and litter goes."""
    command = [sys.executable, str(ROOT / "tests" / "index_kills.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    kills = json.loads(run.stdout)
    assert kills["new"] > 10 < kills["old"]
    assert kills["litter"] > 10
