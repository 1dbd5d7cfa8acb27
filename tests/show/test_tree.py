# ruff: noqa: E501
"""The picture of a model is short and true."""

from __future__ import annotations

import functools
import gc
import io
import re
import sys
import weakref
from html.parser import HTMLParser
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import Llama
from strategies import Leaf, Net, Secret, lists_of_patterns, models

from mlx_modswap import NoMatchError, PatternError, SelectionError, Wrapper, select, tree


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(8, 8, bias=False) for _ in range(3))


class Mixture(nn.Module):
    def __init__(self, layers: int, experts: int):
        super().__init__()
        self.layers = [Net() for _ in range(layers)]
        for layer in self.layers:
            layer.gate = nn.Linear(8, experts, bias=False)
            layer.experts = [Expert() for _ in range(experts)]


def net(**held: Any) -> nn.Module:
    module = Net()
    for name, value in held.items():
        setattr(module, name, value)
    return module


def siblings(first: int, last: int) -> nn.Module:
    """A module of so many different ones that none share a line."""
    return net(**{f"l{n}": nn.Linear(n, 1) for n in range(first, last + 1)})


def deep(levels: int) -> nn.Module:
    model = inner = Net()
    for _ in range(levels):
        inner.inner, inner.w = Net(), nn.Linear(2, 2)
        inner = inner.inner
    return model


# ---------------------------------------------------------------- whole texts


def test_a_whole_model_is_drawn_in_eleven_lines():
    assert (
        str(tree(Llama()))
        == """\
Llama                                                            211.7K params   846.8 KB   float32
  {embed_tokens,lm_head}   Embedding(1000, 64)              x2   64.0K           256.0 KB   float32   tied, one module
  layers[0:4]              LlamaBlock                       x4   147.7K          590.8 KB   float32
    self_attn              Attention(4 heads, 2 kv heads)   x4   49.2K           196.6 KB   float32
      {q,o}_proj           Linear(64 -> 64)                 x8   32.8K           131.1 KB   float32
      {k,v}_proj           Linear(64 -> 32)                 x8   16.4K           65.5 KB    float32
      rope                 RoPE(16)                         x4
    mlp                    MLP                              x4   98.3K           393.2 KB   float32
      {gate,up}_proj       Linear(64 -> 128)                x8   65.5K           262.1 KB   float32
      down_proj            Linear(128 -> 64)                x4   32.8K           131.1 KB   float32
    norm                   RMSNorm(64, eps=1e-05)           x4   256             1.0 KB     float32"""
    )


def test_a_selection_inside_a_wrapped_layer_is_marked():
    layer, model = nn.Module(), nn.Module()
    layer.up, layer.acts = nn.Linear(2, 2), [nn.ReLU(), nn.Tanh()]
    model.block = Wrapper(layer)
    for pattern, name in (("block.up", "up "), ("block.acts[-1]", "acts.1 ")):
        (marked,) = [line for line in str(tree(model, pattern)).splitlines() if line[0] == "*"]
        assert marked[1:].strip().startswith(name)


def test_a_selection_is_marked_and_gives_its_blocks_a_line_of_their_own():
    assert (
        str(tree(Llama(layers=6), "layers[-2:].**.{q,v}_proj"))
        == """\
  Llama                                                            285.6K params   1.1 MB     float32
    {embed_tokens,lm_head}   Embedding(1000, 64)              x2   64.0K           256.0 KB   float32   tied, one module
    layers[0:4]              LlamaBlock                       x4   147.7K          590.8 KB   float32
      self_attn              Attention(4 heads, 2 kv heads)   x4   49.2K           196.6 KB   float32
        {q,o}_proj           Linear(64 -> 64)                 x8   32.8K           131.1 KB   float32
        {k,v}_proj           Linear(64 -> 32)                 x8   16.4K           65.5 KB    float32
        rope                 RoPE(16)                         x4
      mlp                    MLP                              x4   98.3K           393.2 KB   float32
        {gate,up}_proj       Linear(64 -> 128)                x8   65.5K           262.1 KB   float32
        down_proj            Linear(128 -> 64)                x4   32.8K           131.1 KB   float32
      norm                   RMSNorm(64, eps=1e-05)           x4   256             1.0 KB     float32
    layers[4:6]              LlamaBlock                       x2   73.9K           295.4 KB   float32
      self_attn              Attention(4 heads, 2 kv heads)   x2   24.6K           98.3 KB    float32
*       q_proj               Linear(64 -> 64)                 x2   8.2K            32.8 KB    float32
        k_proj               Linear(64 -> 32)                 x2   4.1K            16.4 KB    float32
*       v_proj               Linear(64 -> 32)                 x2   4.1K            16.4 KB    float32
        o_proj               Linear(64 -> 64)                 x2   8.2K            32.8 KB    float32
        rope                 RoPE(16)                         x2
      mlp                    MLP                              x2   49.2K           196.6 KB   float32
        {gate,up}_proj       Linear(64 -> 128)                x4   32.8K           131.1 KB   float32
        down_proj            Linear(128 -> 64)                x2   16.4K           65.5 KB    float32
      norm                   RMSNorm(64, eps=1e-05)           x2   128             512 B      float32
'layers[-2:].**.{q,v}_proj' selects 4 of 74 modules"""
    )


def test_places_that_are_all_selected_share_a_line():
    assert (
        str(tree(Mixture(2, 4), "**.experts[::2].w*"))
        == """\
  Mixture                                    1.6K params   6.4 KB   float32
    layers[0:2]       Net              x2    1.6K          6.4 KB   float32
      gate            Linear(8 -> 4)   x2    64            256 B    float32
      experts.{0,2}   Expert           x4    768           3.1 KB   float32
*       w{1,2,3}      Linear(8 -> 8)   x12   768           3.1 KB   float32
      experts.{1,3}   Expert           x4    768           3.1 KB   float32
        w{1,2,3}      Linear(8 -> 8)   x12   768           3.1 KB   float32
'**.experts[::2].w*' selects 12 of 36 modules"""
    )


