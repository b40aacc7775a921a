"""The two-stage example runs end to end on a small folder of the layout that it asks for."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from skembed import NVEmbedVectorizer

SCRIPT = ROOT / "examples" / "two_stage.py"
PAIRS = (
    "squad_question_sentence",
    "medquad",
    "covid_qa_passages",
    "wordnet_definitions",
    "powershell_docs",
    "scitldr",
    "snli_dev_test_triplets",
    "open_trivia_qa",
    "pubmedqa_labelled",
)
THINGS = ("cat", "dog", "tax", "loan", "rain", "snow", "bread", "salt")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in PAIRS:
        rows = [
            {
                "query": f"what is a {thing} in {name}",
                "positive": f"a {thing} is what {name} says of a {thing}",
                "negative": f"nothing about it, but a word on {other}",
            }
            for thing, other in zip(THINGS, reversed(THINGS), strict=True)
        ]
        write_rows(folder / f"train/permissive/pairs/{name}.jsonl.gz", rows)
    for name in ("banking77", "hwu64"):
        rows = [
            {"text": f"{verb} the {thing}", "label": thing}
            for thing in THINGS
            for verb in ("show me", "I lost", "where is")
        ]
        for part in ("train", "test"):
            write_rows(folder / f"eval/classification/{name}/{part}.jsonl.gz", rows)
    rows = [
        {"sentence1": f"a {a}", "sentence2": f"the {b}", "score": 5.0 if a == b else 1.0}
        for a in THINGS
        for b in THINGS[:3]
    ]
    for part in ("train", "test"):
        write_rows(folder / f"eval/sts/stsb/{part}.jsonl.gz", rows)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240
    )


def test_both_stages_run_and_the_adapter_loads(data: Path, tmp_path: Path) -> None:
    done = run("--data", str(data), "--output", str(tmp_path / "out"), "--steps", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage 1: 1 steps" in done.stdout  # fewer examples than a batch holds
    assert "stage 2: 2 steps" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("STS-B test")]
    assert len(table[0].split()[-3:]) == 3
    tuned = NVEmbedVectorizer(tmp_path / "out" / "adapter")
    frozen = NVEmbedVectorizer()
    assert tuned.transform(["a cat"]).shape == (1, 384)
    assert abs(tuned.transform(["a cat"]) - frozen.transform(["a cat"])).max() > 1e-4


def test_missing_data_is_named(tmp_path: Path) -> None:
    done = run("--data", str(tmp_path))
    assert done.returncode != 0
    assert "--data must name the folder" in done.stderr
