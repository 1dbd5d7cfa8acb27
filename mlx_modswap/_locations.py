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
from itertools import chain, compress
from operator import is_
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ._errors import SelectionError
from ._pattern import Matcher, State, shorten

Container = dict[Any, Any] | list[Any]
Swaps = Mapping[tuple[int, Any], nn.Module]  # (id(container), key) -> module

WRAPPED = "(wrapped)"  # the key of the layer in a module that stands in for it
_MOST_PATHS = 10_000_000


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
    while isinstance(container, dict) and dict.__contains__(container, WRAPPED):
        container = dict.__getitem__(container, WRAPPED)
    return container


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


def is_container(value: Any) -> bool:
    return issubclass(type(value), (dict, list))


# ---------------------------------------------------------------- one place after the other


class Places:
    """Places of a model, as parallel lists with one entry a place.

    Attributes:
        paths (list[str]): Their paths, as ``named_modules()`` prints them.
        modules (list[nn.Module]): The modules that were found there.
        keys (list): The key of each in its container.
        masks (list[int]): The patterns that match each: bit ``i`` for pattern ``i``.
        rows (list[int]): The row of that container in ``containers``.
        containers (list): The containers that the walk went through, parents first.
        holders (list): The containers again, but for one that stands in for a layer
            the layer, whose keys are those of the paths.
        above (list[int]): For each container the row of the container that holds it.
        named (list): For each container its key there.
        entered (set[int]): The ``id`` of each of them.
        leaves (list): Containers that the walk came by, and that hold no others.
        skipped (list): Containers that it came by, and did not look into.
        sharing (Sharing, optional): Who shares what, if it had to be found out.
        odd_keys (bool): See :class:`Matcher`.
    """

    # Lists of str, int and objects that exist anyway: a tuple for each place
    # would double the cost of a big swap in garbage collection.
    __slots__ = (
        "above",
        "containers",
        "entered",
        "holders",
        "keys",
        "leaves",
        "masks",
        "modules",
        "named",
        "odd_keys",
        "paths",
        "rows",
        "sharing",
        "skipped",
    )

    def __init__(self, model: nn.Module):
        self.paths: list[str] = []
        self.modules: list[nn.Module] = []
        self.keys: list[Any] = []
        self.masks: list[int] = []
        self.rows: list[int] = []
        self.containers: list[Container] = []
        self.holders: list[Container] = []
        self.above: list[int] = []
        self.named: list[Any] = []
        self.entered: set[int] = set()
        self.leaves: list[Container] = []
        self.skipped: list[Container] = []
        self.sharing: Sharing | None = None
        self.odd_keys = False
        self.enter(model, -1, None)

    @property
    def model(self) -> nn.Module:
        """The model that the places are in."""
        return cast(nn.Module, self.containers[0])

    def enter(self, container: Container, above: int, key: Any) -> Container:
        """Add a container, and return its holder."""
        holder = container
        while isinstance(holder, dict) and dict.__contains__(holder, WRAPPED):
            holder = dict.__getitem__(holder, WRAPPED)
            self.leaves.append(holder)
        self.entered.add(id(container))
        self.containers.append(container)
        self.holders.append(holder)
        self.above.append(above)
        self.named.append(key)
        return holder

    def around(self) -> list[int]:
        """The rows of the containers that the places lie in, at any depth, parents first."""
        around = {0}
        rows: Iterable[int] = self.rows
        while rows := set(rows) - around:
            around |= rows
            rows = map(self.above.__getitem__, rows)
        return sorted(around)

    def keep(self, selectors: Sequence[bool]) -> None:
        """Forget the places whose selector is false."""
        if not all(selectors):
            for name in ("paths", "modules", "keys", "masks", "rows"):
                setattr(self, name, list(compress(getattr(self, name), selectors)))

    def first_moved(self) -> int | None:
        """The first place whose container is not where the walk found it, if there is one."""
        containers, above = self.containers, self.above
        held = _held(self.holders, above[1:], self.named[1:])
        if all(map(is_, held, containers[1:])):
            return None
        moved = {row for row, now in enumerate(held, start=1) if now is not containers[row]}
        for at, row in enumerate(self.rows):
            while row:
                if row in moved:
                    return at
                row = above[row]
        return None

    def first_without(self, modules: Sequence[nn.Module]) -> int | None:
        """The first place that does not hold its entry of ``modules``, if there is one."""
        held = _held(self.holders, self.rows, self.keys)
        if all(map(is_, held, modules)):
            return None
        return next(at for at, (now, new) in enumerate(zip(held, modules)) if now is not new)


