"""Where mlx-lm finds the places of adapters again, and what it cannot find."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from adapting import adapters_in, config_of, frozen, lora, message
from mlx_lm.models import llama
from mlx_lm.tuner import lora as tuner
from mlx_lm.tuner.utils import load_adapters

from mlx_modswap import lm, replace_layers, select

pytestmark = pytest.mark.usefixtures("on_the_cpu")


# ---------------------------------------------------------------- whole paths


@pytest.mark.parametrize("name", [name for name in zoo.VARIANTS if "pipeline" in zoo.ZOO[name]])
def test_the_keys_of_a_pipeline_stage_are_whole_paths(name, tmp_path):
    model, stage = frozen(name), zoo.build(name)
    whole = zoo.build(zoo.ZOO[name]["module"])
    places = {
        path: layer
        for path, layer in select(model, "model.layers.*.**").items()
        if type(layer) is nn.Linear
    }
    news = replace_layers(model, list(places)[:2], lora(3))
    lm.save_adapters(model, tmp_path)

    assert config_of(tmp_path)["lora_parameters"]["keys"] == list(news)
    for reader in (stage, whole):
        load_adapters(reader, str(tmp_path))
        assert set(adapters_in(reader)) == set(news)


class Subclass(llama.Model):
    """A model of one's own, as in a model_file."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)


class Own(nn.Module):
    """A model of no package."""

    def __init__(self):
        super().__init__()
        self.layers = [Block(), Block()]


def test_the_keys_of_a_subclass_of_a_model_of_mlx_lm_are_relative(tmp_path):
    model = frozen("llama")
    model.__class__ = Subclass
    replace_layers(model, "model.layers.*.self_attn.q_proj", lora(3))
    lm.save_adapters(model, tmp_path)

    assert config_of(tmp_path)["lora_parameters"]["keys"] == ["self_attn.q_proj"]


def test_the_keys_of_a_model_of_no_package_are_whole_paths_which_mlx_lm_reads(tmp_path):
    model = Own()
    model.freeze()
    news = replace_layers(model, "layers.*.proj", lora(3))
    lm.save_adapters(model, tmp_path)
    fresh = Own()
    load_adapters(fresh, str(tmp_path))

    assert config_of(tmp_path)["lora_parameters"]["keys"] == list(news)
    assert set(adapters_in(fresh)) == set(news)


# ---------------------------------------------------------------- adapters that MLX does not see


class Skip:
    """Plain Python around a block, with its attributes."""

    def __init__(self, block: nn.Module):
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def skipping(block: Any) -> Any:
    def skip(x: mx.array) -> mx.array:
        return x + 0 * block(x)

    return skip


HIDING: dict[str, tuple[Any, str]] = {
    "an object": (Skip, "a Skip"),
    "a function": (skipping, "a function"),
    "a tuple": (lambda block: (block, None), "a tuple of 2"),
}


@pytest.mark.parametrize("name", HIDING)
def test_an_adapter_in_an_entry_that_is_not_a_module_is_one_clear_error(name, tmp_path):
    hide, described = HIDING[name]
    model = frozen("llama")
    replace_layers(model, "model.layers.*.self_attn.q_proj", lora(3))
    model.model.layers[1] = hide(model.model.layers[1])

    assert message(lambda: lm.save_adapters(model, tmp_path), tmp_path) == (
        f"ValueError: model.layers[1] is {described}, not an mlx.nn.Module, so MLX does not see "
        "the adapters inside it, and they would be lost; make it a module, such as an "
        "mlx_modswap.Wrapper"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", [None, nn.relu, functools.partial(mx.mean, axis=0), (1, 2)])
def test_an_entry_without_adapters_is_not_in_the_way(entry, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), entry)
    model.freeze()
    news = replace_layers(model, "layers.0", lora(3))
    lm.save_adapters(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), entry)
    again = replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert list(again) == list(news) == ["layers.0"]


# ---------------------------------------------------------------- names of classes


class LoRALinear(nn.Module):
    """As on the page for users of PyTorch."""

    def __init__(self, linear: nn.Module, r: int):
        super().__init__()
        self.linear, self.lora_a, self.lora_b = linear, mx.ones((64, r)), mx.ones((r, 64))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = mx.ones((64, 64))


