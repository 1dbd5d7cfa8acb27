"""A wrapper is its layer to everyone who asks, and costs nothing of what the layer can do."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from mlx_modswap import (
    SelectionError,
    Wrapper,
    partial_modules,
    replace_layers,
    select,
    swapped,
    tree,
)


class Block(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.scale = 0.5
        self.attn = nn.Linear(width, width)
        self.mlp = [nn.Linear(width, width), nn.ReLU()]
        self.by_name = {"norm": nn.LayerNorm(width), "0": nn.Identity()}
        self._hidden = nn.Linear(1, 1)

    def __call__(self, x: mx.array, *, twice: bool = False) -> mx.array:
        x = x + self.scale * self.attn(x)
        for layer in self.mlp:
            x = layer(x)
        x = self.by_name["norm"](x)
        return 2 * x if twice else x

    @property
    def width(self) -> int:
        return self.attn.weight.shape[0]


class Peculiar(nn.Module):
    """Overrides what MLX itself calls."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
        vars(self)["values"] = 3

    def __call__(self, x: mx.array) -> mx.array:
        return self[1](self[0](x))

    def __getitem__(self, key: Any) -> Any:
        return self.layers[key] if isinstance(key, int) else super().__getitem__(key)

    def __len__(self) -> int:
        return 7

    def parameters(self):
        return {"all": [layer.weight for layer in self.layers]}

    def train(self, mode: bool = True):
        super().train(mode)
        self._training = False
        return self


class Recorder(Wrapper):
    """A wrapper as a user writes one."""

    names: tuple[str, ...] = ("a", "b")

    def __init__(self, layer: nn.Module, scale: Any = None):
        super().__init__(layer)
        self.scale = scale
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(super().__call__(*args, **kwargs))
        return self.outputs[-1]

    def last(self) -> Any:
        return self.outputs[-1]