def test_a_picture_shows_group_size_and_bits_of_quantized_layers():
    model = Llama(layers=2)
    nn.quantize(model.layers[0], 32, 8)
    nn.quantize(model.layers[1].mlp, 64, 4)
    assert (
        str(tree(model))
        == """\
Llama                                                                               137.9K params   367.1 KB   float32, uint32
  {embed_tokens,lm_head}   Embedding(1000, 64)                                 x2   64.0K           256.0 KB   float32           tied, one module
  layers.0                 LlamaBlock                                               36.9K           46.3 KB    float32, uint32
    self_attn              Attention(4 heads, 2 kv heads)                           12.3K           15.4 KB    float32, uint32
      {q,o}_proj           QuantizedLinear(64 -> 64, group_size=32, bits=8)    x2   8.2K            10.2 KB    float32, uint32
      {k,v}_proj           QuantizedLinear(64 -> 32, group_size=32, bits=8)    x2   4.1K            5.1 KB     float32, uint32
      rope                 RoPE(16)
    mlp                    MLP                                                      24.6K           30.7 KB    float32, uint32
      {gate,up}_proj       QuantizedLinear(64 -> 128, group_size=32, bits=8)   x2   16.4K           20.5 KB    float32, uint32
      down_proj            QuantizedLinear(128 -> 64, group_size=32, bits=8)        8.2K            10.2 KB    float32, uint32
    norm                   RMSNorm(64, eps=1e-05)                                   64              256 B      float32
  layers.1                 LlamaBlock                                               36.9K           64.8 KB    float32, uint32
    self_attn              Attention(4 heads, 2 kv heads)                           12.3K           49.2 KB    float32
      {q,o}_proj           Linear(64 -> 64)                                    x2   8.2K            32.8 KB    float32
      {k,v}_proj           Linear(64 -> 32)                                    x2   4.1K            16.4 KB    float32
      rope                 RoPE(16)
    mlp                    MLP                                                      24.6K           15.4 KB    float32, uint32
      {gate,up}_proj       QuantizedLinear(64 -> 128, group_size=64, bits=4)   x2   16.4K           10.2 KB    float32, uint32
      down_proj            QuantizedLinear(128 -> 64, group_size=64, bits=4)        8.2K            5.1 KB     float32, uint32
    norm                   RMSNorm(64, eps=1e-05)                                   64              256 B      float32"""
    )


def test_a_picture_of_a_half_frozen_model_shows_what_is_trainable():
    model = Llama(layers=2)
    model.freeze()
    model.layers[1].mlp.unfreeze()
    assert (
        str(tree(model))
        == """\
Llama                                                            137.9K params   24.6K trainable   551.4 KB   float32
  {embed_tokens,lm_head}   Embedding(1000, 64)              x2   64.0K           0                 256.0 KB   float32   tied, one module
  layers.0                 LlamaBlock                            36.9K           0                 147.7 KB   float32
    self_attn              Attention(4 heads, 2 kv heads)        12.3K           0                 49.2 KB    float32
      {q,o}_proj           Linear(64 -> 64)                 x2   8.2K            0                 32.8 KB    float32
      {k,v}_proj           Linear(64 -> 32)                 x2   4.1K            0                 16.4 KB    float32
      rope                 RoPE(16)
    mlp                    MLP                                   24.6K           0                 98.3 KB    float32
      {gate,up}_proj       Linear(64 -> 128)                x2   16.4K           0                 65.5 KB    float32
      down_proj            Linear(128 -> 64)                     8.2K            0                 32.8 KB    float32
    norm                   RMSNorm(64, eps=1e-05)                64              0                 256 B      float32
  layers.1                 LlamaBlock                            36.9K           24.6K             147.7 KB   float32
    self_attn              Attention(4 heads, 2 kv heads)        12.3K           0                 49.2 KB    float32
      {q,o}_proj           Linear(64 -> 64)                 x2   8.2K            0                 32.8 KB    float32
      {k,v}_proj           Linear(64 -> 32)                 x2   4.1K            0                 16.4 KB    float32
      rope                 RoPE(16)
    mlp                    MLP                                   24.6K           24.6K             98.3 KB    float32
      {gate,up}_proj       Linear(64 -> 128)                x2   16.4K           16.4K             65.5 KB    float32
      down_proj            Linear(128 -> 64)                     8.2K            8.2K              32.8 KB    float32
    norm                   RMSNorm(64, eps=1e-05)                64              0                 256 B      float32"""
    )


def test_arrays_in_lists_and_dicts_count_in_the_module_that_holds_them():
    holder = net(by={"w": [mx.zeros(2), mx.zeros(3)], "_v": mx.zeros(1)})
    holder.freeze()
    holder.unfreeze(keys="by.w.1", recurse=False)
    assert (
        str(tree(net(a=holder, b=nn.ReLU())))
        == """\
Net          6 params   3 trainable   24 B   float32
  a   Net    6          3             24 B   float32
  b   ReLU"""
    )


