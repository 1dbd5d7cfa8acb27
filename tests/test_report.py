"""The picture of a replacement is short, true, and made of patterns that work."""

from __future__ import annotations

import gc
import random
import re
import weakref
from itertools import product as each_of
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Leaf, Net, swaps

from mlx_modswap import Replacement, Wrapper, replace_layers, select, tree
from mlx_modswap._fold import fold, pattern_of, segments
from mlx_modswap._hints import outline
from mlx_modswap._report import number, size


class LoRA(nn.Module):
    def __init__(self, linear: Any, rank: int = 4):
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.linear = linear
        self.lora_a = mx.zeros((inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))


class Attention(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dims, dims) for _ in range(3))


class Model(nn.Module):
    def __init__(self, layers: int = 4, dims: int = 64):
        super().__init__()
        self.embed = nn.Embedding(100, dims)
        self.layers = [Net() for _ in range(layers)]
        for layer in self.layers:
            layer.self_attn = Attention(dims)
            layer.norm = nn.RMSNorm(dims)


def lora(path: str, layer: nn.Module) -> nn.Module:
    return LoRA(layer)


def nothing(path: str, layer: nn.Module) -> nn.Module:
    return nn.Identity()


def holding(**held: Any) -> Any:
    module = nn.Module()
    for name, value in held.items():
        setattr(module, name, value)
    return module


def places_of(replacement: Replacement) -> list[str]:
    """The patterns that stand at the beginning of each line."""
    return [row[0] for row in replacement._rows()]


def read(place: str) -> Any:
    """The pattern that was printed."""
    if place.startswith("re.compile("):
        return re.compile(eval(place.removeprefix("re.compile(").removesuffix(")")))
    return place


# ---------------------------------------------------------------- whole texts


def test_adapters_in_a_frozen_model_in_bfloat16():
    model = Model()
    model.set_dtype(mx.bfloat16)
    model.freeze()
    assert str(replace_layers(model, "**.self_attn.{q,v}_proj", lora)) == (
        "layers[0:4].self_attn.{q,v}_proj   Linear -> LoRA   x8   33.3K -> 37.4K params"
        "   0 -> 4.1K trainable   66.6 KB -> 82.9 KB   bfloat16 -> bfloat16, float32"
    )


def test_quantization_keeps_the_number_of_parameters():
    model = Model()
    rules = {
        "layers[-1].**": None,
        "embed": lambda path, layer: layer.to_quantized(bits=8),
        "**": lambda path, layer: layer.to_quantized(bits=4),
    }
    where = (nn.Linear, nn.Embedding)
    assert str(replace_layers(model, rules, where=where)).splitlines() == [
        "embed                                Embedding -> QuantizedEmbedding(bits=8)   x1"
        "   6.4K params    25.6 KB -> 7.2 KB     float32 -> float32, uint32",
        "layers[0:3].self_attn.{q,k,v}_proj   Linear -> QuantizedLinear(bits=4)         x9"
        "   37.4K params   149.8 KB -> 25.3 KB   float32 -> float32, uint32",
    ]


def test_trainable_parameters_are_told_where_they_are_not_what_one_expects():
    def half_frozen(path: str, layer: nn.Module) -> nn.Module:
        new = nn.Linear(64, 64)
        new.freeze(keys="weight")
        return new

    assert str(replace_layers(Model(), "layers[0].self_attn.q_proj", half_frozen)) == (
        "layers.0.self_attn.q_proj   Linear   x1   4.2K params   4.2K -> 64 trainable"
        "   16.6 KB   float32"
    )


class Bare(nn.Module):
    """Does not call ``super().__init__()``."""

    def __init__(self):
        self.weight = mx.zeros((4,))


class Unlike(Bare):
    pass


class Scaled(nn.Module):
    def __init__(self, bits: Any):
        super().__init__()
        self.bits = bits
        self.scales = mx.zeros((2,))
        self.weight = mx.zeros((4,))


def frozen(module: Any) -> Any:
    return module.freeze()


def with_bits(module: Any) -> Any:
    module.bits = 4
    return module


