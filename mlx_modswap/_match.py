"""What a call asks for, the places that its patterns match, and what ``where`` says of them."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ._errors import described, note_misuse
from ._hints import count
from ._pattern import Matcher, Parsed, Pattern, inside, parse_all
from ._walk import Places, find

Patterns = Pattern | Iterable[Pattern]
Where = type | types.UnionType | tuple[type, ...] | Callable[[str, nn.Module], bool]


def parse_argument(model: nn.Module, name: str, patterns: Any) -> list[Parsed]:
    """Parse an argument that is one pattern or several."""
    if isinstance(patterns, (nn.Module, mx.array)):  # which could be iterated
        raise TypeError(f"{name} must be a path pattern, not {described(patterns)}")
    return parse_all(patterns, partial(count, model))


class Rule(NamedTuple):
    """Patterns that decide together. The first rule that matches a path decides it.

    Attributes:
        patterns (list[Parsed]): The rule matches a path if one of these matches it.
        key (str, re.Pattern or tuple): The rule's key; ``None`` if the patterns were not
            given as rules.
        keeps (bool): Whether the rule leaves its places alone, with everything inside them.
    """

    patterns: list[Parsed]
    key: Any = None
    keeps: bool = False

    @property
    def text(self) -> str:
        """What to call the rule in a message; empty if the patterns were not given as rules."""
        if self.key is None:
            return ""
        text = ", ".join(pattern.text for pattern in self.patterns)
        if isinstance(self.key, tuple):
            return f"({text},)" if len(self.patterns) == 1 else f"({text})"
        return text


class Request(NamedTuple):
    """What a call asks for, parsed.

    In a mask, bit ``i`` represents pattern ``i``, counted over all rules; the bits of the
    excludes follow.
    """

    rules: list[Rule]
    where: Where | None
    excludes: list[Parsed]

    @property
    def patterns(self) -> list[Parsed]:
        """The patterns of all rules, in order."""
        return [pattern for rule in self.rules for pattern in rule.patterns]

    @property
    def included(self) -> int:
        """The bits of all patterns; any larger mask has the bit of an exclude."""
        return (1 << sum(len(rule.patterns) for rule in self.rules)) - 1

    @property
    def owners(self) -> list[int]:
        """The number of the rule that each pattern belongs to."""
        return [number for number, rule in enumerate(self.rules) for _ in rule.patterns]


def match(model: nn.Module, request: Request) -> Places:
    """Find all places that a pattern or an exclude matches, and set their masks.

    A place that is left alone is left alone with everything inside it. So an exclude, or a
    pattern of a rule that keeps its places, matches every path inside its matches as well.
    """
    patterns = request.patterns + request.excludes
    matcher = Matcher(patterns)
    regexes: list[tuple[int, Callable[[str], bool]]] = []
    for number, (pattern, below) in enumerate(zip(patterns, _reaches_below(request))):
        if isinstance(pattern.source, re.Pattern):
            regexes.append((1 << number, _regex_test(pattern.source, below)))
        elif below:
            matcher.add(inside(pattern.items), 1 << number)
    places = find(model, matcher)
    for bit, accepts in regexes:
        pairs = zip(places.masks, places.paths)
        places.masks = [mask if accepts(path) else mask & ~bit for mask, path in pairs]
        places.keep(places.masks)
    return places


def _reaches_below(request: Request) -> list[bool]:
    keeps = [rule.keeps for rule in request.rules for _ in rule.patterns]
    return keeps + [True] * len(request.excludes)


def _regex_test(regex: re.Pattern[str], below: bool) -> Callable[[str], bool]:
    """Return a test of a path: does it match or, with ``below``, does it or a path around it?"""
    if not below:
        return lambda path: regex.fullmatch(path) is not None
    known: dict[str, bool] = {}

    def accepts(path: str) -> bool:
        climbed: list[str] = []
        while path not in known:
            climbed.append(path)
            if regex.fullmatch(path) or "." not in path:
                known[path] = regex.fullmatch(path) is not None
            else:
                path = path.rpartition(".")[0]
        known.update(dict.fromkeys(climbed, known[path]))
        return known[path]

    return accepts


def first_pattern(mask: int) -> int:
    """Return the number of the first pattern in a mask."""
    return (mask & -mask).bit_length() - 1


# ---------------------------------------------------------------- where


def is_class(where: Any) -> bool:
    """Return whether ``where`` is a class or several classes."""
    if isinstance(where, tuple):
        return all(map(is_class, where))
    return isinstance(where, (type, types.UnionType))


def check_where(where: Any) -> None:
    """Raise a ``TypeError`` if ``where`` cannot be asked about a module."""
    if where is None or is_class(where):
        return
    if not callable(where) or isinstance(where, nn.Module):
        raise TypeError(
            "where must be a class, a tuple of classes or a function of path and module, "
            f"not {described(where)}"
        )


Passed = list[bool]  # what `where` says of each place


def ask_where(places: Places, request: Request, strict: bool) -> Passed | None:
    """Return whether ``where`` accepts each place; ``None`` if there is no ``where``.

    A function is called for an excluded place only with ``strict``.
    """
    where: Any = request.where
    if where is None:
        return None
    if is_class(where):
        return list(map(isinstance, places.modules, repeat(where)))
    rows = zip(places.paths, places.modules, places.masks)
    return [
        _ask(where, path, module, mask > request.included)
        if strict or mask <= request.included
        else False
        for path, module, mask in rows
    ]


def _ask(where: Any, path: str, module: nn.Module, excluded: bool) -> bool:
    try:
        return bool(where(path, module))
    except Exception as error:
        if excluded:  # perhaps just because `where` fails for it
            return True
        error.add_note(f"while asking where of {path!r} ({type(module).__name__})")
        note_misuse(error, where, path, "where(path, module)", "lambda path, module: {}(module)")
        raise
