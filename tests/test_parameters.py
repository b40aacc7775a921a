"""Every parameter of every estimator and public function: NumPy's scalars count, garbage is named.

Generated from the public names and from `get_params`, so that a new one is covered as it comes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from tiny import make_vectorizer

import skembed
from skembed import (
    ContrastiveTrainer,
    EmbeddingCache,
    EmbeddingClassifier,
    EmbeddingClusterer,
    EmbeddingMapDisplay,
    EmbeddingMapper,
    EmbeddingQuantizer,
    MTEBEncoder,
    NVEmbedVectorizer,
    Reranker,
    Retriever,
    SimilarityRegressor,
    SkembedWarning,
    TrainingTask,
    ZeroShotClassifier,
    evaluate,
    mine_hard_negatives,
)
from skembed._validation import CheckedParameters
from skembed.evaluation import (
    ClassificationTask,
    ClusteringTask,
    EvaluationError,
    RerankingTask,
    RetrievalTask,
    STSTask,
)
from skembed.inference.registry import registry

PAIRS = [(f"the card number {i} is lost", f"account {i} is open") for i in range(12)]
TEXTS = [text for pair in PAIRS for text in pair]
LABELS = ["card", "account"] * 12
ROWS = np.random.default_rng(0).normal(size=(24, 6))


class LoadedError(Exception):
    """Raised in place of loading weights: all checks before have passed."""


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no weights be loaded."""

    def get(*args: Any) -> Any:
        raise LoadedError

    monkeypatch.setattr(type(registry), "get", get)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder of its own: some garbage is a good file name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkembedWarning)
        yield


# Estimators: a good one, and all that it is for.
USES: dict[type, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    NVEmbedVectorizer: (
        {"model": str(make_vectorizer().model), "device": "cpu", "dtype": "float32"},
        lambda e: e.fit(TEXTS).transform(TEXTS),
    ),
    ContrastiveTrainer: (
        {"max_steps": 2, "random_state": 0, "batch_size": 8, "validation_fraction": 0.25},
        lambda t: make_vectorizer(trainer=t).fit(PAIRS).transform(TEXTS),
    ),
    EmbeddingClassifier: ({"vectorizer": None}, lambda e: e.fit(ROWS, LABELS).predict_proba(ROWS)),
    ZeroShotClassifier: (
        {"vectorizer": None, "descriptions": {"a": ROWS[0], "b": ROWS[1]}},
        lambda e: e.fit(ROWS[2:4], ["a", "b"]).predict_proba(ROWS),
    ),
    EmbeddingClusterer: (
        {"vectorizer": None, "n_clusters": 3, "random_state": 0},
        lambda e: e.fit(ROWS, texts=TEXTS if e.vectorizer is None else None).labels_,
    ),
    SimilarityRegressor: (
        {"vectorizer": None, "random_state": 0},
        lambda e: e.fit(ROWS, ROWS[:, 0]).predict(ROWS),
    ),
    Retriever: (
        {"vectorizer": None, "storage": "int8", "rescore_storage": "float16", "device": "cpu"},
        lambda e: e.fit(ROWS).search(ROWS, top_k=3).scores,
    ),
    Reranker: ({"vectorizer": None}, lambda e: e.fit().predict(ROWS)),
    EmbeddingQuantizer: ({}, lambda e: e.fit(ROWS).transform(ROWS)),
}
# Good values where the default is None.
GOOD: dict[str, Any] = {
    "instruction": "STS",
    "document_instruction": "STS",
    "truncate_dim": 8,
    "pooling": "mean",
    "revision": "main",
    "n_jobs": 1,
    "mine_negatives": "perc_pos",
    "checkpoint_steps": 1,
    "label_instruction": "Find it again",
}
GARBAGE = {
    "object": object(),
    "class": int,
    "function": len,
    "list": [],
    "ragged": [[1], [1, 2]],
    "dict": {},
    "bytes": b"x",
    "array": np.array([1.5, 2.5]),
    "complex": 1j,
    "date": np.datetime64("2020-01-01"),
    "set": {1},
    "generator": iter(()),
    "tensor": torch.ones(2),
    "NA": pd.NA,
    "series": pd.Series([1, 2]),
    "generator of numbers": np.random.default_rng(0),
    "large": 2**62,
    "very negative": -(2**62),
    "minus one": -1,
    "zero": 0,
    "half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "beyond int64": 2**70,
    "beyond float": -(10**400),
    "beyond str": 10**5000,
    "empty": "",
    "null": "a\0b",
    "str": "garbage that is none",
    "long": "x" * 500,
    "True": True,
    "None": None,
}
every_estimator = pytest.mark.parametrize("kind", USES, ids=lambda kind: kind.__name__)
every_parameter = pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in USES for name in inspect.signature(kind).parameters],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)


