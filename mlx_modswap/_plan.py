"""Call the factories for the chosen places, and check the result. The model does not change."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from itertools import compress, groupby
from operator import attrgetter, is_not, itemgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import mlx.nn as nn

from ._containers import (
    Kinds,
    Location,
    child_containers,
    has_parameters,
    unwrapped,
    wrapped_layers,
)
from ._errors import SelectionError, described, listed, note_misuse
from ._fold import fold, is_plain, pattern_of
from ._match import Patterns, Rule, Where, parse_argument
from ._pattern import Matcher, Parsed, Pattern, literally, parse
from ._select import check_model, choose
from ._sharing import Sharing, brought_in, ids_inside, sort_containers, survey
from ._walk import Places, find

# A factory may be annotated to take an `nn.Linear`, so the module is an `Any` here.
Factory = Callable[[str, Any], nn.Module]


_Key = TypeVar("_Key", covariant=True)
_Value = TypeVar("_Value", covariant=True)


class _Mapping(Protocol[_Key, _Value]):
    """A mapping, as far as a type checker is concerned.

    A ``Mapping`` is invariant in its keys, so a type checker would not accept a ``dict`` with
    keys of type ``str`` as a mapping from patterns. This protocol has only ``items()``, which
    such a ``dict`` satisfies.
    """

    def items(self) -> ItemsView[_Key, _Value]: ...


Rules = _Mapping[Pattern | tuple[Pattern, ...], Factory | None]

_MODE = attrgetter("_training")


class Plan(NamedTuple):
    """A swap that has passed every check.

    Attributes:
        places (Places): The places that change, with the modules that are there now.
        news (list[nn.Module]): The new module of each place.
        rules (list[int]): The number of the rule that decided each place.
        training (list): The modules that are new to the model, each with the training
            mode that it will get.
        patterns (list[Parsed]): The patterns of all rules.
    """

    places: Places
    news: list[nn.Module]
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
    rules, factories = _rules(model, pattern, factory)
    excludes = parse_argument(model, "exclude", exclude)
    places, deciding, left_alone = choose(model, rules, where, excludes, strict)
    # `containers` keeps all of them alive to the end: a factory may delete parts of the model,
    # and a new module must not get the id of a deleted container.
    containers, sharing = survey(model)
    if sharing:
        units = _units(places, sharing)
        news = _make_once(units, places, deciding, factories)
        _check_units(units, places, deciding, news, sharing, rules)
    else:
        news = _make(places.paths, places.modules, map(factories.__getitem__, deciding))
    changes = list(map(is_not, news, places.modules))
    places.keep(changes)
    news, deciding = list(compress(news, changes)), list(compress(deciding, changes))
    if not nested:
        check_nesting(places, _NESTED)
    _check_left_alone(places, news, left_alone)
    _check_names(places)
    training = _check_cycles(places, news, set(map(id, containers)))
    check_unmoved(places, places.modules, _MOVED)
    return Plan(places, news, deciding, training, [one for rule in rules for one in rule.patterns])


_NESTED = "and both would change; exclude the inner one ({exclude}), or select only {outer!r}"
_MOVED = "{path!r} was modified while the factories ran; the swap was not applied"
_MENDED_FACTORY = "lambda path, layer: {}(layer)"


def _rules(model: nn.Module, pattern: Any, factory: Any) -> tuple[list[Rule], list[Factory | None]]:
    """Return the rules and their factories; patterns that are not in a mapping are one rule."""
    if not isinstance(pattern, Mapping) or isinstance(pattern, nn.Module):
        rule = Rule(parse_argument(model, "pattern", pattern))
        _check_factory(factory)
        return [rule], [factory]
    if factory is not None:
        raise TypeError("rules hold their own factories: leave the factory out")
    rules: list[Rule] = []
    for key, made_by in pattern.items():
        patterns = parse_argument(model, "pattern", key if isinstance(key, tuple) else (key,))
        rule = Rule(patterns, key, made_by is None)
        rules.append(rule)
        if made_by is not None:
            _check_factory(made_by, rule)
    return rules, list(pattern.values())


def _check_factory(factory: Any, rule: Rule | None = None) -> None:
    # A module is callable, but it takes arrays and returns arrays.
    if not callable(factory) or isinstance(factory, nn.Module):
        name = f"the factory of rule {rule.text}" if rule else "factory"
        what = described(factory)
        raise TypeError(f"{name} must be a function of path and module, not {what}")


def _make(
    paths: Sequence[str],
    modules: Sequence[nn.Module],
    factories: Iterable[Factory | None],
) -> list[nn.Module]:
    """Call the factory of each place, and return the new modules."""
    news: list[nn.Module] = []
    for path, module, factory in zip(paths, modules, factories):
        if factory is None:
            news.append(module)
            continue
        try:
            new = factory(path, module)
        except Exception as error:
            error.add_note(f"while replacing {path!r} ({type(module).__name__})")
            note_misuse(error, factory, path, "factory(path, module)", _MENDED_FACTORY)
            raise
        if not issubclass(type(new), nn.Module):
            raise TypeError(
                f"the factory returned {described(new)} for {path!r} "
                f"({type(module).__name__}); it must return an mlx.nn.Module; return the module "
                "it was given to leave it unchanged"
            )
        news.append(new)
    return news


# ---------------------------------------------------------------- shared modules
#
# A *unit* can only change as a whole: a tied module with all of its places, or
# one location with all of its paths.

Unit = int | Location  # the id of a tied module, or a location


def _units(places: Places, sharing: Sharing) -> list[Unit]:
    tied: dict[int, bool] = {}
    units: list[Unit] = []
    for module, location in zip(places.modules, places.locations()):
        layers = [module, *wrapped_layers(module)]  # one place may hold a wrapper, another a layer
        if id(module) not in tied:
            is_shared = any(sharing.location_counts[id(layer)] > 1 for layer in layers)
            tied[id(module)] = is_shared and has_parameters(module)
        units.append(id(layers[-1]) if tied[id(module)] else location)
    return units


def _make_once(
    units: list[Unit], places: Places, rules: list[int], factories: Sequence[Factory | None]
) -> list[nn.Module]:
    """Call the factory of each unit once, at its first place; return the modules of all places."""
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
    deciding: list[int],
    news: list[nn.Module],
    sharing: Sharing,
    rules: list[Rule],
) -> None:
    """Check that each unit changes as a whole and by one rule, or does not change."""
    members: defaultdict[Unit, list[int]] = defaultdict(list)
    for at, unit in enumerate(units):
        members[unit].append(at)
    for unit, inside in members.items():
        if all(news[at] is places.modules[at] for at in inside):
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
    found = zip(everywhere.paths, _units(everywhere, sharing))
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
            f"selected; select {choice} ({_excluding(chosen)}); to untie them, use "
            f"model.update_modules(partial_modules(model, {{{chosen[0]!r}: new}}))"
        )
    names = list(map(repr, paths))
    these = " and ".join(names) if is_pair else listed(names)
    choice = "both paths, or neither" if is_pair else "all of these paths, or none"
    return (
        f"{these} are the same place, because a module or list that contains it is shared; "
        f"select {choice} ({_excluding(chosen)})"
    )


def _excluding(paths: Sequence[str]) -> str:
    """Return the argument that excludes some paths, as Python code."""
    products = [product for product, _ in fold([path.split(".") for path in paths])]
    patterns = [pattern_of(one) if not is_plain(one) else repr(pattern_of(one)) for one in products]
    return f"exclude={patterns[0]}" if len(patterns) == 1 else f"exclude=[{', '.join(patterns)}]"


# ---------------------------------------------------------------- checks


def check_nesting(places: Places, advice: str) -> None:
    """Check that no place lies inside another; ``advice`` ends the message of the error."""
    rows = places.ancestors()
    around = set(map(id, map(places.containers.__getitem__, rows)))
    if around.isdisjoint(map(id, places.modules)):
        return
    outer_path = dict(zip(reversed(places.locations()), reversed(places.paths)))  # the first path
    outer = dict(zip(rows[1:], map(outer_path.get, places.container_locations(rows[1:]))))
    clear = {0}
    for path, row in zip(places.paths, places.rows):
        while row not in clear:
            if outer[row] is not None:
                advice = advice.format(exclude=_excluding([path]), outer=outer[row])
                raise SelectionError(f"{path!r} lies inside {outer[row]!r}, {advice}")
            clear.add(row)
            row = places.parents[row]


def _check_left_alone(
    places: Places, news: list[nn.Module], left_alone: list[tuple[str, nn.Module]]
) -> None:
    """Check that each place that is left alone is still inside the new modules around it."""
    if not left_alone or not child_containers(places.modules, Kinds()):
        return
    number_of = {path: number for number, path in enumerate(places.paths)}
    reached: dict[int, tuple[set[int], set[int]]] = {}  # ids inside the old and the new module
    for path, module in left_alone:
        for outer in _prefixes(path):
            if outer not in number_of:
                continue
            number = number_of[outer]
            if number not in reached:
                reached[number] = ids_inside(places.modules[number]), ids_inside(news[number])
            before, after = reached[number]
            # A key may contain dots: then the path of a place may begin with the path of another
            # place that does not contain it.
            if id(module) in before and id(module) not in after:
                raise SelectionError(
                    f"{path!r} was to be left alone, but the new module for {outer!r} does not "
                    f"hold it; keep it in the new module, or leave {outer!r} alone too"
                )


def _prefixes(path: str) -> Iterator[str]:
    """Yield the shorter paths that a path begins with, the longest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def check_aliases(places: Places, modules: list[nn.Module]) -> None:
    """Check that paths that lead to the same place get the same module."""
    firsts: dict[Location, int] = {}
    for at, location in enumerate(places.locations()):
        first = firsts.setdefault(location, at)
        if modules[at] is not modules[first]:
            raise SelectionError(
                f"{places.paths[first]!r} and {places.paths[at]!r} are the same place, because a "
                "module or list that contains it is shared; give both paths the same module"
            )