class Noting(Wrapper):
    """A wrapper with a constant, that notes what it was called with."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._one = mx.ones(1)

    def __call__(self, x: mx.array) -> mx.array:
        self.last = x
        return super().__call__(x) * self._one


def quantized() -> nn.Module:
    return nn.Linear(64, 64).to_quantized(32, 4)


LAYERS = {
    "Linear": lambda: nn.Linear(4, 4),
    "Embedding": lambda: nn.Embedding(8, 4),
    "QuantizedLinear": quantized,
    "BatchNorm": lambda: nn.BatchNorm(4),
    "ReLU": nn.ReLU,
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "Block": Block,
    "Peculiar": Peculiar,
    "a wrapper": lambda: Wrapper(Block()),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def wrap(path: str, layer: nn.Module) -> nn.Module:
    return Wrapper(layer)


def unwrap(path: str, wrapper: Any) -> nn.Module:
    return wrapper.__wrapped__


def arrays(parameters: Any) -> Any:
    return tree_flatten(parameters)


def names(parameters: Any) -> list[str]:
    return [name for name, _ in arrays(parameters)]


def flat(parameters: Any) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in arrays(parameters)]


# What a wrapper answers

QUESTIONS = {
    "its class": lambda layer: layer.__class__,
    "whether it is of a class": lambda layer: [isinstance(layer, c) for c in (nn.Linear, Block)],
    "its attributes": lambda layer: {k: id(v) for k, v in vars(layer).items()},
    "the names of its attributes": dir,
    "a plain attribute": lambda layer: (getattr(layer, "scale", None), hasattr(layer, "scale")),
    "a property": lambda layer: getattr(layer, "width", None),
    "a method": lambda layer: getattr(layer, "as_linear", None),
    "whether it can be quantized": lambda layer: hasattr(layer, "to_quantized"),
    "an attribute named as a method of dict": lambda layer: getattr(layer, "values", None) == 3,
    "an array": lambda layer: id(getattr(layer, "weight", None)),
    "what it lacks": lambda layer: hasattr(layer, "no_such_name"),
    "its keys": lambda layer: list(layer.keys()),
    "its items": lambda layer: [(key, id(value)) for key, value in layer.items()],
    "its entries by key": lambda layer: [id(layer[key]) for key in layer],
    "its entries by get": lambda layer: [id(layer.get(key)) for key in ("weight", "nothing")],
    "its entries as another dict": lambda layer: {k: id(v) for k, v in dict(layer).items()},
    "whether it has a key": lambda layer: ["weight" in layer, "mlp" in layer, "nothing" in layer],
    "what iterating gives": list,
    "its length": len,
    "whether it is true": bool,
    "its parameters": lambda layer: flat(layer.parameters()),
    "its trainable parameters": lambda layer: flat(layer.trainable_parameters()),
    "its children": lambda layer: flat(layer.children()),
    "its leaf modules": lambda layer: flat(layer.leaf_modules()),
    "the modules inside": lambda layer: [(p, id(m)) for p, m in layer.named_modules() if p],
    "its training mode": lambda layer: layer.training,
    "its frozen keys": lambda layer: layer._no_grad,
    "its signature": inspect.signature,
    "the signature of its calls": lambda layer: inspect.signature(layer.__call__),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@each_layer
def test_a_wrapper_answers_as_its_layer(make, question):
    layer = make()

    assert question(Wrapper(layer)) == question(layer)
    assert question(Wrapper(Wrapper(layer))) == question(layer)


def test_a_wrapper_is_a_wrapper_and_has_its_layer():
    layer = nn.Linear(2, 2)
    wrapper = Wrapper(layer)

    assert type(wrapper) is Wrapper
    assert isinstance(wrapper, Wrapper)
    assert wrapper.__wrapped__ is layer
    assert inspect.unwrap(Recorder(wrapper)) is layer
    assert repr(wrapper) == "Wrapper(Linear(input_dims=2, output_dims=2, bias=True))"


def test_what_the_layer_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        Wrapper(nn.Linear(2, 2)).no_such_name  # noqa: B018


def test_arguments_and_outputs_go_through():
    block, x = Block(), mx.ones((1, 4))

    assert mx.array_equal(Wrapper(block)(x, twice=True), block(x, twice=True))


# What is done to a wrapper


def zeros_for(layer: nn.Module) -> list[tuple[str, mx.array]]:
    return [(name, mx.zeros_like(array)) for name, array in arrays(nn.Module.parameters(layer))]


def set_again(name: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute that the layer has, if it has it."""
    return lambda layer: setattr(layer, name, value) if hasattr(layer, name) else None


def delete(name: str) -> Callable[[Any], None]:
    return lambda layer: delattr(layer, name) if hasattr(layer, name) else None


DEEDS = {
    "set an array": set_again("weight", mx.zeros(3)),
    "set an attribute": set_again("scale", 7),
    "set a child": set_again("attn", nn.Identity()),
    "set an array to something else": set_again("bias", None),
    "set an attribute to an array": set_again("scale", mx.zeros(3)),
    "delete an attribute": delete("scale"),
    "delete an array": delete("bias"),
    "set an entry": lambda layer: layer.__setitem__("key", mx.zeros(1)),
    "delete an entry": lambda layer: [layer.__delitem__(key) for key in list(layer.keys())],
    "take out an entry": lambda layer: [layer.pop(key) for key in list(layer.keys())],
    "freeze": lambda layer: layer.freeze(),
    "freeze a key": lambda layer: layer.freeze(keys="bias"),
    "freeze and unfreeze": lambda layer: layer.freeze().unfreeze(),
    "eval": lambda layer: layer.eval(),
    "train": lambda layer: layer.train(),
    "set the dtype": lambda layer: nn.Module.set_dtype(layer, mx.float16),
    "update": lambda layer: nn.Module.update(layer, nn.Module.parameters(layer)),
    "load weights": lambda layer: nn.Module.load_weights(layer, zeros_for(layer), strict=False),
}


