"""The engine: each distinct text once, longest first, within the budget, whatever happens.

Most tests put a counting fake in the place of model and tokenizer: a token is a character.
"""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from skembed import EmbeddingCache, NVEmbedVectorizer
from skembed.inference import engine
from skembed.inference import workers as _memory
from skembed.inference.engine import (
    EmbedReport,
    EmbedRequest,
    cache_namespace,
    embed_texts,
    find_distinct,
)
from skembed.inference.workers import release_free_memory
from skembed.model.loaded import ModelKey
from skembed.model.network import NVEmbedModel
from skembed.model.tokenization import EncodedTexts, PackedBatch, round_up

DIM = 3
NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 2 GiB"),
    MemoryError(),
]


class FakeTokenizer:
    """One token a character, and one for the end."""

    def encode(
        self, texts: list[str], *, prefix: str, max_length: int, mask_prefix: bool
    ) -> EncodedTexts:
        ids = [
            np.frombuffer(f"{text}\n".encode("utf-32-le"), dtype=np.int32)[:max_length]
            for text in texts
        ]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        n_truncated = sum(len(text) + 1 > max_length for text in texts)
        return EncodedTexts(ids, lengths, 0, n_truncated)


class FakeModel:
    """Vectors that tell the text; counts what it runs, and fails when told to."""

    runs_fused = False

    def __init__(self, attention_path: str = "grouped") -> None:
        self.attention_path = attention_path
        self.batches: list[tuple[int, ...]] = []  # token counts of the batches that were finished
        self.n_calls = 0
        self.fail: Callable[[int, PackedBatch], BaseException | None] = lambda call, batch: None

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        self.n_calls += 1
        error = self.fail(self.n_calls, batch)
        if error is not None:
            raise error
        self.batches.append(batch.lengths)
        starts = batch.cu_seqlens[:-1].long()
        weighted = batch.input_ids.double() * (1 + batch.position_ids % 7)
        sums = torch.stack([part.sum() for part in weighted.split(batch.lengths)])
        columns = [sums, torch.tensor(batch.lengths).double(), batch.input_ids[starts].double()]
        return torch.stack(columns, dim=1).float()  # (B, 3)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text that was finished, in the order it was run."""
        return [length for batch in self.batches for length in batch]


def expected(texts: list[str], max_length: int = 512) -> np.ndarray:
    """What the fake model gives, computed text by text."""
    rows = []
    for text in texts:
        ids = [ord(character) for character in f"{text}\n"][:max_length]
        total = sum(token * (1 + place % 7) for place, token in enumerate(ids))
        rows.append([total, len(ids), ids[0]])
    return np.array(rows, dtype=np.float32).reshape(len(texts), DIM)


def run(
    texts: list[str], model: FakeModel, *, max_length: int = 512, **kwargs: Any
) -> tuple[np.ndarray, EmbedReport]:
    loaded = SimpleNamespace(
        key=SimpleNamespace(device="cpu", dtype="float32"),
        config=SimpleNamespace(is_mask_instruction=True),
        device=torch.device("cpu"),
        model=model,
        tokenizer=FakeTokenizer(),
    )
    request = EmbedRequest(prefix="", max_length=max_length, dim=DIM, namespace="fake")
    kwargs = {"cache": None, "get_models": lambda: [loaded], **kwargs}
    return embed_texts(texts, request, **kwargs)


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass after the other, so that their order is known."""
    monkeypatch.setattr(engine, "MAX_STREAMS", 1)


def make_texts(n: int, *, seed: int = 0, median: float = 40.0) -> list[str]:
    """Distinct texts of log-normal length."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(median), 0.8, n), 8, 500).astype(int)
    letters = np.array(list("abcdefgh "))
    return [
        f"{number}:".ljust(length, letters[number % 9]) for number, length in enumerate(lengths)
    ]


