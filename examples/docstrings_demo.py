"""Embed the documentation of numpy, scipy and scikit-learn; classify it; draw a map of it.

The whole job in one script, offline and on a CPU:

1. load a labelled text set built from the documentation of the installed packages;
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

from skembed import NVEmbedVectorizer
from skembed.datasets import load_docstrings

SHOTS = (4, 8, 16)
BASELINE = "TF-IDF"

# Colours picked one after the other, each as far as possible from all before it, both as most
# people see them and with red-green blindness (distance in OKLab; Machado's deuteranopia matrix).
PALETTE = (
    "#0076b1 #00eb00 #d80014 #ff89ff #4e3b00 #620076 #89b189 #0000ff #d800ff #b176b1 #eb7600 "
    "#00764e #ebb1c4 #3b3bb1 #3bb1ff #624e76 #9d7662 #c41489 #9d0000 #8927d8 #004e4e #62d876 "
    "#7689d8 #14b14e #ff4ed8 #4e62ff #763b3b #8962d8"
).split()
# A second sign beside the colour, since no 25 colours are distinct for every eye.
MARKERS = {"numpy": "^", "scipy": "o", "sklearn": "s"}


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
    positions = project(embeddings)
    say(f"  projected in {time.perf_counter() - clock:.1f} s")
    title = f"{len(docs.data):,} passages of documentation, embedded by {Path(options.model).name}"
    draw_map(positions, docs, map_file, title)
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


def project(embeddings: np.ndarray) -> np.ndarray:
    """Project embeddings of shape (n_texts, dim) to positions of shape (n_texts, 2)."""
    from umap import UMAP  # here, as it takes seconds to load

    # A fixed random state makes UMAP run on one thread; saying so keeps it from warning.
    projection = UMAP(n_neighbors=30, min_dist=0.3, metric="cosine", random_state=0, n_jobs=1)
    return projection.fit_transform(embeddings)


def draw_map(positions: np.ndarray, docs, file: Path, title: str) -> None:
    """Draw one point for each text, and the name of each label where its texts are densest."""
    import matplotlib

    matplotlib.use("Agg")  # a file is all we need: no window, no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(13, 8.6), dpi=140, layout="constrained")
    low, high = visible_range(positions)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    n_outside = int(((positions < low) | (positions > high)).any(axis=1).sum())
    # All labels mixed, or the last ones would cover the first.
    for part in np.array_split(np.random.default_rng(0).permutation(len(positions)), 12):
        for label, name in enumerate(docs.target_names):
            members = part[docs.target[part] == label]
            axes.scatter(
                *positions[members].T,
                s=15,
                marker=MARKERS[name.partition(".")[0]],
                color=PALETTE[label % len(PALETTE)],
                alpha=0.65,
                linewidths=0,
            )
    for label, name in enumerate(docs.target_names):  # the legend: counts, and full-colour signs
        axes.scatter(
            [],
            [],
            s=45,
            marker=MARKERS[name.partition(".")[0]],
            color=PALETTE[label % len(PALETTE)],
            label=f"{name} ({np.sum(docs.target == label)})",
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=11)
    axes.set_title(title, fontsize=15, loc="left", pad=10)
    if n_outside:
        axes.set_xlabel(f"{n_outside} passages lie in islands outside the frame", color="0.35")
    for side in axes.spines.values():
        side.set_color("0.8")
    annotate(figure, axes, positions, docs)
    figure.savefig(file)
    plt.close(figure)


def annotate(figure, axes, positions: np.ndarray, docs) -> None:
    """Write the names of the labels into the map, pushed apart where they would overlap."""
    from matplotlib import patheffects

    low, high = visible_range(positions)
    radius = 0.04 * float((high - low).mean())
    anchors = np.array(
        [densest(positions[docs.target == i], radius) for i in range(len(docs.target_names))]
    )
    halo = [patheffects.withStroke(linewidth=3.5, foreground="white", alpha=0.9)]
    texts = [
        axes.text(
            *anchor, name, ha="center", va="center", fontsize=10, fontweight="bold",
            color=darken(PALETTE[i % len(PALETTE)]), path_effects=halo, zorder=5,
        )
        for i, (name, anchor) in enumerate(zip(docs.target_names, anchors, strict=True))
    ]  # fmt: skip
    figure.canvas.draw()  # settles the layout, so that sizes in pixels are final
    boxes = [text.get_window_extent() for text in texts]
    sizes = np.array([(box.width + 10, box.height + 6) for box in boxes])
    pixels = axes.transData.transform(anchors)
    frame = axes.get_window_extent()
    bounds = np.array([(frame.x0, frame.y0), (frame.x1, frame.y1)])
    moved = push_apart(pixels, sizes, bounds)
    for text, place, pixel, anchor in zip(
        texts, axes.transData.inverted().transform(moved), pixels - moved, anchors, strict=True
    ):
        text.set_position(place)
        if np.hypot(*pixel) > 25:  # far enough that a line helps
            axes.plot(*np.transpose([place, anchor]), color="0.25", linewidth=0.8, zorder=4)


def visible_range(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high corner of the frame: far islands would shrink all else."""
    low, middle, high = np.quantile(positions, [0.02, 0.5, 0.98], axis=0)
    low, high = middle + 1.35 * (low - middle), middle + 1.35 * (high - middle)
    inside = positions[((positions >= low) & (positions <= high)).all(axis=1)]
    low, high = inside.min(axis=0), inside.max(axis=0)
    margin = 0.03 * (high - low)
    return low - margin, high + margin


def densest(points: np.ndarray, radius: float) -> np.ndarray:
    """Return the point of (n, 2) with the most others around it, at the scale of `radius`."""
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    return points[np.exp(-squares / (2 * radius**2)).sum(axis=1).argmax()]


def push_apart(
    centres: np.ndarray, sizes: np.ndarray, bounds: np.ndarray, n_steps: int = 500
) -> np.ndarray:
    """Move boxes of (width, height) until none overlap, each as little as need be.

    Parameters and result are in pixels: centres and sizes of shape (n, 2), bounds as (low, high).
    """
    moved = np.array(centres, dtype=float)
    for _ in range(n_steps):
        # Overlap of each pair along x and y; only positive in both do two boxes touch.
        gaps = moved[:, None] - moved[None]  # (n, n, 2)
        overlap = (sizes[:, None] + sizes[None]) / 2 - np.abs(gaps)
        touching = (overlap > 0).all(axis=-1) & ~np.eye(len(moved), dtype=bool)
        if not touching.any():
            break
        # Part along the shorter way out; equal centres part by their order in the list.
        order = np.sign(np.arange(len(moved))[:, None] - np.arange(len(moved))[None])
        direction = np.where(gaps == 0, order[..., None], np.sign(gaps))
        along_y = overlap[..., 1] <= overlap[..., 0]
        push = np.where(np.stack([~along_y, along_y], axis=-1), overlap * direction, 0)
        moved += 0.3 * np.where(touching[..., None], push, 0).sum(axis=1)
        moved = np.clip(moved, bounds[0] + sizes / 2, bounds[1] - sizes / 2)
    return moved


def darken(color: str) -> str:
    """Return a colour dark enough to read on white."""
    from matplotlib.colors import to_hex, to_rgb

    rgb = np.array(to_rgb(color))
    luminance = rgb @ [0.2126, 0.7152, 0.0722]
    return to_hex(rgb * min(1.0, 0.38 / max(luminance, 1e-9)))


if __name__ == "__main__":
    main()
