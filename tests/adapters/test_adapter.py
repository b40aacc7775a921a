"""Adapters on shared weights that never change: clones, threads, copies, folders as `model`."""

import copy
import gc
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from paths import GOLDEN, ROOT
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from tiny import base_of, load_base, random_lora
from torch import nn
from trained import LABELS, OTHER_TEXTS, TEXTS, make_trainer, make_vectorizer, train, trained

from skembed import EmbeddingCache
from skembed.adapters.adapter import Adapter
from skembed.adapters.lora import (
    LoraLinear,
    LoraSettings,
    insert_lora,
    share_weights,
)
from skembed.exceptions import CheckpointError
from skembed.inference.registry import registry
from skembed.model.loaded import LoadedModel

FILES = ("config.json", "model.safetensors", "tokenizer.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pooling.safetensors")
# peft 0.21 on transformers 5.2; goes when peft asks for the new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
fresh_pooling = pytest.mark.filterwarnings("ignore::skembed.exceptions.FreshPoolingWarning")


def digest(model: nn.Module) -> str:
    """Hash of all parameters and buffers, bit by bit."""
    found = hashlib.blake2b()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear) for module in model.modules())


# Shared weights


def shared_pointers(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_a_view_shares_every_tensor() -> None:
    base, _ = load_base(GOLDEN)
    before = digest(base.model)
    view = share_weights(base.model)
    assert shared_pointers(view) == shared_pointers(base.model)
    tensors = dict(view.named_parameters()), dict(base.model.named_parameters())
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name] is tensors[1][name] for name in tensors[0])
    insert_lora(view, LoraSettings(2, 2.0, 0.0, "x"), random_lora(base.config, ALL))
    view.latent_attention_model = nn.Identity()
    assert has_lora(view)
    assert not has_lora(base.model)
    assert digest(base.model) == before


ALL = LoraSettings(2, 2.0, 0.0, "all-linear")


@fresh_pooling
@pytest.mark.parametrize(
    ("pooling", "train_pooling"),
    [("latent", True), ("latent", False), ("mean", True), ("multilayer", True)],
)
def test_clones_share_the_base_and_own_an_adapter(
    pooling: str, train_pooling: bool, fresh_dir: Path
) -> None:
    n_loads = registry.n_loads
    frozen = make_vectorizer(fresh_dir, pooling=pooling)
    expected = frozen.transform(TEXTS)
    base = base_of(frozen)
    before = digest(base.model)
    first = clone(frozen).set_params(trainer=make_trainer(train_pooling=train_pooling))
    second = clone(first).fit(TEXTS, LABELS)
    first.fit(TEXTS[1:] + TEXTS[:1], LABELS)
    views = []
    for emb in (first, second):
        assert np.abs(emb.transform(TEXTS) - expected).max() > 1e-2
        assert base_of(emb) is base
        views.append(emb.adapter_.bind(base))
    assert registry.n_loads == n_loads + 1
    of_base = shared_pointers(base.model.embedding_model)
    for view in views:
        assert of_base < shared_pointers(view.model.embedding_model)
        pooled = shared_pointers(base.model.latent_attention_model)
        assert (pooled <= shared_pointers(view.model)) == (not train_pooling or not pooled)
    own = [shared_pointers(view.model) - shared_pointers(base.model) for view in views]
    assert own[0]
    assert not own[0] & own[1]
    assert first.adapter_.fingerprint != second.adapter_.fingerprint
    assert digest(base.model) == before
    assert not has_lora(base.model)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert np.array_equal(frozen.transform(TEXTS), expected)


def test_a_view_is_made_once() -> None:
    emb = train()
    base = base_of(emb)
    barrier = threading.Barrier(8)

    def bind(_: int) -> LoadedModel:
        barrier.wait()
        return emb.adapter_.bind(base)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(view) for view in pool.map(bind, range(8))}) == 1


def test_a_view_follows_its_base() -> None:
    emb = train()
    exact = emb.transform(TEXTS)
    half = emb.set_params(dtype="bfloat16").transform(TEXTS)
    assert 0 < np.abs(half - exact).max() < 5e-2
    assert np.array_equal(pickle.loads(pickle.dumps(emb)).transform(TEXTS), half)
    assert np.array_equal(emb.set_params(dtype="float32").transform(TEXTS), exact)


def test_adapters_are_freed_with_their_estimator(fresh_dir: Path) -> None:
    frozen = make_vectorizer(fresh_dir)
    frozen.transform(TEXTS)
    emb = clone(frozen).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    emb.transform(TEXTS)
    view = emb.adapter_.bind(base_of(emb))
    watched = [weakref.ref(thing) for thing in (emb.adapter_, view, view.model)]
    base = weakref.ref(base_of(frozen))
    del view
    emb.fit(TEXTS, LABELS)  # the first adapter goes with the second fit
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    watched = [weakref.ref(emb.adapter_)]
    del emb
    gc.collect()
    assert watched[0]() is None
    assert base() is not None
    del frozen
    gc.collect()
    assert base() is None


