"""The picture of a replacement is short, true, and made of patterns that work."""

from __future__ import annotations

import copy
import gc
import random
import re
import weakref
from itertools import product as each_of
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Llama, build, identity
from strategies import Leaf, Net, swaps

from mlx_modswap import Replacement, Wrapper, replace_layers, select, tree
from mlx_modswap._patterns.fold import fold, pattern_of, segments
from mlx_modswap._select.hints import contents
from mlx_modswap._show import measure as _measure
from mlx_modswap._show.report import Change
from mlx_modswap._words import class_names, number, size


class LoRA(nn.Module):
    def __init__(self, linear: Any, rank: int = 4):
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.linear = linear
        self.lora_a = mx.zeros((inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))


def lora(path: str, layer: nn.Module) -> nn.Module:
    return LoRA(layer)


def patterns_of(replacement: Replacement) -> list[str]:
    """The pattern that each line starts with."""
    return [row[0] for row in replacement._rows() if row[1]]


def read(pattern: str) -> Any:
    """The pattern that was printed."""
    if pattern.startswith("re.compile("):
        return re.compile(eval(pattern.removeprefix("re.compile(").removesuffix(")")))
    return pattern


# ---------------------------------------------------------------- whole texts


def test_a_report_of_adapters_shows_parameters_trainable_ones_bytes_and_dtypes():
    model = Llama()
    model.set_dtype(mx.bfloat16)
    model.freeze()
    assert str(replace_layers(model, "**.self_attn.{q,v}_proj", lora)) == (
        "layers[0:4].self_attn.{q,v}_proj   Linear -> LoRA   x8   24.6K -> 28.2K params"
        "   0 -> 3.6K trainable   49.2 KB -> 63.5 KB   bfloat16 -> bfloat16, float32"
    )


def test_a_report_of_quantization_counts_parameters_before_it():
    rules = {
        "layers[-1].**": None,
        "embed_tokens": lambda path, layer: layer.to_quantized(bits=8),
        "**.self_attn.*_proj": lambda path, layer: layer.to_quantized(bits=4),
    }
    model = Llama()
    model.pop("lm_head")
    assert str(replace_layers(model, rules)).splitlines() == [
        "embed_tokens                           Embedding -> QuantizedEmbedding(bits=8)   x1 "
        "   64.0K params    256.0 KB -> 72.0 KB   float32 -> float32, uint32",
        "layers[0:3].self_attn.{q,k,v,o}_proj   Linear -> QuantizedLinear(bits=4)         x12"
        "   36.9K params    147.5 KB -> 23.0 KB   float32 -> float32, uint32",
        "total                                                                            x13"
        "   100.9K params   403.5 KB -> 95.0 KB",
    ]


def test_places_that_different_rules_decided_never_share_a_line():
    model = Llama(layers=2, dims=8).freeze()
    rules = {"layers[0].**": lora, "**": lambda path, layer: LoRA(layer, rank=8)}
    report = replace_layers(model, rules, where=nn.Linear, exclude="**.mlp.*")
    assert str(report).splitlines() == [
        "layers.0.self_attn.{q,k,v,o}_proj   Linear -> LoRA   x4   192 -> 416 params    "
        "0 -> 224 trainable   768 B -> 1.7 KB    float32",
        "layers.1.self_attn.{q,k,v,o}_proj   Linear -> LoRA   x4   192 -> 640 params    "
        "0 -> 448 trainable   768 B -> 2.6 KB    float32",
        "total                                                x8   384 -> 1.1K params   "
        "0 -> 672 trainable   1.5 KB -> 4.2 KB",
    ]


def test_two_patterns_with_one_factory_share_a_line():
    report = replace_layers(Llama(2), ["**.q_proj", "**.k_proj"], identity)
    assert patterns_of(report) == ["layers[0:2].self_attn.{q,k}_proj"]


def test_the_total_tells_what_is_trainable_if_one_of_its_lines_does():
    model = nn.Sequential(nn.Linear(64, 1, bias=False), frozen(nn.Linear(1, 1)))
    rules = {"*.0": lambda path, layer: layer.to_quantized(), "**": lambda *_: nn.Linear(2, 1)}
    quantized, linear, total = str(replace_layers(model, rules)).splitlines()
    assert "trainable" not in quantized
    assert "   0 -> 3 trainable   " in linear
    assert "   64 -> 3 trainable   " in total


