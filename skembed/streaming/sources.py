"""Sources of texts for streaming, block by block, and the running digest of what was read.

A source has rows in a fixed order: a list or column, an iterator, a frame, or what Arrow reads
(Parquet files and folders, data sets, tables, record batches). One block of rows is in memory at a
time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skembed._inputs import TextColumns, check_texts
from skembed._validation import check_int64, import_optional

__all__ = ["Block", "ID_COLUMN", "TextSource", "check_block", "extend_digest", "open_source"]

ID_COLUMN = "id"
_PURPOSE = "Streaming from or to Arrow and Parquet"
_SCAN_ROWS = 8_192


class Block(NamedTuple):
    """Some rows of a source."""

    texts: Any  # texts or pairs, as `check_texts` takes them
    n_columns: int | None = None  # text columns, where not the texts but the source tells it
    carried: Any = None  # pyarrow.Table of the columns carried along


@dataclass(frozen=True)
class TextSource:
    """Rows to be read once, from the first to the last."""

    n_rows: int | None  # where known before they are read
    is_one_shot: bool  # can be read once only, such as a generator
    read: Callable[[int], Iterator[Block]]  # rows a block -> at least one, all full but the last


def open_source(
    X: Any, *, column: Any, keep_columns: Sequence[str], ids: Any, owner: str
) -> TextSource:
    """Return the source that reads `X`; reads no text yet.

    Raises TypeError if `X` is not a source of texts, ValueError if it lacks a column.
    """
    if isinstance(X, (str, os.PathLike)):
        file = _find_parquet(X, owner=owner)
        with _explain_damage(file, owner=owner):
            source = _open_arrow(_open_parquet(file), column, keep_columns, owner=owner)
        source = replace(source, read=partial(_read_file, file, source.read, owner=owner))
    elif _is_frame(X):
        source = _open_frame(X, column, keep_columns, owner=owner)
    elif _is_arrow_table(X):
        source = _open_arrow(X, column, keep_columns, owner=owner)
    elif column is not None or keep_columns:
        name = "column" if column is not None else "keep_columns"
        raise ValueError(
            f"The `{name}` parameter of `{owner}` is for sources with named columns (Parquet, "
            f"Arrow, frames); got X as a {type(X).__name__}. Leave it out."
        )
    else:
        source = _open_texts(X, owner=owner)
    return source if ids is None else _attach_ids(source, ids, owner=owner)


def check_block(block: Block, start: int, *, owner: str, missing: str) -> TextColumns:
    """Check the texts of a block; errors name the row of the whole source.

    Raises TypeError and ValueError as `check_texts`.
    """
    try:
        columns = check_texts(block.texts, owner=owner, missing=missing)
    except (TypeError, ValueError) as error:
        message = re.sub(r"\bX\[(\d+)\]", lambda m: f"X[{int(m[1]) + start}]", str(error), count=2)
        note = f" The {start} rows before are written." if start else ""
        raise type(error)(message + note) from None
    n = block.n_columns or 1
    if n > 1 and len(columns.columns) == 1:  # no rows: they cannot tell
        return TextColumns(columns.columns * n, columns.missing * n)
    return columns


def extend_digest(digest: bytes, columns: TextColumns, carried: Any) -> bytes:
    """Return the digest of a source up to the end of a block, from that up to its start."""
    state = blake2b(digest, digest_size=16)
    for texts, missing in zip(columns.columns, columns.missing, strict=True):
        encoded = [text.encode("utf-8") for text in texts]
        sizes = np.fromiter(map(len, encoded), dtype="<i8", count=len(encoded))
        for part in (sizes.tobytes(), np.packbits(missing).tobytes(), *encoded):
            state.update(part)
    if carried is not None:
        for name in carried.column_names:
            state.update(repr((name, _to_plain(carried.column(name)))).encode("utf-8", "replace"))
    return state.digest()


def _to_plain(column: Any) -> list[Any]:
    """Return an Arrow column as Python objects: buffers may differ where values do not."""
    pa = import_optional("pyarrow", extra="stream", purpose=_PURPOSE)
    # Nanoseconds have no Python object.
    if pa.types.is_temporal(column.type) and not pa.types.is_interval(column.type):
        width = pa.int32() if column.type.bit_width == 32 else pa.int64()
        column = column.cast(width)
    return column.to_pylist()


def _open_texts(X: Any, *, owner: str) -> TextSource:
    """Open a list, array, Series, Arrow array or any iterable of texts or pairs."""
    refused = (bytes, bytearray, memoryview, Mapping, Set)
    is_flat = isinstance(X, refused) or hasattr(X, "tocsr") or getattr(X, "ndim", 1) == 0
    if is_flat or not isinstance(X, Iterable):
        check_texts(X, owner=owner)  # raises, and says what to do
    rows = X.iloc if hasattr(X, "iloc") else X
    if _is_of_arrow(X) and hasattr(X, "to_pylist"):
        cut = partial(_read_slices, len(X), lambda a, b: X.slice(a, b - a).to_pylist())
        return TextSource(len(X), False, cut)
    is_column = hasattr(X, "dtype") and hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if isinstance(X, (list, tuple)) or is_column:
        return TextSource(len(X), False, partial(_read_slices, len(X), lambda a, b: rows[a:b]))
    n_rows = len(X) if isinstance(X, Sequence) else None
    return TextSource(n_rows, isinstance(X, Iterator), lambda size: _read_items(X, size))


def _is_of_arrow(X: Any) -> bool:
    """Return whether `X` is an object of pyarrow, without importing that."""
    return type(X).__module__.partition(".")[0] == "pyarrow"


def _read_slices(n: int, cut: Callable[[int, int], Any], size: int) -> Iterator[Block]:
    """Yield blocks of a source that `cut` slices; one without rows if it is empty."""
    for start in range(0, max(n, 1), size):
        yield Block(cut(start, min(start + size, n)))


def _read_items(X: Iterable[Any], size: int) -> Iterator[Block]:
    """Yield blocks of an iterable; one without rows if it is empty."""
    items = iter(X)
    part = list(islice(items, size))
    while True:
        following = list(islice(items, 1)) if len(part) == size else []
        yield Block(part)
        if not following:
            return
        part = [*following, *islice(items, size - 1)]


def _is_frame(X: Any) -> bool:
    """Return whether `X` is a pandas frame."""
    return hasattr(X, "iloc") and getattr(X, "ndim", 1) == 2


def _is_arrow_table(X: Any) -> bool:
    """Return whether `X` is a data set, or gives record batches of named columns."""
    if _is_of_arrow(X):
        return hasattr(X, "schema")
    return hasattr(X, "__arrow_c_stream__") and not hasattr(X, "dtype")  # a Series has one


def _find_parquet(path: str | os.PathLike[str], *, owner: str) -> Path:
    """Return the path of a Parquet file or folder."""
    file = Path(os.path.expanduser(path))
    try:
        exists = file.is_file() or file.is_dir()
    except (OSError, ValueError):  # a long text, say
        exists = False
    if not exists:
        step = "Wrap it if it is a text: [text]." if isinstance(path, str) else "Check the path."
        raise TypeError(
            f"The `X` parameter of `{owner}` must be texts, a table, or the path of a Parquet file "
            f"or folder that exists; got a {type(path).__name__} that is none. {step}"
        )
    return file


def _open_parquet(file: Path) -> Any:
    """Return the data set of a Parquet file or folder."""
    dataset = import_optional("pyarrow.dataset", extra="stream", purpose=_PURPOSE)
    return dataset.dataset(file, format="parquet")


def _read_file(
    file: Path, read: Callable[[int], Iterator[Block]], size: int, *, owner: str
) -> Iterator[Block]:
    """Yield the blocks of a Parquet file or folder."""
    with _explain_damage(file, owner=owner):
        yield from read(size)


@contextlib.contextmanager
def _explain_damage(file: Path, *, owner: str) -> Iterator[None]:
    """Raise ValueError for what pyarrow says about a file."""
    pa = import_optional("pyarrow", extra="stream", purpose=_PURPOSE)
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The `X` parameter of `{owner}` must be a Parquet file or folder; {str(file)!r} "
            f"cannot be read as one ({error})."
        ) from error


def _open_frame(X: Any, column: Any, keep: Sequence[str], *, owner: str) -> TextSource:
    """Open a pandas frame; columns are converted to Arrow block by block, all to one schema."""
    names = _choose_columns(list(X.columns), column, keep, owner=owner)
    schema = None
    if keep:
        pa = import_optional("pyarrow", extra="stream", purpose=_PURPOSE)
        schema = pa.Schema.from_pandas(X[list(keep)], preserve_index=False).remove_metadata()

    def read(size: int) -> Iterator[Block]:
        for start in range(0, max(len(X), 1), size):
            part = X.iloc[start : start + size]
            carried = None
            if schema is not None:
                carried = pa.Table.from_pandas(part[list(keep)], schema, preserve_index=False)
                carried = _normalise(pa, carried.replace_schema_metadata())
            columns = [part[name].tolist() for name in names]
            texts = columns[0] if len(names) == 1 else list(zip(*columns, strict=True))
            yield Block(texts, len(names), carried)

    return TextSource(len(X), False, read)


def _open_arrow(X: Any, column: Any, keep: Sequence[str], *, owner: str) -> TextSource:
    """Open a data set, table, record batch, reader, or what exports an Arrow stream."""
    pa = import_optional("pyarrow", extra="stream", purpose=_PURPOSE)
    is_one_shot = hasattr(X, "read_next_batch")
    if not _is_of_arrow(X):
        X = pa.RecordBatchReader.from_stream(X)
    names = _choose_columns(X.schema.names, column, keep, owner=owner)
    for name in names:
        _check_text_type(pa, name, X.schema.field(name).type, owner=owner)
    columns_read = list(dict.fromkeys([*names, *keep]))
    schema = pa.schema([X.schema.field(name) for name in columns_read])

    def read(size: int) -> Iterator[Block]:
        for table in _join_batches(pa, _read_batches(X, columns_read), schema, size):
            columns = [table.column(name).to_pylist() for name in names]
            texts = columns[0] if len(names) == 1 else list(zip(*columns, strict=True))
            carried = _normalise(pa, table.select(list(keep))) if keep else None
            yield Block(texts, len(names), carried)

    return TextSource(_count_rows(X), is_one_shot, read)


def _choose_columns(
    available: Sequence[Any], column: Any, keep: Sequence[str], *, owner: str
) -> list[str]:
    """Return the text columns of a table; check that it has these and the ones to keep."""
    listed = ", ".join(repr(name) for name in available)
    if column is None:
        if len(available) != 1:
            raise ValueError(
                f"The `column` parameter of `{owner}` must name the column of texts; got None, "
                f"and X has several: {listed}."
            )
        column = available[0]
    names = list(column) if isinstance(column, (list, tuple)) else [column]
    if len(names) not in (1, 2):
        raise ValueError(
            f"The `column` parameter of `{owner}` must name one column of texts, or two of pairs; "
            f"got {len(names)}."
        )
    for parameter, given in (("column", names), ("keep_columns", keep)):
        for name in given:
            if list(available).count(name) != 1:
                raise ValueError(
                    f"The `{parameter}` parameter of `{owner}` must name columns that X has once; "
                    f"got {name!r}. X has {listed}."
                )
    return names


def _check_text_type(pa: Any, name: str, kind: Any, *, owner: str) -> None:
    """Refuse a column that holds no texts."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    # Those that `to_pylist` turns into str or None; older pyarrow has no views.
    names = ("is_string", "is_large_string", "is_null", "is_string_view")
    if not any(getattr(pa.types, check, lambda _: False)(value) for check in names):
        raise TypeError(
            f"The `column` parameter of `{owner}` must name a column of texts; {name!r} is of type "
            f"{kind}."
        )