# What stands in the columns for an old module that becomes a Linear of two parameters, 8 bytes.
COUNTED = [
    (lambda: nn.Linear(2, 2), "Linear   x1   6 -> 2 params   24 B -> 8 B   float32"),
    (
        lambda: nn.QuantizedLinear(32, 2, group_size=32, bits=4),
        "QuantizedLinear(bits=4) -> Linear   x1   66 -> 2 params   0 -> 2 trainable"
        "   56 B -> 8 B   float32, uint32 -> float32",
    ),
    (
        lambda: frozen(nn.Linear(2, 2)),
        "Linear   x1   6 -> 2 params   0 -> 2 trainable   24 B -> 8 B   float32",
    ),
    (
        lambda: holding(_private=mx.zeros(3), weight=mx.zeros(4), other=mx.zeros(5, mx.int8)),
        "Module -> Linear   x1   9 -> 2 params   21 B -> 8 B   float32, int8 -> float32",
    ),
    (
        lambda: holding(_private=[mx.zeros(3)], parts={"a": [mx.zeros(4)]}),
        "Module -> Linear   x1   4 -> 2 params   16 B -> 8 B   float32",
    ),
    (
        lambda: holding(_child=nn.Linear(2, 2), child=nn.Linear(2, 2)),
        "Module -> Linear   x1   6 -> 2 params   24 B -> 8 B   float32",
    ),
    (
        lambda: holding(inner=with_bits(nn.Linear(2, 2)), weight=mx.zeros(1)),
        "Module -> Linear   x1   7 -> 2 params   28 B -> 8 B   float32",
    ),
    (
        lambda: holding(a=nn.Linear(2, 2), b=nn.RMSNorm(3), c=holding(d=nn.RMSNorm(4))),
        "Module -> Linear   x1   13 -> 2 params   52 B -> 8 B   float32",
    ),
    (
        lambda: holding(parts=[mx.zeros(2), mx.zeros(3)], a=mx.zeros(4)).freeze(keys="parts"),
        "Module -> Linear   x1   9 -> 2 params   4 -> 2 trainable   36 B -> 8 B   float32",
    ),
    (
        lambda: holding(parts={"b": mx.zeros(2)}, a=mx.zeros(4)).freeze(keys="parts.b"),
        "Module -> Linear   x1   6 -> 2 params   4 -> 2 trainable   24 B -> 8 B   float32",
    ),
    (Bare, "Bare -> Linear   x1   4 -> 2 params   16 B -> 8 B   float32"),
    (
        lambda: with_bits(nn.Linear(2, 2)),
        "Linear   x1   6 -> 2 params   24 B -> 8 B   float32",
    ),
    (
        lambda: Scaled(1),
        "Scaled(bits=1) -> Linear   x1   128 -> 2 params   24 B -> 8 B   float32",
    ),
    (
        lambda: Scaled(32),
        "Scaled(bits=32) -> Linear   x1   4 -> 2 params   24 B -> 8 B   float32",
    ),
    (lambda: Scaled(33), "Scaled -> Linear   x1   6 -> 2 params   24 B -> 8 B   float32"),
    (lambda: Scaled(0), "Scaled -> Linear   x1   6 -> 2 params   24 B -> 8 B   float32"),
    (lambda: Scaled("4"), "Scaled -> Linear   x1   6 -> 2 params   24 B -> 8 B   float32"),
]


@pytest.mark.parametrize(("build", "line"), COUNTED)
def test_what_is_counted_in_a_module(build, line):
    model = nn.Sequential(build())
    report = replace_layers(model, "layers.0", lambda path, layer: nn.Linear(1, 1))
    assert str(report) == f"layers.0   {line}"


@pytest.mark.parametrize(("build", "line"), COUNTED)
def test_what_is_counted_in_a_module_beside_plain_ones(build, line):
    model = nn.Sequential(Unlike(), nn.Embedding(3, 3), build())
    report = replace_layers(model, "layers.*", lambda path, layer: nn.Linear(1, 1))
    last = str(report).splitlines()[2]
    assert last.split() == ["layers.2", *line.split()]


def test_digits_that_are_keys_are_no_indices():
    model = holding(by_key={"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)}, by_index=[nn.Linear(2, 2)])
    assert places_of(replace_layers(model, "by_index.*", nothing)) == ["by_index.0"]
    assert places_of(replace_layers(model, "by_key.*", nothing)) == ["by_key.{0,1}"]


def test_columns_that_say_nothing_are_left_out():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert str(replace_layers(model, "**", lambda path, layer: nn.Tanh(), where=nn.ReLU)) == (
        "layers.{0,2}   ReLU -> Tanh   x2"
    )


def test_what_is_taken_out_leaves_no_arrays():
    assert str(replace_layers(Model(), "layers[::2].norm", nothing)) == (
        "layers.{0,2}.norm   RMSNorm -> Identity   x2   128 -> 0 params   512 B -> 0 B"
        "   float32 -> no arrays"
    )


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (12, "layers.0   Big   x1   10.0M + 12 params   20.0 MB + 24 B   float16"),
        (-12, "layers.0   Big   x1   10.0M - 12 params   20.0 MB - 24 B   float16"),
    ],
)
def test_a_small_change_of_a_big_number_is_visible(more, line):
    class Big(nn.Module):
        def __init__(self, more: int = 0):
            super().__init__()
            self.weight = mx.zeros((10_000_000 + more,), mx.float16)

    model = nn.Sequential(Big())
    assert str(replace_layers(model, "**", lambda path, layer: Big(more))) == line


