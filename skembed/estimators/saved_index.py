"""A saved retriever: which model built its index, and the refusal of another.

Two signs, since a vectorizer may be any encoder: the fingerprint of the weights, where it has one,
and the vectors of a few fixed texts, which change with weights, pooling and instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from skembed.embedding import embed
from skembed.similarity import Vectors

__all__ = ["check_mark", "mark_model"]

_PROBES = [
    "A llama is a domesticated South American camelid.",
    "card payment declined",
    "How do enzymes lower the activation energy of a reaction?",
    "Faust",
]
# Of the length of a vector: a cosine of 0.999, which float32 and bfloat16 of one model keep.
_LARGEST_DISTANCE = 0.045


def mark_model(vectorizer: Any, *, owner: str) -> tuple[dict[str, Any] | None, Vectors | None]:
    """Return name and fingerprint of a model, and its vectors of the probes; None without one."""
    if vectorizer is None:
        return None, None
    known = getattr(vectorizer, "model_", None)
    known = known if isinstance(known, dict) else {}
    mark = {"name": known.get("name"), "fingerprint": known.get("fingerprint")}
    return mark, embed(vectorizer, _PROBES, "document", owner=owner)


def check_mark(
    vectorizer: Any,
    mark: dict[str, Any] | None,
    probe: npt.NDArray[np.float32] | None,
    *,
    where: str,
    owner: str,
) -> None:
    """Raise ValueError unless a vectorizer is the model that the mark was made of.

    `where` begins the sentence. An index of embeddings has no mark, and an index is not checked
    where embeddings are to be given.
    """
    if vectorizer is None:
        return
    if mark is None or probe is None:
        raise ValueError(
            f"{where} was built from embeddings, and says nothing of their model. Load it with "
            "vectorizer=None, and search with embeddings of the same model."
        )
    own, vectors = mark_model(vectorizer, owner=owner)
    prints = mark["fingerprint"], own["fingerprint"] if own else None
    same = None in prints or prints[0] == prints[1]
    if vectors is None or vectors.shape != probe.shape:
        same = False
    elif same:
        distances = np.linalg.norm(vectors - probe, axis=1)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), np.linalg.norm(probe, axis=1))
        same = bool((distances <= _LARGEST_DISTANCE * lengths).all())
    if not same:
        theirs = f" ({mark['name']}, fingerprint {prints[0]})" if prints[0] else ""
        ours = f" ({own['name']}, fingerprint {prints[1]})" if own and prints[1] else ""
        raise ValueError(
            f"{where} was built with another model{theirs} than the `vectorizer`{ours}: they "
            "embed the same text differently. Load it with the model and the document_instruction "
            "that built it, or build it anew."
        )
