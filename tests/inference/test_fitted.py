"""A fitted estimator and other weights than it was fitted with."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import joblib
import numpy as np
import pytest
from paths import GOLDEN, copy_checkpoint
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny import make_vectorizer

import skembed
from skembed import CheckpointError, ContrastiveTrainer, NVEmbedVectorizer
from skembed.model import sources

TEXTS = ["a card was stolen", "how to open an account?", "a card lost", "close my account"]
LABELS = ["card", "account", "card", "account"]
PAIRS = [("a card", "the card"), ("an account", "my account"), ("a loan", "the loan")]
DESCRIBED = {"card": "a card", "account": "an account"}

# Of each public estimator with a vectorizer: how to fit it, and how to use it.
Use = Callable[[Any], Any]
ESTIMATORS: dict[str, tuple[Callable[[Any], Any], Use]] = {
    "EmbeddingClassifier": (lambda e: e.fit(TEXTS, LABELS), lambda e: e.predict_proba(TEXTS)),
    "EmbeddingClusterer": (
        lambda e: e.set_params(clusterer="kmeans", n_clusters=2, random_state=0).fit(TEXTS),
        lambda e: e.predict(TEXTS),
    ),
    "Reranker": (lambda e: e.fit(PAIRS, [2.0, 1.0, 0.0]), lambda e: e.predict(PAIRS)),
    "Retriever": (lambda e: e.fit(TEXTS), lambda e: e.search(["a card"], top_k=2)),
    "SimilarityRegressor": (lambda e: e.fit(PAIRS, [5.0, 3.0, 1.0]), lambda e: e.predict(PAIRS)),
    "ZeroShotClassifier": (lambda e: e.fit(DESCRIBED), lambda e: e.predict(TEXTS)),
}


def change_weights(folder: Path) -> None:
    """Another model of the same sizes under the same name."""
    path = folder / "config.json"
    text = path.read_text()
    changed = text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e+00')
    assert changed != text
    path.write_text(changed)


def test_every_estimator_with_a_vectorizer_is_listed() -> None:
    classes = [getattr(skembed, name) for name in skembed.__all__]
    found = {
        each.__name__
        for each in classes
        if inspect.isclass(each)
        and issubclass(each, BaseEstimator)
        and "vectorizer" in inspect.signature(each).parameters
    }
    assert found == set(ESTIMATORS)


@pytest.mark.filterwarnings("ignore:Cosines do not rise:skembed.SkembedWarning")
@pytest.mark.parametrize("stored", ["object", "pickle", "joblib"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_changed_weights_are_refused(
    name: str, stored: str, fresh_dir: Path, tmp_path: Path
) -> None:
    fit, use = ESTIMATORS[name]
    estimator = fit(getattr(skembed, name)(make_vectorizer(fresh_dir, trainer=None)))
    use(estimator)
    data = pickle.dumps(estimator)
    joblib.dump(estimator, tmp_path / "stored")
    change_weights(fresh_dir)
    if stored == "pickle":
        estimator = pickle.loads(data)
    elif stored == "joblib":
        estimator = joblib.load(tmp_path / "stored")
    with pytest.raises(CheckpointError, match=r"(?s)fitted with .*model.*fingerprint \w{16}.*now"):
        use(estimator)
    use(fit(clone(estimator)))  # the way back


@pytest.mark.parametrize("change", ["weights", "skembed.json"])
def test_a_pipeline_is_refused(change: str, fresh_dir: Path) -> None:
    pipe = make_pipeline(make_vectorizer(fresh_dir, trainer=None), LogisticRegression())
    pipe.fit(TEXTS, LABELS)
    expected = pipe.predict_proba(TEXTS)
    data = pickle.dumps(pipe)
    if change == "weights":
        change_weights(fresh_dir)
    else:
        (fresh_dir / change).write_text(json.dumps({"max_length": 16, "instructions": True}))
    for each in (pipe, pickle.loads(data)):
        with pytest.raises(CheckpointError, match=str(fresh_dir)) as caught:
            each.predict(TEXTS)
        assert "`fit` again" in str(caught.value)
        if change != "weights":
            assert "`max_length`" in str(caught.value)
            each.set_params(nvembedvectorizer__max_length=512)
            np.testing.assert_allclose(each.predict_proba(TEXTS), expected, atol=1e-6)


def test_an_upgrade_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = NVEmbedVectorizer(cache=None, trainer=None).fit(TEXTS)
    with_weights = clone(bundled).set_params(store_weights=True).fit(TEXTS)
    expected = bundled.transform(TEXTS)
    data, data_with_weights = pickle.dumps(bundled), pickle.dumps(with_weights)
    today = tmp_path / "data" / "skembed-mini"
    shutil.copytree(sources.resolve_source("skembed-mini").folder, today)
    change_weights(today)
    monkeypatch.setattr(sources.resources, "files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match="Install the release of skembed"):
        pickle.loads(data).transform(TEXTS)
    found = pickle.loads(data_with_weights).transform(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_in_the_pickle_go_before_a_changed_folder(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir, store_weights=True).fit(TEXTS)
    expected, data = emb.transform(TEXTS), pickle.dumps(emb)
    same = pickle.loads(data)
    assert same._make_encoder().settings.model.source.folder == fresh_dir, "not unpacked"
    change_weights(fresh_dir)
    np.testing.assert_allclose(pickle.loads(data).transform(TEXTS), expected, atol=1e-6)


def test_copies_on_two_machines_are_one_model(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (fresh_dir / "model.safetensors").stat().st_size
    monkeypatch.setattr(sources, "MAX_FULL_HASH_BYTES", size - 1)  # times are hashed, too
    emb = make_vectorizer(fresh_dir).fit(TEXTS)
    expected, before = emb.transform(TEXTS), emb.model_["fingerprint"]
    os.utime(fresh_dir / "model.safetensors", (1, 1))
    np.testing.assert_allclose(emb.transform(TEXTS), expected, atol=1e-6)
    now = clone(emb).fit(TEXTS).model_["fingerprint"]
    assert now != before and sources.has_same_content(now, before)


def test_parameters_may_change_after_fit(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir).fit(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in {
            "instruction": "STS",
            "document_instruction": "Say what this is",
            "max_length": 64,
            "truncate_dim": 8,
            "normalize": False,
            "pooling": "mean",
            "cache": "memory",
        }.items():
            fresh = make_vectorizer(fresh_dir, **{name: value})
            found = clone(emb).fit(TEXTS).set_params(**{name: value})
            np.testing.assert_allclose(
                found.encode_document(TEXTS), fresh.encode_document(TEXTS), atol=1e-6
            )
            np.testing.assert_allclose(found.transform(TEXTS), fresh.transform(TEXTS), atol=1e-6)


def test_another_model_parameter_after_fit(fresh_dir: Path) -> None:
    emb = make_vectorizer(fresh_dir).fit(TEXTS)
    with pytest.raises(CheckpointError) as caught:
        emb.set_params(model="skembed-mini").transform(TEXTS)
    message = str(caught.value)
    assert str(fresh_dir) in message and "'skembed-mini'" in message
    assert f"Set `model` to {str(fresh_dir)!r} again" in message
    assert emb.fit(TEXTS).transform(TEXTS).shape == (4, 384)


def test_a_folder_of_an_adapter_that_changes(fresh_dir: Path, tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(r=2, max_steps=1, random_state=0)
    for seed, name in enumerate(("one", "two")):
        trainer.set_params(random_state=seed, learning_rate=0.1)
        make_vectorizer(fresh_dir, trainer=trainer).fit(PAIRS).save_pretrained(tmp_path / name)
    emb = make_vectorizer(tmp_path / "one").fit(TEXTS)
    emb.transform(TEXTS)
    for path in (tmp_path / "two").iterdir():
        shutil.copy(path, tmp_path / "one" / path.name)
    with pytest.raises(CheckpointError, match="with adapter"):
        emb.transform(TEXTS)


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with one model, whose main branch can move; `calls` holds what was asked."""
    hub = SimpleNamespace(calls=[], commits=["a" * 40, "b" * 40], main="a" * 40)
    for commit in hub.commits:
        copy_checkpoint(tmp_path / "hub" / "snapshots" / commit)
    change_weights(tmp_path / "hub" / "snapshots" / ("b" * 40))

    def snapshot_download(repo_id: str, **options: Any) -> str:
        hub.calls.append(options["revision"])
        commit = options["revision"]
        commit = hub.main if commit in (None, "main") else commit
        return str(tmp_path / "hub" / "snapshots" / commit)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def forget() -> None:
    """Do what a new process does."""
    sources._found.clear()


