"""Nest modules by path into a partial module dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from .._errors import NoMatchError
from .._model.walk import find
from .._patterns.match import literally
from .._select.arguments import check_model
from .._select.hints import no_place
from .._words import described
from .checks import check_aliases, check_different, check_nesting
from .nest import nest


def partial_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[Any, Any]:
    """Nest modules by path into the dict that :meth:`mlx.nn.Module.update_modules` takes.

    Unlike :func:`mlx.utils.tree_unflatten`, this function follows the real containers
    of the model: dict keys that are digits or contain dots are kept as they are, and
    ``{}`` represents a list entry that does not change.

    Args:
        model (mlx.nn.Module): The model that the paths belong to. It is not changed.
        modules (Mapping[str, mlx.nn.Module]): A module for each path. Paths are
            taken literally, as :meth:`mlx.nn.Module.named_modules` prints them.

    Returns:
        dict: The smallest nested dict that contains these modules.

    Raises:
        NoMatchError: If there is no module at a path.
        SelectionError: If a path lies inside another, if two places have the same
            path, or if two paths of one place are given different modules.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import partial_modules
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> partial_modules(model, {"layers.1": nn.Tanh()})
        {'layers': [{}, Tanh()]}
    """
    check_model(model)
    if not isinstance(modules, Mapping):
        raise TypeError(f"modules must map paths to modules, not {described(modules)}")
    for path, module in modules.items():
        if not isinstance(path, str):
            raise TypeError(f"a path is a str, not {described(path)}")
        if not issubclass(type(module), nn.Module):
            raise TypeError(f"{path!r} needs an mlx.nn.Module, not {described(module)}")
    places = find(model, literally(modules))
    found = set(places.paths)
    for path in modules:
        if path not in found:
            raise NoMatchError(no_place(model, path))
    check_different(places.paths)
    check_nesting(places, "and both are given; leave one of them out")
    new_modules = [modules[path] for path in places.paths]
    check_aliases(places, new_modules)
    return nest(places, new_modules)