def test_threads_never_see_anothers_adapter(fresh_dir: Path) -> None:
    n_loads = registry.n_loads
    frozen = make_vectorizer(fresh_dir)
    first = clone(frozen).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    second = clone(frozen).set_params(trainer=make_trainer(random_state=1, train_pooling=False))
    second.fit(TEXTS, LABELS)
    estimators = [first, second, frozen]
    expected = [emb.transform(TEXTS) for emb in estimators]
    for k in range(3):
        assert np.abs(expected[k] - expected[k - 1]).max() > 1e-2
    # Views are built again, by all threads at once.
    first, second = (pickle.loads(pickle.dumps(emb)) for emb in (first, second))
    estimators = [first, second, frozen]
    barrier = threading.Barrier(8)

    def run(number: int) -> bool:
        barrier.wait()
        order = [(number + k) % 3 for k in range(9)]
        return all(np.array_equal(estimators[k].transform(TEXTS), expected[k]) for k in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))
    assert registry.n_loads == n_loads + 1


def test_fits_in_threads_equal_fits_alone() -> None:
    frozen = make_vectorizer()
    expected = frozen.transform(TEXTS)
    alone = [train(trainer={"random_state": seed}) for seed in range(3)]
    barrier = threading.Barrier(4)

    def run(seed: int) -> bool:
        barrier.wait()
        if seed == 3:
            return all(np.array_equal(frozen.transform(TEXTS), expected) for _ in range(20))
        found = train(trainer={"random_state": seed})
        return found.adapter_.fingerprint == alone[seed].adapter_.fingerprint

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))
    assert len({emb.adapter_.fingerprint for emb in alone}) == 3


# Copies, pickles, other processes


def test_copies_are_equal_and_apart() -> None:
    expected = trained().transform(TEXTS)
    for emb in (copy.deepcopy(trained()), copy.copy(trained())):
        assert np.array_equal(emb.transform(TEXTS), expected)
        emb.fit(TEXTS[::-1], LABELS)
        assert np.abs(emb.transform(TEXTS) - expected).max() > 1e-3
    assert np.array_equal(trained().transform(TEXTS), expected)


@pytest.mark.parametrize("train_pooling", [True, False])
def test_pickles_are_of_the_adapters_size(train_pooling: bool) -> None:
    emb = train(trainer={"train_pooling": train_pooling})
    emb.transform(TEXTS)
    size = len(pickle.dumps(emb))
    assert emb.adapter_.size_bytes < size < emb.adapter_.size_bytes + 64 * 1024


def test_adapters_in_shared_memory(tmp_path: Path) -> None:
    """joblib hands large arrays to its workers as read-only maps of a file."""
    joblib.dump(trained(), tmp_path / "emb.joblib")
    expected = trained().transform(TEXTS)
    for mode in (None, "r"):
        emb = joblib.load(tmp_path / "emb.joblib", mmap_mode=mode)
        assert np.array_equal(emb.transform(TEXTS), expected)
        again = emb.set_params(trainer=make_trainer(warm_start=True)).fit(TEXTS, LABELS)
        assert np.abs(again.transform(TEXTS) - expected).max() > 1e-3


OPEN_PICKLES = """
import pickle, sys
from pathlib import Path
import joblib, numpy as np
sys.modules["peft"] = None  # use needs no peft
folder = Path(sys.argv[1])
texts = pickle.loads((folder / "texts").read_bytes())
for path in sorted(folder.glob("*.pickle")):
    emb = joblib.load(path) if "joblib" in path.name else pickle.loads(path.read_bytes())
    np.save(path.with_suffix(".npy"), emb.transform(texts))
"""


def test_pickles_open_in_another_process(fresh_dir: Path, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    lost = tmp_path / "lost"
    train(fresh_dir).save_pretrained(lost)
    estimators = {
        "fitted": trained(),
        "joblib": trained(),
        "bfloat16": train(dtype="bfloat16"),
        "folder": make_vectorizer(saved),
        "stored": make_vectorizer(lost, store_weights=True),
        "stored_and_fitted": train(fresh_dir, store_weights=True, trainer={"random_state": 2}),
        "fitted_on_folder": train(saved, trainer={"max_steps": 1}),
    }
    texts = [*TEXTS, *OTHER_TEXTS]
    expected = {name: emb.transform(texts) for name, emb in estimators.items()}
    for name, emb in estimators.items():
        if name == "joblib":
            joblib.dump(emb, folder / f"{name}.pickle")
        else:
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(emb))
    (folder / "texts").write_bytes(pickle.dumps(texts))
    shutil.rmtree(lost)
    shutil.rmtree(fresh_dir)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", OPEN_PICKLES, folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        timeout=120,
    )
    for name, vectors in expected.items():
        assert np.array_equal(np.load(folder / f"{name}.npy"), vectors), name
    assert len({vectors.tobytes() for vectors in expected.values()}) == 4


