"""The loop: seeds, schedule, validation, faults, interruption; runs that are killed and resumed.

Real training of the tiny checkpoint throughout; runs are killed in processes of their own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import GOLDEN
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sklearn.metrics import pairwise_distances_argmin
from tiny import weights

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.adapters import peft_files as adapters
from skembed.exceptions import CheckpointError, SkembedWarning, TrainingError
from skembed.history import STEP_COLUMNS, TrainingHistory
from skembed.inference.registry import registry
from skembed.training import fit as fit_module
from skembed.training import loop
from skembed.training.examples import TrainingTask, check_examples
from skembed.training.state import STATE_FILE
from skembed.training.validation import Validation, split_validation, validation

PARTIAL = f".{STATE_FILE}.partial"
WORDS = {
    "card": "card stolen lost blocked pin chip",
    "account": "account open new savings branch form",
    "fee": "fee charge rate cost monthly price",
}


def make_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of each class, of the class's own words but for one; and their labels."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for label, words in WORDS.items():
        for k in range(n):
            chosen = [*rng.choice(words.split(), 3), "please", str(k)]
            texts.append(" ".join(rng.permutation(chosen)))
            labels.append(label)
    return texts, labels


TEXTS, LABELS = make_texts(8)
PAIRS = [(a, b) for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)]


def make(*, vectorizer: dict[str, Any] | None = None, **parameters: Any) -> NVEmbedVectorizer:
    """A vectorizer with a trainer of a few quick steps."""
    trainer = ContrastiveTrainer(
        **{
            "r": 2,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 5e-3,
            "max_steps": 4,
            "batch_size": 8,
            "random_state": 0,
            **parameters,
        }
    )
    given = {"model": GOLDEN, "device": "cpu", "dtype": "float32", "cache": None}
    return NVEmbedVectorizer(**{**given, **(vectorizer or {})}, trainer=trainer)


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(values, other[name]) for name, values in one.items())


def timeless(history: TrainingHistory) -> dict[str, Any]:
    """A history without its speeds."""
    values = asdict(history)
    for entry in values["steps"]:
        del entry["examples_per_s"]
    return values


# ---------------------------------------------------------------- seeds


def test_equal_seeds_give_equal_adapters() -> None:
    first, second = (make().fit(TEXTS, LABELS) for _ in range(2))
    assert_same(weights(first), weights(second))
    assert timeless(first.history_) == timeless(second.history_)
    assert first.adapter_.fingerprint == second.adapter_.fingerprint
    other = make(random_state=1).fit(TEXTS, LABELS)
    assert differ(weights(first), weights(other))


def test_fit_twice_equals_fit_once() -> None:
    twice = make().fit(PAIRS).fit(TEXTS, LABELS)
    once = make().fit(TEXTS, LABELS)
    assert_same(weights(twice), weights(once))
    assert {n for n in vars(twice) if n.endswith("_")} == {n for n in vars(once) if n.endswith("_")}
    assert twice.n_features_in_ == 1
    np.testing.assert_array_equal(twice.transform(TEXTS), once.transform(TEXTS))


def test_without_a_seed_runs_differ() -> None:
    first, second = (make(random_state=None, max_steps=1).fit(PAIRS) for _ in range(2))
    assert differ(weights(first), weights(second))


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("parameters", "n_steps", "n_batches"),
    [
        ({"epochs": 3, "max_steps": None}, 9, 3),
        ({"epochs": 3, "max_steps": 4}, 4, 3),
        ({"epochs": 1, "max_steps": 50}, 3, 3),
        ({"epochs": 2, "max_steps": None, "batch_size": 100}, 2, 1),
        ({"max_steps": None, "batch_size": 2}, 6, 6),
    ],
)
def test_steps_and_epochs(parameters: dict[str, Any], n_steps: int, n_batches: int) -> None:
    history = make(**{"batch_size": 4, **parameters}).fit(PAIRS).history_
    assert len(history) == n_steps
    np.testing.assert_array_equal(history["step"], np.arange(1, n_steps + 1))
    np.testing.assert_allclose(history["epoch"], np.arange(1, n_steps + 1) / n_batches)
    assert history.stopped == "finished"


@pytest.mark.parametrize(
    ("warmup_ratio", "expected"),
    [
        (0.0, [5, 4, 3, 2, 1]),
        (0.4, [2.5, 5, 5, 10 / 3, 5 / 3]),
        (0.99, [1, 2, 3, 4, 5]),
    ],
)
def test_learning_rate_rises_and_falls_to_zero(warmup_ratio: float, expected: list[float]) -> None:
    emb = make(batch_size=2, max_steps=5, learning_rate=5e-3, warmup_ratio=warmup_ratio)
    np.testing.assert_allclose(
        emb.fit(PAIRS).history_["learning_rate"], np.array(expected) * 1e-3, rtol=1e-6
    )


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_the_gradient_is_clipped_after_its_norm_is_taken(
    max_grad_norm: float, tmp_path: Path
) -> None:
    parameters = {"max_steps": 1, "checkpoint_dir": tmp_path, "max_grad_norm": max_grad_norm}
    (norm,) = make(**parameters).fit(TEXTS, LABELS).history_["gradient_norm"]
    assert 1e-2 < norm < 1e3
    # After one step AdamW's first moment is a tenth of the gradient that it was given.
    state = load_file(tmp_path / STATE_FILE)
    moments = [t.numpy() for name, t in state.items() if name.startswith("exp_avg/")]
    used = np.sqrt(sum((10 * moment.astype(float) ** 2 * 10).sum() for moment in moments))
    np.testing.assert_allclose(used, min(norm, max_grad_norm), rtol=1e-3)


def test_weight_decay_is_for_the_lora_matrices_alone() -> None:
    # The gradient is clipped to next to nothing: what is left is the decay, rate times weight.
    parameters = {"max_steps": 1, "max_grad_norm": 1e-14, "learning_rate": 1e-2, "warmup_ratio": 0}
    decayed = weights(make(**parameters, weight_decay=0.5).fit(PAIRS))
    plain = weights(make(**parameters, weight_decay=0.0).fit(PAIRS))
    for name, values in plain.items():
        factor = 1 - 0.5e-2 if "lora_" in name else 1
        np.testing.assert_allclose(decayed[name], factor * values, rtol=1e-5, atol=1e-7)
        assert np.abs(values).max() > 0 or "lora_B" in name


def test_only_what_is_to_be_trained_is_trained() -> None:
    frozen = make(train_pooling=False).fit(PAIRS).adapter_
    assert not frozen.pooling
    assert {name.split(".")[-3] for name in frozen.lora} == {"q_proj", "v_proj"}
    trained = make(max_steps=2).fit(PAIRS)
    start = make(max_steps=1, max_grad_norm=1e-14, weight_decay=0.0).fit(PAIRS)
    before, after = weights(start), weights(trained)
    moved = {name for name in after if np.abs(after[name] - before[name]).max() > 1e-4}
    assert moved == set(after)
    assert trained.adapter_.pooling


# ---------------------------------------------------------------- history


def test_history_has_a_column_for_each_number() -> None:
    history = make(validation_fraction=0.3).fit(TEXTS, LABELS).history_
    assert len(history) == 4
    for name in STEP_COLUMNS:
        column = history[name]
        assert column.shape == (4,)
        assert np.isfinite(column).all()
        assert (column > 0).all() or name == "loss"
    assert history["score"].shape == (5,)
    with pytest.raises(KeyError, match="'loss'.*'score'.*got 'losses'"):
        history["losses"]
    assert asdict(pickle.loads(pickle.dumps(history))) == asdict(history)
    json.dumps(asdict(history))


@pytest.mark.parametrize("early_stopping", [True, False])
def test_history_is_drawn(early_stopping: bool) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    steps = [
        {"step": k + 1, "epoch": k / 10, "loss": 1 / (k + 1), "learning_rate": 0.1}
        for k in range(60)
    ]
    scores = [{"step": 0, "score": 0.5}, {"step": 30, "score": 0.8}, {"step": 60, "score": 0.7}]
    history = TrainingHistory(steps, scores, "accuracy", best_step=30 if early_stopping else None)
    ax = history.plot()
    (other,) = [axes for axes in ax.figure.axes if axes is not ax]
    loss, mean = ax.get_lines()
    np.testing.assert_array_equal(loss.get_ydata(), history["loss"])
    np.testing.assert_array_equal(loss.get_xdata(), np.arange(1, 61))
    np.testing.assert_allclose(mean.get_ydata()[0], history["loss"][:3].mean())
    assert (mean.get_xdata()[0], mean.get_xdata()[-1]) == (3, 60)
    np.testing.assert_array_equal(other.get_lines()[0].get_ydata(), [0.5, 0.8, 0.7])
    assert len(other.get_lines()) == 1 + early_stopping
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["loss of a step", "mean of 3 steps", "accuracy", *["kept"] * early_stopping]
    ax.figure.canvas.draw()
    _, mine = pyplot.subplots()
    assert TrainingHistory(steps[:1]).plot(mine) is mine
    assert TrainingHistory().plot(mine) is mine
    pyplot.close("all")


def test_progress_shows_loss_and_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PROGRESS_DELAY_S", 600.0)  # however slow this machine is
    make(verbose=True).fit(PAIRS)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "loss=" in shown
    assert "examples_per_s=" in shown
    make().fit(PAIRS)
    assert capsys.readouterr().err == "", "short runs are silent"


# ---------------------------------------------------------------- validation


def random_units(n: int, rng: np.random.Generator, dim: int = 6) -> np.ndarray:
    vectors = rng.normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_accuracy_is_that_of_the_nearest_centroid(rng: np.random.Generator) -> None:
    texts, labels = make_texts(20)
    examples = check_examples(texts, labels)
    train, held = split_validation(examples, 0.3, 0)
    vectors = random_units(len(texts), rng)
    rows = np.arange(len(texts))
    check = validation(examples, train, held, rows, rows, 0)
    # On unit centroids, the nearest one is that of the highest cosine.
    unit = np.stack([vectors[train][examples.labels[train] == k].mean(0) for k in range(3)])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = (pairwise_distances_argmin(vectors[held], unit) == examples.labels[held]).mean()
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(expected)
    assert 0.1 < expected < 0.9
    assert check.metric == "accuracy of the nearest centroid"


def test_correlation_is_scipys(rng: np.random.Generator) -> None:
    pairs = [(f"a {i}", f"b {i}") for i in range(60)]
    scores = rng.integers(0, 5, 60).astype(float)
    examples = check_examples(pairs, scores)
    train, held = split_validation(examples, 0.5, 0)
    n = len(examples.texts)
    vectors = random_units(2 * n, rng)
    check = validation(examples, train, held, np.arange(n), n + np.arange(n), 0)
    left = vectors[examples.columns[held, 0]]
    right = vectors[n + examples.columns[held, 1]]
    expected = spearmanr((left * right).sum(1), scores[held]).statistic
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(expected)
    assert abs(expected) > 0.01


@pytest.mark.parametrize("n_candidates", [12, 400])
def test_reciprocal_rank_by_hand(n_candidates: int, rng: np.random.Generator) -> None:
    # Anchors with several positives, positives that are anchors elsewhere, given negatives.
    rows = []
    while len(rows) < 300:
        a, p, n = rng.choice(n_candidates, 3, replace=False)
        rows.append((f"t {a}", f"t {p}", f"t {n}"))
    examples = check_examples(rows)
    train, held = split_validation(examples, 0.4, 0)
    n = len(examples.texts)
    vectors = random_units(2 * n, rng)
    check = validation(examples, train, held, np.arange(n), n + np.arange(n), 0)
    known: dict[int, set[int]] = {t: set() for t in range(n)}
    for a, p, _ in examples.columns.tolist():
        known[a].add(p)
        known[p].add(a)
    candidates = {t for row in examples.columns[held].tolist() for t in row[1:]}
    total = 0.0
    for a, p, _ in examples.columns[held].tolist():
        cosines = {c: float(vectors[a] @ vectors[n + c]) for c in candidates - known[a] - {a}}
        rank = 1 + sum(c > float(vectors[a] @ vectors[n + p]) for c in cosines.values())
        total += 1 / rank if rank <= 10 else 0
    assert check.score(lambda wanted: vectors[wanted]) == pytest.approx(total / len(held), abs=1e-6)
    assert 0 < total / len(held) < 1


def test_reciprocal_rank_needs_no_matrix_of_all_cosines(rng: np.random.Generator) -> None:
    import tracemalloc

    examples = check_examples([(f"a {i}", f"b {i}") for i in range(12_000)])
    train, held = split_validation(examples, 0.5, 0)
    vectors = random_units(len(examples.texts), rng, dim=4)
    rows = np.arange(len(examples.texts))
    check = validation(examples, train, held, rows, rows, 0)
    tracemalloc.start()
    check.score(lambda wanted: vectors[wanted])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000 * 6_000 * 4 / 2, "half of the whole matrix"


def held_out_score(emb: NVEmbedVectorizer, X: Any, y: Any, fraction: float) -> float:
    """The score again, by `transform` and other means, of the same held-out part."""
    examples = check_examples(X, y)
    train, held = split_validation(examples, fraction, emb.trainer.random_state)
    found = emb.transform(X)
    if examples.kind == "labels":
        labels = np.array(y)
        centroids = {c: found[train][labels[train] == c].mean(0) for c in sorted(set(y))}
        unit = {c: v / np.linalg.norm(v) for c, v in centroids.items()}
        best = [max(unit, key=lambda c: float(v @ unit[c])) for v in found[held]]
        return float(np.mean([a == b for a, b in zip(best, labels[held], strict=True)]))
    left, right = np.split(found, 2, axis=1)
    if examples.kind == "scores":
        return float(spearmanr((left * right).sum(1)[held], np.array(y)[held]).statistic)
    cosines = left[held] @ right[held].T
    ranks = 1 + (cosines > np.diag(cosines)[:, None]).sum(1)
    return float(np.mean(np.where(ranks <= 10, 1 / ranks, 0)))


KINDS = {
    "labels": (TEXTS, LABELS),
    "rows": (PAIRS, None),
    "scores": (PAIRS, list(range(len(PAIRS)))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_the_history_are_those_of_the_vectors(kind: str) -> None:
    X, y = KINDS[kind]
    names = {"instruction": "Find the like", "document_instruction": "Say it"}
    trainer = {"validation_fraction": 0.4, "learning_rate": 2e-2, "epochs": 4}
    emb = make(vectorizer=names, **trainer).fit(X, y)
    scores = emb.history_["score"]
    assert [entry["step"] for entry in emb.history_.validation] == list(range(5))
    assert scores[-1] == pytest.approx(held_out_score(emb, X, y, 0.4), abs=1e-6)
    start = make(vectorizer=names, max_steps=1, max_grad_norm=1e-14, weight_decay=0).fit(X, y)
    assert scores[0] == pytest.approx(held_out_score(start, X, y, 0.4), abs=1e-6)
    assert emb.history_.validation_metric.split()[0] in ("accuracy", "mean", "Spearman")


def test_several_tasks_are_scored_by_their_mean() -> None:
    tasks = [TrainingTask(*KINDS[kind]) for kind in KINDS]
    emb = make(max_steps=1, validation_fraction=0.4).fit_tasks(tasks)
    assert emb.history_.validation_metric == "mean score of 3 tasks"
    start = make(max_steps=1, max_grad_norm=1e-14, weight_decay=0).fit(PAIRS)
    alone = [held_out_score(start, *KINDS[kind], 0.4) for kind in KINDS]
    assert emb.history_["score"][0] == pytest.approx(np.mean(alone), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_part_is_never_trained_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = KINDS[kind]
    examples = check_examples(X, y)
    _, held = split_validation(examples, 0.4, 0)
    unseen = {examples.texts[i] for i in examples.columns[held].ravel()}
    unseen -= {examples.texts[i] for i in np.delete(examples.columns, held, axis=0).ravel()}
    seen: set[int] = set()
    build = loop.BatchPlan.build

    def recording(self: Any, step: int, listed: Any) -> Any:
        batch = build(self, step, listed)
        for task in self.tasks:
            for row, text in zip(task.queries, task.examples.texts, strict=True):
                if row in batch.texts:
                    seen.add(text)
            for row, text in zip(task.documents, task.examples.texts, strict=True):
                if row in batch.texts:
                    seen.add(text)
        return batch

    monkeypatch.setattr(loop.BatchPlan, "build", recording)
    make(validation_fraction=0.4, max_steps=None, batch_size=4).fit(X, y)
    assert unseen
    assert not seen & unseen
    assert len(seen) == len(examples.texts) - len(unseen)


# ---------------------------------------------------------------- early stopping


def fake_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Score the evaluations of a run in this order, whatever the model does."""
    left = iter(scores)
    original = fit_module.validation

    def scripted(*args: Any) -> Validation:
        return Validation(original(*args).metric, lambda embed: next(left))

    monkeypatch.setattr(fit_module, "validation", scripted)


