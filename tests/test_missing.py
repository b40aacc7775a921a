"""Missing is one thing everywhere: texts, titles, labels, keys, ids, groups and judgments.

Every kind of missing value goes wherever one is read; estimators come from `skembed.__all__`.
"""

from __future__ import annotations

import datetime
import enum
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fake_vectorizer import FakeVectorizer
from test_containers import ESTIMATORS, LABELS, NEW, PAIR_ESTIMATORS, PAIRS, TEXTS, make
from tiny import make_vectorizer

from skembed import ContrastiveTrainer, EmbeddingClassifier, mine_hard_negatives
from skembed._inputs import is_missing
from skembed.estimators.clustering import EmbeddingClusterer
from skembed.estimators.retrieval import Retriever
from skembed.estimators.zero_shot import ZeroShotClassifier
from skembed.evaluation import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    STSTask,
    evaluate,
)
from skembed.metrics import accuracy, v_measure
from skembed.metrics.qrels import join_title, join_titles
from skembed.plotting.groups import read_groups

pd = pytest.importorskip("pandas")
MISSING: dict[str, Any] = {
    "None": None,
    "float": math.nan,
    "float32": np.float32("nan"),
    "Decimal": Decimal("nan"),
    "pd.NA": pd.NA,
    "pd.NaT": pd.NaT,
    "datetime64": np.datetime64("NaT"),
    "timedelta64": np.timedelta64("NaT"),
    "masked": np.ma.masked,
}
every_kind = pytest.mark.parametrize("kind", MISSING)
POSITION = 3


def spoil(items: Any, kind: str) -> list[Any]:
    """Return the items with a missing one at POSITION."""
    spoiled = list(items)
    spoiled[POSITION] = MISSING[kind]
    return spoiled


@every_kind
def test_what_is_missing(kind: str) -> None:
    assert is_missing(MISSING[kind])
    for item in ("", "nan", "None", 0, 0.0, False, Decimal(0), datetime.date(2020, 1, 1), []):
        assert not is_missing(item)


# Texts


@every_kind
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"Reranker", "SimilarityRegressor"}))
def test_a_missing_text_is_found_by_every_estimator(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"missing.*X\[{POSITION}\]"):
        make(name).fit(spoil(TEXTS, kind), LABELS)
    fitted = make(name).fit(TEXTS, LABELS)
    method = next(m for m in ("predict", "transform", "search") if hasattr(fitted, m))
    with pytest.raises(ValueError, match=rf"missing.*\[{POSITION}\]"):
        getattr(fitted, method)(spoil(TEXTS, kind))


@every_kind
@pytest.mark.parametrize("name", PAIR_ESTIMATORS)
def test_a_missing_text_of_a_pair_is_found(name: str, kind: str) -> None:
    pairs = [list(pair) for pair in PAIRS]
    pairs[POSITION][1] = MISSING[kind]
    for X in (pairs, pd.DataFrame(pairs)):
        with pytest.raises(ValueError, match=rf"missing.*X\[{POSITION}\]\[1\]"):
            make(name).fit(X)


@every_kind
def test_the_policies_of_the_vectorizer(kind: str) -> None:
    X = spoil(TEXTS, kind)
    with pytest.raises(ValueError, match=rf"got 1 missing, the first at X\[{POSITION}\]"):
        make_vectorizer().transform(X)
    assert (make_vectorizer(missing="zero").transform(X)[POSITION] == 0).all()
    assert np.isnan(make_vectorizer(missing="nan").transform(X)[POSITION]).all()
    empty = make_vectorizer(missing="empty").transform(X)[POSITION]
    np.testing.assert_array_equal(empty, make_vectorizer().transform([""])[0])


@every_kind
def test_titles_and_texts_of_documents(kind: str) -> None:
    absent = MISSING[kind]
    documents = [
        {"title": absent, "text": "a text"},
        {"title": "a title", "text": absent},
        {"title": "both", "text": "there"},
        {"text": "alone"},
        {"title": absent, "text": absent},
        "plain",
    ]
    expected = ["a text", "a title", "both there", "alone", None, "plain"]
    assert join_title(documents, owner="Owner", name="corpus") == expected
    rows = [(item.get("title"), item.get("text")) for item in documents[:5]]  # type: ignore[union-attr]
    for X in (rows, pd.DataFrame(rows, columns=["title", "text"], dtype=object)):
        assert join_titles(X, owner="Owner") == expected[:5]


