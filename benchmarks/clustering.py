"""`EmbeddingClusterer` on StackOverflow titles: V-measure, and time from texts to named clusters.

Run: python benchmarks/clustering.py [--full] [--texts 20000] [--bootstraps 5] [--no-peer]
V-measure beside MTEB's protocol on the same vectors with the same k, the number of true labels:
bootstraps of 16,384 rows (--full: ten, as MTEB draws), MiniBatchKMeans(batch_size=512, n_init=1,
random_state=42), the mean of their V-measures. Both sides cluster the same bootstraps; the
clusterer is asked for all texts, too.

Time is that of one call on raw texts, model loaded, cache empty: embed, cluster with the given k,
name; and of a map of the result by UMAP, where umap-learn is installed. Beside it, where it is
installed (`pip install bertopic`), BERTopic with its defaults and embeddings of all-MiniLM-L6-v2,
which it computes itself.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from _common import load_minilm, make_parser, read_rows, start
from _results import Figure, finish
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import v_measure_score

from skembed import EmbeddingCache, EmbeddingMapDisplay, NVEmbedVectorizer
from skembed.estimators.clustering import EmbeddingClusterer

os.environ.setdefault("MPLBACKEND", "Agg")  # the map needs no screen
MAX_POINTS_BELOW = 0.5
MAX_SECONDS = 60.0
MAX_ROWS = 16_384


def draw_rows(n: int, bootstraps: int) -> list[np.ndarray]:
    """Rows of each bootstrap, drawn with replacement as MTEB does."""
    rng = np.random.default_rng(42)
    return [rng.integers(0, n, MAX_ROWS) for _ in range(bootstraps)]


def measure_quality(vectors: np.ndarray, labels: np.ndarray, bootstraps: int) -> dict[str, Any]:
    """V-measures, in percent, of MTEB's clusterer and of ours on the same bootstraps."""
    k = len(set(labels))
    found: dict[str, list[float]] = {"protocol": [], "kmeans": [], "minibatch_kmeans": []}
    for rows in draw_rows(len(labels), bootstraps):
        plain = MiniBatchKMeans(k, batch_size=512, init="k-means++", n_init=1, random_state=42)
        found["protocol"].append(v_measure_score(labels[rows], plain.fit_predict(vectors[rows])))
        for name in ("kmeans", "minibatch_kmeans"):
            clusterer = EmbeddingClusterer(None, clusterer=name, n_clusters=k, random_state=42)
            score = v_measure_score(labels[rows], clusterer.fit_predict(vectors[rows]))
            found[name].append(score)
    return {name: [round(100 * value, 3) for value in values] for name, values in found.items()}


def time_ours(vectorizer: Any, texts: list[str], labels: np.ndarray) -> dict[str, Any]:
    """Seconds of one call, its V-measure and the names it found."""
    vectorizer.transform([f"Is it warm, {i}?" for i in range(64)])  # loads the model
    k = len(set(labels))
    began = time.perf_counter()
    found = EmbeddingClusterer(vectorizer, n_clusters=k, random_state=0).fit(texts)
    spent = time.perf_counter() - began
    score = 100 * v_measure_score(labels, found.labels_)
    names = list(found.cluster_names_.values())
    times = {"seconds": round(spent, 2)}
    if has_packages("umap", "matplotlib"):
        began = time.perf_counter()
        EmbeddingMapDisplay.from_estimator(found, texts)
        times["map_s"] = round(time.perf_counter() - began, 2)
    return {**times, "v_measure": round(score, 3), "names": names}


def has_packages(*names: str) -> bool:
    """Whether all of these can be imported."""
    return all(find_spec(name) is not None for name in names)


def time_choice(vectors: np.ndarray) -> dict[str, Any]:
    """Seconds of choosing the number of clusters, on vectors, and the silhouettes."""
    began = time.perf_counter()
    found = EmbeddingClusterer(None, n_clusters="auto", random_state=0).fit(vectors)
    spent = time.perf_counter() - began
    curve = {str(k): round(value, 4) for k, value in found.silhouettes_.items()}
    return {"seconds": round(spent, 2), "chosen": found.n_clusters_, "silhouettes": curve}


def time_bertopic(texts: list[str], labels: np.ndarray) -> dict[str, Any] | None:
    """Seconds of BERTopic's one call with its defaults; None where it is not installed."""
    try:
        bertopic = import_module("bertopic")
    except ImportError as error:
        print(f"{error}: BERTopic is left out", flush=True)
        return None
    peer = load_minilm()
    peer.encode(texts[:64])
    began = time.perf_counter()
    topics, _ = bertopic.BERTopic(embedding_model=peer).fit_transform(texts)
    spent = time.perf_counter() - began
    outliers = float(np.mean(np.asarray(topics) == -1))
    return {
        "version": bertopic.__version__,
        "seconds": round(spent, 2),
        "v_measure": round(100 * v_measure_score(labels, topics), 3),
        "topics": len(set(topics) - {-1}),
        "outliers_share": round(outliers, 4),
    }


def main() -> int:
    """Measure quality, then time."""
    parser = make_parser(__doc__, texts=20_000)
    parser.add_argument("--bootstraps", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave BERTopic out")
    args = start(parser, full={"bootstraps": 10})
    rows = read_rows(args.data, "clustering/stackoverflow_titles", "test")
    chosen = np.random.default_rng(0).permutation(len(rows))[: args.texts]
    texts = [rows[i]["text"] for i in chosen]
    labels = np.array([rows[i]["label"] for i in chosen])
    # The embeddings of the timed call stay in this cache; what follows reads them.
    vectorizer = NVEmbedVectorizer(cache=EmbeddingCache(), trainer=None)
    ours = time_ours(vectorizer, texts, labels)
    vectors = vectorizer.transform(texts)
    quality = measure_quality(vectors, labels, args.bootstraps)
    peer = None if args.no_peer else time_bertopic(texts, labels)
    means = {name: float(np.mean(scores)) for name, scores in quality.items()}
    gap = means["kmeans"] - means["protocol"]
    n = len(texts)
    figures = [
        Figure("MTEB's protocol: V-measure, %", means["protocol"]),
        Figure("EmbeddingClusterer, kmeans: V-measure, %", means["kmeans"]),
        Figure("EmbeddingClusterer, minibatch_kmeans: V-measure, %", means["minibatch_kmeans"]),
        Figure("kmeans against the protocol, points", gap, -MAX_POINTS_BELOW),
        Figure(f"{n:,} titles to named clusters, s", ours["seconds"], MAX_SECONDS, at_least=False),
    ]
    if "map_s" in ours:
        spent = ours["seconds"] + ours["map_s"]
        name = f"{n:,} titles to named clusters and a map, s"
        figures.append(Figure(name, spent, MAX_SECONDS, at_least=False))
    if peer is not None:
        figures.append(Figure(f"BERTopic, defaults, {n:,} titles, s", peer["seconds"]))
        figures.append(Figure("BERTopic: V-measure of all titles, %", peer["v_measure"]))
    values = {"ours": ours, "choice": time_choice(vectors), "quality": quality}
    values |= {} if peer is None else {"bertopic": peer}
    title = "Clusters of StackOverflow titles"
    return finish("clustering", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
