"""Nothing silent: an error for each argument that does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import reduce
from itertools import compress
from operator import or_
from typing import Any

import mlx.nn as nn

from . import _hints
from ._errors import NoMatchError, class_names, classes, counted, listed, shorten
from ._match import Request, Rule, first_pattern, is_class
from ._pattern import Matcher, Parsed, parse
from ._walk import Places, find


def check_matches(model: nn.Module, request: Request, places: Places) -> None:
    """Each pattern must match a module, and each exclude one that a pattern matches.

    Raises:
        NoMatchError: Which of them does not.
    """
    patterns, included = request.patterns, request.included
    if not patterns:
        raise NoMatchError("no pattern was given; '**' matches every module of the model")
    for rule in request.rules:
        if not rule.patterns:
            raise NoMatchError(f"rule {rule.text} holds no pattern; remove it")
    masks = set(places.masks)
    found = reduce(or_, masks, 0)
    for number, pattern in enumerate(patterns):
        if not found >> number & 1:
            raise NoMatchError(_hints.no_match(model, pattern))
    removed = reduce(or_, (mask for mask in masks if mask & included), 0)
    for number, pattern in enumerate(request.excludes, start=len(patterns)):
        if not found >> number & 1:
            raise NoMatchError(f"exclude {_hints.no_match(model, pattern)}")
        if not removed >> number & 1:
            alone = sum(mask >> number & 1 for mask in places.masks)
            others = sum(mask & included > 0 for mask in places.masks)
            raise NoMatchError(
                f"exclude {pattern.text} has no effect: it matches {counted(alone)}, but none of "
                f"the {others} matched by {_union(patterns)}"
            )


def check_effects(
    model: nn.Module, request: Request, places: Places, passed: list[bool] | None
) -> None:
    """Judged after ``where``: each pattern, rule and exclude must do something.

    A pattern whose matches are all excluded is in order, as long as others leave
    something to do.

    Args:
        model (nn.Module): The model.
        request (Request): What was asked for.
        places (Places): All places that a pattern or an exclude matches.
        passed (list[bool], optional): Whether ``where`` lets each of them through.

    Raises:
        NoMatchError: Which of them does nothing.
    """
    if passed is None and len(request.rules) == 1 and not request.excludes:
        return  # what there is to check was checked before `where`
    included, masks = request.included, set(places.masks)
    free = {mask for mask in masks if mask <= included}
    live = masks if passed is None else set(compress(places.masks, passed))
    if not free:
        raise NoMatchError(_all_excluded(request, places))
    if not live & free:
        raise NoMatchError(_all_rejected(model, request, places))
    some_live, some_free = reduce(or_, live, 0), reduce(or_, free, 0)
    for number, (rule, pattern) in enumerate(_with_rules(request)):
        if some_free >> number & 1 and not some_live >> number & 1:
            raise NoMatchError(_rejected(model, request, places, rule, pattern, number))
    _check_rules(request, places, live, passed)
    removed = reduce(or_, (mask for mask in live if mask & included), 0)
    for number, pattern in enumerate(request.excludes, start=len(request.patterns)):
        if not removed >> number & 1:
            rejected = _modules(places, 1 << number, included)
            raise NoMatchError(
                f"exclude {pattern.text} has no effect: {_where(request, rejected)} rejects "
                f"{_all_of(rejected)} it would exclude: {_classes(request, rejected)}"
            )


def _check_rules(
    request: Request, places: Places, live: set[int], passed: list[bool] | None
) -> None:
    included, owners = request.included, request.owners
    decided: dict[int, set[int]] = {}
    for mask in set(places.masks):
        if mask & included:
            decided.setdefault(owners[first_pattern(mask)], set()).add(mask)
    for number, rule in enumerate(request.rules):
        its_masks = decided.get(number, set())
        is_excluded = its_masks and all(mask > included for mask in its_masks)
        if is_excluded or its_masks & live:
            continue
        bits = sum(1 << at for at, owner in enumerate(owners) if owner == number)
        masks = places.masks if passed is None else compress(places.masks, passed)
        count = sum(mask & bits > 0 for mask in masks)
        its_modules = f"all {count} of its modules" if count > 1 else "its only module"
        raise NoMatchError(
            f"rule {rule.text} never applies: earlier rules already match {its_modules}; "
            "remove it, or move it up"
        )


# ---------------------------------------------------------------- what the errors say


def _with_rules(request: Request) -> list[tuple[Rule, Parsed]]:
    return [(rule, pattern) for rule in request.rules for pattern in rule.patterns]


def _modules(places: Places, bits: int, others: int = -1) -> list[nn.Module]:
    """The modules matched by one of some patterns, and by one of some others."""
    pairs = zip(places.modules, places.masks)
    return [module for module, mask in pairs if mask & bits and mask & others]


def _all_excluded(request: Request, places: Places) -> str:
    matched = _modules(places, request.included)
    return (
        f"exclude {_union(request.excludes)} leaves nothing: it removes {_all_of(matched)} "
        f"{_union(request.patterns)} matches, since all that is inside an excluded place is "
        "excluded too"
    )


def _all_rejected(model: nn.Module, request: Request, places: Places) -> str:
    pairs = zip(places.modules, places.masks)
    rejected = [module for module, mask in pairs if mask <= request.included]
    patterns = request.patterns
    rest = " and exclude leaves" if request.excludes else ""
    message = (
        f"{_where(request, rejected)} rejects {_all_of(rejected)} {_union(patterns)} "
        f"matches{rest}: {_classes(request, rejected)}"
    )
    return message + _inside_works(model, request, patterns)


def _rejected(
    model: nn.Module, request: Request, places: Places, rule: Rule, pattern: Parsed, number: int
) -> str:
    """That ``where`` rejects all that one of several patterns matches."""
    rejected = _modules(places, 1 << number)
    where, there = _where(request, rejected), _classes(request, rejected)
    if not rule.text:
        message = f"{where} rejects {_all_of(rejected)} {pattern.text} matches: {there}"
        return message + _inside_works(model, request, [pattern])
    name = f"rule {rule.text}" + f": its {pattern.text}" * (len(rule.patterns) > 1)
    if rule.keeps:
        return (
            f"{name} never applies: {where} leaves alone {_all_of(rejected)} it matches "
            f"in any case: {there}; remove it"
        )
    message = f"{name} never applies: {where} rejects {_all_of(rejected)} it matches: {there}"
    return message + _inside_works(model, request, [pattern])


def _inside_works(model: nn.Module, request: Request, patterns: Sequence[Parsed]) -> str:
    """How much ``where`` would let through inside the modules that some patterns match."""
    for pattern in patterns:
        if isinstance(pattern.source, str):
            with suppress(Exception):  # `where` is the user's, and may not bear other modules
                wider = parse(f"{pattern.source}.**")
                found = find(model, Matcher([wider]))
                where: Any = request.where
                if is_class(where):
                    count = sum(isinstance(module, where) for module in found.modules)
                else:
                    count = sum(map(bool, map(where, found.paths, found.modules)))
                if count:
                    return f"; {wider.text} matches {count}"
    return ""


def _all_of(modules: Sequence[nn.Module]) -> str:
    return f"all {len(modules)} modules that" if len(modules) > 1 else "the only module that"


def _classes(request: Request, modules: Sequence[nn.Module]) -> str:
    there = classes(modules, beside=_where_classes(request.where))
    return there if len(modules) > 1 else there.removeprefix("1 ")


def _where(request: Request, modules: Sequence[nn.Module]) -> str:
    names = class_names([*_where_classes(request.where), *map(type, modules)])
    return f"where={_name_of(request.where, names)}"


def _where_classes(where: Any) -> list[type]:
    if isinstance(where, tuple):
        return [cls for one in where for cls in _where_classes(one)]
    return [where] if isinstance(where, type) else []


def _name_of(where: Any, names: dict[type, str]) -> str:
    if isinstance(where, tuple):
        return f"({', '.join(_name_of(one, names) for one in where)})"
    if isinstance(where, type):
        return names[where]
    return getattr(where, "__name__", None) or shorten(repr(where))


def _union(patterns: Iterable[Parsed]) -> str:
    return listed(pattern.text for pattern in patterns)
