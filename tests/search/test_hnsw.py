"""Graphs from bytes: whatever they say, usearch stays within its memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from graph_fuzz import DIM, make_graph
from paths import ROOT

from skembed.search.hnsw import HnswGraph
from skembed.search.stored_vectors import StoredVectors

pytest.importorskip("usearch")


def fuzz(first: int, last: int) -> dict[str, int]:
    """Read and use a changed graph for each seed, in a process of its own."""
    command = [sys.executable, str(ROOT / "tests" / "graph_fuzz.py"), str(first), str(last)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-2_000:])
    return dict(json.loads(run.stdout))


def test_no_graph_kills_the_process() -> None:
    counts = fuzz(0, 50)
    assert counts["refused"] > 10 < counts["read"], counts


@pytest.mark.slow
def test_none_of_many_graphs_kills_the_process() -> None:
    assert sum(fuzz(50, 2_050).values()) == 2_000


@pytest.mark.parametrize("n", [0, 1, 2, 400])
def test_a_graph_is_read_as_it_was(n: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, DIM)).astype(np.float32)
    labels = np.arange(n) + 7
    graph = HnswGraph(DIM)
    graph.add(labels, StoredVectors.encode(vectors, "float32"))
    read = HnswGraph.read(graph.to_array(), DIM, labels)
    for each in (read, pickle.loads(pickle.dumps(read))):
        np.testing.assert_array_equal(each.search(vectors[:9], 3), graph.search(vectors[:9], 3))
    read.remove(labels)
    assert len(HnswGraph.read(read.to_array(), DIM, labels[:0])) == 0


def test_freed_nodes_are_used_again() -> None:
    data, labels, vectors = make_graph()
    graph = HnswGraph.read(np.frombuffer(data, np.uint8), DIM, labels)
    graph.add(np.array([5_000]), StoredVectors.encode(vectors[:1], "float32"))
    labels = np.append(labels, 5_000)
    assert len(HnswGraph.read(graph.to_array(), DIM, labels)) == len(labels)


HEAD = 8 + 2 * 300 * DIM  # where the heads begin


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (HEAD, b"x", "no graph of usearch 2"),
        (HEAD + 7, b"\3", "no graph of usearch 2"),
        (HEAD + 13, b"c", "a graph of another kind"),
        (HEAD + 17, b"\1", "1 of them removed|for 298 documents"),
        (HEAD + 64 + 32, b"\xff\xff", "its entry is not a node"),
        (HEAD + 104, b"\1", "its levels do not fit its size|its entry is not"),
        (HEAD + 104 + 600, b"\1", "its nodes are other documents"),
        (HEAD + 104 + 600 + 8, b"\1", "levels of its nodes contradict"),
        (HEAD + 104 + 600 + 10, b"\x21", "a node leads nowhere"),
        (HEAD + 104 + 600 + 14, b"\xff\xff", "a node leads nowhere"),
    ],
)
def test_what_is_no_graph_is_said(place: int, new: bytes, message: str) -> None:
    data, labels, _ = make_graph()
    data = data[:place] + new + data[place + len(new) :]
    with pytest.raises(ValueError, match=message):
        HnswGraph.read(np.frombuffer(data, dtype=np.uint8), DIM, labels)


def test_a_graph_of_other_documents_is_refused() -> None:
    data, labels, _ = make_graph()
    array = np.frombuffer(data, dtype=np.uint8)
    for other in (labels + 1, labels[1:], np.append(labels, 9_999)):
        with pytest.raises(ValueError, match="other documents|for 29[79] documents"):
            HnswGraph.read(array, DIM, other)
    with pytest.raises(ValueError, match="300 vectors of 32 bytes are not what it holds"):
        HnswGraph.read(array, DIM + 1, labels)
    for size in (0, 8, 50, len(array) // 2, len(array) - 1):
        with pytest.raises(ValueError, match="."):
            HnswGraph.read(array[:size], DIM, labels)
