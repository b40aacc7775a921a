"""What a training `fit` refuses, before it loads the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from training_examples import GRADED, KINDS, LABELS, PAIRS, ROWS, SCORES, TEXTS, make, make_trainer

from skembed import ContrastiveTrainer
from skembed.training.examples import TrainingTask

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
    "labels for pairs": (PAIRS, LABELS[:18], TypeError, r"floats.*y\[0\] is a str"),
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
    # test_validation.py has every kind of wrong number; here are the bounds of each parameter.
    *[
        (name, value, error)
        for name in ("r", "epochs", "batch_size", "patience", "max_steps", "checkpoint_steps")
        for value, error in ((0, ValueError), (1.0, TypeError))
    ],
    ("n_negatives", -1, ValueError),
    ("n_negatives", 1.5, TypeError),
    *[(name, None, TypeError) for name in ("r", "epochs", "batch_size", "n_negatives", "patience")],
    *[
        (name, value, ValueError)
        for name in ("lora_alpha", "temperature", "learning_rate", "max_grad_norm")
        for value in (0, np.inf)
    ],
    *[
        (name, value, ValueError)
        for name in ("lora_dropout", "warmup_ratio", "validation_fraction")
        for value in (-0.1, 1)
    ],
    ("weight_decay", -0.1, ValueError),
    ("weight_decay", np.inf, ValueError),
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
        for value in (2, None)
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
