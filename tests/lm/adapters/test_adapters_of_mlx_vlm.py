"""Adapters of mlx-vlm: its models are saved so that it reads the folder, and its folders are read.

Checked with mlx-vlm 0.7.10.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import vision_zoo
from adapting import adapters_in, config_of, identical, lora, message
from mlx_vlm.trainer.common.model import prepare_model_for_training
from mlx_vlm.trainer.common.utils import save_trainable_weights
from mlx_vlm.trainer.peft.utils import apply_lora_layers

from mlx_modswap import lm, replace_layers, select, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NOT_FROZEN = ("embedding_gemma2", "gemma4", "mimo_v2")  # whose freeze() fails
NO_WEIGHT = ("sam3d_objects",)  # a layer's weight is a dict
SOME = [
    record
    for record in vision_zoo.records()[::4]
    if record["arch"] not in (*NOT_FROZEN, *NO_WEIGHT)
]
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("record", SOME, ids=lambda record: record["arch"])
def test_a_model_of_mlx_vlm_is_saved_with_whole_paths_which_mlx_vlm_reads(record, tmp_path):
    model, fresh = vision_zoo.build(record), vision_zoo.build(record)
    model.freeze()
    layers = [path for path, layer in select(model, "**").items() if type(layer) is nn.Linear]
    chosen = random.Random(record["arch"]).sample(layers, max(1, len(layers) // 4))
    adapters: Any = replace_layers(model, dict.fromkeys(chosen, lora(3, 5.0)))
    lm.save_adapters(model, tmp_path)
    apply_lora_layers(fresh, tmp_path)

    assert config_of(tmp_path)["lora_parameters"]["keys"] == list(adapters)
    found = adapters_in(fresh)
    assert found.keys() == adapters.keys()
    assert all(identical(found[path].lora_b, adapters[path].lora_b) for path in found)


def test_the_last_blocks_of_a_model_of_mlx_vlm_are_named_by_whole_paths(tmp_path):
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    model.freeze()
    news = replace_layers(model, "language_model.model.layers[-1:].self_attn.q_proj", lora(3))
    lm.save_adapters(model, tmp_path)

    assert config_of(tmp_path)["lora_parameters"]["keys"] == list(news)


# ---------------------------------------------------------------- folders of mlx-vlm


@pytest.fixture
def trained(tmp_path) -> Path:
    """What mlx-vlm writes of a model that it quantized and adapted."""
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    prepare_model_for_training(
        model,
        lora_rank=4,
        target_modules=["q_proj"],
        quantization_bits=4,
        quantization_group_size=32,
        verbose=False,
    )
    for adapter in adapters_in(model).values():
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    save_trainable_weights(model, tmp_path / "adapters.safetensors")
    return tmp_path


def quantized(bits: int) -> Any:
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    nn.quantize(
        model,
        32,
        bits,
        class_predicate=lambda path, layer: (
            isinstance(layer, (nn.Linear, nn.Embedding)) and layer.weight.shape[-1] % 32 == 0
        ),
    )
    return model


def test_a_folder_of_mlx_vlm_gives_the_outputs_of_mlx_vlm(trained):
    ours, theirs = quantized(4), quantized(4)
    apply_lora_layers(theirs, trained)
    theirs.eval()
    tokens = mx.array([[1, 2, 3, 4]])
    before = ours.language_model(tokens).logits
    with swapped(ours, lm.adapter_rules(trained)):
        logits = ours.language_model(tokens).logits

    assert mx.allclose(logits, theirs.language_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not mx.allclose(logits, before, rtol=1e-2, atol=1e-2)


def test_another_quantization_than_in_training_is_one_clear_error(trained):
    rules = lm.adapter_rules(trained)
    path = next(iter(rules))
    cases = {
        "quantized with {'bits': 8, 'group_size': 32, 'mode': 'affine'}": quantized(8),
        "not quantized": vision_zoo.build(vision_zoo.record("qwen2_vl")),
    }
    for found, model in cases.items():
        assert message(lambda model=model: replace_layers(model, rules), trained) == (
            f"ValueError: '{path}' was quantized with {{'bits': 4, 'group_size': 32, 'mode': "
            "'affine'} when the adapter was trained ('base_quantization' in "
            f"'math/adapter_config.json'), and in this model it is {found}; use the model that the "
            "adapter was trained on, or remove the entry to put the adapter there anyway"
        )


def test_without_base_quantization_any_model_is_fine(trained):
    config = config_of(trained)
    del config["base_quantization"]
    (trained / "adapter_config.json").write_text(json.dumps(config))

    assert replace_layers(quantized(8), lm.adapter_rules(trained))


def test_a_folder_of_an_older_mlx_vlm_is_named_as_one(tmp_path):
    arrays = {f"{Q}.A": mx.ones((64, 4)), f"{Q}.B": mx.ones((4, 64))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    (tmp_path / "adapter_config.json").write_text('{"rank": 4, "alpha": 0.1, "dropout": 0.1}')

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        "ValueError: 'math' is an adapter of an older mlx-vlm, with arrays 'A' and 'B' for each "
        "layer; mlx_vlm.load(..., adapter_path=...) loads it"
    )
