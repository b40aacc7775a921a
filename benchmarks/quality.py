"""Scores of skembed-mini on the evaluation sets, beside all-MiniLM-L6-v2 and TF-IDF.

Run: python benchmarks/quality.py [--models skembed-mini minilm tfidf] [--only stsb sickr]
Protocols follow MTEB: classification, 8 examples per class, logistic regression, mean accuracy of
10 draws; clustering, V-measure of mini-batch k-means over 5 seeds; STS, Spearman correlation of the
cosine; reranking, mean average precision; retrieval, nDCG@10. No instruction on any side.
Only test splits are scored; nothing here chooses anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _common import load_minilm, make_parser, read_rows, start
from _results import Figure, finish
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score
from sklearn.pipeline import make_pipeline

from skembed import NVEmbedVectorizer

Embed = Callable[[list[str]], np.ndarray]
MIN_STSB = 72.0
MAX_TEST_ROWS = 4_000
MAX_CLUSTERED = 10_000
TASKS = {
    "classification": (
        "ag_news",
        "amazon_counterfactual_en_ext",
        "banking77",
        "hwu64",
        "sst2",
        "tweet_emotion",
    ),
    "clustering": ("stackoverflow_titles",),
    "sts": ("stsb", "sickr"),
    "reranking": ("climate_fever", "trecqa"),
    "retrieval": ("scifact", "cranfield"),
}


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def score_classification(data: Path, name: str, embed: Embed) -> float:
    """Mean accuracy of 10 draws of 8 examples per class."""
    rng = np.random.default_rng(42)
    train, test = read_rows(data, name, "train"), read_rows(data, name, "test")
    test = [test[i] for i in rng.permutation(len(test))[:MAX_TEST_ROWS]]
    labels = np.array([row["label"] for row in train])
    gold = np.array([row["label"] for row in test])
    draws = [
        np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:8] for c in set(labels)])
        for _ in range(10)
    ]
    used = np.unique(np.concatenate(draws))
    vectors = embed([train[i]["text"] for i in used] + [row["text"] for row in test])
    train_vectors = np.zeros((len(train), vectors.shape[1]), np.float32)
    train_vectors[used] = vectors[: len(used)]
    accuracies = [
        LogisticRegression(max_iter=100, random_state=42)
        .fit(train_vectors[draw], labels[draw])
        .score(vectors[len(used) :], gold)
        for draw in draws
    ]
    return float(np.mean(accuracies))


def score_clustering(data: Path, name: str, embed: Embed) -> float:
    """Mean V-measure over 5 seeds with the true number of clusters."""
    rows = read_rows(data, name, "test")
    chosen = np.random.default_rng(42).permutation(len(rows))[:MAX_CLUSTERED]
    labels = [rows[i]["label"] for i in chosen]
    vectors = embed([rows[i]["text"] for i in chosen])
    scores = []
    for seed in range(5):
        kmeans = MiniBatchKMeans(len(set(labels)), batch_size=512, n_init="auto", random_state=seed)
        scores.append(v_measure_score(labels, kmeans.fit_predict(vectors)))
    return float(np.mean(scores))


def score_sts(data: Path, name: str, embed: Embed) -> float:
    """Spearman correlation of cosine and gold score."""
    rows = read_rows(data, name, "test")
    texts = [row[side] for side in ("sentence1", "sentence2") for row in rows]
    first, second = np.split(unit(embed(texts)), 2)
    return float(spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic)


def score_reranking(data: Path, name: str, embed: Embed) -> float:
    """Mean average precision of candidates ordered by cosine."""
    rows = [r for r in read_rows(data, name, "test") if r["positive"] and r["negative"]]
    documents = sorted({d for r in rows for d in [*r["positive"], *r["negative"]]})
    position = {document: i for i, document in enumerate(documents)}
    vectors = unit(embed(documents + [row["query"] for row in rows]))
    precisions = []
    for row, query in zip(rows, vectors[len(documents) :], strict=True):
        candidates = [*row["positive"], *row["negative"]]
        relevant = [1] * len(row["positive"]) + [0] * len(row["negative"])
        scores = vectors[[position[d] for d in candidates]] @ query
        precisions.append(average_precision_score(relevant, scores))
    return float(np.mean(precisions))


def score_retrieval(data: Path, name: str, embed: Embed) -> float:
    """nDCG@10 with linear gains, documents as title and text."""
    corpus, queries = read_rows(data, name, "corpus"), read_rows(data, name, "queries")
    relevant: dict[str, dict[str, float]] = {}
    for row in read_rows(data, name, "qrels"):
        if float(row["score"]) > 0:
            relevant.setdefault(str(row["query_id"]), {})[str(row["doc_id"])] = float(row["score"])
    queries = [query for query in queries if str(query["id"]) in relevant]
    ids = [str(row["id"]) for row in corpus]
    texts = [f"{row.get('title') or ''} {row.get('text') or ''}".strip() for row in corpus]
    vectors = unit(embed(texts + [query["text"] for query in queries]))
    discounts = 1 / np.log2(np.arange(2, 12))
    gains = []
    for query, vector in zip(queries, vectors[len(corpus) :], strict=True):
        judged = relevant[str(query["id"])]
        best = np.argsort(-(vectors[: len(corpus)] @ vector), kind="stable")[:10]
        found = np.array([judged.get(ids[i], 0.0) for i in best])
        ideal = np.sort(list(judged.values()))[::-1][:10]
        gains.append((found * discounts).sum() / (ideal * discounts[: len(ideal)]).sum())
    return float(np.mean(gains))


SCORERS = {
    "classification": score_classification,
    "clustering": score_clustering,
    "sts": score_sts,
    "reranking": score_reranking,
    "retrieval": score_retrieval,
}


def make_embed(model: str) -> Embed:
    """The function texts -> vectors of a model; TF-IDF is fitted on the texts of the set."""
    if model == "minilm":
        peer = load_minilm()
        return lambda texts: np.asarray(peer.encode(texts), np.float32)
    if model == "tfidf":
        svd = TruncatedSVD(256, random_state=0)
        return lambda texts: make_pipeline(TfidfVectorizer(sublinear_tf=True), svd).fit_transform(
            texts
        )
    return NVEmbedVectorizer(model).transform


def main() -> int:
    """Score the models set by set and write one table."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=["skembed-mini", "minilm", "tfidf"])
    parser.add_argument("--only", nargs="*", help="names of sets")
    args = start(parser)
    values: dict[str, dict[str, float]] = {}
    for model in args.models:
        embed = make_embed(model)
        for task, names in TASKS.items():
            for name in names:
                if args.only and name not in args.only:
                    continue
                started = time.perf_counter()
                score = 100 * SCORERS[task](args.data, f"{task}/{name}", embed)
                values.setdefault(f"{task}/{name}", {})[model] = round(score, 2)
                spent = time.perf_counter() - started
                print(f"{model} {task}/{name}: {score:.2f} ({spent:.0f} s)", flush=True)
    figures = []
    if "skembed-mini" in values.get("sts/stsb", {}):
        figures.append(Figure("STS-B test, Spearman", values["sts/stsb"]["skembed-mini"], MIN_STSB))
    if {"skembed-mini", "minilm"} <= set(args.models):
        shares = [scores["skembed-mini"] / scores["minilm"] for scores in values.values()]
        share = round(100 * float(np.mean(shares)), 1)
        figures.append(Figure("mean share of all-MiniLM-L6-v2's score, %", share, 95.0, aim=True))
    title = "Quality of skembed-mini on the evaluation sets"
    return finish("quality", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
