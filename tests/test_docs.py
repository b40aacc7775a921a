"""README and docs: their code runs, their links lead somewhere, their numbers are the measured."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_origin

import pytest
from paths import ROOT

import skembed

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
# What a block may be: "text" right after "python" is what that block prints, "{eval-rst}" is for
# the site only.
KINDS = {"python", "python no-run", "sh", "text", "{eval-rst}"}
# Blocks that are shown and not run. Each must need a GPU or a model of the hub; whoever adds one
# changes this number too.
N_NO_RUN = 9
MODULES = sorted(module.name for module in pkgutil.walk_packages(skembed.__path__, "skembed."))


class Block(NamedTuple):
    """A fenced block of a page."""

    info: str
    code: str
    line: int  # of its first line of code
    printed: str | None  # of the "text" block right behind it


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    matches = list(FENCE.finditer(text))
    blocks = []
    for match, after in zip(matches, [*matches[1:], None], strict=False):
        printed = None
        if after is not None and after["info"] == "text":
            is_next = not text[match.end() : after.start()].strip()
            printed = after["code"].rstrip() if is_next else None
        line = text.count("\n", 0, match.start()) + 2
        blocks.append(Block(match["info"].strip(), match["code"], line, printed))
    return blocks


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def load_script(path: Path) -> ModuleType:
    """Import a file that is not part of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def warm_model() -> Iterator[object]:
    """Keep the bundled model loaded while the pages use it one after the other."""
    vectorizer = skembed.NVEmbedVectorizer()
    vectorizer.transform(["warm"])
    yield vectorizer


NO_NAMES = {"skembed.css", "skembed.json"}  # files

# Code


@every_page
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = read_blocks(page)
    assert text.count("```") == 2 * len(blocks), f"{page.name}: a fence is not closed"
    assert {block.info for block in blocks} <= KINDS


@every_page
def test_code_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_model: object
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.info != "python":
            continue
        # The line numbers of a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)  # noqa: S102 -- the pages are part of the repository
        if block.printed is not None:
            where = f"{page.name}:{block.line}"
            assert printed.getvalue().rstrip() == block.printed, where


def test_few_blocks_are_not_run() -> None:
    blocks = [(page.name, block) for page in PAGES for block in read_blocks(page)]
    left_out = [(name, block) for name, block in blocks if "no-run" in block.info]
    assert len(left_out) == N_NO_RUN
    for name, block in left_out:
        assert re.search(r'"nvidia/NV-Embed|"cuda', block.code), f"{name}:{block.line} could run"


@every_page
def test_calls_use_parameters_that_exist(page: Path) -> None:
    """Also in the blocks that are not run."""
    for block in read_blocks(page):
        if not block.info.startswith("python"):
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found = getattr(skembed, node.func.id, None)
                if inspect.isclass(found):
                    known = set(inspect.signature(found).parameters)
                    unknown = {word.arg for word in node.keywords if word.arg} - known
                    assert not unknown, f"{page.name}:{block.line}: {node.func.id} of {unknown}"


def public_classes() -> dict[str, type]:
    """Return the classes of public modules and of the package, by name."""
    found = {}
    for name in [name for name in MODULES if not name.rpartition(".")[2].startswith("_")]:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", [skembed.NVEmbedVectorizer.__name__]):
            if inspect.isclass(value := getattr(module, public, None)):
                found[public] = value
    return found | {name: getattr(skembed, name) for name in skembed.__all__}


