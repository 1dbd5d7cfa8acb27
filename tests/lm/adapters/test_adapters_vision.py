"""Adapters of mlx-vlm's models are saved, and read by mlx-vlm and by ``adapter_rules``."""

from __future__ import annotations

import json

import pytest
from mlx_lm.tuner.lora import LoRAEmbedding

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import vision_sweep
import vision_zoo
import zoo
from mlx_vlm.trainer.peft.utils import apply_lora_layers

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

RECORDS = [record for record in vision_zoo.records() if record["inputs"] is not None]
# `Module.freeze` fails, since an `__init__` sets an attribute before that of `nn.Module` is called.
NOT_FROZEN = {
    "embedding_gemma2": "AudioRelativePositionEmbedding",
    "gemma4": "AudioRelativePositionEmbedding",
    "mimo_v2": "AudioEncoder",
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["arch"])
def test_adapters_of_the_language_part_are_loaded_by_mlx_vlm(tmp_path, record):
    model = vision_zoo.build(record)
    if name := NOT_FROZEN.get(record["arch"]):
        with pytest.raises(AttributeError, match=f"{name!r} object has no attribute '_no_grad'"):
            model.freeze()
        return
    adapters = replace_layers(
        model.freeze(), tuple(vision_sweep.adaptable(model)), vision_sweep.adapted
    )
    expected = vision_sweep.output(model, record)

    lm.save_adapters(model, tmp_path)
    theirs = apply_lora_layers(vision_zoo.build(record), tmp_path)
    ours = vision_zoo.build(record).freeze()
    replace_layers(ours, lm.adapter_rules(tmp_path))

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == list(adapters)
    for other in (theirs, ours):
        other.eval()
        assert zoo.same(vision_sweep.output(other, record), expected)
    assert not zoo.same(vision_sweep.output(vision_zoo.build(record), record), expected)


def test_an_adapter_that_mlx_vlm_does_not_read_is_refused(tmp_path):
    model = vision_zoo.build(vision_zoo.record("qwen2_vl")).freeze()
    replace_layers(model, "**.embed_tokens", lambda path, layer: LoRAEmbedding.from_base(layer))
    with pytest.raises(ValueError, match="mlx-vlm") as caught:
        lm.save_adapters(model, tmp_path / "adapter")
    assert str(caught.value) == (
        "mlx-vlm puts adapters around linear layers only, not around the Embedding at "
        "'language_model.model.embed_tokens'; leave it out"
    )
    assert not (tmp_path / "adapter").exists()
