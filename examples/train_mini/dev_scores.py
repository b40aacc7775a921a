"""Scores on development splits and train folds, to choose by; no test split is read here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from corpus import read_rows
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from skembed.metrics import ndcg_at_k

Embed = Callable[[list[str]], np.ndarray]
DISTRACTORS = 600  # documents without a judged query that join the small SciFact corpus


def read(data: Path, name: str) -> list[dict]:
    """Rows of one file below eval/."""
    return list(read_rows(data / "eval" / f"{name}.jsonl.gz"))


def sts(data: Path, name: str, embed: Embed) -> float:
    """Spearman correlation of the cosine."""
    rows = read(data, name)
    first, second = (embed([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
    return float(spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic)


def few_shot(data: Path, train: str, embed: Embed, held_out: str | None = None) -> float:
    """Accuracy of 8 examples per class; on a development file, or else on the rest of train."""
    rng = np.random.default_rng(0)
    rows = read(data, train)
    rows = [rows[i] for i in rng.permutation(len(rows))[:4_000]]
    held = read(data, held_out) if held_out else rows
    vectors = embed([row["text"] for row in rows])
    others = embed([row["text"] for row in held]) if held_out else vectors
    labels, gold = (np.array([row["label"] for row in part]) for part in (rows, held))
    scores = []
    for _ in range(5):
        picked = np.concatenate(
            [rng.permutation(np.flatnonzero(labels == c))[:8] for c in np.unique(labels)]
        )
        kept = np.ones(len(held), bool)
        if not held_out:
            kept[picked] = False
        head = LogisticRegression(max_iter=100).fit(vectors[picked], labels[picked])
        scores.append(head.score(others[kept], gold[kept]))
    return float(np.mean(scores))


def reranking(data: Path, name: str, embed: Embed) -> float:
    """Mean average precision."""
    rows = [row for row in read(data, name) if row["positive"] and row["negative"]]
    precisions = []
    for row in rows:
        candidates = [*row["positive"], *row["negative"]]
        vectors = embed([row["query"], *candidates])
        gold = [1] * len(row["positive"]) + [0] * len(row["negative"])
        precisions.append(average_precision_score(gold, vectors[1:] @ vectors[0]))
    return float(np.mean(precisions))


def retrieval(data: Path, embed: Embed) -> float:
    """nDCG@10 of SciFact's train queries on their documents and some others."""
    relevant: dict[str, set[str]] = {}
    for row in read(data, "retrieval/scifact/qrels_train"):
        relevant.setdefault(str(row["query_id"]), set()).add(str(row["doc_id"]))
    queries = [
        row for row in read(data, "retrieval/scifact/queries_train") if str(row["id"]) in relevant
    ][::3]
    judged = {doc for row in queries for doc in relevant[str(row["id"])]}
    corpus = read(data, "retrieval/scifact/corpus")
    rng = np.random.default_rng(0)
    others = rng.permutation([i for i, row in enumerate(corpus) if str(row["id"]) not in judged])
    kept = [row for row in corpus if str(row["id"]) in judged]
    kept += [corpus[i] for i in others[:DISTRACTORS]]
    documents = embed([f"{row['title']} {row['text']}" for row in kept])
    scores = embed([row["text"] for row in queries]) @ documents.T
    judged_rows = [[str(d["id"]) in relevant[str(q["id"])] for d in kept] for q in queries]
    return ndcg_at_k(np.array(judged_rows, int), scores)


def dev_scores(data: Path, embed: Embed, *, quick: bool = False) -> dict[str, float]:
    """Every development score in percent; `quick` leaves the longest out."""
    scores = {
        "stsb": sts(data, "sts/stsb/dev", embed),
        "sickr": sts(data, "sts/sickr/trial", embed),
        "banking77": few_shot(data, "classification/banking77/train", embed),
        "hwu64": few_shot(data, "classification/hwu64/train", embed, "classification/hwu64/valid"),
        "emotion": few_shot(
            data, "classification/tweet_emotion/train", embed, "classification/tweet_emotion/val"
        ),
        "trecqa": reranking(data, "reranking/trecqa/dev", embed),
    }
    if not quick:
        scores["scifact"] = retrieval(data, embed)
    return {name: round(100 * score, 2) for name, score in scores.items()}