def test_a_name_means_one_commit_in_a_process(hub: Any) -> None:
    emb = make_vectorizer("someone/model").fit(TEXTS)
    first = emb.transform(TEXTS)
    hub.main = "b" * 40
    for each in (
        emb,
        clone(emb),
        emb.set_params(max_length=256),
        clone(emb).fit(TEXTS),
        make_vectorizer("someone/model"),
        pickle.loads(pickle.dumps(emb)),
    ):
        np.testing.assert_allclose(each.transform(TEXTS), first, atol=1e-6)
    assert hub.calls == [None]
    assert emb.model_["revision"] == "a" * 40


@pytest.mark.parametrize("fitted", [True, False])
def test_a_pickle_keeps_the_commit(fitted: bool, hub: Any) -> None:
    emb = make_vectorizer("someone/model", trainer=None)
    first = emb.transform(TEXTS)
    emb = emb.fit(TEXTS) if fitted else emb
    data = pickle.dumps(emb)
    hub.main = "b" * 40
    forget()
    twin = pickle.loads(data)
    for each in (twin, clone(twin), pickle.loads(pickle.dumps(clone(twin)))):
        np.testing.assert_allclose(each.transform(TEXTS), first, atol=1e-6)
    assert set(hub.calls[1:]) == {"a" * 40}
    assert np.abs(make_vectorizer("someone/model").transform(TEXTS) - first).max() > 1e-3, "main"


