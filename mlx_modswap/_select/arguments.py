"""What a call asks for: its patterns, rules, ``where`` and ``exclude``, checked and parsed."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .._patterns.parse import Parsed, Pattern, parse_all
from .._words import described
from .hints import count

Patterns = Pattern | Iterable[Pattern]
Where = type | types.UnionType | tuple[type, ...] | Callable[[str, nn.Module], bool]


def parse_argument(model: nn.Module, name: str, patterns: Any) -> list[Parsed]:
    """Parse an argument that is one pattern or several."""
    if isinstance(patterns, (nn.Module, mx.array)):  # which could be iterated
        raise TypeError(f"{name} must be a path pattern, not {described(patterns)}")
    return parse_all(patterns, partial(count, model))


class Rule(NamedTuple):
    """Patterns that decide together. The first rule that matches a path decides it.

    Attributes:
        patterns (list[Parsed]): The rule matches a path if one of these matches it.
        key (str, re.Pattern or tuple): The rule's key; ``None`` if the patterns were not
            given as rules.
        keeps (bool): Whether the rule leaves its places alone, with everything inside them.
    """

    patterns: list[Parsed]
    key: Any = None
    keeps: bool = False

    @property
    def text(self) -> str:
        """What to call the rule in a message; empty if the patterns were not given as rules."""
        if self.key is None:
            return ""
        text = ", ".join(pattern.text for pattern in self.patterns)
        if isinstance(self.key, tuple):
            return f"({text},)" if len(self.patterns) == 1 else f"({text})"
        return text


class Request(NamedTuple):
    """What a call asks for, parsed.

    In a mask, bit ``i`` represents pattern ``i``, counted over all rules; the bits of the
    excludes follow.
    """

    rules: list[Rule]
    where: Where | None
    excludes: list[Parsed]

    @property
    def patterns(self) -> list[Parsed]:
        """The patterns of all rules, in order."""
        return [pattern for rule in self.rules for pattern in rule.patterns]

    @property
    def included(self) -> int:
        """The bits of all patterns; any larger mask has the bit of an exclude."""
        return (1 << sum(len(rule.patterns) for rule in self.rules)) - 1

    @property
    def owners(self) -> list[int]:
        """The number of the rule that each pattern belongs to."""
        return [number for number, rule in enumerate(self.rules) for _ in rule.patterns]


def is_class(where: Any) -> bool:
    """Return whether ``where`` is a class or several classes."""
    if isinstance(where, tuple):
        return all(map(is_class, where))
    return isinstance(where, (type, types.UnionType))


def check_where(where: Any) -> None:
    """Raise a ``TypeError`` if ``where`` cannot be asked about a module."""
    if where is None or is_class(where):
        return
    if not callable(where) or isinstance(where, nn.Module):
        raise TypeError(
            "where must be a class, a tuple of classes or a function of path and module, "
            f"not {described(where)}"
        )


def check_model(model: Any) -> None:
    """Raise a ``TypeError`` for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module, not {described(model)}")
