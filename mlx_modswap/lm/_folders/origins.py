"""Find out what a loader does with the arrays of a folder, before any of them is computed."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .._loaders import Arrays, Loaded

_READ = "Load"  # the primitive that reads an array from a file
_MOST_NAMES = 1000  # a call may name at most 1,024 arrays
_PRIMITIVE = re.compile(r'(?m)^\{ (\d+) \[label ="(.*)", shape=rectangle\]; \}$')
_OUTPUT = re.compile(r'(?m)^(\d+) -> "(.*)"$')


class Origins(NamedTuple):
    """How the arrays of a model come from those of its files.

    Attributes:
        computed (list): The names of the parameters that are not the array that has
            this name in the files.
        unused (dict): The arrays of the files from which no parameter is computed, by name.
    """

    computed: list[str]
    unused: Arrays


def origins(loaded: Loaded) -> Origins:
    """Compare the parameters of a model with the arrays that its loader has read.

    Identity is not enough. An array may be changed in place, as by ``weights[name] *= 2``,
    and other arrays may be computed from it. MLX tells both only in the drawing of a graph.
    """
    parameters: Any = dict(tree_flatten(loaded.model.parameters()))
    sources = _primitives_of(list(loaded.read.values()))
    needed = set(_primitives(_drawing(*parameters.values())))
    computed = [
        name
        for name, array in parameters.items()
        if array is not loaded.read.get(name) or sources[id(array)].kind not in (_READ, "")
    ]
    unused = {
        name: array
        for name, array in loaded.read.items()
        if sources[id(array)].kind == _READ and sources[id(array)].number not in needed
    }
    return Origins(computed, unused)


class _Source(NamedTuple):
    """The primitive that will compute an array; both are empty if it is computed already."""

    number: str  # which MLX gives a primitive in every drawing
    kind: str


def _primitives_of(arrays: list[mx.array]) -> dict[int, _Source]:
    """Return the primitives that compute some arrays, by the ids of the arrays."""
    found: dict[int, _Source] = {}
    for start in range(0, len(arrays), _MOST_NAMES):
        some = arrays[start : start + _MOST_NAMES]
        drawing = _drawing(**{str(id(array)): array for array in some})
        kinds, outputs = _primitives(drawing), _OUTPUT.findall(drawing)
        numbers = {name: number for number, name in outputs}
        for array in some:
            number = numbers.get(str(id(array)), "")
            found[id(array)] = _Source(number, kinds.get(number, ""))
    return found


def _primitives(drawing: str) -> dict[str, str]:
    return dict(_PRIMITIVE.findall(drawing))


def _drawing(*arrays: mx.array, **named: mx.array) -> str:
    file = StringIO()
    mx.export_to_dot(file, *arrays, **named)
    return file.getvalue()
