"""How many functions a text passes: the counting, and the aims of benchmarks/way_of_the_data.py."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import pytest
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Return the benchmark; its folder is on the path only here."""
    with pytest.MonkeyPatch.context() as patch:
        # Set by what it imports; left in place, they would hang forked processes of later tests.
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(BENCHMARKS))
        yield __import__("way_of_the_data")
        for name in ("way_of_the_data", "_common", "_results"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def ways(script: ModuleType) -> dict[str, tuple[int, int]]:
    """Count every call once for all tests."""
    return script.count_ways(2)


@pytest.mark.parametrize(
    "name", ["transform, cached", "transform, new", "fit on pairs", "search, texts", "transform_to"]
)
def test_a_call_runs_no_more_functions_than_its_aim(
    name: str, script: ModuleType, ways: dict[str, tuple[int, int]]
) -> None:
    found = dict(zip(("functions", "files"), ways[name], strict=True))
    most = {kind: 1.1 * aim for kind, aim in zip(found, script.AIMS[name], strict=False)}
    over = {kind: found[kind] for kind in most if found[kind] > most[kind]}
    assert not over, f"{name}: {over}, within 10 % of the aim {script.AIMS[name]}"


def test_every_aim_is_counted(script: ModuleType, ways: dict[str, tuple[int, int]]) -> None:
    assert set(script.AIMS) <= set(ways)
    assert {"search, vectors", "evaluate"} <= set(ways)
    assert all(functions >= files > 0 for functions, files in ways.values())


def test_a_function_counts_once_and_in_every_thread(script: ModuleType) -> None:
    def run() -> None:
        for _ in range(3):
            functools.cmp_to_key(lambda a, b: 0)
            textwrap.dedent("a")
        thread = threading.Thread(target=json.loads, args=("[1]",))
        thread.start()
        thread.join()

    import json
    import textwrap

    in_thread = script.count(run, "json")
    assert in_thread.functions >= 2  # `loads` and `decode`
    assert in_thread.files == 2
    assert script.count(lambda: [i for i in range(3)], "json") == (0, 0)


def test_a_package_that_is_missing_is_told(script: ModuleType) -> None:
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        script.count(lambda: None, "no_such_package")
