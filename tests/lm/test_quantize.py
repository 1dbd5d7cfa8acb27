"""``lm.quantize`` and ``lm.quantization_config``: rules in, quantized layers out."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import model_folders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model

from mlx_modswap import NoMatchError, PatternError, SelectionError, lm, select

pytestmark = pytest.mark.usefixtures("on_the_cpu")

WIDTH_96 = [f"model.layers.{n}.mlp.down_proj" for n in range(4)]


@pytest.fixture
def llama() -> Any:
    return model_folders.llama()


def settings(model: nn.Module) -> dict[str, str]:
    """Bits, group size and mode of every quantized layer, such as ``'4 64 affine'``."""
    return {
        path: f"{layer.bits} {layer.group_size} {layer.mode}"
        for path, layer in model.named_modules()
        if "scales" in layer
    }


def quantizable(model: nn.Module) -> dict[str, Any]:
    return select(model, "**", where=lambda path, layer: hasattr(layer, "to_quantized"))


# What a rule does


@pytest.mark.parametrize(
    ("rules", "keywords", "expected"),
    [
        ({"**.q_proj": 8}, {}, {"**.q_proj": "8 64 affine"}),
        ({"**.q_proj": 3}, {"group_size": 32}, {"**.q_proj": "3 32 affine"}),
        ({"**.q_proj": 4}, {"mode": "mxfp4"}, {"**.q_proj": "4 32 mxfp4"}),
        ({"**.q_proj": {"mode": "mxfp8"}}, {}, {"**.q_proj": "8 32 mxfp8"}),
        ({"**.q_proj": 1}, {}, {"**.q_proj": "1 64 affine"}),
        ({"**.q_proj": {}}, {}, {"**.q_proj": "4 64 affine"}),
        ({"**.q_proj": {"bits": 8, "group_size": None}}, {}, {"**.q_proj": "8 64 affine"}),
        ({"**.down_proj": {"bits": 6, "group_size": 32}}, {}, {"**.down_proj": "6 32 affine"}),
        (
            {"**.q_proj": {"mode": "nvfp4"}, "**.k_proj": 8},
            {"group_size": 32},  # is not meant for another mode
            {"**.q_proj": "4 16 nvfp4", "**.k_proj": "8 32 affine"},
        ),
        (
            {"model.layers[0].**": 8, "**.v_proj": 2},
            {"group_size": 32},
            {"model.layers[0].**": "8 32 affine", "model.layers[1:].**.v_proj": "2 32 affine"},
        ),
        (
            {"**.{q,k}_proj": None, "**.self_attn.*": 4},
            {},
            {"**.{v,o}_proj": "4 64 affine"},
        ),
        (
            {"model.layers[1:]": None, "**.self_attn.*": 4},
            {},
            {"model.layers[0].self_attn.*": "4 64 affine"},
        ),
        (
            {("lm_head", "model.embed_tokens"): 8, "**.up_proj": 4},
            {},
            {
                "lm_head": "8 64 affine",
                "model.embed_tokens": "8 64 affine",
                "**.up_proj": "4 64 affine",
            },
        ),
    ],
)
def test_the_first_rule_that_matches_decides(llama, rules, keywords, expected):
    wanted = {
        path: told
        for pattern, told in expected.items()
        for path, layer in select(llama, pattern).items()
        if hasattr(layer, "to_quantized")
    }
    report = lm.quantize(llama, rules, **keywords)

    assert settings(llama) == wanted
    assert set(report) == set(wanted)


def test_the_catch_all_rule_skips_widths_that_the_group_size_does_not_divide(llama):
    report = lm.quantize(llama, {"**": 4})

    assert set(quantizable(llama)) == set(WIDTH_96)
    assert len(report) == 26


def test_a_rule_that_is_not_the_catch_all_decides_against_the_model_and_for_other_groups():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.up, self.down = (nn.Linear(64, 64) for _ in range(3))

        @property
        def quant_predicate(self):
            return lambda path, layer: {"router": {"bits": 8}, "up": True, "down": False}[path]

    by_model, by_rule = Model(), Model()
    lm.quantize(by_model, {"**": {"bits": 3, "group_size": 32}})
    lm.quantize(by_rule, {"{router,down}": 2, "**": {"bits": 3, "group_size": 32}})

    assert settings(by_model) == {"router": "8 64 affine", "up": "3 32 affine"}
    assert settings(by_rule) == {
        "router": "2 64 affine",
        "up": "3 32 affine",
        "down": "2 64 affine",
    }


def test_the_predicate_of_a_model_is_asked_about_path_and_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128)
            self.quant_predicate = lambda path, layer: path == "up" or "bias" not in layer

    model = Model()
    lm.quantize(model, {"**": 4})

    assert settings(model) == {"up": "4 64 affine"}


class Packed(nn.Module):
    """A layer with the attributes of a quantized one that are given."""

    def __init__(self, **attributes: Any):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Packing(nn.Module):
    """A layer whose `to_quantized` takes any keywords."""

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros((64, 64))

    def to_quantized(self, bits: int, **keywords: Any) -> nn.Module:
        return Packed(scales=mx.zeros((64, 1)), bits=bits, **keywords)


def test_a_layer_that_takes_any_keywords_gets_all_of_them():
    model = nn.Sequential(Packing())
    lm.quantize(model, {"**": {"bits": 4, "axis": 1}})

    assert (model.layers[0].bits, model.layers[0].axis) == (4, 1)


def test_the_catch_all_rule_skips_what_holds_modules_as_mlx_does():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inner = mx.zeros((64, 64)), nn.Linear(64, 64)

        def to_quantized(self, **keywords):
            return nn.Identity()

    by_rules, by_mlx = nn.Sequential(Pair()), nn.Sequential(Pair())
    lm.quantize(by_rules, {"**": 4})
    nn.quantize(by_mlx)

    assert settings(by_rules) == settings(by_mlx) == {"layers.0.inner": "4 64 affine"}


def test_inputs_are_quantized_where_a_rule_asks_for_it(llama):
    settings = {"mode": "nvfp4", "quantize_input": True}
    lm.quantize(llama, {"**.q_proj": settings, "**.k_proj": {**settings, "quantize_input": False}})
    config = lm.quantization_config(llama)

    assert type(llama.model.layers[0].self_attn.q_proj) is nn.QQLinear
    assert type(llama.model.layers[0].self_attn.k_proj) is nn.QuantizedLinear
    assert config["model.layers.0.self_attn.q_proj"] == {
        "group_size": 16,
        "bits": 4,
        "mode": "nvfp4",
        "quantize_input": True,
    }


def test_a_layer_that_cannot_quantize_its_inputs_may_be_told_not_to():
    model = nn.Sequential(SwitchLinear(64, 64, 2, bias=False))
    lm.quantize(model, {"**": {"bits": 4, "quantize_input": False}})

    assert settings(model) == {"layers.0": "4 64 affine"}


def test_layers_that_are_quantized_stay_when_others_are_quantized(llama):
    lm.quantize(llama, {"**.q_proj": 8})
    before = select(llama, "**.q_proj")
    lm.quantize(llama, {"**": 4})

    assert all(layer is before[path] for path, layer in select(llama, "**.q_proj").items())
    assert set(settings(llama).values()) == {"8 64 affine", "4 64 affine"}


def test_tied_layers_stay_tied():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    lm.quantize(model, {"**": 4})

    assert model.layers[0] is model.layers[2]
    assert list(lm.quantization_config(model)) == [
        *("group_size", "bits", "mode"),
        *("layers.0", "layers.2"),
    ]


def test_no_rule_may_do_nothing_unless_it_is_not_strict(llama):
    with pytest.raises(NoMatchError):
        lm.quantize(llama, {"**.w1": 8, "**.q_proj": 4})
    assert settings(llama) == {}

    lm.quantize(llama, {"**.w1": 8, "**.q_proj": 4}, strict=False)
    assert set(settings(llama)) == set(select(llama, "**.q_proj"))


PATTERNS = ["**", "**.q_proj", "**.{k,v}_proj", "model.layers[1]", "model.layers[:2]", "lm_head"]
PATTERNS += ["**.mlp.**", "model.layers[2:].**", "model", "**.self_attn", "**.down_proj"]
VALUES = [None, 4, 8, {"bits": 2, "group_size": 32}, {"mode": "mxfp8"}]


@given(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from(VALUES), min_size=1))
def test_any_rules_do_to_each_layer_what_the_first_of_them_says(rules):
    model = model_folders.llama()
    wanted = {path: told for path, told in told_by_first(model, rules).items() if told}
    if any(wanted.get(path, "").endswith("64 affine!") for path in WIDTH_96):
        with pytest.raises(ValueError, match="do not divide the width"):
            lm.quantize(model, rules, strict=False)
        assert settings(model) == {}
    else:
        lm.quantize(model, rules, strict=False)
        assert settings(model) == {path: told.rstrip("!") for path, told in wanted.items()}


def told_by_first(model: nn.Module, rules: dict[str, Any]) -> dict[str, str]:
    """The settings of the first rule that matches a layer; with a ``!`` if it is no catch-all."""
    matched = {pattern: set(select(model, pattern)) for pattern in rules}
    told = {}
    for path, layer in quantizable(model).items():
        parts = path.split(".")
        above = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        for pattern, value in rules.items():
            if value is None and above & matched[pattern]:
                break
            if value is not None and path in matched[pattern]:
                value: dict[str, Any] = {"bits": value} if isinstance(value, int) else value
                mode = value.get("mode", "affine")
                group_size = value.get("group_size", {"affine": 64, "mxfp8": 32}[mode])
                if not pattern.endswith("**") or layer.weight.shape[-1] % group_size == 0:
                    end = "" if pattern.endswith("**") else "!"
                    told[path] = f"{value.get('bits', 8)} {group_size} {mode}{end}"
                break
    return told


# Errors: one that says what was there, and the model as it was


@pytest.mark.parametrize(
    ("rules", "keywords", "error", "message"),
    [
        (
            {"**.down_proj": 4},
            {},
            ValueError,
            "rule '**.down_proj' asks for groups of 64, which do not divide the width of "
            "model.layers[0:4].mlp.down_proj (96); use a group_size (--q-group-size) of 32, or "
            "leave these layers alone with None (keep)",
        ),
        (
            {"**.{q,down}_proj": 4},
            {},
            ValueError,
            "rule '**.{q,down}_proj' asks for groups of 64, which do not divide the width of "
            "model.layers[0:4].mlp.down_proj (96); use a group_size (--q-group-size) of 32, or "
            "leave these layers alone with None (keep)",
        ),
        (
            {"**.{q,down}_proj": {"group_size": 128}},
            {},
            ValueError,
            "rule '**.{q,down}_proj' asks for groups of 128, which do not divide the width of "
            "model.layers[0:4].self_attn.q_proj (64), model.layers[0:4].mlp.down_proj (96); "
            "use a group_size (--q-group-size) of 32, or leave these layers alone with None (keep)",
        ),
        (
            {
                "**.down_proj": {"group_size": 32},
                "model.layers[0]": None,
                "**.layers.*.*.*_proj": {"group_size": 128},
            },
            {},
            ValueError,
            "rule '**.layers.*.*.*_proj' asks for groups of 128, which do not divide the width of "
            "model.layers[1:4].self_attn.{q,k,v,o}_proj, model.layers[1:4].mlp.{gate,up}_proj "
            "(64); use a group_size (--q-group-size) of 64 or 32, or leave these layers alone "
            "with None (keep)",
        ),
        (
            {"**.q_proj": 7},
            {},
            ValueError,
            "'model.layers.0.self_attn.q_proj' (Linear) cannot be quantized with group_size=64, "
            "bits=7, mode='affine': [quantize] The requested number of bits 7 is not supported. "
            "The supported bits are 1, 2, 3, 4, 5, 6 and 8.",
        ),
        (
            {"**": 7},
            {},
            ValueError,
            "'model.embed_tokens' (Embedding) cannot be quantized with group_size=64, bits=7, "
            "mode='affine': [quantize] The requested number of bits 7 is not supported. The "
            "supported bits are 1, 2, 3, 4, 5, 6 and 8.",
        ),
        (
            {"**.q_proj": {"group_size": 1}},
            {},
            ValueError,
            "'model.layers.0.self_attn.q_proj' (Linear) cannot be quantized with group_size=1, "
            "bits=4, mode='affine': [quantize] The requested group size 1 is not supported. The "
            "supported group sizes are 32, 64, and 128.",
        ),
        (
            {"**.q_proj": {"bit": 4, "groups": 32}},
            {},
            TypeError,
            "'model.layers.0.self_attn.q_proj' (Linear) cannot be quantized: its to_quantized "
            "takes group_size, bits, mode, quantize_input, not 'bit', 'groups'",
        ),
        (
            {"**.q_proj": "4"},
            {},
            TypeError,
            "rule '**.q_proj' must be a number of bits, a mapping of keywords of to_quantized, "
            "or None, not '4'",
        ),
        (
            {"**.q_proj": True},
            {},
            TypeError,
            "rule '**.q_proj' must be a number of bits, a mapping of keywords of to_quantized, "
            "or None, not True",
        ),
        (
            {"**.q_proj": 4},
            {"mode": "int4"},
            ValueError,
            "mode must be 'affine', 'mxfp4', 'nvfp4' or 'mxfp8', not 'int4'",
        ),
        (
            ["**"],
            {},
            TypeError,
            "rules must map patterns to bits, to keywords of to_quantized or to None, not a list "
            "of 1",
        ),
        (
            nn.Linear(1, 1),
            {},
            TypeError,
            "rules must map patterns to bits, to keywords of to_quantized or to None, not a module "
            "(Linear)",
        ),
        (
            {"**.q_proj": {"bits": 4, "group_size": "32"}},
            {},
            TypeError,
            "group_size of rule '**.q_proj' must be an int of 1 or more, not '32'",
        ),
        (
            {"**.q_proj": 4},
            {"group_size": 0},
            TypeError,
            "group_size of rule '**.q_proj' must be an int of 1 or more, not 0",
        ),
        (
            {("**.q_proj", "**.k_proj"): -4},
            {},
            TypeError,
            "bits of rule ['**.q_proj', '**.k_proj'] must be an int of 1 or more, not -4",
        ),
        (
            {"**": 4},
            {"group_size": 128},
            NoMatchError,
            "rule '**' quantizes nothing: groups of 128 do not divide the widths 64, 96 (30 "
            "layers); name the layers in a rule of their own, with a group_size that fits",
        ),
    ],
)
def test_an_error_says_what_was_wrong_and_changes_nothing(llama, rules, keywords, error, message):
    before = {path: id(module) for path, module in llama.named_modules()}
    with pytest.raises(error) as caught:
        lm.quantize(llama, rules, **keywords)

    assert str(caught.value) == message
    assert {path: id(module) for path, module in llama.named_modules()} == before


@pytest.mark.parametrize(
    ("width", "group_size", "advice"),
    [
        (
            384,
            256,
            "use a group_size (--q-group-size) of 128 or 64 or 32, or leave these layers alone "
            "with None (keep)",
        ),
        (48, 64, "no supported group size does, so leave these layers alone with None (keep)"),
    ],
)
def test_an_error_of_widths_names_the_group_sizes_that_fit(width, group_size, advice):
    with pytest.raises(ValueError, match="do not divide") as caught:
        lm.quantize(nn.Sequential(nn.Linear(width, 8)), {"layers[0]": 4}, group_size=group_size)

    assert str(caught.value) == (
        f"rule 'layers[0]' asks for groups of {group_size}, which do not divide the width of "
        f"layers.0 ({width}); {advice}"
    )


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"**.v_proj": 8, "**.q_proj": 8}, "rule '**.q_proj' has nothing to quantize: "),
        ({"**.{q,v}_proj": 8, "**.q_proj": 8}, "rule '**.q_proj' never applies: earlier rules "),
        (
            {"model.layers[0].self_attn.q_proj": None, "**.q_proj": 8},
            "rule '**.q_proj' has nothing to quantize: ",
        ),
        ({"**.input_layernorm": 8}, "there is no to_quantized in all 4 modules that "),
    ],
)
def test_the_rule_that_matches_only_quantized_layers_is_named(llama, rules, told):
    lm.quantize(llama, {"**.q_proj": 4})
    with pytest.raises(NoMatchError) as caught:
        lm.quantize(llama, rules)

    assert str(caught.value).startswith(told)


def test_an_error_for_a_model_that_is_quantized_already_asks_for_the_original(llama):
    lm.quantize(llama, {"**": 4})
    with pytest.raises(NoMatchError) as one:
        lm.quantize(llama, {"**.q_proj": 8})
    with pytest.raises(NoMatchError) as other:
        lm.quantize(llama, {"**": 8})

    assert str(one.value) == (
        "rule '**.q_proj' has nothing to quantize: the layers that it matches (4) are "
        "already quantized and are left unchanged; start from the original model"
    )
    assert str(other.value) == (
        "rule '**' quantizes nothing: already quantized to 4 bits (26 layers), groups of 64 do "
        "not divide the width 96 (4 layers); start from the original model"
    )


def test_an_error_says_that_the_model_itself_keeps_its_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 64)
            self.quant_predicate = lambda path, layer: False

    with pytest.raises(NoMatchError) as caught:
        lm.quantize(Model(), {"**": 4})
    assert str(caught.value) == (
        "rule '**' quantizes nothing: excluded by the model's own quant_predicate (1 layer); name "
        "the layers in a rule of their own, with a group_size that fits"
    )


def test_errors_of_the_core_come_through(llama):
    layer = nn.Linear(64, 64)
    with pytest.raises(PatternError):
        lm.quantize(llama, {"model.layers.[0]": 4})
    with pytest.raises(SelectionError):
        lm.quantize(nn.Sequential(layer, layer), {"layers[0]": 4, "layers[1]": 8})


# The config


def test_the_config_has_the_most_frequent_settings_and_those_of_each_layer(llama):
    lm.quantize(llama, {"**.o_proj": 8, "**.self_attn.*": {"bits": 2, "group_size": 32}})
    config = lm.quantization_config(llama)

    assert list(config.items())[:3] == [("group_size", 32), ("bits", 2), ("mode", "affine")]
    assert list(config)[3:] == list(select(llama, "**.self_attn.*_proj"))
    assert config["model.layers.0.self_attn.q_proj"] == {
        "group_size": 32,
        "bits": 2,
        "mode": "affine",
    }
    assert json.loads(json.dumps(config)) == config


def test_the_config_of_one_setting_has_the_global_entries_of_mlx_lm(llama):
    _, config = quantize_model(model_folders.llama(), {}, None, 4)
    lm.quantize(llama, {"**": 4})
    ours = lm.quantization_config(llama)

    assert {key: ours[key] for key in config["quantization"]} == config["quantization"]


def test_a_model_without_quantized_layers_has_no_such_config(llama):
    with pytest.raises(ValueError, match=r"^no layer of the model is quantized; see \S+quantize$"):
        lm.quantization_config(llama)


def test_the_experts_of_a_tensor_scale_keep_it_in_the_config():
    model = nn.Sequential(SwitchLinear(64, 64, 2, bias=False))
    lm.quantize(model, {"**": {"mode": "nvfp4", "global_scale": True}})

    assert lm.quantization_config(model)["layers.0"]["global_scale"] is True


def test_the_config_lists_layers_with_scales_and_bits_and_a_group_size():
    scales = {"scales": mx.zeros((4, 1))}
    model = nn.Sequential(
        Packed(**scales, group_size=32, bits=5),
        Packed(**scales),
        Packed(**scales, group_size=32),
        Packed(**scales, bits=4),
        Packed(group_size=32, bits=4),
    )
    assert lm.quantization_config(model) == {
        "group_size": 32,
        "bits": 5,
        "mode": "affine",
        "layers.0": {"group_size": 32, "bits": 5, "mode": "affine"},
    }