def test_functions_none_and_tuples_of_modules_are_shown_as_what_they_are():
    model = net(
        activation=nn.gelu,
        parts=(nn.Linear(2, 2), [nn.ReLU()]),
        layers=[None, nn.Linear(2, 2), nn.silu, None],
        sizes=[1, 2, None],
        strides=(1, 1),
        cache=None,
    )
    assert (
        str(tree(model))
        == """\
Net                                                                       6 params   24 B   float32
  parts          tuple of 1 Linear, 1 ReLU, which MLX does not see
  layers.{0,3}   None                                                x2
  layers.1       Linear(2 -> 2, bias)                                     6          24 B   float32
  layers.2       function silu
  activation     function gelu"""
    )


def test_a_module_in_several_places_is_counted_on_one_line():
    shared, twin = nn.Linear(2, 2), net(inner=nn.Linear(2, 2))
    model = net(
        a=shared,
        layers=[net(own=nn.Linear(2, 2), shared=shared) for _ in range(3)],
        twins=[twin, twin],
        again=[twin],
        activations=[nn.ReLU()] * 3,
    )
    assert (
        str(tree(model))
        == """\
Net                                              30 params   120 B   float32
  a                  Linear(2 -> 2, bias)        6           24 B    float32   tied
  layers[0:3]        Net                    x3   18          72 B    float32
    own              Linear(2 -> 2, bias)   x3   18          72 B    float32
    shared           Linear(2 -> 2, bias)   x3                                 tied to a
  {twins,again}.0    Net                    x2   6           24 B    float32   tied, one module
    inner            Linear(2 -> 2, bias)   x2   6           24 B    float32
  twins.1            Net                                                       tied to {twins,again}.0
  activations[0:3]   ReLU                   x3"""
    )


def test_a_line_says_how_many_different_modules_are_tied():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    model = net(layers=[one, two, one, two], more=[one, two])
    assert str(tree(model)).splitlines()[1:] == [
        "  {layers,more}[0:2]   Linear(2 -> 2, bias)   x4   12          48 B   float32"
        "   tied, 2 modules",
        "  layers[2:4]          Linear(2 -> 2, bias)   x2                             "
        "   tied to {layers,more}[0:2]",
    ]


def test_a_layer_and_a_wrapper_around_it_are_counted_as_one_module():
    layer, again, tied = nn.Linear(2, 2), Wrapper(nn.Linear(3, 3)), nn.Linear(4, 4)
    model = net(
        a=Wrapper(layer),
        b=layer,
        c=Wrapper(net(inner=Wrapper(Wrapper(layer)))),
        d=again,
        e=[again, nn.Linear(3, 3)],
        f=net(x=tied),
        g=net(x=tied, y=Wrapper(nn.ReLU())),
    )
    assert (
        str(tree(model, "d"))
        == """\
  Net                                 50 params   200 B   float32
    a         Wrapper(2 -> 2, bias)   6           24 B    float32   tied
    b         Linear(2 -> 2, bias)                                  tied to a
    c         Wrapper
      inner   Wrapper(2 -> 2, bias)                                 tied to a
*   d         Wrapper(3 -> 3, bias)   12          48 B    float32   tied
    e.0       Wrapper(3 -> 3, bias)                                 tied to d
    e.1       Linear(3 -> 3, bias)    12          48 B    float32
    f         Net                     20          80 B    float32
      x       Linear(4 -> 4, bias)    20          80 B    float32   tied
    g         Net
      x       Linear(4 -> 4, bias)                                  tied to f.x
      y       Wrapper
'd' selects 1 of 12 modules"""
    )


def cells_of(picture: Any) -> list[list[str]]:
    """The cells of each line."""
    return [re.split("   +", line.strip()) for line in str(picture).splitlines()]


class Says(nn.Module):
    def __init__(self, text: Any):
        super().__init__()
        self.text = text

    def _extra_repr(self):
        return self.text.format(self=self)


class Sized(nn.Module):
    @property
    def input_dims(self) -> int:
        return 3

    output_dims = 4


def test_a_line_shows_the_figures_that_matter():
    w1, w2, w3 = mx.zeros(1), mx.zeros((1, 2)), mx.zeros((1, 2, 3))
    table = {
        "Linear(2 -> 3)": nn.Linear(2, 3, bias=False),
        "Conv1d(2, 4, kernel_size=3, bias)": nn.Conv1d(2, 4, 3),
        "Conv3d(1, 1, kernel_size=(3, 3, 3), bias)": nn.Conv3d(1, 1, 3),
        "Conv2d(2, 4, kernel_size=(3, 3), stride=(1, 2), padd...)": nn.Conv2d(
            2, 4, 3, stride=(1, 2), padding=(0, 1)
        ),
        "BatchNorm(4, eps=1e-05, momentum=0.1, track_running_stats)": nn.BatchNorm(4),
        "LayerNorm(4, eps=1e-05)": nn.LayerNorm(4),
        "QuantizedEmbedding(32, 64, group_size=64, bits=4)": nn.QuantizedEmbedding(32, 64),
        "MultiHeadAttention(2 heads)": nn.MultiHeadAttention(8, 2),
        "PReLU(weight 1)": nn.PReLU(),
        "Upsample(scale_factor=2.0, mode='linear', align_corners)": nn.Upsample(2.0, "linear", True),
        "Says(a, c=1)": Says("a=True, b=False, c=1"),
        "Says": Says("num_a=False"),
        "Says(b=2)": Says("stride=(1, 1), b=2, padding=0"),
        "Says(2)": Says("stride=1, groups=1, 2, dilation=1"),
        "Says(stride=11, groups=12, padding=(0, 1))": Says(
            "stride=11, padding=(0, 0, 0), mode=affine, groups=12, affine=True, padding=(0, 1)"
        ),
        "Says(b, c=False d)": Says("a=False, b, c=False d"),
        "Says(Xa, bX)": Says(" , Xa, bX ,"),
        f"Says({'a' * 48})": Says("a" * 48),
        f"Says({'a' * 45}...)": Says("a" * 49),
        "Says(1 -> 2, x, 3 -> 4)": Says("input_dims=1, output_dims=2, x, input_dims=3, output_dims=4"),
        "Says(a[1mb)": Says("a\x1b[1m\nb"),
        "Net(2 heads, 5 kv heads)": net(
            num_heads=2, n_heads=3, num_attention_heads=4,
            n_kv_heads=5, num_kv_heads=6, num_key_value_heads=7,
        ),
        "Net(3 heads, 6 kv heads)": net(n_heads=3, num_attention_heads=4, num_kv_heads=6),
        "Net(4 heads, 7 kv heads)": net(num_attention_heads=4, num_key_value_heads=7),
        "Net(8 experts)": net(num_experts=8, n_routed_experts=9),
        "Net(9 experts)": net(n_routed_experts=9),
        "Net(3 -> 4, group_size=32, bits=8)": net(
            input_dims=3, output_dims=4, group_size=32, bits=8, w=w1
        ),
        "Net(bits=8)": net(bits=8, w=w1),
        "Net(input_dims=3)": net(input_dims=3, w=w1),
        "Net(2 heads, a 1, b 1x2, c 1x2x3)": net(num_heads=2, a=w1, b=w2, c=w3),
        "Net(a scalar, b 1, c 1)": net(a=mx.array(1.0), b=w1, _hidden=w1, c=w1, more=[w1]),
        "Net(output_dims=4, w 1x2)": net(output_dims=4, w=w2),
        "Sized(3 -> 4)": Sized(),
    }  # fmt: skip
    for text, module in table.items():
        assert cells_of(tree(module))[0][0] == text
    nothing = [
        Says("{self.what}"),
        Says(None),
        net(num_heads=True, n_heads="2", num_experts=2.0),
        net(a=w1, b=w1, c=w1, d=w1),
    ]
    for module in nothing:
        assert cells_of(tree(module))[0][0] == type(module).__name__


