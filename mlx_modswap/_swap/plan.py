"""Select the places, call the factories, check the result. The model does not change."""

from __future__ import annotations

from itertools import compress
from operator import is_not
from typing import NamedTuple

import mlx.nn as nn

from .._model.sharing import survey
from .._model.walk import Places
from .._patterns.parse import Parsed
from .._select.arguments import Patterns, Where, check_model, parse_argument
from .._select.select import choose
from .checks import check_cycles, check_left_alone, check_names, check_nesting, check_unmoved
from .factories import Factory, Rules, call_factories, rules_and_factories
from .ties import call_once, check_units, units_of


class Plan(NamedTuple):
    """A swap that has passed every check.

    Attributes:
        places (Places): The places that change, with the modules that are there now.
        new_modules (list[nn.Module]): The new module of each place.
        rules (list[int]): The number of the rule that decided each place.
        training (list): The modules that are new to the model, each with the training
            mode that it will get.
        patterns (list[Parsed]): The patterns of all rules.
    """

    places: Places
    new_modules: list[nn.Module]
    rules: list[int]
    training: list[tuple[nn.Module, bool]]
    patterns: list[Parsed]


def make_plan(
    model: nn.Module,
    pattern: Patterns | Rules,
    factory: Factory | None,
    where: Where | None,
    exclude: Patterns,
    strict: bool,
    *,
    nested: bool = False,
) -> Plan:
    """Select the places, call the factories, run every check, and return the plan.

    With ``nested``, places may lie inside each other: this is possible if all new modules are
    wrappers, which leave every path valid, but not with one call of ``update_modules``.
    """
    check_model(model)
    rules, factories = rules_and_factories(model, pattern, factory)
    excludes = parse_argument(model, "exclude", exclude)
    places, deciding, left_alone = choose(model, rules, where, excludes, strict)
    # `containers` keeps all of them alive to the end: a factory may delete parts of the model,
    # and a new module must not get the id of a deleted container.
    containers, sharing = survey(model)
    if sharing:
        units = units_of(places, sharing)
        new_modules = call_once(units, places, deciding, factories)
        check_units(units, places, deciding, new_modules, sharing, rules)
    else:
        new_modules = call_factories(
            places.paths, places.modules, map(factories.__getitem__, deciding)
        )
    changes = list(map(is_not, new_modules, places.modules))
    places.keep(changes)
    new_modules, deciding = list(compress(new_modules, changes)), list(compress(deciding, changes))
    if not nested:
        check_nesting(places, _NESTED)
    check_left_alone(places, new_modules, left_alone)
    check_names(places)
    training = check_cycles(places, new_modules, set(map(id, containers)))
    check_unmoved(places, places.modules, _MOVED)
    return Plan(
        places, new_modules, deciding, training, [one for rule in rules for one in rule.patterns]
    )


_NESTED = "and both would change; exclude the inner one ({exclude}), or select only {outer!r}"
_MOVED = "{path!r} was modified while the factories ran; the swap was not applied"
