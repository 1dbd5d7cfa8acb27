"""Swap the layers of an MLX model by path pattern."""

from ._errors import NoMatchError, PatternError, SelectionError
from ._hooks import capture, observe, patch
from ._replace import partial_modules, replace_layers, swapped
from ._report import Replacement
from ._select import select
from ._show.tree import tree
from ._wrapper import Wrapper

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
