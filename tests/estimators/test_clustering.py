"""`EmbeddingClusterer`: clusters, their names, their number, noise and new texts."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_vectorizer import FakeVectorizer
from sklearn.base import clone
from sklearn.cluster import DBSCAN, HDBSCAN, AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_rand_score, silhouette_score, v_measure_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from skembed.estimators.cluster_names import compute_class_tfidf
from skembed.estimators.clustering import EmbeddingClusterer
from skembed.exceptions import SkembedWarning

WORDS = {
    "card": "card stolen lost blocked plastic".split(),
    "account": "account savings joint opening new".split(),
    "fee": "fee charge price expensive refund".split(),
    "loan": "loan bond mortgage debt rate".split(),
}
LABELS = np.arange(80) % 4


def make_texts(seed: int = 0) -> list[str]:
    """Four words of the class of each text, drawn with repetition."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list(WORDS.values())[c], 4)) for c in LABELS]


TEXTS, NEW = make_texts(), make_texts(1)
VECTORS, NEW_VECTORS = FakeVectorizer().transform(TEXTS), FakeVectorizer().transform(NEW)
NAMED = ("kmeans", "minibatch_kmeans", "agglomerative")


def make_clusterer(vectorizer: Any = None, **parameters: Any) -> EmbeddingClusterer:
    parameters = {"n_clusters": 4, "random_state": 0, **parameters}
    return EmbeddingClusterer(vectorizer, **parameters)


def make_noisy() -> np.ndarray:
    """Two tight groups of 30 on the axes, and 6 points far from both."""
    rng = np.random.default_rng(0)
    centers = np.repeat(np.eye(8)[:2], 30, axis=0)
    return np.vstack([centers + rng.normal(0, 0.02, (60, 8)), rng.normal(0, 3, (6, 8))])


@parametrize_with_checks([EmbeddingClusterer(vectorizer=None)])
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


# Clusters


@pytest.mark.parametrize("clusterer", [*NAMED, KMeans(n_init=3), AgglomerativeClustering()])
def test_clusters_are_found(clusterer: Any) -> None:
    found = make_clusterer(FakeVectorizer(), clusterer=clusterer).fit(TEXTS)
    assert found.labels_.dtype == np.int64
    assert (found.n_clusters_, len(found.cluster_centers_)) == (4, 4)
    assert adjusted_rand_score(LABELS, found.labels_) > 0.9
    assert adjusted_rand_score(LABELS, found.predict(NEW)) > 0.9
    assert found.score(NEW, LABELS) == v_measure_score(LABELS, found.predict(NEW))
    assert np.isinf(found.noise_radii_).all()


def test_kmeans_is_that_of_scikit_learn() -> None:
    found = make_clusterer(clusterer=KMeans(4, random_state=3), n_clusters=None, random_state=None)
    plain = KMeans(4, random_state=3).fit(VECTORS)
    np.testing.assert_array_equal(found.fit_predict(VECTORS), plain.labels_)
    np.testing.assert_array_equal(found.cluster_centers_, plain.cluster_centers_)
    np.testing.assert_array_equal(found.predict(NEW_VECTORS), plain.predict(NEW_VECTORS))


def test_centres_are_means_where_the_clusterer_has_none() -> None:
    found = make_clusterer(clusterer="agglomerative").fit(VECTORS)
    for c in range(4):
        mean = VECTORS[found.labels_ == c].mean(axis=0)
        np.testing.assert_allclose(found.cluster_centers_[c], mean, atol=1e-6)
    distances = ((NEW_VECTORS[:, None] - found.cluster_centers_) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.predict(NEW_VECTORS), distances.argmin(axis=1))


def test_seed_decides() -> None:
    first, second = (make_clusterer(n_clusters=7).fit(VECTORS) for _ in range(2))
    np.testing.assert_array_equal(first.labels_, second.labels_)
    others = [make_clusterer(n_clusters=7, random_state=s).fit(VECTORS).labels_ for s in range(5)]
    assert any((labels != first.labels_).any() for labels in others)


