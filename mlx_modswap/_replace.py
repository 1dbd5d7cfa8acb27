"""Chosen places -> a checked plan -> one ``update_modules`` call; undo."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import compress, groupby
from operator import attrgetter, is_not, itemgetter
from typing import Any, NamedTuple, TypeVar, overload

import mlx.nn as nn

from . import _hints
from ._errors import NoMatchError, SelectionError
from ._locations import (
    Location,
    Places,
    Sharing,
    brought_in,
    find,
    holds_array,
    nest,
    opened,
    sort_containers,
    survey,
    wrapped,
)
from ._pattern import Matcher, Parsed, Pattern, literally, parse
from ._report import Replacement
from ._select import Patterns, Where, check_model, choose, first_pattern, note, parse_argument

# Whatever stands at the path is what a factory is given: it may ask for an `nn.Linear`.
Factory = Callable[[str, Any], nn.Module]
AnyPattern = TypeVar("AnyPattern", str, re.Pattern[str], Pattern)  # a Mapping's keys are invariant
Rules = Mapping[AnyPattern, Factory | None]

_MODE = attrgetter("_training")


@overload
def replace_layers(
    model: nn.Module,
    pattern: Rules[AnyPattern],
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement: ...


@overload
def replace_layers(
    model: nn.Module,
    pattern: Patterns,
    factory: Factory,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement: ...


def replace_layers(
    model: nn.Module,
    pattern: Patterns | Rules[Any],
    factory: Factory | None = None,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement:
    """Replace the modules whose paths match a pattern with what a factory makes of them.

    Only the places that the arguments name change, or nothing does: every
    factory runs and every check passes before the model is touched, with one
    call of :meth:`mlx.nn.Module.update_modules`.

    * Factories are called in definition order. A factory that returns the
      module it was given leaves it alone.
    * A module with parameters that sits in several places is *tied*: the factory
      is called once and the new module goes to all of them.
    * New modules get the training mode of the module that they replace. Frozen
      state is not carried over: an adapter in a frozen model is trainable.

    Args:
        model (mlx.nn.Module): The model to change in place.
        pattern (str, re.Pattern, an iterable of them, or a mapping): The paths
            to replace. A mapping holds rules, a factory for each pattern: the
            first pattern that matches a path decides, and ``None`` leaves the
            path alone.
        factory (Callable): Called as ``factory(path, module)``, returns the new
            module. Not given with rules.
        where (type, tuple of types or Callable, optional): The modules to take
            of these. See :func:`select`. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave
            out. Default: ``()``.
        strict (bool): If ``True``, whatever does nothing is an error: a pattern
            or a rule that matches no module, a rule wholly shadowed by those
            before it, an ``exclude`` that removes nothing, a ``where`` that
            leaves nothing. Default: ``True``.

    Returns:
        Replacement: A mapping of path to new module, only of the places that
        changed. Print it to see the change.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, a rule, ``exclude`` or ``where`` does nothing.
        SelectionError: If a place to change lies inside another, is one of
            several places of a tied module of which others would not change,
            or cannot be reached by ``update_modules``; or if the model holds a
            cycle.
        TypeError: If an argument, or what a factory returns, is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import replace_layers
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> print(replace_layers(model, "layers[-1]", lambda path, layer: nn.Identity()))
        layers.2   Linear -> Identity   x1   4.2K -> 0 params   ...
    """
    plan = _plan(model, pattern, factory, where, exclude, strict)
    report = _report(plan)
    _update(plan.places, plan.places.modules, plan.news)
    return report


@overload
def swapped(
    model: nn.Module,
    pattern: Rules[AnyPattern],
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> AbstractContextManager[Replacement]: ...


@overload
def swapped(
    model: nn.Module,
    pattern: Patterns,
    factory: Factory,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> AbstractContextManager[Replacement]: ...


@contextmanager
def swapped(
    model: nn.Module,
    pattern: Patterns | Rules[Any],
    factory: Factory | None = None,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Iterator[Replacement]:
    """Replace modules for the length of a ``with`` block, then put the same ones back.

    Takes the arguments of :func:`replace_layers`. On the way out the identical
    modules return to their places, also when the block raises. A training mode
    that was set inside the block, with ``model.eval()`` say, stays with the
    modules that were in the model then.

    Yields:
        Replacement: What was changed.

    Raises:
        SelectionError: In addition to what :func:`replace_layers` raises, on the
            way out, if one of the places was changed by someone else meanwhile.
            Nothing is put back then. An error raised in the block wins.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import swapped
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> with swapped(model, "layers[0]", lambda path, layer: nn.Identity()):
        ...     print(model.layers[0])
        Identity()
        >>> print(model.layers[0])
        Linear(input_dims=4, output_dims=4, bias=True)
    """
    plan = _plan(model, pattern, factory, where, exclude, strict)
    report = _report(plan)
    _update(plan.places, plan.places.modules, plan.news)
    try:
        yield report
    except BaseException as error:
        try:
            _put_back(plan)
        except SelectionError as refusal:
            note(error, str(refusal))
        raise
    _put_back(plan)


def partial_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[Any, Any]:
    """Nest modules by path into what :meth:`mlx.nn.Module.update_modules` takes.

    Unlike :func:`mlx.utils.tree_unflatten` it follows the real containers of the
    model: keys that are digits or hold dots stay keys, and the entries of a list
    that are left alone are held by ``{}``.

    Args:
        model (mlx.nn.Module): The model that the paths belong to. It is not changed.
        modules (Mapping[str, mlx.nn.Module]): A module for each path. Paths are
            taken literally, as :meth:`mlx.nn.Module.named_modules` prints them.

    Returns:
        dict: The smallest nested dict that names these places.

    Raises:
        NoMatchError: If there is no module at a path.
        SelectionError: If a path lies inside another, if two places print it, or if
            two paths of one place are given different modules.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import partial_modules
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> partial_modules(model, {"layers.1": nn.Tanh()})
        {'layers': [{}, Tanh()]}
    """
    check_model(model)
    if not isinstance(modules, Mapping):
        raise TypeError(f"modules must map paths to modules, not {_hints.described(modules)}")
    for path, module in modules.items():
        if not isinstance(path, str):
            raise TypeError(f"a path is a str, not {_hints.described(path)}")
        if not issubclass(type(module), nn.Module):
            raise TypeError(f"{path!r} needs an mlx.nn.Module, not {_hints.described(module)}")
    places = find(model, literally(modules))
    found = set(places.paths)
    for path in modules:
        if path not in found:
            raise NoMatchError(_hints.no_place(model, path))
    _check_different(places.paths)
    _check_nesting(places)
    news = [modules[path] for path in places.paths]
    _check_aliases(places, news)
    return nest(places, news)


# ---------------------------------------------------------------- the plan


class _Plan(NamedTuple):
    """The places that change, with the modules that are there now, and the new ones."""

    places: Places
    news: list[nn.Module]


def _plan(
    model: nn.Module,
    pattern: Patterns | Rules[Any],
    factory: Factory | None,
    where: Where | None,
    exclude: Patterns,
    strict: bool,
) -> _Plan:
    """Select, call the factories, and check all that could go wrong. Changes nothing."""
    check_model(model)
    patterns, factories, as_rules = _rules(pattern, factory)
    excludes = parse_argument("exclude", exclude)
    places = choose(model, patterns, where, excludes, strict, as_rules=as_rules)
    known, sharing = survey(places)
    rules = {mask: first_pattern(mask) if as_rules else 0 for mask in set(places.masks)}
    numbers = list(map(rules.__getitem__, places.masks))
    if sharing:
        units = _units(places, sharing)
        news = _make_once(units, places, numbers, factories)
        _check_units(units, places, numbers, news, sharing, patterns)
    else:
        news = _make(places.paths, places.modules, map(factories.__getitem__, numbers))
    changes = list(map(is_not, news, places.modules))
    places.keep(changes)
    news = list(compress(news, changes))
    _check_nesting(places)
    _check_names(places)
    _bring_in(places, news, known)
    _check_unmoved(places, places.modules, "while the factories ran")
    places.forget()
    return _Plan(places, news)


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
        what = _hints.described(factory)
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
                f"the factory returned {_hints.described(new)} for {path!r} "
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
        layers = [module, *wrapped(module)]  # it may be in one place itself and wrapped in another
        if id(module) not in tied:
            is_shared = any(sharing.holders[id(layer)] > 1 for layer in layers)
            tied[id(module)] = is_shared and holds_array(module)
        units.append(id(layers[-1]) if tied[id(module)] else location)
    return units


def _make_once(
    units: list[Unit], places: Places, numbers: list[int], factories: Sequence[Factory | None]
) -> list[nn.Module]:
    """Call the factory of each unit, at its first place."""
    calls = list(zip(units, map(id, places.modules), numbers))
    firsts = {call: at for at, call in reversed(list(enumerate(calls)))}
    order = sorted(firsts.values())
    made = _make(
        [places.paths[at] for at in order],
        [places.modules[at] for at in order],
        [factories[numbers[at]] for at in order],
    )
    news = dict(zip((calls[at] for at in order), made))
    return [news[call] for call in calls]


def _check_units(
    units: list[Unit],
    places: Places,
    numbers: list[int],
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
        if len(inside) < sharing.ways[shared]:
            raise SelectionError(_partly(unit, places, inside, sharing))
        rules = dict.fromkeys(numbers[at] for at in inside)
        if len(rules) > 1:
            paths = _hints.listed(repr(places.paths[at]) for at in inside)
            texts = _hints.listed(patterns[number].text for number in rules)
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
    missing = _hints.listed(map(repr, others))
    if isinstance(unit, int):
        what = f"{path!r} is tied: the same {name} is at {missing}"
    else:
        what = f"{path!r} is one place with {missing}: a module or list around it is shared"
    return f"{what}, which would not change; select all of them, or leave out with exclude={path!r}"


# ---------------------------------------------------------------- checks


def _check_nesting(places: Places) -> None:
    """No place may lie inside another."""
    rows = places.around()
    outer = map(places.containers.__getitem__, rows)
    if set(map(type, outer)).isdisjoint(map(type, places.modules)):
        return
    holders, keys = places.holders(rows[1:])
    uppers = dict(zip(reversed(places.locations()), reversed(places.paths)))  # the first path
    inner = dict(zip(rows[1:], map(uppers.get, zip(map(id, holders), keys))))
    clear = {0}
    for path, row in zip(places.paths, places.inside):
        while row not in clear:
            upper = inner[row]
            if upper is not None:
                raise SelectionError(
                    f"{path!r} lies inside {upper!r}, and both would change; leave one "
                    f"of them out, with exclude={upper!r} for instance"
                )
            clear.add(row)
            row = places.above[row]


def _check_aliases(places: Places, modules: list[nn.Module]) -> None:
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
    if places.odd_keys:
        _check_different(find(places.model, literally(places.paths)).paths)


def _check_different(paths: list[str]) -> None:
    for path, number in Counter(paths).items():
        if number > 1:
            raise SelectionError(
                f"{number} places print the path {path!r}, for instance by the keys 0 and '0' "
                "of one dict; rename one of the keys"
            )


def _bring_in(places: Places, news: list[nn.Module], known: set[int]) -> None:
    """Give the training mode of the old modules to what the new ones bring into the model.

    Raises:
        SelectionError: If the model would hold a cycle.
    """
    olds = places.modules
    met, seen = set[int](), set[int]()
    before: Sequence[nn.Module] = ()
    for mode, run in _runs(_modes(olds), news):
        seen.update(map(id, before))
        fresh, met_here = brought_in(run, known, seen)
        met, before = met | met_here, run
        if set(_modes(fresh)) != {mode}:
            for module in fresh:
                if id(opened(module)) not in known:
                    _set_mode(module, mode)
    # New modules mostly wrap the module that they replace, which cannot close a cycle.
    if met and not met <= set(map(id, olds)):
        sort_containers(places.model, dict(zip(places.locations(), news)))


def _modes(modules: Sequence[nn.Module]) -> list[bool]:
    try:
        return list(map(_MODE, modules))
    except AttributeError:  # a class that does not call `super().__init__()` has none
        return [getattr(module, "_training", True) for module in modules]


def _runs(modes: list[bool], news: list[nn.Module]) -> Iterator[tuple[bool, list[nn.Module]]]:
    """The new modules, in runs of one mode. Mostly there is one run."""
    if len(set(modes)) == 1:
        yield modes[0], news
        return
    for mode, run in groupby(zip(modes, news), key=itemgetter(0)):
        yield mode, [new for _, new in run]


def _set_mode(module: nn.Module, mode: bool) -> None:
    """Set the mode of one module and not of those inside, as ``train`` does for each."""
    if hasattr(module, "_set_training_mode"):
        module._set_training_mode(mode)
    else:  # MLX before 0.30
        module._training = mode


def _check_unmoved(places: Places, modules: Sequence[nn.Module], when: str) -> None:
    """The places must be where they were found, and hold ``modules``."""
    for at in (places.first_moved(), places.first_without(modules)):
        if at is not None:
            raise SelectionError(
                f"{places.paths[at]!r} was changed by someone else {when}; nothing was changed here"
            )


# ---------------------------------------------------------------- the change


def _update(places: Places, olds: Sequence[nn.Module], news: Sequence[nn.Module]) -> None:
    """Put ``news`` into the places, which hold ``olds``, with one native call."""
    model = places.model
    try:
        nn.Module.update_modules(model, nest(places, news))
        if (at := places.first_without(news)) is not None:
            raise SelectionError(f"MLX's update_modules left {places.paths[at]!r} as it was")
    except BaseException as error:
        # The same partial dict takes the same way through the model and ends where
        # this one did, so it restores exactly what was replaced.
        with suppress(Exception):
            nn.Module.update_modules(model, nest(places, olds))
        if not isinstance(error, Exception):
            raise
        message = _unreachable(places, error)
        if (number := places.first_without(olds)) is not None:
            path = places.paths[number]
            message = f"MLX's update_modules failed, and so did putting {path!r} back: {error}"
        raise SelectionError(message) from error


def _unreachable(places: Places, error: Exception) -> str:
    if isinstance(error, RecursionError):
        depth = 1 + max(path.count(".") for path in places.paths)
        return (
            f"a place that is {depth} levels deep cannot be changed: MLX's update_modules goes "
            "down by recursion, which Python limits (sys.setrecursionlimit); nothing was changed"
        )
    return f"MLX's update_modules failed, and nothing was changed: {error}"


def _put_back(plan: _Plan) -> None:
    try:
        _restore(plan)
    except KeyboardInterrupt:  # an update that is interrupted leaves the new modules there
        _restore(plan)
        raise


def _restore(plan: _Plan) -> None:
    _check_unmoved(plan.places, plan.news, "inside the block")
    _update(plan.places, plan.news, plan.places.modules)


def _report(plan: _Plan) -> Replacement:
    places = plan.places
    return Replacement(places.paths, places.modules, plan.news, places.odd_keys)
