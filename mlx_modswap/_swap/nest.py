"""Nest modules into the partial dict that ``update_modules`` takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.nn as nn

from .._model.walk import Places


def nest(places: Places, modules: Iterable[nn.Module]) -> dict[Any, Any]:
    """Return the partial module dict that puts ``modules`` into ``places``."""
    containers, parents, parent_keys = places.containers, places.parents, places.parent_keys
    partial: list[Any] = [None] * len(containers)  # by row
    partial[0] = {}
    for row in places.ancestors()[1:]:
        partial[row] = child = {} if isinstance(containers[row], dict) else []
        parent, key = partial[parents[row]], parent_keys[row]
        if type(parent) is list:
            _lengthen(parent, key)
        parent[key] = child
    for parent, key, module in zip(map(partial.__getitem__, places.rows), places.keys, modules):
        if type(parent) is list:
            if key == len(parent):  # the common case
                parent.append(module)
                continue
            _lengthen(parent, key)
        parent[key] = module
    return partial[0]


def _lengthen(entries: list[Any], index: int) -> None:
    """Lengthen a list with ``{}``, which tells update_modules to leave an entry alone."""
    while len(entries) <= index:
        entries.append({})
