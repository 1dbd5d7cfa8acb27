"""The cost of hooks: for each call, and to enter and leave a block.

python -m benchmarks --only hooks              # against code by hand
python -m benchmarks.hooks --against CHECKOUT  # against the library of another checkout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .models import Parts, llama
from .timing import Build, Case, compare_builds, timed

X = mx.zeros((1, 8))
BLOCKS = 30


class Layer(nn.Module):
    """Does nothing, so that only the cost of the code around it is measured."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


LAYER = Layer()


def see(path: str, output: mx.array, *args: Any) -> mx.array:
    """A hook for `observe`, and a change for `patch`, that does nothing."""
    return output


def block(
    build: Build, name: str, model: nn.Module, pattern: str, **options: Any
) -> AbstractContextManager[Any]:
    return getattr(build, name)(model, pattern, *[see] * (name != "capture"), **options)


# ---------------------------------------------------------------- a call

# What a call does without the library, and how many seconds longer one with the library may take.
CALLS: dict[str, tuple[Callable[[mx.array], object], float]] = {
    "observe": (lambda x: see("layer", LAYER(x), x), 1.2e-6),
    "capture": (LAYER, 1.1e-6),
    "patch": (lambda x: see("layer", LAYER(x)), 0.8e-6),
    "Wrapper": (LAYER, 0.5e-6),
}


def overhead(name: str) -> Case:
    """By how much a call takes longer than one of the layer, and of the function if there is one.

    The loops are short, since other processes interrupt long ones.
    """
    bare, most = CALLS[name]

    def ours(build: Build) -> float:
        if name == "Wrapper":
            return loop(build.Wrapper(Layer())) - loop(bare)
        model: Any = Parts(layer=Layer())
        with block(build, name, model, "layer"):
            return loop(model.layer) - loop(bare)

    return Case(ours, goals={"ours": most})


def loop(layer: Callable[[mx.array], object]) -> float:
    return timed(lambda: layer(X), 500)


# ---------------------------------------------------------------- a block


class Caller(nn.Module):
    """What people write if they have no hooks, such as mlx-lm's GPTQ: a module around a layer."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        return see("layer", self.layer(x))


@contextmanager
def by_hand(model: Any, pattern: str, cls: type) -> Iterator[None]:
    named = model.named_modules()
    old = [(k, m) for k, m in named if isinstance(m, cls) and pattern in ("**", k)]
    model.update_modules(tree_unflatten([(k, Caller(m)) for k, m in old]))
    yield
    model.update_modules(tree_unflatten(old))


def linear_layers(name: str, pattern: str, least: float) -> Case:
    """Enter and leave a block around linear layers of a llama, with one call inside."""
    model: Any = llama()

    def ours(build: Build) -> None:
        with block(build, name, model, pattern, where=nn.Linear):
            model.lm_head(X)

    def hand() -> None:
        with by_hand(model, pattern, nn.Linear):
            model.lm_head(X)

    return against(ours, hand, least)


def sweep(least: float) -> Case:
    """Patch one transformer block after another, and call it."""
    model: Any = llama(BLOCKS)

    def ours(build: Build) -> None:
        for index in range(BLOCKS):
            with block(build, "patch", model, f"model.layers[{index}]"):
                model.model.layers[index](X)

    def hand() -> None:
        for index in range(BLOCKS):
            with by_hand(model, f"model.layers.{index}", nn.Module):
                model.model.layers[index](X)

    return against(ours, hand, least)


def against(ours: Callable[[Build], None], hand: Callable[[], None], least: float) -> Case:
    name = "by hand / ours"
    others = {name: lambda: timed(hand)}
    return Case(lambda build: timed(lambda: ours(build)), others, {name: least})


PATTERNS = {"**": (225, 3), "lm_head": (1, 4)}  # pattern -> how many linear layers, goal
TABLES = {
    "Hooks, a call": {f"a call, `{name}`": partial(overhead, name) for name in CALLS},
    "Hooks, a block": {
        **{
            f"`{name}`, {number} of 453 modules": partial(linear_layers, name, pattern, least)
            for name in ("observe", "capture", "patch")
            for pattern, (number, least) in PATTERNS.items()
        },
        f"`patch`, one after another of {BLOCKS} transformer blocks": partial(sweep, 4),
    },
}

if __name__ == "__main__":
    compare_builds("hooks", TABLES)
