"""What modules hold: parameters, bytes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .._model.containers import is_private, own_values, unwrapped

_ARRAY = mx.array
_CHUNK = 1000
_SIZE: Any = mx.array.size
_DTYPE: Any = mx.array.dtype
_SIZE, _DTYPE = _SIZE.fget, _DTYPE.fget  # half of the time of an `attrgetter`
_FROZEN = attrgetter("_no_grad")


class Measure(NamedTuple):
    """What a module holds.

    Attributes:
        cls (type): Its class.
        bits (int): The bits of a quantized layer, 0 for any other module.
        params (int): The number of its parameters, before quantization.
        trainable (int): How many of them are not frozen.
        nbytes (int): The size of its arrays in bytes.
        dtypes (frozenset[mx.Dtype]): Their dtypes.
    """

    cls: type
    bits: int
    params: int
    trainable: int
    nbytes: int
    dtypes: frozenset[mx.Dtype]


NOTHING = Measure(nn.Module, 0, 0, 0, 0, frozenset())


def measure(modules: Sequence[nn.Module]) -> list[Measure]:
    """Measure modules with all their descendants. A module that occurs again adds nothing.

    Equal measures are one object, since there are few different ones, however many modules.
    """
    different: dict[Measure, Measure] = {}
    counted: set[int] = set()
    measures = (_with_descendants(module, counted) for module in modules)
    return [different.setdefault(one, one) for one in measures]


def record(modules: Sequence[nn.Module]) -> Callable[[], list[Measure]]:
    """Record what modules hold, so that they can be measured when they are gone.

    Every swap records all modules that it replaces, although most reports are never read.
    So this function only copies sizes and dtypes, with loops in C. The function that it
    returns adds them up. This is right for modules that hold nothing but arrays, all of
    them trainable parameters. Modules with anything else (children, frozen or private
    arrays, quantized weights) are measured at once, which is slower: if all modules were,
    a swap of all 225 projections of a llama would take 2.3 times as long.
    """
    classes: list[type] = []
    lengths: list[int] = []
    sizes: list[int] = []
    dtypes: list[mx.Dtype] = []
    for chunk in _chunks(modules):
        arrays = list(chain.from_iterable(map(dict.values, chunk)))
        if arrays and not (set(map(type, arrays)) == {_ARRAY} and _are_plain(chunk)):
            measures = measure(modules)
            return lambda: measures
        classes += map(type, chunk)
        lengths += map(dict.__len__, chunk)
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
    """Return whether nothing is quantized, private or frozen in modules that hold arrays only."""
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
    """Yield the measures of modules from what :func:`record` copied."""
    counted: set[int] = set()
    for key, cls, length in zip(ids, classes, lengths):
        sizes_and_dtypes = list(islice(arrays, length))
        size = sum(size for size, _ in sizes_and_dtypes)
        nbytes = sum(size * dtype.size for size, dtype in sizes_and_dtypes)
        dtypes = frozenset(dtype for _, dtype in sizes_and_dtypes)
        yield _once(Measure(cls, 0, size, size, nbytes, dtypes), key, counted)


def _once(of: Measure, key: int, counted: set[int]) -> Measure:
    """Return the measure of a module, with figures of 0 if it was counted before."""
    if key in counted:
        return of._replace(params=0, trainable=0, nbytes=0)
    counted.add(key)
    return of


def _with_descendants(module: nn.Module, counted: set[int]) -> Measure:
    modules, seen = [module], set[int]()
    measures: list[Measure] = []
    for one in modules:
        layer = id(unwrapped(one))
        if layer not in seen:
            seen.add(layer)
            alone, children = measure_alone(one)
            measures.append(_once(alone, layer, counted))
            modules += children
    return total(measures)


def measure_alone(module: nn.Module) -> tuple[Measure, list[nn.Module]]:
    """Measure a module without its children; also return the children whose parameters count."""
    bits, frozen = _bits(module), vars(module).get("_no_grad", ())
    params = trainable = nbytes = 0
    dtypes: set[mx.Dtype] = set()
    children: list[nn.Module] = []
    for path, _, keys, value in own_values(module):
        if is_private(path):
            continue
        if type(value) is _ARRAY:
            size = value.size
            names = list(accumulate(map(str, keys), "{}.{}".format))  # also of containers around it
            if bits:  # count the weights that are packed, and not the scales
                size = {"weight": size * 32 // bits, "bias": size}.get(names[-1], 0)
            params += size
            trainable += 0 if any(name in frozen for name in names) else size
            nbytes += value.nbytes
            dtypes.add(value.dtype)
        elif issubclass(type(value), nn.Module):
            children.append(value)
    return Measure(type(module), bits, params, trainable, nbytes, frozenset(dtypes)), children


def _bits(module: nn.Module) -> int:
    """Return the bits of a quantized layer, 0 for any other module."""
    layer: Any = unwrapped(module)
    bits = vars(layer).get("bits") if dict.__contains__(layer, "scales") else 0
    return bits if isinstance(bits, int) and 0 < bits <= 32 else 0


def total(measures: Iterable[Measure]) -> Measure:
    """Return the sum of some measures, with the class and the bits of the first."""
    classes, bits, params, trainable, nbytes, dtypes = zip(*measures)
    sums = sum(params), sum(trainable), sum(nbytes)
    return Measure(classes[0], bits[0], *sums, frozenset().union(*dtypes))
