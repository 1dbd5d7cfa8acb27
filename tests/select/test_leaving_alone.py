"""To leave a place alone is to leave alone all that is inside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from oracle import Snapshot

from mlx_modswap import (
    NoMatchError,
    SelectionError,
    Wrapper,
    capture,
    patch,
    replace_layers,
    select,
    swapped,
    tree,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        self.v_proj = nn.Linear(2, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(2)
        self.mlp = nn.Linear(2, 2)
        self.acts = [nn.ReLU(), nn.Tanh()]


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Block(), Block()]
        self.proj = nn.Linear(2, 2)


class Model(nn.Module):
    """A vision tower, and a text part of three blocks and a head."""

    def __init__(self):
        super().__init__()
        self.vision_tower = Tower()
        self.layers = [Block() for _ in range(3)]
        self.head = nn.Linear(2, 2)


class Bits4(nn.Module):
    """What q4 makes of a layer."""


class Bits8(nn.Module):
    """What q8 makes of a layer."""


class Holder(nn.Module):
    """Holds whatever it is given."""

    def __init__(self, **held: Any):
        super().__init__()
        for name, value in held.items():
            self[name] = value


def q4(path: str, layer: nn.Module) -> nn.Module:
    return Bits4()


def q8(path: str, layer: nn.Module) -> nn.Module:
    return Bits8()


def new(path: str, layer: nn.Module) -> nn.Module:
    return nn.Identity()


def around(path: str, layer: nn.Module) -> nn.Module:
    return Holder(inner=layer)


def paths(*patterns: Any) -> list[str]:
    """The linear layers that some patterns match, of which none is excluded."""
    return list(select(Model(), patterns, where=nn.Linear))


TEXT = ["layers.**", "head"]
TOWER = ["vision_tower.**"]
EXCLUDED = [
    # A module, a list that is no module, and an entry of a list.
    ("vision_tower", TEXT),
    ("vision_tower.layers", ["vision_tower.proj", *TEXT]),
    ("layers", [*TOWER, "head"]),
    ("layers[0]", [*TOWER, "layers[1:].**", "head"]),
    ("layers[:2].attn", [*TOWER, "layers[2].**", "layers[:2].mlp", "head"]),
    # Several places.
    ("**.attn", ["**.mlp", "vision_tower.proj", "head"]),
    ("{head,layers}", TOWER),
    ("*.layers", ["vision_tower.proj", *TEXT]),
    (["vision_tower.layers", "layers"], ["vision_tower.proj", "head"]),
    # What is inside, written out.
    ("vision_tower.**", TEXT),
    (["layers[0]", "layers[0].**"], [*TOWER, "layers[1:].**", "head"]),
    # A single layer.
    ("head", [*TOWER, "layers.**"]),
    # Regular expressions match a leading part of the path, cut at a dot.
    (re.compile("vision_tower"), TEXT),
    (re.compile("VISION.*", re.IGNORECASE), TEXT),
    (re.compile(r"layers"), [*TOWER, "head"]),
    (re.compile(r"layers\.[12]"), [*TOWER, "layers[0].**", "head"]),
    (re.compile(r".*\.attn"), ["**.mlp", "vision_tower.proj", "head"]),
    (re.compile(r"(.*\.)?layers\.0\.mlp"), ["**.attn.*", "**.layers[1:].mlp", "**.proj", "head"]),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("exclude", "changed"), EXCLUDED, ids=[str(row[0]) for row in EXCLUDED])
def test_an_exclude_leaves_alone_all_that_is_inside(exclude, changed, strict):
    options: Any = {"where": nn.Linear, "exclude": exclude, "strict": strict}
    report = replace_layers(Model(), "**", q4, **options)
    assert list(report) == list(select(Model(), "**", **options)) == paths(*changed)


def test_an_exclude_that_matches_part_of_a_name_leaves_nothing_alone():
    model = Model()
    model.layer = nn.Linear(2, 2)
    for exclude in ("layer", re.compile("layer")):
        found = select(model, ["layer", "layers.*.mlp"], exclude=exclude)
        assert list(found) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


RULES = [
    ({"layers[0]": None, "**": q4}, {q4: [*TOWER, "layers[1:].**", "head"]}),
    ({"vision_tower": None, "**": q4}, {q4: TEXT}),
    ({"layers": None, "**": q4}, {q4: [*TOWER, "head"]}),
    ({"**.attn": None, "**": q4}, {q4: ["**.mlp", "vision_tower.proj", "head"]}),
    ({("vision_tower", "layers[1:]"): None, "**": q4}, {q4: ["layers[0].**", "head"]}),
    ({re.compile(r"layers\.[01]"): None, "**": q4}, {q4: [*TOWER, "layers[2].**", "head"]}),
    # The first rule that matches decides, also inside of what a later one leaves alone.
    (
        {"layers.0.attn.q_proj": q8, "layers[0]": None, "**": q4},
        {q8: ["layers.0.attn.q_proj"], q4: [*TOWER, "layers[1:].**", "head"]},
    ),
    (
        {"**.q_proj": q8, "layers": None, "**": q4},
        {q8: ["**.q_proj"], q4: ["vision_tower.**.{v_proj,mlp}", "vision_tower.proj", "head"]},
    ),
    (
        {"layers": None, "**.q_proj": q8, "**": q4},
        {
            q8: ["vision_tower.**.q_proj"],
            q4: ["vision_tower.**.{v_proj,mlp}", "vision_tower.proj", "head"],
        },
    ),
    (
        {"layers.0.attn.q_proj": None, "layers[0]": q8, "layers[0].**": q8, "**": q4},
        {
            q8: ["layers.0.attn.v_proj", "layers.0.mlp"],
            q4: [*TOWER, "layers[1:].**", "head"],
        },
    ),
]


@pytest.mark.parametrize(("rules", "changed"), RULES, ids=[str(list(row[0])) for row in RULES])
def test_a_rule_of_none_leaves_alone_all_that_is_inside(rules, changed):
    report = replace_layers(Model(), rules, where=nn.Linear, strict=False)
    made = {q4: Bits4, q8: Bits8}
    for factory, patterns in changed.items():
        kind = made[factory]
        assert [path for path, m in report.items() if isinstance(m, kind)] == paths(*patterns)
    assert len(report) == sum(len(paths(*patterns)) for patterns in changed.values())


def test_an_exclude_comes_before_any_rule():
    rules = {"layers[0].attn": None, "**.q_proj": q8, "**": q4}
    report = replace_layers(Model(), rules, where=nn.Linear, exclude=["vision_tower", "layers[1]"])
    assert {path: type(module) for path, module in report.items()} == {
        "layers.0.mlp": Bits4,
        "layers.2.attn.q_proj": Bits8,
        "layers.2.attn.v_proj": Bits4,
        "layers.2.mlp": Bits4,
        "head": Bits4,
    }


def selected_paths(model: nn.Module, **options: Any) -> list[str]:
    return list(select(model, "**", **options))


def swapped_paths(model: nn.Module, **options: Any) -> list[str]:
    with swapped(model, "**", q4, **options) as report:
        return list(report)


def captured_paths(model: nn.Module, **options: Any) -> list[str]:
    with capture(model, "**", **options) as outputs:
        call_all(model)
    return list(outputs)


def patched_paths(model: nn.Module, **options: Any) -> list[str]:
    seen: dict[str, None] = {}
    with patch(model, "**", lambda path, output: seen.setdefault(path) or output, **options):
        call_all(model)
    return list(seen)


def call_all(model: nn.Module) -> None:
    for layer in select(model, "**", where=nn.Linear).values():
        layer(mx.zeros((1, 2)))


@pytest.mark.parametrize("paths_of", [selected_paths, swapped_paths, captured_paths, patched_paths])
def test_every_function_leaves_alone_what_is_inside(paths_of):
    found = paths_of(Model(), where=nn.Linear, exclude="vision_tower")
    assert found == paths("layers.**", "head")


def test_a_picture_does_not_mark_what_is_inside_an_excluded_place():
    picture = str(tree(Model(), "**", where=nn.Linear, exclude="vision_tower"))
    assert picture.splitlines()[-1] == "'**' with where and exclude selects 10 of 43 modules"


# ---------------------------------------------------------------- what would be lost


def keep_norm(path: str, block: Any) -> nn.Module:
    return Holder(norm=block.norm)


LOST = [
    (
        ({"layers.0.attn": None, "layers.*": new},),
        {},
        "'layers.0.attn' was to be left alone, but the new module for 'layers.0' does not hold it; "
        "keep it in the new module, or leave 'layers.0' alone too",
    ),
    (
        ({"layers.0.attn.q_proj": None, "layers.*": new},),
        {},
        "'layers.0.attn.q_proj' was to be left alone, but the new module for 'layers.0' does not "
        "hold it; keep it in the new module, or leave 'layers.0' alone too",
    ),
    (
        ({"vision_tower.layers[1].acts": None, "vision_tower": new},),
        {},
        "'vision_tower.layers.1.acts.0' was to be left alone, but the new module for "
        "'vision_tower' does not hold it; keep it in the new module, or leave 'vision_tower' "
        "alone too",
    ),
    (
        ({re.compile(r".*\.(mlp|norm)"): None, "layers.*": keep_norm},),
        {},
        "'layers.0.mlp' was to be left alone, but the new module for 'layers.0' does not hold it; "
        "keep it in the new module, or leave 'layers.0' alone too",
    ),
    (
        ({("layers.1.norm", "head"): None, "layers[1:]": new},),
        {},
        "'layers.1.norm' was to be left alone, but the new module for 'layers.1' does not hold it; "
        "keep it in the new module, or leave 'layers.1' alone too",
    ),
    (
        (["layers[:2]", "**.norm"], new),
        {"exclude": "layers.*.norm"},
        "'layers.0.norm' was to be left alone, but the new module for 'layers.0' does not hold it; "
        "keep it in the new module, or leave 'layers.0' alone too",
    ),
    # What no rule and no `where` would have changed is left alone, too.
    (
        ("layers.*", new),
        {"exclude": "layers.2.attn", "strict": False},
        "'layers.2.attn' was to be left alone, but the new module for 'layers.2' does not hold it; "
        "keep it in the new module, or leave 'layers.2' alone too",
    ),
    (
        ({"layers.*.attn": None, "layers.*": new},),
        {"where": Block, "strict": False},
        "'layers.0.attn' was to be left alone, but the new module for 'layers.0' does not hold it; "
        "keep it in the new module, or leave 'layers.0' alone too",
    ),
    # A copy is another module.
    (
        ({"layers.0.mlp": None, "layers[0]": lambda path, block: Block()},),
        {},
        "'layers.0.mlp' was to be left alone, but the new module for 'layers.0' does not hold it; "
        "keep it in the new module, or leave 'layers.0' alone too",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), LOST)
def test_what_was_to_be_left_alone_is_not_lost_with_the_place_around_it(
    arguments, options, message
):
    model = Model()
    before = Snapshot(model)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, *arguments, **options)
    assert str(error.value) == message
    with pytest.raises(SelectionError) as error, swapped(model, *arguments, **options):
        raise AssertionError("the block must not run")
    assert str(error.value) == message
    assert before.differences() == []


KEPT: dict[str, Callable[[str, Any], nn.Module]] = {
    "a Wrapper": lambda path, block: Wrapper(block),
    "a module that holds the block": around,
    "in a list": lambda path, block: Holder(parts=[nn.ReLU(), block]),
    "in a dict": lambda path, block: Holder(parts={"a": {"b": block}}),
    "in a private attribute": lambda path, block: Holder(_inner=block),
    "a wrapper of a wrapper": lambda path, block: Wrapper(Wrapper(block)),
    "only the attention": lambda path, block: Holder(attention=block.attn),
    "only what is in the attention": lambda path, block: Holder(
        attention=block.attn, q=block.attn.q_proj, v=block.attn.v_proj
    ),
    "the attention itself": lambda path, block: block.attn,
    "the block itself": lambda path, block: block,
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_new_module_that_holds_what_was_to_be_left_alone_is_fine(make):
    calls: list[Any] = [
        (({"layers.0.attn": None, "layers[0]": make},), {}),
        ((["layers[0]", "layers.*.attn"], make), {"exclude": "layers.*.attn"}),
    ]
    for arguments, options in calls:
        model: Any = Model()
        attention = model.layers[0].attn
        replace_layers(model, *arguments, **options)
        assert any(module is attention for module in model.modules())


def test_a_cycle_in_a_new_module_around_a_place_left_alone_is_refused():
    model = Model()
    before = Snapshot(model)

    def ring(path: str, block: Any) -> nn.Module:
        holder: Any = Holder(block=block)
        holder.again = holder
        return holder

    with pytest.raises(SelectionError) as error:
        replace_layers(model, {"layers.0.attn": None, "layers[0]": ring})
    assert str(error.value) == "the model contains a cycle: 'layers.0.again' is 'layers.0' again"
    assert before.differences() == []


def test_a_place_left_alone_does_not_keep_the_one_beside_it():
    rules = {"layers[0]": None, "layers[1]": new, "layers[2].attn": new}
    assert list(replace_layers(Model(), rules)) == ["layers.1", "layers.2.attn"]


def build(**held: Any) -> Any:
    module = nn.Module()
    for name, value in held.items():
        dict.__setitem__(module, name, value)
    return module


def test_what_is_lost_through_another_path_of_its_place_is_found():
    block = build(act=nn.ReLU(), norm=nn.LayerNorm(1))
    model = build(a=block, b=block)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, {"b.act": None, "*": new})
    assert str(error.value) == (
        "'b.act' was to be left alone, but the new module for 'b' does not hold it; "
        "keep it in the new module, or leave 'b' alone too"
    )


def test_a_key_with_a_dot_is_not_inside_the_place_that_its_path_begins_with():
    model = build(d={"a": build(x=nn.ReLU()), "a.b": build(x=nn.ReLU())})
    kept = model.d["a.b"].x
    assert list(replace_layers(model, {"d.a.b.x": None, "d.a": new})) == ["d.a"]
    assert model.d["a.b"].x is kept
    with pytest.raises(SelectionError) as error:
        replace_layers(model, {"d.a.b.x": None, "d.a.b": new})
    assert str(error.value) == (
        "'d.a.b.x' was to be left alone, but the new module for 'd.a.b' does not hold it; "
        "keep it in the new module, or leave 'd.a.b' alone too"
    )


def test_an_empty_name_is_a_leading_part_as_any_other():
    model = build(**{"": build(x=nn.ReLU()), "b": build(x=nn.ReLU())})
    nameless = re.compile("")
    assert list(select(model, "**", exclude=nameless)) == ["b", "b.x"]
    with pytest.raises(SelectionError) as error:
        replace_layers(model, {re.compile(r"\.x"): None, nameless: new})
    assert str(error.value) == (
        "'.x' was to be left alone, but the new module for '' does not hold it; "
        "keep it in the new module, or leave '' alone too"
    )


# ---------------------------------------------------------------- when nothing is left

ALL_EXCLUDED = [
    (
        "head",
        "head",
        "exclude 'head' leaves nothing: it removes the only module that 'head' matches",
    ),
    (
        "vision_tower.**",
        "vision_tower",
        "exclude 'vision_tower' leaves nothing: it removes all 17 modules that 'vision_tower.**' "
        "matches, because what is inside an excluded place is excluded too; "
        "'vision_tower.**' without exclude does not select 'vision_tower' itself",
    ),
    (
        "layers.*.attn",
        "layers",
        "exclude 'layers' leaves nothing: it removes all 3 modules that 'layers.*.attn' matches, "
        "because what is inside an excluded place is excluded too",
    ),
    (
        ["layers.*", "layers[0].mlp"],
        ["layers[0]", "layers[1:]"],
        "exclude 'layers[0]', 'layers[1:]' leave nothing: they remove all 4 modules that "
        "'layers.*', 'layers[0].mlp' match, because what is inside an excluded place is "
        "excluded too",
    ),
    (
        "layers.*.acts.*",
        re.compile(r"layers\.\d+"),
        r"exclude re.compile('layers\\.\\d+') leaves nothing: it removes all 6 modules that "
        "'layers.*.acts.*' matches, because what is inside an excluded place is excluded too",
    ),
]


@pytest.mark.parametrize(("pattern", "exclude", "message"), ALL_EXCLUDED)
def test_excludes_that_leave_nothing_are_an_error(pattern, exclude, message):
    calls: list[Callable[[], Any]] = [
        lambda: select(Model(), pattern, exclude=exclude),
        lambda: replace_layers(Model(), pattern, q4, exclude=exclude),
        lambda: tree(Model(), pattern, exclude=exclude),
        lambda: capture(Model(), pattern, exclude=exclude).__enter__(),
    ]
    for call in calls:
        with pytest.raises(NoMatchError) as error:
            call()
        assert str(error.value) == message
    assert not select(Model(), pattern, exclude=exclude, strict=False)


def test_one_of_several_patterns_may_be_excluded_as_a_whole():
    assert list(select(Model(), ["vision_tower.**", "head"], exclude="vision_tower")) == ["head"]
    some_rules: list[Any] = [
        {"vision_tower.**": q8, "head": q4},
        {("vision_tower.**", "head"): q4},
        {("vision_tower.**", "vision_tower"): q4, "head": q4},
    ]
    for rules in some_rules:
        report = replace_layers(Model(), rules, exclude="vision_tower", where=nn.Linear)
        assert list(report) == ["head"]


# ---------------------------------------------------------------- the advice


@pytest.mark.parametrize(
    ("name", "advice"),
    [("a", "exclude='d.a.attn'"), ("layers[0]", r"exclude=re.compile('d\\.layers\\[0\\]\\.attn')")],
)
def test_the_advice_for_places_inside_one_another_works(name, advice):
    def blocks_and_attention(make: Any, **options: Any) -> Any:
        model = build(d={name: Block()})
        return replace_layers(model, "**", make, where=(Block, Attention), **options)

    with pytest.raises(SelectionError) as error:
        blocks_and_attention(around)
    assert str(error.value) == (
        f"'d.{name}.attn' lies inside 'd.{name}', and both would change; exclude the inner one "
        f"({advice}), or select only 'd.{name}'"
    )
    options = eval(f"dict({advice})")
    assert list(blocks_and_attention(around, **options)) == [f"d.{name}"]
    with pytest.raises(SelectionError, match="was to be left alone"):
        blocks_and_attention(new, **options)
