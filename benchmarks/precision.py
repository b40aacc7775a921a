"""What bfloat16 costs in exactness, and how far a text's vector depends on its company.

Run: python benchmarks/precision.py [--texts 2000] [--draws 10]
skembed-mini in float32 against bfloat16: cosine of the vectors of real texts, and the change of
three evaluation scores: STS-B test (Spearman of cosine), Banking77 with 8 examples a class (mean
accuracy of LogisticRegression over draws), Cranfield (nDCG@10). Then for both types the largest
difference between a text embedded with others and alone, shuffled, in a part, or in small batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from _common import cosines, load_texts, make_parser, read_rows, start
from _results import Figure, finish
from quality import ndcg, score_classification, score_sts

from skembed import NVEmbedVectorizer

DTYPES = ("float32", "bfloat16")
MIN_COSINE = 0.999
MAX_POINTS = 0.2
INVARIANCE = {"float32": 1e-5, "bfloat16": 5e-3}


def score_retrieval(vectorizer: NVEmbedVectorizer, data: Path, name: str) -> float:
    """Return 100 times nDCG@10 of cosine search."""
    corpus, queries, qrels = (
        read_rows(data, name, part) for part in ("corpus", "queries", "qrels")
    )
    relevant: dict[str, dict[str, float]] = {}
    for row in qrels:
        if float(row["score"]) > 0:
            relevant.setdefault(str(row["query_id"]), {})[str(row["doc_id"])] = float(row["score"])
    queries = [row for row in queries if str(row["id"]) in relevant]
    ids = [str(row["id"]) for row in corpus]
    documents = vectorizer.encode_document(
        [f"{row.get('title') or ''} {row.get('text') or ''}".strip() for row in corpus]
    )
    scores = vectorizer.encode_query([row["text"] for row in queries]) @ documents.T
    top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    gains = [
        ndcg([ids[i] for i in best], relevant[str(row["id"])])
        for row, best in zip(queries, top, strict=True)
    ]
    return 100 * float(np.mean(gains))


def score_all(vectorizer: NVEmbedVectorizer, args: Any) -> dict[str, float]:
    """Return the three scores, in points."""
    embed = vectorizer.transform
    return {
        "STS-B test, Spearman": 100 * score_sts(args.data, "sts/stsb", embed),
        "Banking77 8-shot, accuracy": 100
        * score_classification(args.data, "classification/banking77", embed, args.draws),
        f"{args.retrieval}, nDCG@10": score_retrieval(
            vectorizer, args.data, f"retrieval/{args.retrieval}"
        ),
    }


def measure_invariance(dtype: str, texts: list[str], together: np.ndarray) -> dict[str, float]:
    """Return the largest difference of a component from `together`, for other companies."""
    rng = np.random.default_rng(1)
    vectorizer = NVEmbedVectorizer(cache=None, dtype=dtype)
    some = rng.choice(len(texts), size=min(100, len(texts)), replace=False)
    shuffled = rng.permutation(len(texts))
    part = np.sort(rng.choice(len(texts), size=len(texts) // 3, replace=False))
    alone = np.vstack([vectorizer.transform([texts[i]]) for i in some])
    gaps = {
        "alone": alone - together[some],
        "shuffled": vectorizer.transform([texts[i] for i in shuffled]) - together[shuffled],
        "a third of them": vectorizer.transform([texts[i] for i in part]) - together[part],
    }
    vectorizer.set_params(batch_tokens=600)
    gaps["batches of 600 tokens"] = vectorizer.transform(texts) - together
    return {name: float(np.abs(gap).max()) for name, gap in gaps.items()}


def main() -> int:
    """Measure, write the result, and return the exit status."""
    parser = make_parser(__doc__, texts=2_000)
    parser.add_argument("--draws", type=int, default=10, help="draws of training texts")
    parser.add_argument("--retrieval", default="cranfield", help="retrieval set; also: scifact")
    args = start(parser)
    texts = load_texts(args.data, args.texts)
    vectors, scores, gaps = {}, {}, {}
    for dtype in DTYPES:
        print(f"{dtype} ...", flush=True)
        vectorizer = NVEmbedVectorizer(cache=None, dtype=dtype)
        vectors[dtype] = vectorizer.transform(texts)
        gaps[dtype] = measure_invariance(dtype, texts, vectors[dtype])
        scores[dtype] = score_all(vectorizer, args)
    cosine = cosines(vectors["float32"], vectors["bfloat16"])
    moved = {name: scores["bfloat16"][name] - scores["float32"][name] for name in scores["float32"]}
    figures = [Figure("smallest cosine of bfloat16 to float32", float(cosine.min()), MIN_COSINE)]
    figures += [
        Figure(f"{name}: points moved", abs(points), MAX_POINTS, at_least=False)
        for name, points in moved.items()
    ]
    figures += [
        Figure(f"{dtype}: largest change with the batch", max(gaps[dtype].values()), bar, False)
        for dtype, bar in INVARIANCE.items()
    ]
    values = {
        "texts": len(texts),
        "cosine": {
            "min": float(cosine.min()),
            "p1": float(np.percentile(cosine, 1)),
            "mean": float(cosine.mean()),
        },
        "largest difference of a component": float(
            np.abs(vectors["float32"] - vectors["bfloat16"]).max()
        ),
        "scores, points": {
            name: {
                "float32": round(scores["float32"][name], 3),
                "bfloat16": round(scores["bfloat16"][name], 3),
                "moved": round(moved[name], 3),
            }
            for name in moved
        },
        "largest change with the batch": gaps,
    }
    title = "bfloat16 against float32, and batch invariance"
    return finish("precision", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
