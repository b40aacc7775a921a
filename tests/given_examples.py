"""Examples of every kind, and what must hold of them."""

import numpy as np
import pytest

from skembed.training.examples import check_examples

TEXTS = ["lost card", "stolen card", "open account", "new account"]
LABELS = ["card", "card", "account", "account"]
PAIRS = [("a cat", "a feline"), ("a dog", "a hound"), ("a cat", "a kitty")]
ROWS = [
    ("a cat", "a feline", "a cap"),
    ("a dog", "a hound", "a log"),
    ("a cat", "a kitty", "a log"),
]
SCORES = [0.5, 4.0, 2.5]


def rows_of(examples):
    """Return the texts of each example."""
    return [tuple(examples.texts[i] for i in row) for row in examples.columns.tolist()]


def labels_of(examples):
    return [examples.classes[i] for i in examples.labels.tolist()]


def assert_sound(examples):
    """Check what holds of all examples: types, shapes, texts distinct, used and in order."""
    columns = examples.columns
    assert columns.dtype == np.int64
    assert columns.ndim == 2
    assert len(examples) == len(columns)
    assert all(type(text) is str for text in examples.texts)
    assert len(set(examples.texts)) == len(examples.texts)
    assert list(dict.fromkeys(columns.ravel().tolist())) == list(range(len(examples.texts)))
    for values, dtype in ((examples.labels, np.int64), (examples.scores, np.float64)):
        if values is not None:
            assert values.dtype == dtype
            assert values.shape == (len(columns),)
    assert (examples.labels is None) == (examples.classes is None)


EXAMPLES = {
    "labels": check_examples(TEXTS, LABELS),
    "rows": check_examples(ROWS),
    "scores": check_examples(PAIRS, SCORES),
}


def random_examples(rng, kind, n=60, n_texts=25):
    """Random examples with many repeated texts, and the X and y that they were read from."""
    words = [f"w{i}" for i in range(n_texts)]
    if kind == "labels":
        y = rng.permutation(np.arange(n) % 4).tolist()
        return [words[i] for i in rng.integers(n_texts, size=n)], y
    rows = [tuple(rng.choice(words, size=4, replace=False).tolist()) for _ in range(n)]
    if kind == "rows":
        return rows, None
    return [row[:2] for row in rows], rng.random(n).tolist()


every_kind = pytest.mark.parametrize("kind", ["labels", "rows", "scores"])
