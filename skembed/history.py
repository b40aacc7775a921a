"""`TrainingHistory`: the record of each step of a contrastive `fit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skembed._validation import import_optional

__all__ = ["STEP_COLUMNS", "TrainingHistory"]

STEP_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "examples_per_s")


@dataclass
class TrainingHistory:
    """Loss, learning rate, gradient norm and validation score of a training run.

    Attributes
    ----------
    steps : list of dict
        One entry per optimiser step: `step` (from 1), `epoch` (a float, from 0), `loss`,
        `learning_rate`, `gradient_norm` (before clipping) and `examples_per_s`.
    validation : list of dict
        One entry per evaluation: `step` (0 is the untrained model) and `score`.
    validation_metric : str
        Name of `score`; "" without validation.
    best_step : int or None
        The step whose adapter was kept, where early stopping restored one.
    stopped : {"finished", "early", "interrupted"}
        End of the run.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    validation_metric: str = ""
    best_step: int | None = None
    stopped: str = "finished"

    def __len__(self) -> int:
        """Return the number of optimiser steps."""
        return len(self.steps)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column of `steps`, (n_steps,), or "score" of `validation`.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        if name == "score":
            return np.array([entry["score"] for entry in self.validation])
        if name not in STEP_COLUMNS:
            raise KeyError(f"TrainingHistory has {[*STEP_COLUMNS, 'score']}; got {name!r}.")
        return np.array([entry[name] for entry in self.steps])

    def plot(self, ax: Any = None) -> Any:
        """Draw the loss, its running mean, and the validation score where there is one.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; None makes a figure.

        Returns
        -------
        matplotlib axes
            The axes of the loss.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            pyplot: Any = import_optional(
                "matplotlib.pyplot", extra="plot", purpose="TrainingHistory.plot"
            )
            _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
        steps, loss = self["step"], self["loss"]
        width = max(1, len(loss) // 20)
        ax.plot(steps, loss, color="0.75", linewidth=0.8, label="loss of a step")
        if width > 1:
            mean = np.convolve(loss, np.ones(width) / width, mode="valid")
            ax.plot(steps[width - 1 :], mean, color="C0", label=f"mean of {width} steps")
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("loss")
        handles, labels = ax.get_legend_handles_labels()
        if self.validation:
            right = ax.twinx()
            scored = [entry["step"] for entry in self.validation]
            right.plot(scored, self["score"], color="C1", marker="o", label=self.validation_metric)
            right.set_ylabel(self.validation_metric)
            if self.best_step is not None:
                right.axvline(self.best_step, color="C1", linestyle=":", linewidth=1, label="kept")
            more_handles, more_labels = right.get_legend_handles_labels()
            handles, labels = handles + more_handles, labels + more_labels
        # Above the axes: inside them it would hide one of the two curves.
        ax.legend(
            handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
        )
        return ax
