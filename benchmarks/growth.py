"""How the time of a swap grows with the model, and that of a match with the length of the path.

Nobody has models such as these, and the patterns are hard to match.
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


def growth(make: Callable[[int], nn.Module], work: Work, size: int) -> Case:
    """The time for each unit of size, against that of smaller models."""

    def per_unit(size: int) -> Callable[[Build], float]:
        model = make(size)
        return lambda build: timed(lambda: work(build, model)) / size

    others = {
        f"ours / {part} of the size": partial(per_unit(size // divisor), mlx_modswap)
        for part, divisor in (("a tenth", 10), ("a hundredth", 100))
    }
    return Case(per_unit(size), others, dict.fromkeys(others, 1.5))


ALTERNATIVES = ",".join(map(str, range(1000)))
TABLES = {
    "Growth": {
        "a swap of `**.*_proj`, a module of 100,201": partial(
            growth, lambda modules: mixture(modules // 1002, experts=250), swap, 100_200
        ),
        "`**.` 50 times, then a name, a level of 2,000": partial(
            growth, chain, match("**." * 50 + "x"), 2000
        ),
        "1,000 alternatives, an entry of a list of 50,000": partial(
            growth,
            lambda length: Parts(a=[nn.Module() for _ in range(length)]),
            match(f"a.{{{ALTERNATIVES}}}x"),
            50_000,
        ),
        "`{a,aa,aaa}` 20 times, then `b`, a character of 20,000": partial(
            growth,
            lambda length: Parts(**{"a" * length: nn.Module()}),
            match("*" + "{a,aa,aaa}" * 20 + "b"),
            20_000,
        ),
    }
}
