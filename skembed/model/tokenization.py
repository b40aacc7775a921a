"""Texts -> token ids -> packed batches, and which positions are pooled.

The rules are NV-Embed's (arXiv 2405.17428, and the behaviour of the released reference):

- the end-of-sequence string is appended to every text before tokenisation, so that a text which is
  cut at `max_length` loses it;
- the tokenizer puts the begin-of-sequence token in front;
- with an instruction, the begin-of-sequence token and the instruction take part in attention but
  not in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from skembed.exceptions import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "EncodedTexts",
    "PackedBatch",
    "TextTokenizer",
    "find_tokenizer_file",
    "iterate_batches",
    "pack_texts",
    "round_up",
]


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several texts, one text after the other.

    Attributes
    ----------
    input_ids, position_ids : Tensor of int64, shape (T,)
    lengths : tuple of int, length B
        Tokens of each text; equal lengths side by side make the grouped path fast. One more,
        of padding, may follow.
    n_texts : int
        Texts, padding not counted.
    cu_seqlens : Tensor of int32, shape (B + 1,)
        Where each text begins; the last entry is T.
    pool_index : Tensor of int64, shape (P,)
        Positions in the pack that are pooled.
    pool_segments : Tensor of int64, shape (P,)
        The text each pooled position belongs to, ascending.
    pool_counts : Tensor of float32, shape (B,)
        Pooled tokens of each text, at least 1; rows of nothing may follow.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    n_texts: int
    cu_seqlens: Tensor
    pool_index: Tensor
    pool_segments: Tensor
    pool_counts: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on another device; to CUDA through pinned memory, without waiting."""
        pin = device.type == "cuda"
        moved = {}
        for name in self.__dataclass_fields__:
            if name not in ("lengths", "n_texts"):
                tensor: Tensor = getattr(self, name)
                tensor = tensor.pin_memory() if pin else tensor
                moved[name] = tensor.to(device, non_blocking=pin)
        return PackedBatch(lengths=self.lengths, n_texts=self.n_texts, **moved)


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of several texts."""

    ids: list[np.ndarray]  # int32, at most `max_length` each
    lengths: np.ndarray  # int64 (n,)
    pool_start: int  # first pooled position of every text: 0, or behind the instruction
    n_truncated: int  # texts that were longer than `max_length`


class TextTokenizer:
    """A checkpoint's tokenizer.json with NV-Embed's rules around it; safe under threads.

    The `tokenizers` library reads the file itself: no tokenizer class is looked up by name, so
    nothing in the folder can ask for custom code.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        The tokenizer; its own padding and truncation are switched off.
    bos_token_id, eos_token_id : int
        Ids of the begin- and end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos_token_id: int, eos_token_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.bos_token_id = bos_token_id
        eos_token = tokenizer.id_to_token(eos_token_id)
        if eos_token is None or tokenizer.id_to_token(bos_token_id) is None:
            raise CheckpointError(
                f"The tokenizer has no token of id {bos_token_id} (begin) or {eos_token_id} (end), "
                "which config.json names; the two files belong to different models."
            )
        self.eos_token: str = eos_token

    @classmethod
    def from_folder(cls, folder: Path, *, bos_token_id: int, eos_token_id: int) -> TextTokenizer:
        """Read ``tokenizer.json`` of a model folder; CheckpointError where that is unreadable."""
        path = find_tokenizer_file(folder)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
        return cls(tokenizer, bos_token_id=bos_token_id, eos_token_id=eos_token_id)

    def count_prefix(self, prefix: str) -> int:
        """Positions that an instruction prefix keeps out of the pool, begin token included.

        The reference counts the tokens of the prefix alone, without a begin token. Its template
        ends with a space, which alone is a token and in front of a word is not: that token too
        many makes up for the begin token. A prefix without the space lacks it, so one is added,
        and so for a tokenizer that makes no token of a space at the end.
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
        """Token ids of ``prefix + text + end``, cut at `max_length`.

        Raises ValueError where the instruction alone fills that.
        """
        pool_start = self.count_prefix(prefix)
        if pool_start >= max_length:
            raise ValueError(
                f"The instruction takes {pool_start} tokens with the begin-of-sequence token, and "
                f"max_length is {max_length}: no token of a text would be left to pool. Raise "
                "`max_length` or shorten `instruction`."
            )
        full = [prefix + text + self.eos_token for text in texts]
        ids, n_truncated = [], 0
        for encoding in self.tokenizer.encode_batch_fast(full):
            row = encoding.ids
            if row[0] != self.bos_token_id:  # a tokenizer saved without its post-processor
                row = [self.bos_token_id, *row]
            n_truncated += len(row) > max_length
            ids.append(np.array(row[:max_length], dtype=np.int32))
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        return EncodedTexts(ids, lengths, pool_start if mask_prefix else 0, n_truncated)


def find_tokenizer_file(folder: Path) -> Path:
    """The ``tokenizer.json`` of a model folder; CheckpointError where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"The model folder {folder} must hold a tokenizer.json; it does not. Save the "
            "tokenizer in its fast form (`save_pretrained` of a fast tokenizer writes it)."
        )
    return path