def _held(all_holders: list[Container], rows: Sequence[int], keys: Sequence[Any]) -> list[Any]:
    """What the holders of some rows hold under some keys, now."""
    holders = list(map(all_holders.__getitem__, rows))
    for get in (_DICT_GET, list.__getitem__):  # mostly they are all of one kind
        try:
            return list(map(get, holders, keys))
        except (TypeError, IndexError):
            continue
    return list(map(_get, holders, keys))


def _get(holder: Container, key: Any) -> Any:
    if isinstance(holder, dict):
        return dict.get(holder, key)
    return list.__getitem__(holder, key) if key < list.__len__(holder) else None


def find(model: nn.Module, matcher: Matcher) -> Places:
    """Walk a model, depth first, to the places that a pattern matches.

    Raises:
        SelectionError: If the walk comes to a cycle.
    """
    places = Places(model)
    kinds, dead = _Kinds(), matcher.dead
    paths, modules, keys, masks = places.paths, places.modules, places.keys, places.masks
    rows, leaves, skipped, entered = places.rows, places.leaves, places.skipped, places.entered
    kind_of = kinds.__getitem__
    only_arrays = {mx.array}.issuperset
    row, prefix = 0, ""
    steps = _steps(places.holders[0], matcher.start)
    waiting: list[tuple[int, str, Iterator[tuple[Any, Any, State]]]] = []
    while True:
        for key, value, state in steps:
            kind = kinds[type(value)]
            if not kind:
                continue
            if state is dead:
                skipped.append(value)
                continue
            if kind == _MODULE and state.mask:
                paths.append(f"{prefix}{key}")
                modules.append(value)
                keys.append(key)
                rows.append(row)
                masks.append(state.mask)
            if not state.goes_on:
                skipped.append(value)
                continue
            inside = dict.values(value) if kind > _LIST else tuple(list.__iter__(value))
            holds_more = inside and not only_arrays(map(type, inside))
            if holds_more and any(map(kind_of, map(type, inside))):
                if id(value) in entered and places.sharing is None:
                    places.sharing = Sharing(model)
                waiting.append((row, prefix, steps))
                holder = places.enter(value, row, key)
                row, prefix = len(places.containers) - 1, f"{prefix}{key}."
                steps = _steps(holder, state)
                break
            leaves.append(value)
        else:
            if not waiting:
                places.odd_keys = matcher.odd_keys
                return places
            row, prefix, steps = waiting.pop()


def _steps(container: Container, state: State) -> Iterator[tuple[Any, Any, State]]:
    if isinstance(container, dict):
        keys = dict.keys(container)
        return zip(keys, dict.values(container), map(state.__getitem__, keys))
    states = state.entries(list.__len__(container))
    return zip(range(len(states)), list.__iter__(container), states)


