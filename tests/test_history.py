"""The history of a training run: its columns, its plot."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
from training_runs import LABELS, TEXTS, make

from skembed.history import STEP_COLUMNS, TrainingHistory


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
