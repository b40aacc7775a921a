"""Shards: damage, full disks, other processes."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streams
from paths import ROOT
from streams import N_ROWS, ROWS, TEXTS, every_layout, place, read_bytes, read_manifest, stream

from skembed import NVEmbedVectorizer, SkembedWarning
from skembed._files import hold_lock
from skembed.streaming import stream as streaming
from skembed.streaming import targets as _shards
from skembed.streaming.stream import open_embeddings

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install skembed[stream]")
parquet = pytest.importorskip("pyarrow.parquet")
dataset = pytest.importorskip("pyarrow.dataset")
DIM = 48


def shard_file(path: Path, index: int) -> Path:
    return path / f"part-{index:06d}.parquet"


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
    assert caught[0].filename == streams.__file__
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: .* cannot be read .it is not JSON"),
        ("[" * 100_000, "is damaged: .* nested too deeply"),
        ("{}", "holds no set of embeddings of skembed, but another "),
        ('{"format": "skembed-embeddings", "version": 9}', "is of version 9"),
        ('{"format": "skembed-embeddings", "version": 1}', "must have a field 'complete' .bool"),
    ],
)
def test_bad_manifest_is_told_and_left_alone(
    quick: NVEmbedVectorizer, begun: Path, content: str, message: str
) -> None:
    file = begun / "_manifest.json" if begun.is_dir() else Path(f"{begun}.manifest.json")
    file.write_text(content)
    before = read_bytes(begun)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=message):
            stream(quick, TEXTS, begun, overwrite=overwrite)
    with pytest.raises(ValueError, match=message):
        open_embeddings(begun)
    assert read_bytes(begun) == before


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
