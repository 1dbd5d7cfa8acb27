"""What belongs to a wrapper and not to its layer, is kept when it is quantized, or refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from wrapping import (
    Block,
    Noting,
    Recorder,
    each_layer,
    flat,
    names,
    state,
)

from mlx_modswap import (
    Wrapper,
    replace_layers,
    swapped,
)

# What a wrapper keeps for itself


def test_what_init_sets_is_no_parameter_and_does_not_touch_the_layer():
    layer = Block()
    recorder = Recorder(layer, scale=3)
    before = names(layer.parameters())
    x = mx.ones((1, 4))

    assert mx.array_equal(recorder(x), layer(x))
    assert (recorder.scale, layer.scale) == (3, 0.5)
    assert len(recorder.outputs) == 1
    assert recorder.last() is recorder.outputs[0]
    assert not hasattr(layer, "outputs")
    assert names(recorder.parameters()) == names(layer.parameters()) == before


def test_what_is_set_later_on_such_a_name_stays_with_the_wrapper():
    layer = Block()
    recorder = Recorder(layer)
    recorder.scale = 3
    recorder.names = ("c",)
    recorder.outputs = [mx.zeros(1)]

    assert (recorder.scale, layer.scale) == (3, 0.5)
    assert (recorder.names, Recorder.names) == (("c",), ("a", "b"))
    assert "outputs" not in layer
    del recorder.scale
    assert recorder.scale == 0.5


NEWS = {
    "an array": lambda: mx.zeros(3),
    "a module": lambda: nn.Linear(2, 2),
    "a list of arrays": lambda: [mx.zeros(3)],
    "a dict": lambda: {"a": mx.zeros(3)},
    "a number": lambda: 7,
    "None": lambda: None,
    "a function": lambda: print,
}


@pytest.mark.parametrize("make_new", NEWS.values(), ids=NEWS)
@each_layer
def test_what_is_set_later_under_a_new_name_is_the_wrappers(make, make_new):
    layer, new = make(), make_new()
    before = state(layer)
    wrapper = Wrapper(layer)
    wrapper.latest = new

    assert wrapper.latest is new
    assert state(layer) == before
    assert not hasattr(layer, "latest")
    assert flat(wrapper.parameters()) == flat(layer.parameters())
    del wrapper.latest
    assert not hasattr(wrapper, "latest")


def test_what_is_noted_in_a_call_is_gone_after_unwrapping():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = state(model)
    with swapped(model, "layers.*", lambda path, layer: Noting(layer)) as noting:
        model(mx.ones((1, 2)))
        relu: Any = noting["layers.1"]
        assert relu.last.shape == (1, 2)
        assert names(model.parameters()) == ["layers.0.weight", "layers.0.bias"]

    assert state(model) == before


def test_a_name_of_the_layer_is_set_on_the_layer_through_all_wrappers():
    layer = Block()
    wrapper = Recorder(Wrapper(Recorder(layer)))
    wrapper.attn = new = nn.Identity()

    assert layer.attn is wrapper.attn is new


def test_a_name_of_a_wrapper_inside_is_not_a_name_of_the_layer():
    inner = Recorder(nn.Linear(2, 2), scale=1)
    outer = Wrapper(inner)
    outer.scale = 2

    assert (outer.scale, inner.scale) == (2, 1)


def test_wrappers_of_one_class_around_each_other_keep_their_own():
    inner = Recorder(nn.Linear(2, 2), scale=1)
    outer = Recorder(inner, scale=2)
    outer(mx.ones((1, 2)))

    assert (inner.scale, outer.scale) == (1, 2)
    assert len(inner.outputs) == len(outer.outputs) == 1
    assert inner.outputs is not outer.outputs


def test_a_mixin_after_the_wrapper_gives_it_methods():
    mixin: Any = type("Mixin", (), {"help": lambda self: self.scale, "update": None})

    class Helped(Recorder, mixin):
        pass

    wrapper: Any = Helped(Block(), scale=4)
    assert wrapper.help() == 4
    assert wrapper.update({"scale": 1}, strict=False) is wrapper.__wrapped__  # of nn.Module


def test_a_copy_is_a_wrapper_of_a_copy():
    recorder = Recorder(nn.Linear(2, 2), scale=[1])
    recorder.latest = 5
    deep, shallow = copy.deepcopy(recorder), copy.copy(recorder)

    assert [type(c) for c in (deep, shallow)] == [Recorder, Recorder]
    assert shallow.__wrapped__ is recorder.__wrapped__
    assert deep.__wrapped__ is not recorder.__wrapped__
    assert (deep.scale, deep.latest) == ([1], 5)
    assert deep.scale is not recorder.scale
    deep.weight = new = mx.zeros(1)
    deep.latest = 6
    assert deep.__wrapped__.weight is new
    assert recorder.weight.shape == (2, 2)
    assert recorder.latest == 5


def test_a_wrapper_can_be_pickled():
    pytest.importorskip("numpy", reason="MLX pickles arrays by way of NumPy")
    recorder = Recorder(nn.Linear(2, 2), scale=[1])
    again = pickle.loads(pickle.dumps(recorder))

    assert type(again) is Recorder
    assert again.scale == [1]
    assert mx.array_equal(again.weight, recorder.weight)


# The signature of a call


class Passing(Wrapper):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class OfOne(Wrapper):
    def __call__(self, x: mx.array, *args: Any) -> Any:
        return super().__call__(x, *args)


@pytest.mark.parametrize(
    ("wrapper", "parameters"),
    [
        (Passing(Block()), "(x: 'mx.array', *, twice: 'bool' = False) -> 'mx.array'"),
        (Passing(Passing(Block())), "(x: 'mx.array', *, twice: 'bool' = False) -> 'mx.array'"),
        (OfOne(Block()), "(x: 'mx.array', *args: 'Any') -> 'Any'"),
        (Passing(OfOne(Block())), "(x: 'mx.array', *args: 'Any') -> 'Any'"),
    ],
)
def test_the_signature_of_a_call_is_that_of_the_layer_or_one_of_its_own(wrapper, parameters):
    assert str(inspect.signature(wrapper.__call__)) == parameters


def test_a_call_by_its_name_goes_through_the_wrapper():
    recorder = Recorder(nn.Linear(2, 2))
    y = recorder.__call__(mx.ones((1, 2)))

    assert recorder.outputs == [y]


def test_a_layer_that_cannot_be_called_has_no_call():
    assert not hasattr(Wrapper(nn.Module()), "__call__")  # noqa: B004


# Quantizing


class Shifted(Wrapper):
    """Has a constant, and notes what it was called with."""

    def __init__(self, layer: nn.Module, shift: float):
        super().__init__(layer)
        self.shift = shift
        self._constant = mx.full((64,), shift)

    def __call__(self, x: mx.array) -> mx.array:
        self.last = x
        return super().__call__(x) + self._constant


def shifted(path: str, layer: nn.Module) -> nn.Module:
    return Shifted(layer, 2.0)


def test_quantize_keeps_a_wrapper_and_what_it_has():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plain = copy.deepcopy(model)
    replace_layers(model, ["layers.0", "layers.1"], shifted)
    before: Any = model.layers[0]
    x = mx.random.normal((2, 64))
    model(x)
    for each in (model, plain):
        nn.quantize(each, group_size=32, bits=4)
    wrapper = model.layers[0]

    assert [type(layer) for layer in model.layers] == [Shifted, Shifted, nn.QuantizedLinear]
    assert type(wrapper.__wrapped__) is nn.QuantizedLinear
    assert type(model.layers[1].__wrapped__) is nn.ReLU
    assert wrapper is not before
    assert type(before.__wrapped__) is nn.Linear
    assert (wrapper.shift, wrapper._constant) == (2.0, before._constant)
    assert names(model.parameters()) == names(plain.parameters())
    assert mx.allclose(wrapper(x), plain.layers[0](x) + 2, atol=1e-5)
    wrapper.shift = 3.0
    assert before.shift == 2.0


def test_a_quantized_wrapper_of_a_wrapper_has_both():
    quantized: Any = Shifted(Recorder(nn.Linear(64, 64), scale=1), 2.0).to_quantized(bits=4)

    assert [type(quantized), type(quantized.__wrapped__)] == [Shifted, Recorder]
    assert type(quantized.__wrapped__.__wrapped__) is nn.QuantizedLinear
    assert (quantized.shift, quantized.scale) == (2.0, 1)


def test_to_quantized_takes_what_that_of_the_layer_takes():
    wrapper = Wrapper(nn.Linear(64, 64))
    expected = inspect.signature(nn.Linear(64, 64).to_quantized)

    assert inspect.signature(wrapper.to_quantized) == expected
    assert wrapper.to_quantized(32, bits=8).bits == 8
    assert wrapper.to_quantized(32, bits=8).group_size == 32


def test_what_cannot_be_quantized_says_so_with_a_wrapper_too():
    with pytest.raises(AttributeError) as error:
        Wrapper(nn.ReLU()).to_quantized()

    assert str(error.value) == "'ReLU' object has no attribute 'to_quantized'"


def test_a_wrapper_that_computed_something_from_the_layer_may_quantize_in_its_own_way():
    class Normed(Wrapper):
        def __init__(self, layer: nn.Linear):
            super().__init__(layer)
            self.dtype = layer.weight.dtype

        def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
            new: Any = super().to_quantized(*args, **kwargs)
            new.dtype = new.weight.dtype
            return new

    wrapper = Normed(nn.Linear(64, 64))
    quantized: Any = wrapper.to_quantized(bits=4)

    assert (wrapper.dtype, quantized.dtype) == (mx.float32, mx.uint32)
    assert type(quantized) is Normed


# The training mode of what has no parameters


class Dropping(Wrapper):
    """A wrapper with modules of its own: one, one in a list, and a private one."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.dropout = nn.Dropout(0.5)
        self.more = [nn.Dropout(0.5), "a note", {"inner": nn.Sequential(nn.Dropout(0.5))}]
        self._private = nn.Dropout(0.5)
        self._frozen = nn.Sequential(nn.Linear(2, 2))  # a constant: it has parameters

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(super().__call__(x))

    def modes(self) -> set[bool]:
        inner = self.more[2]["inner"]
        found = [self.dropout, self.more[0], inner, inner.layers[0], self._private]
        return {one.training for one in [self, *found]}


