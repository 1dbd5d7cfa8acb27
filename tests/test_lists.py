"""Entries of a list that differ from the others are walked like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest

from mlx_modswap import Wrapper, replace_layers, select


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.act = nn.ReLU()
        self.scale = mx.ones(1)
        self._private = nn.Identity()


class OtherBlock(Block):
    pass


def having(name: Any, value: Callable[[], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = Block()
        dict.__setitem__(block, name, value())
        return block

    return make


def lacking(name: str) -> nn.Module:
    block = Block()
    del block[name]
    return block


def holding(*names: str) -> nn.Module:
    """What a block holds, under other names."""
    block = nn.Module()
    for name, value in zip(names, dict.values(Block())):
        block[name] = value
    block.__class__ = Block
    return block


DIFFERENT = {
    "of a class below": OtherBlock,
    "of another class": nn.ReLU,
    "empty": nn.Module,
    "None": lambda: None,
    "an array": lambda: mx.ones(1),
    "a dict": lambda: {"attn": nn.Linear(2, 2), "act": nn.ReLU()},
    "a list": lambda: [nn.Linear(2, 2), nn.ReLU()],
    "with one more": having("more", nn.ReLU),
    "with one less": lambda: lacking("act"),
    "with another name": lambda: holding("attn", "gelu", "scale", "_private"),
    "in another order": lambda: holding("act", "attn", "scale", "_private"),
    "with None": having("act", lambda: None),
    "with an array": having("act", lambda: mx.ones(1)),
    "with a function": having("act", lambda: nn.relu),
    "with a module for an array": having("scale", nn.ReLU),
    "with a list for an array": having("scale", lambda: [nn.ReLU()]),
    "with an empty list": having("act", list),
    "with a list": having("act", lambda: [nn.ReLU(), None]),
    "with a dict": having("act", lambda: {"0": nn.ReLU()}),
    "with a deeper module": having("act", lambda: nn.Sequential(nn.ReLU())),
    "with a dotted key": having("a.b", nn.ReLU),
    "with an int key": having(7, nn.ReLU),
}
PATTERNS = [
    "**",
    "layers.*",
    "**.attn",
    "**.act",
    "layers.*.{act,scale}",
    "layers[::2].*",
    "layers[3:].act.**",
]


def model_with(*makes: Callable[[], Any]) -> nn.Module:
    model = nn.Module()
    model.layers = [Block(), *(make() for make in makes), Block()]
    return model


def check(model: nn.Module, pattern: str) -> None:
    expected = oracle.chosen(model, [pattern])
    found = select(model, pattern, strict=False)
    assert list(found) == [place.path for place in expected]
    assert all(found[place.path] is place.module for place in expected)


@pytest.mark.parametrize("different", DIFFERENT)
def test_an_entry_that_differs_is_selected_as_the_oracle_says(different):
    for pattern in PATTERNS:
        check(model_with(DIFFERENT[different]), pattern)
        check(model_with(*[DIFFERENT[different]] * 4), pattern)


def test_keys_that_are_equal_print_different_paths():
    check(model_with(having(1, nn.ReLU), having(True, nn.ReLU)), "**")


@pytest.mark.parametrize("pattern", ["layers.*", "layers.*.act"])
def test_a_wrapped_entry_has_the_paths_of_its_layer(pattern):
    model = model_with(Block)
    before = list(select(model, "**"))
    path = pattern.replace("*", "1")
    replace_layers(model, path, lambda path, layer: Wrapper(layer))
    found = select(model, "**")
    assert list(found) == before
    assert type(found[path]) is Wrapper
