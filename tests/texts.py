"""Texts that the common contract is tried on."""

import numpy as np

DIM = 48  # of the tiny checkpoint
TEXTS = ["a card was stolen", "how to open an account?", "", "Ünïcödé — 日本語 🙂", "a card lost"]


def make_texts(n: int, *, seed: int = 0) -> list[str]:
    """Return distinct texts of mixed length."""
    rng = np.random.default_rng(seed)
    words = np.array("card account bank open lost money the a of to transfer fee wrong".split())
    sizes = rng.lognormal(2.0, 0.8, n).astype(int) + 1
    return [f"{k} " + " ".join(rng.choice(words, size)) for k, size in enumerate(sizes)]
