"""How factories are called, and what they return."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import Block, Holder, Model, Recorder, build, fresh, identity, unchanged
from oracle import Snapshot

from mlx_modswap import replace_layers, select, swapped

# ---------------------------------------------------------------- order


def test_order_is_depth_first_as_the_model_is_written():
    model = build(b=nn.ReLU(), a=build(z=[nn.ReLU(), nn.ReLU()], y=nn.ReLU()), c=nn.ReLU())
    factory = Recorder(unchanged)
    replace_layers(model, "**", factory)
    assert factory.paths == ["b", "a", "a.z.0", "a.z.1", "a.y", "c"]


@pytest.mark.parametrize(
    "pattern",
    [
        ["heads.*", "layers[2].mlp", "layers[0].mlp", "embed"],
        ["heads.*", "layers[::-2].mlp", "embed"],
        {"heads.*": True, "layers[::-2].mlp": True, "embed": True},
        {("heads.*", "layers[2].mlp", "layers[0].mlp", "embed"): True},
    ],
    ids=str,
)
def test_order_ignores_that_of_patterns_rules_and_slices(pattern):
    factory = Recorder()
    several: Any = (pattern, factory)
    if isinstance(pattern, dict):
        several = (dict.fromkeys(pattern, factory),)
    replace_layers(Model(), *several)
    in_order = ["embed", "layers.0.mlp", "layers.2.mlp", "heads.b", "heads.a", "heads.10"]
    assert factory.paths == in_order


def test_order_is_that_of_select_and_the_report():
    model = Model()
    factory = Recorder()
    paths = list(select(model, "**", where=nn.Linear))
    assert list(replace_layers(model, "**", factory, where=nn.Linear)) == paths
    assert factory.paths == paths


def test_random_initialisation_is_reproducible():
    def weights():
        mx.random.seed(7)
        report = replace_layers(Model(), "layers.*.mlp", lambda p, m: nn.Linear(4, 4))
        return [module["weight"] for module in report.values()]

    assert all(mx.array_equal(a, b) for a, b in zip(weights(), weights()))


# ---------------------------------------------------------------- results and errors


def test_an_error_of_a_factory_is_raised_unchanged():
    class OwnError(Exception):
        pass

    error = OwnError()

    def failing(path, module):
        raise error

    with pytest.raises(OwnError) as caught:
        replace_layers(Model(), "embed", failing)
    assert caught.value is error
    assert error.__notes__ == ["while replacing 'embed' (Embedding)"]


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "None"),
        (nn.ReLU, "the class ReLU"),
        (mx.zeros(1), "an array"),
        (fresh, "a function"),
        ({}, "a dict"),
        ([nn.ReLU()], "a list of 1"),
        (3, "an int"),
    ],
)
def test_a_result_that_is_not_a_module(returned, what):
    model = Model()
    before = Snapshot(model)
    last = "layers.2.mlp"
    with pytest.raises(TypeError) as caught:
        replace_layers(model, "layers.*.mlp", lambda p, m: returned if p == last else Holder())
    assert str(caught.value) == (
        f"the factory returned {what} for 'layers.2.mlp' (Linear); it must return an "
        "mlx.nn.Module; return the module it was given to leave it unchanged"
    )
    assert before.differences() == []


def test_an_empty_module_is_accepted():
    model = Model()
    replace_layers(model, "layers.*.acts.*", lambda path, module: nn.Tanh())
    assert all(type(layer.acts[0]) is nn.Tanh for layer in model.layers)
    assert all(layer.acts[1:] == [None, nn.gelu] for layer in model.layers)


def test_returning_the_given_module_changes_nothing():
    model = Model()
    before = Snapshot(model)
    report = replace_layers(model, "**", unchanged)
    assert before.differences() == []
    assert len(report) == 0
    assert str(report) == "nothing changed"


def test_a_factory_may_choose_among_nested_places():
    model = Model()
    report = replace_layers(model, "**", lambda p, m: Holder() if type(m) is Block else m)
    assert list(report) == ["layers.0", "layers.1", "layers.2"]


# ---------------------------------------------------------------- written for another call
# Python's own words for it ("'str' object has no attribute 'weight'") say nothing of that.


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
def test_a_factory_for_another_call(factory, text, note):
    model = build(head=nn.Linear(2, 2))
    before = Snapshot(model)
    for swap in (replace_layers, lambda *arguments: swapped(*arguments).__enter__()):
        with pytest.raises((TypeError, AttributeError)) as error:
            swap(model, "head", factory)
        assert str(error.value) == text
        assert error.value.__notes__ == ["while replacing 'head' (Linear)", note]
    assert before.differences() == []


def test_the_proposed_call_works():
    for text in ("Adapter.from_base(layer)", "Adapter(layer)", "Linear.to_quantized(layer)"):
        factory = eval(f"lambda path, layer: {text}", {**globals(), "Linear": nn.Linear})
        model = build(head=nn.Linear(64, 64))
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
def test_a_factory_that_fails_for_another_reason(factory, text):
    with pytest.raises((TypeError, AttributeError, KeyError), match=text) as error:
        replace_layers(build(head=nn.Linear(2, 2)), "head", factory)
    assert "it was called as" not in str(error.value)
    assert error.value.__notes__ == ["while replacing 'head' (Linear)"]


def test_from_base_of_mlx_lm(needs):
    needs("mlx_lm")
    from mlx_lm.tuner import lora

    factory: Any = lora.LoRALinear.from_base
    with pytest.raises(AttributeError) as error:
        replace_layers(build(head=nn.Linear(2, 2)), "head", factory)
    advice = f"{CALLED}; write lambda path, layer: LoRALinear.from_base(layer)"
    assert error.value.__notes__[-1] == advice


# ---------------------------------------------------------------- not a factory


class Odd:
    """Of a class whose name begins with a vowel."""


BAD_ARGUMENTS = [
    ((3, "embed", identity), "model must be an mlx.nn.Module, not an int"),
    ((nn.Linear, "embed", identity), "model must be an mlx.nn.Module, not the class Linear"),
    ((mx.zeros(1), "embed", identity), "model must be an mlx.nn.Module, not an array"),
    ((Odd(), "embed", identity), "model must be an mlx.nn.Module, not an Odd"),
    (((1, 2), "embed", identity), "model must be an mlx.nn.Module, not a tuple of 2"),
    (([Model()], "embed", identity), "model must be an mlx.nn.Module, not a list of 1"),
    ((Model(), "embed"), "factory must be a function of path and module, not None"),
    (
        (Model(), "embed", nn.ReLU()),
        "factory must be a function of path and module, not a module (ReLU)",
    ),
    ((Model(), "embed", 3), "factory must be a function of path and module, not an int"),
    (
        (Model(), {"embed": nn.ReLU()}),
        "the factory of rule 'embed' must be a function of path and module, not a module (ReLU)",
    ),
    (
        (Model(), {"embed": identity}, identity),
        "rules hold their own factories: leave the factory out",
    ),
    ((Model(), nn.ReLU(), identity), "pattern must be a path pattern, not a module (ReLU)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(TypeError) as error:
        replace_layers(*arguments)
    assert str(error.value) == message
