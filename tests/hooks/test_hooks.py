"""What observe, capture and patch have in common: layers that never ran, and what stays after."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from oracle import Snapshot
from refusals import modified
from running import IDS, Model, nothing

from mlx_modswap import (
    NoMatchError,
    SelectionError,
    Wrapper,
    capture,
    observe,
    patch,
    swapped,
)


def unchanged(path: str, output: Any) -> Any:
    return output


Use = Callable[..., AbstractContextManager[Any]]
USES: dict[str, Use] = {
    "observe": lambda model, pattern, **options: observe(model, pattern, nothing, **options),
    "capture": capture,
    "patch": lambda model, pattern, **options: patch(model, pattern, unchanged, **options),
}
each_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


# Hooks that never ran

REASONS = (
    "likely reasons: the model was called outside the block (a generator runs only when it "
    "is read) or in a function that was compiled before it; a layer is used through its weights or "
    "a method other than __call__ (as_linear); a layer was replaced inside the block; strict=False "
    "allows it"
)


def generate_later(model: Model) -> Iterator[mx.array]:
    yield model(IDS)


def never(model: Model) -> None:
    pass


def in_a_generator(model: Model) -> None:
    generate_later(model)


def use_inside_a_swap(model: Model) -> None:
    with swapped(model, "layers.*", lambda path, layer: nn.Identity()):
        model(IDS)


def compiled_before(model: Model) -> Callable[[Model], None]:
    compiled = mx.compile(lambda ids: model(ids))
    mx.eval(compiled(IDS))
    return lambda model: mx.eval(compiled(IDS))


def run(model: Model) -> None:
    model(IDS)


SILENT: dict[str, tuple[Any, Any, str]] = {
    "the model is not called": (
        "layers.*",
        never,
        "none of the 3 layers that 'layers.*' matches was called inside the block: layers[0:3]",
    ),
    "a generator is used up after the block": (
        "layers.*.attn",
        in_a_generator,
        "none of the 3 layers that 'layers.*.attn' matches was called inside the block: "
        "layers[0:3].attn",
    ),
    "the layers are replaced inside the block": (
        "layers[:2]",
        use_inside_a_swap,
        "none of the 2 layers that 'layers[:2]' matches was called inside the block: layers[0:2]",
    ),
    "a layer is used by another method": (
        ["embed", "head"],
        lambda model: model.head.as_linear(mx.ones(4)),
        "the only layer that 'embed' matches was not called inside the block: embed",
    ),
    "a layer is used by its weights": (
        "**.v_proj",
        run,
        "none of the 3 layers that '**.v_proj' matches was called inside the block: "
        "layers[0:3].attn.v_proj",
    ),
    "one of several patterns": (
        ["layers.*", "unused"],
        run,
        "the only layer that 'unused' matches was not called inside the block: unused",
    ),
    "several forms": (
        "**.{v_proj,unused}",
        run,
        "none of the 4 layers that '**.{v_proj,unused}' matches was called inside the block: "
        "layers[0:3].attn.v_proj, unused",
    ),
}


@pytest.mark.parametrize(("pattern", "body", "message"), SILENT.values(), ids=SILENT)
@each_use
def test_a_pattern_of_which_no_layer_is_called_is_an_error(model, use, pattern, body, message):
    with pytest.raises(NoMatchError) as error, use(model, pattern):
        body(model)

    assert str(error.value) == f"{message}; {REASONS}"
    with use(model, pattern, strict=False):
        body(model)


@each_use
def test_a_function_that_was_compiled_before_the_block_is_an_error(model, use):
    run_compiled = compiled_before(model)
    with pytest.raises(NoMatchError, match="none of the 3 layers"), use(model, "layers.*"):
        run_compiled(model)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("**", {}),
        ("**.{q,v}_proj", {}),
        ("**", {"where": nn.Linear}),
        (["layers.*", "unused"], {"exclude": "unused"}),
    ],
    ids=str,
)
@each_use
def test_single_layers_that_are_never_called_are_no_error(model, use, pattern, options):
    with use(model, pattern, **options):
        model(IDS)


@each_use
def test_a_tied_layer_inside_another_hooked_one_and_outside_of_it(use):
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, nn.Sequential(nn.Sequential(inner)), nn.Linear(2, 2))
    x = mx.ones((1, 2))
    before, expected = Snapshot(model), model(x)
    with use(model, "**"):
        assert mx.array_equal(model(x), expected)

    assert before.differences() == []


@each_use
def test_a_layer_of_the_model_itself_and_a_layer_inside_it(use):
    model = nn.Module()
    model.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.block.inner = nn.Identity()
    before = Snapshot(model)
    with use(model, ["block", "block.inner"]):
        model.block.inner(model.block(mx.ones((1, 2))))

    assert before.differences() == []


@each_use
def test_a_layer_of_two_patterns_counts_for_both(model, use):
    with use(model, ["layers[0].attn", "layers.*.attn"]):
        model.layers[0].attn(mx.ones((1, 4)))


@each_use
def test_an_error_raised_in_the_block_comes_before_layers_that_never_ran(model, use):
    with pytest.raises(ZeroDivisionError), use(model, "**"):
        raise ZeroDivisionError


@each_use
def test_not_strict_takes_patterns_that_match_nothing(model, use):
    with use(model, ["no_such_layer", "layers.*"], exclude="nor_this", strict=False):
        model(IDS)
    with use(model, "no_such_layer", strict=False):
        pass


# What a hooked layer is to others


@each_use
def test_what_is_set_on_a_hooked_layer_is_set_on_the_layer(use):
    model: Any = Model()
    with use(model, ["layers.*.attn", "unused"], strict=False):
        layer = model.layers[0].attn
        layer.scale = 3.0
        layer.noted = [mx.ones(2)]
        del layer.scale
        model.unused.weight = mx.zeros((4, 4))

    assert not hasattr(model.layers[0].attn, "scale")
    assert model.layers[0].attn.noted[0].shape == (2,)
    assert mx.array_equal(model.unused.weight, mx.zeros((4, 4)))


@each_use
def test_what_is_set_on_a_hooked_wrapper_is_the_wrappers_own(use):
    model = nn.Sequential(Wrapper(nn.Linear(2, 2)))
    wrapper: Any = model.layers[0]
    with use(model, "layers.0", strict=False):
        model.layers[0].last = 3

    assert wrapper.last == 3
    assert not hasattr(wrapper.__wrapped__, "last")


@each_use
def test_a_wrapper_around_a_hooked_layer_keeps_its_own_too(use):
    model: Any = nn.Sequential(nn.Linear(2, 2))
    with use(model, "layers.0", strict=False):
        wrapper: Any = Wrapper(model.layers[0])
        wrapper.last = 3
        wrapper.weight = new = mx.zeros((2, 2))

    assert not hasattr(model.layers[0], "last")
    assert model.layers[0].weight is new


def test_a_class_that_is_changed_inside_a_block_is_not_that_of_later_blocks():
    """As mlx-lm's ``grad_checkpoint`` changes the class of a layer."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    with capture(model, "layers.0", strict=False):
        assert str(model.layers[0]).startswith("Hooked(Linear(")
        type(model.layers[0]).__call__ = lambda self, x: 0
        assert model(mx.ones((1, 2))) == 0

    with capture(model, "layers.0") as outputs:
        y = model(mx.ones((1, 2)))
    assert mx.array_equal(outputs["layers.0"][0], y)


