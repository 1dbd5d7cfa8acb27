"""Catch-all rules do for their part what mlx-lm does for the whole; reports say what is left."""

from __future__ import annotations

import json
import re
from typing import Any

import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="mlx_modswap.lm is made of functions of mlx-lm")

import model_folders
import zoo
from mlx_lm import utils

from mlx_modswap import NoMatchError, lm, select

pytestmark = pytest.mark.usefixtures("on_the_cpu")

INSTALLED = zoo.installed()
COMPARABLE = [
    name
    for name in zoo.ARCHITECTURES
    if name in INSTALLED and name not in ("afm7", "muse_spark", "phi3small")
]


class Mixture(nn.Module):
    """A model whose predicate keeps its router at 8 bits, and one layer as it is."""

    def __init__(self, router: dict[str, Any] | None = None):
        super().__init__()
        self.layers = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)]
        self.head, self.odd = nn.Linear(64, 64), nn.Linear(96, 96)
        self._router = {"bits": 8, "group_size": 64} if router is None else router

    @property
    def quant_predicate(self):
        answers = {"layers.0.layers.0": self._router, "layers.1.layers.0": False}
        return lambda path, layer: answers.get(path, True)


def bits(model: nn.Module) -> dict[str, int]:
    return {path: layer.bits for path, layer in model.named_modules() if "scales" in layer}


def shapes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (one.dtype, one.shape) for name, one in model_folders.arrays_of(model).items()}


# Which rules are catch-alls


@pytest.mark.parametrize(
    ("pattern", "is_catch_all"),
    [
        ("**", True),
        ("layers.**", True),
        ("layers[0:2].**", True),
        ("{layers,head}.**", True),
        ("**.layers.**", True),
        (("layers.**", "**"), True),
        ("layers.*.layers.*", False),
        ("**.layers.0", False),
        ("**.*", False),
        (("layers.**", "head"), False),
        (re.compile(r"layers\..*"), False),
    ],
)
def test_a_rule_is_a_catch_all_if_each_of_its_patterns_ends_in_two_stars(pattern, is_catch_all):
    model = Mixture()
    matched = select(model, pattern, where=nn.Linear, strict=False)
    rules: dict[Any, Any] = {("odd", "head"): None} if pattern == "**.*" else {}
    lm.quantize(model, {**rules, pattern: 4}, strict=False)

    inside = {path for path in matched if path not in ("head", "odd")}
    own = {"layers.0.layers.0": 8, "layers.1.layers.0": None} if is_catch_all else {}
    wanted = {path: own.get(path, 4) for path in inside}
    found = bits(model)
    assert {path: found.get(path) for path in inside} == wanted


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_catch_all_for_the_blocks_does_there_what_mlx_lm_does(name):
    ours, theirs = zoo.build(name), zoo.build(name)
    try:
        blocks = lm.layers_path(ours)
    except ValueError:
        pytest.skip("its blocks are not one list")
    before = shapes(ours)
    utils.quantize_model(theirs, {}, None, 4)
    wanted = shapes(theirs)
    inside = {one for one in wanted if one.startswith(f"{blocks}.")}
    if wanted.keys() & inside == before.keys() & inside:
        with pytest.raises(NoMatchError, match=r"quantizes nothing|there is no to_quantized"):
            lm.quantize(ours, {f"{blocks}.**": 4})
        return
    lm.quantize(ours, {f"{blocks}.**": 4})

    outside = {one: before[one] for one in before if not one.startswith(f"{blocks}.")}
    assert shapes(ours) == outside | {one: wanted[one] for one in inside}


# What the report says


def test_the_report_marks_what_the_models_predicate_decided():
    model = Mixture()
    report = lm.quantize(model, {"layers.**": 4, "**": {"bits": 4, "group_size": 32}})

    note = "decided by the model's own quant_predicate"
    assert [line.endswith(f"   {note}") for line in str(report).splitlines()] == [
        *(True, False, False, False),  # the lines below
        *(False, False),  # the total, and what was left
    ]
    assert report.notes == {"layers.0.layers.0": note}
    assert [(one.pattern, one.new) for one in report.changes] == [
        ("layers.0.layers.0", "QuantizedLinear(bits=8)"),
        ("layers[0:3].layers.1", "QuantizedLinear(bits=4)"),
        ("layers.2.layers.0", "QuantizedLinear(bits=4)"),
        ("{head,odd}", "QuantizedLinear(bits=4)"),
    ]


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        (
            {"**": 4},
            [
                "left: 1 layer, 16.6 KB: excluded by the model's own quant_predicate "
                "(layers.1.layers.0)",
                "left: 1 layer, 37.2 KB: groups of 64 do not divide the width 96 (odd)",
            ],
        ),
        (
            {"layers.**": {"bits": 4, "group_size": 128}, "**": {"bits": 4, "group_size": 32}},
            [
                "left: 6 layers, 99.8 KB: groups of 128 do not divide the width 64 "
                "(layers[0:3].layers[0:2])"
            ],
        ),
        ({"layers[1].**": None, "odd": None, "**": 4}, []),
        ({"head": 4}, []),
    ],
)
def test_the_last_lines_of_the_report_name_what_was_left(rules, lines):
    report = lm.quantize(Mixture(), rules)

    assert [line for line in str(report).splitlines() if line.startswith("left:")] == lines
    assert list(map(str, report.left)) == lines
    for line in lines:
        assert f"<p>{line.replace(chr(39), '&#x27;')}</p>" in report._repr_html_()


