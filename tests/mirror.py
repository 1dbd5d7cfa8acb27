"""What a model has to look like after each step of a history, said in plain Python.

A `Mirror` holds what every container should hold. An `OpenBlock` says how a `swapped` block has to
end among others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
from mlx.utils import tree_flatten
from oracle import Location, Place

from mlx_modswap import Replacement


class Mirror:
    """What the model has to look like: what each container holds, and its flags."""

    def __init__(self, model: nn.Module):
        self.things: dict[int, Any] = {}
        self.contents: dict[int, list[tuple[Any, Any]]] = {}
        self.flags: dict[int, tuple[bool, set[str]]] = {}
        self.take_in(model)

    def take_in(self, thing: Any, mode: bool | None = None) -> None:
        """Look at what is not known yet; modules among it are to have this mode."""
        for one in oracle.everything(thing):
            if id(one) not in self.things:
                self.look_at(one)
                if isinstance(one, nn.Module) and mode is not None:
                    self.flags[id(one)] = mode, self.flags[id(one)][1]

    def look_at(self, thing: Any) -> None:
        self.things[id(thing)] = thing
        self.contents[id(thing)] = oracle.entries(thing)
        if isinstance(thing, nn.Module):
            self.flags[id(thing)] = flags(thing)

    def look_again(self, model: nn.Module) -> None:
        for thing in list(self.things.values()):
            self.look_at(thing)
        self.take_in(model)

    def put(self, location: Location, new: nn.Module, mode: bool | None = None) -> None:
        """Foretell a swap of one location."""
        container, key = location
        held = self.contents[container]
        self.contents[container] = [(k, new if k == key else value) for k, value in held]
        self.take_in(new, mode)

    def parameters(self, thing: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
        """The names of the parameters in something, and which arrays they are."""
        for key, value in self.contents[id(thing)]:
            if isinstance(thing, nn.Module) and key.startswith("_"):
                continue
            if isinstance(value, mx.array):
                yield f"{prefix}{key}", id(value)
            elif isinstance(value, (dict, list)):
                yield from self.parameters(value, f"{prefix}{key}.")

    def differences(self) -> list[str]:
        found = []
        for number, thing in self.things.items():
            name, then, now = type(thing).__name__, self.contents[number], oracle.entries(thing)
            if [key for key, _ in then] != [key for key, _ in now]:
                found.append(f"the keys of a {name}")
            elif any(old is not new for (_, old), (_, new) in zip(then, now)):
                found.append(f"what a {name} holds")
            if number in self.flags and self.flags[number] != flags(thing):
                found.append(f"the flags of a {name}")
        return found


def flags(module: nn.Module) -> tuple[bool, set[str]]:
    return module._training, set(module._no_grad)


class OpenBlock:
    """A `swapped` block that was entered.

    `olds` is what it has to put back at each location, `around` are the steps on the way to its
    places, and `put` those that lead to what it has put there.
    """

    def __init__(
        self,
        model: nn.Module,
        manager: AbstractContextManager[Replacement],
        targets: list[Place],
    ):
        self.manager = manager
        self.olds = {place.location: place.module for place in targets}

        ways = [way(model, place.path) for place in targets]
        self.around = [step for steps in ways for step in steps[:-1]]
        self.put = [steps[-1] for steps in ways]

    def changed_by_hand(self, above: Mapping[Location, Any]) -> set[Location]:
        """The locations that no later block covers and that hold another module than it put."""
        return {
            (id(container), key)
            for container, key, value in self.put
            if not above[id(container), key]
            and all(
                dict(oracle.entries(container)).get(key) is not one
                for one in (value, self.olds[id(container), key])
            )
        }

    def has_lost_a_place(self) -> bool:
        """Whether the way to a place leads somewhere else, or to another module there."""
        return any(
            dict(oracle.entries(container)).get(key) is not value
            for container, key, value in self.around
        )


def way(container: Any, path: str) -> list[tuple[Any, Any, Any]]:
    """The steps from a container to what is at a path: where, which key, and what is there."""
    for key, value in oracle.entries(container):
        if path == str(key):
            return [(container, key, value)]
        if path.startswith(f"{key}.") and isinstance(value, (dict, list)):
            further = way(value, path[len(f"{key}.") :])
            if further:
                return [(container, key, value), *further]
    return []


def parameters(model: nn.Module, but: Iterable[str]) -> dict[str, int]:
    """The names of the parameters outside of some paths, and which arrays they are."""
    heads = tuple(f"{path}." for path in but)
    named = tree_flatten(nn.Module.parameters(model))
    return {name: id(array) for name, array in named if not name.startswith(heads)}
