"""Keep embeddings per text, in memory or in one SQLite file, so that none is computed twice.

``EmbeddingCache`` is what ``NVEmbedVectorizer(cache=...)`` uses and what a user can
open to read the counters, set a limit or empty it; ``resolve_cache`` turns that
parameter into a cache. A cache holds digests and vectors, never the texts.
"""

import os
import pathlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skembed._cache_file import FileStore
from skembed._validation import check_int, check_string

__all__ = ["EmbeddingCache", "resolve_cache"]

_DEFAULT_MEMORY_BYTES = 1 << 30
# Key (49 bytes), header of the vector's bytes object (33) and its place in an OrderedDict:
# 187 to 198 bytes a row measured with tracemalloc, more right after the table has grown.
_ROW_OVERHEAD_BYTES = 208
_KEY_BYTES = 16
# Bounds what one step copies: at most this many rows, and about this many bytes.
_CHUNK_ROWS = 8192
_CHUNK_BYTES = 16 << 20
_DTYPE = np.dtype("<f4")  # fixed byte order, so that a file can move between machines


class _Store(Protocol):
    """Where the rows are; the caller holds the lock of the cache."""

    def fetch(self, keys: list[bytes], row_bytes: int) -> list[bytes | None]: ...
    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None: ...
    def count(self) -> int: ...
    def size_bytes(self) -> int: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def after_fork(self) -> None: ...