@pytest.mark.parametrize(
    ("scores", "best", "n_steps"),
    [
        ([0.1, 0.2, 0.5, 0.4, 0.3], 2, 4),
        ([0.9, 0.2, 0.3], 0, 2),
        ([0.1, 0.2, 0.2, 0.2], 1, 3),  # as good is not better
        ([0.1, 0.0, 0.3, 0.2, 0.4, 0.3, 0.5], 6, 6),
        ([float("nan"), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 6),
    ],
)
def test_the_best_adapter_is_kept(
    scores: list[float], best: int, n_steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parameters = {"max_steps": 6, "validation_fraction": 0.3, "epochs": 6}
    states = {}
    write = loop.Checkpoints.write

    def keeping(self: Any, tensors: Any, values: Any) -> None:
        for name, tensor in tensors.items():
            if name.startswith("weights/"):
                states.setdefault(values["step"], {})[name[8:].removeprefix("pooling.")] = (
                    tensor.numpy().copy()
                )
        write(self, tensors, values)

    monkeypatch.setattr(loop.Checkpoints, "write", keeping)
    make(**parameters, checkpoint_dir=tmp_path / "all", checkpoint_steps=1).fit(TEXTS, LABELS)
    fake_scores(monkeypatch, scores)
    emb = make(**parameters, early_stopping=True, patience=2).fit(TEXTS, LABELS)
    assert len(emb.history_) == n_steps
    assert emb.history_.best_step == best
    assert emb.history_.stopped == ("early" if n_steps < 6 else "finished")
    assert emb.history_["score"][best] == np.nanmax(emb.history_["score"])
    if best:
        assert_same(weights(emb), states[best])
    else:  # no step was good: B is zero still
        lora = {name: w for name, w in weights(emb).items() if "lora_B" in name}
        assert lora
        assert not any(w.any() for w in lora.values())
        frozen = make().set_params(trainer=None).fit(TEXTS).transform(TEXTS)
        np.testing.assert_allclose(emb.transform(TEXTS), frozen, atol=1e-6)


def test_the_score_of_the_kept_adapter_is_the_best_of_the_history() -> None:
    # A rate that ruins the model: what is returned is the best that was seen on the way.
    emb = make(
        validation_fraction=0.4, early_stopping=True, patience=10, learning_rate=0.5, max_steps=10
    ).fit(TEXTS, LABELS)
    scores = emb.history_["score"]
    assert scores.min() < scores.max()
    assert held_out_score(emb, TEXTS, LABELS, 0.4) == pytest.approx(scores.max())
    assert emb.history_.best_step == emb.history_.validation[int(scores.argmax())]["step"]


def test_without_early_stopping_the_last_adapter_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = {"max_steps": 4, "validation_fraction": 0.3}
    plain = make(**parameters).fit(TEXTS, LABELS)
    fake_scores(monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.1])
    emb = make(**parameters).fit(TEXTS, LABELS)
    assert emb.history_.best_step is None
    assert len(emb.history_) == 4
    assert_same(weights(emb), weights(plain))


def test_ten_evaluations_of_a_long_run() -> None:
    emb = make(max_steps=25, batch_size=2, epochs=9, validation_fraction=0.2, train_pooling=False)
    steps = [entry["step"] for entry in emb.fit(PAIRS).history_.validation]
    assert steps == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]


