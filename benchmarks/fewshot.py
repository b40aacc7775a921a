"""Few-shot accuracy of fitted against frozen vectors, and beside SetFit on the same draws.

Run: python benchmarks/fewshot.py [--full] [--draws 3] [--only banking77:8 hwu64:16:0]
Logistic regression on skembed-mini's vectors, frozen and after `fit` with default parameters, all
test texts; 8 examples of each class, with --full also 16, and more draws. On every side, C is the
best of 1, 10 and 100 by cross-validation on the examples, so that a gain is not one of the head.
Seconds are those of the whole `fit`: training, embedding, head. Results are kept after each draw; a
later call goes on from there.

Other sides: "minilm", logistic regression on all-MiniLM-L6-v2's frozen vectors; "setfit", SetFit
with that body and `--setfit-iterations` pairs of each kind for a text; "setfit-defaults", SetFit as
it comes, which trains on all pairs: stopped after `--setfit-max-steps`, its seconds are projected
from the steps that ran and its accuracy is not reported.

`--held-out` is for choosing settings (`--trainer name=value`) without the test parts: it scores on
the training rows that are not in the draw, and writes no result.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _common import load_minilm, make_parser, read_rows, skip, start
from _finetuning import Results, describe, draw_examples, mean_and_error, parse_options
from _results import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from skembed import ContrastiveTrainer, NVEmbedVectorizer

SETS = ("banking77", "hwu64", "tweet_emotion", "ag_news")
SHOTS = (8, 16)
SHORT = ("banking77:8", "hwu64:8", "tweet_emotion:8", "ag_news:8")  # five minutes
SIDES = ("skembed", "minilm", "setfit", "setfit-defaults")
MIN_GAIN = 2.0  # points
MIN_ERRORS = 2.0  # standard errors of the gain
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Draw:
    """Labelled training texts of one draw, and the whole test part."""

    texts: list[str]
    labels: np.ndarray
    test_texts: list[str]
    test_labels: np.ndarray

    def accuracy(self, predicted: np.ndarray) -> float:
        """Share of right labels of the test part, in percent."""
        return 100 * float(np.mean(np.asarray(predicted) == self.test_labels))


def load_draw(args: argparse.Namespace, name: str, shots: int, draw: int) -> Draw:
    """Draw the training texts of a set."""
    train, test = (read_rows(args.data, f"classification/{name}", s) for s in ("train", "test"))
    if args.classes:
        kept = sorted({row["label"] for row in train})[: args.classes]
        train, test = ([row for row in rows if row["label"] in kept] for rows in (train, test))
    labels = np.array([row["label"] for row in train])
    rows = draw_examples(labels, shots, draw)
    if args.held_out:
        test = [row for i, row in enumerate(train) if i not in set(rows)]
    return Draw(
        [train[i]["text"] for i in rows],
        labels[rows],
        [row["text"] for row in test],
        np.array([row["label"] for row in test]),
    )


# The sides


def make_head() -> GridSearchCV:
    """Logistic regression with C by cross-validation."""
    return GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1.0, 10.0, 100.0]}, cv=4)


def run_skembed(draw: Draw, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of a logistic regression on frozen and on fitted vectors."""

    def fit(trainer: ContrastiveTrainer | None) -> Any:
        pipe = make_pipeline(NVEmbedVectorizer(args.model, trainer=trainer), make_head())
        return pipe.fit(draw.texts, draw.labels)

    frozen = fit(None)  # loads the model, too
    began = time.perf_counter()
    fitted = fit(ContrastiveTrainer(random_state=0, **parse_options(args.trainer)))
    fit_s = time.perf_counter() - began
    before, after = (draw.accuracy(pipe.predict(draw.test_texts)) for pipe in (frozen, fitted))
    return {
        "frozen": round(before, 3),
        "fitted": round(after, 3),
        "gain": round(after - before, 3),
        "fit_s": round(fit_s, 2),
        "steps": len(fitted[0].history_),
    }


