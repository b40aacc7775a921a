"""The suite of benchmarks: what runs, what is skipped, how each end is judged, and the index."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
SCRIPTS = sorted(
    path for path in BENCHMARKS.glob("[!_]*.py") if path.stem not in ("all", "fill_results")
)
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return benchmarks/all.py; its folder is on the path only here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("all", "fill_results")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__("all")
    for name in names:
        sys.modules.pop(name, None)


# The scripts


@every_script
def test_benchmark_says_what_it_does_and_how_to_run_it(script: Path) -> None:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert text.splitlines()[0].endswith(".")
    assert f"python benchmarks/{script.name}" in text


@every_script
def test_benchmark_is_listed_with_what_it_measures(script: Path) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert f"| `{script.name}` |" in readme


@every_script
def test_benchmark_has_an_option_for_its_size(script: Path) -> None:
    """So that a short try shows in seconds that it runs."""
    text = script.read_text(encoding="utf-8")
    sizes = "texts|rows|calls|gigabytes|documents|pairs|draws|examples|layers|only"
    assert re.search(rf'"--({sizes})"|texts=\d', text)


@every_script
def test_benchmark_is_on_the_page_where_it_has_a_result(script: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    if list(RESULTS.glob(f"{script.stem}*.json")):
        assert f"python3 dev.py bench {script.stem}\n" in page


# Running them


def write_script(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code, encoding="utf-8")


RESULT = """
import json, os, pathlib, sys
out = pathlib.Path(os.environ["SKEMBED_BENCH_OUT"])
out.mkdir(parents=True, exist_ok=True)
figures = [{{"name": "ratio", "value": 1.25, "bar": "bar >= 1", "holds": "{holds}"}}]
machine = {{"processor": "A processor", "cores": 2}}
record = {{"command": "python benchmarks/{name}.py", "date": "2026-01-02", "machine": machine,
          "seconds": 61.4, "figures": figures}}
(out / "{name}.json").write_text(json.dumps(record))
(out / "{name}.md").write_text("# Title of {name}\\n")
print("measured", *sys.argv[1:])
sys.exit({status})
"""


@pytest.fixture
def folder(tmp_path: Path, suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of scripts that end in every way there is."""
    made = tmp_path / "benchmarks"
    made.mkdir()
    monkeypatch.setattr(suite, "HERE", made)
    write_script(made, "fine", RESULT.format(name="fine", holds="yes", status=0))
    write_script(made, "slow_bar", RESULT.format(name="slow_bar", holds="no", status=1))
    write_script(made, "broken", "print('so far')\nraise OSError('disk full')\n")
    write_script(made, "absent", "import sys\nprint('no data here', file=sys.stderr)\nsys.exit(77)")
    write_script(made, "gpu", RESULT.format(name="gpu", holds="yes", status=0))
    for name in ("_common", "all", "fill_results"):
        write_script(made, name, "raise SystemExit('no benchmark')\n")
    return made


