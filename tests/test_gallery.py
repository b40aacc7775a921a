"""The examples of the gallery and the notebook run top to bottom, here on a part of their texts.

The build of the documentation runs them whole (docs/conf.py).
"""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT

import skembed.datasets
from skembed import NVEmbedVectorizer

pytest.importorskip("matplotlib", reason="the examples draw: pip install skembed[plot]")

GALLERY = ROOT / "examples" / "gallery"
EXAMPLES = sorted(GALLERY.glob("*.py"))
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# What the issue asks for: one example of each.
SUBJECTS = {
    "classification",
    "clustering",
    "finetuning",
    "grid_search",
    "instructions",
    "retrieval",
    "sts",
}
# Examples that need more than the plot extra.
NEEDS = {"clustering": "umap", "finetuning": "peft"}
N_LABELS, N_TEXTS = 4, 120  # of the part; of each label
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def take_part(docs: Any) -> Any:
    """Keep the first texts of the largest labels, in the order they had."""
    counts = np.bincount(docs.target)
    largest = np.sort(np.argsort(-counts, kind="stable")[:N_LABELS])
    kept = np.concatenate([np.flatnonzero(docs.target == label)[:N_TEXTS] for label in largest])
    docs.data = [docs.data[i] for i in kept]
    docs.names, docs.kinds = [[column[i] for i in kept] for column in (docs.names, docs.kinds)]
    docs.target = np.searchsorted(largest, docs.target[kept])
    docs.target_names = [docs.target_names[label] for label in largest]
    docs.groups = docs.groups[kept]
    docs.pairs = docs.pairs[:N_TEXTS]
    return docs


@pytest.fixture
def pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run in an empty folder, on a part of the texts; close what was drawn."""
    from matplotlib import pyplot as plt

    load: Callable[..., Any] = skembed.datasets.load_docstrings
    monkeypatch.setattr(
        skembed.datasets, "load_docstrings", lambda **options: take_part(load(**options))
    )
    monkeypatch.chdir(tmp_path)
    yield plt
    plt.close("all")


@pytest.fixture(scope="module", autouse=True)
def warm_model() -> Iterator[NVEmbedVectorizer]:
    """Keep the bundled model loaded from one example to the next."""
    vectorizer = NVEmbedVectorizer()
    vectorizer.transform(["warm"])
    yield vectorizer


def run(code: str, name: str) -> str:
    """Run code as a script and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})  # noqa: S102 -- our own files
    return printed.getvalue()


def test_each_subject_has_an_example() -> None:
    assert {path.stem for path in EXAMPLES} >= SUBJECTS


@every_example
def test_example_begins_with_title_and_summary(example: Path) -> None:
    """The gallery shows the title and, on hover, the first paragraph."""
    text = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    assert text is not None
    title, line, blank, summary = text.splitlines()[:4]
    assert line == "=" * len(title)
    assert blank == "" and summary


@every_example
def test_example_runs_prints_and_draws(example: Path, pyplot: Any) -> None:
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem], reason="an extra of skembed is not installed")
    printed = run(example.read_text(encoding="utf-8"), str(example))
    assert printed.strip()
    # A figure, not the word: "nan" may name a cluster of numpy's functions.
    assert not re.search(r"[:=|(] *nan\b", printed)
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert figures
    assert all(axes.has_data() for figure in figures for axes in figure.axes[:1])


# The notebook


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """Return the notebook as Jupyter stores it."""
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return content


def test_notebook_is_of_the_format_that_jupyter_opens(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None  # saved without results, which would go stale
            assert cell["outputs"] == []
        else:
            assert cell["cell_type"] == "markdown"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_notebook_begins_with_words(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert first["source"][0].startswith("# ")


def test_notebook_runs_on_a_part_of_its_texts(notebook: dict[str, Any], pyplot: Any) -> None:
    """Cell by cell in one namespace; the last expression of a cell is shown, as Jupyter does."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = []
    for number, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"cell {number} of {NOTEBOOK.name}"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, where, "exec"), namespace)  # noqa: S102 -- our own file
            if isinstance(last, ast.Expr):
                expression = compile(ast.Expression(last.value), where, "eval")
                shown.append(eval(expression, namespace))
    assert len(cells) >= 6
    assert any(value is not None for value in shown)
    assert pyplot.get_fignums()


# What a kernel does with a notebook: each code cell in order, in one namespace of a new process.
KERNEL = textwrap.dedent(
    """
    import ast, json, sys
    namespace = {"__name__": "__main__"}
    with open(sys.argv[1], encoding="utf-8") as file:
        cells = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
            print(repr(value))
        print(f"[{number}] done", flush=True)
    """
)


def run_notebook(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook in a process of its own, in a folder."""
    return subprocess.run(
        [sys.executable, "-c", KERNEL, str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_notebook_runs_from_top_to_bottom(notebook: dict[str, Any], tmp_path: Path) -> None:
    """All of it, on all of its texts, with nothing there but what its own cells make."""
    for package in ("umap", "peft"):
        pytest.importorskip(package, reason="an extra of skembed is not installed")
    done = run_notebook(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    n_cells = sum(cell["cell_type"] == "code" for cell in notebook["cells"])
    assert re.findall(r"^\[(\d+)\] done$", done.stdout, re.MULTILINE) == [
        str(number) for number in range(1, n_cells + 1)
    ]


def test_a_notebook_that_fails_is_noticed(tmp_path: Path) -> None:
    """A cell that needs a name of a later cell, as it happens when cells are run out of order."""
    sources = ["first = 1\nfirst + 1", "first + second", "second = 2"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    done = run_notebook(path, tmp_path)
    assert done.stdout.splitlines() == ["2", "[1] done"]
    assert done.returncode == 1
    assert "NameError: name 'second' is not defined" in done.stderr
