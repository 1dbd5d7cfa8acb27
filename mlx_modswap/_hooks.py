"""Hooks for the length of a ``with`` block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.nn as nn

from ._errors import described
from ._replace import swapped
from ._select import Patterns, Where, select
from ._wrapper import Wrapper

Change = Callable[[str, Any], Any]
Outputs = dict[str, list[Any]]


@contextmanager
def capture(
    model: nn.Module,
    pattern: Patterns,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
) -> Iterator[Outputs]:
    """Record what layers put out, for the length of a ``with`` block.

    Each call of a selected layer appends its output, whatever it is, to the
    list under its path. Layers inside selected layers may be selected too.
    Afterwards the model has its own layers back; the lists stay. A layer in
    several places has one list, which is under each of its paths.

    A function made by :func:`mlx.core.compile` calls the layers once, to trace
    them, with arrays that are never computed. With the yielded dict as its
    ``outputs=`` the lists hold what the layers put out in its last call; make
    a new function for inputs of another shape.

    Args:
        model (mlx.nn.Module): The model to listen to.
        pattern (str, re.Pattern or an iterable of them): The paths of the
            layers. See :func:`select`.
        where (type, tuple of types or Callable, optional): The modules to take
            of these. See :func:`select`. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave
            out. Default: ``()``.

    Yields:
        dict[str, list]: For each path the outputs, in the order of the calls.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing.
        SelectionError: As in :func:`swapped`.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import capture
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with capture(model, "layers.*") as outputs:
        ...     y = model(mx.ones((1, 4)))
        >>> {path: output.shape for path, (output,) in outputs.items()}
        {'layers.0': (1, 8), 'layers.1': (1, 8), 'layers.2': (1, 2)}
    """
    recorded: defaultdict[str, list[Any]] = defaultdict(list)

    def record(path: str, output: Any) -> Any:
        recorded[path].append(output)
        return output

    with _hooked(model, pattern, record, where, exclude) as called:
        yield {path: recorded[name] for path, name in called.items()}


@contextmanager
def patch(
    model: nn.Module,
    pattern: Patterns,
    change: Change,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
) -> Iterator[None]:
    """Change what layers put out, for the length of a ``with`` block.

    Afterwards the model has its own layers back. Layers inside selected layers
    may be selected too.

    Args:
        model (mlx.nn.Module): The model to change.
        pattern (str, re.Pattern or an iterable of them): The paths of the
            layers. See :func:`select`.
        change (Callable): Called as ``change(path, output)`` after each call of
            a layer, returns what to go on with instead of ``output``. A layer in
            several places is called by its first path.
        where (type, tuple of types or Callable, optional): The modules to take
            of these. See :func:`select`. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave
            out. Default: ``()``.

    Yields:
        None

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing.
        SelectionError: As in :func:`swapped`.
        TypeError: If an argument is of the wrong type, or if ``change`` returns
            ``None`` for what was not.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import patch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Identity())
        >>> with patch(model, "layers[1]", lambda path, output: output + 1):
        ...     print(model(mx.zeros((1, 4))).min() >= 1)
        array(True, dtype=bool)
    """
    if not callable(change) or isinstance(change, nn.Module):
        what = described(change)
        raise TypeError(f"change must be a function of path and output, not {what}")

    with _hooked(model, pattern, change, where, exclude):
        yield


class _Hooked(Wrapper):
    """A layer whose output goes through a function."""

    def __init__(self, path: str, layer: nn.Module, change: Change):
        super().__init__(layer)
        self.__path, self.__change = path, change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        new = self.__change(self.__path, output)
        if new is None and output is not None:
            raise TypeError(
                f"change returned None for {self.__path!r}; it must return an output, "
                "the one it was given to change nothing"
            )
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is copied or saved inside the block is the layer without the hook."""
        return self.__wrapped__.__reduce_ex__(protocol)


@contextmanager
def _hooked(
    model: nn.Module,
    pattern: Patterns,
    change: Change,
    where: Where | None,
    exclude: Patterns,
) -> Iterator[dict[str, str]]:
    """Hook the selected layers; yields the path by which ``change`` is called, for each of theirs.

    Layers may lie inside one another, and a swap takes no such ones: there is one
    for each depth. A layer in several places is as deep as its deepest.
    """
    chosen = select(model, pattern, where=where, exclude=exclude)
    depths: dict[int, int] = {}
    for path, layer in chosen.items():
        depths[id(layer)] = max(path.count("."), depths.get(id(layer), 0))
    called: dict[str, str] = {}
    hook = partial(_Hooked, change=change)

    def is_at(depth: int) -> Where:
        return lambda path, layer: path in chosen and depths.get(id(layer)) == depth

    with ExitStack() as stack:
        for depth in sorted(set(depths.values())):
            swap = stack.enter_context(swapped(model, "**", hook, where=is_at(depth)))
            firsts: dict[int, str] = {}
            for path, hooked in swap.items():
                called[path] = firsts.setdefault(id(hooked), path)
        yield {path: called[path] for path in chosen}
