"""The demo script: its splits, its table, and a whole run with its map on a small stand-in set."""

import importlib.util
import json

import numpy as np
import pytest
from paths import ROOT
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.utils import Bunch

import skembed


class FakeVectorizer(TransformerMixin, BaseEstimator):
    """Hashed words in the place of embeddings: no weights, no torch."""

    def __init__(self, model="skembed-mini"):
        self.model = model

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return HashingVectorizer(n_features=64).transform(X).toarray().astype(np.float32)


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setitem(vars(skembed), "NVEmbedVectorizer", FakeVectorizer)
    spec = importlib.util.spec_from_file_location(
        "docstrings_demo", ROOT / "examples" / "docstrings_demo.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_docs():
    words = {"numpy.fruit": "apple pear plum fig", "scipy.metal": "iron zinc tin lead"}
    rng = np.random.default_rng(0)
    data, target, groups = [], [], []
    for label, vocabulary in enumerate(words.values()):
        for position in range(100):
            data.append(f"text {position} of " + " ".join(rng.choice(vocabulary.split(), 6)))
            target.append(label)
            groups.append(f"{label}.{position // 2:02}")
    return Bunch(
        data=data,
        target=np.array(target),
        groups=np.array(groups),
        target_names=list(words),
        versions={"numpy": np.__version__},
    )


def test_few_shot_splits_are_balanced_nested_and_held_out(demo):
    target = np.repeat([0, 1, 2], [50, 30, 20])
    folds = [
        (np.arange(0, 100, 2), np.arange(1, 100, 2)),
        (np.arange(1, 100, 2), np.arange(0, 100, 2)),
    ]
    small = demo.few_shot_splits(target, folds, shots=4, n_draws=3)
    large = demo.few_shot_splits(target, folds, shots=8, n_draws=3)
    assert len(small) == 3
    for (few, test), (more, same_test), fold in zip(small, large, [*folds, folds[0]], strict=True):
        assert np.bincount(target[few]).tolist() == [4, 4, 4]
        assert set(few) < set(more) <= set(fold[0])
        assert np.array_equal(test, fold[1]) and np.array_equal(test, same_test)
    assert set(small[0][0]) != set(small[2][0])  # the same fold, another draw
    again = demo.few_shot_splits(target, folds, shots=4, n_draws=3)
    assert np.array_equal(small[2][0], again[2][0])


def test_table_is_aligned_and_says_the_gain(demo):
    def result(setting, method, accuracy, seconds, n_train):
        return {
            "setting": setting,
            "method": method,
            "accuracy": accuracy,
            "seconds": seconds,
            "n_train": n_train,
        }

    table = demo.format_table(
        [
            result("4 per class", "TF-IDF", [0.25, 0.35], 1.25, 100),
            result("4 per class", "skembed", [0.5, 0.5], 0.5, 100),
            result("all", "TF-IDF", [0.75], 100.0, 4000),
            result("all", "skembed", [0.7], 12.0, 4000),
        ]
    )
    head, rule, first, last = table.split("\n")
    assert len({len(head), len(rule), len(first), len(last)}) == 1
    assert head.split("  ")[0] == "labelled texts"
    assert head.index("TF-IDF accuracy") < head.index("skembed accuracy") < head.index("gain")
    assert "4 per class (100)" in first and "0.300 ± 0.050" in first and first.endswith("+0.200")
    assert "all (4,000)" in last and "100.0" in last and last.endswith("-0.050")


def test_whole_run(demo, monkeypatch, tmp_path, capsys):
    for package in ("matplotlib", "umap"):
        pytest.importorskip(package, reason="the demo draws: pip install skembed[plot]")
    maps = []
    draw = demo.EmbeddingMapDisplay.from_embeddings
    kept = staticmethod(lambda *args, **options: maps.append(draw(*args, **options)))
    monkeypatch.setattr(demo.EmbeddingMapDisplay, "from_embeddings", kept)
    monkeypatch.setattr(demo, "load_docstrings", make_docs)
    demo.main(["--output", str(tmp_path / "out"), "--quick"])
    printed = capsys.readouterr().out
    assert "4 per class (8)" in printed and "16 per class (32)" in printed
    picture = (tmp_path / "out" / "map.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    (found,) = maps
    assert [note.get_text() for note in found.annotations_] == ["numpy.fruit", "scipy.metal"]
    assert found.ax_.get_title(loc="left").endswith("embedded by skembed-mini")
    assert found.reducer_.metric == "cosine" and found.reducer_.min_dist == 0.3
    report = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert report["embedding_dim"] == 64
    assert report["n_texts"] == len(found.coordinates) < 200  # --quick
    assert len(report["results"]) == 8
    assert {len(r["accuracy"]) for r in report["results"]} == {2, 3}
    for result in report["results"]:
        if result["setting"] == "all":
            assert np.mean(result["accuracy"]) > 0.95


def test_missing_package_is_told_before_the_work(demo, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "load_docstrings", lambda: pytest.fail("worked first"))
    with pytest.raises(SystemExit, match=r"needs `umap`.*pip install skembed\[plot\]"):
        demo.main([])


def test_bad_draws(demo, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--draws", "0"])
    assert "--draws must be at least 1; got 0" in capsys.readouterr().err
