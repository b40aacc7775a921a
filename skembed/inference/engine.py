"""Raw embeddings of texts: each distinct text once, cached, in batches of a token budget.

A call hashes and deduplicates, sorts by length, and per chunk of some thousand texts: looks up the
cache, tokenises what is missing (both while the model works on the chunk before), packs by true
token length up to the budget, runs the model and stores; then it scatters back to input order.
Beside the output it holds two chunks, the passes at work and 50 bytes a text;
benchmarks/encode_scale.py measures what the process takes.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from torch import Tensor

from skembed.cache.embedding_cache import EmbeddingCache
from skembed.exceptions import CacheError, CheckpointError, SkembedWarning
from skembed.inference.registry import registry
from skembed.inference.workers import (
    name_process,
    release_free_memory,
    run_ahead,
    run_tasks,
    share_cores,
    spread,
)
from skembed.model.loaded import LoadedModel, ModelKey
from skembed.model.tokenization import EncodedTexts, iterate_batches, pack_texts
from skembed.progress import progress_bar

__all__ = [
    "CHUNK_CHARACTERS",
    "CHUNK_TEXTS",
    "CPU_BATCH_TOKENS",
    "EmbedReport",
    "EmbedRequest",
    "MAX_BATCH_TOKENS",
    "MAX_STREAMS",
    "MIN_BATCH_TOKENS",
    "NUMERICS_VERSION",
    "PARALLEL_TEXTS",
    "REST_TEXTS",
    "SHORTEST_PADDED",
    "STORE_ROWS",
    "STREAM_TOKENS",
    "TRIM_TEXTS",
    "cache_namespace",
    "count_streams",
    "default_batch_tokens",
    "embed_texts",
    "find_distinct",
]

logger = logging.getLogger(__name__)

# Raised by every change of code that moves vectors by more than rounding.
NUMERICS_VERSION = 1
CHUNK_TEXTS = 8_192
CHUNK_CHARACTERS = 16_000_000
PARALLEL_TEXTS = 256  # below, starting workers costs more than they bring
SHORTEST_PADDED = 0.92  # keeps the padded share of attention under 5 %
STORE_ROWS = 1_024  # rows between two writes to the cache
TRIM_TEXTS = 1_024  # a chunk of as many leaves free memory behind that is worth giving back
REST_TEXTS = 4_096  # of a chunk of as many, the last batch is a small part: it may be filled up
CPU_BATCH_TOKENS = 2_048  # best of 768 to 4,096 on two cores: activations stay in the cache
MAX_STREAMS = 4
STREAM_TOKENS = 1_024  # for fewer, one more stream does not pay
MAX_BATCH_TOKENS = 65_536
MIN_BATCH_TOKENS = 64


@dataclass(frozen=True)
class EmbedRequest:
    """All that decides the vectors besides the texts and the weights."""

    prefix: str  # the instruction inside its template; "" for none
    max_length: int  # tokens
    dim: int  # width of the vectors
    namespace: str  # cache key of all of the above and the model


@dataclass
class EmbedReport:
    """Counts of one call, for warnings, attributes and tests."""

    n_texts: int = 0
    n_distinct: int = 0
    n_embedded: int = 0
    n_truncated: int = 0
    n_tokens: int = 0
    n_positions: int = 0  # tokens and padding that the attention saw
    batch_tokens: int = 0

    def add(self, other: EmbedReport) -> None:
        """Add the counts of another call or a worker."""
        self.n_texts += other.n_texts
        self.n_distinct += other.n_distinct
        self.n_embedded += other.n_embedded
        self.n_truncated += other.n_truncated
        self.n_tokens += other.n_tokens
        self.n_positions += other.n_positions
        self.batch_tokens = max(self.batch_tokens, other.batch_tokens)


def cache_namespace(key: ModelKey, prefix: str, max_length: int) -> str:
    """Return all that changes a raw vector (not truncated, not normalised) but the text."""
    parts = [NUMERICS_VERSION, key.fingerprint, key.pooling, key.dtype, max_length, prefix]
    return json.dumps(parts)


def embed_texts(
    texts: Sequence[str],
    request: EmbedRequest,
    *,
    get_models: Callable[[], Sequence[LoadedModel]],
    load_in_worker: Callable[[], LoadedModel] | None = None,
    cache: EmbeddingCache | None,
    batch_tokens: int | None = None,
    progress: bool = False,
    n_jobs: int | None = None,
) -> tuple[np.ndarray, EmbedReport]:
    """Return raw vectors (neither normalised nor truncated), float32 (n_texts, dim), and counts.

    `get_models` gives the model on each device; it is called only for texts that are not cached.
    `load_in_worker` gives the model in one of `n_jobs` worker processes, and must be picklable.
    `progress` shows a bar.
    """
    out = np.empty((len(texts), request.dim), dtype=np.float32)
    distinct, source = find_distinct(texts)
    report = EmbedReport()
    workers = 1 if n_jobs is None else effective_n_jobs(n_jobs)
    runner: _Runner | _ParallelRunner
    if workers > 1 and load_in_worker is not None and len(distinct) >= PARALLEL_TEXTS:
        runner = _ParallelRunner(request, load_in_worker, batch_tokens, report, workers)
    else:
        runner = _Runner(request, get_models, batch_tokens, report)
    with progress_bar(progress, total=len(distinct), unit="text", desc="embedding") as bar:
        chunks = _chunks(texts, distinct, max(1, workers // 4))
        prepare = partial(_prepare_chunk, texts, cache, runner)
        with closing(run_ahead(prepare, chunks)) as prepared:
            for chunk in prepared:
                _embed_chunk(chunk, out, cache, runner, bar)
    if source is not None:
        repeated = np.flatnonzero(source != np.arange(len(texts)))
        for start in range(0, len(repeated), CHUNK_TEXTS):
            part = repeated[start : start + CHUNK_TEXTS]
            out[part] = out[source[part]]
    report.n_texts, report.n_distinct = len(texts), len(distinct)  # not those of workers' parts
    return out, report


def find_distinct(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return first rows of distinct texts, ascending, and each row's first row (None: itself).

    Sorts Python's hashes, 24 bytes a text, and compares texts only where hashes are equal.
    """
    n = len(texts)
    hashes = np.fromiter(map(hash, texts), dtype=np.int64, count=n)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    if len(first) == n:
        return np.arange(n), None
    source = first[inverse]
    collided: dict[str, int] = {}
    for row in np.flatnonzero(source != np.arange(n)).tolist():
        if texts[row] != texts[source[row]]:
            source[row] = collided.setdefault(texts[row], row)
    return np.flatnonzero(source == np.arange(n)), source


