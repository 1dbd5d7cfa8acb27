"""What observe sees, and what a function of the user is told that fails."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from running import IDS, Model, nothing

from mlx_modswap import (
    observe,
    patch,
)

# What observe sees


def test_a_hook_gets_the_path_the_output_and_the_arguments_of_the_call(model):
    seen: list[Any] = []
    x, mask, cache = mx.ones((1, 1, 4)), object(), object()
    with observe(model, "layers[1].attn", lambda *args, **kwargs: seen.append((args, kwargs))):
        y = model.layers[1].attn(x, mask, cache=cache)

    (((path, output, *args), kwargs),) = seen
    assert path == "layers.1.attn"
    assert mx.array_equal(output, y)
    assert mx.array_equal(args[0], x)
    assert args[1] is mask
    assert list(kwargs) == ["cache"]
    assert kwargs["cache"] is cache


def test_what_a_hook_returns_is_ignored(model):
    expected = model(IDS)
    with observe(model, "**.attn", lambda path, output, *args, **kwargs: 0 * output):
        assert mx.array_equal(model(IDS), expected)


def test_arguments_may_be_named_like_those_of_a_hook():
    class Odd(nn.Module):
        def __call__(self, path: str, output: int) -> str:
            return path * output

    seen: list[Any] = []

    def hook(path: str, output: str, /, *args: Any, **kwargs: Any) -> None:
        seen.append((path, output, args, kwargs))

    model = nn.Sequential(Odd())
    with observe(model, "layers.0", hook):
        model.layers[0](path="a", output=3)

    assert seen == [("layers.0", "aaa", (), {"path": "a", "output": 3})]


def test_calls_are_counted_while_the_block_runs_for_every_selected_place(model):
    with observe(model, "**", nothing, where=nn.Linear) as calls:
        assert set(calls.values()) == {0}
        model(IDS)
        assert calls["layers.0.attn.q_proj"] == 1
        model(IDS)

    blocks = ["layers.0", "layers.1", "layers.2"]
    assert calls == {
        **{f"{block}.{path}": 2 for block in blocks for path in ("attn.q_proj", "mlp.layers.0")},
        **{f"{block}.attn.v_proj": 0 for block in blocks},
        "unused": 0,
    }


def test_layers_inside_others_are_seen_first(model):
    seen: list[str] = []
    with observe(model, "layers[0].**", lambda path, *args, **kwargs: seen.append(path)):
        model(IDS)

    assert seen == [
        "layers.0.attn.q_proj",
        "layers.0.attn",
        "layers.0.mlp.layers.0",
        "layers.0.mlp.layers.1",
        "layers.0.mlp",
    ]


def test_a_tied_layer_is_seen_once_a_call_by_its_first_path(model):
    seen: list[str] = []
    with observe(model, ["head", "embed"], lambda path, *args: seen.append(path)) as calls:
        model.embed(IDS)
        model.head(IDS)

    assert seen == ["embed", "embed"]
    assert calls == {"embed": 2, "head": 2}


def test_running_sums_are_those_of_all_inputs(model):
    sums: dict[str, Any] = {}
    inputs: dict[str, list[mx.array]] = {}

    def add(path: str, output: mx.array, x: mx.array) -> None:
        sums[path] = sums.get(path, 0) + x.reshape(-1, 4).T @ x.reshape(-1, 4)

    def keep(path: str, output: mx.array, x: mx.array) -> None:
        inputs.setdefault(path, []).append(x.reshape(-1, 4))

    linears = ["layers.*.attn.q_proj", "layers.*.mlp.layers.0"]
    with observe(model, linears, add), observe(model, linears, keep):
        for step in range(3):
            model(IDS + step)

    assert sums.keys() == inputs.keys()
    for path, total in sums.items():
        assert len(inputs[path]) == 3
        x = mx.concatenate(inputs[path])
        assert mx.allclose(total, x.T @ x, atol=1e-4)


def test_a_hook_sees_the_arrays_of_a_gradient_and_changes_none():
    model = Model()

    def loss(model: Model) -> mx.array:
        return nn.losses.cross_entropy(model(IDS), IDS).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    with observe(model, "**", nothing, where=nn.Linear) as calls:
        value_inside, gradients_inside = nn.value_and_grad(model, loss)(model)

    assert mx.array_equal(value, value_inside)
    assert mx.array_equal(gradients["embed"]["weight"], gradients_inside["embed"]["weight"])
    assert calls["layers.0.attn.q_proj"] == 1


def test_a_function_that_is_compiled_inside_the_block_calls_a_hook_once(model):
    expected = model(IDS)
    mx.eval(expected)
    with observe(model, "layers.*", nothing) as calls:
        compiled = mx.compile(lambda ids: model(ids))
        for _ in range(3):
            assert mx.allclose(compiled(IDS), expected, atol=1e-5)

    assert set(calls.values()) == {1}


# What goes wrong in a function of the user


def test_an_error_of_a_hook_goes_through_the_model_with_the_path(model):
    with (
        pytest.raises(ZeroDivisionError) as caught,
        observe(model, "**", lambda path, *args, **kwargs: 1 / (path != "layers.1.attn")),
    ):
        model(IDS)

    assert caught.value.__notes__ == ["while observing 'layers.1.attn'"]


def test_an_error_of_a_change_goes_through_the_model_with_the_path(model):
    def change(path: str, output: mx.array) -> mx.array:
        if path == "layers.1.attn":
            raise ZeroDivisionError
        return output

    with pytest.raises(ZeroDivisionError) as caught, patch(model, "**", change):
        model(IDS)

    assert caught.value.__notes__ == ["while patching 'layers.1.attn'"]


def of_one(output: mx.array) -> mx.array:
    return output


def of_a_module(layer: Any, output: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return layer.weight @ output


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (of_one, "of_one() takes 1 positional argument but"),
        (lambda output: output, "<lambda>() takes 1 positional argument but"),
        (of_a_module, "'str' object has no attribute 'weight'"),
    ],
    ids=["a function", "a lambda", "a function that wants the layer"],
)
def test_a_function_that_wants_another_call_is_told_how_it_is_called(model, function, said):
    for use, call, doing in (
        (observe, "hook(path, output, *args, **kwargs)", "observing"),
        (patch, "change(path, output)", "patching"),
    ):
        with pytest.raises((TypeError, AttributeError)) as caught, use(model, "unused", function):
            model.unused(mx.ones((1, 4)))

        assert said in str(caught.value)
        assert caught.value.__notes__ == [f"while {doing} 'unused'", f"it was called as {call}"]


@pytest.mark.parametrize(
    ("hook", "what"),
    [(None, "None"), (0, "an int"), (nn.ReLU(), "a module (ReLU)"), ("x", "a str")],
    ids=str,
)
def test_a_hook_that_is_not_a_function_is_refused(model, hook, what):
    with pytest.raises(TypeError) as error, observe(model, "layers.*", hook):
        pass

    assert str(error.value) == (
        f"hook must be a function of path, output and the arguments of the call, not {what}"
    )
