"""Vectors, look-ups and child processes of the cache's tests."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from paths import ROOT
from sklearn.base import BaseEstimator

from skembed.cache.embedding_cache import EmbeddingCache
from skembed.cache.file_store import FileStore

DIM = 16


def make_vectors(n: int, dim: int = DIM, *, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


def find(
    cache: EmbeddingCache, texts: list[str], *, namespace: str = "model", dim: int = DIM
) -> tuple[list[bool], npt.NDArray[np.float32]]:
    """Look texts up in a fresh array of zeros."""
    out = np.zeros((len(texts), dim), dtype=np.float32)
    return cache.lookup(namespace, texts, out).tolist(), out


def integrity(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


def start_python(code: str, *args: object) -> "subprocess.Popen[str]":
    """Start a fresh interpreter that can import skembed."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_all(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Return what each process prints; a failure of any is the test's."""
    results = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [output.strip() for output, _ in results]


def finish(process: "subprocess.Popen[str]") -> str:
    return finish_all([process])[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def file_connection(cache: EmbeddingCache) -> sqlite3.Connection:
    store = cache._store
    assert isinstance(store, FileStore)
    return store._connect()


class Holder(BaseEstimator):
    def __init__(self, cache: object = None) -> None:
        self.cache = cache
