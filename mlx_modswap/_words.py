"""Words that messages share: lists, counts, names of classes, sizes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def listed(things: Iterable[str], most: int = 8, between: str = ", ") -> str:
    """Join the first few of some texts, and say how many more there are."""
    things = list(things)
    more = len(things) - most
    return between.join(things[:most]) + (f" and {more} more" if more > 0 else "")


def counted(modules: int) -> str:
    """Format ``1`` as ``'1 module'``, and ``2`` as ``'2 modules'``."""
    return f"{modules} module" + "s" * (modules != 1)


def classes(modules: Iterable[nn.Module], beside: Iterable[type] = ()) -> str:
    """Say how many modules of each class there are.

    Args:
        modules (iterable of nn.Module): The modules to count.
        beside (iterable of type): Other classes that the message names.
    """
    counts = Counter(map(type, modules))
    names = class_names([*counts, *beside])
    return listed(f"{count} {names[cls]}" for cls, count in counts.most_common())


def class_names(of: Iterable[type]) -> dict[type, str]:
    """Return a name for each class, so that no two names are the same."""
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
    """Return a class's name in the outermost Python module that has it: ``mlx.nn.RMSNorm``."""
    for name in accumulate(cls.__module__.split("."), "{}.{}".format):
        if name in sys.modules and vars(sys.modules[name]).get(cls.__name__) is cls:
            return f"{name}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def described(value: Any) -> str:
    """Describe the kind of a value for a message: ``a module (Linear)``, ``a list of 3``."""
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


def number(count: int) -> str:
    """Format ``2100000`` as ``'2.1M'``."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def size(nbytes: int) -> str:
    """Format ``2100000`` as ``'2.1 MB'``."""
    return _scaled(nbytes, (" B", " KB", " MB", " GB", " TB"))


def _scaled(count: int, units: tuple[str, ...]) -> str:
    power = 0
    while power < len(units) - 1 and count >= 999.95 * 1000**power:
        power += 1
    return f"{count / 1000**power:.1f}{units[power]}" if power else f"{count}{units[0]}"


def dtypes(of: Iterable[mx.Dtype]) -> str:
    """Return the names of some dtypes as text."""
    return ", ".join(sorted(str(one).removeprefix("mlx.core.") for one in of)) or "no arrays"


def aligned(rows: list[list[str]]) -> list[str]:
    """Return a line for each row, with aligned columns; empty columns are left out."""
    columns = [column for column in zip(*rows) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    return ["   ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns)]