class EmbeddingCache:
    """Bounded cache of float32 vectors, one per text and namespace.

    Use one to share embeddings between runs and processes (give a path), to set a
    limit, or to read the counters; ``NVEmbedVectorizer(cache="memory")`` needs none of
    this. All methods may be called from several threads.

    Parameters
    ----------
    path : str or os.PathLike or None, default=None
        The SQLite file; made at first use, in a folder that must exist. None keeps the
        vectors in memory.
    max_bytes : int or None, default=None
        Limit in bytes. The least recently used rows go first. None means 1 GiB in
        memory, and no limit for a file.

    Attributes
    ----------
    path : pathlib.Path or None
        Absolute path of the file, links resolved.
    max_bytes : int or None
        The limit in force.
    hits, misses : int
        Texts found and not found by ``lookup`` of this object, since it was made or
        last cleared. Not shared between processes.
    size_bytes : int
        Memory: keys, vectors and the measured overhead of both. File: the pages in use,
        without SQLite's write-ahead log beside it (some 30 MB, or the largest call of
        ``store``).

    Raises
    ------
    TypeError
        If `path` or `max_bytes` is of another type.
    ValueError
        If `path` is empty or `max_bytes` is below 1.

    Notes
    -----
    ``copy.copy``, ``copy.deepcopy`` and scikit-learn's ``clone`` return the cache
    itself, so that clones of an estimator share it. A pickle holds the path and the limit,
    no vectors: a file is opened anew where the pickle is loaded, a memory cache arrives
    empty, and the default of ``cache="memory"`` arrives as that process's own default.

    A file may be used by several processes at once, on a local disk (SQLite's
    write-ahead log does not work over a network share). Each ``store`` is one
    transaction: once it has returned, a killed process (SIGKILL) loses nothing. The log
    is not flushed to the disk at every transaction (``synchronous=NORMAL``), so the last
    ones can be lost when the machine itself loses power; the file stays sound.

    The order of use in a file is approximate: ``lookup`` never writes, and what it
    used is recorded by the next ``store`` or ``close`` of the same object, if it has a
    limit. A row's vector takes whole fractions of 4096-byte pages: 2048 bytes for 384
    dimensions. Pages that lose only some of their rows still count as in use.

    A file that is not such a cache, is damaged, or was made by a newer release raises
    ``CacheError`` at first use and is never overwritten.

    Examples
    --------
    >>> import numpy as np
    >>> from skembed import EmbeddingCache
    >>> cache = EmbeddingCache(max_bytes=10_000_000)
    >>> cache.store("model-a", ["a cat"], np.ones((1, 4), dtype=np.float32))
    >>> out = np.zeros((2, 4), dtype=np.float32)
    >>> cache.lookup("model-a", ["a cat", "a dog"], out).tolist()
    [True, False]
    >>> len(cache), cache.hits, cache.misses
    (1, 1, 1)
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int | None = None
    ) -> None:
        max_bytes = check_int(
            max_bytes, name="max_bytes", owner="EmbeddingCache", low=1, allow_none=True
        )
        self._store: _Store
        self._path: pathlib.Path | None = None
        if path is None:
            max_bytes = _DEFAULT_MEMORY_BYTES if max_bytes is None else max_bytes
            self._store = _MemoryStore(max_bytes)
        else:
            self._path = _resolve_path(path, name="path", owner="EmbeddingCache")
            self._store = FileStore(self._path, max_bytes)
        self._max_bytes = max_bytes
        self._hits = 0
        self._misses = 0
        self._lock = threading.RLock()
        # Newer Python versions warn about a connection that nobody has closed.
        weakref.finalize(self, self._store.close)
        with _registry_lock:
            _instances.add(self)

    @property
    def path(self) -> pathlib.Path | None:
        """Absolute path of the file, or None for a memory cache."""
        return self._path

    @property
    def max_bytes(self) -> int | None:
        """The limit in bytes, or None for a file without one."""
        return self._max_bytes

    @property
    def hits(self) -> int:
        """Number of texts that ``lookup`` has found."""
        return self._hits

    @property
    def misses(self) -> int:
        """Number of texts that ``lookup`` has not found."""
        return self._misses

    @property
    def size_bytes(self) -> int:
        """Bytes in use, in memory or in the file."""
        with self._lock:
            return self._store.size_bytes()

    def __len__(self) -> int:
        with self._lock:
            return self._store.count()

    def __bool__(self) -> bool:
        # An empty cache is still a cache: `if cache:` must not depend on its content.
        return True

    def lookup(
        self, namespace: str, texts: Sequence[str], out: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.bool_]:
        """Copy the vectors of known texts into `out`.

        Takes 1 to 3 microseconds a text in memory and 5 to 16 in a file (384 dimensions, up
        to a million rows, 2 cores: benchmarks/cache_throughput.py).

        Parameters
        ----------
        namespace : str
            Everything but the text that changes the vector, as one string.
        texts : sequence of str of length n
            The texts. Repeated ones count each time.
        out : ndarray of shape (n, dim), dtype float32
            Rows of known texts are overwritten, the others left as they are.

        Returns
        -------
        ndarray of shape (n,), dtype bool
            True where the row was found. A vector stored with another `dim` counts as
            not found.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If `out` does not have one row per text.
        CacheError
            If the file cannot be opened or read. The cache can be used again.
        """
        keys = _make_keys(namespace, texts, owner="EmbeddingCache.lookup")
        _check_rows(out, len(keys), name="out", owner="EmbeddingCache.lookup")
        if out.dtype != np.float32:
            raise TypeError(
                "The `out` parameter of `EmbeddingCache.lookup` must be an array of dtype float32; "
                f"got {out.dtype}."
            )
        mask = np.zeros(len(keys), dtype=np.bool_)  # (n,)
        row_bytes = out.shape[1] * _DTYPE.itemsize
        for rows in _iter_chunks(len(keys), row_bytes):
            with self._lock:
                values = self._store.fetch(keys[rows], row_bytes)
            found = [value for value in values if value is not None]
            mask[rows] = [value is not None for value in values]
            vectors = np.frombuffer(b"".join(found), dtype=_DTYPE)
            # (n_found, dim)
            out[rows][mask[rows]] = vectors.reshape(len(found), out.shape[1])
        n_hits = int(np.count_nonzero(mask))
        with self._lock:
            self._hits += n_hits
            self._misses += len(keys) - n_hits
        return mask

    def store(self, namespace: str, texts: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Keep the vectors of texts; those already there are replaced.

        Rows that are not finite are left out, and so are rows for which the limit has no
        room. In a file, the call is one transaction: all of its rows are kept, or none.

        Parameters
        ----------
        namespace : str
            As for ``lookup``.
        texts : sequence of str of length n
            The texts. Of repeated ones, the last counts.
        vectors : array-like of shape (n, dim), dtype float32
            One row per text.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If `vectors` does not have one row per text.
        CacheError
            If the file cannot be opened or written, for one because the disk is full.
            What was stored before is kept, and the cache can be used again.
        """
        keys = _make_keys(namespace, texts, owner="EmbeddingCache.store")
        array = np.ascontiguousarray(vectors, dtype=_DTYPE)  # (n, dim)
        _check_rows(array, len(keys), name="vectors", owner="EmbeddingCache.store")
        items: dict[bytes, int] = {}
        for rows in _iter_chunks(len(keys), array.shape[1] * _DTYPE.itemsize):
            finite = np.isfinite(array[rows]).all(axis=1)  # (n_rows,)
            positions = np.flatnonzero(finite) + rows.start
            items.update((keys[position], position) for position in positions.tolist())
        if items:
            with self._lock:
                self._store.put(items, array)

    def clear(self) -> None:
        """Remove every row and set the counters to zero; a file shrinks to a few pages.

        Raises
        ------
        CacheError
            If the file cannot be opened or written.
        """
        with self._lock:
            self._store.clear()
            self._hits = self._misses = 0

    def close(self) -> None:
        """Close the file; the next use opens it again. A memory cache keeps its rows."""
        with self._lock:
            self._store.close()

    def stats(self) -> dict[str, Any]:
        """Return the counters and sizes in one dict.

        Returns
        -------
        dict
            ``path`` (str or None), ``max_bytes``, ``n_rows``, ``size_bytes``, ``hits`` and
            ``misses``.

        Raises
        ------
        CacheError
            If the file cannot be opened or read.
        """
        with self._lock:
            return {
                "path": None if self._path is None else str(self._path),
                "max_bytes": self._max_bytes,
                "n_rows": self._store.count(),
                "size_bytes": self._store.size_bytes(),
                "hits": self._hits,
                "misses": self._misses,
            }

    def __repr__(self) -> str:
        path = "" if self._path is None else f"{str(self._path)!r}, "
        return f"EmbeddingCache({path}max_bytes={self._max_bytes})"

    def __copy__(self) -> "EmbeddingCache":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "EmbeddingCache":
        return self

    def __reduce__(self) -> tuple[Callable[..., "EmbeddingCache"], tuple[Any, ...]]:
        if self is _default_cache:
            return _get_default_cache, ()
        return _restore_cache, (None if self._path is None else str(self._path), self._max_bytes)