def test_a_report_shows_trainable_parameters_only_where_they_are_unexpected():
    def half_frozen(path: str, layer: nn.Module) -> nn.Module:
        new = nn.Linear(64, 64)
        new.freeze(keys="weight")
        return new

    model = nn.Sequential(nn.Linear(64, 64))
    assert str(replace_layers(model, "layers[0]", half_frozen)) == (
        "layers.0   Linear   x1   4.2K params   4.2K -> 64 trainable   16.6 KB   float32"
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


def in_float16(module: nn.Module) -> nn.Module:
    module.set_dtype(mx.float16)
    return module


def with_bits(module: Any) -> Any:
    module.bits = 4
    return module


# The cells of a line for an old module that becomes a Linear of two parameters, 8 bytes.
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
        lambda: build(_private=mx.zeros(3), weight=mx.zeros(4), other=mx.zeros(5, mx.int8)),
        "Module -> Linear   x1   9 -> 2 params   21 B -> 8 B   float32, int8 -> float32",
    ),
    (
        lambda: build(_private=[mx.zeros(3)], parts={"a": [mx.zeros(4)]}),
        "Module -> Linear   x1   4 -> 2 params   16 B -> 8 B   float32",
    ),
    (
        lambda: build(_child=nn.Linear(2, 2), child=nn.Linear(2, 2)),
        "Module -> Linear   x1   6 -> 2 params   24 B -> 8 B   float32",
    ),
    (
        lambda: build(inner=with_bits(nn.Linear(2, 2)), weight=mx.zeros(1)),
        "Module -> Linear   x1   7 -> 2 params   28 B -> 8 B   float32",
    ),
    (
        lambda: build(a=nn.Linear(2, 2), b=nn.RMSNorm(3), c=build(d=nn.RMSNorm(4))),
        "Module -> Linear   x1   13 -> 2 params   52 B -> 8 B   float32",
    ),
    (
        lambda: build(parts=[mx.zeros(2), mx.zeros(3)], a=mx.zeros(4)).freeze(keys="parts"),
        "Module -> Linear   x1   9 -> 2 params   4 -> 2 trainable   36 B -> 8 B   float32",
    ),
    (
        lambda: build(parts={"b": mx.zeros(2)}, a=mx.zeros(4)).freeze(keys="parts.b"),
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
def test_the_figures_of_a_single_module(build, line):
    model = nn.Sequential(build())
    report = replace_layers(model, "layers.0", lambda path, layer: nn.Linear(1, 1))
    assert str(report) == f"layers.0   {line}"


@pytest.mark.parametrize(("build", "line"), COUNTED)
def test_the_figures_of_a_module_next_to_plain_ones(build, line):
    model = nn.Sequential(Unlike(), nn.Embedding(3, 3), build())
    report = replace_layers(model, "layers.*", lambda path, layer: nn.Linear(1, 1))
    last = str(report).splitlines()[2]
    assert last.split() == ["layers.2", *line.split()]


ARRAYS = nn.Linear(2, 2)
PLAIN = [
    *(ARRAYS, nn.RMSNorm(3), nn.ReLU(), ARRAYS, nn.Tanh(), nn.ReLU()),
    *(nn.Linear(3, 1, bias=False), in_float16(nn.Linear(2, 2)), in_float16(nn.PReLU()), ARRAYS),
]
OTHERS = [
    build(inner=ARRAYS),
    nn.QuantizedLinear(64, 1),
    frozen(nn.Linear(1, 1)),
    build(_private=mx.zeros(3)),
    Bare(),
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("other", OTHERS)
def test_a_record_made_in_chunks_measures_the_same_as_all_at_once(monkeypatch, chunk, other):
    monkeypatch.setattr(_measure, "_CHUNK", chunk)
    for at in range(len(PLAIN) + 1):
        modules = [*PLAIN[:at], other, *PLAIN[at:]]
        assert _measure.record(modules)() == _measure.measure(modules)
    assert _measure.record(PLAIN)() == _measure.measure(PLAIN)
    assert _measure.record([])() == []


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_record_tells_what_modules_held_when_it_was_made(monkeypatch, chunk):
    monkeypatch.setattr(_measure, "_CHUNK", chunk)
    layers = [nn.Linear(1, 2), nn.Linear(1, 2, bias=False), nn.Linear(1, 2)]
    note = _measure.record([layers[0], layers[1], layers[0], layers[2]])
    for layer in layers:
        layer.set_dtype(mx.float16)
        layer.pop("weight")
    assert [(one.params, one.nbytes) for one in note()] == [(4, 16), (2, 8), (0, 0), (4, 16)]


def test_a_report_writes_slices_only_where_all_numbers_are_indices():
    model = build(by_key={"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)}, by_index=[nn.Linear(2, 2)])
    assert patterns_of(replace_layers(model, "by_index.*", identity)) == ["by_index.0"]
    assert patterns_of(replace_layers(model, "by_key.*", identity)) == ["by_key.{0,1}"]
    model = build(dotted={"a.0": nn.Linear(2, 2), "a.1": nn.Linear(2, 2)})
    assert patterns_of(replace_layers(model, "dotted.**", identity)) == ["dotted.a.{0,1}"]


def test_a_report_leaves_out_empty_columns():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert str(replace_layers(model, "**", lambda path, layer: nn.Tanh(), where=nn.ReLU)) == (
        "layers.{0,2}   ReLU -> Tanh   x2"
    )


def test_a_report_says_where_no_arrays_are_left():
    assert str(replace_layers(Llama(), "layers[::2].norm", identity)) == (
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


def test_a_report_counts_a_tied_module_once():
    model = Net()
    model.a = model.b = nn.Linear(2, 2)
    assert str(replace_layers(model, "*", lambda path, layer: nn.Linear(2, 2, bias=False))) == (
        "{a,b}   Linear   x2   6 -> 4 params   24 B -> 16 B   float32"
    )
    model.a = model.b = frozen(nn.Linear(2, 2))
    assert str(replace_layers(model, "*", lambda path, layer: nn.Linear(2, 2, bias=False))) == (
        "{a,b}   Linear   x2   6 -> 4 params   0 -> 4 trainable   24 B -> 16 B   float32"
    )


def test_a_report_says_that_nothing_changed():
    report = replace_layers(Llama(), "**", lambda path, layer: layer)
    assert (str(report), report._repr_html_()) == ("nothing changed", "<p>nothing changed</p>")


def test_digit_keys_of_a_dict_without_modules_do_not_prevent_slices():
    model = Llama()
    model.settings = {"0": None, "1": nn.gelu}
    assert str(replace_layers(model, "**.q_proj", identity)).startswith("layers[0:4].self_attn.q")


def test_digit_keys_of_a_dict_are_not_written_as_a_slice():
    model = build(keyed={str(n): nn.ReLU() for n in range(3)})
    assert str(replace_layers(model, "**", identity)) == "keyed.{0,1,2}   ReLU -> Identity   x3"


def test_digit_names_of_arrays_do_not_prevent_slices():
    model = build(layers=[nn.Module() for _ in range(10)])
    for layer in model.layers:
        layer["0"] = mx.zeros(1)
    report = replace_layers(model, "**", identity)
    assert str(report).startswith("layers[0:10]   Module -> Identity")


def test_layers_of_different_dtypes_do_not_share_a_line():
    model = build(layers=[nn.Linear(1, 1, bias=False) for _ in range(2000)])
    for layer in model.layers[:1000]:
        layer.set_dtype(mx.float16)
    assert str(replace_layers(model, "layers.*", identity)).splitlines() == [
        "layers[0:1000]      Linear -> Identity   x1000   1.0K -> 0 params   2.0 KB -> 0 B   "
        "float16 -> no arrays",
        "layers[1000:2000]   Linear -> Identity   x1000   1.0K -> 0 params   4.0 KB -> 0 B   "
        "float32 -> no arrays",
        "total                                    x2000   2.0K -> 0 params   6.0 KB -> 0 B",
    ]


def test_changes_of_different_classes_or_dtypes_do_not_share_a_line():
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
        "total                             x8   4 params        12 B",
    ]


@pytest.mark.parametrize(
    ("lines", "end"),
    [
        (1, [["a0.b0", "ReLU -> Identity", "x1"]]),
        (100, [["a99.b99", "ReLU -> Identity", "x1"], ["total", "x100"]]),
        (101, [["... 1 more"], ["total", "x101"]]),
        (120, [["... 20 more"], ["total", "x120"]]),
    ],
)
def test_a_report_shows_at_most_a_hundred_lines_and_the_total(lines, end):
    model = Net()
    for n in range(lines):
        setattr(model, f"a{n}.b{n}", nn.ReLU())
    replacement = replace_layers(model, "**", identity)
    shown, table = str(replacement).splitlines(), replacement._repr_html_()
    assert len(shown) == min(lines, 101) + (lines > 1)
    assert [re.split("   +", line) for line in shown[-len(end) :]] == end
    assert table.count("<tr>") == len(shown)
    assert table.endswith(f"<td>x{lines}</td></tr></table>")
    assert len(replacement.changes) == lines


def test_a_report_of_more_than_a_hundred_lines_keeps_all_its_columns():
    model = build(**{f"a{n}.b{n}": Leaf() for n in range(101)})
    first, *_, rest, total = str(replace_layers(model, "**", identity)).splitlines()
    assert re.split("   +", first)[1:] == [
        "Leaf -> Identity", "x1", "1 -> 0 params", "4 B -> 0 B", "float32 -> no arrays"
    ]  # fmt: skip
    assert rest == "... 1 more"
    assert re.split("   +", total) == ["total", "x101", "101 -> 0 params", "404 B -> 0 B"]


def test_a_notebook_gets_a_table_with_markup_escaped():
    model = Net()
    setattr(model, "<b>&", Leaf())
    model.act = nn.ReLU()
    assert replace_layers(model, "*", identity)._repr_html_() == (
        "<table><tr><td>&lt;b&gt;&amp;</td><td>Leaf -&gt; Identity</td><td>x1</td>"
        "<td>1 -&gt; 0 params</td><td>4 B -&gt; 0 B</td>"
        "<td>float32 -&gt; no arrays</td></tr>"
        "<tr><td>act</td><td>ReLU -&gt; Identity</td><td>x1</td>"
        "<td></td><td></td><td></td></tr>"
        "<tr><td>total</td><td></td><td>x2</td>"
        "<td>1 -&gt; 0 params</td><td>4 B -&gt; 0 B</td><td></td></tr></table>"
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


# ---------------------------------------------------------------- two classes of one name


def rms_norm() -> type:
    class RMSNorm(nn.Module):
        pass

    return RMSNorm


ONE, OTHER = rms_norm(), rms_norm()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (nn.RMSNorm(1), nn.RMSNorm(1), "RMSNorm"),
        (ONE(), ONE(), "RMSNorm"),
        (nn.RMSNorm(1), ONE(), f"mlx.nn.RMSNorm -> {__name__}.rms_norm.<locals>.RMSNorm"),
        (
            ONE(),
            OTHER(),
            "{0} -> {0} (2)".format(f"{__name__}.rms_norm.<locals>.RMSNorm"),
        ),
        (Bare(), nn.RMSNorm(1), "Bare -> RMSNorm"),
    ],
)
def test_two_classes_of_one_name_read_differently(old, new, text):
    (change,) = replace_layers(nn.Sequential(old), "layers.0", lambda *_: new).changes
    assert " -> ".join(dict.fromkeys([change.old, change.new])) == text
    report = replace_layers(nn.Sequential(old), "layers.0", lambda *_: copy.copy(new))
    assert re.split("   +", str(report))[1] == text


def test_a_class_is_named_after_the_outermost_module_that_has_it():
    one, other = type("Wrapper", (nn.Module,), {}), type("Sequential", (nn.Module,), {})
    assert list(class_names([Wrapper, one, nn.Sequential, other, nn.ReLU]).values()) == [
        "mlx_modswap.Wrapper", f"{__name__}.Wrapper", "mlx.nn.Sequential",
        f"{__name__}.Sequential", "ReLU",
    ]  # fmt: skip


def test_classes_of_one_name_in_different_lines_read_differently():
    model = nn.Sequential(nn.RMSNorm(1), ONE(), nn.ReLU())
    report = replace_layers(model, {"*.0": identity, "*.1": identity, "**": identity})
    assert [change.old for change in report.changes] == [
        "mlx.nn.RMSNorm", f"{__name__}.rms_norm.<locals>.RMSNorm", "ReLU"
    ]  # fmt: skip


# ---------------------------------------------------------------- the same as data


def test_changes_are_the_lines_as_data():
    model = build(
        **{"a[0]": nn.Linear(2, 2, bias=False)},
        layers=[nn.Linear(64, 1, bias=False) for _ in range(3)],
    )
    rules = {"layers.*": lambda path, layer: layer.to_quantized(bits=8), "**": identity}
    report = replace_layers(model, rules, where=nn.Linear)
    float32, packed = frozenset({mx.float32}), frozenset({mx.float32, mx.uint32})
    a, new = re.compile(r"a\[0\]"), "QuantizedLinear(bits=8)"
    assert report.changes == [
        (a, "Linear", "Identity", 1, 4, 0, 16, 0, float32, frozenset()),
        ("layers[0:3]", "Linear", new, 3, 192, 192, 768, 216, float32, packed),
    ]
    assert (report.old_nbytes, report.new_nbytes) == (784, 216)
    assert Change._fields == (
        "pattern", "old", "new", "count", "old_params", "new_params",
        "old_nbytes", "new_nbytes", "old_dtypes", "new_dtypes",
    )  # fmt: skip
    report.changes.clear()
    assert len(report.changes) == 2


def test_a_swap_of_nothing_has_no_changes():
    report = replace_layers(Llama(), "**", lambda path, layer: layer)
    assert (report.changes, report.old_nbytes, report.new_nbytes) == ([], 0, 0)


@pytest.mark.parametrize("read", [str, lambda report: report.changes, lambda r: r.new_nbytes])
def test_figures_stay_when_the_arrays_of_the_new_modules_are_gone(read):
    def swap() -> Replacement:
        return replace_layers(Llama(), "**.q_proj", lora)

    report, other = swap(), swap()
    read(report)
    for module in report.values():
        dict.clear(module)
    assert (str(report), report.changes) == (str(other), other.changes)
    assert (report.old_nbytes, report.new_nbytes) == (other.old_nbytes, other.new_nbytes)


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
        (["block 1", "block 2"], ["{block 1,block 2}"]),
        (["a b", "a_b"], ["{a b,a_b}"]),
        (["x_in 1", "x_out 1"], ["x_{in 1,out 1}"]),
        ([" a", "b "], [r"re.compile('\\ a')", r"re.compile('b\\ ')"]),
        (["a.2", "a.0", "a.1"], ["a[0:3]"]),
        (["a.0", "a.x"], ["a.0", "a.x"]),
    ],
)
def test_paths_fold_into_patterns(paths, patterns):
    folded = list(fold([segments(path, numbers_are_indices=True) for path in paths]))
    assert [pattern_of(product) for product, _ in folded] == patterns
    for product, numbers in folded:
        named = {".".join(map(str, names)) for names in each_of(*product)}
        assert [paths[n] for n in numbers] == [path for path in paths if path in named]


def test_without_slices_a_number_is_a_name():
    folded = fold([segments(f"a.{n}", numbers_are_indices=False) for n in range(3)])
    assert [pattern_of(product) for product, _ in folded] == ["a.{0,1,2}"]


@given(swaps())
def test_the_printed_patterns_select_each_changed_place_once(swap):
    report = replace_layers(swap.model, swap.patterns, identity)
    found = [path for text in patterns_of(report) for path in select(swap.model, read(text))]
    assert sorted(found) == sorted(report)


@given(swaps(shared=False))
def test_a_change_is_of_one_rule_and_counts_the_places_of_its_pattern(swap):
    olds = {place.path: place.module for place in swap.targets}
    rules = dict.fromkeys(swap.patterns, identity)
    report = replace_layers(swap.model, rules)
    assert sorted(olds) == sorted(report)
    for change in report.changes:
        places = oracle.chosen(swap.model, [change.pattern])
        assert change.count == len(places)
        assert len({oracle.deciding(rules, place) for place in places}) == 1
        modules = [olds[place.path] for place in places]
        assert change.old_params == sum(map(oracle.parameters, modules))
        assert {type(module).__name__ for module in modules} == {change.old}


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0, 1))
def test_any_choice_of_layers_folds_into_patterns_that_select_it(seed, layers, share):
    model, chance = Llama(layers, 2), random.Random(seed)
    chosen = {path for path in select(model, "layers.**") if chance.random() < share}
    folded = fold([segments(path, numbers_are_indices=True) for path in chosen])
    found = [path for product, _ in folded for path in select(model, pattern_of(product))]
    assert sorted(found) == sorted(chosen)


