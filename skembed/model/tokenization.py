"""Token ids and packed batches of texts, and the positions that are pooled.

The rules are NV-Embed's (arXiv 2405.17428, and the released reference). The end-of-sequence string
is appended before tokenisation, so that a text cut at `max_length` loses it. With an instruction,
the begin-of-sequence token and the instruction take part in attention but not in the pool.
"""

from __future__ import annotations

import json
import re
import string
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from skembed._files import read_file
from skembed.exceptions import CheckpointError
from skembed.model.files import find_file, has_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "EncodedTexts",
    "MAX_TOKENIZER_BYTES",
    "PackedBatch",
    "TextCutter",
    "TextTokenizer",
    "find_tokenizer_file",
    "iterate_batches",
    "pack_texts",
    "round_up",
]


MAX_TOKENIZER_BYTES = 256 * 1024**2
LONG_TEXT = 50_000  # characters above those of `max_length` tokens, from which on a cut pays


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several texts, one text after the other."""

    input_ids: Tensor  # int64 (T,)
    position_ids: Tensor  # int64 (T,)
    lengths: tuple[int, ...]  # tokens of each text; equal neighbours make the grouped path fast
    n_texts: int  # a text of padding may follow them in `lengths`, empty ones in `pool_counts`
    cu_seqlens: Tensor  # int32 (B + 1,): where each text begins, and T
    pool_index: Tensor  # int64 (P,): positions that are pooled
    pool_segments: Tensor  # int64 (P,): the text of each pooled position, ascending
    pool_counts: Tensor  # float32 (B,): pooled tokens of each text, at least 1

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on another device; to CUDA through pinned memory, without waiting."""
        pin = device.type == "cuda"
        moved: dict[str, Any] = {
            name: (x.pin_memory() if pin else x).to(device, non_blocking=pin)
            for name, x in vars(self).items()
            if isinstance(x, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of several texts."""

    ids: list[np.ndarray]  # int32, at most `max_length` each
    lengths: np.ndarray  # int64 (n,)
    pool_start: int  # first pooled position of every text: 0, or the first after the instruction
    n_truncated: int  # texts that were longer than `max_length`


class TextTokenizer:
    """A checkpoint's tokenizer.json with NV-Embed's rules around it; thread-safe.

    The `tokenizers` library reads the file itself: no tokenizer class is looked up by name, so
    nothing in the folder can ask for custom code. The tokenizer's own padding and truncation are
    switched off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_token_id: int,
        eos_token_id: int,
        vocab_size: int | None = None,
        path: Path | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.bos_token_id = bos_token_id
        self.vocab_size = 1 << 32 if vocab_size is None else vocab_size
        self.path = path
        self.cutter = TextCutter(tokenizer)
        eos_token = tokenizer.id_to_token(eos_token_id)
        if eos_token is None or tokenizer.id_to_token(bos_token_id) is None:
            raise CheckpointError(
                f"The tokenizer has no token of id {bos_token_id} (begin) or {eos_token_id} (end), "
                "which config.json names; the two files belong to different models."
            )
        n_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
        if max(n_tokens - 1, bos_token_id, eos_token_id) >= self.vocab_size:
            raise CheckpointError(
                f"The tokenizer {path} has {n_tokens} tokens, or begin and end tokens "
                f"({bos_token_id}, {eos_token_id}), beyond the {vocab_size} of config.json's "
                "vocab_size; the two files belong to different models."
            )
        self.eos_token: str = eos_token

    @classmethod
    def from_folder(
        cls, folder: Path, *, bos_token_id: int, eos_token_id: int, vocab_size: int | None = None
    ) -> TextTokenizer:
        """Read the ``tokenizer.json`` of a model folder; raise CheckpointError if unreadable."""
        path = find_tokenizer_file(folder)
        try:
            content = read_file(path, limit=MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        with _translate_panics(path, "is not a readable tokenizer"):
            return cls(
                Tokenizer.from_buffer(content),
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                vocab_size=vocab_size,
                path=path,
            )

    def count_prefix(self, prefix: str) -> int:
        """Return how many positions an instruction keeps out of the pool, begin token included.

        The reference counts the tokens of the prefix alone, without a begin token. Its template
        ends with a space, which is a token at the end but not before a word; that extra token makes
        up for the begin token. Where a prefix has no such token, one is added.
        """
        if not prefix:
            return 0
        tokens, bare = (
            self.tokenizer.encode(text, add_special_tokens=False).ids
            for text in (prefix, prefix.rstrip(" "))
        )
        return len(tokens) + (len(tokens) == len(bare))

    def encode(
        self, texts: Sequence[str], *, prefix: str, max_length: int, mask_prefix: bool = True
    ) -> EncodedTexts:
        """Return the token ids of ``prefix + text + end``, cut at `max_length`.

        Raises ValueError if the instruction alone fills `max_length`.
        """
        with _translate_panics(self.path, "fails on the instruction"):
            pool_start = self.count_prefix(prefix)
        if pool_start >= max_length:
            raise ValueError(
                f"The instruction takes {pool_start} tokens with the begin-of-sequence token, and "
                f"max_length is {max_length}: no token of a text would be left to pool. Raise "
                "`max_length` or shorten `instruction`."
            )
        enough = max_length * CHARACTERS_PER_TOKEN + LONG_TEXT
        full = [
            prefix + text + self.eos_token
            if len(text) < enough
            else self.cutter.cut(prefix, text, max_length) or prefix + text + self.eos_token
            for text in texts
        ]
        ids, n_truncated = [], 0
        with _translate_panics(self.path, "fails on a text"):
            encodings = self.tokenizer.encode_batch_fast(full)
        for encoding in encodings:
            row = encoding.ids
            if not row or row[0] != self.bos_token_id:  # saved without its post-processor
                row = [self.bos_token_id, *row]
            n_truncated += len(row) > max_length
            ids.append(np.array(row[:max_length], dtype=np.int32))
            if max(row) >= self.vocab_size:
                self._refuse(max(row[:max_length]))
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        return EncodedTexts(ids, lengths, pool_start if mask_prefix else 0, n_truncated)

    def _refuse(self, highest: int) -> None:
        """Raise CheckpointError if a token has no word vector."""
        if highest >= self.vocab_size:
            raise CheckpointError(
                f"The tokenizer {self.path or ''} has a token of id {highest}, which a text holds, "
                f"and config.json's vocab_size is {self.vocab_size}: the model has no vector for "
                "it. The two files belong to different models, or tokens were added to one alone."
            )


@contextmanager
def _translate_panics(path: Path | None, problem: str) -> Iterator[None]:
    """Raise CheckpointError for what the tokenizers library raises.

    It raises bare Exception, and panics that are no Exception at all.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        where = "The tokenizer" if path is None else str(path)
        raise CheckpointError(f"{where} {problem}: {error}") from error


def find_tokenizer_file(folder: Path) -> Path:
    """Return the path of a model folder's ``tokenizer.json``; raise CheckpointError if missing."""
    path = find_file(folder, "tokenizer.json")
    if not has_file(folder, "tokenizer.json"):
        raise CheckpointError(
            f"The model folder {folder} must hold a tokenizer.json; it does not. Save the "
            "tokenizer in its fast form (`save_pretrained` of a fast tokenizer writes it)."
        )
    return path


def pack_texts(
    ids: Sequence[np.ndarray], pool_start: int, *, on_grid: bool = False, coarse: bool = False
) -> PackedBatch:
    """Return a batch, on the CPU, of texts that are each longer than `pool_start`.

    `on_grid` pads to one of few sizes, with a text of padding at the end and empty rows in the
    result, because oneDNN spends up to milliseconds and lasting memory on each new size of a
    product. `coarse` takes even fewer sizes, for a batch among many.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    tokens = np.concatenate(ids).astype(np.int64)
    pool_counts = lengths - pool_start
    if on_grid:
        filling = round_up(len(tokens), coarse=coarse) - len(tokens)
        tokens = np.concatenate([tokens, np.zeros(filling, np.int64)])
        lengths = np.append(lengths, filling) if filling else lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    pooled = np.flatnonzero(positions[: starts[len(ids)]] >= pool_start)
    segments = np.repeat(np.arange(len(ids)), pool_counts)
    if on_grid:
        filling = round_up(len(pooled), coarse=coarse) - len(pooled)
        pooled = np.concatenate([pooled, np.zeros(filling, np.int64)])
        segments = np.concatenate([segments, np.full(filling, len(ids))])
        pool_counts = np.append(pool_counts, filling)
        n_rows = round_up(len(pool_counts), coarse=True)  # few sizes: one small product uses them
        pool_counts = np.pad(pool_counts, (0, n_rows - len(pool_counts)))
    return PackedBatch(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        lengths=tuple(lengths.tolist()),
        n_texts=len(ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        pool_index=torch.from_numpy(pooled),
        pool_segments=torch.from_numpy(segments),
        pool_counts=torch.from_numpy(pool_counts.astype(np.float32)),
    )


def round_up(size: int, *, coarse: bool = False) -> int:
    """Return the next size of the grid: steps of 16 up to 256, then of 64; coarse: powers of 2."""
    if coarse:
        return max(16, 1 << (size - 1).bit_length())
    step = 16 if size <= 256 else 64
    return -(-size // step) * step


def iterate_batches(
    lengths: np.ndarray, batch_tokens: int, *, shortest: float = 0.0
) -> Iterator[np.ndarray]:
    """Yield positions of texts, longest first, in batches of at most `batch_tokens` tokens.

    Longest first, so that a batch too large for the memory fails at once and the time left is
    never underestimated. A text above the budget forms its own batch. `shortest` is the least
    length in a batch as a share of its longest; it bounds the cost of padding.
    """
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order]
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        used = ends[start - 1] if start else 0
        stop = np.searchsorted(ends, used + batch_tokens, side="right")
        if shortest:
            stop = min(stop, np.searchsorted(falling, falling[start] * shortest, side="right"))
        stop = max(start + 1, int(stop))
        yield order[start:stop]
        start = stop


# Long texts
#
# A text of millions of characters is cut at `max_length` tokens, so most of it need not be
# tokenised. `TextCutter` finds a place where a cut provably leaves the tokens in front of it as
# they are, or none: between an ASCII letter or digit and the space before another, for tokenizers
# that are made of known parts only.
#
# Why there: the known normalisers map each character by itself or compose accents, none of which
# reach over a space; the known pre-tokenizers either split at the space, so that each word is a
# matter of its own, or not at all. Then the model must be BPE, and none of its tokens may hold the
# letter or digit with a space behind it: merges then stay on their side of the cut. For the same
# reason no added token may hold a space.

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