@every_page
def test_calls_in_the_text_use_parameters_that_exist(page: Path) -> None:
    """Such as `Retriever(storage="int8")` in a table; spans that are no Python are left out."""
    classes = public_classes()
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        try:
            tree = ast.parse(span.replace("...", "None"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found = classes.get(node.func.id)
                if inspect.isclass(found):
                    known = set(inspect.signature(found).parameters)
                    unknown = {word.arg for word in node.keywords if word.arg} - known
                    assert not unknown, f"{page.name}: `{span}` of {unknown}"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_model: object
) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"


# Links


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_links(page: Path) -> list[str]:
    """Return the targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in find_links(page):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: no {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the project"
        if anchor:
            assert anchor in heading_anchors(target), f"{page.name}: no heading for {link}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in find_links(index)}
    assert set(PAGES) - {index} <= linked


def read_contents() -> list[str]:
    """Return the entries of the site's table of contents, generated pages left out."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^:::\{toctree\}\n(.*?)^:::$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith((":", "generated/"))]


def test_every_page_is_in_the_contents_of_the_site() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert sorted(read_contents()) == sorted(pages)


def read_api() -> list[str]:
    """Return the names that the API page describes, as they are imported."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return re.findall(r"^ {3}(skembed\.[\w.]+)$", text, flags=re.MULTILINE)


def test_api_page_describes_every_public_name() -> None:
    described = []
    for name in read_api():
        module, _, attribute = name.rpartition(".")
        described.append(getattr(importlib.import_module(module), attribute))
    assert len({id(value) for value in described}) == len(described), "a name stands there twice"
    public = {name: getattr(skembed, name) for name in skembed.__all__}
    missing = [
        name
        for name, value in public.items()
        if not inspect.ismodule(value) and not any(value is other for other in described)
    ]
    assert not missing


@pytest.mark.parametrize(
    "module",
    [
        *("metrics", "evaluation", "reranking"),
        *("estimators.classification", "estimators.sts"),
    ],
)
def test_api_page_describes_all_of_a_module(module: str) -> None:
    """Modules whose every public function and class is for users."""
    found = importlib.import_module(f"skembed.{module}")
    described = {name.rpartition(".")[2] for name in read_api()}
    named = {name for name in found.__all__ if callable(getattr(found, name))}
    named -= {name for name in named if get_origin(getattr(found, name))}  # aliases of types
    assert named <= described


@every_page
def test_benchmarks_named_in_commands_exist(page: Path) -> None:
    names = re.findall(r"\bdev\.py bench ([\w-]+)", page.read_text(encoding="utf-8"))
    missing = [name for name in names if not (ROOT / "benchmarks" / f"{name}.py").is_file()]
    assert not missing


def test_benchmarks_page_shows_each_result_below_its_command() -> None:
    """A result belongs to the script that wrote it: its file says which."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    parts = re.findall(r"bench ([\w-]+)\n```\n\n<!-- results:([\w-]+) -->", text)
    assert len(parts) == text.count("<!-- results:") > 0
    for script, name in parts:
        result = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
        assert f"`python benchmarks/{script}.py" in result


@every_page
def test_files_named_in_the_text_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|benchmarks|examples|skembed|docs)/[\w./-]*\w)`", prose(page))
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{page.name} names {missing}"


@every_page
def test_names_of_the_package_in_the_text_exist(page: Path) -> None:
    """Dotted names such as `skembed.metrics.ndcg_at_k`, and test files by their name alone."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bskembed(?:\.[A-Za-z_]\w*)+", text)) - NO_NAMES:
        assert pydoc.locate(name) is not None, f"{page.name} names {name}"
    for name in set(re.findall(r"`(test_\w+\.py)`", text)):
        assert list((ROOT / "tests").rglob(name)), f"{page.name} names {name}"


def test_picture_shows_the_floors_as_they_are() -> None:
    script = load_script(ROOT / "docs" / "architecture_picture.py")
    drawn = script.draw(script.read_floors())
    assert drawn == script.PICTURE.read_text(encoding="utf-8"), f"run `python {script.__file__}`"


# The two commands


def test_readme_gives_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    section = text.partition("## Set up")[2].partition("\n## ")[0]
    commands = re.findall(r"^python3 dev\.py (\w+)\b", section, flags=re.MULTILINE)
    assert commands == ["demo", "test"]


@every_page
def test_commands_are_those_of_the_dev_script(page: Path) -> None:
    dev = load_script(ROOT / "dev.py")
    used = set(re.findall(r"\bdev\.py (\w+)", page.read_text(encoding="utf-8")))
    assert used <= set(dev.COMMANDS)


def test_continuous_integration_calls_the_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "python3 dev.py test" in lines
    assert "python3 dev.py lint" in lines


# Results


@pytest.fixture(scope="module")
def fill_results() -> ModuleType:
    """Return the script that copies measured tables into the pages."""
    return load_script(ROOT / "benchmarks" / "fill_results.py")


@every_page
def test_results_are_those_that_were_measured(page: Path, fill_results: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    # A place may be empty only where there is no result: `fill` leaves it empty there.
    assert fill_results.fill(text, page, ROOT) == text, "run `python3 benchmarks/fill_results.py`"


def test_every_result_is_shown(fill_results: ModuleType) -> None:
    """A misspelt marker would stay empty for ever; this finds the table that nobody shows."""
    measured = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")} - {"README"}
    shown = {
        match["name"]
        for page in PAGES
        for match in fill_results.MARKER.finditer(page.read_text(encoding="utf-8"))
    }
    assert measured <= shown


PAGE = "# Page\n\n<!-- results:speed -->\n{}<!-- /results -->\n\nEnd.\n"


@pytest.fixture
def results_root(tmp_path: Path) -> Path:
    """Return a project with one page in docs/ and one result of two tables."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Read me\n", encoding="utf-8")
    (tmp_path / "docs" / "page.md").write_text(PAGE.format(""), encoding="utf-8")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "speed.md").write_text(
        "# Speed\n\nOn a machine.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nMore.\n\n| c |\n|---|\n",
        encoding="utf-8",
    )
    return tmp_path


def test_fill_writes_the_first_table_and_its_source(
    results_root: Path, fill_results: ModuleType
) -> None:
    page = results_root / "docs" / "page.md"
    filled = fill_results.fill(page.read_text(encoding="utf-8"), page, results_root)
    source = "Machine, versions and all values: [speed](../benchmarks/results/speed.md)."
    body = f"\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{source}\n\n"
    assert filled == PAGE.format(body)
    assert fill_results.fill(filled, page, results_root) == filled


def test_fill_empties_a_place_without_result(results_root: Path, fill_results: ModuleType) -> None:
    page = results_root / "docs" / "page.md"
    (results_root / "benchmarks" / "results" / "speed.md").unlink()
    assert fill_results.fill(PAGE.format("| stale |\n"), page, results_root) == PAGE.format("")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results:speed -->\nno end\n",
        "<!-- /results -->\n",
        "<!-- results:speed -->\n<!-- results:speed -->\n<!-- /results -->\n<!-- /results -->\n",
        "text <!-- results:speed -->\n<!-- /results -->\n",
    ],
    ids=["open", "close", "nested", "not alone"],
)
def test_fill_refuses_markers_that_do_not_pair(
    text: str, results_root: Path, fill_results: ModuleType
) -> None:
    with pytest.raises(fill_results.ResultsError, match="do not pair up"):
        fill_results.fill(text, results_root / "README.md", results_root)


def test_fill_refuses_a_result_without_table(results_root: Path, fill_results: ModuleType) -> None:
    (results_root / "benchmarks" / "results" / "speed.md").write_text("No table.\n")
    page = results_root / "docs" / "page.md"
    with pytest.raises(fill_results.ResultsError, match=r"speed\.md holds no table"):
        fill_results.fill(PAGE.format(""), page, results_root)


def test_fill_script_checks_then_writes(
    results_root: Path,
    fill_results: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fill_results, "ROOT", results_root)
    page = results_root / "docs" / "page.md"
    assert fill_results.main(["--check"]) == 1
    assert page.read_text(encoding="utf-8") == PAGE.format("")
    assert fill_results.main([]) == 0
    assert "| 1 | 2 |" in page.read_text(encoding="utf-8")
    assert fill_results.main(["--check"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "would change: docs/page.md",
        "changed: docs/page.md",
        "would change: nothing",
    ]
