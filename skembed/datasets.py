"""Labelled real text that needs no download: the documentation of installed packages."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.special
from sklearn.utils import Bunch

from skembed._validation import check_int
from skembed.exceptions import SkembedError

__all__ = ["load_docstrings"]

# Import name -> distribution name.
_PACKAGES = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}

# Folders and modules without documentation of their own: tests, build parts, and code vendored
# from other projects under other licences.
_SKIPPED_PARTS = {
    "tests", "externals", "_lib", "f2py", "distutils", "testing", "_typing", "_examples",
    "_testing", "_build_utils", "conftest", "setup", "estimator_checks", "testutils",
    "timer_comparison",
}  # fmt: skip
# scipy.fftpack is the predecessor of scipy.fft, and scipy.misc is empty or gone: the same
# functions described twice would make two labels out of one subject.
_SKIPPED_LABELS = {"scipy.fftpack", "scipy.misc", "numpy.compat"}
# numpy defines its main namespace in these folders (`core` before numpy 2).
_MAIN_NAMESPACE = {"_core", "core", "lib", "matrixlib"}

# The summaries of these scikit-learn methods ("Predict class labels for samples in X.") are the
# same sentence in every subpackage, in slightly different words: they say nothing of the label.
_ESTIMATOR_METHODS = {
    "decision_function", "fit", "fit_predict", "fit_transform", "get_feature_names_out",
    "get_metadata_routing", "get_n_splits", "get_params", "inverse_transform", "partial_fit",
    "predict", "predict_log_proba", "predict_proba", "score", "score_samples", "set_output",
    "set_params", "split", "staged_decision_function", "staged_predict", "staged_predict_proba",
    "transform",
}  # fmt: skip

_MIN_CHARS, _MIN_WORDS = 40, 7  # of a passage: less is a phrase, not a text
_MAX_CHARS = 900  # a longer passage is split between paragraphs
_MIN_BODY_CHARS, _MAX_BODY_CHARS = 120, 2000

_DESCR = """\
{title}
{underline}

Passages of the documentation of the installed numpy, scipy and scikit-learn, each labelled with
the subpackage that it documents. Built offline from the installed sources; the three packages
are distributed under BSD licences.

:Number of texts: {n_texts}
:Number of classes: {n_classes}
:Number of documented objects (groups): {n_groups}
:Number of (summary, body) pairs: {n_pairs}

A docstring gives passages of up to three kinds: its summary, its extended description and its
notes; long ones are split between paragraphs. Code, formulas, tables, references and reST markup
are taken out, and so are module paths, which would give the label away. A paragraph found under
several labels is dropped and one repeated under a single label is kept once, so that boilerplate
neither decides a label nor repeats across objects. All passages about a function, or about a
class and its methods, share one group: split by `groups`, or parts of one docstring end up on
both sides.
"""


class _Module(NamedTuple):
    """What a source file says of public objects."""

    parts: tuple[str, ...]  # path within the package, without ".py"
    declared: set[str] | None  # its ``__all__``, where that is a literal
    imported: set[str]  # "module.name" of each ``from module import name``
    docs: list[tuple[str, str]]  # (name, docstring); name may be "Class.method"
    added_docs: list[tuple[str, str]]  # the same, from ``add_newdoc``

    @property
    def is_public(self) -> bool:
        """Whether no part of the path is private; the first part is the label's."""
        return not any(part.startswith("_") and part != "__init__" for part in self.parts[1:])


class _Doc(NamedTuple):
    """One docstring: where it belongs and what it says."""

    label: str
    name: str  # below the label: "function", "Class" or "Class.method"
    group: str  # qualified name of the function or class
    text: str


class _Passage(NamedTuple):
    """One text of the set, before rare labels are dropped."""

    label: str
    name: str
    group: str
    kind: str
    text: str


