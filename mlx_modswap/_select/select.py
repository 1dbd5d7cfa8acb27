"""Find the places that patterns, ``where`` and ``exclude`` select."""

from __future__ import annotations

from itertools import compress
from typing import NamedTuple

import mlx.nn as nn

from .._model.walk import Places
from .._patterns.parse import Parsed
from .arguments import Patterns, Request, Rule, Where, check_model, check_where, parse_argument
from .match import Accepted, ask_where, first_pattern, match
from .no_effect import check_effects, check_matches


def select(
    model: nn.Module,
    pattern: Patterns,
    *,
    where: Where | None = None,
    exclude: Patterns = (),
    strict: bool = True,
) -> dict[str, nn.Module]:
    """Find the modules of a model whose paths match a pattern.

    Nothing changes. The modules are in the order in which :func:`replace_layers`
    calls its factory.

    Args:
        model (mlx.nn.Module): The model to look into.
        pattern (str, re.Pattern or an iterable of them): The paths to select.
            Several patterns select the union of their matches.
        where (type, tuple of types or Callable, optional): Which of these modules
            to select: the instances of a class, or those for which
            ``where(path, module)`` is true. Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): The paths to leave out,
            with everything inside them. Default: ``()``.
        strict (bool): If ``True``, an argument that does nothing is an error:
            of the modules that ``where`` accepts, each pattern must match at
            least one, and each ``exclude`` must remove at least one that a
            pattern matches. Default: ``True``.

    Returns:
        dict[str, mlx.nn.Module]: The module at each path, in definition order. A
        module in several places is listed under each of its paths.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, an ``exclude`` or ``where`` does nothing.
        SelectionError: If the model contains a cycle.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import select
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(select(model, "layers.*", where=nn.Linear))
        ['layers.0', 'layers.2']
    """
    check_model(model)
    rule = Rule(parse_argument(model, "pattern", pattern))
    excludes = parse_argument(model, "exclude", exclude)
    places = choose(model, [rule], where, excludes, strict).places
    chosen: dict[str, nn.Module] = {}
    for path, module in zip(places.paths, places.modules):
        chosen.setdefault(path, module)
    return chosen


class Chosen(NamedTuple):
    """The places that a request selects.

    Attributes:
        places (Places): The places, in definition order.
        rules (list[int]): The number of the rule that decides each place.
        left_alone (list[tuple[str, nn.Module]]): Path and module of each place that an
            exclude, or a rule with ``None``, leaves alone, whether or not ``where``
            accepts it.
    """

    places: Places
    rules: list[int]
    left_alone: list[tuple[str, nn.Module]]


def choose(
    model: nn.Module,
    rules: list[Rule],
    where: Where | None,
    excludes: list[Parsed],
    strict: bool,
) -> Chosen:
    """Find the places that the arguments of a call select."""
    check_where(where)
    request = Request(rules, where, excludes)
    places = match(model, request)
    if strict:
        check_matches(model, request, places)
    accepted = ask_where(places, request, strict)
    if strict:
        check_effects(model, request, places, accepted)
    return narrow(places, request, accepted)


def narrow(places: Places, request: Request, accepted: Accepted | None) -> Chosen:
    """Keep the places that ``where`` accepts and that no exclude removes, and return them."""
    included, owners = request.included, request.owners
    masks = set(places.masks)
    unexcluded = {mask for mask in masks if mask <= included}
    rule_of = {mask: owners[first_pattern(mask)] for mask in unexcluded}
    kept = masks - unexcluded | {mask for mask in unexcluded if request.rules[rule_of[mask]].keeps}
    left_alone: list[tuple[str, nn.Module]] = []
    if kept:
        found = zip(places.paths, places.modules, places.masks)
        left_alone = [(path, module) for path, module, mask in found if mask in kept]
    if unexcluded < masks:
        is_unexcluded = list(map(unexcluded.__contains__, places.masks))
        accepted = accepted and list(compress(accepted, is_unexcluded))
        places.keep(is_unexcluded)
    if accepted is not None:
        places.keep(accepted)
    return Chosen(places, list(map(rule_of.__getitem__, places.masks)), left_alone)
