"""Embedding on several devices at once."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from engines_worker import make_texts, make_vectorizer
from sklearn.base import clone

from skembed import ContrastiveTrainer, EmbeddingCache
from skembed.exceptions import SkembedWarning
from skembed.inference.devices import resolve_devices
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import PackedBatch

TOLERANCE = 1e-5  # stated for float32: the same text in any batch, order or subset
TWO = ["cpu", "cpu"]


def test_two_devices_give_exactly_the_rows_of_one(n_threads: int) -> None:
    texts = make_texts()
    torch.set_num_threads(1)  # as many as each of the two has
    one, two = (make_vectorizer(device=d, batch_tokens=256) for d in ("cpu", TWO))
    np.testing.assert_array_equal(two.transform(texts), one.transform(texts))
    torch.set_num_threads(n_threads)


def test_both_devices_work(
    expected: np.ndarray,
    passes: list[tuple[int, int, int]],
    n_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2, timeout=60)
    forward, waited = NVEmbedModel.forward, set()

    def waiting(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        if threading.get_ident() not in waited:  # no pass ends before the other device has one
            waited.add(threading.get_ident())
            both.wait()
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", waiting)
    emb = make_vectorizer(device=TWO)
    np.testing.assert_allclose(emb.transform(make_texts()), expected, atol=TOLERANCE)
    threads = {thread for thread, _, _ in passes}
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert sum(n for _, n, _ in passes) == len(set(make_texts())), "each distinct text once"
    assert {n for _, _, n in passes} == {max(1, n_threads // 2)}


def test_few_texts_keep_both_devices_busy(passes: list[tuple[int, int, int]]) -> None:
    texts = make_texts(16)[:16]
    found = make_vectorizer(device=TWO).transform(texts)
    assert len(passes) >= 2
    np.testing.assert_allclose(found, make_vectorizer().transform(texts), atol=TOLERANCE)


@pytest.mark.parametrize("texts", [[], ["one"], [""]])
def test_very_few_texts(texts: list[str]) -> None:
    found = make_vectorizer(device=TWO).transform(texts)
    np.testing.assert_allclose(found, make_vectorizer().transform(texts), atol=TOLERANCE)


def test_devices_share_the_cache() -> None:
    cache = EmbeddingCache()
    texts = make_texts()
    first = make_vectorizer(device=TWO).set_params(cache=cache).transform(texts)
    hits = cache.hits
    second = make_vectorizer().set_params(cache=cache).transform(texts)
    assert cache.hits - hits == len(set(texts))
    np.testing.assert_array_equal(first, second)


def test_adapter_on_each_device(n_threads: int) -> None:
    trainer = ContrastiveTrainer(max_steps=2, random_state=0)
    pairs = [("a card", "the card"), ("an account", "my account")]
    emb = make_vectorizer(device=TWO, trainer=trainer).fit(pairs)
    texts = make_texts(40)
    torch.set_num_threads(1)
    found = emb.set_params(batch_tokens=32).transform(texts)
    np.testing.assert_array_equal(found, emb.set_params(device="cpu").transform(texts))
    frozen = make_vectorizer().transform(texts)
    assert np.abs(found - frozen).max() > 1e-3
    torch.set_num_threads(n_threads)


def test_devices_survive_cloning_and_are_named() -> None:
    emb = clone(make_vectorizer(device=("cpu", "cpu"))).fit(["a"])
    assert emb.device == ("cpu", "cpu")
    assert emb.model_["device"] == "cpu, cpu"
    again = pickle.loads(pickle.dumps(emb))
    np.testing.assert_array_equal(again.transform(["a"]), emb.transform(["a"]))
    assert make_vectorizer(device=["cpu"]).fit(["a"]).model_["device"] == "cpu"


def test_out_of_memory_on_one_device_halves_the_batches(
    expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []
    forward = NVEmbedModel.forward

    def failing(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        if not failures:
            failures.append(batch.n_texts)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", failing)
    found = make_vectorizer(device=TWO).transform(make_texts())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert failures


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has three GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)


@pytest.mark.usefixtures("three_gpus")
def test_gpus_by_number() -> None:
    assert resolve_devices(["cuda:0", "cuda:2"]) == [torch.device("cuda", k) for k in (0, 2)]
    assert resolve_devices("cuda") == [torch.device("cuda", 2)], "the current one"


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ([], r"name at least one device.*got \[\]"),
        (["cuda:0", "cuda:0"], "name each GPU once"),
        (["cuda", "cuda:2"], "name each GPU once"),
        (["cpu", "cuda:0"], r"devices of one kind; got \['cpu', 'cuda:0'\]"),
        (["auto", "cuda:0"], "name each device"),
        (["cuda:0", "cuda:3"], "'cuda:3', but torch sees 3 CUDA devices"),
        (["cuda:0", "gpu"], "got 'gpu'"),
    ],
)
def test_wrong_lists_of_devices(device: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vectorizer().set_params(device=device).fit(["a"])


@pytest.mark.parametrize("device", [0.5, [0, 0.5], ["cpu", ["cpu"]], {"cpu"}, True])
def test_devices_of_a_wrong_type(device: Any) -> None:
    with pytest.raises(TypeError, match="`device` parameter of `NVEmbedVectorizer` must be a str"):
        make_vectorizer().set_params(device=device).fit(["a"])


def test_worker_processes_beside_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="`n_jobs`.* must be None or 1 with several devices"):
        make_vectorizer(device=TWO, n_jobs=2).transform(["a"])


def test_a_pickle_of_several_gpus_opens_on_a_cpu() -> None:
    emb = pickle.loads(pickle.dumps(make_vectorizer().set_params(device=["cuda:0", "cuda:1"])))
    if torch.cuda.device_count() > 1:
        pytest.skip("this machine has the GPUs")
    with pytest.warns(SkembedWarning, match=r"pickled with device=\['cuda:0', 'cuda:1'\]"):
        found = emb.transform(["a card"])
    np.testing.assert_allclose(found, make_vectorizer().transform(["a card"]), atol=TOLERANCE)


@pytest.mark.gpu
def test_every_gpu_gives_the_rows_of_the_first() -> None:
    """Also a single device that is not the current one."""
    names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    texts = make_texts()
    emb = make_vectorizer()
    first = emb.set_params(device=names[0], dtype="float32").transform(texts)
    for device in (names[-1], names):
        found = clone(emb).set_params(device=device).transform(texts)
        np.testing.assert_allclose(found, first, atol=TOLERANCE)
