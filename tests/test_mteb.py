"""`evaluate` against mteb's own code, on local tasks of each type, through `MTEBEncoder`."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer, metrics
from skembed.evaluation.harness import evaluate
from skembed.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RerankingTask,
    RetrievalTask,
    STSTask,
)
from skembed.instructions import INSTRUCTIONS
from skembed.mteb import MTEBEncoder, find_task

mteb = pytest.importorskip("mteb", minversion="2.26")
hypothesis = pytest.importorskip("hypothesis")
datasets = pytest.importorskip("datasets")

from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores  # noqa: E402
from mteb.abstasks import (  # noqa: E402
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

st = hypothesis.strategies
drawn = hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)

# Our own little world: subject, verb and object of four topics.
TOPICS = {
    "kitchen": ("cook baker chef", "bakes kneads salts", "bread soup pasta dough"),
    "garden": ("gardener bee mole", "digs waters plants", "roses soil hedges beans"),
    "harbour": ("sailor captain gull", "anchors steers loads", "boats nets crates sails"),
    "office": ("clerk manager printer", "files prints signs", "letters contracts forms bills"),
}
WHEN = ("today", "at dawn", "every week", "in the rain", "once more")


def write_texts(n: int, *, seed: int, stray: bool = False) -> tuple[list[str], list[str]]:
    """Return n texts, some of them equal, with their topics.

    With `stray` subject and object are of any topic, and only the verb tells the text's own.
    """
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(n):
        topic = str(rng.choice(list(TOPICS)))
        who, does, what = (str(rng.choice(words.split())) for words in TOPICS[topic])
        if stray:
            other, another = (TOPICS[str(name)] for name in rng.choice(list(TOPICS), 2))
            who, what = (str(rng.choice(words.split())) for words in (other[0], another[2]))
        texts.append(f"the {who} {does} the {what} {rng.choice(WHEN)}")
        labels.append(topic)
    return texts, labels


TRAIN, TRAIN_LABELS = write_texts(150, seed=1)
TEST, TEST_LABELS = write_texts(80, seed=2)
HARD_TRAIN, HARD_TRAIN_LABELS = write_texts(150, seed=1, stray=True)
HARD_TEST, HARD_TEST_LABELS = write_texts(80, seed=2, stray=True)
NUMBERS = {topic: number for number, topic in enumerate(TOPICS)}

DOCUMENTS = {
    f"d{i}": {"title": label if i % 3 else "", "text": f" {text}. "}
    for i, (text, label) in enumerate(zip(*write_texts(120, seed=3), strict=True))
}
QUERIES = {f"q{i}": text for i, text in enumerate(write_texts(25, seed=4)[0])} | {
    "d7": DOCUMENTS["d7"]["text"]
}


def judge(query: str) -> dict[str, int]:
    """Grade a document by the words it shares with the query; 0 is judged, too."""
    words = set(query.split()) - set(" ".join(WHEN).split()) - {"the"}
    shared = {
        d: len(words & set(item["text"].replace(".", "").split())) for d, item in DOCUMENTS.items()
    }
    grades = {d: n - 1 for d, n in shared.items() if n}
    return grades | {"not in the corpus": 1}


RELEVANCE = {query: judge(text) for query, text in QUERIES.items()}
CANDIDATES = {
    query: [f"d{(7 * i + 11 * j) % 120}" for j in range(30)] for i, query in enumerate(QUERIES)
}
PAIRS = list(zip(write_texts(60, seed=5)[0], write_texts(60, seed=6)[0], strict=True))
PAIR_SCORES = [float(len(set(a.split()) & set(b.split()))) for a, b in PAIRS]


def describe(kind: str, name: str, main_score: str, prompt: Any = None) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        prompt=prompt,
        description="A task of the tests, written for them.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        category="t2t" if kind in ("STS", "Retrieval", "Reranking") else "t2c",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-01-01"),
        domains=["Written"],
        task_subtypes=[],
        license="not specified",
        annotations_creators="derived",
        dialect=[],
        modalities=["text"],
        sample_creation="created",
        bibtex_citation="",
    )


class Local:
    """What all local tasks share: the data is there already."""

    def load_data(self, **_: Any) -> None:
        self.dataset = self.make()  # type: ignore[attr-defined]
        self.data_loaded = True


class Classification(Local, AbsTaskClassification):
    metadata = describe("Classification", "LocalClassification", "accuracy")

    def make(self) -> Any:
        splits = {
            "train": (HARD_TRAIN, HARD_TRAIN_LABELS),
            "test": (HARD_TEST, HARD_TEST_LABELS),
        }
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {"text": texts, "label": [NUMBERS[label] for label in labels]}
                )
                for split, (texts, labels) in splits.items()
            }
        )


class BinaryClassification(Local, AbsTaskClassification):
    metadata = describe("Classification", "LocalBinary", "ap")
    samples_per_label = 5
    n_experiments = 4

    def make(self) -> Any:
        splits = {"train": (TRAIN, TRAIN_LABELS), "test": (TEST, TEST_LABELS)}
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {"text": texts, "label": [int(label < "h") for label in labels]}
                )
                for split, (texts, labels) in splits.items()
            }
        )


class Clustering(Local, AbsTaskClustering):
    metadata = describe("Clustering", "LocalClustering", "v_measure")
    max_fraction_of_documents_to_embed = 0.6
    max_documents_per_cluster = 500

    def make(self) -> Any:
        rows = datasets.Dataset.from_dict({"sentences": TRAIN, "labels": TRAIN_LABELS})
        return datasets.DatasetDict({"test": rows})


class DeepClustering(Local, AbsTaskClustering):
    """Two levels; some texts do not reach the second, some are marked so."""

    metadata = describe("Clustering", "LocalDeepClustering", "v_measure")
    max_fraction_of_documents_to_embed = None
    max_document_to_embed = 70
    max_documents_per_cluster = 300
    n_clusters = 3

    def make(self) -> Any:
        rows = datasets.Dataset.from_dict({"sentences": TRAIN, "labels": DEEP_LABELS})
        return datasets.DatasetDict({"test": rows})


DEEP_LABELS = [
    [NUMBERS[label]] if i % 5 == 0 else [NUMBERS[label], -1 if i % 7 == 0 else i % 3]
    for i, label in enumerate(TRAIN_LABELS)
]


class STS(Local, AbsTaskSTS):
    metadata = describe("STS", "LocalSTS", "cosine_spearman")
    max_score = 9

    def make(self) -> Any:
        left, right = zip(*PAIRS, strict=True)
        rows = {"sentence1": list(left), "sentence2": list(right), "score": PAIR_SCORES}
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})


class Retrieval(Local, AbsTaskRetrieval):
    metadata = describe("Retrieval", "LocalRetrieval", "ndcg_at_10")
    top_ranked: Any = None

    def make(self) -> Any:
        queries = [{"id": query, "text": text} for query, text in QUERIES.items()]
        corpus = [{"id": d, **item} for d, item in DOCUMENTS.items()]
        split = {
            "queries": datasets.Dataset.from_list(queries),
            "corpus": datasets.Dataset.from_list(corpus),
            "relevant_docs": {query: dict(grades) for query, grades in RELEVANCE.items()},
            "top_ranked": self.top_ranked,
        }
        return {"default": {"test": split}}


class RetrievalWithoutItself(Retrieval):
    metadata = describe("Retrieval", "LocalOther", "recall_at_5")
    ignore_identical_ids = True


class Reranking(Retrieval):
    metadata = describe("Reranking", "LocalReranking", "map_at_1000")
    top_ranked = CANDIDATES


TASKS = {
    Classification: ClassificationTask(
        HARD_TRAIN,
        HARD_TRAIN_LABELS,
        test_texts=HARD_TEST,
        test_labels=HARD_TEST_LABELS,
    ),
    BinaryClassification: ClassificationTask(
        np.array(TRAIN),
        [label < "h" for label in TRAIN_LABELS],
        test_texts=TEST,
        test_labels=[label < "h" for label in TEST_LABELS],
        samples_per_label=5,
        n_experiments=4,
        metric="ap",
        name="binary",
    ),
    Clustering: ClusteringTask(TRAIN, TRAIN_LABELS, max_fraction=0.6, sample_size=500),
    DeepClustering: ClusteringTask(
        TRAIN, DEEP_LABELS, max_texts=70, sample_size=300, n_experiments=3, name="deep"
    ),
    STS: STSTask(PAIRS, PAIR_SCORES),
    Retrieval: RetrievalTask(QUERIES, DOCUMENTS, RELEVANCE),
    RetrievalWithoutItself: RetrievalTask(
        QUERIES,
        DOCUMENTS,
        RELEVANCE,
        ignore_identical_ids=True,
        metric="recall_at_5",
        name="other",
    ),
    Reranking: RerankingTask(QUERIES, CANDIDATES, RELEVANCE, corpus=DOCUMENTS),
}


def run_mteb(encoder: Any, task: Any) -> dict[str, Any]:
    """Return mteb's scores of a task."""
    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
    scores: dict[str, Any] = result.task_results[0].scores["test"][0]
    return scores


