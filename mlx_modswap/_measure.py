"""What modules hold: parameters, bytes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ._containers import is_private, own_values, unwrapped

_ARRAY = mx.array
_CHUNK = 1000
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
    """Measure modules and what is inside. One that comes again counts nothing the second time."""
    known: dict[Measure, Measure] = {}  # few differ, so few are kept
    counted: set[int] = set()
    found = (_with_inner(module, counted) for module in modules)
    return [known.setdefault(one, one) for one in found]


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
    for part in _chunks(modules):
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
    return lambda: list(_measures(ids, classes, lengths, zip(sizes, dtypes)))


def _chunks(things: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split into chunks that fit the CPU cache, since each is passed over several times."""
    for start in range(0, len(things), _CHUNK):
        yield things[start : start + _CHUNK]


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
    ids: list[int], classes: list[type], lengths: list[int], arrays: Iterator[tuple[int, mx.Dtype]]
) -> Iterator[Measure]:
    counted: set[int] = set()
    for key, cls, length in zip(ids, classes, lengths):
        held = list(islice(arrays, length))
        size = sum(size for size, _ in held)
        nbytes = sum(size * dtype.size for size, dtype in held)
        own = Measure(cls.__name__, size, size, nbytes, frozenset(d for _, d in held))
        yield _once(own, key, counted)


def _once(own: Measure, key: int, counted: set[int]) -> Measure:
    """What to count of a module, if others were counted before."""
    if key in counted:
        return own._replace(params=0, trainable=0, nbytes=0)
    counted.add(key)
    return own


def _with_inner(module: nn.Module, counted: set[int]) -> Measure:
    modules, seen = [module], set[int]()
    measures: list[Measure] = []
    for one in modules:
        layer = id(unwrapped(one))
        if layer not in seen:
            seen.add(layer)
            own, inner = measure_own(one)
            measures.append(_once(own, layer, counted))
            modules += inner
    return total(measures)


def measure_own(module: nn.Module) -> tuple[Measure, list[nn.Module]]:
    """Measure what a module holds itself; returns also the modules inside it that count."""
    bits, frozen = _bits(module), vars(module).get("_no_grad", ())
    params = trainable = nbytes = 0
    dtypes: set[mx.Dtype] = set()
    inner: list[nn.Module] = []
    for path, _, keys, value in own_values(module):
        if is_private(path):
            continue
        if type(value) is _ARRAY:
            size = value.size
            names = list(accumulate(map(str, keys), "{}.{}".format))  # of what is around it, too
            if bits:  # the numbers that the packed ones stand for, and no scales
                size = {"weight": size * 32 // bits, "bias": size}.get(names[-1], 0)
            params += size
            trainable += 0 if any(name in frozen for name in names) else size
            nbytes += value.nbytes
            dtypes.add(value.dtype)
        elif issubclass(type(value), nn.Module):
            inner.append(value)
    name = f"{type(module).__name__}(bits={bits})" if bits else type(module).__name__
    return Measure(name, params, trainable, nbytes, frozenset(dtypes)), inner


def _bits(module: nn.Module) -> int:
    """The bits of a quantized layer, 0 for another one."""
    layer: Any = unwrapped(module)
    bits = vars(layer).get("bits") if dict.__contains__(layer, "scales") else 0
    return bits if isinstance(bits, int) and 0 < bits <= 32 else 0


def total(measures: Iterable[Measure]) -> Measure:
    """The sum of some measures, under the name of the first."""
    names, params, trainable, nbytes, dtypes = zip(*measures)
    sums = sum(params), sum(trainable), sum(nbytes)
    return Measure(names[0], *sums, frozenset().union(*dtypes))