def _chunks(texts: Sequence[str], rows: np.ndarray, scale: int = 1) -> Iterator[np.ndarray]:
    """Yield rows, longest text first, in chunks bounded in texts and in characters.

    `scale` makes them larger: many workers wait for each other at the end of each chunk.
    """
    sizes = np.fromiter((len(texts[i]) for i in rows), dtype=np.int64, count=len(rows))
    order = np.argsort(-sizes, kind="stable")
    rows, ends = rows[order], np.cumsum(sizes[order])
    start = 0
    while start < len(rows):
        used = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, used + scale * CHUNK_CHARACTERS, side="right"))
        stop = min(max(stop, start + 1), start + scale * CHUNK_TEXTS)
        yield rows[start:stop]
        start = stop


@dataclass(frozen=True)
class _Chunk:
    """Texts that are embedded together, prepared as far as possible without the model."""

    cached_rows: np.ndarray  # rows of the output whose vectors are cached, (n_cached,)
    cached: np.ndarray  # their vectors, float32 (n_cached, dim)
    rows: np.ndarray  # rows to compute, (n,)
    texts: list[str]  # their texts
    encoded: Any  # what `encode` of the runner gave for them; None where all is cached


def _prepare_chunk(
    texts: Sequence[str],
    cache: EmbeddingCache | None,
    runner: _Runner | _ParallelRunner,
    rows: np.ndarray,
) -> _Chunk:
    """Look up the texts of some rows in the cache, and tokenise the others."""
    request = runner.request
    part = [texts[i] for i in rows]
    cached_rows, cached = rows[:0], np.empty((0, request.dim), dtype=np.float32)
    if cache is not None:
        vectors = np.empty((len(rows), request.dim), dtype=np.float32)
        is_cached = cache.lookup(request.namespace, part, vectors)
        cached_rows, cached = rows[is_cached], vectors[is_cached]
        rows = rows[~is_cached]
        part = [text for text, hit in zip(part, is_cached, strict=True) if not hit]
    return _Chunk(cached_rows, cached, rows, part, runner.encode(part) if part else None)


