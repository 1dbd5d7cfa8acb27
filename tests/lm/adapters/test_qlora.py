"""Adapters around quantized layers: fused without rounding again, and saved as a mixed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import model_folders
import pytest
from adapting import adapters_in, lora
from mlx_lm.utils import load_model

from mlx_modswap import lm, replace_layers, select, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TOKENS = mx.array([[1, 2, 3, 4]])
PLACES = {
    "linear layers": "**.{q,down}_proj",
    "the embedding": "**.embed_tokens",
    "both": ["**.q_proj", "**.embed_tokens"],
}


@pytest.fixture(params=[4, 8])
def folder(request, tmp_path) -> Path:
    """A quantized model."""
    source = model_folders.llama_folder(tmp_path / "source")
    rules = {"**": {"bits": request.param, "group_size": 32}}
    lm.convert(source, tmp_path / "quantized", rules, dtype="float32")
    return tmp_path / "quantized"


def load(folder: Path) -> Any:
    return load_model(folder)[0]


def difference(one: mx.array, other: mx.array) -> Any:
    return mx.abs(one - other).max().item()


@pytest.mark.parametrize("places", PLACES)
def test_dequantize_keeps_what_was_learned_and_the_mixed_model_is_saved(places, folder, tmp_path):
    model = load(folder).freeze()
    adapters = replace_layers(model, PLACES[places], lora(4))
    expected = model(TOKENS)
    paths = list(adapters_in(model))
    with swapped(model, paths, lambda path, layer: layer.fuse()):
        again = difference(model(TOKENS), expected)
    replace_layers(model, paths, lambda path, layer: layer.fuse(dequantize=True))
    lm.save(model, tmp_path / "fused", folder)
    loaded = load(tmp_path / "fused")
    layers = select(loaded, "**", where=lambda path, layer: hasattr(layer, "weight"))

    assert difference(model(TOKENS), expected) < 1e-4
    assert again > 1e-3
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert {type(layers[path]) for path in adapters} <= {nn.Linear, nn.Embedding}
    assert any(isinstance(layer, nn.QuantizedLinear) for layer in layers.values())


def test_the_adapter_alone_is_saved_and_read_around_the_quantized_layers(folder, tmp_path):
    model, fresh = load(folder).freeze(), load(folder)
    replace_layers(model, PLACES["both"], lora(4))
    lm.save_adapters(model, tmp_path / "adapters")
    replace_layers(fresh, lm.adapter_rules(tmp_path / "adapters"))

    assert mx.allclose(fresh(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
