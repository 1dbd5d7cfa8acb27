"""The three errors of the library, and what they say of a function that was called wrongly."""

from __future__ import annotations

from typing import Any


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
    error: BaseException, function: Any, path: str, call: str, corrected: str = ""
) -> None:
    """Add a note on how a function is called, if it failed because it takes other arguments.

    Args:
        error (BaseException): The error that the function raised.
        function (Callable): The function.
        path (str): The first argument of the call.
        call (str): How the function is called: ``"factory(path, module)"``.
        corrected (str): A call that would work, if one is known, with ``{}`` for the name of
            the function.
    """
    path_was_taken_for_a_module = getattr(error, "obj", None) is path
    if not path_was_taken_for_a_module and not _refuses_the_call(function, error):
        return
    name = getattr(function, "__qualname__", "<lambda>")
    text = f"it was called as {call}"
    is_public = "<" not in name  # no lambda or function inside another
    if corrected and path_was_taken_for_a_module and is_public:
        text += f"; write {corrected.format(name)}"
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