def locate(model: nn.Module, paths: Iterable[str]) -> tuple[Places, list[int]]:
    """The places that print these paths, which are taken literally.

    Returns:
        The places, in the order of the paths, and how many there are for each path.
    """
    places = Places(model)
    rows: dict[tuple[int, Any], int] = {}
    names: dict[int, dict[str, list[Any]]] = {}
    counts: list[int] = []

    for path in paths:
        segments = path.split(".")
        before = len(places.paths)
        reached = [(0, 0)]  # a row of containers, and how many segments lead to it
        for row, used in reached:
            container = places.holders[row]
            if row not in names:
                names[row] = _names(container)
            for end in range(used + 1, len(segments) + 1):
                for key in names[row].get(".".join(segments[used:end]), ()):
                    value = _held([container], [0], [key])[0]
                    if end == len(segments):
                        if issubclass(type(value), nn.Module):
                            places.paths.append(path)
                            places.modules.append(value)
                            places.keys.append(key)
                            places.rows.append(row)
                    elif is_container(value):
                        if (row, key) not in rows:
                            rows[row, key] = len(places.containers)
                            places.enter(value, row, key)
                        reached.append((rows[row, key], end))
        counts.append(len(places.paths) - before)
    return places, counts


def _names(container: Container) -> dict[str, list[Any]]:
    names: dict[str, list[Any]] = {}
    for key, value in entries(container):
        if is_container(value):
            names.setdefault(str(key), []).append(key)
    return names


def nest(places: Places, modules: Iterable[nn.Module]) -> dict[Any, Any]:
    """The partial module dict that puts ``modules`` into ``places``."""
    partial: dict[int, Any] = {0: {}}  # by the row of its container
    for row in places.around()[1:]:
        outer, key = partial[places.above[row]], places.named[row]
        if type(outer) is list:
            _lengthen(outer, key)
        outer[key] = partial[row] = {} if isinstance(places.containers[row], dict) else []
    for row, key, module in zip(places.rows, places.keys, modules):
        outer = partial[row]
        if type(outer) is list:
            _lengthen(outer, key)
        outer[key] = module
    return partial[0]


def _lengthen(entries: list[Any], index: int) -> None:
    """Make room: an empty dict tells update_modules to leave an entry of a list alone."""
    entries.extend([{}] * (index + 1 - len(entries)))


# ---------------------------------------------------------------- all containers at once


class Sharing:
    """Who shares what in a model in which something is in several places.

    Attributes:
        ways (dict[int, int]): How many paths lead to each container, by ``id``.
        holders (Counter[int]): How many locations hold each, likewise.

    Raises:
        SelectionError: If the model holds a cycle, or more paths than anyone can walk.
    """

    __slots__ = ("holders", "ways")

    def __init__(self, model: nn.Module):
        order = sort_containers(model, {})
        self.holders: Counter[int] = Counter()
        self.ways = dict.fromkeys(map(id, order), 0)
        self.ways[id(model)] = 1
        for container in order:
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
    known = [places.containers, places.leaves, places.skipped]
    ids, count = set(map(id, chain(*known))), sum(map(len, known))
    level = places.skipped
    while level and len(ids) == count:
        level = _inner(level, kinds)
        ids.update(map(id, level))
        count += len(level)
    if len(ids) == count:
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


def sort_containers(model: nn.Module, swaps: Swaps) -> list[Container]:
    """Every container once, each before all that it holds.

    Args:
        model (nn.Module): Where to begin.
        swaps (dict): Modules to go on with at some locations instead of what is there.

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


def _inner_containers(container: Container, swaps: Swaps) -> Iterator[tuple[Any, Any]]:
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
    own = type(module).parameters is not nn.Module.parameters
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
        seen (set[int]): The ids of what was brought in before. This is added to it.

    Returns:
        All modules in and inside ``modules`` that are new, and the ids of what they
        lead to that is known or was seen before.
    """
    kinds = _Kinds()
    fresh: list[nn.Module] = []
    met: set[int] = set()
    level: Sequence[Any] = modules
    while level:
        ids = set(map(id, level))
        if len(ids) < len(level) or not ids.isdisjoint(known) or not ids.isdisjoint(seen):
            old = ids & known | ids & seen
            met |= old
            level = [v for key, v in dict(zip(map(id, level), level)).items() if key not in old]
        fresh += level if level is modules else (v for v in level if kinds[type(v)] == _MODULE)
        seen |= ids
        level = _inner(level, kinds)
    return fresh, met