def pack_texts(
    ids: Sequence[np.ndarray], pool_start: int, *, on_grid: bool = False, coarse: bool = False
) -> PackedBatch:
    """Texts one after the other, with everything the model needs to know of their borders.

    Each text must be longer than `pool_start`, its first pooled position. The batch is on the CPU;
    the model's first ``len(ids)`` rows are the texts'.

    `on_grid` fills up to one of few sizes, with a text of padding at the end and rows of nothing in
    the result: on CPUs each new size of a product in oneDNN costs up to milliseconds of preparation
    and memory that stays. `coarse` takes one of fewer sizes yet, for a batch among many.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    tokens = np.concatenate(ids).astype(np.int64)
    pool_counts = lengths - pool_start
    if on_grid:
        filling = round_up(len(tokens), coarse=coarse) - len(tokens)
        tokens = np.concatenate([tokens, np.zeros(filling, np.int64)])
        lengths = np.append(lengths, filling) if filling else lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    pooled = np.flatnonzero(position[: starts[len(ids)]] >= pool_start)
    segments = np.repeat(np.arange(len(ids)), pool_counts)
    if on_grid:
        filling = round_up(len(pooled), coarse=coarse) - len(pooled)
        pooled = np.concatenate([pooled, np.zeros(filling, np.int64)])
        segments = np.concatenate([segments, np.full(filling, len(ids))])
        pool_counts = np.append(pool_counts, filling)
        n_rows = round_up(len(pool_counts), coarse=True)  # one small product a batch sees them
        pool_counts = np.pad(pool_counts, (0, n_rows - len(pool_counts)))
    return PackedBatch(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position),
        lengths=tuple(lengths.tolist()),
        n_texts=len(ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        pool_index=torch.from_numpy(pooled),
        pool_segments=torch.from_numpy(segments),
        pool_counts=torch.from_numpy(pool_counts.astype(np.float32)),
    )


def round_up(size: int, *, coarse: bool = False) -> int:
    """The next size of the grid: steps of 16 up to 256, of 64 above; coarse, powers of two."""
    if coarse:
        return max(16, 1 << (size - 1).bit_length())
    step = 16 if size <= 256 else 64
    return -(-size // step) * step


def iterate_batches(
    lengths: np.ndarray, batch_tokens: int, *, shortest: float = 0.0
) -> Iterator[np.ndarray]:
    """Positions of texts, longest first, in batches of at most `batch_tokens` tokens.

    Longest first, so that a batch too large for the memory shows at once and the time left is
    never underestimated. A text above the budget forms a batch by itself. `shortest` is the least
    length in a batch as a share of its longest; it bounds what padding can cost.
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
