"""No place that changes lies inside another one, and what was left alone stays in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from models import Block, Model, SelfAttention, around, build, fresh
from refusals import refuses

from mlx_modswap import SelectionError, Wrapper, replace_layers, select


def test_an_inner_and_an_outer_place_are_both_named():
    assert refuses(Model(), ["layers.1", "layers.1.mlp"], fresh) == (
        "'layers.1.mlp' lies inside 'layers.1', and both would change; exclude the inner one "
        "(exclude='layers.1.mlp'), or select only 'layers.1'"
    )


def test_nesting_many_levels_down():
    model = build(a=build(b=[{"c": build(d=[nn.ReLU()])}]))
    message = refuses(model, ["a", "a.b.0.c.d.0"], fresh)
    assert message.startswith("'a.b.0.c.d.0' lies inside 'a', and both would change")


def test_nesting_through_an_alias():
    inner = build(x=nn.ReLU())
    model = build(a=build(inner=inner), b=inner)
    assert "lies inside" in refuses(model, ["a", "**.x"], fresh)


def test_nesting_under_an_empty_name():
    model = build()
    dict.__setitem__(model, "", build(x=nn.ReLU()))
    message = refuses(model, ["**"], fresh)
    assert message.startswith("'.x' lies inside '', and both would change")


def test_a_name_with_the_same_start_is_not_inside():
    model = build(a=build(x=nn.ReLU()), a2=build(x=nn.ReLU()))
    assert list(replace_layers(model, ["a", "a2.x"], fresh)) == ["a", "a2.x"]


# ---------------------------------------------------------------- what was to be left alone


def lost(path: str, place: str) -> str:
    return (
        f"'{path}' was to be left alone, but the new module for '{place}' does not hold it; "
        f"keep it in the new module, or leave '{place}' alone too"
    )


def keep_norm(path: str, block: Any) -> nn.Module:
    return build(norm=block.norm)


LOST: list[tuple[tuple[Any, ...], dict[str, Any], str, str]] = [
    (({"layers.0.self_attn": None, "layers.*": fresh},), {}, "layers.0.self_attn", "layers.0"),
    (
        ({"layers.0.self_attn.q_proj": None, "layers.*": fresh},),
        {},
        "layers.0.self_attn.q_proj",
        "layers.0",
    ),
    (({"layers.0.acts": None, "layers.*": fresh},), {}, "layers.0.acts.0", "layers.0"),
    (
        ({re.compile(r".*\.(mlp|norm)"): None, "layers.*": keep_norm},),
        {},
        "layers.0.mlp",
        "layers.0",
    ),
    (({("layers.1.norm", "embed"): None, "layers[1:]": fresh},), {}, "layers.1.norm", "layers.1"),
    ((["layers[:2]", "**.norm"], fresh), {"exclude": "layers.*.norm"}, "layers.0.norm", "layers.0"),
    # What no rule and no `where` would have changed is left alone, too.
    (("layers.*", fresh), {"exclude": "layers.2.mlp", "strict": False}, "layers.2.mlp", "layers.2"),
    (
        ({"layers.*.mlp": None, "layers.*": fresh},),
        {"where": Block, "strict": False},
        "layers.0.mlp",
        "layers.0",
    ),
    # A copy is another module.
    (
        ({"layers.0.mlp": None, "layers[0]": lambda path, block: Block()},),
        {},
        "layers.0.mlp",
        "layers.0",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "path", "place"), LOST)
def test_what_was_left_alone_must_stay(arguments, options, path, place):
    assert refuses(Model(), *arguments, **options) == lost(path, place)


KEPT: dict[str, Callable[[str, Any], nn.Module]] = {
    "a Wrapper": lambda path, block: Wrapper(block),
    "a module that holds the block": around,
    "in a list": lambda path, block: build(parts=[nn.ReLU(), block]),
    "in a dict": lambda path, block: build(parts={"a": {"b": block}}),
    "in a private attribute": lambda path, block: build(_inner=block),
    "a wrapper of a wrapper": lambda path, block: Wrapper(Wrapper(block)),
    "only the attention": lambda path, block: build(attention=block.self_attn),
    "only what is in the attention": lambda path, block: build(
        attention=block.self_attn, q=block.self_attn.q_proj, v=block.self_attn.v_proj
    ),
    "the attention itself": lambda path, block: block.self_attn,
    "the block itself": lambda path, block: block,
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_new_module_may_hold_it(make):
    calls: list[Any] = [
        (({"layers.0.self_attn": None, "layers[0]": make},), {}),
        ((["layers[0]", "layers.*.self_attn"], make), {"exclude": "layers.*.self_attn"}),
    ]
    for arguments, options in calls:
        model = Model()
        attention = model.layers[0].self_attn
        replace_layers(model, *arguments, **options)
        assert any(module is attention for module in model.modules())


def test_a_cycle_around_it_is_refused():
    def ring(path: str, block: Any) -> nn.Module:
        holder = build(block=block)
        holder.again = holder
        return holder

    assert refuses(Model(), {"layers.0.mlp": None, "layers[0]": ring}) == (
        "the model contains a cycle: 'layers.0.again' is 'layers.0' again"
    )


def test_a_place_beside_it_may_change():
    rules = {"layers[0]": None, "layers[1]": fresh, "layers[2].mlp": fresh}
    assert list(replace_layers(Model(), rules)) == ["layers.1", "layers.2.mlp"]


def test_a_loss_through_another_path():
    block = build(act=nn.ReLU(), norm=nn.LayerNorm(1))
    model = build(a=block, b=block)
    assert refuses(model, {"b.act": None, "*": fresh}) == lost("b.act", "b")


def test_a_key_with_a_dot_is_not_inside():
    model = build(d={"a": build(x=nn.ReLU()), "a.b": build(x=nn.ReLU())})
    kept = model.d["a.b"].x
    assert list(replace_layers(model, {"d.a.b.x": None, "d.a": fresh})) == ["d.a"]
    assert model.d["a.b"].x is kept
    assert refuses(model, {"d.a.b.x": None, "d.a.b": fresh}) == lost("d.a.b.x", "d.a.b")


def test_a_loss_under_an_empty_name():
    model = build(**{"": build(x=nn.ReLU()), "b": build(x=nn.ReLU())})
    nameless = re.compile("")
    assert list(select(model, "**", exclude=nameless)) == ["b", "b.x"]
    assert refuses(model, {re.compile(r"\.x"): None, nameless: fresh}) == lost(".x", "")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a", "exclude='d.a.self_attn'"),
        ("layers[0]", r"exclude=re.compile('d\\.layers\\[0\\]\\.self_attn')"),
    ],
)
def test_the_advice_for_nested_places_works(name, advice):
    def blocks_and_attention(make: Any, **options: Any) -> Any:
        model = build(d={name: Block()})
        return replace_layers(model, "**", make, where=(Block, SelfAttention), **options)

    with pytest.raises(SelectionError) as error:
        blocks_and_attention(around)
    assert str(error.value) == (
        f"'d.{name}.self_attn' lies inside 'd.{name}', and both would change; "
        f"exclude the inner one ({advice}), or select only 'd.{name}'"
    )
    options = eval(f"dict({advice})")
    assert list(blocks_and_attention(around, **options)) == [f"d.{name}"]
    with pytest.raises(SelectionError, match="was to be left alone"):
        blocks_and_attention(fresh, **options)