def load_docstrings(*, min_per_class: int = 45) -> Bunch:
    """Build a labelled text set from the documentation of numpy, scipy and scikit-learn.

    The set is real technical English, needs no network, and is the same on every machine that
    has the same versions of the three packages. Reading takes a few seconds the first time in a
    process; later calls reuse what was read.

    Parameters
    ----------
    min_per_class : int, default=45
        Subpackages with fewer texts than this are left out, at least 1.

    Returns
    -------
    Bunch
        With these attributes, the first five in one order (by label, then by qualified name,
        then by position in the docstring):

        data : list of str
            The texts, all distinct, 40 to about 900 characters long.
        target : ndarray of shape (n_texts,), dtype int64
            Index of the label of each text in `target_names`.
        groups : ndarray of shape (n_texts,), dtype str
            Qualified name of the function or class that each text documents.
        names : list of str
            Qualified name of the documented object, with the method where it is one.
        kinds : list of str
            ``"summary"``, ``"description"`` or ``"notes"``.
        target_names : list of str
            The labels, sorted: ``"scipy.stats"``, ``"sklearn.linear_model"``, ...; ``"numpy"``
            is the main namespace of numpy.
        pairs : list of tuple of (str, str)
            Summary and body (description and notes) of one object each, for retrieval; all
            summaries are distinct, and so are all bodies.
        versions : dict
            Distribution name to installed version.
        DESCR : str
            Description of the set.

    Raises
    ------
    TypeError
        If `min_per_class` is not an int.
    ValueError
        If `min_per_class` is below 1, or above the size of every subpackage.
    SkembedError
        If the sources of a package are not installed as files.

    Examples
    --------
    >>> from skembed.datasets import load_docstrings
    >>> docs = load_docstrings()
    >>> len(docs.data) == len(docs.target) == len(docs.groups)
    True
    >>> "scipy.stats" in docs.target_names
    True
    """
    check_int(min_per_class, name="min_per_class", owner="load_docstrings", low=1)
    passages = _read_passages()
    counts = Counter(passage.label for passage in passages)
    target_names = sorted(label for label, count in counts.items() if count >= min_per_class)
    if not target_names:
        raise ValueError(
            "The `min_per_class` parameter of `load_docstrings` must be an int in "
            f"[1, {max(counts.values())}] with the installed packages; got {min_per_class}."
        )
    index = {label: position for position, label in enumerate(target_names)}
    return _make_bunch([passage for passage in passages if passage.label in index], index)


def _make_bunch(passages: list[_Passage], index: dict[str, int]) -> Bunch:
    """Number the labels and describe the set."""
    pairs = _make_pairs(passages)
    groups = np.array([passage.group for passage in passages])
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES.values()}
    title = "Documentation of " + ", ".join(f"{k} {v}" for k, v in versions.items())
    return Bunch(
        data=[passage.text for passage in passages],
        target=np.array([index[passage.label] for passage in passages], dtype=np.int64),
        groups=groups,
        names=[f"{passage.label}.{passage.name}" for passage in passages],
        kinds=[passage.kind for passage in passages],
        target_names=list(index),
        pairs=pairs,
        versions=versions,
        DESCR=_DESCR.format(
            title=title,
            underline="=" * len(title),
            n_texts=len(passages),
            n_classes=len(index),
            n_groups=len(np.unique(groups)),
            n_pairs=len(pairs),
        ),
    )


# --- Installed packages -> docstrings ------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _read_passages() -> tuple[_Passage, ...]:
    """Return the passages of all labels, sorted by label and qualified name."""
    docs: dict[tuple[str, str], _Doc] = {}
    for doc in _iter_docs():
        # One name under one label is one object: its first definition stands for the aliases.
        docs.setdefault((doc.label, doc.name), doc)
    return tuple(_make_passages([docs[key] for key in sorted(docs)]))


def _iter_docs() -> Iterator[_Doc]:
    """Yield the docstrings of all public objects, aliases included."""
    for package, distribution in _PACKAGES.items():
        by_label: dict[str, list[_Module]] = defaultdict(list)
        for module in _read_modules(package, distribution):
            by_label[_label(package, module.parts)].append(module)
        for label, modules in by_label.items():
            if label not in _SKIPPED_LABELS:
                yield from _public_docs(label, modules)
    yield from _compiled_docs()


