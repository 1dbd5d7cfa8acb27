"""Paths in the words of a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._fold import fold, pattern_of, segments

_MOST = 4  # things in one list


def folded(paths: Iterable[str]) -> list[str]:
    """Few patterns for many paths: ``['model.layers[0:4].mlp.up_proj']``."""
    split = [segments(path, slices=True) for path in paths]
    return [pattern_of(product) for product, _ in fold(split)]


def listed(texts: Sequence[str], between: str = ", ") -> str:
    """The first few of some texts, and how many more there are."""
    more = len(texts) - _MOST
    return between.join(texts[:_MOST]) + (f" and {more} more" if more > 0 else "")
