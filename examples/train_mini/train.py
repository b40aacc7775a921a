"""Distil the teacher into the inherited student.

    python examples/train_mini/train.py --work WORK --data DATA

Texts pass once, in the corpus's order; the teacher runs beside the student on the same packed
batch, so its vector of every token is there to learn from. State is written atomically every two
minutes; the same command resumes after a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dev_scores import Embed, dev_scores
from masters import MasterAdamW
from prepare import build_config, load_tokenizer, read_texts
from recipe import Recipe, parse_folders, work_paths
from teacher import PackedTeacher
from torch import Tensor
from torch.nn import functional as F

from skembed.model.network import NVEmbedModel
from skembed.model.pooling import segment_mean
from skembed.model.tokenization import (
    PackedBatch,
    TextTokenizer,
    iterate_batches,
    pack_texts,
)

LOG_EVERY_S = 60.0
SCORE_EVERY = 15  # entries of the log: the scores cost as much as two minutes of training


Texts = tuple[list[np.ndarray], np.ndarray]  # token ids by length; which texts belong together


def ranking_loss(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Divergence of each text's softmax over the others, averaged; unit vectors (n, D)."""
    itself = torch.eye(len(ours), dtype=torch.bool)
    logits, wanted = (
        (x @ x.T / temperature).masked_fill(itself, -1e4).log_softmax(-1) for x in (ours, theirs)
    )
    return F.kl_div(logits, wanted, log_target=True, reduction="batchmean")


def distillation_loss(
    model: NVEmbedModel, batch: PackedBatch, target: Tensor, related: np.ndarray, recipe: Recipe
) -> Tensor:
    """Tokens, texts, and the similarities of texts, against the teacher's token vectors (T, D).

    The texts of the mask `related` (n,) are ranked among themselves too.
    """
    n = batch.n_texts
    hidden = model.hidden_states(batch)[batch.pool_index]
    tokens = model.latent_attention_model.transform_tokens(hidden)
    target = target[batch.pool_index].float()
    tokens = tokens.float()
    used = batch.pool_segments < n  # the rest fills the grid
    by_token = 1 - F.cosine_similarity(tokens[used], target[used], dim=-1).mean()
    ours, theirs = (
        F.normalize(segment_mean(x, batch.pool_segments, batch.pool_counts)[:n], dim=-1)
        for x in (tokens, target)
    )
    by_text = 1 - (ours * theirs).sum(-1).mean()
    difference = (ours @ ours.T - theirs @ theirs.T).square().sum() / (n * (n - 1))
    loss = by_text + recipe.similarity_weight * difference + recipe.token_weight * by_token
    if related.any():
        block = torch.from_numpy(related)
        by_rank = ranking_loss(ours[block], theirs[block], recipe.ranking_temperature)
        loss = loss + recipe.ranking_weight * by_rank
    return loss