@every_kind
def test_a_corpus_with_a_missing_title_scores_as_one_without(kind: str) -> None:
    def score(corpus: dict[str, Any]) -> float:
        relevance = {"q": {"a": 1}}
        task = RetrievalTask({"q": "stolen card"}, corpus, relevance, metric="ndcg_at_10")
        return evaluate(Noted(), task, n_bootstraps=0)[0].score

    class Noted(FakeVectorizer):
        def transform(self, X: Any) -> np.ndarray:
            assert not any("nan" in text.lower() or "na" in text.split() for text in X)
            return super().transform(X)

    corpus = {"a": {"title": MISSING[kind], "text": "a stolen card"}, "b": "another one"}
    assert score(corpus) == score({"a": "a stolen card", "b": "another one"})


# Labels: missing ones, and those of several types, wherever labels are read


def evaluate_labels(labels: list[Any]) -> None:
    evaluate(FakeVectorizer(), ClassificationTask(TEXTS * 4, list(labels) * 4, samples_per_label=1))


def train(labels: list[Any]) -> None:
    make_vectorizer(trainer=ContrastiveTrainer(max_steps=1)).fit(TEXTS, labels)


READERS: dict[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "classifier": ("y", lambda y: EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, y)),
    "classifier on vectors": ("y", lambda y: EmbeddingClassifier(None).fit(np.eye(5), y)),
    "classifier.score": (
        "y",
        lambda y: EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, LABELS).score(TEXTS, y),
    ),
    "zero-shot labels": (
        "y",
        lambda y: ZeroShotClassifier(FakeVectorizer()).fit(TEXTS, y),
    ),
    "zero-shot examples": (
        "y",
        lambda y: ZeroShotClassifier(
            FakeVectorizer(), descriptions={"card": "a card", "account": "an account"}
        ).fit(TEXTS, y),
    ),
    "zero-shot keys": (
        r"list\(descriptions\)",
        lambda y: ZeroShotClassifier(FakeVectorizer()).fit(
            {label if i == POSITION else f"{label}{i}": "a" for i, label in enumerate(y)}
        ),
    ),
    "clusterer.score": (
        "y",
        lambda y: EmbeddingClusterer(None, n_clusters=2).fit(np.eye(5)).score(np.eye(5), y),
    ),
    "trainer": ("y", train),
    "mining": ("y", lambda y: mine_hard_negatives(TEXTS, y, vectorizer=FakeVectorizer())),
    "classification task": ("labels", evaluate_labels),
    "clustering task": (
        "labels",
        lambda y: evaluate(FakeVectorizer(), ClusteringTask(TEXTS, y)),
    ),
    "maps": ("y", lambda y: read_groups(y, 5, owner="EmbeddingMapDisplay")),
    "accuracy": ("y_true", lambda y: accuracy(y, LABELS)),
    "v_measure": ("y_true", lambda y: v_measure(y, [0, 0, 1, 1, 0])),
}
every_reader = pytest.mark.parametrize("reader", READERS)


@every_reader
@every_kind
@pytest.mark.parametrize("as_array", [False, True])
def test_a_missing_label_is_an_error_with_its_position(
    reader: str, kind: str, as_array: bool
) -> None:
    name, read = READERS[reader]
    if (reader, kind) == ("zero-shot keys", "masked"):
        pytest.skip("numpy's masked item cannot be a key")
    labels: Any = spoil(LABELS, kind)
    if as_array:
        labels = np.array(labels, dtype=object)
    with pytest.raises(ValueError, match=rf"missing.*{name}\[{POSITION}\]"):
        read(labels)


@every_reader
@pytest.mark.parametrize("other", [1, 2.0, True, np.int64(3)], ids=repr)
def test_labels_of_two_types_are_an_error_with_the_position(reader: str, other: Any) -> None:
    name, read = READERS[reader]
    labels = [*LABELS[:POSITION], other, *LABELS[POSITION + 1 :]]
    with pytest.raises(TypeError, match=rf"one type.*{name}\[{POSITION}\]"):
        read(labels)


@every_reader
@pytest.mark.parametrize("label", [b"card", datetime.date(2020, 1, 1)], ids=repr)
def test_labels_of_other_types_are_an_error_with_the_position(reader: str, label: Any) -> None:
    name, read = READERS[reader]
    with pytest.raises(TypeError, match=rf"str, int or bool; {name}\[{POSITION}\]"):
        read([*LABELS[:POSITION], label, *LABELS[POSITION + 1 :]])