# Equality


@pytest.fixture(scope="module")
def vectorizer() -> NVEmbedVectorizer:
    """The bundled model, with a cache: a text has one vector on both sides, to the last bit."""
    return NVEmbedVectorizer(cache=EmbeddingCache())


@pytest.mark.parametrize("kind", TASKS, ids=lambda kind: kind.__name__)
def test_scores_equal_mteb(kind: Any, vectorizer: NVEmbedVectorizer) -> None:
    task = TASKS[kind]
    expected = run_mteb(MTEBEncoder(vectorizer), kind())
    row = evaluate(vectorizer, task, n_bootstraps=0)[0]
    assert row.metric == kind.metadata.main_score
    assert row.score == expected["main_score"], "to the last bit"
    assert 0 < row.score < 1, "a score that an error could change"
    for name, value in row.metrics.items():
        # mteb scales the scores of STS first, which moves the last bits of Pearson's correlation.
        assert value == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name


def test_draws_equal_mteb(vectorizer: NVEmbedVectorizer) -> None:
    encoder = MTEBEncoder(vectorizer)
    found = evaluate(vectorizer, [TASKS[Classification], TASKS[DeepClustering]], n_bootstraps=0)
    experiments = run_mteb(encoder, Classification())["scores_per_experiment"]
    assert found[0].values.tolist() == [scores["accuracy"] for scores in experiments]
    assert len(set(found[0].values)) > 1, "draws that differ"
    levels = run_mteb(encoder, DeepClustering())["v_measures"]
    assert found[1].values.tolist() == levels["Level 0"] + levels["Level 1"]


