"""Embeddings as int8 and bits: memory, recall of the exact search, and time, beside the peer's.

Run: python benchmarks/quantization.py [--texts 5500] [--queries 500] [--documents 200000]
Recall on real texts embedded by skembed-mini: the share of the exact best k that a search among
codes finds, with and without rescoring. The peer is sentence-transformers: `quantize_embeddings`
with ranges learned from the documents, and `semantic_search_usearch` (exact, its rescoring on,
which decodes the stored codes) with the same oversampling; it has no finer copy to rescore from, so
that row of ours stands alone. Needs usearch for the peer.

Time and memory on random unit vectors, both sides in turn: encoding all documents, and searching
them. Bars: int8 finds at least 98 % of the exact results, and no fewer than the peer's int8; bits
with an int8 copy find at least 95 %; memory 4 and 32 times smaller. Bits alone find as many as the
peer's, within the noise of some hundred queries: that figure has no bar.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from _common import compare, load_texts, make_parser, seconds, skip, start
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.estimators.quantization import EmbeddingQuantizer

Vectors = np.ndarray
PEER_PRECISION = {"int8": "int8", "binary": "ubinary"}


def make_vectors(n: int, dim: int, seed: int) -> Vectors:
    """Return random unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def find_exactly(queries: Vectors, corpus: Vectors, k: int) -> Vectors:
    """Return the rows of the k highest dot products."""
    return np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :k]


def measure_recall(found: Vectors, exact: Vectors) -> float:
    """Return the share of the exact rows that were found."""
    shared = sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True))
    return shared / exact.size


class Peer:
    """Codes and search of sentence-transformers; the time of building its index is left out."""

    def __init__(self, precision: str, calibration: Vectors) -> None:
        try:
            from sentence_transformers.util import quantization
        except ImportError as error:
            skip(f"{error}. The peers come with the extra: pip install skembed[bench]")
        self.functions = quantization
        self.precision = PEER_PRECISION[precision]
        self.calibration = calibration
        self.index: Any = None

    def encode(self, vectors: Vectors) -> Vectors:
        """Return codes, with ranges of the documents."""
        return self.functions.quantize_embeddings(
            vectors, precision=self.precision, calibration_embeddings=self.calibration
        )

    def search(self, queries: Vectors, codes: Vectors, k: int, rescore: int) -> Vectors:
        """Return the rows found; usearch, every document compared."""
        stored = (
            {"corpus_embeddings": codes} if self.index is None else {"corpus_index": self.index}
        )
        hits, _, self.index = self.functions.semantic_search_usearch(
            queries,
            **stored,
            corpus_precision=self.precision,
            top_k=k,
            calibration_embeddings=self.calibration,
            rescore_multiplier=rescore,
            exact=True,
            output_index=True,
        )
        return np.array([[hit["corpus_id"] for hit in row] for row in hits])


def compare_recall(corpus: Vectors, queries: Vectors, k: int, rescore: int) -> dict[str, float]:
    """Return the recall of each way to search."""
    exact, found = find_exactly(queries, corpus, k), {}
    fine = EmbeddingQuantizer("int8").fit(corpus)
    pair = (fine, fine.transform(corpus))
    for precision in PEER_PRECISION:
        quantizer = EmbeddingQuantizer(precision).fit(corpus)
        codes = quantizer.transform(corpus)
        ways: dict[str, Any] = {"": None, ", rescored from float32": corpus}
        if precision == "binary":
            ways[", rescored from int8"] = pair
        for name, finer in ways.items():
            rows = quantizer.search(queries, codes, k, finer=finer, rescore=rescore).indices
            found[f"{precision}{name}"] = measure_recall(rows, exact)
        peer = Peer(precision, corpus)
        rows = peer.search(queries, peer.encode(corpus), k, rescore)
        found[f"{precision}, sentence-transformers"] = measure_recall(rows, exact)
    return found


def compare_times(args: Any) -> dict[str, Any]:
    """Return times of encoding and searching random vectors, and the bytes of their codes."""
    corpus = make_vectors(args.documents, args.dim, seed=0)
    queries = make_vectors(args.queries, args.dim, seed=1)
    values: dict[str, Any] = {"float32, bytes a vector": corpus.nbytes / len(corpus)}
    for precision in PEER_PRECISION:
        quantizer, peer = (
            EmbeddingQuantizer(precision).fit(corpus),
            Peer(precision, corpus[:10_000]),
        )
        codes, theirs = quantizer.transform(corpus), peer.encode(corpus)

        def search_ours(q: EmbeddingQuantizer = quantizer, codes: Vectors = codes) -> object:
            return q.search(queries, codes, args.top_k)

        def search_theirs(peer: Peer = peer, codes: Vectors = theirs) -> object:
            return peer.search(queries, codes, args.top_k, 1)

        search_theirs()  # builds its index
        encode: tuple[Callable[[], object], Callable[[], object]] = (
            lambda q=quantizer: q.transform(corpus),
            lambda peer=peer: peer.encode(corpus),
        )
        sides = ("skembed", "sentence-transformers")
        values[precision] = {
            "bytes a vector": codes.nbytes / len(corpus),
            "fit_s": seconds(lambda p=precision: EmbeddingQuantizer(p).fit(corpus)),
            "encode": compare(sides, *encode, repeats=args.repeats).to_dict(len(corpus)),
            "search": compare(sides, search_ours, search_theirs, repeats=args.repeats).to_dict(
                len(queries)
            ),
        }
    return values


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=5_500)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--documents", type=int, default=200_000, help="random vectors, for times")
    parser.add_argument("--dim", type=int, default=384, help="of the random vectors")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--rescore", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = start(parser)
    texts = load_texts(args.data, args.texts + args.queries)
    vectors = NVEmbedVectorizer(cache=None).transform(texts)
    corpus, queries = vectors[args.queries :], vectors[: args.queries]
    recall = compare_recall(corpus, queries, args.top_k, args.rescore)
    times = compare_times(args)
    bars = {"int8": 0.98, "binary, rescored from int8": 0.95}
    figures = [
        Figure(f"{name}: recall@{args.top_k}", value, bars.get(name))
        for name, value in recall.items()
    ]
    figures += [
        Figure(
            f"{precision}: recall beyond sentence-transformers in the same bytes",
            recall[precision] - recall[f"{precision}, sentence-transformers"],
            0.0 if precision == "int8" else None,
        )
        for precision in PEER_PRECISION
    ]
    for precision, factor in (("int8", 4), ("binary", 32)):
        smaller = times["float32, bytes a vector"] / times[precision]["bytes a vector"]
        figures.append(Figure(f"{precision}: times smaller", smaller, factor))
        for task in ("encode", "search"):
            name = f"{precision}: {task}, times as fast as sentence-transformers"
            figures.append(Figure(name, times[precision][task]["ratio"]))
    values = {
        "texts": len(corpus),
        "queries": len(queries),
        "candidates for each result": args.rescore,
        "recall": {name: round(value, 4) for name, value in recall.items()},
        "random vectors": args.documents,
        **times,
    }
    title = "Embeddings as int8 and bits: memory, recall and time"
    return finish("quantization", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
