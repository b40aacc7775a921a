"""`MTEBEncoder`: a vectorizer inside ``mteb.evaluate``, with NV-Embed's task instructions."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import joblib
from sklearn.utils.validation import check_is_fitted

from skembed._inputs import is_missing
from skembed._validation import check_choice, check_string, import_optional, name_our_words
from skembed.embedding import FloatArray, check_vectorizer, embed
from skembed.instructions import INSTRUCTIONS, resolve_instruction
from skembed.vectorizer import NVEmbedVectorizer

__all__ = ["MTEBEncoder", "find_task"]

_OWNER = "MTEBEncoder"
# mteb passes these to every encoder; skembed sizes batches by their tokens.
_IGNORED_OPTIONS = {"batch_size", "show_progress_bar"}
# mteb puts these into the names of later versions and smaller sets of a task.
_VARIANTS = (r"\.v\d+$", r"HardNegatives$", r"Hierarchical", r"(Retrieval|Summarization)$")
_TASKS = {name.casefold(): name for name in INSTRUCTIONS}
_ASYMMETRIC = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


def find_task(name: str) -> str | None:
    """Return the name in `INSTRUCTIONS` of an mteb task, a later version or a smaller set of it."""
    for pattern in _VARIANTS:
        if name.casefold() in _TASKS:
            break
        name = re.sub(pattern, "", name)
    return _TASKS.get(name.casefold())


class MTEBEncoder:
    """Wrapper of a vectorizer for ``mteb.evaluate``, with the instruction of each task.

    Needs mteb 2.26 or newer of version 2 (``pip install skembed[mteb]``).

    Parameters
    ----------
    vectorizer : NVEmbedVectorizer, any object with `transform` or `encode`, or a callable
        Already fitted, if it needs to be. Used as it is, never changed. Queries go through
        `encode_query` and documents through `encode_document`, if present.
    instructions : "auto", None, or dict of str to str, default="auto"
        Instructions by name of the mteb task, where the vectorizer takes one. "auto" leaves a
        vectorizer with an `instruction` of its own as it is, and one whose model learned none (as
        the bundled one); else it takes the task's from `skembed.instructions`, or for a task
        unknown there the prompt that mteb has for it, if any. A dict (task texts, or names of
        known tasks) overrides these and the vectorizer's own. None leaves every vectorizer as it
        is.
    name : str, optional
        Name of the model in mteb's results; None makes one from the vectorizer.
    revision : str, optional
        Revision in mteb's results, which mteb looks cached results up by. None takes a hash of the
        vectorizer and `instructions`, so that another model never finds them.

    Notes
    -----
    Retrieval and reranking documents stay bare, unless the task asks for more: in
    `skembed.instructions` (QuoraRetrieval and the duplicate questions), or in mteb by a prompt for
    documents. mteb's own wrapper of NV-Embed puts a prompt that is a single text on documents too.

    References
    ----------
    N. Muennighoff et al., MTEB: Massive Text Embedding Benchmark, arXiv 2210.07316.

    Examples
    --------
    >>> from skembed import NVEmbedVectorizer
    >>> from skembed.mteb import MTEBEncoder
    >>> MTEBEncoder(NVEmbedVectorizer()).instructions_for("NFCorpus", "Retrieval")
    (None, None)
    >>> encoder = MTEBEncoder(NVEmbedVectorizer(), instructions={"NFCorpus": "NFCorpus"})
    >>> encoder.instructions_for("NFCorpus", "Retrieval")
    ('Given a question, retrieve relevant documents that answer the question', None)
    """

    @name_our_words
    def __init__(
        self,
        vectorizer: Any,
        *,
        instructions: str | Mapping[str, str] | None = "auto",
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        if instructions is not None and not isinstance(instructions, Mapping):
            check_choice(instructions, name="instructions", owner=_OWNER, allowed=("auto",))
        check_vectorizer(vectorizer, subject=f"The `vectorizer` parameter of `{_OWNER}`")
        if isinstance(vectorizer, NVEmbedVectorizer):
            check_is_fitted(vectorizer)
        self.vectorizer = vectorizer
        self.instructions = instructions
        self.name = check_string(name, name="name", owner=_OWNER, allow_none=True)
        self.revision = check_string(revision, name="revision", owner=_OWNER, allow_none=True)
        self._meta: Any = None

    def __repr__(self) -> str:
        """Return the call with the vectorizer and the instructions."""
        return f"MTEBEncoder({self.vectorizer!r}, instructions={self.instructions!r})"

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> FloatArray:
        """Embed the texts of a task; called by mteb.

        Parameters
        ----------
        inputs : iterable of mapping
            Batches, whose texts are under "text".
        task_metadata : mteb.TaskMetadata
            Task, whose name, type and prompt decide on the instruction.
        hf_split, hf_subset : str
            Split and subset of the task; ignored.
        prompt_type : mteb.types.PromptType, optional
            Query or document; None for tasks with one kind of text.
        **kwargs
            `batch_size` and `show_progress_bar`, ignored: batches are sized by tokens.

        Returns
        -------
        ndarray of float32, shape (n_texts, dim)
            In input order.

        Raises
        ------
        TypeError
            If mteb was told to pass on another option, which would be ignored.
        ValueError
            If the vectorizer returns NaN, or an array of another shape.
        """
        unknown = sorted(set(kwargs) - _IGNORED_OPTIONS)
        if unknown:
            raise TypeError(
                f"`{_OWNER}.encode` takes no option {unknown[0]!r}. Set it on the vectorizer, and "
                "leave it out of mteb's `encode_kwargs`."
            )
        texts = [
            None if is_missing(text) else str(text) for batch in inputs for text in batch["text"]
        ]
        prompts = task_metadata.prompt
        query, document = self.instructions_for(task_metadata.name, task_metadata.type, prompts)
        vectorizer = _instruct(self.vectorizer, query, document)
        side = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        return embed(vectorizer, texts, side, owner=_OWNER)

    def instructions_for(
        self, task: str, task_type: str, prompt: str | Mapping[str, str] | None = None
    ) -> tuple[str | None, str | None]:
        """Return the task texts that a task's queries and documents get from this encoder.

        Parameters
        ----------
        task, task_type : str
            Name and type of the task in mteb.
        prompt : str or mapping, optional
            mteb's own prompt for the task: one text, or one each for "query" and "document".

        Returns
        -------
        tuple of (str or None, str or None)
            For queries, and the texts of tasks without; and for documents. None where the
            vectorizer's own is left as it is.

        Raises
        ------
        TypeError, ValueError
            If a text is neither the name of a known task nor a task text.
        """
        parameters = _get_parameters(self.vectorizer)
        if self.instructions is None or "instruction" not in parameters:
            return None, None
        text = self.instructions.get(task) if isinstance(self.instructions, Mapping) else None
        if text is None and not self._wants_instruction(parameters["instruction"]):
            return None, None
        text = find_task(task) if text is None else text
        if text is not None:
            query = resolve_instruction(text, name="instructions", owner=_OWNER)
            if find_task(text) is None:  # a task text from the user
                return query, None if task_type in _ASYMMETRIC else query
            return query, resolve_instruction(text, owner=_OWNER, side="document")
        if isinstance(prompt, Mapping):
            return prompt.get("query") or None, prompt.get("document") or None
        return prompt or None, None if task_type in _ASYMMETRIC else prompt or None

    def _wants_instruction(self, own: str | None) -> bool:
        """Return whether a task's instruction helps a vectorizer whose parameter is `own`."""
        if not isinstance(self.vectorizer, NVEmbedVectorizer):
            return own is None
        if own != "auto":  # None too, which a user has to write
            return False
        card = _fit(self.vectorizer)._card
        return bool(card["instructions"]) and not card["auto"]["instruction"]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosine similarity of all rows with all rows; called by mteb.

        Parameters
        ----------
        embeddings1, embeddings2 : array-like of float, shapes (n, dim) and (m, dim)
            Embeddings.

        Returns
        -------
        torch.Tensor of float32, shape (n, m)
            Cosines.

        Raises
        ------
        ImportError
            If mteb is not installed.
        """
        return _import_mteb("mteb.similarity_functions").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the cosine similarity of each row with the same row; called by mteb.

        Parameters
        ----------
        embeddings1, embeddings2 : array-like of float, shape (n, dim)
            Embeddings.

        Returns
        -------
        torch.Tensor of float32, shape (n,)
            Cosines.

        Raises
        ------
        ImportError
            If mteb is not installed.
        """
        return _import_mteb("mteb.similarity_functions").pairwise_cos_sim(embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> Any:
        """Description of the model in mteb's results, an ``mteb.ModelMeta``.

        Raises
        ------
        ImportError
            If mteb is not installed.
        """
        if self._meta is None:
            module = _import_mteb("mteb.models.model_meta")
            model = _describe(self.vectorizer)
            takes = "instruction" in _get_parameters(self.vectorizer)
            key = (model.get("fingerprint"), self.vectorizer, self.instructions)
            self._meta = module.ModelMeta.create_empty(
                {
                    "name": self.name or f"skembed/{model['name']}",
                    "revision": self.revision or joblib.hash(key),
                    "embed_dim": model.get("dim"),
                    "similarity_fn_name": module.ScoringFunction.COSINE,
                    "framework": ["PyTorch", "safetensors"] if "fingerprint" in model else [],
                    "use_instructions": takes and bool(model.get("instructions", True)),
                }
            )
        return self._meta


def _import_mteb(module: str) -> Any:
    """Import a module of mteb."""
    import_optional("mteb", extra="mteb", purpose=f"`{_OWNER}`")
    return import_module(module)


def _get_parameters(vectorizer: Any) -> dict[str, Any]:
    """Return the parameters of an estimator; an empty dict for any other object."""
    get_params = getattr(vectorizer, "get_params", None)
    return dict(get_params(deep=False)) if callable(get_params) else {}


def _instruct(vectorizer: Any, query: str | None, document: str | None) -> Any:
    """Return the vectorizer, or a shallow copy of it with other instructions."""
    texts = {"instruction": query, "document_instruction": document}
    parameters = _get_parameters(vectorizer)
    changes = {k: text for k, text in texts.items() if text is not None and k in parameters}
    if not changes:
        return vectorizer
    # Shares weights and fitted values; a clone would lose an adapter.
    return copy.copy(vectorizer).set_params(**changes)


def _fit(vectorizer: NVEmbedVectorizer) -> NVEmbedVectorizer:
    """Return a vectorizer that knows its model: itself, or a fitted copy of a frozen one.

    That reads the configuration, no weights.
    """
    return vectorizer if hasattr(vectorizer, "_card") else copy.copy(vectorizer).fit(["text"])


def _describe(vectorizer: Any) -> dict[str, Any]:
    """Return the name of a vectorizer and, for models of this package, fingerprint and width."""
    if not isinstance(vectorizer, NVEmbedVectorizer):
        return {"name": type(vectorizer).__name__}
    vectorizer = _fit(vectorizer)
    return {
        "name": Path(str(vectorizer.model_["name"])).name,
        "fingerprint": vectorizer.model_["fingerprint"],
        "instructions": vectorizer._card["instructions"],
        "dim": int(vectorizer.embedding_dim_),
    }
