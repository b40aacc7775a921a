"""The cache of embeddings, and what the `cache` parameter of an estimator stands for.

A cache holds digests and vectors, never the texts.
"""

from __future__ import annotations

import os
import pathlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed._validation import check_choice, check_int, check_string
from skembed.cache.file_store import FileStore
from skembed.cache.stores import DTYPES, KEY_BYTES, MemoryStore, Store, find_storable

__all__ = ["EmbeddingCache", "resolve_cache"]

_DEFAULT_MEMORY_BYTES = 1 << 30
# What stands for memory elsewhere; nobody means a file of that name.
_IN_MEMORY = re.compile(r":?memory:?$|file:", re.IGNORECASE)
# Bounds what one step copies: at most this many rows, and about this many bytes.
_CHUNK_ROWS = 8192
_CHUNK_BYTES = 16 << 20


class EmbeddingCache:
    """Bounded cache of vectors, one per text and namespace.

    Create one to share embeddings between runs and processes (give a path), to set a
    limit, or to read the counters; ``NVEmbedVectorizer(cache="memory")`` works without.
    All methods may be called from several threads.

    Parameters
    ----------
    path : str or os.PathLike or None, default=None
        The SQLite file, created at first use in a folder that must exist. None keeps the
        vectors in memory.
    max_bytes : int or None, default=None
        Limit in bytes. The least recently used rows are dropped first. None means 1 GiB
        in memory, and no limit for a file.
    dtype : {"float32", "float16"} or None, default=None
        Storage type of the vectors; ``lookup`` gives float32 either way. "float16" halves the
        space and rounds each component: see Notes. None means the type of the file, and
        "float32" for a new file or memory.

    Attributes
    ----------
    path : pathlib.Path or None
        Absolute path of the file, links resolved.
    max_bytes : int or None
        The limit in force.
    dtype : {"float32", "float16"} or None
        As given; ``stats()["dtype"]`` is the type in force.
    hits, misses : int
        Texts found and not found by ``lookup`` of this object, since it was created or
        last cleared. Not shared between processes.
    size_bytes : int
        Memory: keys, vectors and the measured overhead of both. File: the pages in use,
        without SQLite's write-ahead log beside it (some 30 MB, or the largest call of
        ``store``).

    Raises
    ------
    TypeError
        If `path`, `max_bytes` or `dtype` is of another type.
    ValueError
        If `path` is empty or SQLite's name for memory, `max_bytes` is below 1, or `dtype` is not
        one of those above.

    Notes
    -----
    ``copy.copy``, ``copy.deepcopy`` and scikit-learn's ``clone`` return the cache
    itself, so that clones of an estimator share it. A pickle holds path, limit and type,
    no vectors: a file is opened again where the pickle is loaded, a memory cache arrives
    empty, and the default of ``cache="memory"`` becomes the default of that process.

    A file may be used by several processes at once, on a local disk (SQLite's
    write-ahead log does not work over a network share). Each ``store`` is one
    transaction: once it has returned, a killed process (SIGKILL) loses nothing. The log
    is not flushed to the disk at every transaction (``synchronous=NORMAL``), so the last
    ones can be lost when the machine itself loses power; the file stays sound.

    The order of use in a file is approximate: ``lookup`` never writes, and what it
    used is recorded by the next ``store`` or ``close`` of the same object, if it has a
    limit. Rows stored by one call form blocks of up to 16 (3 at 384 dimensions), which
    are read and dropped together. The space of a replaced row is free once its whole
    block is. Each row has a checksum: a damaged one counts as not found. The file is read
    through a memory map: copying over it while it is open is not safe, moving another file into
    its place between two calls is. A log that a killed process left beside another file is
    deleted. A new file can be read by its owner only.

    With ``dtype="float16"`` a component is off by at most a factor of 1 +- 2 ** -11, or by
    2 ** -25 where it is smaller than 2 ** -14. A row with a component of 65520 or more, which
    would become infinite, is not stored: ``lookup`` does not find it. The vectors passed to
    ``store`` stay as they are, so a text's first embedding and those from the cache differ by
    the rounding. A file never changes its type; another one in `dtype` raises ``CacheError``.

    A file that is not such a cache, is damaged, or has another release's layout raises
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
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int | None = None,
        dtype: str | None = None,
    ) -> None:
        max_bytes = check_int(
            max_bytes, name="max_bytes", owner="EmbeddingCache", low=1, allow_none=True
        )
        dtype = check_choice(dtype, name="dtype", owner="EmbeddingCache", allowed=[*DTYPES, None])
        self._store: Store
        self._path: pathlib.Path | None = None
        if path is None:
            max_bytes = _DEFAULT_MEMORY_BYTES if max_bytes is None else max_bytes
            self._store = MemoryStore(max_bytes, dtype or "float32")
        else:
            self._path = _resolve_path(path, name="path", owner="EmbeddingCache")
            self._store = FileStore(self._path, max_bytes, dtype)
        self._max_bytes = max_bytes
        self._dtype = dtype
        self._hits = 0
        self._misses = 0
        self._lock = threading.RLock()
        # Newer Python versions warn about connections that are never closed.
        weakref.finalize(self, self._store.close)
        with _registry_lock:
            _instances.add(self)

    @property
    def path(self) -> pathlib.Path | None:
        """Absolute path of the file, or None for a memory cache."""
        return self._path

    @property
    def max_bytes(self) -> int | None:
        """Limit in bytes, or None for a file without one."""
        return self._max_bytes

    @property
    def dtype(self) -> str | None:
        """Requested type, or None; ``stats()["dtype"]`` is the one in force."""
        return self._dtype

    @property
    def hits(self) -> int:
        """Number of texts that ``lookup`` found."""
        return self._hits

    @property
    def misses(self) -> int:
        """Number of texts that ``lookup`` did not find."""
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

        Thousands at once cost microseconds each; benchmarks/cache_throughput.py measures it.

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
        for rows in _iter_chunks(len(keys), out.shape[1] * out.itemsize):
            with self._lock:
                mask[rows] = self._store.fetch(keys[rows], out[rows])
        n_hits = int(np.count_nonzero(mask))
        with self._lock:
            self._hits += n_hits
            self._misses += len(keys) - n_hits
        return mask

    def store(self, namespace: str, texts: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Store the vectors of texts, instead of those stored before.

        Rows that are not finite are left out (for float16: not finite once rounded), and
        so are rows for which the limit has no room. In a file, the call is one
        transaction: all of its rows are stored, or none.

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
            If the file cannot be opened or written, for example because the disk is full.
            What was stored before is kept, and the cache can be used again.
        """
        keys = _make_keys(namespace, texts, owner="EmbeddingCache.store")
        array = np.ascontiguousarray(vectors, dtype=np.float32)  # (n, dim)
        _check_rows(array, len(keys), name="vectors", owner="EmbeddingCache.store")
        positions = np.flatnonzero(find_storable(array, DTYPES["float32"])).tolist()
        items: dict[bytes, int] = {keys[position]: position for position in positions}
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
            ``path`` (str or None), ``max_bytes``, ``dtype`` ("float32" or "float16"),
            ``n_rows``, ``size_bytes``, ``hits`` and ``misses``.

        Raises
        ------
        CacheError
            If the file cannot be opened or read.
        """
        with self._lock:
            return {
                "path": None if self._path is None else str(self._path),
                "max_bytes": self._max_bytes,
                "dtype": self._store.dtype(),
                "n_rows": self._store.count(),
                "size_bytes": self._store.size_bytes(),
                "hits": self._hits,
                "misses": self._misses,
            }

    def __repr__(self) -> str:
        path = "" if self._path is None else f"{str(self._path)!r}, "
        dtype = "" if self._dtype is None else f", dtype={self._dtype!r}"
        return f"EmbeddingCache({path}max_bytes={self._max_bytes}{dtype})"

    def __copy__(self) -> EmbeddingCache:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingCache:
        return self

    def __reduce__(self) -> tuple[Callable[..., EmbeddingCache], tuple[Any, ...]]:
        if self is _default_cache:
            return _get_default_cache, ()
        path = None if self._path is None else str(self._path)
        return _restore_cache, (path, self._max_bytes, self._dtype)


def resolve_cache(cache: Any) -> EmbeddingCache | None:
    """Return the cache that the `cache` parameter of an estimator stands for, None for None.

    "memory" is the one memory cache of this process. Equal paths give the same object for as long
    as anyone refers to it. Raises TypeError for another type, ValueError for an empty path.
    """
    if cache is None or isinstance(cache, EmbeddingCache):
        return cache
    if isinstance(cache, str) and cache == "memory":
        return _get_default_cache()
    path = _resolve_path(cache, name="cache", owner="NVEmbedVectorizer")
    return _get_file_cache(path, None, None)


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
    if isinstance(path, str) and _IN_MEMORY.match(text):
        memory = "'memory'" if name == "cache" else "None"
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must be {memory} for a cache in memory, or the "
            f"path of a file; got {text!r}. Write {'./' + text!r} for a file of that name."
        )
    return pathlib.Path(os.path.realpath(os.path.expanduser(text)))


def _make_keys(namespace: str, texts: Sequence[str], *, owner: str) -> list[bytes]:
    """Return the 16-byte digest of namespace and text, for each text."""
    check_string(namespace, name="namespace", owner=owner, allow_empty=True)
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"The `texts` parameter of `{owner}` must be a sequence of texts; got a bare "
            f"{type(texts).__name__}. Wrap it: [text]."
        )
    encoded = namespace.encode("utf-8", "surrogatepass")
    # The length in front keeps other namespaces and texts from joining to the same bytes.
    prefix = blake2b(len(encoded).to_bytes(8, "little") + encoded, digest_size=KEY_BYTES)
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
    """Raise unless an array has one row per text."""
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
    """Yield slices of the rows, each small enough to copy at once."""
    step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, row_bytes)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


# Guards the four names below. A thread that holds the lock of a cache never takes this one.
_registry_lock = threading.RLock()
_instances: weakref.WeakSet[EmbeddingCache] = weakref.WeakSet()
_file_caches: weakref.WeakValueDictionary[tuple[str, int | None, str | None], EmbeddingCache] = (
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


def _get_file_cache(path: pathlib.Path, max_bytes: int | None, dtype: str | None) -> EmbeddingCache:
    """Return the shared cache of a path, limit and type."""
    key = (str(path), max_bytes, dtype)
    with _registry_lock:
        cache = _file_caches.get(key)
        if cache is None:
            cache = EmbeddingCache(path, max_bytes=max_bytes, dtype=dtype)
            _file_caches[key] = cache
        return cache


def _restore_cache(path: str | None, max_bytes: int | None, dtype: str | None) -> EmbeddingCache:
    """Return what a pickled cache stands for in this process."""
    if path is None:
        return EmbeddingCache(max_bytes=max_bytes, dtype=dtype)
    return _get_file_cache(pathlib.Path(path), max_bytes, dtype)


def _before_fork() -> None:
    """Lock every cache, so that the child gets a copy that no thread is changing.

    Files are closed: a child must not touch a connection of its parent, not even to close it, and
    as long as it has one, its own connections do not really lock the file.
    """
    _registry_lock.acquire()
    for cache in list(_instances):
        cache._lock.acquire()
        _held_for_fork.append(cache)
        cache._store.close()


def _after_fork() -> None:
    """Release the locks, in parent and child."""
    while _held_for_fork:
        _held_for_fork.pop()._lock.release()
    _registry_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork,
    )