class Nameless:
    __name__ = 3

    def __call__(self):
        return None


def test_a_line_says_what_is_where_a_module_could_be():
    table = {
        "function gelu": nn.gelu,
        "function <lambda>": lambda: None,
        "function": functools.partial(nn.gelu),
        "tuple of 2 ReLU, 1 Tanh, which MLX does not see": (nn.ReLU(), [(nn.Tanh(),)], nn.ReLU()),
        "Tanh": nn.Tanh(),
    }
    for text, value in table.items():
        for model in (net(a=value), net(a=[value]), net(a={"b": [value]})):
            assert [cells[-1] for cells in cells_of(tree(model))] == ["Net", text]
    assert str(tree(net(a=Nameless()))) == "Net\n  a   function"
    for value in (None, 1, "a", nn.ReLU, (), (1, [nn.gelu], {"a": nn.ReLU()}), {"a": None}):
        assert str(tree(net(a=value, b=[value] * (value is not None)))) == "Net"
    assert str(tree(net(_a=nn.gelu))) == "Net"
    assert str(tree(net(a=[None, mx.zeros(1)]))).count("\n") == 0
    assert str(tree(net(a=[None, [nn.ReLU()]]))) == "Net\n  a.0     None\n  a.1.0   ReLU"


class Settings:
    """No module and no text: as in many a model, an object with the numbers of its config."""

    def __init__(self, size: int):
        self.size = size


class Odd(nn.Module):
    """Its numbers are where no look at its attributes sees them."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.settings = Settings(sizes[0])
        self.layer_ids = list(sizes)

    def _extra_repr(self):
        return str(self.settings.size)


class Listed(nn.Module):
    def __init__(self, *sizes: float):
        super().__init__()
        self.sizes = {"all": [list(sizes), 1]}

    def _extra_repr(self):
        return str(self.sizes["all"][0])


def test_modules_with_different_figures_do_not_share_a_line():
    model = nn.Sequential(
        *(nn.Conv1d(1, 1, 3, stride=n) for n in (1, 1, 2)),
        *(nn.Conv2d(1, 1, 3, stride=n) for n in (1, 2, 2)),
        *map(nn.MaxPool2d, (2, 2, 3)),
        *(Odd(*sizes) for sizes in ((1, 2), (1, 3), (2, 3))),
        *(Listed(*sizes) for sizes in ((1, 2), (1, 2), (1, 3))),
    )
    assert (
        str(tree(model))
        == """\