def test_scores_equal_mteb_for_any_transformer() -> None:
    tfidf = make_pipeline(TfidfVectorizer(), TruncatedSVD(20, random_state=0)).fit(TRAIN)
    encoder = MTEBEncoder(tfidf)
    for kind in (Classification, Clustering, STS, Retrieval, Reranking):
        expected = run_mteb(encoder, kind())["main_score"]
        assert evaluate(tfidf, TASKS[kind], n_bootstraps=0)[0].score == expected, kind


def test_ours_is_the_same_each_time_and_mteb_is_not(vectorizer: NVEmbedVectorizer) -> None:
    task, encoder = Clustering(), MTEBEncoder(vectorizer)
    first, again = run_mteb(encoder, task), run_mteb(encoder, task)
    assert first["main_score"] != again["main_score"], "mteb goes on with one generator"
    ours = [evaluate(vectorizer, TASKS[Clustering])[0] for _ in range(2)]
    assert ours[0].score == ours[1].score == first["main_score"]
    assert ours[0].metrics == ours[1].metrics


def test_defaults_are_those_of_mteb() -> None:
    classification, clustering = TASKS[Classification], TASKS[Clustering]
    assert classification.samples_per_label == AbsTaskClassification.samples_per_label
    assert classification.n_experiments == AbsTaskClassification.n_experiments
    assert AbsTaskClassification.evaluator_model.get_params()["max_iter"] == 100
    assert ClusteringTask.sample_size == AbsTaskClustering.max_documents_per_cluster
    assert ClusteringTask.n_experiments == AbsTaskClustering.n_clusters
    assert clustering.random_state == Clustering().seed
    assert tuple(AbsTaskRetrieval.k_values) == metrics.K_VALUES
    assert RetrievalTask.top_k == max(AbsTaskRetrieval.k_values)


# Ranking metrics against mteb's own functions

IDS = [f"d{i}" for i in range(12)]
graded = st.dictionaries(st.sampled_from(IDS), st.integers(0, 3), min_size=1, max_size=6)
scored = st.dictionaries(
    st.sampled_from(IDS),
    st.sampled_from([0.0, 0.25, 0.5, 0.75]) | st.floats(-1, 1, width=32),
    min_size=1,
)


