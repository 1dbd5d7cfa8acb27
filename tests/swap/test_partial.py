"""`partial_modules`: the nested dict that `update_modules` takes."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from models import Model, build, fresh
from oracle import Snapshot

from mlx_modswap import NoMatchError, SelectionError, partial_modules, replace_layers, select


def test_a_swap_by_hand_is_undone_by_hand():
    model = Model()
    originals = select(model, "layers.*.mlp")
    before = Snapshot(model)
    replace_layers(model, "layers.*.mlp", fresh)
    model.update_modules(partial_modules(model, originals))
    assert before.differences() == []


def test_only_the_places_are_named():
    tanh = nn.Tanh()
    assert repr(partial_modules(Model(), {"layers.1.acts.0": tanh, "heads.10": tanh})) == (
        "{'layers': [{}, {'acts': [Tanh()]}], 'heads': {'10': Tanh()}}"
    )


def test_paths_with_dotted_and_empty_keys():
    inside = build(a=nn.ReLU(), d={"": build(a=nn.ReLU())})
    model = build(d={"": inside, "x.y": nn.ReLU()})
    tanh = nn.Tanh()
    assert repr(partial_modules(model, {"d..a": tanh, "d.x.y": tanh})) == (
        "{'d': {'': {'a': Tanh()}, 'x.y': Tanh()}}"
    )


def test_paths_of_one_place_get_one_module():
    block = build(act=nn.ReLU())
    model, tanh = build(a=block, b=block), nn.Tanh()
    assert repr(partial_modules(model, {"a.act": tanh, "b.act": tanh})) == (
        "{'a': {'act': Tanh()}, 'b': {'act': Tanh()}}"
    )
    with pytest.raises(SelectionError) as error:
        partial_modules(model, {"b.act": tanh, "a.act": nn.Tanh()})
    assert str(error.value) == (
        "'a.act' and 'b.act' are the same place, because a module or list that contains it is "
        "shared; give both paths the same module"
    )


@pytest.mark.parametrize(("outer", "inner"), [("a.x", "b.x.q"), ("b.x", "a.x.q")])
def test_nested_paths_through_an_alias(outer, inner):
    shared = build(x=build(q=nn.ReLU()))
    model = build(a=shared, b=shared)
    with pytest.raises(SelectionError, match=f"'{inner}' lies inside '{outer}'"):
        partial_modules(model, {outer: nn.Tanh(), inner: nn.Tanh()})


PARTIALS = [
    ({"zzz": nn.ReLU()}, NoMatchError, "there is no module at 'zzz': the model holds 'embed', "
     "'layers[0:3]' (3 Block), 'heads.{b,a,10}' (3 Linear)"),
    ({"layers.9": nn.ReLU()}, NoMatchError,
     "there is no module at 'layers.9': 'layers' is a list of 3"),
    ({"heads.a.weight": nn.ReLU()}, NoMatchError,
     "there is no module at 'heads.a.weight': it is an array, not a module"),
    ({"layers.*": nn.ReLU()}, NoMatchError, "there is no module at 'layers.*'"),
    ({"layers[0]": nn.ReLU()}, NoMatchError, "there is no module at 'layers[0]'"),
    ({"": nn.ReLU()}, NoMatchError, "there is no module at ''"),
    ({".embed": nn.ReLU()}, NoMatchError, "there is no module at '.embed'"),
    ({"embed.": nn.ReLU()}, NoMatchError, "there is no module at 'embed.'"),
    ({"layers..0": nn.ReLU()}, NoMatchError, "there is no module at 'layers..0'"),
    ({"{embed}": nn.ReLU()}, NoMatchError, "there is no module at '{embed}'"),
    ({"embe?": nn.ReLU()}, NoMatchError, "there is no module at 'embe?'"),
    ({39 * "a." + "a": nn.ReLU()}, NoMatchError,
     "there is no module at '" + 38 * "a." + "...: the model holds 'embed', "
     "'layers[0:3]' (3 Block), 'heads.{b,a,10}' (3 Linear)"),
    ({40 * "a." + "a": nn.ReLU()}, NoMatchError, "there is no module at '" + 38 * "a." + "..."),
    ({"layers.0.mlp": nn.ReLU(), "layers.0": nn.ReLU()}, SelectionError,
     "'layers.0.mlp' lies inside 'layers.0', and both are given; leave one of them out"),
    ({"embed": nn.ReLU}, TypeError, "'embed' needs an mlx.nn.Module, not the class ReLU"),
    ({3: nn.ReLU()}, TypeError, "a path is a str, not an int"),
    (["embed"], TypeError, "modules must map paths to modules, not a list of 1"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "error_class", "message"), PARTIALS)
def test_what_cannot_be_built_is_refused(modules, error_class, message):
    with pytest.raises(error_class) as error:
        partial_modules(Model(), modules)
    assert str(error.value) == message
