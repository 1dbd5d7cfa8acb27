"""The first rule that matches decides; `None` leaves alone; each rule must have an effect."""

from __future__ import annotations

import re
from typing import Any

import mlx.nn as nn
import pytest
from models import Holder, Recorder, around, build, fresh, identity, multimodal, transformer
from oracle import Snapshot

from mlx_modswap import (
    NoMatchError,
    PatternError,
    SelectionError,
    replace_layers,
    select,
    swapped,
)


def test_none_leaves_a_place_alone():
    model = transformer()
    last = model.layers[-1].mlp
    report = replace_layers(model, {"layers[-1].**": None, "layers.*.mlp": fresh})
    assert list(report) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    assert model.layers[-1].mlp is last


def test_no_rule_sees_what_another_put_in():
    model = build(a=nn.ReLU())
    factory = Recorder(around)
    replace_layers(model, {"a": factory, "a.inner": factory}, strict=False)
    assert factory.paths == ["a"]
    assert type(model.a.inner) is nn.ReLU


def paths(*patterns: Any) -> list[str]:
    """The linear layers that some patterns match."""
    return list(select(multimodal(), patterns, where=nn.Linear))


TOWER, TEXT = ["vision_tower.**"], ["layers.**", "head"]
RULES = [
    ({"layers[0]": None, "**": fresh}, {fresh: [*TOWER, "layers[1:].**", "head"]}),
    ({"vision_tower": None, "**": fresh}, {fresh: TEXT}),
    ({"layers": None, "**": fresh}, {fresh: [*TOWER, "head"]}),
    ({"**.self_attn": None, "**": fresh}, {fresh: ["**.mlp", "vision_tower.proj", "head"]}),
    ({("vision_tower", "layers[1:]"): None, "**": fresh}, {fresh: ["layers[0].**", "head"]}),
    ({re.compile(r"layers\.[01]"): None, "**": fresh}, {fresh: [*TOWER, "layers[2].**", "head"]}),
    # The first rule that matches decides, also inside of what a later one leaves alone.
    (
        {"layers.0.self_attn.q_proj": identity, "layers[0]": None, "**": fresh},
        {identity: ["layers.0.self_attn.q_proj"], fresh: [*TOWER, "layers[1:].**", "head"]},
    ),
    (
        {"**.q_proj": identity, "layers": None, "**": fresh},
        {
            identity: ["**.q_proj"],
            fresh: ["vision_tower.**.{v_proj,mlp}", "vision_tower.proj", "head"],
        },
    ),
    (
        {"layers": None, "**.q_proj": identity, "**": fresh},
        {
            identity: ["vision_tower.**.q_proj"],
            fresh: ["vision_tower.**.{v_proj,mlp}", "vision_tower.proj", "head"],
        },
    ),
    (
        {
            "layers.0.self_attn.q_proj": None,
            "layers[0]": identity,
            "layers[0].**": identity,
            "**": fresh,
        },
        {
            identity: ["layers.0.self_attn.v_proj", "layers.0.mlp"],
            fresh: [*TOWER, "layers[1:].**", "head"],
        },
    ),
]


@pytest.mark.parametrize(("rules", "changed"), RULES, ids=[str(list(row[0])) for row in RULES])
def test_a_rule_of_none_leaves_alone_what_is_inside(rules, changed):
    report = replace_layers(multimodal(), rules, where=nn.Linear, strict=False)
    made = {fresh: Holder, identity: nn.Identity}
    for factory, patterns in changed.items():
        kind = made[factory]
        assert [path for path, m in report.items() if isinstance(m, kind)] == paths(*patterns)
    assert len(report) == sum(len(paths(*patterns)) for patterns in changed.values())


def test_an_exclude_comes_before_any_rule():
    rules = {"layers[0].self_attn": None, "**.q_proj": identity, "**": fresh}
    report = replace_layers(
        multimodal(), rules, where=nn.Linear, exclude=["vision_tower", "layers[1]"]
    )
    assert {path: type(module) for path, module in report.items()} == {
        "layers.0.mlp": Holder,
        "layers.2.self_attn.q_proj": nn.Identity,
        "layers.2.self_attn.v_proj": Holder,
        "layers.2.mlp": Holder,
        "head": Holder,
    }


# ---------------------------------------------------------------- without effect