def test_own_reducer() -> None:
    found = make_clusterer(reducer=PCA(3, random_state=0)).fit(VECTORS)
    assert found.clusterer_.n_features_in_ == 3
    assert found.cluster_centers_.shape == (4, 64), "centres are in the space of the embeddings"
    assert adjusted_rand_score(LABELS, found.predict(NEW_VECTORS)) > 0.9


# Their number


def test_number_of_clusters_is_chosen() -> None:
    found = make_clusterer(n_clusters="auto").fit(VECTORS)
    assert found.n_clusters_ == 4
    assert min(found.silhouettes_) == 2
    assert max(found.silhouettes_) == 40
    best = max(found.silhouettes_, key=found.silhouettes_.__getitem__)
    assert best == 4
    expected = silhouette_score(VECTORS, found.labels_)
    assert found.silhouettes_[4] == pytest.approx(expected, abs=1e-6)
    by_default = EmbeddingClusterer(None, random_state=0).fit(VECTORS)
    assert by_default.silhouettes_ == found.silhouettes_


def test_given_numbers_are_tried() -> None:
    found = make_clusterer(n_clusters=range(3, 6), clusterer="agglomerative").fit(VECTORS)
    assert list(found.silhouettes_) == [3, 4, 5]
    assert found.n_clusters_ == 4
    assert make_clusterer(n_clusters=np.array([5])).fit(VECTORS).silhouettes_ == {}


def test_many_texts_choose_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skembed.estimators.clustering.MAX_SILHOUETTE_ROWS", 40)
    found = make_clusterer(n_clusters=[3, 4, 5]).fit(VECTORS)
    assert found.n_clusters_ == 4
    assert len(found.labels_) == 80


def test_curve_is_drawn() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = make_clusterer(n_clusters=[2, 4, 6]).fit(VECTORS)
    axes = found.plot_silhouettes()
    curve, mark = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(curve.get_ydata(), list(found.silhouettes_.values()))
    assert mark.get_xdata()[0] == found.n_clusters_ == 4
    figure, own = pyplot.subplots()
    assert found.plot_silhouettes(ax=own) is own
    pyplot.close("all")
    with pytest.raises(ValueError, match="not searched. Fit with n_clusters='auto'"):
        make_clusterer().fit(VECTORS).plot_silhouettes()


# Noise


@pytest.mark.parametrize("clusterer", ["hdbscan", DBSCAN(0.3), HDBSCAN(5, copy=True)])
def test_noise_is_kept_apart(clusterer: Any) -> None:
    X = make_noisy()
    texts = [f"left{i} word" for i in range(30)] + [f"right{i} word" for i in range(30)]
    texts += ["noise noise noise"] * 6
    found = make_clusterer(clusterer=clusterer, n_clusters=None).fit(X, texts=texts)
    assert found.n_clusters_ == 2
    assert (found.labels_[60:] == -1).all()
    np.testing.assert_allclose(found.cluster_centers_, np.eye(8)[:2], atol=0.05)
    assert set(found.top_terms_) == set(found.representative_texts_) == {0, 1}
    assert "noise" not in sum(found.top_terms_.values(), [])
    near, far = np.eye(8)[:2], 5 * np.eye(8)[2:4]
    np.testing.assert_array_equal(found.predict(near), found.labels_[[0, 30]])
    np.testing.assert_array_equal(found.predict(far), [-1, -1])


def test_noise_quantile_is_the_share_of_a_cluster_within_its_radius() -> None:
    X = make_noisy()
    for quantile in (0.5, 1.0):
        found = make_clusterer(clusterer="hdbscan", n_clusters=None, noise_quantile=quantile).fit(X)
        members = found.labels_ >= 0
        kept = (found.predict(X)[members] == found.labels_[members]).mean()
        assert kept == pytest.approx(quantile, abs=0.05)


