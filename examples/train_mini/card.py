"""Write the model card: card_template.md, filled from recipe, logs, scores and licence list.

    python examples/train_mini/card.py --work WORK --data DATA \\
        --scores benchmarks/results/quality.json --out skembed/data/skembed-mini

The README.md of `--data` lists every source with its licence. What the contrastive stages scored
is read from stages.json beside the scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from corpus import source_files
from recipe import Recipe, parse_folders, refine_paths, work_paths

SCORES = ("stsb", "sickr", "banking77", "hwu64", "emotion", "trecqa", "scifact")
TEMPLATE = Path(__file__).with_name("card_template.md")
PASS = (
    "   - {step:,} steps, {tokens} million tokens, {minutes} minutes, texts up to "
    "{chosen.max_length} tokens, learning rate {chosen.learning_rate:g} falling to nothing, "
    "weight of the tokens' own loss {chosen.token_weight:g}: {scores}."
)


def read_sources(readme: Path, used: set[str]) -> list[tuple[str, str, str, str]]:
    """Return name, source, licence and content of each source used, from the README's tables."""
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def describe_run(path: Path) -> dict[str, Any]:
    """Return what a log ended with: steps, millions of tokens, minutes and scores."""
    last = read_log(path)[-1]
    return {
        "step": last["step"],
        "tokens": f"{last['tokens'] / 1e6:.1f}",
        "minutes": f"{last['spent_s'] / 60:.0f}",
        "scores": ", ".join(f"{name} {last[name]}" for name in SCORES),
    }


def tabulate(scores: dict[str, dict[str, float]]) -> str:
    """Return one line a set, one column a model."""
    models = list(next(iter(scores.values())))
    lines = ["| set | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[m]:.1f}" for m in models) + " |")
    return "\n".join(lines)


def describe_shares(stages: dict[str, Any]) -> dict[str, str]:
    """Return what the stages began from, and of each the mean score by share."""
    return {
        name: tried
        if isinstance(tried, str)
        else ", ".join(f"{k}: {np.mean(list(scores.values())):.2f}" for k, scores in tried.items())
        for name, tried in stages.items()
    }


def write_card(work: Path, data: Path, scores: Path, out: Path) -> str:
    """Return the text of the card."""
    recipe, paths = Recipe(), work_paths(work)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    quality = json.loads(scores.read_text(encoding="utf-8"))
    used = {path.name.removesuffix(".jsonl.gz") for path in source_files(data)}
    sources = read_sources(data / "README.md", used)
    before = read_log(paths["log"])[0]
    passes = [
        PASS.format(chosen=chosen, **describe_run(refine_paths(paths, number)["log"]))
        for number, chosen in enumerate(recipe.refinements)
    ]
    return TEMPLATE.read_text(encoding="utf-8").format(
        recipe=recipe,
        text=config["text_config"],
        latent=config["latent_attention_config"],
        size_mb=sum(path.stat().st_size for path in out.glob("*.*") if path.suffix != ".md") / 1e6,
        groups="; ".join(" and ".join(map(str, group)) for group in recipe.layer_groups),
        scores_before=", ".join(f"{k} {v}" for k, v in before.items() if k != "step"),
        run=describe_run(paths["log"]),
        passes="\n".join(passes),
        tried=describe_shares(json.loads(scores.with_name("stages.json").read_text())["values"]),
        quality=quality,
        scores=tabulate(quality["values"]["scores"]),
        sources="\n".join(f"| {' | '.join(source)} |" for source in sources),
    )


def main() -> None:
    """Write README.md beside the weights."""
    arguments = parse_folders(
        __doc__,
        data="folder with README.md and train/",
        scores="quality.json",
        out="the model's folder",
    )
    card = write_card(arguments.work, arguments.data, arguments.scores, arguments.out)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(f"{arguments.out / 'README.md'}: {len(card.splitlines())} lines")


if __name__ == "__main__":
    main()