class SameHash(str):
    """A text whose hash says nothing."""

    __slots__ = ()
    __eq__ = str.__eq__

    def __hash__(self) -> int:
        return 7


# Distinct texts


@pytest.mark.parametrize("kind", [str, SameHash])
def test_find_distinct_agrees_with_a_dictionary(kind: type[str], rng: np.random.Generator) -> None:
    for n_values in (1, 3, 20, 200):
        texts = [kind(f"text {i}") for i in rng.integers(n_values, size=100)]
        first: dict[str, int] = {}
        for row, text in enumerate(texts):
            first.setdefault(str(text), row)
        rows, source = find_distinct(texts)
        assert rows.tolist() == sorted(first.values())
        assert source is not None
        assert source.tolist() == [first[str(text)] for text in texts]


def test_find_distinct_of_distinct_texts_needs_no_map() -> None:
    rows, source = find_distinct(["b", "a", "c"])
    assert rows.tolist() == [0, 1, 2]
    assert source is None
    rows, source = find_distinct([])
    assert (len(rows), source) == (0, None)


def test_texts_of_equal_hash_get_their_own_vectors() -> None:
    texts = [SameHash(text) for text in ("a", "b", "a", "c", "b", "c", "a")]
    model = FakeModel()
    vectors, report = run(texts, model)
    np.testing.assert_array_equal(vectors, expected([str(text) for text in texts]))
    assert report.n_distinct == len(model.lengths) == 3


def test_repeated_texts_run_once_and_come_back_in_order(rng: np.random.Generator) -> None:
    distinct = make_texts(50)
    texts = [distinct[i] for i in rng.integers(50, size=2_000)]
    model = FakeModel()
    vectors, report = run(texts, model)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert vectors.dtype == np.float32
    assert (report.n_texts, report.n_distinct, report.n_embedded) == (2_000, 50, 50)
    assert sorted(model.lengths) == sorted(len(text) + 1 for text in distinct)
    assert report.n_tokens == sum(model.lengths)


def test_no_texts_need_no_model() -> None:
    def no_model() -> Any:
        raise AssertionError("nothing to embed")

    vectors, report = run([], FakeModel(), get_models=no_model)
    assert vectors.shape == (0, DIM)
    assert report == EmbedReport()


# Batches


def test_longest_first_within_the_budget(one_stream: None) -> None:
    texts = make_texts(500)
    model = FakeModel()
    run(texts, model, batch_tokens=600)
    assert model.lengths == sorted((len(text) + 1 for text in texts), reverse=True)
    sizes = [sum(batch) for batch in model.batches]
    assert max(sizes) <= 600
    for size, following in zip(sizes, model.batches[1:], strict=False):
        assert size + following[0] > 600, "a batch took less than it had room for"


