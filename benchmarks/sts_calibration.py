"""Which curve `SimilarityRegressor` calibrates with: error by number of scored pairs.

Run: python benchmarks/sts_calibration.py [--draws 10] [--pairs 5749]
Fitted on draws from the train parts of STS-B and SICK-R, scored on their development parts. Ranks
hardly change, so the root mean squared error decides.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from _common import make_parser, read_rows, start
from _results import Figure, finish

from skembed import NVEmbedVectorizer
from skembed.estimators.sts import SimilarityRegressor

SETS = {"stsb": "dev", "sickr": "trial"}
SIZES = (20, 50, 200, 1000, None)
CURVES = ("logistic", "isotonic")


def load_pairs(args: Any, name: str, part: str, vectorizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of pairs side by side, and their scores."""
    rows = read_rows(args.data, f"sts/{name}", part)[: args.pairs]
    sides = [vectorizer.transform([row[s] for row in rows]) for s in ("sentence1", "sentence2")]
    return np.hstack(sides), np.array([row["score"] for row in rows], float)


def score_curve(curve: str, fitted: Any, held: Any, rows: np.ndarray) -> tuple[float, float]:
    """Root mean squared error and Spearman correlation (x 100) of one fit."""
    reg = SimilarityRegressor(None, calibration=curve).fit(fitted[0][rows], fitted[1][rows])
    error = np.sqrt(np.mean((reg.predict(held[0]) - held[1]) ** 2))
    return float(error), 100 * reg.score(*held)


def main() -> int:
    """Score both curves on both sets."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=10, help="draws of each number of pairs")
    parser.add_argument("--pairs", type=int, help="first pairs of each part only: a short try")
    parser.add_argument("--cache", default="memory", help="cache of the vectorizer")
    args = start(parser)
    vectorizer = NVEmbedVectorizer(cache=args.cache, trainer=None)
    figures, values = [], {}
    for name, part in SETS.items():
        fitted = load_pairs(args, name, "train", vectorizer)
        held = load_pairs(args, name, part, vectorizer)
        for size in (size for size in SIZES if (size or 0) < len(fitted[1])):
            n, draws = size or len(fitted[1]), args.draws if size else 1
            rows = [np.random.default_rng(d).permutation(len(fitted[1]))[:n] for d in range(draws)]
            for curve in CURVES:
                runs = np.array([score_curve(curve, fitted, held, chosen) for chosen in rows])
                error, spearman = runs.mean(axis=0)
                case = f"{name}, {n:,} pairs, {curve}"
                figures.append(Figure(f"{case}: root mean squared error", float(error)))
                values[case] = {"spearman_x100": round(float(spearman), 2)}
    title = "Curves from cosine to score, frozen skembed-mini"
    return finish("sts_calibration", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
