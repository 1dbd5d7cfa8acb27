"""Visit each container of a model once: find what is shared or tied, and whether it has a cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.nn as nn

from ._containers import (
    MODULE,
    WRAPPED,
    Container,
    Kinds,
    Location,
    child_containers,
    is_container,
    raw_entries,
    values,
)
from ._errors import SelectionError, shorten

Swaps = Mapping[Location, nn.Module]

_MOST_PATHS = 10_000_000


class Sharing:
    """How many paths lead to each container of a model, and how many locations hold it.

    Attributes:
        order (list): Every container once, each before all that it holds.
        path_counts (dict[int, int]): How many paths lead to each container, by ``id``.
        location_counts (Counter[int]): How many locations hold each container, by ``id``.

    Raises:
        SelectionError: If the model contains a cycle, or too many paths to walk them all.
    """

    __slots__ = ("location_counts", "order", "path_counts")

    def __init__(self, model: nn.Module):
        self.order = sort_containers(model)
        self.location_counts: Counter[int] = Counter()
        self.path_counts = dict.fromkeys(map(id, self.order), 0)
        self.path_counts[id(model)] = 1
        for container in self.order:
            for value in filter(is_container, values(container)):
                self.path_counts[id(value)] += self.path_counts[id(container)]
                self.location_counts[id(value)] += 1
        if sum(self.path_counts.values()) > _MOST_PATHS:
            raise SelectionError(
                f"more than {_MOST_PATHS:,} paths lead through this model: shared modules "
                "hold other shared modules, at many levels"
            )


def survey(model: nn.Module) -> tuple[list[Container], Sharing | None]:
    """Visit every container, level by level with loops in C: the cheapest way to see a model.

    Returns:
        The containers; and the :class:`Sharing` of the model, or ``None`` if nothing is in
        several places.
    """
    kinds = Kinds()
    seen: list[Container] = [model]
    level: list[Container] = [model]
    ids = {id(model)}
    while level and len(ids) == len(seen):
        level = child_containers(level, kinds)
        seen.extend(level)
        ids.update(map(id, level))
    if len(ids) == len(seen):
        return seen, None
    sharing = Sharing(model)
    return sharing.order, sharing


def sort_containers(model: nn.Module, swaps: Swaps | None = None) -> list[Container]:
    """List every container once, each before all that it holds.

    Args:
        model (nn.Module): The model.
        swaps (dict, optional): Modules to use at some locations instead of those in the
            model.

    Raises:
        SelectionError: If a container holds itself, at any depth.
    """
    order: list[Container] = []
    done = set[int]()
    path_of = {id(model): ""}  # of the containers on the stack, each with a dot at the end
    stack: list[tuple[Container, str, Iterator[tuple[Any, Any]]]] = [
        (model, "", _child_entries(model, swaps))
    ]
    while stack:
        container, prefix, children = stack[-1]
        for key, value in children:
            inside = prefix if key == WRAPPED else f"{prefix}{key}."
            if id(value) in path_of:
                path, ancestor = shorten(inside[:-1]), path_of[id(value)][:-1]
                again = repr(shorten(ancestor)) if ancestor else "the model itself"
                raise SelectionError(f"the model holds a cycle: {path!r} is {again} again")
            if id(value) not in done:
                path_of[id(value)] = inside
                stack.append((value, inside, _child_entries(value, swaps)))
                break
        else:
            stack.pop()
            del path_of[id(container)]
            done.add(id(container))
            order.append(container)
    order.reverse()
    return order


def _child_entries(container: Container, swaps: Swaps | None) -> Iterator[tuple[Any, Any]]:
    for key, value in raw_entries(container):
        if swaps:
            value = swaps.get((id(container), key), value)
        if is_container(value):
            yield key, value


def brought_in(
    modules: Sequence[nn.Module], known: set[int], seen: set[int]
) -> tuple[list[nn.Module], set[int]]:
    """Find the modules that ``modules`` would add to a model.

    A factory may return a fresh layer, a layer that holds the one it replaces (LoRA), or
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
    fresh: list[nn.Module] = []
    met: set[int] = set()
    level: Sequence[Any] = modules
    while level:
        if level is not modules or seen or not known.isdisjoint(map(id, level)):
            ids = set(map(id, level))
            old = ids & known | ids & seen
            if old or len(ids) < len(level):
                met |= old
                level = [v for key, v in dict(zip(map(id, level), level)).items() if key not in old]
            seen |= ids
        fresh += level if level is modules else (v for v in level if kinds[type(v)] == MODULE)
        level = child_containers(level, kinds)
    return fresh, met


def ids_inside(module: nn.Module) -> set[int]:
    """Return the ids of a module and of all containers inside it."""
    kinds = Kinds()
    ids: set[int] = set()
    level: list[Any] = [module]
    while level := [one for one in level if id(one) not in ids]:
        ids.update(map(id, level))
        level = child_containers(level, kinds)
    return ids