def make(kind: type, **changes: Any) -> Any:
    return kind(**{**USES[kind][0], **changes})


def as_numpy(value: Any) -> list[Any]:
    """Return a value as the scalars that a grid of NumPy's would hold."""
    if isinstance(value, tuple):
        return [np.array(value)]
    if isinstance(value, str):
        return [np.str_(value), np.array(value)]
    if isinstance(value, bool):
        return [np.bool_(value), np.array(value), int(value), np.uint8(value)]
    if isinstance(value, int):
        return [np.int64(value), np.uint16(value), np.array(value)]
    if isinstance(value, float):
        return [np.float64(value), np.array(value)]
    return []


def test_the_tables_are_complete() -> None:
    """An estimator that is new in the package fails here until it has its row and its rules."""
    public = {getattr(skembed, name) for name in skembed.__all__}
    estimators = {each for each in public if hasattr(each, "get_params")}
    assert estimators == set(USES)
    for kind in estimators:
        assert issubclass(kind, CheckedParameters)
        assert kind._rules.keys() == kind(**USES[kind][0]).get_params(deep=False).keys()


# NumPy's scalars


@every_parameter
def test_numpy_values_are_read_as_built_in_ones(kind: type, name: str) -> None:
    default = getattr(make(kind), name)
    default = GOOD.get(name) if default is None else default
    expected = getattr(make(kind, **{name: default})._checked(), name)
    for value in as_numpy(default):
        checked = getattr(make(kind, **{name: value})._checked(), name)
        assert type(checked) is type(expected)
        assert checked == expected
        with_list = [checked] if not isinstance(checked, (list, tuple)) else checked
        for item in with_list:
            assert isinstance(item, EmbeddingCache) or type(item).__module__ == "builtins"


def all_numpy(kind: type) -> Any:
    """Return an estimator whose parameters are NumPy's scalars, as far as there are any."""
    values = make(kind).get_params(deep=False)
    changes = {name: as_numpy(value)[:1] for name, value in values.items()}
    return make(kind, **{name: change[0] for name, change in changes.items() if change})


@every_estimator
def test_numpy_values_give_the_same_results(kind: type) -> None:
    use = USES[kind][1]
    expected, found = use(make(kind)), use(all_numpy(kind))
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    else:
        assert found == expected
    clone(all_numpy(kind))


def read_folder(folder: Path) -> dict[str, Any]:
    """Return the values of JSON files by name, without the random part of an index's names."""
    found = {}
    for path in folder.rglob("*"):
        text = path.read_text() if path.suffix == ".json" else "null"
        found[re.sub("-[0-9a-f]{12}", "", path.name)] = json.loads(
            re.sub('-[0-9a-f]{12}|[0-9a-f]{32,}|"crc32": [0-9]+,', "", text)
        )
    return found


@pytest.mark.parametrize("kind", [NVEmbedVectorizer, ContrastiveTrainer, Retriever])
def test_numpy_values_are_saved_as_built_in_ones(kind: type, tmp_path: Path) -> None:
    for folder, estimator in {"plain": make(kind), "numpy": all_numpy(kind)}.items():
        path = tmp_path / folder
        if kind is Retriever:
            estimator.fit(ROWS).save(path)
        else:
            if kind is ContrastiveTrainer:
                estimator.set_params(checkpoint_dir=tmp_path / f"{folder} state")
                estimator = make_vectorizer(trainer=estimator).fit(PAIRS)
            estimator.save_pretrained(path)
    assert read_folder(tmp_path / "numpy") == read_folder(tmp_path / "plain")