# An adapter's folder as `model`


def test_cross_validation_of_a_saved_adapter(saved: Path, embedded: list[int]) -> None:
    emb = make_vectorizer(saved, cache=EmbeddingCache())
    texts = [f"{text} ({k})" for text in TEXTS for k in range(3)]
    labels = np.repeat([0, 1], 12)
    n_loads = registry.n_loads
    scores = cross_val_score(make_pipeline(emb, LogisticRegression()), texts, labels, cv=3)
    assert scores.shape == (3,)
    assert sum(embedded) == 24
    assert registry.n_loads <= n_loads + 1
    twin = clone(emb)
    assert np.array_equal(twin.transform(TEXTS), trained().transform(TEXTS))
    assert np.abs(twin.transform(TEXTS) - make_vectorizer().transform(TEXTS)).max() > 1e-2


def test_a_changed_folder_is_read_again(saved: Path) -> None:
    emb = make_vectorizer(saved)
    before = emb.transform(TEXTS)
    other = train(trainer={"random_state": 5})
    other.save_pretrained(saved)
    found = emb.transform(TEXTS)
    assert np.array_equal(found, other.transform(TEXTS))
    assert np.abs(found - before).max() > 1e-3


def test_training_goes_on_from_a_folder_and_leaves_it(saved: Path) -> None:
    files = {name: (saved / name).read_bytes() for name in ADAPTER_FILES}
    start = make_vectorizer(saved)
    base, _ = load_base(GOLDEN)
    loaded = Adapter.load(saved, base.config, base.key.fingerprint)
    # No step worth the name: what is trained starts at the folder's adapter.
    emb = train(saved, trainer={"max_steps": 1, "learning_rate": 1e-9})
    np.testing.assert_allclose(emb.transform(TEXTS), start.transform(TEXTS), rtol=0, atol=1e-5)
    emb.set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    assert emb.adapter_.fingerprint != loaded.fingerprint
    # A clone shares the lease, and with it the adapter that training starts from.
    twin = clone(start).set_params(trainer=make_trainer()).fit(TEXTS, LABELS)
    assert twin.adapter_.fingerprint == emb.adapter_.fingerprint
    assert {name: (saved / name).read_bytes() for name in ADAPTER_FILES} == files
    assert np.array_equal(start.transform(TEXTS), trained().transform(TEXTS))


def test_a_folder_may_hold_base_and_adapter(saved: Path, tmp_path: Path) -> None:
    """What is trained on top of it names the base, not a folder that is an adapter itself."""
    both = tmp_path / "both"
    shutil.copytree(saved, both)
    for name in FILES:
        shutil.copy(GOLDEN / name, both / name)
    assert np.array_equal(make_vectorizer(both).transform(TEXTS), trained().transform(TEXTS))
    emb = train(both, trainer={"max_steps": 1})
    emb.save_pretrained(tmp_path / "next")
    found = make_vectorizer(tmp_path / "next").transform(TEXTS)
    assert np.array_equal(found, emb.transform(TEXTS))


def test_an_adapter_of_stored_files_names_the_base_it_was_trained_on(
    fresh_dir: Path, tmp_path: Path
) -> None:
    """Not the temporary folder that a pickle's files were unpacked into."""
    lost = tmp_path / "lost"
    train(fresh_dir).save_pretrained(lost)
    content = pickle.dumps(make_vectorizer(lost, store_weights=True))
    shutil.rmtree(lost)
    pickle.loads(content).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(fresh_dir)


def test_adapters_name_their_base(tmp_path: Path) -> None:
    copied = tmp_path / "skembed-mini"  # a folder of that name is not the bundled model
    shutil.copytree(GOLDEN, copied)
    models: list[Path | str] = [GOLDEN, copied, "skembed-mini"]
    for k, model in enumerate(models):
        emb = train(model, trainer={"max_steps": 1, "train_pooling": False})
        for folder in (tmp_path / f"first{k}", tmp_path / f"second{k}"):
            emb.save_pretrained(folder)
            written = json.loads((folder / "adapter_config.json").read_text())
            assert written["base_model_name_or_path"] == str(model)
            loaded = make_vectorizer(folder)
            assert np.array_equal(loaded.transform(TEXTS), emb.transform(TEXTS))
            emb = loaded


def test_an_adapter_knows_its_base_only() -> None:
    adapter = trained().adapter_
    base, _ = load_base(GOLDEN)
    other = replace(base, key=replace(base.key, fingerprint="0" * 32))
    with pytest.raises(CheckpointError, match="trained on another model"):
        adapter.bind(other)
    assert adapter.bind(base).key.fingerprint == f"{base.key.fingerprint}+{adapter.fingerprint}"