def test_suite_runs_each_and_says_how_it_ended(
    suite: ModuleType, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert suite.main(["--out", str(out)]) == 1
    printed = capfd.readouterr().out
    verdicts = dict(re.findall(r"^(\w+) +(passed|missed a bar|skipped|FAILED)", printed, re.M))
    assert verdicts == {
        "absent": "skipped",
        "broken": "FAILED",
        "fine": "passed",
        "slow_bar": "missed a bar",
    }
    assert re.search(r"absent +skipped after \d+ s: no data here", printed)
    assert re.search(r"broken +FAILED after \d+ s: OSError: disk full", printed)
    assert sorted(path.name for path in out.glob("*.json")) == ["fine.json", "slow_bar.json"]
    index = (out / "README.md").read_text(encoding="utf-8")
    assert (
        "| [Title of fine](fine.md) | `python benchmarks/fine.py` | 2026-01-02, 61 s "
        "| A processor, 2 cores | 1 of 1 |  |"
    ) in index
    assert "| A processor, 2 cores | 0 of 1 | ratio: 1.25 |" in index


def test_suite_takes_the_gpu_on_request_only(
    suite: ModuleType, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suite.find_benchmarks(gpu=False) == ["absent", "broken", "fine", "slow_bar"]
    assert suite.find_benchmarks(gpu=True)[-1] == "gpu"
    options = ["--gpu", "--skip", "absent", "broken", "slow_bar", "--out", str(tmp_path / "out")]
    assert suite.main(options) == 0
    assert re.findall(r"^== (\w+)", capfd.readouterr().out, re.M) == ["fine", "gpu"]


def test_suite_starts_grown_results_anew_on_request(
    suite: ModuleType, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = RESULT.format(name="grown", holds="yes", status=0) + '\n# takes "--fresh"\n'
    write_script(folder, "grown", code)
    options = ["--only", "fine", "grown", "--out", str(tmp_path / "out")]
    suite.main(options)
    assert "measured --fresh" not in capfd.readouterr().out
    suite.main([*options, "--fresh"])
    assert capfd.readouterr().out.count("measured --fresh") == 1  # `fine` has no such option


def test_suite_stops_one_that_takes_too_long(
    suite: ModuleType, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_script(folder, "endless", "import time\nprint('began')\ntime.sleep(600)\n")
    options = ["--only", "endless", "--timeout-s", "2", "--out", str(tmp_path / "out")]
    assert suite.main(options) == 1
    assert re.search(r"endless +FAILED after \d+ s: stopped after 2 s", capfd.readouterr().out)


def test_a_result_of_an_earlier_run_does_not_hide_a_failure(
    suite: ModuleType, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    suite.main(["--only", "fine", "--out", str(out)])
    write_script(folder, "fine", "import sys\nsys.exit('wrong option')\n")
    run = suite.run_benchmark("fine", [], out, 60.0)
    assert (run.verdict, run.reason) == ("FAILED", "wrong option")


def test_suite_knows_the_scripts_there_are(suite: ModuleType) -> None:
    assert set(suite.find_benchmarks(gpu=True)) == {path.stem for path in SCRIPTS}
    assert {name for name in suite.find_benchmarks(gpu=True) if suite.takes_fresh(name)} == {
        "fewshot",
        "finetune",
        "training_speed",
    }
    common = (BENCHMARKS / "_common.py").read_text(encoding="utf-8")
    assert f"EXIT_SKIPPED = {suite.EXIT_SKIPPED}\n" in common


# The index, and places on the page


def test_index_lists_every_result(suite: ModuleType) -> None:
    fill: Any = sys.modules["fill_results"]
    written = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert written == fill.render_index(RESULTS), "run `python3 benchmarks/fill_results.py`"
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert f"]({path.stem}.md) | `{record['command']}` | {record['date']}" in written


def test_a_command_gets_its_place_once_there_is_a_result(suite: ModuleType, tmp_path: Path) -> None:
    fill: Any = sys.modules["fill_results"]
    page = tmp_path / "docs" / "benchmarks.md"
    text = "# Page\n\n```sh\npython3 dev.py bench speed\n```\n\nEnd.\n"
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert fill.fill(text, page, tmp_path) == text
    (results / "speed.md").write_text("# Speed\n\n| a |\n|---|\n| 1 |\n", encoding="utf-8")
    filled = fill.fill(text, page, tmp_path)
    assert "bench speed\n```\n\n<!-- results:speed -->\n\n| a |\n|---|\n| 1 |\n" in filled
    assert filled.endswith("<!-- /results -->\n\nEnd.\n")
    assert fill.fill(filled, page, tmp_path) == filled
    assert fill.fill(text, tmp_path / "docs" / "other.md", tmp_path) == text


# Limits of the forward pass, torch.compile, and the probe of a GPU


HELPERS = ("_common", "_models", "_results", "gpu_training")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that imports a benchmark; its folder is on the path only here."""
    # Set by what it imports; left in place, they would hang forked processes of later tests.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in ("compile", "forward_limits", "gpu_probe", *HELPERS):
        sys.modules.pop(name, None)


@pytest.fixture
def limits(load: Any) -> ModuleType:
    """Return benchmarks/forward_limits.py."""
    module: ModuleType = load("forward_limits")
    return module


BACKBONE = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
}


def test_bytes_of_a_pass_are_those_counted_by_hand(limits: ModuleType) -> None:
    config = limits.NVEmbedConfig(backbone=BACKBONE, pooling="mean")
    norm = 8 + (8 + 8) + (8 + 8)  # length, scaling, weight
    projections = (8 + 4) + (8 + 2) + (8 + 2)  # queries, keys, values
    rotation = (2 + 3 + 4) * (4 + 2)  # swap, product, sum
    gathering, scattering = 2 * (4 + 2 + 2), 2 * 4
    products = (4 + 2) + (2 + 4)  # reads queries and keys; reads values, writes the result
    output = 4 + 8 + 8  # reads the result and the residual, writes the sum
    feed_forward = (8 + 5) + (8 + 5 + 5) + (5 + 8 + 8)  # gate, up, down
    a_layer = 2 * norm + projections + rotation + gathering + products + scattering
    a_layer += output + feed_forward
    once = (8 + 8) + 2 * (4 + 2) + norm + (8 + 8)  # word vectors, tables, last norm, pooled rows
    scores = (1 + 2 + 1) * 2 * (3**2 + 1**2)  # written, softmax, read
    weights = 2 * (8 * 4 + 2 * 8 * 2 + 4 * 8 + 3 * 8 * 5)
    mean = 8 * (2 + 4 + 4 + 8)  # bytes: to float32, then added to the text's sum
    expected = 2 * (4 * (2 * a_layer + once) + 2 * scores + weights) + 4 * mean
    assert limits.count_bytes(config, [3, 1], itemsize=2) == expected


def test_bytes_of_latent_pooling_are_those_counted_by_hand(limits: ModuleType) -> None:
    sizes = {"num_latents_value": 3, "num_cross_heads": 2, "ff_mult": 2}
    mean, latent = (
        limits.count_bytes(
            limits.NVEmbedConfig(backbone=BACKBONE, pooling=pooling, **sizes), [4], itemsize=4
        )
        for pooling in ("mean", "latent")
    )
    norms, softmax = 2 * (8 + 8), 6 + 6
    scores, values = 8 + 6, 6 + 8 + 8
    feed_forward = (8 + 16) + (8 + 16 + 16)  # gate, value
    weights = 2 * 6 * 8 + 3 * 16 * 8
    a_token = norms + scores + softmax + values + feed_forward
    assert latent - mean == 4 * (4 * a_token + weights) + 4 * 16 * (4 + 4 + 4 + 8)


def test_warm_up_is_paid_back_only_by_a_gain(load: Any) -> None:
    count = load("compile").count_texts_to_pay
    assert count(20.0, before_s=3.0, after_s=2.0, n_texts=100) == 2_000
    assert count(20.0, before_s=2.0, after_s=2.0, n_texts=100) == float("inf")
    assert count(20.0, before_s=2.0, after_s=3.0, n_texts=100) == float("inf")


def test_gpu_probe_runs_at_toy_sizes(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_probe.py", "--cpu", "--layers", "1"])
    assert load("gpu_probe").main() == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    for probe in (
        "grouped against padded",
        "forward, padded: {",
        "training, gradient",
        "search on",
    ):
        assert re.search(rf"^{probe}", printed, re.MULTILINE)


def test_a_step_is_timed_without_the_steps_inside(
    limits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 4.0, 6.0])  # outer begins, inner begins and ends, outer ends
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    steps = limits.Steps()
    inner = steps.watch("inner", lambda: 5)
    outer = steps.watch("outer", lambda: inner() + 1)
    assert outer() == 6
    assert dict(steps.spent) == {"inner": 3.0, "outer": 3.0}
