"""The package as a whole: exports, lazy imports, optional packages, docstrings."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from numpydoc.validate import validate
from offline import NetworkBlockedError
from paths import ROOT
from test_house import may_import_torch

import skembed

PACKAGE = ROOT / "skembed"

# Import name -> distribution, for the packages that every installation has.
REQUIRED = {
    "huggingface_hub": "huggingface_hub",
    "joblib": "joblib",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
}
OPTIONAL = [
    ("matplotlib", "plot"),
    ("pyarrow", "stream"),
    ("mteb", "mteb"),
    ("pandas", "frame"),
    ("peft", "train"),
    ("plotly", "interactive"),
    ("umap", "plot"),
    ("usearch", "ann"),
]

# numpydoc's checks that docstrings must pass: the summary is one line that ends in a period,
# sections are known, in order and without gaps, parameters are all there, in order, with type
# and description, and what comes back is described.
DOCSTRING_CHECKS = {
    *("GL03", "GL05", "GL06", "GL07", "GL08", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS06"),
    *("PR01", "PR02", "PR03", "PR04", "PR07", "PR10"),
    *("RT01", "RT03", "YD01"),
}


# Reading the sources


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name != "skembed"]
every_source = pytest.mark.parametrize("name", SOURCES)


@cache
def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def iter_imports(name: str) -> Iterator[tuple[ast.stmt, str]]:
    """Yield (statement, dotted name) of each import of a module, inside functions too."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node, f"{prefix}.{alias.name}"


def find_optional_imports() -> set[tuple[str, str]]:
    """Return (module, extra) of each `import_optional` call in the sources."""
    found = set()
    for name in SOURCES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_optional"):
                extra = next(word.value for word in node.keywords if word.arg == "extra")
                found.add((ast.literal_eval(node.args[0]), ast.literal_eval(extra)))
    return found


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The public surface


def test_all_is_sorted_and_complete() -> None:
    assert skembed.__all__ == sorted(set(skembed.__all__))
    assert set(skembed.__all__) == set(skembed._HOMES)
    errors = importlib.import_module("skembed.exceptions")
    assert set(errors.__all__) <= set(skembed.__all__)


def test_type_checkers_see_the_same_names() -> None:
    typed = {
        alias.asname or alias.name
        for block in parse("skembed").body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(skembed.__all__)


@pytest.mark.parametrize("name", skembed.__all__)
def test_public_name_loads_from_its_home(name: str) -> None:
    found = getattr(skembed, name)
    home = found.__name__ if inspect.ismodule(found) else found.__module__
    assert home == skembed._HOMES[name]
    assert name in dir(skembed)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'skembed' has no attribute 'NVEmbedder'"):
        skembed.NVEmbedder  # noqa: B018 -- the access is the test


def test_dir_lists_names_before_they_load() -> None:
    code = "import skembed; print(set(skembed.__all__) - set(dir(skembed)) or 'none missing')"
    assert run_python(code) == "none missing"


def test_import_loads_no_other_package() -> None:
    heavy = [*REQUIRED, *(name for name, _ in OPTIONAL), "polars"]
    code = f"import sys, skembed; print(*sorted(set(sys.modules) & set({heavy!r})))"
    assert run_python(code) == ""


def test_what_needs_no_torch_loads_none() -> None:
    light = [name for name in MODULES if not may_import_torch(name.removeprefix("skembed."))]
    code = f"import sys, {', '.join(light)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_version_is_the_head_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^]]*)\]", changelog, flags=re.MULTILINE)
    assert released[0] == skembed.__version__
    assert importlib.metadata.version("skembed") == skembed.__version__


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# Imports


@every_source
def test_third_party_imports_are_declared(name: str) -> None:
    known = {*REQUIRED, *sys.stdlib_module_names, "skembed"}
    for node, target in iter_imports(name):
        at_import = node in parse(name).body
        if target.split(".")[0] not in known:
            assert not at_import, f"{name}:{node.lineno} imports {target}: only inside a function"


@every_source
def test_no_private_imports(name: str) -> None:
    for node, target in iter_imports(name):
        root, *rest = target.split(".")
        if root in REQUIRED:
            private = [part for part in rest if part.startswith("_")]
            assert not private, f"{name}:{node.lineno} imports {target}"