def _check_names(places: Places) -> None:
    """Check that no other place in the model has the path of one of these places."""
    # Two places can have equal paths only if some container around both has a key that is not
    # a str or that contains a dot.
    if any(type(key) is not str or "." in key for key in places.dict_keys()):
        check_different(find(places.model, literally(places.paths)).paths)


def check_different(paths: list[str]) -> None:
    """Check that no two places have the same path."""
    for path, number in Counter(paths).items():
        if number > 1:
            raise SelectionError(
                f"{number} places have the path {path!r}, as the keys 0 and '0' of one dict do; "
                "rename one of the keys"
            )


def _check_cycles(
    places: Places, news: list[nn.Module], known: set[int]
) -> list[tuple[nn.Module, bool]]:
    """Check that the swap creates no cycle in the model.

    Returns:
        The modules that are new to the model, each with its training mode: the mode of the
        module that it replaces, or that the new module around it replaces.
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
    # In the common case, the only old module inside a new module is the one that it replaces, so
    # there is no cycle.
    if met and not met <= set(map(id, olds)):
        sort_containers(places.model, dict(zip(places.locations(), news)))
    return training


def _modes(modules: Sequence[nn.Module]) -> list[bool]:
    try:
        return list(map(_MODE, modules))
    except AttributeError:  # a class that does not call `super().__init__()` has no mode
        return [getattr(module, "_training", True) for module in modules]


def _runs(modes: list[bool], news: list[nn.Module]) -> Iterator[tuple[bool, list[nn.Module]]]:
    """Yield the new modules in runs of one mode; in the common case there is one run."""
    if len(set(modes)) == 1:
        yield modes[0], news
        return
    for mode, run in groupby(zip(modes, news), key=itemgetter(0)):
        yield mode, [new for _, new in run]


def check_unmoved(places: Places, modules: Sequence[nn.Module], message: str) -> None:
    """Check that the places are where they were found, and that they hold ``modules``."""
    for at in (places.first_moved(), places.first_without(modules)):
        if at is not None:
            raise SelectionError(message.format(path=places.paths[at]))