def test_modules_of_a_wrapper_follow_the_training_mode_of_the_model():
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    replace_layers(model, "**.layers.0", lambda path, layer: Dropping(layer), where=nn.Linear)
    wrapper, x = model.layers[0].layers[0], mx.ones((1, 2))
    assert wrapper.modes() == {True}
    model.eval()
    assert wrapper.modes() == {False}
    assert wrapper._frozen.training
    assert mx.array_equal(model(x), wrapper.__wrapped__(x))
    model.train()
    assert wrapper.modes() == {True}


@pytest.mark.parametrize(
    "make", [lambda layer: layer, lambda layer: nn.Linear(2, 2)], ids=["old", "new"]
)
@pytest.mark.parametrize("mode", [True, False])
def test_a_swap_gives_the_modules_of_a_wrapper_the_mode_of_the_old_layer(make, mode):
    model: Any = nn.Sequential(nn.Linear(2, 2)).train(mode)
    with swapped(model, "layers.0", lambda path, layer: Dropping(make(layer))):
        assert model.layers[0].modes() == {mode}


def test_a_layer_without_a_mode_can_be_wrapped():
    class Bare(nn.Module):
        def __init__(self):
            pass

    assert Dropping(Bare()).dropout.training


# What is refused


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Linear, "the class Linear"),
        (None, "None"),
        (nn.relu, "a function"),
        ([nn.ReLU()], "a list of 1"),
        ({}, "a dict"),
    ],
)
def test_only_a_module_can_be_wrapped(layer, what):
    with pytest.raises(TypeError) as error:
        Wrapper(layer)

    assert str(error.value) == f"layer must be an mlx.nn.Module, not {what}"


