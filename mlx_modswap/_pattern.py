"""Text -> pattern -> matcher. Knows nothing of MLX.

A pattern becomes a row of *items*, one for each segment of a path. The patterns
of a call become one tree in a :class:`Matcher`, whose states say where a walk
through a model stands in every pattern at once. A state remembers the state
behind each key it has met, so most steps are one look-up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from ._errors import PatternError, shorten

Pattern = str | re.Pattern[str]


class Parsed(NamedTuple):
    """One pattern, ready to match.

    Attributes:
        source (Pattern): The pattern as it was given. The whole path must match it besides
            if it is a regular expression.
        items (tuple): One item for each step along a path.
    """

    source: Pattern
    items: tuple[Any, ...]

    @property
    def text(self) -> str:
        """What to call the pattern in a message."""
        return shorten(repr(self.source))


def parse(pattern: Pattern) -> Parsed:
    """Turn the text of a pattern, or a compiled regular expression, into items."""
    if isinstance(pattern, str):
        return Parsed(pattern, _parse_path(pattern))
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return Parsed(pattern, _EVERYTHING)
    raise TypeError(
        "a pattern is a str or a compiled regular expression of str, "
        f"not {type(pattern).__name__}: {shorten(repr(pattern))}"
    )


def parse_all(patterns: Pattern | Iterable[Pattern]) -> list[Parsed]:
    """Parse one pattern or an iterable of them."""
    if isinstance(patterns, (str, bytes, re.Pattern)) or not isinstance(patterns, Iterable):
        return [parse(patterns)]
    return [parse(pattern) for pattern in patterns]


# ---------------------------------------------------------------- items
#
# An item answers two questions: does it accept this segment of a path, and
# which entries of a list of this length does it accept?


class _Names(frozenset[str]):
    """One of some names: ``q_proj``, ``{q,k}_proj``."""

    accepts = frozenset.__contains__

    def indices(self, length: int) -> Iterable[int]:
        # Longer digits are no index of any list, and int() limits their number.
        numbers = [int(name) for name in self if _INDEX_TEXT.fullmatch(name)]
        return [number for number in numbers if number < length]


class _Glob:
    """Text with ``*``, ``?`` or several braces: ``*_proj``, ``{a,b}_{c,d*}``.

    Args:
        parts: What follows what: each part a list of alternatives, each
            alternative a list of tokens (``*``, ``?`` or plain text).
    """

    def __init__(self, parts: list[list[list[str]]]):
        self.parts = parts
        self.fits_numbers = all(
            any(all(t in "*?" or t.isdecimal() for t in tokens) for tokens in alternatives)
            for alternatives in parts
        )

    def accepts(self, text: str) -> bool:
        # The set of all places where the parts so far can end: no backtracking.
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
        elif token not in text:  # mostly
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


_ANY = _Glob([[["*"]]])  # one segment, whatever it is
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
            mended = ".".join(filter(None, text.split("."))) or "**"
            raise _error(text, start, 1, f"an empty segment; write {shorten(mended)!r}")
        if segment == "**":
            if not items or items[-1] is not _DEEP:  # two are the same as one
                items.append(_DEEP)
        elif _SPECIAL.search(segment):
            items.extend(_parse_segment(text, start, segment))
        else:
            items.append(_Names((segment,)))
        start += len(segment) + 1
    if items[-1] is _DEEP:
        items.append(_ANY)  # what is inside, not the place itself
    return tuple(items)


def _parse_segment(text: str, start: int, segment: str) -> list[Any]:
    subscripts = [_parse_subscript(text, start, found) for found in _BRACKETS.finditer(segment)]
    split = _SEGMENT.fullmatch(segment)
    if split is None:
        raise _bracket_error(text, start, segment)
    return [_parse_name(text, start, split[1]), *subscripts]


def _parse_name(text: str, start: int, name: str) -> Any:
    if name == "*":
        return _ANY
    if "**" in name:
        one, bare = re.sub(r"[*]{2,}", "*", name), re.sub(r"[*]{2,}", "", name)
        inside = f", or '{shorten(bare)}.**' for what is inside" if bare else " or '**'"
        if bare and name.startswith("**"):
            inside = f", or '**.{shorten(bare)}' for one at any depth"
        right = f"'{shorten(one)}'{inside}"
        raise _error(text, start, len(name), f"'**' is a whole segment of its own; write {right}")
    if not _BRACED.fullmatch(name):
        raise _brace_error(text, start, name)
    pieces = re.split(r"\{([^{}]*)\}", name)
    parts = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if "*" not in name and "?" not in name and len(parts) <= 3:
        return _Names(map("".join, product(*parts)))
    return _Glob([[_TOKEN.findall(option) for option in options] for options in parts])


def _parse_subscript(text: str, start: int, found: re.Match[str]) -> _Subscript:
    inside = found[1]
    if re.search(r"-0+(?![0-9])", inside):
        right = re.sub(r"-0+(?![0-9])", "0", inside)
        message = f"-0 counts from the start, not from the end; write [{right}] if you mean that"
        raise _error(text, start + found.start(), len(found[0]), message)
    if _INDEX.fullmatch(inside):
        return _Subscript(int(inside))
    bounds = _SLICE.fullmatch(inside)
    numbers = [None if n is None else int(n) for n in bounds.groups()] if bounds else [0, 0, 0]
    if numbers[2] != 0:
        return _Subscript(slice(*numbers))
    raise _error(
        text,
        start + found.start(),
        len(found[0]),
        f"{shorten(found[0])} is no index or slice of a list; write {_mended_subscript(inside)}",
    )


def _mended_subscript(inside: str) -> str:
    span = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", inside)
    if span:
        return f"[{span[1]}:{int(span[2]) + 1}] for the entries {span[1]} to {span[2]}"
    if re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})+", inside) and len(inside) < 60:
        return f".{{{inside}}} for some of the entries"
    if re.fullmatch(r"\w{1,20}", inside) and not inside.isdecimal():
        return "{" + ",".join(dict.fromkeys(inside)) + "} for one of several characters"
    return "[0], [-1], [2:6], [-4:] or [::2], as for a Python list"


def _bracket_error(text: str, start: int, segment: str) -> PatternError:
    """Why brackets whose insides are right are in the wrong place."""
    stray = re.search(r"[\[\]]", _BRACKETS.sub(lambda found: " " * len(found[0]), segment))
    if stray:
        what = "is not closed" if stray[0] == "[" else "closes nothing"
        return _error(text, start + stray.start(), 1, f"'{stray[0]}' {what}; write 'layers[0]'")
    if segment.startswith("["):
        message = f"an index follows the name of a list; write 'layers{shorten(segment)}'"
        return _error(text, start, len(segment), message)
    first = _BRACKETS.search(segment)
    assert first is not None
    at = first.end()
    message = f"an index ends its segment; write '{shorten(segment[:at])}.{shorten(segment[at:])}'"
    return _error(text, start + at, len(segment) - at, message)


def _brace_error(text: str, start: int, name: str) -> PatternError:
    """What is wrong with the first brace that is not one of a good pair."""
    rest = re.sub(r"\{[^{}]+\}", lambda found: " " * len(found[0]), name)
    at = re.search(r"[{}]", rest)
    assert at is not None
    if rest.startswith("{}", at.start()):
        return _error(text, start + at.start(), 2, "no alternatives; write '{q,k,v}'")
    if at[0] == "}":
        return _error(text, start + at.start(), 1, "'}' closes nothing; write '{q,k,v}'")
    if "}" in rest[at.start() :]:
        return _error(text, start + at.start(), 1, "braces do not nest; write '{a,b,c}'")
    message = "'{' is not closed in its segment; write '{q,k,v}', or several patterns for more"
    return _error(text, start + at.start(), 1, message)


def _error(text: str, start: int, length: int, message: str) -> PatternError:
    """The message, the pattern, and carets under the place that is wrong."""
    window = slice(max(0, start - 50), start), slice(start, start + min(length, 20))
    before, wrong = (repr(text[part])[1:-1] for part in window)
    after = repr(text[window[1].stop : start + 50])[1:-1]
    carets = " " * len(before) + "^" * max(1, len(wrong))
    return PatternError(f"{message}\n    {before}{wrong}{after}\n    {carets}")


# ---------------------------------------------------------------- items -> matcher


class _Node:
    """Where some patterns stand behind their first items: those that begin alike share it.

    Attributes:
        edges (dict[Any, _Node]): The node behind each item that may follow.
        names (dict[str, list[_Node]]): The same for those that are names, by name.
        globs (list[tuple[_Glob, _Node]]): The same for those with wildcards.
        loops (bool): Whether any segment leads back here: the last item is ``**``.
        mask (int): Bit ``i`` is set if pattern ``i`` ends here.
    """

    __slots__ = ("edges", "globs", "loops", "mask", "names")

    def __init__(self, loops: bool = False):
        self.edges: dict[Any, _Node] = {}
        self.names: dict[str, list[_Node]] = {}
        self.globs: list[tuple[_Glob, _Node]] = []
        self.loops = loops
        self.mask = 0

    def behind(self, item: Any) -> _Node:
        """The node behind an item, a new one if there is none."""
        if item not in self.edges:
            self.edges[item] = node = _Node(loops=item is _DEEP)
            if isinstance(item, _Names):
                for name in item:
                    self.names.setdefault(name, []).append(node)
            elif isinstance(item, _Glob):
                self.globs.append((item, node))
        return self.edges[item]


class State(dict[str, "State"]):
    """Where a walk stands in all patterns of a matcher: a set of nodes.

    ``state[key]`` is the state behind ``key``, ``state.entries(n)`` are the
    states behind the entries of a list of ``n``.

    Attributes:
        mask (int): Bit ``i`` is set if pattern ``i`` matches the path walked.
        goes_on (bool): Whether anything deeper could match.
    """

    __slots__ = ("_matcher", "_nodes", "_tables", "goes_on", "mask")

    def __init__(self, matcher: Matcher, nodes: frozenset[_Node]):
        self._matcher = matcher
        self._nodes = nodes
        self._tables: dict[int, list[State]] = {}
        self.mask = 0
        self.goes_on = False
        for node in nodes:
            self.mask |= node.mask
            self.goes_on |= bool(node.edges)

    def __missing__(self, key: Any) -> State:
        """Step along ``key``, which may hold dots; remember the way if it is a plain str."""
        if type(key) is not str:
            return self[f"{key}"]
        state = self
        for segment in key.split("."):
            state = state._step(segment)
        self[key] = state
        return state

    def _step(self, segment: str) -> State:
        reached: list[_Node] = []
        for node in self._nodes:
            if node.loops:
                reached.append(node)
            reached += node.names.get(segment, ())
            for glob, behind in node.globs:
                if glob is _ANY or glob.accepts(segment):
                    reached.append(behind)
        return self._matcher.state(reached)

    def entries(self, length: int) -> list[State]:
        """The states behind the entries of a list of ``length``."""
        table = self._tables.get(length)
        if table is None:
            table = self._tables[length] = self._entries(length)
        return table

    def _entries(self, length: int) -> list[State]:
        everywhere: list[_Node] = []
        somewhere: list[tuple[_Node, ...]] = [()] * length
        for node in self._nodes:
            if node.loops:
                everywhere.append(node)
            for item, behind in node.edges.items():
                if item is _ANY:
                    everywhere.append(behind)
                elif item is not _DEEP:
                    for index in item.indices(length):
                        somewhere[index] += (behind,)
        states = {some: self._matcher.state([*everywhere, *some]) for some in set(somewhere)}
        return list(map(states.__getitem__, somewhere))


class Matcher:
    """Several patterns side by side, as one lazily built automaton."""

    def __init__(self, patterns: Sequence[Parsed] = ()):
        self._root = _Node()
        self._states: dict[frozenset[_Node], State] = {}
        for number, pattern in enumerate(patterns):
            self.add(pattern.items, 1 << number)

    def add(self, items: Iterable[Any], mask: int) -> None:
        """Match what the items match, too."""
        node = self._root
        for item in items:
            node = node.behind(item)
        node.mask |= mask

    @property
    def start(self) -> State:
        """The state at the model itself."""
        return self.state([self._root])

    def state(self, nodes: list[_Node]) -> State:
        """The state of a walk that has come to some nodes."""
        # None of its segments is one way to take `**`, and no other `**` follows it.
        key = frozenset(nodes + [node.edges[_DEEP] for node in nodes if _DEEP in node.edges])
        if key not in self._states:
            self._states[key] = State(self, key)
        return self._states[key]


def literally(paths: Iterable[str]) -> Matcher:
    """A matcher of some paths, as they are printed and not as patterns."""
    matcher = Matcher()
    for path in paths:
        matcher.add([_Names((segment,)) for segment in path.split(".")], 1)
    return matcher