def test_a_tied_module_counts_once():
    model = Net()
    model.a = model.b = nn.Linear(2, 2)
    assert str(replace_layers(model, "*", lambda path, layer: nn.Linear(2, 2, bias=False))) == (
        "{a,b}   Linear   x2   6 -> 4 params   24 B -> 16 B   float32"
    )


def test_a_swap_of_nothing():
    report = replace_layers(Model(), "**", lambda path, layer: layer)
    assert (str(report), report._repr_html_()) == ("nothing changed", "<p>nothing changed</p>")


def test_digit_keys_of_a_dict_that_holds_no_modules_do_not_matter():
    model = Model()
    model.settings = {"0": None, "1": nn.gelu}
    assert str(replace_layers(model, "**.q_proj", nothing)).startswith("layers[0:4].self_attn.q")


def test_digit_keys_of_a_dict_are_no_indices():
    model = holding(keyed={str(n): nn.ReLU() for n in range(3)})
    assert str(replace_layers(model, "**", nothing)) == "keyed.{0,1,2}   ReLU -> Identity   x3"


def test_arrays_that_hold_other_numbers_are_no_layers_with_digit_keys():
    model = holding(layers=[nn.Module() for _ in range(10)])
    for layer in model.layers:
        layer["0"] = mx.zeros(1)
    assert str(replace_layers(model, "**", nothing)).startswith("layers[0:10]   Module -> Identity")


def test_of_many_layers_each_keeps_its_own_dtype():
    model = holding(layers=[nn.Linear(1, 1, bias=False) for _ in range(2000)])
    for layer in model.layers[:1000]:
        layer.set_dtype(mx.float16)
    assert str(replace_layers(model, "layers.*", nothing)).splitlines() == [
        "layers[0:1000]      Linear -> Identity   x1000   1.0K -> 0 params   2.0 KB -> 0 B   "
        "float16 -> no arrays",
        "layers[1000:2000]   Linear -> Identity   x1000   1.0K -> 0 params   4.0 KB -> 0 B   "
        "float32 -> no arrays",
    ]


def test_what_differs_has_a_line_of_its_own():
    def linear(dtype: mx.Dtype) -> nn.Module:
        layer = nn.Linear(1, 1)
        layer.set_dtype(dtype)
        return layer

    swaps = [
        (nn.ReLU(), nn.Identity()),
        (nn.Tanh(), nn.Identity()),
        (nn.ReLU(), nn.Identity()),
        (nn.ReLU(), nn.GELU()),
        (linear(mx.float32), nn.GELU()),
        (linear(mx.float16), nn.GELU()),
        (nn.ReLU(), linear(mx.float32)),
        (nn.ReLU(), linear(mx.float16)),
    ]
    model, news = nn.Sequential(*(old for old, _ in swaps)), iter(new for _, new in swaps)
    assert str(replace_layers(model, "layers.*", lambda *_: next(news))).splitlines() == [
        "layers.{0,2}   ReLU -> Identity   x2",
        "layers.1       Tanh -> Identity   x1",
        "layers.3       ReLU -> GELU       x1",
        "layers.4       Linear -> GELU     x1   2 -> 0 params   8 B -> 0 B   float32 -> no arrays",
        "layers.5       Linear -> GELU     x1   2 -> 0 params   4 B -> 0 B   float16 -> no arrays",
        "layers.6       ReLU -> Linear     x1   0 -> 2 params   0 B -> 8 B   no arrays -> float32",
        "layers.7       ReLU -> Linear     x1   0 -> 2 params   0 B -> 4 B   no arrays -> float16",
    ]