class Topic(str, enum.Enum):
    """Labels as many programs keep them."""

    CARD = "card"
    ACCOUNT = "account"


@pytest.mark.parametrize("labels", [list, np.array, pd.Series], ids=lambda kind: kind.__name__)
def test_members_of_a_str_enum_are_the_str_that_they_hold(labels: Any) -> None:
    members = [Topic(label) for label in LABELS]
    given = np.array(members, dtype=object) if labels is np.array else labels(members)
    clf = EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, given)
    assert clf.classes_.tolist() == ["account", "card"]
    assert clf.score(TEXTS, given) == clf.score(TEXTS, LABELS)
    assert read_groups(given, 5, owner="EmbeddingMapDisplay").names == ["account", "card"]
    assert accuracy(given, LABELS) == 1


@every_reader
@pytest.mark.parametrize(
    "labels", [[2**63 + 1, 2**63 + 2, -1, 2**63 + 1, -1], [1, 2, 1, 2, 2**70], [1, 2**63, 1, 1, 2]]
)
def test_ints_that_no_array_keeps_apart_are_an_error(reader: str, labels: list[int]) -> None:
    if reader == "zero-shot keys":
        pytest.skip("makes str of all labels but one")
    with pytest.raises(ValueError, match=r"ints in .*Convert the labels to str"):
        READERS[reader][1](labels)


def test_the_ints_of_an_unsigned_array_are_labels() -> None:
    for y in (np.array([2**63, 1, 1, 2**63, 1], dtype="u8"), pd.Series([2**63, 1, 1, 1, 1])):
        assert EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, y).classes_.tolist() == [1, 2**63]


@every_reader
@pytest.mark.parametrize("label", [math.inf, Fraction(1, 2)], ids=repr)
def test_infinite_labels_and_fractions_are_an_error(reader: str, label: Any) -> None:
    if reader == "zero-shot keys":
        pytest.skip("makes str of all labels but one")
    with pytest.raises((TypeError, ValueError), match=r"finite|whole|fraction|str, int or bool"):
        READERS[reader][1]([1.0, 2.0, 2.0, label, 1.0])


@pytest.mark.parametrize("reader", ["classifier", "classifier on vectors", "trainer", "maps"])
@pytest.mark.parametrize(
    "labels",
    [
        [["a", "b"], ["a"], ["b"], ["a"], []],
        [["a", "b"]] * 5,
        [{"a"}, {"b"}, {"a"}, {"b"}, {"a"}],
        pd.Series([["a", "b"], ["a"], ["b"], ["a"], ["b"]]),
    ],
    ids=["ragged", "even", "sets", "series"],
)
def test_several_labels_a_text_name_the_way_out(reader: str, labels: Any) -> None:
    with pytest.raises(TypeError, match=r"MultiLabelBinarizer.*OneVsRestClassifier"):
        READERS[reader][1](labels)


def test_the_way_out_of_several_labels_works() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    labels = MultiLabelBinarizer().fit_transform([["a", "b"], ["a"], ["b"], ["a"], []])
    for y in (labels, labels.tolist(), pd.DataFrame(labels)):
        with pytest.raises(ValueError, match="OneVsRestClassifier"):
            EmbeddingClassifier(FakeVectorizer()).fit(TEXTS, y)
        head = OneVsRestClassifier(LogisticRegression())
        clf = EmbeddingClassifier(FakeVectorizer(), head=head).fit(TEXTS, y)
        assert clf.predict(NEW).shape == (2, 2)
        assert 0 <= clf.score(TEXTS, y) <= 1


# Scores, ids, groups and judgments


SCORES = [5.0, 0.0, 4.0, 0.0, 1.0]
NUMBERS: dict[str, Callable[[list[Any]], Any]] = {
    "SimilarityRegressor": lambda y: make("SimilarityRegressor").fit(PAIRS, y),
    "SimilarityRegressor.score": lambda y: make("SimilarityRegressor").fit(PAIRS).score(PAIRS, y),
    "Reranker": lambda y: make("Reranker").fit(PAIRS, y),
    "Reranker.score": lambda y: make("Reranker").fit().score(PAIRS, y),
    "trainer": lambda y: make_vectorizer().fit(PAIRS, y),
    "task": lambda y: evaluate(FakeVectorizer(), STSTask(PAIRS, y)),
}


