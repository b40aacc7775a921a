"""Make skembed/data/docstrings.json from the installed numpy, scipy and scikit-learn.

Run: python3 benchmarks/_make_docstrings.py   (no benchmark: `load_docstrings` reads what it writes)
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy.special

FILE = Path(__file__).resolve().parents[1] / "skembed" / "data" / "docstrings.json"
PACKAGES = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}
# Without documentation of their own, vendored, or described a second time elsewhere.
SKIPPED = set(
    "tests externals _lib f2py distutils testing _typing _examples _testing _build_utils conftest "
    "setup estimator_checks testutils timer_comparison fftpack misc compat".split()
)
# "Predict class labels for samples in X." says nothing of the subpackage.
METHODS = set(
    "decision_function fit fit_predict fit_transform get_feature_names_out get_n_splits "
    "inverse_transform partial_fit predict predict_log_proba predict_proba score score_samples "
    "split staged_decision_function staged_predict staged_predict_proba transform".split()
)
MIN_CHARS, MIN_WORDS, MAX_CHARS = 40, 7, 900
LIBRARIES = "numpy|scipy|sklearn|scikit-learn|np|sp"
SUBSTITUTIONS = [
    (r"(?<=\w)-\n\s*(?=\w)", "-"),  # a word broken at its hyphen
    (r"%\(\w+\)s|\[\d+\]_|\[[A-Za-z]+\d*\]_|\|\w+\|", ""),  # templates, citations, substitutions
    (r"\s*\(?Read more in the :ref:`[^`]*`\.?\)?", ""),
    (r"`([^`<]+?)\s*<[^`>]*>`__?|:[\w:]+:`([^`<]+?)\s*<[^`>]*>`", r"\1\2"),
    (r":[a-z]+(?::[a-z]+)*:`[~!]?([^`]*)`|``?[~!]?([^`]*)``?_{0,2}", r"\1\2"),
    (r"(?:https?|ftp)://\S+|doi:\S+", ""),
    (r"\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}", r"\1"),
    (r"\\leq?\b", "<="),
    (r"\\geq?\b", ">="),
    (r"\\(?:mathrm|mathbf|mathcal|mathbb|text|left|right|displaystyle)\b|[\\{}$]", ""),
    (rf"\b(?:{LIBRARIES})(?:\.\w+)*\.(\w+)", r"\1"),  # scipy.stats.norm -> norm
    (rf"(?i)\b(?:{LIBRARIES})(?:'s)?\s+(?=[\w.])", ""),
    (rf"(?i)\b(?:{LIBRARIES})\b", "the library"),
    (r"\b([Aa]) (?=array|ndarray|estimator|object)", r"\1n "),
    (r"\s+([.,;:)])(?=\s|$)", r"\1"),
    (r"\(\s*\)|\(\s+", " "),
    (r"\s+", " "),
]
HEADER = re.compile(r"^[ \t]*([A-Z][A-Za-z ]+)[ \t]*\n[ \t]*([-=~])\2{2,}[ \t]*$", re.MULTILINE)
SIGNATURE = re.compile(r"^[\w.]+\s?\(.*\)(\s*->.*)?(\s+--)?$")
ADMONITION = re.compile(r"^\.\. (?:note|warning|tip|hint|important|caution|attention)::\s*")
BULLET = re.compile(r"^(?:[-*+•]|\(?(?:\d{1,2}|[a-z]|#)[.)])\s+")
UNFINISHED = re.compile(r"(?:^|(?<=[\w)][.!?])\s)(?:(?![\w)][.!?]\s).)*[:,]$")  # "given by:"
RULE = re.compile(r"^[-=~^+|#*_ .`]+$")


class Module:
    """Public objects of a source file, read from its syntax tree."""

    def __init__(self, parts: tuple[str, ...], tree: ast.Module) -> None:
        self.stem = parts[-1]
        self.is_public = not any(part.startswith("_") and part != "__init__" for part in parts[1:])
        self.declared: set[str] | None = None  # ``__all__``, where that is a literal
        self.imported: set[str] = set()  # "module.name" of each ``from module import name``
        self.docs: list[tuple[str, str]] = []  # (name or "Class.method", docstring)
        self.added: list[tuple[str, str]] = []  # the same, from ``add_newdoc``
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                members = node.body if isinstance(node, ast.ClassDef) else []
                methods = [member for member in members if isinstance(member, ast.FunctionDef)]
                named = [(node.name, node), *((f"{node.name}.{m.name}", m) for m in methods)]
                self.docs += [(name, ast.get_docstring(item) or "") for name, item in named]
            elif isinstance(node, ast.ImportFrom):
                source = (node.module or "").rpartition(".")[2]
                self.imported |= {f"{source}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                with contextlib.suppress(ValueError):  # put together at run time
                    self.declared = set(ast.literal_eval(node.value))
            elif isinstance(node, ast.Expr) and ast.unparse(node).startswith("add_newdoc("):
                with contextlib.suppress(ValueError):
                    *_, name, value = [ast.literal_eval(part) for part in node.value.args]
                    members = [("", value)] if isinstance(value, str) else value
                    for member, text in [members] if isinstance(members, tuple) else members:
                        self.added.append((f"{name}.{member}".rstrip("."), text))


def find_docs() -> Iterator[tuple[str, str, str, str]]:
    """Yield label, group, name and docstring of all objects, aliases included."""
    for package in PACKAGES:
        modules = defaultdict(list)
        (folder,) = find_spec(package).submodule_search_locations
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_main = parts[0] in ("__init__", "_core", "lib", "matrixlib")
            if SKIPPED.isdisjoint(parts) and (is_main or not parts[0].startswith("_")):
                label = package if is_main else f"{package}.{parts[0]}"
                modules[label].append(Module(parts, ast.parse(path.read_bytes())))
        for label in modules:
            yield from ((label, *doc) for doc in exported_docs(modules[label]))
    for label, names in (("numpy", np), ("scipy.special", scipy.special)):
        for name, value in sorted(vars(names).items()):
            if isinstance(value, np.ufunc):
                yield label, name, name, value.__doc__ or ""
    for name, value in sorted(vars(np.random.Generator).items()):  # each an object of its own
        yield "numpy.random", f"Generator.{name}", f"Generator.{name}", value.__doc__ or ""


def exported_docs(modules: list[Module]) -> Iterator[tuple[str, str, str]]:
    """Yield group, name and docstring of what modules define in public or re-export."""
    exported, size = set(), -1  # "module.name", through any star imports
    while len(exported) > size:
        size = len(exported)
        for module in modules:
            if module.is_public or module.stem == "__init__" or f"{module.stem}.*" in exported:
                exported |= module.imported
    for module in modules:
        is_open = module.is_public or f"{module.stem}.*" in exported
        for name, text in module.docs:
            owner = name.partition(".")[0]
            is_declared = module.declared is None or owner in module.declared
            if (is_open and is_declared) or f"{module.stem}.{owner}" in exported:
                yield owner, name, text
        yield from ((name.partition(".")[0], name, text) for name, text in module.added)


def make_texts() -> dict[str, dict[str, list[list[str]]]]:
    """Return label -> group -> [name, kind, text] of each passage, by label and name."""
    docs: dict[tuple[str, str], tuple[str, str]] = {}
    for label, group, name, text in find_docs():
        if text and not re.search(r"(^|\.)_", name):
            docs.setdefault((label, name), (group, text))  # the first definition, not the aliases
    parsed = [
        (label, group, name, split_docstring(label, name, inspect.cleandoc(text)))
        for (label, name), (group, text) in sorted(docs.items())
    ]
    labels = defaultdict(set)
    for label, _, _, sections in parsed:
        for paragraph in sum(sections.values(), []):
            labels[fold(paragraph)].add(label)
    texts, seen = defaultdict(lambda: defaultdict(list)), set()
    for label, group, name, sections in parsed:
        for kind, paragraphs in sections.items():
            chunks = [""]
            for paragraph in paragraphs:
                key = fold(paragraph)
                if len(labels[key]) == 1 and key not in seen:
                    seen.add(key)
                    if chunks[-1] and len(chunks[-1]) + len(paragraph) > MAX_CHARS:
                        chunks.append("")
                    chunks[-1] = f"{chunks[-1]} {paragraph}".lstrip()
            for chunk in chunks:
                if len(chunk) >= MIN_CHARS and len(chunk.split()) >= MIN_WORDS:
                    texts[label][group].append([name, kind, chunk])
    return texts


def fold(text: str) -> str:
    """Return the letters of a text in lower case, which two copies of it share."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def split_docstring(label: str, name: str, text: str) -> dict[str, list[str]]:
    """Return the clean paragraphs of a docstring, by kind of passage."""
    head, *rest = HEADER.split(text)
    notes = dict(zip(rest[::3], rest[2::3], strict=True)).get("Notes", "")
    blocks = [block for block in re.split(r"\n\s*\n", head.strip()) if block.strip()]
    while blocks and SIGNATURE.match(" ".join(blocks[0].split())):
        del blocks[0]  # compiled functions start with their signature
    is_common = label.startswith("sklearn") and name.rpartition(".")[2] in METHODS
    return {
        "summary": plain_paragraphs("" if is_common else "".join(blocks[:1])),
        "description": plain_paragraphs("\n\n".join(blocks[1:])),
        "notes": plain_paragraphs(notes),
    }


