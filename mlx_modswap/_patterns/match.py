"""Match paths with several patterns at once, in one walk.

A state of a :class:`Matcher` says how far a walk through a model has come in all of the
patterns of a call at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any

from .items import ANY, DEEP, Names
from .parse import Parsed

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
            if position.item is DEEP:
                reached.append(position)
            elif position.item is ANY or position.item.accepts(segment):
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
            if position.item is DEEP:
                everywhere.append(position)
            elif position.item is ANY:
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
        key = frozenset(reached + [one.after for one in reached if one.item is DEEP])
        if key not in self._states:
            self._states[key] = State(self, key)
        return self._states[key]


def literally(paths: Iterable[str]) -> Matcher:
    """Return a matcher of some paths, which are taken literally and not as patterns."""
    matcher = Matcher()
    for path in paths:
        matcher.add([Names((segment,)) for segment in path.split(".")], 1)
    return matcher


def inside(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the items of ``P.**`` for the items of ``P``."""
    return (*items, DEEP, ANY)
