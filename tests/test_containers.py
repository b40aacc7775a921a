"""Every estimator of texts, with every container of X and y: the results are those of lists.

Estimators come from `skembed.__all__`, so that a new one is tested at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from containers import COLUMNS, TABLES
from fake_vectorizer import FakeVectorizer, TwoSidedVectorizer
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny import make_vectorizer

import skembed
from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed._inputs import check_texts

TEXTS = ["a card was stolen", "my card is lost", "open an account", "a new account", "lost cards"]
LABELS = ["card", "card", "account", "account", "card"]
NEW = ["an account", "a stolen card"]
PAIRS = list(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))
GRADES = [5, 0, 4, 0, 1]
IDS = [7, 5, 3, 1, 9]
Convert = Callable[[list[Any]], Any]


def find_estimators() -> dict[str, type]:
    """Return the public estimators that take texts through a `vectorizer`."""
    found = {name: getattr(skembed, name) for name in skembed.__all__}
    return {
        name: cls
        for name, cls in found.items()
        if inspect.isclass(cls)
        and issubclass(cls, BaseEstimator)
        and "vectorizer" in inspect.signature(cls).parameters
    }


ESTIMATORS = find_estimators()
OPTIONS: dict[str, dict[str, Any]] = {"EmbeddingClusterer": {"n_clusters": 2, "random_state": 0}}


def make(name: str) -> Any:
    # Descriptions need a side of documents.
    vectorizer = TwoSidedVectorizer() if name == "ZeroShotClassifier" else FakeVectorizer()
    return ESTIMATORS[name](vectorizer, **OPTIONS.get(name, {}))


def use_labels(estimator: Any, convert: Convert) -> list[Any]:
    """Fit on texts and labels; return what the estimator says of new texts."""
    estimator.fit(convert(TEXTS), convert(LABELS))
    method = next(m for m in ("predict", "transform", "search") if hasattr(estimator, m))
    found = [getattr(estimator, method)(convert(NEW))]
    if hasattr(estimator, "score"):
        found.append(estimator.score(convert(TEXTS), convert(LABELS)))
    return found


def use_corpus(estimator: Any, convert: Convert) -> list[Any]:
    """Fit on a corpus with ids; return the best documents, and a score."""
    estimator.fit(convert(TEXTS), ids=convert(IDS))
    found = list(estimator.search(convert(NEW), 2))
    estimator.add(convert(["a new card"]), ids=convert([11])).remove(convert([5]))
    return [
        *found,
        *estimator.search(convert(NEW), 9),
        estimator.score(convert(NEW), convert([3, 7])),
    ]


def use_pairs(estimator: Any, convert: Convert, *, makes_tables: bool = False) -> list[Any]:
    """Fit on pairs with grades; return predictions and scores."""
    pairs = convert(PAIRS) if makes_tables else PAIRS
    grades = GRADES if makes_tables else convert(GRADES)
    estimator.fit(pairs, grades)
    found = [estimator.predict(pairs), estimator.score(pairs, grades)]
    if hasattr(estimator, "rank") and not makes_tables:
        found += [estimator.score(pairs, grades, groups=convert([1, 1, 1, 2, 2]))]
        found += estimator.rank(convert(NEW), [convert(TEXTS), convert(TEXTS[:2])]).scores
    return found


USES: dict[str, Callable[[Any, Convert], list[Any]]] = {
    "Retriever": use_corpus,
    "Reranker": use_pairs,
    "SimilarityRegressor": use_pairs,
}
PAIR_ESTIMATORS = [name for name, use in USES.items() if use is use_pairs]
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@every_estimator
@pytest.mark.parametrize("container", COLUMNS)
def test_every_estimator_takes_every_column(name: str, container: str) -> None:
    use = USES.get(name, use_labels)
    assert_equal(use(make(name), COLUMNS[container]), use(make(name), list))


@pytest.mark.parametrize("name", PAIR_ESTIMATORS)
@pytest.mark.parametrize("table", TABLES)
def test_estimators_of_pairs_read_two_columns(name: str, table: str) -> None:
    expected = use_pairs(make(name), list)[:2]
    assert_equal(use_pairs(make(name), TABLES[table], makes_tables=True), expected)


@pytest.mark.parametrize("container", COLUMNS)
def test_the_vectorizer_takes_every_column(container: str) -> None:
    emb = make_vectorizer()
    X = COLUMNS[container](TEXTS)
    expected = emb.transform(TEXTS)
    for method in ("transform", "fit_transform", "encode_query", "encode_document"):
        np.testing.assert_array_equal(getattr(emb, method)(X), expected)
    assert emb.fit(X).get_feature_names_out()[0] == "nvembedvectorizer0"


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("table", TABLES)
def test_columns_of_a_table_are_features(table: str, k: int) -> None:
    columns = [TEXTS, TEXTS[::-1], LABELS][:k]
    X = TABLES[table](list(zip(*columns, strict=True)))
    emb = make_vectorizer()
    expected = np.hstack([emb.transform(column) for column in columns])
    for y in (None, LABELS, [0, 0, 1, 1, 0], [True] * 5, [0.5, 1.0, 0.0, 0.2, 0.1]):
        fitted = make_vectorizer().fit(X, y)
        assert not hasattr(fitted, "adapter_")
        np.testing.assert_array_equal(fitted.transform(X), expected)
    np.testing.assert_array_equal(fitted.fit_transform(X, LABELS), expected)
    names = fitted.get_feature_names_out()
    assert len(names) == expected.shape[1] == len(set(names))
    prefixes = ["title", "body", "note"][:k]
    if table.startswith("numpy") or k == 1:
        prefixes = ["nvembedvectorizer"]
        assert names[1] == "nvembedvectorizer1"
    else:
        assert names[1] == "title_1"
    assert list(dict.fromkeys(str(name).rstrip("0123456789").rstrip("_") for name in names)) == (
        prefixes
    )
    with pytest.raises(ValueError, match=f"X has {k + 1} text columns, but .* fitted with {k}"):
        fitted.transform(np.array([["a"] * (k + 1)]))


@pytest.mark.parametrize("table", TABLES)
def test_a_trainer_refuses_columns_and_its_advice_works(table: str) -> None:
    X = TABLES[table](PAIRS)
    trainer = ContrastiveTrainer(max_steps=1, batch_size=2, random_state=0)
    emb = make_vectorizer(trainer=trainer)
    with pytest.raises(ValueError, match="2 columns, which are features. Make tuples") as caught:
        emb.fit(X)
    advice = str(caught.value).split("Make tuples of its rows: ")[1].split(". With")[0]
    rows = eval(advice, {"X": X})
    assert [tuple(row) for row in rows] == PAIRS
    assert hasattr(emb.fit(rows), "adapter_")
    for frozen in ("auto", None):
        assert not hasattr(make_vectorizer(trainer=frozen).fit(X), "adapter_")


def test_tuples_are_pairs_and_labels_on_them_an_error() -> None:
    trainer = ContrastiveTrainer(max_steps=1, batch_size=2, random_state=0)
    for y in ([0, 1, 0, 1, 0], np.array([1, 0, 1, 0, 0]), [True, False] * 2 + [True], LABELS):
        for setting in ("auto", trainer):
            emb = make_vectorizer(trainer=setting)
            with pytest.raises(TypeError, match=r"floats.*dtype=float.*' '\.join\(row\) for row"):
                emb.fit(PAIRS, y)
        assert not hasattr(make_vectorizer(trainer=None).fit(PAIRS, y), "adapter_")
    joined = [" ".join(row) for row in PAIRS]
    assert not hasattr(make_vectorizer().fit(joined, LABELS), "adapter_")
    emb = make_vectorizer(trainer=trainer).fit(PAIRS, np.asarray([0, 1, 0, 1, 0], dtype=float))
    assert emb.n_features_in_ == 2
    assert emb.history_.steps


def test_rows_of_three_agree_in_fit_and_transform() -> None:
    rows = [(a, b, f"{b} not") for a, b in PAIRS]
    trainer = ContrastiveTrainer(max_steps=1, batch_size=2, random_state=0)
    emb = make_vectorizer(trainer=trainer)
    found = emb.fit_transform(rows)
    np.testing.assert_array_equal(found, emb.transform(rows))
    assert found.shape == (5, 3 * emb.embedding_dim_)
    assert len(emb.get_feature_names_out()) == found.shape[1]


@pytest.mark.parametrize("columns", ["title", ["title"], ["title", "body"], ["title", "body", "n"]])
@pytest.mark.parametrize("labels", [LABELS, [0, 0, 1, 1, 0]])
def test_column_transformers_keep_the_model_frozen(columns: Any, labels: Any) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"title": TEXTS, "body": TEXTS[::-1], "n": LABELS, "number": range(5)})
    transformer = ColumnTransformer([("emb", make_vectorizer(), columns)], remainder="drop")
    transformer.set_output(transform="pandas")
    pipe = make_pipeline(transformer, LogisticRegression())
    pipe.fit(frame if columns != "title" else frame[["title", "number"]], labels)
    fitted = transformer.named_transformers_["emb"]
    assert not hasattr(fitted, "adapter_")
    k = 1 if isinstance(columns, str) else len(columns)
    assert fitted.n_features_in_ == k
    first = transformer.get_feature_names_out()[0]
    assert first == ("emb__nvembedvectorizer0" if k == 1 else "emb__title_0")


LAZY: dict[str, tuple[Callable[[], Any], str]] = {
    "polars LazyFrame": (
        lambda: pytest.importorskip("polars").LazyFrame({"text": TEXTS}),
        "X.collect()",
    ),
    "dask Series": (
        lambda: pytest.importorskip("dask.dataframe").from_pandas(
            pytest.importorskip("pandas").Series(TEXTS), npartitions=2
        ),
        "X.compute()",
    ),
    "narwhals LazyFrame": (
        lambda: pytest.importorskip("narwhals").from_native(
            pytest.importorskip("polars").LazyFrame({"text": TEXTS})
        ),
        "X.collect()",
    ),
    "datasets DatasetDict": (
        lambda: pytest.importorskip("datasets").DatasetDict(
            train=pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})
        ),
        "X['train']['text']",
    ),
    "datasets IterableDataset": (
        lambda: (
            pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
        ),
        "[row['text'] for row in X]",
    ),
    "generator": (lambda: iter(TEXTS), "list(X)"),
    "dict": (lambda: dict(enumerate(TEXTS)), "list(X.values())"),
}


@pytest.mark.parametrize("kind", LAZY)
def test_advice_for_other_containers_works_when_followed(kind: str) -> None:
    make_container, advice = LAZY[kind]
    X = make_container()
    with pytest.raises(TypeError) as caught:
        check_texts(X, owner="Owner")
    assert advice in str(caught.value)
    assert check_texts(eval(advice, {"X": X}), owner="Owner").columns == [TEXTS]
    if kind != "generator":
        with pytest.raises(TypeError, match="labels"):
            make("EmbeddingClassifier").fit(TEXTS, X)


def test_several_columns_where_one_text_is_wanted_say_so() -> None:
    for name in set(ESTIMATORS) - set(USES):
        with pytest.raises(ValueError, match="one text a row; got 3 columns"):
            make(name).fit(np.array([["a", "b", "c"]] * 5), LABELS)


def test_all_public_text_estimators_are_found() -> None:
    assert {"EmbeddingClassifier", "Retriever", "SimilarityRegressor"} <= set(ESTIMATORS)
    assert set(USES) <= set(ESTIMATORS)
    assert issubclass(NVEmbedVectorizer, BaseEstimator)
