"""Check the golden vectors on several transformers releases; a script, not collected by pytest.

Run: python tests/transformers_range.py [VERSION ...] [--keep FOLDER]
Needs a package index. Each release goes into a folder of its own, together with those of its
requirements that the running environment does not meet; torch and the rest are shared. The folder
stands first on PYTHONPATH, so the running environment itself is not changed.

Checked in each, in float32 on the CPU: golden vectors on the grouped and the padded path, the leak
check, the rotary table for a base read from the old and the new form of config.json, and that no
warning is raised. Exit status 1 when a release fails.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from paths import GOLDEN, ROOT

VERSIONS = ("5.0.0", "5.5.4", "5.10.4", "5.16.1", "5.23.0")
TOLERANCE = 1e-5


def install(version: str, folder: Path) -> list[str]:
    """Put a release into a folder, with the requirements that are not met; those requirements."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    folder.mkdir(parents=True)  # fails on one that is there: it may be incomplete
    path = [str(folder), *sys.path]
    waiting = [f"transformers=={version}"]
    installed: list[str] = []
    while waiting:
        line = waiting.pop().partition(";")[0].strip()
        if installed and is_met(line, path):
            continue
        subprocess.run([*pip, line], check=True, capture_output=True, text=True)
        installed.append(line)
        found = find_distribution(re.split(r"[^\w.-]", line)[0], path)
        needs = found.requires if found is not None else None
        waiting += [need for need in needs or () if not is_met(need, path)]
    return installed[1:]


def find_distribution(name: str, path: list[str]) -> importlib.metadata.Distribution | None:
    """Return the first distribution of a name on a path."""
    return next(iter(importlib.metadata.distributions(name=name, path=path)), None)


def is_met(line: str, path: list[str]) -> bool:
    """Tell whether the first distribution of that name on a path meets a requirement."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    found = find_distribution(requirement.name, path)
    return found is not None and requirement.specifier.contains(found.version, prereleases=True)


def check_release() -> dict[str, Any]:
    """Run all checks with the transformers on the path; called in the child process."""
    import numpy as np
    import torch
    import transformers

    from skembed.model import loaded as module
    from skembed.model.checkpoint import load_model
    from skembed.model.sources import read_config, resolve_source
    from skembed.model.tokenization import pack_texts

    golden = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    source = resolve_source(GOLDEN)
    config = read_config(source)
    tokenizer = module.load_tokenizer(GOLDEN, config)
    row: dict[str, Any] = {"version": transformers.__version__}
    for path in ("grouped", "padded"):
        model = load_model(
            source,
            config,
            device=torch.device("cpu"),
            dtype=torch.float32,
            attention_path=path,
        )
        module.prove_bidirectional(model, torch.device("cpu"))
        model.fold_pooling()
        worst = 0.0
        for name, expected in golden["embeddings"].items():
            instruction, max_length = name.split("/")
            encoded = tokenizer.encode(
                golden["texts"],
                prefix=golden["instructions"][instruction],
                max_length=int(max_length),
            )
            with torch.inference_mode():
                vectors = model(pack_texts(encoded.ids, encoded.pool_start)).numpy()
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            worst = max(worst, float(np.abs(vectors - np.array(expected)).max()))
        row[path] = worst
    row["rotary"] = max(check_rotary(form) for form in ("old", "new"))
    return row


def check_rotary(form: str) -> float:
    """Relative error of the rotary frequencies for a base given in one of the two forms."""
    import torch

    from skembed.model.config import NVEmbedConfig
    from skembed.model.network import NVEmbedModel

    base, width = 1234.5, 8
    values = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    text = values["text_config"]
    text.pop("rope_theta")
    if form == "old":
        text["rope_theta"] = base
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
    model = NVEmbedModel(NVEmbedConfig.from_dict(values, "here"))
    expected = torch.exp(torch.arange(0, width, 2) * (-math.log(base) / width))
    found = model.embedding_model.rotary_emb.inv_freq
    return float(((found - expected) / expected).abs().max())


def run_release(version: str, folder: Path) -> dict[str, Any]:
    """Install one release and run the checks in a child process."""
    try:
        extra = install(version, folder)
    except subprocess.CalledProcessError as error:
        return {"version": version, "error": "install: " + last_line(error.stderr)}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"version": version, "error": last_line(done.stderr)}
    row = json.loads(done.stdout.splitlines()[-1])
    if row["version"] != version:
        row["error"] = f"the child imported {row['version']}"
    return {**row, "version": version, "extra": extra}


def last_line(text: str) -> str:
    """Last line of an error output, where Python puts the message."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def passes(row: dict[str, Any]) -> bool:
    """Tell whether a release reproduces the golden vectors and the rotary table."""
    return "error" not in row and all(
        row[name] <= TOLERANCE for name in ("grouped", "padded", "rotary")
    )


def main() -> None:
    """Check all releases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument(
        "--keep", type=Path, help="keep the releases in this folder, which has none yet"
    )
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        warnings.simplefilter("error")
        print(json.dumps(check_release()))
        return
    failed = 0
    print(
        f"{'release':10} {'verdict':8} {'grouped':>9} {'padded':>9} {'rotary':>9}  also installed"
    )
    with tempfile.TemporaryDirectory(prefix="transformers-range-") as temporary:
        for version in args.versions:
            row = run_release(version, (args.keep or Path(temporary)) / version)
            failed += not passes(row)
            verdict = "pass" if passes(row) else "FAIL"
            if "error" in row:
                print(f"{version:10} {verdict:8} {row['error']}", flush=True)
                continue
            errors = " ".join(f"{row[name]:9.1e}" for name in ("grouped", "padded", "rotary"))
            print(
                f"{version:10} {verdict:8} {errors}  {', '.join(row['extra']) or '-'}", flush=True
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
