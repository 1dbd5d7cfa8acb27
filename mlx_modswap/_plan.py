"""The chosen places -> the factories' new modules -> a checked plan. Changes nothing at all."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress, groupby
from operator import attrgetter, is_not, itemgetter
from typing import Any, NamedTuple, TypeVar

import mlx.nn as nn

from ._containers import Location, has_parameters, unwrapped, wrapped_layers
from ._errors import SelectionError, described, listed, note
from ._pattern import Matcher, Parsed, Pattern, literally, parse
from ._select import Patterns, Where, check_model, choose, first_pattern, parse_argument
from ._sharing import Sharing, brought_in, sort_containers, survey
from ._walk import Places, find

# A factory may ask for an `nn.Linear`, so what it is given is not called an `nn.Module` here.
Factory = Callable[[str, Any], nn.Module]
AnyPattern = TypeVar("AnyPattern", str, re.Pattern[str], Pattern)  # a Mapping's keys are invariant
Rules = Mapping[AnyPattern, Factory | None]

_MODE = attrgetter("_training")


class Plan(NamedTuple):
    """A swap that has passed every check.

    Attributes:
        places (Places): The places that change, with the modules that are there now.
        news (list[nn.Module]): The new module of each place.
        rules (list[int]): The number of the rule that decided each place.
        training (list): Modules that are new to the model, and the training mode that
            each is to get.
    """

    places: Places
    news: list[nn.Module]
    rules: list[int]
    training: list[tuple[nn.Module, bool]]


def make_plan(
    model: nn.Module,
    pattern: Patterns | Rules[Any],
    factory: Factory | None,
    where: Where | None,
    exclude: Patterns,
    strict: bool,
) -> Plan:
    """Select, call the factories, and check all that could go wrong."""
    check_model(model)
    patterns, factories, as_rules = _rules(pattern, factory)
    excludes = parse_argument("exclude", exclude)
    places, visited = choose(model, patterns, where, excludes, strict, as_rules=as_rules)
    known, sharing = survey(model, visited)
    rule_of = {mask: first_pattern(mask) if as_rules else 0 for mask in set(places.masks)}
    rules = list(map(rule_of.__getitem__, places.masks))
    if sharing:
        units = _units(places, sharing)
        news = _make_once(units, places, rules, factories)
        _check_units(units, places, rules, news, sharing, patterns)
    else:
        news = _make(places.paths, places.modules, map(factories.__getitem__, rules))
    changes = list(map(is_not, news, places.modules))
    places.keep(changes)
    news, rules = list(compress(news, changes)), list(compress(rules, changes))
    check_nesting(places)
    _check_names(places)
    training = _check_cycles(places, news, known)
    check_unmoved(places, places.modules, "while the factories ran")
    return Plan(places, news, rules, training)


def _rules(pattern: Any, factory: Any) -> tuple[list[Parsed], list[Factory | None], bool]:
    """The patterns, the factories, and whether they are rules with a factory each."""
    if isinstance(pattern, Mapping) and not isinstance(pattern, nn.Module):
        if factory is not None:
            raise TypeError("rules hold their own factories: leave the factory out")
        rules = [parse(rule) for rule in pattern]
        factories = list(pattern.values())
        for rule, made_by in zip(rules, factories):
            if made_by is not None:
                _check_factory(made_by, rule)
        return rules, factories, True
    patterns = parse_argument("pattern", pattern)
    _check_factory(factory)
    return patterns, [factory], False


def _check_factory(factory: Any, rule: Parsed | None = None) -> None:
    # A module is callable, but what it returns for a path and a module is no module.
    if not callable(factory) or isinstance(factory, nn.Module):
        name = "factory" if rule is None else f"the factory of rule {rule.text}"
        what = described(factory)
        raise TypeError(f"{name} must be a function of path and module, not {what}")


def _make(
    paths: Sequence[str],
    modules: Sequence[nn.Module],
    factories: Iterable[Factory | None],
) -> list[nn.Module]:
    """Call the factory of each place."""
    news: list[nn.Module] = []
    for path, module, factory in zip(paths, modules, factories):
        if factory is None:
            news.append(module)
            continue
        try:
            new = factory(path, module)
        except Exception as error:
            note(error, f"while replacing {path!r} ({type(module).__name__})")
            raise
        if not issubclass(type(new), nn.Module):
            raise TypeError(
                f"the factory returned {described(new)} for {path!r} "
                f"({type(module).__name__}); it must return an mlx.nn.Module, "
                "the one it was given to change nothing"
            )
        news.append(new)
    return news


# ---------------------------------------------------------------- shared modules
#
# A *unit* is what changes as a whole: a tied module with all of its places, or
# one location with all of its paths.

Unit = int | Location  # the id of a tied module, or a location


def _units(places: Places, sharing: Sharing) -> list[Unit]:
    tied: dict[int, bool] = {}
    units: list[Unit] = []
    for module, location in zip(places.modules, places.locations()):
        layers = [
            module,
            *wrapped_layers(module),
        ]  # it may be in one place itself and wrapped in another
        if id(module) not in tied:
            is_shared = any(sharing.location_counts[id(layer)] > 1 for layer in layers)
            tied[id(module)] = is_shared and has_parameters(module)
        units.append(id(layers[-1]) if tied[id(module)] else location)
    return units


def _make_once(
    units: list[Unit], places: Places, rules: list[int], factories: Sequence[Factory | None]
) -> list[nn.Module]:
    """Call the factory of each unit, at its first place."""
    calls = list(zip(units, map(id, places.modules), rules))
    firsts = {call: at for at, call in reversed(list(enumerate(calls)))}
    order = sorted(firsts.values())
    made = _make(
        [places.paths[at] for at in order],
        [places.modules[at] for at in order],
        [factories[rules[at]] for at in order],
    )
    news = dict(zip((calls[at] for at in order), made))
    return [news[call] for call in calls]


def _check_units(
    units: list[Unit],
    places: Places,
    rules: list[int],
    news: list[nn.Module],
    sharing: Sharing,
    patterns: list[Parsed],
) -> None:
    """Each unit changes as a whole and by one rule, or does not change."""
    members: defaultdict[Unit, list[int]] = defaultdict(list)
    for at, unit in enumerate(units):
        members[unit].append(at)
    for unit, inside in members.items():
        if all(news[at] is places.modules[at] for at in inside):
            continue
        shared = unit if isinstance(unit, int) else unit[0]
        if len(inside) < sharing.path_counts[shared]:
            raise SelectionError(_partly(unit, places, inside, sharing))
        deciding = dict.fromkeys(rules[at] for at in inside)
        if len(deciding) > 1:
            paths = listed(repr(places.paths[at]) for at in inside)
            texts = listed(patterns[number].text for number in deciding)
            name = type(places.modules[inside[0]]).__name__
            raise SelectionError(
                f"{paths} are one and the same {name}, but different rules decide: {texts}; "
                "give it to one rule"
            )


def _partly(unit: Unit, places: Places, inside: list[int], sharing: Sharing) -> str:
    """That only some paths of a unit were chosen, and which are missing."""
    everywhere = find(places.model, Matcher([parse("**")]))
    chosen = {places.paths[at] for at in inside}
    others = [
        path
        for path, other in zip(everywhere.paths, _units(everywhere, sharing))
        if other == unit and path not in chosen
    ]
    path = places.paths[inside[0]]
    name = type(places.modules[inside[0]]).__name__
    missing = listed(map(repr, others))
    if isinstance(unit, int):
        what = f"{path!r} is tied: the same {name} is at {missing}"
    else:
        what = f"{path!r} is one place with {missing}: a module or list around it is shared"
    return f"{what}, which would not change; select all of them, or leave out with exclude={path!r}"


# ---------------------------------------------------------------- checks


def check_nesting(places: Places) -> None:
    """No place may lie inside another."""
    rows = places.ancestors()
    around = map(id, map(places.containers.__getitem__, rows))
    if set(map(id, places.modules)).isdisjoint(around):
        return
    outer_path = dict(zip(reversed(places.locations()), reversed(places.paths)))  # the first path
    outer = dict(zip(rows[1:], map(outer_path.get, places.container_locations(rows[1:]))))
    clear = {0}
    for path, row in zip(places.paths, places.rows):
        while row not in clear:
            if outer[row] is not None:
                raise SelectionError(
                    f"{path!r} lies inside {outer[row]!r}, and both would change; leave one "
                    f"of them out, with exclude={outer[row]!r} for instance"
                )
            clear.add(row)
            row = places.parents[row]


def check_aliases(places: Places, modules: list[nn.Module]) -> None:
    """Paths that lead to one place must get one module."""
    firsts: dict[Location, int] = {}
    for at, location in enumerate(places.locations()):
        first = firsts.setdefault(location, at)
        if modules[at] is not modules[first]:
            raise SelectionError(
                f"{places.paths[first]!r} and {places.paths[at]!r} are one place: a module or "
                "list around it is shared; give both paths the same module"
            )


def _check_names(places: Places) -> None:
    """No other place may print the path of one of these."""
    # Two paths that print alike part at a container that is around both places, where one of
    # two keys is no str or holds a dot.
    if any(type(key) is not str or "." in key for key in places.dict_keys()):
        check_different(find(places.model, literally(places.paths)).paths)


def check_different(paths: list[str]) -> None:
    for path, number in Counter(paths).items():
        if number > 1:
            raise SelectionError(
                f"{number} places print the path {path!r}, for instance by the keys 0 and '0' "
                "of one dict; rename one of the keys"
            )


def _check_cycles(
    places: Places, news: list[nn.Module], known: set[int]
) -> list[tuple[nn.Module, bool]]:
    """The model must not come to hold a cycle.

    Returns:
        The modules that are new to the model, and the training mode for each: that of
        the module that it replaces, or that is replaced by a module around it.
    """
    olds = places.modules
    training: list[tuple[nn.Module, bool]] = []
    met, seen = set[int](), set[int]()
    before: Sequence[nn.Module] = ()
    for mode, run in _runs(_modes(olds), news):
        seen.update(map(id, before))
        fresh, met_here = brought_in(run, known, seen)
        met, before = met | met_here, run
        if set(_modes(fresh)) != {mode}:
            training += [(new, mode) for new in fresh if id(unwrapped(new)) not in known]
    # In the common case a new module holds only the module that it replaces: no cycle.
    if met and not met <= set(map(id, olds)):
        sort_containers(places.model, dict(zip(places.locations(), news)))
    return training


def _modes(modules: Sequence[nn.Module]) -> list[bool]:
    try:
        return list(map(_MODE, modules))
    except AttributeError:  # a class that does not call `super().__init__()` has none
        return [getattr(module, "_training", True) for module in modules]


def _runs(modes: list[bool], news: list[nn.Module]) -> Iterator[tuple[bool, list[nn.Module]]]:
    """The new modules, in runs of one mode. In the common case there is one run."""
    if len(set(modes)) == 1:
        yield modes[0], news
        return
    for mode, run in groupby(zip(modes, news), key=itemgetter(0)):
        yield mode, [new for _, new in run]


def check_unmoved(places: Places, modules: Sequence[nn.Module], when: str) -> None:
    """The places must be where they were found, and hold ``modules``."""
    for at in (places.first_moved(), places.first_without(modules)):
        if at is not None:
            raise SelectionError(
                f"{places.paths[at]!r} was changed by someone else {when}; nothing was changed here"
            )
