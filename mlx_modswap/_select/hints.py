"""Say in an error what is there instead, and what would work. Every suggestion is tried first.

This code only runs before an error, so it is written to be simple, not fast.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import mlx.nn as nn

from .._errors import PatternError, SelectionError, shorten
from .._model.containers import Container, entries, is_container, own_values
from .._model.walk import find
from .._patterns.fold import fold, pattern_of
from .._patterns.match import Matcher
from .._patterns.parse import Parsed, parse, parse_all
from .._patterns.proposals import Proposal, as_code, proposals, spellings, widened
from .._words import described, listed

_MOST_TOKENS = 40  # of a pattern that is worth correcting


def no_match(model: nn.Module, pattern: Parsed) -> str:
    """Return the message that a pattern matches nothing, what is there, and what would match."""
    source = pattern.source
    if isinstance(source, re.Pattern):
        works = _first_that_works(model, widened(source))
        return f"{pattern.text} does not match any complete path (fullmatch){works}"
    message = f"{pattern.text} matches nothing"
    tokens = _TOKENS.findall(source)
    if len(tokens) > _MOST_TOKENS:
        return message
    if works := _first_that_works(model, proposals(source)):
        return message + works
    if there := _what_is_there(model, tokens):
        message += f": {there}"
    return message + _first_that_works(model, _close_patterns(model, source))


def no_place(model: nn.Module, path: str) -> str:
    """Return the message that there is no module at a path, and what is there instead."""
    message = f"there is no module at {shorten(repr(path))}"
    names = path.split(".")
    if len(names) > _MOST_TOKENS or re.search(r"[*?\[\]{}]|^$|^\.|\.\.|\.$", path):
        return message  # too long, or not a path that can be followed
    return f"{message}: {_what_is_there(model, names)}"


def count(model: nn.Module, proposal: Proposal) -> int:
    """Count the modules that a proposal matches; 0 if one of its patterns matches nothing."""
    with suppress(PatternError, SelectionError):  # such as a cycle that the source does not reach
        found = [_paths(model, pattern) for pattern in parse_all(proposal)]
        return len(set().union(*found)) if all(found) else 0
    return 0


def _paths(model: nn.Module, pattern: Parsed) -> set[str]:
    paths = find(model, Matcher([pattern])).paths
    source = pattern.source
    return set(filter(source.fullmatch, paths) if isinstance(source, re.Pattern) else paths)


def _first_that_works(model: nn.Module, candidates: Iterable[Proposal]) -> str:
    """Write which candidate is the first that matches something; ``''`` if none does."""
    for candidate in candidates:
        if (code := as_code(candidate)) and (matches := count(model, candidate)):
            return f"; {code} matches {matches}"
    return ""


# ---------------------------------------------------------------- a walk that sees everything


class _Entry(NamedTuple):
    value: Any
    name: str = ""
    path: str = ""
    in_tuple: bool = False  # which hides it from MLX


_NAME = re.compile(r"(?!\d+$)[\w-]+")  # neither a number nor a pattern
_TOKENS = re.compile(r"\[[^\]]*\]|[^.\[]+")


def _children(entry: _Entry) -> list[_Entry]:
    """List all that an entry holds directly, including what MLX does not see."""
    value = entry.value
    is_tuple = isinstance(value, tuple)
    pairs: list[tuple[Any, Any]] = list(enumerate(value)) if is_tuple else []
    if is_container(value):
        pairs += entries(value)
    if issubclass(type(value), nn.Module):
        pairs += [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    prefix, in_tuple = entry.path and f"{entry.path}.", entry.in_tuple or is_tuple
    return [_Entry(child, str(key), f"{prefix}{key}", in_tuple) for key, child in pairs]


def _with_descendants(start: list[_Entry]) -> list[_Entry]:
    """List some entries and all that is inside them, level by level."""
    reached, entered = list(start), set[int]()
    for entry in reached:
        if id(entry.value) not in entered:
            entered.add(id(entry.value))
            reached += _children(entry)
    return reached


def _step(start: list[_Entry], token: str) -> list[_Entry]:
    """Follow one token of a pattern from some entries, and return the entries it leads to."""
    if token == "**":
        return _with_descendants(start)
    item = parse(f"_{token}" if token.startswith("[") else token).items[-1]
    reached: list[_Entry] = []
    for entry in start:
        children = _children(entry)
        if isinstance(entry.value, (list, tuple)):
            reached += [children[index] for index in item.indices(len(children))]
        else:
            reached += [child for child in children if item.accepts(child.name)]
    return reached


# ---------------------------------------------------------------- what is there instead


def _what_is_there(model: nn.Module, tokens: list[str]) -> str:
    """Describe what the model holds where the tokens stop matching."""
    reached = [_Entry(model)]
    for number, token in enumerate(tokens):
        before, reached = reached, _step(reached, token)
        if not reached:
            return "" if "**" in tokens[:number] else _what_is_at(token, before[0])
    return _not_a_module(reached[0], ".".join(tokens))


def _what_is_at(token: str, entry: _Entry) -> str:
    place = repr(shorten(entry.path)) if entry.path else "the model"
    if isinstance(entry.value, (list, tuple)):
        return f"{place} is {described(entry.value)}"
    if token.startswith("["):
        return f"{place} is {described(entry.value)}, not a list"
    there = contents(entry.value) if is_container(entry.value) else []
    return f"{place} holds {listed(there) or 'no modules'}"


def _not_a_module(entry: _Entry, pattern: str) -> str:
    place = repr(shorten(entry.path)) if entry.path else "the model"
    if entry.path == pattern:
        place = "it"
    if entry.in_tuple:
        return f"{place} is in a tuple, and MLX sees modules in lists and dicts only"
    if issubclass(type(entry.value), nn.Module):
        return f"{place} holds no modules"
    return f"{place} is {described(entry.value)}, not a module"


def contents(container: Container) -> list[str]:
    """List the modules directly in a container: ``["'norm'", "'layers[0:32]' (32 Block)"]``."""
    paths_of: dict[type, list[tuple[str | int, ...]]] = {}
    for path, _, _, value in own_values(container):
        if issubclass(type(value), nn.Module):
            paths_of.setdefault(type(value), []).append(path)
    return [
        f"{pattern_of(product)!r}" + (f" ({len(numbers)} {cls.__name__})" if numbers[1:] else "")
        for cls, paths in paths_of.items()
        for product, numbers in fold(paths)
    ]


# ---------------------------------------------------------------- what would work


def _close_patterns(model: nn.Module, source: str) -> Iterator[str]:
    """Yield patterns that are similar to one that matches nothing, the likeliest first."""
    for text in dict.fromkeys(reversed(list(spellings(source)))):
        with suppress(PatternError):  # the text may still have a mistake
            parse(text)
            yield from _corrected(model, _TOKENS.findall(text))
    # Only the beginning may be wrong, if the pattern is for another model of the same family.
    tokens = _TOKENS.findall(source)
    for start, token in enumerate(tokens):
        if _NAME.fullmatch(token):
            yield f"**.{_joined(tokens[start:])}"


def _joined(tokens: list[str]) -> str:
    return "".join(t if t.startswith("[") else f".{t}" for t in tokens).removeprefix(".")


def _corrected(model: nn.Module, tokens: list[str]) -> list[str]:
    """List patterns that are similar to these tokens and lead somewhere in the model."""
    reached = [_Entry(model)]
    corrected: list[str] = []
    for token in tokens:
        for instead in _replacements(reached, token, corrected[-1:]):
            if further := reduce(_step, instead, reached):
                corrected += instead
                reached = further
                break
        else:
            return []
    texts = map(_joined, (corrected, [*corrected, "*"], corrected[:-1]))
    return [text for text in texts if text != "**"]  # which says nothing of the model


def _replacements(start: list[_Entry], token: str, before: list[str]) -> Iterator[list[str]]:
    """Yield the tokens that may have been meant by one token, the likeliest first."""
    yield [token]
    if token.startswith("["):
        yield [token[1:-1]]
        yield ["[-1]"]
        return
    if token.isdecimal() and before and before != ["**"]:
        yield ["[-1]"]
    yield from ([name] for name in _likely_name(token, start))
    yield ["**", token]
    yield from (["**", name] for name in _likely_name(token, _with_descendants(start)))
    if _NAME.fullmatch(token) and isinstance(start[0].value, list):
        yield ["*"]  # for `layers.N.mlp`


def _likely_name(token: str, start: list[_Entry]) -> list[str]:
    """Find the name below some entries that a token misspells; empty unless there is just one."""
    names = {
        child.name.lower(): child.name
        for child in chain.from_iterable(map(_children, start))
        if is_container(child.value) and _NAME.fullmatch(child.name)
    }
    if not names or not _NAME.fullmatch(token):
        return []
    close = get_close_matches(token.lower(), names, len(names), 0.5)
    scores = {name: _likeness(token.lower(), name) for name in close}
    best = [name for name in close if scores[name] == max(scores.values()) >= _LIKE]
    return [names[name] for name in best] if len(best) == 1 else []


_LIKE = 0.6  # as in `get_close_matches`
_WORD = re.compile(r"[^\W\d_]+|\d+")


def _likeness(token: str, name: str) -> float:
    """Rate how likely a token is a misspelling of a name, from 0 to 1.

    Words that both have are left out: ``q_b_proj`` and ``kv_b_proj`` share most of their letters,
    but nobody writes one for the other. If the remaining words are all in one of the two, the name
    is just likely enough.
    """
    words, others = (Counter(_WORD.findall(text)) for text in (token, name))
    left, right = (
        "".join((one - other).elements()) for one, other in ((words, others), (others, words))
    )
    if bool(left) != bool(right):
        return _LIKE
    return SequenceMatcher(None, left, right).ratio()