# ---------------------------------------------------------------- faults


def visible(emb: NVEmbedVectorizer) -> dict[str, Any]:
    return {name: value for name, value in vars(emb).items() if name != "_lease"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"learning_rate": 1e30},
        {"learning_rate": 1e39, "max_steps": 1, "warmup_ratio": 0.0},
        {"temperature": 1e-30},
        {"temperature": 1e-45},
    ],
    ids=str,
)
@pytest.mark.parametrize("fitted", [False, True])
def test_a_loss_that_is_not_finite_ends_training(
    fitted: bool, parameters: dict[str, Any], tmp_path: Path
) -> None:
    emb = make()
    if fitted:
        emb.fit(TEXTS, LABELS)
    before = visible(emb)
    found = weights(emb) if fitted else {}
    trainer = {"max_steps": 8, "epochs": 8, "checkpoint_dir": tmp_path, **parameters}
    emb.set_params(**{f"trainer__{name}": value for name, value in trainer.items()})
    with pytest.raises(TrainingError, match="is not finite.*`learning_rate`.*as it was before"):
        emb.fit(TEXTS, LABELS)
    assert visible(emb) == before
    assert hasattr(emb, "adapter_") == fitted
    if fitted:
        assert_same(weights(emb), found)
    assert not (tmp_path / STATE_FILE).exists(), "no state of a run that failed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_weight_ends_training(value: float) -> None:
    emb = make(warm_start=True).fit(TEXTS, LABELS)
    adapter = emb.adapter_
    next(iter(adapter.lora.values()))[0, 0] = value
    with pytest.raises(TrainingError, match="loss is not finite at step 1 of 4"):
        emb.fit(TEXTS, LABELS)
    assert emb.adapter_ is adapter


