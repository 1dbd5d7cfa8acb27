"""A wrapper is its layer to everyone who asks, and costs nothing of what the layer can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from wrapping import (
    Block,
    Noting,
    Recorder,
    arrays,
    each_layer,
    flat,
    names,
    state,
    unwrap,
    wrap,
)

from mlx_modswap import (
    SelectionError,
    Wrapper,
    partial_modules,
    replace_layers,
    select,
    swapped,
    tree,
)

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
    """As ``mx.grad`` and ``mx.compile`` do with what they find in it."""
    layer, other = nn.Linear(2, 2), nn.ReLU()
    wrapper = Wrapper(layer)
    ((key, value),) = dict.items(wrapper)

    assert value is layer
    assert key in wrapper
    assert wrapper[key] is layer
    wrapper[key] = other
    assert wrapper.__wrapped__ is wrapper[key] is other


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
