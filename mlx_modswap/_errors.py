"""The three errors of the library, and the words that messages share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import mlx.nn as nn


class PatternError(ValueError):
    """The text of a pattern is wrong."""

    __module__ = "mlx_modswap"  # where users find it


class NoMatchError(LookupError):
    """A pattern, a rule, a ``where``, an ``exclude`` or a hook did nothing."""

    __module__ = "mlx_modswap"  # where users find it


class SelectionError(ValueError):
    """What was selected cannot be swapped as asked."""

    __module__ = "mlx_modswap"  # where users find it


def note_misuse(
    error: BaseException, function: Any, path: str, call: str, mended: str = ""
) -> None:
    """Add a note on how a function is called, if it failed because it takes other arguments.

    Args:
        error (BaseException): The error that the function raised.
        function (Callable): The function.
        path (str): The first argument of the call.
        call (str): How the function is called: ``"factory(path, module)"``.
        mended (str): A call that would work, if one is known, with ``{}`` for the name of
            the function.
    """
    path_was_taken_for_a_module = getattr(error, "obj", None) is path
    if not path_was_taken_for_a_module and not _refuses_the_call(function, error):
        return
    name = getattr(function, "__qualname__", "<lambda>")
    text = f"it was called as {call}"
    is_public = "<" not in name  # no lambda or function inside another
    if mended and path_was_taken_for_a_module and is_public:
        text += f"; write {mended.format(name)}"
    error.add_note(text)


def _refuses_the_call(function: Any, error: BaseException) -> bool:
    """Return whether a function could not be called, or is a class such as ``nn.Linear``."""
    if not isinstance(error, TypeError):
        return False
    traceback = error.__traceback__
    if traceback is not None and traceback.tb_next is None:
        return True  # the function did not start to run
    # `nn.Linear(path, module)` does start, and fails when it computes with its dimensions.
    code = getattr(function.__init__, "__code__", None) if isinstance(function, type) else None
    return code is not None and "path" not in code.co_varnames[: code.co_argcount]


def shorten(text: str) -> str:
    """Return the text, cut if it is too long for a message."""
    return text if len(text) <= 80 else text[:77] + "..."


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
