"""How the time of a swap grows with the model, and that of a match with the length of the path.

Nobody has models such as these, and the patterns are hard to match. If a time grew with the square
of the size, the ratio to a tenth of the size would be 10.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.nn as nn

import mlx_modswap

from .models import Leaf, Parts, chain, mixture
from .timing import Build, Case, timed

Work = Callable[[Build, nn.Module], object]


def swap(build: Build, model: nn.Module) -> None:
    build.replace_layers(model, "**.*_proj", lambda path, layer: Leaf())


def match(pattern: str) -> Work:
    return lambda build, model: build.select(model, pattern, strict=False)


def growth(make: Callable[[int], nn.Module], work: Work, size: int, part: str, most: float) -> Case:
    """The time for each unit of size, against that of smaller models."""

    def per_unit(size: int) -> Callable[[Build], float]:
        model = make(size)
        return lambda build: timed(lambda: work(build, model)) / size

    others = {
        f"ours / {one} of the size": partial(per_unit(size // divisor), mlx_modswap)
        for one, divisor in (("a tenth", 10), ("a hundredth", 100))
    }
    return Case(per_unit(size), others, {f"ours / {part} of the size": most})


def long_list(length: int) -> Parts:
    return Parts(a=[nn.Module() for _ in range(length)])


def long_name(length: int) -> Parts:
    return Parts(**{"a" * length: nn.Module()})


HARD = {
    "`**.` 50 times, then a name, a level of 2,000": (chain, "**." * 50 + "x", 2000),
    "1,000 alternatives, an entry of a list of 50,000": (
        long_list,
        "a.{" + ",".join(map(str, range(1000))) + "}x",
        50_000,
    ),
    "`{a,aa,aaa}` 20 times, then `b`, a character of 20,000": (
        long_name,
        "*" + "{a,aa,aaa}" * 20 + "b",
        20_000,
    ),
}
TABLES = {
    "Growth": {
        "a swap of `**.*_proj`, a module of 100,201": partial(
            growth, lambda size: mixture(size // 1002, 250), swap, 100_200, "a hundredth", 1.5
        ),
        **{
            name: partial(growth, make, match(pattern), size, "a tenth", 2)
            for name, (make, pattern, size) in HARD.items()
        },
    }
}
