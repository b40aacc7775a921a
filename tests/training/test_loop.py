"""The loop: seeds, schedule, early stopping, faults, interruption.

Real training of the tiny checkpoint throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import weights
from training_runs import (
    LABELS,
    PAIRS,
    TEXTS,
    assert_same,
    held_out_score,
    make,
    read_state,
    timeless,
)

from skembed import NVEmbedVectorizer, TrainingTask, progress
from skembed.exceptions import SkembedWarning, TrainingError
from skembed.training import fit as fit_module
from skembed.training import loop
from skembed.training.state import STATE_FILE
from skembed.training.validation import Validation


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(values, other[name]) for name, values in one.items())


# Seeds


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


# Schedule


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


# History


def test_progress_shows_loss_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    make(verbose=True).fit(PAIRS)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "loss=" in shown
    assert "examples_per_s=" in shown
    make().fit(PAIRS)
    assert capsys.readouterr().err == ""


# Early stopping


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


# Faults


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


@pytest.mark.parametrize("blend", [True, False])
def test_nothing_to_compare_is_said_before_training(blend: bool) -> None:
    one_anchor = [("one anchor", f"positive {i}") for i in range(8)]
    one_positive = [(f"anchor {i}", "one positive") for i in range(8)]
    every = [(f"anchor {i}", f"positive {j}") for i in range(3) for j in range(3)]
    for pairs, n in ((one_anchor, 8), (one_positive, 1), (every, 3)):
        emb = make()
        with pytest.raises(ValueError, match=rf"every anchor belongs to every positive \({n} dif"):
            emb.fit(pairs)
        assert not hasattr(emb, "adapter_")
        assert not hasattr(emb, "n_features_in_")
    tasks = [TrainingTask(PAIRS), TrainingTask(one_positive)]
    emb = make(blend_tasks=blend, train_pooling=False)
    if blend:  # the other task has negatives for it
        assert emb.fit_tasks(tasks).history_.steps
        return
    with pytest.raises(ValueError, match=r"of tasks\[1\] must hold an anchor"):
        emb.fit_tasks(tasks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_rare", [1, 3, 9])
def test_few_distinct_positives_train_with_any_seed(n_rare: int, seed: int) -> None:
    pairs = [(f"text {i}", "common") for i in range(60)]
    pairs += [(f"rare text {i}", "rare") for i in range(n_rare)]
    emb = make(random_state=seed, max_steps=None, batch_size=8, train_pooling=False).fit(pairs)
    assert (emb.history_["loss"] > 0).all()


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


# Interruption


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C when the bar has reached a step."""

    class Interrupted(progress.tqdm):
        def update(self, n: float = 1) -> Any:
            self.passed = getattr(self, "passed", 0) + 1
            if self.passed == step:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(progress, "tqdm", Interrupted)


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