@pytest.mark.parametrize(
    "parameters", [{"validation_fraction": 0.3}, {"mine_negatives": "perc_pos"}]
)
def test_vectors_that_are_not_finite_are_no_scores(parameters: dict[str, Any]) -> None:
    emb = make(warm_start=True).fit(PAIRS)
    next(iter(emb.adapter_.lora.values()))[0, 0] = np.nan
    emb.set_params(**{f"trainer__{name}": value for name, value in parameters.items()})
    with pytest.raises(TrainingError, match="not finite"):
        emb.fit(PAIRS)


def test_nothing_to_compare_is_said() -> None:
    pairs = [("one anchor", f"positive {i}") for i in range(8)]
    emb = make()
    with pytest.raises(TrainingError, match=r"8 examples has no negative left.*`batch_size`"):
        emb.fit(pairs)
    assert not hasattr(emb, "adapter_")
    assert not hasattr(emb, "n_features_in_")


@pytest.mark.parametrize("kind", ["labels", "scores"])
def test_a_rare_class_or_score_does_not_end_a_run(kind: str) -> None:
    n = 24
    if kind == "labels":
        X: Any = [f"text {i}" for i in range(n)]
        y: Any = [0] * (n - 2) + [1] * 2
    else:
        X = [(f"a {i}", f"b {i}") for i in range(n)]
        y = [1.0] * (n - 1) + [0.0]
    emb = make(batch_size=4, max_steps=6, train_pooling=False).fit(X, y)
    assert (emb.history_["loss"] > 0).all()


