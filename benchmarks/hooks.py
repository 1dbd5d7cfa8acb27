"""The cost of hooks: for each call, and to enter and leave a block.

python -m benchmarks --only hooks              # against code by hand
python -m benchmarks.hooks --against CHECKOUT  # against another build
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import mlx_modswap
from mlx_modswap import Wrapper

from .models import Llama
from .tables import Row, ms, verdict
from .timing import Build, alternate, compare_builds, ratio, timed, versus

CALLS = 500  # in a loop
BLOCKS = 30
X = mx.zeros((1, 1, 8))


def see(path: str, output: mx.array, *args: Any) -> mx.array:
    """A hook for `observe`, and a change for `patch`, that does nothing."""
    return output


def opened(
    name: str, model: nn.Module, pattern: str, build: Build = mlx_modswap, **options: Any
) -> AbstractContextManager[Any]:
    """The block of a function of the library."""
    hooks = [] if name == "capture" else [see]
    return getattr(build, name)(model, pattern, *hooks, **options)


# ---------------------------------------------------------------- a call


class Layer(nn.Module):
    """Does nothing, so that only the cost of the code around it is measured."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer: Any = Layer()


BY_HAND: dict[str, Callable[[Any], Callable[[mx.array], object]]] = {
    "observe": lambda layer: lambda x: see("layer", layer(x), x),
    "capture": lambda layer: layer,
    "patch": lambda layer: lambda x: see("layer", layer(x)),
}
MOST = {"observe": 1.2, "capture": 1.1, "patch": 0.8}  # microseconds


def calls(layer: Callable[[mx.array], object]) -> float:
    """The seconds for one call."""
    return timed(lambda: layer(X), CALLS)


def call(name: str) -> list[Row]:
    net = Net()
    with opened(name, net, "layer"):
        without = "without" if name == "capture" else "of the layer and the function"
        what = f"a call inside `{name}` / {without}"
        return [_overhead(what, net.layer, BY_HAND[name](Layer()), MOST[name])]


def wrapper_call() -> list[Row]:
    return [_overhead("a call through a `Wrapper` / without", Wrapper(Layer()), Layer(), 0.5)]


def _overhead(what: str, layer: Any, bare: Any, most: float) -> Row:
    """By how many microseconds a call of ``layer`` takes longer than one of ``bare``."""
    taken = alternate({"bare": partial(calls, bare), "layer": partial(calls, layer)}, seconds=3)
    more = median(b - a for a, b in zip(taken["bare"], taken["layer"])) * 1e6
    return {
        "what": what,
        "ratio": f"**{ratio(taken['layer'], taken['bare']):.2f}**",
        "time": f"{more:+.2f} us",
        "goal": f"{most} us at most",
        "verdict": verdict(more <= most),
    }


# ---------------------------------------------------------------- a block


class Caller(nn.Module):
    """What people write if they have no hooks, such as mlx-lm's GPTQ: a module around a layer."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, *args: Any) -> mx.array:
        return see("layer", self.layer(*args))


LAYERS = {"**": 225, "lm_head": 1}  # pattern -> how many linear layers of the llama it matches


def around(name: str, pattern: str, model: Llama, build: Build) -> None:
    """Enter and leave a block around linear layers, with one call of one layer inside."""
    with opened(name, model, pattern, build, where=nn.Linear):
        model.lm_head(X)


def around_by_hand(pattern: str, model: Llama) -> None:
    named: Any = model.named_modules()
    old = [(k, m) for k, m in named if isinstance(m, nn.Linear) and pattern in ("**", k)]
    model.update_modules(tree_unflatten([(k, Caller(m)) for k, m in old]))
    model.lm_head(X)
    model.update_modules(tree_unflatten(old))


def sweep(model: Llama, build: Build) -> None:
    """Patch one transformer block after the other, and call it."""
    for index in range(BLOCKS):
        with opened("patch", model, f"model.layers[{index}]", build):
            model.model.layers[index](X)


def sweep_by_hand(model: Llama) -> None:
    for index in range(BLOCKS):
        path = f"model.layers.{index}"
        old = [(k, m) for k, m in model.named_modules() if k == path]
        model.update_modules(tree_unflatten([(k, Caller(m)) for k, m in old]))
        model.model.layers[index](X)
        model.update_modules(tree_unflatten(old))


def block(name: str, pattern: str) -> list[Row]:
    model = Llama()
    ours = partial(around, name, pattern, model, mlx_modswap)
    what = f"enter and leave `{name}`, `{pattern}`, a llama of 453 modules"
    least = 3 if pattern == "**" else 4
    return [_by_hand(what, LAYERS[pattern], ours, partial(around_by_hand, pattern, model), least)]


def sweep_of_patches() -> list[Row]:
    model = Llama(BLOCKS)
    what = f"a sweep of `patch` over {BLOCKS} transformer blocks, each called once"
    return [
        _by_hand(what, BLOCKS, partial(sweep, model, mlx_modswap), partial(sweep_by_hand, model), 4)
    ]


def _by_hand(
    what: str, layers: int, ours: Callable[[], None], by_hand: Callable[[], None], least: float
) -> Row:
    taken = alternate({"ours": lambda: timed(ours), "by hand": lambda: timed(by_hand)})
    much = ratio(taken["by hand"], taken["ours"])
    return {
        "what": what,
        "layers": str(layers),
        "by hand / ours": f"**{much:.2f}**",
        "ours, ms": ms(median(taken["ours"])),
        "by hand, ms": ms(median(taken["by hand"])),
        "goal": f"{least:g} x",
        "verdict": verdict(much >= least),
    }


def against(new: Build, old: Build, folder: str) -> Iterator[Row]:
    """Compare two builds."""
    model = Llama()
    for name in BY_HAND:
        for pattern, layers in LAYERS.items():
            runs = (partial(around, name, pattern, model, build) for build in (new, old))
            what = f"enter and leave `{name}`, {layers} of 453 modules"
            yield versus(what, *(partial(timed, run) for run in runs))
    model = Llama(BLOCKS)
    runs = (partial(sweep, model, build) for build in (new, old))
    yield versus(f"a sweep of `patch` over {BLOCKS} blocks", *(partial(timed, run) for run in runs))
    for name in BY_HAND:
        with ExitStack() as blocks:
            nets = {build: Net() for build in (new, old)}
            for build, net in nets.items():
                blocks.enter_context(opened(name, net, "layer", build))
            runs = (partial(calls, net.layer) for net in nets.values())
            yield versus(f"a call inside `{name}`", *runs, 1e6, "us")


TABLES = {
    "Hooks, a call": {
        "a call, wrapper": ("wrapper_call",),
        **{f"a call, {name}": ("call", name) for name in BY_HAND},
    },
    "Hooks, a block": {
        **{
            f"{name}, {pattern}": ("block", name, pattern) for name in BY_HAND for pattern in LAYERS
        },
        "sweep": ("sweep_of_patches",),
    },
}

if __name__ == "__main__":
    compare_builds("hooks", against)
