"""The paper's ablation in small: pooling by attention, and two training stages against one.

    python benchmarks/ablation/ablation.py --data DATA --work WORK [--jobs 2]
    python benchmarks/ablation/ablation.py --write-docs

Tables 2-4 of NV-Embed (arXiv 2405.17428) on a backbone of a few layers that is trained from its
start: six cells (end-of-sequence, mean or latent pooling; causal or bidirectional attention), and
the last cell's two stages against one stage on the same examples. Every run of a seed has the same
start, examples and number of steps. Scores are of development splits and train folds only.

A run is finished or not there: the same command goes on with those that are missing. Runs stand
side by side, one thread each (`--jobs`). The second command writes the tables from the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_examples import (
    PASSAGES,
    Example,
    Run,
    Settings,
    Stage,
    Tokens,
    bundled_folder,
    collect_examples,
    encode_sides,
    load_examples,
    load_tokenizer,
    plan_stages,
)
from ablation_report import write_docs, write_results
from common import RESULTS, write_whole
from dev_scores import Embed, few_shot, read, reranking, retrieval, sts
from masters import MasterAdamW
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from skembed.model.config import NVEmbedConfig
from skembed.model.cpu_kernels import plan_buckets
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import (
    PackedBatch,
    TextTokenizer,
    iterate_batches,
    pack_texts,
    round_up,
)
from skembed.training.losses import info_nce

CAUSAL = "skembed-causal"


def list_runs(seeds: Sequence[int]) -> list[Run]:
    """Return every run, seed by seed: six cells in two stages, and one stage of the last cell."""
    cells = [
        (pooling, attention, "two stages")
        for attention in ("causal", "bidirectional")
        for pooling in ("eos", "mean", "latent")
    ]
    cells += [("latent", "bidirectional", f"in-batch {state}") for state in ("on", "off")]
    return [Run(*cell, seed) for seed in seeds for cell in cells]


# Attention


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from each token to itself and those before: (1, H, T, d) -> (1, T, H, d).

    Padded places stand behind a text, where no token of it looks.
    """
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, H, d)
    parts = []
    for bucket in plan_buckets(packed.lengths):
        q, k, v = (
            x[bucket.start : bucket.stop]
            .index_select(0, bucket.gather.reshape(-1))
            .view(bucket.count, bucket.length, *x.shape[1:])
            .transpose(1, 2)
            for x in rows
        )  # (n, H, L, d)
        later = torch.ones(bucket.length, bucket.length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(later, float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)  # (n L, H, d)
        parts.append(attended.index_select(0, bucket.kept))
    return torch.cat(parts).unsqueeze(0), None


AttentionInterface.register(CAUSAL, causal_attention)
AttentionMaskInterface.register(CAUSAL, lambda *_, **__: None)  # the function only looks back


def first_moves_with_last(model: NVEmbedModel) -> bool:
    """Tell whether a change of a text's last token reaches its first position.

    The other text of the pack must not notice; RuntimeError where it does.
    """
    texts = [np.arange(3, 14), np.arange(20, 29)]
    changed = [np.append(texts[0][:-1], 40), texts[1]]
    with torch.inference_mode():
        before, after = (model.hidden_states(pack_texts(ids, 0)) for ids in (texts, changed))
    if not torch.equal(before[len(texts[0]) :], after[len(texts[0]) :]):
        raise RuntimeError("a text of the pack sees its neighbour")
    return not torch.equal(before[0], after[0])


def check_attention(model: NVEmbedModel, attention: str) -> None:
    """Refuse to train a model whose attention is not what its cell says."""
    if first_moves_with_last(model) != (attention == "bidirectional"):
        raise RuntimeError(f"the attention is not {attention}")


# The start


@lru_cache(maxsize=1)
def word_vectors(width: int) -> Tensor:
    """Return the bundled model's word vectors on their first principal components, (V, width).

    Scaled to unit variance: beside them, fresh layers write little, so a run begins near the mean
    of good word vectors.
    """
    state = load_file(bundled_folder() / "model.safetensors")
    table = state["embedding_model.embed_tokens.weight"].double()
    table = table - table.mean(0)
    _, directions = torch.linalg.eigh(table.T @ table)  # ascending
    projected = table @ directions[:, -width:]
    return (projected / projected.std()).float()


def build_model(run: Run, settings: Settings) -> NVEmbedModel:
    """Return a cell's model; backbones of a seed are equal, a fresh latent layer is the mean."""
    table = word_vectors(settings.hidden_size)
    backbone = {
        "vocab_size": len(table),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "max_position_embeddings": 4_096,
        "rms_norm_eps": 1e-5,
    }
    config = NVEmbedConfig(
        backbone,
        pooling=run.pooling,
        num_latents_value=settings.num_latents,
        num_cross_heads=2,
        cross_dim_head=settings.hidden_size // 2,
        latent_dim=settings.hidden_size,
        ff_mult=1,  # in the paper the layer is a tenth of the model
    )
    torch.manual_seed(run.seed)
    model = NVEmbedModel(config)  # the backbone draws first: the pooling changes nothing in it
    with torch.no_grad():
        model.embedding_model.embed_tokens.weight.copy_(table)
    if run.pooling == "latent":
        model.latent_attention_model.start_as_mean()
    if run.attention == "causal":
        model.embedding_model.set_attn_implementation(CAUSAL)
    check_attention(model, run.attention)
    model.use_lean_modules()
    return model


def count_weights(model: NVEmbedModel) -> dict[str, int]:
    """Count the weights of the word vectors, of the layers above them and of the pooling."""
    words = model.embedding_model.embed_tokens.weight.numel()
    backbone = sum(p.numel() for p in model.embedding_model.parameters())
    pooling = sum(p.numel() for p in model.latent_attention_model.parameters())
    return {"word vectors": words, "layers": backbone - words, "pooling": pooling}


# Texts to vectors


def pack(texts: Sequence[Tokens]) -> PackedBatch:
    """Return a pack of texts with instructions of different lengths; sizes from the grid."""
    batch = pack_texts([text.ids for text in texts], 0, on_grid=True)
    n_pooled = sum(len(text.ids) for text in texts)  # the rest fills the grid
    index, segments = batch.pool_index[:n_pooled], batch.pool_segments[:n_pooled]
    starts = torch.tensor([text.pool_start for text in texts])
    kept = batch.position_ids[index] >= starts[segments]
    index, segments = index[kept], segments[kept]
    filling = round_up(len(index)) - len(index)
    counts = batch.pool_counts.clone()
    counts[: len(texts)] -= starts
    counts[len(texts)] = filling
    return replace(
        batch,
        pool_index=F.pad(index, (0, filling)),
        pool_segments=F.pad(segments, (0, filling), value=len(texts)),
        pool_counts=counts,
    )


def embed_tokens(model: NVEmbedModel, texts: Sequence[Tokens]) -> Tensor:
    """Return unit vectors, float32 (n, D), in the order of the texts; one pack."""
    order = np.argsort([-len(text.ids) for text in texts], kind="stable")
    vectors = model(pack([texts[i] for i in order]))[: len(texts)]
    return F.normalize(vectors[torch.from_numpy(np.argsort(order))], dim=-1)


# Training


def contrastive_loss(
    vectors: Tensor, batch: Sequence[Example], in_batch: bool, temperature: float
) -> Tensor:
    """Return the InfoNCE loss of a batch; vectors (B * (2 + n), D), each example's texts in turn.

    With `in_batch` all candidates of the batch are negatives, but for texts equal to the anchor's
    positive or to the anchor; else an example's own alone.
    """
    n = len(batch)
    by_example = vectors.unflatten(0, (n, -1))  # (B, 2 + n, D)
    anchors, candidates = by_example[:, 0], by_example[:, 1:].flatten(0, 1)
    per_example = by_example.shape[1] - 1
    positive = torch.arange(n) * per_example
    if in_batch:
        # Without its instruction, so that a text is known again on the other side.
        names = np.array(
            [[hash(t.ids[max(t.pool_start, 1) :].tobytes()) for t in e.texts] for e in batch]
        )
        others = names[:, 1:].reshape(-1)
        equal = (others == names[:, 1, None]) | (others == names[:, 0, None])
        allowed = torch.from_numpy(~equal)
    else:
        allowed = torch.eye(n, dtype=torch.bool).repeat_interleave(per_example, dim=1)
    return info_nce(anchors, candidates, positive, allowed, temperature=temperature)


def train_stage(model: NVEmbedModel, stage: Stage, settings: Settings) -> dict[str, Any]:
    """Train one pass with a new optimizer; return steps, tokens, processor seconds and losses."""
    model.float()
    optimizer = MasterAdamW(model, settings)
    size = settings.batch_size
    n_steps = len(stage.examples) // size
    warmup = max(1, round(settings.warmup_share * n_steps))
    begin, tokens, losses = time.process_time(), 0, []
    for step in range(n_steps):
        batch = stage.examples[step * size : (step + 1) * size]
        texts = [text for example in batch for text in example.texts]
        vectors = embed_tokens(model, texts)
        loss = contrastive_loss(vectors, batch, stage.in_batch, settings.temperature)
        loss.backward()
        optimizer.step(min((step + 1) / warmup, (n_steps - step) / (n_steps - warmup + 1)))
        losses.append(loss.item())
        tokens += sum(len(text.ids) for text in texts)
    model.float().load_state_dict(optimizer.named())  # the next stage goes on unrounded
    return {
        "steps": n_steps,
        "tokens": tokens,
        "seconds": round(time.process_time() - begin, 1),
        "loss": [
            round(float(np.mean(part)), 4) for part in np.array_split(losses, 10) if len(part)
        ],
    }


# Scores


def make_embed(
    model: NVEmbedModel,
    tokenizer: TextTokenizer,
    settings: Settings,
    instruction: str,
    queries: set[str] | None = None,
) -> Embed:
    """Return the function texts -> vectors of a task; only `queries` carry its instruction."""

    def embed(texts: list[str]) -> np.ndarray:
        sides = [instruction if queries is None or t in queries else None for t in texts]
        tokens = encode_sides(tokenizer, texts, sides, settings.max_tokens_scored)
        out = np.empty((len(texts), settings.hidden_size), np.float32)
        with torch.inference_mode():
            for rows in iterate_batches(np.array([len(text.ids) for text in tokens]), 4_096):
                out[rows] = embed_tokens(model, [tokens[i] for i in rows]).numpy()
        return out

    return embed


def evaluate(
    model: NVEmbedModel, tokenizer: TextTokenizer, data: Path, settings: Settings
) -> dict[str, float]:
    """Return the development scores in percent, set by set."""
    embed = partial(make_embed, model, tokenizer, settings)
    questions = {row["query"] for row in read(data, "reranking/trecqa/dev")}
    claims = {row["text"] for row in read(data, "retrieval/scifact/queries_train")}
    model.to(torch.bfloat16)
    scores = {
        "scifact": retrieval(data, embed("SciFact", claims)),
        "trecqa": reranking(data, "reranking/trecqa/dev", embed(PASSAGES, questions)),
        "banking77": few_shot(data, "classification/banking77/train", embed("Banking77")),
        "stsb": sts(data, "sts/stsb/dev", embed("STS")),
        "sickr": sts(data, "sts/sickr/trial", embed("STS")),
    }
    model.float()
    return {name: round(100 * score, 3) for name, score in scores.items()}


# Runs


def finish_run(run: Run, data: Path, folder: Path, settings: Settings) -> str:
    """Train and score one run and write its file; returns the run's name."""
    torch.set_num_threads(1)
    examples = load_examples(folder / "examples.jsonl", settings)
    tokenizer = load_tokenizer()
    model = build_model(run, settings)
    record: dict[str, Any] = {**asdict(run), "weights": count_weights(model), "stages": []}
    for stage in plan_stages(examples, run, settings):
        trained = train_stage(model, stage, settings)
        check_attention(model, run.attention)
        begin = time.process_time()
        scores = evaluate(model, tokenizer, data, settings)
        scoring_s = round(time.process_time() - begin, 1)
        record["stages"].append(
            {"name": stage.name, **trained, "scores": scores, "scoring_s": scoring_s}
        )
    write_whole(folder / f"{run.name}.json", json.dumps(record, indent=1))
    return run.name


def run_folder(work: Path, settings: Settings) -> Path:
    """Return the folder of runs with these settings and this bundled model, and no others."""
    digest = hashlib.sha256((bundled_folder() / "model.safetensors").read_bytes())
    digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    folder = work / f"ablation-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare_examples(data: Path, folder: Path, settings: Settings) -> None:
    """Mine once and keep."""
    path = folder / "examples.jsonl"
    if not path.exists():
        rows = collect_examples(data, settings)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def run_all(
    runs: Sequence[Run], finish: Callable[[Run], str], folder: Path, jobs: int
) -> Iterator[str]:
    """Finish the runs that are missing, `jobs` at a time; yield the name of each that is done."""
    missing = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(finish, missing)


def main() -> None:
    """Finish what is missing, gather the results, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with eval/ and train/")
    parser.add_argument("--work", type=Path, help="folder for this run's files")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of each stage")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--write-docs", action="store_true", help="only write the tables anew")
    options = parser.parse_args()
    if not options.write_docs:
        if options.data is None or options.work is None:
            parser.error("--data and --work are needed to train")
        settings = replace(Settings(), steps=options.steps)
        folder = run_folder(options.work, settings)
        prepare_examples(options.data, folder, settings)
        runs = list_runs(options.seeds)
        begin = time.perf_counter()
        finish = partial(finish_run, data=options.data, folder=folder, settings=settings)
        for name in run_all(runs, finish, folder, options.jobs):
            print(f"{time.perf_counter() - begin:6.0f} s  {name}", flush=True)
        records = [json.loads((folder / f"{run.name}.json").read_text()) for run in runs]
        write_results(records, asdict(settings), options.out)
    write_docs(options.out)


if __name__ == "__main__":
    main()
