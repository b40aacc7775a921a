"""Scores of skembed-mini on the evaluation sets, beside all-MiniLM-L6-v2 and three plain baselines.

Run: python benchmarks/quality.py [--full] [--models skembed-mini minilm ...] [--only stsb ...]
Protocols follow MTEB (arXiv 2210.07316): classification, 8 examples per class, logistic regression,
mean accuracy of 10 draws on at most 4,000 test rows; clustering, V-measure of mini-batch k-means on
at most 10,000 texts, mean of 5 seeds; STS, Spearman correlation of the cosine; reranking, mean
average precision; retrieval, nDCG@10, a document of the query's own id left out. No instruction on
any side. Only test splits are scored; nothing here chooses anything.

Models: `skembed-mini`; `minilm`, all-MiniLM-L6-v2 through sentence-transformers; `tfidf`, plain
words, and `tfidf-svd`, their 256 first dimensions, both fitted on the texts of the set; and as a
floor `word-vectors`, the mean of skembed-mini's own word vectors, without its layers.

Sets go from the smallest to the largest, each through all models in turn, and every model embeds a
text once. `--keep minilm` takes that column from the results in `--out` instead of computing it; it
keeps its machine and date, and no ratio of speeds is taken with it. So it is by default where it is
there, for the peer's scores do not change and take most of the time; --full computes all columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from _common import load_minilm, make_parser, read_rows, skip, start
from _results import Figure, finish, processor_name
from safetensors.torch import load_file
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer

from skembed import NVEmbedVectorizer
from skembed.model.sources import resolve_source

Matrix = Any  # (n, d): a float array, or sparse rows of plain TF-IDF
Embed = Callable[[list[str]], Matrix]
NAME = "quality"
OURS, PEER, PLAIN = "skembed-mini", "minilm", "tfidf"
MODELS = (OURS, PEER, PLAIN, "tfidf-svd", "word-vectors")
MIN_STSB = 78.0
MIN_SHARE = 95.0  # %, of the peer's score, over all sets
MIN_TYPE_SHARE = 90.0  # %, the same within each type of task
MAX_TEST_ROWS = 4_000
MAX_CLUSTERED = 10_000
MAX_TOKENS = 512  # of the floor, as the vectorizer's default


# Protocols


def draw_rows(rows: list[dict], most: int, rng: np.random.Generator) -> list[dict]:
    """Rows as they are, or a random choice where there are more than `most`."""
    return [rows[i] for i in rng.permutation(len(rows))[:most]] if len(rows) > most else rows


def score_classification(data: Path, name: str, embed: Embed, n_draws: int = 10) -> float:
    """Mean accuracy of some draws of 8 examples per class."""
    rng = np.random.default_rng(42)
    train = read_rows(data, name, "train")
    test = draw_rows(read_rows(data, name, "test"), MAX_TEST_ROWS, rng)
    labels = np.array([row["label"] for row in train])
    gold = np.array([row["label"] for row in test])
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]  # in an order of their own
    draws = [np.concatenate([rng.permutation(c)[:8] for c in classes]) for _ in range(n_draws)]
    used = np.unique(np.concatenate(draws))
    vectors = embed([train[i]["text"] for i in used] + [row["text"] for row in test])
    accuracies = [
        LogisticRegression(max_iter=100, random_state=0)
        .fit(vectors[np.searchsorted(used, draw)], labels[draw])
        .score(vectors[len(used) :], gold)
        for draw in draws
    ]
    return float(np.mean(accuracies))


def score_clustering(data: Path, name: str, embed: Embed) -> float:
    """Mean V-measure over 5 seeds with the true number of clusters."""
    rows = draw_rows(read_rows(data, name, "test"), MAX_CLUSTERED, np.random.default_rng(42))
    labels = np.array([row["label"] for row in rows])
    vectors = embed([row["text"] for row in rows])
    n_clusters = len(np.unique(labels))
    scores = []
    for seed in range(5):
        kmeans = MiniBatchKMeans(n_clusters, batch_size=512, n_init="auto", random_state=seed)
        scores.append(v_measure_score(labels, kmeans.fit_predict(vectors)))
    return float(np.mean(scores))


def score_sts(data: Path, name: str, embed: Embed, part: str = "test") -> float:
    """Spearman correlation of cosine and gold score."""
    rows = read_rows(data, name, part)
    texts = [row[side] for side in ("sentence1", "sentence2") for row in rows]
    vectors = normalize(embed(texts))
    cosines = row_products(vectors[: len(rows)], vectors[len(rows) :])
    return float(spearmanr(cosines, [row["score"] for row in rows]).statistic)


def score_reranking(data: Path, name: str, embed: Embed) -> float:
    """Mean average precision of candidates ordered by cosine."""
    rows = [r for r in read_rows(data, name, "test") if r["positive"] and r["negative"]]
    documents = sorted({d for r in rows for d in [*r["positive"], *r["negative"]]})
    position = {document: i for i, document in enumerate(documents)}
    vectors = normalize(embed(documents + [row["query"] for row in rows]))
    precisions = []
    for k, row in enumerate(rows):
        candidates = [*row["positive"], *row["negative"]]
        relevant = [1] * len(row["positive"]) + [0] * len(row["negative"])
        query = vectors[[len(documents) + k]]
        scores = products(query, vectors[[position[d] for d in candidates]])[0]
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
    ids = np.array([str(row["id"]) for row in corpus])
    texts = [f"{row.get('title') or ''} {row.get('text') or ''}".strip() for row in corpus]
    vectors = normalize(embed(texts + [query["text"] for query in queries]))
    scores = products(vectors[len(corpus) :], vectors[: len(corpus)])
    gains = []
    for query, line in zip(queries, scores, strict=True):
        line[ids == str(query["id"])] = -np.inf
        best = np.argsort(-line, kind="stable")[:10]
        gains.append(ndcg([ids[i] for i in best], relevant[str(query["id"])]))
    return float(np.mean(gains))


def ndcg(found: Sequence[str], judged: Mapping[str, float]) -> float:
    """Discounted gain of the documents found, best first, as a share of the largest possible."""
    discounts = 1 / np.log2(np.arange(2, len(found) + 2))
    gains = np.array([judged.get(document, 0.0) for document in found])
    ideal = np.sort(list(judged.values()))[::-1][: len(found)]
    return float((gains * discounts).sum() / (ideal * discounts[: len(ideal)]).sum())


def products(queries: Matrix, documents: Matrix) -> np.ndarray:
    """All scalar products, dense: (n, d), (m, d) -> (n, m)."""
    scores = queries @ documents.T
    return scores.toarray() if sparse.issparse(scores) else scores


def row_products(left: Matrix, right: Matrix) -> np.ndarray:
    """Scalar product of each row with the same row of the other: (n, d), (n, d) -> (n,)."""
    product = left.multiply(right) if sparse.issparse(left) else left * right
    return np.asarray(product.sum(axis=1)).ravel()


SCORERS = {
    "classification": score_classification,
    "clustering": score_clustering,
    "sts": score_sts,
    "reranking": score_reranking,
    "retrieval": score_retrieval,
}


# Models


def average_word_vectors() -> Embed:
    """The function texts -> means of skembed-mini's word vectors; begin and end are no words."""
    folder = resolve_source(OURS).folder
    state = load_file(folder / "model.safetensors")  # bfloat16, which numpy does not know
    table = state["embedding_model.embed_tokens.weight"].float().numpy()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def embed(texts: list[str]) -> np.ndarray:
        out = np.zeros((len(texts), table.shape[1]), np.float32)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for row, encoding in zip(out, encodings, strict=True):
            if encoding.ids:  # a text without words stays zero
                row[:] = table[encoding.ids].mean(axis=0)
        return normalize(out)

    return embed


