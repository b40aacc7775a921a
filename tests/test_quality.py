"""The benchmark of quality: its protocols and its table."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from scipy import sparse
from scipy.stats import spearmanr
from scripts import WORDS, import_script, write_rows
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, ndcg_score, v_measure_score


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    yield from import_script(ROOT / "benchmarks", "quality")


# Quality.py: the protocols


def embed(texts: list[str]) -> np.ndarray:
    """Vectors that share a direction where texts share a word; not of unit length."""
    table = {word: np.random.default_rng(i).normal(size=12) for i, word in enumerate(WORDS)}
    rows = []
    for text in texts:
        noise = np.random.default_rng(list(text.encode())).normal(size=12)
        rows.append(noise + sum(table[word] for word in text.split() if word in table))
    return np.array(rows, dtype=np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of each task; the names are those of no real set."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labelled = [{"text": f"{w} {k}", "label": w} for w in WORDS[:4] for k in range(40)]
    labelled = [labelled[i] for i in rng.permutation(len(labelled))]
    write_rows(folder / "eval/classification/topics/train.jsonl.gz", labelled[:100])
    write_rows(folder / "eval/classification/topics/test.jsonl.gz", labelled[100:])
    write_rows(folder / "eval/clustering/groups/test.jsonl.gz", labelled)
    pairs = [
        {"sentence1": f"{a} a", "sentence2": f"{b} b", "score": 5.0 * (a == b) + 0.1 * i}
        for i, a in enumerate(WORDS)
        for b in WORDS
    ]
    write_rows(folder / "eval/sts/pairs/test.jsonl.gz", pairs)
    candidates = [
        {
            "query": f"{w} or {v}",
            "positive": [f"{w} one", f"{w} two"][: 1 + i % 2],
            "negative": [f"{v} {w} no", f"{v} three", "nothing"] if i else [],
        }
        for i, (w, v) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ]
    write_rows(folder / "eval/reranking/answers/test.jsonl.gz", candidates)
    corpus = [{"id": k, "title": WORDS[k % 8], "text": f"part {k}"} for k in range(60)]
    corpus.append({"id": "q0", "title": None, "text": "cat 0"})  # the first query's own text
    queries = [{"id": f"q{k}", "text": f"{WORDS[k]} {k}"} for k in range(8)]
    qrels = [
        {"query_id": f"q{k}", "doc_id": str(k + 8 * j), "score": j % 3}
        for k in range(7)
        for j in range(5)
    ]
    for part, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        write_rows(folder / f"eval/retrieval/search/{part}.jsonl.gz", rows)
    return folder


def read(data: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(data / "eval" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expected_classification(data: Path) -> float:
    train, test = (read(data, f"classification/topics/{part}") for part in ("train", "test"))
    rng = np.random.default_rng(42)
    vectors, gold = embed([r["text"] for r in train]), [r["label"] for r in test]
    labels = [r["label"] for r in train]
    scores = []
    for _ in range(10):
        draw: list[int] = []
        for label in sorted(set(labels)):
            rows = np.array([i for i in range(len(train)) if labels[i] == label])
            draw += list(rng.permutation(rows)[:8])
        head = LogisticRegression(max_iter=100).fit(vectors[draw], [labels[i] for i in draw])
        scores.append(accuracy_score(gold, head.predict(embed([r["text"] for r in test]))))
    return float(np.mean(scores))


def expected_clustering(data: Path) -> float:
    rows = read(data, "clustering/groups/test")
    vectors, labels = embed([row["text"] for row in rows]), [row["label"] for row in rows]
    found = [
        MiniBatchKMeans(4, batch_size=512, n_init="auto", random_state=seed).fit(vectors).labels_
        for seed in range(5)
    ]
    return float(np.mean([v_measure_score(labels, clusters) for clusters in found]))


def expected_sts(data: Path) -> float:
    rows = read(data, "sts/pairs/test")
    left, right = (unit(embed([row[f"sentence{k}"] for row in rows])) for k in (1, 2))
    return float(spearmanr((left * right).sum(1), [row["score"] for row in rows])[0])


def expected_reranking(data: Path) -> float:
    found = []
    for row in read(data, "reranking/answers/test"):
        if row["positive"] and row["negative"]:
            candidates = row["positive"] + row["negative"]
            gold = [text in row["positive"] for text in candidates]
            scores = unit(embed(candidates)) @ unit(embed([row["query"]]))[0]
            found.append(average_precision_score(gold, scores))
    return float(np.mean(found))


def expected_retrieval(data: Path) -> float:
    corpus = read(data, "retrieval/search/corpus")
    qrels = {(r["query_id"], r["doc_id"]): r["score"] for r in read(data, "retrieval/search/qrels")}
    documents = unit(embed([f"{d['title'] or ''} {d['text']}".strip() for d in corpus]))
    found = []
    for query in read(data, "retrieval/search/queries"):
        gold = np.array([qrels.get((query["id"], str(d["id"])), 0) for d in corpus])
        scores = documents @ unit(embed([query["text"]]))[0]
        scores[[str(d["id"]) == query["id"] for d in corpus]] = -2
        if gold.any():
            found.append(ndcg_score([gold], [scores], k=10))
    return float(np.mean(found))


EXPECTED = {
    "classification/topics": expected_classification,
    "clustering/groups": expected_clustering,
    "sts/pairs": expected_sts,
    "reranking/answers": expected_reranking,
    "retrieval/search": expected_retrieval,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_equal_plain_reference_code(quality: ModuleType, data: Path, name: str) -> None:
    score = quality.SCORERS[name.split("/")[0]](data, name, embed)
    assert score == pytest.approx(EXPECTED[name](data), abs=1e-6)
    assert 0.05 < score < 0.999  # neither chance nor saturated: a wrong protocol would show


@pytest.mark.parametrize("name", EXPECTED)
def test_sparse_rows_score_as_dense_ones(quality: ModuleType, data: Path, name: str) -> None:
    scorer = quality.SCORERS[name.split("/")[0]]
    plain = quality.load_model("tfidf")
    assert sparse.issparse(plain(["cat", "dog"]))
    dense = scorer(data, name, lambda texts: plain(texts).toarray())
    # k-means draws its start from the rows in another way where they are sparse.
    tolerance = 0.2 if name.startswith("clustering") else 1e-6
    assert scorer(data, name, plain) == pytest.approx(dense, abs=tolerance)


def test_a_large_test_part_is_cut(
    quality: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MAX_TEST_ROWS", 10)
    monkeypatch.setattr(quality, "MAX_CLUSTERED", 20)
    seen: list[int] = []

    def count(texts: list[str]) -> np.ndarray:
        seen.append(len(set(texts)))
        return embed(texts)

    quality.score_classification(data, "classification/topics", count)
    quality.score_clustering(data, "clustering/groups", count)
    n_train = len({row["text"] for row in read(data, "classification/topics/train")})
    assert seen[0] <= n_train + 10
    assert seen[1] == 20


# Quality.py: the table


def test_shares_are_of_sums_and_of_means(quality: ModuleType) -> None:
    ours = {"sts/a": 40.0, "sts/b": 90.0, "retrieval/c": 10.0}
    theirs = {"sts/a": 80.0, "sts/b": 90.0, "retrieval/c": 20.0}
    share = quality.shares(ours, theirs)
    assert share["all sets"] == pytest.approx(100 * 140 / 190)
    assert share["mean over sets"] == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    assert share["sts"] == pytest.approx(100 * 130 / 170)
    assert share["retrieval"] == pytest.approx(50)


def test_a_text_is_embedded_once(quality: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watch(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return embed(texts)

    monkeypatch.setattr(quality, "load_model", lambda name: watch)
    column = quality.Column("fake")
    column.load()
    n_first = len(seen)
    first = column.embed(["cat", "dog", "cat"])
    second = column.embed(["rain", "dog"])
    assert seen[n_first:] == ["cat", "dog", "rain"]
    assert column.n_texts == 3  # loading is not counted
    np.testing.assert_array_equal(first, embed(["cat", "dog", "cat"]))
    np.testing.assert_array_equal(second, embed(["rain", "dog"]))


def test_the_floor_is_the_mean_of_word_vectors(quality: ModuleType) -> None:
    floor = quality.load_model("word-vectors")
    vectors = floor(["rain snow", "snow rain", "rain", "snow", ""])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)  # order does not count
    np.testing.assert_allclose(np.linalg.norm(vectors[:4], axis=1), 1, rtol=1e-5)
    assert abs(vectors[2] - vectors[3]).max() > 0.01
    assert not vectors[4].any()


def run_quality(quality: ModuleType, patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["quality.py", *arguments])
    return quality.main()


def test_a_run_writes_the_table_and_keeps_a_column(
    quality: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[str] = []

    def load_model(name: str) -> Any:
        loaded.append(name)
        return embed

    monkeypatch.setattr(quality, "load_model", load_model)
    options = [
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--only",
        "pairs",
        "answers",
        "--models",
    ]
    status = run_quality(quality, monkeypatch, *options, "skembed-mini", "minilm")
    assert status == 0  # equal scores: 100 % everywhere; no STS-B in this folder
    record = json.loads((tmp_path / "quality.json").read_text())
    figures = {row["name"]: row for row in record["figures"]}
    assert figures["share of all-MiniLM-L6-v2's scores, %"]["value"] == 100
    assert "texts/s, skembed-mini over minilm" in figures
    assert set(record["values"]["scores"]) == {"sts/pairs", "reranking/answers"}
    page = (tmp_path / "quality.md").read_text()
    assert "| set | skembed-mini | minilm |" in page
    assert "| texts/s |" in page

    loaded.clear()
    status = run_quality(
        quality, monkeypatch, *options, "skembed-mini", "minilm", "--keep", "minilm"
    )
    assert status == 0
    assert loaded == ["skembed-mini"]
    kept = json.loads((tmp_path / "quality.json").read_text())
    assert "texts/s, skembed-mini over minilm" not in {row["name"] for row in kept["figures"]}
    assert "texts/s, minilm" not in {row["name"] for row in kept["figures"]}
    before, after = (r["values"]["models"]["minilm"] for r in (record, kept))
    assert after == {**before, "kept": "yes"}
    assert kept["values"]["scores"] == record["values"]["scores"]

    with pytest.raises(SystemExit, match=r"holds no minilm for sts/x: run it instead"):
        quality.keep_column("minilm", tmp_path / "quality.json", ["sts/x"])


def test_a_set_that_is_not_there_is_named(quality: ModuleType, data: Path) -> None:
    assert sorted(quality.find_sets(data)) == sorted(EXPECTED)
    sizes = [
        sum(file.stat().st_size for file in (data / "eval" / name).iterdir())
        for name in quality.find_sets(data)
    ]
    assert sizes == sorted(sizes)
    with pytest.raises(SystemExit, match="no set nowhere under"):
        quality.find_sets(data, ["pairs", "nowhere"])
