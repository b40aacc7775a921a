"""Run by search/test_hnsw.py: graphs with changed bytes and no checksum, in a process that may die.

python graph_fuzz.py FIRST LAST
    Changes a graph for each seed, reads it, and uses what is read: searches, removes, adds, saves.
    Prints how many graphs were read and how many refused.
"""

import json
import random
import sys

import numpy as np
from fuzz import mutate

from skembed.search.hnsw import HnswGraph
from skembed.search.stored_vectors import StoredVectors

N, DIM = 300, 16
EXTREMES = (0, 1, 31, 32, 33, 255, 299, 300, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def make_graph() -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return a graph with two free nodes, its labels, and its vectors."""
    vectors = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    labels = np.arange(N, dtype=np.int64) * 3
    graph = HnswGraph(DIM)
    graph.add(labels, StoredVectors.encode(vectors, "float32"))
    graph.remove(labels[[5, 9]])
    return graph.to_array().tobytes(), np.delete(labels, [5, 9]), vectors


def change(data: bytes, seed: int) -> bytes:
    """Return other bytes: anything for one seed in four, else some numbers behind the vectors."""
    if seed % 4 == 0:
        return mutate(data, seed)
    random_, changed = random.Random(seed), bytearray(data)
    start = 8 if seed % 4 == 1 else 8 + 2 * N * DIM + (0 if seed % 4 == 2 else 104 + 2 * N)
    for _ in range(random_.choice((1, 1, 3, 30))):
        place = random_.randrange(start, len(data) - 4)
        if seed % 8 < 4:
            changed[place] ^= 1 << random_.randrange(8)
        else:
            size = random_.choice((1, 2, 4))
            value = random_.choice(EXTREMES) % 256**size
            changed[place : place + size] = value.to_bytes(size, "little")
    return bytes(changed)


def use(graph: HnswGraph, labels: np.ndarray, vectors: np.ndarray) -> None:
    """Do with a graph what a retriever does."""
    for k in (1, 10, N):
        found = graph.search(vectors[:40], k)
        assert {*found.ravel().tolist()} <= {-1, *labels.tolist()}
    graph.remove(labels[::7])
    graph.add(np.arange(2_000, 2_060), StoredVectors.encode(vectors[:60], "float32"))
    graph.search(vectors, 20)
    graph.to_array()


def main(first: int, last: int) -> None:
    data, labels, vectors = make_graph()
    counts = {"read": 0, "refused": 0}
    for seed in range(first, last):
        changed = np.frombuffer(change(data, seed), dtype=np.uint8)
        try:
            graph = HnswGraph.read(changed, DIM, labels)
        except ValueError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        use(graph, labels, vectors)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
