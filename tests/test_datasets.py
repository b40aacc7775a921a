"""The docstring set: what it promises of labels, texts, groups and order."""

import hashlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections import defaultdict

import numpy as np
import pytest
from paths import ROOT
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from skembed.datasets import load_docstrings

DATA = ROOT / "skembed" / "data"
MAKER = ROOT / "benchmarks" / "_make_docstrings.py"


@pytest.fixture(scope="module")
def docs():
    return load_docstrings()


def test_size_and_shapes(docs):
    assert len(docs.data) >= 3000
    assert 15 <= len(docs.target_names) <= 35
    assert docs.target.dtype == np.int64
    assert len(docs.data) == len(docs.target) == len(docs.groups)
    assert len(docs.data) == len(docs.names) == len(docs.kinds)
    assert set(docs.kinds) == {"summary", "description", "notes"}
    assert docs.target_names == sorted(docs.target_names)
    assert {"numpy", "scipy.stats", "sklearn.metrics"} <= set(docs.target_names)
    counts = np.bincount(docs.target, minlength=len(docs.target_names))
    assert counts.min() >= 45


def test_texts_are_distinct_sentences_without_markup(docs):
    folded = [re.sub(r"[^a-z]+", " ", text.lower()) for text in docs.data]
    assert len(set(folded)) == len(folded)
    assert not [text for text in docs.data if ">>>" in text or "``" in text or "\n" in text]
    assert not [
        text for text in docs.data if re.search(r":[a-z]+:`|\.\. [a-z]+::|\\|https?:", text)
    ]
    assert min(map(len, docs.data)) >= 40
    assert min(len(text.split()) for text in docs.data) >= 7
    assert np.mean([len(text) > 900 for text in docs.data]) < 0.01
    # A bare formula has no sentences to speak of.
    letters = [sum(c.isalpha() or c == " " for c in text) / len(text) for text in docs.data]
    assert np.quantile(letters, 0.01) > 0.7


def test_labels_are_not_spelled_in_the_texts(docs):
    labels = [docs.target_names[position] for position in docs.target]
    dotted = [name for name in docs.target_names if "." in name]
    assert not [text for text in docs.data if any(name in text for name in dotted)]
    assert sum(bool(re.search(r"\b(?:numpy|scipy|sklearn)\b", text)) for text in docs.data) == 0
    # Some last parts are everyday words ("signal", "sparse"); the made-up ones must be rare.
    made_up = re.compile(r"linalg|linear_model|model_selection|ndimage|fft|stats|ma")
    tails = [label.rpartition(".")[2] for label in labels]
    spelled = [
        bool(re.search(rf"\b{tail}\b", text))
        for tail, text in zip(tails, docs.data, strict=True)
        if made_up.fullmatch(tail)
    ]
    assert np.mean(spelled) < 0.03


def test_groups_hold_whole_objects(docs):
    labels_of = defaultdict(set)
    for group, name, position in zip(docs.groups, docs.names, docs.target, strict=True):
        assert name == group or name.startswith(group + ".")
        labels_of[group].add(position)
    assert all(len(labels) == 1 for labels in labels_of.values())
    # A class and its methods are one group; the methods of Generator are functions of a module.
    members = {
        name
        for name, group in zip(docs.names, docs.groups, strict=True)
        if group == "scipy.stats.rv_continuous"
    }
    assert len(members) > 3
    assert "numpy.random.Generator.gamma" in docs.groups
    assert not [name for name in docs.names if "._" in name]


def test_objects_are_found_where_they_are_documented(docs):
    names = set(docs.names)
    assert "scipy.signal.butter" in names  # re-exported through three private modules
    assert {"numpy.add", "scipy.special.gamma", "numpy.ndarray.flat"} <= names  # compiled
    assert "numpy.concatenate" in names and "numpy.random.Generator.normal" in names
    assert "sklearn.metrics.RocCurveDisplay" in names
    # Predecessors of other modules, and helpers of tests.
    assert not [name for name in names if re.search(r"\.fftpack\.|assert_.*equal", name)]