def test_a_class_with_the_name_of_one_of_mlx_lm_is_named_in_full(tmp_path):
    model, path = frozen("llama"), "model.layers.0.self_attn.q_proj"
    replace_layers(model, path, lambda path, layer: LoRALinear(layer, 4))
    assert message(lambda: lm.save_adapters(model, tmp_path), tmp_path) == (
        f"ValueError: '{path}' is a {__name__}.LoRALinear, which mlx-lm does not build; use the "
        "classes of mlx_lm.tuner.lora and mlx_lm.tuner.dora"
    )

    def around_mine(path: str, layer: Any) -> nn.Module:
        adapter: Any = tuner.LoRALinear.from_base(layer, r=4)
        adapter.linear = Linear()
        return adapter

    model = frozen("llama")
    replace_layers(model, path, around_mine)
    assert message(lambda: lm.save_adapters(model, tmp_path), tmp_path) == (
        f"ValueError: '{path}' is a LoRALinear around a {__name__}.Linear, which mlx-lm does not "
        "build"
    )


def test_a_layer_with_the_name_of_one_of_mlx_is_named_in_full(tmp_path):
    model, path = frozen("llama"), "model.layers.0.self_attn.q_proj"
    replace_layers(model, path, lora(4))
    lm.save_adapters(model, tmp_path)
    fresh = frozen("llama")
    replace_layers(fresh, path, lambda path, layer: Linear())

    assert message(lambda: replace_layers(fresh, lm.adapter_rules(tmp_path)), tmp_path) == (
        f"ValueError: 'math/adapters.safetensors' has a LoRA adapter for '{path}', and mlx-lm has "
        f"no such adapter for {__name__}.Linear"
    )


# ---------------------------------------------------------------- afm7's layers of several layers


def test_the_cure_for_fused_layers_of_afm7_works(tmp_path):
    model, path = frozen("afm7"), "model.layers.0.self_attn.qkv_proj"
    replace_layers(model, path, lambda path, layer: layer.to_lora(r=4))
    adapter: Any = select(model, path)[path]
    adapter.lora_b = [mx.random.normal(one.shape) for one in adapter.lora_b]
    tokens = mx.array([[1, 2, 3]])
    expected = model(tokens)
    with pytest.raises(ValueError, match=r"lora_a\.0, lora_a\.1"):
        lm.save_adapters(model, tmp_path)
    replace_layers(model, path, lambda path, layer: layer.fuse())

    assert mx.allclose(model(tokens), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- other threads, and the home


def in_a_thread(action: Any) -> Any:
    """The result or the error of an action in another thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("kind", ["mlx-lm", "PEFT", "experts"])
def test_rules_that_one_thread_read_are_used_by_another(kind, tmp_path):
    data = Path(__file__).parents[2] / "data" / "peft"
    folder = data / ("head" if kind == "PEFT" else "experts_as_modules") / "adapter"
    if kind == "mlx-lm":
        folder = tmp_path
        model = frozen("llama")
        rules = {"**.q_proj": lora(2, 3.0), "**.v_proj": lora(4, 7.0)}
        replace_layers(model, rules)
        lm.save_adapters(model, folder)
    read = in_a_thread(lambda: lm.adapter_rules(folder))
    first = next(iter(read.values()))
    arrays = first.__closure__[0].cell_contents.arrays

    assert all(mx.isfinite(array).all() for array in arrays.values())


def test_arrays_of_another_thread_are_named_as_the_reason(tmp_path):
    def make() -> Any:
        model = frozen("llama")
        mx.eval(model.parameters())
        replace_layers(model, "**.q_proj", lora(3))
        return model

    model = in_a_thread(make)
    error = in_a_thread(lambda: lm.save_adapters(model, tmp_path / "math"))
    assert (type(error), str(error)) == (
        RuntimeError,
        "another thread made the arrays of the adapters and has not computed them; call "
        "mx.eval(model.parameters()) there, or save the adapters there",
    )
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_may_be_named_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = frozen("llama")
    replace_layers(model, "**.q_proj", lora(3))
    lm.save_adapters(model, "~/math")

    assert (tmp_path / "math" / "adapter_config.json").is_file()
    assert lm.adapter_rules("~/math").keys() == adapters_in(model).keys()