def state(container: Any) -> Any:
    """All that a container holds, to compare."""
    if isinstance(container, nn.Module):
        attributes = vars(container).items()
        plain = {key: value for key, value in attributes if not isinstance(value, mx.Dtype)}
        return type(container), str(plain), state(dict(dict.items(container)))
    if isinstance(container, dict):
        return {key: state(value) for key, value in container.items()}
    if isinstance(container, list):
        return [state(value) for value in container]
    if isinstance(container, mx.array):
        return container.dtype, container.tolist()
    return container


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
@each_layer
def test_what_is_done_to_a_wrapper_is_done_to_its_layer(make, deed):
    mx.random.seed(0)
    expected = make()
    mx.random.seed(0)
    layer = make()
    wrapper = Wrapper(layer)
    deed(expected)
    deed(wrapper)

    assert state(layer) == state(expected)
    assert dict.__len__(wrapper) == 1
    assert object.__getattribute__(wrapper, "__dict__").keys() == {"(sealed)"}


@each_layer
def test_what_a_model_does_to_all_of_its_modules_is_done_to_the_wrapped_ones(make):
    model, plain = nn.Sequential(Wrapper(make())), nn.Sequential(make())
    for deed in (nn.Module.freeze, nn.Module.eval, nn.Module.unfreeze, nn.Module.train):
        deed(model)
        deed(plain)

        assert names(model.trainable_parameters()) == names(plain.trainable_parameters())
        assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]


def test_what_unfreeze_of_the_layer_leaves_frozen_stays_frozen():
    wrapper = Wrapper(nn.BatchNorm(4))
    wrapper.unfreeze()

    assert names(wrapper.trainable_parameters()) == ["weight", "bias"]


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


class Slotted(Wrapper):
    __slots__ = ("scale", "unset")


def test_slots_belong_to_the_wrapper_and_its_copies():
    layer = Block()
    wrapper = Slotted(layer)
    wrapper.scale = 3
    copied = copy.deepcopy(wrapper)

    assert (wrapper.scale, copied.scale, layer.scale) == (3, 3, 0.5)
    assert not hasattr(copied, "unset")


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


def test_slots_are_kept_when_a_wrapper_is_quantized():
    wrapper = Slotted(nn.Linear(64, 64))
    wrapper.scale = 3

    assert wrapper.to_quantized(bits=4).scale == 3


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


def test_an_array_in_a_slot_is_refused_as_well():
    class InASlot(Wrapper):
        __slots__ = ("gain",)

        def __init__(self, layer: nn.Module):
            super().__init__(layer)
            self.gain = mx.zeros(2)

    with pytest.raises(TypeError, match="sets 'gain' to an array"):
        InASlot(nn.ReLU())


def test_a_tie_is_seen_on_both_sides_of_a_wrapper():
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.wrapped = Wrapper(nn.Sequential(nn.ReLU()))
    model.last = model.first
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "**.last", wrap)
    assert str(error.value) == (
        "'last' is tied to 'first' (the same Linear), which is not selected; select both, or "
        "neither (exclude='last'); to untie them, use "
        "model.update_modules(partial_modules(model, {'last': new}))"
    )


def test_an_init_that_does_not_hand_on_the_layer_is_told_so():
    class Forgetful(Wrapper):
        def __init__(self, layer: nn.Module):
            self.layer = layer

    with pytest.raises(TypeError) as error:
        Forgetful(nn.ReLU())

    assert str(error.value) == "Forgetful.__init__ must call super().__init__(layer)"


# Training


