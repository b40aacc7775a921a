"""Tables of the embedding cache's file, and what a transaction does with them.

A vector is stored in a block of a few rows. An index maps the first eight bytes of each digest, an
integer, to its block; the block holds the whole digests, which decide, and a checksum of each row:
a damaged one counts as absent. The caller has begun a transaction; errors of SQLite pass through.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from skembed.cache.sqlite_log import PAGE_BYTES
from skembed.cache.stores import COPY_ROWS

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "compute_checks",
    "count_block_rows",
    "count_rows",
    "delete_all",
    "estimate_row_bytes",
    "evict",
    "fetch_rows",
    "insert_rows",
    "touch",
    "used_bytes",
]

SCHEMA_VERSION = 3
# Vectors are appended in order; only `entries` is written in random order, so it holds two integers
# a row. Uses change only `uses`, which has few pages.
SCHEMA = (
    "CREATE TABLE mark (previous BLOB NOT NULL, current BLOB NOT NULL)",  # first: see sqlite_log
    "CREATE TABLE entries (key INTEGER PRIMARY KEY, slot INTEGER NOT NULL)",
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY, row_bytes INTEGER NOT NULL,"
    " heads BLOB NOT NULL, vectors BLOB NOT NULL)",
    "CREATE TABLE uses (block INTEGER PRIMARY KEY, tick INTEGER NOT NULL)",
    "CREATE TABLE state (tick INTEGER NOT NULL, dtype TEXT NOT NULL)",
)
# What a block knows of a row: its digest, and the checksum of both.
_HEAD = np.dtype([("digest", "<i8", 2), ("check", "<u4")])
_SLOTS = 16  # slot = _SLOTS * block + offset in the block
# Rows that share a block are read together: a larger block would cost more than it saves.
_BLOCK_BYTES = 12_288
_ENTRY_BYTES = 28  # one row of `entries`, in pages that are on average 70 % full
_USE_BYTES = 10
# Few distinct statements, so that each is compiled once.
_SELECT_SIZES = (1, 8, 32, 64, 128, 256, 512)
# Blocks read by one statement: their copies stay in the processor's cache and grow no heap.
_READ_BYTES = 5 << 18
_FEW_ROWS = 4
# Damage can turn a value into any other: these give an integer or nothing, and bytes.
_WHOLE = "typeof({}) = 'integer'"
_BLOB = "coalesce(CAST({} AS BLOB), x'')"
_SELECT_SLOTS = f"SELECT key, slot FROM entries WHERE key IN ({{}}) AND {_WHOLE.format('slot')}"
_SELECT_BLOCKS = (
    f"SELECT id, row_bytes, {_BLOB.format('heads')}, {_BLOB.format('vectors')}"
    " FROM blocks WHERE id IN ({})"
)
_SELECT_HEADS = f"SELECT id, {_BLOB.format('heads')} FROM blocks WHERE id IN ({{}})"
_MAX_BLOCK = 1 << 58
_MAX_TICK = 1 << 62

_Integers = npt.NDArray[np.int64]


# Reading


def fetch_rows(
    connection: sqlite3.Connection,
    digests: _Integers,
    out: npt.NDArray[np.float32],
    dtype: np.dtype[Any],
) -> tuple[npt.NDArray[np.bool_], _Integers]:
    """Copy the vectors of `digests` (n, 2) into `out` (n, dim).

    Returns which rows were found, (n,), and the blocks that hold them.
    """
    if len(digests) <= _FEW_ROWS:
        return _fetch_few(connection, digests, out, dtype)
    mask = np.zeros(len(digests), dtype=np.bool_)
    slots = _find_slots(connection, digests[:, 0])  # (n,)
    rows = np.flatnonzero(slots >= 0)
    rows = rows[np.argsort(slots[rows], kind="stable")]  # in the order of the file
    block_ids, offsets = np.divmod(slots[rows], _SLOTS)
    blocks, first = np.unique(block_ids, return_index=True)
    first = np.append(first, len(rows))
    row_bytes = out.shape[1] * dtype.itemsize
    n_blocks = _count_blocks_read(row_bytes)
    for start in range(0, len(blocks), n_blocks):
        stop = min(start + n_blocks, len(blocks))
        part = slice(first[start], first[stop])
        heads, vectors, begin = _read_blocks(connection, blocks[start:stop], out.shape[1], dtype)
        source = begin[np.searchsorted(blocks[start:stop], block_ids[part])] + offsets[part]
        target = rows[part]
        # A block of another width begins far below zero.
        inside = (source >= 0) & (source < len(heads))
        source, target = source[inside], target[inside]
        found = vectors[source]
        same = (heads["digest"][source] == digests[target]).all(axis=1)
        same &= heads["check"][source] == compute_checks(digests[target], found)
        if not same.all():
            target, found = target[same], found[same]
        # Converted first: an assignment that converts takes twice as long.
        out[target] = found.astype(np.float32, copy=False)
        mask[target] = True
    return mask, blocks


def _fetch_few(
    connection: sqlite3.Connection,
    digests: _Integers,
    out: npt.NDArray[np.float32],
    dtype: np.dtype[Any],
) -> tuple[npt.NDArray[np.bool_], _Integers]:
    """Do the work of `fetch_rows` row by row, for a single one in half the time."""
    sql = (
        f"SELECT e.slot % {_SLOTS}, b.id, {_BLOB.format('b.heads')}, {_BLOB.format('b.vectors')}"
        f" FROM entries e CROSS JOIN blocks b ON b.id = e.slot / {_SLOTS}"
        f" WHERE e.key = ? AND b.row_bytes = ? AND {_WHOLE.format('e.slot')}"
    )
    mask = np.zeros(len(digests), dtype=np.bool_)
    blocks: list[int] = []
    row_bytes, seed = out.shape[1] * dtype.itemsize, _seed(dtype)
    for position, digest in enumerate(digests):
        row = connection.execute(sql, (int(digest[0]), row_bytes)).fetchone()
        if row is None:
            continue
        offset, block, heads, vectors = row
        blocks.append(block)
        head = heads[offset * _HEAD.itemsize : (offset + 1) * _HEAD.itemsize]
        vector = vectors[offset * row_bytes : (offset + 1) * row_bytes]
        key = digest.tobytes()
        check = zlib.crc32(vector, seed) ^ int.from_bytes(key[8:12], "little")
        if head == key + check.to_bytes(4, "little") and len(vector) == row_bytes:
            out[position] = np.frombuffer(vector, dtype)
            mask[position] = True
    return mask, np.array(blocks, dtype=np.int64)


def _seed(dtype: np.dtype[Any]) -> int:
    """Return where the checksum of a row of that type begins."""
    return zlib.crc32(dtype.str.encode())


def compute_checks(digests: _Integers, rows: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Return the checksums (n,) of rows (n, dim) with their digests (n, 2) and type."""
    crc32, seed = zlib.crc32, _seed(rows.dtype)
    checks = np.array([crc32(row, seed) for row in rows.view(np.uint8)], dtype="<u4")
    return checks ^ digests[:, 1].astype("<u4")  # of another digest, a row is another row