@pytest.mark.parametrize("reader", NUMBERS)
@every_kind
def test_a_missing_score_is_an_error_with_its_position(reader: str, kind: str) -> None:
    for scores in (spoil(SCORES, kind), np.array(spoil(SCORES, kind), dtype=object)):
        with pytest.raises(ValueError, match=rf"missing.*\[{POSITION}\]"):
            NUMBERS[reader](scores)


@pytest.mark.parametrize("reader", NUMBERS)
def test_a_score_of_another_type_is_an_error_with_its_position(reader: str) -> None:
    with pytest.raises(TypeError, match=rf"\[{POSITION}\] is a str"):
        NUMBERS[reader]([*SCORES[:POSITION], "0.5", *SCORES[POSITION + 1 :]])


@every_kind
def test_missing_ids_groups_and_judged_documents(kind: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"ids\[{POSITION}\]"):
        Retriever(FakeVectorizer()).fit(TEXTS, ids=spoil("abcde", kind))
    with pytest.raises(ValueError, match=rf"missing.*groups\[{POSITION}\]"):
        make("Reranker").fit().score(PAIRS, SCORES, groups=spoil("abcde", kind))
    retriever = Retriever(FakeVectorizer()).fit(TEXTS)
    listed: list[Any] = [] if kind == "masked" else [[0, MISSING[kind]], {0: 1, MISSING[kind]: 1}]
    for judged in listed:  # numpy's masked item cannot be a key
        with pytest.raises(ValueError, match="none missing; query 0"):
            retriever.score(["a card"], [judged])
    with pytest.raises(TypeError, match="grades of int"):
        retriever.score(["a card"], [{0: MISSING[kind]}])
    if kind != "masked":
        task = RetrievalTask({MISSING[kind]: "a card"}, {"a": "a card"}, {MISSING[kind]: {"a": 1}})
        with pytest.raises(ValueError, match=r"ids, none missing; list\(queries\)\[0\]"):
            evaluate(FakeVectorizer(), task, n_bootstraps=0)


@pytest.mark.parametrize("key", [["a"], {"a": 1}, ("a", [1])], ids=repr)
def test_keys_that_no_dict_takes_are_an_error(key: Any) -> None:
    retriever = Retriever(FakeVectorizer()).fit(TEXTS)
    with pytest.raises(TypeError, match=r"`y`.* ids of documents of str or int; one is"):
        retriever.score(["a card"], [[key]])
    with pytest.raises(TypeError, match=r"`query_ids`.* ids of str or int; one is"):
        retriever.score(["a card"], {"q": [0]}, query_ids=[key])
    with pytest.raises(TypeError, match=r"`groups`.* str or int; one is"):
        make("Reranker").fit().score(PAIRS, SCORES, groups=[key] * 5)
    frame = pd.DataFrame({"query": [key], "document": ["a"], "grade": [1]})
    with pytest.raises(TypeError, match=r"`relevance`.* ids of queries of str or int; one is"):
        evaluate(
            FakeVectorizer(), RetrievalTask(["a"], TEXTS, frame, query_ids=["q"]), n_bootstraps=0
        )


def test_other_query_ids_and_grades() -> None:
    retriever = Retriever(FakeVectorizer()).fit(TEXTS)
    expected = retriever.score(["a card"], [[0]])
    for ids in (["q"], pd.Series(["q"]), iter(["q"]), {"q": 1}.keys()):
        assert retriever.score(["a card"], {"q": [0]}, query_ids=ids) == expected
    with pytest.raises(TypeError, match="`query_ids` .* got a bare str"):
        retriever.score(["a card"], {"q": [0]}, query_ids="q")
    with pytest.raises(ValueError, match="`y` .* Pass smaller grades"):
        retriever.score(["a card"], [{0: 2**70}])


def test_a_set_of_ids_has_no_order() -> None:
    with pytest.raises(TypeError, match="must be a list of ids; got set"):
        Retriever(FakeVectorizer()).fit(TEXTS, ids=set("abcde"))
    corpus = dict(zip("edcba", TEXTS, strict=True))
    retriever = Retriever(FakeVectorizer()).fit(list(corpus.values()), ids=corpus.keys())
    assert retriever.ids_.tolist() == list("edcba")