def resolve_cache(cache: Any) -> EmbeddingCache | None:
    """Turn the `cache` parameter of an estimator into a cache.

    Parameters
    ----------
    cache : None, "memory", str, os.PathLike or EmbeddingCache
        None for no cache; "memory" for the one memory cache of this process; a path for
        a file; or a cache.

    Returns
    -------
    EmbeddingCache or None
        Equal paths give the same object for as long as anyone refers to it.

    Raises
    ------
    TypeError
        If `cache` is of another type.
    ValueError
        If `cache` is an empty path.

    Examples
    --------
    >>> from skembed.cache import resolve_cache
    >>> resolve_cache("memory") is resolve_cache("memory")
    True
    """
    if cache is None or isinstance(cache, EmbeddingCache):
        return cache
    if isinstance(cache, str) and cache == "memory":
        return _get_default_cache()
    path = _resolve_path(cache, name="cache", owner="NVEmbedVectorizer")
    return _get_file_cache(path, None)


class _MemoryStore:
    """Rows in an OrderedDict, the least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._size_bytes = 0

    def fetch(self, keys: list[bytes], row_bytes: int) -> list[bytes | None]:
        """Return the row of each key, None where there is none of that length."""
        get, move_to_end = self._rows.get, self._rows.move_to_end
        values = [get(key) for key in keys]
        for position, value in enumerate(values):
            if value is None:
                continue
            if len(value) == row_bytes:
                move_to_end(keys[position])
            else:
                values[position] = None
        return values

    def put(self, items: dict[bytes, int], vectors: npt.NDArray[np.float32]) -> None:
        """Insert row `position` of `vectors` under each key, then evict down to the limit."""
        row_cost = vectors.shape[1] * _DTYPE.itemsize + _ROW_OVERHEAD_BYTES
        if row_cost > self._max_bytes:
            return  # it would push out everything else and then itself
        for key, position in items.items():
            self._remove(self._rows.pop(key, None))
            self._rows[key] = vectors[position].tobytes()
            self._size_bytes += row_cost
            while self._size_bytes > self._max_bytes:
                self._remove(self._rows.popitem(last=False)[1])

    def _remove(self, row: bytes | None) -> None:
        """Take the bytes of a row that has left the dict off the account."""
        if row is not None:
            self._size_bytes -= len(row) + _ROW_OVERHEAD_BYTES

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def size_bytes(self) -> int:
        """Return the bytes held, with the overhead of each row."""
        return self._size_bytes

    def clear(self) -> None:
        """Drop every row; a new dict, as an emptied one keeps its table."""
        self._rows = OrderedDict()
        self._size_bytes = 0

    def close(self) -> None:
        """Do nothing: there is no file to let go of."""

    def after_fork(self) -> None:
        """Do nothing: the child goes on with its own copy of the rows."""


def _resolve_path(path: Any, *, name: str, owner: str) -> pathlib.Path:
    """Return the absolute path with ``~`` and links resolved; the file need not exist."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        allowed = "None, 'memory', a path or an EmbeddingCache" if name == "cache" else "a path"
        raise TypeError(
            f"The `{name}` parameter of `{owner}` must be {allowed}; got a {type(path).__name__}."
        )
    text = check_string(os.fspath(path), name=name, owner=owner)
    if "\0" in text:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must be a path; got one with a null character."
        )
    return pathlib.Path(os.path.realpath(os.path.expanduser(text)))


