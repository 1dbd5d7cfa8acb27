"""What is in several places changes in all of them or in none, and what the errors advise works."""

from __future__ import annotations

import re
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import Block, Holder, Recorder, around, build, fresh, unchanged
from refusals import refuses

from mlx_modswap import Wrapper, partial_modules, replace_layers, select


def shared_in(*names: str) -> Any:
    """A model with one embedding under several names, which may be inside others."""
    embedding, model = nn.Embedding(8, 4), build(other=nn.Linear(1, 1))
    for name in names:
        outer, _, inner = name.rpartition(".")
        setattr(model, outer or inner, build(**{inner: embedding}) if outer else embedding)
    return model


def recurrent() -> Any:
    """Two blocks that alternate."""
    return build(layers=[Block(), Block()] * 4)


def two_names() -> Any:
    layers = [Block(), Block()]
    return build(layers=layers, blocks=layers)


def odd_names() -> Any:
    layer = nn.Linear(2, 2)
    return build(d={"a[0]": layer, "b*": layer})


# ---------------------------------------------------------------- all places


def test_the_factory_runs_once_and_the_tie_stays():
    model = shared_in("shared", "encoder.embed")
    factory = Recorder()
    report = replace_layers(model, "**.{shared,embed}", factory)
    assert factory.paths == ["shared"]
    assert list(report) == ["shared", "encoder.embed"]
    assert report["shared"] is report["encoder.embed"] is model.shared is model.encoder.embed


def test_all_paths_of_a_place_go_together():
    model = recurrent()
    factory = Recorder()
    assert len(replace_layers(model, "layers.*.acts.0", factory)) == 8
    assert factory.paths == ["layers.0.acts.0", "layers.1.acts.0"]
    assert model.layers[0].acts[0] is model.layers[6].acts[0] is not model.layers[1].acts[0]


def test_select_does_not_judge():
    assert list(select(shared_in("a", "b"), "a")) == ["a"]


# ---------------------------------------------------------------- some of the places

TIED = [
    (
        shared_in("embed", "head"),
        "embed",
        "'embed' is tied to 'head' (the same Embedding), which is not selected; select both, or "
        "neither (exclude='embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'embed': new}))",
    ),
    (
        shared_in("embed", "head"),
        "**.head",
        "'head' is tied to 'embed' (the same Embedding), which is not selected; select both, or "
        "neither (exclude='head'); to untie them, use "
        "model.update_modules(partial_modules(model, {'head': new}))",
    ),
    (
        shared_in("shared", "encoder.embed", "decoder.embed"),
        "decoder.*",
        "'decoder.embed' is tied to 'shared', 'encoder.embed' (the same Embedding), which are not "
        "selected; select all of them, or none (exclude='decoder.embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'decoder.embed': new}))",
    ),
    (
        shared_in("shared", "encoder.embed", "decoder.embed"),
        "*.embed",
        "'encoder.embed' is tied to 'shared' (the same Embedding), which is not selected; select "
        "all of them, or none (exclude='{encoder,decoder}.embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'encoder.embed': new}))",
    ),
    (
        shared_in("shared", "encoder.embed", "decoder.embed"),
        ["shared", "encoder.*"],
        "'shared' is tied to 'decoder.embed' (the same Embedding), which is not selected; select "
        "all of them, or none (exclude=['shared', 'encoder.embed']); to untie them, use "
        "model.update_modules(partial_modules(model, {'shared': new}))",
    ),
    (
        recurrent(),
        "layers[-2:]",
        "'layers.6' is tied to 'layers.0', 'layers.2', 'layers.4' (the same Block), which are not "
        "selected; select all of them, or none (exclude='layers.6'); to untie them, use "
        "model.update_modules(partial_modules(model, {'layers.6': new}))",
    ),
    (
        odd_names(),
        re.compile(r"d\.a.*"),
        "'d.a[0]' is tied to 'd.b*' (the same Linear), which is not selected; select both, or "
        r"neither (exclude=re.compile('d\\.a\\[0\\]')); to untie them, use "
        "model.update_modules(partial_modules(model, {'d.a[0]': new}))",
    ),
]


