"""Saved indexes of every kind, and what may happen to their files."""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_vectorizer import unit_rows

from skembed.estimators.retrieval import Retriever
from skembed.search.stored_vectors import STORAGE_KINDS

N, DIM = 60, 24
QUERIES = unit_rows(np.random.default_rng(1), 5, DIM)

# What `Retriever` can store: each kind alone, below each finer copy, and under a graph.
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"storage": kind} for kind in STORAGE_KINDS},
    **{
        f"{kind}+{finer}": {"storage": kind, "rescore_storage": finer}
        for i, kind in enumerate(STORAGE_KINDS)
        for finer in STORAGE_KINDS[:i]
    },
    **{f"hnsw {kind}": {"storage": kind, "algorithm": "hnsw"} for kind in STORAGE_KINDS},
}


def save_index(kind: str, folder: Path, *, n: int = N, seed: int = 0) -> Retriever:
    """Save an index of n documents; every second kind has ids of str."""
    is_text = list(KINDS).index(kind) % 2 == 1
    vectors = unit_rows(np.random.default_rng(seed), n + 1, DIM)
    ids = [f"é{i}" for i in range(n + 1)] if is_text else None
    retriever = Retriever(None, **KINDS[kind]).fit(vectors, ids=ids)
    retriever.remove([ids[3] if ids else 3])  # so that labels are no count, and a node is free
    retriever.save(folder)
    return retriever


def search(retriever: Retriever) -> list[Any]:
    """Return what a retriever finds, comparable with ==."""
    top = retriever.search(QUERIES, 4)
    return [top.scores.tolist(), retriever.ids_[top.indices].tolist()]


def load_and_search(folder: Path, **options: Any) -> list[Any]:
    return search(Retriever.load(folder, **options))


def list_files(folder: Path) -> list[Path]:
    """Return the files of an index that hold arrays."""
    return sorted(folder.glob("*.npy"))


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def sign_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum that fits it, as a forger would."""
    manifest = {name: value for name, value in manifest.items() if name != "crc32"}
    crc32 = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "crc32": crc32}))


def replace_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Put another array in place of one, with checksums that fit it."""
    from skembed.search.saved_array import write_array

    manifest = read_manifest(folder)
    path = folder / manifest["files"][name]["file"]
    path.unlink()
    manifest["files"][name] = write_array(path, array)
    sign_manifest(folder, manifest)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    flip_bit(path, random.Random(path.name[:6]).randrange(8 * path.stat().st_size))


def _flip_last(path: Path) -> None:
    flip_bit(path, 8 * path.stat().st_size - 1)


def _change_shape(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b"'shape': (") + len(b"'shape': (")
    path.write_bytes(content[:place] + b"9" + content[place + 1 :])


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _become_link(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


def _become_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _become_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "grown": _grow,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": _flip,
    "last bit": _flip_last,
    "another shape": _change_shape,
    "a folder": _become_folder,
    "a pipe": _become_pipe,
    "a link out": _become_link,
    "a link to itself": _become_loop,
    "a device": _become_device,
}
