"""`evaluate`: protocols by hand, intervals, comparisons, tables, scorers, bad input."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.evaluation import protocols as _protocols
from skembed.evaluation.harness import evaluate
from skembed.evaluation.results import EvaluationError, EvaluationResult
from skembed.evaluation.scorers import (
    clustering_scorer,
    reranking_scorer,
    retrieval_scorer,
    sts_scorer,
)
from skembed.evaluation.task_data import read_task
from skembed.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)
from skembed.exceptions import SkembedWarning
from skembed.metrics.ranking import ndcg_at_k

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")

WORDS = ("cat dog horse", "car train ship", "bread milk salt")


def write_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return n texts of three topics, and their topics."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(len(WORDS), size=n)
    words = [WORDS[topic].split() for topic in topics]
    texts = [f"{rng.choice(own)} {rng.choice(own)} {i % 7}" for i, own in enumerate(words)]
    return texts, [WORDS[topic].split()[0] for topic in topics]


class Words:
    """A transformer with a random vector for each word; notes the sides it is asked for."""

    def __init__(self, dim: int = 16, noise: float = 0.0, seed: int = 0) -> None:
        self.dim, self.noise, self.seed = dim, noise, seed
        self.calls: list[tuple[str, list[str]]] = []

    def _embed(self, texts: list[str], side: str) -> np.ndarray:
        self.calls.append((side, list(texts)))
        return np.array([self._embed_one(text) for text in texts], dtype=np.float32)

    def _embed_one(self, text: str) -> np.ndarray:
        words = [random.Random(f"{self.seed} {word}") for word in text.split()]
        vectors = [[source.gauss(0, 1) for _ in range(self.dim)] for source in words]
        noise = random.Random(f"{self.seed} noise {text}")
        return np.mean(vectors, axis=0) + [self.noise * noise.gauss(0, 1) for _ in range(self.dim)]

    def transform(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "transform")


class TwoSided(Words):
    def encode_query(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "query")

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self._embed(texts, "document")


TEXTS, LABELS = write_texts(90)
TEST, TEST_LABELS = write_texts(40, seed=1)
PAIRS = list(zip(TEXTS[:30], TEXTS[30:60], strict=True))
SCORES = [float(len(set(a.split()) & set(b.split()))) for a, b in PAIRS]
QUERIES = {f"q{i}": text for i, text in enumerate(TEST[:12])}
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS)}
RELEVANCE = {
    query: {d: 1 for d, other in CORPUS.items() if text.split()[0] == other.split()[0]}
    for query, text in QUERIES.items()
}


def make_tasks() -> list[Any]:
    return [
        ClassificationTask(TEXTS, LABELS, test_texts=TEST, test_labels=TEST_LABELS),
        ClusteringTask(TEXTS, LABELS, sample_size=100, n_experiments=5),
        STSTask(PAIRS, SCORES),
        RerankingTask(TEST[:5], [TEXTS[:9]] * 5, [[1, 0, 0] * 3] * 5),
        RetrievalTask(QUERIES, CORPUS, RELEVANCE),
    ]


# The table


def test_one_row_for_each_task_and_vectorizer() -> None:
    result = evaluate({"good": Words(), "bad": Words(noise=3.0)}, make_tasks(), n_bootstraps=50)
    assert len(result) == 10
    assert result.vectorizers == ["good", "bad"]
    assert result.tasks == ["classification", "clustering", "sts", "reranking", "retrieval"]
    assert [row.vectorizer for row in result[:4]] == ["good", "bad", "good", "bad"]
    units = {row.task: (row.unit, row.n) for row in result}
    assert units == {
        "classification": ("draws", 10),
        "clustering": ("draws", 5),
        "sts": ("pairs", 30),
        "reranking": ("queries", 5),
        "retrieval": ("queries", 12),
    }
    for row in result:
        assert row.score == row.metrics[row.metric]
        assert row.low <= row.high
        assert row.seconds > 0 and row.texts_per_s > 0
        assert result.get(row.task, row.vectorizer) is row
    with pytest.raises(KeyError, match="No row of task 'sts' and vectorizer 'ugly'"):
        result.get("sts", "ugly")
    for task in ("classification", "clustering", "retrieval"):
        assert result.get(task, "good").score > result.get(task, "bad").score


def test_table_as_text_and_as_frames() -> None:
    result = evaluate({"a": Words(), "bb": Words(noise=1.0)}, make_tasks(), n_bootstraps=20)
    lines = repr(result).splitlines()
    assert len(lines) == 11
    assert lines[0].split() == [
        *("task", "vectorizer", "metric", "score", "low", "high"),
        *("n", "unit", "seconds", "texts_per_s"),
    ]
    assert lines[2].split()[:3] == ["classification", "bb", "accuracy"]
    assert lines[2].split()[3] == f"{result[1].score:.4f}"
    frame = result.to_frame()
    assert list(frame.columns) == lines[0].split()
    assert frame["score"].tolist() == [row.score for row in result]
    tidy = result.to_frame(all_metrics=True)
    assert list(tidy.columns) == ["task", "vectorizer", "metric", "value"]
    assert len(tidy) == sum(len(row.metrics) for row in result)
    chosen = tidy.query("task == 'sts' and vectorizer == 'bb' and metric == 'euclidean_pearson'")
    assert chosen["value"].tolist() == [result.get("sts", "bb").metrics["euclidean_pearson"]]


def test_the_same_call_gives_the_same_scores() -> None:
    tasks = make_tasks()
    first, again = (evaluate(Words(noise=1.0), tasks, n_bootstraps=30) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert (a.metrics, a.low, a.high) == (b.metrics, b.low, b.high)
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.replicates, b.replicates)
    np.random.seed(7)  # noqa: NPY002 -- what a user's script may have done
    random.seed(7)
    assert [row.score for row in evaluate(Words(noise=1.0), tasks)] == [r.score for r in first]


def test_vectorizers_are_named_by_their_class() -> None:
    task = make_tasks()[2]
    assert evaluate(Words(), task).vectorizers == ["Words"]
    several = evaluate([Words(), TwoSided(), Words(seed=1)], task, n_bootstraps=0)
    assert several.vectorizers == ["Words", "TwoSided", "Words-2"]
    assert several[0].score != several[2].score


def test_sides_go_where_they_belong() -> None:
    sided = TwoSided()
    evaluate(sided, make_tasks(), n_bootstraps=0)
    assert [side for side, _ in sided.calls] == [
        *("transform", "transform"),  # classification: train, test
        "transform",  # clustering
        *("transform", "transform"),  # sts: left, right
        *("query", "document"),
        *("query", "document"),
    ]
    plain = Words()
    assert [r.score for r in evaluate(plain, make_tasks())] == [
        r.score for r in evaluate(sided, make_tasks())
    ]

    class OnlySides:
        encode_query, encode_document = Words().transform, Words().transform

    assert evaluate(OnlySides(), make_tasks()[0]).vectorizers == ["OnlySides"]


def test_time_counts_the_vectorizer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(_protocols.time, "perf_counter", lambda: float(next(clock)))
    row = evaluate(Words(), STSTask(PAIRS, SCORES), n_bootstraps=0)[0]
    assert (row.seconds, row.texts_per_s) == (2.0, 60 / 2)


# Classification


def test_classification_by_hand() -> None:
    row = evaluate(Words(noise=1.5), make_tasks()[0])[0]
    order = list(range(len(TEXTS)))
    vectors, test = Words(noise=1.5).transform(TEXTS), Words(noise=1.5).transform(TEST)
    expected = []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        drawn: list[int] = []
        for i in order:
            if sum(LABELS[j] == LABELS[i] for j in drawn) < 8:
                drawn.append(i)
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit(vectors[drawn], [LABELS[i] for i in drawn])
        expected.append(classifier.score(test, TEST_LABELS))
    assert row.values.tolist() == expected
    assert row.score == np.mean(expected)
    np.testing.assert_allclose([row.low, row.high], np.percentile(expected, [2.5, 97.5]))


def test_pooled_classification_tests_on_what_is_left() -> None:
    task = ClassificationTask(TEXTS, LABELS, samples_per_label=4, n_experiments=3)
    spy = Words(noise=1.5)
    row = evaluate(spy, task)[0]
    assert [texts for _, texts in spy.calls] == [TEXTS], "each text once"
    vectors, labels = Words(noise=1.5).transform(TEXTS), np.array(LABELS)
    draws = read_task(task).draws  # type: ignore[union-attr]
    assert len({tuple(draw) for draw in draws}) == 3
    for value, draw in zip(row.values, draws, strict=True):
        assert len(draw) == 12
        rest = np.delete(np.arange(90), draw)
        classifier = LogisticRegression(max_iter=100).fit(vectors[draw], labels[draw])
        assert value == classifier.score(vectors[rest], labels[rest])


def test_only_what_is_drawn_is_embedded() -> None:
    texts = [f"cat {i}" if i % 2 else f"dog {i}" for i in range(1000)]
    labels = ["cat" if i % 2 else "dog" for i in range(1000)]
    spy = Words()
    task = ClassificationTask(
        texts, labels, test_texts=texts[:10], test_labels=labels[:10], samples_per_label=2
    )
    evaluate(spy, task)
    assert len(spy.calls[0][1]) <= 40


def test_other_classifiers_and_main_scores() -> None:
    nearest = KNeighborsClassifier(1)
    base = {"texts": TEXTS, "labels": LABELS, "test_texts": TEST, "test_labels": TEST_LABELS}
    row = evaluate(Words(noise=1.5), ClassificationTask(**base, classifier=nearest, metric="f1"))[0]
    assert row.metric == "f1" and row.score == row.metrics["f1"] != row.metrics["accuracy"]
    assert not hasattr(nearest, "classes_"), "a clone was fitted"
    assert row.score != evaluate(Words(noise=1.5), ClassificationTask(**base, metric="f1"))[0].score
    with pytest.raises(EvaluationError, match="must be one of .*got 'ap', which needs two labels"):
        evaluate(Words(), ClassificationTask(**base, metric="ap"))


def test_labels_of_any_type_give_the_same_score() -> None:
    binary = [label == "cat" for label in LABELS]
    tested = [label == "cat" for label in TEST_LABELS]

    def score(convert: Any, container: Any = list) -> float:
        task = ClassificationTask(
            TEXTS,
            container([convert(x) for x in binary]),
            test_texts=TEST,
            test_labels=container([convert(x) for x in tested]),
            n_experiments=2,
        )
        row = evaluate(Words(noise=1.0), task)[0]
        assert 0 < row.metrics["ap"] < 1
        return row.score

    expected = score(int)
    assert score(bool) == score(float) == score(np.int8) == expected
    assert score(lambda x: "b" if x else "a") == score(str, pd.Series) == expected
    assert score(str, pl.Series) == score(int, np.array) == expected
    assert score(str, lambda items: pd.Series(items, dtype="category")) == expected
    assert score(str, lambda items: np.array(items, dtype=object)) == expected


# Clustering


def test_clustering_by_hand() -> None:
    from sklearn.cluster import MiniBatchKMeans

    row = evaluate(Words(noise=0.6), ClusteringTask(TEXTS, LABELS, max_fraction=0.5))[0]
    generator = random.Random(42)
    kept = generator.sample(range(90), k=45)
    vectors = Words(noise=0.6).transform([TEXTS[i] for i in kept])
    labels = np.array([LABELS[i] for i in kept])
    expected = []
    for _ in range(10):
        sample = generator.choices(range(45), k=16_384)
        kmeans = MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=42)
        expected.append(v_measure_score(labels[sample], kmeans.fit_predict(vectors[sample])))
    assert row.values.tolist() == expected
    assert row.metrics["v_measure"] == np.mean(expected)
    assert row.metrics["v_measure_std"] == np.std(expected)


def test_levels_that_a_text_does_not_reach() -> None:
    labels = [[label] if i % 4 == 0 else [label, str(i % 2)] for i, label in enumerate(LABELS)]
    base = {"sample_size": 50, "n_experiments": 2}
    both = evaluate(Words(), ClusteringTask(TEXTS, labels, **base))[0]
    assert both.n == 4
    first = evaluate(Words(), ClusteringTask(TEXTS, labels, max_depth=1, **base))[0]
    assert first.values.tolist() == both.values[:2].tolist()
    data = read_task(ClusteringTask(TEXTS, labels, **base))
    rows, found, _ = data.levels[1]  # type: ignore[union-attr]
    assert rows.tolist() == [i for i in range(90) if i % 4]
    assert set(found) == {"0", "1"}


# Pairs and queries


def test_relevance_in_any_form_is_the_same() -> None:
    grades = np.zeros((12, 90), dtype=int)
    for i, found in enumerate(RELEVANCE.values()):
        for document in found:
            grades[i, int(document[1:])] = 1
    rows = [(q, d, g) for q, found in RELEVANCE.items() for d, g in found.items()]
    forms: list[Any] = [
        RELEVANCE,
        {query: list(found) for query, found in RELEVANCE.items()},
        list(RELEVANCE.values()),
        [set(found) for found in RELEVANCE.values()],
        grades,
        pd.DataFrame(rows, columns=["query", "document", "grade"]),
        pl.DataFrame(rows, schema=["query", "document", "grade"], orient="row"),
    ]
    expected = evaluate(Words(), RetrievalTask(QUERIES, CORPUS, RELEVANCE))[0].metrics
    for relevance in forms:
        assert evaluate(Words(), RetrievalTask(QUERIES, CORPUS, relevance))[0].metrics == expected
    lists = RetrievalTask(
        pd.Series(list(QUERIES.values())),
        list(CORPUS.values()),
        RELEVANCE,
        query_ids=list(QUERIES),
        document_ids=np.array(list(CORPUS)),
    )
    assert evaluate(Words(), lists)[0].metrics == expected


def test_search_in_chunks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = RetrievalTask(QUERIES, CORPUS, RELEVANCE, top_k=7)
    # Noise keeps scores apart: the last bit of a product may depend on the size of the block.
    whole = evaluate(Words(noise=0.5), task, n_bootstraps=0)[0].metrics
    monkeypatch.setattr(_protocols, "CHUNK_SIZE", 11)
    monkeypatch.setattr(_protocols, "BLOCK_BYTES", 5 * 4 * 11)
    assert evaluate(Words(noise=0.5), task, n_bootstraps=0)[0].metrics == whole
    assert len(set(whole.values())) > 10


def test_equal_documents_stand_in_descending_order_of_their_ids() -> None:
    corpus = {"d9": "a cat", "d10": "a cat", "d1": "a cat"}
    for relevant, rank in (("d9", 1), ("d10", 2), ("d1", 3)):
        for top_k in (1, 2, 3):
            task = RetrievalTask({"q": "a cat"}, corpus, {"q": [relevant]}, top_k=top_k)
            metrics = evaluate(Words(), task, n_bootstraps=0)[0].metrics
            assert metrics["mrr_at_10"] == (1 / rank if rank <= top_k else 0.0)
    listed = RerankingTask(["a cat"], [["a cat", "a cat", "a car"]], [[1, 0, 0]])
    assert evaluate(Words(), listed, n_bootstraps=0)[0].score == 0.5


def test_documents_have_titles_and_no_space_around_them() -> None:
    spy = Words()
    corpus = {"a": {"title": "Cats", "text": "purr "}, "b": {"title": "", "text": " cars "}}
    evaluate(spy, RetrievalTask({"q": " cats "}, corpus, {"q": ["a"]}), n_bootstraps=0)
    assert spy.calls == [("transform", [" cats "]), ("transform", ["Cats purr", "cars"])]


def test_candidates_as_texts_and_by_id_agree() -> None:
    lists = [[f"d{(5 * i + j) % 90}" for j in range(12)] for i in range(12)]
    by_id = RerankingTask(QUERIES, dict(zip(QUERIES, lists, strict=True)), RELEVANCE, corpus=CORPUS)
    inside = [[RELEVANCE[q].get(d, 0) for d in ids] for q, ids in zip(QUERIES, lists, strict=True)]
    texts = [[CORPUS[d] for d in ids] for ids in lists]
    as_texts = RerankingTask(list(QUERIES.values()), texts, inside)
    found, listed = (evaluate(Words(noise=0.01), task)[0] for task in (by_id, as_texts))
    assert found.metrics["mrr_at_10"] == listed.metrics["mrr_at_10"]
    assert 0 < found.score < listed.score, "by id, positives beyond the candidates count"


def test_a_query_drops_its_own_document() -> None:
    corpus = {"q": "a cat", "d": "a cat or so"}
    task = RetrievalTask({"q": "a cat"}, corpus, {"q": ["d"]}, ignore_identical_ids=True)
    assert evaluate(Words(), task)[0].metrics["mrr_at_1"] == 1.0
    same = RetrievalTask({"q": "a cat"}, corpus, {"q": ["d"]})
    assert evaluate(Words(), same)[0].metrics["mrr_at_1"] == 0.0


def test_judged_documents_outside_the_corpus_count() -> None:
    task = RetrievalTask({"q": "a cat"}, {"d": "a cat"}, {"q": ["d", "elsewhere"]})
    assert evaluate(Words(), task)[0].metrics["recall_at_10"] == 0.5


# Intervals and comparisons


def test_bootstrap_by_hand() -> None:
    row = evaluate(Words(), make_tasks()[4], n_bootstraps=200, confidence=0.8)[0]
    generator = np.random.default_rng(42)
    samples = [generator.integers(12, size=12) for _ in range(200)]
    expected = [row.values[sample].mean() for sample in samples]
    np.testing.assert_array_equal(row.replicates, expected)
    np.testing.assert_allclose([row.low, row.high], np.percentile(expected, [10, 90]))
    assert row.low < row.score < row.high


def test_bootstrap_of_pairs_correlates_each_sample_anew() -> None:
    row = evaluate(Words(), STSTask(PAIRS, SCORES), n_bootstraps=20)[0]
    generator = np.random.default_rng(42)
    from scipy.stats import spearmanr

    for found in row.replicates:
        sample = generator.integers(30, size=30)
        assert found == spearmanr(np.array(SCORES)[sample], row.values[sample])[0]


def test_interval_covers_the_mean_as_often_as_it_says(rng: np.random.Generator) -> None:
    covered = 0
    for _ in range(200):
        values = rng.random(60)
        found = _protocols._bootstrap(60, 200, 0, lambda i, v=values: float(v[i].mean()))
        low, high = np.percentile(found, [10, 90])
        covered += low <= 0.5 <= high
    assert 0.70 < covered / 200 < 0.90


def test_without_bootstraps_there_is_no_interval() -> None:
    result = evaluate({"a": Words(), "b": Words(seed=1)}, make_tasks(), n_bootstraps=0)
    row = result.get("retrieval", "a")
    assert math.isnan(row.low) and math.isnan(row.high) and len(row.replicates) == 0
    draws = result.get("classification", "a")
    assert draws.low <= draws.high, "draws have one anyway"
    assert math.isnan(result.compare("a", "b")[4].wins)


def test_comparison_is_paired() -> None:
    vectorizers = {"good": Words(), "bad": Words(noise=2.0), "same": Words()}
    result = evaluate(vectorizers, make_tasks(), n_bootstraps=100)
    for row in result.compare("good", "same"):
        assert (row.difference, row.low, row.high, row.wins) == (0.0, 0.0, 0.0, 0.5)
    compared = result.compare("good", "bad")
    assert [row.task for row in compared] == result.tasks
    for row in compared:
        good, bad = result.get(row.task, "good"), result.get(row.task, "bad")
        differences = good.replicates - bad.replicates
        assert row.difference == good.score - bad.score
        expected = np.percentile(differences, [2.5, 97.5])
        np.testing.assert_allclose([row.low, row.high], expected, atol=1e-12)
        assert row.wins == np.mean((differences > 0) + (differences == 0) / 2)
    back = result.compare("bad", "good")
    assert [row.difference for row in back] == [-row.difference for row in compared]
    assert repr(compared).splitlines()[1].split()[:4] == [
        "classification", "good", "bad", "accuracy"
    ]  # fmt: skip
    assert compared.to_frame()["wins"].tolist() == [row.wins for row in compared]
    with pytest.raises(KeyError, match="vectorizer 'ugly'"):
        result.compare("good", "ugly")


def test_two_instructions_of_one_model_are_compared() -> None:
    cache = EmbeddingCache()
    vectorizers = {
        "bare": NVEmbedVectorizer(cache=cache),
        "instructed": NVEmbedVectorizer(instruction="STS", cache=cache),
    }
    scores = [len(a + b) % 5 for a, b in PAIRS]
    result = evaluate(vectorizers, [STSTask(PAIRS, scores)], n_bootstraps=20)
    (row,) = result.compare("instructed", "bare")
    assert row.difference != 0 and row.low < row.high
    assert vectorizers["bare"].instruction is None


# Pictures


def test_bar_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    result = evaluate({"a": Words(), "b": Words(noise=1.0)}, make_tasks(), n_bootstraps=20)
    ax = result.plot()
    bars = [bar for bars in ax.containers if hasattr(bars, "patches") for bar in bars]
    heights = [result.get(task, name).score for name in "ab" for task in result.tasks]
    np.testing.assert_allclose([bar.get_height() for bar in bars], heights)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xticklabels()[0].get_text() == "classification\naccuracy"
    ax.figure.canvas.draw()
    pyplot.close(ax.figure)
    _, given = pyplot.subplots()
    assert result.plot(ax=given) is given
    pyplot.close(given.figure)
    broken = EvaluationResult(evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5).rows)
    pyplot.close(broken.plot().figure)


class Constant:
    def transform(self, texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 3))


def test_equal_vectors_score_nan_and_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5)[0]
    assert math.isnan(row.score) and math.isnan(row.low)
    assert "nan" in repr(evaluate(Constant(), STSTask(PAIRS, SCORES), n_bootstraps=5))


# Scorers


@pytest.fixture(scope="module")
def frozen() -> NVEmbedVectorizer:
    return NVEmbedVectorizer(trainer=None, cache=EmbeddingCache())


def test_sts_scorer_in_a_grid_search(frozen: NVEmbedVectorizer) -> None:
    grid = {"truncate_dim": [4, None]}
    search = GridSearchCV(frozen, grid, scoring=sts_scorer, cv=2).fit(PAIRS, SCORES)
    best = search.cv_results_["mean_test_score"]
    assert np.isfinite(best).all() and best[0] != best[1]
    vectors = frozen.transform(PAIRS)
    by_hand = np.einsum("nd,nd->n", vectors[:, :384], vectors[:, 384:])
    from scipy.stats import spearmanr

    expected = spearmanr(SCORES, by_hand)[0]
    assert sts_scorer(frozen, PAIRS, SCORES) == pytest.approx(expected, abs=1e-6)

    class Fitted:
        def predict(self, X: Any) -> list[float]:
            return SCORES

    assert sts_scorer(Fitted(), PAIRS, SCORES) == pytest.approx(1.0)


def test_reranking_scorer_keeps_queries_together(frozen: NVEmbedVectorizer) -> None:
    rows = [(q, t) for q in ("cat dog", "car ship", "milk salt") for t in TEXTS[:12]]
    grades = [int(t.split()[0] in WORDS[i // 12].split()) for i, (_, t) in enumerate(rows)]
    queries = [q for q, _ in rows]
    scores = cross_val_score(
        frozen, rows, grades, groups=queries, cv=GroupKFold(3), scoring=reranking_scorer
    )
    expected = reranking_scorer(frozen, rows, grades)
    assert 0.4 < expected <= 1
    assert scores.mean() == pytest.approx(expected), "the mean over queries, either way"
    shuffled = np.random.default_rng(0).permutation(len(rows))
    again = reranking_scorer(frozen, [rows[i] for i in shuffled], [grades[i] for i in shuffled])
    assert again == pytest.approx(expected)


def test_retrieval_scorer_of_pairs_and_of_a_retriever(frozen: NVEmbedVectorizer) -> None:
    pairs = [(f"about {t}", t) for t in dict.fromkeys(TEXTS[:40])]
    scores = cross_val_score(frozen, pairs, cv=2, scoring=retrieval_scorer)
    assert ((scores > 0.2) & (scores <= 1)).all()
    queries, documents = (list(column) for column in zip(*pairs, strict=True))
    task = RetrievalTask(queries, documents, [[i] for i in range(len(pairs))])
    expected = evaluate(frozen, task, n_bootstraps=0)[0].score
    assert retrieval_scorer(frozen, pairs) == pytest.approx(expected, abs=2e-5)
    twice = [*pairs, ("about " + documents[0], documents[1])]
    assert retrieval_scorer(frozen, twice) != retrieval_scorer(frozen, pairs)

    class Search:
        def search(self, X: list[str], *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
            n = len(X)
            return np.tile([0.9, 0.5], (n, 1)), np.tile([1, 0], (n, 1))

    assert retrieval_scorer(Search(), ["a", "b"], [[1], {0: 2}]) == pytest.approx(
        (1 + ndcg_at_k([[1, 0]], [[0.5, 0.9]])) / 2
    )


def test_clustering_scorer_in_cross_validation(frozen: NVEmbedVectorizer) -> None:
    pipe = make_pipeline(frozen, KMeans(3, n_init=3, random_state=0))
    scores = cross_val_score(pipe, TEXTS, LABELS, cv=2, scoring=clustering_scorer)
    assert ((scores >= 0) & (scores <= 1)).all()
    fitted = pipe.fit(TEXTS)
    assert clustering_scorer(fitted, TEXTS, LABELS) == v_measure_score(
        LABELS, fitted.predict(TEXTS)
    )


class Odd:
    def transform(self, X: Any) -> np.ndarray:
        return np.ones((len(X), 3))


class Finder:
    def search(self, X: Any, *, top_k: int) -> Any:
        raise AssertionError("asked before the entries were counted")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sts_scorer(object(), PAIRS, SCORES), TypeError, "`sts_scorer` needs an estimator"),
        (
            lambda: sts_scorer(Odd(), PAIRS, SCORES),
            ValueError,
            r"returned an array of shape \(30, 3\)",
        ),
        (lambda: clustering_scorer(object(), TEXTS, LABELS), TypeError, "estimator with `predict`"),
        (lambda: retrieval_scorer(Words(dim=4), TEXTS), ValueError, "must hold pairs"),
        (lambda: retrieval_scorer(Finder(), ["a"], [[0], [0]]), ValueError, "a query, 1; got 2"),
        (lambda: retrieval_scorer(Finder(), ["a"]), ValueError, "a query, 1; got None"),
    ],
)
def test_bad_scorers(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Bad input: refused before anything is embedded


BAD_TASKS = [
    (lambda: ClassificationTask([], []), "must hold texts; got none"),
    (lambda: ClassificationTask(TEXTS, LABELS[1:]), r"shape \(90,\), one label a text"),
    (lambda: ClassificationTask(TEXTS, ["one"] * 90), "two different labels; got 1"),
    (lambda: ClassificationTask(TEXTS, [None, *LABELS[1:]]), r"labels\[0\] is of type NoneType"),
    (lambda: ClassificationTask(TEXTS, [0.5, *[1.0] * 89]), "round or bin numbers"),
    (lambda: ClassificationTask(TEXTS, [1, *LABELS[1:]]), "labels of one type"),
    (lambda: ClassificationTask(PAIRS, SCORES), "must hold texts; got pairs"),
    (lambda: ClassificationTask(TEXTS, LABELS, test_texts=TEST), "must be given together"),
    (
        lambda: ClassificationTask(TEXTS, LABELS, test_texts=["a"], test_labels=["new"]),
        "labels that are in `labels`; 1 are not, the first is 'new'",
    ),
    (lambda: ClassificationTask(TEXTS, LABELS, samples_per_label=90), "leave texts to test on"),
    (lambda: ClassificationTask(TEXTS, LABELS, samples_per_label=0), r"an int in \[1, inf\)"),
    (lambda: ClassificationTask(TEXTS, LABELS, metric="auc"), "`metric` parameter of"),
    (lambda: ClassificationTask(TEXTS, LABELS, random_state=-1), "`random_state` parameter of"),
    (lambda: ClusteringTask(TEXTS, ["one"] * 90), "two different labels; got 1"),
    (lambda: ClusteringTask(TEXTS, LABELS, max_fraction=1.5), "`max_fraction` parameter of"),
    (lambda: ClusteringTask(TEXTS, LABELS, max_fraction=0.1, max_texts=5), "must be None where"),
    (lambda: ClusteringTask(TEXTS, [["a"], *LABELS[1:]]), "either labels or lists of labels"),
    (lambda: ClusteringTask(TEXTS, LABELS[1:]), "one label a text, 90; got 89"),
    (lambda: STSTask(TEXTS, SCORES), "must hold pairs of texts; got 90 single texts"),
    (lambda: STSTask(PAIRS, SCORES[1:]), r"numbers of shape \(30,\)"),
    (lambda: STSTask(PAIRS, [1.0] * 30), "two different finite numbers or more; got less"),
    (lambda: STSTask(PAIRS, [math.nan] * 30), "got NaN or infinity"),
    (lambda: RetrievalTask(QUERIES, {}, RELEVANCE), "`corpus` parameter of .* got none"),
    (lambda: RetrievalTask([], CORPUS, RELEVANCE), "`queries` parameter of .* got none"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {"q0": ["d0"]}), "11 of 12 have none, the first is"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {**RELEVANCE, "q1": {}}), "1 of 12 have none"),
    (lambda: RetrievalTask(QUERIES, CORPUS, {**RELEVANCE, "x": {"d0": 1}}), "are of none"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": [0]}), "ids of one type, str or int"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": {"d": 0.5}}), "grades of int; got float"),
    (lambda: RetrievalTask({"q": "a"}, {"d": "a"}, {"q": "d"}), "lists of document ids; got str"),
    (lambda: RetrievalTask(["a"], ["b"], [[0], [0]]), "one entry a query, 1; got 2"),
    (lambda: RetrievalTask(["a"], ["b"], np.ones((1, 2), int)), r"of shape \(1, 1\)"),
    (lambda: RetrievalTask(["a"], ["b"], 3), "a mapping, a sequence, a matrix or a frame"),
    (
        lambda: RetrievalTask(["a", "b"], ["c"], [[0], [0]], query_ids=["x", "x"]),
        r"`query_ids` .* each id once; query_ids\[1\], 'x', is there before",
    ),
    (
        lambda: RetrievalTask(["a"], ["b", "c"], [["x"]], document_ids=["x", "x"]),
        "`document_ids` .* each id once",
    ),
    (lambda: RetrievalTask(["a"], ["b"], [[1]], document_ids=["x", "y"]), "must hold 1 ids"),
    (
        lambda: RetrievalTask(["a"], ["b", "c"], [[1]], document_ids=["x", 1]),
        r"all of one type; document_ids\[1\] is of type int",
    ),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, query_ids=["q"]), "must be None where"),
    (
        lambda: RetrievalTask(["a"], ["b"], pd.DataFrame([(0, 0, 1), (0, 0, 1)])),
        "judge a document once; 0 occurs twice",
    ),
    (lambda: RetrievalTask(["a"], ["b"], pd.DataFrame([(0, 0)])), "three columns"),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, metric="ndcg_at_11"), "`metric`"),
    (lambda: RetrievalTask(QUERIES, CORPUS, RELEVANCE, top_k=0), "`top_k`"),
    (lambda: RerankingTask(["a", "b"], [["c"], []], [[1], []]), "1 have none, the first is 1"),
    (lambda: RerankingTask(["a"], [["c"]], [[1, 0]]), "query 0 has 1 candidates and 2 grades"),
    (lambda: RerankingTask(["a"], [["c"]], [[0.5]]), "grades of int; query 0 has another"),
    (lambda: RerankingTask(["a"], [["c"], ["d"]], [[1]]), "one list a query, 1; got 2"),
    (lambda: RerankingTask(["a"], [["c"]], [[1], [1]]), "one list a query, 1; got 2"),
    (lambda: RerankingTask(["a"], ["c"], [[1]]), "must hold lists; got str"),
    (lambda: RerankingTask(["a"], [["x"]], [["b"]], corpus={"b": "b"}), "unknown or repeated one"),
    (
        lambda: RerankingTask(["a"], [["b", "b"]], [["b"]], corpus={"b": "b"}),
        "unknown or repeated one",
    ),
    (
        lambda: RerankingTask({"q": "a"}, {"r": ["b"]}, {"q": ["b"]}, corpus={"b": "b"}),
        "an entry for every query, and for no other id",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD_TASKS, ids=range(len(BAD_TASKS)))
def test_bad_tasks_are_refused_before_anything_is_embedded(make: Any, message: str) -> None:
    spy, good = Words(), STSTask(PAIRS, SCORES, name="good")
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(spy, [good, make()])
    assert not spy.calls


class Returns:
    """A transformer that returns what it is told."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def transform(self, texts: list[str]) -> Any:
        return self.result(len(texts))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: np.full((n, 2), np.nan), r"finite numbers; .* texts\[0\] is not finite"),
        (lambda n: np.r_[np.ones((n - 1, 2)), [[1, np.inf]]], r"texts\[29\] is not finite"),
        (lambda n: np.ones((n - 1, 2)), r"30 texts into .* got shape \(29, 2\)"),
        (lambda n: np.ones(n), r"array of shape \(30, dim\); got shape \(30,\)"),
        (lambda n: [["a"]] * n, "array of numbers"),
    ],
)
def test_bad_vectors(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate({"mine": Returns(result)}, STSTask(PAIRS, SCORES))
    assert isinstance(caught.value.__cause__, (ValueError, TypeError))


def test_sparse_vectors_and_two_widths() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    with pytest.raises(EvaluationError, match="TypeError: .* got a sparse matrix. Reduce it, for"):
        evaluate(TfidfVectorizer().fit(TEXTS), STSTask(PAIRS, SCORES))
    widths = iter([2, 3])
    uneven = Returns(lambda n: np.ones((n, next(widths))))
    with pytest.raises(EvaluationError, match="ValueError: .* of one width; got 2 and 3"):
        evaluate(uneven, RetrievalTask(QUERIES, CORPUS, RELEVANCE))


# A vectorizer that fails in the middle


class FailsOn(Words):
    """A transformer that fails when it is given a certain text."""

    def __init__(self, text: str, error: BaseException) -> None:
        super().__init__(noise=3.0)
        self.text, self.error = text, error

    def transform(self, texts: list[str]) -> np.ndarray:
        if self.text in texts:
            raise self.error
        return super().transform(texts)


BROKEN_TEXT = "a text that breaks"
THREE_TASKS = [
    STSTask(PAIRS, SCORES, name="first"),
    RetrievalTask({"q": BROKEN_TEXT, **QUERIES}, CORPUS, {"q": ["d0"], **RELEVANCE}, name="second"),
    STSTask(PAIRS[:20], SCORES[:20], name="third"),
]


def test_error_keeps_the_finished_rows_and_its_cause() -> None:
    cause = OSError("disk full")
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, cause), "last": Words(seed=1)}
    with pytest.raises(EvaluationError) as caught:
        evaluate(vectorizers, THREE_TASKS, confidence=0.9, n_bootstraps=50)
    error = caught.value
    assert str(error).startswith("The vectorizer 'bad' failed on the task 'second'")
    assert str(error).endswith("OSError: disk full")
    assert error.__cause__ is cause
    found = [(row.task, row.vectorizer) for row in error.results]
    first = [("first", name) for name in vectorizers]
    assert found == [*first, ("second", "good")]
    assert error.results.confidence == 0.9
    # The same rows as in an undisturbed run, and usable as such.
    whole = evaluate({"good": Words()}, THREE_TASKS, confidence=0.9, n_bootstraps=50)
    for row in (error.results[0], error.results[3]):
        expected = whole.get(row.task, "good")
        assert (row.score, row.low, row.high) == (expected.score, expected.low, expected.high)
    assert [row.task for row in error.results.compare("good", "bad")] == ["first"]
    assert len(EvaluationResult([*error.results, *whole])) == 7


