"""Parse the text of a pattern into items; an error proposes a form that works."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from .._errors import PatternError, shorten
from .items import ANY, DEEP, EVERYTHING, Glob, Names, Subscript
from .proposals import Mistake, Proposal, as_code, proposals

Pattern = str | re.Pattern[str]


class Parsed(NamedTuple):
    """One pattern, ready to match.

    Attributes:
        source (Pattern): The pattern as it was given. If it is a regular expression, the items
            match any path, and the whole path must match the source as well.
        items (tuple): One item for each step along a path.
    """

    source: Pattern
    items: tuple[Any, ...]

    @property
    def text(self) -> str:
        """The pattern as a message shows it."""
        return shorten(repr(self.source))


Trial = Callable[[Proposal], Any]  # whether a proposal works, for example in a given model


def parse(pattern: Pattern, trial: Trial = bool) -> Parsed:
    """Parse the text of a pattern, or a compiled regular expression, into items.

    An error proposes a form that parses, if possible one for which ``trial`` is true.
    """
    if isinstance(pattern, str):
        try:
            return Parsed(pattern, _parse_path(pattern))
        except Mistake as mistake:
            raise PatternError(_message(pattern, mistake, trial)) from None
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return Parsed(pattern, EVERYTHING)
    raise TypeError(
        "a pattern is a str or a compiled regular expression of str, "
        f"not {type(pattern).__name__}: {shorten(repr(pattern))}"
    )


def parse_all(patterns: Pattern | Iterable[Pattern], trial: Trial = bool) -> list[Parsed]:
    """Parse one pattern or an iterable of them."""
    if isinstance(patterns, (str, bytes, re.Pattern)) or not isinstance(patterns, Iterable):
        return [parse(patterns, trial)]
    return [parse(pattern, trial) for pattern in patterns]


_SPECIAL = re.compile(r"[*?\[\]{}]")
_SEGMENT = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_INDEX = re.compile(r"-?[0-9]{1,18}")
_SLICE = re.compile(r"(-?[0-9]{1,18})?:(-?[0-9]{1,18})?(?::(-?[0-9]{1,18})?)?")
_BRACED = re.compile(r"(?:[^{}]|\{[^{}]+\})*")
_TOKEN = re.compile(r"\*|\?|[^*?]+")


@lru_cache(1024)
def _parse_path(text: str) -> tuple[Any, ...]:
    if not text:
        raise PatternError("'' is an empty pattern; '**' matches every module of the model")
    items: list[Any] = []
    start = 0
    for segment in text.split("."):
        if not segment:
            raise Mistake("a segment is empty", start, 1)
        if segment == "**":
            if not items or items[-1] is not DEEP:  # two are the same as one
                items.append(DEEP)
        elif _SPECIAL.search(segment):
            items.extend(_parse_segment(start, segment))
        else:
            items.append(Names((segment,)))
        start += len(segment) + 1
    if items[-1] is DEEP:
        items.append(ANY)  # match what is inside the place, not the place itself
    return tuple(items)


def _parse_segment(start: int, segment: str) -> list[Any]:
    subscripts = [_parse_subscript(start, found) for found in _BRACKETS.finditer(segment)]
    split = _SEGMENT.fullmatch(segment)
    if split is None:
        raise _bracket_mistake(start, segment)
    return [_parse_name(start, split[1]), *subscripts]


def _parse_name(start: int, name: str) -> Any:
    if name == "*":
        return ANY
    if "**" in name:
        raise Mistake("'**' must be a segment of its own", start, len(name))
    if not _BRACED.fullmatch(name):
        raise _brace_mistake(start, name)
    pieces = re.split(r"\{([^{}]*)\}", name)
    parts = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if any(option != option.strip(" ") for options in parts[1::2] for option in options):
        raise Mistake("an alternative in braces starts or ends with a space", start, len(name))
    if "*" not in name and "?" not in name and len(parts) <= 3:
        return Names(map("".join, product(*parts)))
    return Glob([[_TOKEN.findall(option) for option in options] for options in parts])


def _parse_subscript(start: int, found: re.Match[str]) -> Subscript:
    inside, start = found[1], start + found.start()
    if re.search(r"(?<![0-9])-0+(?![0-9])", inside):
        reason, condition = "-0 counts from the start, not from the end", "if you mean that, "
        raise Mistake(reason, start, len(found[0]), condition)
    if _INDEX.fullmatch(inside):
        return Subscript(int(inside))
    bounds = _SLICE.fullmatch(inside)
    numbers = [None if n is None else int(n) for n in bounds.groups()] if bounds else [0, 0, 0]
    if numbers[2] != 0:
        return Subscript(slice(*numbers))
    reason = f"{shorten(repr(found[0])[1:-1])} is not a valid index or slice"
    valid = "[0], [-1], [2:6], [-4:] and [::2] are, as for a Python list"
    if inside.startswith("!"):
        valid = "write a pattern that matches more, and leave out the rest with exclude"
    raise Mistake(reason, start, len(found[0]), otherwise=valid)


def _bracket_mistake(start: int, segment: str) -> Mistake:
    """Return the mistake of brackets that are valid themselves, but in the wrong place."""
    stray = re.search(r"[\[\]]", _BRACKETS.sub(lambda found: " " * len(found[0]), segment))
    if stray:
        return Mistake(f"unmatched '{stray[0]}'", start + stray.start(), 1)
    if segment.startswith("["):
        return Mistake("an index must follow the name of a list", start, len(segment))
    name = re.search(r"(?<=\])[^\[].*", segment)
    assert name is not None
    return Mistake("an index must end its segment", start + name.start(), len(name[0]))


def _brace_mistake(start: int, name: str) -> Mistake:
    """Return the mistake at the first brace that is not part of a valid pair."""
    rest = re.sub(r"\{[^{}]+\}", lambda found: " " * len(found[0]), name)
    at = re.search(r"[{}]", rest)
    assert at is not None
    start += at.start()
    if rest.startswith("{}", at.start()):
        return Mistake("braces without alternatives", start, 2)
    if at[0] == "{" and "}" in rest[at.start() :]:
        return Mistake("braces cannot be nested", start, 1)
    more = " in this segment" if at[0] == "{" else ""
    return Mistake(f"unmatched '{at[0]}'{more}", start, 1)


def _message(text: str, mistake: Mistake, trial: Trial) -> str:
    """Write what is wrong and what would be right, then the pattern with carets below the place."""
    advice = mistake.otherwise
    right = list(filter(_is_right, proposals(text)))
    if right:
        best = next(filter(trial, right), right[0])
        is_regex = isinstance(best, re.Pattern)
        condition = "for a regular expression " if is_regex else mistake.condition
        advice = f"{condition}write {as_code(best)}"
    return f"{mistake}{advice and '; '}{advice}\n{mistake.shown_in(text)}"


def _is_right(proposal: Proposal) -> bool:
    """Return whether all of a proposal parses and can be shown."""
    if not isinstance(proposal, re.Pattern):
        try:
            for text in [proposal] if isinstance(proposal, str) else proposal:
                _parse_path(text)
        except (Mistake, PatternError):
            return False
    return bool(as_code(proposal))
