"""Write the trained weights as a model folder that `NVEmbedVectorizer` reads.

python examples/train_mini/export.py --work WORK --out skembed/data/skembed-mini
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from recipe import Recipe, work_paths
from train import build_config

from skembed.checkpoint import save_checkpoint


def main() -> None:
    """Convert the last checkpoint to the recipe's storage type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    recipe, paths = Recipe(), work_paths(arguments.work)
    state = torch.load(paths["checkpoint"], weights_only=True)
    dtype = getattr(torch, recipe.dtype)
    save_checkpoint(
        arguments.out,
        config=build_config(recipe),
        tensors=((name, tensor.to(dtype)) for name, tensor in state["model"].items()),
        tokenizer_folder=paths["tokenizer"].parent,
        extra={"recipe.json": {**recipe.to_dict(), "step": state["step"]}},
    )
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"step {state['step']}: {size / 1e6:.1f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
