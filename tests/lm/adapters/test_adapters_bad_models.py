"""Models that adapters do not fit, or whose adapters cannot be saved: the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapting import adapted, contents, frozen, is_expected, lora, message
from mlx_lm.tuner.lora import LoRALinear

from mlx_modswap import Wrapper, capture, lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q1, Q3 = (f"model.layers.{n}.self_attn.q_proj" for n in (1, 3))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with two adapters of ranks 2 and 4."""
    model = frozen("llama")
    replace_layers(model, {Q1: lora(2, 3.0), Q3: lora(4, 5.0)})
    lm.save_adapters(model, tmp_path / "math")
    return tmp_path / "math"


def llama(**config: Any) -> nn.Module:
    return frozen("llama", **config)


def with_adapters() -> nn.Module:
    model = llama()
    replace_layers(model, Q3, lora(8))
    return model


def with_a_norm() -> nn.Module:
    model = llama()
    replace_layers(model, Q3, lambda path, layer: nn.RMSNorm(64))
    return model


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "fewer blocks": (
        lambda: llama(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "NoMatchError: 'model.layers.3.self_attn.q_proj' matches nothing...",
    ),
    "wider layers": (
        lambda: llama(hidden_size=128),
        f"ValueError: 'math/adapters.safetensors' does not fit '{Q1}': lora_a has the shape "
        "(64, 2), and the Linear needs (128, 2)",
    ),
    "quantized layers of another width": (
        lambda: nn.quantize(model := llama(head_dim=32), 32, 4) or model,
        f"ValueError: 'math/adapters.safetensors' does not fit '{Q1}': lora_b has the shape "
        "(2, 64), and the QuantizedLinear needs (2, 128)",
    ),
    "wider layers that are quantized": (
        lambda: nn.quantize(model := llama(hidden_size=128), 32, 4) or model,
        f"ValueError: 'math/adapters.safetensors' does not fit '{Q1}': lora_a has the shape "
        "(64, 2), and the QuantizedLinear needs (128, 2)",
    ),
    "adapters": (
        with_adapters,
        f"ValueError: '{Q3}' already has an adapter, a LoRALinear; to replace it, take it off "
        f"first (layer.linear), and to add this one to it, use '{Q3}.linear'",
    ),
    "a layer of another class": (
        with_a_norm,
        f"ValueError: 'math/adapters.safetensors' has a LoRA adapter for '{Q3}', and mlx-lm has no "
        "such adapter for RMSNorm",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_of_another_model_is_one_clear_error_that_changes_nothing(name, saved):
    make, expected = MISFITS[name]
    model, rules = make(), lm.adapter_rules(saved)
    before = contents(model)
    text = message(lambda: replace_layers(model, rules), saved)

    assert is_expected(text, expected), text
    assert contents(model)[0] == before[0]


def test_magnitudes_of_dora_of_another_length_do_not_fit(tmp_path):
    model = llama()
    replace_layers(model, Q1, lora(4, method="dora"))
    lm.save_adapters(model, tmp_path)
    file = str(tmp_path / "adapters.safetensors")
    arrays: Any = mx.load(file)
    mx.eval(arrays)
    mx.save_safetensors(file, {**arrays, f"{Q1}.m": mx.zeros((65,))})

    assert message(lambda: replace_layers(llama(), lm.adapter_rules(tmp_path)), tmp_path) == (
        f"ValueError: 'math/adapters.safetensors' does not fit '{Q1}': m has the shape (65,), and "
        "the Linear needs (64,)"
    )


def test_dora_has_no_place_around_experts_and_quantized_embeddings(tmp_path):
    model = llama()
    replace_layers(model, "model.embed_tokens", lora(4, method="dora"))
    lm.save_adapters(model, tmp_path)
    fresh = llama()
    nn.quantize(fresh, 32, 4)

    assert message(lambda: replace_layers(fresh, lm.adapter_rules(tmp_path)), tmp_path) == (
        "ValueError: 'math/adapters.safetensors' has a DoRA adapter for 'model.embed_tokens', and "
        "mlx-lm has no such adapter for QuantizedEmbedding"
    )


# ---------------------------------------------------------------- models that cannot be saved


class MyLoRA(nn.Module):
    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear, self.lora_a, self.lora_b = linear, mx.ones((64, 4)), mx.ones((4, 64))


class Doubled(LoRALinear):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(x)


def subclassed(path: str, layer: Any) -> nn.Module:
    adapter = Doubled(64, 64)
    adapter.linear = layer
    return adapter


class Half(Wrapper):
    def __call__(self, x: mx.array) -> mx.array:
        return 0.5 * super().__call__(x)


def stacked(path: str, layer: nn.Module) -> nn.Module:
    inner = adapted(layer, r=4)
    outer = LoRALinear(64, 64, r=2)
    outer.linear = inner
    return outer


def changed(**attributes: Any) -> Callable[[str, Any], nn.Module]:
    def factory(path: str, layer: Any) -> nn.Module:
        adapter = adapted(layer, r=4, scale=2.0)
        for name, value in attributes.items():
            setattr(adapter, name, value)
        return adapter

    return factory


def with_a_long_magnitude(path: str, layer: Any) -> nn.Module:
    adapter = adapted(layer, "dora", r=4)
    adapter.m = mx.ones((65,))
    return adapter


def around_a_norm(path: str, layer: Any) -> nn.Module:
    adapter = adapted(layer, r=4)
    adapter.linear = nn.RMSNorm(64)
    return adapter


UNSAVABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no adapters": (
        {Q1: lambda path, layer: nn.Linear(64, 64)},
        "ValueError: the model has no adapters; put some in with replace_layers and a class of "
        "mlx-lm, such as mlx_lm.tuner.lora.LoRALinear",
    ),
    "a class of one's own": (
        {"**.q_proj": lambda path, layer: MyLoRA(layer)},
        "ValueError: 'model.layers.0.self_attn.q_proj' is a MyLoRA, which mlx-lm does not build; "
        "use the classes of mlx_lm.tuner.lora and mlx_lm.tuner.dora",
    ),
    "a subclass of mlx-lm's": (
        {Q1: subclassed},
        f"ValueError: '{Q1}' is a Doubled, which mlx-lm does not build; use the classes of "
        "mlx_lm.tuner.lora and mlx_lm.tuner.dora",
    ),
    "a wrapper around mlx-lm's": (
        {Q1: lambda path, layer: Half(adapted(layer, r=4))},
        f"ValueError: '{Q1}' is a Half, which mlx-lm does not build; use the classes of "
        "mlx_lm.tuner.lora and mlx_lm.tuner.dora",
    ),
    "an adapter in an adapter": (
        {Q1: stacked},
        f"ValueError: '{Q1}' is an adapter around an adapter, and mlx-lm reads one for each layer; "
        "remove one of the two",
    ),
    "an adapter around another class": (
        {Q1: around_a_norm},
        f"ValueError: '{Q1}' is a LoRALinear around a RMSNorm, which mlx-lm does not build",
    ),
    "LoRA and DoRA": (
        {"**.q_proj": lora(4), "**.{k,v}_proj": lora(4, method="dora")},
        "ValueError: mlx-lm reads one method for all adapters, not LoRA at "
        "'model.layers[0:4].self_attn.q_proj', DoRA at 'model.layers[0:4].self_attn.{k,v}_proj'; "
        "remove the adapters of one kind, or fuse them",
    ),
    "two dropouts": (
        {"**.q_proj": lora(4, dropout=0.1), "model.layers[0].**.k_proj": lora(4)},
        "ValueError: mlx-lm reads one dropout for all adapters, not 0.1 at "
        "'model.layers[0:4].self_attn.q_proj', 0.0 at 'model.layers.0.self_attn.k_proj'; give them "
        "one: layer.dropout = mlx.nn.Dropout(p)",
    ),
    "another class of dropout": (
        {Q1: changed(dropout=nn.Identity())},
        f"ValueError: the dropout of '{Q1}' must be an mlx.nn.Dropout, not a module (Identity)",
    ),
    "arrays of two ranks": (
        {Q1: changed(lora_b=mx.zeros((8, 64)))},
        f"ValueError: the adapter at '{Q1}' does not fit its layer: lora_b has the shape (8, 64), "
        "and the Linear needs (4, 64)",
    ),
    "magnitudes of another length": (
        {Q1: with_a_long_magnitude},
        f"ValueError: the adapter at '{Q1}' does not fit its layer: m has the shape (65,), and the "
        "Linear needs (64,)",
    ),
    "an array as scale": (
        {Q1: changed(scale=mx.array(2.0))},
        f"ValueError: the scale of '{Q1}' must be a number, not array(2, dtype=float32)",
    ),
    "a scale that is infinite": (
        {Q1: changed(scale=float("inf"))},
        f"ValueError: the scale of '{Q1}' must be a number, not inf",
    ),
    "two scales of zero among others": (
        {"**.q_proj": changed(scale=0), "**.k_proj": lora(4), "**.up_proj": changed(scale=0)},
        "ValueError: the scale is 0 at model.layers[0:4].self_attn.q_proj, "
        "model.layers[0:4].mlp.up_proj, and lora_b could not be restored from what mlx-lm reads; "
        "set another scale, or remove the adapters",
    ),
    "a scale of zero among others": (
        {Q1: changed(scale=0), "**.k_proj": lora(4)},
        f"ValueError: the scale is 0 at {Q1}, and lora_b could not be restored from what mlx-lm "
        "reads; set another scale, or remove the adapters",
    ),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_mlx_lm_cannot_read_is_one_clear_error_and_nothing_is_written(name, tmp_path):
    rules, expected = UNSAVABLE[name]
    model = llama()
    replace_layers(model, rules)
    before = contents(model)
    text = message(lambda: lm.save_adapters(model, tmp_path / "deep" / "math"), tmp_path)

    assert is_expected(text, expected), text
    assert contents(model)[0] == before[0]
    assert list(tmp_path.iterdir()) == []


def test_a_wrapper_around_an_adapter_is_named_inside_a_block_with_hooks_too(tmp_path):
    model = llama()
    replace_layers(model, Q1, lambda path, layer: Half(adapted(layer, r=4)))
    with capture(model, Q1, strict=False), capture(model, Q1, strict=False):
        text = message(lambda: lm.save_adapters(model, tmp_path / "math"), tmp_path)

    assert is_expected(text, UNSAVABLE["a wrapper around mlx-lm's"][1]), text


def test_the_fused_layers_of_afm7_whose_adapters_nothing_reads_are_refused(tmp_path):
    model = frozen("afm7")
    path = "model.layers.0.self_attn.qkv_proj"
    replace_layers(model, path, lambda path, layer: layer.to_lora(r=4))
    assert message(lambda: lm.save_adapters(model, tmp_path), tmp_path) == (
        f"ValueError: '{path}' is a FusedLoRALinear, which mlx-lm builds but does not read: its "
        "arrays are lists, and mlx-lm refuses their names (lora_a.0, lora_a.1, ...); fuse it "
        "(layer.fuse()) and save the model with lm.save, or leave this layer without an adapter"
    )

    fresh = frozen("afm7")
    replace_layers(model, path, lambda path, layer: adapted(nn.Linear(64, 128).freeze(), r=4))
    lm.save_adapters(model, tmp_path)
    assert message(lambda: replace_layers(fresh, lm.adapter_rules(tmp_path)), tmp_path) == (
        f"ValueError: 'math/adapters.safetensors' has a LoRA adapter for '{path}', and mlx-lm "
        "has no such adapter for FusedLinear"
    )


def test_a_path_that_mlx_lm_would_find_in_a_block_too_is_one_clear_error(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]
            self.head = nn.Linear(8, 8)

    model = Model()
    replace_layers(model, "head", lora(2))

    assert message(lambda: lm.save_adapters(model, tmp_path), tmp_path) == (
        "ValueError: mlx-lm would also find 'head' inside a block, and would put adapters "
        "there as well"
    )


def test_a_model_must_be_a_module():
    assert message(lambda: lm.save_adapters({}, "math"), Path("math")) == (  # pyright: ignore[reportArgumentType]
        "TypeError: model must be an mlx.nn.Module, not a dict"
    )
