"""A training `fit` inside scikit-learn: every kind of examples, folds, grids, clones, bad input."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN, copy_checkpoint
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import Pipeline
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted
from tiny import weights

from skembed import ContrastiveTrainer, EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import SkembedWarning, TruncationWarning
from skembed.inference import settings as resolution
from skembed.inference.registry import registry
from skembed.instructions import resolve_instruction
from skembed.model.tokenization import TextTokenizer
from skembed.training import fit as contrastive
from skembed.training.batches import BatchPlan
from skembed.training.examples import TrainingTask

DIM = 48
TEMPLATE = "Instruct: {}\nQuery: "
WORDS = {
    "card": "card stolen lost blocked pin chip",
    "account": "account open new savings branch form",
    "fee": "fee charge rate cost monthly price",
}


def make_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of each class, of the class's own words and some that all share; and their labels."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for label, words in WORDS.items():
        for k in range(n):
            shared = rng.choice("please tell me about my the of to".split(), 4)
            chosen = [*rng.choice(words.split(), 2), *shared, str(k)]
            texts.append(" ".join(rng.permutation(chosen)))
            labels.append(label)
    return texts, labels


def mix(texts: list[str], labels: list[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order], [labels[i] for i in order]


TEXTS, LABELS = mix(*make_texts(12))
BY_CLASS = {label: [t for t, y in zip(TEXTS, LABELS, strict=True) if y == label] for label in WORDS}
PAIRS = [pair for texts in BY_CLASS.values() for pair in zip(texts[::2], texts[1::2], strict=True)]
ROWS = [
    (*pair, BY_CLASS[other][k % 12], BY_CLASS[other][(k + 1) % 12])
    for k, (pair, other) in enumerate(zip(PAIRS, [*["fee"] * 6, *["card"] * 12], strict=True))
]
DRAWN = [(i, j) for i, j in np.random.default_rng(0).integers(0, 36, (81, 2)).tolist() if i != j]
GRADED = [(TEXTS[i], TEXTS[j]) for i, j in DRAWN]
SCORES = [float(LABELS[i] == LABELS[j]) for i, j in DRAWN]
KINDS: dict[str, tuple[Any, Any]] = {
    "labels": (TEXTS, LABELS),
    "pairs": (PAIRS, None),
    "rows": (ROWS, None),
    "scores": (GRADED, SCORES),
}


def make_trainer(**parameters: Any) -> ContrastiveTrainer:
    """A trainer of a few quick steps."""
    return ContrastiveTrainer(
        **{
            "r": 2,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 5e-3,
            "max_steps": 3,
            "batch_size": 12,
            "random_state": 0,
            **parameters,
        }
    )


def make(trainer: Any = "quick", **parameters: Any) -> NVEmbedVectorizer:
    given = {"model": GOLDEN, "device": "cpu", "dtype": "float32", "cache": None, **parameters}
    trainer = make_trainer() if isinstance(trainer, str) and trainer == "quick" else trainer
    return NVEmbedVectorizer(**given, trainer=trainer)


def make_pipe(trainer: Any = "quick", **parameters: Any) -> Pipeline:
    return Pipeline([("emb", make(trainer, **parameters)), ("clf", LogisticRegression())])


# ---------------------------------------------------------------- what is learned


def separation(vectors: np.ndarray, labels: list[str]) -> float:
    """Mean cosine of two texts of a class less that of two classes."""
    cosines, names = vectors @ vectors.T, np.array(labels)
    same = names[:, None] == names[None]
    off = ~np.eye(len(names), dtype=bool)
    return float(cosines[same & off].mean() - cosines[~same].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_examples_is_learned(kind: str) -> None:
    X, y = KINDS[kind]
    trainer = make_trainer(max_steps=20, epochs=20, learning_rate=1e-2, temperature=0.2)
    emb = make(trainer).fit(X, y)
    frozen = make(None)
    loss = emb.history_["loss"]
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    # The effect on vectors, of new texts too.
    new, their_labels = make_texts(8, seed=1)
    for texts, labels, gain in ((TEXTS, LABELS, 0.2), (new, their_labels, 0.05)):
        before, after = (separation(e.transform(texts), labels) for e in (frozen, emb))
        assert after > before + gain
    if kind == "scores":
        cosines = [np.einsum("nd,nd->n", *np.split(e.transform(X), 2, 1)) for e in (frozen, emb)]
        before, after = (spearmanr(c, y).statistic for c in cosines)
        assert after > before + 0.2
    assert emb.n_features_in_ == (1 if kind == "labels" else 2)
    assert emb.embedding_dim_ == DIM


def test_the_base_model_stays_as_it_was() -> None:
    frozen = make(None)
    before = frozen.transform(TEXTS)
    (base,) = frozen._lease.models.values()
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    emb = make(make_trainer(learning_rate=0.1)).fit(TEXTS, LABELS)
    assert np.abs(emb.transform(TEXTS) - before).max() > 0.01
    np.testing.assert_array_equal(make(None).transform(TEXTS), before)
    for name, tensor in base.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name].numpy())
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize(
    ("trainer", "kind", "trains"),
    [
        ("auto", "labels", False),
        ("auto", "pairs", True),
        ("auto", "rows", True),
        ("auto", "scores", True),
        (None, "labels", False),
        (None, "pairs", False),
        (None, "scores", False),
    ],
)
def test_auto_trains_on_pairs_and_rows(trainer: Any, kind: str, trains: bool) -> None:
    X, y = KINDS[kind]
    emb = make(trainer).fit(X[:8], None if y is None else y[:8])
    assert hasattr(emb, "adapter_") == hasattr(emb, "history_") == trains
    if trains:
        assert emb.adapter_.settings.r == ContrastiveTrainer().r
        assert emb.trainer == "auto"


INSTRUCTIONS = [
    ({}, "", ""),
    ({"instruction": "Find the like"}, TEMPLATE.format("Find the like"), ""),
    (
        {"instruction": "Find the like", "document_instruction": "Say it"},
        TEMPLATE.format("Find the like"),
        TEMPLATE.format("Say it"),
    ),
    ({"instruction": "STS"}, "known", "known"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parameters", "query", "document"), INSTRUCTIONS)
def test_training_puts_the_instructions_of_transform_in_front(
    parameters: dict[str, Any],
    query: str,
    document: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if query == "known":
        query = document = TEMPLATE.format(resolve_instruction("STS"))
    seen: dict[str, set[str]] = {}
    encode = TextTokenizer.encode

    def spying(self: Any, texts: Any, *, prefix: str, **rest: Any) -> Any:
        if texts:
            seen.setdefault(prefix, set()).update(texts)
        return encode(self, texts, prefix=prefix, **rest)

    monkeypatch.setattr(TextTokenizer, "encode", spying)
    X, y = KINDS[kind]
    emb = make(make_trainer(max_steps=1), **parameters).fit(X, y)
    trained = {prefix: set(texts) for prefix, texts in seen.items()}
    seen.clear()
    if kind == "rows":  # anchors are queries, positives and negatives documents
        emb.encode_query([row[0] for row in X])
        emb.encode_document([text for row in X for text in row[1:]])
    else:
        emb.transform(X)
    assert trained == seen
    assert set(seen) == ({query} if kind == "labels" else {query, document})


def test_texts_cut_in_training_are_warned_about() -> None:
    X = [("word " * 40, "b"), ("c", "d"), ("e", "f")]
    with pytest.warns(TruncationWarning, match="1 of 6 texts were longer than max_length=20"):
        make(make_trainer(max_steps=1), max_length=20, instruction="a b").fit(X)


# ---------------------------------------------------------------- several tasks


def test_tasks_are_trained_together(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = set()
    encode = TextTokenizer.encode

    def spying(self: Any, texts: Any, *, prefix: str, **rest: Any) -> Any:
        prefixes.add(prefix)
        return encode(self, texts, prefix=prefix, **rest)

    drawn = []
    build = BatchPlan.build

    def counting(self: Any, step: int, listed: np.ndarray) -> Any:
        drawn.append(np.bincount(listed[:, 0], minlength=3))
        return build(self, step, listed)

    monkeypatch.setattr(TextTokenizer, "encode", spying)
    monkeypatch.setattr(BatchPlan, "build", counting)
    tasks = [
        TrainingTask(TEXTS, LABELS, instruction="Say the topic"),
        TrainingTask(ROWS, instruction="Find the like", in_batch_negatives=False, weight=3),
        TrainingTask(GRADED, SCORES, document_instruction="Rate it", name="rating", weight=0.5),
    ]
    trainer = make_trainer(max_steps=None, batch_size=40, learning_rate=1e-2, temperature=0.2)
    emb = make(trainer, instruction="My own").fit_tasks(tasks)
    assert prefixes == {
        "",
        *(TEMPLATE.format(text) for text in ("Say the topic", "Find the like", "Rate it")),
    }
    # Each text with 8 others of its class; three times the rows; half the pairs.
    np.testing.assert_array_equal(np.sum(drawn, axis=0), [8 * 36, 3 * 18, len(GRADED) / 2])
    assert (np.array(drawn) > 0).all(), "blended"
    assert emb.n_features_in_ == 1
    frozen = make(None, instruction="My own")
    assert separation(emb.transform(TEXTS), LABELS) > separation(frozen.transform(TEXTS), LABELS)
    loss = emb.history_["loss"]
    assert loss[-3:].mean() < loss[:3].mean()


def test_tasks_can_keep_to_their_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    build = BatchPlan.build

    def counting(self: Any, step: int, listed: np.ndarray) -> Any:
        drawn.append(set(listed[:, 0].tolist()))
        return build(self, step, listed)

    monkeypatch.setattr(BatchPlan, "build", counting)
    trainer = make_trainer(blend_tasks=False, max_steps=None, batch_size=9, train_pooling=False)
    emb = make(trainer).fit_tasks([TrainingTask(PAIRS), TrainingTask(GRADED, SCORES)])
    assert sorted(map(sorted, drawn)) == [[0]] * 2 + [[1]] * round(len(GRADED) / 9)
    assert len(emb.history_) == len(drawn)


def test_one_task_is_a_fit() -> None:
    names = {"instruction": "Find the like", "document_instruction": "Say it"}
    task = TrainingTask(PAIRS, **names)
    one, other = make(**names).fit(PAIRS), make().fit_tasks((task,))
    assert one.adapter_.fingerprint == other.adapter_.fingerprint


BAD_TASKS = {
    "no task": ([(PAIRS, None)], {}, TypeError, r"tasks\[0\] is a tuple"),
    "none": ([], {}, TypeError, "must be a list of TrainingTask; got an empty one"),
    "not a list": (TrainingTask(PAIRS), {}, TypeError, "list of TrainingTask; got TrainingTask"),
    "empty text": (
        [TrainingTask(PAIRS), TrainingTask([*PAIRS, ("", "b")])],
        {},
        ValueError,
        r"`examples` parameter of `tasks\[1\]`.*blank",
    ),
    "named": (
        [TrainingTask(TEXTS, LABELS[:-1], name="topics")],
        {},
        ValueError,
        r"`y` parameter of `tasks\[0\] \(topics\)` must have as many",
    ),
    "weight": ([TrainingTask(PAIRS, weight=0)], {}, ValueError, r"`weight`.*`tasks\[0\]`"),
    "instruction": (
        [TrainingTask(PAIRS), TrainingTask(PAIRS, document_instruction="Bankng77")],
        {},
        ValueError,
        r"tasks\[1\]",
    ),
    "loss": (
        [TrainingTask(GRADED, SCORES), TrainingTask(PAIRS, name="pairs")],
        {"loss": "cosent"},
        ValueError,
        r"`loss` parameter.*got 'cosent' with rows \(tasks\[1\]\)",
    ),
    "negatives": (
        [TrainingTask(ROWS), TrainingTask(PAIRS, in_batch_negatives=False)],
        {},
        ValueError,
        r"needs negatives of its own \(tasks\[1\]\)",
    ),
    "alone": (
        [TrainingTask(ROWS), TrainingTask(PAIRS)],
        {"batch_size": 1},
        ValueError,
        r"no negatives of its own \(tasks\[1\]\)",
    ),
}


@pytest.fixture(scope="module")
def unloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny checkpoint that nothing may load."""
    return copy_checkpoint(tmp_path_factory.mktemp("unloaded") / "model")


