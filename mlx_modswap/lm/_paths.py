"""Write paths in a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._fold import fold, pattern_of, segments

_MOST = 4  # things in one list


def folded(paths: Iterable[str]) -> list[str]:
    """Fold many paths into few patterns: ``['model.layers[0:4].mlp.up_proj']``."""
    split = [segments(path, slices=True) for path in paths]
    return [pattern_of(product) for product, _ in fold(split)]


def listed(texts: Sequence[str], between: str = ", ") -> str:
    """Join the first few of some texts, and say how many more there are."""
    more = len(texts) - _MOST
    return between.join(texts[:_MOST]) + (f" and {more} more" if more > 0 else "")
