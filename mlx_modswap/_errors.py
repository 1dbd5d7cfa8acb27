"""The three errors of the library, and the words that messages share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import mlx.nn as nn

_MOST_NAMES = 8  # in a list of what is there


class PatternError(ValueError):
    """The text of a pattern is wrong."""

    __module__ = "mlx_modswap"  # where users find it


class NoMatchError(LookupError):
    """A pattern, a rule, a ``where``, an ``exclude`` or a hook did nothing."""

    __module__ = "mlx_modswap"  # where users find it


class SelectionError(ValueError):
    """What was selected cannot be swapped as asked."""

    __module__ = "mlx_modswap"  # where users find it


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, where Python has them (3.11 and later)."""
    add_note = getattr(error, "add_note", None)
    if add_note is not None:
        add_note(text)


def shorten(text: str) -> str:
    """The text, or the beginning of one that is too long for a message."""
    return text if len(text) <= 80 else text[:77] + "..."


def listed(things: Iterable[str]) -> str:
    """A few of many things, with how many more there are."""
    things = list(things)
    more = len(things) - _MOST_NAMES
    shown = ", ".join(things[:_MOST_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def classes(modules: Iterable[nn.Module]) -> str:
    """How many modules of which class there are."""
    counts = Counter(type(module).__name__ for module in modules)
    return listed(f"{count} {name}" for name, count in counts.most_common())


def class_names(of: Iterable[type]) -> dict[type, str]:
    """What to call some classes, so that no two of them read the same."""
    classes = list(dict.fromkeys(of))
    same_name = Counter(cls.__name__ for cls in classes)
    names: dict[type, str] = {}
    same_module: Counter[str] = Counter()  # as in a notebook whose cell was run again
    for cls in classes:
        name = cls.__name__ if same_name[cls.__name__] == 1 else _full_name(cls)
        same_module[name] += 1
        names[cls] = f"{name} ({same_module[name]})" if same_module[name] > 1 else name
    return names


def _full_name(cls: type) -> str:
    """The name of a class after that of the outermost module with it: ``mlx.nn.RMSNorm``."""
    for name in accumulate(cls.__module__.split("."), "{}.{}".format):
        if name in sys.modules and vars(sys.modules[name]).get(cls.__name__) is cls:
            return f"{name}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def described(value: Any) -> str:
    """What kind of thing a value is, in the words of a message."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if issubclass(type(value), nn.Module):
        return f"a module ({name})"
    name = f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"
    if isinstance(value, list):
        return f"{name} of {list.__len__(value)}"
    if isinstance(value, tuple):
        return f"{name} of {tuple.__len__(value)}"
    return "a function" if callable(value) else name
