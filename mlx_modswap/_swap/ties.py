"""Shared modules: a factory is called once for all places of a tied module.

A *unit* can only change as a whole: a tied module with all of its places, or one location
with all of its paths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import mlx.nn as nn

from .._errors import SelectionError
from .._model.containers import Location, has_parameters, wrapped_layers
from .._model.sharing import Sharing
from .._model.walk import Places, find
from .._patterns.match import Matcher
from .._patterns.parse import parse
from .._select.arguments import Rule
from .._words import listed
from .checks import excluding
from .factories import Factory, call_factories

#
# A *unit* can only change as a whole: a tied module with all of its places, or
# one location with all of its paths.

Unit = int | Location  # the id of a tied module, or a location


def units_of(places: Places, sharing: Sharing) -> list[Unit]:
    tied: dict[int, bool] = {}
    units: list[Unit] = []
    for module, location in zip(places.modules, places.locations()):
        layers = [module, *wrapped_layers(module)]  # one place may hold a wrapper, another a layer
        if id(module) not in tied:
            is_shared = any(sharing.location_counts[id(layer)] > 1 for layer in layers)
            tied[id(module)] = is_shared and has_parameters(module)
        units.append(id(layers[-1]) if tied[id(module)] else location)
    return units


def call_once(
    units: list[Unit], places: Places, rules: list[int], factories: Sequence[Factory | None]
) -> list[nn.Module]:
    """Call the factory of each unit once, at its first place; return the modules of all places."""
    calls = list(zip(units, map(id, places.modules), rules))
    firsts = {call: at for at, call in reversed(list(enumerate(calls)))}
    order = sorted(firsts.values())
    made = call_factories(
        [places.paths[at] for at in order],
        [places.modules[at] for at in order],
        [factories[rules[at]] for at in order],
    )
    new_modules = dict(zip((calls[at] for at in order), made))
    return [new_modules[call] for call in calls]


def check_units(
    units: list[Unit],
    places: Places,
    deciding: list[int],
    new_modules: list[nn.Module],
    sharing: Sharing,
    rules: list[Rule],
) -> None:
    """Check that each unit changes as a whole and by one rule, or does not change."""
    members: defaultdict[Unit, list[int]] = defaultdict(list)
    for at, unit in enumerate(units):
        members[unit].append(at)
    for unit, inside in members.items():
        if all(new_modules[at] is places.modules[at] for at in inside):
            continue
        shared = unit if isinstance(unit, int) else unit[0]
        if len(inside) < sharing.path_counts[shared]:
            raise SelectionError(_partly(unit, places, inside, sharing))
        numbers = dict.fromkeys(deciding[at] for at in inside)
        if len(numbers) > 1:
            paths = listed(repr(places.paths[at]) for at in inside)
            texts = listed(rules[number].text for number in numbers)
            name = type(places.modules[inside[0]]).__name__
            raise SelectionError(
                f"{paths} are the same {name}, but different rules decide about them: {texts}; "
                "let one rule match all of these paths first"
            )


def _partly(unit: Unit, places: Places, inside: list[int], sharing: Sharing) -> str:
    """Return the message that only some paths of a unit are selected, and which are missing."""
    everywhere = find(places.model, Matcher([parse("**")]))
    found = zip(everywhere.paths, units_of(everywhere, sharing))
    paths = [path for path, other in found if other == unit]
    chosen = [places.paths[at] for at in inside]
    is_pair = len(paths) == 2
    if isinstance(unit, int):
        others = [repr(path) for path in paths if path not in chosen]
        name = type(places.modules[inside[0]]).__name__
        are = "are" if len(others) > 1 else "is"
        choice = "both, or neither" if is_pair else "all of them, or none"
        return (
            f"{chosen[0]!r} is tied to {listed(others)} (the same {name}), which {are} not "
            f"selected; select {choice} ({excluding(chosen)}); to untie them, use "
            f"model.update_modules(partial_modules(model, {{{chosen[0]!r}: new}}))"
        )
    names = list(map(repr, paths))
    these = " and ".join(names) if is_pair else listed(names)
    choice = "both paths, or neither" if is_pair else "all of these paths, or none"
    return (
        f"{these} are the same place, because a module or list that contains it is shared; "
        f"select {choice} ({excluding(chosen)})"
    )
