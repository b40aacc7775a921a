"""Results of `evaluate`: rows shown as a table, a frame or bars, and compared in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, overload

import numpy as np

from skembed._validation import check_bool, import_optional
from skembed.exceptions import SkembedError
from skembed.similarity import Floats

__all__ = [
    "Comparison",
    "ComparisonResult",
    "EvaluationError",
    "EvaluationResult",
    "TaskScore",
    "percentile_interval",
]

_Row = TypeVar("_Row")

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the pale yellow.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")


@dataclass(frozen=True, eq=False)
class TaskScore:
    """The score of one vectorizer on one task.

    Parameters
    ----------
    task, vectorizer : str
        Their names.
    metric : str
        Name of the main score.
    score : float
        The main score.
    low, high : float
        Its confidence interval; NaN where there is none.
    n : int
        Draws, queries or pairs that it rests on.
    unit : {"draws", "queries", "pairs"}
        Unit that was counted or resampled.
    seconds : float
        Time spent in the vectorizer.
    texts_per_s : float
        Texts that the vectorizer embedded in a second, without those from its cache; NaN where all
        came from there.
    metrics : dict of str to float
        All metrics.
    values : ndarray of float64, shape (n,)
        The main score of each draw or query; the similarity of each pair.
    replicates : ndarray of float64, shape (n_replicates,)
        Values that the interval is computed from: the draws, or bootstrap samples of the queries
        or pairs.
    """

    task: str
    vectorizer: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    unit: str
    seconds: float
    texts_per_s: float
    metrics: dict[str, float] = field(repr=False)
    values: Floats = field(repr=False)
    replicates: Floats = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """Two vectorizers on the same draws or queries of one task.

    Parameters
    ----------
    task, first, second : str
        Names of the task and of the two vectorizers.
    metric : str
        Name of the main score.
    difference : float
        Score of the first minus score of the second.
    low, high : float
        Confidence interval of the difference; NaN where there is none.
    wins : float
        Share of the draws or bootstrap samples in which the first is ahead; ties count half.
    n : int
        Draws, queries or pairs.
    unit : {"draws", "queries", "pairs"}
        Unit that was counted or resampled.
    """

    task: str
    first: str
    second: str
    metric: str
    difference: float
    low: float
    high: float
    wins: float
    n: int
    unit: str


class _Table(Sequence[_Row]):
    """Rows of one dataclass, shown as a text table."""

    columns: tuple[str, ...] = ()

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[_Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> _Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_Row]: ...
    def __getitem__(self, index: int | slice) -> _Row | Sequence[_Row]:
        return self.rows[index]

    def __repr__(self) -> str:
        cells = [list(self.columns)]
        cells += [[_show(getattr(row, name), name) for name in self.columns] for row in self.rows]
        widths = [max(len(line[j]) for line in cells) for j in range(len(self.columns))]
        numeric = [
            any(isinstance(getattr(row, name), (int, float)) for row in self.rows[:1])
            for name in self.columns
        ]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in cells
        )

    def to_frame(self) -> Any:
        """Return the table as a pandas DataFrame.

        Returns
        -------
        DataFrame
            One row an entry, in order.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        return _make_frame([{c: getattr(row, c) for c in self.columns} for row in self.rows])


class ComparisonResult(_Table[Comparison]):
    """Comparisons of two vectorizers, one row a task: a sequence of `Comparison`.

    Parameters
    ----------
    rows : sequence of Comparison
        The rows.

    See Also
    --------
    EvaluationResult.compare : Makes it.

    Examples
    --------
    >>> from skembed.evaluation import Comparison, ComparisonResult
    >>> row = Comparison("pets", "a", "b", "accuracy", 0.1, 0.05, 0.15, 1.0, 10, "draws")
    >>> ComparisonResult([row])
    task  first  second  metric    difference     low    high    wins   n  unit
    pets  a      b       accuracy      0.1000  0.0500  0.1500  1.0000  10  draws
    """

    columns = tuple(field.name for field in fields(Comparison))