def run_minilm(draw: Draw, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of a logistic regression on all-MiniLM-L6-v2's frozen vectors."""
    peer = load_minilm()
    began = time.perf_counter()
    vectors = peer.encode(draw.texts)
    head = make_head().fit(vectors, draw.labels)
    fit_s = time.perf_counter() - began
    accuracy = draw.accuracy(head.predict(peer.encode(draw.test_texts)))
    return {"accuracy": round(accuracy, 3), "fit_s": round(fit_s, 2)}


def run_setfit(draw: Draw, args: argparse.Namespace) -> dict[str, Any]:
    """SetFit with a bounded number of pairs for each text, run to its end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_setfit(draw, folder, num_iterations=args.setfit_iterations)
        began = time.perf_counter()
        trainer.train()
        fit_s = time.perf_counter() - began
    predicted = trainer.model.predict(draw.test_texts, use_labels=True)
    return {
        "accuracy": round(draw.accuracy(predicted), 3),
        "fit_s": round(fit_s, 2),
        "iterations": args.setfit_iterations,
        "steps": len(clock.times),
        "s_per_step": round(seconds_per_step(clock.times), 4),
    }


def run_setfit_defaults(draw: Draw, args: argparse.Namespace) -> dict[str, Any]:
    """SetFit on all pairs: some steps run, the seconds of all of them projected."""
    from setfit.sampler import ContrastiveDataset

    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_setfit(draw, folder, max_steps=args.setfit_max_steps)
        pairs = len(ContrastiveDataset(draw.texts, list(draw.labels), None))
        trainer.train()
        batch = trainer.args.embedding_batch_size
    steps = math.ceil(pairs / batch) * trainer.args.embedding_num_epochs
    per_step = seconds_per_step(clock.times)
    return {
        "note": f"not run to the end: {len(clock.times)} of {steps} steps; seconds are projected",
        "pairs": pairs,
        "steps": steps,
        "steps_run": len(clock.times),
        "s_per_step": round(per_step, 4),
        "projected_s": round(per_step * steps),
    }


RUNNERS = dict(zip(SIDES, (run_skembed, run_minilm, run_setfit, run_setfit_defaults), strict=True))


def make_setfit(draw: Draw, folder: str, **options: Any) -> tuple[Any, Any]:
    """Return a SetFit trainer with the MiniLM body, and the times of its steps.

    All else is SetFit's default, but for two that only cost it time: no checkpoint is written and
    nothing is reported.
    """
    try:
        from datasets import Dataset
        from setfit import SetFitModel, Trainer, TrainingArguments
        from transformers import TrainerCallback
    except ImportError as error:
        skip(f"{error}. This side needs SetFit: pip install skembed[bench]")

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """The end of each step."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    model = SetFitModel(model_body=load_minilm(), model_head=make_head())
    settings = TrainingArguments(
        output_dir=str(Path(folder)), save_strategy="no", report_to="none", **options
    )
    dataset = Dataset.from_dict({"text": draw.texts, "label": [str(x) for x in draw.labels]})
    trainer = Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[clock])
    return trainer, clock


def seconds_per_step(times: list[float]) -> float:
    """Mean seconds of a step after the first few."""
    first = min(WARM_UP_STEPS, len(times) - 2)
    return (times[-1] - times[first]) / (len(times) - 1 - first)


# The page


def make_figures(cases: dict[str, Any]) -> list[Figure]:
    """Means over the draws at hand of each set and number of examples."""
    figures: list[Figure] = []
    for case, draws in cases.items():
        sides: dict[str, list[dict[str, Any]]] = {}
        for entry, found in draws.items():
            sides.setdefault(entry.split(", ", 1)[1], []).append(found)
        for side, found in sides.items():
            name = f"{case}, {side}, {len(found)} draw{'s' if len(found) > 1 else ''}"
            figures += SUMMARIES[side.split(" ")[0]](name, found)
    return figures


