"""Items of a pattern, one for each segment of a path.

An item answers two questions: does it accept this segment of a path, and which entries of a
list of this length does it accept?
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#
# An item answers two questions: does it accept this segment of a path, and
# which entries of a list of this length does it accept?


class Names(frozenset[str]):
    """Some names, one of which must be equal to the segment: ``q_proj``, ``{q,k}_proj``."""

    accepts = frozenset.__contains__

    def indices(self, length: int) -> Iterable[int]:
        # A longer number is not an index of any list, and int() limits the number of digits.
        numbers = [int(name) for name in self if _INDEX_TEXT.fullmatch(name)]
        return [number for number in numbers if number < length]


class Glob:
    """Text with ``*``, ``?`` or several braces: ``*_proj``, ``{a,b}_{c,d*}``.

    Args:
        parts: The parts of the text in order. A part is a list of alternatives,
            and an alternative is a list of tokens (``*``, ``?`` or plain text).
    """

    def __init__(self, parts: list[list[list[str]]]):
        self.parts = parts
        self.fits_numbers = all(
            any(all(t in "*?" or t.isdecimal() for t in tokens) for tokens in alternatives)
            for alternatives in parts
        )

    def accepts(self, text: str) -> bool:
        # All positions at which the parts so far can end, so no backtracking is needed.
        ends: Ends = {0}
        for alternatives in self.parts:
            reached = [_advance(ends, tokens, text) for tokens in alternatives]
            ends = reached[0] if len(reached) == 1 else set().union(*reached)
        return len(text) in ends

    def indices(self, length: int) -> Iterable[int]:
        return filter(lambda i: self.accepts(str(i)), range(length)) if self.fits_numbers else ()


Ends = set[int] | range


def _advance(ends: Ends, tokens: list[str], text: str) -> Ends:
    for token in tokens:
        if not ends:
            break
        if token == "*":
            ends = range(min(ends), len(text) + 1)
        elif token == "?":
            ends = {end + 1 for end in ends if end < len(text)}
        elif token not in text:  # the common case
            return set()
        else:
            ends = {end + len(token) for end in ends if text.startswith(token, end)}
    return ends


class Subscript:
    """Entries of a list, as Python would choose them: ``[0]``, ``[-4:]``."""

    def __init__(self, subscript: int | slice):
        self.subscript = subscript

    def accepts(self, text: str) -> bool:
        return False

    def indices(self, length: int) -> Iterable[int]:
        chosen = range(length)
        if isinstance(self.subscript, slice):
            return chosen[self.subscript]
        return [chosen[self.subscript]] if -length <= self.subscript < length else ()


ANY = Glob([[["*"]]])  # any one segment
DEEP = object()  # any number of segments
EVERYTHING = (DEEP, ANY)
_INDEX_TEXT = re.compile(r"0|[1-9][0-9]{0,17}")
