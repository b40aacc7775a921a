"""Write the model card from what was run: recipe, log, scores and the corpus's own licence list.

    python examples/train_mini/card.py --work WORK --data DATA \\
        --scores benchmarks/results/quality.json --out skembed/data/skembed-mini

`--data` is the folder whose README.md lists every source with its licence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipe import LEFT_OUT, Recipe, work_paths


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


def score_table(scores: dict[str, dict[str, float]]) -> list[str]:
    """One line a set, one column a model."""
    models = list(next(iter(scores.values())))
    lines = ["| set | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[m]:.1f}" for m in models) + " |")
    return lines


def write_card(work: Path, data: Path, scores: Path, out: Path) -> str:
    """The text of the card."""
    recipe, paths = Recipe(), work_paths(work)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    quality = json.loads(scores.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in paths["log"].open(encoding="utf-8")]
    files = sorted((data / "train" / "permissive").glob("*/*.jsonl.gz"))
    used = {path.name.removesuffix(".jsonl.gz") for path in files} - set(LEFT_OUT)
    sources = read_sources(data / "README.md", used)
    text, latent = config["text_config"], config["latent_attention_config"]
    steps = log[-1]["step"]
    size = sum(path.stat().st_size for path in out.glob("*.*") if path.suffix != ".md") / 1e6
    lines = [
        "---",
        "license: bsd-3-clause",
        "language: en",
        "base_model: sentence-transformers/all-MiniLM-L6-v2 (teacher, Apache-2.0)",
        "---",
        "# skembed-mini",
        "",
        "The NV-Embed architecture (arXiv 2405.17428) in small, bundled with skembed: a",
        "bidirectional Mistral whose token vectors are pooled by latent attention. It works at",
        "once and offline. First version: distilled from all-MiniLM-L6-v2, no contrastive stage.",
        "",
        "## Architecture",
        "",
        f"- {text['num_hidden_layers']} layers, {text['hidden_size']} wide, "
        f"{text['num_attention_heads']} heads ({text['num_key_value_heads']} for keys and values), "
        f"MLP {text['intermediate_size']}",
        f"- latent attention: {latent['num_latents_value']} latents, {latent['num_cross_heads']} "
        f"heads of {latent['cross_dim_head']}, feed-forward widened {latent['ff_mult']} times",
        f"- vocabulary {text['vocab_size']:,} (lower-cased byte-fallback BPE of its own), up to "
        f"{text['max_position_embeddings']:,} tokens, taught on at most "
        f"{recipe.teacher_max_length}",
        f"- {recipe.dtype} weights, {size:.1f} MB in all; embeddings of {config['hidden_size']} "
        "dimensions, unit length",
        "",
        "## Recipe",
        "",
        "`examples/train_mini/`: `prepare.py` (corpus, tokenizer, teacher vectors), `train.py`, "
        "`export.py`, `card.py`; every choice is in `recipe.py`.",
        "",
        f"- {recipe.max_texts:,} distinct texts drawn from the sources below, at most "
        f"{recipe.texts_per_file:,} a file; long texts mostly cut to "
        f"{recipe.span_words[0]}-{recipe.span_words[1]} words",
        "- start: each token's vector is the teacher's vector of that token, output projections "
        "zero, so that training begins from a mean of static word vectors",
        f"- loss: 1 - cosine to the teacher + {recipe.similarity_weight:g} x squared error of the "
        "batch's similarity matrix; half of the batches are neighbours under the teacher",
        f"- AdamW, {steps:,} steps of {recipe.batch_size} texts ({recipe.passes:g} passes), "
        f"learning rate {recipe.learning_rate:g} falling linearly, bfloat16 autocast over float32 "
        f"weights, {log[-1]['spent_s'] / 60:.0f} minutes on one CPU core; {recipe.run_note}",
        "- STS-B development split while training (Spearman): "
        + ", ".join(
            f"{entry['sts_dev']:.3f} at {entry['step']}"
            for entry in [*log[:: max(1, len(log) // 6)], log[-1]]
        ),
        "",
        "No evaluation set was trained on; rows that share 13 words with one were dropped from the "
        "corpus by its makers.",
        "",
        "## Scores",
        "",
        f"`{quality['command']}`; protocols in that file. minilm is all-MiniLM-L6-v2 through "
        "sentence-transformers, tfidf is 256 dimensions of TF-IDF fitted on each set.",
        "",
        *score_table(quality["values"]),
        "",
        "## Limits",
        "",
        "- English. Other scripts fall back to bytes and mean little.",
        "- Short texts first: most training texts have fewer than 50 words. Retrieval over long "
        "scientific texts is its weakest side, and plain words (TF-IDF) can win there.",
        "- Fine-grained intents and technical titles lag behind the teacher.",
        "- Sources carry the biases of forum posts, reviews, encyclopaedias and old books; one set "
        "(goemotions_reddit_comments) holds offensive language.",
        "- It was distilled without instructions: an instruction changes vectors, but was not "
        "learned.",
        "",
        "## Licence",
        "",
        "The weights are released under BSD-3-Clause, as the package. The teacher's weights are "
        "Apache-2.0. Every text source is stated by its makers to be permissive or share-alike "
        "and open to commercial use:",
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
