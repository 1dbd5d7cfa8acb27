"""The swaps of each model, as patterns for the library and as regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import mlx.nn as nn

from . import models
from .ways import Swap


class Subject(NamedTuple):
    """A model, the swaps to time on it, and the goals for them.

    Attributes:
        title: The name of the model in the tables.
        build: Makes a new model.
        swaps: The swaps, by name.
        goal: The speed-up over the idiom that a swap must reach; 0 for no goal.
        goal_exact: The goal for a swap of one exact path.
        union: One pattern that matches the same layers as the ten rules.
    """

    title: str
    build: Callable[[], nn.Module]
    swaps: dict[str, Swap]
    goal: float = 0
    goal_exact: float = 0
    union: str = ""


_PROJ = ("q", "k", "v", "o", "gate", "up", "down")

LLAMA = {
    "one path": Swap("model.layers.7.mlp.up_proj", r"model\.layers\.7\.mlp\.up_proj"),
    "one block": Swap("model.layers[7].**.*_proj", r"model\.layers\.7\..*_proj"),
    "`**.down_proj`": Swap("**.down_proj", r".*\.down_proj"),
    "a union": Swap("**.{q,k,v,o}_proj", r".*\.(q|k|v|o)_proj"),
    "a regex": Swap(re.compile(r".*\.mlp\.\w+_proj"), r".*\.mlp\.\w+_proj"),
    "`**`, where": Swap("**", r".*", models.Linear),
    "ten rules": Swap(
        ["lm_head", *(f"model.layers[{at}].**.*_proj" for at in (0, -1))]
        + [f"**.{name}_proj" for name in _PROJ],
        ["lm_head", *(rf"model\.layers\.{at}\..*_proj" for at in (0, 31))]
        + [rf".*\.{name}_proj" for name in _PROJ],
    ),
}

CHAIN = {
    "one path": Swap("inner." * 499 + "leaf", r"inner\." * 499 + "leaf"),
    "`**.leaf`": Swap("**.leaf", r"(.*\.)?leaf"),
    "a regex": Swap(re.compile(r"(.*\.)?leaf"), r"(.*\.)?leaf"),
    "`**`, where": Swap("**", r".*", models.Leaf),
}

LONG_LIST = {
    "one path": Swap("layers.99999", r"layers\.99999"),
    "`layers[-4:]`": Swap("layers[-4:]", r"layers\.9999[6-9]"),
    "`layers.*`": Swap("layers.*", r"layers\.[^.]*"),
    "a regex": Swap(re.compile(r"layers\.\d+"), r"layers\.\d+"),
    "`**`, where": Swap("**", r".*", models.Leaf),
    "ten rules": Swap(
        [f"layers[{at}::10]" for at in range(10)], [rf"layers\.\d*{at}" for at in range(10)]
    ),
}


def mixture(leaf: type) -> dict[str, Swap]:
    sixes = [range(at, at + 6) for at in range(0, 60, 6)]
    path = "layers.7.mlp.experts.99.up_proj"
    return {
        "one path": Swap(path, re.escape(path)),
        "one block": Swap("layers[7].**.*_proj", r"layers\.7\..*_proj"),
        "`**.down_proj`": Swap("**.down_proj", r".*\.down_proj"),
        "a union": Swap("**.{gate,up}_proj", r".*\.(gate|up)_proj"),
        "a regex": Swap(re.compile(r".*\.experts\.\d+\.up_proj"), r".*\.experts\.\d+\.up_proj"),
        "`**`, where": Swap("**", r".*", leaf),
        "ten rules": Swap(
            [f"layers[{six[0]}:{six[-1] + 1}].**.*_proj" for six in sixes],
            [rf"layers\.({'|'.join(map(str, six))})\..*_proj" for six in sixes],
        ),
    }


SUBJECTS = {
    "llama": Subject(
        "llama, 453 modules",
        models.Llama,
        LLAMA,
        goal=1.5,
        goal_exact=1.5,
        union="**.{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head}",
    ),
    # Nobody has such models. They show how the time of a swap grows.
    "mixture": Subject(
        "mixture, 61,561 modules",
        models.Mixture,
        mixture(models.Leaf),
        goal=2.5,
        goal_exact=6,
        union="**.*_proj",
    ),
    "arrays": Subject(
        "mixture, 61,561 modules, arrays",
        lambda: models.Mixture(leaf=models.ArrayLeaf),
        mixture(models.ArrayLeaf),
        goal=2.5,
        goal_exact=4,
        union="**.*_proj",
    ),
    "list": Subject(
        "list of 100,000", models.LongList, LONG_LIST, goal=3.5, goal_exact=3.5, union="layers.*"
    ),
    "chain": Subject("chain, 500 deep", models.chain, CHAIN),
}
