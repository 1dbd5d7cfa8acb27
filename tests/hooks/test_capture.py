"""What capture records and patch changes, and that the model is the same one afterwards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import zoo
from oracle import Snapshot
from running import IDS, Block, Model

from mlx_modswap import NoMatchError, SelectionError, capture, patch, select, swapped

BLOCKS = ["layers.0", "layers.1", "layers.2"]


def are_called_once(outputs: Mapping[str, list[Any]]) -> bool:
    """Whether each layer was, but those that the model never calls."""
    never = {*(f"{block}.attn.v_proj" for block in BLOCKS), "unused"}
    return all(len(of_one) == (path not in never) for path, of_one in outputs.items())


def double(path: str, output: mx.array) -> mx.array:
    return 2 * output


def same(a: mx.array, b: mx.array) -> bool:
    return mx.array_equal(a, b).item() is True


# What capture records


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("layers.*", BLOCKS),
        ("layers[-1]", ["layers.2"]),
        ("layers[0].{mlp,attn}", ["layers.0.attn", "layers.0.mlp"]),
        (["layers[0]", "embed", "head"], ["embed", "layers.0", "head"]),
    ],
)
def test_the_outputs_are_under_their_paths_in_the_order_of_the_model(model, pattern, paths):
    with capture(model, pattern) as outputs:
        assert outputs == {path: [] for path in paths}
        model(IDS)

    assert list(outputs) == paths
    assert all(len(of_one) == 1 for of_one in outputs.values())


def test_the_outputs_are_those_of_the_layers(model):
    with capture(model, ["layers.*", "layers[0].mlp.layers.*"]) as outputs:
        logits = model(IDS)
        x = model.embed(IDS)
        for path in BLOCKS:
            x = model.layers[int(path[-1])](x)
            first, second = outputs[path]
            assert same(first, second)
            assert same(second, x)

    assert same(logits, model(IDS))
    before, after = (outputs[f"layers.0.mlp.layers.{n}"][0] for n in (0, 1))
    assert same(nn.relu(before), after)


def test_each_call_is_recorded(model):
    with capture(model, "layers[1].mlp") as outputs:
        for length in (1, 2, 3):
            model(IDS[:, :length])

    assert [output.shape for output in outputs["layers.1.mlp"]] == [(1, 1, 4), (1, 2, 4), (1, 3, 4)]


def test_keyword_arguments_reach_a_recorded_layer(model):
    x = mx.ones((1, 1, 4))
    with capture(model, "layers[1].attn") as outputs:
        y = model.layers[1].attn(x, mask=None, cache=[x])

    (recorded,) = outputs["layers.1.attn"]
    assert same(recorded, y)


def test_where_and_exclude_choose_as_in_select(model):
    with capture(model, "**", where=nn.Linear, exclude="layers[0].**") as outputs:
        model(IDS)

    inside = ("attn.q_proj", "attn.v_proj", "mlp.layers.0")
    assert list(outputs) == [*(f"layers.{n}.{path}" for n in (1, 2) for path in inside), "unused"]


def test_every_layer_of_a_model_can_be_recorded_at_once(model):
    logits, paths = model(IDS), list(select(model, "**"))
    with capture(model, "**") as outputs:
        assert same(model(IDS), logits)

    assert list(outputs) == paths
    assert are_called_once(outputs)


def test_the_paths_of_a_layer_in_several_places_have_one_list(model):
    with capture(model, ["embed", "head"]) as outputs:
        model(IDS)
        model.head(IDS)

    assert outputs["embed"] is outputs["head"]
    assert len(outputs["embed"]) == 2


def test_a_layer_without_parameters_in_several_places_has_a_list_for_each():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Identity(), relu)
    with capture(model, "layers[::2]") as outputs:
        model.layers[0](mx.zeros(1))

    assert {path: len(of_one) for path, of_one in outputs.items()} == {"layers.0": 1, "layers.2": 0}


@pytest.mark.parametrize("pattern", ["**", ["**", "layers.*"]], ids=str)
@pytest.mark.parametrize("outside", [0, -1], ids=["before", "after"])
def test_a_tied_layer_inside_and_outside_of_a_recorded_one(outside, pattern):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    model.layers[outside] = model.layers[1].layers[0]
    before, x = Snapshot(model), mx.ones((1, 2))
    expected = model(x)
    with capture(model, pattern) as outputs:
        assert same(model(x), expected)

    assert before.differences() == []
    assert list(outputs) == ["layers.0", "layers.1", "layers.1.layers.0", "layers.2"]
    tied = outputs["layers.1.layers.0"]
    assert tied is outputs[["layers.0", "layers.2"][outside]]
    assert len(tied) == 2


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("layers.*", "layers.*.mlp"),
        ("layers.*.mlp", "layers.*"),
        ("layers.*", "layers.*"),
        ("**", "**"),
    ],
)
def test_blocks_can_be_nested_in_any_order(model, outer, inner):
    logits = model(IDS)
    with capture(model, outer) as outside, capture(model, inner) as inside:
        assert list(inside) == list(select(model, inner))
        assert same(model(IDS), logits)

    assert are_called_once(outside)
    assert are_called_once(inside)


def test_nothing_is_recorded_after_the_block(model):
    with capture(model, "layers.*", strict=False) as outputs:
        pass
    model(IDS)

    assert outputs == {path: [] for path in BLOCKS}


def test_the_model_has_its_own_layers_back_after_an_error(model):
    with pytest.raises(ValueError, match="addmm"), capture(model, "**") as outputs:
        model.layers[0](mx.ones((1, 1, 5)))

    assert outputs["layers.0"] == []


# With what else MLX does


def test_a_compiled_function_computes_the_same(model):
    logits = model(IDS)
    mx.eval(logits)
    with capture(model, "layers.*"):
        compiled = mx.compile(lambda ids: model(ids))
        assert mx.allclose(compiled(IDS), logits, atol=1e-5)
        assert mx.allclose(compiled(IDS), logits, atol=1e-5)


def test_a_compiled_function_with_the_lists_as_outputs_records_its_last_call(model):
    with capture(model, ["embed", "head", "layers.*.mlp"]) as outputs:
        compiled = mx.compile(lambda ids: model(ids), outputs=outputs)
        for ids in (IDS, IDS + 1, IDS + 2):
            compiled(ids)
            recorded = dict(outputs)
            assert [len(of_one) for of_one in recorded.values()] == [1, 1, 1, 1, 1]
            assert mx.allclose(outputs["embed"][0], model.embed.weight[ids])


def test_gradients_are_those_of_the_model():
    model = Model()

    def loss(model: Model) -> mx.array:
        return nn.losses.cross_entropy(model(IDS), IDS).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    with capture(model, "**") as outputs:
        value_inside, gradients_inside = nn.value_and_grad(model, loss)(model)
        assert mx.array_equal(value, value_inside)
        assert mx.array_equal(gradients["embed"]["weight"], gradients_inside["embed"]["weight"])
        assert outputs["layers.2"][0].shape == (1, 3, 4)


def test_what_is_trained_inside_the_block_stays():
    model = Model()
    optimizer = optim.SGD(0.1)
    before = model.layers[0].mlp.layers[0].weight
    with capture(model, "**"):
        gradients = nn.value_and_grad(model, lambda ids: model(ids).sum())(IDS)[1]
        optimizer.update(model, gradients)
        inside = model.layers[0].mlp.layers[0].weight

    assert model.layers[0].mlp.layers[0].weight is inside
    assert not same(inside, before)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mamba2", "qwen3_moe"])
def test_generation_with_a_cache_is_recorded_token_by_token(name, needs):
    needs("mlx_lm")
    from mlx_lm.generate import generate_step

    model, prompt = zoo.build(name), mx.arange(1, 6)
    blocks = set(map(id, model.layers))
    paths = [path for path, module in select(model, "**").items() if id(module) in blocks]
    expected = [token for token, _ in generate_step(prompt, model, max_tokens=4)]
    with capture(model, paths) as outputs:
        tokens = [token for token, _ in generate_step(prompt, model, max_tokens=4)]

    assert tokens == expected
    assert {len(of_one) for of_one in outputs.values()} == {6}
    lengths = [output.shape[1] for output in outputs[paths[0]]]
    assert lengths == [4, 1, 1, 1, 1, 1]


# What patch changes


def test_change_gets_path_and_output_and_its_result_goes_on(model):
    seen = []

    def change(path: str, output: mx.array) -> mx.array:
        seen.append(path)
        return output * 0

    with patch(model, "layers.*", change), capture(model, "layers[2]") as outputs:
        logits = model(IDS)

    assert seen == BLOCKS
    assert same(logits, mx.zeros((1, 3, 8)))
    assert same(outputs["layers.2"][0], mx.zeros((1, 3, 4)))


def test_an_output_put_in_place_of_another_carries_over_what_follows(model):
    other = mx.array([[4, 5, 6]])
    with capture(model, "layers[1]") as outputs:
        expected = model(other)
    (output,) = outputs["layers.1"]
    with patch(model, "layers[1]", lambda path, old: output):
        assert same(model(IDS), expected)
    assert not same(model(IDS), expected)


def test_changes_of_layers_inside_of_others_add_up(model):
    x = mx.ones((1, 1, 4))
    attended = model.layers[0].mlp(x)
    pattern = ["layers[0].mlp", "layers[0].mlp.layers[1]"]
    with patch(model, pattern, double):
        assert same(model.layers[0].mlp(x), 4 * attended)
    with patch(model, pattern[0], double), patch(model, pattern[1], double):
        assert same(model.layers[0].mlp(x), 4 * attended)


def test_a_tied_layer_is_changed_by_its_first_path(model):
    seen = []
    with patch(model, ["embed", "head"], lambda path, output: seen.append(path) or output):
        model.head(IDS)

    assert seen == ["embed"]


def test_the_model_is_the_same_again_after_an_error_in_change(model):
    with pytest.raises(ZeroDivisionError), patch(model, "layers.*", lambda path, output: 1 / 0):
        model(IDS)


# What is refused


@pytest.mark.parametrize(
    ("change", "what"),
    [(None, "None"), (0, "an int"), (nn.ReLU(), "a module (ReLU)"), ("x", "a str")],
    ids=str,
)
def test_a_change_that_is_no_function_is_refused(model, change, what):
    with pytest.raises(TypeError) as error, patch(model, "layers.*", change):
        pass

    assert str(error.value) == f"change must be a function of path and output, not {what}"


def test_patch_reports_a_change_that_returns_none(model):
    with (
        pytest.raises(TypeError) as error,
        patch(model, "layers[0].mlp", lambda path, output: None),
    ):
        model(IDS)

    assert str(error.value) == (
        "change returned None for 'layers.0.mlp'; it must return an output; return the output it "
        "was given to leave it unchanged"
    )


def test_a_layer_that_returns_none_may_go_on_to(model):
    class Silent(nn.Module):
        def __call__(self) -> None:
            pass

    silent = nn.Sequential(Silent())
    with patch(silent, "layers.0", lambda path, output: output), capture(silent, "*.0") as outputs:
        silent.layers[0]()

    assert outputs == {"layers.0": [None]}


@pytest.mark.parametrize("use", [capture, functools.partial(patch, change=double)])
@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("layer.*", NoMatchError, "'layer.*' matches nothing"),
        (
            "embed",
            SelectionError,
            "'embed' is tied to 'head' (the same Embedding), which is not selected; select "
            "both, or neither (exclude='embed')",
        ),
        (["layers.*", "layers.*.mlp", "head"], SelectionError, "'head' is tied to"),
    ],
    ids=str,
)
def test_what_cannot_be_swapped_cannot_be_recorded(model, use, pattern, error, message):
    with pytest.raises(error) as raised, use(model, pattern):
        pass

    assert str(raised.value).startswith(message)


def test_a_recorded_layer_that_was_replaced_inside_the_block_is_an_error():
    model = Model()
    new = Block()
    with (
        pytest.raises(SelectionError, match=r"'layers\.0' was modified inside the block"),
        capture(model, "layers.*"),
    ):
        model.layers[0] = new

    assert model.layers[0] is new


def test_a_swap_inside_the_block_that_is_undone_is_fine(model):
    with (
        capture(model, "layers.*") as outputs,
        swapped(model, "layers.*.mlp", lambda path, layer: nn.Identity()),
    ):
        model(IDS)

    assert [len(of_one) for of_one in outputs.values()] == [1, 1, 1]