class EvaluationResult(_Table[TaskScore]):
    """Scores of vectorizers on tasks, one row each: a sequence of `TaskScore`.

    Parameters
    ----------
    rows : sequence of TaskScore
        The rows.
    confidence : float, default=0.95
        Confidence level of the intervals.

    See Also
    --------
    evaluate : Makes it.
    """

    columns = tuple(field.name for field in fields(TaskScore) if field.repr)

    def __init__(self, rows: Sequence[TaskScore], *, confidence: float = 0.95) -> None:
        super().__init__(rows)
        self.confidence = confidence

    def get(self, task: str, vectorizer: str) -> TaskScore:
        """Return the row of a task and a vectorizer.

        Parameters
        ----------
        task, vectorizer : str
            Their names.

        Returns
        -------
        TaskScore
            The row.

        Raises
        ------
        KeyError
            If there is none.
        """
        row = self._find(task, vectorizer)
        if row is None:
            raise KeyError(
                f"No row of task {task!r} and vectorizer {vectorizer!r}; tasks are {self.tasks}, "
                f"vectorizers {self.vectorizers}."
            )
        return row

    def _find(self, task: str, vectorizer: str) -> TaskScore | None:
        """Return a row, or None for a vectorizer that failed."""
        rows = (row for row in self.rows if (row.task, row.vectorizer) == (task, vectorizer))
        return next(rows, None)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def vectorizers(self) -> list[str]:
        """Names of the vectorizers, in order."""
        return list(dict.fromkeys(row.vectorizer for row in self.rows))

    def compare(self, first: str, second: str) -> ComparisonResult:
        """Compare two vectorizers on the same draws, queries or pairs of each task.

        Parameters
        ----------
        first, second : str
            Names of two vectorizers.

        Returns
        -------
        ComparisonResult
            One row a task that has scores of both: difference of the scores, its interval, and
            the share of draws or bootstrap samples in which the first is ahead.

        Raises
        ------
        KeyError
            If there is no such vectorizer.

        Notes
        -----
        Differences are taken draw by draw, or bootstrap sample by bootstrap sample, so that what
        makes a draw easy or a query hard for both cancels. Over draws the interval tells how much
        the training samples matter; it does not cover the choice of test texts.
        """
        for name in {first, second} - set(self.vectorizers):
            raise KeyError(f"No row of vectorizer {name!r}; vectorizers are {self.vectorizers}.")
        rows = []
        for task in self.tasks:
            a, b = self._find(task, first), self._find(task, second)
            if a is None or b is None:  # one of them failed
                continue
            differences = a.replicates - b.replicates
            wins = (differences > 0) + 0.5 * (differences == 0)
            rows.append(
                Comparison(
                    task,
                    first,
                    second,
                    a.metric,
                    a.score - b.score,
                    *percentile_interval(differences, self.confidence),
                    float(wins.mean()) if len(wins) else float("nan"),
                    a.n,
                    a.unit,
                )
            )
        return ComparisonResult(rows)

    def to_frame(self, *, all_metrics: bool = False) -> Any:
        """Return the table as a pandas DataFrame.

        Parameters
        ----------
        all_metrics : bool, default=False
            One row for each metric, with columns `task`, `vectorizer`, `metric` and `value`,
            instead of one for each main score.

        Returns
        -------
        DataFrame
            One row an entry, in order.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        if not check_bool(all_metrics, name="all_metrics", owner="EvaluationResult.to_frame"):
            return super().to_frame()
        return _make_frame(
            [
                {"task": row.task, "vectorizer": row.vectorizer, "metric": name, "value": value}
                for row in self.rows
                for name, value in row.metrics.items()
            ]
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the main scores as bars, with their intervals.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Axes to draw on; None makes a figure.

        Returns
        -------
        matplotlib axes
            The axes.

        Raises
        ------
        ValueError
            If there are no rows.
        ImportError
            If matplotlib is not installed.
        """
        tasks, vectorizers = self.tasks, self.vectorizers
        if not self.rows:
            raise ValueError("`EvaluationResult.plot` needs a row to draw; there is none.")
        if ax is None:
            pyplot: Any = import_optional(
                "matplotlib.pyplot", extra="plot", purpose="EvaluationResult.plot"
            )
            width = max(4.0, 1.2 + 0.8 * len(tasks) + 0.35 * len(self.rows))
            _, ax = pyplot.subplots(figsize=(width, 4), layout="constrained")
        share = 0.8 / len(vectorizers)
        for j, vectorizer in enumerate(vectorizers):
            rows = [row for row in self.rows if row.vectorizer == vectorizer]
            ticks = np.array([tasks.index(row.task) for row in rows])
            scores = np.array([row.score for row in rows])
            # A bar for a score beyond its own interval would have a negative length.
            errors = np.array([(r.score - r.low, r.high - r.score) for r in rows]).T.clip(min=0)
            ax.bar(
                ticks + (j - (len(vectorizers) - 1) / 2) * share,
                np.nan_to_num(scores),
                width=0.9 * share,
                yerr=np.nan_to_num(errors),
                color=_COLORS[j % len(_COLORS)],
                error_kw={"ecolor": "0.3", "elinewidth": 1, "capsize": 2},
                label=vectorizer,
            )
        metrics = {row.task: row.metric for row in self.rows}
        ax.set_xticks(range(len(tasks)), [f"{task}\n{metrics[task]}" for task in tasks])
        ax.axhline(0, color="0.2", linewidth=0.8)
        ax.set_ylabel(f"main score, {self.confidence:.0%} interval")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        # Inside the axes the legend would hide bars.
        ax.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(vectorizers)), frameon=False
        )
        return ax


class EvaluationError(SkembedError, RuntimeError):
    """Failure of a vectorizer on a task of `evaluate`; what was finished before is kept.

    The error of the vectorizer is the cause (`__cause__`).

    Parameters
    ----------
    message : str
        Names of the vectorizer and the task, and the reason.
    results : EvaluationResult, optional
        The finished rows; None for none.

    Attributes
    ----------
    results : EvaluationResult
        The finished rows. ``EvaluationResult([*error.results, *others])`` joins them with those of
        another call.

    See Also
    --------
    evaluate : Raises it.

    Examples
    --------
    >>> from skembed.evaluation import EvaluationError, STSTask, evaluate
    >>> class Broken:
    ...     def transform(self, texts):
    ...         raise OSError("disk full")
    >>> try:
    ...     evaluate(Broken(), STSTask([("a cat", "a feline"), ("a cat", "a car")], [5.0, 0.5]))
    ... except EvaluationError as error:
    ...     print(len(error.results), "rows;", repr(error.__cause__))
    0 rows; OSError('disk full')
    """

    def __init__(self, message: str, results: EvaluationResult | None = None) -> None:
        super().__init__(message)
        self.results = EvaluationResult([]) if results is None else results


def percentile_interval(replicates: Floats, level: float) -> tuple[float, float]:
    """Return the bounds of the middle `level` of the replicates; NaN where there are none."""
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _show(value: Any, name: str) -> str:
    """Return a cell of a text table."""
    if name == "texts_per_s" and value != value:  # NaN
        return "cached"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def _make_frame(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a pandas DataFrame."""
    pandas: Any = import_optional("pandas", extra="frame", purpose="`to_frame`")
    return pandas.DataFrame(rows)
