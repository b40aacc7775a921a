"""Embeddings inside Ray Data, Spark and Dask: one small callable for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from skembed._inputs import is_instance_of
from skembed._validation import check_choice, check_string, import_optional, name_our_words
from skembed.inference.registry import registry
from skembed.vectorizer import NVEmbedVectorizer

__all__ = ["EmbeddingMapper", "METHODS", "OWNER"]

OWNER = "EmbeddingMapper"
METHODS = ("transform", "encode_query", "encode_document")


class EmbeddingMapper:
    """Callable that embeds a column of the batches of a data engine.

    Hand it to Ray Data's ``map_batches``, Dask's ``map_partitions``, Spark's ``mapInPandas`` or, as
    `make_predict_fn`, to Spark's ``predict_batch_udf``. Its pickle is small: settings and a trained
    adapter, no base weights. Each worker process loads the model at its first batch and keeps it
    for later batches and tasks.

    Parameters
    ----------
    vectorizer : NVEmbedVectorizer or text transformer, optional
        Encoder of the texts; None takes the bundled model. Every machine must have its model.
    column : str, default="text"
        The column of texts.
    output_column : str, default="embedding"
        The new column, one float32 vector a row.
    method : {"transform", "encode_query", "encode_document"}, default="transform"
        Method of the vectorizer that embeds the texts.

    Raises
    ------
    TypeError, ValueError
        If a parameter has an invalid type or value.

    See Also
    --------
    NVEmbedVectorizer : Its `n_jobs` and `device` spread one array of texts.

    Notes
    -----
    Rows stay in their order, and each worker embeds a repeated text once, as far as the
    vectorizer's cache allows. ``device="auto"`` and ``dtype="auto"`` are decided in the worker: on
    machines of different kinds name the `dtype`, so that all rows are computed in one type.

    Examples
    --------
    >>> import numpy as np
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.parallel import EmbeddingMapper
    >>> mapper = EmbeddingMapper(NVEmbedVectorizer(), column="title")
    >>> batch = mapper({"id": np.array([1, 2]), "title": np.array(["card lost", "new card"])})
    >>> sorted(batch), batch["embedding"].shape, str(batch["embedding"].dtype)
    (['embedding', 'id', 'title'], (2, 384), 'float32')
    """

    @name_our_words
    def __init__(
        self,
        vectorizer: Any = None,
        *,
        column: str = "text",
        output_column: str = "embedding",
        method: str = "transform",
    ) -> None:
        self.vectorizer = NVEmbedVectorizer() if vectorizer is None else vectorizer
        self.column = check_string(column, name="column", owner=OWNER)
        self.output_column = check_string(output_column, name="output_column", owner=OWNER)
        self.method = check_choice(method, name="method", owner=OWNER, allowed=METHODS)
        if not callable(getattr(self.vectorizer, method, None)):
            raise TypeError(
                f"The `vectorizer` parameter of `{OWNER}` must have a method `{method}`; got "
                f"{type(vectorizer).__name__}."
            )
        self._from_pickle = False

    def __repr__(self) -> str:
        columns = f"column={self.column!r}, output_column={self.output_column!r}"
        return f"{OWNER}({self.vectorizer!r}, {columns}, method={self.method!r})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and note that a worker's next task may bring another copy."""
        self.__dict__.update(state, _from_pickle=True)

    def __call__(self, batch: Any) -> Any:
        """Embed one batch, or an iterator of batches.

        Parameters
        ----------
        batch : dict of ndarray, pandas.DataFrame, pyarrow.Table or iterator of these
            Rows with the column; other columns are kept.

        Returns
        -------
        same kind as `batch`
            A new batch with `output_column`: (n, dim) float32 in a dict, an array a row in a frame,
            a fixed-size list in a table; rows in their order. For an iterator, a generator.

        Raises
        ------
        ValueError
            If the batch has no such column, or already has the output column.
        TypeError
            If the batch is of another kind, or holds anything but texts.
        """
        if isinstance(batch, Iterator):
            return map(self, batch)
        if isinstance(batch, Mapping):
            self._check_columns(list(batch))
            return {**batch, self.output_column: self.embed(batch[self.column])}
        if is_instance_of(batch, "pandas", "DataFrame"):
            self._check_columns(list(batch.columns))
            return self._extend_frame(batch)
        if is_instance_of(batch, "pyarrow", "Table"):
            self._check_columns(batch.column_names)
            return self._extend_table(batch)
        raise TypeError(
            f"`{OWNER}` takes a dict of arrays, a pandas DataFrame, a pyarrow Table, or an "
            f"iterator of these; got {type(batch).__name__}. For Spark's predict_batch_udf pass "
            "`make_predict_fn`."
        )

    def embed(self, texts: Any) -> np.ndarray:
        """Embed one array of texts.

        Parameters
        ----------
        texts : ndarray, Series or list of str, n_texts rows
            The texts.

        Returns
        -------
        ndarray of float32, shape (n_texts, dim)
            In input order.

        Raises
        ------
        TypeError, ValueError, SkembedError
            As for the vectorizer's method.
        """
        vectors = np.asarray(getattr(self.vectorizer, self.method)(texts), dtype=np.float32)
        lease = getattr(self.vectorizer, "__dict__", {}).get("_lease")
        if self._from_pickle and lease is not None:  # the vectorizer goes with its task
            for model in lease.models.values():
                registry.keep(model)
        return vectors

    def make_predict_fn(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return `embed`; Spark's ``predict_batch_udf`` calls this once in each worker.

        Returns
        -------
        callable
            Texts (n,) -> vectors (n, dim).
        """
        return self.embed

    def _check_columns(self, names: list[Any]) -> None:
        """Check that the batch has the texts and not yet the output."""
        if self.column not in names:
            raise ValueError(
                f"The `column` parameter of `{OWNER}` must be a column of the batch; got "
                f"{self.column!r}, and the batch has {names}."
            )
        if self.output_column in names:
            raise ValueError(
                f"The `output_column` parameter of `{OWNER}` must be a new column; got "
                f"{self.output_column!r}, which the batch has already. Name another one."
            )

    def _extend_frame(self, frame: Any) -> Any:
        """Return a copy of a pandas frame with one vector a row, its index kept."""
        vectors = np.fromiter(self.embed(frame[self.column]), dtype=object, count=len(frame))
        return frame.assign(**{self.output_column: vectors})

    def _extend_table(self, table: Any) -> Any:
        """Return an Arrow table with a column of fixed-size lists."""
        pa = import_optional("pyarrow", extra="stream", purpose=f"`{OWNER}` of Arrow tables")
        vectors = self.embed(table[self.column].to_pylist())
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return table.append_column(self.output_column, values)
