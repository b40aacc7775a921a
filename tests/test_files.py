"""Files read as what they should be, written in one step, and locked."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import leave_partial

from skembed._files import (
    check_fields,
    find_inside,
    hold_lock,
    name_of_partial,
    open_file,
    read_file,
    read_json,
    read_manifest,
    remove_leftovers,
    replace_file,
    write_bytes,
    write_json,
)
from skembed.exceptions import CheckpointError

SECRET = "not of this folder"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file in it, and a secret beside it."""
    (tmp_path / "secret").write_text(SECRET)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("content")
    (folder / "sub" / "file").write_text("content")
    return folder


# Inside a folder


@pytest.mark.parametrize("name", ["file", "sub/file", "absent", "a b", ".hidden", "..."])
def test_names_inside(folder: Path, name: str) -> None:
    assert find_inside(folder, name, subject="A shard") == folder / name


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../secret", "sub/../../secret", "/etc/passwd", "C:\\x", "C:x", "a\\..\\b", "a\0b"),
        *("", None, 3, ["file"], True, {"a": 1}),
    ],
)
def test_names_that_lead_out_or_are_none(folder: Path, name: Any) -> None:
    with pytest.raises(CheckpointError, match="A shard must be the name of a file"):
        find_inside(folder, name, subject="A shard", error=CheckpointError)


def test_links(folder: Path) -> None:
    (folder / "within").symlink_to(folder / "sub" / "file")
    (folder / "out").symlink_to("../secret")
    (folder / "out_folder").symlink_to(folder.parent)
    (folder / "gone").symlink_to("/nowhere/at/all")
    assert find_inside(folder, "within", subject="It").read_text() == "content"
    for name in ("out", "out_folder/secret", "gone"):
        with pytest.raises(ValueError, match="a link that leads out of it"):
            find_inside(folder, name, subject="It")
    allowed = find_inside(folder, "out", subject="It", others=[folder.parent])
    assert allowed.read_text() == SECRET


def test_a_folder_that_is_a_link_itself(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert find_inside(link, "file", subject="It").read_text() == "content"


# Reading


def test_a_pipe_is_no_file_and_nobody_waits_for_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", Path("/dev/zero"), folder):
        with pytest.raises(OSError, match="not a regular file|Is a directory") as error:
            open_file(path)
        assert error.value.filename == str(path)


def test_reading_with_a_limit(folder: Path) -> None:
    assert read_file(folder / "file", limit=7) == b"content"
    with pytest.raises(OSError, match="7 bytes, more than 6"):
        read_file(folder / "file", limit=6)
    with pytest.raises(FileNotFoundError):
        read_file(folder / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1, 2]", "no JSON object, but list"),
        (b"null", "no JSON object, but NoneType"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "file")


def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"

    def read() -> dict[str, Any]:
        return read_manifest(path, kind="index", form="skembed-x", version=2, advice="Rebuild it.")

    good = {"format": "skembed-x", "version": 2, "rows": 3}
    write_json(path, good)
    assert read() == good
    for content, message in (
        (b"{", "The index in .* is damaged: manifest.json cannot be read .*Rebuild it"),
        (b"{}", "holds no index of skembed, but another manifest.json"),
        (b'{"format": "skembed-x"}', "of version None; this skembed reads version 2"),
        (json.dumps({**good, "version": True}).encode(), "of version True"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"damaged: .*not a regular file"):
        read()


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"rows": -1}, "-1"),
        ({"rows": True}, "True"),
        ({"rows": 3.0}, "3.0"),
        ({"name": None}, "None"),
        ({"name": b"x"}, "b'x'"),
    ],
)
def test_fields_of_the_wrong_kind(fields: dict[str, Any], got: str) -> None:
    spec: dict[str, Any] = {"rows": int, "name": str, "size": (int, type(None))}
    good = {"rows": 3, "name": "x", "size": None, "further": object()}
    assert check_fields(good, spec, subject="The manifest") is good
    with pytest.raises(CheckpointError, match=f"The manifest must have a field .*; got {got}"):
        check_fields({**good, **fields}, spec, subject="The manifest", error=CheckpointError)
    absent = next(iter(fields))
    with pytest.raises(ValueError, match=f"field '{absent}' .*; got no such field. Rebuild it"):
        rest = {name: value for name, value in good.items() if name != absent}
        check_fields(rest, spec, subject="The manifest", advice="Rebuild it.")
    with pytest.raises(ValueError, match="must be a JSON object; got list"):
        check_fields([], spec, subject="The manifest")


