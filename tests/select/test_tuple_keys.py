"""The key of a rule may be a tuple of patterns, which is their union."""

from __future__ import annotations

import re
from typing import Any

import mlx.nn as nn
import pytest

from mlx_modswap import (
    NoMatchError,
    PatternError,
    SelectionError,
    replace_layers,
    select,
    swapped,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = self.tied = nn.Embedding(2, 2)
        self.layers = [Block(), Block()]
        self.head = nn.Linear(2, 2)


class One(nn.Module):
    pass


class Two(nn.Module):
    pass


def one(path: str, layer: nn.Module) -> nn.Module:
    return One()


def two(path: str, layer: nn.Module) -> nn.Module:
    return Two()


DECIDED = [
    ({("**.q", "**.v"): one}, "layers.*.{q,v}", []),
    ({("head",): one}, "head", []),
    ({("**.q", "**.q"): one}, "**.q", []),
    ({("**.q", re.compile(r".*\.0\.[kv]")): one}, ["**.q", "layers.0.{k,v}"], []),
    ({("embed", "tied"): one}, "{embed,tied}", []),  # two rules could not share the tie
    # The first rule decides, whichever of its patterns it is that matches.
    (
        {("**.q", "layers[0].*"): one, "layers.*.*": two},
        ["**.q", "layers[0].*"],
        "layers[1].{k,v,norm}",
    ),
    ({"layers[0].*": one, ("**.q", "**.v"): two}, "layers[0].*", "layers[1].{q,v}"),
    ({("layers[0]", "**.norm"): None, "layers.*.*": two}, [], "layers[1].{q,k,v}"),
    # A member may be decided by an earlier rule, if another is not.
    ({"**.q": one, ("**.q", "**.v"): two}, "**.q", "**.v"),
]


@pytest.mark.parametrize(("rules", "ones", "twos"), DECIDED)
def test_a_tuple_of_patterns_is_one_rule(rules, ones, twos):
    for changed in (replace_layers(Model(), rules), enter(Model(), rules)):
        for kind, patterns in ((One, ones), (Two, twos)):
            expected = list(select(Model(), patterns)) if patterns else []
            assert [path for path, m in changed.items() if type(m) is kind] == expected


def enter(model: nn.Module, rules: Any) -> dict[str, nn.Module]:
    with swapped(model, rules) as changed:
        return dict(changed)


def test_the_factory_is_called_in_the_order_of_the_model_and_not_of_the_tuple():
    paths: list[str] = []

    def make(path: str, layer: nn.Module) -> nn.Module:
        paths.append(path)
        return One()

    replace_layers(Model(), {("head", "**.v", "**.q"): make})
    assert paths == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "head"]


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ({(): one}, NoMatchError, "rule () holds no pattern; remove it"),
    ({(): None, "head": one}, NoMatchError, "rule () holds no pattern; remove it"),
    # Each member must match something, and the rule must decide something.
    (
        {("**.q", "q"): one},
        NoMatchError,
        "'q' matches nothing; '**.q' matches 2",
    ),
    (
        {"layers.*.*": one, ("**.q", "**.v"): two},
        NoMatchError,
        "rule ('**.q', '**.v') never applies: earlier rules already match all 4 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"head": one, ("head",): two},
        NoMatchError,
        "rule ('head',) never applies: earlier rules already match its only module; "
        "remove it, or move it up",
    ),
    (
        {("head", re.compile("hea")): one},
        NoMatchError,
        "re.compile('hea') does not match any complete path (fullmatch); "
        're.compile(r".*(hea).*") matches 1',
    ),
    (
        {("embed", "head"): one, "tied": two},
        SelectionError,
        "'embed', 'tied' are the same Embedding, but different rules decide about them: "
        "('embed', 'head'), 'tied'; let one rule match all of these paths first",
    ),
    (
        {("head", "layers[0"): one},
        PatternError,
        "unmatched '['; write 'layers[0]'\n    layers[0\n          ^",
    ),
    (
        {("head", "embed"): nn.ReLU()},
        TypeError,
        "the factory of rule ('head', 'embed') must be a function of path and module, "
        "not a module (ReLU)",
    ),
    (
        {("head", 1): one},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not int: 1",
    ),
    (
        {("head", ("embed",)): one},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not tuple: ('embed',)",
    ),
    (
        {frozenset(["head"]): one},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not frozenset: "
        "frozenset({'head'})",
    ),
]


@pytest.mark.parametrize(("rules", "error_class", "message"), REFUSED)
def test_a_rule_of_several_patterns_that_is_refused(rules, error_class, message):
    with pytest.raises(error_class) as error:
        replace_layers(Model(), rules)
    assert str(error.value) == message


def test_what_does_nothing_is_skipped_if_it_need_not_be_strict():
    rules = {(): one, ("nothing", "head"): two, ("head", "**.q"): one, ("no",): None}
    changed = replace_layers(Model(), rules, strict=False)
    assert {path: type(module) for path, module in changed.items()} == {
        "layers.0.q": One,
        "layers.1.q": One,
        "head": Two,
    }


def test_a_tuple_of_patterns_is_an_ordinary_union_where_it_is_not_a_key():
    assert list(select(Model(), ("head", "**.q"), exclude=("layers[0]",))) == ["layers.1.q", "head"]
