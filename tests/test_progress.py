"""Progress bars: none unless asked for, none where the environment says so."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from tiny import make_vectorizer

from skembed import ContrastiveTrainer, evaluate, mine_hard_negatives
from skembed.evaluation import STSTask
from skembed.progress import progress_bar

PAIRS = [(f"the card {i}", f"an account {i}") for i in range(4)]
TEXTS = [text for pair in PAIRS for text in pair]


def train(verbose: bool, folder: Path) -> Any:
    trainer = ContrastiveTrainer(max_steps=1, mine_negatives="perc_pos", verbose=verbose)
    return make_vectorizer(trainer=trainer, verbose=verbose).fit(PAIRS)


WORK: dict[str, Callable[[bool, Path], Any]] = {
    "embedding": lambda v, _: make_vectorizer(verbose=v).transform(TEXTS),
    "training": train,
    "streaming": lambda v, f: make_vectorizer(verbose=v).transform_to(TEXTS, f / "a.npy"),
    "mining": lambda v, _: mine_hard_negatives(PAIRS, vectorizer=make_vectorizer(), verbose=v),
    "evaluate": lambda v, _: evaluate(make_vectorizer(), STSTask(PAIRS, [0, 1, 2, 3]), verbose=v),
}
every_work = pytest.mark.parametrize("name", WORK)


@every_work
def test_a_bar_is_shown_where_asked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WORK[name](True, tmp_path)
    assert f"{name}: " in capsys.readouterr().err


@every_work
@pytest.mark.parametrize("verbose", [False, True])
def test_no_bar_unless_asked_or_where_the_environment_hides_them(
    name: str,
    verbose: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if verbose:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    WORK[name](verbose, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_the_environment_may_also_say_no(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert not progress_bar(True, total=1, file=io.StringIO()).disable


def test_one_module_makes_bars() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "skembed").rglob("*.py")}
    assert [n for n, text in texts.items() if re.search("(from|import) tqdm", text)] == [
        "progress.py"
    ]