@pytest.mark.parametrize(
    ("rows", "end", "end_of_table"),
    [
        (100, "a99.b99   ReLU -> Identity   x1", "<td>x1</td></tr></table>"),
        (101, "... 1 more", "<td>x1</td></tr></table><p>... 1 more</p>"),
        (120, "... 20 more", "<td>x1</td></tr></table><p>... 20 more</p>"),
    ],
)
def test_a_long_picture_is_cut(rows, end, end_of_table):
    model = Net()
    for n in range(rows):
        setattr(model, f"a{n}.b{n}", nn.ReLU())
    replacement = replace_layers(model, "**", nothing)
    lines, table = str(replacement).splitlines(), replacement._repr_html_()
    assert len(lines) == min(rows, 101)
    assert lines[-1] == end
    assert table.count("<tr>") == 100
    assert table.endswith(end_of_table)


def test_a_notebook_gets_a_table_in_which_nothing_is_markup():
    model = Net()
    setattr(model, "<b>&", Leaf())
    model.act = nn.ReLU()
    assert replace_layers(model, "*", nothing)._repr_html_() == (
        "<table><tr><td>&lt;b&gt;&amp;</td><td>Leaf -&gt; Identity</td><td>x1</td>"
        "<td>1 -&gt; 0 params</td><td>4 B -&gt; 0 B</td>"
        "<td>float32 -&gt; no arrays</td></tr>"
        "<tr><td>act</td><td>ReLU -&gt; Identity</td><td>x1</td>"
        "<td></td><td></td><td></td></tr></table>"
    )


@pytest.mark.parametrize(
    ("count", "as_number", "as_size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1_000, "1.0K", "1.0 KB"),
        (999_949, "999.9K", "999.9 KB"),
        (999_950, "1.0M", "1.0 MB"),
        (12_345_678, "12.3M", "12.3 MB"),
        (7_000_000_000, "7.0B", "7.0 GB"),
        (1_500_000_000_000, "1.5T", "1.5 TB"),
        (4_000_000_000_000_000, "4000.0T", "4000.0 TB"),
    ],
)
def test_big_numbers_are_short(count, as_number, as_size):
    assert (number(count), size(count)) == (as_number, as_size)


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        (["a"], ["a"]),
        (["a.0.b", "a.1.b", "a.2.b"], ["a[0:3].b"]),
        (["a.0.b", "a.2.b", "a.4.b"], ["a[0:5:2].b"]),
        (["a.0.b", "a.2.b"], ["a.{0,2}.b"]),
        (["a.7"], ["a.7"]),
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], ["a[0:2][0:2]"]),
        (["a.0.q_proj", "a.0.v_proj", "a.1.q_proj", "a.1.v_proj"], ["a[0:2].{q,v}_proj"]),
        (["a.0.q", "a.0.k", "a.1.q"], ["a[0:2].q", "a.0.k"]),
        (["conv1", "conv2"], ["conv{1,2}"]),
        (["norm", "norm1"], ["{norm,norm1}"]),
        (["w_in", "w_out", "w_up"], ["w_{in,out,up}"]),
        (["gate_up_proj", "gate_down_proj"], ["gate_{up,down}_proj"]),
        (["encoder", "decoder"], ["{encoder,decoder}"]),
        (["a_a", "a_a_a"], ["a_{a,a_a}"]),
        (["st*r", "stir"], [r"re.compile('st\\*r')", "stir"]),
        (["a.0.x[1]", "a.1.x[1]"], [r"re.compile('a\\.(0|1)\\.x\\[1\\]')"]),
        (["line\nbreak"], [r"re.compile('line\\\nbreak')"]),
        (["a.", "b."], [r"re.compile('(a|b)\\.')"]),
        (
            [f"a.{n}" for n in (*range(3, 40), 50, 52, *range(60, 99))],
            ["a[3:40]", "a[60:99]", "a.{50,52}"],
        ),
        (
            [f"{n}_layernorm" for n in ("post_attention", "pre_attention", "output", "input")],
            ["{post_attention,pre_attention,output}_layernorm", "input_layernorm"],
        ),
        ([22 * "a", 22 * "b", 22 * "c"], [f"{{{22 * 'a'},{22 * 'b'}}}", 22 * "c"]),
        (
            [f"a.{n}" for n in (1, 5, 10, 11, 12, 20, 30, 41, 52, 63, 74, 80, 91, 93, 95, 99)],
            ["a.{1,5,10,11,12,20,30,41,52,63,74,80,91,93,95,99}"],
        ),
        (
            [f"a.{n}" for n in (1, 2, 5, 6, 7, 10, 13, 16, 20, 22, 24, 30, 33, 36, 41, 44, 50, 55)],
            ["a[5:8]", "a.{1,2,10,13,16,20,22,24,30,33,36,41,44,50,55}"],
        ),
        (
            [f"a.{n}" for n in (50, *range(39, 2, -1), *range(98, 59, -1))],
            ["a[3:40]", "a[60:99]", "a.50"],
        ),
        (["a.2", "a.0", "a.1"], ["a[0:3]"]),
        (["a.0", "a.x"], ["a.0", "a.x"]),
    ],
)
def test_paths_fold_into_patterns(paths, patterns):
    folded = list(fold([segments(path, slices=True) for path in paths]))
    assert [pattern_of(product) for product, _ in folded] == patterns
    for product, numbers in folded:
        named = {".".join(map(str, names)) for names in each_of(*product)}
        assert [paths[n] for n in numbers] == [path for path in paths if path in named]


