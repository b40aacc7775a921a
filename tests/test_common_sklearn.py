"""The vectorizer inside scikit-learn: transformers of columns, grids, its own checks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from joblib import Parallel, delayed
from packaging.version import Version
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import SkipTestWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils import estimator_checks
from texts import DIM, TEXTS, make_texts
from tiny import make_vectorizer

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.cache import embedding_cache as cache_module
from skembed.exceptions import TruncationWarning
from skembed.inference.registry import registry

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default cache that holds nothing yet."""
    monkeypatch.setattr(cache_module, "_default_cache", None)


@pytest.mark.parametrize("column", ["text", ["text"]])
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_column_transformer_on_a_named_column(
    column: Any, frame: Any, emb: NVEmbedVectorizer, vectors: np.ndarray
) -> None:
    X = frame({"price": [1.0, 2.0, 3.0, 4.0, 5.0], "text": TEXTS})
    columns = ColumnTransformer([("emb", emb, column), ("rest", "passthrough", ["price"])])
    found = columns.fit_transform(X)
    np.testing.assert_allclose(found[:, :DIM], vectors, atol=1e-6)
    np.testing.assert_array_equal(found[:, DIM], [1, 2, 3, 4, 5])
    names = columns.get_feature_names_out().tolist()
    assert names == [*(f"emb__nvembedvectorizer{k}" for k in range(DIM)), "rest__price"]
    np.testing.assert_allclose(columns.transform(X[:2]), found[:2], atol=1e-5)


def test_column_transformer_with_pandas_output(emb: NVEmbedVectorizer) -> None:
    X = pd.DataFrame({"price": [1.0, 2.0], "text": ["a", "b"]}, index=[10, 20])
    columns = ColumnTransformer([("emb", emb, "text"), ("rest", "passthrough", ["price"])])
    found = columns.set_output(transform="pandas").fit_transform(X)
    assert found.index.tolist() == [10, 20]
    assert found.columns[[0, -1]].tolist() == ["emb__nvembedvectorizer0", "rest__price"]


def test_feature_union_with_tfidf(emb: NVEmbedVectorizer, vectors: np.ndarray) -> None:
    union = FeatureUnion([("tfidf", TfidfVectorizer()), ("emb", emb)])
    found = union.fit_transform(TEXTS)
    names = union.get_feature_names_out()
    assert found.shape == (5, len(names))
    np.testing.assert_allclose(found[:, -DIM:].toarray(), vectors, atol=1e-6)
    assert names[-1] == f"emb__nvembedvectorizer{DIM - 1}"


def make_pipe(model: Path, **parameters: Any) -> Pipeline:
    emb = make_vectorizer(model, **parameters)
    return Pipeline([("emb", emb), ("clf", LogisticRegression(max_iter=1_000))])


LABELS = np.arange(100) % 2


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("grid", "n_embedded"),
    [
        ({"clf__C": [0.1, 1.0, 10.0]}, 100),
        ({"emb__truncate_dim": [8, 16, None]}, 100),
        ({"emb__normalize": [True, False], "emb__truncate_dim": [8, None]}, 100),
        ({"emb__instruction": [None, "STS", "Find the same text"]}, 300),
    ],
    ids=["C", "truncate_dim", "normalize", "instruction"],
)
def test_grid_search_embeds_each_text_once(
    grid: dict[str, Any], n_embedded: int, fresh_dir: Path, embedded: list[int]
) -> None:
    n_loads = registry.n_loads
    search = GridSearchCV(make_pipe(fresh_dir, cache="memory"), grid, cv=5, error_score="raise")
    search.fit(make_texts(100), LABELS)
    assert registry.n_loads - n_loads == 1
    assert sum(embedded) == n_embedded
    # The grid points are truly different ones: each has its own columns or vectors.
    assert len(search.cv_results_["params"]) == np.prod([len(v) for v in grid.values()])
    assert search.predict(["a new text"]).shape == (1,)
    assert sum(embedded) == n_embedded + 1


