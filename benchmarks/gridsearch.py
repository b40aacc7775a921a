"""Model loads and texts through the model in a grid search over a Pipeline.

Run: python benchmarks/gridsearch.py
GridSearchCV, 5 folds: 3 values of the classifier's C, then, from a cold start again, 3 values of
the embedding's width. Counts, not times: a machine's load changes nothing. Without data of its own:
100 passages of the documentation of numpy, scipy and scikit-learn.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from _common import make_parser, seconds, start, watch_model
from _results import Figure, finish
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from skembed import NVEmbedVectorizer
from skembed.cache import resolve_cache
from skembed.datasets import load_docstrings
from skembed.inference.registry import registry

N_CLASSES = 4
GRIDS: dict[str, dict[str, list[Any]]] = {
    "clf__C": {"clf__C": [0.1, 1.0, 10.0]},
    "emb__truncate_dim": {"emb__truncate_dim": [None, 128, 64]},
}


def load_task(n_texts: int) -> tuple[list[str], list[str]]:
    """Return distinct texts and their labels, equally many of each class."""
    docs = load_docstrings()
    texts: list[str] = []
    labels: list[str] = []
    for target in range(N_CLASSES):
        rows = [i for i, label in enumerate(docs.target) if label == target]
        texts += [docs.data[i] for i in rows[: n_texts // N_CLASSES]]
        labels += [docs.target_names[target]] * (n_texts // N_CLASSES)
    return texts, labels


def run_grid(texts: list[str], labels: list[str], grid: dict[str, list[Any]]) -> dict[str, Any]:
    """Search from a cold start: no model loaded, an empty cache; return the counts."""
    cache = resolve_cache("memory")
    if cache is not None:
        cache.clear()
    gc.collect()
    if len(registry):
        sys.exit("gridsearch.py: a model is still loaded, so loads would be counted too low.")
    before = registry.n_loads
    pipe = Pipeline([("emb", NVEmbedVectorizer()), ("clf", LogisticRegression(max_iter=200))])
    search = GridSearchCV(pipe, grid, cv=5)
    with watch_model() as activity:
        wall_s = seconds(lambda: search.fit(texts, labels))
    return {
        "model_loads": registry.n_loads - before,
        "texts_through_the_model": activity.n_texts,
        "seconds": round(wall_s, 3),
        "best": str(search.best_params_),
        "best_accuracy": round(float(search.best_score_), 3),
    }


def main() -> int:
    """Measure, write the result, and return the exit status."""
    args = start(make_parser(__doc__, texts=100, data=False))
    texts, labels = load_task(args.texts)
    n_distinct = len(set(texts))
    figures: list[Figure] = []
    values: dict[str, Any] = {"distinct texts": n_distinct, "folds": 5}
    for name, grid in GRIDS.items():
        values[name] = found = run_grid(texts, labels, grid)
        figures += [
            Figure(f"{name}: model loads", found["model_loads"], 1, at_least=False),
            Figure(
                f"{name}: texts through the model",
                found["texts_through_the_model"],
                n_distinct,
                at_least=False,
            ),
        ]
        if not found["texts_through_the_model"]:
            sys.exit("gridsearch.py: no text was counted; the counter does not see the model.")
    title = "Grid search: model loads and texts through the model"
    return finish("gridsearch", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
