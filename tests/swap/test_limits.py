"""Cycles, equal paths, and models too deep for MLX are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from models import Holder, Model, SelfAttention, around, build, fresh
from oracle import Snapshot
from refusals import refuses

from mlx_modswap import (
    NoMatchError,
    SelectionError,
    Wrapper,
    partial_modules,
    replace_layers,
    select,
    swapped,
)

# ---------------------------------------------------------------- equal paths


SAME_PATH: list[tuple[dict[Any, Any], str]] = [
    ({"keyed": {0: nn.ReLU(), "0": nn.ReLU()}, "other": nn.ReLU()}, "keyed.0"),
    ({"keyed": {"a.b": nn.Tanh(), "a": {"b": nn.Tanh()}}, "other": nn.ReLU()}, "keyed.a.b"),
    ({"a.b": {"c.d": nn.Tanh()}, "a.b.c.d": nn.Tanh(), "other": nn.ReLU()}, "a.b.c.d"),
]


@pytest.mark.parametrize(("entries", "path"), SAME_PATH)
def test_two_places_that_print_the_same_path(entries, path):
    model = nn.Module()
    dict.update(model, entries)
    message = (
        f"2 places have the path '{path}', as the keys 0 and '0' of one dict do; "
        "rename one of the keys"
    )
    assert refuses(model, path, fresh) == message
    with pytest.raises(SelectionError) as error:
        partial_modules(model, {path: nn.Tanh()})
    assert str(error.value) == message
    assert list(replace_layers(model, "other", fresh)) == ["other"]


# ---------------------------------------------------------------- cycles


def with_cycle() -> Any:
    model: Any = Model()
    model.layers[1].self_attn.back = model.layers
    return model


def test_a_model_with_a_cycle():
    message = "the model contains a cycle: 'layers.1.self_attn.back' is 'layers' again"
    for call in (select, lambda model, pattern: replace_layers(model, pattern, fresh)):
        with pytest.raises(SelectionError) as error:
            call(with_cycle(), "**")
        assert str(error.value) == message
    model = build(top=build(mlp=nn.ReLU()))
    model.top.back = model
    with pytest.raises(SelectionError) as error:
        select(model, "**")
    assert str(error.value) == "the model contains a cycle: 'top.back' is the model itself again"


def test_a_narrow_pattern_does_not_come_to_a_cycle():
    assert list(select(with_cycle(), "layers.0.mlp")) == ["layers.0.mlp"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layers.9",
            "'layers.9' matches nothing: 'layers' is a list of 3; 'layers[-1]' matches 1",
        ),
        (
            "layers.0.mpl",
            "'layers.0.mpl' matches nothing: 'layers.0' holds 'self_attn', 'norm', 'mlp', "
            "'acts.0'; 'layers.0.mlp' matches 1",
        ),
        (
            "zzz",
            "'zzz' matches nothing: the model holds 'embed', 'layers[0:3]' (3 Block), "
            "'heads.{b,a,10}' (3 Linear)",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_beside_a_cycle(pattern, message):
    with pytest.raises(NoMatchError) as error:
        select(with_cycle(), pattern)
    assert str(error.value) == message


def test_the_model_in_a_tuple_of_its_layer_is_not_a_cycle():
    model = build(attn=SelfAttention())
    model.attn.owner = (model,)
    with pytest.raises(NoMatchError) as error:
        select(model, "v_prjo")
    assert str(error.value) == (
        "'v_prjo' matches nothing: the model holds 'attn'; '**.v_proj' matches 1"
    )


def two_places() -> Any:
    return build(a=build(x=nn.ReLU()), b=build(x=nn.ReLU()))


def each_other(model: Any) -> Any:
    one, two = Holder(), Holder()
    one.other, two.other = two, one
    return lambda path, module: one if path == "a" else two


# A model, a pattern, the factory for the model, and where the cycle is.
CYCLES: list[tuple[Any, str, Callable[[Any], Any], str]] = [
    (
        two_places(),
        "a",
        lambda model: lambda path, layer: Holder(model),
        "'a.inner' is the model itself again",
    ),
    (
        two_places(),
        "a",
        lambda model: lambda path, layer: nn.Sequential(layer, model),
        "'a.layers.1' is the model itself again",
    ),
    (
        two_places(),
        "a",
        lambda model: lambda path, layer: nn.Sequential(model, nn.Sequential(layer)),
        "'a.layers.0' is the model itself again",
    ),
    (
        two_places(),
        "a.x",
        lambda model: lambda path, layer: Holder([model.a]),
        "'a.x.inner.0' is 'a' again",
    ),
    (two_places(), "*", each_other, "'a.other.other' is 'a' again"),
    (
        two_places(),
        "*.x",
        lambda model: lambda path, layer: model.b if path == "a.x" else model.a,
        "'a.x.x' is 'a' again",
    ),
    (
        Wrapper(build(x=nn.ReLU())),
        "x",
        lambda model: lambda path, layer: Holder(model.__wrapped__),
        "'x.inner' is the model itself again",
    ),
    (
        build(b=Wrapper(build(x=nn.ReLU()))),
        "b.x",
        lambda model: lambda path, layer: Holder(model.b.__wrapped__),
        "'b.x.inner' is 'b' again",
    ),
]


@pytest.mark.parametrize(("model", "pattern", "factory", "message"), CYCLES)
def test_a_new_module_that_would_close_a_cycle(model, pattern, factory, message):
    assert refuses(model, pattern, factory(model)) == f"the model contains a cycle: {message}"


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_cycle_inside_a_new_module(length):
    new, ring = Holder(), [Holder() for _ in range(length)]
    new.inner = ring[0]
    for one, next_one in zip(ring, ring[1:] + ring[:1]):
        one.inner = next_one
    assert refuses(build(a=nn.ReLU()), "a", lambda path, module: new) == (
        f"the model contains a cycle: 'a.inner{'.inner' * length}' is 'a.inner' again"
    )


def test_a_module_around_the_old_one_is_not_a_cycle():
    assert len(replace_layers(Model(), "layers.*", around)) == 3


# ---------------------------------------------------------------- depth and number of paths


def test_the_number_of_paths_is_limited(monkeypatch):
    shared = Holder()
    model = build(first=shared, last=shared)  # three paths, with that of the model itself
    monkeypatch.setattr("mlx_modswap._model.sharing._MOST_PATHS", 2)
    assert refuses(model, "*", fresh) == (
        "more than 2 paths lead through this model: shared modules hold other shared modules, "
        "at many levels"
    )
    monkeypatch.setattr("mlx_modswap._model.sharing._MOST_PATHS", 3)
    assert list(replace_layers(model, "*", fresh)) == ["first", "last"]


def test_a_place_too_deep_for_update_modules():
    model = deep = build(first=nn.ReLU())
    for _ in range(2000):
        deep.down = build()
        deep = deep.down
    deep.act = nn.ReLU()
    path = "down." * 2000 + "act"
    assert list(select(model, "**.act")) == [path]
    before = Snapshot(model)
    with pytest.raises(SelectionError) as caught:
        replace_layers(model, ["first", "**.act"], fresh)
    assert str(caught.value) == (
        "a place that is 2001 levels deep cannot be changed: MLX's update_modules goes down "
        "by recursion, which Python limits (sys.setrecursionlimit); nothing was changed"
    )
    assert before.differences() == []
    assert list(replace_layers(model, "first", fresh)) == ["first"]


def test_little_of_the_stack_left():
    model = deep = build(first=nn.ReLU())
    for _ in range(200):
        deep.down = build()
        deep.act = nn.ReLU()
        deep = deep.down

    def swap_below(frames: int) -> None:
        if frames:
            swap_below(frames - 1)
        else:
            replace_layers(model, "**.act", lambda path, module: nn.Tanh())

    before = Snapshot(model)
    for frames in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit(), 10):
        with pytest.raises((SelectionError, RecursionError)):
            swap_below(frames)
        assert before.differences() == []
    swap_below(0)
    assert len(select(model, "**.act", where=nn.Tanh)) == 200


def test_a_deep_place_does_not_hinder_others():
    model = deep = build(first=nn.ReLU())
    for _ in range(2000):
        deep.down = [build()]
        deep = deep.down[0]
    with swapped(model, "first", around):
        assert type(model.first) is Holder
    assert type(model.first) is nn.ReLU