@pytest.mark.usefixtures("empty_cache")
def test_grid_over_instruction_and_dimension(fresh_dir: Path, embedded: list[int]) -> None:
    texts = make_texts(60)
    grid = {"emb__instruction": [None, "Find the same text"], "emb__truncate_dim": [4, None]}
    search = GridSearchCV(make_pipe(fresh_dir, cache="memory"), grid, cv=3, error_score="raise")
    search.fit(texts, LABELS[:60])
    assert sum(embedded) == 120
    best = search.best_params_
    expected = make_pipe(fresh_dir).set_params(**best).fit(texts, LABELS[:60])
    np.testing.assert_allclose(
        search.predict_proba(texts), expected.predict_proba(texts), atol=1e-4
    )


def loads_of_workers() -> dict[int, int]:
    """Process -> loads so far, of joblib's two workers."""

    # Inside a function, so that workers are sent it by value and need not import this file.
    def count_loads() -> tuple[int, int]:
        import os
        import time

        from skembed.inference.registry import registry

        time.sleep(0.1)  # long enough for every worker to take a task
        return os.getpid(), registry.n_loads

    return dict(Parallel(n_jobs=2)(delayed(count_loads)() for _ in range(6)))


def test_cross_validation_in_workers_loads_once_each(fresh_dir: Path) -> None:
    texts, before = make_texts(100), loads_of_workers()
    assert os.getpid() not in before
    pipe = make_pipe(fresh_dir)
    scores = cross_val_score(pipe, texts, LABELS, cv=6, n_jobs=2, error_score="raise")
    after = loads_of_workers()
    loads = [after[pid] - before.get(pid, 0) for pid in after]
    # Six tasks: more loads than workers would mean that a worker has loaded for each task.
    assert set(loads) <= {0, 1}
    assert sum(loads) >= 1
    np.testing.assert_allclose(scores, cross_val_score(pipe, texts, LABELS, cv=6), atol=0.051)


def test_n_jobs_gives_the_same_vectors() -> None:
    texts = make_texts(300)
    texts += [texts[0], "word " * 600]
    with pytest.warns(TruncationWarning, match="1 of 301 texts"):
        expected = make_vectorizer().transform(texts)
    cache = EmbeddingCache()
    emb = make_vectorizer(n_jobs=2, cache=cache)
    with pytest.warns(TruncationWarning, match="1 of 301 texts"):
        found = emb.transform(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "_lease" in emb.__dict__
    assert not emb._lease.models, "this process has not loaded the weights"
    assert len(cache) == 301


@pytest.mark.skipif(
    Version(sklearn.__version__) < Version("1.6"),
    reason="scikit-learn 1.5 has no generator of checks",
)
def test_scikit_learn_generator() -> None:
    names = []
    with warnings.catch_warnings():
        # It says that it has few checks for estimators of text.
        warnings.simplefilter("ignore", SkipTestWarning)
        for estimator, check in estimator_checks.estimator_checks_generator(make_vectorizer()):
            check(estimator)
            names.append(check.func.__name__)
    assert names


@pytest.mark.parametrize(
    "name",
    [
        "check_parameters_default_constructible",
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_repr",
        "check_estimator_cloneable",
        "check_valid_tag_types",
        "check_mixin_order",
    ],
)
def test_scikit_learn_checks_that_need_no_numbers(name: str) -> None:
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip("not in this release of scikit-learn")
    check("NVEmbedVectorizer", make_vectorizer())


def test_tags(emb: NVEmbedVectorizer) -> None:
    if Version(sklearn.__version__) < Version("1.6"):
        pytest.skip("scikit-learn 1.5 has other tags")
    from sklearn.utils import get_tags

    tags = get_tags(emb)
    assert tags.input_tags.string
    assert not tags.input_tags.two_d_array
    assert not tags.requires_fit
    assert get_tags(make_vectorizer(trainer=ContrastiveTrainer())).requires_fit