def _make_keys(namespace: str, texts: Sequence[str], *, owner: str) -> list[bytes]:
    """Return the 16-byte digest of namespace and each text."""
    check_string(namespace, name="namespace", owner=owner, allow_empty=True)
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"The `texts` parameter of `{owner}` must be a sequence of texts; got a bare "
            f"{type(texts).__name__}. Wrap it: [text]."
        )
    encoded = namespace.encode("utf-8", "surrogatepass")
    # With the length in front, no other namespace and text join to the same bytes.
    prefix = blake2b(len(encoded).to_bytes(8, "little") + encoded, digest_size=_KEY_BYTES)
    keys = []
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"The `texts` parameter of `{owner}` must hold texts (str); "
                f"texts[{position}] is a {type(text).__name__}."
            )
        digest = prefix.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return keys


def _check_rows(array: Any, n_rows: int, *, name: str, owner: str) -> None:
    """Refuse an array that does not have one row per text."""
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"The `{name}` parameter of `{owner}` must be an ndarray; got a {type(array).__name__}."
        )
    if array.ndim != 2 or array.shape[0] != n_rows:
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must have shape ({n_rows}, dim), one row per "
            f"text; got {array.shape}."
        )


def _iter_chunks(n_rows: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices over the rows, each small enough to copy in passing."""
    step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, row_bytes)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


# Guards the four names below. Whoever holds the lock of a cache never asks for this one.
_registry_lock = threading.RLock()
_instances: "weakref.WeakSet[EmbeddingCache]" = weakref.WeakSet()
_file_caches: "weakref.WeakValueDictionary[tuple[str, int | None], EmbeddingCache]" = (
    weakref.WeakValueDictionary()
)
_default_cache: EmbeddingCache | None = None
_held_for_fork: list[EmbeddingCache] = []


def _get_default_cache() -> EmbeddingCache:
    """Return the memory cache that ``cache="memory"`` means in this process."""
    global _default_cache
    with _registry_lock:
        if _default_cache is None:
            _default_cache = EmbeddingCache()
        return _default_cache


def _get_file_cache(path: pathlib.Path, max_bytes: int | None) -> EmbeddingCache:
    """Return the shared cache of a path and limit."""
    with _registry_lock:
        cache = _file_caches.get((str(path), max_bytes))
        if cache is None:
            cache = EmbeddingCache(path, max_bytes=max_bytes)
            _file_caches[str(path), max_bytes] = cache
        return cache


def _restore_cache(path: str | None, max_bytes: int | None) -> EmbeddingCache:
    """Return what a pickled cache stands for in this process."""
    if path is None:
        return EmbeddingCache(max_bytes=max_bytes)
    return _get_file_cache(pathlib.Path(path), max_bytes)


def _before_fork() -> None:
    """Wait until no thread is inside a cache, so that the child gets each one whole."""
    _registry_lock.acquire()
    for cache in list(_instances):
        cache._lock.acquire()
        _held_for_fork.append(cache)


def _after_fork_in_parent() -> None:
    """Let the other threads go on."""
    while _held_for_fork:
        _held_for_fork.pop()._lock.release()
    _registry_lock.release()


def _after_fork_in_child() -> None:
    """Let go of the parent's connections and locks."""
    for cache in _held_for_fork:
        cache._store.after_fork()
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
