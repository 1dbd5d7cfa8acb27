"""Parse patterns, and match paths with them. Nothing here depends on MLX.

A pattern is parsed into *items*, one for each segment of a path. A state of a
:class:`Matcher` says how far a walk through a model has come in all of the patterns
of a call at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from itertools import product
from operator import or_
from typing import Any, NamedTuple

from ._errors import PatternError, shorten
from ._proposals import Mistake, Proposal, proposals, written

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
        return Parsed(pattern, _EVERYTHING)
    raise TypeError(
        "a pattern is a str or a compiled regular expression of str, "
        f"not {type(pattern).__name__}: {shorten(repr(pattern))}"
    )


def parse_all(patterns: Pattern | Iterable[Pattern], trial: Trial = bool) -> list[Parsed]:
    """Parse one pattern or an iterable of them."""
    if isinstance(patterns, (str, bytes, re.Pattern)) or not isinstance(patterns, Iterable):
        return [parse(patterns, trial)]
    return [parse(pattern, trial) for pattern in patterns]


# ---------------------------------------------------------------- items
#
# An item answers two questions: does it accept this segment of a path, and
# which entries of a list of this length does it accept?


class _Names(frozenset[str]):
    """Some names, one of which must be equal to the segment: ``q_proj``, ``{q,k}_proj``."""

    accepts = frozenset.__contains__

    def indices(self, length: int) -> Iterable[int]:
        # A longer number is not an index of any list, and int() limits the number of digits.
        numbers = [int(name) for name in self if _INDEX_TEXT.fullmatch(name)]
        return [number for number in numbers if number < length]


class _Glob:
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


class _Subscript:
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


_ANY = _Glob([[["*"]]])  # any one segment
_DEEP = object()  # any number of segments
_EVERYTHING = (_DEEP, _ANY)
_INDEX_TEXT = re.compile(r"0|[1-9][0-9]{0,17}")


# ---------------------------------------------------------------- text -> items

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
            if not items or items[-1] is not _DEEP:  # two are the same as one
                items.append(_DEEP)
        elif _SPECIAL.search(segment):
            items.extend(_parse_segment(start, segment))
        else:
            items.append(_Names((segment,)))
        start += len(segment) + 1
    if items[-1] is _DEEP:
        items.append(_ANY)  # match what is inside the place, not the place itself
    return tuple(items)


def _parse_segment(start: int, segment: str) -> list[Any]:
    subscripts = [_parse_subscript(start, found) for found in _BRACKETS.finditer(segment)]
    split = _SEGMENT.fullmatch(segment)
    if split is None:
        raise _bracket_mistake(start, segment)
    return [_parse_name(start, split[1]), *subscripts]


def _parse_name(start: int, name: str) -> Any:
    if name == "*":
        return _ANY
    if "**" in name:
        raise Mistake("'**' must be a segment of its own", start, len(name))
    if not _BRACED.fullmatch(name):
        raise _brace_mistake(start, name)
    pieces = re.split(r"\{([^{}]*)\}", name)
    parts = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if any(option != option.strip(" ") for options in parts[1::2] for option in options):
        raise Mistake("an alternative in braces starts or ends with a blank", start, len(name))
    if "*" not in name and "?" not in name and len(parts) <= 3:
        return _Names(map("".join, product(*parts)))
    return _Glob([[_TOKEN.findall(option) for option in options] for options in parts])


def _parse_subscript(start: int, found: re.Match[str]) -> _Subscript:
    inside, start = found[1], start + found.start()
    if re.search(r"(?<![0-9])-0+(?![0-9])", inside):
        reason, condition = "-0 counts from the start, not from the end", "if you mean that, "
        raise Mistake(reason, start, len(found[0]), condition)
    if _INDEX.fullmatch(inside):
        return _Subscript(int(inside))
    bounds = _SLICE.fullmatch(inside)
    numbers = [None if n is None else int(n) for n in bounds.groups()] if bounds else [0, 0, 0]
    if numbers[2] != 0:
        return _Subscript(slice(*numbers))
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
        advice = f"{condition}write {written(best)}"
    return f"{mistake}{advice and '; '}{advice}\n{mistake.shown_in(text)}"


def _is_right(proposal: Proposal) -> bool:
    """Return whether all of a proposal parses and can be shown."""
    if not isinstance(proposal, re.Pattern):
        try:
            for text in [proposal] if isinstance(proposal, str) else proposal:
                _parse_path(text)
        except (Mistake, PatternError):
            return False
    return bool(written(proposal))


# ---------------------------------------------------------------- items -> matcher
#
# All patterns are matched in one walk. Several positions can be reached at once: after `layers`,
# those after `layers` in `layers.0`, in `layers.*` and in `**.layers.q_proj`, and the `**` itself.
# Only this set of positions matters further down, so a `State` is a set of positions.
#
# The invariant: the matcher keeps one `State` object for each set of positions, whatever path
# reached it. So a state can store the state that follows each key: equal blocks share their
# states, and nearly every step is one dict lookup. With two objects for one set the results would
# be the same, but each block would be matched anew.
#
# Sets also make backtracking unnecessary: a walk can be at several positions of `**.a.**.b` at
# once, but never at more than there are. So the time grows with the length of the path, and not
# with the number of ways to divide the path among the stars.


class _Position:
    """A position in a pattern: the item that comes next, and the position after it.

    At the end of a pattern ``item`` is ``None``, and ``mask`` has the bits of the pattern.
    """

    __slots__ = ("after", "item", "mask")

    def __init__(self, item: Any, after: Any, mask: int):
        self.item, self.after, self.mask = item, after, mask


class State(dict[str, "State"]):
    """How far a walk has come in all patterns of a matcher: a set of positions.

    ``state[key]`` is the state after ``key``, ``state.entries(n)`` are the
    states after the indices of a list of ``n``.

    Attributes:
        mask (int): Bit ``i`` is set if pattern ``i`` matches the path walked.
        goes_on (bool): Whether anything deeper could match.
    """

    __slots__ = ("_matcher", "_open", "_tables", "goes_on", "mask")

    def __init__(self, matcher: Matcher, positions: frozenset[_Position]):
        self._matcher = matcher
        self._open = [position for position in positions if position.item is not None]
        self._tables: dict[int, list[State]] = {}
        self.mask = reduce(or_, (position.mask for position in positions), 0)
        self.goes_on = bool(self._open)

    def __missing__(self, key: Any) -> State:
        """Return the state after ``key``, which may contain dots; store it if ``key`` is a str."""
        if type(key) is not str:
            return self[f"{key}"]
        state = self
        for segment in key.split("."):
            state = state._step(segment)
        self[key] = state
        return state

    def _step(self, segment: str) -> State:
        reached: list[_Position] = []
        for position in self._open:
            if position.item is _DEEP:
                reached.append(position)
            elif position.item is _ANY or position.item.accepts(segment):
                reached.append(position.after)
        return self._matcher.state(reached)

    def entries(self, length: int) -> list[State]:
        """Return the states after each index of a list of ``length``."""
        table = self._tables.get(length)
        if table is None:
            table = self._tables[length] = self._entries(length)
        return table

    def _entries(self, length: int) -> list[State]:
        everywhere: list[_Position] = []
        somewhere: list[tuple[_Position, ...]] = [()] * length
        for position in self._open:
            if position.item is _DEEP:
                everywhere.append(position)
            elif position.item is _ANY:
                everywhere.append(position.after)
            else:
                for index in position.item.indices(length):
                    somewhere[index] += (position.after,)
        states = {some: self._matcher.state([*everywhere, *some]) for some in set(somewhere)}
        return list(map(states.__getitem__, somewhere))


class Matcher:
    """Several patterns, matched together as one automaton whose states are made as needed."""

    def __init__(self, patterns: Sequence[Parsed] = ()):
        self._starts: list[_Position] = []
        self._states: dict[frozenset[_Position], State] = {}
        for number, pattern in enumerate(patterns):
            self.add(pattern.items, 1 << number)

    def add(self, items: Sequence[Any], mask: int) -> None:
        """Add a pattern, given by its items; its matches get the bits of ``mask``."""
        position = _Position(None, None, mask)
        for item in reversed(items):
            position = _Position(item, position, 0)
        self._starts.append(position)

    @property
    def start(self) -> State:
        """The state at the model itself."""
        return self.state(self._starts)

    def state(self, reached: list[_Position]) -> State:
        """Return the state of a walk that has reached some positions."""
        # `**` may match no segment at all, so the position after it is reached at once. One step is
        # enough: the parser never leaves two `**` in a row.
        key = frozenset(reached + [one.after for one in reached if one.item is _DEEP])
        if key not in self._states:
            self._states[key] = State(self, key)
        return self._states[key]


def literally(paths: Iterable[str]) -> Matcher:
    """Return a matcher of some paths, which are taken literally and not as patterns."""
    matcher = Matcher()
    for path in paths:
        matcher.add([_Names((segment,)) for segment in path.split(".")], 1)
    return matcher


def inside(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the items of ``P.**`` for the items of ``P``."""
    return (*items, _DEEP, _ANY)
