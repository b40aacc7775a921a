"""Short training runs, and what they have learned."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from paths import GOLDEN
from safetensors import SafetensorError, safe_open
from scipy.stats import spearmanr
from tiny import weights
from training_examples import WORDS

from skembed import ContrastiveTrainer, NVEmbedVectorizer
from skembed.history import TrainingHistory
from skembed.training.examples import check_examples
from skembed.training.state import STATE_FILE
from skembed.training.validation import split_validation


def make_texts(n: int, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return texts of each class's own words but for one, and their labels."""
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
    """Return a vectorizer with a trainer of a few quick steps."""
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


def timeless(history: TrainingHistory) -> dict[str, Any]:
    """Return a history without its speeds."""
    values = asdict(history)
    for entry in values["steps"]:
        del entry["examples_per_s"]
    return values


def held_out_score(emb: NVEmbedVectorizer, X: Any, y: Any, fraction: float) -> float:
    """Compute the score of the held-out part again, by `transform` and other means."""
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


def read_state(folder: Path) -> dict[str, Any]:
    """Return the header of a state, {} while there is none."""
    try:
        with safe_open(folder / STATE_FILE, framework="np") as file:
            return dict(json.loads(file.metadata()["skembed"]))
    except (FileNotFoundError, SafetensorError):
        return {}


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
