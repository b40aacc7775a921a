"""Embed the documentation of numpy, scipy and scikit-learn; classify it; draw a map of it.

The whole job in one script, offline and on a CPU:

1. load a labelled text set, the documentation of the three packages;
2. embed every text once with NVEmbedVectorizer;
3. compare the pipeline NVEmbedVectorizer + LogisticRegression with TF-IDF + LogisticRegression,
   trained on 4, 8 and 16 labelled texts per class and on all of them, always tested on functions
   and classes that were not trained on;
4. write a UMAP map of the embeddings (PNG) and all results (JSON).

Run ``python examples/docstrings_demo.py --help`` for the options.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_validate
from sklearn.pipeline import Pipeline

from skembed import EmbeddingMapDisplay, NVEmbedVectorizer
from skembed.datasets import load_docstrings

SHOTS = (4, 8, 16)
BASELINE = "TF-IDF"


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    options = parse_arguments(arguments)
    check_packages("umap", "matplotlib")  # now, rather than after all the work
    started = time.perf_counter()
    docs = load_texts(options)
    folds = StratifiedGroupKFold(options.folds, shuffle=True, random_state=0)
    splits = list(folds.split(docs.data, docs.target, docs.groups))

    embeddings, embedding_seconds = embed(docs, options.model)
    results = compare(docs, splits, options)
    print_results(results, docs, embedding_seconds)

    options.output.mkdir(parents=True, exist_ok=True)
    map_file = options.output / "map.png"
    say("\nMap: projecting the embeddings to two dimensions with UMAP (cosine) ...")
    clock = time.perf_counter()
    title = f"{len(docs.data):,} passages of documentation, embedded by {Path(options.model).name}"
    draw_map(embeddings, docs, map_file, title)
    say(f"  projected and drawn in {time.perf_counter() - clock:.1f} s")
    results_file = options.output / "results.json"
    report = describe(docs, options, results, embedding_seconds, embeddings.shape[1])
    results_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"Wrote {map_file} and {results_file}.")
    say(f"Done in {time.perf_counter() - started:.0f} s.")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for map.png, results.json"
    )
    parser.add_argument(
        "--model", default="skembed-mini", help="bundled model, local folder or hub id"
    )
    parser.add_argument("--draws", type=int, default=5, help="random training sets per size")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer texts, draws and folds, for a first look",
    )
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"--draws must be at least 1; got {options.draws}")
    options.folds = 5
    if options.quick:
        options.draws, options.folds = min(options.draws, 2), 3
    return options


def check_packages(*names: str) -> None:
    """End with advice if a package that draws the map is not installed."""
    for name in names:
        if find_spec(name) is None:
            sys.exit(
                f"The map needs `{name}`, which is not installed. Run: pip install skembed[plot]"
            )


def say(text: str) -> None:
    """Print a line at once, so that progress shows when the output goes to a file too."""
    print(text, flush=True)


# --- Texts and embeddings ------------------------------------------------------------------------


def load_texts(options: argparse.Namespace):
    """Load the labelled texts; a part of them for a quick run."""
    clock = time.perf_counter()
    docs = load_docstrings()
    if options.quick:
        docs = thin_out(docs, every=4)
    versions = ", ".join(f"{name} {number}" for name, number in docs.versions.items())
    n_groups = len(set(docs.groups))
    say(f"Texts: documentation of {versions}, as installed here.")
    say(
        f"  {len(docs.data):,} passages about {n_groups:,} functions and classes, labelled with "
        f"{len(docs.target_names)} subpackages ({time.perf_counter() - clock:.1f} s)."
    )
    return docs


def thin_out(docs, every: int, keep: int = 16):
    """Keep every `every`-th function or class, and the first `keep` of each label."""
    kept = np.zeros(len(docs.data), dtype=bool)
    for label in range(len(docs.target_names)):
        groups = np.unique(docs.groups[docs.target == label])
        chosen = {*groups[::every], *groups[:keep]}
        kept |= np.isin(docs.groups, sorted(chosen))
    docs.data = [text for text, is_kept in zip(docs.data, kept, strict=True) if is_kept]
    docs.target = docs.target[kept]
    docs.groups = docs.groups[kept]
    return docs


def embed(docs, model: str) -> tuple[np.ndarray, float]:
    """Embed every text once; the estimators below find the result in the vectorizer's cache."""
    say(f"\nEmbedding with {model} ...")
    clock = time.perf_counter()
    vectorizer = NVEmbedVectorizer(model=model)
    embeddings = np.asarray(vectorizer.fit_transform(docs.data))
    seconds = time.perf_counter() - clock
    say(
        f"  {len(embeddings):,} texts to {embeddings.shape[1]} dimensions in {seconds:.1f} s, "
        f"loading the model included: {len(embeddings) / seconds:,.0f} texts per second."
    )
    return embeddings, seconds


# --- Comparison ----------------------------------------------------------------------------------


def make_pipelines(model: str) -> dict[str, Pipeline]:
    """Return the two pipelines; they differ in nothing but the vectorizer."""
    # Character 3- and 4-grams are the strongest baseline found on this set: words alone, words
    # and bigrams, words without stop words, and other lengths score lower
    # on all texts (with 8 a class, characters 3-5 are slightly ahead).
    tfidf = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 4), min_df=2)
    return {
        BASELINE: Pipeline([("tfidf", tfidf), ("clf", LogisticRegression(max_iter=1000))]),
        "skembed": Pipeline(
            [("emb", NVEmbedVectorizer(model=model)), ("clf", LogisticRegression(max_iter=1000))]
        ),
    }


