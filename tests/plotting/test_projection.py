"""From embeddings to two dimensions."""

import sys
from typing import Any

import numpy as np
import pytest
from maps import TEXTS
from sklearn.preprocessing import FunctionTransformer

from skembed.exceptions import SkembedWarning
from skembed.plotting.display import EmbeddingMapDisplay

pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: skembed[plot]")


# From embeddings


def test_coordinates_are_reused(rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(30, 5))
    first = EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca")
    again = EmbeddingMapDisplay.from_embeddings(
        vectors, rng.integers(3, size=30), coordinates=first.coordinates, reducer=first.reducer_
    )
    assert np.array_equal(again.coordinates, first.coordinates)
    np.testing.assert_allclose(again.place(vectors), first.coordinates, atol=1e-12)
    bare = EmbeddingMapDisplay.from_embeddings(vectors, coordinates=first.coordinates)
    assert bare.reducer_ is None
    with pytest.raises(ValueError, match="must have `transform` to place new texts; there is none"):
        bare.place(vectors)


@pytest.mark.parametrize("n", [2, 9])
def test_few_texts_fall_back_to_pca_and_say_so(n: int, rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(n, 6))
    with pytest.warns(SkembedWarning, match=rf"UMAP needs at least 10 texts; got {n}\."):
        display = EmbeddingMapDisplay.from_embeddings(vectors)
    silent = EmbeddingMapDisplay.from_embeddings(vectors, reducer="pca")
    assert np.array_equal(display.coordinates, silent.coordinates)


def test_one_dimension_makes_a_line(rng: np.random.Generator) -> None:
    display = EmbeddingMapDisplay.from_embeddings(rng.normal(size=(20, 1)), reducer="pca")
    assert (display.coordinates[:, 1] == 0).all() and np.ptp(display.coordinates[:, 0]) > 1
    assert display.place([[0.5]]).shape == (1, 2)


def test_equal_embeddings_make_a_point() -> None:
    vectors = np.ones((20, 4), dtype=np.float32)
    display = EmbeddingMapDisplay.from_embeddings(
        vectors, ["a", "b"] * 10, reducer=FunctionTransformer(lambda X: X[:, :2])
    )
    assert len(display.annotations_) == 2


def test_reducer_is_cloned(rng: np.random.Generator) -> None:
    reducer = FunctionTransformer(lambda X: X[:, :2] * 2)
    vectors = rng.normal(size=(12, 4))
    display = EmbeddingMapDisplay.from_embeddings(vectors, reducer=reducer)
    assert np.array_equal(display.coordinates, 2 * vectors[:, :2])
    assert display.reducer_ is not reducer
    with pytest.raises(ValueError, match=r"finite coordinates of shape \(12, 2\); got \(12, 4\)"):
        EmbeddingMapDisplay.from_embeddings(vectors, reducer=FunctionTransformer())


BAD = np.eye(12)
BAD[3, 3] = np.nan


@pytest.mark.parametrize(
    ("X", "options", "error", "message"),
    [
        (BAD, {}, ValueError, "finite numbers; row 3 holds NaN"),
        (TEXTS, {}, TypeError, "array of numbers.*use `from_estimator`"),
        (np.empty((0, 3)), {}, ValueError, "at least one text"),
        (np.eye(1), {"reducer": "pca"}, ValueError, "at least 2 texts to make a map; got 1"),
        (np.eye(3), {"reducer": "tsne"}, ValueError, "`reducer` parameter.*'umap', 'pca'"),
        (np.eye(3), {"reducer": 3}, TypeError, "transformer with `fit_transform`"),
        (np.eye(3), {"random_state": "zero"}, TypeError, "`random_state` parameter"),
        (np.eye(3), {"texts": ["a", "b"]}, ValueError, "must hold 3 texts, one a point; got 2"),
        (np.eye(3), {"texts": "abc"}, TypeError, "`texts` parameter.*bare str"),
        (np.eye(3), {"y": [0, 1]}, ValueError, "one label a text"),
        (np.eye(3), {"coordinates": np.eye(2)}, ValueError, r"shape \(3, 2\).*got shape \(2, 2\)"),
        (np.eye(3), {"coordinates": np.eye(3)}, ValueError, r"shape \(n_texts, 2\)"),
    ],
)
def test_bad_input_is_refused_before_the_reduction(
    X: Any, options: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # what gets so far fails in another way
    with pytest.raises(error, match=message):
        EmbeddingMapDisplay.from_embeddings(X, **options)


def test_sparse_embeddings_are_refused() -> None:
    from scipy import sparse

    with pytest.raises(TypeError, match=r"dense array; got a sparse matrix.*TruncatedSVD"):
        EmbeddingMapDisplay.from_embeddings(sparse.eye(12).tocsr())


def test_missing_umap_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"`EmbeddingMapDisplay` needs `umap`.*skembed\[plot\]"):
        EmbeddingMapDisplay.from_embeddings(np.eye(12))


# UMAP itself (its functions compile at first use: one fit for all)


@pytest.fixture(scope="module")
def umap_map() -> EmbeddingMapDisplay:
    """A map of two groups that differ in direction, not in length."""
    pytest.importorskip("umap", reason="needs umap-learn: skembed[plot]")
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(2, 8), 20, axis=0) + 0.1 * rng.normal(size=(40, 8))
    vectors *= rng.uniform(0.1, 10, size=(40, 1))
    return EmbeddingMapDisplay.from_embeddings(vectors, np.repeat(["x", "y"], 20))


def test_umap_is_seeded_and_by_cosine(umap_map: EmbeddingMapDisplay) -> None:
    reducer = umap_map.reducer_
    assert (reducer.metric, reducer.random_state, reducer.n_jobs) == ("cosine", 0, 1)
    assert np.array_equal(reducer.embedding_, umap_map.coordinates.astype(np.float32))
    from umap import UMAP

    again = UMAP(metric="cosine", n_neighbors=15, random_state=0, n_jobs=1)
    assert np.array_equal(again.fit_transform(reducer._raw_data), reducer.embedding_)


def test_umap_keeps_directions_together(umap_map: EmbeddingMapDisplay) -> None:
    x, y = umap_map.coordinates[:20], umap_map.coordinates[20:]
    inner = max(np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in (x, y))
    assert np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)) > 2 * inner


def test_umap_places_new_vectors_with_their_own(umap_map: EmbeddingMapDisplay) -> None:
    new = np.eye(2, 8) * 3 + 0.05
    placed = umap_map.place(new)
    centres = umap_map.coordinates.reshape(2, 20, 2).mean(axis=1)
    distances = np.linalg.norm(placed[:, None] - centres[None], axis=-1)
    assert distances.argmin(axis=1).tolist() == [0, 1]
    assert distances.min(axis=1).max() < 0.25 * distances.max(axis=1).min()
    assert np.array_equal(umap_map.place(new), placed)