# Writing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), replace_file(path) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    assert path.stat().st_mode == usual.stat().st_mode


def test_what_a_library_drops_beside_the_file_goes_too(tmp_path: Path) -> None:
    with replace_file(tmp_path / "file") as partial:
        (partial.parent / ".tmpAbC").write_bytes(b"litter of a library")
        partial.write_bytes(b"content")
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_place_of_the_file_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file").symlink_to(victim)
    write_bytes(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_leftovers_of_the_killed_go_and_others_stay(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    left = leave_partial(path, b"half")
    leave_partial(other, b"half")
    assert left.read_bytes() == b"half"
    assert name_of_partial(left.parent.name) == "file"
    foreign = tmp_path / ".file.partial"
    foreign.write_text("a user's")
    elsewhere = tmp_path / left.parent.name.replace(".file.", ".file.0")[: len(left.parent.name)]
    elsewhere.mkdir()
    with replace_file(path) as partial:  # this process is alive, and so is its folder
        write_bytes(path, b"in between")
        assert partial.parent.is_dir()
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert not left.parent.exists()
    names = sorted(os.listdir(tmp_path))
    assert [name_of_partial(name) for name in names if name.startswith(".other")] == ["other"]
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted({".file.partial", "file", elsewhere.name})


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    left = leave_partial(tmp_path / "file", b"half").parent
    (left / "file").unlink()
    left.rmdir()
    left.symlink_to(victim)
    write_bytes(tmp_path / "file", b"whole")
    assert (victim / "file").read_text() == "precious"


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([k]) * 100_000 for k in range(8)]
    threads = [
        threading.Thread(target=lambda c=content: [write_bytes(path, c) for _ in range(20)])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow above 64 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("library", ["python", "safetensors", "numpy"])
def test_a_full_disk(tmp_path: Path, library: str) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    writers = {
        "python": lambda partial: partial.write_bytes(bytes(100_000)),
        "safetensors": lambda partial: save_file({"a": torch.zeros(100_000)}, partial),
        "numpy": lambda partial: np.save(f"{partial}.npy", np.zeros(100_000)),
    }
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(OSError, match=str(path)) as error, replace_file(path) as partial:
        writers[library](partial)
    assert error.value.filename == str(path)
    assert error.value.errno in (errno.EFBIG, errno.EIO)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replace_file(tmp_path / "file"):
        (tmp_path / "elsewhere").read_bytes()


# Locks


def test_a_lock_keeps_a_second_holder_away_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path, subject="The run"):
        with (
            pytest.raises(BlockingIOError, match=f"The run is being .*process {os.getpid()}"),
            hold_lock(path, subject="The run"),
        ):
            pass
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_place_of_a_lock(tmp_path: Path, exists: bool) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    with (
        pytest.raises(OSError, match="A link stands where the lock belongs"),
        hold_lock(tmp_path / "lock", subject="The run"),
    ):
        pass
    assert victim.exists() is exists
    assert (tmp_path / "lock").is_symlink()
    if exists:
        assert victim.read_text() == "precious"


def test_an_unrelated_file_in_place_of_a_lock_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"packages": []}')
    with pytest.raises(FileExistsError, match="Another file"), hold_lock(path, subject="The run"):
        pass
    assert path.read_text() == '{"packages": []}'
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match="lock"), hold_lock(path, subject="The run"):
        pass


def test_the_lock_of_a_killed_process_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import os, sys; from pathlib import Path; from skembed._files import hold_lock\n"
        "with hold_lock(Path(sys.argv[1]), subject='It'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert path.read_text().startswith("process ")
    with hold_lock(path, subject="The run"):
        pass
    assert not path.exists()
