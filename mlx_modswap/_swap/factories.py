"""Factories: the rules that name them, and their calls."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import mlx.nn as nn

from .._errors import note_misuse
from .._patterns.parse import Pattern
from .._select.arguments import Rule, parse_argument
from .._words import described

# A factory may be annotated to take an `nn.Linear`, so the module is an `Any` here.
Factory = Callable[[str, Any], nn.Module]


_Key = TypeVar("_Key", covariant=True)
_Value = TypeVar("_Value", covariant=True)


class _Mapping(Protocol[_Key, _Value]):
    """A mapping, as far as a type checker is concerned.

    A ``Mapping`` is invariant in its keys, so a type checker would not accept a ``dict`` with
    keys of type ``str`` as a mapping from patterns. This protocol has only ``items()``, which
    such a ``dict`` satisfies.
    """

    def items(self) -> ItemsView[_Key, _Value]: ...


Rules = _Mapping[Pattern | tuple[Pattern, ...], Factory | None]
_CORRECTED_FACTORY = "lambda path, layer: {}(layer)"


def rules_and_factories(
    model: nn.Module, pattern: Any, factory: Any
) -> tuple[list[Rule], list[Factory | None]]:
    """Return the rules and their factories; patterns that are not in a mapping are one rule."""
    if not isinstance(pattern, Mapping) or isinstance(pattern, nn.Module):
        rule = Rule(parse_argument(model, "pattern", pattern))
        _check_factory(factory)
        return [rule], [factory]
    if factory is not None:
        raise TypeError("rules hold their own factories: leave the factory out")
    rules: list[Rule] = []
    for key, made_by in pattern.items():
        patterns = parse_argument(model, "pattern", key if isinstance(key, tuple) else (key,))
        rule = Rule(patterns, key, made_by is None)
        rules.append(rule)
        if made_by is not None:
            _check_factory(made_by, rule)
    return rules, list(pattern.values())


def _check_factory(factory: Any, rule: Rule | None = None) -> None:
    # A module is callable, but it takes arrays and returns arrays.
    if not callable(factory) or isinstance(factory, nn.Module):
        name = f"the factory of rule {rule.text}" if rule else "factory"
        what = described(factory)
        raise TypeError(f"{name} must be a function of path and module, not {what}")


def call_factories(
    paths: Sequence[str],
    modules: Sequence[nn.Module],
    factories: Iterable[Factory | None],
) -> list[nn.Module]:
    """Call the factory of each place, and return the new modules."""
    new_modules: list[nn.Module] = []
    for path, module, factory in zip(paths, modules, factories):
        if factory is None:
            new_modules.append(module)
            continue
        try:
            new = factory(path, module)
        except Exception as error:
            error.add_note(f"while replacing {path!r} ({type(module).__name__})")
            note_misuse(error, factory, path, "factory(path, module)", _CORRECTED_FACTORY)
            raise
        if not issubclass(type(new), nn.Module):
            raise TypeError(
                f"the factory returned {described(new)} for {path!r} "
                f"({type(module).__name__}); it must return an mlx.nn.Module; return the module "
                "it was given to leave it unchanged"
            )
        new_modules.append(new)
    return new_modules