# Texts of the characters that patterns, words and regular expressions are about.
odd_names = st.text("aB1_- ,*?[]{}()|\\\n.\u00a0", max_size=6)


@given(st.sets(odd_names, min_size=1, max_size=8), st.integers(1, 3))
def test_keys_of_any_text_fold_into_patterns_that_select_them(names, count):
    model = nn.Module()
    model.keyed = {name: nn.ReLU() for name in names}
    model.lists = [{name: nn.ReLU() for name in names} for _ in range(count)]
    chosen = [path for path, _ in model.named_modules() if path]
    folded = fold([segments(path, numbers_are_indices=path.startswith("lists")) for path in chosen])
    found = [path for product, _ in folded for path in select(model, read(pattern_of(product)))]
    assert sorted(found) == sorted(chosen)


# ---------------------------------------------------------------- what else it keeps


def test_a_report_keeps_no_replaced_module_alive():
    model = Llama()
    olds = [weakref.ref(module) for module in select(model, "**.q_proj").values()]
    replacement = replace_layers(model, "**.q_proj", identity)
    gc.collect()
    assert [old() for old in olds] == [None] * 4
    assert str(replacement).startswith("layers[0:4].self_attn.q_proj   Linear -> Identity   x4")


def test_an_outline_names_the_direct_children():
    block = Llama().layers[0]
    model = build(layers=[block] * 4, norm=nn.ReLU())
    assert contents(model) == ["'layers[0:4]' (4 LlamaBlock)", "'norm'"]
    assert contents(block.self_attn) == ["'{q,k,v,o}_proj' (4 Linear)", "'rope'"]
    assert contents(nn.ReLU()) == []