Sequential                                                                     42 params   168 B   float32
  layers[0:2]     Conv1d(1, 1, kernel_size=3, bias)                       x2   8           32 B    float32
  layers.2        Conv1d(1, 1, kernel_size=3, stride=2, bias)                  4           16 B    float32
  layers.3        Conv2d(1, 1, kernel_size=(3, 3), bias)                       10          40 B    float32
  layers[4:6]     Conv2d(1, 1, kernel_size=(3, 3), stride=(2, 2), bias)   x2   20          80 B    float32
  layers[6:8]     MaxPool2d(kernel_size=(2, 2), stride=(2, 2))            x2
  layers.8        MaxPool2d(kernel_size=(3, 3), stride=(3, 3))
  layers[9:11]    Odd(1)                                                  x2
  layers.11       Odd(2)
  layers[12:14]   Listed([1, 2])                                          x2
  layers.14       Listed([1, 3])"""
    )


def test_settings_that_compare_equal_but_print_differently_do_not_share_a_line():
    model = nn.Sequential(*map(Listed, (1, 1.0, True)))
    assert str(tree(model)).split() == (
        [
            "Sequential",
            "layers.0",
            "Listed([1])",
            "layers.1",
            "Listed([1.0])",
            "layers.2",
            "Listed([True])",
        ]
    )


def test_private_attributes_of_a_module_do_not_matter_to_the_picture():
    layers = nn.ReLU(), nn.ReLU(), nn.ReLU()
    vars(layers[0])["_hook"], vars(layers[1])["_hook"] = nn.gelu, nn.silu
    vars(layers[2])["kept_from_mlx"] = layers[0]
    assert str(tree(nn.Sequential(*layers))).split() == ["Sequential", "layers[0:3]", "ReLU", "x3"]


def test_modules_that_hold_different_things_do_not_share_a_line():
    w23, w32 = mx.zeros((2, 3)), mx.zeros((3, 2))
    tied = nn.ReLU6(), nn.Linear(2, 2)
    model = net(
        layers=[
            net(a=w23, b=w23, c=w23, d=w23),
            net(a=w23, b=w23, c=w23, d=w23),
            net(a=w23, b=w23, c=w23, d=w32),
            net(a=w23, b=w23, c=w23, e=w23),
            net(a=w23, b=w23, c=w23, d=w23.astype(mx.float16)),
            net(x=tied[1]),
            net(x=nn.Linear(2, 2)),
            net(x=[nn.gelu, tied[0]]),
            net(x=[nn.gelu, tied[0]]),
            net(x=[nn.silu, tied[0]]),
            net(x=[None, tied[0]]),
            net(x=[tied[0]]),
            net(x=[tied[0], None]),
            net(x=tied),
            net(x=tied[:1]),
            net(f=nn.gelu),
            net(f=nn.silu),
        ],
        other=tied[1],
    )
    assert (
        str(tree(model))
        == """\
Net                                                                       132 params   516 B   float16, float32
  layers[0:2]   Net                                                  x2   48           192 B   float32
  layers.2      Net                                                       24           96 B    float32
  layers.3      Net                                                       24           96 B    float32
  layers.4      Net                                                       24           84 B    float16, float32
  layers.5      Net                                                       6            24 B    float32
    x           Linear(2 -> 2, bias)                                      6            24 B    float32            tied
  layers.6      Net                                                       6            24 B    float32
    x           Linear(2 -> 2, bias)                                      6            24 B    float32
  layers[7:9]   Net                                                  x2
    x.0         function gelu                                        x2
    x.1         ReLU6                                                x2
  layers.9      Net
    x.0         function silu
    x.1         ReLU6
  layers.10     Net
    x.0         None
    x.1         ReLU6
  layers.11     Net
    x.0         ReLU6
  layers.12     Net
    x.0         ReLU6
    x.1         None
  layers.13     Net
    x           tuple of 1 ReLU6, 1 Linear, which MLX does not see
  layers.14     Net
    x           tuple of 1 ReLU6, which MLX does not see
  layers.15     Net
    f           function gelu
  layers.16     Net
    f           function silu
  other         Linear(2 -> 2, bias)                                                                              tied to layers.5.x"""
    )


def test_modules_under_a_private_name_do_not_count_in_their_parent():
    assert (
        str(tree(net(_hidden=nn.Linear(2, 2), a=nn.Linear(2, 2), secret=Secret())))
        == """\
Net                                6 params   24 B   float32
  _hidden   Linear(2 -> 2, bias)   6          24 B   float32   not in parameters()
  a         Linear(2 -> 2, bias)   6          24 B   float32
  secret    Secret"""
    )


def test_names_that_no_plain_pattern_matches_are_drawn_as_regular_expressions():
    model = net(**{"a[b]": net(x=Leaf(), y=Leaf()), "dot.ted": Leaf(), "0": Leaf(), "": Leaf()})
    assert (
        str(tree(model))
        == """\
Net                                              5 params   20 B   float32
  re.compile('a\\\\[b\\\\]')   Net                   2          8 B    float32
    {x,y}                  Leaf(weight 1)   x2   2          8 B    float32
  dot.ted                  Leaf(weight 1)        1          4 B    float32
  0                        Leaf(weight 1)        1          4 B    float32
  re.compile('')           Leaf(weight 1)        1          4 B    float32"""
    )


def test_a_single_module_is_drawn_in_one_line():
    assert str(tree(nn.Linear(2, 2))) == "Linear(2 -> 2, bias)   6 params   24 B   float32"
    assert repr(tree(nn.ReLU())) == "ReLU"


def test_of_more_children_than_fit_the_first_and_the_selected_are_drawn():
    assert (
        str(tree(net(layers=[nn.Linear(n, 1) for n in range(1, 51)]), "layers[40]"))
        == """\
  Net                                     1.3K params   5.3 KB   float32
    layers.0      Linear(1 -> 1, bias)    2             8 B      float32
    layers.1      Linear(2 -> 1, bias)    3             12 B     float32
    layers.2      Linear(3 -> 1, bias)    4             16 B     float32
    layers.3      Linear(4 -> 1, bias)    5             20 B     float32
    layers.4      Linear(5 -> 1, bias)    6             24 B     float32
    layers.5      Linear(6 -> 1, bias)    7             28 B     float32
    layers.6      Linear(7 -> 1, bias)    8             32 B     float32
    layers.7      Linear(8 -> 1, bias)    9             36 B     float32
    layers.8      Linear(9 -> 1, bias)    10            40 B     float32
    layers.9      Linear(10 -> 1, bias)   11            44 B     float32
    layers.10     Linear(11 -> 1, bias)   12            48 B     float32
    layers.11     Linear(12 -> 1, bias)   13            52 B     float32
    layers.12     Linear(13 -> 1, bias)   14            56 B     float32
    layers.13     Linear(14 -> 1, bias)   15            60 B     float32
    layers.14     Linear(15 -> 1, bias)   16            64 B     float32
    layers.15     Linear(16 -> 1, bias)   17            68 B     float32
    layers.16     Linear(17 -> 1, bias)   18            72 B     float32
    layers.17     Linear(18 -> 1, bias)   19            76 B     float32
    layers.18     Linear(19 -> 1, bias)   20            80 B     float32
    layers.19     Linear(20 -> 1, bias)   21            84 B     float32
    layers.20     Linear(21 -> 1, bias)   22            88 B     float32
    layers.21     Linear(22 -> 1, bias)   23            92 B     float32