def load_model(name: str) -> Embed:
    """The function texts -> vectors of a model."""
    if name == PEER:
        peer = load_minilm()
        return lambda texts: np.asarray(peer.encode(texts), np.float32)
    if name == PLAIN:
        return lambda texts: TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    if name == "tfidf-svd":
        return lambda texts: make_pipeline(
            TfidfVectorizer(sublinear_tf=True), TruncatedSVD(256, random_state=0)
        ).fit_transform(texts)
    if name == "word-vectors":
        return average_word_vectors()
    return NVEmbedVectorizer(name).transform


@dataclass
class Column:
    """One model in a run: vectors of the texts it has seen, scores, and the time it took."""

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    n_texts: int = 0
    seconds: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._vectors: dict[str, np.ndarray] = {}
        self._model: Embed | None = None

    def load(self) -> None:
        """Load the model, and let it embed a few texts: first calls are slow."""
        self._model = load_model(self.name)
        if not self.name.startswith(PLAIN):
            self._model(["A first text.", "Another one, a little longer than the first."])

    def embed(self, texts: list[str]) -> Matrix:
        """Vectors of texts; one that was embedded before is not embedded again.

        TF-IDF is fitted anew: its vectors depend on the set.
        """
        if self.name.startswith(PLAIN):
            return self._time(texts)
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if new:
            self._vectors.update(zip(new, self._time(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def _time(self, texts: list[str]) -> Matrix:
        if self._model is None:
            raise RuntimeError(f"{self.name} is not loaded")
        begin = time.perf_counter()
        vectors = self._model(texts)
        self.seconds += time.perf_counter() - begin
        self.n_texts += len(texts)
        return vectors

    @property
    def rate(self) -> float:
        """Texts per second."""
        return self.n_texts / self.seconds

    def describe(self) -> dict[str, Any]:
        """What a later run with ``--keep`` needs beside the scores."""
        if self.kept:
            return self.kept
        return {
            "texts": self.n_texts,
            "seconds": round(self.seconds, 2),
            "texts_per_s": round(self.rate, 1),
            "processor": processor_name(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "kept": "no",
        }


def has_column(name: str, args: argparse.Namespace) -> bool:
    """Whether an earlier run in `--out` scored a model on all sets of this one."""
    path = args.out / f"{NAME}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores = record.get("values", {}).get("scores", {})
    return all(name in scores.get(s, {}) for s in find_sets(args.data, args.only))


def keep_column(name: str, path: Path, sets: Iterable[str]) -> Column:
    """The column of an earlier run."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values = record.get("values", {})
    found = {s: row[name] for s, row in values.get("scores", {}).items() if name in row}
    missing = [s for s in sets if s not in found]
    if missing or name not in values.get("models", {}):
        sys.exit(f"{path} holds no {name} for {', '.join(missing) or 'its speed'}: run it instead.")
    return Column(name, {s: found[s] for s in sets}, kept={**values["models"][name], "kept": "yes"})


# Sets, shares and the table


def find_sets(data: Path, only: Sequence[str] | None = None) -> list[str]:
    """Every set of the folder, such as ``"sts/stsb"``, the smallest first."""
    found = [path for task in SCORERS for path in sorted((data / "eval" / task).glob("*"))]
    folders = [path for path in found if path.is_dir()]
    if only:
        unknown = set(only) - {path.name for path in folders}
        if unknown:
            sys.exit(f"The data folder has no set {', '.join(sorted(unknown))} under eval/.")
        folders = [path for path in folders if path.name in only]
    if not folders:
        skip("there are no sets under eval/. Pass the data folder as --data, or set SKEMBED_DATA.")
    folders.sort(key=lambda path: sum(file.stat().st_size for file in path.iterdir()))
    return [f"{path.parent.name}/{path.name}" for path in folders]


def shares(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Our share of their scores, %: of the sums, the mean over sets, and of the sums by type."""
    types: dict[str, list[str]] = {}
    for name in ours:
        types.setdefault(name.split("/")[0], []).append(name)

    def of_sums(names: Iterable[str]) -> float:
        names = list(names)
        return 100 * sum(ours[n] for n in names) / sum(theirs[n] for n in names)

    return {
        "all sets": of_sums(ours),
        "mean over sets": float(np.mean([100 * ours[name] / theirs[name] for name in ours])),
        **{task: of_sums(names) for task, names in types.items()},
    }


def list_figures(columns: Mapping[str, Column]) -> list[Figure]:
    """The figures with bars, the shares by type, and the speeds."""
    figures = []
    ours, peer = columns.get(OURS), columns.get(PEER)
    if ours and "sts/stsb" in ours.scores:
        figures.append(Figure("STS-B test, Spearman", ours.scores["sts/stsb"], MIN_STSB))
    if ours and peer:
        share = shares(ours.scores, peer.scores)
        figures += [
            Figure("share of all-MiniLM-L6-v2's scores, %", share.pop("all sets"), MIN_SHARE),
            Figure("the same, mean of the sets' shares, %", share.pop("mean over sets"), MIN_SHARE),
        ]
        weakest = min(share, key=lambda task: share[task])
        figures.append(
            Figure(f"weakest type of task ({weakest}), %", share.pop(weakest), MIN_TYPE_SHARE)
        )
        figures += [Figure(f"{task}, %", value) for task, value in share.items()]
    for name, column in columns.items():
        if not column.kept:
            figures.append(Figure(f"texts/s, {name}", column.rate))
    if ours and peer and not ours.kept and not peer.kept:
        figures.append(Figure("texts/s, skembed-mini over minilm", ours.rate / peer.rate))
    return figures


def score_table(columns: Mapping[str, Column]) -> str:
    """One line a set, one column a model, and the texts per second; the best score is bold."""
    lines = [f"| set | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())).scores:
        row = [column.scores[name] for column in columns.values()]
        cells = [f"**{score:.2f}**" if score == max(row) else f"{score:.2f}" for score in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rates = [
        f"{column.kept['texts_per_s']:,.0f} ({column.kept['date']})"
        if column.kept
        else f"{column.rate:,.0f}"
        for column in columns.values()
    ]
    return "\n".join([*lines, f"| texts/s | {' | '.join(rates)} |"])


def run(args: argparse.Namespace) -> dict[str, Column]:
    """Score every set with every model."""
    sets = find_sets(args.data, args.only)
    columns = {name: Column(name) for name in args.models}
    for name in args.keep:
        columns[name] = keep_column(name, args.out / f"{NAME}.json", sets)
    running = [column for column in columns.values() if not column.kept]
    for column in running:
        column.load()
    for name in sets:
        for column in running:
            begin = time.perf_counter()
            score = 100 * SCORERS[name.split("/")[0]](args.data, name, column.embed)
            column.scores[name] = round(score, 2)
            spent = time.perf_counter() - begin
            print(f"{name}, {column.name}: {score:.2f} ({spent:.0f} s)", flush=True)
    return columns


def main() -> int:
    """Score the models set by set and write one table."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=MODELS, help="columns of the table")
    parser.add_argument("--only", nargs="*", help="names of sets, such as stsb")
    parser.add_argument(
        "--keep", nargs="*", help="models taken from earlier results; default: minilm if it can be"
    )
    args = start(parser, full={"keep": []})
    if args.keep is None:
        args.keep = [PEER] if PEER in args.models and has_column(PEER, args) else []
    columns = run(args)
    sets = next(iter(columns.values())).scores
    values: dict[str, Any] = {
        "scores": {s: {name: c.scores[s] for name, c in columns.items()} for s in sets},
        "models": {name: column.describe() for name, column in columns.items()},
    }
    if {OURS, PLAIN} <= set(columns):
        ahead = [s for s in sets if columns[PLAIN].scores[s] > columns[OURS].scores[s]]
        values["sets where plain TF-IDF is ahead"] = ahead or ["none"]
    title = "Quality of skembed-mini on the evaluation sets"
    status = finish(NAME, title, list_figures(columns), values, args=args)
    page = args.out / f"{NAME}.md"
    table = score_table(columns)
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{table}\n", encoding="utf-8")
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
