"""The refusal of another model, or of other settings in its folder, than `fit` saw.

A classifier behind the vectors would go on with numbers that it was not trained on. Copies of a
model on two machines are one model: only the content of its files counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skembed.exceptions import CheckpointError
from skembed.model.sources import (
    BUNDLED_MODELS,
    CONTENT_DIGITS,
    ModelSource,
    find_weight_files,
    has_same_content,
)
from skembed.model.weight_files import check_file

__all__ = ["describe_change"]

_OWNER = "NVEmbedVectorizer"


def describe_change(
    fitted: Mapping[str, Any],
    source: ModelSource,
    fingerprint: str,
    adapter: str | None,
    changed: Sequence[str] = (),
) -> CheckpointError:
    """Return the error, with both models and the way back; raise that of damaged weights.

    `fitted` holds the `model_` of `fit`; `fingerprint` is the base model's now, `adapter` its
    adapter's; `changed` names the parameters whose "auto" means something else now.
    """
    for path in find_weight_files(source.folder):
        check_file(path)  # a file that was cut off is no other model
    name, revision = fitted["name"], fitted["revision"]
    now = _describe_model(source.name, source.revision, f"{fingerprint}+{adapter or ''}")
    if changed:
        what = f"its folder gives other values for {', '.join(f'`{n}`' for n in changed)} now"
        back = "Pass the old values"
    elif name != source.name:
        what, back = f"its `model` is {now} now", f"Set `model` to {name!r} again"
    else:
        what = f"that name stands for another model now: {now}"
        back = "Put the old folder back"
        if name in BUNDLED_MODELS:
            back = "Install the release of skembed that it was fitted with"
        elif revision is not None and adapter is None:
            back = f"Pass revision={revision!r}"
    base = fitted["fingerprint"].partition("+")[0]
    is_other_base = bool(adapter) and not has_same_content(base, fingerprint)
    also = " Its adapter was trained on another model." if is_other_base else ""
    return CheckpointError(
        f"This {_OWNER} was fitted with {_describe_model(name, revision, fitted['fingerprint'])}, "
        f"and {what}.{also} What was learned from old vectors does not fit new ones. {back}, or "
        "call `fit` again, on this and on all that learned from its vectors."
    )


def _describe_model(name: str, revision: str | None, fingerprint: str) -> str:
    """Return a model's name, and what tells it from another one of that name."""
    base, _, adapter = fingerprint.partition("+")
    digits = base[:CONTENT_DIGITS] + (
        f" with adapter {adapter[:CONTENT_DIGITS]}" if adapter else ""
    )
    return f"{name!r} ({f'revision {revision}, ' if revision else ''}fingerprint {digits})"
