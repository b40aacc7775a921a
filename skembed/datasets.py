"""Labelled real text that needs no download: the documentation of three packages."""

from __future__ import annotations

import importlib.resources
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from sklearn.utils import Bunch

from skembed._validation import check_int

__all__ = ["load_docstrings"]

_MIN_BODY_CHARS, _MAX_BODY_CHARS = 120, 2000

_DESCR = """\
{title}
{underline}

Passages of the documentation of numpy, scipy and scikit-learn in these versions, each labelled
with the subpackage that it documents. They come with skembed; the three packages are distributed
under BSD licences, which lie beside the file (docstrings.LICENSES.md).

:Number of texts: {n_texts}
:Number of classes: {n_classes}
:Number of documented objects (groups): {n_groups}
:Number of (summary, body) pairs: {n_pairs}

A docstring gives passages of up to three kinds: its summary, its extended description and its
notes; long ones are split between paragraphs. Code, formulas, tables, references and reST markup
are removed, and so are module paths, which would give the label away. A paragraph found under
several labels is dropped and one repeated under a single label is kept once, so that boilerplate
neither decides a label nor repeats across objects. All passages about a function, or about a
class and its methods, share one group: split by `groups`, or parts of one docstring end up on
both sides.
"""


class _Passage(NamedTuple):
    """One text of the set: what it documents, and which part of the docstring it is."""

    label: str
    group: str
    name: str
    kind: str
    text: str


def load_docstrings(*, min_per_class: int = 45) -> Bunch:
    """Load a labelled text set from the documentation of numpy, scipy and scikit-learn.

    The set is real technical English, needs no network, and is the same on every machine,
    whatever versions of the three packages are installed. Reading takes less than a second.

    Parameters
    ----------
    min_per_class : int, default=45
        Subpackages with fewer texts than this are left out, at least 1.

    Returns
    -------
    Bunch
        With these attributes, the first five in one order (by label, then by qualified name,
        then by position in the docstring):

        data : list of str
            The texts, all distinct, 40 to about 900 characters long.
        target : ndarray of shape (n_texts,), dtype int64
            Index of the label of each text in `target_names`.
        groups : ndarray of shape (n_texts,), dtype str
            Qualified name of the function or class that each text documents.
        names : list of str
            Qualified name of the documented object, with the method where it is one.
        kinds : list of str
            ``"summary"``, ``"description"`` or ``"notes"``.
        target_names : list of str
            The labels, sorted: ``"scipy.stats"``, ``"sklearn.linear_model"``, ...; ``"numpy"``
            is the main namespace of numpy.
        pairs : list of tuple of (str, str)
            Summary and body (description and notes) of one object each, for retrieval; all
            summaries are distinct, and so are all bodies.
        versions : dict
            Distribution name to the version whose documentation was taken.
        DESCR : str
            Description of the set.

    Raises
    ------
    TypeError
        If `min_per_class` is not an int.
    ValueError
        If `min_per_class` is below 1, or above the size of every subpackage.

    Examples
    --------
    >>> from skembed.datasets import load_docstrings
    >>> docs = load_docstrings()
    >>> len(docs.data) == len(docs.target) == len(docs.groups)
    True
    >>> "scipy.stats" in docs.target_names
    True
    """
    check_int(min_per_class, name="min_per_class", owner="load_docstrings", low=1)
    file = importlib.resources.files("skembed") / "data" / "docstrings.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    by_label = {
        label: [
            _Passage(label, f"{label}.{group}", f"{label}.{name}", kind, text)
            for group, rows in groups.items()
            for name, kind, text in rows
        ]
        for label, groups in content["texts"].items()
    }
    target_names = [label for label, rows in by_label.items() if len(rows) >= min_per_class]
    if not target_names:
        raise ValueError(
            "The `min_per_class` parameter of `load_docstrings` must be an int in "
            f"[1, {max(map(len, by_label.values()))}]; got {min_per_class}."
        )
    passages = [passage for label in target_names for passage in by_label[label]]
    return _make_bunch(passages, target_names, content["versions"])


def _make_bunch(
    passages: list[_Passage], target_names: list[str], versions: dict[str, str]
) -> Bunch:
    """Return the data set, with its labels numbered and its description filled in."""
    pairs = _make_pairs(passages)
    position = {label: index for index, label in enumerate(target_names)}
    groups = np.array([passage.group for passage in passages])
    title = "Documentation of " + ", ".join(f"{k} {v}" for k, v in versions.items())
    return Bunch(
        data=[passage.text for passage in passages],
        target=np.array([position[passage.label] for passage in passages], dtype=np.int64),
        groups=groups,
        names=[passage.name for passage in passages],
        kinds=[passage.kind for passage in passages],
        target_names=target_names,
        pairs=pairs,
        versions=versions,
        DESCR=_DESCR.format(
            title=title,
            underline="=" * len(title),
            n_texts=len(passages),
            n_classes=len(target_names),
            n_groups=len(np.unique(groups)),
            n_pairs=len(pairs),
        ),
    )


def _make_pairs(passages: Iterable[_Passage]) -> list[tuple[str, str]]:
    """Return (summary, body) of each object that has both."""
    summaries: dict[str, str] = {}
    bodies: dict[str, list[str]] = defaultdict(list)
    for passage in passages:
        if passage.kind == "summary":
            summaries[passage.name] = passage.text
        else:
            bodies[passage.name].append(passage.text)
    joined = {name: " ".join(bodies[name]) for name in summaries}
    return [
        (summary, textwrap.shorten(joined[name], _MAX_BODY_CHARS, placeholder=""))
        for name, summary in summaries.items()
        if len(joined[name]) >= _MIN_BODY_CHARS
    ]