def compare(docs, splits: list, options: argparse.Namespace) -> list[dict]:
    """Score both pipelines on all settings; one result for each pipeline and setting."""
    n_classes = len(docs.target_names)
    say(
        f"\nClassification into {n_classes} subpackages, tested on unseen functions and classes "
        f"({options.draws} draws, {len(splits)} folds):"
    )
    texts = np.array(docs.data, dtype=object)
    results = []
    for shots in (*SHOTS, None):
        name = "all" if shots is None else f"{shots} per class"
        cv = splits if shots is None else few_shot_splits(docs.target, splits, shots, options.draws)
        for method, pipeline in make_pipelines(options.model).items():
            clock = time.perf_counter()
            scores = cross_validate(
                pipeline, texts, docs.target, cv=cv, scoring=["accuracy", "balanced_accuracy"]
            )
            seconds = time.perf_counter() - clock
            accuracy, balanced = scores["test_accuracy"], scores["test_balanced_accuracy"]
            say(f"  {name:<14}{method:<9}{accuracy.mean():.3f}  ({seconds:.1f} s)")
            results.append(
                {
                    "setting": name,
                    "method": method,
                    "n_train": round(float(np.mean([len(train) for train, _ in cv]))),
                    "accuracy": accuracy.tolist(),
                    "balanced_accuracy": balanced.tolist(),
                    "seconds": round(seconds, 2),
                }
            )
    return results


def few_shot_splits(
    target: np.ndarray, splits: list, shots: int, n_draws: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw `shots` training texts per class from the training part of each fold in turn.

    The test part stays whole. The texts of a smaller draw are part of the larger ones.
    """
    drawn = []
    for draw in range(n_draws):
        train, test = splits[draw % len(splits)]
        shuffled = np.random.default_rng(draw).permutation(train)
        chosen = [shuffled[target[shuffled] == label][:shots] for label in np.unique(target)]
        drawn.append((np.concatenate(chosen), test))
    return drawn


def print_results(results: list[dict], docs, embedding_seconds: float) -> None:
    """Print the table and how to read it."""
    say("\n" + format_table(results))
    say(
        f"Mean ± standard deviation over draws or folds; chance is about "
        f"{np.bincount(docs.target).max() / len(docs.target):.2f} (always the largest class).\n"
        f"Seconds: fitting and scoring all draws or folds. Those of skembed read the embeddings "
        f"from its cache;\nmaking them took {embedding_seconds:.1f} s, once for all rows."
    )


def format_table(results: list[dict]) -> str:
    """Lay the results out, one line for each setting, both methods side by side."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    head = ["labelled texts", *(f"{method} accuracy" for method in methods), "gain"]
    head[2:2] = ["seconds"]
    head.insert(len(head) - 1, "seconds")
    rows = [head]
    for setting in dict.fromkeys(result["setting"] for result in results):
        found = {r["method"]: r for r in results if r["setting"] == setting}
        first, last = (np.mean(found[method]["accuracy"]) for method in methods)
        row = [f"{setting} ({found[methods[0]]['n_train']:,})"]
        for method in methods:
            accuracy = np.array(found[method]["accuracy"])
            row += [
                f"{accuracy.mean():.3f} ± {accuracy.std():.3f}",
                f"{found[method]['seconds']:.1f}",
            ]
        rows.append([*row, f"{last - first:+.3f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe(
    docs, options: argparse.Namespace, results: list[dict], embedding_seconds: float, dim: int
) -> dict:
    """Gather what another run needs to compare itself with this one."""
    packages = ["torch", "transformers", "umap-learn"]
    return {
        "model": str(options.model),
        "quick": options.quick,
        "n_texts": len(docs.data),
        "n_groups": len(set(docs.groups)),
        "labels": docs.target_names,
        "embedding_dim": dim,
        "embedding_seconds": round(embedding_seconds, 2),
        "results": results,
        "versions": {"python": platform.python_version(), **docs.versions}
        | {name: version(name) for name in packages},
        "machine": {"system": platform.platform(), "cpu_count": os.cpu_count()},
    }


# --- Map -----------------------------------------------------------------------------------------


def draw_map(embeddings: np.ndarray, docs, file: Path, title: str) -> None:
    """Project embeddings of shape (n_texts, dim) with UMAP and draw a point for each text."""
    import matplotlib
    from umap import UMAP  # here, as it takes seconds to load

    matplotlib.use("Agg")  # a file is all we need: no window, no screen
    from matplotlib import pyplot as plt

    # A fixed random state makes UMAP run on one thread; saying so keeps it from warning.
    reducer = UMAP(n_neighbors=30, min_dist=0.3, metric="cosine", random_state=0, n_jobs=1)
    figure, axes = plt.subplots(figsize=(10.9, 8.6), dpi=140, layout="constrained")
    axes.set_title(title, fontsize=15, loc="left", pad=10)
    EmbeddingMapDisplay.from_embeddings(
        embeddings, docs.target, names=docs.target_names, reducer=reducer, ax=axes
    )
    figure.savefig(file)
    plt.close(figure)


if __name__ == "__main__":
    main()
