"""Carry out a checked plan with one ``update_modules`` call, and undo it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import overload

import mlx.nn as nn

from .._errors import SelectionError
from .._model.walk import Places
from .._select.arguments import Patterns, Where
from .._show.report import Replacement
from .factories import Factory, Rules
from .nest import nest
from .plan import Plan, make_plan
from .undo import until_the_end


@overload
def replace_layers(
    model: nn.Module,
    pattern: Rules,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement: ...


@overload
def replace_layers(
    model: nn.Module,
    pattern: Patterns,
    factory: Factory,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement: ...


def replace_layers(
    model: nn.Module,
    pattern: Patterns | Rules,
    factory: Factory | None = None,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Replacement:
    """Replace the modules whose paths match a pattern with the modules that a factory returns.

    Only the selected places change. Every factory runs and every check passes
    before the model is changed, by one call of
    :meth:`mlx.nn.Module.update_modules`. If anything fails, nothing changes.

    * Factories are called in definition order. A factory that returns the
      module it was given leaves it unchanged.
    * A module with parameters that is in several places is *tied*: the factory
      is called once, and the new module is put into all of these places.
    * A new module gets the training mode of the module that it replaces. Frozen
      state is not copied: an adapter in a frozen model is trainable.
    * If a place is left alone, by ``exclude`` or by a rule whose value is
      ``None``, everything inside it is left alone, too.

    Args:
        model (mlx.nn.Module): The model to change in place.
        pattern (str, re.Pattern, an iterable of them, or a mapping): The paths
            of the modules to replace. A mapping holds rules: each key is a
            pattern, or a tuple of patterns, and its value is the factory for
            them. The first rule that matches a path decides; if its value is
            ``None``, the path is left alone.
        factory (Callable): Called as ``factory(path, module)``; returns the new
            module. Left out if ``pattern`` is a mapping.
        where (type, tuple of types or Callable, optional): Which of these modules
            to replace. See :func:`select`. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave out,
            with everything inside them. Default: ``()``.
        strict (bool): If ``True``, an argument that does nothing is an error.
            Of the modules that ``where`` accepts, each pattern must match at
            least one, each rule must be the first to match at least one, and
            each ``exclude`` must remove at least one that a pattern matches.
            Default: ``True``.

    Returns:
        Replacement: A mapping from path to new module, for the places that
        changed. Print it to see the change.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, a rule, an ``exclude`` or ``where`` does nothing.
        SelectionError: If one place to change lies inside another; if only some
            of the places of a tied module would change; if a place that is left
            alone would be removed together with a module that contains it; if
            ``update_modules`` cannot reach a place; or if the model contains a
            cycle.
        TypeError: If an argument, or what a factory returns, is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import replace_layers
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> print(replace_layers(model, "layers[-1]", lambda path, layer: nn.Identity()))
        layers.2   Linear -> Identity   x1   4.2K -> 0 params   ...
    """
    plan = make_plan(model, pattern, factory, where, exclude, strict)
    report = _report(plan)
    _carry_out(plan)
    return report


@overload
def swapped(
    model: nn.Module,
    pattern: Rules,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> AbstractContextManager[Replacement]: ...


@overload
def swapped(
    model: nn.Module,
    pattern: Patterns,
    factory: Factory,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> AbstractContextManager[Replacement]: ...


@contextmanager
def swapped(
    model: nn.Module,
    pattern: Patterns | Rules,
    factory: Factory | None = None,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> Iterator[Replacement]:
    """Replace modules inside a ``with`` block, then put the same modules back.

    Takes the arguments of :func:`replace_layers`. At the end of the block the
    old modules return to their places, even if the block raises an error. Setting a
    training mode inside the block, for example with ``model.eval()``, affects only
    the modules that are in the model at that time.

    Blocks on one model need not end in the reverse order, for example if two token
    streams take turns. Once the last of the blocks has ended, the model has its own
    layers back. But a block raises an error at its end in two cases:

    * a later block is still open on one of the same places, so its own module was not
      in use there in the meantime;
    * one of its places is no longer at its path, because another block changed a
      module that contains it.

    Use one block around both streams instead. The same holds for :func:`observe`,
    :func:`capture` and :func:`patch`.

    Yields:
        Replacement: What was changed.

    Raises:
        SelectionError: As in :func:`replace_layers`. Also at the end of the block, if
            one of the places was modified by hand inside the block (it stays as it is,
            and the others are put back), or if blocks did not end in the reverse order.
            If the block itself raises an error, that error is raised, with this one as
            a note.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import swapped
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> with swapped(model, "layers[0]", lambda path, layer: nn.Identity()):
        ...     print(model.layers[0])
        Identity()
        >>> print(model.layers[0])
        Linear(input_dims=4, output_dims=4, bias=True)
    """
    plan = make_plan(model, pattern, factory, where, exclude, strict)
    report = _report(plan)
    with until_the_end(plan.places, plan.new_modules, lambda: _carry_out(plan)):
        yield report


def _carry_out(plan: Plan) -> None:
    """Swap, and set the training mode of the modules that the model did not contain before."""
    modes = [(module, getattr(module, "_training", True)) for module, _ in plan.training]
    try:
        _set_modes(plan.training)
        _update(plan.places, plan.places.modules, plan.new_modules)
    except BaseException:
        _set_modes(modes)
        raise


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module._set_training_mode(mode)


def _update(
    places: Places, old_modules: Sequence[nn.Module], new_modules: Sequence[nn.Module]
) -> None:
    """Put new modules into the places with one call of ``update_modules``."""
    model = places.model
    try:
        nn.Module.update_modules(model, nest(places, new_modules))
        if (at := places.first_without(new_modules)) is not None:
            raise SelectionError(f"MLX's update_modules left {places.paths[at]!r} as it was")
    except BaseException as error:
        # The same partial dict visits the places in the same order and stops where the first
        # call stopped, so it restores exactly what was replaced.
        with suppress(Exception):
            nn.Module.update_modules(model, nest(places, old_modules))
        if not isinstance(error, Exception):
            raise
        message = _unreachable(places, error)
        if (number := places.first_without(old_modules)) is not None:
            path = places.paths[number]
            message = f"MLX's update_modules failed, and so did putting {path!r} back: {error}"
        raise SelectionError(message) from error


def _unreachable(places: Places, error: Exception) -> str:
    if isinstance(error, RecursionError):
        depth = 1 + max(path.count(".") for path in places.paths)
        return (
            f"a place that is {depth} levels deep cannot be changed: MLX's update_modules goes "
            "down by recursion, which Python limits (sys.setrecursionlimit); nothing was changed"
        )
    return f"MLX's update_modules failed, and nothing was changed: {error}"


def _report(plan: Plan) -> Replacement:
    places = plan.places
    digits = any(str(key).isdecimal() or "." in str(key) for key in places.dict_keys())
    return Replacement(
        places.paths, places.modules, plan.new_modules, plan.rules, numbers_are_indices=not digits
    )
