"""A training `fit` inside scikit-learn: folds, grids, clones, refits, output."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import Pipeline
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted
from tiny import weights
from training_examples import DIM, KINDS, LABELS, PAIRS, ROWS, TEXTS, make, make_trainer

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import SkembedWarning
from skembed.inference import settings as resolution
from skembed.inference.registry import registry


def make_pipe(trainer: Any = "quick", **parameters: Any) -> Pipeline:
    return Pipeline([("emb", make(trainer, **parameters)), ("clf", LogisticRegression())])


# Folds


def test_each_fold_trains_an_adapter_of_its_own(steps: list[int]) -> None:
    pipe = make_pipe(make_trainer(learning_rate=1e-2))
    n_loads = registry.n_loads
    found = cross_validate(
        pipe, TEXTS, LABELS, cv=3, return_estimator=True, return_indices=True, error_score="raise"
    )
    assert registry.n_loads <= n_loads + 1
    assert steps == [*range(3)] * 3
    prints = {fold["emb"].adapter_.fingerprint for fold in found["estimator"]}
    assert len(prints) == 3
    # Each is what a fit on its own training part gives.
    texts, labels = np.array(TEXTS), np.array(LABELS)
    train = found["indices"]["train"][1]
    alone = clone(pipe).fit(texts[train].tolist(), labels[train])
    fold = found["estimator"][1]
    assert alone["emb"].adapter_.fingerprint == fold["emb"].adapter_.fingerprint
    np.testing.assert_allclose(fold.predict_proba(TEXTS), alone.predict_proba(TEXTS), atol=1e-5)


def test_held_out_labels_do_not_leak() -> None:
    # Labels without meaning: learned by heart where they are seen, a coin's throw where not.
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
    texts = [" ".join(rng.choice(words, 5)) for _ in range(60)]
    labels = rng.permutation(np.arange(60) % 2)
    trainer = ContrastiveTrainer(
        r=4, learning_rate=1e-2, max_steps=25, batch_size=24, random_state=0
    )
    cv = StratifiedKFold(3, shuffle=True, random_state=0)
    found = cross_validate(
        make_pipe(trainer, cache=EmbeddingCache()),
        texts,
        labels,
        cv=cv,
        return_train_score=True,
        error_score="raise",
    )
    assert found["train_score"].min() > 0.9
    standard_error = np.sqrt(0.25 / 60)
    assert abs(found["test_score"].mean() - 0.5) < 3 * standard_error


def test_a_fold_is_never_served_the_vectors_of_another(
    monkeypatch: pytest.MonkeyPatch, embedded: list[int]
) -> None:
    spaces: list[str] = []
    name_space = resolution.cache_namespace

    def recording(*args: Any) -> str:
        spaces.append(name_space(*args))
        return spaces[-1]

    monkeypatch.setattr(resolution, "cache_namespace", recording)
    cache = EmbeddingCache()
    frozen = make(None, cache=cache)
    plain = frozen.transform(TEXTS)
    found = cross_validate(
        make_pipe(make_trainer(learning_rate=5e-2), cache=cache),
        TEXTS,
        LABELS,
        cv=3,
        return_estimator=True,
        error_score="raise",
    )
    assert len(set(spaces)) == 4, "the frozen model's, and one for each fold"
    for fold in found["estimator"]:
        emb = fold["emb"]
        embedded.clear()
        served = emb.transform(TEXTS)
        assert embedded == [], "all of it from the cache: its own training and test part"
        fresh = pickle.loads(pickle.dumps(emb)).set_params(cache=None).transform(TEXTS)
        np.testing.assert_allclose(served, fresh, atol=1e-5)
        assert np.abs(served - plain).max() > 1e-3
    np.testing.assert_array_equal(frozen.transform(TEXTS), plain)


def test_frozen_folds_cost_one_pass(embedded: list[int], steps: list[int]) -> None:
    for trainer in ("auto", None):
        embedded.clear()
        pipe = make_pipe(trainer, cache=EmbeddingCache())
        cross_validate(pipe, TEXTS, LABELS, cv=3, error_score="raise")
        assert sum(embedded) == len(TEXTS)
    assert steps == []


def test_grid_search_reaches_the_trainer(steps: list[int]) -> None:
    grid = {"emb__trainer__r": [1, 4], "emb__trainer__temperature": [0.05, 0.5]}
    pipe = make_pipe()
    search = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(TEXTS, LABELS)
    assert set(search.best_params_) == set(grid)
    assert len(steps) == 3 * (4 * 2 + 1)
    best = search.best_estimator_["emb"]
    assert best.adapter_.settings.r == search.best_params_["emb__trainer__r"]
    assert best.trainer.temperature == search.best_params_["emb__trainer__temperature"]
    assert pipe["emb"].trainer.r == 2, "the grid leaves the trainer it was given alone"
    assert not hasattr(pipe["emb"], "adapter_")
    assert search.predict(TEXTS[:3]).shape == (3,)


def test_grid_search_over_whether_to_train() -> None:
    grid = {"emb__trainer": [None, make_trainer(max_steps=1)]}
    search = GridSearchCV(make_pipe(), grid, cv=2, error_score="raise").fit(TEXTS, LABELS)
    assert len(search.cv_results_["params"]) == 2


def test_a_trained_vectorizer_in_a_column_transformer() -> None:
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame({"price": np.arange(36.0), "text": TEXTS})
    columns = ColumnTransformer([("emb", make(), "text"), ("rest", "passthrough", ["price"])])
    found = columns.fit_transform(X, LABELS)
    assert found.shape == (36, DIM + 1)
    fitted = columns.named_transformers_["emb"]
    np.testing.assert_allclose(found[:, :DIM], fitted.transform(TEXTS), atol=1e-5)
    assert fitted.adapter_.fingerprint == make().fit(TEXTS, LABELS).adapter_.fingerprint


# Clones, refits


def test_a_clone_is_unfitted(trained: NVEmbedVectorizer) -> None:
    twin = clone(trained)
    assert not any(name.endswith("_") for name in vars(twin))
    assert twin.trainer is not trained.trainer
    for method in ("transform", "encode_query", "encode_document"):
        with pytest.raises(NotFittedError, match="has a trainer and is not fitted yet"):
            getattr(twin, method)(TEXTS)
    with pytest.raises(NotFittedError):
        check_is_fitted(twin)
    check_is_fitted(trained)
    auto = make("auto").fit(PAIRS)
    frozen = make(None).transform(TEXTS)
    np.testing.assert_array_equal(clone(auto).transform(TEXTS), frozen)
    assert np.abs(auto.transform(TEXTS) - frozen).max() > 1e-6


def test_warm_start_goes_on() -> None:
    emb = make().fit(TEXTS, LABELS)
    before, fingerprint = weights(emb), emb.model_["fingerprint"]
    # Steps too small to matter: what is there is where the second fit began.
    still = {"warm_start": True, "max_grad_norm": 1e-14, "weight_decay": 0.0}
    emb.set_params(**{f"trainer__{name}": value for name, value in still.items()})
    emb.fit(TEXTS, LABELS)
    for name, values in weights(emb).items():
        np.testing.assert_allclose(values, before[name], atol=1e-6)
    emb.set_params(trainer__max_grad_norm=1.0).fit(PAIRS)
    assert emb.model_["fingerprint"] != fingerprint
    assert np.abs(weights(emb)[next(iter(before))] - before[next(iter(before))]).max() > 1e-4
    first = make(make_trainer(warm_start=True)).fit(TEXTS, LABELS)
    np.testing.assert_equal(weights(first), before)  # nothing to go on from


def test_without_warm_start_each_fit_begins_anew() -> None:
    emb = make().fit(PAIRS).fit(TEXTS, LABELS)
    np.testing.assert_equal(weights(emb), weights(make().fit(TEXTS, LABELS)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"r": 3}, "an adapter with r=2.*asks for r=3.*Use the same values, or merge"),
        ({"lora_alpha": 8}, "lora_alpha=32.*asks for r=2, lora_alpha=8"),
        ({"target_modules": ["q_proj"]}, "4 layers.*and 2 layers"),
        ({"train_pooling": False}, "`train_pooling=False` of `ContrastiveTrainer` would lose it"),
    ],
)
def test_warm_start_needs_the_same_sizes(
    parameters: dict[str, Any], message: str, trained: NVEmbedVectorizer, steps: list[int]
) -> None:
    emb = pickle.loads(pickle.dumps(trained))
    emb.set_params(trainer__warm_start=True)
    emb.set_params(**{f"trainer__{name}": value for name, value in parameters.items()})
    adapter = emb.adapter_
    with pytest.raises(ValueError, match=message):
        emb.fit(TEXTS, LABELS)
    assert emb.adapter_ is adapter
    assert steps == []


@pytest.mark.parametrize("trainer", ["auto", None])
def test_a_frozen_refit_drops_the_adapter_and_says_so(trainer: Any) -> None:
    emb = make().fit(TEXTS, LABELS).set_params(trainer=trainer)
    with pytest.warns(SkembedWarning, match="drops the adapter.*FrozenEstimator"):
        emb.fit(TEXTS)
    assert not hasattr(emb, "adapter_")
    assert not hasattr(emb, "history_")
    frozen = make(None).fit(TEXTS)
    assert emb.model_ == frozen.model_
    np.testing.assert_array_equal(emb.transform(TEXTS), frozen.transform(TEXTS))
    emb.fit(TEXTS)  # nothing is left to be dropped


def test_a_failed_refit_leaves_the_estimator_as_it_was(trained: NVEmbedVectorizer) -> None:
    emb = pickle.loads(pickle.dumps(trained))
    before = {name: value for name, value in vars(emb).items() if name != "_lease"}
    with pytest.raises(ValueError, match="at least 2 classes"):
        emb.fit(TEXTS, ["card"] * 36)
    assert {name: value for name, value in vars(emb).items() if name != "_lease"} == before


# Output


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_output_containers_and_names(kind: str) -> None:
    pd = pytest.importorskip("pandas")
    X, y = KINDS[kind]
    index = [*range(5, 5 + len(X))]
    if kind == "labels":
        X = pd.DataFrame({"body": X}, index=index)
    emb = make().set_output(transform="pandas").fit(X, y)
    found = emb.transform(X)
    assert isinstance(found, pd.DataFrame)
    assert found.columns.tolist() == emb.get_feature_names_out().tolist()
    assert len(set(found.columns)) == (DIM if kind == "labels" else 2 * DIM)
    assert set(found.dtypes) == {np.dtype(np.float32)}
    if kind == "labels":
        assert found.index.tolist() == index
        assert emb.feature_names_in_.tolist() == ["body"]
    fitted = make().fit(X, y).transform(X)
    np.testing.assert_array_equal(found.to_numpy(), fitted)


def test_single_texts_after_training_on_pairs_and_pairs_after_texts() -> None:
    names = {"instruction": "Find the like", "document_instruction": "Say it"}
    emb = make(**names).fit(PAIRS)
    assert emb.n_features_in_ == 2
    left, right = np.split(emb.transform(PAIRS), 2, axis=1)
    anchors, positives = (list(side) for side in zip(*PAIRS, strict=True))
    np.testing.assert_allclose(emb.transform(anchors), left, atol=1e-5)
    np.testing.assert_allclose(emb.encode_query(anchors), left, atol=1e-5)
    np.testing.assert_allclose(emb.encode_document(positives), right, atol=1e-5)
    emb.fit(TEXTS, LABELS)
    assert emb.n_features_in_ == 1
    assert emb.transform(PAIRS).shape == (18, 2 * DIM)
    assert emb.get_feature_names_out().shape == (DIM,)


def test_rows_have_a_vector_for_each_of_their_texts() -> None:
    k = len(ROWS[0])
    emb = make().fit(ROWS)
    assert emb.n_features_in_ == k
    assert emb.get_feature_names_out().shape == (k * DIM,)
    whole = emb.transform(ROWS)
    np.testing.assert_array_equal(make().fit_transform(ROWS), whole)
    part = emb.transform([row[:2] for row in ROWS])
    np.testing.assert_allclose(part, whole[:, : 2 * DIM], atol=1e-5)


def test_truncated_and_raw_vectors_of_a_trained_model(trained: NVEmbedVectorizer) -> None:
    emb = pickle.loads(pickle.dumps(trained))
    whole = emb.transform(TEXTS)
    cut = emb.set_params(truncate_dim=8).transform(TEXTS)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-5)
    assert emb.get_feature_names_out().shape == (8,)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_batch_order_and_subset_change_nothing(dtype: str, tolerance: float) -> None:
    emb = make(make_trainer(learning_rate=5e-2), dtype=dtype).fit(TEXTS, LABELS)
    texts = [*TEXTS, "", "word " * 80]
    whole = emb.transform(texts)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1.0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = emb.transform([texts[i] for i in order])
    np.testing.assert_allclose(shuffled, whole[order], rtol=0, atol=tolerance)
    alone = np.vstack([emb.transform([text]) for text in texts[::6]])
    np.testing.assert_allclose(alone, whole[::6], rtol=0, atol=tolerance)
    again = emb.set_params(batch_tokens=50).transform(texts)
    np.testing.assert_allclose(again, whole, rtol=0, atol=tolerance)


def test_pickles_and_html_of_a_trained_model(trained: NVEmbedVectorizer) -> None:
    twin = pickle.loads(pickle.dumps(trained))
    assert twin.model_ == trained.model_
    assert len(twin.history_) == 3
    np.testing.assert_allclose(twin.transform(TEXTS), trained.transform(TEXTS), atol=1e-6)
    assert "ContrastiveTrainer" in trained._repr_html_()
    assert "ContrastiveTrainer" in repr(trained)


CHECKS = [
    "check_parameters_default_constructible",
    "check_no_attributes_set_in_init",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimator_repr",
    "check_estimator_cloneable",
    "check_valid_tag_types",
    "check_mixin_order",
]


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", ["trained", "with a trainer", "the trainer"])
def test_scikit_learn_checks_that_need_no_numbers(
    kind: str, name: str, trained: NVEmbedVectorizer
) -> None:
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip("not in this release of scikit-learn")
    if kind == "the trainer":
        if "tag" in name or "mixin" in name:
            pytest.skip("the trainer is a set of parameters, no estimator")
        return check("ContrastiveTrainer", make_trainer())
    return check("NVEmbedVectorizer", trained if kind == "trained" else make())


@pytest.mark.skipif(
    not hasattr(estimator_checks, "estimator_checks_generator"),
    reason="scikit-learn 1.5 has no generator of checks",
)
def test_scikit_learn_generator_with_a_trainer(trained: NVEmbedVectorizer) -> None:
    names = []
    for estimator in (trained, make()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkipTestWarning)  # few checks for estimators of text
            for subject, check in estimator_checks.estimator_checks_generator(estimator):
                check(subject)
                names.append(check.func.__name__)
    assert names
