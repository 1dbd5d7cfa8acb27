"""Patterns, ``where`` and ``exclude`` -> the chosen places."""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import repeat
from operator import or_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import _hints
from ._errors import NoMatchError, classes, described, listed, shorten
from ._pattern import Matcher, Parsed, Pattern, parse_all
from ._sharing import Visited
from ._walk import Places, find_and_note

Patterns = Pattern | Iterable[Pattern]
Where = type | types.UnionType | tuple[type, ...] | Callable[[str, nn.Module], bool]


def select(
    model: nn.Module,
    pattern: Patterns,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> dict[str, nn.Module]:
    """Find the modules of a model whose paths match a pattern.

    Only looks: it returns what the arguments name, in the order in which
    :func:`replace_layers` would call its factory.

    Args:
        model (mlx.nn.Module): The model to look into.
        pattern (str, re.Pattern or an iterable of them): The paths to take, a
            union if there are several patterns.
        where (type, tuple of types or Callable, optional): The modules to take
            of these: the instances of a class, or those for which
            ``where(path, module)`` is true. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave
            out. Default: ``()``.
        strict (bool): If ``True``, a pattern that matches no module, an
            ``exclude`` that removes none of the matches and a ``where`` that
            leaves nothing are errors. Default: ``True``.

    Returns:
        dict[str, mlx.nn.Module]: Path and module of each place, in definition
        order. A module in several places is listed once for each.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing.
        SelectionError: If the model holds a cycle.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import select
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select(model, "layers.*", where=nn.Linear))
        ['layers.0', 'layers.2']
    """
    check_model(model)
    patterns, excludes = parse_argument("pattern", pattern), parse_argument("exclude", exclude)
    places, _ = choose(model, patterns, where, excludes, strict)
    chosen: dict[str, nn.Module] = {}
    for path, module in zip(places.paths, places.modules):
        chosen.setdefault(path, module)
    return chosen


def check_model(model: Any) -> None:
    """Raise a ``TypeError`` for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module, not {described(model)}")


def parse_argument(name: str, patterns: Any) -> list[Parsed]:
    """Parse an argument that is one pattern or several."""
    if isinstance(patterns, (nn.Module, mx.array)):  # which could be iterated
        raise TypeError(f"{name} must be a path pattern, not {described(patterns)}")
    return parse_all(patterns)


def choose(
    model: nn.Module,
    patterns: list[Parsed],
    where: Where | None,
    excludes: list[Parsed],
    strict: bool,
    *,
    as_rules: bool = False,
) -> tuple[Places, Visited]:
    """Find the places that the arguments name, with the mask of the patterns that match each.

    With ``as_rules`` a pattern that is wholly shadowed by those before it is an error.
    """
    _check_where(where)
    places, visited = _match(model, patterns + excludes)
    included = (1 << len(patterns)) - 1  # the lower bits; those of the excludes follow
    masks = set(places.masks)
    if strict:
        _check_patterns(model, patterns, masks)
        _check_excludes(model, patterns, excludes, places)
        if as_rules:
            _check_rules(patterns, places)
    wanted = {mask for mask in masks if mask <= included}
    if wanted != masks:
        places.keep(list(map(wanted.__contains__, places.masks)))
    if where is not None:
        passed = _passed(where, places)
        if strict and passed and not any(passed):
            raise NoMatchError(_where_message(where, patterns, places.modules))
        places.keep(passed)
    return places, visited


def _match(model: nn.Module, patterns: list[Parsed]) -> tuple[Places, Visited]:
    places, visited = find_and_note(model, Matcher(patterns))
    for number, pattern in enumerate(patterns):
        if isinstance(pattern.source, re.Pattern):
            fullmatch, rest = pattern.source.fullmatch, ~(1 << number)
            pairs = zip(places.masks, places.paths)
            places.masks = [mask if fullmatch(path) else mask & rest for mask, path in pairs]
            places.keep(places.masks)
    return places, visited


def first_pattern(mask: int) -> int:
    """The number of the first pattern of a mask."""
    return (mask & -mask).bit_length() - 1


def _is_class(where: Any) -> bool:
    if isinstance(where, tuple):
        return all(map(_is_class, where))
    return isinstance(where, (type, types.UnionType))


def _check_where(where: Any) -> None:
    if where is None or _is_class(where):
        return
    if not callable(where) or isinstance(where, nn.Module):
        raise TypeError(
            "where must be a class, a tuple of classes or a function of path and module, "
            f"not {described(where)}"
        )


def _passed(where: Any, places: Places) -> list[bool]:
    if _is_class(where):
        return list(map(isinstance, places.modules, repeat(where)))
    return [bool(where(path, module)) for path, module in zip(places.paths, places.modules)]


# ---------------------------------------------------------------- nothing silent


def _check_patterns(model: nn.Module, patterns: list[Parsed], masks: set[int]) -> None:
    if not patterns:
        raise NoMatchError("no pattern was given; '**' matches every module of the model")
    found_by_any = reduce(or_, masks, 0)
    for number, pattern in enumerate(patterns):
        if not found_by_any >> number & 1:
            raise NoMatchError(_hints.no_match(model, pattern))


def _check_excludes(
    model: nn.Module, patterns: list[Parsed], excludes: list[Parsed], places: Places
) -> None:
    included = (1 << len(patterns)) - 1
    matches = [mask for mask in places.masks if mask & included] if excludes else []
    found_by_any = reduce(or_, set(matches), 0)
    for number, pattern in enumerate(excludes, start=len(patterns)):
        if found_by_any >> number & 1:
            continue
        alone = len(_match(model, [pattern])[0].paths)
        if not alone:
            raise NoMatchError(f"exclude {_hints.no_match(model, pattern)}")
        raise NoMatchError(
            f"exclude {pattern.text} removes nothing: it matches {alone}, but none of the "
            f"{len(matches)} that {_union(patterns)} matches"
        )


def _check_rules(rules: list[Parsed], places: Places) -> None:
    deciding = set(map(first_pattern, set(places.masks)))
    for number, rule in enumerate(rules):
        if number not in deciding:
            taken = Counter(first_pattern(m) for m in places.masks if m >> number & 1)
            by = listed(f"{rules[n].text} takes {count}" for n, count in taken.most_common())
            raise NoMatchError(
                f"rule {rule.text} decides nothing: rules before it take all of the "
                f"{taken.total()} that it matches ({by}); drop it, or put it before them"
            )


def _where_message(where: Any, patterns: list[Parsed], modules: list[nn.Module]) -> str:
    matches = f"the {len(modules)} that {_union(patterns)} matches"
    there = classes(modules)
    return f"where={_name_of(where)} leaves nothing of {matches}: they are {there}"


def _name_of(where: Any) -> str:
    if isinstance(where, tuple):
        return f"({', '.join(map(_name_of, where))})"
    return getattr(where, "__name__", None) or shorten(repr(where))


def _union(patterns: list[Parsed]) -> str:
    return listed(pattern.text for pattern in patterns)
