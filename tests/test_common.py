"""Our own contract for text estimators, on `NVEmbedVectorizer` with a tiny checkpoint.

scikit-learn's generator yields next to nothing for estimators that take text.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from packaging.version import Version
from paths import GOLDEN
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from texts import DIM, TEXTS, make_texts
from tiny import make_vectorizer

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import TruncationWarning
from skembed.inference.registry import registry

FILES = ("config.json", "model.safetensors", "tokenizer.json")
OTHERS = ["the card", "an account", "b", "c", "d"]
pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the registry fails."""

    def get(*args: Any) -> Any:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(type(registry), "get", get)


# Parameters and cloning


@pytest.mark.usefixtures("no_loading")
def test_only_use_asks_for_weights(emb: NVEmbedVectorizer) -> None:
    twin = clone(emb)
    assert "nvembed-tiny" in repr(twin)
    assert twin._repr_html_()
    assert twin.get_params()["max_length"] == "auto"
    twin.set_params(max_length=16)
    twin.fit(TEXTS)
    assert twin.get_feature_names_out().shape == (DIM,)
    assert twin.transform([]).shape == (0, DIM)
    pickle.loads(pickle.dumps(twin))
    with pytest.raises(AssertionError, match="weights were asked for"):
        twin.transform(["a"])


@pytest.mark.usefixtures("no_loading")
def test_wrong_parameters_are_stored_and_found_at_fit(golden_dir: Path) -> None:
    wrong = {"model": 3, "max_length": "x", "device": "gpu", "cache": 7, "trainer": "never"}
    emb = clone(NVEmbedVectorizer(golden_dir).set_params(**wrong))
    assert {name: emb.get_params()[name] for name in wrong} == wrong
    with pytest.raises(TypeError):
        emb.fit(TEXTS)


def test_clone_shares_weights(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir)
    n_loads = registry.n_loads
    first = emb.transform(TEXTS)
    twin = clone(emb)
    np.testing.assert_array_equal(twin.transform(TEXTS), first)
    np.testing.assert_array_equal(clone(twin).transform(TEXTS), first)
    assert registry.n_loads == n_loads + 1
    (of_emb,), (of_twin,) = emb._lease.models.values(), twin._lease.models.values()
    assert of_emb is of_twin
    assert not hasattr(clone(emb.fit(TEXTS)), "n_features_in_")


def test_every_parameter_survives_clone_and_get_params() -> None:
    trainer = ContrastiveTrainer(temperature=0.1)
    given = {
        "model": "here",
        "instruction": "Find the like",
        "document_instruction": "Find it",
        "instruction_template": "{instruction}: ",
        "pooling": "mean",
        "max_length": 7,
        "truncate_dim": 5,
        "normalize": False,
        "missing": "nan",
        "trainer": trainer,
        "device": "cuda:1",
        "dtype": "float16",
        "batch_tokens": 77,
        "cache": "x.sqlite",
        "revision": "abc",
        "store_weights": True,
        "n_jobs": 3,
        "verbose": True,
    }
    emb = clone(NVEmbedVectorizer(**given))
    found = emb.get_params(deep=False)
    assert found.keys() == given.keys()
    assert {**found, "trainer": None} == {**given, "trainer": None}
    assert emb.get_params()["trainer__temperature"] == 0.1
    assert emb.set_params(trainer__temperature=0.2).trainer.temperature == 0.2
    assert trainer.temperature == 0.1, "a clone owns its trainer"


