"""Which head `EmbeddingClassifier` takes by default: accuracy and log loss on frozen vectors.

Run: python benchmarks/classification_heads.py [--full] [--rows 1200] [--only banking77 sst2]
Uses the train parts only: a third of the rows is held out, the head is fitted on 8 and 16 examples
a class drawn from the rest, and on all of the rest. Each text is embedded once. A head's mean is
taken over the sets, each set counting the same. Where a head gives probabilities: their log loss,
and how far they are from the share of right predictions (calibration error).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import make_parser, read_rows, start
from _finetuning import draw_examples
from _results import Figure, finish
from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC

from skembed import NVEmbedVectorizer
from skembed.estimators.classification import DEFAULT_C

SETS = ("ag_news", "amazon_counterfactual_en_ext", "banking77", "hwu64", "sst2", "tweet_emotion")
SHOTS = (8, 16)
HELD_OUT = 1 / 3


def logistic(C: float) -> Callable[[], Any]:
    """Return a maker of logistic regressions."""
    return lambda: LogisticRegression(C=C, max_iter=1000)


def searched() -> Any:
    """Logistic regression whose C is searched by log loss over 3 folds."""
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    options = {"scoring": "neg_log_loss", "max_iter": 1000, "use_legacy_attributes": False}
    return LogisticRegressionCV(Cs=[1, 10, 100], l1_ratios=(0,), cv=folds, **options)


HEADS: dict[str, Callable[[], Any]] = {
    **{f"logistic regression, C={C:g}": logistic(C) for C in (1, 3, 10, 30, 100)},
    "logistic regression, C searched": searched,
    "ridge, alpha=0.3": lambda: RidgeClassifier(alpha=0.3),
    "ridge, alpha=1": lambda: RidgeClassifier(alpha=1.0),
    "linear SVM, C=0.3": lambda: LinearSVC(C=0.3),
    "linear SVM, C=1": lambda: LinearSVC(C=1.0),
    "5 nearest neighbours": lambda: KNeighborsClassifier(5),
    "nearest centroid": NearestCentroid,
}

DEFAULT = f"logistic regression, C={DEFAULT_C:g}"
SHOWN = (
    "logistic regression, C=1",
    DEFAULT,
    "logistic regression, C searched",
    "ridge, alpha=1",
    "linear SVM, C=1",
    "5 nearest neighbours",
    "nearest centroid",
)


def load_set(data: Path, name: str, rows: int) -> tuple[list[str], np.ndarray]:
    """Return texts and labels of rows drawn from the train part."""
    found = read_rows(data, f"classification/{name}", "train")
    chosen = np.random.default_rng(0).permutation(len(found))[:rows]
    return [found[i]["text"] for i in chosen], np.array([str(found[i]["label"]) for i in chosen])


Labelled = tuple[np.ndarray, np.ndarray]


def score_head(make: Callable[[], Any], fitted: Labelled, held: Labelled) -> dict[str, float]:
    """Accuracy in percent, log loss and seconds of one fit."""
    began = time.perf_counter()
    head = make().fit(*fitted)
    spent = time.perf_counter() - began
    accuracy = 100 * float(np.mean(head.predict(held[0]) == held[1]))
    found = {"accuracy": accuracy, "fit_s": spent}
    if isinstance(head, LogisticRegression):  # LogisticRegressionCV is one, too
        proba = head.predict_proba(held[0])
        found["calibration_error"] = calibration_error(proba, head.predict(held[0]) == held[1])
        found["log_loss"] = float(log_loss(held[1], proba, labels=head.classes_))
    return found


def calibration_error(proba: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over ten equal ranges of confidence, in percent."""
    confidence = proba.max(axis=1)
    ranges = np.minimum((confidence * 10).astype(int), 9)
    gaps = np.bincount(ranges, confidence - right, minlength=10)
    return 100 * float(np.abs(gaps).sum() / len(right))


def score_set(texts: list[str], labels: np.ndarray, args: Any) -> dict[str, Any]:
    """Scores of all heads on one set, by the number of examples a class."""
    vectors = NVEmbedVectorizer(args.model, cache=args.cache).transform(texts)
    cut = round(len(texts) * HELD_OUT)
    X, y = vectors[cut:], labels[cut:]
    known = np.isin(labels[:cut], y)
    held = vectors[:cut][known], labels[:cut][known]
    cases = {f"{s} per class": [draw_examples(y, s, d) for d in range(args.draws)] for s in SHOTS}
    cases["all"] = [np.arange(len(y))]
    scores: dict[str, Any] = {}
    for case, draws in cases.items():
        for name, make in HEADS.items():
            runs = [score_head(make, (X[rows], y[rows]), held) for rows in draws]
            means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            scores.setdefault(case, {})[name] = {k: round(v, 4) for k, v in means.items()}
    return scores


def average(values: dict[str, Any]) -> dict[str, Any]:
    """Mean of each head over the sets, for each number of examples."""
    first = next(iter(values.values()))

    def mean(case: str, name: str, key: str) -> float:
        return round(float(np.mean([scores[case][name][key] for scores in values.values()])), 4)

    return {
        case: {name: {key: mean(case, name, key) for key in found} for name, found in heads.items()}
        for case, heads in first.items()
    }


def main() -> int:
    """Score the heads set by set and write one table of means."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="skembed-mini")
    parser.add_argument("--rows", type=int, default=1200, help="rows of each train part")
    parser.add_argument("--draws", type=int, default=3, help="draws of 8 and 16 examples a class")
    parser.add_argument("--only", nargs="*", choices=SETS, default=SETS, help="names of sets")
    parser.add_argument("--cache", default="memory", help="cache of the vectorizer")
    args = start(parser, full={"rows": 2400})
    for category in (ConvergenceWarning, UndefinedMetricWarning):
        warnings.filterwarnings("ignore", category=category)
    # Rare classes have fewer rows than folds in a draw.
    warnings.filterwarnings("ignore", message="The least populated class")
    values: dict[str, Any] = {}
    for name in args.only:
        began = time.perf_counter()
        values[name] = score_set(*load_set(args.data, name, args.rows), args)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    means = average(values)
    figures = [
        Figure(f"{case}, {name}: accuracy, %", means[case][name]["accuracy"])
        for case in means
        for name in SHOWN
    ]
    for case, heads in means.items():
        for name in (DEFAULT, "logistic regression, C searched"):
            error = heads[name]["calibration_error"]
            figures.append(Figure(f"{case}, {name}: calibration error, points", error))
    title = "Heads on frozen vectors of skembed-mini, train parts only"
    return finish("classification_heads", title, figures, {"mean": means, **values}, args=args)


if __name__ == "__main__":
    sys.exit(main())
