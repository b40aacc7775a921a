"""Damaged files: bytes changed at random, and the outcomes that a reader of them may have."""

import random
from collections.abc import Callable
from typing import TypeVar

from skembed.exceptions import SkembedError

T = TypeVar("T")

# What a reader may raise for a bad file. Its own sentence, too: see `assert_ours`.
OURS = (SkembedError, OSError, ValueError, TypeError)
# Marks of sentences that a library below wrote, or Python itself.
_FOREIGN = (
    "object is not", "object has no", "unsupported operand", "not supported between",
    "codec can't", "invalid literal", "could not convert", "must be real number",
    "index out of range", "not enough values", "too many values", "unexpected keyword",
    "argument", "Expecting value", "shape mismatch", "cannot reshape",
)  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes:
    """Return the bytes with a few changes: flips, cuts, insertions, repetitions, other numbers."""
    random_ = random.Random(seed)
    changed = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        size = len(changed)
        # Half of all changes fall into the head, where formats keep what they promise.
        place = random_.randrange(min(size, 512) if random_.random() < 0.5 else size) if size else 0
        length = random_.choice((1, 1, 2, 8, 64))
        kind = random_.randrange(6)
        if kind == 0 and size:
            changed[place] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = random_.randbytes(length)
        elif kind == 3:
            changed[place : place + length] = random_.randbytes(length)
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        else:
            word = random_.choice((b"null", b"-1", b"NaN", b"1e999", b"[]", b"{", b'""', b"9" * 30))
            changed[place : place + random_.randrange(8)] = word
    return bytes(changed)


def assert_ours(call: Callable[[], T], *, names: str | None = None) -> T | None:
    """Return what the call returns, or None where it raises an error in skembed's own words.

    Fails for any other error, crashes of lower libraries (`BaseException`) included. The error must
    contain `names`, such as the name of the damaged file, if that is given.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        message = str(error)
        is_ours = isinstance(error, OURS) and not isinstance(error, UnicodeError)
        first = message.partition("(")[0].partition(": ")[0]  # a quoted reason may be another's
        foreign = [mark for mark in _FOREIGN if mark in first]
        if not is_ours or foreign:
            raise AssertionError(f"not in our words: {type(error).__name__}: {error}") from error
        if names is not None and names not in message:
            raise AssertionError(f"does not name {names}: {error}") from error
        return None
