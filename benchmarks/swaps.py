"""The time of a whole ``replace_layers``, with all of its checks.

python -m benchmarks --only swaps              # against code by hand, and against the limit
python -m benchmarks.swaps --against CHECKOUT  # against the library of another checkout
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import mlx_modswap

from .models import Linear, Parts, llama, ready
from .timing import Build, Case, compare_builds, import_seconds, timed


class Swap(NamedTuple):
    """One swap, in the terms of each way.

    Attributes:
        pattern: For `ours`: a pattern, or a list of patterns, each of which becomes a rule.
        regexes: For the other ways: the same as regular expressions.
        where: For all ways: the class of the layers to swap.
        limit: The goal: how many times as long as the limit ours may take.
    """

    pattern: Any
    regexes: list[str]
    where: type | None = None
    limit: float = 3.5


PROJ = ("q", "k", "v", "o", "gate", "up", "down")
SWAPS = {
    "one path": Swap("model.layers.7.mlp.up_proj", [r"model\.layers\.7\.mlp\.up_proj"], limit=1.8),
    "one block": Swap("model.layers[7].**.*_proj", [r"model\.layers\.7\..*_proj"], limit=1.8),
    "`**.down_proj`": Swap("**.down_proj", [r".*\.down_proj"]),
    "a union": Swap("**.{q,k,v,o}_proj", [r".*\.(q|k|v|o)_proj"]),
    "a regex": Swap(re.compile(r".*\.mlp\.\w+_proj"), [r".*\.mlp\.\w+_proj"]),
    "`**`, where": Swap("**", [], Linear),
    "ten rules": Swap(
        ["lm_head", "model.layers[0].**.*_proj", "model.layers[-1].**.*_proj"]
        + [f"**.{name}_proj" for name in PROJ],
        ["lm_head", r"model\.layers\.0\..*_proj", r"model\.layers\.31\..*_proj"]
        + [rf".*\.{name}_proj" for name in PROJ],
    ),
}
# The layers of the ten rules.
ONE_RULE = Swap("**.{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head}", [])

# ---------------------------------------------------------------- the ways

Way = Callable[[nn.Module, Swap], object]


def take(path: str, module: nn.Module) -> nn.Module:
    """The factory of all ways: returns a module that was made beforehand."""
    return ready.pop()


def ours(model: nn.Module, swap: Swap, build: Build = mlx_modswap) -> None:
    if isinstance(swap.pattern, list):
        build.replace_layers(model, dict.fromkeys(swap.pattern, take))
    else:
        build.replace_layers(model, swap.pattern, take, where=swap.where)


def by(build: Build) -> Way:
    return partial(ours, build=build)


def idiom(model: nn.Module, swap: Swap) -> None:
    """The code that people write by hand."""
    if cls := swap.where:
        new = [(k, take(k, m)) for k, m in model.named_modules() if isinstance(m, cls)]
    elif len(swap.regexes) == 1:
        [rx] = swap.regexes
        new = [(k, take(k, m)) for k, m in model.named_modules() if re.fullmatch(rx, k)]
    else:
        rules = dict.fromkeys(swap.regexes, take)
        new: list[Any] = []
        for k, m in model.named_modules():
            for rx, f in rules.items():
                if re.fullmatch(rx, k):
                    new.append((k, f(k, m)))
                    break
    model.update_modules(tree_unflatten(new))


def quantize(model: nn.Module, swap: Swap) -> None:
    """The traversal of ``nn.quantize``: ``to_quantized`` here is as trivial as ``take``."""

    def chosen(path: str, module: nn.Module) -> bool:
        if swap.where is not None:
            return isinstance(module, swap.where)
        return any(re.fullmatch(rx, path) for rx in swap.regexes)

    nn.quantize(model, class_predicate=chosen)


def walk(model: nn.Module) -> None:
    """Touch every container once: the fastest way known to look at a whole model."""
    level: list[Any] = [model]
    while level:
        values = chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level)
        level = [value for value in values if isinstance(value, (dict, list))]


# ---------------------------------------------------------------- the runs


class Bench:
    """A model, and two sets of layers for the paths of a swap; each run swaps one for the other."""

    def __init__(self, model: nn.Module, swap: Swap):
        self.model, self.swap = model, swap
        self.paths = list(mlx_modswap.select(model, swap.pattern, where=swap.where))
        first = self._layers()
        self._sets = first, [type(layer)() for layer in first]
        mx.eval(self._sets)  # not `model.parameters()`, which recurses

    def run(self, way: Way, measure: Callable[[Callable[[], object]], float] = timed) -> float:
        """The seconds that a way takes, or another measure of it."""
        ready[:] = self._flip()
        return self._checked(measure(lambda: way(self.model, self.swap)))

    def run_limit(self) -> float:
        """The seconds for a bare walk, and ``update_modules`` with a dict that was built before."""
        new = tree_unflatten(list(zip(self.paths, self._flip())))
        return self._checked(timed(lambda: (walk(self.model), self.model.update_modules(new))))

    def _layers(self) -> list[nn.Module]:
        named: Any = self.model.named_modules()
        layers = dict(named)
        return [layers[path] for path in self.paths]

    def _flip(self) -> list[nn.Module]:
        self._sets = self._sets[::-1]
        return self._sets[0]

    def _checked(self, found: float) -> float:
        now = set(map(id, self._layers()))
        assert now == set(map(id, self._sets[0])), "the swap did not happen as asked"
        return found


# ---------------------------------------------------------------- the cases


def of_llama(name: str) -> Case:
    bench = Bench(llama(), SWAPS[name])
    others = {f"{way.__name__} / ours": partial(bench.run, way) for way in (idiom, quantize)}
    goals = {"idiom / ours": 2.2, "ours / limit": bench.swap.limit}
    layers = {"layers": str(len(bench.paths))}
    return Case(
        lambda build: bench.run(by(build)),
        {**others, "ours / limit": bench.run_limit},
        goals,
        layers,
    )


def single() -> Case:
    """Swap the only layer of a model, in a loop, because one swap is too short to be timed."""
    model, swap = Parts(linear=Linear()), Swap("linear", ["linear"])
    number = 50

    def loop(way: Way) -> float:
        ready[:] = [Linear() for _ in range(number)]
        return timed(lambda: way(model, swap), number)

    others = {f"{way.__name__} / ours": partial(loop, way) for way in (idiom, quantize)}
    return Case(lambda build: loop(by(build)), others, {"ours": 30e-6}, {"layers": "1"})


def ten_rules() -> Case:
    """Time ten rules, and one rule that selects the same layers."""
    ten, one = (Bench(llama(), swap) for swap in (SWAPS["ten rules"], ONE_RULE))
    others = {"ours / one rule": partial(one.run, ours)}
    return Case(
        lambda build: ten.run(by(build)),
        others,
        {"ours / one rule": 1.2},
        {"layers": str(len(ten.paths))},
    )


TABLES = {
    "Time of a swap": {
        **{f"llama of 453 modules, {name}": partial(of_llama, name) for name in SWAPS},
        "a single Linear": single,
    },
    "Time, other": {
        "ten rules against one rule": ten_rules,
        "`import mlx_modswap` after `import mlx.nn`": lambda: Case(
            partial(import_seconds, TemporaryDirectory()), goals={"ours": 0.015}
        ),
    },
}

if __name__ == "__main__":
    compare_builds("swaps", TABLES)
