"""Swap the layers of an MLX model by path pattern."""

from ._errors import NoMatchError, PatternError, SelectionError
from ._hooks.hooks import capture, observe, patch
from ._hooks.wrapper import Wrapper
from ._select.select import select
from ._show.report import Replacement
from ._show.tree import tree
from ._swap.partial import partial_modules
from ._swap.replace import replace_layers, swapped

__all__ = [
    "NoMatchError",
    "PatternError",
    "Replacement",
    "SelectionError",
    "Wrapper",
    "capture",
    "observe",
    "partial_modules",
    "patch",
    "replace_layers",
    "select",
    "swapped",
    "tree",
]