class Net(nn.Module):
    """Has a layer that changes its own entries, a tied one, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm(4)
        self.blocks = [Block(), Block()]
        self.frozen = nn.Linear(4, 4).freeze()
        self.again = self.embed

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.frozen(self.norm(self.embed(ids)))
        for block in self.blocks:
            x = block(x)
        return self.again.as_linear(x)


def trained(pattern: Any, compiled: bool, factory: Any = wrap) -> tuple[Net, list[float]]:
    mx.random.seed(0)
    model = Net()
    ids = mx.random.randint(0, 8, (16,))
    if pattern is not None:
        replace_layers(model, pattern, factory)
    optimizer = optim.AdamW(1e-2)

    def loss(model: Net, ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids), ids).mean()

    def step(ids: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, ids)
        optimizer.update(model, gradients)
        return value

    everything = [model.state, optimizer.state]
    if compiled:
        step = mx.compile(step, inputs=everything, outputs=everything)
    losses = []
    for _ in range(4):
        losses.append(step(ids).item())
        mx.eval(everything)
    return model, losses


WHOLE = ["embed", "again", "norm", "blocks.*", "frozen"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("pattern", [WHOLE, "norm", "blocks[0]", "blocks.**.{attn,norm}"], ids=str)
@pytest.mark.parametrize(
    "factory", [wrap, lambda path, layer: Wrapper(Noting(Wrapper(layer)))], ids=["one", "more"]
)
def test_training_is_that_of_the_model_without_wrappers(factory, pattern, compiled):
    plain, losses = trained(None, compiled)
    model, losses_wrapped = trained(pattern, compiled, factory)

    assert losses_wrapped == losses
    assert losses[-1] < losses[0]
    for parameters in (nn.Module.parameters, nn.Module.trainable_parameters):
        expected, found = arrays(parameters(plain)), arrays(parameters(model))
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(found, expected))


def test_what_the_raw_dict_holds_can_be_read_and_written_back_by_its_key():
    """As ``mx.grad`` and ``mx.compile`` of MLX 0.26 do with what they find in it."""
    layer, other = nn.Linear(2, 2), nn.ReLU()
    wrapper = Wrapper(layer)
    ((key, value),) = dict.items(wrapper)

    assert value is layer
    assert key in wrapper
    assert wrapper[key] is layer
    wrapper[key] = other
    assert wrapper.__wrapped__ is wrapper[key] is other
    assert dict.__len__(wrapper) == 1
    assert (dict.__len__(layer), dict.__len__(other)) == (2, 0)


def test_a_wrapper_may_be_the_argument_of_a_function_of_which_mlx_takes_the_gradient():
    def loss(layer: Any) -> mx.array:
        return layer(mx.ones((1, 2))).sum()

    layer = nn.Linear(2, 2)
    wrapper = Wrapper(layer)
    value, gradients = mx.value_and_grad(loss)(layer)
    value_of_wrapper, gradients_of_wrapper = mx.value_and_grad(loss)(wrapper)

    assert mx.array_equal(value_of_wrapper, value)
    assert mx.array_equal(gradients_of_wrapper["(wrapped)"]["weight"], gradients["weight"])
    assert wrapper.__wrapped__ is layer
    assert list(dict.keys(wrapper)) == ["(wrapped)"]


def test_what_is_trained_inside_a_swap_stays():
    model = nn.Sequential(nn.Linear(2, 2))
    with swapped(model, "layers.0", wrap):
        model.update({"layers": [{"weight": mx.ones((2, 2))}]})

    assert mx.array_equal(model.layers[0].weight, mx.ones((2, 2)))


def test_weights_are_saved_and_strictly_loaded_with_and_without_wrappers(tmp_path):
    for wrapped in (Net(), Net()):
        replace_layers(wrapped, WHOLE, wrap)
        plain = Net()
        for a, b in ((wrapped, plain), (plain, wrapped)):
            a.update({"embed": {"weight": mx.random.normal((8, 4))}})
            a.save_weights(str(tmp_path / "weights.safetensors"))
            b.load_weights(str(tmp_path / "weights.safetensors"), strict=True)

            assert mx.array_equal(plain.embed.weight, wrapped.embed.weight)


# In a model


def test_wrapping_by_pattern_is_undone_by_a_swap_and_by_hand():
    model = Net()
    before = [(path, id(module)) for path, module in model.named_modules()]
    with swapped(model, WHOLE, wrap) as wrapped:
        assert list(wrapped) == ["embed", "norm", "blocks.0", "blocks.1", "frozen", "again"]
        assert wrapped["embed"] is wrapped["again"]
        assert [path for path, _ in model.named_modules()] == [path for path, _ in before]
    assert [(path, id(module)) for path, module in model.named_modules()] == before

    replace_layers(model, WHOLE, wrap)
    replace_layers(model, "**", unwrap, where=Wrapper)
    assert [(path, id(module)) for path, module in model.named_modules()] == before


def test_a_wrapped_tied_layer_is_still_tied():
    model = Net()
    replace_layers(model, WHOLE, wrap)

    with pytest.raises(SelectionError, match=r"'embed' is tied to 'again' \(the same Wrapper\)"):
        replace_layers(model, "embed", wrap)


def test_a_wrapper_has_the_mode_of_its_layer_and_gives_it_back():
    model = Net().eval()
    replace_layers(model, "blocks.*", wrap)
    assert not any(module.training for module in model.modules())
    model.train()
    replace_layers(model, "blocks.*", unwrap)
    assert all(module.training for module in model.modules())


def test_paths_inside_a_wrapper_are_those_that_mlx_prints():
    model = Net()
    before = list(select(model, "**"))
    replace_layers(model, "blocks.*", lambda path, layer: Wrapper(Wrapper(layer)))

    assert list(select(model, "**")) == before
    assert sorted(before) == sorted(path for path, _ in model.named_modules())[1:]
    assert list(select(Wrapper(model), "**")) == before


def test_a_long_list_of_wrapped_layers_has_the_paths_of_the_layers():
    model = nn.Module()
    model.layers = [Wrapper(nn.Linear(2, 2)) for _ in range(20)]
    paths = [f"layers.{index}" for index in range(20)]
    assert list(select(model, "**")) == paths
    assert list(replace_layers(model, "**", lambda path, layer: nn.Identity())) == paths


def test_layers_inside_a_wrapper_are_swapped_and_put_back():
    model = Net()
    replace_layers(model, "blocks[0]", lambda path, layer: Wrapper(Wrapper(layer)))
    layer = model.blocks[0].attn
    with swapped(model, "blocks.*.attn", lambda path, layer: nn.Identity()) as swap:
        assert list(swap) == ["blocks.0.attn", "blocks.1.attn"]
        assert model.blocks[0].attn is swap["blocks.0.attn"]
    assert model.blocks[0].attn is layer

    new = nn.Tanh()
    model.update_modules(partial_modules(model, {"blocks.0.mlp.1": new}))
    assert model.blocks[0].mlp[1] is new


@pytest.mark.parametrize("is_the_model", [False, True])
def test_a_wrapper_that_gets_another_layer_meanwhile_is_seen_and_nothing_is_changed(is_the_model):
    first, second = Block(), Block()
    wrapper = Wrapper(first)
    model = wrapper if is_the_model else nn.Sequential(wrapper)
    path = "attn" if is_the_model else "layers.0.attn"
    first_attn, second_attn = first.attn, second.attn

    def exchange(path: str, layer: nn.Module) -> nn.Module:
        wrapper["(wrapped)"] = second
        return nn.Identity()

    with pytest.raises(SelectionError, match=f"'{path}' was modified while the factories ran"):
        replace_layers(model, path, exchange)
    assert first.attn is first_attn
    assert second.attn is second_attn


def test_a_picture_of_a_model_shows_what_is_inside_of_a_wrapper():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    replace_layers(model, "layers[0]", wrap)
    picture = str(tree(model))

    assert "Wrapper" in picture
    assert "Linear" in picture
    assert "(wrapped)" not in picture
