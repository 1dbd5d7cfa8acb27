"""The places that patterns match, and what ``where`` says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import repeat
from typing import Any

import mlx.nn as nn

from .._errors import note_misuse
from .._model.walk import Places, find
from .._patterns.match import Matcher, inside
from .arguments import Request, is_class


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
    """Return a function that says whether a path or, with ``below``, one of its parents matches."""
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


Accepted = list[bool]  # what `where` says of each place


def ask_where(places: Places, request: Request, strict: bool) -> Accepted | None:
    """Return whether ``where`` accepts each place; ``None`` if there is no ``where``.

    A function is called once for each place that a pattern matches; for an excluded one only
    with ``strict``.
    """
    where: Any = request.where
    if where is None:
        return None
    if is_class(where):
        return list(map(isinstance, places.modules, repeat(where)))
    included = request.included
    return [
        _ask(where, path, module, mask > included)
        if mask & included and (strict or mask <= included)
        else False
        for path, module, mask in zip(places.paths, places.modules, places.masks)
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