def test_pairs_are_summary_and_body(docs):
    assert len(docs.pairs) > 500
    summaries, bodies = zip(*docs.pairs, strict=True)
    assert len(set(summaries)) == len(summaries)
    assert len(set(bodies)) == len(bodies)
    texts = {text for text, kind in zip(docs.data, docs.kinds, strict=True) if kind == "summary"}
    assert set(summaries) <= texts
    assert min(map(len, bodies)) >= 120
    assert max(map(len, bodies)) <= 2000
    assert not [summary for summary, body in docs.pairs if summary in body]


def test_versions_and_description(docs):
    assert set(docs.versions) == {"numpy", "scipy", "scikit-learn"}
    licences = (DATA / "docstrings.LICENSES.md").read_text(encoding="utf-8")
    for name, version in docs.versions.items():
        assert f"{name} {version}" in docs.DESCR
        assert f"## {name} {version}\n" in licences
    assert f":Number of texts: {len(docs.data)}" in docs.DESCR
    assert "BSD" in docs.DESCR


def test_callers_do_not_share_a_result(docs):
    other = load_docstrings()
    other.data.clear()
    other.pairs.clear()
    other.target[:] = -1
    fresh = load_docstrings()
    assert fresh.data == docs.data
    assert fresh.pairs == docs.pairs
    assert np.array_equal(fresh.target, docs.target)


def digest(docs):
    content = repr((docs.data, docs.target.tolist(), docs.groups.tolist(), docs.pairs))
    return hashlib.sha256(content.encode()).hexdigest()


def test_same_order_in_any_process_without_torch_or_warnings(docs):
    code = (
        "import hashlib, sys\n"
        "from skembed.datasets import load_docstrings\n"
        "docs = load_docstrings()\n"
        "found = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "found |= {'scipy.signal', 'sklearn.linear_model'} & set(sys.modules)\n"
        "content = repr((docs.data, docs.target.tolist(), docs.groups.tolist(), docs.pairs))\n"
        "print(hashlib.sha256(content.encode()).hexdigest(), sorted(found))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(maxsplit=1) == [digest(docs), "[]\n"]


def test_min_per_class(docs):
    few = load_docstrings(min_per_class=200)
    assert set(few.target_names) < set(docs.target_names)
    assert np.bincount(few.target).min() >= 200
    assert sorted(set(few.target)) == list(range(len(few.target_names)))
    kept = [
        t
        for t, i in zip(docs.data, docs.target, strict=True)
        if docs.target_names[i] in few.target_names
    ]
    assert few.data == kept


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (10**6, ValueError), (2.5, TypeError), ("9", TypeError)]
)
def test_bad_min_per_class(value, error):
    with pytest.raises(error, match=r"`min_per_class` parameter of `load_docstrings`"):
        load_docstrings(min_per_class=value)


def test_the_labels_can_be_learned_and_do_not_leak(docs):
    # Other objects than those trained on: well above the share of the largest class (15 %),
    # well below what texts that name their label would give.
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), RidgeClassifier())
    cv = GroupKFold(2)
    scores = cross_val_score(model, docs.data, docs.target, groups=docs.groups, cv=cv)
    assert 0.5 < scores.mean() < 0.9


def test_the_file_is_small_and_can_be_made_again(docs):
    content = (DATA / "docstrings.json").read_bytes()
    assert len(content) <= 1.5e6
    installed = {name: importlib.metadata.version(name) for name in docs.versions}
    if installed != docs.versions:
        pytest.skip(f"the texts are those of {docs.versions}; installed are {installed}")
    make_texts = runpy.run_path(str(MAKER))["make_texts"]
    with warnings.catch_warnings():
        # Parsing repeats what the compiler has to say about other people's string escapes.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        assert make_texts() == json.loads(content)["texts"]
