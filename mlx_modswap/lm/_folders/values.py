"""Compare the values of the arrays that a loader computes with those in the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..._patterns.fold import folded
from ..._select.select import select
from ..._words import listed
from .._loaders import Arrays, Loaded
from .._quantize import quantized
from .._shards import weight_files
from .origins import origins

# How far a value may move, relatively and absolutely. A norm is a long sum, so normalizing twice
# moves a float32 by 20 units in the last place; shorter floats are only rounded again.
_CLOSE = {mx.float16: (2.0**-10, 2.0**-24), mx.bfloat16: (2.0**-7, 0.0)}
_CLOSE_FLOAT32 = (2.0**-17, 0.0)
_PART = 2**18  # elements that are compared at a time, which takes a few times their memory


def other_values(folder: Path, loaded: Loaded, by: str) -> str:
    """Say which arrays get other values when they are loaded from a folder; ``""`` if none.

    Only arrays that are not taken from the files as they are need to be compared. Each is
    computed, compared and freed before the next, and the model is left without arrays.

    Args:
        folder (pathlib.Path): A folder, whose files have the names and shapes of the model.
        loaded (Loaded): The model that its loader makes of it.
        by (str): The name of the loader.
    """
    names = origins(loaded).computed
    places = select(loaded.model, "**", where=quantized, strict=False)
    arrays = _taken(loaded.model, names)
    loaded.read.clear()
    written = _read(folder, names)
    changed = [name for name in names if not is_same(arrays.pop(name), written.pop(name))]
    if not changed:
        return ""
    message = (
        f"{by} would compute {listed(folded(changed, numbers_are_indices=True), 4)} anew "
        "each time it loads the folder, and get other values than the model has"
    )
    packed = [path for path in places if any(_is_inside(name, path) for name in changed)]
    if packed:
        paths = listed(folded(packed, numbers_are_indices=True), 4)
        message += f"; other settings for {paths}, or None (keep), may avoid that"
    return message


def _is_inside(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def _taken(model: nn.Module, names: list[str]) -> Arrays:
    """Return some arrays of a model, and remove all arrays from it."""
    parameters: Any = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda array: mx.array([]), model.parameters()))
    return {name: parameters[name] for name in names}


def _read(folder: Path, names: list[str]) -> Arrays:
    found: Arrays = {}
    for file in weight_files(folder) if names else ():
        arrays: Any = mx.load(str(file))
        found.update((name, arrays[name]) for name in names if name in arrays)
    return found


def is_same(one: mx.array, other: mx.array) -> bool:
    """Return whether two arrays have the same values but for rounding; compute both."""
    same = all(_is_close(*parts) for parts in zip(_parts(one), _parts(other)))
    mx.clear_cache()
    return same


def _parts(array: mx.array) -> Iterator[mx.array]:
    flat = array.reshape(-1)
    for start in range(0, array.size, _PART):
        yield flat[start : start + _PART]


def _is_close(one: mx.array, other: mx.array) -> bool:
    if not mx.issubdtype(one.dtype, mx.floating):
        return mx.array_equal(one, other).item() is True
    rtol, atol = _CLOSE.get(one.dtype, _CLOSE_FLOAT32)
    both = one.astype(mx.float32), other.astype(mx.float32)
    return mx.allclose(*both, rtol=rtol, atol=atol, equal_nan=True).item() is True