@pytest.fixture
def nothing_done(steps: list[int]) -> Any:
    """What holds after a refusal: no model was loaded, no step taken."""
    n_loads = registry.n_loads
    yield
    assert registry.n_loads == n_loads
    assert steps == []


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_tasks_are_named_by_position(name: str, unloaded: Path) -> None:
    tasks, parameters, error, message = BAD_TASKS[name]
    emb = make(make_trainer(**parameters), model=unloaded)
    with pytest.raises(error, match=message):
        emb.fit_tasks(tasks)
    assert not hasattr(emb, "adapter_")


@pytest.mark.usefixtures("nothing_done")
def test_tasks_need_a_trainer(unloaded: Path) -> None:
    with pytest.raises(ValueError, match="`trainer`.*for `fit_tasks`; got None, which never"):
        make(None, model=unloaded).fit_tasks([TrainingTask(PAIRS)])


# ---------------------------------------------------------------- mined negatives


@pytest.mark.parametrize("rule", ["perc_pos", "margin_pos"])
@pytest.mark.parametrize("kind", ["labels", "pairs", "rows"])
@pytest.mark.parametrize("remine", [False, True])
def test_negatives_are_mined_with_the_model_at_hand(
    remine: bool, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mined: list[np.ndarray] = []
    mine = contrastive._mine_task

    def recording(task: Any, embed: Any, trainer: ContrastiveTrainer) -> np.ndarray:
        mined.append(mine(task, embed, trainer))
        return mined[-1]

    monkeypatch.setattr(contrastive, "_mine_task", recording)
    trainer = make_trainer(
        mine_negatives=rule,
        remine=remine,
        n_negatives=3,
        in_batch_negatives=False,
        max_steps=None,
        epochs=3,
        batch_size=100,
        learning_rate=1e-2,
    )
    X, y = KINDS[kind]
    emb = make(trainer).fit(X, y)
    assert len(emb.history_) == 3 * (3 if kind == "labels" else 1)
    assert len(mined) == (3 if remine else 1)
    assert all((found >= 0).any() for found in mined)
    if remine:
        assert (mined[0] != mined[1]).any()
        assert (mined[1] != mined[2]).any()
    class_of = dict(zip(TEXTS, LABELS, strict=True))
    for found in mined:
        for row, negatives in enumerate(found):
            names = [TEXTS[i] for i in negatives if i >= 0] if kind == "labels" else []
            assert all(class_of[name] != LABELS[row] for name in names)


# ---------------------------------------------------------------- folds


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


# ---------------------------------------------------------------- clones, refits


@pytest.fixture(scope="module")
def trained() -> NVEmbedVectorizer:
    return make(make_trainer(learning_rate=5e-2)).fit(TEXTS, LABELS)


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


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_output_containers_and_names(kind: str) -> None:
    pd = pytest.importorskip("pandas")
    X, y = KINDS[kind]
    if kind == "pairs":
        X = pd.DataFrame(X, columns=["anchor", "positive"], index=range(5, 23))
    emb = make().set_output(transform="pandas").fit(X, y)
    found = emb.transform(X)
    width = DIM if kind == "labels" else 2 * DIM
    assert isinstance(found, pd.DataFrame)
    assert found.columns.tolist() == emb.get_feature_names_out().tolist()
    assert len(set(found.columns)) == width
    assert set(found.dtypes) == {np.dtype(np.float32)}
    if kind == "pairs":
        assert found.index.tolist() == [*range(5, 23)]
        assert emb.feature_names_in_.tolist() == ["anchor", "positive"]
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


def test_a_training_part_of_rows_gives_anchors_and_positives_names() -> None:
    emb = make().fit(ROWS)
    assert emb.n_features_in_ == 2
    assert emb.get_feature_names_out().shape == (2 * DIM,)
    assert emb.transform([row[:2] for row in ROWS]).shape == (18, 2 * DIM)


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


# ---------------------------------------------------------------- bad input

BAD_EXAMPLES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "one class": (TEXTS, ["card"] * 36, ValueError, "`y`.*at least 2 classes.*got 1, 'card'"),
    "lonely class": (
        [*TEXTS, "alone"],
        [*LABELS, "rare"],
        ValueError,
        r"each class at least 2 different texts.*'rare' \(y\[36\]\)",
    ),
    "equal texts of a class": (
        [*TEXTS, "twin", "twin"],
        [*LABELS, "rare", "rare"],
        ValueError,
        "each class at least 2 different texts",
    ),
    "short y": (
        TEXTS,
        LABELS[:-1],
        ValueError,
        "as many entries as there are examples, 36; got 35",
    ),
    "no y": (TEXTS, None, ValueError, "`y`.*a class label for each text.*got None"),
    "missing label": (TEXTS, [*LABELS[:-1], None], ValueError, r"no missing.*y\[35\]"),
    "fractions": (TEXTS, [0.5, 1.5] * 18, ValueError, r"must be whole; y\[0\] is 0.5"),
    "empty member": ([*PAIRS, ("a", "")], None, ValueError, r"blank.*X\[18\]\[1\]"),
    "None member": ([*PAIRS, (None, "b")], None, ValueError, r"missing or blank.*X\[18\]\[0\]"),
    "mixed rows": ([*PAIRS, ("a", "b", "c")], None, ValueError, r"equal length.*X\[18\] has 3"),
    "number": ([*PAIRS, ("a", 3)], None, TypeError, r"X\[18\]\[1\] is an int"),
    "text itself": ([*PAIRS, ("a", "a")], None, ValueError, r"1 row, the first X\[18\]"),
    "negative is positive": ([("a", "b", "c"), ("d", "e", "e")], None, ValueError, r"X\[1\]\[2\]"),
    "negative is anchor": ([("a", "b", "a"), ("d", "e", "f")], None, ValueError, r"X\[0\]\[2\]"),
    "NaN score": (GRADED, [float("nan"), *SCORES[1:]], ValueError, r"missing.*y\[0\]"),
    "infinite score": (GRADED, [*SCORES[:-1], np.inf], ValueError, r"finite.*first at y\[\d+\]"),
    "equal scores": (GRADED, [1.0] * len(GRADED), ValueError, "scores that differ"),
    "labels for pairs": (PAIRS, LABELS[:18], TypeError, r"numbers.*y\[0\] is a str"),
    "scores for rows": (ROWS, SCORES[:18], ValueError, "must be None for rows"),
    "one example": (PAIRS[:1], None, ValueError, "at least 2 training examples; got 1"),
    "no container": ("text", None, TypeError, "`X`"),
}


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_bad_examples_are_refused_early(name: str, unloaded: Path) -> None:
    X, y, error, message = BAD_EXAMPLES[name]
    emb = make(model=unloaded)
    with pytest.raises(error, match=f"(?s){message}"):
        emb.fit(X, y)
    assert not any(attribute.endswith("_") for attribute in vars(emb))


