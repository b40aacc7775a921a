"""`evaluate`: each vectorizer on each task, and what happens when one fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from skembed._validation import check_bool, check_choice, check_int, check_real
from skembed.embedding import check_vectorizer
from skembed.evaluation.protocols import Outcome, TimedVectorizer, run_protocol
from skembed.evaluation.results import (
    EvaluationError,
    EvaluationResult,
    TaskScore,
    percentile_interval,
)
from skembed.evaluation.task_data import check_task, read_task
from skembed.evaluation.tasks import Task
from skembed.exceptions import SkembedWarning
from skembed.progress import progress_bar

__all__ = ["evaluate"]

_MAX_BOOTSTRAPS = 1_000_000


def evaluate(
    vectorizers: Any,
    tasks: Task | Sequence[Task],
    *,
    confidence: float = 0.95,
    n_bootstraps: int = 1000,
    on_error: Literal["raise", "warn"] = "raise",
    verbose: bool = False,
) -> EvaluationResult:
    """Score vectorizers on tasks by the protocols of mteb 2.26.

    Parameters
    ----------
    vectorizers : object, list of objects, or dict of str to object
        Anything that embeds texts: transformers, objects with `encode` such as a
        SentenceTransformer, callables. Queries and documents go through `encode_query` and
        `encode_document` if present. Vectors may be sparse, such as those of a TF-IDF pipeline.
        Used as they are, never fitted: fit those that need it. The keys of a dict are the names in
        the table; without a dict, the names are the classes.
    tasks : task or list of tasks
        `ClassificationTask`, `ClusteringTask`, `STSTask`, `RetrievalTask`, `RerankingTask`; each
        with a name of its own.
    confidence : float, default=0.95
        Confidence level of the intervals.
    n_bootstraps : int, default=1000
        Bootstrap samples of queries or pairs; 0 for no interval. Draws need none.
    on_error : {"raise", "warn"}, default="raise"
        Response to a vectorizer that fails on a task, or does not return vectors: stop, with the
        finished rows in the `results` of the error; or warn, leave its row out and go on.
    verbose : bool, default=False
        Show a progress bar.

    Returns
    -------
    EvaluationResult
        One row for each task and vectorizer, in that order.

    Raises
    ------
    TypeError, ValueError
        If a task or a parameter has an invalid type or value, before anything is embedded.
    EvaluationError
        If a vectorizer fails on a task; with ``on_error="warn"`` only if all do on all. Its cause
        is the error of the vectorizer.

    Warns
    -----
    SkembedWarning
        If a row is left out, with ``on_error="warn"``; one for each.

    Notes
    -----
    The interval is the percentiles of the main score over draws (classification, clustering), which
    tells how much the draw matters, or over bootstrap samples of the queries or pairs.

    The same call gives the same scores: each starts with fresh generators. mteb's own clustering
    tasks keep theirs, so a task object evaluated twice gives two scores there.

    References
    ----------
    N. Muennighoff et al., MTEB: Massive Text Embedding Benchmark, arXiv 2210.07316.
    K. Enevoldsen et al., MMTEB: Massive Multilingual Text Embedding Benchmark, arXiv 2502.13595.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.evaluation import RetrievalTask, STSTask, evaluate
    >>> pairs = [("a cat", "a kitten"), ("a cat", "a tiger"), ("a cat", "the stock market")]
    >>> documents = {"d1": "the stock market rose", "d2": "a cat sleeps on the sofa"}
    >>> tasks = [
    ...     STSTask(pairs, [5.0, 3.5, 0.0], name="pairs"),
    ...     RetrievalTask({"q": "a pet"}, documents, {"q": {"d2": 1}}, name="search"),
    ... ]
    >>> result = evaluate({"mini": NVEmbedVectorizer()}, tasks)
    >>> [(row.task, row.metric, row.score) for row in result][1]
    ('search', 'ndcg_at_10', 1.0)
    """
    owner = "evaluate"
    check_choice(on_error, name="on_error", owner=owner, allowed=("raise", "warn"))
    level = check_real(
        confidence, name="confidence", owner=owner, low=0, high=1, inclusive="neither"
    )
    n_bootstraps = check_int(
        n_bootstraps, name="n_bootstraps", owner=owner, low=0, high=_MAX_BOOTSTRAPS
    )
    verbose = check_bool(verbose, name="verbose", owner=owner)
    named = _name_vectorizers(vectorizers)
    steps = [
        (task, data, name)
        for task, data in [(task, read_task(task)) for task in _list_tasks(tasks)]
        for name in named
    ]
    result, failure = EvaluationResult([], confidence=level), None
    for task, data, name in progress_bar(verbose, iterable=steps, desc="evaluate"):
        vectorizer = TimedVectorizer(named[name])
        try:
            outcome = run_protocol(task, data, vectorizer, n_bootstraps=n_bootstraps)
            row = _make_row(task, name, outcome, vectorizer, level=level)
        except Exception as error:
            failure = _describe_failure(task, name, error, result)
            if on_error == "raise":
                raise failure from error
            warnings.warn(
                f"{failure} Silence this with warnings.filterwarnings('ignore', "
                "category=skembed.SkembedWarning).",
                SkembedWarning,
                stacklevel=2,
            )
        else:
            result = EvaluationResult([*result, row], confidence=level)
    if failure is not None and not result:
        raise failure
    return result


def _describe_failure(
    task: Task, name: str, error: Exception, result: EvaluationResult
) -> EvaluationError:
    """Return an error that says what failed and holds the rows finished before."""
    failure = EvaluationError(
        f"The vectorizer {name!r} failed on the task {task.name!r} and has no row there. "
        f"{type(error).__name__}: {error}",
        result,
    )
    failure.__cause__ = error
    return failure


def _make_row(
    task: Task, name: str, outcome: Outcome, vectorizer: TimedVectorizer, *, level: float
) -> TaskScore:
    """Return the row of one task and one vectorizer."""
    low, high = percentile_interval(outcome.replicates, level)
    return TaskScore(
        task=task.name,
        vectorizer=name,
        metric=task.metric,
        score=outcome.metrics[task.metric],
        low=low,
        high=high,
        n=len(outcome.values),
        unit=outcome.unit,
        seconds=vectorizer.seconds,
        texts_per_s=vectorizer.texts_per_s(),
        metrics=outcome.metrics,
        values=outcome.values,
        replicates=outcome.replicates,
    )


def _name_vectorizers(vectorizers: Any) -> dict[str, Any]:
    """Return the vectorizers by name; those of one class are numbered."""
    if isinstance(vectorizers, Mapping):
        named = dict(vectorizers)
    else:
        several = isinstance(vectorizers, (list, tuple))
        named = {}
        for vectorizer in vectorizers if several else [vectorizers]:
            name = kind = type(vectorizer).__name__
            number = 1
            while name in named:
                number += 1
                name = f"{kind}-{number}"
            named[name] = vectorizer
    if not named or not all(isinstance(name, str) for name in named):
        raise TypeError(
            "The `vectorizers` parameter of `evaluate` must be a vectorizer, a list of them, or a "
            f"dict of str to vectorizer; got {'none' if not named else 'names that are not str'}."
        )
    for name, vectorizer in named.items():
        check_vectorizer(vectorizer, subject=f"The vectorizer {name!r} of `evaluate`")
    return named


def _list_tasks(tasks: Any) -> list[Any]:
    """Return the tasks as a list, no two of one name."""
    listed = [check_task(each) for each in (tasks if isinstance(tasks, (list, tuple)) else [tasks])]
    if not listed:
        raise ValueError("The `tasks` parameter of `evaluate` must hold a task; got none.")
    names = [task.name for task in listed]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"The `tasks` parameter of `evaluate` must hold tasks of different names; "
            f"{repeated[0]!r} occurs more than once. Pass `name=`."
        )
    return listed
