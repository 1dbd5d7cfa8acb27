"""What modules hold: parameters, bytes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ._locations import entries, is_container

_ARRAY = mx.array


class Measure(NamedTuple):
    """What a module holds.

    Attributes:
        name (str): Its class, with the bits if it is a quantized layer.
        params (int): The number of its parameters, before quantization.
        trainable (int): How many of them are not frozen.
        nbytes (int): The size of its arrays in bytes.
        dtypes (tuple[mx.Dtype, ...]): Their dtypes.
    """

    name: str
    params: int
    trainable: int
    nbytes: int
    dtypes: tuple[mx.Dtype, ...]


def measure(modules: Sequence[nn.Module]) -> list[Measure]:
    """Measure modules. One that comes again counts nothing the second time.

    A swap measures all modules that it replaces before they go, so this is
    written for speed.
    """
    known: dict[Any, Measure] = {}  # few differ, so few are made into objects
    measures: list[Measure] = []
    for module in modules:
        found = _measure(module) if dict.__len__(module) else (type(module).__name__, 0, 0, 0, ())
        try:
            measures.append(known[found])
        except KeyError:
            measures.append(known.setdefault(found, Measure(*found)))
    if len(set(map(id, modules))) < len(modules):
        seen: set[int] = set()
        for at, module in enumerate(modules):
            if id(module) in seen:
                measures[at] = Measure(measures[at].name, 0, 0, 0, measures[at].dtypes)
            seen.add(id(module))
    return measures


def _measure(module: nn.Module) -> tuple[str, int, int, int, tuple[mx.Dtype, ...]]:
    state = vars(module)
    name = type(module).__name__
    if "bits" in state:
        name = f"{name}(bits={state['bits']})"
    params = trainable = nbytes = 0
    dtypes: tuple[mx.Dtype, ...] = ()
    # An owner names its frozen arrays by their path inside it.
    waiting: list[tuple[nn.Module, str, Any]] = [(module, "", module)]
    for owner, prefix, container in waiting:
        frozen = vars(owner).get("_no_grad", ())
        quantized = "scales" in owner
        for key, value in entries(container):
            path = f"{prefix}{key}"
            if type(value) is _ARRAY:
                if path[:1] == "_":
                    continue
                numbers = value.size
                if quantized:
                    numbers = _unpacked(owner, path, numbers)
                params += numbers
                if path not in frozen:
                    trainable += numbers
                nbytes += value.nbytes
                dtype = value.dtype
                if dtype not in dtypes:
                    dtypes += (dtype,)
            elif is_container(value) and path[:1] != "_":
                inside = issubclass(type(value), nn.Module)
                waiting.append((value, "", value) if inside else (owner, f"{path}.", value))
    return name, params, trainable, nbytes, dtypes


def _unpacked(owner: nn.Module, path: str, numbers: int) -> int:
    """How many numbers an array of a quantized layer stands for."""
    bits = vars(owner).get("bits")
    if bits is None:
        return numbers
    return {"weight": numbers * 32 // bits, "bias": numbers}.get(path, 0)


def total(measures: Iterable[Measure]) -> Measure:
    """The sum of some measures that have name and dtypes in common."""
    names, params, trainable, nbytes, dtypes = zip(*measures)
    return Measure(names[0], sum(params), sum(trainable), sum(nbytes), dtypes[0])