def test_nothing_but_noise_is_warned_about() -> None:
    X = np.random.default_rng(0).normal(0, 5, (12, 8))
    clusterer = make_clusterer(clusterer=DBSCAN(0.01), n_clusters=None)
    with pytest.warns(SkembedWarning, match="All 12 texts are noise"):
        clusterer.fit(X)
    assert clusterer.n_clusters_ == 0
    assert clusterer.cluster_centers_.shape == (0, 8)
    np.testing.assert_array_equal(clusterer.predict(X), [-1] * 12)
    assert clusterer.representative_indices_ == {}


@pytest.mark.slow
def test_umap_before_density_clustering() -> None:
    pytest.importorskip("umap")
    found = EmbeddingClusterer(
        FakeVectorizer(), clusterer="hdbscan", reducer="umap", random_state=0
    ).fit(TEXTS)
    assert found.reducer_.n_components == 5
    assert found.clusterer_.n_features_in_ == 5
    assert adjusted_rand_score(LABELS, found.labels_) > 0.8
    assert adjusted_rand_score(LABELS, found.predict(NEW)) > 0.6
    again = clone(found).fit(TEXTS)
    np.testing.assert_array_equal(again.labels_, found.labels_)


# What they are about


def test_class_tfidf_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    counts, labels = rng.integers(0, 3, (20, 6)), rng.integers(0, 3, 20)
    found = compute_class_tfidf(counts, labels).toarray()
    tf = np.array([counts[labels == c].sum(axis=0) for c in range(3)])
    expected = tf * np.log(1 + tf.sum(axis=1).mean() / tf.sum(axis=0))
    np.testing.assert_allclose(found, expected)


def test_terms_and_representatives_say_what_a_cluster_is_about() -> None:
    found = make_clusterer(FakeVectorizer(), n_terms=5, n_representatives=4).fit(TEXTS)
    assert sorted(map(sorted, found.top_terms_.values())) == sorted(map(sorted, WORDS.values()))
    for c, terms in found.top_terms_.items():
        assert found.cluster_names_[c] == ", ".join(terms[:3])
        rows = found.representative_indices_[c]
        shown = found.representative_texts_[c]
        assert [TEXTS[row] for row in rows] == shown
        assert len(set(shown)) == len(shown) == 4
        assert (found.labels_[rows] == c).all()
        distances = np.linalg.norm(VECTORS - found.cluster_centers_[c], axis=1)
        assert (np.diff(distances[rows]) >= 0).all()
        assert distances[rows[0]] == distances[found.labels_ == c].min()


def test_no_text_twice_among_representatives() -> None:
    texts = ["card card card"] * 10 + ["card card fee"] + ["loan rate"] * 5
    found = make_clusterer(FakeVectorizer(), n_clusters=2).fit(texts)
    c = found.labels_[0]
    assert found.representative_texts_[c] == ["card card card", "card card fee"]
    assert found.representative_indices_[c] == [0, 10]


def test_own_term_vectorizer_is_cloned() -> None:
    counter = CountVectorizer(ngram_range=(2, 2))
    found = make_clusterer(FakeVectorizer(), term_vectorizer=counter).fit(TEXTS)
    assert all(" " in term for terms in found.top_terms_.values() for term in terms)
    assert not hasattr(counter, "vocabulary_")


def test_stop_words_alone_make_no_terms() -> None:
    found = make_clusterer(FakeVectorizer(), n_clusters=2).fit(["the", "the of", "and", "and a"])
    assert found.top_terms_ == {0: [], 1: []}
    assert found.cluster_names_ == {0: "cluster 0", 1: "cluster 1"}


def test_texts_behind_embeddings() -> None:
    on_texts = make_clusterer(FakeVectorizer()).fit(TEXTS)
    pipe = make_pipeline(FakeVectorizer(), make_clusterer())
    pipe.fit(TEXTS, embeddingclusterer__texts=TEXTS)
    assert pipe[-1].top_terms_ == on_texts.top_terms_
    assert pipe[-1].representative_texts_ == on_texts.representative_texts_
    np.testing.assert_array_equal(pipe.predict(NEW), on_texts.predict(NEW))
    without = make_clusterer().fit(VECTORS)
    assert without.representative_indices_ == on_texts.representative_indices_
    assert not {"top_terms_", "cluster_names_", "representative_texts_"} & vars(without).keys()
    pipe[-1].fit(VECTORS)
    assert not hasattr(pipe[-1], "top_terms_"), "terms of an earlier fit"
    with pytest.raises(ValueError, match="`texts` parameter.*must be None"):
        make_clusterer(FakeVectorizer()).fit(TEXTS, texts=TEXTS)
    with pytest.raises(ValueError, match="inconsistent"):
        make_clusterer().fit(VECTORS, texts=TEXTS[1:])