def test_error_before_the_first_row_holds_an_empty_table() -> None:
    broken = FailsOn(PAIRS[0][0], RuntimeError("no model"))
    with pytest.raises(EvaluationError) as caught:
        evaluate({"bad": broken, "good": Words()}, THREE_TASKS)
    results = caught.value.results
    assert len(results) == 0 and results.tasks == []
    assert repr(results).split() == list(EvaluationResult.columns)
    assert results.to_frame().empty
    with pytest.raises(ValueError, match="needs a row to draw"):
        results.plot()
    assert len(EvaluationError("made elsewhere").results) == 0


def test_error_survives_a_pickle() -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(FailsOn(BROKEN_TEXT, OSError("disk full")), THREE_TASKS)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert [row.score for row in again.results] == [row.score for row in caught.value.results]


def test_warning_leaves_the_row_out_and_goes_on() -> None:
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, OSError("disk full"))}
    with pytest.warns(SkembedWarning, match="'bad' failed on the task 'second'.*disk full") as seen:
        result = evaluate(vectorizers, THREE_TASKS, n_bootstraps=50, on_error="warn")
    assert len(seen) == 1 and seen[0].filename == __file__
    rows = [(row.task, row.vectorizer) for row in result]
    both = [(task, name) for task in ("first", "second", "third") for name in vectorizers]
    assert rows == [row for row in both if row != ("second", "bad")]
    assert [row.task for row in result.compare("bad", "good")] == ["first", "third"]
    with pytest.raises(KeyError, match="No row of task 'second' and vectorizer 'bad'"):
        result.get("second", "bad")