*   layers.40     Linear(41 -> 1, bias)   42            168 B    float32
    ... 27 more
'layers[40]' selects 1 of 50 modules"""
    )


def test_twenty_four_children_of_a_line_are_drawn():
    assert names_of(tree(siblings(1, 24))) == ["Net", *(f"l{n}" for n in range(1, 25))]
    assert names_of(tree(siblings(1, 25))) == ["Net", *(f"l{n}" for n in range(1, 24)), "..."]
    assert str(tree(siblings(1, 25))).endswith("\n  ... 2 more")


def names_of(picture: Any) -> list[str]:
    return [line.removeprefix("*").split()[0] for line in str(picture).splitlines()]


def test_a_text_has_at_most_forty_lines():
    for more, pattern, is_open in (
        (19, "**", True),
        (20, "**", False),
        (18, "c", True),
        (19, "c", False),
    ):
        model = net(a=siblings(1, 17), b=siblings(20, 19 + more), c=nn.ReLU())
        picture = tree(model, pattern)
        lines = str(picture).splitlines()
        assert len(lines) == (40 if is_open else 21 + (pattern != "**"))
        closed = [line for line in lines if line.endswith(f"{more} modules inside")]
        assert len(closed) == (not is_open)


TWO = net(a=siblings(1, 20), b=siblings(21, 40))


@pytest.mark.parametrize(
    ("model", "pattern", "closed"),
    [
        (TWO, "**", {"b": "20 modules inside"}),
        (TWO, "b.l30", {"a": "20 modules inside"}),
        (net(a=TWO.a, b=TWO.b, c=TWO.b), "**", {"{b,c}": "tied, one module, 40 modules inside"}),
        (TWO, ["**"], {"b": "20 modules inside, 20 selected"}),
        (TWO, ["b", "a.l3"], {"b": "20 modules inside"}),
        (TWO, ["a", "b", "a.l3", "b.l3*"], {"b": "20 modules inside, 10 selected"}),
        (
            net(a=net(p=siblings(1, 15)), b=siblings(21, 35), c=siblings(41, 50)),
            "**",
            {"p": "15 modules inside"},
        ),
        (
            net(a=siblings(1, 12), p=net(b=siblings(1, 12)), z=net(r=net(s=siblings(31, 41)))),
            "**",
            {"b": "as a"},
        ),
    ],
)
def test_lines_that_do_not_fit_are_collapsed_and_say_what_is_inside(model, pattern, closed):
    found = {}
    for line in str(tree(model, pattern)).splitlines():
        cells = re.split("   +", line.removeprefix("*").strip())
        if re.search("^as | inside", cells[-1]):
            found[cells[0]] = cells[-1]
    assert found == closed


@pytest.mark.parametrize(
    ("name", "note"),
    [("a" * 30, f"as {'a' * 30}.x"), ("b" + "a" * 30, f"as ...{'a' * 27}.x")],
)
def test_a_note_cuts_a_long_pattern_at_its_start(name, note):
    parts = net(x=siblings(1, 20), rest=net(y=net(x=siblings(1, 20))))
    picture = str(tree(net(**{name: parts}))).splitlines()
    assert [line for line in picture if line.endswith(note)]
    assert [line for line in picture if " as " in line]


def test_lists_in_lists_and_dicts_are_drawn():
    model = net(grid=[[Leaf(), nn.ReLU()], [Leaf(), nn.ReLU()]], by={"a": Leaf(), 1: Leaf()})
    assert (
        str(tree(model))
        == """\
Net                                   4 params   16 B   float32
  grid[0:2].0   Leaf(weight 1)   x2   2          8 B    float32
  grid[0:2].1   ReLU             x2
  by.{a,1}      Leaf(weight 1)   x2   2          8 B    float32"""
    )


def test_a_module_with_a_private_and_a_public_name_counts_at_the_public_one():
    shared = nn.Linear(2, 2)
    assert (
        str(tree(net(_a=net(b=shared), _c=shared, d=shared, e=shared)))
        == """\
Net                                   6 params   24 B   float32
  _a      Net                         6          24 B   float32   not in parameters()
    b     Linear(2 -> 2, bias)        6          24 B   float32   tied
  _c      Linear(2 -> 2, bias)        6          24 B   float32   tied
  {d,e}   Linear(2 -> 2, bias)   x2   6          24 B   float32   tied, one module"""
    )


def test_modules_without_parameters_are_not_drawn_as_tied():
    inner = net(_hidden=nn.Linear(2, 2), relu=nn.ReLU(), secret=Secret())
    assert (
        str(tree(net(a=inner, b=inner)))
        == """\
Net
  {a,b}       Net                    x2
    _hidden   Linear(2 -> 2, bias)   x2   12   48 B   float32   not in parameters()
    relu      ReLU                   x2
    secret    Secret                 x2"""
    )


def test_only_a_name_of_the_module_itself_is_private():
    module = net(by={"_a": nn.Linear(2, 2), "b._c": nn.ReLU()}, _hidden={"a": nn.Linear(3, 3)})
    assert (
        str(tree(net(layers=[module, module, nn.ReLU()])))
        == """\