# scikit-learn


def test_cross_validation_and_grid_search() -> None:
    assert cross_val_score(make_clusterer(FakeVectorizer()), TEXTS, LABELS, cv=3).mean() > 0.8
    grid = {"vectorizer__dim": [2, 64], "n_clusters": [2, 4]}
    search = GridSearchCV(make_clusterer(FakeVectorizer()), grid, cv=3, error_score="raise")
    search.fit(TEXTS, LABELS)
    assert search.best_params_ == {"vectorizer__dim": 64, "n_clusters": 4}
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(NEW), search.predict(NEW))
    nested = GridSearchCV(make_clusterer(clusterer=KMeans()), {"clusterer__n_init": [1, 2]}, cv=2)
    assert nested.fit(VECTORS, LABELS).best_params_["clusterer__n_init"] in (1, 2)


def test_labels_do_not_reach_the_vectorizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(FakeVectorizer, "fit", lambda self, X, y=None: seen.append(y) or self)
    make_clusterer(FakeVectorizer()).fit(TEXTS, LABELS)
    assert seen == [None]


def test_instances_are_cloned() -> None:
    clusterer, reducer, vectorizer = KMeans(4), PCA(3), FakeVectorizer()
    make_clusterer(vectorizer, clusterer=clusterer, reducer=reducer).fit(pd.Series(TEXTS))
    assert clusterer.n_clusters == 4
    assert not hasattr(clusterer, "labels_")
    assert not hasattr(reducer, "components_")
    assert not hasattr(vectorizer, "n_fitted_")


