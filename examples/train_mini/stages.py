"""NV-Embed's two contrastive stages behind the distillation, with the package's own `fit_tasks`.

    python examples/train_mini/stages.py --work WORK --data DATA

Stage 1: retrieval-like pairs, in-batch and mined hard negatives. Stage 2: all kinds of pairs
blended, negatives of their own only. Each stage trains LoRA adapters, which are then added to the
weights at the share that the development scores like best, 0 included: a smaller share keeps more
of the teacher's geometry. A stage that was interrupted resumes from its checkpoint.

With ``--start FOLDER`` the stages begin from a model folder, the bundled one say, instead of the
distillation's last checkpoint. What every share scored is written into
benchmarks/results/stages.json, and as a table into stages.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from corpus import read_rows
from export import export
from recipe import Recipe, Stage, refine_paths, work_paths
from safetensors.torch import load_file

import dev
from skembed import ContrastiveTrainer, NVEmbedVectorizer, TrainingTask
from skembed.checkpoint import read_config, resolve_source, save_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _results import RESULTS, describe_run

NAME = "stages"


def pair_task(data: Path, name: str, stage: Stage, seed: int) -> TrainingTask:
    """Pairs of one file, or rows with a negative where the file has them."""
    path = data / f"train/permissive/pairs/{name}.jsonl.gz"
    rows = [
        {key: str(value).strip() for key, value in row.items() if value} for row in read_rows(path)
    ]
    has_negative = all("negative" in row for row in rows[:100])
    keys = ["query", "positive", *(["negative"] if has_negative else [])]
    examples = [tuple(row.get(key, "") for key in keys) for row in rows]
    examples = [e for e in dict.fromkeys(examples) if all(e) and len(set(e)) == len(e)]
    random.Random(seed).shuffle(examples)
    return TrainingTask(examples[: stage.examples_per_file], name=name)


def train_stage(start: Path, out: Path, data: Path, stage: Stage, recipe: Recipe) -> None:
    """Train one stage from the folder `start` and write the merged model into `out`."""
    trainer = ContrastiveTrainer(
        r=stage.r,
        lora_alpha=2 * stage.r,
        lora_dropout=0.0,
        temperature=stage.temperature,
        in_batch_negatives=stage.in_batch_negatives,
        mine_negatives="perc_pos",
        n_negatives=stage.n_negatives,
        blend_tasks=stage.blend,
        batch_size=stage.batch_size,
        max_steps=stage.max_steps,
        learning_rate=stage.learning_rate,
        checkpoint_dir=out.with_name(out.name + "-state"),
        random_state=recipe.random_state,
        verbose=True,
    )
    model = NVEmbedVectorizer(str(start), max_length=recipe.max_length, trainer=trainer)
    model.fit_tasks([pair_task(data, name, stage, recipe.random_state) for name in stage.files])
    (out.with_suffix(".history.json")).write_text(json.dumps(model.history_.steps))
    model.save_pretrained(out, merge=True)


def add_share(start: Path, trained: Path, out: Path, share: float) -> None:
    """A model `share` of the way from `start` to `trained`, weight by weight."""
    source = resolve_source(str(start))
    first, last = (load_file(folder / "model.safetensors") for folder in (start, trained))
    save_checkpoint(
        out,
        config=read_config(source),
        tensors=(
            (name, torch.lerp(w.float(), last[name].float(), share).to(w.dtype))
            for name, w in first.items()
        ),
        tokenizer_folder=source.folder,
        extra={},
    )


def score_folder(folder: Path, data: Path, recipe: Recipe) -> dict[str, float]:
    """Development scores of a model folder."""
    model = NVEmbedVectorizer(
        str(folder), max_length=recipe.max_length, trainer=None, cache=None, verbose=False
    ).fit(["a"])

    def embed(texts: list[str]) -> np.ndarray:
        return model.transform(texts)

    return dev.dev_scores(data, embed)


def run_stage(number: int, start: Path, work: Path, data: Path, recipe: Recipe, log: dict) -> Path:
    """Train a stage unless it is done, choose its share, and return the folder to go on with."""
    stage, trained = recipe.stages[number], work / f"stage-{number + 1}-trained"
    if not (trained / "config.json").exists():
        train_stage(start, trained, data, stage, recipe)
    results = log.setdefault(f"stage {number + 1}", {})
    for share in recipe.shares:
        folder = work / f"stage-{number + 1}-{share:g}"
        if f"{share:g}" not in results:
            add_share(start, trained, folder, share)
            results[f"{share:g}"] = score_folder(folder, data, recipe)
            print(number + 1, share, results[f"{share:g}"], flush=True)
            (work / "stages.json").write_text(json.dumps(log, indent=1))
    best = max(results, key=lambda share: sum(results[share].values()))
    results_path = work / f"stage-{number + 1}-{best}"
    print(f"stage {number + 1}: share {best}", flush=True)
    return results_path


def write_result(log: dict, recipe: Recipe) -> None:
    """benchmarks/results/stages.json, and its table as stages.md."""
    record = {**describe_run(NAME, "python examples/train_mini/stages.py"), "values": log}
    (RESULTS / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    names = list(next(iter(log["stage 1"].values())))
    lines = [
        f"# The two contrastive stages, tried on {log['start']}",
        "",
        f"`{record['command']}`, {record['date']}. Scores of development splits and train folds, "
        "percent; share: how much of the stage's change is added to the weights.",
        "",
        f"| stage | steps | share | {' | '.join(names)} | mean |",
        "|---" * (len(names) + 4) + "|",
    ]
    for number, stage in enumerate(recipe.stages):
        for share, scores in log.get(f"stage {number + 1}", {}).items():
            cells = [str(number + 1), str(stage.max_steps), share]
            cells += [f"{scores[name]:.2f}" for name in names]
            cells.append(f"{np.mean(list(scores.values())):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    machine = record["machine"]
    lines += ["", f"Machine: {machine['processor']}, {machine['cores']} cores.", ""]
    (RESULTS / f"{NAME}.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Run both stages, and write what to export into WORK/final.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the distillation")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and train/")
    parser.add_argument("--start", type=Path, help="model folder to begin from")
    parser.add_argument("--stages", type=int, default=len(Recipe().stages), help="how many")
    arguments = parser.parse_args()
    recipe, work = Recipe(), arguments.work
    log_path = work / "stages.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    if arguments.start is None:
        folder = work / "distilled"
        export(work_paths(work), folder, recipe)
        done = [refine_paths(work_paths(work), k)["log"] for k in range(len(recipe.refinements))]
        passes = sum(path.exists() for path in done)
        log.setdefault("start", f"the model after {passes} passes of refinement")
    else:
        folder = arguments.start
        work.mkdir(parents=True, exist_ok=True)
        log.setdefault("start", f"the model of {folder.name}")
    for number in range(arguments.stages):
        folder = run_stage(number, folder, work, arguments.data, recipe, log)
        write_result(log, recipe)
    (work / "final.txt").write_text(folder.name)


if __name__ == "__main__":
    main()
