"""How much of a very long text can matter to its first tokens.

A text of millions of characters is cut at `max_length` tokens, so most of it need not be tokenised.
`TextCutter` finds a place where a cut provably leaves the tokens in front of it as they are, or
none: between an ASCII letter or digit and the space before another, for tokenizers that are made of
known parts only.

Why there: the known normalisers map each character by itself or compose accents, none of which
reach over a space; the known pre-tokenizers either split at the space, so that each word is a
matter of its own, or not at all. Then the model must be BPE, and none of its tokens may hold the
letter or digit with a space behind it: merges then stay on their side of the cut. For the same
reason no added token may hold a space.
"""

from __future__ import annotations

import json
import re
import string
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

__all__ = ["CHARACTERS_PER_TOKEN", "TextCutter"]

CHARACTERS_PER_TOKEN = 16  # far above that of prose; where it does not do, more is taken
_GROWTH = 4
_BOUNDARY_SEARCH = 10_000  # characters
_WORD_CHARACTERS = set(string.ascii_letters + string.digits)
_METASPACE, _BYTE_SPACE = "\u2581", "\u0120"  # how SentencePiece and byte-level BPE write a space
_SPACES = {" ", _METASPACE, _BYTE_SPACE}

# Normalisers that change one character at a time, or a character and its accents.
_LOCAL = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Prepend"}
_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "ByteLevel"}
_MODELS = {"BPE", "WordPiece", "WordLevel", "Unigram"}


class TextCutter:
    """Cutter of long texts for one tokenizer; its parts are looked at when the first one comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def cut(self, prefix: str, text: str, n_tokens: int) -> str | None:
        """Return ``prefix + text`` up to a place behind which nothing changes the first tokens.

        What is returned gives more than `n_tokens` tokens. None: take the text whole.
        """
        if self._boundary is None:
            return None
        size = n_tokens * CHARACTERS_PER_TOKEN
        while size < len(text):
            boundary = self._boundary.search(text, size, min(size + _BOUNDARY_SEARCH, len(text)))
            if boundary is None:
                return None
            part = prefix + text[: boundary.end()]
            if len(self._tokenizer.encode(part, add_special_tokens=False).ids) > n_tokens:
                return part
            size *= _GROWTH
        return None

    @cached_property
    def _boundary(self) -> re.Pattern[str] | None:
        """What stands in front of a cut; None if the tokenizer has parts that are not known."""
        characters = "".join(sorted(self._find_characters()))
        return re.compile(f"[{characters}](?= [A-Za-z0-9])") if characters else None

    def _find_characters(self) -> set[str]:
        """Return the letters and digits behind which a text may be cut."""
        parts = json.loads(self._tokenizer.to_str())
        model = parts["model"]
        if model["type"] not in _MODELS or model.get("dropout"):
            return set()
        for token in parts["added_tokens"] or []:
            if any(char.isspace() or char in _SPACES for char in token["content"]):
                return set()
        normalizers = _flatten(parts["normalizer"], "normalizers")
        space = _find_space(normalizers)
        if space is None:
            return set()
        splits, space = _find_split(_flatten(parts["pre_tokenizer"], "pretokenizers"), space)
        if splits or space is None:
            return _WORD_CHARACTERS if splits else set()
        keeps_case = all(part["type"] in ("Prepend", "Replace") for part in normalizers)
        return _find_unjoined(model, space) if keeps_case else set()


def _flatten(part: Any, key: str) -> list[Any]:
    """Return the parts of a sequence of them, of a single one, or of none."""
    if part is None:
        return []
    return [x for each in part[key] for x in _flatten(each, key)] if key in part else [part]


def _find_space(normalizers: list[Any]) -> str | None:
    """Return what a space has become after the normalisers; None if one may look over it."""
    space = " "
    for part in normalizers:
        if part["type"] == "Replace":
            pattern = part["pattern"].get("String", "")
            if len(pattern) != 1 or pattern in _WORD_CHARACTERS:
                return None
            space = part["content"] if pattern == space else space
        elif part["type"] not in _LOCAL:
            return None
    return space if space in _SPACES else None


def _find_split(pre_tokenizers: list[Any], space: str) -> tuple[bool, str | None]:
    """Return whether a new word begins at the space, and what it has become; None if unknown."""
    for part in pre_tokenizers:
        name, was = part["type"], space
        if name == "Metaspace" and part.get("replacement") == _METASPACE:
            space = _METASPACE if was == " " else was
            splits = bool(part.get("split", True)) and space == _METASPACE
        elif name == "ByteLevel":
            space = _BYTE_SPACE
            splits = bool(part.get("use_regex", True))
            if was != " ":
                return False, None
        elif name in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
            splits = was == " "
            if not splits:  # what it does to the other forms of a space is not looked into
                return False, None
        else:
            return False, None
        if splits:
            # A later one that is unknown may look back at the whole text.
            return all(each["type"] in _SPLITTERS for each in pre_tokenizers), space
    return False, space


def _find_unjoined(model: Any, space: str) -> set[str]:
    """Return the letters and digits that a model of whole texts never joins to a space behind."""
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return set()
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return set()
    vocab = model["vocab"]
    if space not in vocab:  # it would join its neighbours as "unknown"
        return set()
    joined = re.compile(rf"[A-Za-z0-9](?={space})")
    return (_WORD_CHARACTERS & vocab.keys()) - {c for token in vocab for c in joined.findall(token)}