def _find_slots(connection: sqlite3.Connection, keys: _Integers) -> _Integers:
    """Return the slot of each key (n,), -1 where there is none."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    slots = np.full(len(distinct), -1, dtype=np.int64)
    entries = _select(connection, _SELECT_SLOTS, distinct)
    pairs = np.fromiter(chain.from_iterable(entries), dtype=np.int64).reshape(-1, 2)
    slots[np.searchsorted(distinct, pairs[:, 0])] = pairs[:, 1]
    result: _Integers = slots[inverse]
    return result


def _read_blocks(
    connection: sqlite3.Connection, blocks: _Integers, dim: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], _Integers]:
    """Return heads (n_rows,) and vectors (n_rows, dim), and where each block begins.

    A block that is absent, or holds vectors of another width, begins far below zero.
    """
    row_bytes = dim * dtype.itemsize
    read = [
        row
        for row in _select(connection, _SELECT_BLOCKS, blocks)
        if row[1] == row_bytes and len(row[2]) * row_bytes == len(row[3]) * _HEAD.itemsize
    ]
    heads = np.frombuffer(b"".join([row[2] for row in read]), dtype=_HEAD)
    vectors = np.frombuffer(b"".join([row[3] for row in read]), dtype=dtype)
    sizes = np.array([len(row[2]) // _HEAD.itemsize for row in read], dtype=np.int64)
    ids = np.array([row[0] for row in read], dtype=np.int64)
    begin = np.full(len(blocks), -2 * _SLOTS, dtype=np.int64)
    begin[np.searchsorted(blocks, ids)] = np.cumsum(sizes) - sizes
    return heads, vectors.reshape(len(heads), dim), begin


def _count_blocks_read(row_bytes: int) -> int:
    """Return the number of blocks that one statement reads."""
    block_bytes = max(1, row_bytes * count_block_rows(row_bytes))
    return max(size for size in _SELECT_SIZES if size == 1 or size * block_bytes <= _READ_BYTES)


def _select(connection: sqlite3.Connection, sql: str, keys: _Integers) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of `sql`, whose ``{}`` stands for the keys, in any order."""
    largest = _SELECT_SIZES[-1]
    values: list[int] = keys.tolist()
    for start in range(0, len(values), largest):
        batch: list[int | None] = list(values[start : start + largest])
        size = next(size for size in _SELECT_SIZES if size >= len(batch))
        batch += [None] * (size - len(batch))  # NULL is never IN anything
        yield from connection.execute(sql.format(",".join("?" * size)), batch)


