"""Raise an error for each argument that does nothing.

There are two checks. The first does not need ``where``, so that a typo is found before the user's
function is called. The second is about the modules that ``where`` accepts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import reduce
from itertools import compress
from operator import or_
from types import UnionType
from typing import Any

import mlx.nn as nn

from .._errors import NoMatchError, shorten
from .._model.walk import Places
from .._patterns.parse import Parsed, parse
from .._words import class_names, classes, counted, listed
from . import hints
from .arguments import Request, Rule
from .match import Accepted, ask_where, first_pattern, match


def check_matches(model: nn.Module, request: Request, places: Places) -> None:
    """Check that each pattern matches a module, and each exclude a module that a pattern matches.

    Raises:
        NoMatchError: If one of them does not. The message says which.
    """
    patterns, included = request.patterns, request.included
    for rule in request.rules:
        if not rule.patterns and rule.key is not None:
            raise NoMatchError(f"rule {rule.text} holds no pattern; remove it")
    if not patterns:
        raise NoMatchError("no pattern was given; '**' matches every module of the model")
    masks = set(places.masks)
    found = reduce(or_, masks, 0)
    for number, pattern in enumerate(patterns):
        if not found >> number & 1:
            raise NoMatchError(hints.no_match(model, pattern))
    removed = reduce(or_, (mask for mask in masks if mask & included))
    for number, pattern in enumerate(request.excludes, start=len(patterns)):
        if not found >> number & 1:
            raise NoMatchError(f"exclude {hints.no_match(model, pattern)}")
        if not removed >> number & 1:
            alone = sum(mask >> number & 1 for mask in places.masks)
            others = sum(mask & included > 0 for mask in places.masks)
            none = f"none of the {others}" if others > 1 else "not the one"
            raise NoMatchError(
                f"exclude {pattern.text} has no effect: it matches {counted(alone)}, but "
                f"{none} matched by {_union(patterns)}"
            )


def check_effects(
    model: nn.Module, request: Request, places: Places, accepted: Accepted | None
) -> None:
    """Check that each argument does something, given the modules that ``where`` accepts.

    Args:
        model (nn.Module): The model.
        request (Request): What was asked for, which has accepted :func:`check_matches`.
        places (Places): All places that a pattern or an exclude matches.
        accepted (list, optional): What ``where`` says of each of the places.

    Raises:
        NoMatchError: If an argument does nothing. The message says which.
    """
    # `check_matches` has checked the rest. Most calls need none of these checks.
    alone, excludes = len(request.patterns) == 1, request.excludes
    if alone and not excludes and (accepted is None or any(accepted)):
        return
    matched = _Matched(model, request, places, accepted)
    if excludes or accepted is not None:
        _check_that_something_is_left(matched)
        _check_patterns(matched)
    _check_rules(matched)
    if excludes:
        _check_excludes(matched)


class _Matched:
    """What the patterns and excludes of a request match.

    A mask says which patterns and excludes match a module, and nothing else about a module
    matters here. So sets of masks represent all modules: a model may have thousands of
    layers, but these rarely have more than a few different masks.

    Attributes:
        masks (set[int]): The masks of all modules.
        free (set[int]): The masks without an exclude.
        accepted_masks (set[int]): The masks of the modules that ``where`` accepts.
    """

    def __init__(
        self, model: nn.Module, request: Request, places: Places, accepted: Accepted | None
    ) -> None:
        self.model = model
        self.request = request
        self.places = places
        self.accepted = accepted
        self.masks = set(places.masks)
        included = request.included
        self.free = {mask for mask in self.masks if mask <= included}
        self.accepted_masks = (
            self.masks if accepted is None else set(compress(places.masks, accepted))
        )

    def has_effect(self, masks: Collection[int]) -> bool:
        """Return whether a pattern with these masks, or a rule that decides them, does something.

        Usually one of the masks is accepted. But it has an effect, too, if all of its modules are
        excluded, since one list of patterns can serve several models.
        """
        return bool(masks) and self.free.isdisjoint(masks)

    def modules(self, bits: int, others: int = -1) -> list[nn.Module]:
        """Return the modules that a pattern in ``bits`` matches, and also one in ``others``."""
        pairs = zip(self.places.modules, self.places.masks)
        return [module for module, mask in pairs if mask & bits and mask & others]


def _check_that_something_is_left(matched: _Matched) -> None:
    if not matched.free:
        raise NoMatchError(_all_excluded(matched))
    if not matched.accepted_masks & matched.free:
        raise NoMatchError(_all_rejected(matched))


def _check_patterns(matched: _Matched) -> None:
    accepted_masks = reduce(or_, matched.accepted_masks)
    for number in range(len(matched.request.patterns)):
        if accepted_masks >> number & 1:
            continue
        if not matched.has_effect([mask for mask in matched.masks if mask >> number & 1]):
            raise NoMatchError(_rejected(matched, number))


def _check_rules(matched: _Matched) -> None:
    included, owners = matched.request.included, matched.request.owners
    rule_of = {mask: owners[first_pattern(mask)] for mask in matched.masks if mask & included}
    deciding = {rule for mask, rule in rule_of.items() if mask in matched.accepted_masks}
    for number in range(len(matched.request.rules)):
        if number in deciding:  # the common case
            continue
        if not matched.has_effect([mask for mask, rule in rule_of.items() if rule == number]):
            raise NoMatchError(_never_applies(matched, number))


def _check_excludes(matched: _Matched) -> None:
    request = matched.request
    included = request.included
    removed = reduce(or_, (mask for mask in matched.accepted_masks if mask & included))
    for number, pattern in enumerate(request.excludes, start=len(request.patterns)):
        if not removed >> number & 1:
            rejected = matched.modules(1 << number, included)
            raise NoMatchError(
                f"exclude {pattern.text} has no effect: {_where(request, rejected)} rejects "
                f"{_all_of(rejected)} it would exclude: {_classes(request, rejected)}"
            )


# ---------------------------------------------------------------- what the errors say


def _all_excluded(matched: _Matched) -> str:
    request = matched.request
    removed, several = matched.modules(request.included), len(request.excludes) > 1
    message = (
        f"exclude {_union(request.excludes)} "
        f"{'leave nothing: they remove' if several else 'leaves nothing: it removes'} "
        f"{_all_of(removed)} {_union(request.patterns)} {_matches(request)}"
    )
    if any(_reaches_inside(matched.model, exclude) for exclude in request.excludes):
        message += ", because what is inside an excluded place is excluded too"
    for exclude in request.excludes:
        for pattern in request.patterns:
            if pattern.source == f"{exclude.source}.**":
                message += f"; {pattern.text} without exclude does not select {exclude.text} itself"
    return message


def _reaches_inside(model: nn.Module, exclude: Parsed) -> bool:
    """Return whether an exclude removes more than the places that it matches."""
    alone, with_inside = (
        match(model, Request([Rule([exclude], keeps=keeps)], None, [])).paths
        for keeps in (False, True)
    )
    return len(alone) < len(with_inside)


def _all_rejected(matched: _Matched) -> str:
    """Write that ``where`` rejects everything that is not excluded."""
    request = matched.request
    pairs = zip(matched.places.modules, matched.places.masks)
    rejected = [module for module, mask in pairs if mask in matched.free]
    patterns = _union(request.patterns)
    which = f"{patterns} {_matches(request)}"
    if request.excludes:
        which = f"{'are' if rejected[1:] else 'is'} left of {patterns} after exclude"
    message = (
        f"{_where(request, rejected)} rejects {_all_of(rejected)} {which}: "
        f"{_classes(request, rejected)}"
    )
    tried = (_works_inside(matched, number) for number in range(len(request.patterns)))
    return message + next(filter(None, tried), "")


def _rejected(matched: _Matched, number: int) -> str:
    """Write that ``where`` rejects everything that one of several patterns matches."""
    request = matched.request
    pattern, rule = request.patterns[number], request.rules[request.owners[number]]
    rejected = matched.modules(1 << number)
    where, all_of_them = _where(request, rejected), _all_of(rejected)
    there = _classes(request, rejected)
    if rule.key is None:
        message = f"{where} rejects {all_of_them} {pattern.text} matches: {there}"
        return message + _works_inside(matched, number)
    name = f"rule {rule.text}"
    if len(rule.patterns) > 1:
        name = f"{pattern.text} in {name}"
    if rule.keeps:
        return (
            f"{name} has no effect: {where} already leaves alone {all_of_them} it matches: "
            f"{there}; remove it"
        )
    message = f"{name} never applies: {where} rejects {all_of_them} it matches: {there}"
    return message + _works_inside(matched, number)


def _never_applies(matched: _Matched, number: int) -> str:
    """Write that earlier rules decide everything that a rule matches."""
    request, masks = matched.request, matched.places.masks
    bits = sum(1 << at for at, owner in enumerate(request.owners) if owner == number)
    its = matched.modules(bits)
    accepted = len(its)
    if matched.accepted is not None:
        pairs = zip(masks, matched.accepted)
        accepted -= sum(mask & bits > 0 and not answer for mask, answer in pairs)
    which = f"all {accepted} of its modules" if accepted > 1 else "its only module"
    if accepted < len(its):
        which = f"all {accepted}" if accepted > 1 else "the only one"
        which += f" of its modules that {_where(request, its)} accepts"
    return (
        f"rule {request.rules[number].text} never applies: earlier rules already match {which}; "
        "remove it, or move it up"
    )


def _works_inside(matched: _Matched, number: int) -> str:
    """Write how many modules inside the matches of a pattern would be selected; ``''`` if none."""
    request = matched.request
    source, rule_number = request.patterns[number].source, request.owners[number]
    if not isinstance(source, str):
        return ""
    wider = parse(f"{source}.**")
    tried = request._replace(rules=[*request.rules[:rule_number], Rule([wider])])
    included, owners = tried.included, tried.owners
    with suppress(Exception):  # the user's `where` may fail for other modules
        places = match(matched.model, tried)
        accepted = ask_where(places, tried, strict=False) or ()
        count = sum(
            mask <= included and owners[first_pattern(mask)] == rule_number
            for mask in compress(places.masks, accepted)
        )
        if count:
            return f"; {wider.text} matches {count}"
    return ""


def _all_of(modules: Sequence[nn.Module]) -> str:
    if len(modules) == 2:
        return "both modules that"
    return f"all {len(modules)} modules that" if len(modules) > 2 else "the only module that"


def _matches(request: Request) -> str:
    return "match" if len(request.patterns) > 1 else "matches"


def _classes(request: Request, modules: Sequence[nn.Module]) -> str:
    there = classes(modules, beside=_where_classes(request.where))
    return there if len(modules) > 1 else there.removeprefix("1 ")


def _where(request: Request, modules: Sequence[nn.Module]) -> str:
    names = class_names([*_where_classes(request.where), *map(type, modules)])
    return f"where={_name_of(request.where, names)}"


def _where_classes(where: Any) -> list[type]:
    if isinstance(where, UnionType):
        return _where_classes(where.__args__)
    if isinstance(where, tuple):
        return [cls for one in where for cls in _where_classes(one)]
    return [where] if isinstance(where, type) else []


def _name_of(where: Any, names: dict[type, str]) -> str:
    if isinstance(where, UnionType):
        return " | ".join(_name_of(one, names) for one in where.__args__)
    if isinstance(where, tuple):
        return f"({', '.join(_name_of(one, names) for one in where)})"
    if isinstance(where, type):
        return names[where]
    return getattr(where, "__name__", None) or shorten(repr(where))


def _union(patterns: Iterable[Parsed]) -> str:
    return listed(pattern.text for pattern in patterns)