@drawn
@hypothesis.given(
    queries=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(graded, scored), min_size=1)
)
def test_rounded_means_equal_mteb(queries: dict[str, Any]) -> None:
    relevance = {query: grades for query, (grades, _) in queries.items()}
    run = {query: found for query, (_, found) in queries.items()}
    k_values = [1, 3, 5, 10]
    with np.errstate(all="ignore"):  # its abstention scores divide by nothing
        expected = calculate_retrieval_scores(run, relevance, k_values)
    found = metrics.ranking_summary(relevance, run, k_values=k_values)
    names = {
        "ndcg": ("NDCG", expected.ndcg),
        "map": ("MAP", expected.map),
        "recall": ("Recall", expected.recall),
        "precision": ("P", expected.precision),
        "mrr": ("MRR", expected.mrr),
        "hit_rate": ("HitRate", expected.hit_rate),
    }
    for name, (other, values) in names.items():
        for k in k_values:
            value, wanted = found[f"{name}_at_{k}"], values[f"{other}@{k}"]
            assert value == pytest.approx(wanted, abs=1e-15 if name == "mrr" else 0), (name, k)


# The encoder


class Spy:
    """A vectorizer with instructions that notes what it embeds, and how."""

    def __init__(
        self, instruction: str | None = None, document_instruction: str | None = None
    ) -> None:
        self.instruction, self.document_instruction = instruction, document_instruction
        self.calls: list[tuple[str, str | None, str | None]] = []

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "document_instruction": self.document_instruction,
        }

    def set_params(self, **parameters: Any) -> Spy:
        vars(self).update(parameters)
        return self

    def _embed(self, side: str, texts: list[str]) -> np.ndarray:
        self.calls.append((side, self.instruction, self.document_instruction))
        letters = "abcdefghijklmnopqrstuvwxyz"
        return np.array([[text.count(letter) / 5 for letter in letters] for text in texts])

    def transform(self, texts: list[str]) -> np.ndarray:
        return self._embed("transform", texts)

    def encode_query(self, texts: list[str]) -> np.ndarray:
        return self._embed("query", texts)

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self._embed("document", texts)


def make_task(base: Any, kind: str, name: str, prompt: Any = None) -> Any:
    main_score = base.metadata.main_score
    return type("Named", (base,), {"metadata": describe(kind, name, main_score, prompt)})()