def _read_modules(package: str, distribution: str) -> list[_Module]:
    """Parse the modules of a package, in the order of their paths."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted((path, folder) for folder in folders for path in Path(folder).rglob("*.py"))
    if not files:
        raise SkembedError(
            f"`load_docstrings` reads the .py files of {distribution}, and found none. "
            f"Run: pip install --force-reinstall {distribution}"
        )
    modules = []
    with warnings.catch_warnings():
        # Parsing repeats what the compiler has to say about other people's string escapes.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for path, folder in files:
            parts = path.relative_to(folder).with_suffix("").parts
            is_private = parts[0].startswith("_") and parts[0] not in ("__init__", "_core")
            if not is_private and _SKIPPED_PARTS.isdisjoint(parts):
                modules.append(_read_module(parts, ast.parse(path.read_bytes())))
    return modules


def _read_module(parts: tuple[str, ...], tree: ast.Module) -> _Module:
    """Take from a syntax tree what is needed of it: the trees of scipy fill much memory."""
    module = _Module(parts, None, set(), [], [])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            module.docs.extend(_object_docs(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            module.added_docs.extend(_added_docs(node.value))
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").rpartition(".")[2]
            module.imported.update(f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            with contextlib.suppress(ValueError):  # put together at run time
                module = module._replace(declared=set(ast.literal_eval(node.value)))
    return module


def _exported_names(modules: list[_Module]) -> set[str]:
    """Return what public modules re-export as "module.name", through any star imports."""
    exported: set[str] = set()
    size = -1
    while len(exported) > size:
        size = len(exported)
        for module in modules:
            is_package = module.parts[-1] == "__init__"
            if module.is_public or is_package or f"{module.parts[-1]}.*" in exported:
                exported |= module.imported
    return exported


def _object_docs(node: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield the docstring of a function, or those of a class and its methods."""
    members = node.body if isinstance(node, ast.ClassDef) else []
    methods = [member for member in members if isinstance(member, ast.FunctionDef)]
    named = [(node.name, node), *((f"{node.name}.{method.name}", method) for method in methods)]
    for name, documented in named:
        text = ast.get_docstring(documented)
        if text and not documented.name.startswith("_"):
            yield name, text


