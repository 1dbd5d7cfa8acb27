"""Entries of a list that differ from the others are walked like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from models import build

from mlx_modswap import Wrapper, replace_layers, select

ENTRIES: dict[str, Callable[[], Any]] = {
    "attn": lambda: nn.Linear(2, 2),
    "act": nn.ReLU,
    "scale": lambda: mx.ones(1),
    "_private": nn.Identity,
}


def block(**changes: Callable[[], Any]) -> nn.Module:
    return build(**{name: make() for name, make in {**ENTRIES, **changes}.items()})


def having(name: Any, value: Callable[[], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = block()
        dict.__setitem__(module, name, value())
        return module

    return make


def holding(*names: str) -> nn.Module:
    """What a block holds, under other names."""
    return build(**{name: make() for name, make in zip(names, ENTRIES.values())})


def of_another_class() -> nn.Module:
    class Other(nn.Module):
        pass

    module = block()
    module.__class__ = Other
    return module


DIFFERENT = {
    "of another class": of_another_class,
    "a module without any": nn.ReLU,
    "empty": nn.Module,
    "None": lambda: None,
    "an array": lambda: mx.ones(1),
    "a dict": lambda: {"attn": nn.Linear(2, 2), "act": nn.ReLU()},
    "a list": lambda: [nn.Linear(2, 2), nn.ReLU()],
    "with one more": having("more", nn.ReLU),
    "with one less": lambda: holding("attn", "act"),
    "with another name": lambda: holding("attn", "gelu", "scale", "_private"),
    "in another order": lambda: holding("act", "attn", "scale", "_private"),
    "with None": lambda: block(act=lambda: None),
    "with an array": lambda: block(act=lambda: mx.ones(1)),
    "with a function": lambda: block(act=lambda: nn.relu),
    "with a module for an array": lambda: block(scale=nn.ReLU),
    "with a list for an array": lambda: block(scale=lambda: [nn.ReLU()]),
    "with an empty list": lambda: block(act=list),
    "with a list": lambda: block(act=lambda: [nn.ReLU(), None]),
    "with a dict": lambda: block(act=lambda: {"0": nn.ReLU()}),
    "with a deeper module": lambda: block(act=lambda: nn.Sequential(nn.ReLU())),
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
    model.layers = [block(), *(make() for make in makes), block()]
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
    model = model_with(block)
    before = list(select(model, "**"))
    path = pattern.replace("*", "1")
    replace_layers(model, path, lambda path, layer: Wrapper(layer))
    found = select(model, "**")
    assert list(found) == before
    assert type(found[path]) is Wrapper