# House rules


@every_source
def test_source_keeps_the_house_rules(name: str) -> None:
    for node in ast.walk(parse(name)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert"
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in {"print", "exec", "eval", "os.putenv"}, f"{where}: {function}"
            assert not re.fullmatch(r"os\.environ\.(update|setdefault|pop)", function), where
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            assert ast.unparse(node.value) != "os.environ", f"{where}: writes os.environ"


# Packages


def extras_of(distribution: str) -> set[str]:
    return set(importlib.metadata.metadata(distribution).get_all("Provides-Extra") or ())


def test_required_packages_are_the_declared_ones() -> None:
    requirements = importlib.metadata.requires("skembed") or []
    declared = {re.split(r"[^\w.-]", item)[0] for item in requirements if "extra ==" not in item}
    normal = {re.sub(r"[-_.]+", "-", distribution) for distribution in REQUIRED.values()}
    assert {re.sub(r"[-_.]+", "-", distribution) for distribution in declared} == normal


@pytest.mark.parametrize(("module", "extra"), sorted({*OPTIONAL, *find_optional_imports()}))
def test_hidden_optional_package_says_what_to_install(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skembed._validation import import_optional

    assert extra in extras_of("skembed")
    # None is what makes Python itself say "not found"; the parts of a package follow its head.
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(ImportError) as caught:
        import_optional(module, extra=extra, purpose="The test")
    message = str(caught.value)
    assert message.startswith("The test needs ")
    assert f"`{module.split('.')[0]}" in message
    assert f"pip install skembed[{extra}]" in message


# Docstrings


def iter_documented(name: str) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, object) of a public name and of its own public parts."""
    found = getattr(skembed, name)
    if isinstance(found, ModuleType):
        for part in found.__all__:
            yield f"{found.__name__}.{part}", getattr(found, part)
        return
    home = f"{found.__module__}.{found.__qualname__}"
    yield home, found
    for owner in found.__mro__ if inspect.isclass(found) else ():
        if owner.__module__.split(".")[0] == "skembed":
            for part, value in vars(owner).items():
                made = type(value).__module__.split(".")[0] == "sklearn"  # `set_score_request`
                if not part.startswith("_") and not made and not isinstance(value, ModuleType):
                    yield f"{home}.{part}", getattr(owner, part)


def is_plain_exception(found: object) -> bool:
    """Tell whether an object is an exception class, which has no parameters of its own."""
    return inspect.isclass(found) and issubclass(found, BaseException)


def raises_itself(found: object) -> bool:
    """Tell whether the body of a function has a `raise` of its own (not in a nested function)."""
    try:
        source = textwrap.dedent(inspect.getsource(found))  # type: ignore[arg-type]
    except TypeError:  # not a function
        return False
    todo: list[ast.AST] = list(ast.parse(source).body[0].body)  # type: ignore[attr-defined]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))
    return False


@pytest.mark.parametrize("name", skembed.__all__)
def test_docstrings_follow_numpydoc(name: str) -> None:
    wrong = []
    for path, found in iter_documented(name):
        if not (callable(found) or isinstance(found, property)):
            continue  # a constant is described where it is defined
        for code, message in validate(path)["errors"]:
            if is_plain_exception(found) and code.startswith("PR"):
                continue
            if code in DOCSTRING_CHECKS:
                wrong.append(f"{path}: {code} {message}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", skembed.__all__)
def test_docstrings_say_what_is_raised(name: str) -> None:
    for path, found in iter_documented(name):
        if inspect.isroutine(found) and raises_itself(found):
            assert re.search(r"^\s*Raises\n\s*-{6}", found.__doc__ or "", re.MULTILINE), path


# The tests' own fixtures


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 80)])
def test_network_is_blocked(address: tuple[str, int]) -> None:
    with pytest.raises(NetworkBlockedError):
        socket.create_connection(address, timeout=1)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=60).close()


def test_golden_folder_is_complete(golden_dir: Path) -> None:
    files = {path.name for path in golden_dir.iterdir()}
    assert {"config.json", "golden.json", "model.safetensors", "tokenizer.json"} <= files