def plain_paragraphs(text: str) -> list[str]:
    """Return the sentences of a piece of reST as paragraphs of one line, without markup."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", "\n".join(prose_lines(text))):
        for pattern, replacement in SUBSTITUTIONS:
            block = re.sub(pattern, replacement, block)
        block = UNFINISHED.sub("", block.strip())
        letters = sum(map(len, re.findall(r"[A-Za-z][a-z]+(?:-[a-z]+)*", block)))
        if letters >= 0.6 * len(block.replace(" ", "")) and " " in block:  # no formula or listing
            paragraphs.append(block)
    return paragraphs


def prose_lines(text: str) -> Iterator[str]:
    """Yield the lines without directives, literal blocks, doctests, tables and bullets."""
    deeper_than: int | None = None
    in_doctest = False
    for line in inspect.cleandoc(text).splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        in_doctest = bool(stripped) and (in_doctest or stripped.startswith(">>>"))
        if deeper_than is not None and (not stripped or indent > deeper_than):
            yield ""
            continue
        deeper_than = None
        is_directive = stripped.startswith(".. ") and not ADMONITION.match(stripped)
        if is_directive or in_doctest or RULE.match(stripped) or stripped.startswith(("|", "+--")):
            deeper_than = indent if is_directive else None
            yield ""
            continue
        if stripped.endswith("::") and ADMONITION.match(stripped):
            stripped = ""
        elif stripped.endswith("::"):
            deeper_than, stripped = indent, stripped.rstrip(": ") + ":"
        yield BULLET.sub("", ADMONITION.sub("", stripped))


def format_json(versions: dict[str, str], texts: dict[str, dict[str, list[list[str]]]]) -> str:
    """Return the content of the file, with one passage a line."""
    dump = partial(json.dumps, ensure_ascii=False)
    labels = []
    for label, groups in texts.items():
        rows = [f"{dump(name)}: [" + ",\n".join(map(dump, groups[name])) + "]" for name in groups]
        labels.append(f"{dump(label)}: {{\n" + ",\n".join(rows) + "\n}")
    return f'{{"versions": {dump(versions)}, "texts": {{\n' + ",\n".join(labels) + "\n}}\n"


def main() -> None:
    """Write the file."""
    versions = {name: version(name) for name in PACKAGES.values()}
    FILE.write_text(format_json(versions, make_texts()), encoding="utf-8")


if __name__ == "__main__":
    main()
