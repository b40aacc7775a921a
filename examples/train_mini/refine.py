"""Distil on, with texts that belong together in every batch.

    python examples/train_mini/refine.py --work WORK --data DATA

Texts of one source and one place in it (a question, its answer, the paragraphs around it) are hard
to tell apart, as a search has to. They form a block of the batch whose rankings, each text against
the others, are learned from the teacher beside everything that train.py learns. State is written
atomically every two minutes; the same command resumes after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import read_values, source_files
from prepare import load_tokenizer, read_texts
from recipe import Recipe, parse_folders, refine_paths, work_paths
from train import Distillation, Texts

from skembed.model.tokenization import TextTokenizer


def collect_related(data: Path, recipe: Recipe, words: int) -> dict[str, list[str]]:
    """Distinct texts of each source in the order of its rows, cut to so many words."""
    sources = {}
    for path in source_files(data):
        texts = dict.fromkeys(" ".join(value.split()[:words]) for value in read_values(path))
        if len(texts) > recipe.related_texts:
            sources[path.name.removesuffix(".jsonl.gz")] = list(texts)
    return sources


class RelatedTexts:
    """Neighbouring texts of one source after the other, by step; `sources` keep their order."""

    def __init__(
        self, sources: dict[str, list[str]], tokenizer: TextTokenizer, recipe: Recipe
    ) -> None:
        self.sources = list(sources.values())
        self.tokenizer, self.recipe = tokenizer, recipe
        words = np.array([np.mean([len(t.split()) for t in part[:500]]) for part in self.sources])
        sizes = np.array([len(part) for part in self.sources])
        weights = np.sqrt(np.minimum(sizes, 20_000)) * np.where(words > 25, 2.0, 1.0)
        weights *= np.where(np.isin(list(sources), recipe.related_favoured), 3.0, 1.0)
        self.weights = weights / weights.sum()

    def __getitem__(self, step: int) -> list[np.ndarray]:
        """Token ids of the block of this step: at least two texts."""
        rng = np.random.default_rng([self.recipe.random_state, step])
        source = self.sources[rng.choice(len(self.sources), p=self.weights)]
        first = int(rng.integers(len(source) - self.recipe.related_texts))
        texts = source[first : first + self.recipe.related_texts]
        ids = self.tokenizer.encode(texts, prefix="", max_length=self.recipe.max_length).ids
        lengths = np.cumsum([len(part) for part in ids])
        return ids[: max(2, int(np.searchsorted(lengths, self.recipe.related_tokens)))]


def batches(
    corpora: tuple[list[str], list[str], RelatedTexts],
    tokenizer: TextTokenizer,
    recipe: Recipe,
    step: int,
) -> Iterator[Texts]:
    """Token ids of a batch, and which of its texts belong together, from `step` on."""
    texts, long_texts, related = corpora
    texts = texts[recipe.held_out_texts + recipe.steps * recipe.batch_size :]
    long_texts = long_texts[(recipe.steps - recipe.long_from_step) * recipe.long_per_batch :]
    while True:
        block = related[step]
        others = [
            part[(step * many) % (len(part) - many) :][:many]
            for part, many in (
                (texts, recipe.refine_texts),
                (long_texts, recipe.refine_long_texts),
            )
        ]
        encoded = tokenizer.encode(sum(others, []), prefix="", max_length=recipe.max_length)
        ids = [*block, *encoded.ids]
        order = np.argsort([len(part) for part in ids], kind="stable")
        yield [ids[i] for i in order], order < len(block)
        step += 1


def refine(number: int, paths: dict[str, Path], data: Path) -> None:
    """One refinement, from the checkpoint of what came before; or the rest of it."""
    recipe, chosen = Recipe().for_refinement(number), Recipe().refinements[number]
    before = refine_paths(paths, number - 1) if number else paths
    own = refine_paths(paths, number)
    if not own["start"].exists():
        partial = own["start"].with_suffix(".partial")
        torch.save(torch.load(before["checkpoint"], weights_only=True)["model"], partial)
        partial.replace(own["start"])
    tokenizer = load_tokenizer(paths)
    sources = collect_related(data, recipe, chosen.related_words)
    related = RelatedTexts(sources, tokenizer, recipe)
    corpora = read_texts(paths), read_texts(paths, "long_texts"), related
    offset = sum(part.steps for part in recipe.refinements[:number])
    run = Distillation(recipe, own, tokenizer)
    run.run(lambda step: batches(corpora, tokenizer, recipe, offset + step), chosen.steps, data)


def main() -> None:
    """Go on from the distilled weights, or from where a refinement was interrupted."""
    arguments = parse_folders(__doc__, data="folder with eval/ and train/")
    for number in range(len(Recipe().refinements)):
        refine(number, work_paths(arguments.work), arguments.data)


if __name__ == "__main__":
    main()