Net                                         6 params   24 B   float32
  layers[0:2]   Net                    x2   6          24 B   float32   tied, one module
    by._a       Linear(2 -> 2, bias)   x2   6          24 B   float32
    by.b._c     ReLU                   x2
    _hidden.a   Linear(3 -> 3, bias)   x2   12         48 B   float32   not in parameters()
  layers.2      ReLU"""
    )


# ---------------------------------------------------------------- what fits


def test_a_big_mixture_of_experts_is_drawn_in_five_lines():
    lines = str(tree(Mixture(20, 64))).splitlines()
    assert [line.split()[0] for line in lines] == [
        "Mixture", "layers[0:20]", "gate", "experts[0:64]", "w{1,2,3}"
    ]  # fmt: skip
    assert " x3840 " in lines[-1]


def test_a_model_2000_levels_deep_is_drawn():
    picture = tree(deep(2000), "**.w")
    lines = str(picture).splitlines()
    assert len(lines) == 40
    assert lines[19].endswith("3962 modules inside, 1981 selected")
    assert lines[-1] == "'**.w' selects 2000 of 4000 modules"
    assert picture._repr_html_().count("<details") == 100
    assert len(picture._rows) == 4001


# ---------------------------------------------------------------- what holds for any model


def test_a_line_counts_the_places_that_its_pattern_selects():
    inner = net(x=nn.Linear(2, 2), layers=[nn.ReLU(), nn.Linear(3, 3)])
    block = net(one=inner, two=inner, other=nn.Linear(2, 2))
    model = net(a=block, b=block, more=[block, inner, Net()], last=inner)
    rows = tree(model)._rows[1:]
    assert len(rows) > 8
    for row in rows:
        assert row.count == len(paths_of(model, row)), row.pattern


@given(models(shared=False))
def test_the_patterns_of_all_lines_select_every_place_once(model):
    rows = [row for row in tree(model)._rows[1:] if row.form]
    assert sorted(path for row in rows for path in paths_of(model, row)) == sorted(
        place.path for place in oracle.places(model)
    )
    assert [row.count for row in rows] == [len(paths_of(model, row)) for row in rows]


@given(models(shared=False), st.data())
def test_the_marked_lines_are_the_places_that_select_returns(model, data):
    patterns = data.draw(lists_of_patterns(model))
    places = oracle.chosen(model, patterns)
    assume(not oracle.idle(model, patterns))
    picture = tree(model, patterns)
    marked = [row for row in picture._rows if row.marked]
    assert sorted(path for row in marked for path in paths_of(model, row)) == sorted(
        place.path for place in places
    )
    selected, modules = len(places), len(oracle.places(model))
    summary = str(picture).splitlines()[-1]
    assert summary.endswith(f" selects {selected} of {modules} module" + "s" * (modules != 1))


@given(models(shared=True))
def test_a_picture_counts_each_parameter_once(model):
    picture = tree(model)
    assert picture._rows[0].measure.params == oracle.parameters(model)
    assert picture._rows[0].modules == len(oracle.places(model))


def paths_of(model: nn.Module, row: Any) -> list[str]:
    """The places of a line, looked up by its pattern."""
    path = row.pattern
    if path.startswith("re.compile("):
        path = re.compile(eval(path.removeprefix("re.compile(").removesuffix(")")))
    return [place.path for place in oracle.chosen(model, [path])]


# ---------------------------------------------------------------- terminals and notebooks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "environment", "in_colour"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (None, {}, False),
    ],
)
def test_only_a_terminal_that_wants_colour_gets_it(monkeypatch, terminal, environment, in_colour):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    picture = tree(nn.Sequential(nn.ReLU(), nn.Tanh()), "layers[1]")
    monkeypatch.setattr(sys, "stdout", terminal)
    drawn = str(picture)
    monkeypatch.undo()
    green, plain = ("\x1b[1;32m", "\x1b[0m") if in_colour else ("", "")
    assert drawn == (
        f"  Sequential\n    layers.0   ReLU\n{green}*   layers.1   Tanh{plain}\n"
        "'layers[1]' selects 1 of 2 modules"
    )


class Page(HTMLParser):
    """Reads what a browser would show, and fails for tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.is_open: list[bool] = []  # of each `details`
        self.lines: list[str] = []
        self.seen: list[bool] = []  # whether a line can be seen at first
        self.marked: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "details":
            self.is_open.append(("open", None) in attrs)
        if tag in ("p", "summary", "footer"):
            self.lines.append("")
            around = self.is_open[:-1] if tag == "summary" else self.is_open
            self.seen.append(all(around))
            if ("class", "marked") in attrs:
                self.marked.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "details":
            self.is_open.pop()

    def handle_data(self, data):
        if "style" not in self.open and self.lines:
            self.lines[-1] += data


def test_a_notebook_gets_a_tree_whose_lines_can_be_expanded():
    page = Page(tree(Llama(), "**.{q,v}_proj")._repr_html_())
    assert page.tags == {"div", "style", "details", "summary", "p", "b", "i", "footer"}
    assert len(page.marked) == 2
    assert [line.split()[0] for line in page.lines] == [
        "Llama", "{embed_tokens,lm_head}", "layers[0:4]", "self_attn", "q_proj", "k_proj",
        "v_proj", "o_proj", "rope", "mlp", "{gate,up}_proj", "down_proj", "norm",
        "'**.{q,v}_proj'",
    ]  # fmt: skip


def half_frozen() -> nn.Module:
    shared = nn.Linear(2, 2)
    model = net(
        a=shared,
        layers=[net(b=shared, relu=nn.ReLU()), shared, None],
        q=nn.QuantizedLinear(64, 1, False),
        f=nn.gelu,
    )
    shared.freeze(keys="bias", recurse=False)
    return model