def test_bars_leave_a_gap_where_a_row_is_missing() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    vectorizers = {"good": Words(), "bad": FailsOn(BROKEN_TEXT, OSError("disk full"))}
    with pytest.warns(SkembedWarning):
        result = evaluate(vectorizers, THREE_TASKS, n_bootstraps=50, on_error="warn")
    ax = result.plot()
    good, bad = ([bar.get_x() + bar.get_width() / 2 for bar in c] for c in ax.containers[1::2])
    pyplot.close(ax.figure)
    assert np.allclose(good, [-0.2, 0.8, 1.8])
    assert np.allclose(bad, [0.2, 2.2])


def test_warning_for_all_rows_is_an_error() -> None:
    broken = FailsOn(PAIRS[0][0], RuntimeError("no model"))
    with pytest.warns(SkembedWarning), pytest.raises(EvaluationError, match="no model") as caught:
        evaluate(broken, THREE_TASKS[::2], on_error="warn")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_interrupt_stays_an_interrupt(on_error: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(FailsOn(BROKEN_TEXT, KeyboardInterrupt()), THREE_TASKS, on_error=on_error)


def test_bad_calls() -> None:
    task = STSTask(PAIRS, SCORES)
    for bad in ([], {}, {1: Words()}):
        with pytest.raises(TypeError, match="`vectorizers` parameter of `evaluate`"):
            evaluate(bad, task)
    for bad in (object(), Words, "skembed-mini"):
        with pytest.raises(TypeError, match="of `evaluate` must be an object with `transform`"):
            evaluate(bad, task)
    with pytest.raises(ValueError, match="must hold a task; got none"):
        evaluate(Words(), [])
    with pytest.raises(ValueError, match="'sts' occurs more than once. Pass `name=`"):
        evaluate(Words(), [task, task])
    with pytest.raises(TypeError, match="must hold tasks, such as ClassificationTask; got an obj"):
        evaluate(Words(), [task, "STS12"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`confidence` parameter"):
        evaluate(Words(), task, confidence=1.0)
    with pytest.raises(ValueError, match="`n_bootstraps` parameter"):
        evaluate(Words(), task, n_bootstraps=-1)
    with pytest.raises(TypeError, match="`verbose` parameter"):
        evaluate(Words(), task, verbose=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`on_error` parameter of `evaluate` must be one of"):
        evaluate(Words(), task, on_error="ignore")  # type: ignore[arg-type]


def test_repr_of_a_task_shows_no_texts() -> None:
    for task in make_tasks():
        assert repr(task) == f"{type(task).__name__}(name={task.name!r})"