class Holding(Wrapper):
    def __init__(self, layer: nn.Module, name: str, value: Any):
        super().__init__(layer)
        setattr(self, name, value)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (mx.zeros(2), "an array"),
        (nn.Linear(2, 2), "a module (Linear) that holds arrays"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "a module (Sequential) that holds arrays"),
        (Wrapper(nn.Linear(2, 2)), "a module (Wrapper) that holds arrays"),
        ([mx.zeros(2)], "a list of 1 that holds arrays"),
        ({"a": [None, {"b": mx.zeros(2)}]}, "a dict that holds arrays"),
        ([nn.ReLU(), nn.Linear(2, 2)], "a list of 2 that holds arrays"),
    ],
)
def test_what_would_not_be_trained_is_refused(value, what):
    with pytest.raises(TypeError) as error:
        Holding(nn.ReLU(), "gain", value)

    assert str(error.value) == (
        f"Holding.__init__ sets 'gain' to {what}, which is not a parameter there: it would be "
        "neither trained, nor saved, nor cast; name it '_gain' if it is a constant, or write a "
        "plain mlx.nn.Module that holds the layer if it is to be trained and saved"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_gain", mx.zeros(2)),
        ("_parts", [nn.Linear(2, 2)]),
        ("act", nn.ReLU()),
        ("rope", nn.RoPE(4)),
        ("parts", []),
        ("function", mx.compile(nn.relu)),
        ("where", {"a": 1}),
    ],
)
def test_constants_and_what_holds_no_arrays_may_be_set(name, value):
    wrapper = Holding(nn.Linear(2, 2), name, value)

    assert getattr(wrapper, name) is value
    assert names(wrapper.parameters()) == ["weight", "bias"]


def test_a_list_that_init_fills_later_is_looked_at_as_well():
    class Filling(Wrapper):
        def __init__(self, layer: nn.Module):
            super().__init__(layer)
            self.parts = []
            self.parts.append(nn.Linear(2, 2))

    with pytest.raises(
        TypeError, match=r"Filling\.__init__ sets 'parts' to a list of 1 that holds"
    ):
        Filling(nn.ReLU())


@pytest.mark.parametrize("name", ["items", "children", "update"])
def test_an_attribute_that_hides_a_method_of_every_module_is_refused(name):
    class Hiding(Wrapper):
        def __init__(self, layer: nn.Module):
            super().__init__(layer)
            setattr(self, name, [])

    with pytest.raises(TypeError) as error:
        Hiding(nn.ReLU())
    assert str(error.value) == (
        f"Hiding.__init__ sets {name!r}, which is a method of every mlx.nn.Module; use "
        "another name for the attribute"
    )


def test_an_init_that_does_not_hand_on_the_layer_is_told_so():
    class Forgetful(Wrapper):
        def __init__(self, layer: nn.Module):
            self.layer = layer

    with pytest.raises(TypeError) as error:
        Forgetful(nn.ReLU())

    assert str(error.value) == "Forgetful.__init__ must call super().__init__(layer)"
