"""What an error says was there, and what would have worked. Every suggestion is tried first.

Runs on the way to an error only, so it is written to be plain, not fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import mlx.nn as nn

from ._containers import Container, entries, is_container, own_values
from ._errors import SelectionError, described, listed, shorten
from ._fold import fold, pattern_of
from ._pattern import Matcher, Parsed, parse
from ._walk import find

_MOST_TOKENS = 40  # of a pattern that is worth mending


def no_match(model: nn.Module, pattern: Parsed) -> str:
    """That a pattern matches nothing, what is there instead, and a pattern that matches."""
    source = pattern.source
    if isinstance(source, re.Pattern):
        return _no_match_of_regex(model, source, pattern.text)
    message = f"{pattern.text} matches nothing"
    tokens = _TOKENS.findall(source)
    if len(tokens) > _MOST_TOKENS:
        return message
    if works := _tried(model, [f"**.{source}"]):
        return message + works
    if there := _what_is_there(model, tokens):
        message += f": {there}"
    return message + _tried(model, _mended(model, tokens))


def _tried(model: nn.Module, patterns: list[str]) -> str:
    """What a message says of the first pattern that matches, or ``''``."""
    for text in patterns:
        with suppress(SelectionError):  # a cycle, say, to which the given pattern does not come
            if count := len(find(model, Matcher([parse(text)])).paths):
                return f"; {shorten(repr(text))} matches {count}"
    return ""


def _no_match_of_regex(model: nn.Module, regex: re.Pattern[str], text: str) -> str:
    paths = find(model, Matcher([parse("**")])).paths
    inner = _INLINE_FLAGS.sub("", regex.pattern)  # they stand at the beginning only
    with suppress(re.error):  # it ends in a comment, say
        for wider in (rf"(.*\.)?({inner})", rf".*({inner}).*"):
            candidate = re.compile(wider, regex.flags)
            if count := sum(map(bool, map(candidate.fullmatch, paths))):
                return f"{text} matches no whole path; {shorten(repr(candidate))} matches {count}"
    return f"{text} matches no whole path"


def no_place(model: nn.Module, path: str) -> str:
    """That there is no module at a path, and what is there instead."""
    message = f"there is no module at {shorten(repr(path))}"
    names = path.split(".")
    if len(names) > _MOST_TOKENS or re.search(r"[*?\[\]{}]|^$|^\.|\.\.|\.$", path):
        return message  # no pattern that could be stepped through
    return f"{message}: {_what_is_there(model, names)}"


# ---------------------------------------------------------------- a walk that sees everything


class _Thing(NamedTuple):
    value: Any
    name: str = ""
    path: str = ""
    hidden: bool = False  # inside a tuple, which hides it from MLX


_NAME = re.compile(r"(?!\d+$)[^.*?\[\]{}]+")  # no number, and no pattern
_INLINE_FLAGS = re.compile(r"\A(\(\?[aimsux]+\))+")
_TOKENS = re.compile(r"\[[^\]]*\]|[^.\[]+")


def _inside(thing: _Thing) -> list[_Thing]:
    """Everything that a thing holds: also what MLX does not see."""
    value = thing.value
    is_tuple = isinstance(value, tuple)
    held: list[tuple[Any, Any]] = list(enumerate(value)) if is_tuple else []
    if is_container(value):
        held += entries(value)
    if issubclass(type(value), nn.Module):
        held += [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    prefix, hidden = thing.path and f"{thing.path}.", thing.hidden or is_tuple
    return [_Thing(inner, str(key), f"{prefix}{key}", hidden) for key, inner in held]


def _everything(things: list[_Thing]) -> list[_Thing]:
    """The things and all that is inside of them, level by level."""
    reached, entered = list(things), set[int]()
    for thing in reached:
        if id(thing.value) not in entered:
            entered.add(id(thing.value))
            reached += _inside(thing)
    return reached


def _step(things: list[_Thing], token: str) -> list[_Thing]:
    """What one token of a pattern leads to from some things."""
    if token == "**":
        return _everything(things)
    item = parse(f"_{token}" if token.startswith("[") else token).items[-1]
    reached: list[_Thing] = []
    for thing in things:
        inside = _inside(thing)
        if isinstance(thing.value, (list, tuple)):
            reached += [inside[index] for index in item.indices(len(inside))]
        else:
            reached += [inner for inner in inside if item.accepts(inner.name)]
    return reached


# ---------------------------------------------------------------- what is there instead


def _what_is_there(model: nn.Module, tokens: list[str]) -> str:
    """What stands where the tokens stop to match."""
    reached = [_Thing(model)]
    for number, token in enumerate(tokens):
        before, reached = reached, _step(reached, token)
        if not reached:
            return "" if "**" in tokens[:number] else _instead_of(token, before[0])
    return _no_module(reached[0], ".".join(tokens))


def _instead_of(token: str, thing: _Thing) -> str:
    place = repr(shorten(thing.path)) if thing.path else "the model"
    if isinstance(thing.value, (list, tuple)):
        return f"{place} is {described(thing.value)}"
    if token.startswith("["):
        return f"{place} is {described(thing.value)}, not a list"
    there = outline(thing.value) if is_container(thing.value) else []
    return f"{place} holds {listed(there) or 'no modules'}"


def _no_module(thing: _Thing, pattern: str) -> str:
    place = "it" if thing.path == pattern else repr(shorten(thing.path))
    if thing.hidden:
        return f"{place} is in a tuple, and MLX sees modules in lists and dicts only"
    if issubclass(type(thing.value), nn.Module):
        return f"{place} holds no modules"
    return f"{place} is {described(thing.value)}, not a module"


def outline(container: Container) -> list[str]:
    """The modules right inside a container, folded: ``["'norm'", "'layers[0:32]' (32 Block)"]``."""
    alike: dict[type, list[tuple[str | int, ...]]] = {}
    for path, _, _, value in own_values(container):
        if issubclass(type(value), nn.Module):
            alike.setdefault(type(value), []).append(path)
    return [
        f"{pattern_of(product)!r}" + (f" ({len(numbers)} {cls.__name__})" if numbers[1:] else "")
        for cls, paths in alike.items()
        for product, numbers in fold(paths)
    ]


# ---------------------------------------------------------------- what would work


def _mended(model: nn.Module, tokens: list[str]) -> list[str]:
    """Patterns close to these tokens that may match, the likeliest first."""
    reached = [_Thing(model)]
    mended: list[str] = []
    for token in tokens:
        for way in _ways(reached, token, mended[-1:]):
            if further := reduce(_step, way, reached):
                mended += way
                reached = further
                break
        else:
            return []
    ways = mended, [*mended, "*"], mended[:-1]
    texts = ["".join(t if t.startswith("[") else f".{t}" for t in way)[1:] for way in ways]
    return [text for text in texts if text not in ("", "**")]  # which says nothing of the model


def _ways(things: list[_Thing], token: str, before: list[str]) -> Iterator[list[str]]:
    """Steps that may have been meant by a token, the likeliest first."""
    yield [token]
    if token.startswith("["):
        yield [token[1:-1]]
        yield ["[-1]"]
        return
    if token.isdecimal() and before and before != ["**"]:
        yield ["[-1]"]
    yield from ([name] for name in _close(token, things))
    yield ["**", token]
    yield from (["**", name] for name in _close(token, _everything(things)))


def _close(token: str, things: list[_Thing]) -> list[str]:
    """Names in some things that are like a token and may lead to modules, the likest first."""
    names = {
        inner.name.lower(): inner.name
        for inner in chain.from_iterable(map(_inside, things))
        if is_container(inner.value) and _NAME.fullmatch(inner.name)
    }
    return [names[name] for name in get_close_matches(token.lower(), names)]