def test_a_run_saved_with_numpy_values_goes_on_with_built_in_ones(
    tmp_path: Path, steps: list[int]
) -> None:
    """The state in `checkpoint_dir` is that of equal parameters, whatever they came as."""
    for rate, rank in ((np.float64(1e-3), np.int64(8)), (1e-3, 8)):
        trainer = ContrastiveTrainer(
            r=rank,
            learning_rate=rate,
            max_steps=2,
            epochs=2,
            random_state=0,
            checkpoint_dir=tmp_path / "run",
        )
        make_vectorizer(trainer=trainer).fit(PAIRS)
    assert steps == [0, 1]  # the second fit found the run complete


# Garbage


def check_outcome(
    call: Callable[[], Any], *, name: str, owner: str, words: tuple[str, ...]
) -> None:
    """Make a call: it passes all checks, or its error names the parameter and its owner."""
    before = sorted(Path.cwd().rglob("*"))
    try:
        call()
    except LoadedError:
        return
    except EvaluationError as error:
        assert isinstance(error.__cause__, LoadedError)
    except FileNotFoundError as error:
        assert GARBAGE["str"] in str(error) or "no such folder" in str(error)
    except (TypeError, ValueError, OSError) as error:
        message = str(error)
        assert any(f"`{word}" in message for word in (name, *words)), message
        assert owner.partition(".")[0] in message or words, message
        assert re.search(r"; got|is a|is False|ends after|has \d", message), message
        assert len(message) < 1000
        assert sorted(Path.cwd().rglob("*")) == before, "an error leaves no file"