BAD_TRAINERS: list[tuple[str, Any, type[Exception]]] = [
    *[
        (name, value, ValueError)
        for name in ("r", "epochs", "batch_size", "patience", "max_steps", "checkpoint_steps")
        for value in (0, -1)
    ],
    *[
        (name, value, TypeError)
        for name in ("r", "epochs", "batch_size", "patience", "max_steps", "checkpoint_steps")
        for value in (1.0, "1", True)
    ],
    ("n_negatives", -1, ValueError),
    ("n_negatives", 1.5, TypeError),
    *[(name, None, TypeError) for name in ("r", "epochs", "batch_size", "n_negatives", "patience")],
    *[
        (name, value, ValueError)
        for name in ("lora_alpha", "temperature", "learning_rate", "max_grad_norm")
        for value in (0, -1, np.nan, np.inf)
    ],
    *[
        (name, value, ValueError)
        for name in ("lora_dropout", "warmup_ratio", "validation_fraction")
        for value in (-0.1, 1, 1.5, np.nan)
    ],
    *[(name, value, ValueError) for name in ("weight_decay",) for value in (-0.1, np.nan, np.inf)],
    *[
        (name, "0.1", TypeError)
        for name in (
            "lora_alpha",
            "temperature",
            "learning_rate",
            "max_grad_norm",
            "lora_dropout",
            "warmup_ratio",
            "validation_fraction",
            "weight_decay",
        )
    ],
    *[
        (name, value, TypeError)
        for name in (
            "train_pooling",
            "in_batch_negatives",
            "remine",
            "blend_tasks",
            "gradient_checkpointing",
            "early_stopping",
            "warm_start",
            "verbose",
        )
        for value in (1, "yes", None)
    ],
    ("loss", "triplet", ValueError),
    ("loss", None, (TypeError, ValueError)),
    ("mine_negatives", "hard", ValueError),
    ("batch_tokens", 0, ValueError),
    ("batch_tokens", "many", (TypeError, ValueError)),
    ("batch_tokens", None, (TypeError, ValueError)),
    ("target_modules", "", (TypeError, ValueError)),
    ("target_modules", [], (TypeError, ValueError)),
    ("target_modules", [3], TypeError),
    ("target_modules", None, TypeError),
    ("checkpoint_dir", 3, TypeError),
    ("random_state", -1, ValueError),
    ("random_state", 2**32, ValueError),
    ("random_state", "0", TypeError),
    ("random_state", np.random.RandomState(0), TypeError),
    ("early_stopping", True, ValueError),  # without a validation part
    ("remine", True, ValueError),  # without mining
]


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(
    ("name", "value", "error"), BAD_TRAINERS, ids=lambda value: str(value)[:20]
)
def test_bad_trainers_are_refused_early(name: str, value: Any, error: Any, unloaded: Path) -> None:
    trainer = make_trainer()
    emb = make(clone(trainer).set_params(**{name: value}), model=unloaded)
    message = f"`{name}` parameter of `ContrastiveTrainer`"
    with pytest.raises(error, match=message):
        emb.fit(TEXTS, LABELS)
    with pytest.raises(error, match=message):
        emb.fit_tasks([TrainingTask(PAIRS)])


