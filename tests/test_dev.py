"""dev.py: what each command runs, with pip and the commands themselves left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT


@pytest.fixture
def dev() -> Iterator[ModuleType]:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("dev_script", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def called(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Return what would have been run: ("set_up", extras...) and the arguments of Python."""
    calls: list[tuple[str, ...]] = []

    def step(title: str, *arguments: str | Path) -> int:
        calls.append(tuple(str(argument) for argument in arguments))
        return 0

    monkeypatch.setattr(dev, "set_up", lambda *extras: calls.append(("set_up", *extras)))
    monkeypatch.setattr(dev, "step", step)
    return calls


def test_ci_runs_tests_lint_and_the_pages(dev: ModuleType, called: list[Any]) -> None:
    assert dev.main(["ci"]) == 0
    commands = [" ".join(call) for call in called if call[0] != "set_up"]
    assert commands[0] == "-m pytest"
    assert commands[1:4] == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    assert commands[4:] == ["-m sphinx -W -b html -D plot_gallery=0 docs docs/_build/html"]


def test_ci_goes_on_after_a_failure_and_tells_of_it(
    dev: ModuleType, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "run_test", lambda arguments: 3)
    assert dev.main(["ci"]) == 3
    assert any("sphinx" in call for call in called)


def test_docs_build_the_gallery_too_and_warnings_are_errors(
    dev: ModuleType, called: list[Any]
) -> None:
    assert dev.main(["docs"]) == 0
    assert called[-1] == ("-m", "sphinx", "-W", "-b", "html", "docs", "docs/_build/html")
    assert "docs" in called[0]


def test_ci_script_calls_the_commands_a_user_types() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("python3")]
    assert commands == [
        "python3 dev.py test",
        "python3 dev.py lint",
        "python3 dev.py docs -D plot_gallery=0",
    ]
    assert "set -euo pipefail" in text


def test_bench_without_a_name_lists_and_runs_nothing(
    dev: ModuleType, called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev.main(["bench"]) == 0
    assert called == []
    listed = capsys.readouterr().out
    assert "encode_speed" in listed and "`bench all`" in listed
    assert "fill_results" not in listed and "_common" not in listed


@pytest.mark.parametrize("name", ["all", "retrieval"])
def test_bench_runs_the_script_with_the_peers(
    name: str, dev: ModuleType, called: list[Any]
) -> None:
    assert dev.main(["bench", name, "--gpu"]) == 0
    assert "bench" in called[0]
    assert called[1] == (str(ROOT / "benchmarks" / f"{name}.py"), "--gpu")


def test_unknown_names_are_told(
    dev: ModuleType, called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev.main(["bench", "fill_results"]) == 1
    assert "there is no benchmark 'fill_results'; there are: all, " in capsys.readouterr().err
    assert dev.main(["deploy"]) == 2
    assert "there is no command 'deploy'" in capsys.readouterr().err
    assert dev.main(["lint", "--fix"]) == 1
    assert "`lint` takes no arguments; got --fix." in capsys.readouterr().err
    assert called == []