def embedder(model: NVEmbedModel, tokenizer: TextTokenizer, max_length: int) -> Embed:
    """Unit vectors of texts from the model as it stands."""

    def embed(texts: list[str]) -> np.ndarray:
        encoded = tokenizer.encode(texts, prefix="", max_length=max_length)
        out = np.empty((len(texts), model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for rows in iterate_batches(encoded.lengths, 4_096):
                batch = pack_texts([encoded.ids[i] for i in rows], 0, on_grid=True)
                out[rows] = F.normalize(model(batch)[: batch.n_texts].float(), dim=-1).numpy()
        return out

    return embed


def batches(
    texts: list[str], long_texts: list[str], tokenizer: TextTokenizer, recipe: Recipe, start: int
) -> Iterator[Texts]:
    """Token ids of one batch after the other from step `start` on, round and round.

    From `long_from_step` on, half of the short texts give way to `long_per_batch` long ones.
    """
    train, size, many = texts[recipe.held_out_texts :], recipe.batch_size, recipe.long_per_batch
    step = start
    while True:
        first = step % (len(train) // size) * size
        part = train[first : first + size]
        if step >= recipe.long_from_step:
            first = (step - recipe.long_from_step) % (len(long_texts) // many) * many
            part = part[: size // 2] + long_texts[first : first + many]
        ids = tokenizer.encode(part, prefix="", max_length=recipe.max_length).ids
        yield sorted(ids, key=len), np.zeros(len(ids), bool)
        step += 1


class Distillation:
    """A run of the student beside its teacher: steps, log and checkpoint."""

    def __init__(self, recipe: Recipe, paths: dict[str, Path], tokenizer: TextTokenizer) -> None:
        torch.manual_seed(recipe.random_state)
        self.recipe, self.paths = recipe, paths
        self.model = NVEmbedModel(build_config(recipe))
        self.model.load_state_dict(torch.load(paths["start"], weights_only=True))
        self.model.use_lean_modules()
        self.teacher = PackedTeacher(torch.bfloat16)
        self.teacher_ids = torch.from_numpy(np.load(paths["teacher_ids"]))
        narrower = recipe.hidden_size < self.teacher.hidden_size
        self.basis = torch.from_numpy(np.load(paths["basis"])).bfloat16() if narrower else None
        self.optimizer = MasterAdamW(self.model, recipe)
        self.embed = embedder(self.model, tokenizer, recipe.max_length)
        self.step, self.spent_s, self.tokens = 0, 0.0, 0
        if paths["checkpoint"].exists():
            state = torch.load(paths["checkpoint"], weights_only=True)
            self.optimizer.load_state_dict(state)
            self.step, self.spent_s = state["step"], state["spent_s"]
            self.tokens = state["tokens"]

    def save(self) -> None:
        """Everything that a resumed run needs, whole or not at all."""
        partial = self.paths["checkpoint"].with_suffix(".partial")
        state = {"step": self.step, "spent_s": self.spent_s, "tokens": self.tokens}
        torch.save({**self.optimizer.state_dict(), **state}, partial)
        partial.replace(self.paths["checkpoint"])

    def log(self, entry: dict[str, Any]) -> None:
        """One line into the log, and to whoever watches."""
        with self.paths["log"].open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def take_step(self, texts: Texts, progress: float) -> float:
        """One step on these texts; `progress` is the share of the run behind it. The loss."""
        begin = time.perf_counter()
        ids, related = texts
        batch = pack_texts(ids, 0, on_grid=True)
        target = self.teacher.hidden_states(self.teacher_ids[batch.input_ids], batch)
        if self.basis is not None:
            target = target @ self.basis
        loss = distillation_loss(self.model, batch, target, related, self.recipe)
        loss.backward()
        warm = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        self.optimizer.step(warm * max(0.01, 1 - progress))
        self.step += 1
        self.tokens += len(batch.input_ids)
        self.spent_s += time.perf_counter() - begin
        return loss.item()

    def run(
        self,
        batches_from: Callable[[int], Iterator[Texts]],
        steps: int,
        data: Path,
        *,
        score_start: bool = True,
    ) -> None:
        """Train up to step `steps`, scoring on development splits now and then.

        `batches_from` gives the batches from a step on.
        """
        if self.step >= steps:
            return
        if self.step == 0 and score_start:
            self.log({"step": 0, **dev_scores(data, self.embed, quick=True)})
        losses: list[float] = []
        saved = logged = self.spent_s
        since, logs = self.tokens, 0
        for texts in batches_from(self.step):
            losses.append(self.take_step(texts, self.step / steps))
            done = self.step >= steps
            if done or self.spent_s - logged > LOG_EVERY_S:
                entry: dict[str, Any] = {
                    "step": self.step,
                    "loss": round(float(np.mean(losses)), 4),
                    "spent_s": round(self.spent_s),
                    "tokens": self.tokens,
                    "tokens_per_s": round((self.tokens - since) / (self.spent_s - logged)),
                }
                logs += 1
                if done or logs % SCORE_EVERY == 0:
                    entry.update(dev_scores(data, self.embed, quick=not done))
                self.log(entry)
                logged, since, losses = self.spent_s, self.tokens, []
            if done or self.spent_s - saved > self.recipe.checkpoint_every_s:
                self.save()
                saved = self.spent_s
            if done:
                return


def main() -> None:
    """Train, or go on training."""
    arguments = parse_folders(__doc__, data="folder with eval/")
    recipe, paths = Recipe(), work_paths(arguments.work)
    texts, long_texts = read_texts(paths), read_texts(paths, "long_texts")
    tokenizer = load_tokenizer(paths)
    corpora = (texts, long_texts, tokenizer, recipe)
    run = Distillation(recipe, paths, tokenizer)
    run.run(lambda step: batches(*corpora, step), recipe.steps, arguments.data)


if __name__ == "__main__":
    main()
