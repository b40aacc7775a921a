"""Zero-shot and few-shot accuracy of `ZeroShotClassifier`, and its two settings.

Run: python benchmarks/zero_shot.py [--full] [--rows 2400] [--draws 2] [--test-rows 7600]
AG News with one sentence a label: the wording was chosen on the train part, the figure is that of
the whole test part. The default weight of descriptions and the temperature were chosen on the train
parts alone: 800 rows held out, the examples drawn from the others. The descriptions of the other
sets are the bare names of their labels. `EmbeddingClassifier` learns from the same examples,
without descriptions.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
from _common import make_parser, read_rows, start
from _finetuning import draw_examples
from _results import Figure, finish
from sklearn.metrics import log_loss

from skembed import NVEmbedVectorizer
from skembed.estimators.classification import EmbeddingClassifier
from skembed.estimators.zero_shot import ZeroShotClassifier

SETS = ("ag_news", "banking77", "hwu64", "tweet_emotion")
AG_NEWS = {
    "World": "World news: governments, elections, wars and attacks in other countries.",
    "Sports": "Sports news: a team wins a game, a player, a coach, the Olympics.",
    "Business": "Business news: companies, profits, stocks, oil prices and the economy.",
    "Sci/Tech": "Technology and science news: software, the internet, computers, space and "
    "research.",
}
MIN_ACCURACY = 60.0
N_HELD_OUT = 800
SHOTS = (1, 2, 4, 8, 16)
WEIGHTS = (1.0, 2.0, 3.0, 5.0, 10.0, float("inf"))
PLAIN = "EmbeddingClassifier on the same examples"
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1)


def load_part(data: Any, name: str, part: str) -> tuple[list[str], np.ndarray]:
    """Return texts and labels of one part of a set."""
    rows = read_rows(data, f"classification/{name}", part)
    return [row["text"] for row in rows], np.array([str(row["label"]) for row in rows])


def score_set(name: str, args: Any, vectorizer: NVEmbedVectorizer) -> dict[str, Any]:
    """Accuracy by weight and number of examples, log loss by temperature, on a train part."""
    texts, labels = load_part(args.data, name, "train")
    chosen = np.random.default_rng(0).permutation(len(texts))[: args.rows]
    texts, labels = [texts[i] for i in chosen], labels[chosen]
    held, held_labels, rest = texts[:N_HELD_OUT], labels[:N_HELD_OUT], labels[N_HELD_OUT:]
    described = AG_NEWS if name == "ag_news" else {c: c.replace("_", " ") for c in set(labels)}

    def accuracy(weight: float, shots: int, draw: int) -> float:
        rows = N_HELD_OUT + draw_examples(rest, shots, draw)
        clf = ZeroShotClassifier(vectorizer, descriptions=described, description_weight=weight)
        clf.fit([texts[i] for i in rows], labels[rows])
        return 100 * clf.score(held, held_labels)

    def plain_accuracy(shots: int, draw: int) -> float:
        rows = N_HELD_OUT + draw_examples(rest, shots, draw)
        clf = EmbeddingClassifier(vectorizer).fit([texts[i] for i in rows], labels[rows])
        return 100 * clf.score(held, held_labels)

    clf = ZeroShotClassifier(vectorizer, descriptions=described).fit()
    losses = {}
    for temperature in TEMPERATURES:
        proba = clf.set_params(temperature=temperature).predict_proba(held)
        loss = log_loss(held_labels, proba, labels=clf.classes_)
        losses[f"temperature {temperature:g}"] = round(float(loss), 4)
    return {
        "no examples": round(100 * clf.score(held, held_labels), 2),
        "log loss, no examples": losses,
        **{
            f"{shots} examples a class": {
                f"weight {weight:g}": round(
                    float(np.mean([accuracy(weight, shots, d) for d in range(args.draws)])), 2
                )
                for weight in WEIGHTS
            }
            | {
                PLAIN: round(
                    float(np.mean([plain_accuracy(shots, d) for d in range(args.draws)])), 2
                )
            }
            for shots in SHOTS
        },
    }


def main() -> int:
    """Score AG News' test part, then the settings on train parts."""
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2400, help="rows of each train part")
    parser.add_argument("--draws", type=int, default=2, help="draws of examples")
    parser.add_argument("--test-rows", type=int, help="of AG News: a short try; default: all")
    parser.add_argument("--only", nargs="*", choices=SETS, default=SETS, help="names of sets")
    parser.add_argument("--cache", default="memory", help="cache of the vectorizer")
    args = start(parser, full={"draws": 3})
    # Logistic regression: few rows and many labels look like numbers to predict.
    warnings.filterwarnings("ignore", message="The number of unique classes is greater")
    vectorizer = NVEmbedVectorizer(cache=args.cache, trainer=None)
    names = {label: label for label in AG_NEWS}
    news = tuple(column[: args.test_rows] for column in load_part(args.data, "ag_news", "test"))
    accuracy, of_names = (
        100 * ZeroShotClassifier(vectorizer).fit(described).score(*news)
        for described in (AG_NEWS, names)
    )
    values: dict[str, Any] = {name: score_set(name, args, vectorizer) for name in args.only}
    figures = [Figure("AG News test, four label sentences: accuracy, %", accuracy, MIN_ACCURACY)]
    figures.append(Figure("AG News test, the four names alone: accuracy, %", of_names))
    for shots in SHOTS:
        case = f"{shots} examples a class"
        for side in (*(f"weight {weight:g}" for weight in WEIGHTS), PLAIN):
            mean = float(np.mean([found[case][side] for found in values.values()]))
            figures.append(Figure(f"{case}, {side}: accuracy, %", mean))
    title = "Label descriptions and a few examples, frozen skembed-mini"
    return finish("zero_shot", title, figures, {**values, "descriptions": AG_NEWS}, args=args)


if __name__ == "__main__":
    sys.exit(main())