@pytest.mark.parametrize(("model", "pattern", "message"), TIED)
def test_half_of_a_tie_is_refused_and_the_advice_unties_it(model, pattern, message):
    assert refuses(model, pattern, fresh) == message

    then = dict(model.named_modules())
    untied = message.split("'")[1]
    (advice,) = re.findall(r"use (model\.update_modules\(.*\))$", message)
    new = nn.Linear(2, 2)
    eval(advice, {"model": model, "partial_modules": partial_modules, "new": new})
    now = dict(model.named_modules())
    assert [path for path in then if now.get(path) is not then[path] and path in now] == [untied]
    assert now[untied] is new


PLACES = [
    (
        recurrent,
        "layers[-2:].mlp",
        "'layers.0.mlp', 'layers.2.mlp', 'layers.4.mlp', 'layers.6.mlp' are the same place, "
        "because a module or list that contains it is shared; select all of these paths, or none "
        "(exclude='layers.6.mlp')",
    ),
    (
        recurrent,
        "layers[5:].mlp",
        "'layers.1.mlp', 'layers.3.mlp', 'layers.5.mlp', 'layers.7.mlp' are the same place, "
        "because a module or list that contains it is shared; select all of these paths, or none "
        "(exclude='layers.{5,7}.mlp')",
    ),
    (
        two_names,
        "layers[0].mlp",
        "'layers.0.mlp' and 'blocks.0.mlp' are the same place, because a module or list that "
        "contains it is shared; select both paths, or neither (exclude='layers.0.mlp')",
    ),
    # A layer without parameters is not tied, but its place is one place.
    (
        two_names,
        "blocks[1].acts.*",
        "'layers.1.acts.0' and 'blocks.1.acts.0' are the same place, because a module or list "
        "that contains it is shared; select both paths, or neither (exclude='blocks.1.acts.0')",
    ),
]


@pytest.mark.parametrize(("prepare", "pattern", "message"), PLACES)
def test_some_paths_of_a_place_are_refused(prepare, pattern, message):
    assert refuses(prepare(), pattern, fresh) == message


def test_where_cannot_cut_a_tie():
    message = refuses(shared_in("a", "b"), "*", fresh, where=lambda path, module: path == "a")
    assert message.startswith("'a' is tied to 'b' (the same Embedding), which is not selected;")


def test_the_advice_to_exclude_works():
    changed = replace_layers(recurrent(), "layers.*.mlp", fresh, exclude="layers[::2].mlp")
    assert list(changed) == ["layers.1.mlp", "layers.3.mlp", "layers.5.mlp", "layers.7.mlp"]
    model = shared_in("shared", "encoder.embed", "decoder.embed")
    several = ["*.embed", "other"]
    assert list(replace_layers(model, several, fresh, exclude="{encoder,decoder}.embed")) == [
        "other"
    ]


# ---------------------------------------------------------------- rules

RULES = [
    (
        shared_in("embed", "head"),
        {"embed": fresh, "head": around},
        "'embed', 'head' are the same Embedding, but different rules decide about them: 'embed', "
        "'head'; let one rule match all of these paths first",
    ),
    (
        shared_in("embed", "head"),
        {"head": None, "**": fresh},
        "'embed', 'head' are the same Embedding, but different rules decide about them: '**', "
        "'head'; let one rule match all of these paths first",
    ),
    (
        shared_in("embed", "head", "tied"),
        {("embed", "head"): fresh, "tied": around},
        "'embed', 'head', 'tied' are the same Embedding, but different rules decide about them: "
        "('embed', 'head'), 'tied'; let one rule match all of these paths first",
    ),
    (
        recurrent(),
        {"layers[-1]": None, "**.mlp": fresh},
        "'layers.1.mlp', 'layers.3.mlp', 'layers.5.mlp', 'layers.7.mlp' are the same Linear, but "
        "different rules decide about them: '**.mlp', 'layers[-1]'; let one rule match all of "
        "these paths first",
    ),
]


