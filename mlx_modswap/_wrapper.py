"""A module that stands in for a layer, and hooks that are made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import mlx.nn as nn

from ._containers import WRAPPED
from ._errors import described
from ._match import Patterns, Where
from ._replace import swapped
from ._select import select

Change = Callable[[str, Any], Any]
Outputs = dict[str, list[Any]]
T = TypeVar("T")

_SEALED = "(sealed)"  # no name of an attribute, so it hides none of the layer's


class _Sealing(type):
    """Knows when the ``__init__`` of a wrapper is over: what is set later is set on the layer."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        wrapper = super().__call__(*args, **kwargs)
        if not dict.__contains__(wrapper, WRAPPED):
            raise TypeError(f"{cls.__name__}.__init__ must call super().__init__(layer)")
        _own(wrapper)[_SEALED] = True
        return wrapper


class Wrapper(nn.Module, metaclass=_Sealing):
    """Stands in for a layer, and is that layer to everyone who asks.

    Attributes, parameters and their names, frozen state, training mode and
    ``isinstance`` are those of the layer, whichever way they are read or set.
    A subclass overrides ``__call__`` to see or change what goes in and out, and
    defines only methods of its own. What its ``__init__`` sets on ``self``
    belongs to the wrapper and is no parameter; all that is set later goes to
    the layer. ``__wrapped__`` is the layer.

    Args:
        layer (mlx.nn.Module): The layer to stand in for.

    Raises:
        TypeError: If ``layer`` is no module.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import Wrapper, replace_layers
        >>> class Scaled(Wrapper):
        ...     def __init__(self, layer, scale):
        ...         super().__init__(layer)
        ...         self.scale = scale
        ...
        ...     def __call__(self, *args, **kwargs):
        ...         return self.scale * super().__call__(*args, **kwargs)
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> _ = replace_layers(model, "layers.0", lambda path, layer: Scaled(layer, 2.0))
        >>> model.layers[0]
        Scaled(Linear(input_dims=4, output_dims=2, bias=True))
        >>> isinstance(model.layers[0], nn.Linear), model.layers[0].weight.shape
        (True, (2, 4))
    """

    # There is one copy of everything, in the layer. The raw dict of the wrapper holds
    # nothing but the layer, for the code that reads raw dicts: `mx.eval` and `mx.compile`
    # find the arrays there. Everyone else asks through the methods below, which are the
    # layer's, so no name gets a segment more. A copy of the layer's entries would have
    # the same names too, but goes stale when the layer sets one itself (`BatchNorm` does).

    __wrapped__: nn.Module

    def __init__(self, layer: nn.Module):
        if not issubclass(type(layer), nn.Module):
            raise TypeError(f"layer must be an mlx.nn.Module, not {described(layer)}")
        dict.__setitem__(self, WRAPPED, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return dict.__getitem__(self, WRAPPED)(*args, **kwargs)

    # Also the methods of `nn.Module` and `dict` are taken from the layer, whose class may
    # override them, and so is `__class__`, which `isinstance` asks for.
    def __getattribute__(self, name: str) -> Any:
        if name == "__wrapped__":
            return dict.__getitem__(self, WRAPPED)
        if _is_own(self, name):
            return object.__getattribute__(self, name)
        return getattr(dict.__getitem__(self, WRAPPED), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _SEALED not in _own(self) or _is_own(self, name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.__wrapped__, name, value)

    def __delattr__(self, name: str) -> None:
        if _is_own(self, name):
            object.__delattr__(self, name)
        else:
            delattr(self.__wrapped__, name)

    # Python looks these up in the class.
    def __getitem__(self, key: Any) -> Any:
        return self.__wrapped__ if key == WRAPPED else self.__wrapped__[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == WRAPPED:  # mx.grad and mx.compile of an older MLX write back what they found
            dict.__setitem__(self, WRAPPED, value)
        else:
            self.__wrapped__[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.__wrapped__[key]

    def __contains__(self, key: object) -> bool:
        return key == WRAPPED or key in self.__wrapped__

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__wrapped__)

    def __len__(self) -> int:
        return len(self.__wrapped__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__wrapped__!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self), self.__wrapped__, _own(self))


# ---------------------------------------------------------------- for the length of a block


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


# ---------------------------------------------------------------- what a wrapper is made of


def _own(wrapper: Wrapper) -> dict[str, Any]:
    return object.__getattribute__(wrapper, "__dict__")


def _is_own(wrapper: Wrapper, name: str) -> bool:
    """Whether an attribute is the wrapper's: set by its ``__init__``, or defined in its class."""
    if name in _own(wrapper):
        return True
    for cls in type(wrapper).__mro__:
        if cls is nn.Module:
            return False
        if name in cls.__dict__:
            return True
    return False


def _rebuilt(cls: type[Wrapper], layer: nn.Module, own: dict[str, Any]) -> Wrapper:
    """A wrapper from its parts, for ``copy`` and ``pickle``."""
    wrapper = cls.__new__(cls)
    dict.__setitem__(wrapper, WRAPPED, layer)
    _own(wrapper).update(own)
    return wrapper