def test_without_slices_a_number_is_a_name():
    folded = fold([segments(f"a.{n}", slices=False) for n in range(3)])
    assert [pattern_of(product) for product, _ in folded] == ["a.{0,1,2}"]


@given(swaps())
def test_the_places_of_a_picture_select_what_has_changed_each_place_once(swap):
    replacement = replace_layers(swap.model, swap.patterns, nothing)
    found = [path for place in places_of(replacement) for path in select(swap.model, read(place))]
    assert sorted(found) == sorted(replacement)


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0, 1))
def test_any_choice_of_layers_folds_into_patterns_that_select_it(seed, layers, share):
    model, chance = Model(layers, 2), random.Random(seed)
    chosen = {path for path in select(model, "layers.**") if chance.random() < share}
    folded = fold([segments(path, slices=True) for path in chosen])
    found = [path for product, _ in folded for path in select(model, pattern_of(product))]
    assert sorted(found) == sorted(chosen)


# ---------------------------------------------------------------- what else it keeps


def test_a_picture_keeps_no_replaced_module_alive():
    model = Model()
    olds = [weakref.ref(module) for module in select(model, "**.q_proj").values()]
    replacement = replace_layers(model, "**.q_proj", nothing)
    gc.collect()
    assert [old() for old in olds] == [None] * 4
    assert str(replacement).startswith("layers[0:4].self_attn.q_proj   Linear -> Identity   x4")


def test_an_outline_names_the_modules_right_inside():
    assert outline(Model()) == ["'embed'", "'layers[0:4]' (4 Net)"]
    assert outline(Attention(2)) == ["'{q,k,v}_proj' (3 Linear)"]
    assert outline(nn.ReLU()) == []


@pytest.mark.parametrize("bits", ["nf4", 0, 1.58, None])
def test_bits_of_a_layers_own_kind_do_not_disturb_the_report(bits):
    layer = holding(weight=mx.ones((2, 2)), scales=mx.ones((1,)), bits=bits)
    assert str(replace_layers(holding(a=layer), "a", nothing)).startswith("a   Module -> ")
    assert str(tree(holding(a=layer)))


def test_a_layer_in_two_places_inside_of_what_is_replaced_counts_once():
    inner = nn.Linear(2, 2)
    for model in (
        holding(a=holding(x=inner, y=inner)),
        holding(a=holding(x=inner), b=holding(x=inner)),
        holding(a=holding(x=inner, y=Wrapper(inner))),
        holding(a=inner, b=Wrapper(inner)),
        holding(a=holding(x=inner, y=holding(z=inner))),
    ):
        assert "   6 -> 0 params   24 B -> 0 B   " in total_of(replace_layers(model, "*", nothing))


def test_new_layers_that_were_made_to_hold_one_another_are_measured_once():
    first, second = holding(x=nn.Linear(2, 2)), holding(x=nn.Linear(3, 3))
    report = replace_layers(nn.Sequential(nn.ReLU()), "layers.0", lambda path, layer: first)
    first.second, second.first = second, first
    assert str(report) == (
        "layers.0   ReLU -> Module   x1   0 -> 18 params   0 B -> 72 B   no arrays -> float32"
    )


def total_of(report: Replacement) -> str:
    """The lines of a report, those left out that count nothing."""
    return "".join(line for line in str(report).splitlines() if " 0 -> 0 " not in line) + "   "


def test_a_deep_model_is_reported_in_good_time():
    model = inner = nn.Module()
    for _ in range(300):
        inner.leaf, inner.inner = nn.ReLU(), nn.Module()
        inner = inner.inner
    report = replace_layers(model, "**.leaf", nothing)
    assert str(report).count("\n") == 100
