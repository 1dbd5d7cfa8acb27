"""What modules hold: parameters, bytes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ._fold import inside, is_private
from ._locations import opened, parts

_ARRAY = mx.array
_SIZE, _DTYPE = attrgetter("size"), attrgetter("dtype")
_FROZEN = attrgetter("_no_grad")


class Measure(NamedTuple):
    """What a module holds.

    Attributes:
        name (str): Its class, with the bits if it is a quantized layer.
        params (int): The number of its parameters, before quantization.
        trainable (int): How many of them are not frozen.
        nbytes (int): The size of its arrays in bytes.
        dtypes (frozenset[mx.Dtype]): Their dtypes.
    """

    name: str
    params: int
    trainable: int
    nbytes: int
    dtypes: frozenset[mx.Dtype]


NOTHING = Measure("", 0, 0, 0, frozenset())


def measure(modules: Sequence[nn.Module]) -> list[Measure]:
    """Measure modules. One that comes again counts nothing the second time."""
    known: dict[Measure, Measure] = {}  # few differ, so few are kept
    found = map(_with_inner, modules)
    return _once(map(id, modules), [known.setdefault(one, one) for one in found])


def record(modules: Sequence[nn.Module]) -> Callable[[], list[Measure]]:
    """Note what modules hold, so that they can be measured when they are gone.

    A swap does this with all that it replaces, so it is written for speed: of plain
    layers it takes the numbers of all arrays, with loops in C, and leaves the rest
    for later.
    """
    classes: list[type] = []
    lengths: list[int] = []
    sizes: list[int] = []
    dtypes: list[mx.Dtype] = []
    for part in parts(modules):
        arrays = list(chain.from_iterable(map(dict.values, part)))
        if arrays and not (set(map(type, arrays)) == {_ARRAY} and _are_plain(part)):
            measures = measure(modules)
            return lambda: measures
        classes += map(type, part)
        lengths += map(dict.__len__, part)
        sizes += map(_SIZE, arrays)
        few = list(set(map(_DTYPE, arrays)))
        dtypes += few * len(arrays) if len(few) == 1 else map(_DTYPE, arrays)
    ids = list(map(id, modules))
    return lambda: _once(ids, _measures(classes, lengths, zip(sizes, dtypes)))


def _are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether nothing is quantized, private or frozen in modules that hold arrays only."""
    keys = set(chain.from_iterable(map(dict.keys, modules)))
    if "scales" in keys or any(str(key).startswith("_") for key in keys):
        return False
    try:
        return not any(map(_FROZEN, modules))
    except AttributeError:  # a class that does not call `super().__init__()`
        return False


def _measures(
    classes: list[type], lengths: list[int], arrays: Iterator[tuple[int, mx.Dtype]]
) -> Iterator[Measure]:
    for cls, length in zip(classes, lengths):
        held = list(islice(arrays, length))
        size = sum(size for size, _ in held)
        nbytes = sum(size * dtype.size for size, dtype in held)
        yield Measure(cls.__name__, size, size, nbytes, frozenset(d for _, d in held))


def _once(ids: Iterable[int], measures: Iterable[Measure]) -> list[Measure]:
    seen: set[int] = set()
    counted: list[Measure] = []
    for key, one in zip(ids, measures):
        counted.append(one._replace(params=0, trainable=0, nbytes=0) if key in seen else one)
        seen.add(key)
    return counted


def _with_inner(module: nn.Module) -> Measure:
    modules, seen = [module], {id(module)}
    measures: list[Measure] = []
    for one in modules:
        own, inner = measure_own(one)
        measures.append(own)
        fresh = {id(module): module for module in inner if id(module) not in seen}
        seen |= fresh.keys()
        modules += fresh.values()
    return total(measures)


def measure_own(module: nn.Module) -> tuple[Measure, list[nn.Module]]:
    """Measure what a module holds itself; returns also the modules inside it that count."""
    bits, frozen = _bits(module), vars(module).get("_no_grad", ())
    params = trainable = nbytes = 0
    dtypes: set[mx.Dtype] = set()
    inner: list[nn.Module] = []
    for names, _, _, value in inside(module):
        path = ".".join(map(str, names))
        if is_private(names):
            continue
        if type(value) is _ARRAY:
            size = value.size
            if bits:  # the numbers that the packed ones stand for, and no scales
                size = {"weight": size * 32 // bits, "bias": size}.get(path, 0)
            params += size
            trainable += size if path not in frozen else 0
            nbytes += value.nbytes
            dtypes.add(value.dtype)
        elif issubclass(type(value), nn.Module):
            inner.append(value)
    name = f"{type(module).__name__}(bits={bits})" if bits else type(module).__name__
    return Measure(name, params, trainable, nbytes, frozenset(dtypes)), inner


def _bits(module: nn.Module) -> int:
    """The bits of a quantized layer, 0 for another one."""
    layer: Any = opened(module)
    bits = vars(layer).get("bits") if dict.__contains__(layer, "scales") else 0
    return bits if isinstance(bits, int) and 0 < bits <= 32 else 0


def total(measures: Iterable[Measure]) -> Measure:
    """The sum of some measures, under the name of the first."""
    names, params, trainable, nbytes, dtypes = zip(*measures)
    sums = sum(params), sum(trainable), sum(nbytes)
    return Measure(names[0], *sums, frozenset().union(*dtypes))