def test_streams_share_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several forward passes at once on a CPU: the same rows, each once, on threads of its own."""
    before = torch.get_num_threads()
    texts = make_texts(500)
    names: set[str] = set()
    threads: set[int] = set()

    def note(call: int, batch: PackedBatch) -> None:
        names.add(threading.current_thread().name)
        threads.add(torch.get_num_threads())
        time.sleep(0.002)

    model = FakeModel()
    model.fail = note
    torch.set_num_threads(3)
    try:
        vectors, report = run(texts, model, batch_tokens=600)
        assert torch.get_num_threads() == 3, "as the caller left it"
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sorted(model.lengths) == sorted(len(text) + 1 for text in texts)
    assert report.n_embedded == 500
    assert len(names) == 3
    assert threads == {1}


def test_no_stream_without_work() -> None:
    assert engine.count_streams(2, 100) == 1
    assert engine.count_streams(2, 1_000_000) == 2
    assert engine.count_streams(1, 1_000_000) == 1
    assert engine.count_streams(64, 1_000_000) == engine.MAX_STREAMS


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_no_memory_in_one_of_several_streams(n_threads: int) -> None:
    before = torch.get_num_threads()
    texts = make_texts(400)
    model = FakeModel()
    model.fail = lambda call, batch: MemoryError() if len(batch.input_ids) > 600 else None
    torch.set_num_threads(n_threads)
    try:
        vectors, report = run(texts, model, batch_tokens=1_200)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sorted(model.lengths) == sorted(len(text) + 1 for text in texts)
    assert report.batch_tokens == 600


def test_text_above_the_budget_runs_alone() -> None:
    model = FakeModel()
    texts = ["x" * 300, "y" * 200, "z" * 20, "w" * 10]
    vectors, _ = run(texts, model, batch_tokens=100)
    assert model.batches == [(301,), (201,), (21, 11)]
    np.testing.assert_array_equal(vectors, expected(texts))


def test_chunks_are_bounded_in_texts_and_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 10)
    monkeypatch.setattr(engine, "CHUNK_CHARACTERS", 300)
    texts = ["x" * 500, "", *make_texts(200, median=25.0)]
    rows = np.arange(len(texts))
    chunks = [chunk.tolist() for chunk in engine._chunks(texts, rows)]
    assert sorted(row for chunk in chunks for row in chunk) == rows.tolist()
    sizes = [len(texts[row]) for chunk in chunks for row in chunk]
    assert sizes == sorted(sizes, reverse=True)
    assert chunks[0] == [0], "a text above the bound is a chunk by itself"
    assert {len(chunk) for chunk in chunks} >= {10}, "short texts reach the bound in texts"
    for chunk in chunks[1:]:
        assert len(chunk) <= 10
        assert sum(len(texts[row]) for row in chunk) <= 300
    model = FakeModel()
    vectors, report = run(texts, model)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert report.n_embedded == len(texts)


def test_the_next_chunk_is_tokenised_while_the_model_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 50)
    tokenised = [threading.Event() for _ in range(4)]
    encode, count = FakeTokenizer.encode, iter(tokenised)

    def watched(self: FakeTokenizer, texts: list[str], **kwargs: Any) -> EncodedTexts:
        next(count).set()
        return encode(self, texts, **kwargs)

    monkeypatch.setattr(FakeTokenizer, "encode", watched)
    model = FakeModel()

    def wait(call: int, batch: PackedBatch) -> None:
        assert tokenised[1].wait(60), "the first pass would wait for ever"

    model.fail = wait
    texts = make_texts(200)
    vectors, report = run(texts, model)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert report.n_embedded == 200
    assert all(event.is_set() for event in tokenised)


@pytest.mark.parametrize(("n_texts", "n_coarse"), [(399, 0), (400, 1), (1_000, 2)])
def test_the_rest_of_each_large_chunk_is_filled_up_to_few_sizes(
    monkeypatch: pytest.MonkeyPatch, one_stream: None, n_texts: int, n_coarse: int
) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 450)
    monkeypatch.setattr(engine, "REST_TEXTS", 400)
    pack, kinds = engine.pack_texts, []

    def watched(ids: Any, pool_start: int, *, on_grid: bool, coarse: bool) -> PackedBatch:
        kinds.append((coarse, sum(map(len, ids))))
        return pack(ids, pool_start, on_grid=on_grid, coarse=coarse)

    monkeypatch.setattr(engine, "pack_texts", watched)
    texts = make_texts(n_texts)
    vectors, _ = run(texts, FakeModel(), batch_tokens=1_024)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sum(coarse for coarse, _ in kinds) == n_coarse
    assert len(kinds) > 10 * max(1, n_coarse)
    assert all(size < 1_024 for coarse, size in kinds if coarse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_cpu_have_few_sizes(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    forward, sizes = NVEmbedModel.forward, set()

    def watched(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        sizes.update([len(batch.input_ids), len(batch.pool_index)])
        return forward(self, batch)

    monkeypatch.setattr(NVEmbedModel, "forward", watched)
    emb = NVEmbedVectorizer(golden_dir, dtype=dtype, device="cpu", cache=None).fit(["a"])
    for n in range(1, 60):
        emb.transform(["a b " * (n // 2), "a b c " * n])
    assert all(size == round_up(size) for size in sizes)
    assert 5 < len(sizes) < 30


def test_grouped_path_pads_nothing() -> None:
    _, report = run(make_texts(2_000), FakeModel("grouped"))
    assert report.n_positions == report.n_tokens > 0


@pytest.mark.parametrize("batch_tokens", [1_024, 4_096, 65_536])
def test_padded_path_pads_less_than_five_percent(batch_tokens: int) -> None:
    texts = make_texts(5_000)
    _, report = run(texts, FakeModel("padded"), batch_tokens=batch_tokens)
    assert 0 < 1 - report.n_tokens / report.n_positions < 0.05
    # The input is mixed indeed: unsorted, the same budget would pad most of it.
    lengths = np.array([len(text) + 1 for text in texts])
    batches = np.array_split(lengths, 1 + lengths.sum() // batch_tokens)
    positions = sum(batch.max() * len(batch) for batch in batches)
    assert 1 - lengths.sum() / positions > 0.5


def test_truncated_texts_are_counted_once_each() -> None:
    texts = ["x" * 30, "y" * 5, "z" * 40, "x" * 30, "w" * 9, "v" * 10]
    vectors, report = run(texts, FakeModel(), max_length=10)
    np.testing.assert_array_equal(vectors, expected(texts, max_length=10))
    # Nine characters and the end fit; ten do not.
    assert (report.n_truncated, report.n_embedded) == (3, 5)


# Memory


def test_free_pages_between_used_ones_go_back_to_the_system() -> None:
    if _memory._find_trim() is None:
        pytest.skip("the C library has no malloc_trim")

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(8_192) for _ in range(8_192)]
    kept = blocks[::512]  # without them the end of the heap would shrink by itself
    before = resident()
    blocks.clear()
    assert release_free_memory()
    assert before - resident() > 48 << 20
    assert len(kept) == 16


@pytest.mark.parametrize(("n_texts", "n_chunks"), [(10, 0), (100, 1), (250, 2)])
def test_memory_is_given_back_after_each_large_chunk(
    monkeypatch: pytest.MonkeyPatch, n_texts: int, n_chunks: int
) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 100)
    monkeypatch.setattr(engine, "TRIM_TEXTS", 60)
    calls: list[None] = []
    monkeypatch.setattr(engine, "release_free_memory", lambda: calls.append(None))
    run(make_texts(n_texts), FakeModel())
    assert len(calls) == n_chunks


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_budget(error: BaseException, one_stream: None) -> None:
    texts = make_texts(400)
    model = FakeModel()
    model.fail = lambda call, batch: error if len(batch.input_ids) > 1_100 else None
    vectors, report = run(texts, model, batch_tokens=4_096)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert report.batch_tokens == 1_024
    assert model.n_calls - len(model.batches) == 2
    assert len(model.lengths) == report.n_embedded == 400


def test_finished_rows_are_not_run_again(one_stream: None) -> None:
    texts = make_texts(400)
    model = FakeModel()
    model.fail = lambda call, batch: MemoryError() if call in (4, 9) else None
    vectors, report = run(texts, model, batch_tokens=2_048)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sorted(model.lengths) == sorted(len(text) + 1 for text in texts)
    assert [sum(batch) > 1_024 for batch in model.batches[:3]] == [True] * 3
    assert max(sum(batch) for batch in model.batches[3:7]) <= 1_024
    assert max(sum(batch) for batch in model.batches[7:]) <= 512
    assert report.batch_tokens == 512


def test_budget_that_fitted_is_kept_for_the_chunks_to_come(
    monkeypatch: pytest.MonkeyPatch, one_stream: None
) -> None:
    monkeypatch.setattr(engine, "CHUNK_TEXTS", 50)
    model = FakeModel()
    model.fail = lambda call, batch: MemoryError() if len(batch.input_ids) > 600 else None
    texts = make_texts(400)
    vectors, _ = run(texts, model, batch_tokens=2_048)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert model.n_calls - len(model.batches) == 2


@pytest.mark.parametrize("n_streams", [1, 2])
def test_memory_of_the_failed_pass_is_free_before_the_next(
    n_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The traceback of the error holds the frames of the pass, and these its activations. A pass
    # that another stream began before the failure is no retry: it has more than half the budget.
    monkeypatch.setattr(engine, "count_streams", lambda n_cores, n_tokens: n_streams)

    class Activations:
        pass

    model = FakeModel()
    held: list[weakref.ref[Activations]] = []
    alive_at_retry: list[bool] = []

    def fail(call: int, batch: PackedBatch) -> BaseException | None:
        if call == 2:
            activations = Activations()
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        if held and len(batch.input_ids) <= 512:
            alive_at_retry.append(held[0]() is not None)
        return None

    model.fail = fail
    run(make_texts(100), model, batch_tokens=1_024)
    assert alive_at_retry
    assert not any(alive_at_retry)


def test_text_that_never_fits_is_a_clear_error_and_finished_rows_stay() -> None:
    texts = make_texts(100)
    cache = EmbeddingCache()
    model = FakeModel()
    model.fail = lambda call, batch: MemoryError() if call > 3 else None
    with pytest.raises(MemoryError, match=r"One text of \d+ tokens does not fit.*max_length"):
        run(texts, model, batch_tokens=512, cache=cache)
    finished = len(model.lengths)
    assert 0 < finished == len(cache) < 100
    model.fail = lambda call, batch: None
    vectors, report = run(texts, model, cache=cache)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert report.n_embedded == 100 - finished


def test_other_runtime_errors_pass_through_unchanged() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    model = FakeModel()
    model.fail = lambda call, batch: error
    with pytest.raises(RuntimeError) as caught:
        run(["a"], model)
    assert caught.value is error
    assert model.n_calls == 1


def extra_memory(n: int) -> int:
    """Bytes that a call over n texts takes at most, beside its output."""
    texts = [f"text number {i}" for i in range(n)]
    tracemalloc.start()
    try:
        vectors, _ = run(texts, FakeModel())
        return tracemalloc.get_traced_memory()[1] - vectors.nbytes
    finally:
        tracemalloc.stop()


def test_memory_is_the_output_and_a_constant() -> None:
    small, large = extra_memory(20_000), extra_memory(200_000)
    assert small < 8_000_000
    assert (large - small) / 180_000 < 56, "bytes that each text adds"


# Cache and interrupts


def test_second_call_asks_for_no_model() -> None:
    def no_model() -> Any:
        raise AssertionError("every text is in the cache")

    cache = EmbeddingCache()
    texts = make_texts(300)
    first, _ = run(texts, FakeModel(), cache=cache)
    again, report = run(texts[::-1], FakeModel(), cache=cache, get_models=no_model)
    np.testing.assert_array_equal(again, first[::-1])
    assert (report.n_distinct, report.n_embedded) == (300, 0)
    with pytest.raises(AssertionError, match="every text"):
        run([*texts, "new"], FakeModel(), cache=cache, get_models=no_model)


def test_only_texts_unknown_to_the_cache_run() -> None:
    cache = EmbeddingCache()
    texts = make_texts(300)
    run(texts[:200], FakeModel(), cache=cache)
    model = FakeModel()
    vectors, report = run(texts, model, cache=cache)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sorted(model.lengths) == sorted(len(text) + 1 for text in texts[200:])
    assert (report.n_embedded, cache.hits, cache.misses) == (100, 200, 300)


def test_without_a_cache_every_call_runs() -> None:
    model = FakeModel()
    run(["a", "b"], model)
    run(["a", "b"], model)
    assert len(model.lengths) == 4


def test_namespace_holds_all_that_changes_a_vector() -> None:
    key = ModelKey("f1", "latent", "cpu", "float32", "grouped")
    base = cache_namespace(key, "prefix", 512)
    others = [
        cache_namespace(replace(key, fingerprint="f2"), "prefix", 512),
        cache_namespace(replace(key, pooling="mean"), "prefix", 512),
        cache_namespace(replace(key, dtype="bfloat16"), "prefix", 512),
        cache_namespace(key, "", 512),
        cache_namespace(key, "prefix", 511),
    ]
    assert len({base, *others}) == 6
    # The same weights give the same vectors on every device and attention path.
    assert cache_namespace(replace(key, device="cuda:0"), "prefix", 512) == base
    assert cache_namespace(replace(key, attention_path="padded"), "prefix", 512) == base


def test_numerics_version_is_in_the_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ModelKey("f1", "latent", "cpu", "float32", "grouped")
    base = cache_namespace(key, "", 512)
    monkeypatch.setattr(engine, "NUMERICS_VERSION", engine.NUMERICS_VERSION + 1)
    assert cache_namespace(key, "", 512) != base


@pytest.mark.parametrize("where", ["memory", "file"])
def test_interrupt_keeps_the_finished_rows(where: str, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache.sqlite" if where == "file" else None)
    texts = make_texts(300)
    model = FakeModel()
    model.fail = lambda call, batch: KeyboardInterrupt() if call == 5 else None
    with pytest.raises(KeyboardInterrupt):
        run(texts, model, batch_tokens=1_024, cache=cache)
    finished = len(model.lengths)
    assert 0 < finished == len(cache) < 300
    again = FakeModel()
    vectors, report = run(texts, again, cache=cache)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert report.n_embedded == len(again.lengths) == 300 - finished
    cache.close()


def test_interrupt_leaves_the_estimator_usable(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache()
    emb = NVEmbedVectorizer(
        golden_dir, dtype="float32", device="cpu", cache=cache, batch_tokens=64
    ).fit(["a"])
    texts = [f"sentence number {i} of several" for i in range(30)]
    forward, batches = NVEmbedModel.forward, []

    def interrupted(self: NVEmbedModel, batch: PackedBatch) -> torch.Tensor:
        batches.append(batch.n_texts)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(NVEmbedModel, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            emb.transform(texts)
    assert len(cache) == sum(batches[:3]) > 0
    reference = NVEmbedVectorizer(golden_dir, dtype="float32", device="cpu", cache=None)
    np.testing.assert_allclose(emb.transform(texts), reference.transform(texts), atol=1e-5)


# Progress bar, workers


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run(["a", "b", "a"], FakeModel(), progress=shown)
    output = capsys.readouterr()
    assert output.out == ""
    assert ("embedding: 100%" in output.err and "2/2" in output.err) is shown
    assert bool(output.err) is shown


def test_progress_bar_counts_what_the_cache_gives(capsys: pytest.CaptureFixture[str]) -> None:
    cache = EmbeddingCache()
    run(["a", "b"], FakeModel(), cache=cache)
    run(["a", "b", "c"], FakeModel(), cache=cache, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_short_input_starts_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoWorkers:
        def __init__(self, *args: Any) -> None:
            raise AssertionError("workers")

    monkeypatch.setattr(engine, "_ParallelRunner", NoWorkers)
    kwargs: dict[str, Any] = {"load_in_worker": lambda: None, "n_jobs": 2}
    texts = make_texts(engine.PARALLEL_TEXTS)
    vectors, _ = run(texts[:-1], FakeModel(), **kwargs)
    np.testing.assert_array_equal(vectors, expected(texts[:-1]))
    with pytest.raises(AssertionError, match="workers"):
        run(texts, FakeModel(), **kwargs)