def test_what_is_left_is_data_whose_patterns_select_it():
    model = Mixture()
    before = {path: layer.parameters() for path, layer in select(model, "**.odd").items()}
    report = lm.quantize(model, {"**": 4})
    what, why, count, nbytes, pattern = report.left[1]

    assert (what, why, count) == ("layers", "groups of 64 do not divide the width 96", 1)
    assert nbytes == 96 * 97 * 4
    assert list(select(model, pattern)) == list(before)


def test_widths_of_one_group_size_share_a_line():
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(48, 8), nn.Linear(64, 8), nn.Linear(96, 8))
    report = lm.quantize(model, {"**": 4})

    assert list(map(str, report.left)) == [
        "left: 3 layers, 7.8 KB: groups of 64 do not divide the widths 48, 96 (layers.{0,1,3})"
    ]


def test_layers_that_are_quantized_already_are_named():
    model: Any = model_folders.llama()
    lm.quantize(model, {"model.layers[0:2].**.q_proj": 3, "model.layers[2].**.q_proj": 4})
    report = lm.quantize(model, {"**.q_proj": 8, "**.{q,k}_proj": 2}, strict=False)

    assert list(map(str, report.left)) == [
        "left: 2 layers, 4.1 KB: already quantized to 3 bits (model.layers[0:2].self_attn.q_proj)",
        "left: 1 layer, 2.6 KB: already quantized to 4 bits (model.layers.2.self_attn.q_proj)",
    ]
    again = lm.quantize(model, {"**.{q,k}_proj": None, "**.v_proj": 4})
    assert again.left == []


def test_other_swaps_leave_nothing():
    from mlx_modswap import replace_layers

    report = replace_layers(Mixture(), "head", lambda path, layer: nn.Identity())

    assert report.left == []
    assert len(str(report).splitlines()) == 1


# Errors


def test_settings_of_the_predicate_that_do_not_fit_are_said_to_be_its_own():
    model = Mixture({"bits": 8, "group_size": 128})
    with pytest.raises(ValueError, match="cannot be quantized") as caught:
        lm.quantize(model, {"**": {"bits": 4, "group_size": 32}})

    assert str(caught.value) == (
        "'layers.0.layers.0' (Linear) cannot be quantized with bits=8, group_size=128: [quantize] "
        "The last dimension of the matrix needs to be divisible by the quantization group size "
        "128. However the provided  matrix has shape (64,64); the model's own quant_predicate asks "
        "for groups of 128, so name this layer in an earlier rule, with settings that fit or with "
        "None (keep)"
    )
    assert bits(model) == {}


def test_a_predicate_without_a_group_size_asks_for_the_usual_groups():
    model = nn.Sequential(nn.Linear(96, 8))
    object.__setattr__(model, "quant_predicate", lambda path, layer: {"bits": 8})
    with pytest.raises(ValueError, match="quant_predicate asks for groups of 64, so"):
        lm.quantize(model, {"**": {"bits": 4, "group_size": 32}})


# mlx-lm's own table


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "olmoe", "rwkv7", "mamba2"])
def test_the_table_of_an_mlx_lm_folder_is_taken_as_rules(name):
    theirs, config = utils.quantize_model(zoo.build(name), {}, None, 4)
    tables = [config["quantization"], lm.quantization_config(theirs)]
    for table in tables:
        ours = zoo.build(name)
        lm.quantize(ours, json.loads(json.dumps(table)))
        model_folders.assert_same_arrays(ours, theirs)


def test_false_leaves_a_layer_alone():
    by_table: Any = model_folders.llama()
    by_rules = model_folders.llama()
    table = {
        "group_size": 32,
        "bits": 4,
        "model.norm": False,
        "lm_head": False,
        "model.layers.0.self_attn.q_proj": True,
        "model.embed_tokens": {"bits": 8, "group_size": 64},
    }
    lm.quantize(by_table, table)
    lm.quantize(
        by_rules, {"lm_head": False, "model.embed_tokens": 8, "**": {"bits": 4, "group_size": 32}}
    )

    model_folders.assert_same_arrays(by_table, by_rules)
    assert "scales" not in by_table.lm_head


def test_a_table_of_another_model_is_an_error():
    with pytest.raises(NoMatchError) as caught:
        lm.quantize(model_folders.llama(), {"group_size": 64, "bits": 4, "model.h.0": {"bits": 8}})

    assert str(caught.value).startswith("'model.h.0' matches nothing")


# Messages do not speak of a `where` that nobody has passed


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"**.input_layernorm": 4},
            "there is no to_quantized in all 4 modules that '**.input_layernorm' matches: 4 "
            "RMSNorm",
        ),
        (
            {"**.mlp": 4, "**": 4},
            "rule '**.mlp' never applies: there is no to_quantized in all 4 modules that it "
            "matches: 4 MLP; '**.mlp.**' matches 12",
        ),
        (
            {"model.norm": None, "**": 4},
            "rule 'model.norm' has no effect: there is no to_quantized in the only module that it "
            "matches: RMSNorm; remove it",
        ),
        (
            {"model.layers.*.**": 4, "model.layers[0].**": 8, "**": 4},
            "rule 'model.layers[0].**' never applies: earlier rules already match all 7 of its "
            "modules that can be quantized; remove it, or move it up",
        ),
    ],
)
def test_rules_for_what_cannot_be_quantized(rules, message):
    with pytest.raises(NoMatchError) as caught:
        lm.quantize(model_folders.llama(), rules)

    assert str(caught.value) == message