def _embed_chunk(
    chunk: _Chunk,
    out: np.ndarray,
    cache: EmbeddingCache | None,
    runner: _Runner | _ParallelRunner,
    bar: Any,
) -> None:
    """Fill the chunk's rows of `out`; store what was computed even on Ctrl-C."""
    out[chunk.cached_rows] = chunk.cached
    bar.update(len(chunk.cached_rows))
    rows, part, namespace = chunk.rows, chunk.texts, runner.request.namespace
    if not part:
        return
    unsaved: list[int] = []

    def store() -> None:
        if unsaved and not runner.cache_failed and cache is not None:
            try:
                cache.store(namespace, [part[i] for i in unsaved], out[rows[unsaved]])
            except CacheError as error:  # no room, say: the vectors are worth more than the cache
                runner.cache_failed = True
                warnings.warn(
                    f"The cache takes no more vectors; this call goes on without it. {error}",
                    SkembedWarning,
                    stacklevel=2,
                )
        unsaved.clear()

    try:
        for done, vectors in runner.run(part, chunk.encoded):
            if not np.isfinite(np.vdot(vectors, vectors)):
                _check_finite(rows[done], vectors)
            out[rows[done]] = vectors
            unsaved.extend(done.tolist())
            bar.update(len(done))
            if len(unsaved) >= STORE_ROWS:
                store()
    finally:
        store()
    if len(part) >= TRIM_TEXTS:
        release_free_memory()


def _check_finite(rows: np.ndarray, vectors: np.ndarray) -> None:
    """Raise CheckpointError for vectors without a finite norm, of the texts in these rows."""
    bad = rows[~np.isfinite(np.einsum("nd,nd->n", vectors, vectors))]
    if len(bad):
        raise CheckpointError(
            f"The model gives NaN, infinite or huge values for texts[{bad.min()}]: its weights, or "
            "those of its adapter, are damaged or too large for its type. Pass dtype='float32' or "
            "'bfloat16', or train the adapter again with a lower learning rate."
        )


