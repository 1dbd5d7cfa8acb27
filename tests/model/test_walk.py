"""Where modules are found: in modules, lists and dicts of any kind, as the reference finds them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from models import build

from mlx_modswap import Wrapper, replace_layers, select


def block(**entries: Any) -> Any:
    """A module with a layer, an array and a private layer, and with some entries changed."""
    module = nn.Module()
    usual = {"attn": nn.Linear(2, 2), "act": nn.ReLU(), "scale": mx.ones(1), "_own": nn.Identity()}
    for name, value in {**usual, **entries}.items():
        dict.__setitem__(module, name, value)
    return module


# What may be among the blocks of a list.
ENTRIES: dict[str, Any] = {
    "a layer": nn.ReLU(),
    "a module without entries": nn.Module(),
    "None": None,
    "an array": mx.ones(1),
    "a function": nn.relu,
    "a dict": {"attn": nn.Linear(2, 2), "act": nn.ReLU()},
    "a list": [nn.Linear(2, 2), nn.ReLU()],
    "a block of other names": build(attn=nn.Linear(2, 2), gelu=nn.ReLU()),
    "a block in another order": build(act=nn.ReLU(), attn=nn.Linear(2, 2)),
    "a block with one more": block(more=nn.ReLU()),
    "a block with None": block(act=None),
    "a block with a function": block(act=nn.relu),
    "a block with an array for a module": block(act=mx.ones(1)),
    "a block with a module for an array": block(scale=nn.ReLU()),
    "a block with a list for an array": block(scale=[nn.ReLU()]),
    "a block with an empty list": block(act=[]),
    "a block with a list": block(act=[nn.ReLU(), None]),
    "a block with a dict": block(act={"0": nn.ReLU()}),
    "a block with a deeper module": block(act=nn.Sequential(nn.ReLU())),
    "a block with a dotted key": block(**{"a.b": nn.ReLU()}),
    "a block with an int key": block(more={7: nn.ReLU()}),
    "blocks with keys that are equal": [block(more={1: nn.ReLU()}), block(more={True: nn.ReLU()})],
}
PATTERNS = ["**", "layers.*", "**.attn", "**.act", "layers.*.{act,scale}", "layers[::2].*"]


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_modules_are_found_as_the_reference_finds_them(entry):
    model = build(layers=[block(), entry, block()])
    for pattern in PATTERNS:
        expected = oracle.chosen(model, [pattern])
        found = select(model, pattern, strict=False)
        assert list(found) == [place.path for place in expected]
        assert all(found[place.path] is place.module for place in expected)


@pytest.mark.parametrize("pattern", ["layers.1", "layers.1.act"])
def test_a_wrapped_layer_has_the_paths_of_the_layer(pattern):
    model = build(layers=[block(), block(), block()])
    before = list(select(model, "**"))
    replace_layers(model, pattern, lambda path, layer: Wrapper(layer))
    found = select(model, "**")
    assert list(found) == before
    assert type(found[pattern]) is Wrapper
