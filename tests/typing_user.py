# pyright: strict, reportMissingTypeStubs=false
"""What a strictly checked program of a user gets from each public function: test_typing.py."""

from __future__ import annotations

import re
from typing import Any, assert_type

import mlx.core as mx
import mlx.nn as nn

from mlx_modswap import (
    NoMatchError,
    PatternError,
    Replacement,
    SelectionError,
    Wrapper,
    capture,
    observe,
    partial_modules,
    patch,
    replace_layers,
    select,
    swapped,
    tree,
)


class Scaled(Wrapper):
    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__(layer)
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = super().__call__(x)
        return self.scale * output


def scaled(path: str, layer: nn.Module) -> Scaled:
    return Scaled(layer, 0.5)


def of_linear(path: str, layer: nn.Linear) -> nn.Linear:
    output_dims, input_dims = layer.weight.shape
    return nn.Linear(input_dims, output_dims, bias="bias" in layer)


def no_bias(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "bias" not in module


def looking(model: nn.Module) -> None:
    found = select(model, "layers[0].**", where=nn.Linear, exclude=["**.ln1", re.compile("a.*")])
    assert_type(found, dict[str, nn.Module])
    assert_type(select(model, ("a", re.compile("b")), where=(nn.Linear,)), dict[str, nn.Module])
    select(model, {"a", "b"}, where=no_bias, strict=False)
    select(model, "**", where=nn.Linear | nn.Embedding)
    select(model, "**", where=lambda path, module: path in found and module is not found[path])

    assert_type(partial_modules(model, found), dict[Any, Any])
    partial_modules(model, {"head": nn.Linear(4, 4)})

    assert_type(str(tree(model)), str)
    print(tree(model, "**.linear1", where=nn.Linear, exclude="layers[0].**"))


def swapping(model: nn.Module) -> None:
    changed = replace_layers(model, "a", scaled, where=nn.Linear, exclude="b", strict=False)
    assert_type(changed, Replacement)
    assert_type([*changed.items()], list[tuple[str, nn.Module]])
    assert_type(changed["layers.0.linear1"], nn.Module)
    assert_type(str(changed), str)
    for change in changed.changes:
        assert_type(change.pattern, str | re.Pattern[str])
        assert_type(change.count, int)
        assert_type(change.old_dtypes, frozenset[mx.Dtype])
        select(model, change.pattern)
    assert_type(changed.old_nbytes - changed.new_nbytes, int)

    replace_layers(model, re.compile("a"), of_linear, where=nn.Linear)
    replace_layers(model, ["a", re.compile("b")], lambda path, layer: nn.Identity())
    replace_layers(model, "**", lambda path, layer: layer.to_quantized(bits=4), where=nn.Linear)
    rules = replace_layers(model, {"a": None, "b": scaled, "c": lambda path, layer: nn.Identity()})
    assert_type(rules, Replacement)
    replace_layers(model, {re.compile("a"): None, re.compile("b"): scaled}, where=no_bias)
    mixed: dict[str | re.Pattern[str], Any] = {"a": None, re.compile("b"): scaled}
    replace_layers(model, mixed)
    replace_layers(model, {("a", "b"): scaled, ("c", "d"): None}, where=nn.Linear)
    replace_layers(model, {("a", re.compile("b")): scaled, "c": None, re.compile("d"): scaled})
    several: dict[str | re.Pattern[str] | tuple[str, ...], Any] = {("a", "b"): scaled, "c": None}
    replace_layers(model, several, exclude="layers[0]")

    with swapped(model, "a", scaled, where=nn.Linear, exclude=("b",), strict=False) as changed:
        assert_type(changed, Replacement)
    with swapped(model, {"a": None, "b": scaled}, where=no_bias) as changed:
        assert_type(changed, Replacement)
    with swapped(model, {("a", "b"): scaled, "c": None}) as changed:
        assert_type(changed, Replacement)


def hooking(model: nn.TransformerEncoder, x: mx.array) -> mx.array:
    sums: dict[str, mx.array] = {}

    def add(path: str, output: mx.array, x: mx.array) -> None:
        sums[path] = sums.get(path, mx.zeros(4)) + x.sum(axis=0)

    with observe(model, "**.linear1", add, where=nn.Linear, exclude="b", strict=False) as calls:
        model(x, None)
    assert_type(calls, dict[str, int])

    with capture(model, "layers[:2]", where=nn.Module, exclude="layers[1]", strict=True) as outputs:
        model(x, None)
    assert_type(outputs, dict[str, list[Any]])

    with patch(model, "layers[1]", lambda path, output: 0.5 * output, where=no_bias) as nothing:
        assert_type(nothing, None)
        output: mx.array = model(x, None)
    return output


def wrapping(layer: nn.Linear) -> None:
    wrapper = Scaled(layer, 2.0)
    assert_type(wrapper, Scaled)
    assert_type(wrapper.scale, float)
    assert_type(wrapper(mx.ones(4)), mx.array)
    assert_type(wrapper.__wrapped__, nn.Module)
    assert_type(wrapper.weight, Any)  # the layer's
    assert_type(Wrapper(layer), Wrapper)


def failing(model: nn.Module) -> None:
    try:
        select(model, "a[")
    except PatternError as error:
        assert_type(error, PatternError)
        value: ValueError = error
        print(value)
    except NoMatchError as error:
        lookup: LookupError = error
        print(lookup)
    except SelectionError as error:
        value = error
