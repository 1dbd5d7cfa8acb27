"""Walk a model to the places that patterns match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, count, repeat
from operator import is_not
from typing import Any

import mlx.nn as nn

from .._patterns.match import Matcher, State
from .containers import LIST, MODULE, WRAPPED, Container, Kinds, Location, unwrapped, values_at
from .sharing import sort_containers


class Places:
    """Some places of a model, and the containers on the way to them.

    These are two tables, stored by column. An object for each place would read better, but
    makes a swap of many places 1.7 to 2.3 times as slow, mostly because Python's garbage
    collector has to visit every object.

    Attributes:
        paths (list[str]): The path of each place, as ``named_modules()`` prints it.
        modules (list[nn.Module]): The module found there.
        rows (list[int]): The row, in the second table, of the container that holds it.
        keys (list): Its key in that container.
        masks (list[int]): The patterns that match it: bit ``i`` for pattern ``i``.

        containers (list): A row for each container on the way; row 0 is the model.
            A container comes before all that it holds.
        holders (list): The container itself or, for a ``Wrapper``, the innermost layer,
            which has the keys with which a path continues.
        parents (list[int]): The row of the container that holds this container.
        parent_keys (list): Its key in that container.
    """

    def __init__(self, model: nn.Module):
        self.paths: list[str] = []
        self.modules: list[nn.Module] = []
        self.rows: list[int] = []
        self.keys: list[Any] = []
        self.masks: list[int] = []
        self.containers: list[Any] = [model]
        self.holders: list[Any] = [unwrapped(model)]
        self.parents: list[int] = [0]
        self.parent_keys: list[Any] = [None]
        self._ancestors: list[int] | None = None
        self._dict_keys: set[Any] | None = None

    @property
    def model(self) -> nn.Module:
        """The model that the places are in."""
        return self.containers[0]

    def keep(self, selectors: Sequence[Any]) -> None:
        """Forget the places whose selector is false."""
        if not all(selectors):
            self._ancestors = self._dict_keys = None
            for name in ("paths", "modules", "rows", "keys", "masks"):
                setattr(self, name, list(compress(getattr(self, name), selectors)))

    def ancestors(self) -> list[int]:
        """Return the rows of the containers around the places, at any depth, the model first."""
        if self._ancestors is None:
            ancestors, rows = {0}, set(self.rows)
            while rows:
                rows -= ancestors
                ancestors |= rows
                rows = set(map(self.parents.__getitem__, rows))
            self._ancestors = sorted(ancestors)
        return self._ancestors

    def dict_keys(self) -> set[Any]:
        """Return the keys of the modules and dicts around the places."""
        if self._dict_keys is None:
            holders = self._holders_of(self.ancestors())
            dicts: Any = compress(holders, map(isinstance, holders, repeat(dict)))
            self._dict_keys = set(chain.from_iterable(map(dict.keys, dicts)))
        return self._dict_keys

    def locations(self) -> list[Location]:
        """Return where each place is: the ``id`` of its holder, and its key there."""
        return list(zip(map(id, self._holders_of(self.rows)), self.keys))

    def container_locations(self, rows: Sequence[int]) -> list[Location]:
        """Return where the containers of some rows are."""
        parents = map(self.parents.__getitem__, rows)
        keys = map(self.parent_keys.__getitem__, rows)
        return list(zip(map(id, self._holders_of(parents)), keys))

    def first_moved(self) -> int | None:
        """Return the number of the first place that is no longer in the model, if there is one."""
        rows = self.ancestors()[1:]
        parents = map(self.parents.__getitem__, rows)
        now = values_at(self._holders_of(parents), list(map(self.parent_keys.__getitem__, rows)))
        # A wrapper that was put around a container, or taken off, does not move what it holds.
        moved = {
            row
            for row, value in zip([0, *rows], [self.model, *now])
            if value is not self.holders[row] and unwrapped(value) is not self.holders[row]
        }
        for number, row in enumerate(self.rows if moved else ()):
            while row and row not in moved:
                row = self.parents[row]
            if row in moved:
                return number
        return None

    def first_without(self, modules: Iterable[nn.Module]) -> int | None:
        """Return the number of the first place that does not hold its entry of ``modules``."""
        changed = map(is_not, values_at(self._holders_of(self.rows), self.keys), modules)
        return next(compress(count(), changed), None)

    def _holders_of(self, rows: Iterable[int]) -> list[Container]:
        return list(map(self.holders.__getitem__, rows))


def find(model: nn.Module, matcher: Matcher) -> Places:
    """Find the places that a pattern matches, by a walk through the model, depth first.

    The walk does not enter a container if no pattern can match anything inside it. If it
    enters a container for the second time, the container is either shared or part of a
    cycle, in which the walk would not end: :func:`sort_containers` distinguishes the two.

    Raises:
        SelectionError: If the walk reaches a cycle.
    """
    places = Places(model)
    paths, modules, masks = places.paths, places.modules, places.masks
    rows, keys = places.rows, places.keys
    containers, holders = places.containers, places.holders
    parents, parent_keys = places.parents, places.parent_keys
    kinds = Kinds()
    kind_of, are_others = kinds.__getitem__, kinds.others.issuperset
    entered: set[int] = set()
    is_checked = False
    row, prefix = 0, ""
    steps = _steps(holders[0], matcher.start)
    waiting: list[tuple[int, str, Iterator[tuple[Any, Any, State]]]] = []
    while True:
        for key, value, state in steps:
            kind = kinds[type(value)]
            if not kind:
                continue
            if state.mask and kind == MODULE:
                paths.append(f"{prefix}{key}")
                modules.append(value)
                masks.append(state.mask)
                rows.append(row)
                keys.append(key)
            if not state.goes_on:
                continue
            held: Any = dict.values(value) if kind > LIST else tuple(list.__iter__(value))
            # The common case is a layer that holds nothing but arrays, so that comes first.
            if not held or are_others(map(type, held)) or not any(map(kind_of, map(type, held))):
                continue
            if id(value) in entered and not is_checked:
                sort_containers(model)
                is_checked = True
            entered.add(id(value))
            waiting.append((row, prefix, steps))
            parents.append(row)
            parent_keys.append(key)
            row, prefix = len(containers), f"{prefix}{key}."
            containers.append(value)
            if kind == LIST:
                steps = zip(count(), held, state.entries(len(held)))
                holders.append(value)
            else:
                holder: Any = unwrapped(value) if dict.__contains__(value, WRAPPED) else value
                steps = _steps(holder, state)
                holders.append(holder)
            break
        else:
            if not waiting:
                return places
            row, prefix, steps = waiting.pop()


def _steps(container: dict[Any, Any], state: State) -> Iterator[tuple[Any, Any, State]]:
    keys = dict.keys(container)
    return zip(keys, dict.values(container), map(state.__getitem__, keys))
