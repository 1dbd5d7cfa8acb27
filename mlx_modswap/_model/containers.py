"""The containers of MLX: their kinds, their entries, and what one module holds.

MLX finds a child module inside modules, dicts and lists, at any depth. A
*container* is a module, a dict or a list; a *location* is a container and a key
in it. Modules are dicts whose classes may override ``__len__``, ``__iter__`` or
``__getitem__``, so the functions here call only the methods of ``dict`` and
``list`` themselves, and compare modules only by identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Container = dict[Any, Any] | list[Any]
Location = tuple[int, Any]  # the id of a container, and a key in it
Keys = tuple[Any, ...]  # the keys on the way from one container to another
Segments = tuple[str | int, ...]  # of a path; an int is an index of a list

WRAPPED = "(wrapped)"  # the key of the layer in a Wrapper

MODULE, DICT, LIST = 3, 2, 1  # the kinds of containers; 0 is anything else


class Kinds(dict[type, int]):
    """A cache: for each type, the kind of container that its values are.

    Attributes:
        others (set[type]): The types seen so far whose values are not containers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: set[type] = set()

    def __missing__(self, cls: type) -> int:
        if issubclass(cls, dict):
            kind = MODULE if issubclass(cls, nn.Module) else DICT
        else:
            kind = LIST if issubclass(cls, list) else 0
        if not kind:
            self.others.add(cls)
        self[cls] = kind
        return kind


def is_container(value: Any) -> bool:
    """Return whether a value is a module, a dict or a list."""
    return issubclass(type(value), (dict, list))


def wrapped_layers(container: Container) -> list[dict[Any, Any]]:
    """Return the layers under a ``Wrapper``, outermost first; empty for anything else."""
    layers: list[dict[Any, Any]] = []
    while isinstance(container, dict) and isinstance(layer := dict.get(container, WRAPPED), dict):
        layers.append(layer)
        container = layer
    return layers


def unwrapped(container: Container) -> Container:
    """Return the innermost layer under a ``Wrapper``, or anything else as it is."""
    layers = wrapped_layers(container)
    return layers[-1] if layers else container


def entries(container: Container) -> Iterator[tuple[Any, Any]]:
    """Return the keys and values of a container in order; for a ``Wrapper``, its layer's."""
    return raw_entries(unwrapped(container))


def raw_entries(container: Container) -> Iterator[tuple[Any, Any]]:
    """Return the keys and values that a container itself holds, in order."""
    if isinstance(container, dict):
        return iter(dict.items(container))
    return enumerate(list.__iter__(container))


def values(container: Container) -> Iterable[Any]:
    """Return the values that a container itself holds, in order."""
    if isinstance(container, dict):
        return dict.values(container)
    return list.__iter__(container)


def value_at(container: Container, key: Any) -> Any:
    """Return the value that a container itself holds at a key, or ``None``."""
    if isinstance(container, dict):
        return dict.get(container, key)
    return list.__getitem__(container, key) if key < list.__len__(container) else None


def values_at(containers: list[Container], keys: list[Any]) -> list[Any]:
    """Return the value of each container at its key."""
    getters: list[Any] = [dict.get, list.__getitem__]
    for get in getters:  # the common case: all are dicts, or all are lists
        try:
            return list(map(get, containers, keys))
        except (TypeError, IndexError):
            continue
    return list(map(value_at, containers, keys))


def child_containers(containers: Sequence[Any], kinds: Kinds) -> list[Any]:
    """Return the containers directly inside some containers."""
    try:
        held = list(chain.from_iterable(map(dict.values, containers)))
    except TypeError:  # some of them are lists
        held = list(chain.from_iterable(map(values, containers)))
    return list(compress(held, map(kinds.__getitem__, map(type, held))))


# ---------------------------------------------------------------- what one module holds


def own_values(
    container: Container,
) -> Iterator[tuple[tuple[str | int, ...], Container, Keys, Any]]:
    """Yield every value that a module itself holds, in order, also in its lists and dicts.

    A child module is one of these values, but what the child holds is not.

    Yields:
        The segments of the path to a value, the container that holds it, the keys that lead
        to it, and the value.
    """
    waiting: list[tuple[Any, ...]] = [((), container, (), container)]
    while waiting:
        path, holder, keys, value = waiting.pop()
        if keys and (issubclass(type(value), nn.Module) or not is_container(value)):
            yield path, holder, keys, value
            continue
        holder = unwrapped(value)
        is_list = isinstance(holder, list)
        held = [
            ((*path, *([key] if is_list else str(key).split("."))), holder, (*keys, key), one)
            for key, one in entries(holder)
        ]
        waiting.extend(reversed(held))


def is_private(path: Sequence[str | int]) -> bool:
    """Return whether ``parameters()`` leaves out what a module holds at a path."""
    return str(path[0]).startswith("_")


def has_parameters(module: nn.Module) -> bool:
    """Return whether ``module.parameters()`` contains an array."""
    # MLX's own method is recursive, and a deep model would exceed Python's stack.
    layer: Any = unwrapped(module)
    overrides = type(layer).parameters is not nn.Module.parameters
    waiting: list[Container] = [module.parameters() if overrides else module]
    seen: set[int] = set()
    for container in waiting:
        seen.add(id(container))
        public_only = isinstance(container, nn.Module)
        for key, value in entries(container):
            if public_only and str(key).startswith("_"):
                continue
            if isinstance(value, mx.array):
                return True
            if is_container(value) and id(value) not in seen:
                waiting.append(value)
    return False