def is_linear(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


WITHOUT_EFFECT = [
    (
        {"**.self_attn": identity, "**": fresh},
        {},
        "rule '**.self_attn' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 SelfAttention; '**.self_attn.**' matches 8",
    ),
    (
        {"embed": identity, "**": fresh},
        {},
        "rule 'embed' never applies: where=Linear rejects the only module that it matches: "
        "Embedding",
    ),
    (
        {("**.mlp", "**.norm"): identity, "**": fresh},
        {},
        "'**.norm' in rule ('**.mlp', '**.norm') never applies: where=Linear rejects all 4 "
        "modules that it matches: 4 LayerNorm",
    ),
    # A rule that leaves alone what would be left alone anyway.
    (
        {"**.norm": None, "**": fresh},
        {},
        "rule '**.norm' has no effect: where=Linear already leaves alone all 4 modules that it "
        "matches: 4 LayerNorm; remove it",
    ),
    (
        {("embed", "layers[0]"): None, "**": fresh},
        {},
        "'embed' in rule ('embed', 'layers[0]') has no effect: where=Linear already leaves alone "
        "the only module that it matches: Embedding; remove it",
    ),
    # Rules that come too late.
    (
        {"**.q_proj": identity, "layers[0].**.q_proj": fresh},
        {},
        "rule 'layers[0].**.q_proj' never applies: earlier rules already match its only module; "
        "remove it, or move it up",
    ),
    (
        {"layers": None, "**.{q,v}_proj": identity, "head": fresh},
        {},
        "rule '**.{q,v}_proj' never applies: earlier rules already match all 8 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"**.q_proj": identity, "**.v_proj": identity, "**.self_attn.**": fresh, "**.mlp": fresh},
        {},
        "rule '**.self_attn.**' never applies: earlier rules already match all 8 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"layers.*.{mlp,self_attn}": identity, "layers[:2].{mlp,norm}": fresh},
        {},
        "rule 'layers[:2].{mlp,norm}' never applies: earlier rules already match all 2 of its "
        "modules that where=Linear accepts; remove it, or move it up",
    ),
    (
        {"layers.*.mlp": identity, "layers[0].{mlp,norm}": fresh},
        {},
        "rule 'layers[0].{mlp,norm}' never applies: earlier rules already match the only one of "
        "its modules that where=Linear accepts; remove it, or move it up",
    ),
    (
        {
            "**.q_proj": identity,
            ("layers[0].self_attn.q_proj", "layers[1].self_attn.q_proj"): fresh,
        },
        {},
        "rule ('layers[0].self_attn.q_proj', 'layers[1].self_attn.q_proj') never applies: earlier "
        "rules already match all 2 of its modules; remove it, or move it up",
    ),
    # What earlier rules leave is what would work.
    (
        {"**.q_proj": identity, "**.self_attn": fresh, "**": fresh},
        {},
        "rule '**.self_attn' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 SelfAttention; '**.self_attn.**' matches 4",
    ),
    (
        {"**.{q,v}_proj": identity, "**.self_attn": fresh, "**": fresh},
        {},
        "rule '**.self_attn' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 SelfAttention",
    ),
    # Excludes of rules.
    (
        {"**.q_proj": identity, "**": fresh},
        {"exclude": ["layers[0]", "**.norm"]},
        "exclude '**.norm' has no effect: where=Linear rejects all 4 modules that it would "
        "exclude: 4 LayerNorm",
    ),
]


@pytest.mark.parametrize("where", [nn.Linear, is_linear], ids=["a class", "a function"])
@pytest.mark.parametrize(("rules", "options", "message"), WITHOUT_EFFECT)
def test_a_rule_without_effect_is_an_error(rules, options, message, where):
    model = transformer()
    before = Snapshot(model)
    for swap in (replace_layers, lambda *a, **k: swapped(*a, **k).__enter__()):
        with pytest.raises(NoMatchError) as error:
            swap(model, rules, where=where, **options)
        assert str(error.value) == message.replace("where=Linear", f"where={where.__name__}")
    assert before.differences() == []
    replace_layers(model, rules, where=where, **options, strict=False)


# ---------------------------------------------------------------- tuples of patterns


def tied() -> Any:
    model = transformer(2)
    model.tied = model.embed
    return model


DECIDED = [
    ({("**.q_proj", "**.v_proj"): fresh}, "**.{q,v}_proj", []),
    ({("head",): fresh}, "head", []),
    ({("**.q_proj", "**.q_proj"): fresh}, "**.q_proj", []),
    ({("**.q_proj", re.compile(r".*\.0\.mlp")): fresh}, ["**.q_proj", "layers.0.mlp"], []),
    ({("embed", "tied"): fresh}, "{embed,tied}", []),  # two rules could not share the tie
    # The first rule decides, whichever of its patterns it is that matches.
    (
        {("**.mlp", "layers[0].norm"): fresh, "layers.*.{norm,mlp}": identity},
        ["**.mlp", "layers[0].norm"],
        "layers[1].norm",
    ),
    (
        {"layers[0].{norm,mlp}": fresh, ("**.mlp", "**.norm"): identity},
        "layers[0].{norm,mlp}",
        "layers[1].{norm,mlp}",
    ),
    ({("layers[0]", "**.norm"): None, "layers.*.{norm,mlp}": identity}, [], "layers[1].mlp"),
    # A member may be decided by an earlier rule, if another is not.
    ({"**.q_proj": fresh, ("**.q_proj", "**.v_proj"): identity}, "**.q_proj", "**.v_proj"),
]


@pytest.mark.parametrize(("rules", "ones", "twos"), DECIDED)
def test_a_tuple_of_patterns_is_one_rule(rules, ones, twos):
    for changed in (replace_layers(tied(), rules), enter(tied(), rules)):
        for kind, patterns in ((Holder, ones), (nn.Identity, twos)):
            expected = list(select(tied(), patterns)) if patterns else []
            assert [path for path, m in changed.items() if type(m) is kind] == expected


def enter(model: nn.Module, rules: Any) -> dict[str, nn.Module]:
    with swapped(model, rules) as changed:
        return dict(changed)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ({}, NoMatchError, "no pattern was given; '**' matches every module of the model"),
    ({(): fresh}, NoMatchError, "rule () holds no pattern; remove it"),
    ({(): None, "head": fresh}, NoMatchError, "rule () holds no pattern; remove it"),
    # Each member must match something, and the rule must decide something.
    (
        {("**.q_proj", "q_proj"): fresh},
        NoMatchError,
        "'q_proj' matches nothing; '**.q_proj' matches 2",
    ),
    (
        {"layers.*.{norm,mlp}": fresh, ("**.norm", "**.mlp"): identity},
        NoMatchError,
        "rule ('**.norm', '**.mlp') never applies: earlier rules already match all 4 of its "
        "modules; remove it, or move it up",
    ),
    (
        {"head": fresh, ("head",): identity},
        NoMatchError,
        "rule ('head',) never applies: earlier rules already match its only module; "
        "remove it, or move it up",
    ),
    (
        {("head", re.compile("hea")): fresh},
        NoMatchError,
        "re.compile('hea') does not match any complete path (fullmatch); "
        're.compile(r".*(hea).*") matches 1',
    ),
    (
        {("embed", "head"): fresh, "tied": identity},
        SelectionError,
        "'embed', 'tied' are the same Embedding, but different rules decide about them: "
        "('embed', 'head'), 'tied'; let one rule match all of these paths first",
    ),
    (
        {("head", "layers[0"): fresh},
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
        {("head", 1): fresh},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not int: 1",
    ),
    (
        {("head", ("embed",)): fresh},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not tuple: ('embed',)",
    ),
    (
        {frozenset(["head"]): fresh},
        TypeError,
        "a pattern is a str or a compiled regular expression of str, not frozenset: "
        "frozenset({'head'})",
    ),
]


@pytest.mark.parametrize(("rules", "error_class", "message"), REFUSED)
def test_a_tuple_that_is_refused(rules, error_class, message):
    with pytest.raises(error_class) as error:
        replace_layers(tied(), rules)
    assert str(error.value) == message


def test_not_strict_skips_rules_without_effect():
    rules = {(): fresh, ("nothing", "head"): identity, ("head", "**.q_proj"): fresh, ("no",): None}
    changed = replace_layers(tied(), rules, strict=False)
    assert {path: type(module) for path, module in changed.items()} == {
        "layers.0.self_attn.q_proj": Holder,
        "layers.1.self_attn.q_proj": Holder,
        "head": nn.Identity,
    }


def test_a_tuple_of_patterns_is_a_union_elsewhere():
    assert list(select(tied(), ("head", "**.q_proj"), exclude=("layers[0]",))) == [
        "layers.1.self_attn.q_proj",
        "head",
    ]