# Writing


def insert_rows(
    connection: sqlite3.Connection,
    digests: _Integers,
    vectors: npt.NDArray[np.float32],
    positions: _Integers,
    dtype: np.dtype[Any],
) -> None:
    """Write row ``positions[i]`` of `vectors` under ``digests[i]``, in new blocks."""
    # Of two digests with the same first half, which are most unlikely, the last is stored.
    _, last = np.unique(digests[::-1, 0], return_index=True)
    if len(last) < len(digests):
        order = np.sort(len(digests) - 1 - last)
        digests, positions = digests[order], positions[order]
    n_rows = len(digests)
    size = count_block_rows(vectors.shape[1] * dtype.itemsize)
    (block,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM blocks").fetchone()
    if not 0 < block < _MAX_BLOCK:
        raise sqlite3.DatabaseError("malformed: a block has an impossible number")
    number, offset = np.divmod(np.arange(n_rows), size)
    slots = (block + number) * _SLOTS + offset
    connection.executemany(
        "INSERT INTO blocks VALUES (?, ?, ?, ?)",
        _iter_blocks(digests, vectors, positions, dtype, block, size),
    )
    tick = _read_tick(connection)
    n_blocks = -(-n_rows // size)
    connection.executemany(
        "INSERT INTO uses VALUES (?, ?)", ((block + i, tick) for i in range(n_blocks))
    )
    _enter(connection, digests[:, 0], slots, block)


def _iter_blocks(
    digests: _Integers,
    vectors: npt.NDArray[np.float32],
    positions: _Integers,
    dtype: np.dtype[Any],
    block: int,
    size: int,
) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield the rows of the table `blocks`; the first has the id `block`."""
    row_bytes = vectors.shape[1] * dtype.itemsize
    step = COPY_ROWS // size * size
    for start in range(0, len(digests), step):
        part = vectors[positions[start : start + step]].astype(dtype, copy=False)
        heads = np.empty(len(part), dtype=_HEAD)
        heads["digest"] = digests[start : start + step]
        heads["check"] = compute_checks(heads["digest"], part)
        for first in range(0, len(part), size):
            rows = slice(first, first + size)
            yield block, row_bytes, heads[rows].tobytes(), part[rows].tobytes()
            block += 1


def _enter(connection: sqlite3.Connection, keys: _Integers, slots: _Integers, block: int) -> None:
    """Point the index to new slots, and drop the blocks that it no longer points to."""
    order = np.argsort(keys)  # rows that share a page are written one after the other
    keys, slots = keys[order], slots[order]
    pairs = list(zip(keys.tolist(), slots.tolist(), strict=True))
    added = connection.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", pairs).rowcount
    if added == len(pairs):
        return
    old = _find_slots(connection, keys)
    is_old = old < block * _SLOTS
    changes = zip(slots[is_old].tolist(), keys[is_old].tolist(), strict=True)
    connection.executemany("UPDATE entries SET slot = ? WHERE key = ?", changes)
    _drop_dead(connection, np.unique(old[is_old] // _SLOTS))


def _drop_dead(connection: sqlite3.Connection, blocks: _Integers) -> None:
    """Delete those of `blocks` that hold no row of the index."""
    for ids, keys in _iter_keys(connection, blocks):
        alive = ids[_find_slots(connection, keys) // _SLOTS == ids]
        _delete_blocks(connection, np.setdiff1d(ids, alive))


def _iter_keys(
    connection: sqlite3.Connection, blocks: _Integers
) -> Iterator[tuple[_Integers, _Integers]]:
    """Yield block (n,) and key (n,) of all rows in `blocks`, some hundred blocks at a time."""
    largest = _SELECT_SIZES[-1]
    for start in range(0, len(blocks), largest):
        rows = list(_select(connection, _SELECT_HEADS, blocks[start : start + largest]))
        rows = [row for row in rows if len(row[1]) % _HEAD.itemsize == 0]
        sizes = [len(row[1]) // _HEAD.itemsize for row in rows]
        ids = np.repeat(np.array([row[0] for row in rows], dtype=np.int64), sizes)
        heads = np.frombuffer(b"".join([row[1] for row in rows]), dtype=_HEAD)
        yield ids, heads["digest"][:, 0]


def _delete_blocks(connection: sqlite3.Connection, blocks: _Integers) -> None:
    """Delete blocks and the record of their use, but not what points to them."""
    ids = [(block,) for block in blocks.tolist()]
    connection.executemany("DELETE FROM blocks WHERE id = ?", ids)
    connection.executemany("DELETE FROM uses WHERE block = ?", ids)


def _read_tick(connection: sqlite3.Connection) -> int:
    """Return the clock of the file."""
    row = connection.execute("SELECT tick FROM state").fetchone()
    if row is None or not isinstance(row[0], int) or not 0 <= row[0] < _MAX_TICK:
        raise sqlite3.DatabaseError("malformed: an impossible time")
    return row[0]


def touch(connection: sqlite3.Connection, blocks: Sequence[int]) -> None:
    """Record that blocks were used after all that the last ``store`` wrote."""
    # `store` leaves an even tick; uses get the odd one after it.
    tick = _read_tick(connection) + 1
    connection.executemany(
        "UPDATE uses SET tick = ?1 WHERE block = ?2 AND tick < ?1",
        [(tick, block) for block in sorted(blocks)],
    )


def evict(connection: sqlite3.Connection, target_bytes: int) -> None:
    """Delete the least recently used blocks until at most `target_bytes` are in use."""
    while (used := used_bytes(connection)) > target_bytes:
        (n_blocks,) = connection.execute("SELECT count(*) FROM uses").fetchone()
        if not n_blocks:
            return
        share = min(1.0, (used - max(target_bytes, 0)) / used)
        oldest = connection.execute(
            "SELECT block FROM uses ORDER BY tick, block LIMIT ?",
            (max(1, int(n_blocks * share)),),
        )
        blocks = np.array([block for (block,) in oldest], dtype=np.int64)
        blocks.sort()
        for ids, keys in _iter_keys(connection, blocks):
            order = np.argsort(keys)
            first = ids[order] * _SLOTS
            pairs = zip(keys[order].tolist(), first.tolist(), strict=True)
            connection.executemany(  # a key may now point to another block
                f"DELETE FROM entries WHERE key = ?1 AND slot >= ?2 AND slot < ?2 + {_SLOTS}",
                pairs,
            )
        _delete_blocks(connection, blocks)


def delete_all(connection: sqlite3.Connection) -> None:
    """Delete every row."""
    for table in ("entries", "blocks", "uses"):
        connection.execute(f"DELETE FROM {table}")


# Sizes


def count_rows(connection: sqlite3.Connection) -> int:
    """Return the number of rows."""
    (n_rows,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    return int(n_rows)


def used_bytes(connection: sqlite3.Connection) -> int:
    """Return the bytes of all pages in use."""
    (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
    (n_free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return (int(n_pages) - int(n_free)) * PAGE_BYTES


@lru_cache(maxsize=64)
def count_block_rows(row_bytes: int) -> int:
    """Return how many rows share a block: the fewest that leave little of its pages empty."""
    largest = max(1, min(_SLOTS, _BLOCK_BYTES // max(1, row_bytes)))
    costs = [_estimate_block_bytes(n, row_bytes) / n for n in range(1, largest + 1)]
    return next(n for n, cost in enumerate(costs, start=1) if cost <= 1.03 * min(costs))


def estimate_row_bytes(row_bytes: int) -> int:
    """Return the bytes of a row in the file: its share of a full block, and its index entry."""
    n_rows = count_block_rows(row_bytes)
    block_bytes = _estimate_block_bytes(n_rows, row_bytes) + _USE_BYTES
    return -int(-block_bytes // n_rows) + _ENTRY_BYTES


def _estimate_block_bytes(n_rows: int, row_bytes: int) -> float:
    """Return the bytes of a block in the file, by SQLite's rules for long rows.

    References: https://www.sqlite.org/fileformat2.html, section 1.6.
    """
    payload = n_rows * (row_bytes + _HEAD.itemsize) + 11  # with the record's header
    smallest, largest, per_page = 489, PAGE_BYTES - 35, PAGE_BYTES - 4
    local = payload
    if payload > largest:
        local = smallest + (payload - smallest) % per_page
        local = local if local <= largest else smallest
    n_overflow = -(-(payload - local) // per_page)
    n_on_page = max(1, (PAGE_BYTES - 8) // (local + 11))
    return n_overflow * PAGE_BYTES + PAGE_BYTES / n_on_page
