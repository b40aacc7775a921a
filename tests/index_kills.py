"""Run by search/test_index_file.py: kills `Retriever.save` before each change of the disk.

python index_kills.py FOLDER
    Saves an index into a new folder and over another one, killed before change 0, 1, ... until a
    save comes to its end. After each kill the folder holds what it held or the new index, and the
    next save leaves nothing but its own files. Prints how many kills there were.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from saved_indexes import load_and_search, read_manifest, save_index, search

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def save_and_die(kind: str, folder: Path, step: int) -> None:
    """Save in this process, which is killed before its change number `step`."""
    retriever = save_index(kind, folder.parent / f"child-{os.getpid()}", seed=1)
    left = [step]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    retriever.save(folder)


def main(root: Path) -> None:
    torch.set_num_threads(1)  # forks must not share threads
    kind = "int8+float32"
    new = search(save_index(kind, root / "new", seed=1))
    old = search(save_index(kind, root / "old", seed=0))
    kills = {"new": 0, "old": 0, "litter": 0}
    for there in ("new", "old"):
        step, status = 0, -1
        while status:
            folder = root / f"{there}{step}"
            if there == "old":
                shutil.copytree(root / "old", folder)
            pid = os.fork()
            if not pid:
                save_and_die(kind, folder, step)
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            assert status in (0, signal.SIGKILL), status
            if there == "old" or (folder / "manifest.json").exists():
                assert load_and_search(folder) in ([new] if there == "new" else [old, new])
            litter = {path.name for path in folder.glob("*")} if folder.exists() else set()
            save_index(kind, folder, seed=2)
            names = {path.name for path in folder.iterdir()}
            files = {entry["file"] for entry in read_manifest(folder)["files"].values()}
            assert names == {"manifest.json", *files}, names
            kills["litter"] += len(litter) > 1
            step += 1
        kills[there] = step - 1
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