def _count_rows(X: Any) -> int | None:
    """Return the number of rows; None for a reader, which does not know it."""
    n_rows = getattr(X, "num_rows", None)
    if n_rows is None and hasattr(X, "count_rows"):
        n_rows = X.count_rows()
    return n_rows


def _read_batches(X: Any, names: list[str]) -> Iterator[Any]:
    """Yield record batches of some columns, in order."""
    if hasattr(X, "get_fragments"):
        dataset = import_optional("pyarrow.dataset", extra="stream", purpose=_PURPOSE)
        # The defaults read 4 files and 16 batches ahead.
        options: dict[str, Any] = {"batch_readahead": 1, "fragment_readahead": 1}
        if isinstance(getattr(X, "format", None), dataset.ParquetFileFormat):
            options["fragment_scan_options"] = dataset.ParquetFragmentScanOptions(
                use_buffered_stream=True, pre_buffer=False
            )
        yield from X.to_batches(columns=names, batch_size=_SCAN_ROWS, use_threads=False, **options)
    elif hasattr(X, "to_batches"):
        yield from X.select(names).to_batches(max_chunksize=_SCAN_ROWS)
    elif hasattr(X, "read_next_batch"):
        for batch in X:
            yield batch.select(names)
    else:  # one record batch
        yield X.select(names)


