"""Every container of a model once: what is shared, what is tied, whether there is a cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from ._containers import (
    MODULE,
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
    """How often each container is held in a model in which something is in several places.

    Attributes:
        order (list): Every container once, each before all that it holds.
        path_counts (dict[int, int]): How many paths lead to each container, by ``id``.
        location_counts (Counter[int]): How many locations hold each container, by ``id``.

    Raises:
        SelectionError: If the model holds a cycle, or more paths than anyone can walk.
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
                f"more than {_MOST_PATHS:,} paths lead through this model: modules in several "
                "places hold modules in several places, again and again"
            )


class Visited(NamedTuple):
    """What a walk came by, for :func:`survey` to go on from.

    Attributes:
        seen (list): All containers that the walk came by, one in several places once for each.
        skipped (list): Those among them that it did not look into.
        sharing (list): The :class:`Sharing` of the model, if the walk had to find it out.
    """

    seen: list[Container]
    skipped: list[Container]
    sharing: list[Sharing]


def survey(model: nn.Module, visited: Visited) -> tuple[set[int], Sharing | None]:
    """Visit the containers that a walk left out.

    It goes level by level with loops in C, the cheapest way to see all of a model.

    Returns:
        The ``id`` of every container in the model; and how things are shared, or
        ``None`` if nothing is in several places.
    """
    kinds = Kinds()
    seen, level = visited.seen, visited.skipped
    ids = set(map(id, seen))
    while level and len(ids) == len(seen):
        level = child_containers(level, kinds)
        seen.extend(level)  # held, so that no other object gets the id of one
        ids.update(map(id, level))
    if len(ids) == len(seen):
        return ids, None
    sharing = visited.sharing[0] if visited.sharing else Sharing(model)
    return set(sharing.path_counts), sharing


def sort_containers(model: nn.Module, swaps: Swaps | None = None) -> list[Container]:
    """Every container once, each before all that it holds.

    Args:
        model (nn.Module): Where to begin.
        swaps (dict, optional): Modules to go on with at some locations instead of
            those in the model.

    Raises:
        SelectionError: If a container holds itself, at any depth.
    """
    order: list[Container] = []
    done, path_of = set[int](), {id(model): ""}  # `path_of`: those on the way to this one
    stack: list[tuple[Container, str, Iterator[tuple[Any, Any]]]] = [
        (model, "", _child_entries(model, swaps))
    ]
    while stack:
        container, prefix, children = stack[-1]
        for key, value in children:
            path = f"{prefix}{key}"
            if id(value) in path_of:
                ancestor = path_of[id(value)][:-1]
                again = repr(shorten(ancestor)) if ancestor else "the model itself"
                raise SelectionError(f"the model holds a cycle: {shorten(path)!r} is {again} again")
            if id(value) not in done:
                path_of[id(value)] = path + "."
                stack.append((value, path + ".", _child_entries(value, swaps)))
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
    """The modules that ``modules`` would add to a model.

    A factory may return a fresh layer, one that holds the layer it replaces (LoRA), or
    one that the model has elsewhere. The search goes down level by level from
    ``modules`` and stops at every container that is in the model already or was
    reached before, so it visits each new container once. A module of ``modules``
    itself that the model has already stops the search too. The ids of the places where
    it stopped decide whether a cycle is possible: a swap can close one only if a new
    module leads back into the model, and to something other than the module that it
    replaces. Without them every swap of a LoRA layer would have to sort the whole
    model to rule a cycle out.

    Args:
        modules (sequence of nn.Module): The modules to put in.
        known (set[int]): The ids of the containers of the model.
        seen (set[int]): The ids of what earlier calls visited; this call adds its own.

    Returns:
        The modules that are new to the model, and the ids of those reached that are not.
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
    """The ids of a module and of all containers inside it."""
    kinds = Kinds()
    ids: set[int] = set()
    level: list[Any] = [module]
    while level := [one for one in level if id(one) not in ids]:
        ids.update(map(id, level))
        level = child_containers(level, kinds)
    return ids