def _added_docs(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Yield what ``add_newdoc`` calls say of compiled objects, in numpy and scipy.special."""
    if not (isinstance(call.func, ast.Name) and call.func.id == "add_newdoc"):
        return
    try:
        *_, name, value = [ast.literal_eval(argument) for argument in call.args]
    except ValueError:  # text put together at run time
        return
    # A text for the object itself, or (member, text), or a list of those.
    members = [("", value)] if isinstance(value, str) else value
    for member, text in [members] if isinstance(members, tuple) else members:
        if not name.startswith("_") and not member.startswith("_"):
            yield f"{name}.{member}" if member else name, inspect.cleandoc(text)


def _label(package: str, parts: tuple[str, ...]) -> str:
    """Return the subpackage that documents a module, or the package for its main namespace."""
    is_main = parts[0] == "__init__" or (package == "numpy" and parts[0] in _MAIN_NAMESPACE)
    return package if is_main else f"{package}.{parts[0]}"


def _public_docs(label: str, modules: list[_Module]) -> Iterator[_Doc]:
    """Yield the docstrings that the public modules of a label define or re-export."""
    exported = _exported_names(modules)
    for module in modules:
        stem = module.parts[-1]
        is_open = module.is_public or f"{stem}.*" in exported
        for name, text in module.docs:
            owner = name.partition(".")[0]
            is_declared = module.declared is None or owner in module.declared
            if (is_open and is_declared) or f"{stem}.{owner}" in exported:
                yield _Doc(label, name, f"{label}.{owner}", text)
        for name, text in module.added_docs:
            yield _Doc(label, name, f"{label}.{name.partition('.')[0]}", text)


def _compiled_docs() -> Iterator[_Doc]:
    """Yield documentation that is compiled in: ufuncs and random numbers."""
    for label, module in (("numpy", np), ("scipy.special", scipy.special)):
        for name, value in sorted(vars(module).items()):
            if isinstance(value, np.ufunc) and value.__doc__ and not name.startswith("_"):
                yield _Doc(label, name, f"{label}.{name}", inspect.cleandoc(value.__doc__))
    # The methods of Generator are the functions of the module: each is an object of its own.
    for name, value in sorted(vars(np.random.Generator).items()):
        text = getattr(value, "__doc__", None)
        if text and not name.startswith("_"):
            qualified = f"Generator.{name}"
            yield _Doc(
                "numpy.random", qualified, f"numpy.random.{qualified}", inspect.cleandoc(text)
            )


# --- Docstrings -> passages ----------------------------------------------------------------------


def _make_passages(docs: list[_Doc]) -> Iterator[_Passage]:
    """Yield distinct passages in the order of the docstrings."""
    parsed = [(doc, _docstring_paragraphs(doc)) for doc in docs]
    labels: dict[str, set[str]] = defaultdict(set)
    for doc, sections in parsed:
        for paragraph in (text for _, texts in sections for text in texts):
            labels[_fold(paragraph)].add(doc.label)
    seen: set[str] = set()
    for doc, sections in parsed:
        for kind, paragraphs in sections:
            fresh = []
            for paragraph in paragraphs:
                key = _fold(paragraph)
                if len(labels[key]) == 1 and key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            for text in _chunks(fresh):
                yield _Passage(doc.label, doc.name, doc.group, kind, text)


def _fold(text: str) -> str:
    """Return what two copies of a text have in common: letters, in lower case."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def _chunks(paragraphs: list[str]) -> Iterator[str]:
    """Join paragraphs to passages, and leave out what is too short to be a text."""
    chunks = [""]
    for paragraph in paragraphs:
        if chunks[-1] and len(chunks[-1]) + len(paragraph) > _MAX_CHARS:
            chunks.append("")
        chunks[-1] = f"{chunks[-1]} {paragraph}".lstrip()
    for chunk in chunks:
        if len(chunk) >= _MIN_CHARS and len(chunk.split()) >= _MIN_WORDS:
            yield chunk


def _make_pairs(passages: list[_Passage]) -> list[tuple[str, str]]:
    """Return (summary, body) of each object that has both."""
    bodies: dict[tuple[str, str], list[str]] = defaultdict(list)
    for passage in passages:
        if passage.kind in ("description", "notes"):
            bodies[passage.label, passage.name].append(passage.text)
    pairs = []
    for passage in passages:
        if passage.kind == "summary":
            body = " ".join(bodies[passage.label, passage.name])
            if len(body) >= _MIN_BODY_CHARS:
                pairs.append(
                    (passage.text, textwrap.shorten(body, _MAX_BODY_CHARS, placeholder=""))
                )
    return pairs


_HEADER = re.compile(r"^[ \t]*([A-Z][A-Za-z ]+)[ \t]*\n[ \t]*([-=~])\2{2,}[ \t]*$", re.MULTILINE)
_SIGNATURE = re.compile(r"^[\w.]+\s?\(.*\)(\s*->.*)?(\s+--)?$")


def _docstring_paragraphs(doc: _Doc) -> list[tuple[str, list[str]]]:
    """Return the clean paragraphs of a docstring, by kind of passage."""
    head, *rest = _HEADER.split(doc.text)
    # `split` gives (title, underline character, body) for each section.
    sections = dict(zip(rest[::3], rest[2::3], strict=True))
    blocks = [block for block in re.split(r"\n\s*\n", head.strip()) if block.strip()]
    while blocks and _SIGNATURE.match(" ".join(blocks[0].split())):
        del blocks[0]  # compiled functions start with their signature
    summary = _paragraphs(blocks[0]) if blocks else []
    if doc.label.startswith("sklearn") and doc.name.rpartition(".")[2] in _ESTIMATOR_METHODS:
        summary = []
    return [
        ("summary", summary),
        ("description", _paragraphs("\n\n".join(blocks[1:]))),
        ("notes", _paragraphs(sections.get("Notes", ""))),
    ]


# --- reST -> plain text --------------------------------------------------------------------------

_ADMONITION = re.compile(r"^\.\. (?:note|warning|tip|hint|important|caution|attention)::\s*")
_BULLET = re.compile(r"^(?:[-*+•]|\(?(?:\d{1,2}|[a-z]|#)[.)])\s+")
# A last sentence that only leads to a formula or listing, now gone: "... is given by:".
_UNFINISHED = re.compile(r"(?:^|(?<=[\w)][.!?])\s)(?:(?![\w)][.!?]\s).)*[:,]$")
_RULE = re.compile(r"^[-=~^+|#*_ .`]+$")


def _paragraphs(text: str) -> list[str]:
    """Return the natural language of a piece of reST as plain one-line paragraphs."""
    blocks = re.split(r"\n\s*\n", "\n".join(_prose_lines(text)))
    plain = (_UNFINISHED.sub("", _plain(block)) for block in blocks)
    return [paragraph for paragraph in plain if _is_prose(paragraph)]


def _prose_lines(text: str) -> Iterator[str]:
    """Drop directives, literal blocks, doctests and tables; a bullet starts a sentence."""
    skip_deeper_than: int | None = None
    in_doctest = False
    for line in inspect.cleandoc(text).splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        in_doctest = bool(stripped) and (in_doctest or stripped.startswith(">>>"))
        if skip_deeper_than is not None and (not stripped or indent > skip_deeper_than):
            yield ""
            continue
        skip_deeper_than = None
        if stripped.startswith(".. ") and not _ADMONITION.match(stripped):
            skip_deeper_than = indent
            yield ""
        elif in_doctest or _RULE.match(stripped) or stripped.startswith(("|", "+--")):
            yield ""
        else:
            if stripped.endswith("::"):
                skip_deeper_than = None if _ADMONITION.match(stripped) else indent
                stripped = stripped.rstrip(": ") + ":" if skip_deeper_than is not None else ""
            yield _BULLET.sub("", _ADMONITION.sub("", stripped))


_LIBRARIES = "numpy|scipy|sklearn|scikit-learn|np|sp"
_SUBSTITUTIONS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\w)-\n\s*(?=\w)", "-"),  # a word broken at its hyphen
        (r"%\(\w+\)s", ""),  # templates filled in at import
        (r"\[\d+\]_|\[[A-Za-z]+\d*\]_|\|\w+\|", ""),  # citations and substitutions
        (r"\s*\(?Read more in the :ref:`[^`]*`\.?\)?", ""),
        (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # `text <target>`_
        (r":[\w:]+:`([^`<]+?)\s*<[^`>]*>`", r"\1"),
        (r":[a-z]+(?::[a-z]+)*:`[~!]?([^`]*)`", r"\1"),
        (r"``?[~!]?([^`]*)``?_{0,2}", r"\1"),
        (r"(?:https?|ftp)://\S+|doi:\S+", ""),
        (r"\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}", r"\1"),
        (r"\\leq?\b", "<="),
        (r"\\geq?\b", ">="),
        (r"\\(?:mathrm|mathbf|mathcal|mathbb|text|left|right|displaystyle)\b|[\\{}$]", ""),
        # A path keeps its last part, which names the object: scipy.stats.norm -> norm.
        (rf"\b(?:{_LIBRARIES})(?:\.\w+)*\.(\w+)", r"\1"),
        (rf"(?i)\b(?:{_LIBRARIES})(?:'s)?\s+(?=[\w.])", ""),
        (rf"(?i)\b(?:{_LIBRARIES})\b", "the library"),
        (r"\b([Aa]) (?=array|ndarray|estimator|object)", r"\1n "),
        (r"\s+([.,;:)])(?=\s|$)", r"\1"),
        (r"\(\s*\)|\(\s+", " "),
        (r"\s+", " "),
    ]
]


def _plain(block: str) -> str:
    """Return a reST paragraph without its markup and without module paths."""
    for pattern, replacement in _SUBSTITUTIONS:
        block = pattern.sub(replacement, block)
    return block.strip()


def _is_prose(text: str) -> bool:
    """Tell sentences from formulas and listings: most characters belong to words."""
    letters = sum(len(word) for word in re.findall(r"[A-Za-z][a-z]+(?:-[a-z]+)*", text))
    return letters >= 0.6 * len(text.replace(" ", "")) and " " in text
