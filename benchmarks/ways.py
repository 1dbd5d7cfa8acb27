"""The ways to swap layers that the benchmarks compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_modswap import replace_layers

from .models import ready
from .turns import Work, timed


class Swap(NamedTuple):
    """One swap, in the terms of each way.

    Attributes:
        pattern: For `ours`: a pattern, or a list of patterns, each of which becomes a rule.
        regex: For the other ways: one regular expression, or a list of them.
        where: For all ways: the class of the layers to swap.
    """

    pattern: Any
    regex: str | list[str]
    where: type | None = None


Way = Callable[[nn.Module, Swap], None]


def take(path: str, module: nn.Module) -> nn.Module:
    """The factory of all ways: returns a module that was made beforehand."""
    return ready.pop()


def ours(model: nn.Module, swap: Swap) -> None:
    if isinstance(swap.pattern, list):
        replace_layers(model, dict.fromkeys(swap.pattern, take), where=swap.where)
    else:
        replace_layers(model, swap.pattern, take, where=swap.where)


def idiom(model: nn.Module, swap: Swap) -> None:
    """The code that people write by hand."""
    cls = swap.where
    if isinstance(swap.regex, list):
        rules = dict.fromkeys(swap.regex, take)
        news: list[Any] = []
        for k, m in model.named_modules():
            for rx, f in rules.items():
                if re.fullmatch(rx, k):
                    news.append((k, f(k, m)))
                    break
    elif cls is not None:
        f = take
        news = [(k, f(k, m)) for k, m in model.named_modules() if isinstance(m, cls)]
    else:
        f, rx = take, swap.regex
        news = [(k, f(k, m)) for k, m in model.named_modules() if re.fullmatch(rx, k)]
    model.update_modules(tree_unflatten(news))


def quantize(model: nn.Module, swap: Swap) -> None:
    """The traversal of ``nn.quantize``: ``to_quantized`` here is as trivial as ``take``."""
    regexes = [swap.regex] if isinstance(swap.regex, str) else swap.regex
    cls = swap.where

    def chosen(path: str, module: nn.Module) -> bool:
        if cls is not None:
            return isinstance(module, cls)
        return any(re.fullmatch(rx, path) for rx in regexes)

    nn.quantize(model, class_predicate=chosen)


def walk(model: nn.Module) -> None:
    """Touch every container once: the fastest way known to look at a whole model."""
    level: list[Any] = [model]
    while level:
        values = chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level)
        level = [value for value in values if isinstance(value, (dict, list))]


# ---------------------------------------------------------------- runs


class Bench:
    """A model, and two sets of layers for the places of a swap; each run swaps one for the other.

    Attributes:
        paths (list[str]): The places.
    """

    def __init__(self, model: nn.Module, swap: Swap):
        self.model = model
        self.paths = _paths(model, swap)
        self._locations = [_location(model, path) for path in self.paths]
        first = [container[key] for container, key in self._locations]
        self._sets = first, [type(module)() for module in first]
        mx.eval(self._sets)  # not `model.parameters()`, which recurses

    def run(self, way: Way, swap: Swap, measure: Callable[[Work], float] = timed) -> float:
        """The seconds that a way takes, or another measure of it."""
        ready[:] = self._flip()
        found = measure(lambda: way(self.model, swap))
        self._check()
        return found

    def run_limit(self) -> float:
        """The seconds for a bare walk, and ``update_modules`` with a dict that was built before."""
        partial = _partial(self.model, zip(self.paths, self._flip()))
        seconds = timed(lambda: (walk(self.model), self.model.update_modules(partial)))
        self._check()
        return seconds

    def _flip(self) -> list[nn.Module]:
        self._sets = self._sets[::-1]
        return self._sets[0]

    def _check(self) -> None:
        now = {id(container[key]) for container, key in self._locations}
        assert now == set(map(id, self._sets[0])), "the swap did not happen as asked"


def _partial(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> Any:
    """The nested dict for ``update_modules``, built without any checks."""
    partial: Any = {}
    for path, module in modules:
        container: Any = model
        inside = partial
        *inner, last = path.split(".")
        for key in inner:
            container, key = _entry(container, key)
            inside = _slot(inside, key, [] if isinstance(container, list) else {})
        _slot(inside, _entry(container, last)[1], module)
    return partial


def _slot(inside: Any, key: Any, new: Any) -> Any:
    """The value at a key of the nested dict or list, which is set to ``new`` if it is missing."""
    if isinstance(inside, dict):
        return inside.setdefault(key, new)
    inside.extend([{}] * (key + 1 - len(inside)))
    if type(inside[key]) is dict and not inside[key]:
        inside[key] = new
    return inside[key]


def _entry(container: Any, name: str) -> tuple[Any, Any]:
    """The value that a segment of a path names in a container, and its key there."""
    key: Any = int(name) if isinstance(container, list) else name
    return container[key], key


def _paths(model: nn.Module, swap: Swap) -> list[str]:
    regexes = [swap.regex] if isinstance(swap.regex, str) else swap.regex
    chosen = re.compile("|".join(f"(?:{rx})" for rx in regexes))
    cls = swap.where or nn.Module
    named: Iterable[tuple[str, nn.Module]] = model.named_modules()
    return [k for k, m in named if chosen.fullmatch(k) and isinstance(m, cls)]


def _location(model: nn.Module, path: str) -> tuple[Any, Any]:
    container: Any = model
    *inner, last = path.split(".")
    for name in inner:
        container, _ = _entry(container, name)
    return container, _entry(container, last)[1]
