"""The fingerprint of the model that built a saved index, and the refusal of another model.

A vectorizer may be any encoder, so a fingerprint has two parts: that of the weights, if there is
one, and the vectors of a few fixed texts, which change with weights, pooling and instruction.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from skembed._files import check_fields
from skembed.embedding import embed
from skembed.model.sources import has_same_content
from skembed.search.index_file import SavedIndex
from skembed.similarity import Vectors

__all__ = ["Saved", "check_fingerprint", "fingerprint_model", "read_settings"]

_MODEL_FIELDS = ("name", "fingerprint")
_PROBES = [
    "A llama is a domesticated South American camelid.",
    "card payment declined",
    "How do enzymes lower the activation energy of a reaction?",
    "Faust",
]
# Relative to the length of a vector. It allows a cosine of 0.999: float32 and bfloat16 of one model
# differ by less.
_LARGEST_DISTANCE = 0.045


class Saved(Enum):
    """The default of `Retriever.load`, apart from all names that a model or folder may have."""

    NAME = "the model named in the index"


def fingerprint_model(
    vectorizer: Any, *, owner: str
) -> tuple[dict[str, Any] | None, Vectors | None]:
    """Return the name and fingerprint of a model, and the vectors of the probes, (4, dim)."""
    if vectorizer is None:
        return None, None
    return _describe_model(vectorizer), embed(vectorizer, _PROBES, "document", owner=owner)


def _describe_model(vectorizer: Any) -> dict[str, Any]:
    """Return name and fingerprint of a model; None for each where it has none."""
    model = getattr(vectorizer, "model_", None)
    model = model if isinstance(model, dict) else {}
    return {name: _as_text(model.get(name)) for name in _MODEL_FIELDS}


def _as_text(value: Any) -> str | None:
    """Return a str of a stranger's `model_`, as JSON can hold it, or None for anything else."""
    return str.__str__(value) if isinstance(value, str) else None


def read_settings(saved: SavedIndex, parameters: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a saved index if they are these, and no others.

    The values of `parameters` are the caller's to check. Raises ValueError.
    """
    null = type(None)
    fields: dict[str, type | tuple[type, ...]] = {
        "parameters": dict,
        "ids_counted": bool,
        "vectorizer": (str, null),
        "model": (dict, null),
    }
    settings = check_fields(saved.settings, fields, subject="its settings", error=saved.damaged)
    model = settings["model"]
    if model is not None:
        check_fields(
            model,
            dict.fromkeys(_MODEL_FIELDS, (str, null)),
            subject="its model",
            error=saved.damaged,
        )
    foreign = {*settings} - {*fields, "kinds", "dim", "n_seen"}
    if foreign or {*settings["parameters"]} != {*parameters}:
        names = sorted(foreign or {*settings["parameters"]} ^ {*parameters})
        raise saved.damaged(f"its settings must be those of an index, but differ in {names}")
    return settings


def check_fingerprint(
    vectorizer: Any,
    saved: dict[str, Any] | None,
    probe: Vectors | None,
    *,
    where: str,
    owner: str,
) -> None:
    """Raise ValueError unless a vectorizer is the `saved` model; `where` begins the sentence.

    Without a vectorizer there is nothing to check: the user gives embeddings.
    """
    if vectorizer is None:
        return
    if saved is None or probe is None:
        raise ValueError(
            f"{where} was built from embeddings, and does not know their model. Load it with "
            "vectorizer=None, and search with embeddings of the same model."
        )
    models = [saved, _describe_model(vectorizer)]
    known = [m["fingerprint"] for m in models if m.get("fingerprint")]
    same = len(known) < 2 or has_same_content(*known)
    if same:
        vectors = embed(vectorizer, _PROBES, "document", owner=owner)
        same = vectors.shape == probe.shape
    if same:
        distances = np.linalg.norm(vectors - probe, axis=1)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1), np.linalg.norm(probe, axis=1))
        same = bool((distances <= _LARGEST_DISTANCE * lengths).all())
    if not same:
        built, given = (
            f" ({m['name']}, fingerprint {m['fingerprint']})" if m.get("fingerprint") else ""
            for m in models
        )
        raise ValueError(
            f"{where} was built with another model{built} than the `vectorizer`{given}: they "
            "embed the same text differently. Load it with the model and the document_instruction "
            "that built it, or build it again."
        )