# ---------------------------------------------------------------- interruption


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C when the bar has reached a step."""

    class Interrupted(loop.tqdm):  # type: ignore[misc, name-defined]
        def update(self, n: float = 1) -> Any:
            self.passed = getattr(self, "passed", 0) + 1
            if self.passed == step:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(loop, "tqdm", Interrupted)


def test_an_interrupted_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(max_steps=6, epochs=2).fit(TEXTS, LABELS)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        emb = make(max_steps=6, epochs=2)
        with pytest.warns(SkembedWarning, match="interrupted after 3 steps; the adapter is the"):
            assert emb.fit(TEXTS, LABELS) is emb
    assert emb.history_.stopped == "interrupted"
    assert timeless(emb.history_)["steps"] == timeless(whole.history_)["steps"][:3]
    assert np.isfinite(emb.transform(TEXTS)).all()
    # It is the adapter of step 3: three steps of the whole schedule, by another way.
    monkeypatch.setattr(
        loop,
        "compute_learning_rate",
        lambda trainer, step, n_steps: float(whole.history_["learning_rate"][step]),
    )
    three = make(max_steps=3, epochs=2).fit(TEXTS, LABELS)
    assert_same(weights(emb), weights(three))


def test_an_interrupted_run_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scores(monkeypatch, [0.1, 0.7, 0.3, 0.2])
    parameters = {"validation_fraction": 0.3, "early_stopping": True, "max_steps": 6, "epochs": 4}
    emb = make(patience=9, **parameters)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.warns(SkembedWarning, match="interrupted after 4 steps"):
            emb.fit(TEXTS, LABELS)
    assert emb.history_.best_step == 1
    fake_scores(monkeypatch, [0.1, 0.7, 0.3, 0.2])
    again = make(patience=1, **parameters)  # stops by itself, with the same best
    assert_same(weights(emb), weights(again.fit(TEXTS, LABELS)))


def test_interrupted_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def accumulate(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Learner, "accumulate", accumulate)
    with pytest.warns(SkembedWarning, match="interrupted after 0 steps"):
        emb = make().fit(TEXTS, LABELS)
    frozen = make().set_params(trainer=None).fit(TEXTS).transform(TEXTS)
    np.testing.assert_allclose(emb.transform(TEXTS), frozen, atol=1e-6)
    assert len(emb.history_) == 0


@pytest.mark.parametrize("seed", [0, None])
def test_an_interrupted_run_is_resumed(
    seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    parameters = {"max_steps": 6, "epochs": 2, "random_state": seed}
    saving = {"checkpoint_dir": tmp_path / "run", "checkpoint_steps": 2}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.warns(SkembedWarning, match="interrupted"):
            make(**parameters, **saving).fit(TEXTS, LABELS)
    state = read_state(tmp_path / "run")
    assert state["values"]["step"] == 4
    steps.clear()
    emb = make(**parameters, **saving).fit(TEXTS, LABELS)
    assert steps == [4, 5]
    whole = make(**{**parameters, "random_state": state["seed"]}).fit(TEXTS, LABELS)
    assert_same(weights(emb), weights(whole))
    assert timeless(emb.history_) == timeless(whole.history_)


def test_patience_and_the_best_are_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    parameters = {"validation_fraction": 0.3, "early_stopping": True, "patience": 2, "epochs": 6}
    saving = {"checkpoint_dir": tmp_path, "checkpoint_steps": 1, "max_steps": 6}
    fake_scores(monkeypatch, [0.1, 0.5, 0.4, 0.3])
    whole = make(**{**parameters, "max_steps": 6}).fit(TEXTS, LABELS)
    assert (len(whole.history_), whole.history_.best_step) == (3, 1)
    fake_scores(monkeypatch, [0.1, 0.5, 0.4])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.warns(SkembedWarning, match="interrupted after 3 steps"):
            make(**parameters, **saving).fit(TEXTS, LABELS)
    steps.clear()
    fake_scores(monkeypatch, [0.3])
    emb = make(**parameters, **saving).fit(TEXTS, LABELS)
    assert steps == [2], "one bad score before the interruption, and one after it"
    assert timeless(emb.history_) == timeless(whole.history_)
    assert_same(weights(emb), weights(whole))


# ---------------------------------------------------------------- states on disk


def read_state(folder: Path) -> dict[str, Any]:
    """The header of a state; {} while there is none."""
    try:
        with safe_open(folder / STATE_FILE, framework="np") as file:
            return dict(json.loads(file.metadata()["skembed"]))
    except (FileNotFoundError, SafetensorError):
        return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NVEmbedVectorizer]:
    """A folder of a finished run of four steps, and what it gave."""
    folder = tmp_path_factory.mktemp("finished") / "deeper" / "run"
    return folder, make(checkpoint_dir=folder, checkpoint_steps=2).fit(TEXTS, LABELS)


@pytest.fixture
def run(finished: tuple[Path, NVEmbedVectorizer], tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_given_again_at_once(
    run: Path, finished: tuple[Path, NVEmbedVectorizer], steps: list[int]
) -> None:
    # What does not change the adapter may differ: where, how often, how loud; numpy's numbers.
    emb = make(checkpoint_dir=str(run), checkpoint_steps=3, max_steps=np.int64(4), verbose=True)
    emb.fit(TEXTS, LABELS)
    assert steps == []
    assert_same(weights(emb), weights(finished[1]))
    assert asdict(emb.history_) == asdict(finished[1].history_)
    assert sorted(path.name for path in run.iterdir()) == [STATE_FILE]


def test_checkpoints_change_nothing(finished: tuple[Path, NVEmbedVectorizer]) -> None:
    assert_same(weights(make().fit(TEXTS, LABELS)), weights(finished[1]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.1}, "trainer"),
        ({"r": 4}, "trainer"),
        ({"random_state": 1}, "trainer"),
        ({"vectorizer": {"instruction": "Find the like"}}, "set of examples or instruction"),
        ({"vectorizer": {"max_length": 100}}, "max_length"),
        ({"vectorizer": {"dtype": "bfloat16"}}, "data type"),
        ({"vectorizer": {"pooling": "mean"}, "train_pooling": True}, "pooling"),
        ({"texts": [*TEXTS[:-1], "another text"]}, "set of examples or instruction"),
        ({"labels": [*LABELS[:-1], "card"]}, "set of examples or instruction"),
    ],
    ids=str,
)
def test_the_state_of_another_run_is_refused(
    change: dict[str, Any], named: str, run: Path, steps: list[int]
) -> None:
    change = dict(change)
    texts, labels = change.pop("texts", TEXTS), change.pop("labels", LABELS)
    emb = make(**{"checkpoint_dir": run, **change})
    with pytest.raises(CheckpointError, match=f"`checkpoint_dir`.*written with another {named}"):
        emb.fit(texts, labels)
    assert steps == []
    assert not hasattr(emb, "adapter_")


def test_the_state_of_another_model_is_refused(run: Path, tmp_path: Path, steps: list[int]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN, folder)
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    emb = make(vectorizer={"model": folder}, checkpoint_dir=run)
    with pytest.raises(CheckpointError, match="written with another model.*Name another folder"):
        emb.fit(TEXTS, LABELS)
    assert steps == []


def test_a_state_to_go_on_from_is_part_of_the_run(run: Path, steps: list[int]) -> None:
    emb = make(checkpoint_dir=run, warm_start=True)
    with pytest.raises(CheckpointError, match="another trainer"):
        emb.fit(TEXTS, LABELS)
    emb.set_params(trainer__checkpoint_dir=run.parent / "warm").fit(TEXTS, LABELS)
    with pytest.raises(CheckpointError, match="another model"):  # now there is an adapter below
        emb.fit(TEXTS, LABELS)
    assert len(steps) == 4


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "header cut": lambda data: data[:20],
    "empty": lambda data: b"",
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage: str, run: Path, steps: list[int]) -> None:
    path = run / STATE_FILE
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    n_loads = registry.n_loads
    with pytest.raises(CheckpointError, match="cannot be read.*Delete the file"):
        make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert (steps, registry.n_loads) == ([], n_loads)


@pytest.mark.parametrize("header", [None, "[]", '{"version": 99}', '{"version": 1}', "{"])
def test_a_foreign_file_is_refused(header: str | None, run: Path, steps: list[int]) -> None:
    tensors = load_file(run / STATE_FILE)
    metadata = {"format": "pt"} if header is None else {"skembed": header}
    save_file(tensors, run / STATE_FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match="cannot be read|of version 99"):
        make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert steps == []


@pytest.mark.parametrize("place", ["file", "below a file", "read only"])
def test_a_folder_that_cannot_be_written_is_said_early(
    place: str, tmp_path: Path, fresh_dir: Path
) -> None:
    folder = tmp_path / "run"
    if place == "read only":
        folder.mkdir()
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        folder.write_text("")
        folder = folder / "deeper" if place == "below a file" else folder
    n_loads = registry.n_loads
    emb = make(vectorizer={"model": fresh_dir}, checkpoint_dir=folder)
    with pytest.raises(OSError, match="`checkpoint_dir` parameter of `ContrastiveTrainer`"):
        emb.fit(TEXTS, LABELS)
    assert registry.n_loads == n_loads


def test_a_write_that_fails_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "run", make().fit(TEXTS, LABELS)
    save, calls = adapters.save_file, []

    def failing(tensors: Any, path: Path, **rest: Any) -> None:
        save(tensors, path, **rest)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(path, 1_000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "save_file", failing)
        with pytest.raises(OSError, match="No space left"):
            make(checkpoint_dir=folder, checkpoint_steps=1).fit(TEXTS, LABELS)
    assert read_state(folder)["values"]["step"] == 2
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
    emb = make(checkpoint_dir=folder, checkpoint_steps=1).fit(TEXTS, LABELS)
    assert_same(weights(emb), weights(whole))


@pytest.mark.parametrize("before", [True, False])
def test_half_a_file_of_a_killed_write_is_passed_over(before: bool, run: Path) -> None:
    data = (run / STATE_FILE).read_bytes()
    (run / PARTIAL).write_bytes(data[: len(data) // 3])
    if not before:  # killed in the first write of all
        (run / STATE_FILE).unlink()
    emb = make(checkpoint_dir=run).fit(TEXTS, LABELS)
    assert len(emb.history_) == 4
    assert [path.name for path in run.iterdir()] == [STATE_FILE]


def test_a_state_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, bool]] = []
    write = loop.Checkpoints.write

    def recording(self: Any, tensors: Any, values: Any) -> None:
        written.append((values["step"], values["done"]))
        write(self, tensors, values)

    monkeypatch.setattr(loop.Checkpoints, "write", recording)
    make(checkpoint_dir=tmp_path / "a", checkpoint_steps=3, max_steps=7, epochs=9).fit(PAIRS)
    assert written == [(3, False), (6, False), (7, True)]
    written.clear()
    make(checkpoint_dir=tmp_path / "b").fit(PAIRS)
    assert written == [(2, True)], "by the clock, and this one was short"
    written.clear()
    monkeypatch.setattr("skembed.training.state.INTERVAL_S", 0.0)
    make(checkpoint_dir=tmp_path / "c").fit(PAIRS)
    assert written == [(1, False), (2, False), (2, True)]


# ---------------------------------------------------------------- killed, and resumed

LONG = {"max_steps": 10, "epochs": 10, "batch_size": 6, "checkpoint_steps": 1}
RUNS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "labels": (LONG, TEXTS, LABELS),
    # Dropout, given and mined negatives, mined again in each epoch of two steps, and a best.
    "everything": (
        {
            **LONG,
            "mine_negatives": "perc_pos",
            "remine": True,
            "n_negatives": 3,
            "validation_fraction": 0.2,
            "early_stopping": True,
            "patience": 10,
            "random_state": 3,
        },
        [(a, b, c) for (a, b), c in zip(PAIRS, reversed(TEXTS[::2]), strict=True)],
        None,
    ),
}


def train_in_child(name: str, folder: Path | None, result: Path | None) -> None:
    """Train one of `RUNS` and write what came of it; runs in a process of its own."""
    warnings.simplefilter("error")
    parameters, X, y = RUNS[name]
    emb = make(**parameters, checkpoint_dir=folder).fit(X, y)
    if result is not None:
        result.write_bytes(pickle.dumps((weights(emb), timeless(emb.history_))))


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Starts processes that have torch imported and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["skembed.vectorizer", "peft", "scipy.stats", "sklearn"])
    started: list[BaseProcess] = []

    def start(*args: Any) -> BaseProcess:
        process = context.Process(target=train_in_child, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def wait_for(process: BaseProcess) -> int | None:
    process.join(timeout=120)
    return process.exitcode


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(
    request: pytest.FixtureRequest, processes: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any]:
    """A run's name, and what it gives when it is left alone."""
    result = tmp_path_factory.mktemp("whole") / "result"
    assert wait_for(processes(request.param, None, result)) == 0
    return request.param, pickle.loads(result.read_bytes())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("least", [1, 6])
def test_a_killed_run_ends_in_the_same_adapter(
    least: int, uninterrupted: tuple[str, Any], processes: Any, tmp_path: Path
) -> None:
    name, (expected, history) = uninterrupted
    folder, result = tmp_path / "run", tmp_path / "result"
    process = processes(name, folder, None)
    deadline = time.monotonic() + 120
    while read_state(folder).get("values", {"step": 0})["step"] < least:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL
    state = read_state(folder)["values"]
    assert least <= state["step"] < len(history["steps"])
    assert not state["done"]
    assert wait_for(processes(name, folder, result)) == 0
    found, resumed = pickle.loads(result.read_bytes())
    assert_same(found, expected)
    assert resumed == history
    assert read_state(folder)["values"]["done"]