@each_use
def test_a_hooked_layer_is_quantized_without_its_hook(use):
    model: Any = nn.Sequential(nn.Linear(64, 64), Wrapper(nn.Linear(64, 64)), nn.ReLU())
    with use(model, "layers.*", strict=False):
        quantized = [layer.to_quantized(32, bits=8) for layer in model.layers[:2]]
        assert not hasattr(model.layers[2], "to_quantized")

    assert [type(layer) for layer in quantized] == [nn.QuantizedLinear, Wrapper]
    assert [(layer.group_size, layer.bits) for layer in quantized] == [(32, 8)] * 2


@each_use
def test_a_model_that_is_quantized_inside_the_block_is_not_put_back(use):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    with (
        pytest.raises(SelectionError) as error,
        use(model, "layers[0]"),
    ):
        nn.quantize(model)

    assert str(error.value) == modified("layers.0")
    assert type(model.layers[0]) is nn.QuantizedLinear


# A model that changes arrays in place


class Doubling(nn.Module):
    """Changes its input, and returns what it is given again, in containers of each kind."""

    def __call__(self, x: mx.array, *, again: list[mx.array]) -> Any:
        x *= 2
        return {"sum": x + again[0], "parts": [x + 1, (x + 2,)]}


class InPlace(nn.Module):
    """Goes on with the outputs of its layers as arrays of its own, which it changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, 2)
        self.embed.weight = mx.array([[1.0, 2.0], [3.0, 4.0]])
        self.double = Doubling()

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        h += 10
        out = self.double(h, again=[h])
        total = out["sum"]
        total *= 100
        for part in (out["parts"][0], *out["parts"][1]):
            part *= 0
        out["parts"].clear()
        h += 1000
        return total


H = [11.0, 12.0]  # the state between the two layers
DOUBLED = {"sum": [44.0, 48.0], "parts": [[23.0, 25.0], ([24.0, 26.0],)]}


def as_lists(value: Any) -> Any:
    if isinstance(value, mx.array):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_lists(one) for key, one in value.items()}
    return type(value)(map(as_lists, value)) if isinstance(value, (list, tuple)) else value


def test_outputs_are_recorded_as_the_layers_returned_them():
    model = InPlace()
    with capture(model, "*") as outputs:
        assert model(mx.array(0)).tolist() == [4400.0, 4800.0]
    assert as_lists(outputs) == {"embed": [[1.0, 2.0]], "double": [DOUBLED]}


def test_a_hook_keeps_outputs_and_arguments_as_they_were_in_the_call():
    model, kept = InPlace(), []
    with observe(model, "double", lambda *args, **kwargs: kept.append((args, kwargs))):
        assert model(mx.array(0)).tolist() == [4400.0, 4800.0]
    ((args, kwargs),) = kept
    assert as_lists(args) == ("double", DOUBLED, H)
    assert as_lists(kwargs) == {"again": [H]}


def test_a_hook_that_changes_what_it_sees_changes_nothing_in_the_model():
    def spoil(path: str, output: Any, *args: Any, **kwargs: Any) -> None:
        for array in [output] if path == "embed" else [output["sum"], *args, *kwargs["again"]]:
            array *= 0

    model = InPlace()
    with observe(model, "*", spoil):
        assert model(mx.array(0)).tolist() == [4400.0, 4800.0]


def test_what_a_patch_returns_is_not_changed_by_the_model():
    model, vector = InPlace(), mx.array([0.0, 1.0])
    with patch(model, "embed", lambda path, output: vector):
        first, second = model(mx.array(0)), model(mx.array(1))
    assert first.tolist() == second.tolist() == [4000.0, 4400.0]
    assert vector.tolist() == [0.0, 1.0]


@each_use
def test_a_copy_of_the_model_has_no_hooks(model, use):
    with use(model, "**", strict=False):
        copied = copy.deepcopy(model)

    assert {type(module) for module in copied.modules()} == {
        type(module) for module in model.modules()
    }


# After the block


def test_a_hooked_layer_that_is_kept_is_silent_after_the_block(model):
    seen: list[str] = []
    with (
        observe(model, "layers[0]", lambda path, *args: seen.append(path)) as calls,
        capture(model, "layers[1]") as outputs,
        patch(model, "layers[2]", lambda path, output: 0 * output),
    ):
        kept = list(model.layers)
        model(IDS)
    x = mx.ones((1, 4))
    for hooked, layer in zip(kept, model.layers):
        assert mx.array_equal(hooked(x), layer(x))

    assert (seen, calls, len(outputs["layers.1"])) == (["layers.0"], {"layers.0": 1}, 1)


def test_nothing_is_held_after_the_block(model):
    class Hook:
        def __call__(self, path: str, output: Any, *args: Any, **kwargs: Any) -> Any:
            self.last = output
            return output

    class Big:
        """An output that can be watched."""

    class Layer(nn.Module):
        def __call__(self) -> Big:
            return Big()

    other = nn.Sequential(Layer())
    for use in (observe, patch):
        hook = Hook()
        with use(other, "layers.0", hook) as calls:
            kept = other.layers[0]
            kept()
        watched = [weakref.ref(hook), weakref.ref(hook.last)]
        del hook
        gc.collect()
        assert [ref() for ref in watched] == [None, None]
        assert calls in ({"layers.0": 1}, None)


def test_the_layers_are_not_held_by_a_block_that_has_ended(model):
    other: Any = nn.Sequential(nn.Linear(2, 2))
    layer = weakref.ref(other.layers[0])
    with observe(other, "layers.0", nothing, strict=False) as calls:
        pass
    other.layers[0] = nn.ReLU()
    gc.collect()

    assert layer() is None
    assert calls == {"layers.0": 0}