def test_each_parameter_of_the_trainer_is_checked() -> None:
    assert {name for name, _, _ in BAD_TRAINERS} == set(ContrastiveTrainer().get_params())


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("labels", {"loss": "cosent"}, "`loss`.*got 'cosent' with labels"),
    ("pairs", {"loss": "cosent"}, "`loss`.*got 'cosent' with rows"),
    ("scores", {"loss": "infonce"}, "`loss`.*got 'infonce' with scores"),
    ("pairs", {"in_batch_negatives": False}, "every example needs negatives of its own"),
    ("rows", {"in_batch_negatives": False, "n_negatives": 0}, "needs negatives of its own"),
    ("labels", {"in_batch_negatives": False, "n_negatives": 0}, "needs negatives of its own"),
    ("pairs", {"batch_size": 1}, "`batch_size`.*above 1"),
    ("labels", {"batch_size": 1}, "`batch_size`.*above 1"),
    ("scores", {"batch_size": 1}, "`batch_size`.*above 1"),
    ("rows", {"batch_size": 1, "n_negatives": 0}, "`batch_size`.*above 1"),
    ("pairs", {"mine_negatives": "perc_pos", "n_negatives": 0}, "`n_negatives`.*above 0"),
    ("two classes", {"validation_fraction": 0.5}, "`validation_fraction`.*at least 3 texts"),
    ("one anchor", {"validation_fraction": 0.5}, "`validation_fraction`.*2 different anchors"),
]


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(("kind", "parameters", "message"), MISFITS)
def test_trainers_that_do_not_fit_the_examples(
    kind: str, parameters: dict[str, Any], message: str, unloaded: Path
) -> None:
    others: dict[str, tuple[Any, Any]] = {
        "two classes": (["a", "b", "c", "d"], [0, 0, 1, 1]),
        "one anchor": ([("a", "b"), ("a", "c")], None),
    }
    X, y = {**KINDS, **others}[kind]
    with pytest.raises(ValueError, match=message):
        make(make_trainer(**parameters), model=unloaded).fit(X, y)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("rows", {"batch_size": 1}),
        ("rows", {"in_batch_negatives": False}),
        ("labels", {"in_batch_negatives": False, "batch_size": 1}),
        ("pairs", {"in_batch_negatives": False, "mine_negatives": "perc_pos"}),
        ("labels", {"n_negatives": 0}),
    ],
)
def test_trainers_at_the_edge_of_what_is_allowed(kind: str, parameters: dict[str, Any]) -> None:
    X, y = KINDS[kind]
    history = make(make_trainer(**parameters)).fit(X, y).history_
    assert (history["loss"] > 0).all()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state of a run."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    make(make_trainer(checkpoint_dir=folder, max_steps=1)).fit(TEXTS, LABELS)
    return folder


@pytest.mark.parametrize("other", ["trainer", "examples", "instruction", "unwritable"])
def test_a_wrong_checkpoint_folder_is_refused_before_the_model_is_loaded(
    other: str, saved_run: Path, unloaded: Path, tmp_path: Path, nothing_done: None
) -> None:
    folder = saved_run
    if other == "unwritable":
        folder = tmp_path / "run"
        folder.write_text("")
    trainer = make_trainer(checkpoint_dir=folder, max_steps=2 if other == "trainer" else 1)
    instruction = "Find the like" if other == "instruction" else None
    labels = LABELS[::-1] if other == "examples" else LABELS
    with pytest.raises((OSError, ValueError), match="`checkpoint_dir` parameter"):
        make(trainer, model=unloaded, instruction=instruction).fit(TEXTS, labels)


def test_warnings_are_errors_here_so_a_fit_is_silent() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in KINDS:
            make(make_trainer(max_steps=1)).fit(*KINDS[kind])
    assert [str(w.message) for w in caught] == []
