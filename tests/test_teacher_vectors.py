"""The script that keeps the teachers' vectors on disk, with a teacher made here."""

import gzip
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from paths import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "ablation")
    import teacher_vectors

    return teacher_vectors


def test_fill_resumes_and_refuses_the_state_of_other_texts(script: ModuleType, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    with gzip.open(tmp_path / "texts" / "toy.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"text  {i % 70}"}) + "\n" for i in range(100))
    texts = script.order_texts(tmp_path)
    assert sorted(texts) == sorted(f"text {i}" for i in range(70))
    calls: list[list[str]] = []

    def toy(batch: list[str], pause: Path) -> tuple[np.ndarray, list[int]]:
        assert not pause.exists()
        calls.append(batch)
        return np.ones((len(batch), 2), dtype=np.float16), [2] * len(batch)

    script.fill(tmp_path, texts, {"toy": toy}, size=30)
    (tmp_path / "toy" / "00001.npz").unlink()
    script.fill(tmp_path, texts, {"toy": toy}, size=30)
    assert calls == [texts[:30], texts[30:60], texts[60:], texts[30:60]]
    shards = [np.load(path)["ids"] for path in sorted((tmp_path / "toy").glob("*.npz"))]
    np.testing.assert_array_equal(np.concatenate(shards), script.text_ids(texts))
    with pytest.raises(ValueError, match="holds other vectors"):
        script.fill(tmp_path, texts[1:], {"toy": toy}, size=30)


def test_batches_hold_each_text_once_and_few_padded_tokens(script: ModuleType):
    lengths = [400, 3, 700, 2, 512, 9]
    batches = list(script.split_batches(lengths))
    assert batches == [[3, 1, 5], [0, 4], [2]]
