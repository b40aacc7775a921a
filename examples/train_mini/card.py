"""Write the model card from what was run: recipe, log, scores and the corpus's own licence list.

    python examples/train_mini/card.py --work WORK --data DATA \\
        --scores benchmarks/results/quality.json --out skembed/data/skembed-mini

`--data` is the folder whose README.md lists every source with its licence. What stages.py tried
is read from the folder of the scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus import source_files
from recipe import Recipe, refine_paths, work_paths

SCORES = ("stsb", "sickr", "banking77", "hwu64", "emotion", "trecqa", "scifact")


def read_sources(readme: Path, used: set[str]) -> list[tuple[str, str, str, str]]:
    """Name, source, licence and content of each source used, from the tables of the README."""
    sources = []
    for line in readme.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[1] in used:
            sources.append((cells[1], cells[7], cells[9], cells[10]))
        elif len(cells) == 9 and cells[0] in used:
            sources.append((cells[0], cells[4], cells[6], cells[7]))
    missing = used - {name for name, *_ in sources}
    if missing:
        raise SystemExit(f"{readme} states no licence for {sorted(missing)}")
    return sorted(sources)


def read_log(path: Path) -> list[dict]:
    """The lines of a log; none where there is no log."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def score_table(scores: dict[str, dict[str, float]]) -> list[str]:
    """One line a set, one column a model."""
    models = list(next(iter(scores.values())))
    lines = ["| set | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[m]:.1f}" for m in models) + " |")
    return lines


def describe_architecture(config: dict, recipe: Recipe, size_mb: float) -> list[str]:
    """Sizes of the network."""
    text, latent = config["text_config"], config["latent_attention_config"]
    return [
        f"- {text['num_hidden_layers']} layers, {text['hidden_size']} wide, "
        f"{text['num_attention_heads']} heads of {text['head_dim']}, "
        f"MLP {text['intermediate_size']}",
        f"- latent attention: {latent['num_latents_value']} latents, {latent['num_cross_heads']} "
        f"heads of {latent['cross_dim_head']}, feed-forward widened {latent['ff_mult']} times",
        f"- vocabulary {text['vocab_size']:,}: of the teacher's lower-cased word pieces those that "
        "the corpus uses most",
        f"- up to {text['max_position_embeddings']:,} tokens, taught on at most "
        f"{recipe.taught_length}",
        f"- bfloat16 weights, {size_mb:.1f} MB in all; embeddings of {config['hidden_size']} "
        "dimensions, unit length",
    ]


def describe_distillation(log: list[dict], recipe: Recipe) -> list[str]:
    """What was run, from the log."""
    groups = "; ".join(" and ".join(str(k) for k in group) for group in recipe.layer_groups)
    last = log[-1]
    return [
        "1. **Inheritance** (`inherit.py`). Each matrix is the ridge regression of the teacher's "
        f"activation on what the student sees, over {recipe.calibration_tokens:,} tokens; our "
        f"layers stand for the teacher's layers {groups}. Before any training: "
        + ", ".join(f"{name} {value}" for name, value in log[0].items() if name != "step")
        + " (development scores, percent).",
        f"2. **Distillation** (`train.py`). {last['step']:,} steps of {recipe.batch_size} texts, "
        f"{last['tokens'] / 1e6:.1f} million tokens, each text once, {last['spent_s'] / 60:.0f} "
        "minutes on two CPU cores shared with other work; from step "
        f"{recipe.long_from_step} on half of a batch's texts gave way to {recipe.long_per_batch} "
        f"long ones. Loss: 1 - cosine of each token's vector and of each text's, "
        f"and {recipe.similarity_weight:g} times the squared error of the similarities inside a "
        f"batch. AdamW on float32 masters of bfloat16 weights, learning rate "
        f"{recipe.learning_rate:g} falling to nothing (in this run with the time spent, and with "
        "the steps in the later part). At its end: "
        + ", ".join(f"{name} {last[name]}" for name in SCORES)
        + ".",
    ]


def describe_refinements(paths: dict[str, Path], recipe: Recipe) -> list[str]:
    """What refine.py did, from its logs; nothing where it did not run."""
    passes = []
    for number, chosen in enumerate(recipe.refinements):
        log = read_log(refine_paths(paths, number)["log"])
        if log:
            last = log[-1]
            passes.append(
                f"{last['step']:,} steps, {last['tokens'] / 1e6:.1f} million tokens, "
                f"{last['spent_s'] / 60:.0f} minutes, texts up to {chosen.max_length} tokens, "
                f"learning rate {chosen.learning_rate:g} falling to nothing, weight of the tokens' "
                f"own loss {chosen.token_weight:g}: "
                + ", ".join(f"{name} {last[name]}" for name in SCORES)
            )
    if not passes:
        return []
    return [
        f"3. **Refinement** (`refine.py`). The same loss on {recipe.refine_texts} new short texts, "
        f"{recipe.refine_long_texts} long ones, and a block of up to {recipe.related_texts} "
        f"neighbouring texts of one source (at most {recipe.related_tokens:,} tokens). Each text "
        "of the block ranks the others; the divergence from the teacher's ranking (softmax of the "
        f"cosine over {recipe.ranking_temperature:g}) joins the loss with weight "
        f"{recipe.ranking_weight:g}. Passes, with the development scores at their ends:",
        *(f"   - {line}." for line in passes),
        "",
        f"   The model is the mean of the weights of the last {recipe.averaged} passes.",
    ]


