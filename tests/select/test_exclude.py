"""To exclude a place is to leave alone what is inside it, and an `exclude` must have an effect."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import fresh, identity, multimodal, transformer

from mlx_modswap import (
    NoMatchError,
    capture,
    patch,
    replace_layers,
    select,
    swapped,
    tree,
)


def paths(*patterns: Any) -> list[str]:
    """The linear layers that some patterns match, of which none is excluded."""
    return list(select(multimodal(), patterns, where=nn.Linear))


TEXT = ["layers.**", "head"]


TOWER = ["vision_tower.**"]


EXCLUDED = [
    # A module, a list that is no module, and an entry of a list.
    ("vision_tower", TEXT),
    ("vision_tower.layers", ["vision_tower.proj", *TEXT]),
    ("layers", [*TOWER, "head"]),
    ("layers[0]", [*TOWER, "layers[1:].**", "head"]),
    ("layers[:2].self_attn", [*TOWER, "layers[2].**", "layers[:2].mlp", "head"]),
    # Several places.
    ("**.self_attn", ["**.mlp", "vision_tower.proj", "head"]),
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
    (re.compile(r".*\.self_attn"), ["**.mlp", "vision_tower.proj", "head"]),
    (
        re.compile(r"(.*\.)?layers\.0\.mlp"),
        ["**.self_attn.*", "**.layers[1:].mlp", "**.proj", "head"],
    ),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("exclude", "changed"), EXCLUDED, ids=[str(row[0]) for row in EXCLUDED])
def test_an_exclude_leaves_alone_what_is_inside(exclude, changed, strict):
    options: Any = {"where": nn.Linear, "exclude": exclude, "strict": strict}
    report = replace_layers(multimodal(), "**", fresh, **options)
    assert list(report) == list(select(multimodal(), "**", **options)) == paths(*changed)


def test_an_exclude_does_not_match_part_of_a_name():
    model = multimodal()
    model.layer = nn.Linear(2, 2)
    for exclude in ("layer", re.compile("layer")):
        found = select(model, ["layer", "layers.*.mlp"], exclude=exclude)
        assert list(found) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


def selected_paths(model: nn.Module, **options: Any) -> list[str]:
    return list(select(model, "**", **options))


def swapped_paths(model: nn.Module, **options: Any) -> list[str]:
    with swapped(model, "**", fresh, **options) as report:
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
        layer(mx.zeros((1, 4)))


@pytest.mark.parametrize("paths_of", [selected_paths, swapped_paths, captured_paths, patched_paths])
def test_every_function_leaves_alone_what_is_inside(paths_of):
    found = paths_of(multimodal(), where=nn.Linear, exclude="vision_tower")
    assert found == paths("layers.**", "head")


def test_a_picture_does_not_mark_what_is_excluded():
    picture = str(tree(multimodal(), "**", where=nn.Linear, exclude="vision_tower"))
    assert picture.splitlines()[-1] == "'**' with where and exclude selects 10 of 39 modules"


ALL_EXCLUDED = [
    (
        "head",
        "head",
        "exclude 'head' leaves nothing: it removes the only module that 'head' matches",
    ),
    (
        "vision_tower.**",
        "vision_tower",
        "exclude 'vision_tower' leaves nothing: it removes all 15 modules that 'vision_tower.**' "
        "matches, because what is inside an excluded place is excluded too; "
        "'vision_tower.**' without exclude does not select 'vision_tower' itself",
    ),
    (
        "layers.*.self_attn",
        "layers",
        "exclude 'layers' leaves nothing: it removes all 3 modules that 'layers.*.self_attn' "
        "matches, because what is inside an excluded place is excluded too",
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
        r"exclude re.compile('layers\\.\\d+') leaves nothing: it removes all 3 modules that "
        "'layers.*.acts.*' matches, because what is inside an excluded place is excluded too",
    ),
]


@pytest.mark.parametrize(("pattern", "exclude", "message"), ALL_EXCLUDED)
def test_excludes_that_leave_nothing_are_an_error(pattern, exclude, message):
    calls: list[Callable[[], Any]] = [
        lambda: select(multimodal(), pattern, exclude=exclude),
        lambda: replace_layers(multimodal(), pattern, fresh, exclude=exclude),
        lambda: tree(multimodal(), pattern, exclude=exclude),
        lambda: capture(multimodal(), pattern, exclude=exclude).__enter__(),
    ]
    for call in calls:
        with pytest.raises(NoMatchError) as error:
            call()
        assert str(error.value) == message
    assert not select(multimodal(), pattern, exclude=exclude, strict=False)


def test_one_of_several_patterns_may_be_wholly_excluded():
    assert list(select(multimodal(), ["vision_tower.**", "head"], exclude="vision_tower")) == [
        "head"
    ]
    some_rules: list[Any] = [
        {"vision_tower.**": identity, "head": fresh},
        {("vision_tower.**", "head"): fresh},
        {("vision_tower.**", "vision_tower"): fresh, "head": fresh},
    ]
    for rules in some_rules:
        report = replace_layers(multimodal(), rules, exclude="vision_tower", where=nn.Linear)
        assert list(report) == ["head"]


WITHOUT_EFFECT = [
    (
        {"pattern": "layers.*", "exclude": "haed"},
        "exclude 'haed' matches nothing: the model holds 'embed', 'layers[0:4]' (4 Block), 'head'; "
        "'head' matches 1",
    ),
    (
        {"pattern": "layers.*", "exclude": ["layers[0]", "head"]},
        "exclude 'head' has no effect: it matches 1 module, but none of the 4 matched by "
        "'layers.*'",
    ),
    (
        {"pattern": "layers.0", "exclude": "head"},
        "exclude 'head' has no effect: it matches 1 module, but not the one matched by 'layers.0'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_EFFECT)
def test_an_exclude_without_effect_is_an_error(arguments, message):
    with pytest.raises(NoMatchError) as error:
        select(transformer(), **arguments)
    assert str(error.value) == message
    assert select(transformer(), **arguments, strict=False)
