"""What is in several places changes in all of them, and what the errors advise works."""

from __future__ import annotations

import re
from typing import Any

import mlx.nn as nn
import pytest
from oracle import Snapshot

from mlx_modswap import SelectionError, partial_modules, replace_layers


def build(**held: Any) -> Any:
    module = nn.Module()
    for name, value in held.items():
        dict.__setitem__(module, name, value)
    return module


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(2, 2)
        self.act = nn.ReLU()


def make(path: str, layer: nn.Module) -> nn.Module:
    return nn.Linear(2, 2)


def two() -> Any:
    embedding = nn.Embedding(2, 2)
    return build(embed=embedding, layers=[nn.ReLU()], head=embedding)


def three() -> Any:
    embedding = nn.Embedding(2, 2)
    return build(shared=embedding, encoder=build(embed=embedding), decoder=build(embed=embedding))


def recurrent() -> Any:
    """Two blocks that take turns."""
    return build(layers=[Block(), Block()] * 4)


def two_names() -> Any:
    layers = [Block(), Block()]
    return build(layers=layers, blocks=layers)


def odd_names() -> Any:
    layer = nn.Linear(2, 2)
    return build(d={"a[0]": layer, "b*": layer})


TIED = [
    (
        two,
        "embed",
        "'embed' is tied to 'head' (the same Embedding), which is not selected; select both, or "
        "neither (exclude='embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'embed': new}))",
        ["embed"],
    ),
    (
        three,
        "decoder.*",
        "'decoder.embed' is tied to 'shared', 'encoder.embed' (the same Embedding), which are not "
        "selected; select all of them, or none (exclude='decoder.embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'decoder.embed': new}))",
        ["decoder.embed"],
    ),
    (
        three,
        "*.embed",
        "'encoder.embed' is tied to 'shared' (the same Embedding), which is not selected; select "
        "all of them, or none (exclude='{encoder,decoder}.embed'); to untie them, use "
        "model.update_modules(partial_modules(model, {'encoder.embed': new}))",
        ["encoder.embed"],
    ),
    (
        three,
        ["shared", "encoder.*"],
        "'shared' is tied to 'decoder.embed' (the same Embedding), which is not selected; select "
        "all of them, or none (exclude=['shared', 'encoder.embed']); to untie them, use "
        "model.update_modules(partial_modules(model, {'shared': new}))",
        ["shared"],
    ),
    (
        recurrent,
        "layers[-2:]",
        "'layers.6' is tied to 'layers.0', 'layers.2', 'layers.4' (the same Block), which are not "
        "selected; select all of them, or none (exclude='layers.6'); to untie them, use "
        "model.update_modules(partial_modules(model, {'layers.6': new}))",
        ["layers.6"],
    ),
    (
        odd_names,
        re.compile(r"d\.a.*"),
        "'d.a[0]' is tied to 'd.b*' (the same Linear), which is not selected; select both, or "
        r"neither (exclude=re.compile('d\\.a\\[0\\]')); to untie them, use "
        "model.update_modules(partial_modules(model, {'d.a[0]': new}))",
        ["d.a[0]"],
    ),
]


@pytest.mark.parametrize(("prepare", "pattern", "message", "untied"), TIED)
def test_half_of_a_tie_is_refused_and_the_way_to_untie_it_works(prepare, pattern, message, untied):
    model = prepare()
    before = Snapshot(model)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, pattern, make)
    assert str(error.value) == message
    assert before.differences() == []

    then = dict(model.named_modules())
    (advice,) = re.findall(r"use (model\.update_modules\(.*\))$", message)
    new = nn.Linear(2, 2)
    eval(advice, {"model": model, "partial_modules": partial_modules, "new": new})
    now = dict(model.named_modules())
    assert [path for path in then if now.get(path) is not then[path] and path in now] == untied
    assert now[untied[0]] is new


PLACES = [
    (
        recurrent,
        "layers[-2:].q",
        "'layers.0.q', 'layers.2.q', 'layers.4.q', 'layers.6.q' are the same place, because a "
        "module or list that contains it is shared; select all of these paths, or none "
        "(exclude='layers.6.q')",
    ),
    (
        recurrent,
        "layers[5:].q",
        "'layers.1.q', 'layers.3.q', 'layers.5.q', 'layers.7.q' are the same place, because a "
        "module or list that contains it is shared; select all of these paths, or none "
        "(exclude='layers.{5,7}.q')",
    ),
    (
        two_names,
        "layers[0].q",
        "'layers.0.q' and 'blocks.0.q' are the same place, because a module or list that contains "
        "it is shared; select both paths, or neither (exclude='layers.0.q')",
    ),
    # A layer without parameters is not tied, but its place is one place.
    (
        two_names,
        "blocks[1].act",
        "'layers.1.act' and 'blocks.1.act' are the same place, because a module or list that "
        "contains it is shared; select both paths, or neither (exclude='blocks.1.act')",
    ),
]


@pytest.mark.parametrize(("prepare", "pattern", "message"), PLACES)
def test_some_paths_of_a_place_are_refused_and_all_of_them_are_named(prepare, pattern, message):
    model = prepare()
    before = Snapshot(model)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, pattern, make)
    assert str(error.value) == message
    assert before.differences() == []


def test_the_advice_for_a_recurrent_stack_works():
    model = recurrent()
    assert len(replace_layers(model, "layers.*.q", make)) == 8
    assert model.layers[0].q is model.layers[6].q is not model.layers[1].q
    changed = replace_layers(model, "layers.*.q", make, exclude="layers[::2].q")
    assert list(changed) == ["layers.1.q", "layers.3.q", "layers.5.q", "layers.7.q"]


def test_the_advice_to_exclude_works():
    model = three()
    model.head = nn.Linear(2, 2)
    changed = replace_layers(model, ["*.embed", "head"], make, exclude="{encoder,decoder}.embed")
    assert list(changed) == ["head"]


RULES = [
    (
        two,
        {"embed": make, "head": lambda path, layer: nn.Embedding(2, 2)},
        "'embed', 'head' are the same Embedding, but different rules decide about them: 'embed', "
        "'head'; let one rule match all of these paths first",
    ),
    (
        two,
        {"head": None, "**": make},
        "'embed', 'head' are the same Embedding, but different rules decide about them: '**', "
        "'head'; let one rule match all of these paths first",
    ),
    (
        recurrent,
        {"layers[-1]": None, "**.q": make},
        "'layers.1.q', 'layers.3.q', 'layers.5.q', 'layers.7.q' are the same Linear, but different "
        "rules decide about them: '**.q', 'layers[-1]'; let one rule match all of these paths "
        "first",
    ),
]


@pytest.mark.parametrize(("prepare", "rules", "message"), RULES)
def test_two_rules_do_not_share_what_is_in_several_places(prepare, rules, message):
    model = prepare()
    before = Snapshot(model)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, rules)
    assert str(error.value) == message
    assert before.differences() == []


def test_one_rule_for_all_paths_comes_first():
    model = two()
    rules = {("embed", "head"): make, "**": lambda path, layer: nn.Identity()}
    assert list(replace_layers(model, rules)) == ["embed", "layers.0", "head"]
    assert model.embed is model.head
