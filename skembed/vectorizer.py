"""`NVEmbedVectorizer`: texts -> embeddings as a scikit-learn transformer."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from skembed._validation import (
    MISSING_POLICIES,
    TextColumns,
    check_bool,
    check_choice,
    check_int,
    check_string,
    check_texts,
)
from skembed.cache import resolve_cache
from skembed.checkpoint import (
    BUNDLED_MODELS,
    ModelSource,
    fingerprint_weights,
    iterate_tensors,
    pack_folder,
    read_config,
    resolve_source,
    save_checkpoint,
    unpack_folder,
)
from skembed.engine import EmbedReport, EmbedRequest, cache_namespace, embed_texts
from skembed.exceptions import SkembedWarning, TruncationWarning
from skembed.instructions import (
    check_template,
    format_instruction,
    is_task_name,
    resolve_instruction,
)
from skembed.model import NVEmbedConfig
from skembed.pooling import POOLINGS
from skembed.registry import (
    DTYPES,
    Lease,
    ModelKey,
    choose_attention_path,
    registry,
    resolve_device,
    resolve_dtype,
)
from skembed.training import ContrastiveTrainer, refuse_training

if TYPE_CHECKING:
    from skembed.cache import EmbeddingCache

OWNER = "NVEmbedVectorizer"
SETTINGS_FILE = "skembed.json"
# Saved beside the weights: what belongs to the model's use, not to this machine.
SAVED_PARAMETERS = (
    "instruction",
    "document_instruction",
    "instruction_template",
    "max_length",
    "truncate_dim",
    "normalize",
    "missing",
)


@dataclass(frozen=True)
class _Resolved:
    """The parameters after checking: which model, where, in which type."""

    source: ModelSource
    config: NVEmbedConfig
    key: ModelKey
    dim: int


class NVEmbedVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Embed texts with a bidirectional Mistral and latent-attention pooling (NV-Embed).

    Works like any scikit-learn transformer: in a Pipeline, under cross-validation and grid search.
    The weights are loaded at the first `transform`, once per process, and shared by all clones;
    every distinct text runs through the model once and comes out of the cache afterwards.

    Parameters
    ----------
    model : str or path, default="skembed-mini"
        The bundled model, a local folder, or a hub id such as ``"nvidia/NV-Embed-v2"``. A folder
        holds NV-Embed's layout, a plain Mistral model, or what `save_pretrained` wrote.
    instruction : str, optional
        What the texts are to be compared for, put in front of each text and kept out of the pool;
        or the name of a known task ("STS", "Banking77", "NFCorpus"; see `skembed.instructions`).
    document_instruction : str, optional
        The same for `encode_document` and the second text of a pair. None leaves documents bare,
        except where `instruction` names a task that has an instruction on both sides.
    instruction_template : str, default="Instruct: {instruction}\\nQuery: "
        How an instruction is written in front of a text.
    pooling : {"latent", "mean", "eos", "multilayer"}, optional
        From token vectors to one vector. None takes the checkpoint's.
    max_length : int, default=512
        Longest text in tokens, instruction included; the rest is cut off and warned about.
    truncate_dim : int, optional
        Keep the first dimensions only, before normalisation.
    normalize : bool, default=True
        Scale each vector to unit length.
    missing : {"error", "empty", "zero", "nan"}, default="error"
        What None and NaN become: an error, the vector of the empty text, zeros, or NaN.
    trainer : "auto", None or ContrastiveTrainer, default="auto"
        "auto" trains on pairs and leaves single texts frozen; None never trains. Training is not
        part of this release: asked to train, `fit` raises NotImplementedError.
    device : str, default="auto"
        "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best there is.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Type of weights and activations. "auto" takes bfloat16 where the device computes in it
        natively, else float32. Results are float32 either way.
    batch_tokens : int or "auto", default="auto"
        Tokens of one forward pass. Halved when memory runs out, whatever it starts from.
    cache : None, "memory", path or EmbeddingCache, default="memory"
        Where vectors are kept: nowhere, in a bounded memory shared by the process, or in an SQLite
        file that several processes may share.
    revision : str, optional
        Commit, tag or branch of a hub id. Known models are pinned to their published commit.
    store_weights : bool, default=False
        Put the model's files into pickles, so that they open on a machine without the model.
    n_jobs : int, optional
        Worker processes of joblib for long input on CPUs, each with one copy of the model. None
        stays in this process, where torch uses all cores already.
    verbose : bool, default=False
        Show the progress bar at once instead of after three seconds.

    Attributes
    ----------
    n_features_in_ : int
        Text columns seen by `fit`: 1, or 2 for pairs.
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Their names, when `fit` saw a frame.
    embedding_dim_ : int
        Width of one embedding after truncation.
    model_ : dict
        What runs: `name`, `revision`, `fingerprint`, `architecture`, `pooling`, `hidden_size`,
        `dtype`, `device` and `attention_path`.

    See Also
    --------
    EmbeddingCache : Where embeddings are kept.

    Notes
    -----
    The same text gives the same vector in any batch, order or subset: within 1e-5 in float32 and
    within 5e-3 per component in bfloat16.

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

    def __init__(
        self,
        model: str | os.PathLike[str] = "skembed-mini",
        *,
        instruction: str | None = None,
        document_instruction: str | None = None,
        instruction_template: str = "Instruct: {instruction}\nQuery: ",
        pooling: str | None = None,
        max_length: int = 512,
        truncate_dim: int | None = None,
        normalize: bool = True,
        missing: str = "error",
        trainer: str | ContrastiveTrainer | None = "auto",
        device: str = "auto",
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

    # scikit-learn's methods

    def fit(self, X: Any, y: Any = None) -> NVEmbedVectorizer:
        """Check parameters and texts; the frozen model learns nothing and is not loaded yet.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or frame of str, n_texts rows
            One text a row, or two for pairs.
        y : array-like, optional
            Ignored while frozen.

        Returns
        -------
        NVEmbedVectorizer
            This estimator.

        Raises
        ------
        TypeError, ValueError
            When a parameter or a text is not as it must be; see `transform`.
        NotImplementedError
            When `trainer` and the data ask for training.
        ModelNotFoundError, CheckpointError
            When there is no such model, or its files are damaged.
        """
        self._check_parameters()
        if isinstance(self.trainer, ContrastiveTrainer):
            refuse_training(OWNER)
        columns = check_texts(X, owner=OWNER, missing=self.missing)
        if self.trainer == "auto" and len(columns.columns) == 2:
            refuse_training(OWNER)
        resolved = self._resolve()
        self.n_features_in_ = len(columns.columns)
        names = getattr(X, "columns", None)
        if names is not None and all(isinstance(name, str) for name in names):
            self.feature_names_in_ = np.asarray(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.embedding_dim_ = resolved.dim
        self.model_ = self._describe(resolved)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embed texts, `instruction` in front; the second text of a pair as a document.

        Parameters
        ----------
        X : list, tuple, ndarray, Series or frame of str, n_texts rows
            One text a row, or two for pairs.

        Returns
        -------
        ndarray of float32, shape (n_texts, dim) or (n_texts, 2 * dim)
            In input order, rows of unit length where `normalize`; for pairs the first text's
            vector, then the second's.

        Raises
        ------
        TypeError
            When X or one of its items is not text; the position is named.
        ValueError
            When a parameter or a shape is not allowed, or a text is missing under
            ``missing="error"``.
        ModelNotFoundError, CheckpointError
            When there is no such model, or its files are damaged.
        CacheError
            When the cache file cannot be used.
        MemoryError
            When a single text does not fit into the device's memory.

        Warns
        -----
        TruncationWarning
            When texts were longer than `max_length`, with their number.
        """
        self._check_trained()
        columns = check_texts(X, owner=OWNER, missing=self.missing)
        seen = getattr(self, "n_features_in_", len(columns.columns))
        if len(columns.columns) != seen:
            raise ValueError(
                f"X has {len(columns.columns)} text columns, but {OWNER} was fitted with {seen}."
            )
        return self._embed(columns, ("query", "document"))

    def encode_query(self, X: Any) -> np.ndarray:
        """Embed queries, `instruction` in front; the same as `transform` of single texts.

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

    @property
    def _n_features_out(self) -> int:
        """Columns of `transform`, for `get_feature_names_out`."""
        check_is_fitted(self)
        return self._resolve().dim * int(getattr(self, "n_features_in_", 1))

    def __sklearn_is_fitted__(self) -> bool:
        """A frozen vectorizer needs no `fit`; one with a trainer does."""
        return not isinstance(self.trainer, ContrastiveTrainer)

    def __sklearn_tags__(self) -> Any:
        """Text in, float32 out, no `fit` needed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []
        tags.requires_fit = isinstance(self.trainer, ContrastiveTrainer)
        return tags

    def __sklearn_clone__(self) -> NVEmbedVectorizer:
        """A clone shares the lease, so that folds and grid points find the weights loaded."""
        clone = super().__sklearn_clone__()
        clone.__dict__["_lease"] = self._shared_lease()
        for name in ("_stored_files", "_from_pickle"):
            if name in self.__dict__:
                clone.__dict__[name] = self.__dict__[name]
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """Parameters and fitted values; the model's files too where `store_weights`."""
        state = dict(super().__getstate__())
        state.pop("_lease", None)
        state.pop("_stored_files", None)
        if self.store_weights:
            files = self._files_of_pickle() or pack_folder(self._source().folder)
            state["_stored_files"] = (os.fspath(self.model), self.revision, files)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, remembering that the device may be another machine's."""
        super().__setstate__(state)
        self.__dict__["_from_pickle"] = True

    # Saving

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tokenizer and settings to a folder that `from_pretrained` reads.

        The layout is NV-Embed's, weights in the type they are stored in. Files are written whole
        or not at all, config.json last; a folder cut short refuses to load.

        Parameters
        ----------
        path : str or path
            The folder; made if need be.

        Raises
        ------
        ValueError
            When the folder is the one the model is read from.
        OSError
            When the folder cannot be written.
        """
        resolved = self._resolve()
        folder = Path(path).expanduser()
        if folder.exists() and folder.resolve() == resolved.source.folder:
            raise ValueError(
                f"The `path` parameter of `{OWNER}.save_pretrained` must be another folder than "
                f"the one the model is read from; got {str(path)!r}."
            )
        settings = {name: getattr(self, name) for name in SAVED_PARAMETERS}
        save_checkpoint(
            folder,
            config=resolved.config,
            tensors=iterate_tensors(resolved.source, resolved.config),
            tokenizer_folder=resolved.source.folder,
            extra={SETTINGS_FILE: settings},
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **parameters: Any) -> NVEmbedVectorizer:
        """A vectorizer for a folder, with the settings saved in it.

        Parameters
        ----------
        path : str or path
            A folder that `save_pretrained` wrote, or any model that `model` takes.
        **parameters
            Parameters of the class; they go before the saved ones.

        Returns
        -------
        NVEmbedVectorizer
            Weights are loaded at first use.

        Raises
        ------
        ModelNotFoundError
            When there is no such folder.
        TypeError
            When a parameter is not one of the class.
        """
        source = resolve_source(path, parameters.get("revision"))
        settings = source.folder / SETTINGS_FILE
        saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        return cls(path, **{**saved, **parameters})

    # The way of the data

    def _encode_one_side(self, X: Any, side: str) -> np.ndarray:
        """Embed single texts as queries or documents, (n_texts, dim)."""
        self._check_trained()
        columns = check_texts(X, owner=OWNER, missing=self.missing)
        if len(columns.columns) != 1:
            raise ValueError(
                f"`{OWNER}.encode_{side}` takes one text a row; got pairs. Use `transform`."
            )
        return self._embed(columns, (side,))

    def _embed(self, columns: TextColumns, sides: tuple[str, ...]) -> np.ndarray:
        """Embed each column for its side and put the vectors side by side."""
        self._check_parameters()
        resolved = self._resolve()
        parts, reports = [], []
        for texts, missing, side in zip(columns.columns, columns.missing, sides, strict=False):
            vectors, report = self._embed_column(texts, side, resolved)
            if self.missing in ("zero", "nan"):
                vectors[missing] = 0.0 if self.missing == "zero" else np.nan
            parts.append(vectors)
            reports.append(report)
        self._warn_truncated(reports)
        return parts[0] if len(parts) == 1 else np.hstack(parts)

    def _embed_column(
        self, texts: list[str], side: str, resolved: _Resolved
    ) -> tuple[np.ndarray, EmbedReport]:
        """Raw vectors from the engine, then truncation and normalisation, (n_texts, dim)."""
        prefix = format_instruction(self.instruction_template, self._instruction_of(side))
        config, key = resolved.config, resolved.key
        request = EmbedRequest(
            prefix=prefix,
            max_length=self.max_length,
            dim=config.hidden_size,
            namespace=cache_namespace(key, prefix, self.max_length),
        )
        lease = self._shared_lease()
        vectors, report = embed_texts(
            texts,
            request,
            get_model=partial(_get_model, lease, resolved),
            load_in_worker=partial(_load_in_worker, resolved),
            cache=lease.hold_cache(resolve_cache(self.cache)),
            batch_tokens=None if self.batch_tokens == "auto" else int(self.batch_tokens),
            progress=True if self.verbose else None,
            n_jobs=self.n_jobs,
        )
        if resolved.dim < vectors.shape[1]:
            vectors = np.ascontiguousarray(vectors[:, : resolved.dim])
        if self.normalize:
            norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
            vectors /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
        return vectors, report

    def _instruction_of(self, side: str) -> str | None:
        """The task text in front of queries or documents."""
        if side == "query":
            return resolve_instruction(self.instruction)
        if self.document_instruction is not None:
            return resolve_instruction(
                self.document_instruction, name="document_instruction", side="document"
            )
        if is_task_name(self.instruction):
            return resolve_instruction(self.instruction, side="document")
        return None

    def _warn_truncated(self, reports: list[EmbedReport]) -> None:
        """One warning a call for all texts that were cut."""
        cut = sum(report.n_truncated for report in reports)
        if cut:
            embedded = sum(report.n_embedded for report in reports)
            warnings.warn(
                f"{cut} of {embedded} texts were longer than max_length={self.max_length} tokens "
                "and were cut there. Raise `max_length`, or silence this with "
                "warnings.filterwarnings('ignore', category=skembed.TruncationWarning).",
                TruncationWarning,
                stacklevel=5,  # the caller of a public method
            )

    # Parameters

    def _check_parameters(self) -> None:
        """Types and values of all parameters, without touching files or devices."""
        if not isinstance(self.model, (str, os.PathLike)) or not os.fspath(self.model):
            raise TypeError(
                f"The `model` parameter of `{OWNER}` must be a model name, a folder or a hub id; "
                f"got {type(self.model).__name__}."
            )
        check_template(self.instruction_template, owner=OWNER)
        resolve_instruction(self.instruction)
        resolve_instruction(self.document_instruction, name="document_instruction")
        check_choice(self.pooling, name="pooling", allowed=(None, *POOLINGS), owner=OWNER)
        check_int(self.max_length, name="max_length", low=2, owner=OWNER)
        check_int(self.truncate_dim, name="truncate_dim", low=1, allow_none=True, owner=OWNER)
        check_bool(self.normalize, name="normalize", owner=OWNER)
        check_choice(self.missing, name="missing", allowed=MISSING_POLICIES, owner=OWNER)
        if not isinstance(self.trainer, ContrastiveTrainer):
            check_choice(self.trainer, name="trainer", allowed=("auto", None), owner=OWNER)
        check_string(self.device, name="device", owner=OWNER)
        check_choice(self.dtype, name="dtype", allowed=("auto", *DTYPES), owner=OWNER)
        if self.batch_tokens != "auto":
            check_int(self.batch_tokens, name="batch_tokens", low=1, owner=OWNER)
        check_string(self.revision, name="revision", allow_none=True, owner=OWNER)
        check_bool(self.store_weights, name="store_weights", owner=OWNER)
        check_int(self.n_jobs, name="n_jobs", allow_none=True, owner=OWNER)
        if self.n_jobs == 0:
            raise ValueError(
                f"The `n_jobs` parameter of `{OWNER}` must be None, a positive int, or a negative "
                "one that counts from all cores (-1); got 0."
            )
        check_bool(self.verbose, name="verbose", owner=OWNER)
        resolve_cache(self.cache)  # touches no file

    def _check_trained(self) -> None:
        """A vectorizer with a trainer is of no use before `fit`."""
        if isinstance(self.trainer, ContrastiveTrainer):
            raise NotFittedError(
                f"This {OWNER} has a trainer and is not fitted yet. Call `fit` first, or pass "
                "`trainer=None` to use the model frozen."
            )

    def _source(self) -> ModelSource:
        """The model's folder; that of the pickle, before any download, when there is none here."""
        files = self._files_of_pickle()
        name = os.fspath(self.model)
        if files is None or name in BUNDLED_MODELS or Path(name).expanduser().is_dir():
            return resolve_source(self.model, self.revision)
        return ModelSource(name, unpack_folder(files))

    def _files_of_pickle(self) -> dict[str, bytes] | None:
        """The model's files that came with the pickle, unless `model` has changed since."""
        model, revision, files = self.__dict__.get("_stored_files", (None, None, None))
        return files if (model, revision) == (os.fspath(self.model), self.revision) else None

    def _resolve(self) -> _Resolved:
        """Which model, where and in which type; reads config.json, loads no weights."""
        source = self._source()
        config = read_config(source, self.pooling)
        longest = config.backbone.get("max_position_embeddings")
        if longest is not None:
            check_int(self.max_length, name="max_length", owner=OWNER, low=2, high=int(longest))
        width = config.hidden_size
        check_int(
            self.truncate_dim, name="truncate_dim", owner=OWNER, low=1, high=width, allow_none=True
        )
        device = self._device()
        if device.type != "cpu" and self.n_jobs not in (None, 1):
            raise ValueError(
                f"The `n_jobs` parameter of `{OWNER}` must be None or 1 on {str(device)!r}; got "
                f"{self.n_jobs}. Every worker would put a copy of the model on the one device."
            )
        dtype = resolve_dtype(self.dtype, device)
        key = ModelKey(
            fingerprint=fingerprint_weights(source),
            pooling=config.pooling,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            attention_path=choose_attention_path(device, dtype),
        )
        return _Resolved(source, config, key, self.truncate_dim or width)

    def _device(self) -> torch.device:
        """The device; an unpickled estimator falls back from one this machine has not."""
        try:
            return resolve_device(self.device)
        except ValueError:
            kind = self.device.split(":")[0]
            if not self.__dict__.get("_from_pickle") or kind not in ("cuda", "mps"):
                raise
        found = resolve_device("auto")
        warnings.warn(
            f"This {OWNER} was pickled with device={self.device!r}, which this machine has not; "
            f"it runs on {str(found)!r}. Silence this with set_params(device='auto').",
            SkembedWarning,
            stacklevel=5,
        )
        return found

    def _describe(self, resolved: _Resolved) -> dict[str, Any]:
        """The `model_` attribute."""
        key, backbone = resolved.key, resolved.config.backbone
        layers = backbone["num_hidden_layers"]
        return {
            "name": resolved.source.name,
            "revision": resolved.source.revision,
            "fingerprint": key.fingerprint,
            "architecture": f"bidirectional Mistral, {layers} layers",
            "pooling": key.pooling,
            "hidden_size": resolved.config.hidden_size,
            "dtype": key.dtype,
            "device": key.device,
            "attention_path": key.attention_path,
        }

    def _shared_lease(self) -> Lease:
        """What keeps the weights loaded while this estimator or a clone of it lives."""
        lease: Lease = self.__dict__.setdefault("_lease", Lease())
        return lease


def _get_model(lease: Lease, resolved: _Resolved) -> Any:
    """The loaded model, held by the lease."""
    loaded = registry.get(resolved.key, resolved.source, resolved.config)
    lease.hold(loaded)
    return loaded


def _load_in_worker(resolved: _Resolved) -> Any:
    """The loaded model of a worker process, which keeps it."""
    return registry.get(resolved.key, resolved.source, resolved.config)