def describe_stages(stages: dict[str, dict], recipe: Recipe) -> list[str]:
    """The contrastive stages, tried, and what each share of their change scored."""
    lines = []
    for number, stage in enumerate(recipe.stages):
        shares = stages.get(f"stage {number + 1}")
        if shares is None:
            continue
        tried = ", ".join(
            f"{share}: {sum(scores.values()) / len(scores):.2f}" for share, scores in shares.items()
        )
        negatives = "in-batch and mined" if stage.in_batch_negatives else "mined"
        lines.append(
            f"{number + 4}. **Stage {number + 1}** (`stages.py`, `fit_tasks`). LoRA of rank "
            f"{stage.r} on {len(stage.files)} files of pairs, at most "
            f"{stage.examples_per_file:,} of each, {negatives} negatives, {stage.max_steps} steps "
            f"of {stage.batch_size}. Mean of the development scores by the share of its change "
            f"that is added to the weights: {tried}."
        )
    if lines:
        lines.append(
            f"   Both were tried on {stages['start']}. No share gains more than the passes of "
            "the refinement differ by, so neither stage is in the weights."
        )
    return lines


def write_card(work: Path, data: Path, scores: Path, out: Path) -> str:
    """The text of the card."""
    recipe, paths = Recipe(), work_paths(work)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    quality = json.loads(scores.read_text(encoding="utf-8"))
    log = read_log(paths["log"])
    tried = scores.with_name("stages.json")
    stages = json.loads(tried.read_text())["values"] if tried.exists() else {}
    used = {path.name.removesuffix(".jsonl.gz") for path in source_files(data / "train/permissive")}
    sources = read_sources(data / "README.md", used)
    size = sum(path.stat().st_size for path in out.glob("*.*") if path.suffix != ".md") / 1e6
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "base_model: sentence-transformers/all-MiniLM-L6-v2 (teacher, Apache-2.0)",
        "---",
        "# skembed-mini",
        "",
        "The NV-Embed architecture (arXiv 2405.17428) in small, bundled with skembed: a",
        "bidirectional Mistral whose token vectors are pooled by latent attention. It works at",
        "once and offline. It inherits from all-MiniLM-L6-v2, and is faster.",
        "",
        "## Architecture",
        "",
        *describe_architecture(config, recipe, size),
        "",
        "## Recipe",
        "",
        "`examples/train_mini/`; every choice is in `recipe.py`. The corpus: at most "
        f"{recipe.texts_per_file:,} distinct texts a source, {recipe.max_texts:,} in all, long "
        f"texts mostly cut to {recipe.span_words[0]}-{recipe.span_words[1]} words.",
        "",
        *describe_distillation(log, recipe),
        *describe_refinements(paths, recipe),
        *describe_stages(stages, recipe),
        "",
        "Development scores are of development splits and train folds: STS-B dev, SICK trial, "
        "8-shot accuracy on Banking77 train, HWU64 valid and TweetEval emotion val, TREC-QA dev, "
        "SciFact's train queries on a part of its documents. No evaluation set was trained on; "
        "rows that share 13 words with one were dropped from the corpus by its makers.",
        "",
        "To retrain: `prepare.py`, `train.py`, `refine.py`, `stages.py`, `export.py`, then "
        "`benchmarks/quality.py` and `card.py`, as the heads of these files say. Each resumes "
        "after a kill.",
        "",
        "## Scores",
        "",
        f"`{quality['command']}`; protocols in that file. minilm is all-MiniLM-L6-v2 through "
        "sentence-transformers.",
        "",
        *score_table(quality["values"]["scores"]),
        "",
        "## Limits",
        "",
        "- English, without upper case and accents. A character outside the vocabulary makes its "
        "word unknown, and texts of unknown words are all alike.",
        f"- Taught on at most {recipe.taught_length} tokens: longer texts work, untested by "
        "training.",
        "- Where the words themselves decide (scientific claims, technical terms, a single word "
        'such as "would"), plain word statistics can win: see the tfidf columns.',
        "- Sources carry the biases of forum posts, reviews, encyclopaedias and old books; one set "
        "(goemotions_reddit_comments) holds offensive language. The teacher was trained on a "
        "billion pairs from forums and the web, with theirs.",
        "- It was distilled without instructions: an instruction changes vectors, but was not "
        "learned.",
        "",
        "## Licence",
        "",
        "The weights derive from all-MiniLM-L6-v2 and bear its licence, Apache-2.0: free to use, "
        "commercially too. Every text source is stated by its makers to be permissive or "
        "share-alike and open to commercial use:",
        "",
        "| source | from | licence | content |",
        "|---|---|---|---|",
        *(f"| {' | '.join(source)} |" for source in sources),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write README.md beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--data", type=Path, required=True, help="folder with README.md and train/")
    parser.add_argument("--scores", type=Path, required=True, help="quality.json")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    arguments = parser.parse_args()
    card = write_card(arguments.work, arguments.data, arguments.scores, arguments.out)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(f"{arguments.out / 'README.md'}: {len(card.splitlines())} lines")


if __name__ == "__main__":
    main()