# Bad input


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"n_clusters": 81}, ValueError, "`n_clusters` .* at most the number of texts, 80; got 81"),
        ({"n_clusters": 0}, ValueError, r"`n_clusters` .* an int in \[1, inf\) or None; got 0"),
        ({"n_clusters": [2, 90]}, ValueError, "at most the number of texts"),
        ({"n_clusters": []}, ValueError, "at least one int"),
        ({"n_clusters": "many"}, ValueError, "`n_clusters` .* one of 'auto'"),
        ({"n_clusters": 2.5}, TypeError, "`n_clusters`"),
        ({"clusterer": "k-means"}, ValueError, "`clusterer` .* Did you mean 'kmeans'"),
        ({"clusterer": KMeans}, TypeError, "`clusterer`"),
        ({"clusterer": 3}, TypeError, "`clusterer`"),
        ({"clusterer": "hdbscan"}, ValueError, "`n_clusters` .* None for hdbscan"),
        ({"clusterer": DBSCAN()}, ValueError, "`n_clusters` .* None for DBSCAN"),
        (
            {"clusterer": "hdbscan", "n_clusters": None, "min_cluster_size": 100},
            ValueError,
            "`min_cluster_size` .* at most the number of texts, 80",
        ),
        ({"min_cluster_size": 1}, ValueError, "`min_cluster_size`"),
        ({"noise_quantile": 0}, ValueError, "`noise_quantile`"),
        ({"n_terms": 0}, ValueError, "`n_terms`"),
        ({"n_representatives": "x"}, TypeError, "`n_representatives`"),
        ({"reducer": "pca"}, ValueError, "`reducer`"),
        ({"reducer": PCA}, TypeError, "`reducer`"),
    ],
)
def test_parameters_out_of_order(
    parameters: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make_clusterer(**parameters).fit(VECTORS)


def test_input_out_of_order() -> None:
    with pytest.raises(TypeError, match="bare str"):
        make_clusterer(FakeVectorizer()).fit("a text")
    with pytest.raises(ValueError, match="at least 1 text; got 0"):
        make_clusterer(FakeVectorizer()).fit([])
    with pytest.raises(TypeError, match="got texts"):
        make_clusterer().fit(TEXTS)
    with pytest.raises(ValueError, match="at least 3 texts to choose"):
        make_clusterer(FakeVectorizer(), n_clusters="auto").fit(["a", "b"])
    with pytest.raises(ValueError, match="at least 8 texts for reducer='umap'"):
        make_clusterer(reducer="umap", n_clusters=2).fit(VECTORS[:5])
    found = make_clusterer().fit(VECTORS)
    with pytest.raises(ValueError, match="X has 8 features, but .* is expecting 64"):
        found.predict(VECTORS[:, :8])
    broken = VECTORS.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        found.predict(broken)
    with pytest.raises(ValueError, match="requires y"):
        found.score(VECTORS, None)
    with pytest.raises(NotFittedError):
        make_clusterer().predict(VECTORS)


def test_bundled_model_by_default() -> None:
    texts = ["my card was stolen", "card lost", "the stolen card"]
    texts += ["open an account", "a new account please", "which account to open"]
    found = EmbeddingClusterer(n_clusters=2, random_state=0).fit(texts)
    np.testing.assert_array_equal(found.labels_ == found.labels_[0], [True] * 3 + [False] * 3)
    assert found.top_terms_[found.labels_[0]][0] == "card"


@pytest.mark.parametrize("clusterer", ["kmeans", "minibatch_kmeans", "agglomerative"])
@pytest.mark.parametrize("n_clusters", [None, "auto"])
def test_identical_texts_are_one_cluster(clusterer: str, n_clusters: Any) -> None:
    """Without a warning, which would be an error here."""
    options = {"clusterer": clusterer, "n_clusters": n_clusters, "random_state": 0}
    found = EmbeddingClusterer(FakeVectorizer(), **options).fit(["a card"] * 20)
    assert found.n_clusters_ == 1
    assert (found.labels_ == 0).all()
    assert found.representative_texts_ == {0: ["a card"]}
    assert found.predict(["a card", "a card"]).tolist() == [0, 0]
    few = EmbeddingClusterer(FakeVectorizer(), **options).fit(["a card", "an account", "sun"] * 9)
    assert few.n_clusters_ == 3
    assert set(few.silhouettes_) <= {2, 3}


@pytest.mark.parametrize("n_clusters", [5, [2, 5], [4, 5]])
@pytest.mark.parametrize("clusterer", ["kmeans", "agglomerative", KMeans(n_init=1)])
def test_more_clusters_than_different_texts_warn_once(n_clusters: Any, clusterer: Any) -> None:
    texts = ["a card", "an account", "sun"] * 9
    options = {"clusterer": clusterer, "n_clusters": n_clusters, "random_state": 0}
    with pytest.warns(SkembedWarning, match="3 different embeddings, fewer than the 5") as caught:
        found = EmbeddingClusterer(FakeVectorizer(), **options).fit(texts)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.n_clusters_ <= 3


def test_representatives_go_by_row_where_a_text_repeats() -> None:
    vectors = np.array([[0.0], [0.1], [0.2], [5.0], [50.0], [51.0]])
    texts = ["near", "second", "third", "near", "far", "further"]
    options = {"n_clusters": 2, "n_representatives": 3, "random_state": 0}
    found = EmbeddingClusterer(None, **options).fit(vectors, texts=texts)
    cluster = found.labels_[0]
    distances = np.abs(vectors[:, 0] - found.cluster_centers_[cluster, 0])
    rows = [row for row in np.argsort(distances).tolist() if found.labels_[row] == cluster]
    expected = list(dict.fromkeys(texts[row] for row in rows))[:3]
    assert found.representative_texts_[cluster] == expected
    assert [texts[row] for row in found.representative_indices_[cluster]] == expected
    nearest = {text: min(r for r in rows if texts[r] == text) for text in expected}
    assert found.representative_indices_[cluster] == [nearest[text] for text in expected]
