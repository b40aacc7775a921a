"""Write a model folder that `NVEmbedVectorizer` reads.

    python examples/train_mini/export.py --work WORK --out skembed/data/skembed-mini

The model is what stages.py ended with, or the distilled one where it did not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from prepare import build_config
from recipe import Recipe, refine_paths, work_paths

from skembed.checkpoint import save_checkpoint


def export(paths: dict[str, Path], out: Path, recipe: Recipe) -> None:
    """The distilled weights, or the mean of the last refinements, as a bfloat16 model folder."""
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
        extra={},
    )


def main() -> None:
    """Export the last model of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    recipe, final = Recipe(), arguments.work / "final.txt"
    if final.exists():
        folder = arguments.work / final.read_text().strip()
    else:
        folder = arguments.work / "distilled"
        export(work_paths(arguments.work), folder, recipe)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copyfile(folder / name, arguments.out / name)
    (arguments.out / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{folder.name}: {size / 1e6:.1f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