@pytest.mark.parametrize("bits", ["nf4", 0, 1.58, None])
def test_bits_of_a_layers_own_kind_do_not_disturb_the_report(bits):
    layer = build(weight=mx.ones((2, 2)), scales=mx.ones((1,)), bits=bits)
    assert str(replace_layers(build(a=layer), "a", identity)).startswith("a   Module -> ")
    assert str(tree(build(a=layer)))


def test_a_layer_in_two_places_inside_replaced_modules_counts_once():
    inner = nn.Linear(2, 2)
    for model in (
        build(a=build(x=inner, y=inner)),
        build(a=build(x=inner), b=build(x=inner)),
        build(a=build(x=inner, y=Wrapper(inner))),
        build(a=inner, b=Wrapper(inner)),
        build(a=build(x=inner, y=build(z=inner))),
    ):
        assert "   6 -> 0 params   24 B -> 0 B   " in total_of(replace_layers(model, "*", identity))


def test_new_layers_that_contain_each_other_are_measured_once():
    first, second = build(x=nn.Linear(2, 2)), build(x=nn.Linear(3, 3))
    report = replace_layers(nn.Sequential(nn.ReLU()), "layers.0", lambda path, layer: first)
    first.second, second.first = second, first
    assert str(report) == (
        "layers.0   ReLU -> Module   x1   0 -> 18 params   0 B -> 72 B   no arrays -> float32"
    )


def total_of(report: Replacement) -> str:
    """The lines of a report, those left out that count nothing."""
    return "".join(line for line in str(report).splitlines() if " 0 -> 0 " not in line) + "   "


def test_a_swap_300_levels_deep_is_reported_in_a_hundred_lines():
    model = inner = nn.Module()
    for _ in range(300):
        inner.leaf, inner.inner = nn.ReLU(), nn.Module()
        inner = inner.inner
    report = replace_layers(model, "**.leaf", identity)
    assert str(report).splitlines()[-2].strip() == "... 200 more"