def _join_batches(pa: Any, batches: Iterator[Any], schema: Any, size: int) -> Iterator[Any]:
    """Yield tables of `size` rows, the last one shorter; one without rows if there is none."""
    held: list[Any] = []
    n_held, n_tables = 0, 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, size - n_held)
            batch = batch.slice(part.num_rows)
            held.append(part)
            n_held += part.num_rows
            if n_held == size:
                yield pa.Table.from_batches(held, schema)
                held, n_held, n_tables = [], 0, n_tables + 1
    if held or not n_tables:
        yield pa.Table.from_batches(held, schema)


def _normalise(pa: Any, table: Any) -> Any:
    """Return a table in one chunk, with types that do not depend on how batches were cut."""
    large = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}
    for index, field in enumerate(table.schema):
        column = table.column(index)
        if pa.types.is_dictionary(field.type):
            kind = large.get(str(field.type.value_type), field.type.value_type)
            # Decoding has no kernel for every type of values: it needs large ones.
            parts = [
                pa.DictionaryArray.from_arrays(
                    chunk.indices, chunk.dictionary.cast(kind)
                ).dictionary_decode()
                for chunk in column.chunks
            ]
            column = pa.chunked_array(parts, type=kind)
        elif str(field.type) in large:
            column = column.cast(large[str(field.type)])
        if column.type != field.type:
            table = table.set_column(index, field.name, column)
    return table.combine_chunks()


