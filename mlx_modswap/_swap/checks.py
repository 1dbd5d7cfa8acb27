"""Checks of the new modules and of their places. Nothing here changes a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import mlx.nn as nn

from .._errors import SelectionError
from .._model.containers import MODULE, Kinds, Location, child_containers, unwrapped
from .._model.sharing import sort_containers
from .._model.walk import Places, find
from .._patterns.fold import fold, is_plain, pattern_of
from .._patterns.match import literally


def new_modules_in(
    modules: Sequence[nn.Module], known: set[int], seen: set[int]
) -> tuple[list[nn.Module], set[int]]:
    """Find the modules that ``modules`` would add to a model.

    A factory may return a new_to_model layer, a layer that holds the one it replaces (LoRA), or
    a layer that is elsewhere in the model. The search goes down from ``modules``, level
    by level, and stops at every container that is in the model already or was reached
    before, so it visits each new container once. It stops at a module of ``modules``,
    too, if the model already contains it. The ids of the containers at which it stopped
    show whether a cycle is possible: a swap can close a cycle only if a new module leads
    back into the model, to something other than the module that it replaces. Without
    these ids, every swap to LoRA would have to sort the whole model to rule out a cycle.

    Args:
        modules (sequence of nn.Module): The modules to put in.
        known (set[int]): The ids of the containers of the model.
        seen (set[int]): The ids of what earlier calls visited; this call adds its own.

    Returns:
        The modules that are new to the model, and the ids of the containers at which the
        search stopped.
    """
    kinds = Kinds()
    new_to_model: list[nn.Module] = []
    reached: set[int] = set()
    level: Sequence[Any] = modules
    while level:
        if level is not modules or seen or not known.isdisjoint(map(id, level)):
            ids = set(map(id, level))
            old = ids & known | ids & seen
            if old or len(ids) < len(level):
                reached |= old
                level = [v for key, v in dict(zip(map(id, level), level)).items() if key not in old]
            seen |= ids
        new_to_model += (
            level if level is modules else (v for v in level if kinds[type(v)] == MODULE)
        )
        level = child_containers(level, kinds)
    return new_to_model, reached


def ids_inside(module: nn.Module) -> set[int]:
    """Return the ids of a module and of all containers inside it."""
    kinds = Kinds()
    ids: set[int] = set()
    level: list[Any] = [module]
    while level := [one for one in level if id(one) not in ids]:
        ids.update(map(id, level))
        level = child_containers(level, kinds)
    return ids


_MODE = attrgetter("_training")


def excluding(paths: Sequence[str]) -> str:
    """Return the argument that excludes some paths, as Python code."""
    products = [product for product, _ in fold([path.split(".") for path in paths])]
    patterns = [pattern_of(one) if not is_plain(one) else repr(pattern_of(one)) for one in products]
    return f"exclude={patterns[0]}" if len(patterns) == 1 else f"exclude=[{', '.join(patterns)}]"


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
                advice = advice.format(exclude=excluding([path]), outer=outer[row])
                raise SelectionError(f"{path!r} lies inside {outer[row]!r}, {advice}")
            clear.add(row)
            row = places.parents[row]


def check_left_alone(
    places: Places, new_modules: list[nn.Module], left_alone: list[tuple[str, nn.Module]]
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
                reached[number] = (
                    ids_inside(places.modules[number]),
                    ids_inside(new_modules[number]),
                )
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


def check_names(places: Places) -> None:
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


def check_cycles(
    places: Places, new_modules: list[nn.Module], known: set[int]
) -> list[tuple[nn.Module, bool]]:
    """Check that the swap creates no cycle in the model.

    Returns:
        The modules that are new to the model, each with its training mode: the mode of the
        module that it replaces, or that the new module around it replaces.
    """
    old_modules = places.modules
    training: list[tuple[nn.Module, bool]] = []
    reached, seen = set[int](), set[int]()
    before: Sequence[nn.Module] = ()
    for mode, run in _runs(_modes(old_modules), new_modules):
        seen.update(map(id, before))
        new_to_model, reached_here = new_modules_in(run, known, seen)
        reached, before = reached | reached_here, run
        if set(_modes(new_to_model)) != {mode}:
            training += [(new, mode) for new in new_to_model if id(unwrapped(new)) not in known]
    # In the common case, the only old module inside a new module is the one that it replaces, so
    # there is no cycle.
    if reached and not reached <= set(map(id, old_modules)):
        sort_containers(places.model, dict(zip(places.locations(), new_modules)))
    return training


def _modes(modules: Sequence[nn.Module]) -> list[bool]:
    try:
        return list(map(_MODE, modules))
    except AttributeError:  # a class that does not call `super().__init__()` has no mode
        return [getattr(module, "_training", True) for module in modules]


def _runs(
    modes: list[bool], new_modules: list[nn.Module]
) -> Iterator[tuple[bool, list[nn.Module]]]:
    """Yield the new modules in runs of one mode; in the common case there is one run."""
    if len(set(modes)) == 1:
        yield modes[0], new_modules
        return
    for mode, run in groupby(zip(modes, new_modules), key=itemgetter(0)):
        yield mode, [new for _, new in run]


def check_unmoved(places: Places, modules: Sequence[nn.Module], message: str) -> None:
    """Check that the places are where they were found, and that they hold ``modules``."""
    for at in (places.first_moved(), places.first_without(modules)):
        if at is not None:
            raise SelectionError(message.format(path=places.paths[at]))