@pytest.fixture
def each_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Iterator over names and values of garbage, each in an empty folder of its own."""

    def iterate() -> Iterator[tuple[str, Any]]:
        for number, (label, value) in enumerate(GARBAGE.items()):
            folder = tmp_path / str(number)
            folder.mkdir()
            monkeypatch.chdir(folder)
            yield label, value
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close("all")

    return iterate()


@pytest.mark.usefixtures("no_loading")
@every_parameter
def test_garbage_is_named_before_anything_is_loaded(
    kind: type, name: str, each_garbage: Iterator[tuple[str, Any]]
) -> None:
    for _, value in each_garbage:
        estimator = make(kind).set_params(**{name: value})
        # With any encoder, X must be texts; a str may name a model, which is not there then.
        words = ("model", "X") if name == "vectorizer" else ()
        check_outcome(
            lambda e=estimator: USES[kind][1](e), name=name, owner=kind.__name__, words=words
        )


def plot(**options: Any) -> Any:
    display = EmbeddingMapDisplay.from_embeddings(ROWS, LABELS, reducer="pca", **options)
    return display.plot(**{k: v for k, v in options.items() if k not in ("random_state",)})


fitted = Retriever(None).fit(ROWS)
codes = EmbeddingQuantizer().fit(ROWS)
GRADES = {i: {i: 1} for i in range(12)}
QUERIES, DOCUMENTS = ([pair[k] for pair in PAIRS] for k in range(2))
# Owner: a call with options, and the options.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "EmbeddingCache": (EmbeddingCache, ("path", "max_bytes", "dtype")),
    "MTEBEncoder": (
        lambda **options: MTEBEncoder(**{"vectorizer": make_vectorizer(), **options}),
        ("vectorizer", "instructions", "name", "revision"),
    ),
    "EmbeddingMapper": (
        lambda **options: EmbeddingMapper(**{"vectorizer": make_vectorizer(), **options}),
        ("vectorizer", "column", "output_column", "method"),
    ),
    "EmbeddingMapDisplay": (
        plot,
        ("annotate", "legend", "point_size", "alpha", "cmap"),
    ),
    "EmbeddingMapDisplay.from_embeddings": (
        lambda **options: EmbeddingMapDisplay.from_embeddings(
            ROWS, **{"reducer": "pca", **options}
        ),
        ("reducer", "random_state", "names", "colors", "noise_label", "texts", "coordinates"),
    ),
    "mine_hard_negatives": (
        lambda **options: mine_hard_negatives(
            PAIRS, **{"vectorizer": make_vectorizer(), **options}
        ),
        (
            "vectorizer",
            "n_negatives",
            "strategy",
            "threshold",
            "sampling",
            "random_state",
            "verbose",
        ),
    ),
    "tasks[0]": (
        lambda **options: make_vectorizer().fit_tasks([TrainingTask(PAIRS, **options)]),
        ("instruction", "document_instruction", "in_batch_negatives", "weight", "name"),
    ),
    "NVEmbedVectorizer.fit_tasks": (
        lambda **options: make_vectorizer().fit_tasks(**options),
        ("tasks",),
    ),
    "evaluate": (
        lambda **options: evaluate(make_vectorizer(), STSTask(PAIRS, range(12)), **options),
        ("confidence", "n_bootstraps", "on_error", "verbose"),
    ),
    "ClassificationTask": (
        lambda **options: evaluate(make_vectorizer(), ClassificationTask(TEXTS, LABELS, **options)),
        ("name", "samples_per_label", "n_experiments", "metric", "random_state"),
    ),
    "ClusteringTask": (
        lambda **options: evaluate(make_vectorizer(), ClusteringTask(TEXTS, LABELS, **options)),
        (
            "name",
            "max_depth",
            "n_experiments",
            "sample_size",
            "max_fraction",
            "max_texts",
            "metric",
        ),
    ),
    "RetrievalTask": (
        lambda **options: evaluate(
            make_vectorizer(), RetrievalTask(QUERIES, DOCUMENTS, GRADES, **options)
        ),
        ("name", "top_k", "ignore_identical_ids", "metric", "random_state"),
    ),
    "RerankingTask": (
        lambda **options: evaluate(
            make_vectorizer(),
            RerankingTask(QUERIES, [DOCUMENTS] * 12, [[1] * 12] * 12, **options),
        ),
        ("name", "top_k", "metric", "random_state"),
    ),
    "NVEmbedVectorizer.transform_to": (
        lambda **options: make_vectorizer().transform_to(TEXTS, **{"path": "out", **options}),
        (
            *("path", "format", "side", "rows_per_shard", "embedding_column", "use_cache"),
            *("overwrite", "keep_columns", "ids", "column"),
        ),
    ),
    "NVEmbedVectorizer.save_pretrained": (
        lambda **options: make_vectorizer().save_pretrained(**{"path": "out", **options}),
        ("path", "merge"),
    ),
    "NVEmbedVectorizer.from_pretrained": (
        lambda **options: NVEmbedVectorizer.from_pretrained(**options),
        ("path",),
    ),
    "Retriever": (lambda **options: fitted.search(ROWS, **options), ("top_k",)),
    "Retriever.save": (lambda **options: fitted.save(**options), ("path",)),
    "Retriever.load": (
        lambda **options: Retriever.load(**{"path": "no such folder", **options}),
        ("path", "mmap"),
    ),
    "EmbeddingQuantizer.search": (
        lambda **options: codes.search(ROWS, codes.transform(ROWS), **options),
        ("top_k", "rescore"),
    ),
    "open_embeddings": (
        lambda **options: skembed.open_embeddings(**{"path": "no such folder", **options}),
        ("path", "verify"),
    ),
}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, (_, names) in CALLS.items() for name in names]
)
def test_garbage_in_functions_is_named(
    owner: str, name: str, each_garbage: Iterator[tuple[str, Any]]
) -> None:
    for label, value in each_garbage:
        words = ("model",) if name == "path" and label == "str" else ()
        check_outcome(
            lambda v=value: CALLS[owner][0](**{name: v}), name=name, owner=owner, words=words
        )


# Names of parameters


@every_estimator
def test_an_unknown_name_is_answered_with_the_names(kind: type) -> None:
    with pytest.raises(
        TypeError, match=rf"`{kind.__name__}` has no parameter `nonsense`"
    ) as caught:
        kind(nonsense=1)
    names = list(inspect.signature(kind).parameters)
    assert names[0] in str(caught.value)
    for name in names:
        with pytest.raises(TypeError, match=f"here it is `{name}`"):
            kind(**{f"{name}_": 1})


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        *((NVEmbedVectorizer, w, "model") for w in ("model_name", "model_name_or_path")),
        *((NVEmbedVectorizer, w, "instruction") for w in ("prompt", "prompt_name")),
        (NVEmbedVectorizer, "normalize_embeddings", "normalize"),
        (NVEmbedVectorizer, "batch_size", "batch_tokens"),
        (NVEmbedVectorizer, "max_seq_length", "max_length"),
        (NVEmbedVectorizer, "show_progress_bar", "verbose"),
        (NVEmbedVectorizer, "torch_dtype", "dtype"),
        (NVEmbedVectorizer, "max_len", "max_length"),
        (ContrastiveTrainer, "num_train_epochs", "epochs"),
        (ContrastiveTrainer, "per_device_train_batch_size", "batch_size"),
        (ContrastiveTrainer, "lr", "learning_rate"),
        (EmbeddingClassifier, "model_name", "vectorizer"),
        (EmbeddingClassifier, "clf", "head"),
        (Retriever, "metric", "similarity"),
    ],
)
def test_words_of_other_packages(kind: type, theirs: str, ours: str) -> None:
    with pytest.raises(TypeError) as caught:
        kind(**{theirs: 1})
    message = str(caught.value)
    assert message.startswith(
        f"`{kind.__name__}` has no parameter `{theirs}`; here it is `{ours}`. The page"
    )


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("batch_size", "batch_tokens"),
        ("prompt_name", "instruction"),
        ("show_progress_bar", "verbose"),
        ("device", "device"),
    ],
)
def test_words_of_other_packages_in_methods(method: str, theirs: str, ours: str) -> None:
    message = f"`NVEmbedVectorizer.{method}` has no parameter `{theirs}`; set `{ours}` of"
    with pytest.raises(TypeError, match=message):
        getattr(make_vectorizer(), method)(["a"], **{theirs: 1})


@every_estimator
def test_signatures_are_whole(kind: type) -> None:
    names = list(inspect.signature(kind).parameters)
    assert names == list(inspect.signature(kind.__init__).parameters)[1:]
    assert set(names) == set(make(kind).get_params(deep=False))
    assert inspect.getsource(kind.__init__).lstrip().startswith("def __init__(")
    assert clone(make(kind)).get_params().keys() == make(kind).get_params().keys()


# What is unambiguous counts


def test_what_is_unambiguous_counts(tmp_path: Path) -> None:
    given: dict[str, Any] = {"cache": "memory", "normalize": True}
    plain = make_vectorizer(**given)._checked()
    for changes in (
        {"normalize": 1, "verbose": 0, "store_weights": np.int8(0)},
        {"cache": True},
        {"cache": np.True_},
        {"cache": ":memory:"},
        {"device": torch.device("cpu")},
        {"dtype": torch.float32},
        {"dtype": np.float32},
        {"dtype": np.dtype("float32")},
        {"dtype": "torch.float32"},
    ):
        assert make_vectorizer(**{**given, **changes})._checked() == plain, changes
    assert make_vectorizer(cache=False)._checked().cache is None
    assert make_vectorizer(device=None)._checked().device == "auto"
    assert make_vectorizer(device=np.int64(1))._checked().device == "cuda:1"
    assert make_vectorizer(device=[0, torch.device("cuda", 1)])._checked().device == (
        "cuda:0",
        "cuda:1",
    )
    assert Retriever(None, device=torch.device("cpu"), storage=np.float16).fit(ROWS)
    assert EmbeddingQuantizer(np.int8).fit(ROWS).transform(ROWS).dtype == np.int8
    found = make_vectorizer(normalize=1, device=torch.device("cpu"), dtype=torch.float32)
    np.testing.assert_array_equal(found.transform(TEXTS), make_vectorizer().transform(TEXTS))


@pytest.mark.parametrize(
    "cache", ["", "Memory", "none", "False", ":MEMORY:", "file:cache.db?mode=memory", "sqlite:///a"]
)
def test_a_cache_that_is_no_path_makes_no_file(cache: str) -> None:
    with pytest.raises(
        ValueError, match="`cache` parameter of `NVEmbedVectorizer` must be None, 'm"
    ):
        make_vectorizer(cache=cache).transform(TEXTS)
    assert not list(Path.cwd().iterdir())


def test_the_cache_class_knows_the_word_too() -> None:
    with pytest.raises(ValueError, match="`path` parameter of `EmbeddingCache`.*Pass None, or"):
        EmbeddingCache(":memory:")


def test_saved_settings_are_json(tmp_path: Path) -> None:
    """A failed save leaves a good folder as it was; NumPy's numbers are no reason to fail."""
    make_vectorizer(truncate_dim=np.array(8)).save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "skembed.json").read_text())
    assert settings["truncate_dim"] == 8
    assert NVEmbedVectorizer.from_pretrained(tmp_path / "model").transform(["a"]).shape == (1, 8)