def _attach_ids(source: TextSource, ids: Any, *, owner: str) -> TextSource:
    """Return the source with a column of ids beside the others, one id a row."""
    pa = import_optional("pyarrow", extra="stream", purpose=_PURPOSE)
    if isinstance(ids, (str, bytes, Mapping, Set)) or not isinstance(ids, Iterable):
        raise TypeError(
            f"The `ids` parameter of `{owner}` must be an iterable of int or str, one a row; got a "
            f"{type(ids).__name__}. A column of X goes into `keep_columns`."
        )

    def read(size: int) -> Iterator[Block]:
        rest: Iterator[Any] = iter(ids)
        start, kind = 0, None
        for block in source.read(size):
            n_rows = len(block.texts)
            column = _make_ids(pa, list(islice(rest, n_rows)), start, kind, owner=owner)
            _check_id_count(len(column) < n_rows, start + len(column), owner=owner)
            kind = column.type
            carried = block.carried if block.carried is not None else pa.table({})
            if ID_COLUMN in carried.column_names:
                raise ValueError(
                    f"The `ids` parameter of `{owner}` makes a column {ID_COLUMN!r}, and "
                    "`keep_columns` names one, too. Leave one of them out."
                )
            columns = [column, *carried.columns]
            carried = pa.table(columns, names=[ID_COLUMN, *carried.column_names])
            # An id behind the last row is an error before the shard is written.
            start += n_rows
            following = list(islice(rest, 1)) if n_rows < size else []
            _check_id_count(bool(following), start, owner=owner)
            yield Block(block.texts, block.n_columns, carried)
        _check_id_count(next(rest, rest) is not rest, start, owner=owner)

    one_shot = source.is_one_shot or isinstance(ids, Iterator)
    return TextSource(source.n_rows, one_shot, read)


def _make_ids(pa: Any, values: list[Any], start: int, kind: Any, *, owner: str) -> Any:
    """Return ids as one Arrow column, all int or all str."""
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    allowed: tuple[type, ...] = (int, str)
    if kind is not None:
        allowed = (int,) if kind == pa.int64() else (str,)
    elif plain and type(plain[0]) in allowed:
        allowed = (type(plain[0]),)
    for position, value in enumerate(plain, start):
        if type(value) not in allowed:
            names = " or ".join(each.__name__ for each in allowed)
            raise TypeError(
                f"The `ids` parameter of `{owner}` must hold int or str, all of one type; "
                f"ids[{position}] is a {type(value).__name__} instead of {names}."
            )
    if allowed == (str,):
        return pa.array(plain, type=pa.string())
    check_int64(plain, subject=f"The `ids` parameter of `{owner}`", name="ids", start=start)
    return pa.array(plain, type=pa.int64())


def _check_id_count(wrong: bool, count: int, *, owner: str) -> None:
    """Refuse ids that end before the rows or go on behind them."""
    if wrong:
        raise ValueError(
            f"The `ids` parameter of `{owner}` must have one id for each row of X; one of them "
            f"ends after {count}, the other goes on."
        )
