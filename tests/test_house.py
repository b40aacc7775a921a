"""The layout of the package: floors, folders, sizes and names, read from the sources."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "skembed"

# A room is a folder of the package or a module at its root. A room imports rooms on lower floors
# only, so that no two of them know each other. docs/architecture.md shows the same floors.
FLOORS = {
    1: {"exceptions", "_validation", "similarity", "distributed"},
    2: {"_inputs", "_files", "datasets", "history"},
    3: {"cache", "model", "search", "metrics", "embedding", "instructions"},
    4: {"adapters", "evaluation", "plotting"},
    5: {"inference", "training"},
    6: {"streaming"},
    7: {"vectorizer"},
    8: {"estimators", "mteb", "parallel"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# Modules of a few lines that keep a documented path.
DOORS = {"pooling", "quantization", "reranking"}
# Rooms and modules that may import torch when they are imported; all others load without it.
WITH_TORCH = {
    *("model", "adapters", "inference", "streaming", "vectorizer", "estimators", "mteb"),
    *("parallel", "distributed", "search.gpu", "search.hnsw", "search.index"),
    *("training.batches", "training.fit", "training.loop", "training.losses", "training.state"),
    "training.validation",
}
MAX_DOOR_LINES = 10
MAX_FILE_LINES = 700
MAX_BODY_LINES = 50
MAX_ROOT_MODULES = 15
FOLDER_FILES = range(3, 15)


def module_name(path: Path) -> str:
    """Return the dotted name of a source file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name]
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
every_module = pytest.mark.parametrize("name", MODULES)
every_folder = pytest.mark.parametrize("folder", FOLDERS)


@cache
def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def iter_own_imports(name: str) -> Iterator[tuple[int, str]]:
    """Yield (line, imported module of this package), inside functions too."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] != "skembed":
                continue
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in SOURCES:
                parts.pop()  # a name inside a module
            yield node.lineno, ".".join(parts)


def room_of(name: str) -> str:
    return name.split(".")[0]


def may_import_torch(name: str) -> bool:
    """Tell whether a module, named without the package's own name, may load torch."""
    return room_of(name) in WITH_TORCH or name in WITH_TORCH or name in DOORS


# Floors


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name) for name in MODULES}
    assert rooms == set(FLOOR_OF) | DOORS
    assert len(FLOORS) <= 8


@every_module
def test_imports_go_down(name: str) -> None:
    floor = FLOOR_OF.get(room_of(name), len(FLOORS) + 1)  # a door stands above all
    for line, target in iter_own_imports(name):
        where = f"skembed.{name}:{line} imports skembed.{target}"
        if name in DOORS and not target:
            continue
        assert target, f"{where}: the package itself stands above all"
        if room_of(target) != room_of(name):
            assert FLOOR_OF[room_of(target)] < floor, f"{where}: not on a lower floor"


def test_no_circles() -> None:
    imports = {name: {target for _, target in iter_own_imports(name)} for name in MODULES}
    left = dict(imports)
    while left:  # take away what imports nothing that is left; a circle never goes
        free = [name for name, targets in left.items() if not targets & left.keys() - {name}]
        assert free, f"modules that import each other: {sorted(left)}"
        for name in free:
            del left[name]


@every_module
def test_only_some_modules_may_import_torch(name: str) -> None:
    if may_import_torch(name):
        return
    for node in parse(name).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        assert not {target.split(".")[0] for target in names} & {"torch", "transformers"}


def test_no_private_imports_of_transformers() -> None:
    """From transformers' top level only, and no name with a leading underscore."""
    for name in MODULES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert node.module == "transformers", name
                assert not [alias.name for alias in node.names if alias.name.startswith("_")]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert not [n for n in names if n.startswith("transformers.")], name


# Sizes


def test_the_root_is_small() -> None:
    at_root = [name for name in MODULES if "." not in name and name not in FOLDERS]
    doors = [name for name in at_root if count_lines(name) <= MAX_DOOR_LINES]
    assert set(doors) == DOORS
    assert len(at_root) - len(doors) <= MAX_ROOT_MODULES


@every_folder
def test_a_folder_is_neither_a_corridor_nor_a_drawer(folder: str) -> None:
    files = [name for name in MODULES if name.startswith(f"{folder}.")]
    assert len(files) in FOLDER_FILES, f"{folder} has {len(files)} files"


@every_module
def test_a_file_is_short(name: str) -> None:
    assert count_lines(name) <= MAX_FILE_LINES


def count_lines(name: str) -> int:
    return len(SOURCES[name].read_text(encoding="utf-8").splitlines())


@every_module
def test_a_body_is_short(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= MAX_BODY_LINES, f"skembed.{name}:{node.lineno} {node.name}"


# Names


@every_module
def test_no_underscore_stands_for_a_folder(name: str) -> None:
    assert not name.split(".")[-1].startswith("_") or name in {"_files", "_inputs", "_validation"}


@every_module
def test_a_module_says_what_it_exports(name: str) -> None:
    """`__all__` lists every public definition, so that private ones can be told apart."""
    tree = parse(name)
    if len(tree.body) <= 1:  # the `__init__` of a folder that re-exports nothing
        return
    listed = next(
        (
            set(ast.literal_eval(node.value))
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        None,
    )
    assert listed is not None, f"skembed.{name} has no __all__"
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    assert defined <= listed, f"skembed.{name}: {sorted(defined - listed)} not in __all__"


@every_module
def test_private_names_stay_in_their_module(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("skembed"):
            for alias in node.names:
                private = alias.name.startswith("_") and alias.name not in SOURCES
                assert not private, f"skembed.{name}:{node.lineno} imports {alias.name}"


@every_module
def test_no_file_bears_the_name_of_a_public_function(name: str) -> None:
    import skembed

    functions = {n for n in skembed.__all__ if re.match("[a-z]", n)} - {"datasets", "metrics"}
    assert name.split(".")[-1] not in functions


# Tests


def test_tests_mirror_the_folders() -> None:
    """tests/model/test_pooling.py tests skembed/model/pooling.py."""
    for path in sorted((ROOT / "tests").glob("*/test_*.py")):
        folder = path.parent.name
        assert folder in FOLDERS, f"{path.relative_to(ROOT)}: the package has no such folder"
        parts = path.stem.removeprefix("test_")
        modules = [name.split(".")[1] for name in MODULES if name.startswith(f"{folder}.")]
        assert any(parts == m or parts.startswith(f"{m}_") for m in modules), path


def test_test_files_are_short() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, path
