"""A function that was written for another call is told how it is called.

Python's own words for it ("'str' object has no attribute 'weight'") say nothing of that. A note
says it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.nn as nn
import pytest
from oracle import Snapshot

from mlx_modswap import replace_layers, select, swapped


class Adapter(nn.Module):
    def __init__(self, layer: Any, rank: int = 8):
        super().__init__()
        self.layer = layer
        self.dims = layer.weight.shape

    @classmethod
    def from_base(cls, layer: Any, rank: int = 8) -> Adapter:
        return cls(layer, rank)

    @staticmethod
    def around(layer: Any) -> Adapter:
        return Adapter(layer)


class Careless(nn.Module):
    """Takes path and layer, and fails for another reason."""

    def __init__(self, path: str, layer: Any):
        super().__init__()
        self.half = layer.weight.shape[0] / "2"


class Made:
    """A class without a Python `__init__`, which fails for another reason."""

    def __new__(cls, path: str, layer: Any) -> Any:
        return layer.weight.shape[0] / "2"


class Halving:
    """Made with a number, called with path and layer, and fails for another reason."""

    def __init__(self, parts: int):
        self.parts = parts

    def __call__(self, path: str, layer: Any) -> Any:
        return layer.weight.shape[0] / str(self.parts)


def adapt(layer: Any, rank: int) -> nn.Module:
    return Adapter(layer, rank)


def made_inside() -> Any:
    def inner(layer: Any, rank: int) -> nn.Module:
        return Adapter(layer, rank)

    return inner


def build() -> nn.Module:
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    return model


def said(error: BaseException) -> tuple[str, list[str]]:
    return str(error), error.__notes__


CALLED = "it was called as factory(path, module)"
NO_WEIGHT = "'str' object has no attribute 'weight'"
WRONG = {
    "a class method": (
        Adapter.from_base,
        NO_WEIGHT,
        f"{CALLED}; write lambda path, layer: Adapter.from_base(layer)",
    ),
    "a class": (Adapter, NO_WEIGHT, f"{CALLED}; write lambda path, layer: Adapter(layer)"),
    "a function": (adapt, NO_WEIGHT, f"{CALLED}; write lambda path, layer: adapt(layer)"),
    "a method": (
        nn.Linear.to_quantized,
        NO_WEIGHT,
        f"{CALLED}; write lambda path, layer: Linear.to_quantized(layer)",
    ),
    # What has no name that could be written.
    "a function inside another": (made_inside(), NO_WEIGHT, CALLED),
    "a lambda that takes the path for a layer": (lambda a, b: a.weight, NO_WEIGHT, CALLED),
    # What could not be called at all.
    "a lambda of one": (
        lambda layer: layer,
        "<lambda>() takes 1 positional argument but 2 were given",
        CALLED,
    ),
    "a static method of one": (
        Adapter.around,
        "Adapter.around() takes 1 positional argument but 2 were given",
        CALLED,
    ),
    "a function in C": (len, "len() takes exactly one argument (2 given)", CALLED),
    "a partial function": (
        partial(adapt, rank=2),
        "adapt() got multiple values for argument 'rank'",
        CALLED,
    ),
    # A layer of MLX, which takes the path for a number.
    "a layer class": (nn.Linear, "unsupported operand type(s) for /: 'float' and 'str'", CALLED),
}


@pytest.mark.parametrize(("factory", "text", "note"), WRONG.values(), ids=WRONG)
def test_a_factory_for_another_call_is_told_how_it_is_called(factory, text, note):
    model = build()
    before = Snapshot(model)
    for swap in (replace_layers, lambda *arguments: swapped(*arguments).__enter__()):
        with pytest.raises((TypeError, AttributeError)) as error:
            swap(model, "head", factory)
        assert said(error.value) == (text, ["while replacing 'head' (Linear)", note])
    assert before.differences() == []


def test_the_call_that_is_proposed_works():
    for text in ("Adapter.from_base(layer)", "Adapter(layer)", "Linear.to_quantized(layer)"):
        factory = eval(f"lambda path, layer: {text}", {**globals(), "Linear": nn.Linear})
        model = nn.Module()
        model.head = nn.Linear(64, 64)
        assert list(replace_layers(model, "head", factory)) == ["head"]


RIGHT = {
    "its own TypeError": (lambda path, layer: path + 1, "can only concatenate str"),
    "its own AttributeError": (lambda path, layer: layer.nothing, "has no attribute 'nothing'"),
    "a call inside that is wrong": (
        lambda path, layer: Adapter(rank=1),  # pyright: ignore[reportCallIssue]
        "missing 1 required",
    ),
    "a class that takes the path": (Careless, "unsupported operand type"),
    "a class that takes it in __new__": (Made, "unsupported operand type"),
    "an object that takes the path": (Halving(2), "unsupported operand type"),
    "another error": (lambda path, layer: {}[path], "head"),
}


@pytest.mark.parametrize(("factory", "text"), RIGHT.values(), ids=RIGHT)
def test_a_factory_that_fails_for_another_reason_is_not_told_so(factory, text):
    with pytest.raises((TypeError, AttributeError, KeyError), match=text) as error:
        replace_layers(build(), "head", factory)
    assert "it was called as" not in str(error.value)
    assert error.value.__notes__ == ["while replacing 'head' (Linear)"]


def has_weight(module: Any) -> bool:
    return module.weight is not None


def has_a_weight(module: Any, name: str) -> bool:
    return module.weight is not None


WHERE = "it was called as where(path, module)"
WRONG_WHERE = {
    "a lambda of one": (
        lambda module: True,
        "<lambda>() takes 1 positional argument but 2 were given",
        WHERE,
    ),
    "a function of one": (
        has_weight,
        "has_weight() takes 1 positional argument but 2 were given",
        WHERE,
    ),
    "a function that takes the path for a module": (
        lambda module, key="weight": module.weight is not None,
        NO_WEIGHT,
        WHERE,
    ),
    "a function that has a name": (
        has_a_weight,
        NO_WEIGHT,
        f"{WHERE}; write lambda path, module: has_a_weight(module)",
    ),
}


@pytest.mark.parametrize(("where", "text", "note"), WRONG_WHERE.values(), ids=WRONG_WHERE)
def test_a_where_for_another_call_is_told_how_it_is_called(where, text, note):
    with pytest.raises((TypeError, AttributeError)) as error:
        select(build(), "head", where=where)
    assert said(error.value) == (text, ["while asking where of 'head' (Linear)", note])


def test_a_where_that_fails_for_another_reason_says_for_which_module():
    with pytest.raises(AttributeError) as error:
        select(build(), "head", where=lambda path, module: module.nothing)
    assert str(error.value) == "'Linear' object has no attribute 'nothing'"
    assert error.value.__notes__ == ["while asking where of 'head' (Linear)"]


def test_an_adapter_of_mlx_lm_as_the_factory_is_told_how_to_write_it(needs):
    needs("mlx_lm")
    from mlx_lm.tuner import lora

    factory: Any = lora.LoRALinear.from_base
    with pytest.raises(AttributeError) as error:
        replace_layers(build(), "head", factory)
    assert said(error.value)[1][-1] == (
        f"{CALLED}; write lambda path, layer: LoRALinear.from_base(layer)"
    )
