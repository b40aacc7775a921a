"""States of training that are damaged, forged, or in use by another run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import assert_ours, mutate
from paths import ROOT
from safetensors.torch import load_file, save_file
from saved_indexes import DAMAGES
from tiny import weights
from training_runs import LABELS, RUNS, TEXTS, assert_same, make, read_state

from skembed import NVEmbedVectorizer
from skembed.exceptions import CheckpointError
from skembed.inference.registry import registry
from skembed.training import state as state_module
from skembed.training.state import STATE_FILE, Checkpoints, check_values

Tensors = dict[str, torch.Tensor]


def make_run(folder: Path, **more: Any) -> NVEmbedVectorizer:
    """Return the vectorizer of a run with all that a state may hold: mined negatives, a best."""
    return make(**{**RUNS["everything"][0], "max_steps": 4, "checkpoint_dir": folder, **more})


def fit(folder: Path, **more: Any) -> NVEmbedVectorizer:
    return make_run(folder, **more).fit(RUNS["everything"][1])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NVEmbedVectorizer]:
    """A folder with the state after two of four steps, and what the run gave in the end."""
    folder, kept = tmp_path_factory.mktemp("run") / "run", tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        write = Checkpoints.write

        def keep(self: Checkpoints, tensors: Any, values: Any) -> None:
            write(self, tensors, values)
            if values["step"] == 2:
                shutil.copy(self.path, kept)

        patch.setattr(Checkpoints, "write", keep)
        fitted = fit(folder)
    return kept, fitted


@pytest.fixture
def run(interrupted: tuple[Path, NVEmbedVectorizer], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(interrupted[0], tmp_path / "run")


def sign(folder: Path, tensors: Tensors, header: dict[str, Any]) -> None:
    """Write a state with the checksum that fits it, as a forger would."""
    header = {name: value for name, value in header.items() if name != "crc32"}
    header["crc32"] = state_module._sum_state(tensors, header)
    save_file(tensors, folder / STATE_FILE, metadata={"skembed": json.dumps(header)})


def test_the_interrupted_run_goes_on(
    run: Path, interrupted: tuple[Path, NVEmbedVectorizer], steps: list[int]
) -> None:
    sign(run, load_file(run / STATE_FILE), read_state(run))
    assert_same(weights(fit(run)), weights(interrupted[1]))
    assert len(steps) == 2


BAD_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda t: None,
    "one element": lambda t: t.reshape(-1)[:1].clone(),
    "empty": lambda t: t.reshape(-1)[:0].clone(),
    "an axis more": lambda t: t[None].clone(),
    "half": lambda t: t.double() if t.is_floating_point() else t.int(),
    "float16": lambda t: t.half(),
    "not a number": lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t + 999,
    "infinite": lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t - 999,
    "low": lambda t: (
        torch.full_like(t, -2)
        if t.ndim == 0
        else torch.full_like(t, -torch.inf)
        if t.is_floating_point()
        else torch.full_like(t, -2)
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_no_tensor_of_another_kind_reaches_the_optimiser(
    bad: str, run: Path, steps: list[int]
) -> None:
    tensors, header = load_file(run / STATE_FILE), read_state(run)
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq", "step", "best", "mined"}
    for kind in sorted(kinds):
        name = next(name for name in sorted(tensors) if name.startswith(f"{kind}/"))
        changed = BAD_TENSORS[bad](tensors[name])
        others = {key: value for key, value in tensors.items() if key != name}
        sign(run, others if changed is None else {**others, name: changed}, header)
        with pytest.raises(CheckpointError, match=r"tensor '\w+/[^']+'.*Delete the file"):
            fit(run)
    assert steps == []


def test_negative_second_moments_and_unknown_tensors(run: Path) -> None:
    tensors, header = load_file(run / STATE_FILE), read_state(run)
    name = next(name for name in tensors if name.startswith("exp_avg_sq/"))
    for changed in (
        {**tensors, name: tensors[name] - 1.0},
        {**tensors, "foreign": torch.zeros(1)},
        {**tensors, "exp_avg/foreign": torch.zeros(1)},
        {**tensors, "mined/1": tensors["mined/0"].clone()},
    ):
        sign(run, changed, header)
        with pytest.raises(CheckpointError, match="has the tensor|no training leaves"):
            fit(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 10**9}, r"its step must lie in \[1, 4\]; got 1000000000"),
        ({"step": 0}, r"its step must lie in \[1, 4\]; got 0"),
        ({"step": -1}, r"must have a field 'step' \(int\); got -1"),
        ({"step": True}, r"a field 'step' \(int\); got True"),
        ({"step": "2"}, "a field 'step'"),
        ({"step": 1}, "its history does not have 1 steps"),
        ({"step": 3}, "its history does not have 3 steps"),
        ({"done": True}, "it is done at step 2 of 4"),
        ({"done": 1}, "a field 'done'"),
        ({"n_worse": -1}, "a field 'n_worse'"),
        ({"best_score": float("nan")}, "its best_score must be finite; got nan"),
        ({"best_score": 10**400}, "its best_score must be finite"),
        ({"best_score": "1"}, "a field 'best_score'"),
        ({"history": []}, "a field 'history'"),
        ({"history": {}}, "a field 'steps'"),
    ],
    ids=str,
)
def test_values_of_no_run(change: dict[str, Any], message: str, run: Path, steps: Any) -> None:
    header = read_state(run)
    header["values"] |= change
    sign(run, load_file(run / STATE_FILE), header)
    with pytest.raises(CheckpointError, match=rf"holds a {STATE_FILE} that is damaged.*{message}"):
        fit(run)
    assert steps == []


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": seed} for seed in (None, "0", -1, 2**32, 10**30, True, 1.0, [])),
        *({"identity": identity} for identity in (None, [], "x", 3)),
        *({"values": values} for values in (None, [], {}, 3)),
        *({"version": version} for version in (None, "2", True, 3, -1, 2.0)),
        *({"crc32": crc32} for crc32 in (None, "0", 2**40)),
    ],
    ids=str,
)
def test_headers_of_no_state(change: dict[str, Any], run: Path, steps: Any) -> None:
    header = {**read_state(run), **change}
    if "crc32" in change:
        save_file(
            load_file(run / STATE_FILE), run / STATE_FILE, metadata={"skembed": json.dumps(header)}
        )
    else:
        sign(run, load_file(run / STATE_FILE), header)
    with pytest.raises(CheckpointError, match="damaged|of version 3;|another"):
        fit(run)
    assert steps == []


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 5, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x"),
    *([], [0], {}, {"x": 1}, "early", "interrupted"),
]


def change_everywhere(value: Any) -> Any:
    """Yield copies of a JSON value, each with one part changed, removed or added."""
    if isinstance(value, dict):
        for name in value:
            rest = {key: each for key, each in value.items() if key != name}
            yield rest
            yield from ({**rest, name: changed} for changed in change_everywhere(value[name]))
        yield {**value, "foreign": 1}
    if isinstance(value, list) and value:
        yield from (value[:-1], [*value, value[-1]])
        yield from ([*value[:-1], changed] for changed in change_everywhere(value[-1]))
    yield from VALUES


def test_any_change_of_the_values_is_refused_or_of_no_consequence(run: Path) -> None:
    values, n_read = read_state(run)["values"], 0
    for changed in change_everywhere(values):
        try:
            check_values(changed, n_steps=4, may_stop=True)
        except CheckpointError as error:
            assert re.search(r"is damaged: .*\. Delete the file to start again", str(error))
            continue
        n_read += 1
        history = changed["history"]
        assert [row["step"] for row in history["steps"]] == [1, 2]
        assert changed["step"] == 2
        assert changed["done"] is False or history["stopped"] == "early"
    assert n_read


def check_seeds(run: Path, seeds: range) -> None:
    """Damage the state at random: it is refused, or read as it was."""
    path = run / STATE_FILE
    content, identity = path.read_bytes(), read_state(run)["identity"]
    tensors, values = Checkpoints(run, identity).read()  # type: ignore[misc]
    for seed in seeds:
        path.write_bytes(mutate(content, seed))
        found = assert_ours(lambda: Checkpoints(run, identity).read(), names=STATE_FILE)
        if found is not None:
            assert found[1] == values
            assert_same(
                {name: each.numpy() for name, each in found[0].items()},
                {name: each.numpy() for name, each in tensors.items()},
            )


def test_random_damage(run: Path) -> None:
    check_seeds(run, range(50))


@pytest.mark.slow
def test_much_random_damage(run: Path) -> None:
    check_seeds(run, range(50, 2_050))


def test_each_flipped_bit_is_seen(run: Path, steps: list[int]) -> None:
    path = run / STATE_FILE
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for place in [*rng.integers(len(content), size=20), len(content) - 1]:
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=STATE_FILE):
            fit(run)
        content[place] ^= 1
    assert steps == []


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d not in ("missing", "another shape")])
def test_what_is_no_state_is_refused_before_the_model_is_loaded(
    damage: str, run: Path, steps: list[int]
) -> None:
    DAMAGES[damage](run / STATE_FILE)
    n_loads = registry.n_loads
    with pytest.raises(CheckpointError, match=f"`checkpoint_dir`.*{STATE_FILE}"):
        fit(run)
    assert steps == []
    if "bit" not in damage:
        assert registry.n_loads == n_loads


# One run at a time


def test_a_second_fit_in_the_folder_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "run", make().fit(TEXTS, LABELS)
    began, go_on = threading.Event(), threading.Event()
    offer = Checkpoints.offer

    def wait(self: Checkpoints, *args: Any) -> None:
        offer(self, *args)
        began.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Checkpoints, "offer", wait)
    emb = make(checkpoint_dir=folder, checkpoint_steps=1)
    first = threading.Thread(target=emb.fit, args=(TEXTS, LABELS))
    first.start()
    try:
        assert began.wait(60)
        for X, y in ((TEXTS, LABELS), (TEXTS[1:], LABELS[1:])):
            n_loads = registry.n_loads
            with pytest.raises(
                BlockingIOError, match=rf"training state in .*\(process {os.getpid()} on"
            ):
                make(checkpoint_dir=folder).fit(X, y)
            assert registry.n_loads == n_loads
        code = (
            "import sys, pathlib, training_runs as runs\n"
            "runs.train_in_child('labels', pathlib.Path(sys.argv[1]), None)"
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        other = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert f"BlockingIOError: [Errno 11] The training state in '{folder}'" in other.stderr
        assert f"process {os.getpid()} on" in other.stderr
    finally:
        go_on.set()
        first.join()
    assert_same(weights(emb), weights(whole))
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
    make(checkpoint_dir=folder).fit(TEXTS, LABELS)


def test_a_fit_that_fails_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("skembed.training.loop._take_step", fail)
        with pytest.raises(RuntimeError, match="stop"):
            make(checkpoint_dir=tmp_path).fit(TEXTS, LABELS)
    assert list(tmp_path.iterdir()) == []
    make(checkpoint_dir=tmp_path).fit(TEXTS, LABELS)


def test_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    numbers = {"random_state": np.int64(0), "learning_rate": np.float32(5e-3), "r": np.int64(2)}
    emb = make(checkpoint_dir=tmp_path, checkpoint_steps=np.int64(1), **numbers).fit(TEXTS, LABELS)
    assert read_state(tmp_path)["seed"] == 0
    assert_same(weights(make(checkpoint_dir=tmp_path, **numbers).fit(TEXTS, LABELS)), weights(emb))


@pytest.mark.parametrize("folder", ["a\0b", "~no such user/x"])
def test_a_folder_of_an_impossible_name(folder: str) -> None:
    with pytest.raises(ValueError, match="`checkpoint_dir` parameter of `ContrastiveTrainer`"):
        make(checkpoint_dir=folder).fit(TEXTS, LABELS)
