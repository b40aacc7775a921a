"""Scripts outside the package, imported for a test."""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT

RECIPE = ROOT / "examples" / "train_mini"
WORDS = ("cat", "dog", "tax", "loan", "rain", "snow", "bread", "salt")


def import_script(folder: Path, name: str) -> Iterator[ModuleType]:
    """Yield a script of a folder as a module; what it imported from there is forgotten again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        # Scripts set it to true, which would hang forked processes of other tests.
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        before = set(sys.modules)
        yield importlib.import_module(name)
        for loaded in set(sys.modules) - before:
            file = getattr(sys.modules[loaded], "__file__", None) or ""
            if Path(file).parent in (folder, RECIPE, ROOT / "benchmarks"):
                del sys.modules[loaded]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
