"""Pickles and saved folders."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from texts import DIM, TEXTS
from tiny import make_vectorizer

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.exceptions import ModelNotFoundError, SkembedWarning

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


def test_pickle_is_small_and_gives_the_same_vectors(tmp_path: Path, vectors: np.ndarray) -> None:
    emb = make_vectorizer(cache=EmbeddingCache()).fit(TEXTS)
    np.testing.assert_array_equal(emb.transform(TEXTS), vectors)
    data = pickle.dumps(emb)
    joblib.dump(emb, tmp_path / "emb.joblib")
    assert max(len(data), (tmp_path / "emb.joblib").stat().st_size) < 20_000
    for twin in (pickle.loads(data), joblib.load(tmp_path / "emb.joblib")):
        assert twin.model_ == emb.model_
        assert twin.embedding_dim_ == DIM
        np.testing.assert_allclose(twin.transform(TEXTS), vectors, atol=1e-6)


def test_pickle_of_a_fitted_pipeline(emb: NVEmbedVectorizer, tmp_path: Path) -> None:
    pipe = Pipeline([("emb", emb), ("clf", LogisticRegression())]).fit(TEXTS, [0, 1, 0, 1, 0])
    joblib.dump(pipe, tmp_path / "pipe.joblib")
    assert (tmp_path / "pipe.joblib").stat().st_size < 20_000
    twin = joblib.load(tmp_path / "pipe.joblib")
    np.testing.assert_allclose(twin.predict_proba(TEXTS), pipe.predict_proba(TEXTS), atol=1e-6)


def test_pickle_without_weights_needs_the_folder(fresh_dir: Path) -> None:
    data = pickle.dumps(make_vectorizer(fresh_dir).fit(TEXTS))
    shutil.rmtree(fresh_dir)
    twin = pickle.loads(data)
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        twin.transform(TEXTS)


@pytest.mark.parametrize("fitted", [True, False])
def test_stored_weights_open_without_the_folder(
    fitted: bool, fresh_dir: Path, tmp_path: Path, vectors: np.ndarray
) -> None:
    emb = make_vectorizer(fresh_dir, store_weights=True)
    if fitted:
        emb.fit(TEXTS)
    joblib.dump(emb, tmp_path / "emb.joblib")
    weights = (fresh_dir / "model.safetensors").stat().st_size
    assert weights < (tmp_path / "emb.joblib").stat().st_size < 1.2 * weights
    shutil.rmtree(fresh_dir)
    twin = joblib.load(tmp_path / "emb.joblib")
    np.testing.assert_allclose(twin.transform(TEXTS), vectors, atol=1e-6)
    again = pickle.loads(pickle.dumps(clone(twin)))
    np.testing.assert_allclose(again.transform(TEXTS), vectors, atol=1e-6)
    twin.fit(TEXTS)
    assert twin.model_["name"] == str(fresh_dir)


def test_stored_weights_are_those_of_the_model_parameter(
    fresh_dir: Path, tmp_path: Path, vectors: np.ndarray
) -> None:
    twin = pickle.loads(pickle.dumps(make_vectorizer(fresh_dir, store_weights=True)))
    # A typo must not fall back on the weights of the model before.
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        twin.set_params(model=tmp_path / "typo").transform(TEXTS)
    # And another model is what the next pickle holds.
    other = tmp_path / "other"
    shutil.copytree(fresh_dir, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(
        config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1.0')
    )
    expected = make_vectorizer(other).transform(TEXTS)
    assert np.abs(expected - vectors).max() > 1e-3
    data = pickle.dumps(twin.set_params(model=other))
    shutil.rmtree(other)
    np.testing.assert_allclose(pickle.loads(data).transform(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_pickle_of_a_gpu_opens_on_a_cpu(
    device: str, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    emb = make_vectorizer().fit(TEXTS).set_params(device=device)
    with pytest.raises(ValueError, match="`device` parameter"):
        emb.transform(TEXTS)
    twin = pickle.loads(pickle.dumps(emb))
    with pytest.warns(SkembedWarning, match=f"pickled with device='{device}'.*runs on 'cpu'"):
        found = twin.transform(TEXTS)
    np.testing.assert_allclose(found, vectors, atol=1e-6)
    assert twin.device == device, "on the way back it runs on the GPU again"
    np.testing.assert_array_equal(twin.set_params(device="auto").transform(TEXTS), found)
    with pytest.raises(ValueError, match="got 'gpu'"):
        twin.set_params(device="gpu").transform(TEXTS)


def test_saved_folder_gives_the_same_vectors(tmp_path: Path, emb: NVEmbedVectorizer) -> None:
    emb.set_params(instruction="Find the same", truncate_dim=16, missing="zero")
    vectors = emb.transform(TEXTS)
    emb.save_pretrained(tmp_path / "saved")
    twin = NVEmbedVectorizer.from_pretrained(
        tmp_path / "saved", device="cpu", dtype="float32", cache=None
    )
    assert (twin.instruction, twin.truncate_dim, twin.missing) == ("Find the same", 16, "zero")
    np.testing.assert_allclose(twin.transform(TEXTS), vectors, atol=1e-6)
    other = NVEmbedVectorizer.from_pretrained(tmp_path / "saved", truncate_dim=8)
    assert other.truncate_dim == 8, "what is given goes before what is saved"