CHANGES = {
    "instruction": "Find the text that says the same",
    "pooling": "mean",
    "max_length": 4,
    "truncate_dim": 8,
    "normalize": False,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", CHANGES)
def test_set_params_takes_effect_after_fit(name: str, vectors: np.ndarray) -> None:
    emb = make_vectorizer(cache=EmbeddingCache()).fit(TEXTS)
    np.testing.assert_allclose(emb.transform(TEXTS), vectors, atol=1e-6)
    emb.set_params(**{name: CHANGES[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        found = emb.transform(TEXTS)
        fresh = make_vectorizer(**{name: CHANGES[name]}).transform(TEXTS)
    np.testing.assert_array_equal(found, fresh)
    assert found.shape != vectors.shape or np.abs(found - vectors).max() > 1e-4
    assert emb.get_feature_names_out().shape == (found.shape[1],)


def test_document_instruction_and_template_take_effect() -> None:
    emb = make_vectorizer(instruction="Find the same text")
    queries, documents = emb.encode_query(TEXTS), emb.encode_document(TEXTS)
    assert np.abs(queries - documents).max() > 1e-4
    np.testing.assert_array_equal(emb.transform(TEXTS), queries)
    emb.set_params(document_instruction="Find the same text")
    np.testing.assert_array_equal(emb.encode_document(TEXTS), queries)
    emb.set_params(instruction_template="{instruction}: ")
    assert np.abs(emb.encode_query(TEXTS) - queries).max() > 1e-4


def test_truncated_vectors_are_the_first_dimensions(vectors: np.ndarray) -> None:
    cut = make_vectorizer(truncate_dim=8).transform(TEXTS)
    first = vectors[:, :8]
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    np.testing.assert_allclose(cut, first, atol=1e-6)
    raw = make_vectorizer(normalize=False).transform(TEXTS)
    np.testing.assert_allclose(
        make_vectorizer(normalize=False, truncate_dim=8).transform(TEXTS), raw[:, :8], atol=1e-6
    )


def test_fit_twice_equals_fit_once() -> None:
    frame = pd.DataFrame({"anchor": TEXTS, "positive": OTHERS})
    twice = make_vectorizer(trainer=None).fit(frame).fit(TEXTS)
    once = make_vectorizer(trainer=None).fit(TEXTS)
    learned = {name: value for name, value in vars(once).items() if name.endswith("_")}
    assert {n: v for n, v in vars(twice).items() if n.endswith("_")} == learned
    assert set(learned) == {"n_features_in_", "embedding_dim_", "model_"}
    np.testing.assert_array_equal(twice.transform(TEXTS), once.transform(TEXTS))


def test_fitted_attributes(emb: NVEmbedVectorizer) -> None:
    assert emb.fit(TEXTS, y=[0, 1, 0, 1, 0]) is emb
    assert (emb.n_features_in_, emb.embedding_dim_) == (1, DIM)
    assert not hasattr(emb, "feature_names_in_")
    expected = {
        "name": str(GOLDEN),
        "revision": None,
        "architecture": "bidirectional Mistral, 2 layers",
        "pooling": "latent",
        "hidden_size": DIM,
        "dtype": "float32",
        "device": "cpu",
        "attention_path": "grouped",
    }
    fingerprint = emb.model_.pop("fingerprint")
    assert emb.model_ == expected
    assert len(fingerprint) == 32
    emb.fit(pd.DataFrame({"text": TEXTS}))
    assert emb.feature_names_in_.tolist() == ["text"]
    emb.fit(pd.DataFrame({0: TEXTS}))
    assert not hasattr(emb, "feature_names_in_")


def test_wrong_number_of_columns_after_fit(emb: NVEmbedVectorizer) -> None:
    emb.set_params(trainer=None).fit(TEXTS)
    with pytest.raises(ValueError, match="X has 2 text columns, but .* was fitted with 1"):
        emb.transform([("a", "b")])
    emb.fit([("a", "b")])
    with pytest.raises(ValueError, match="X has 1 text columns, but .* was fitted with 2"):
        emb.transform(TEXTS)
    assert emb.transform([("a", "b")]).shape == (1, 2 * DIM)


def test_other_names_or_another_order_of_columns_after_fit(emb: NVEmbedVectorizer) -> None:
    frame = pd.DataFrame({"title": TEXTS, "body": TEXTS[::-1]})
    emb.set_params(trainer=None).fit(frame)
    for other in (frame[["body", "title"]], frame.rename(columns={"body": "text"})):
        with pytest.raises(ValueError, match=r"was fitted with \['title', 'body'\].*same order"):
            emb.transform(other)
    expected = emb.transform(frame)
    np.testing.assert_array_equal(emb.transform(frame.to_numpy()), expected)
    emb.fit(frame[["title"]])
    np.testing.assert_array_equal(emb.transform(frame[["body"]]), expected[:, DIM:])


def test_fit_transform_is_fit_then_transform(emb: NVEmbedVectorizer, vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(emb.fit_transform(TEXTS, [1, 2, 3, 4, 5]), vectors)
    assert emb.embedding_dim_ == DIM


def test_html_repr_shows_the_parameters() -> None:
    html = make_vectorizer(truncate_dim=16, instruction="STS")._repr_html_()
    shown = ["truncate_dim", "instruction", "dtype"]
    if Version(sklearn.__version__) >= Version("1.7"):  # from here on the table has every parameter
        shown = list(NVEmbedVectorizer().get_params())
    assert [name for name in shown if name not in html] == []


# State


@pytest.mark.parametrize("method", ["transform", "encode_query", "encode_document"])
def test_frozen_model_needs_no_fit(
    method: str, emb: NVEmbedVectorizer, vectors: np.ndarray
) -> None:
    check_is_fitted(emb)
    before = {k: v for k, v in vars(emb).items() if k != "_lease"}
    np.testing.assert_array_equal(getattr(emb, method)(TEXTS), vectors)
    assert {k: v for k, v in vars(emb).items() if k != "_lease"} == before


@pytest.mark.usefixtures("no_loading")
def test_trainer_wants_fit_first() -> None:
    emb = make_vectorizer(trainer=ContrastiveTrainer())
    for method in ("transform", "encode_query", "encode_document"):
        with pytest.raises(NotFittedError, match="has a trainer and is not fitted.*`fit` first"):
            getattr(emb, method)(TEXTS)
    with pytest.raises(NotFittedError):
        check_is_fitted(emb)
    with pytest.raises(NotFittedError):
        emb.get_feature_names_out()


@pytest.mark.parametrize(
    ("trainer", "X", "y"),
    [
        ("auto", [("a", "b"), ("c", "d")], None),
        ("auto", [("a", "b"), ("c", "d")], [0.5, 1.0]),
        (ContrastiveTrainer(r=2), [("a", "b"), ("c", "d")], None),
        (ContrastiveTrainer(r=2, max_steps=1), ["a", "b", "c", "d"], [0, 1, 0, 1]),
    ],
)
def test_the_trainer_says_whether_fit_trains(trainer: Any, X: Any, y: Any) -> None:
    emb = make_vectorizer(trainer=trainer).fit(X, y)
    assert len(emb.history_) == 1
    frozen = make_vectorizer(trainer=None).fit(X, y)
    assert frozen.embedding_dim_ == DIM
    assert not hasattr(frozen, "adapter_")
    assert emb.model_["fingerprint"].startswith(frozen.model_["fingerprint"] + "+")
    assert np.abs(emb.transform(X) - frozen.transform(X)).max() > 1e-6


def test_labels_leave_single_texts_frozen(emb: NVEmbedVectorizer, vectors: np.ndarray) -> None:
    assert emb.trainer == "auto"
    np.testing.assert_array_equal(emb.fit(TEXTS, [0, 1, 0, 1, 0]).transform(TEXTS), vectors)


# Containers


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "object array": lambda x: np.array(x, dtype=object),
    "str array": np.array,
    "column array": lambda x: np.array(x, dtype=object)[:, None],
    "pandas Series": lambda x: pd.Series(x, index=[7, 7, -1, 0, 3]),
    "pandas str Series": lambda x: pd.Series(x, dtype="string", index=list("edcba")),
    "pandas frame": lambda x: pd.DataFrame({"text": x}, index=[4, 3, 2, 1, 0]),
    "polars Series": pl.Series,
    "polars frame": lambda x: pl.DataFrame({"text": x}),
}


if hasattr(np.dtypes, "StringDType"):  # numpy 2
    CONTAINERS["StringDType"] = lambda x: np.array(x, dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_texts(name: str, emb: NVEmbedVectorizer, vectors: np.ndarray) -> None:
    found = emb.fit(CONTAINERS[name](TEXTS)).transform(CONTAINERS[name](TEXTS))
    assert type(found) is np.ndarray
    assert (found.shape, found.dtype) == ((5, DIM), np.float32)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, vectors)


PAIRS = {
    "tuples": lambda a, b: list(zip(a, b, strict=True)),
    "lists": lambda a, b: [list(pair) for pair in zip(a, b, strict=True)],
    "object array": lambda a, b: np.array([a, b], dtype=object).T,
    "str array": lambda a, b: np.array([a, b]).T,
    "pandas frame": lambda a, b: pd.DataFrame({"anchor": a, "positive": b}, index=[9, 8, 7, 7, 1]),
    "polars frame": lambda a, b: pl.DataFrame({"anchor": a, "positive": b}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_query_then_document(name: str) -> None:
    emb = make_vectorizer(instruction="Find the same", document_instruction="Say it", trainer=None)
    found = emb.fit_transform(PAIRS[name](TEXTS, OTHERS))
    expected = np.hstack([emb.encode_query(TEXTS), emb.encode_document(OTHERS)])
    assert (found.shape, found.dtype) == ((5, 2 * DIM), np.float32)
    np.testing.assert_array_equal(found, expected)
    assert emb.n_features_in_ == 2
    names = emb.get_feature_names_out()
    assert (len(names), len(set(names))) == (2 * DIM, 2 * DIM)


@pytest.mark.parametrize(
    "empty",
    [
        [],
        (),
        np.array([], dtype=object),
        np.array([]),
        np.empty((0, 1), dtype=object),
        pd.Series([], dtype=object),
        pd.DataFrame({"text": []}),
        pl.Series([], dtype=pl.String),
    ],
    ids=lambda empty: f"{type(empty).__module__}-{np.shape(empty)}",
)
@pytest.mark.usefixtures("no_loading")
def test_empty_input(empty: Any, emb: NVEmbedVectorizer) -> None:
    for method in ("transform", "fit_transform", "encode_query", "encode_document"):
        found = getattr(emb, method)(empty)
        assert (found.shape, found.dtype) == ((0, DIM), np.float32)


@pytest.mark.usefixtures("no_loading")
def test_empty_input_of_pairs() -> None:
    emb = make_vectorizer(trainer=None, truncate_dim=8)
    for empty in (np.empty((0, 2), dtype=object), pd.DataFrame({"a": [], "b": []})):
        found = emb.fit(empty).transform(empty)
        assert (found.shape, found.dtype) == ((0, 16), np.float32)


@pytest.mark.parametrize("normalize", [True, False])
def test_missing_policies(normalize: bool) -> None:
    texts = ["a", None, "b", float("nan"), ""]
    emb = make_vectorizer(normalize=normalize)
    known = emb.transform(["a", "b", ""])
    with pytest.raises(ValueError, match=r"2 missing, the first at X\[1\]"):
        emb.transform(texts)
    for policy, filled in (
        ("empty", known[2]),
        ("zero", np.zeros(DIM)),
        ("nan", np.full(DIM, np.nan)),
    ):
        emb.set_params(missing=policy)
        for method in ("transform", "fit_transform", "encode_query", "encode_document"):
            found = getattr(emb, method)(texts)
            np.testing.assert_allclose(found[[0, 2, 4]], known, atol=1e-5)
            np.testing.assert_allclose(found[[1, 3]], [filled, filled], atol=1e-5)
            assert found.dtype == np.float32
    np.testing.assert_allclose(
        emb.set_params(missing="error").transform(["a"]), known[:1], atol=1e-5
    )


def test_missing_texts_of_pairs_stay_on_their_side() -> None:
    emb = make_vectorizer(missing="zero", trainer=None)
    found = emb.fit_transform([("a", None), (None, "b"), ("a", "b")])
    assert not found[0, DIM:].any()
    assert not found[1, :DIM].any()
    np.testing.assert_allclose(found[2], np.r_[found[0, :DIM], found[1, DIM:]], atol=1e-6)
    assert found[2].all()


def test_missing_values_of_frames() -> None:
    emb = make_vectorizer(missing="nan")
    for series in (
        pd.Series(["a", None, "b"]),
        pd.Series(["a", pd.NA, "b"], dtype="string"),
        pl.Series(["a", None, "b"]),
    ):
        found = emb.transform(series)
        assert np.isnan(found).all(axis=1).tolist() == [False, True, False]


def test_input_is_left_as_it_was(emb: NVEmbedVectorizer) -> None:
    texts = ["a", "b\udce9", None]
    emb.set_params(missing="zero").transform(texts)
    assert texts == ["a", "b\udce9", None]


# Order, subsets, threads


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("instruction", [None, "Find the same text"])
def test_batch_order_and_subset_change_nothing(
    dtype: str, tolerance: float, instruction: str | None, rng: np.random.Generator
) -> None:
    texts = [*make_texts(60), "", "word " * 80]
    emb = make_vectorizer(dtype=dtype, instruction=instruction)
    whole = emb.transform(texts)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, atol=1e-5)
    order = rng.permutation(len(texts))
    shuffled = emb.transform([texts[i] for i in order])
    np.testing.assert_allclose(shuffled, whole[order], rtol=0, atol=tolerance)
    alone = np.vstack([emb.transform([text]) for text in texts[::6]])
    np.testing.assert_allclose(alone, whole[::6], rtol=0, atol=tolerance)
    for batch_tokens in (1, 100):
        again = emb.set_params(batch_tokens=batch_tokens).transform(texts)
        np.testing.assert_allclose(again, whole, rtol=0, atol=tolerance)
    doubled = emb.transform(texts[:9] * 2)
    np.testing.assert_array_equal(doubled[:9], doubled[9:])


@pytest.mark.parametrize("cache", [None, "memory", "file"])
def test_threads_share_one_model(cache: str | None, fresh_dir: Path, tmp_path: Path) -> None:
    where = {"memory": EmbeddingCache(), "file": tmp_path / "cache.sqlite"}.get(str(cache))
    emb = make_vectorizer(fresh_dir, cache=where)
    texts = make_texts(40)
    expected = make_vectorizer().transform(texts)
    n_loads, barrier = registry.n_loads, threading.Barrier(8)

    def work(shift: int) -> np.ndarray:
        barrier.wait()
        return np.roll(emb.transform(texts[shift:] + texts[:shift]), shift, axis=0)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert registry.n_loads == n_loads + 1
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "eos", "multilayer"])
@pytest.mark.filterwarnings("ignore::skembed.FreshPoolingWarning")
def test_threads_under_other_poolings(pooling: str) -> None:
    # Poolings over all layers ask transformers for more than the last hidden states.
    emb = make_vectorizer(pooling=pooling)
    texts = make_texts(40)
    expected = emb.transform(texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: emb.transform(texts), range(8)))
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


# Output containers


def test_feature_names(emb: NVEmbedVectorizer) -> None:
    names = emb.get_feature_names_out()
    assert names.tolist() == [f"nvembedvectorizer{k}" for k in range(DIM)]
    assert emb.set_params(truncate_dim=3).fit(TEXTS).get_feature_names_out().tolist() == [
        "nvembedvectorizer0",
        "nvembedvectorizer1",
        "nvembedvectorizer2",
    ]


@pytest.mark.parametrize("fitted", [True, False])
def test_pandas_output_keeps_the_index(
    fitted: bool, emb: NVEmbedVectorizer, vectors: np.ndarray
) -> None:
    emb.set_output(transform="pandas")
    index = pd.Index(["x", "y", "y", 3, None], name="row")
    for X in (pd.Series(TEXTS, index=index), pd.DataFrame({"text": TEXTS}, index=index)):
        found = emb.fit(X).transform(X) if fitted else emb.transform(X)
        assert isinstance(found, pd.DataFrame)
        pd.testing.assert_index_equal(found.index, index)
        assert found.columns.tolist() == emb.get_feature_names_out().tolist()
        assert set(found.dtypes) == {np.dtype(np.float32)}
        np.testing.assert_array_equal(found.to_numpy(), vectors)
    assert emb.transform(TEXTS).index.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(emb.encode_query(TEXTS), np.ndarray), "only transform has a container"
    assert isinstance(clone(emb).transform(TEXTS), pd.DataFrame)


def test_polars_output(emb: NVEmbedVectorizer, vectors: np.ndarray) -> None:
    emb.set_output(transform="polars")
    for X in (TEXTS, pl.Series(TEXTS), pl.DataFrame({"text": TEXTS}), pd.Series(TEXTS)):
        found = emb.fit_transform(X)
        assert isinstance(found, pl.DataFrame)
        assert found.columns == emb.get_feature_names_out().tolist()
        assert set(found.dtypes) == {pl.Float32}
        np.testing.assert_array_equal(found.to_numpy(), vectors)


def test_pandas_output_of_pairs(emb: NVEmbedVectorizer) -> None:
    frame = pd.DataFrame({"anchor": TEXTS, "positive": OTHERS}, index=list("abcde"))
    found = emb.set_params(trainer=None).set_output(transform="pandas").fit_transform(frame)
    assert found.shape == (5, 2 * DIM)
    assert found.index.tolist() == list("abcde")
    assert emb.feature_names_in_.tolist() == ["anchor", "positive"]


# The bundled model


def test_bundled_model_is_the_default() -> None:
    emb = NVEmbedVectorizer(cache=None)
    texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
    found = emb.fit_transform(texts)
    assert found.shape == (4, emb.embedding_dim_)
    assert emb.model_["name"] == "skembed-mini"
    similarity = found @ found.T
    assert similarity[0, 1] > similarity[0, 2]
    assert similarity[2, 3] > similarity[2, 1]
    assert len(pickle.dumps(emb)) < 20_000
