"""Regular expressions from foreign files, matched in bounded time.

Python's own matcher takes exponential time for patterns such as ``(a+)+b``. Here a pattern becomes
a tree, and each node gives the set of all places where a match of it may end, once for each place
where it may begin: time grows with the square of the name's length and never faster. Each single
character of a pattern (a class, an escape, an anchor) is still decided by `re`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce

__all__ = ["NamePattern"]

MAX_LENGTH = 10_000
_MAX_DEPTH = 50
# A class, an escape of several characters, or a single character.
_ATOM = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\[^1-9]|[^\\]",
    re.DOTALL,
)
_REPEAT = re.compile(r"\*|\+|\?|\{(\d+)\}|\{(\d*),(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?::|P<\w+>|=|!))?")
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")


@dataclass(eq=False)
class _Node:
    """A part of a pattern: an atom, or parts of it."""

    kind: str  # "atom", "sequence", "choice", "repeat", "ahead", "not ahead"
    parts: list[_Node] = field(default_factory=list)
    atom: re.Pattern[str] | None = None
    low: int = 0
    high: int | None = None


class NamePattern:
    """A regular expression whose match against a whole name takes bounded time.

    Raises ValueError for no regular expression, and for back-references, look-behind, conditions
    and other constructs that have no such matcher.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"it has {len(pattern):,} characters, more than {MAX_LENGTH:,}")
        try:
            self._flags = re.compile(pattern).flags & ~re.UNICODE
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        flags = _FLAGS.match(pattern)
        self._pattern = pattern[flags.end() :] if flags else pattern
        if self._flags & re.VERBOSE:
            raise ValueError("it uses (?x), which is not supported here")
        self._at = 0
        self._root = self._parse_choice(0)
        if self._at < len(self._pattern):
            raise self._refusal()

    def matches(self, name: str) -> bool:
        """Return whether the whole name matches, as `re.fullmatch` does."""
        return len(name) in _Match(name).ends(self._root, 0)

    def _refusal(self) -> ValueError:
        part = self._pattern[self._at : self._at + 4]
        return ValueError(f"it uses {part!r}, which is not supported here")

    def _parse_choice(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        options = [_Node("sequence", list(self._parse_sequence(depth)))]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            options.append(_Node("sequence", list(self._parse_sequence(depth))))
        return _Node("choice", options)

    def _parse_sequence(self, depth: int) -> Iterator[_Node]:
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            node = self._parse_single(depth)
            repeat = _REPEAT.match(self._pattern, self._at)
            if repeat:
                self._at = repeat.end()
                if self._pattern.startswith("+", self._at):  # possessive, from Python 3.11 on
                    raise self._refusal()
                self._at += self._pattern.startswith("?", self._at)  # lazy: the same set of ends
                low, high = _read_bounds(repeat)
                node = _Node("repeat", [node], low=low, high=high)
            yield node

    def _parse_single(self, depth: int) -> _Node:
        if self._pattern[self._at] == "(":
            group = _GROUP.match(self._pattern, self._at)
            opening = group[0] if group else ""
            if opening == "(" and self._pattern.startswith("(?", self._at):
                raise self._refusal()
            self._at += len(opening)
            inner = self._parse_choice(depth + 1)
            self._at += 1  # the closing bracket, which `re` has seen
            kind = {"(?=": "ahead", "(?!": "not ahead"}.get(opening)
            return inner if kind is None else _Node(kind, [inner])
        atom = _ATOM.match(self._pattern, self._at)
        if atom is None:
            raise self._refusal()
        self._at = atom.end()
        try:
            return _Node("atom", atom=re.compile(atom[0], self._flags))
        except re.error:
            raise self._refusal() from None


def _read_bounds(repeat: re.Match[str]) -> tuple[int, int | None]:
    """Return the least and the greatest number of repetitions; None for no limit."""
    if repeat[1]:
        return int(repeat[1]), int(repeat[1])
    if repeat[0][0] == "{":
        return int(repeat[2] or 0), int(repeat[3]) if repeat[3] else None
    return (1 if repeat[0] == "+" else 0), (1 if repeat[0] == "?" else None)


class _Match:
    """The match of one name, which remembers what each node gave at each place."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[_Node, int], frozenset[int]] = {}

    def ends(self, node: _Node, start: int) -> frozenset[int]:
        """Return all places where a match of the node that begins at `start` may end."""
        key = (node, start)
        if key not in self._known:
            self._known[key] = self._find_ends(node, start)
        return self._known[key]

    def _find_ends(self, node: _Node, start: int) -> frozenset[int]:
        if node.atom is not None:
            match = node.atom.match(self._name, start)
            return frozenset() if match is None else frozenset([match.end()])
        if node.kind == "sequence":
            return reduce(
                lambda starts, part: self._step(part, starts), node.parts, frozenset([start])
            )
        if node.kind == "choice":
            return frozenset().union(*(self.ends(part, start) for part in node.parts))
        if node.kind == "repeat":
            return self._repeat(node, start)
        is_ahead = bool(self.ends(node.parts[0], start))
        return frozenset([start] if is_ahead == (node.kind == "ahead") else [])

    def _step(self, node: _Node, starts: frozenset[int]) -> frozenset[int]:
        return frozenset().union(*(self.ends(node, start) for start in starts))

    def _repeat(self, node: _Node, start: int) -> frozenset[int]:
        # Beyond as many rounds as there are places, only empty ones are left, which change nothing.
        most = len(self._name) + 2
        low = min(node.low, most)
        high = most if node.high is None else min(node.high, most)
        reached, found = frozenset([start]), set([start] if low == 0 else [])
        for k in range(1, high + 1):
            reached = self._step(node.parts[0], reached)
            if k >= low:
                found |= reached
            if not reached:
                break
        return frozenset(found)
