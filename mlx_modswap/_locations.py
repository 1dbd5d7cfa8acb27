"""The one file that knows how MLX keeps children: walk a model, nest a partial dict.

MLX sees a child module where a module, a dict or a list holds it, to any depth.
A *container* is a module, a dict or a list; a *location* is a container and a
key in it. Modules are dicts whose classes may override ``__len__``, ``__iter__``
or ``__getitem__``: only what ``dict`` and ``list`` themselves say is asked here,
and modules are told apart by identity alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress, count
from operator import is_not
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ._errors import SelectionError
from ._pattern import Matcher, State, shorten

Container = dict[Any, Any] | list[Any]
Location = tuple[int, Any]  # the id of a container, and a key in it
Swaps = Mapping[Location, nn.Module]

WRAPPED = "(wrapped)"  # the key of the layer in a module that stands in for it
_MOST_PATHS = 10_000_000
_PART = 1000
_LONG = 8  # a list that is worth a look at its entries as a whole
_DICT_GET: Any = dict.get


class _Kinds(dict[type, int]):
    """What a value of some type is to MLX, asked once for each type."""

    def __missing__(self, cls: type) -> int:
        if issubclass(cls, dict):
            kind = _MODULE if issubclass(cls, nn.Module) else _DICT
        else:
            kind = _LIST if issubclass(cls, list) else 0
        self[cls] = kind
        return kind


_MODULE, _DICT, _LIST = 3, 2, 1  # 0: no container


def opened(container: Container) -> Container:
    """The container itself, or the layer that it stands in for."""
    layers = wrapped(container)
    return layers[-1] if layers else container


def wrapped(container: Container) -> list[dict[Any, Any]]:
    """The layer that a container stands in for; if that does so too, its layer next."""
    layers: list[dict[Any, Any]] = []
    while isinstance(container, dict) and isinstance(layer := _DICT_GET(container, WRAPPED), dict):
        layers.append(layer)
        container = layer
    return layers


def entries(container: Container) -> Iterator[tuple[Any, Any]]:
    """The keys and values of a container, in order, as ``dict`` and ``list`` see them."""
    return _raw_entries(opened(container))


def _raw_entries(container: Container) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, dict):
        return iter(dict.items(container))
    return enumerate(list.__iter__(container))


def _values(container: Container) -> Iterable[Any]:
    if isinstance(container, dict):
        return dict.values(container)
    return list.__iter__(container)


def parts(things: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """A sequence in parts: what loops in C go over several times stays in the caches."""
    for start in range(0, len(things), _PART):
        yield things[start : start + _PART]


def is_container(value: Any) -> bool:
    return issubclass(type(value), (dict, list))


# ---------------------------------------------------------------- some places of a model


class Places:
    """Some places of a model, and the containers on the way to them.

    Columns rather than an object for each place, which would double the cost of a
    big swap in garbage collection.

    Attributes:
        paths (list[str]): The path of each place, as ``named_modules()`` prints it.
        modules (list[nn.Module]): What was found there.
        inside (list[int]): The row of the container that holds it.
        keys (list): Its key there.
        masks (list[int]): The patterns that match it: bit ``i`` for pattern ``i``.

        containers (list): A row for each container on the way; row 0 is the model.
            What is inside of one comes behind it.
        above (list[int]): The row of the container that holds it.
        keys_above (list): Its key there.
        layers (dict): The layer that one of them stands in for, by row.

        seen (list): All containers that the walk came by.
        skipped (list): Those among them that it did not look into.
        sharing (Sharing, optional): Who shares what, if it had to be found out.
        odd_keys (bool): See :class:`Matcher`.
    """

    def __init__(self, model: nn.Module):
        self.paths: list[str] = []
        self.modules: list[nn.Module] = []
        self.inside: list[int] = []
        self.keys: list[Any] = []
        self.masks: list[int] = []
        self.containers: list[Any] = [model]
        self.above: list[int] = [0]
        self.keys_above: list[Any] = [None]
        self.layers: dict[int, dict[Any, Any]] = {}
        self.seen: list[Container] = [model]
        self.skipped: list[Container] = []
        self.sharing: Sharing | None = None
        self.odd_keys = False
        self._around: list[int] | None = None

    @property
    def model(self) -> nn.Module:
        """The model that the places are in."""
        return self.containers[0]

    def open(self, row: int) -> dict[Any, Any]:
        """What has the keys that the paths through a module or dict go on with."""
        layers = wrapped(self.containers[row])
        if not layers:
            return self.containers[row]
        self.layers[row] = layers[-1]
        self.seen += layers
        return layers[-1]

    def keep(self, selectors: Sequence[Any]) -> None:
        """Forget the places whose selector is false."""
        if not all(selectors):
            self._around = None
            for name in ("paths", "modules", "inside", "keys", "masks"):
                setattr(self, name, list(compress(getattr(self, name), selectors)))

    def forget(self) -> None:
        """Let go of what was only looked at."""
        self.seen.clear()
        self.skipped.clear()

    def around(self) -> list[int]:
        """The rows of the containers around the places, at any depth; the model is the first."""
        if self._around is None:
            around, rows = {0}, set(self.inside)
            while rows:
                rows -= around
                around |= rows
                rows = set(map(self.above.__getitem__, rows))
            self._around = sorted(around)
        return self._around

    def locations(self) -> list[Location]:
        """Where each place is: the ``id`` of what holds it, and its key there."""
        return list(zip(map(id, self._opened(self.inside)), self.keys))

    def holders(self, rows: Sequence[int]) -> tuple[list[Container], list[Any]]:
        """What holds the containers of some rows, and their keys there."""
        above, keys = self.above.__getitem__, self.keys_above.__getitem__
        return self._opened(map(above, rows)), list(map(keys, rows))

    def first_moved(self) -> int | None:
        """The number of the first place that is no longer in the model, if there is one."""
        rows = self.around()[1:]
        held = _held(*self.holders(rows))
        moved = {row for row, now in zip(rows, held) if now is not self.containers[row]}
        for row, layer in self.layers.items():
            if opened(self.containers[row]) is not layer:
                moved.add(row)
        for number, row in enumerate(self.inside if moved else ()):
            while row and row not in moved:
                row = self.above[row]
            if row in moved:
                return number
        return None

    def first_without(self, modules: Iterable[nn.Module]) -> int | None:
        """The number of the first place that does not hold its entry of ``modules``, likewise."""
        changed = map(is_not, _held(self._opened(self.inside), self.keys), modules)
        return next(compress(count(), changed), None)

    def _opened(self, rows: Iterable[int]) -> list[Container]:
        layers, containers = self.layers, self.containers
        if layers:
            return [layers[row] if row in layers else containers[row] for row in rows]
        return list(map(containers.__getitem__, rows))


def _held(holders: list[Container], keys: list[Any]) -> list[Any]:
    """What containers hold now at some keys."""
    for get in (_DICT_GET, list.__getitem__):  # mostly they are all of one kind
        try:
            return list(map(get, holders, keys))
        except (TypeError, IndexError):
            continue
    return list(map(held_at, holders, keys))


def held_at(holder: Container, key: Any) -> Any:
    """What a container holds at a key, ``None`` if there is nothing."""
    if isinstance(holder, dict):
        return dict.get(holder, key)
    return list.__getitem__(holder, key) if key < list.__len__(holder) else None


def find(model: nn.Module, matcher: Matcher) -> Places:
    """Walk a model, depth first, to the places that a pattern matches.

    Raises:
        SelectionError: If the walk comes to a cycle.
    """
    places = Places(model)
    paths, modules, masks = places.paths, places.modules, places.masks
    inside, keys, seen = places.inside, places.keys, places.seen
    containers, above, keys_above = places.containers, places.above, places.keys_above
    kinds = _Kinds()
    kind_of = kinds.__getitem__
    entered: set[int] = set()
    row, prefix = 0, ""
    steps = _steps(places.open(0), matcher.start)
    waiting: list[tuple[int, str, Iterator[tuple[Any, Any, State]]]] = []
    while True:
        for key, value, state in steps:
            kind = kinds[type(value)]
            if not kind:
                continue
            seen.append(value)
            if state.mask and kind == _MODULE:
                paths.append(f"{prefix}{key}")
                modules.append(value)
                masks.append(state.mask)
                inside.append(row)
                keys.append(key)
            if not state.goes_on:
                places.skipped.append(value)
                continue
            held: Any = dict.values(value) if kind > _LIST else tuple(list.__iter__(value))
            if not held or not any(map(kind_of, map(type, held))):
                continue
            if id(value) in entered and places.sharing is None:
                places.sharing = Sharing(model)
            entered.add(id(value))
            waiting.append((row, prefix, steps))
            above.append(row)
            keys_above.append(key)
            row, prefix = len(containers), f"{prefix}{key}."
            containers.append(value)
            if kind == _LIST:
                states = state.entries(len(held))
                taken = _take_alike(places, prefix, held, states, kinds)
                steps = zip(count(taken), held[taken:], states[taken:])
            else:
                layer = places.open(row) if dict.__contains__(value, WRAPPED) else value
                steps = _steps(layer, state)
            break
        else:
            if not waiting:
                places.odd_keys = matcher.odd_keys
                return places
            row, prefix, steps = waiting.pop()


def _steps(container: dict[Any, Any], state: State) -> Iterator[tuple[Any, Any, State]]:
    keys = dict.keys(container)
    return zip(keys, dict.values(container), map(state.__getitem__, keys))


def _take_alike(
    places: Places, prefix: str, held: Sequence[Any], states: list[State], kinds: _Kinds
) -> int:
    """Take the first entries of the list that was entered last, as far as they look alike.

    Column by column, with loops in C: a step for each is most of the cost of a big walk.

    Returns:
        How many were taken. The others have to be walked one by one.
    """
    row, taken = len(places.containers) - 1, 0
    if len(held) < _LONG:
        return taken
    for modules, their_states in zip(parts(held), parts(states)):
        state = their_states[0]
        if not state.goes_on or len(set(map(id, their_states))) > 1:
            break
        columns = _columns(modules, kinds)
        if columns is None:
            break
        _take(places, row, prefix, range(taken, taken + len(modules)), state, columns)
        taken += len(modules)
    return taken


class _Columns(NamedTuple):
    """Modules of one class that hold the same, and no containers but leaves.

    Attributes:
        modules (Sequence): The modules.
        names (list[str]): The keys of each of them.
        kinds (list[int]): What stands there.
        values (list): What they hold, one after the other.
        leaves (list): The containers among these.
    """

    modules: Sequence[Any]
    names: list[str]
    kinds: list[int]
    values: list[Any]
    leaves: list[Any]


def _columns(modules: Sequence[Any], kinds: _Kinds) -> _Columns | None:
    kind_of, first = kinds.__getitem__, modules[0]
    if kind_of(type(first)) != _MODULE or len(set(map(type, modules))) > 1:
        return None
    names = list(dict.keys(first))
    its_kinds = list(map(kind_of, map(type, dict.values(first))))
    its_leaves = list(compress(dict.values(first), its_kinds))
    if WRAPPED in names or _inner(its_leaves, kinds):
        return None  # mostly here, before the others were looked at
    if not any(map(dict.__len__, modules)):
        return _Columns(modules, [], [], [], [])
    keys = list(chain.from_iterable(map(dict.keys, modules)))
    if set(map(type, keys)) - {str} or keys != names * len(modules):
        return None
    values = list(chain.from_iterable(map(dict.values, modules)))
    all_kinds = list(map(kind_of, map(type, values)))
    leaves = list(compress(values, all_kinds))
    if all_kinds != its_kinds * len(modules) or _inner(leaves, kinds):
        return None
    return _Columns(modules, names, its_kinds, values, leaves)


def _take(
    places: Places, row: int, prefix: str, indices: range, state: State, columns: _Columns
) -> None:
    modules, names, kinds, values, leaves = columns
    some, first_row = len(modules), len(places.containers)
    hits: list[Any] = []  # how paths end, modules, mask, rows and keys
    if state.mask:
        hits.append(("", modules, state.mask, [row] * some, indices))
    for at, (name, kind) in enumerate(zip(names, kinds) if leaves else ()):
        mask = state[name].mask
        if mask and kind == _MODULE:
            rows = range(first_row, first_row + some)
            hits.append((f".{name}", values[at :: len(names)], mask, rows, [name] * some))
    if hits:
        ends, found, masks, rows, keys = zip(*hits)
        starts = [f"{prefix}{index}" for index in indices]
        places.paths += [start + end for start in starts for end in ends] if any(ends) else starts
        places.modules += _by_turns(found)
        places.masks += masks * some
        places.inside += _by_turns(rows)
        places.keys += _by_turns(keys)
    places.seen += modules
    if leaves:
        places.seen += leaves
        places.containers += modules
        places.above += [row] * some
        places.keys_above += indices


def _by_turns(columns: Sequence[Sequence[Any]]) -> Iterable[Any]:
    """What stands first in each column, what stands second, and so on."""
    return chain.from_iterable(zip(*columns)) if len(columns) > 1 else columns[0]


def nest(places: Places, modules: Iterable[nn.Module]) -> dict[Any, Any]:
    """The partial module dict that puts ``modules`` into ``places``."""
    containers, above, keys_above = places.containers, places.above, places.keys_above
    partial: list[Any] = [None] * len(containers)  # by row
    partial[0] = {}
    for row in places.around()[1:]:
        partial[row] = inner = {} if isinstance(containers[row], dict) else []
        outer, key = partial[above[row]], keys_above[row]
        if type(outer) is list:
            _lengthen(outer, key)
        outer[key] = inner
    for outer, key, module in zip(map(partial.__getitem__, places.inside), places.keys, modules):
        if type(outer) is list:
            if key == len(outer):  # mostly
                outer.append(module)
                continue
            _lengthen(outer, key)
        outer[key] = module
    return partial[0]


def _lengthen(entries: list[Any], index: int) -> None:
    """Make room: an empty dict tells update_modules to leave an entry of a list alone."""
    while len(entries) <= index:
        entries.append({})


# ---------------------------------------------------------------- all containers at once


class Sharing:
    """Who shares what in a model in which something is in several places.

    Attributes:
        order (list): Every container once, each before all that it holds.
        ways (dict[int, int]): How many paths lead to each container, by ``id``.
        holders (Counter[int]): How many locations hold each, likewise.

    Raises:
        SelectionError: If the model holds a cycle, or more paths than anyone can walk.
    """

    __slots__ = ("holders", "order", "ways")

    def __init__(self, model: nn.Module):
        self.order = sort_containers(model)
        self.holders: Counter[int] = Counter()
        self.ways = dict.fromkeys(map(id, self.order), 0)
        self.ways[id(model)] = 1
        for container in self.order:
            for value in filter(is_container, _values(container)):
                self.ways[id(value)] += self.ways[id(container)]
                self.holders[id(value)] += 1
        if sum(self.ways.values()) > _MOST_PATHS:
            raise SelectionError(
                f"more than {_MOST_PATHS:,} paths lead through this model: modules in several "
                "places hold modules in several places, again and again"
            )


def survey(places: Places) -> tuple[set[int], Sharing | None]:
    """Go on to all containers that the walk to some places left out.

    Level by level with loops in C, which is the cheapest sound look at a whole model.

    Returns:
        The ``id`` of every container in the model; and who shares what, if something
        is in several places.
    """
    kinds = _Kinds()
    ids = set(map(id, places.seen))
    level = places.skipped
    while level and len(ids) == len(places.seen):
        level = _inner(level, kinds)
        places.seen += level  # held, so that no other object gets the id of one
        ids.update(map(id, level))
    if len(ids) == len(places.seen):
        return ids, None
    sharing = places.sharing or Sharing(places.model)
    return set(sharing.ways), sharing


def _inner(containers: Sequence[Any], kinds: _Kinds) -> list[Any]:
    """What containers hold that is a container itself."""
    try:
        values = list(chain.from_iterable(map(dict.values, containers)))
    except TypeError:  # some of them are lists
        values = list(chain.from_iterable(map(_values, containers)))
    return list(compress(values, map(kinds.__getitem__, map(type, values))))


def sort_containers(model: nn.Module, swaps: Swaps | None = None) -> list[Container]:
    """Every container once, each before all that it holds.

    Args:
        model (nn.Module): Where to begin.
        swaps (dict, optional): Modules to go on with at some locations instead of
            what is there.

    Raises:
        SelectionError: If a container holds itself, at any depth.
    """
    order: list[Container] = []
    done, under_way = set[int](), {id(model): ""}
    stack: list[tuple[Container, str, Iterator[tuple[Any, Any]]]] = [
        (model, "", _inner_containers(model, swaps))
    ]
    while stack:
        container, prefix, inside = stack[-1]
        for key, value in inside:
            path = f"{prefix}{key}"
            if id(value) in under_way:
                top = under_way[id(value)][:-1]
                again = repr(shorten(top)) if top else "the model itself"
                raise SelectionError(f"the model holds a cycle: {shorten(path)!r} is {again} again")
            if id(value) not in done:
                under_way[id(value)] = path + "."
                stack.append((value, path + ".", _inner_containers(value, swaps)))
                break
        else:
            stack.pop()
            del under_way[id(container)]
            done.add(id(container))
            order.append(container)
    order.reverse()
    return order


def _inner_containers(container: Container, swaps: Swaps | None) -> Iterator[tuple[Any, Any]]:
    for key, value in _raw_entries(container):
        if swaps:
            value = swaps.get((id(container), key), value)
        if is_container(value):
            yield key, value


def holds_array(module: nn.Module) -> bool:
    """Whether ``module.parameters()`` hold an array.

    As in MLX, an attribute whose name starts with ``_`` is no parameter.
    """
    # The method of MLX recurses, which a deep model does not bear.
    layer: Any = opened(module)
    own = type(layer).parameters is not nn.Module.parameters
    waiting: list[Container] = [module.parameters() if own else module]
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


def brought_in(
    modules: Sequence[nn.Module], known: set[int], seen: set[int]
) -> tuple[list[nn.Module], set[int]]:
    """What modules that are to be put into a model would bring with them.

    Args:
        modules (sequence of nn.Module): The modules to put in.
        known (set[int]): The ids of the containers of the model.
        seen (set[int]): The ids of what was looked at before; those of what is inside
            of ``modules`` are added.

    Returns:
        All modules in and inside ``modules`` that are new, and the ids of what they
        lead to that is known or was seen.
    """
    kinds = _Kinds()
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
        fresh += level if level is modules else (v for v in level if kinds[type(v)] == _MODULE)
        level = _inner(level, kinds)
    return fresh, met
