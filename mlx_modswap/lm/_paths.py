"""Paths in the words of a message."""

from __future__ import annotations

from collections.abc import Iterable

from .._fold import fold, pattern_of, segments


def folded(paths: Iterable[str]) -> list[str]:
    """Few patterns for many paths: ``['model.layers[0:4].mlp.up_proj']``."""
    split = [segments(path, slices=True) for path in paths]
    return [pattern_of(product) for product, _ in fold(split)]
