"""Distil the teacher's vectors into the bundled model's architecture.

    python examples/train_mini/train.py --work WORK [--dev STSB_DEV.jsonl.gz]

Starts from a working model: each token's vector is the teacher's vector of that token, and all
output projections begin at zero, so that the untrained network is a mean of static word vectors.
Batches are packed without padding. Half of the batches are made of neighbours under the teacher
(leaves of a random-hyperplane tree), where the similarity matrix has most to say.

State is written atomically every two minutes; the same command resumes after a kill.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from recipe import Recipe, work_paths
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from skembed.model import NVEmbedConfig, NVEmbedModel
from skembed.pooling import LatentAttention
from skembed.tokenization import TextTokenizer, iterate_batches, pack_texts


def build_config(recipe: Recipe) -> NVEmbedConfig:
    """The architecture of the recipe in NV-Embed's terms."""
    backbone = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "num_key_value_heads": recipe.num_key_value_heads,
        "max_position_embeddings": 4_096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    }
    return NVEmbedConfig(
        backbone=backbone,
        num_latents_value=recipe.num_latents_value,
        num_cross_heads=recipe.num_cross_heads,
        cross_dim_head=recipe.cross_dim_head,
        latent_dim=recipe.hidden_size,
        ff_mult=recipe.ff_mult,
    )


def start_static(model: NVEmbedModel, vectors: np.ndarray) -> None:
    """Token vectors from the teacher (centred, unit root mean square), projections at zero."""
    table = torch.from_numpy(vectors.astype(np.float32))
    table = F.normalize(table - table.mean(0), dim=-1) * math.sqrt(table.shape[1])
    with torch.no_grad():
        model.embedding_model.embed_tokens.weight.copy_(table)
        for layer in model.embedding_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    pooling = model.latent_attention_model
    if isinstance(pooling, LatentAttention):
        pooling.start_as_mean()


def neighbour_batches(
    rows: np.ndarray, teacher: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Halve `rows` by random hyperplanes at the median until a batch is left."""
    if len(rows) <= batch_size:
        return [rows]
    pair = teacher[rng.choice(rows, 2)].astype(np.float32)
    order = np.argsort(teacher[rows].astype(np.float32) @ (pair[0] - pair[1]))
    middle = len(rows) // 2 // batch_size * batch_size or batch_size
    halves = rows[order[:middle]], rows[order[middle:]]
    return [b for half in halves for b in neighbour_batches(half, teacher, batch_size, rng)]


def make_batches(teacher: np.ndarray, recipe: Recipe, epoch: int) -> list[np.ndarray]:
    """The batches of one pass, in the order they are trained on."""
    rng = np.random.default_rng([recipe.random_state, epoch])
    size, buffer = recipe.batch_size, recipe.batch_size * 32
    rows = rng.permutation(len(teacher))
    batches: list[np.ndarray] = []
    for k, start in enumerate(range(0, len(rows), buffer)):
        block = rows[start : start + buffer]
        if k % 2:
            batches += neighbour_batches(block, teacher, size, rng)
        else:
            batches += [block[i : i + size] for i in range(0, len(block), size)]
    batches = [b for b in batches if len(b) == size]
    return [batches[i] for i in rng.permutation(len(batches))]


def distillation_loss(student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """1 - cosine to the teacher, plus the squared error of the similarity matrix."""
    student = F.normalize(student, dim=-1)
    cosine = (student * teacher).sum(-1).mean()
    difference = (student @ student.T - teacher @ teacher.T).square()
    off_diagonal = difference.sum() / (len(student) * (len(student) - 1))
    return 1 - cosine + weight * off_diagonal


def embed_ids(model: NVEmbedModel, ids: list[np.ndarray]) -> np.ndarray:
    """Unit vectors (n, D) of tokenised texts, in their order."""
    lengths = np.array([len(row) for row in ids])
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for rows in iterate_batches(lengths, 8_192):
            vectors = model(pack_texts([ids[i] for i in rows], 0))
            out[rows] = F.normalize(vectors.float(), dim=-1).numpy()
    model.train()
    return out


class StsDev:
    """Spearman correlation on the STS-B development split, to watch the run."""

    def __init__(self, path: Path, tokenizer: TextTokenizer, max_length: int) -> None:
        rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
        texts = [row[side] for side in ("sentence1", "sentence2") for row in rows]
        self.ids = tokenizer.encode(texts, prefix="", max_length=max_length).ids
        self.scores = [row["score"] for row in rows]

    def score(self, model: NVEmbedModel) -> float:
        """Spearman correlation of cosine and gold score."""
        first, second = np.split(embed_ids(model, self.ids), 2)
        return float(spearmanr((first * second).sum(1), self.scores).statistic)


def make_optimizer(model: NVEmbedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; word vectors with a rate of their own, no decay on norms, biases and vectors."""
    table = model.embedding_model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not table]
    groups = [
        {"params": [table], "lr": recipe.embedding_learning_rate, "weight_decay": 0.0},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in others if p.ndim > 1]},
    ]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )


def main() -> None:
    """Train, or go on training, until the passes of the recipe are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--dev", type=Path, help="STS-B development split, to watch the run")
    parser.add_argument("--passes", type=float, help="override the recipe's passes")
    parser.add_argument("--stop-after", type=int, default=0, help="stop after this many steps")
    arguments = parser.parse_args()
    recipe, paths = Recipe(), work_paths(arguments.work)
    torch.manual_seed(recipe.random_state)
    tokenizer = TextTokenizer(
        Tokenizer.from_file(str(paths["tokenizer"])), bos_token_id=1, eos_token_id=2
    )
    texts = [json.loads(line) for line in paths["texts"].open(encoding="utf-8")]
    ids = tokenizer.encode(texts, prefix="", max_length=recipe.max_length).ids
    teacher = np.load(paths["teacher"], mmap_mode="r")
    dev = StsDev(arguments.dev, tokenizer, recipe.max_length) if arguments.dev else None

    model = NVEmbedModel(build_config(recipe))
    start_static(model, np.load(paths["vocabulary"]))
    optimizer = make_optimizer(model, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    per_pass = len(make_batches(teacher, recipe, 0))
    total = int(per_pass * (arguments.passes or recipe.passes))
    step, spent = 0, 0.0
    if paths["checkpoint"].exists():
        state = torch.load(paths["checkpoint"], weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent_s"]
    print(f"{len(ids)} texts, {sum(map(len, ids))} tokens, step {step} of {total}", flush=True)

    def save() -> None:
        partial = paths["checkpoint"].with_suffix(".partial")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "spent_s": spent}, partial)
        partial.replace(paths["checkpoint"])

    if dev is not None and step == 0:
        print(f"static start: STS-B dev {dev.score(model):.4f}", flush=True)
    model.train()
    started = saved = logged = time.perf_counter()
    spent_before, seen, losses = spent, 0, []
    while step < total:
        epoch, offset = divmod(step, per_pass)
        for rows in make_batches(teacher, recipe, epoch)[offset : offset + total - step]:
            scale = min(1.0, (step + 1) / recipe.warmup_steps) * max(0.02, 1 - step / total)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            rows = rows[np.argsort([len(ids[i]) for i in rows])]  # equal lengths side by side
            batch = pack_texts([ids[i] for i in rows], 0)
            target = F.normalize(torch.from_numpy(teacher[rows].astype(np.float32)), dim=-1)
            with torch.autocast("cpu", torch.bfloat16):
                vectors = model(batch)
            loss = distillation_loss(vectors.float(), target, recipe.similarity_weight)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seen += len(batch.input_ids)
            losses.append(loss.item())
            now = time.perf_counter()
            spent = spent_before + now - started
            if now - logged > 60 or step == total:
                entry = {"step": step, "loss": float(np.mean(losses)), "spent_s": round(spent)}
                entry["tokens_per_s"] = round(seen / (now - logged))
                if dev is not None:
                    entry["sts_dev"] = round(dev.score(model), 4)
                with paths["log"].open("a") as log:
                    log.write(json.dumps(entry) + "\n")
                print(entry, flush=True)
                logged, seen, losses = time.perf_counter(), 0, []
            if now - saved > recipe.checkpoint_every_s or step == total:
                save()
                saved = now
            if arguments.stop_after and step >= arguments.stop_after:
                save()
                return


if __name__ == "__main__":
    main()