@pytest.mark.parametrize(("model", "rules", "message"), RULES)
def test_two_rules_cannot_share_a_tie_or_a_place(model, rules, message):
    assert refuses(model, rules) == message


def test_one_rule_for_all_paths_comes_first():
    model = shared_in("embed", "head")
    assert list(replace_layers(model, {("embed", "head"): fresh, "**": around})) == [
        "other",
        "embed",
        "head",
    ]
    assert model.embed is model.head


# ---------------------------------------------------------------- what is tied


class Discreet(nn.Linear):
    def parameters(self):
        return {}


def with_private(module: Any, value: Any) -> nn.Module:
    module._private = value
    return module


def deep(levels: int) -> nn.Module:
    module: nn.Module = Holder()
    for _ in range(levels):
        module = build(inner=module)
    return module


WITH_PARAMETERS = {
    "an array": nn.Linear(1, 1),
    "frozen": nn.Linear(1, 1).freeze(),
    "an array deep inside": build(inner=[{"x": nn.Linear(1, 1)}]),
    "an array beyond the recursion limit": deep(2 * sys.getrecursionlimit()),
    "an array beside a private one": with_private(Holder(), [nn.Linear(1, 1)]),
}


@pytest.mark.parametrize("shared", WITH_PARAMETERS.values(), ids=WITH_PARAMETERS)
def test_a_module_with_parameters_is_tied(shared):
    model = build(a=shared, b=shared)
    # A snapshot goes down by recursion.
    with pytest.raises(ValueError, match=r"^'a' is tied to 'b' \(the same \w+\), which is not"):
        replace_layers(model, "a", fresh)
    assert model.a is model.b is shared


WITHOUT_PARAMETERS = {
    "nothing": nn.ReLU(),
    "a private array": with_private(nn.ReLU(), mx.zeros(1)),
    "a private list of layers": with_private(nn.Module(), [nn.Linear(1, 1)]),
    "None and functions": build(acts=[None, nn.gelu, {"x": [nn.ReLU()]}]),
    "parameters() says nothing": Discreet(1, 1),
}


@pytest.mark.parametrize("shared", WITHOUT_PARAMETERS.values(), ids=WITHOUT_PARAMETERS)
def test_a_module_without_parameters_is_not_tied(shared):
    model = build(a=shared, b=shared, c=[shared])
    factory = Recorder()
    replace_layers(model, ["a", "c.*"], factory)
    assert factory.paths == ["a", "c.0"]
    assert model.b is shared
    assert type(model.a) is type(model.c[0]) is Holder
    assert model.a is not model.c[0]


def test_a_tie_that_stays_hides_no_other():
    kept, changed = nn.LayerNorm(1), nn.Linear(1, 1)
    model = build(a=kept, b=kept, c=changed, d=changed)
    make = Recorder(lambda path, module: module if module is kept else Holder())
    assert refuses(model, ["a", "c"], make).startswith("'c' is tied to 'd' (the same Linear)")


def test_a_tie_that_stays_may_be_under_two_rules_or_half_selected():
    def only_relu(path: str, module: nn.Module) -> nn.Module:
        return Holder() if type(module) is nn.ReLU else module

    model = build(a=nn.Linear(1, 1), c=nn.ReLU())
    model.b = model.a
    assert not replace_layers(model, {"a": None, "b": unchanged})
    assert list(replace_layers(model, ["a", "c"], only_relu)) == ["c"]


def test_a_layer_is_tied_to_the_wrapper_that_holds_it():
    layer = nn.Linear(2, 2)
    model = build(a=Wrapper(layer), b=layer)
    assert "'b' is tied to 'a' (the same Linear)" in refuses(model, "b", fresh)
    assert "'a' is tied to 'b' (the same Wrapper)" in refuses(model, "a", fresh)
    assert refuses(model, {"a": fresh, "b": around}) == (
        "'a', 'b' are the same Wrapper, but different rules decide about them: 'a', 'b'; "
        "let one rule match all of these paths first"
    )
    factory = Recorder()  # the layer and the wrapper are two modules, and it may want both
    assert list(replace_layers(model, "*", factory)) == factory.paths == ["a", "b"]
