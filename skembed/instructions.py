r"""Task instructions: the template, and the registry of NV-Embed's task texts.

NV-Embed embeds a query as ``"Instruct: {task text}\nQuery: {text}"`` and a retrieval
document bare. Fitting, transforming, mining and evaluation all take the task text from
here, so that they cannot drift apart.

Notes
-----
Where the texts (data/instructions.json) come from:

- Retrieval, STS and Summarization: the instructions.json released with NV-Embed-v2,
  complete. It has no entry for CQADupstack, and neither does the registry.
- Classification, Clustering, Reranking and PairClassification: the list of
  E5-Mistral, to which NV-Embed's model card points through the paper's table. That
  table was not available; the strings are written from memory and may differ from it
  in detail. Scores that depend on them should name the text used.

What the document side carries: retrieval documents are bare, except for
QuoraRetrieval, as released. STS and SummEval carry the text on both sides. No source
settles the other tasks; here, tasks whose texts are all of one kind (Classification,
Clustering, PairClassification, and reranking of duplicate questions or of titles by a
title) carry it on both sides, and MindSmallReranking (articles by a browsing history)
on the query side only.

References
----------
arXiv 2405.17428, sections 3 and 4.2 (NV-Embed); arXiv 2401.00368 (E5-Mistral).
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from skembed._inputs import replace_surrogates
from skembed._validation import check_choice, check_string

__all__ = [
    "INSTRUCTIONS",
    "Instruction",
    "TASK_TYPES",
    "build_prefix",
    "check_template",
    "format_instruction",
    "is_task_name",
    "list_instructions",
    "resolve_instruction",
]

TASK_TYPES = (
    "Classification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
)

# Words of the template; inside a task text they would appear twice.
_TEMPLATE_WORDS = re.compile(
    r"\binstruct:|^\s*query:|\{instruction\}", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Instruction:
    """The task texts of one MTEB task.

    Attributes
    ----------
    name : str
        The task's name in MTEB; "STS" for all of the STS tasks.
    query : str
        Task text for queries, and for the texts of tasks that have no queries.
    document : str or None
        Task text for documents; None leaves them bare.
    task_type : str
        The task's type in MTEB, one of `TASK_TYPES`.
    """

    name: str
    query: str
    document: str | None
    task_type: str


def _read_registry() -> dict[str, Instruction]:
    """Return every name of every task, in the order of the file, mapped to its instruction."""
    file = importlib.resources.files("skembed") / "data" / "instructions.json"
    registry = {}
    for row in json.loads(file.read_text(encoding="utf-8")):
        aliases = row.pop("aliases")
        registry.update(dict.fromkeys((row["name"], *aliases), Instruction(**row)))
    return registry


INSTRUCTIONS: Mapping[str, Instruction] = MappingProxyType(_read_registry())
"""Every known task name, full or short, mapped to its `Instruction`; read-only."""

_NAMES = {name.casefold(): name for name in INSTRUCTIONS}


def list_instructions(task_type: str | None = None) -> list[str]:
    """List the full names of the known tasks.

    Parameters
    ----------
    task_type : str or None, default=None
        Only tasks of this type, one of `TASK_TYPES`; None lists all.

    Returns
    -------
    list of str
        Sorted MTEB names, without the short names that are also understood.

    Raises
    ------
    TypeError
        If `task_type` is not a str.
    ValueError
        If no task has that type.

    Examples
    --------
    >>> from skembed.instructions import list_instructions
    >>> list_instructions("Summarization")
    ['SummEval']
    """
    if task_type is not None:
        check_choice(task_type, name="task_type", owner="list_instructions", allowed=TASK_TYPES)
    return sorted({i.name for i in INSTRUCTIONS.values() if task_type in (None, i.task_type)})


def resolve_instruction(
    value: str | None,
    *,
    name: str = "instruction",
    owner: str = "NVEmbedVectorizer",
    side: str = "query",
) -> str | None:
    """Return the task text that a user's `instruction` stands for.

    Parameters
    ----------
    value : str or None
        The name of a known task, in any case; or a task text, which must contain a
        space; or None or a blank string for no instruction.
    name, owner : str
        Parameter and estimator to name in errors.
    side : {"query", "document"}, default="query"
        The side to look a task name up for. A task text is taken as it is.

    Returns
    -------
    str or None
        The task text, without the template; None where the texts stay bare.

    Raises
    ------
    TypeError
        If `value` is neither a str nor None.
    ValueError
        If `value` is a single word but no known task (the nearest is suggested), or if
        it already holds words of the template, which would then appear twice.

    Examples
    --------
    >>> from skembed.instructions import resolve_instruction
    >>> resolve_instruction("nfcorpus")
    'Given a question, retrieve relevant documents that answer the question'
    >>> resolve_instruction("NFCorpus", side="document") is None
    True
    >>> resolve_instruction("Find the recipe that the text describes")
    'Find the recipe that the text describes'
    """
    check_choice(side, name="side", owner="resolve_instruction", allowed=("query", "document"))
    text = check_string(value, name=name, owner=owner, allow_empty=True, allow_none=True)
    if text is None or not text.strip():
        return None
    task_name = _NAMES.get(text.strip().casefold())
    if task_name is not None:
        instruction = INSTRUCTIONS[task_name]
        return instruction.query if side == "query" else instruction.document
    if _TEMPLATE_WORDS.search(text):
        raise ValueError(
            f"The `{name}` parameter of `{owner}` must be the task text alone; got a text that "
            "already holds words of the template. Leave out 'Instruct:' and 'Query:', which "
            "`instruction_template` adds."
        )
    if len(text.split()) == 1 and text == text.strip():
        raise ValueError(_unknown_name_message(text, name=name, owner=owner))
    return replace_surrogates(text)


def is_task_name(value: str | None) -> bool:
    """Return whether a value names a known task, so that both of its sides are known."""
    return value is not None and value.strip().casefold() in _NAMES


def _unknown_name_message(text: str, *, name: str, owner: str) -> str:
    """Return the error for a single word that is not a task, with the nearest task."""
    near = difflib.get_close_matches(text.casefold(), _NAMES, n=1, cutoff=0.5)
    shown = repr(text) if len(text) <= 60 else f"a word of {len(text)} characters"
    suggestion = f"Did you mean {_NAMES[near[0]]!r}? " if near else ""
    return (
        f"The `{name}` parameter of `{owner}` must be a known task name, or a task text "
        f"containing a space; got {shown}. {suggestion}"
        "`skembed.instructions.list_instructions()` lists the names."
    )


def check_template(template: str, *, owner: str = "NVEmbedVectorizer") -> str:
    """Return `template` if it has the field ``{instruction}`` exactly once, and no other.

    Raises TypeError for another type, ValueError for other fields or unmatched braces.
    """
    text = check_string(template, name="instruction_template", owner=owner)
    subject = f"The `instruction_template` parameter of `{owner}`"
    try:
        fields = [parts[1:] for parts in string.Formatter().parse(text) if parts[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"{subject} must be a format string; got unmatched braces. "
            "Double a literal brace: '{{' or '}}'."
        ) from error
    if fields != [("instruction", "", None)]:
        raise ValueError(
            f"{subject} must contain the field {{instruction}} exactly once and no other; "
            f"got {len(fields)} fields: {[field[0] for field in fields]}. "
            "NV-Embed's is 'Instruct: {instruction}\\nQuery: '."
        )
    return text


def format_instruction(template: str, instruction: str | None) -> str:
    r"""Return the text that precedes every query.

    Parameters
    ----------
    template : str
        A template that `check_template` accepts.
    instruction : str or None
        A task text, as `resolve_instruction` returns it.

    Returns
    -------
    str
        The filled template; "" where `instruction` is None or empty.

    Examples
    --------
    >>> from skembed.instructions import format_instruction
    >>> format_instruction("Instruct: {instruction}\nQuery: ", "Find duplicates of this")
    'Instruct: Find duplicates of this\nQuery: '
    """
    return template.format(instruction=instruction) if instruction else ""


def build_prefix(
    template: str,
    instruction: str | None,
    document_instruction: str | None,
    *,
    side: str,
    owner: str,
) -> str:
    """Return the filled template that precedes the texts of one side; "" for nothing.

    Without a `document_instruction` documents stay bare, unless `instruction` names a task with an
    instruction on both sides. Raises as `resolve_instruction`.
    """
    text = None
    if side == "query":
        text = resolve_instruction(instruction, owner=owner)
    elif document_instruction is not None:
        text = resolve_instruction(
            document_instruction, name="document_instruction", owner=owner, side="document"
        )
    elif is_task_name(instruction):
        text = resolve_instruction(instruction, owner=owner, side="document")
    return format_instruction(template, text)
