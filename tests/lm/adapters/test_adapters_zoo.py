"""Adapters in every architecture of mlx-lm: at any places, of any ranks and scales."""

from __future__ import annotations

import random
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from adapting import (
    adaptable,
    adapted,
    adapters_in,
    config_of,
    freeze,
    frozen,
    identical,
    lora,
)
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_modswap import lm, replace_layers, select, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

INSTALLED = zoo.installed()
BUILT = [name for name in zoo.ZOO if zoo.ZOO[name].get("module", name) in INSTALLED]
READ_WEIGHTS = {  # layers whose `.weight` the model reads, and an adapter has none
    "gemma3n": "**.altup.*_coefs",
    "kimi_k3": "**.*_res_proj",
    "seed_oss": "model.embed_tokens",
}


def build(name: str) -> Any:
    """A model with half of its layers quantized."""
    model, chance = zoo.build(name), random.Random(name)

    def some(path: str, layer: Any) -> bool:
        fits = hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0
        return fits and not hasattr(layer, "to_lora") and chance.random() < 0.5

    def quantized(path: str, layer: Any) -> nn.Module:
        return layer.to_quantized(group_size=32, bits=chance.choice((4, 8)))

    if name != "bitnet":  # it has no layer but its embedding, which DoRA needs as it is
        exclude = READ_WEIGHTS.get(name, ())
        replace_layers(model, "**", quantized, where=some, exclude=exclude, strict=False)
    return freeze(model)


def close(one: mx.array, other: mx.array) -> bool:
    one, other = (mx.nan_to_num(array.astype(mx.float32)) for array in (one, other))
    return (mx.abs(one - other).max() <= 1e-4 * mx.abs(other).max()).item() is True


def test_all_architectures_that_run_are_compared():
    if version("mlx-lm") != zoo.MADE_FOR:
        pytest.skip(f"the zoo was made for mlx-lm {zoo.MADE_FOR}, this is {version('mlx-lm')}")
    compared = [name for name in zoo.ARCHITECTURES if "no_forward" not in zoo.ZOO[name]]

    assert len(zoo.ARCHITECTURES) == 126
    assert len(compared) == 124


@pytest.mark.parametrize("name", READ_WEIGHTS)
def test_a_model_that_reads_the_weight_of_a_layer_does_not_run_with_an_adapter_there(name):
    model = zoo.build(name)
    places = [p for p, layer in select(model, READ_WEIGHTS[name]).items() if adaptable(layer)]
    for path in places:
        with (
            swapped(model, path, lora(2)),
            pytest.raises(AttributeError, match="object has no attribute 'weight'"),
        ):
            zoo.run(name, model)
    zoo.run(name, model)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", BUILT)
def test_any_places_ranks_and_scales_are_read_by_mlx_lm_and_restored_by_us(name, method, tmp_path):
    model, theirs, ours = build(name), build(name), build(name)
    chance = random.Random(name)
    layers = select(model, "**", exclude=READ_WEIGHTS.get(name, ()))
    places = [path for path, layer in layers.items() if adaptable(layer, method)]
    chosen = chance.sample(places, max(1, len(places) // 3))

    def random_adapter(path: str, layer: nn.Module) -> nn.Module:
        r, scale = chance.randint(2, 8), chance.uniform(0.5, 20)
        return adapted(layer, method, r=r, scale=scale, dropout=0.1)

    adapters: Any = replace_layers(model, dict.fromkeys(chosen, random_adapter))
    lm.save_adapters(model, tmp_path)

    load_adapters(theirs, str(tmp_path)).eval()
    assert {path: type(one) for path, one in adapters_in(theirs).items()} == {
        path: type(one) for path, one in adapters.items()
    }
    with swapped(ours, lm.adapter_rules(tmp_path)) as news:
        restored: Any = news
        assert list(restored) == list(adapters)
        for path, adapter in adapters.items():
            assert type(restored[path]) is type(adapter)
            assert restored[path].scale == adapter.scale
            assert identical(restored[path].lora_a, adapter.lora_a)
            assert mx.allclose(restored[path].lora_b, adapter.lora_b, rtol=2e-7, atol=0)
        if "no_forward" not in zoo.ZOO[name]:
            expected = zoo.run(name, model.eval())
            assert close(zoo.run(name, theirs), expected)
            assert close(zoo.run(name, ours.eval()), expected)


# The keys of a pipeline stage are whole paths, and mlx-lm cannot adapt the blocks of bitnet.
RELATIVE = [name for name in BUILT if "pipeline" not in zoo.ZOO[name] and name != "bitnet"]


@pytest.mark.parametrize("name", RELATIVE)
def test_what_mlx_lm_adapts_by_relative_keys_is_saved_with_relative_keys(name, tmp_path):
    model, fresh = frozen(name), zoo.build(name)
    chance = random.Random(name)
    last = chance.randint(1, len(model.layers))
    places = {
        path
        for block in model.layers[-last:]
        for path, layer in block.named_modules()
        if adaptable(layer)
    }
    keys = chance.sample(sorted(places), (len(places) + 1) // 2)
    linear_to_lora_layers(model, last, {"rank": 2, "scale": 5.0, "dropout": 0.0, "keys": keys})
    lm.save_adapters(model, tmp_path)

    written = config_of(tmp_path)
    assert written["lora_parameters"]["keys"] == sorted(keys)
    assert written["num_layers"] <= last
    load_adapters(fresh, str(tmp_path))
    assert list(adapters_in(fresh)) == list(adapters_in(model))
