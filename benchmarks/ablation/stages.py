"""NV-Embed's two contrastive stages behind the distillation, with the package's own `fit_tasks`.

    python benchmarks/ablation/stages.py --work WORK --data DATA

Stage 1: retrieval-like pairs, in-batch and mined hard negatives. Stage 2: all kinds of pairs
blended, negatives of their own only. Each stage trains LoRA adapters, which are then added to the
weights at several shares, 0 included: a smaller share keeps more of the teacher's geometry. The
share that the development scores like best is where the next stage begins. No share gained enough
to join the recipe. WORK is the folder of a training run (examples/train_mini); a stage that was
interrupted resumes from its checkpoint. Writes benchmarks/results/stages.json and stages.md.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import (
    RESULTS,
    SCORES,
    describe_machine,
    make_record,
    table,
    write_page,
    write_record,
)
from corpus import read_rows
from dev_scores import dev_scores
from export import export
from recipe import Recipe, parse_folders, refine_paths, work_paths
from safetensors.torch import load_file

from skembed import ContrastiveTrainer, NVEmbedVectorizer, TrainingTask
from skembed.model.checkpoint import save_checkpoint
from skembed.model.sources import read_config, resolve_source

SHARES = (0.0, 0.25, 0.5, 1.0)  # of a stage's change
RETRIEVAL_FILES = """
    18f_blog_posts acl_title_abstract_2016plus covid_qa_passages d2l_deep_learning_book
    digitalgov_articles dynamics365_business_docs medquad openstax_heading_paragraph
    owasp_cheat_sheets powershell_docs pubmedqa_labelled python_peps react_docs scitldr
    squad_question_sentence stackexchange_beer stackexchange_coffee stackexchange_matheducators
    wikipedia_section_paragraph wikipedia_sentence_context wikipedia_title_lead xquad_english
""".split()
OTHER_FILES = """
    botframework_chitchat comve_reason_reason disfl_qa ibm_argument_keypoint
    medical_question_entailment open_trivia_qa snli_counterfactual snli_dev_test_triplets
    tatoeba_english_paraphrases wiki_split
""".split()


@dataclass(frozen=True)
class Stage:
    """One contrastive stage; NV-Embed's recipe (arXiv 2405.17428, section 4) in small."""

    files: list[str]
    in_batch_negatives: bool
    blend: bool  # several files in one batch
    max_steps: int
    n_negatives: int
    learning_rate: float
    examples_per_file: int = 300
    batch_size: int = 48
    r: int = 32
    temperature: float = 0.05


STAGES = (
    Stage(RETRIEVAL_FILES, True, False, max_steps=60, n_negatives=1, learning_rate=3e-4),
    Stage(
        RETRIEVAL_FILES + OTHER_FILES,
        False,
        True,
        max_steps=50,
        n_negatives=3,
        learning_rate=2e-4,
    ),
)


def pair_task(data: Path, name: str, stage: Stage, seed: int) -> TrainingTask:
    """Return pairs of one file, or rows with a negative where the file has them."""
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
    model.save_pretrained(out, merge=True)


def add_share(start: Path, trained: Path, out: Path, share: float) -> None:
    """Write a model `share` of the way from `start` to `trained`, weight by weight."""
    first, last = (load_file(folder / "model.safetensors") for folder in (start, trained))
    save_checkpoint(
        out,
        config=read_config(resolve_source(str(start))),
        tensors=(
            (name, torch.lerp(w.float(), last[name].float(), share).to(w.dtype))
            for name, w in first.items()
        ),
        tokenizer_folder=start,
        extra={},
    )


def run_stage(number: int, start: Path, work: Path, data: Path, log: dict) -> Path:
    """Train a stage unless it is done, choose its share, and return the folder to go on with."""
    recipe, trained = Recipe(), work / f"stage-{number + 1}-trained"
    if not (trained / "config.json").exists():
        train_stage(start, trained, data, STAGES[number], recipe)
    results = log.setdefault(f"stage {number + 1}", {})
    for share in SHARES:
        folder = work / f"stage-{number + 1}-{share:g}"
        if f"{share:g}" not in results:
            add_share(start, trained, folder, share)
            model = NVEmbedVectorizer(
                str(folder), max_length=recipe.max_length, trainer=None, cache=None, verbose=False
            )
            results[f"{share:g}"] = dev_scores(data, model.fit(["a"]).transform)
            print(number + 1, share, results[f"{share:g}"], flush=True)
            (work / "stages.json").write_text(json.dumps(log, indent=1))
    best = max(results, key=lambda share: sum(results[share].values()))
    print(f"stage {number + 1}: share {best}", flush=True)
    return work / f"stage-{number + 1}-{best}"


def write_result(log: dict) -> None:
    """Write benchmarks/results/stages.json, and its table as stages.md."""
    record = make_record("stages", "stages", values=log)
    rows = [
        [str(number), str(stage.max_steps), share]
        + [f"{scores[name]:.2f}" for name in SCORES]
        + [f"{np.mean(list(scores.values())):.2f}"]
        for number, stage in enumerate(STAGES, start=1)
        for share, scores in log.get(f"stage {number}", {}).items()
    ]
    write_record(record, RESULTS)
    parts = [
        f"# The two contrastive stages, tried on {log['start']}",
        f"`{record['command']}`, {record['date']}. Scores of development splits and train folds, "
        "percent; share: how much of the stage's change is added to the weights.",
        table(["stage", "steps", "share", *SCORES, "mean"], rows, "|---|"),
        describe_machine(record),
    ]
    write_page(record, parts, RESULTS)


def main() -> None:
    """Run both stages on the model of a training run."""
    arguments = parse_folders(__doc__, data="folder with eval/ and train/")
    recipe, work = Recipe(), arguments.work
    paths, log_path, folder = work_paths(work), work / "stages.json", work / "distilled"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    export(paths, folder, recipe)
    passes = sum(refine_paths(paths, k)["log"].exists() for k in range(len(recipe.refinements)))
    log.setdefault("start", f"the model after {passes} passes of refinement")
    for number in range(len(STAGES)):
        folder = run_stage(number, folder, work, arguments.data, log)
        write_result(log)


if __name__ == "__main__":
    main()
