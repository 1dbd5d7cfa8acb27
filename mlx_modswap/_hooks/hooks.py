"""Hooks inside a ``with`` block: ``observe``, ``capture`` and ``patch``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, reduce
from operator import or_
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .._errors import NoMatchError, SelectionError, note_misuse
from .._model.containers import WRAPPED
from .._model.walk import Places
from .._patterns.fold import folded
from .._patterns.parse import Parsed
from .._select.arguments import Patterns, Where
from .._swap.plan import make_plan
from .._swap.undo import until_the_end
from .._words import described, listed
from .wrapper import Wrapper

ChangeOutput = Callable[[str, Any], Any]
Outputs = dict[str, list[Any]]


class Hook(Protocol):
    """A function of path, output and the arguments of the call."""

    def __call__(self, path: str, output: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Look at one call of a layer. The result is ignored."""


OnCall = Callable[[str, Any, Sequence[Any], dict[str, Any]], Any]


@contextmanager
def observe(
    model: nn.Module,
    pattern: Patterns,
    hook: Hook,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Iterator[dict[str, int]]:
    """Call a function after each call of a selected layer inside a ``with`` block.

    The function sees the output and the arguments of each call, and changes nothing:
    use it for calibration, for running statistics or to look at inputs, without
    keeping every array. Arrays that it does keep stay as they were in the call, even
    if the model changes them later (``h += y``). After the block the model has its own
    layers back, and no layer refers to ``hook`` any more. For a layer with parameters
    in several places, ``hook`` is called once per call of the layer, with the first of
    its paths.

    If a function is compiled inside the block, ``hook`` is called only once, while
    the function is traced, with arrays that must not be kept.

    Args:
        model (mlx.nn.Module): The model to observe.
        pattern (str, re.Pattern or an iterable of them): The paths of the
            layers. Layers inside selected layers may be selected too. See
            :func:`select`.
        hook (Callable): Called as ``hook(path, output, *args, **kwargs)`` with the
            arguments of the layer's call. Its result is ignored; an error that it
            raises propagates through the model to the caller.
        where (type, tuple of types or Callable, optional): Which of these
            layers to hook. See :func:`select`. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave
            out, with everything inside them. Default: ``()``.
        strict (bool): If ``True``, a pattern, ``exclude`` or ``where`` that does
            nothing is an error, and so is a pattern if none of its layers is called
            inside the block. Default: ``True``.

    Yields:
        dict[str, int]: How often the layer at each path has been called so far.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing. Also at the
            end of the block, if no layer of some pattern was called inside it.
        SelectionError: As in :func:`swapped`.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import observe
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> moments = {}
        >>> def add(path, output, x):
        ...     moments[path] = moments.get(path, 0) + x.square().sum(axis=0)
        >>> with observe(model, "**", add, where=nn.Linear) as calls:
        ...     for _ in range(3):
        ...         y = model(mx.ones((1, 4)))
        >>> calls
        {'layers.0': 3, 'layers.2': 3}
        >>> moments["layers.0"]
        array([3, 3, 3, 3], dtype=float32)
    """
    _check_function("hook", "path, output and the arguments of the call", hook)

    def on_call(path: str, output: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            hook(path, _detached(output), *args, **kwargs)
        except Exception as error:
            error.add_note(f"while observing {path!r}")
            note_misuse(error, hook, path, "hook(path, output, *args, **kwargs)")
            raise
        return output

    with _hooking(model, pattern, on_call, where, exclude, strict, wants_inputs=True) as session:
        yield session.calls


@contextmanager
def capture(
    model: nn.Module,
    pattern: Patterns,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Iterator[Outputs]:
    """Record the outputs of layers inside a ``with`` block.

    Each call of a selected layer appends the output to the list under the layer's
    path. After the block the model has its own layers back; the lists stay. A layer
    in several places has one list, which is under each of its paths.

    A function compiled by :func:`mlx.core.compile` calls the layers only once, to
    trace them, with arrays that are never computed. If the yielded dict is passed to
    ``compile`` as ``outputs=``, the lists hold the outputs of the function's last
    call. Compile a new function for inputs of another shape.

    Args:
        model (mlx.nn.Module): The model to record.
        pattern (str, re.Pattern or an iterable of them): The paths of the
            layers. Layers inside selected layers may be selected too. See
            :func:`select`.
        where (optional): As in :func:`observe`.
        exclude (optional): As in :func:`observe`.
        strict (bool): As in :func:`observe`.

    Yields:
        dict[str, list]: The outputs of the layer at each path, in the order of the
        calls.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing. Also at the
            end of the block, if no layer of some pattern was called inside it.
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

    def on_call(path: str, output: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        recorded[path].append(_detached(output))
        return output

    with _hooking(model, pattern, on_call, where, exclude, strict) as session:
        yield {path: recorded[first] for path, first in session.firsts.items()}


@contextmanager
def patch(
    model: nn.Module,
    pattern: Patterns,
    change: ChangeOutput,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Iterator[None]:
    """ChangeOutput the outputs of layers inside a ``with`` block.

    After the block the model has its own layers back.

    Args:
        model (mlx.nn.Module): The model to change.
        pattern (str, re.Pattern or an iterable of them): The paths of the
            layers. Layers inside selected layers may be selected too. See
            :func:`select`.
        change (Callable): Called as ``change(path, output)`` after each call of
            a layer; returns the output to use instead. For a layer in several
            places, ``path`` is the first of its paths.
        where (optional): As in :func:`observe`.
        exclude (optional): As in :func:`observe`.
        strict (bool): As in :func:`observe`.

    Yields:
        None

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing. Also at the
            end of the block, if no layer of some pattern was called inside it.
        SelectionError: As in :func:`swapped`.
        TypeError: If an argument is of the wrong type, or if ``change`` returns
            ``None`` for an output that is not ``None``.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_modswap import patch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Identity())
        >>> with patch(model, "layers[1]", lambda path, output: output + 1):
        ...     print(model(mx.zeros((1, 4))).min() >= 1)
        array(True, dtype=bool)
    """
    _check_function("change", "path and output", change)

    def on_call(path: str, output: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            new = change(path, output)
        except Exception as error:
            error.add_note(f"while patching {path!r}")
            note_misuse(error, change, path, "change(path, output)")
            raise
        if new is None and output is not None:
            raise TypeError(
                f"change returned None for {path!r}; it must return an output; return the output "
                "it was given to leave it unchanged"
            )
        return _detached(new)

    with _hooking(model, pattern, on_call, where, exclude, strict):
        yield


def _check_function(name: str, arguments: str, function: Any) -> None:
    # A module is callable, but it takes arrays.
    if not callable(function) or isinstance(function, nn.Module):
        raise TypeError(f"{name} must be a function of {arguments}, not {described(function)}")


_ARRAY, _copied = mx.array, mx.array.__copy__  # another object for the same array


def _detached(value: Any) -> Any:
    """Return the same arrays as other objects, also those in a tuple, a list or a dict.

    In MLX ``h += y`` changes the object ``h`` itself. So a model that goes on with an
    output in this way would change what a hook has kept of it, or a vector that
    ``patch`` was told to use; and a hook would change what the model goes on with.
    """
    cls = type(value)
    if cls is _ARRAY:
        return _copied(value)
    if cls is tuple or cls is list:
        return cls([_detached(one) for one in value])
    if cls is dict:
        return {key: _detached(one) for key, one in value.items()}
    return value


# ---------------------------------------------------------------- the hooks of a block

_SESSION, _PATHS = "_(session)", "_(paths)"  # not identifiers, so they hide no attribute of a layer

_REASONS = (
    "likely reasons: the model was called outside the block (a generator runs only when it "
    "is read) or in a function that was compiled before it; a layer is used through its weights or "
    "a method other than __call__ (as_linear); a layer was replaced inside the block; strict=False "
    "allows it"
)


class _Session:
    """What the hooked layers of one block share.

    Attributes:
        on_call (Callable, optional): Called with the path, the output and the arguments of each
            call; returns the output to use. ``None`` once the block has ended, since a
            hooked layer may live longer, for example inside a module of another block.
        calls (dict[str, int]): How often the layer at each path was called.
        wants_inputs (bool): Whether ``see`` looks at the arguments.
        firsts (dict[str, str]): For each path, the first path of its layer.
        kind (type): The class of the hooked layers of this block alone, since mlx-lm's
            ``grad_checkpoint`` changes the class of a layer.
    """

    def __init__(self, on_call: OnCall, wants_inputs: bool):
        self.on_call: OnCall | None = on_call
        self.wants_inputs = wants_inputs
        self.calls: dict[str, int] = {}
        self.firsts: dict[str, str] = {}
        self.kind: Any = type(Hooked)("Hooked", (Hooked,), {})

    def hook(self, path: str, layer: nn.Module) -> nn.Module:
        """Make the hooked layer for a layer: a factory."""
        return self.kind(layer, self)


class Hooked(Wrapper):
    """A layer with the hook of a block. Setting an attribute sets it on the layer."""

    def __init__(self, layer: nn.Module, session: _Session):
        super().__init__(layer)
        own = object.__getattribute__(self, "__dict__")
        own[_SESSION], own[_PATHS] = session, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = object.__getattribute__(self, "__dict__")
        session, paths = own[_SESSION], own[_PATHS]
        given: Any = args, kwargs
        if session.wants_inputs:
            given = [_detached(one) for one in args], _detached(kwargs) if kwargs else kwargs
        output = dict.__getitem__(self, WRAPPED)(*args, **kwargs)
        if (on_call := session.on_call) is None:
            return output
        for path in paths:
            session.calls[path] += 1
        return on_call(paths[0], output, *given)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__wrapped__, name, value)

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the quantized layer, without the hook."""
        layer: Any = self.__wrapped__
        return layer.to_quantized(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the layer, without the hook."""
        return self.__wrapped__.__reduce_ex__(protocol)


def unhooked(module: Any) -> Any:
    """Return a module without the hooks of the blocks that are open."""
    while issubclass(type(module), Hooked):
        module = module.__wrapped__
    return module


@contextmanager
def _hooking(
    model: nn.Module,
    pattern: Patterns,
    on_call: OnCall,
    where: Where | None,
    exclude: Patterns,
    strict: bool,
    *,
    wants_inputs: bool = False,
) -> Iterator[_Session]:
    """Hook the selected layers inside a ``with`` block; yield what the hooked layers share."""
    session = _Session(on_call, wants_inputs)
    plan = make_plan(model, pattern, session.hook, where, exclude, strict, nested=True)
    places, masks = plan.places, dict(zip(plan.places.paths, plan.places.masks))
    for path, hooked in zip(places.paths, plan.new_modules):
        paths: list[str] = object.__getattribute__(hooked, "__dict__")[_PATHS]
        paths.append(path)
        session.calls[path], session.firsts[path] = 0, paths[0]
    numbers_are_indices = not any(
        str(key).isdecimal() or "." in str(key) for key in places.dict_keys()
    )
    try:
        with until_the_end(places, plan.new_modules, partial(_put, places, plan.new_modules)):
            yield session
    finally:
        session.on_call = None
    if strict:
        _check_calls(plan.patterns, masks, session.calls, numbers_are_indices)


def _put(places: Places, new_modules: Sequence[nn.Module]) -> None:
    """Put the hooked layers into their places.

    These may lie inside each other, which one partial dict of ``update_modules`` cannot say.
    A hooked layer keeps every path inside it valid, so the order does not matter.
    """
    try:
        for row, key, new in zip(places.rows, places.keys, new_modules):
            places.holders[row][key] = new
        if (number := places.first_without(new_modules)) is not None:
            raise SelectionError(f"{places.paths[number]!r} cannot be hooked")
    except BaseException as error:
        for row, key, old in zip(places.rows, places.keys, places.modules):
            with suppress(Exception):
                places.holders[row][key] = old
        if not isinstance(error, Exception):
            raise
        raise SelectionError(f"hooking failed, and nothing was changed: {error}") from error


def _check_calls(
    patterns: list[Parsed], masks: dict[str, int], calls: dict[str, int], numbers_are_indices: bool
) -> None:
    """Check that at least one of the layers that each pattern matches was called.

    Args:
        patterns (list[Parsed]): The patterns.
        masks (dict[str, int]): The patterns that match each path: bit ``i`` for pattern ``i``.
        calls (dict[str, int]): How often the layer at each path was called.
        numbers_are_indices (bool): Whether every number in a path is an index of a list.
    """
    called = reduce(or_, (mask for path, mask in masks.items() if calls[path]), 0)
    matched = reduce(or_, masks.values())
    for number, pattern in enumerate(patterns):
        if (matched & ~called) >> number & 1:
            paths = [path for path, mask in masks.items() if mask >> number & 1]
            names = listed(folded(paths, numbers_are_indices=numbers_are_indices))
            which = f"none of the {len(paths)} layers" if len(paths) > 1 else "the only layer"
            was = "was called" if len(paths) > 1 else "was not called"
            raise NoMatchError(
                f"{which} that {pattern.text} matches {was} inside the block: {names}; {_REASONS}"
            )
