"""Put an adapter around a layer."""

from __future__ import annotations

import mlx.nn as nn

from .kinds import METHODS, Adapter, kind_for, kind_of, mismatch, name_of


def attach(path: str, layer: nn.Module, adapter: Adapter, file: str) -> nn.Module:
    """Put an adapter around a layer, and return the adapter.

    Raises:
        ValueError: If the layer is of the wrong class or size, or not the one that the adapter
            was trained on. The message names ``file``.
    """
    name = name_of(layer)
    inner = kind_of(layer)
    if inner is not None:
        raise ValueError(
            f"{path!r} already has an adapter, a {name}; to replace it, take it off first "
            f"(layer.{inner.holds}), and to add this one to it, use '{path}.{inner.holds}'"
        )
    kind = kind_for(layer, adapter.method)
    if kind is None:
        raise ValueError(
            f"{file} has a {METHODS[adapter.method]} adapter for {path!r}, "
            f"and mlx-lm has no such adapter for {name}"
        )
    for fit in adapter.fits:
        adapter = fit(path, layer, adapter)
    if wrong := mismatch(layer, adapter.arrays, adapter.method, adapter.rank):
        raise ValueError(f"{file} does not fit {path!r}: {wrong}")
    new = kind.adapter.from_base(
        layer, r=adapter.rank, dropout=adapter.dropout, scale=adapter.scale
    )
    for key, array in adapter.arrays.items():
        new[key] = array
    return new
