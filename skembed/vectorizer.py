"""`NVEmbedVectorizer`: a scikit-learn transformer of texts into embeddings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from skembed._inputs import TextColumns, check_columns, check_texts, column_names, holds_rows
from skembed._validation import (
    CheckedParameters,
    check_bool,
    check_choice,
    check_path,
    name_our_words,
)
from skembed.cache.embedding_cache import EmbeddingCache, resolve_cache
from skembed.exceptions import SkembedWarning
from skembed.inference.card import read_settings
from skembed.inference.encoder import EncoderMixin, warn_truncated
from skembed.inference.saving import save_vectorizer
from skembed.inference.settings import (
    OWNER,
    RULES,
    Settings,
    describe_card,
    describe_model,
    find_settings,
    load_resolved,
)
from skembed.model.sources import resolve_source
from skembed.streaming.stream import ROWS_PER_SHARD, StreamReport, write_embeddings
from skembed.training.examples import Examples, TrainingTask, read_task
from skembed.training.fit import check_run, fit_adapter
from skembed.training.trainer import ContrastiveTrainer, check_trainer

__all__ = ["NVEmbedVectorizer"]

_BARE = "{instruction}"  # a template; the model's own is known when its folder was read


def _read_trainer(value: Any, *, name: str, owner: str) -> ContrastiveTrainer | str | None:
    """Return a trainer with built-in values, "auto", or None."""
    if isinstance(value, ContrastiveTrainer):
        return check_trainer(value)
    return check_choice(value, name=name, owner=owner, allowed=("auto", None))


class NVEmbedVectorizer(
    CheckedParameters,
    EncoderMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    r"""Embed texts with a bidirectional Mistral and latent-attention pooling (NV-Embed).

    Works like any scikit-learn transformer: in a Pipeline, under cross-validation and grid search.
    The weights are loaded at the first `transform`, once per process, and shared by all clones;
    every distinct text runs through the model once and comes out of the cache afterwards.

    Parameters
    ----------
    model : str or path, default="skembed-mini"
        The bundled model, a local folder, or a hub id such as ``"nvidia/NV-Embed-v2"``. A folder
        holds NV-Embed's layout, a plain Mistral model, or what `save_pretrained` wrote.
    instruction : str or None, default="auto"
        Task that the texts are compared for, put in front of each and kept out of the pool;
        or the name of a known task ("STS", "Banking77", "NFCorpus"; see `skembed.instructions`).
        None puts nothing in front. "auto", here and below, is what the model's folder says (see
        Notes); else None.
    document_instruction : str or None, default="auto"
        The same for `encode_document` and the second text of a pair. None leaves documents bare;
        so does "auto" where the folder says nothing, unless `instruction` names a task that has
        an instruction on both sides.
    instruction_template : str, default="auto"
        Format of an instruction in front of a text; else "Instruct: {instruction}\\nQuery: ".
    pooling : {"latent", "mean", "eos", "multilayer"}, optional
        From token vectors to one vector. None takes the checkpoint's.
    max_length : int or "auto", default="auto"
        Longest text in tokens, instruction included; the rest is cut off and warned about. Else
        512.
    truncate_dim : int or None, default="auto"
        Keep the first dimensions only, before normalisation; else all.
    normalize : bool or "auto", default="auto"
        Scale each vector to unit length; else True.
    missing : {"error", "empty", "zero", "nan"}, default="error"
        Result for None and NaN: an error, the vector of the empty text, zeros, or NaN.
    trainer : "auto", None or ContrastiveTrainer, default="auto"
        Training by `fit`. "auto" trains LoRA adapters with default parameters, on lists of tuples
        only; a ContrastiveTrainer trains on labelled texts, too; None never trains.
    device : str or list of str, default="auto"
        "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best one. A list such as ["cuda:0",
        "cuda:1"] puts a copy of the model on each and splits the texts; `fit` uses the first.
    dtype : {"auto", "float32", "bfloat16", "float16", "int8", "nf4"}, default="auto"
        Type of weights and activations. "auto" takes bfloat16 where the device computes in it
        natively, else float32. "int8" and "nf4" (needs bitsandbytes) store weights in 1 or about
        1/2 byte and compute as "auto": less memory, not faster. Results are float32 in any case.
    batch_tokens : int or "auto", default="auto"
        Tokens of one forward pass. Halved when memory runs out, whatever it starts from.
    cache : None, "memory", path or EmbeddingCache, default="memory"
        Store of vectors: none, in bounded memory of the process, or in an SQLite file that
        several processes may share.
    revision : str, optional
        Commit, tag or branch of a hub id. None takes the published commit of a known model, and
        of others the commit that the main branch has at first use: clones and pickles keep it.
    store_weights : bool, default=False
        Put the model's files into pickles, so that they open on a machine without the model.
    n_jobs : int, optional
        Workers for long input on CPUs, of joblib's active backend (its own processes, or a cluster
        under ``joblib.parallel_config("dask")``), each process with one copy of the model and its
        part of the cores. None stays in this process, where torch uses all cores already.
    verbose : bool, default=False
        Show a progress bar. The environment variable ``TQDM_DISABLE=1`` hides all bars.

    Attributes
    ----------
    n_features_in_ : int
        Text columns seen by `fit`: 1, or as many as the tuples or the table have.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, when `fit` saw a frame.
    embedding_dim_ : int
        Width of one embedding after truncation.
    model_ : dict
        Model in use: `name`, `revision`, `fingerprint` (the adapter's included), `architecture`,
        `pooling`, `hidden_size`, `dtype`, `device` and `attention_path`. A fitted estimator whose
        model has other weights at its next use raises CheckpointError.
    adapter_ : Adapter
        Weights that a training `fit` learned.
    history_ : TrainingHistory
        Loss, learning rate, gradient norm and validation score of a training `fit`.

    See Also
    --------
    ContrastiveTrainer : Parameters of training.
    EmbeddingCache : Store of embeddings.

    Notes
    -----
    The same text gives the same vector in any batch, order or subset: within 1e-5 in float32 and
    within 5e-3 per component in bfloat16.

    "auto" is what skembed.json says, which `save_pretrained` writes, and then the files of
    sentence-transformers: prompts, `max_seq_length`, a Normalize module. A model that learned no
    instructions, such as the bundled one, gets none unless you name one, with a warning.

    Unlike the reference, the mean over tokens is taken in float32 and the latent layer runs in a
    folded form (see `skembed.pooling`); both are exact algebra.

    References
    ----------
    C. Lee et al., NV-Embed, arXiv 2405.17428.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import Pipeline
    >>> from skembed import NVEmbedVectorizer
    >>> texts = ["my card was stolen", "card lost", "open an account", "a new account please"]
    >>> pipe = Pipeline([("emb", NVEmbedVectorizer()), ("clf", LogisticRegression())])
    >>> pipe.fit(texts, ["card", "card", "account", "account"]).predict(["I lost my card"])
    array(['card'], dtype='<U7')
    """

    _rules = {**RULES, "trainer": _read_trainer, "cache": resolve_cache}

    def __init__(
        self,
        model: str | os.PathLike[str] = "skembed-mini",
        *,
        instruction: str | None = "auto",
        document_instruction: str | None = "auto",
        instruction_template: str = "auto",
        pooling: str | None = None,
        max_length: int | str = "auto",
        truncate_dim: int | str | None = "auto",
        normalize: bool | str = "auto",
        missing: str = "error",
        trainer: str | ContrastiveTrainer | None = "auto",
        device: str | Sequence[str] = "auto",
        dtype: str = "auto",
        batch_tokens: int | str = "auto",
        cache: str | os.PathLike[str] | EmbeddingCache | None = "memory",
        revision: str | None = None,
        store_weights: bool = False,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.instruction = instruction
        self.document_instruction = document_instruction
        self.instruction_template = instruction_template
        self.pooling = pooling
        self.max_length = max_length
        self.truncate_dim = truncate_dim
        self.normalize = normalize
        self.missing = missing
        self.trainer = trainer
        self.device = device
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.cache = cache
        self.revision = revision
        self.store_weights = store_weights
        self.n_jobs = n_jobs
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> NVEmbedVectorizer:
        """Check parameters and texts; fine-tune where `trainer` and the examples ask for it.

        A frozen model learns nothing and is not loaded yet. Training learns an adapter for this
        estimator alone, from scratch; the shared weights below it do not change.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or frame of str, n_texts rows
            Single texts; or a list of tuples, which are pairs (anchor, positive) or rows (anchor,
            positive, negative, ...) of equal length: anchors are embedded as queries, all others
            as documents. A frame or array of several columns holds features, whatever y is: the
            model stays frozen.
        y : array-like, optional
            Class labels of single texts, or the graded similarity of pairs as floats. Ignored
            while frozen.

        Returns
        -------
        NVEmbedVectorizer
            This estimator.

        Raises
        ------
        TypeError, ValueError
            If a parameter, a text or an example is not allowed; before training starts.
        ImportError
            If training is asked for and peft is not installed.
        ModelNotFoundError, CheckpointError
            If there is no such model, its files are damaged, or `checkpoint_dir` holds the
            state of another run.
        TrainingError
            If the loss is not finite, or nothing is left to compare.
        """
        checked = self._checked()
        trainer, missing = checked.trainer, checked.missing
        subject = f"The `X` parameter of `{OWNER}`"
        # A trainer always trains; "auto" on pairs and rows, which are lists of tuples alone.
        if isinstance(trainer, ContrastiveTrainer) or (trainer and holds_rows(X, subject=subject)):
            trainer = ContrastiveTrainer() if trainer == "auto" else trainer
            task = TrainingTask(X, y)
            examples = read_task(task, trainer, template=_BARE, owner=OWNER, missing=missing)
            n_columns = examples.columns.shape[1]
            return self._train([examples], trainer, X, n_columns=n_columns, own_prefix=True)
        columns = check_texts(X, owner=OWNER, missing=missing)
        if hasattr(self, "adapter_"):
            warnings.warn(
                f"`fit` with trainer={trainer!r} leaves the model frozen on such texts, and "
                "drops the adapter that an earlier `fit` trained. To keep it, wrap the vectorizer "
                "in sklearn.frozen.FrozenEstimator, or save it and pass the folder as `model`.",
                SkembedWarning,
                stacklevel=2,
            )
            del self.adapter_, self.history_
        settings = self._make_encoder(anew=True).settings
        return self._set_fitted(settings, X, len(columns.columns))

    def fit_tasks(self, tasks: Sequence[TrainingTask]) -> NVEmbedVectorizer:
        """Fine-tune on several tasks at once, each with instructions of its own.

        Parameters
        ----------
        tasks : sequence of TrainingTask
            Their examples are mixed in every batch unless the trainer's `blend_tasks` is False.

        Returns
        -------
        NVEmbedVectorizer
            This estimator; its own `instruction` is what `transform` uses afterwards.

        Raises
        ------
        TypeError, ValueError, ImportError, SkembedError
            As `fit`; a bad task is named by its position.
        """
        checked = self._checked()
        trainer = checked.trainer
        trainer = ContrastiveTrainer() if trainer == "auto" else trainer
        if trainer is None:
            raise ValueError(
                f"The `trainer` parameter of `{OWNER}` must be 'auto' or a ContrastiveTrainer for "
                "`fit_tasks`; got None, which never trains."
            )
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
            raise TypeError(
                f"The `tasks` parameter of `{OWNER}.fit_tasks` must be a list of TrainingTask; got "
                f"{type(tasks).__name__ if not isinstance(tasks, Sequence) else 'an empty one'}."
            )
        examples = [
            read_task(task, trainer, template=_BARE, owner=OWNER, index=index)
            for index, task in enumerate(tasks)
        ]
        return self._train(examples, trainer, None, n_columns=1, own_prefix=False)

    def _train(
        self,
        examples: list[Examples],
        trainer: ContrastiveTrainer,
        X: Any,
        *,
        n_columns: int,
        own_prefix: bool,
    ) -> NVEmbedVectorizer:
        """Train an adapter and use it; nothing here changes if training fails.

        The examples' prefixes are task texts; with `own_prefix` those of `transform` replace them.
        """
        initial = getattr(self, "adapter_", None) if trainer.warm_start else None
        lease = self._shared_lease()
        settings = find_settings(self._parameters(), lease, initial)
        if settings.warning:
            warnings.warn(settings.warning, SkembedWarning, stacklevel=3)
        resolved, max_length = settings.model, settings.parameters.max_length
        template = settings.parameters.instruction_template
        fronts = {side: request.prefix for side, request in settings.requests.items()}
        examples = [e.complete_prefixes(template, fronts if own_prefix else None) for e in examples]
        check_run(examples, trainer)
        (base,) = load_resolved(replace(resolved, adapter=None, replicas=()), lease)
        result = fit_adapter(
            base,
            resolved.source,
            examples,
            trainer,
            max_length=max_length,
            initial=resolved.adapter,
            progress=trainer.verbose or settings.parameters.verbose,
        )
        adapter = result.adapter
        adapter.instructions = settings.learned or any(
            e.query_prefix or e.document_prefix for e in examples
        )
        self.adapter_, self.history_ = adapter, result.history
        model = replace(resolved, adapter=adapter)
        trained = replace(settings, model=model, learned=adapter.instructions)
        self._set_fitted(trained, X, n_columns)
        warn_truncated(result.n_truncated, result.n_texts, max_length, stacklevel=4)
        if result.history.stopped == "interrupted":
            warnings.warn(
                f"Training was interrupted after {len(result.history)} steps; the adapter is the "
                "best so far.",
                SkembedWarning,
                stacklevel=3,
            )
        return self

    def _set_fitted(self, settings: Settings, X: Any, n_columns: int) -> NVEmbedVectorizer:
        """Set the attributes that every `fit` sets; return the estimator."""
        self.n_features_in_ = n_columns
        names = column_names(X)
        if names is not None and len(names) == n_columns:
            self.feature_names_in_ = np.asarray(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.embedding_dim_ = settings.dim
        self.model_, self._card = describe_model(settings.model), describe_card(settings)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embed texts, `instruction` in front; of several columns, all but the first as documents.

        Where no `instruction` is given, the default prompt of the model's folder, if it has one.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or frame of str, n_texts rows
            One text a row, or k: a list of k-tuples, an array or a frame of k columns.

        Returns
        -------
        ndarray of float32, shape (n_texts, k * dim)
            In input order, column after column, each vector of unit length if `normalize`.

        Raises
        ------
        TypeError
            If X or one of its items is not text; the position is named.
        ValueError
            If a parameter or a shape is not allowed, or a text is missing under
            ``missing="error"``.
        ModelNotFoundError, CheckpointError
            If there is no such model, or its files are damaged.
        CacheError
            If the cache file cannot be used.
        MemoryError
            If a single text does not fit into the device's memory.

        Warns
        -----
        TruncationWarning
            If texts were longer than `max_length`, with their number.
        """
        self._check_trained()
        columns = check_texts(X, owner=OWNER, missing=self.missing)
        # A model trained on pairs embeds single texts, too, and the other way round.
        if not hasattr(self, "adapter_"):
            check_columns(self, X, len(columns.columns), owner=OWNER)
        return self._embed(columns, ("text", "document"))

    @name_our_words
    def encode_query(self, X: Any) -> np.ndarray:
        """Embed queries, `instruction` in front: as `transform`, or with the folder's own prompt.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The queries.

        Returns
        -------
        ndarray of float32, shape (n_texts, dim)
            In input order.

        Raises
        ------
        TypeError, ValueError, SkembedError
            As `transform`.
        """
        return self._encode_one_side(X, "query")

    @name_our_words
    def encode_document(self, X: Any) -> np.ndarray:
        """Embed documents, `document_instruction` in front if there is one.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or one-column frame of str, n_texts rows
            The documents.

        Returns
        -------
        ndarray of float32, shape (n_texts, dim)
            In input order.

        Raises
        ------
        TypeError, ValueError, SkembedError
            As `transform`.
        """
        return self._encode_one_side(X, "document")

    def transform_to(
        self,
        X: Any,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        column: str | Sequence[str] | None = None,
        keep_columns: Sequence[str] = (),
        ids: Iterable[Any] | None = None,
        side: str = "query",
        rows_per_shard: int = ROWS_PER_SHARD,
        embedding_column: str = "embedding",
        use_cache: bool = False,
        overwrite: bool = False,
    ) -> StreamReport:
        """Embed any number of texts into Parquet files or one .npy file, in bounded memory.

        After a stop, call it again with the same source and parameters: it continues after the last
        complete shard and ends with the bytes of an undisturbed run. It reads the source from its
        start and compares it with a digest, but embeds no row twice.
        `skembed.open_embeddings` opens the result.

        Parameters
        ----------
        X : list, array, Series, frame, iterable, path, or Arrow data set, table or reader
            Texts or pairs as `transform` takes them; any iterable of these, such as a generator;
            the path of a Parquet file or folder; or a table whose text column is `column`.
        path : str or path
            A folder for Parquet, a file for .npy.
        format : {"parquet", "npy"}, optional
            None takes "npy" for a path that ends in .npy, else "parquet".
        column : str or pair of str, optional
            Column of the texts in a table, or two columns of pairs. None takes the only one.
        keep_columns : sequence of str, default=()
            Columns of the table to write beside the embeddings (Parquet only).
        ids : iterable of int or str, optional
            One id a row, written as column "id" (Parquet only).
        side : {"query", "document"}, default="query"
            As `encode_query` or `encode_document`; pairs are always a query and a document.
        rows_per_shard : int, default=16384
            Rows embedded and written at a time: memory grows with it, and a kill loses no more.
        embedding_column : str, default="embedding"
            Name of the column of vectors in Parquet.
        use_cache : bool, default=False
            Use the vectorizer's cache. Off by default: a long stream would push everything else
            out. With it, equal bytes are not promised, as batches then depend on what it holds.
        overwrite : bool, default=False
            Delete embeddings that an earlier call wrote to the path, and start over.

        Returns
        -------
        StreamReport
            Number of rows, and how many of them were there already.

        Raises
        ------
        TypeError, ValueError
            If a parameter or text is not allowed or the source has changed (the error names the
            row of the whole source), or the path holds anything but embeddings made the same way.
        OSError
            If a shard cannot be written, as on a full disk; complete shards are kept.
            BlockingIOError while another run writes to the path.
        ImportError
            If Parquet or Arrow is used and pyarrow is not installed.
        NotFittedError, SkembedError
            As `transform`.

        Warns
        -----
        SkembedWarning, TruncationWarning
            If a complete shard is damaged and embedded again, or packages have other versions
            than when the run began; and as `transform`.

        Examples
        --------
        >>> from skembed import NVEmbedVectorizer, open_embeddings
        >>> texts = (f"a text about {thing}" for thing in ("cats", "dogs", "taxes"))
        >>> NVEmbedVectorizer().transform_to(texts, "texts.npy").n_rows
        3
        >>> open_embeddings("texts.npy").shape
        (3, 384)
        """
        self._check_trained()
        return write_embeddings(
            self._make_encoder(embeds=True),
            X,
            path,
            format=format,
            column=column,
            keep_columns=keep_columns,
            ids=ids,
            side=side,
            rows_per_shard=rows_per_shard,
            embedding_column=embedding_column,
            use_cache=use_cache,
            overwrite=overwrite,
        )

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns of `transform`.

        Parameters
        ----------
        input_features : array-like of str, optional
            Not used; must be the names that `fit` saw, where it saw a frame.

        Returns
        -------
        ndarray of object (str), shape (n_features_out,)
            ``"nvembedvectorizer0"``, ``"nvembedvectorizer1"``, ...; where `fit` saw a frame of
            several columns, such as "title" and "body", ``"title_0"``, ..., ``"body_0"``, ...

        Raises
        ------
        NotFittedError
            If called before `fit`.
        ValueError
            If `input_features` are not those of `fit`.
        """
        names = super().get_feature_names_out(input_features)
        columns = getattr(self, "feature_names_in_", None)
        if columns is None or len(columns) == 1:
            return names
        dim = len(names) // len(columns)
        return np.array([f"{column}_{i}" for column in columns for i in range(dim)], dtype=object)

    @property
    def _n_features_out(self) -> int:
        """Columns of `transform`, for `get_feature_names_out`."""
        check_is_fitted(self)
        return self._make_encoder().settings.dim * int(getattr(self, "n_features_in_", 1))

    def __sklearn_is_fitted__(self) -> bool:
        """Return True unless a trainer has yet to train: a frozen vectorizer needs no `fit`."""
        return not isinstance(self.trainer, ContrastiveTrainer) or hasattr(self, "adapter_")

    def __sklearn_tags__(self) -> Any:
        """Return the tags: text in, float32 out, `fit` needed only to train."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []
        tags.requires_fit = isinstance(self.trainer, ContrastiveTrainer)
        return tags

    def save_pretrained(self, path: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Write a folder that `from_pretrained`, or `model=path`, reads.

        With an adapter: the adapter alone, in peft's format, and the pooling layer if it was
        trained; the base model is named, not copied. Frozen, or with `merge`: weights, tokenizer
        and settings in NV-Embed's layout, in the types they are stored in. All is written before
        anything old goes, so that a full disk leaves what was there; a folder in which a killed
        process left two models half and half refuses to load.

        Parameters
        ----------
        path : str or path
            The folder; made if need be.
        merge : bool, default=False
            Add the adapter to the base weights and write a model that stands alone. Sums are
            taken in float32 and rounded to the type each weight is stored in.

        Raises
        ------
        ValueError
            If the folder is the one the model is read from.
        OSError
            If the folder cannot be written.
        """
        owner = f"{OWNER}.save_pretrained"
        merge = check_bool(merge, name="merge", owner=owner)
        path = check_path(path, name="path", owner=owner)
        save_vectorizer(self._make_encoder().settings, path, merge=merge)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **parameters: Any) -> NVEmbedVectorizer:
        """Return a vectorizer for a folder, with the settings saved in it as its parameters.

        Its vectors are those of ``NVEmbedVectorizer(path)``, which leaves the parameters "auto".
        This looks for the folder at once, and takes the saved `missing` too.

        Parameters
        ----------
        path : str or path
            A folder that `save_pretrained` wrote, or any model that `model` takes.
        **parameters
            Parameters of the class; they override the saved ones.

        Returns
        -------
        NVEmbedVectorizer
            Weights are loaded at first use.

        Raises
        ------
        ModelNotFoundError
            If there is no such folder, or an adapter's base model cannot be found.
        CheckpointError
            If skembed.json in the folder holds a value that its parameter does not allow.
        TypeError
            If a parameter is not one of the class.
        """
        checked = check_path(path, name="path", owner=f"{OWNER}.from_pretrained")
        source = resolve_source(checked, parameters.get("revision"))
        saved = read_settings(source.adapter_folder or source.folder)
        saved.pop("instructions", None)
        return cls(path, **{**saved, **parameters})

    def _encode_one_side(self, X: Any, side: str) -> np.ndarray:
        """Embed single texts as queries or documents, (n_texts, dim)."""
        self._check_trained()
        columns = check_texts(X, owner=OWNER, missing=self.missing)
        if len(columns.columns) != 1:
            raise ValueError(
                f"`{OWNER}.encode_{side}` takes one text a row; got {len(columns.columns)} "
                "columns. Use `transform`."
            )
        return self._embed(columns, (side,), stacklevel=6)

    def _embed(
        self, columns: TextColumns, sides: tuple[str, ...], *, stacklevel: int = 5
    ) -> np.ndarray:
        """Embed each column for its side and put the vectors side by side."""
        encoder = self._make_encoder(stacklevel=stacklevel, embeds=True)
        vectors, report = encoder.embed(columns, sides)
        if report.n_truncated:
            n_cut, n_texts = report.n_truncated, report.n_embedded
            max_length = encoder.settings.parameters.max_length
            warn_truncated(n_cut, n_texts, max_length, stacklevel=stacklevel)
        return vectors

    def _check_trained(self) -> None:
        """Check `trainer`; raise NotFittedError where one has yet to train."""
        if not isinstance(self.trainer, ContrastiveTrainer):
            check_choice(self.trainer, name="trainer", allowed=("auto", None), owner=OWNER)
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                f"This {OWNER} has a trainer and is not fitted yet. Call `fit` first, or pass "
                "`trainer=None` to use the model frozen."
            )
