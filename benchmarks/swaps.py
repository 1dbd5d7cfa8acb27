"""The time of a whole ``replace_layers``, with all of its checks.

python -m benchmarks --only swaps              # against code by hand, and against the limit
python -m benchmarks.swaps --against CHECKOUT  # against another build, and the time of an import
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import mlx_modswap

from .models import Linear, Llama, Single, ready
from .tables import Row, ms, verdict
from .timing import (
    HERE,
    Build,
    alternate,
    compare_builds,
    import_seconds,
    ratio,
    timed,
    versus,
)


class Swap(NamedTuple):
    """One swap, in the terms of each way.

    Attributes:
        pattern: For `ours`: a pattern, or a list of patterns, each of which becomes a rule.
        regexes: For the other ways: the same as regular expressions.
        where: For all ways: the class of the layers to swap.
        limit: How many times as long as the limit ours may take.
    """

    pattern: Any
    regexes: list[str]
    where: type = nn.Module
    limit: float = 3.5


SWAPS = {
    "one path": Swap("model.layers.7.mlp.up_proj", [r"model\.layers\.7\.mlp\.up_proj"], limit=1.8),
    "one block": Swap("model.layers[7].**.*_proj", [r"model\.layers\.7\..*_proj"], limit=1.8),
    "`**.down_proj`": Swap("**.down_proj", [r".*\.down_proj"]),
    "a union": Swap("**.{q,k,v,o}_proj", [r".*\.(q|k|v|o)_proj"]),
    "a regex": Swap(re.compile(r".*\.mlp\.\w+_proj"), [r".*\.mlp\.\w+_proj"]),
    "`**`, where": Swap("**", [r".*"], Linear),
    "ten rules": Swap(
        ["lm_head", *(f"model.layers[{at}].**.*_proj" for at in (0, -1))]
        + [f"**.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        ["lm_head", *(rf"model\.layers\.{at}\..*_proj" for at in (0, 31))]
        + [rf".*\.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    ),
    # The layers of the ten rules.
    "one rule": Swap("**.{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head}", []),
}
SINGLE = Swap("linear", ["linear"])

# ---------------------------------------------------------------- the ways

Way = Callable[[nn.Module, Swap], object]


def take(path: str, module: nn.Module) -> nn.Module:
    """The factory of all ways: returns a module that was made beforehand."""
    return ready.pop()


def ours(model: nn.Module, swap: Swap, build: Build = mlx_modswap) -> None:
    if isinstance(swap.pattern, list):
        build.replace_layers(model, dict.fromkeys(swap.pattern, take))
    elif swap.where is nn.Module:
        build.replace_layers(model, swap.pattern, take)
    else:
        build.replace_layers(model, swap.pattern, take, where=swap.where)


def idiom(model: nn.Module, swap: Swap) -> None:
    """The code that people write by hand."""
    if len(swap.regexes) > 1:
        rules = dict.fromkeys(swap.regexes, take)
        new: list[Any] = []
        for k, m in model.named_modules():
            for rx, f in rules.items():
                if re.fullmatch(rx, k):
                    new.append((k, f(k, m)))
                    break
    elif swap.where is not nn.Module:
        f, cls = take, swap.where
        new = [(k, f(k, m)) for k, m in model.named_modules() if isinstance(m, cls)]
    else:
        f, [rx] = take, swap.regexes
        new = [(k, f(k, m)) for k, m in model.named_modules() if re.fullmatch(rx, k)]
    model.update_modules(tree_unflatten(new))


def quantize(model: nn.Module, swap: Swap) -> None:
    """The traversal of ``nn.quantize``: ``to_quantized`` here is as trivial as ``take``."""

    def chosen(path: str, module: nn.Module) -> bool:
        if swap.where is not nn.Module:
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


def loop(way: Way, number: int = 50) -> float:
    """The seconds to swap the only layer of a model, which is too short to be timed once."""
    model = Single()
    layers = [Linear(), model.linear] * (number // 2)

    def swap() -> None:
        ready.append(layers.pop())
        way(model, SINGLE)

    return timed(swap, number)


# ---------------------------------------------------------------- the tables


def llama(name: str) -> list[Row]:
    """Time one swap of a llama in each way."""
    bench = Bench(Llama(), SWAPS[name])
    ways = {way.__name__: partial(bench.run, way) for way in (ours, idiom, quantize)}
    taken = alternate({**ways, "limit": bench.run_limit})
    most = bench.swap.limit
    met = (
        ratio(taken["idiom"], taken["ours"]) >= 2.2 and ratio(taken["ours"], taken["limit"]) <= most
    )
    goal = {"goal": f"2.2 x the idiom, {most:g} x the limit", "verdict": verdict(met)}
    row = {"model": "llama, 453 modules", "pattern": name, "layers": str(len(bench.paths))}
    return [row | _times(taken) | goal]


def single() -> list[Row]:
    taken = alternate({way.__name__: partial(loop, way) for way in (ours, idiom, quantize)})
    goal = {"goal": "0.03 ms at most", "verdict": verdict(median(taken["ours"]) <= 30e-6)}
    return [
        {"model": "a single Linear", "pattern": "one path", "layers": "1"} | _times(taken) | goal
    ]


def _times(taken: dict[str, list[float]]) -> Row:
    """The ratios come first, since they are the claim."""
    row: Row = {}
    for slow, fast in (("idiom", "ours"), ("quantize", "ours"), ("ours", "limit")):
        both = slow in taken and fast in taken
        row[f"{slow} / {fast}"] = f"{ratio(taken[slow], taken[fast]):.1f}" if both else ""
    row["idiom / ours"] = f"**{row['idiom / ours']}**"
    for way in ("ours", "idiom", "quantize", "limit"):
        row[f"{way}, ms"] = ms(median(taken[way])) if way in taken else ""
    return row


def ten_rules() -> list[Row]:
    """Time ten rules, and one rule that selects the same layers."""
    ten, one = (Bench(Llama(), SWAPS[name]) for name in ("ten rules", "one rule"))
    taken = alternate({"ten": lambda: ten.run(ours), "one": lambda: one.run(ours)})
    much = ratio(taken["ten"], taken["one"])
    return [
        {
            "what": "ten rules / one rule, llama, 453 modules",
            "ratio": f"**{much:.2f}**",
            "ms": " / ".join(ms(median(taken[way])) for way in ("ten", "one")),
            "goal": "1.2 at most",
            "verdict": verdict(much <= 1.2),
        }
    ]


def import_time() -> list[Row]:
    """What ``import mlx_modswap`` adds to ``import mlx.nn``, in fresh processes."""
    with TemporaryDirectory() as cache:
        _, *seconds = (import_seconds(HERE, cache) for _ in range(22))
    return [
        {
            "what": "`import mlx_modswap` after `import mlx.nn`",
            "ms": ms(median(seconds)),
            "goal": "15 ms at most",
            "verdict": verdict(median(seconds) <= 0.015),
        }
    ]


def against(new: Build, old: Build, folder: str) -> Iterator[Row]:
    """Compare two builds."""
    ways = partial(ours, build=new), partial(ours, build=old)
    for name, swap in SWAPS.items():
        bench = Bench(Llama(), swap)
        yield versus(f"llama, {name}", *(partial(bench.run, way) for way in ways))
    yield versus("a single Linear", *(partial(loop, way) for way in ways), 1e6, "us")
    with TemporaryDirectory() as cache:
        imports = (partial(import_seconds, place, cache) for place in (HERE, folder))
        yield versus("`import mlx_modswap` after `import mlx.nn`", *imports)


TABLES = {
    "Time of a swap": {
        **{f"llama, {name}": ("llama", name) for name in list(SWAPS)[:-1]},
        "single": ("single",),
    },
    "Time, other": {"ten rules": ("ten_rules",), "import": ("import_time",)},
}

if __name__ == "__main__":
    compare_builds("swaps", against)