def test_encoder_follows_the_protocol(vectorizer: NVEmbedVectorizer) -> None:
    encoder = MTEBEncoder(vectorizer)
    assert isinstance(encoder, EncoderProtocol)
    vectors = np.array([[3.0, 4.0], [1.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(encoder.similarity(vectors, vectors), [[1, 0.6], [0.6, 1]], 1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, vectors), [1, 1], 1e-6)
    assert repr(encoder) == f"MTEBEncoder({vectorizer!r}, instructions='auto')"


@pytest.mark.parametrize(
    ("name", "prompt", "query", "document"),
    [
        ("NFCorpus", None, INSTRUCTIONS["NFCorpus"].query, None),
        ("FEVERHardNegatives", "Find it, whatever it is", INSTRUCTIONS["FEVER"].query, None),
        (
            "QuoraRetrieval",
            None,
            INSTRUCTIONS["QuoraRetrieval"].query,
            INSTRUCTIONS["QuoraRetrieval"].document,
        ),
        ("LocalRetrieval", None, None, None),
        ("LocalRetrieval", "Find what helps the query", "Find what helps the query", None),
        ("LocalRetrieval", {"query": "Find what helps"}, "Find what helps", None),
        (
            "LocalRetrieval",
            {"query": "Find what helps", "document": "Say what this is"},
            "Find what helps",
            "Say what this is",
        ),
    ],
)
def test_retrieval_documents_stay_bare_unless_the_task_asks(
    name: str, prompt: Any, query: str | None, document: str | None
) -> None:
    spy = Spy()
    run_mteb(MTEBEncoder(spy), make_task(Retrieval, "Retrieval", name, prompt))
    assert spy.calls == [("query", query, document), ("document", query, document)]
    assert (spy.instruction, spy.document_instruction) == (None, None), "left as it was"


@pytest.mark.parametrize(
    ("base", "kind", "name", "prompt", "instruction"),
    [
        (STS, "STS", "STS12", None, INSTRUCTIONS["STS12"].query),
        (STS, "STS", "LocalSTS", "Compare these two texts", "Compare these two texts"),
        (
            Classification,
            "Classification",
            "Banking77Classification",
            "Some other text",
            INSTRUCTIONS["Banking77"].query,
        ),
        (
            Clustering,
            "Clustering",
            "ArXivHierarchicalClusteringS2S",
            None,
            INSTRUCTIONS["ArxivClusteringS2S"].query,
        ),
    ],
)
def test_texts_without_a_side_go_through_transform(
    base: Any, kind: str, name: str, prompt: Any, instruction: str
) -> None:
    spy = Spy()
    run_mteb(MTEBEncoder(spy), make_task(base, kind, name, prompt))
    assert {call[:2] for call in spy.calls} == {("transform", instruction)}


def test_instructions_of_the_vectorizer_and_of_the_caller() -> None:
    task = make_task(Retrieval, "Retrieval", "NFCorpus", "A prompt of mteb")
    own = Spy(instruction="Keep this one")
    run_mteb(MTEBEncoder(own), task)
    run_mteb(MTEBEncoder(own, instructions=None), task)
    assert {call[1] for call in own.calls} == {"Keep this one"}
    run_mteb(MTEBEncoder(own, instructions={"NFCorpus": "Take this one"}), task)
    assert {call[1:] for call in own.calls[4:]} == {("Take this one", None)}
    bare = Spy()
    run_mteb(MTEBEncoder(bare, instructions=None), task)
    assert {call[1] for call in bare.calls} == {None}
    encoder = MTEBEncoder(bare, instructions={"A": "quora", "B": "Take this one"})
    both = INSTRUCTIONS["QuoraRetrieval"]
    assert encoder.instructions_for("A", "Retrieval") == (both.query, both.document)
    assert encoder.instructions_for("B", "STS") == ("Take this one", "Take this one")
    assert encoder.instructions_for("NFCorpus", "Retrieval")[0] == INSTRUCTIONS["NFCorpus"].query


def test_names_of_the_english_benchmark_are_known() -> None:
    kinds = {
        task.metadata.name: task.metadata.type for task in mteb.get_benchmark("MTEB(eng, v2)").tasks
    }
    assert len(kinds) == 41
    known = {name: find_task(name) for name in kinds}
    # The released list has no entry for CQADupstack.
    unknown = {"CQADupstackGamingRetrieval", "CQADupstackUnixRetrieval"}
    assert {name for name, task in known.items() if task is None} == unknown
    for name, task in known.items():
        assert task is None or INSTRUCTIONS[task].task_type == kinds[name], name


ADVICE = "The model 'skembed-mini' learned no instructions"


@pytest.mark.filterwarnings(f"ignore:{ADVICE}:skembed.SkembedWarning")
def test_an_instruction_changes_the_vectors_and_shares_the_weights() -> None:
    cache = EmbeddingCache()
    vectorizer = NVEmbedVectorizer(cache=cache)
    encoder = MTEBEncoder(vectorizer, instructions={"STS12": "STS"})
    task = make_task(STS, "STS", "STS12")
    inputs = [{"text": ["a cat", "a dog"]}, {"text": ["a cat"]}]
    options = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    found = encoder.encode(inputs, **options)
    same = NVEmbedVectorizer(instruction="STS", cache=cache)
    np.testing.assert_array_equal(found, same.transform(["a cat", "a dog", "a cat"]))
    assert np.abs(found[0] - vectorizer.transform(["a cat"])[0]).max() > 1e-3
    assert vectorizer.instruction == "auto"
    assert len(cache) == 3, "the copy embeds with the same model into the same cache"


def encode(encoder: MTEBEncoder, name: str = "STS12", prompt: Any = None) -> np.ndarray:
    options = {"hf_split": "test", "hf_subset": "default"}
    task = make_task(STS, "STS", name, prompt)
    return encoder.encode([{"text": ["a cat"]}], task_metadata=task.metadata, **options)


@pytest.mark.parametrize("name", ["STS12", "LocalSTS"])
def test_a_model_without_instructions_gets_none(name: str, vectorizer: NVEmbedVectorizer) -> None:
    bare = vectorizer.transform(["a cat"])
    for own in ("auto", None):
        encoder = MTEBEncoder(clone(vectorizer).set_params(instruction=own))
        np.testing.assert_array_equal(encode(encoder, name, "Compare these two texts"), bare)
        assert not encoder.mteb_model_meta.use_instructions


def test_a_model_with_instructions_gets_the_task_s() -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    emb = NVEmbedVectorizer(GOLDEN, **options)
    instructed = NVEmbedVectorizer(GOLDEN, instruction="STS", **options).transform(["a cat"])
    np.testing.assert_array_equal(encode(MTEBEncoder(emb)), instructed)
    assert MTEBEncoder(emb).mteb_model_meta.use_instructions
    none = MTEBEncoder(clone(emb).set_params(instruction=None))
    np.testing.assert_array_equal(encode(none), emb.transform(["a cat"])), "None wins"


def test_an_instruction_that_the_user_names_brings_one_warning() -> None:
    encoder = MTEBEncoder(NVEmbedVectorizer(), instructions={"STS12": "STS"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            encode(encoder)
    assert [str(w.message)[: len(ADVICE)] for w in caught] == [ADVICE]
    assert "filterwarnings('ignore'" in str(caught[0].message)


@pytest.mark.filterwarnings(f"ignore:{ADVICE}:skembed.SkembedWarning")
def test_a_trained_adapter_is_used() -> None:
    pytest.importorskip("peft")
    trainer = ContrastiveTrainer(max_steps=2, batch_size=4, random_state=0)
    pairs = [(f"a {x}", f"the {x}") for x in ("cat", "dog", "boat", "rose", "form", "soup")]
    trained = NVEmbedVectorizer(trainer=trainer, cache=EmbeddingCache())
    with pytest.raises(NotFittedError):
        MTEBEncoder(trained)
    trained.fit(pairs)
    task = make_task(STS, "STS", "LocalSTS", "Compare these two texts")
    options = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    encoder = MTEBEncoder(trained, instructions={"LocalSTS": "Compare these two texts"})
    found = encoder.encode([{"text": ["a cat"]}], **options)
    trained.set_params(instruction="Compare these two texts")
    np.testing.assert_array_equal(found, trained.transform(["a cat"]))
    frozen = NVEmbedVectorizer(instruction="Compare these two texts").transform(["a cat"])
    assert np.abs(found - frozen).max() > 1e-6


def test_results_of_another_model_are_never_found(vectorizer: NVEmbedVectorizer) -> None:
    def revision(*arguments: Any, **options: Any) -> str:
        return str(MTEBEncoder(*arguments, **options).mteb_model_meta.revision)

    assert revision(vectorizer) == revision(NVEmbedVectorizer(cache=vectorizer.cache))
    others = [
        revision(NVEmbedVectorizer(cache=vectorizer.cache, truncate_dim=64)),
        revision(NVEmbedVectorizer(cache=vectorizer.cache, instruction="STS")),
        revision(vectorizer, instructions=None),
        revision(vectorizer, instructions={"NFCorpus": "Find what helps"}),
        revision(TfidfVectorizer().fit(["one two"])),
        revision(TfidfVectorizer().fit(["one three"])),
        revision(TfidfVectorizer(ngram_range=(1, 2)).fit(["one three"])),
    ]
    assert len({revision(vectorizer), *others}) == len(others) + 1
    meta = MTEBEncoder(vectorizer).mteb_model_meta
    assert (meta.name, meta.embed_dim) == ("skembed/skembed-mini", 384)
    named = MTEBEncoder(vectorizer, name="me/mine", revision="7").mteb_model_meta
    assert (named.name, named.revision) == ("me/mine", "7")


def test_bad_input(vectorizer: NVEmbedVectorizer) -> None:
    with pytest.raises(ValueError, match="`instructions` parameter of `MTEBEncoder` must be one"):
        MTEBEncoder(vectorizer, instructions="all")
    encoder = MTEBEncoder(vectorizer)
    options = {"task_metadata": STS.metadata, "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(TypeError, match="takes no option 'precision'"):
        encoder.encode([{"text": ["a cat"]}], precision="int8", **options)
    assert encoder.encode([{"text": ["a cat"]}], batch_size=4, **options).shape == (1, 384)
    with pytest.raises(ValueError, match="'instructions'|`instructions` parameter"):
        MTEBEncoder(vectorizer, instructions={"A": "Unknown"}).instructions_for("A", "STS")

    class Broken:
        def transform(self, texts: list[str]) -> np.ndarray:
            return np.full((len(texts), 2), math.nan)

    with pytest.raises(ValueError, match=r"`MTEBEncoder` must turn 1 .* texts\[0\] is not finite"):
        MTEBEncoder(Broken()).encode([{"text": ["a cat"]}], **options)


def test_without_mteb(vectorizer: NVEmbedVectorizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mteb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match=r"`MTEBEncoder` needs `mteb`.*skembed\[mteb\]"):
        MTEBEncoder(vectorizer).mteb_model_meta  # noqa: B018 -- the access is the test