class _Runner:
    """Runner of chunks of texts through the model, with the token budget that fits."""

    def __init__(
        self,
        request: EmbedRequest,
        get_models: Callable[[], Sequence[LoadedModel]],
        batch_tokens: int | None,
        report: EmbedReport,
    ) -> None:
        self.request = request
        self.report = report
        self.cache_failed = False
        self._get_models = get_models
        self._batch_tokens = batch_tokens
        self._replicas: list[LoadedModel] = []
        self._guard = threading.Lock()

    @property
    def loaded(self) -> LoadedModel:
        """The model, fetched at first use; the first of several replicas."""
        if not self._replicas:
            self._replicas = list(self._get_models())
            self.report.batch_tokens = self._batch_tokens or min(
                map(default_batch_tokens, self._replicas)
            )
        return self._replicas[0]

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Return token ids of texts; may be called from another thread than `run`."""
        with self._guard:
            loaded = self.loaded
        request = self.request
        return loaded.tokenizer.encode(
            texts,
            prefix=request.prefix,
            max_length=request.max_length,
            mask_prefix=loaded.config.is_mask_instruction,
        )

    def run(
        self, texts: list[str], encoded: EncodedTexts
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions in `texts` and their vectors, batch by batch."""
        report = self.report
        report.n_truncated += encoded.n_truncated
        report.n_embedded += len(texts)
        report.n_tokens += int(encoded.lengths.sum())
        left = np.arange(len(texts))
        while len(left):  # again with half the budget after running out of memory
            finished = []
            try:
                for rows, vectors in self._run_batches(encoded, left):
                    finished.append(rows)
                    yield rows, vectors
                return
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # Its traceback holds the frames of the failed pass, and these its activations.
                failure = error.with_traceback(None)
            left = np.setdiff1d(left, np.concatenate(finished) if finished else [])
            self._halve_budget(failure, int(encoded.lengths[left].max()))

    def _halve_budget(self, error: BaseException, longest: int) -> None:
        """Halve the budget; raise MemoryError if a single text does not fit."""
        budget = self.report.batch_tokens
        if budget <= max(MIN_BATCH_TOKENS, longest // 2):
            raise MemoryError(
                f"One text of {longest} tokens does not fit into the memory of "
                f"{self.loaded.key.device}. Lower `max_length`, or use another `device`. Finished "
                "texts are in the cache."
            ) from error
        self.report.batch_tokens = budget // 2
        logger.warning("out of memory at %d tokens a batch; going on with half", budget)
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_batches(
        self, encoded: EncodedTexts, left: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows and vectors, from all replicas at once, or several streams on one CPU."""
        replicas, budget = self._replicas, self.report.batch_tokens
        lengths = encoded.lengths[left]
        n_tokens = int(lengths.sum())
        n_threads = None
        if replicas[0].device.type == "cpu":
            n_cores = torch.get_num_threads()
            if len(replicas) == 1:
                replicas = replicas * count_streams(n_cores, n_tokens)
            n_threads = max(1, n_cores // len(replicas))
        if len(replicas) > 1:  # none stands idle while another has two batches to go
            share = -(-n_tokens // (2 * len(replicas)))
            budget = min(budget, max(share, MIN_BATCH_TOKENS))
        padded = any(loaded.model.attention_path == "padded" for loaded in replicas)
        batches = iterate_batches(lengths, budget, shortest=SHORTEST_PADDED if padded else 0.0)
        rows = (left[batch] for batch in batches)
        if len(replicas) == 1:
            yield from self._run_on(replicas[0], encoded, budget, rows)
            return
        workers = [partial(self._run_on, loaded, encoded, budget) for loaded in replicas]
        yield from spread(rows, workers, n_threads=n_threads)

    def _run_on(
        self, loaded: LoadedModel, encoded: EncodedTexts, budget: int, batches: Iterator[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows and vectors; on CUDA a pass is queued before the one before it is fetched."""
        may_fill = len(encoded.ids) >= REST_TEXTS and loaded.model.attention_path != "padded"
        depth = 1 if loaded.device.type == "cuda" else 0
        pending: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
        for rows in batches:
            lengths = encoded.lengths[rows]
            # The rest of a chunk, where another text would have fitted. Each has another size, and
            # the CPU's matrix products keep code and memory of each size.
            coarse = may_fill and bool(lengths.sum() + lengths.min() <= budget)
            pending.append((rows, self._start(loaded, encoded, rows, coarse)))
            if len(pending) > depth:
                done, fetch = pending.popleft()
                yield done, fetch()
        for done, fetch in pending:
            yield done, fetch()

    def _start(
        self, loaded: LoadedModel, encoded: EncodedTexts, rows: np.ndarray, coarse: bool
    ) -> Callable[[], np.ndarray]:
        """Launch one forward pass; return what waits for its vectors (B, D) on the host.

        `coarse` fills the batch up to one of very few sizes.
        """
        on_cpu = loaded.device.type == "cpu"
        with torch.inference_mode():
            # oneDNN does the products of the fused pass, and those in half precision, and pays for
            # each new size: pad the batch to one of few sizes.
            on_grid = on_cpu and (loaded.key.dtype != "float32" or loaded.model.runs_fused)
            batch = pack_texts(
                [encoded.ids[i] for i in rows], encoded.pool_start, on_grid=on_grid, coarse=coarse
            )
            if loaded.model.attention_path == "padded":
                n_positions = max(batch.lengths) * len(batch.lengths)
            else:
                n_positions = len(batch.input_ids)
            with self._guard:
                self.report.n_positions += n_positions
            if on_cpu:
                return loaded.model(batch)[: batch.n_texts].numpy
            # Kernels and events that name no GPU go to the current one.
            is_cuda = loaded.device.type == "cuda"
            with torch.cuda.device(loaded.device) if is_cuda else nullcontext():
                return _copy_to_host(loaded.model(batch.to(loaded.device)))


def _copy_to_host(vectors: Tensor) -> Callable[[], np.ndarray]:
    """Start copying to the host, on CUDA into pinned memory; return what waits for the copy."""
    if vectors.device.type != "cuda":
        return vectors.cpu().numpy
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(vectors.device))  # not the current device's

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


class _ParallelRunner:
    """Runner over joblib's workers, each of which loads the model once and keeps it."""

    def __init__(
        self,
        request: EmbedRequest,
        load_in_worker: Callable[[], LoadedModel],
        batch_tokens: int | None,
        report: EmbedReport,
        workers: int,
    ) -> None:
        self.request = request
        self.report = report
        self.cache_failed = False
        self._load = load_in_worker
        self._batch_tokens = batch_tokens
        self._workers = workers

    def encode(self, texts: list[str]) -> None:
        """Do nothing: the workers tokenise."""

    def run(self, texts: list[str], encoded: None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions in `texts` and their vectors, part by part."""
        n_parts = max(self._workers, len(texts) // STORE_ROWS)
        parts = [np.arange(k, len(texts), n_parts) for k in range(n_parts)]  # alike in length
        parts = [rows for rows in parts if len(rows)]
        common = (self.request, self._load, self._batch_tokens, self._workers, name_process())
        calls = (([texts[i] for i in rows], *common) for rows in parts)
        results = run_tasks(_embed_in_worker, calls, self._workers)
        for rows, (vectors, report) in zip(parts, results, strict=True):
            self.report.add(report)
            yield rows, vectors


def _embed_in_worker(
    texts: list[str],
    request: EmbedRequest,
    load: Callable[[], LoadedModel],
    batch_tokens: int | None,
    n_workers: int,
    home: tuple[str, int],
) -> tuple[np.ndarray, EmbedReport]:
    """Return raw vectors and counts of one part, inside a worker."""
    with share_cores(n_workers, home):
        if home != name_process():  # a worker process: its model serves the tasks to come
            registry.keep(load())
        return embed_texts(
            texts,
            request,
            get_models=lambda: [load()],
            cache=None,
            batch_tokens=batch_tokens,
            progress=False,
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that torch or Python ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def count_streams(n_cores: int, n_tokens: int) -> int:
    """Return how many forward passes share a CPU: their cores need not wait for each other."""
    return max(1, min(n_cores, MAX_STREAMS, n_tokens // STREAM_TOKENS))


def default_batch_tokens(loaded: LoadedModel) -> int:
    """Return tokens of one forward pass: for the CPU's cache, or a fifth of a GPU's free memory."""
    if loaded.device.type != "cuda":
        return CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(loaded.device)
    backbone = loaded.model.embedding_model.config
    width = 3 * backbone.intermediate_size + 8 * backbone.hidden_size
    bytes_per_token = width * torch.finfo(loaded.key.compute_dtype).bits // 8
    return int(np.clip(free // 5 // bytes_per_token, MIN_BATCH_TOKENS, MAX_BATCH_TOKENS))
