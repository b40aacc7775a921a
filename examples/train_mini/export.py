"""Write a model folder that `NVEmbedVectorizer` reads.

    python examples/train_mini/export.py --work WORK --out my-model

The model is the mean of the last refinements, or the distilled one where refine.py did not run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from prepare import build_config
from recipe import Recipe, parse_folders, refine_paths, work_paths

from skembed.model.checkpoint import save_checkpoint


def export(paths: dict[str, Path], out: Path, recipe: Recipe) -> None:
    """Write the weights of a run in bfloat16."""
    refined = [refine_paths(paths, k)["checkpoint"] for k in range(len(recipe.refinements))]
    last = [path for path in refined if path.exists()][-recipe.averaged :]
    states = [
        torch.load(path, weights_only=True)["model"] for path in last or [paths["checkpoint"]]
    ]
    mean = ((name, sum(s[name] for s in states) / len(states)) for name in states[0])
    save_checkpoint(
        out,
        config=build_config(recipe),
        tensors=((name, tensor.to(torch.bfloat16)) for name, tensor in mean),
        tokenizer_folder=paths["tokenizer"].parent,
        extra={"recipe.json": recipe.to_dict()},
    )


def main() -> None:
    """Export the last model of a run."""
    arguments = parse_folders(__doc__, out="folder to write")
    export(work_paths(arguments.work), arguments.out, Recipe())
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{size / 1e6:.1f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
