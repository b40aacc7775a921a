"""Configuration of the documentation site.

All pages and all examples::

    python -m sphinx -W -b html docs docs/_build/html

Without running the examples, for a quick look and for CI: add ``-D plot_gallery=0``. Everything
that a page loads lies beside it: no remote fonts, scripts or pictures.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import tqdm.std
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import skembed

matplotlib.use("Agg")  # pictures need no screen

start_bar = tqdm.std.tqdm.__init__


def start_no_bar(bar: tqdm.std.tqdm, *args: Any, **options: Any) -> None:
    """Start a progress bar that shows nothing: pages are no place for one."""
    start_bar(bar, *args, **options | {"disable": True})


tqdm.std.tqdm.__init__ = start_no_bar

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# All that a build writes between the pages; git ignores it.
GENERATED = DOCS / "generated"

project = "skembed"
author = "skembed developers"
copyright = author
version = release = skembed.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_templates", "**/*.ipynb"]
templates_path = ["_templates"]
# `name` in a docstring: code, and a link where it names something of the package.
default_role = "py:obj"

# Markdown, as GitHub reads it; directives in ::: blocks.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# API reference
autosummary_generate = True
autodoc_typehints = "none"  # docstrings state types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the class template lists them
numpydoc_xref_param_type = False

# Gallery
sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples" / "gallery"),
    "gallery_dirs": "generated/gallery",
    "filename_pattern": r"\.py$",  # all of them run
    "within_subsection_order": "sphinx_gallery.sorting.FileNameSortKey",
    "abort_on_example_error": True,
    "doc_module": ("skembed",),
    "backreferences_dir": "generated/backreferences",
    "download_all_examples": False,
    "write_computation_times": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 0,
}

# Pages
smartquotes = False  # "auto" is a value, to be copied as it stands
html_theme = "furo"
html_title = f"skembed {version}"
html_static_path = ["_static"]
html_css_files = ["skembed.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"


# Files beside the folder docs


# Paths in the repository -> pages of the site.
PAGE_OF = {
    "README.md": "/generated/readme.md",
    "CHANGELOG.md": "/changelog.md",
    "benchmarks/README.md": "/generated/results/all_scripts.md",
    "examples/gallery": "/generated/gallery/index.rst",
    "skembed/data/skembed-mini": "/model_card.md",
    "skembed/data/skembed-mini/README.md": "/model_card.md",
}
PATTERNS = {
    r"docs/([\w-]+)\.md": r"/\1.md",
    r"benchmarks/results/([\w-]+)\.md": r"/generated/results/\1.md",
    r"examples/([\w-]+)\.py": r"/generated/scripts/\1.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)\s]+")


def find_page(link: str, folder: str) -> str:
    """Return the page of the site that stands for a link in a file of a folder, or the link."""
    path, mark, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(folder, path))
    if target in PAGE_OF:
        return PAGE_OF[target]
    for pattern, page in PATTERNS.items():
        if re.fullmatch(pattern, target):
            return re.sub(pattern, page, target) + mark + anchor
    return link


def map_links(text: str, folder: str) -> str:
    """Point the links of a Markdown file, which lies in a folder, at pages of the site."""
    return LINK.sub(lambda match: find_page(match[0], folder), text)


def map_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Point the links of a page at pages of the site (event source-read)."""
    if app.env.doc2path(docname).suffix == ".md" and not docname.startswith("generated/"):
        source[0] = map_links(source[0], "docs")


def write_pages(app: Sphinx, config: object) -> None:
    """Write the pages that are made of files beside docs (event config-inited)."""
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    for stub in GENERATED.glob("api/*.rst"):
        if f" {stub.stem}\n" not in api:
            stub.unlink()  # of a name that has left the page
    for name in ("results", "scripts"):
        shutil.rmtree(GENERATED / name, ignore_errors=True)
        (GENERATED / name).mkdir(parents=True)
    for result in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        shutil.copy2(result, GENERATED / "results")
    scripts = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    page = scripts.replace("# Benchmarks", "# All scripts", 1)
    (GENERATED / "results" / "all_scripts.md").write_text(page, encoding="utf-8")
    for script in sorted((ROOT / "examples").glob("*.py")):
        page = f"---\norphan: true\n---\n# {script.name}\n\n"
        page += f":::{{literalinclude}} ../../../examples/{script.name}\n:::\n"
        (GENERATED / "scripts" / f"{script.stem}.md").write_text(page, encoding="utf-8")
    readme = map_links((ROOT / "README.md").read_text(encoding="utf-8"), "")
    readme = readme.replace("# skembed", "# Overview", 1).replace("](LICENSE)", "](../../LICENSE)")
    (GENERATED / "readme.md").write_text(readme, encoding="utf-8")
    card = (ROOT / "skembed" / "data" / "skembed-mini" / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?^---\n\s*# [^\n]*\n", "", card, flags=re.DOTALL | re.MULTILINE)
    (GENERATED / "model_card.txt").write_text(body, encoding="utf-8")


# Formulas: MathML, which browsers show without a script


def visit_formula(writer: Any, node: nodes.Element) -> None:
    """Write a formula in a line of text."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_formula_block(writer: Any, node: nodes.Element) -> None:
    """Write a formula on lines of its own."""
    formula = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="math">{formula}</div>\n')
    raise nodes.SkipNode


def skip_member(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any
) -> bool | None:
    """Keep a class's own methods and properties only (event autodoc-skip-member).

    What scikit-learn adds to each estimator is described there; fields are listed as attributes.
    """
    function = getattr(obj, "fget", obj)
    is_own = str(getattr(function, "__module__", "")).startswith("skembed.")
    return None if is_own and callable(function) else True


def escape_shapes(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Keep "shape (n_features_in_,)" from reading as a link (event autodoc-process-docstring)."""
    lines[:] = [
        re.sub(r"(?<=shape \()[^)]*", lambda match: re.sub(r"_\b", r"\\_", match[0]), line)
        for line in lines
    ]


REMOTE = re.compile(
    r"""<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|srcset|href)=["']?(?:https?:)?//"""
)


def refuse_remote(app: Sphinx, exception: Exception | None) -> None:
    """Fail where a page would load something from elsewhere (event build-finished)."""
    if exception is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        if found := REMOTE.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page} loads something remote: {found[0]}...")


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula_block, None))
    app.connect("config-inited", write_pages)
    app.connect("source-read", map_page)
    app.connect("build-finished", refuse_remote)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", escape_shapes, priority=1)  # before numpydoc