def page_of(picture: Any) -> str:
    """The page line by line, without its style."""
    html = re.sub("(?s)<style>.*</style>", "<style></style>", picture._repr_html_())
    return re.sub("(?=<(details|summary|p|/details|footer))", "\n", html)


def test_a_page_is_nested_details_and_paragraphs():
    assert (
        page_of(tree(half_frozen(), "layers.0.**"))
        == """\
<div class="mlx-modswap"><style></style>
<details open>
<summary><b>Net</b><i>                                                            70 params   4 trainable   64 B   float32, uint32</i></summary>
<p><b>a</b><i>          Linear(2 -&gt; 2, bias)                              6           4             24 B   float32           tied</i></p>
<details open>
<summary><b>layers.0</b><i>   Net</i></summary>
<p class="marked"><b>b</b><i>        Linear(2 -&gt; 2, bias)                                                                                 tied to a</i></p>
<p class="marked"><b>relu</b><i>     ReLU</i></p>
</details>
<p><b>layers.1</b><i>   Linear(2 -&gt; 2, bias)                                                                                 tied to a</i></p>
<p><b>layers.2</b><i>   None</i></p>
<p><b>q</b><i>          QuantizedLinear(64 -&gt; 1, group_size=64, bits=4)   64          0             40 B   float32, uint32</i></p>
<p><b>f</b><i>          function gelu</i></p>
</details>
<footer>&#x27;layers.0.**&#x27; selects 2 of 6 modules</footer></div>"""
    )
    assert (
        page_of(tree(net(**{"<": nn.Linear(1, 1)})))
        == """\
<div class="mlx-modswap"><style></style>
<details open>
<summary><b>Net</b><i>                          2 params   8 B   float32</i></summary>
<p><b>&lt;</b><i>   Linear(1 -&gt; 1, bias)   2          8 B   float32</i></p>
</details></div>"""
    )


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (Llama(), "**"),
        (Llama(6), "layers[-2:].**.{q,v}_proj"),
        (net(a=siblings(1, 16), b=siblings(2, 18), c=net(d=siblings(5, 12))), "c.d.*"),
        (net(a=siblings(1, 17), b=siblings(20, 38), c=nn.ReLU()), "c"),
        (deep(70), "**"),
        (deep(70), "**.w"),
    ],
)
def test_a_page_shows_at_first_what_the_text_shows(model, pattern):
    picture = tree(model, pattern)
    page = Page(picture._repr_html_())
    seen = [line.split()[0] for line, is_seen in zip(page.lines, page.seen) if is_seen]
    assert seen == names_of(picture)
    assert len(page.lines) > len(seen) or len(seen) < 39


def test_a_page_draws_two_hundred_children_of_a_line():
    for number, last in ((200, "l200"), (201, "... 2 more"), (202, "... 3 more")):
        lines = Page(tree(siblings(1, number))._repr_html_()).lines
        assert len(lines) == 201
        assert lines[-1].split(" Linear")[0].strip() == last


def test_names_with_markup_are_escaped_on_a_page():
    model = net(**{"<script>": Leaf(), "a": type("<b>", (nn.Module,), {})()})
    page = Page(tree(model, "<script>")._repr_html_())
    assert page.tags.isdisjoint({"script"})
    assert [line.split()[:2] for line in page.lines] == [
        ["Net", "1"], ["<script>", "Leaf(weight"], ["a", "<b>"], ["'<script>'", "selects"]
    ]  # fmt: skip


@given(models())
def test_every_page_has_matching_tags(model):
    Page(tree(model)._repr_html_())


# ---------------------------------------------------------------- what else


def test_tree_takes_the_arguments_of_select():
    model = Llama()
    picture = tree(model, ["**"], where=nn.Linear, exclude="**.mlp.*")
    assert str(picture).splitlines()[-1] == "'**' with where and exclude selects 16 of 50 modules"
    assert str(tree(model, re.compile(".*proj"))).splitlines()[-1] == (
        "re.compile('.*proj') selects 28 of 50 modules"
    )
    assert str(tree(model, "**", exclude=[])) == str(tree(model))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pattern": "q_proj"}, NoMatchError),
        ({"pattern": "**", "exclude": "x"}, NoMatchError),
        ({"pattern": "a**"}, PatternError),
        ({"pattern": 3}, TypeError),
        ({"pattern": nn.ReLU()}, TypeError),
        ({"pattern": "**", "exclude": nn.ReLU()}, TypeError),
        ({"pattern": "**", "exclude": "a**"}, PatternError),
        ({"pattern": "**", "where": 3}, TypeError),
    ],
)
def test_tree_refuses_what_select_refuses_in_the_same_words(arguments, error):
    with pytest.raises(error) as of_select:
        select(Llama(), **arguments)
    with pytest.raises(error, match=re.escape(str(of_select.value))):
        tree(Llama(), **arguments)


def test_tree_refuses_a_model_with_a_cycle():
    inner = Net()
    model = net(a=inner)
    inner.b = model
    with pytest.raises(
        SelectionError, match=r"the model contains a cycle: 'a\.b' is the model itself"
    ):
        tree(model)


def test_a_picture_keeps_no_module_alive():
    model = Llama()
    alive = weakref.ref(model.layers[0])
    picture = tree(model, "**.q_proj")
    del model
    gc.collect()
    assert alive() is None
    assert str(picture).endswith("selects 4 of 50 modules")


def test_drawing_a_model_changes_nothing_in_it():
    model = Llama()
    before = oracle.Snapshot(model)
    str(tree(model, "**.q_proj"))
    assert before.differences() == []