def test_revision_pins_for_good(hub: Any) -> None:
    first = make_vectorizer("someone/model", revision="a" * 40).transform(TEXTS)
    hub.main = "b" * 40
    forget()
    again = make_vectorizer("someone/model", revision="a" * 40).fit(TEXTS)
    np.testing.assert_allclose(again.transform(TEXTS), first, atol=1e-6)
    with pytest.raises(CheckpointError, match=f"(?s)revision {'a' * 40}.*revision {'b' * 40}"):
        again.set_params(revision="main").transform(TEXTS)


def test_a_cleaned_cache_brings_the_same_commit(hub: Any, tmp_path: Path) -> None:
    emb = make_vectorizer("someone/model").fit(TEXTS)
    first = emb.transform(TEXTS)
    hub.main = "b" * 40
    folder = tmp_path / "hub" / "snapshots" / ("a" * 40)
    folder.rename(tmp_path / "away")
    with pytest.raises(CheckpointError):
        make_vectorizer("someone/model").fit(TEXTS)
    (tmp_path / "away").rename(folder)
    np.testing.assert_allclose(make_vectorizer("someone/model").transform(TEXTS), first, atol=1e-6)
    assert set(hub.calls[1:]) == {"a" * 40}


# Names


def test_a_folder_by_the_name_of_a_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN, "skembed-mini")
    assert make_vectorizer("skembed-mini").transform(TEXTS).shape == (4, 384)
    for path in (Path("skembed-mini"), "./skembed-mini"):
        assert make_vectorizer(path).transform(TEXTS).shape == (4, 48)
    with pytest.raises(ValueError, match="must not be the name of a bundled model"):
        make_vectorizer().save_pretrained("skembed-mini")


def test_a_folder_called_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy_checkpoint(tmp_path / "saved")
    copy_checkpoint(tmp_path / "other")
    change_weights(tmp_path / "other")
    skembed.Retriever("other").fit(TEXTS).save("index")
    retriever = skembed.Retriever.load("index")
    assert retriever.vectorizer == "other"
    with pytest.raises(ValueError, match="built with another model"):
        skembed.Retriever.load("index", vectorizer="saved")
    (tmp_path / "other" / "config.json").write_text(
        (tmp_path / "saved" / "config.json").read_text()
    )
    with pytest.raises(CheckpointError, match="fitted with 'other'"):
        retriever.search(["a card"], top_k=1)
