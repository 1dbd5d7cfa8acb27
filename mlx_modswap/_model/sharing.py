"""Visit each container of a model once: find what is shared or tied, and whether it has a cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn

from .._errors import SelectionError, shorten
from .containers import (
    WRAPPED,
    Container,
    Kinds,
    Location,
    child_containers,
    is_container,
    raw_entries,
    values,
)

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
                raise SelectionError(f"the model contains a cycle: {path!r} is {again} again")
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
