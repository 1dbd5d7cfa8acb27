"""Every architecture of the zoo of mlx-vlm through ``mlx_modswap.lm``, and why a few do not pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import model_folders
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import vision_sweep
import vision_zoo
from mlx_vlm import utils

from mlx_modswap import lm

pytestmark = pytest.mark.usefixtures("on_the_cpu")

RECORDS = vision_zoo.records()

ANEW = (
    "mlx-vlm would compute {names} anew each time it loads the folder, and get other values than "
    "the model has; other settings for {paths}, or None (keep), may avoid that"
)
W13 = "language_model.model.layers[0:2].mlp.w13"
INTERLEAVED = ANEW.format(names=f"{W13}.{{weight,scales,biases}}", paths=W13)  # on every load

# What mlx-vlm would not load as it was saved, and how that begins.
REFUSED = {
    "falcon_ocr": INTERLEAVED,
    "falcon_perception": INTERLEAVED,
    "prism_hadamard_qwen35": "mlx-vlm cannot load '{target}': Hadamard packs require 2-bit affine "
    "weights, group size 128",
    "rt_detr_v2": "mlx-vlm cannot load '{target}': Expected shape (16, 3, 3, 16) but received "
    "shape (16, 3, 16, 3) for parameter vision.backbone.embedder.embedder.1.conv.weight",
    # Floats are cast to the dtype of the weights of the attention, which are packed.
    "sapiens2": "mlx-vlm would build uint32 (64, 16, 16, 3) at "
    "backbone.patch_embed.projection.weight, but the model has float32 (64, 16, 16, 3), and ",
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["arch"])
def test_mixed_bits_are_saved_and_converted_and_loaded_by_mlx_vlm(tmp_path, record):
    source = vision_zoo.folder(record, tmp_path / "source")
    model = utils.load_model(source, lazy=True)
    rules = vision_sweep.mixed_rules(model)
    lm.quantize(model, rules, strict=False)

    def save(target: Path) -> None:
        lm.save(model, target, source)

    def convert(target: Path) -> None:
        lm.convert(source, target, rules, strict=False, loader="mlx-vlm")

    for write in (save, convert):
        target = tmp_path / write.__name__
        if reason := REFUSED.get(record["arch"]):
            with pytest.raises(ValueError, match="was not written") as caught:
                write(target)
            start = f"{str(target)!r} was not written: " + reason.replace("{target}", str(target))
            assert str(caught.value).startswith(start)
            continue
        write(target)
        model_folders.assert_same_arrays(utils.load_model(target, lazy=True), model)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["arch"])
def test_the_catch_all_rule_does_what_mlx_vlm_does(record):
    ours, theirs = vision_zoo.build(record), vision_zoo.build(record)

    settings = vision_sweep.quantize_as_mlx_vlm(theirs)
    lm.quantize(ours, {"**": 4}, strict=False)

    assert vision_sweep.settings_of(ours) == settings
    model_folders.assert_same_arrays(ours, theirs)