def summarise_skembed(name: str, found: list[dict[str, Any]]) -> list[Figure]:
    """Accuracies, the gain and its standard error, seconds."""
    gain, error = mean_and_error([row["gain"] for row in found])
    figures = [
        Figure(f"{name}: frozen, %", statistics.fmean(row["frozen"] for row in found)),
        Figure(f"{name}: fitted, %", statistics.fmean(row["fitted"] for row in found)),
        Figure(f"{name}: gain, points", gain, MIN_GAIN),
    ]
    if len(found) > 1 and error > 0:
        figures.append(Figure(f"{name}: gain, standard errors", gain / error, MIN_ERRORS))
    figures.append(Figure(f"{name}: fit, s", statistics.median(row["fit_s"] for row in found)))
    return figures


def summarise_peer(name: str, found: list[dict[str, Any]]) -> list[Figure]:
    """Accuracy and seconds."""
    return [
        Figure(f"{name}: accuracy, %", statistics.fmean(row["accuracy"] for row in found)),
        Figure(f"{name}: fit, s", statistics.median(row["fit_s"] for row in found)),
    ]


def summarise_projection(name: str, found: list[dict[str, Any]]) -> list[Figure]:
    """Projected seconds, and from how many steps."""
    seconds = statistics.median(row["projected_s"] for row in found)
    run, steps = (found[0][key] for key in ("steps_run", "steps"))
    words = f"fit, s, not run to the end: projected from {run} of {steps:,} steps"
    return [Figure(f"{name}: {words}", seconds)]


SUMMARIES = dict(
    zip(
        SIDES,
        (summarise_skembed, summarise_peer, summarise_peer, summarise_projection),
        strict=True,
    )
)


def is_wanted(only: Sequence[str], name: str, shots: int, draw: int) -> bool:
    """Whether a draw is named by `--only`: a set, set:shots or set:shots:draw."""
    full = f"{name}:{shots}:{draw}"
    return any(f"{full}:".startswith(f"{item}:") for item in only)


def name_entry(side: str, draw: int, args: argparse.Namespace) -> str:
    """What a result is kept under."""
    extra = f" ({args.setfit_iterations} iterations)" if side == "setfit" else ""
    return f"draw {draw}, {side}{extra}"


def main() -> int:
    """Measure draw by draw, write the result, and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="skembed-mini")
    parser.add_argument("--sides", nargs="+", default=["skembed"], choices=SIDES)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=SHORT, help="such as banking77, banking77:8, banking77:8:0"
    )
    parser.add_argument("--classes", type=int, help="keep this many classes, for a short try")
    parser.add_argument("--trainer", nargs="+", default=[], help="name=value of ContrastiveTrainer")
    parser.add_argument("--held-out", action="store_true", help="score without the test parts")
    parser.add_argument("--setfit-iterations", type=int, default=20)
    parser.add_argument("--setfit-max-steps", type=int, default=60)
    parser.add_argument("--fresh", action="store_true", help="drop earlier results")
    args = start(parser, full={"draws": 5, "only": SETS})
    wanted = [
        (name, shots, draw, side)
        for name, shots, draw, side in product(SETS, SHOTS, range(args.draws), args.sides)
        if is_wanted(args.only, name, shots, draw)
    ]
    if args.held_out:
        for name, shots, draw, side in wanted:
            found = RUNNERS[side](load_draw(args, name, shots, draw), args)
            print(f"{name}, {shots} per class, draw {draw}, {side}, held out: {describe(found)}")
        return 0
    settings = {"model": args.model, "classes": args.classes, "trainer": args.trainer or None}
    title = "Few-shot accuracy after a contrastive fit"
    results = Results("fewshot", title, args, settings, make_figures)
    for name, shots, draw, side in wanted:
        case, entry = f"{name}, {shots} per class", name_entry(side, draw, args)
        if not results.has(case, entry):
            found = RUNNERS[side](load_draw(args, name, shots, draw), args)
            results.add(case, entry, found)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
