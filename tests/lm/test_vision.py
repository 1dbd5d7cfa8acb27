"""Every architecture of the zoo of mlx-vlm through ``mlx_modswap.lm``, and why a few fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
import model_folders
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import vision_sweep
import vision_zoo
from mlx_vlm import utils

from mlx_modswap import lm
from mlx_modswap.__main__ import main
from mlx_modswap.lm._loaders import VisionLoader
from mlx_modswap.lm._source import Source

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


# ---------------------------------------------------------------- rules


def test_a_catch_all_rule_that_matches_only_skipped_layers_quantizes_them():
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))

    lm.quantize(model, {"vision_tower.**": 8, "**": 4})

    bits = {path: bits for path, (bits, _) in vision_sweep.settings_of(model).items()}
    assert {bits[path] for path in bits if path.startswith("vision_tower.")} == {8}
    assert {bits[path] for path in bits if path.startswith("language_model.")} == {4}


def test_a_catch_all_rule_after_another_skips_towers_as_one_alone_does():
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    lm.quantize(model, {"language_model.**": 8}, strict=False)
    other = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    lm.quantize(other, {"language_model.**": 8, "**": 4}, strict=False)
    model_folders.assert_same_arrays(model, other)


def test_a_group_size_that_the_model_asks_for_is_used_where_the_usual_one_does_not_fit():
    """Tables of 96 columns get groups of 32; ``to_quantized`` does not know the key for that."""
    record = vision_zoo.record("qwen4_exp")
    model, other = vision_zoo.build(record), vision_zoo.build(record)
    for one in (model, other):
        one.language_model.ple = {"ple_embedding": {"ngram_embedding": {"shards": [table()]}}}
    path = "language_model.ple.ple_embedding.ngram_embedding.shards.0"
    assert model.quant_predicate(path, None) == {"fallback_group_size": 32}

    lm.quantize(model, {"**": 4})

    assert vision_sweep.settings_of(model) == vision_sweep.quantize_as_mlx_vlm(other)
    assert vision_sweep.settings_of(model)[path] == (4, 32)


def table() -> nn.Embedding:
    return nn.Embedding(8, 96)


def test_a_layer_is_skipped_if_the_groups_that_the_model_asks_for_do_not_fit():
    record = vision_zoo.record("diffusion_gemma")
    text = {**record["config"]["text_config"], "hidden_size": 96}
    record = {**record, "config": {**record["config"], "text_config": text}}
    model, other = vision_zoo.build(record), vision_zoo.build(record)
    path = "model.decoder.embed_tokens"
    layer = model.model.decoder.embed_tokens
    assert model.quant_predicate(path, layer) == {"group_size": 64, "bits": 8}

    lm.quantize(model, {"**": {"bits": 4, "group_size": 32}})

    assert vision_sweep.settings_of(model) == vision_sweep.quantize_as_mlx_vlm(other, 32)
    assert path not in vision_sweep.settings_of(model)


def test_a_part_of_a_model_is_quantized_like_a_model():
    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    report = lm.quantize(model.language_model, {"**": 4})
    assert set(report) == {
        path.removeprefix("language_model.") for path in vision_sweep.settings_of(model)
    }


# ---------------------------------------------------------------- what is refused


def loaded(arch: str, source: Path) -> Any:
    return utils.load_model(vision_zoo.folder(vision_zoo.record(arch), source))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"**.lm_head": {"bits": 4, "group_size": 32}, "**": 4},
            ANEW.format(names="language_model.lm_head.weight", paths="language_model.lm_head"),
        ),
        (
            {"**.lm_head": 8, "**": 4},
            "mlx-vlm cannot load '{target}': Expected shape (128, 16) but received shape (128, 8) "
            "for parameter language_model.lm_head.weight",
        ),
        (
            {"**.lm_head": None, "**": 4},
            "mlx-vlm cannot load '{target}': Expected shape (128, 64) but received shape (128, 8) "
            "for parameter language_model.lm_head.weight",
        ),
        ({"**.{embed_tokens,lm_head}": 8, "**": 4}, ""),
    ],
)
def test_the_head_of_gemma3_is_overwritten_with_the_embedding_on_load(tmp_path, rules, message):
    model = loaded("gemma3", tmp_path / "source")
    lm.quantize(model, rules)
    target = tmp_path / "target"
    if not message:
        lm.save(model, target, tmp_path / "source")
        model_folders.assert_same_arrays(utils.load_model(target), model)
        return
    message = message.replace("{target}", str(target))
    assert model_folders.refusal(model, target, tmp_path / "source") == message


def test_rows_that_are_interleaved_on_each_load_are_refused_unquantized_too(tmp_path):
    model = loaded("falcon_ocr", tmp_path / "source")
    message = model_folders.refusal(model, tmp_path / "target", tmp_path / "source")
    assert message == (
        f"mlx-vlm would compute {W13}.weight anew each time it loads the folder, and get other "
        "values than the model has"
    )


def test_floats_that_take_the_dtype_of_packed_weights_on_load_are_kept_with_unpacked_ones(tmp_path):
    model = loaded("sapiens2", tmp_path / "source")
    lm.quantize(model, {"**.attn": None, "**": 4})
    lm.save(model, tmp_path / "target", tmp_path / "source")
    model_folders.assert_same_arrays(utils.load_model(tmp_path / "target"), model)


def test_modules_that_a_forward_pass_has_added_are_named(tmp_path):
    model = loaded("florence2", tmp_path / "source")
    vision_zoo.outputs(model, vision_zoo.record("florence2"))
    lm.quantize(model, {"**": 4})
    assert model_folders.refusal(model, tmp_path / "target", tmp_path / "source") == (
        "mlx-vlm would build nothing at language_model.model.{encoder,decoder}.embed_tokens, but "
        "the model has QuantizedEmbedding: pass the changed config entries: config={...}; if they "
        "are in its 'text_config', pass the complete 'text_config'; if calling the model has added "
        "them, load it anew and save it uncalled"
    )


def test_a_part_of_a_model_cannot_be_saved(tmp_path):
    model = loaded("qwen2_vl", tmp_path / "source")
    part = model.language_model
    assert model_folders.refusal(part, tmp_path / "target", tmp_path / "source") == (
        "the model is only the LanguageModel at 'language_model' of what mlx-vlm would build: save "
        "the whole model"
    )


def test_what_mlx_lm_cannot_load_names_the_other_loader(tmp_path):
    source = vision_zoo.folder(vision_zoo.record("aya_vision"), tmp_path / "source")
    with pytest.raises(ValueError, match="cannot load") as caught:
        lm.convert(source, tmp_path / "target", {"**": 4})
    assert str(caught.value) == (
        f"mlx-lm cannot load '{source}': Model type aya_vision not supported; loader='mlx-vlm' "
        "(--loader mlx-vlm) loads vision-language models"
    )
    with pytest.raises(ValueError, match="loader") as caught:
        lm.convert(source, tmp_path / "target", {"**": 4}, loader="mlx_vlm")
    assert str(caught.value) == "loader must be 'mlx-lm' or 'mlx-vlm', not 'mlx_vlm'"


# ---------------------------------------------------------------- folders


CODE = """
from mlx_vlm.models.qwen2_vl import *
from mlx_vlm.models import qwen2_vl

open({ran!r}, "w").close()


class Model(qwen2_vl.Model):
    pass
"""


def test_code_of_a_folder_runs_only_if_it_is_trusted(tmp_path):
    source = vision_zoo.folder(vision_zoo.record("qwen2_vl"), tmp_path / "source")
    ran = tmp_path / "ran"
    (source / "own.py").write_text(CODE.format(ran=str(ran)))
    config = {**model_folders.config_of(source), "model_file": "own.py"}
    (source / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="trust") as caught:
        lm.convert(source, tmp_path / "target", {"**": 4}, loader="mlx-vlm")
    assert str(caught.value) == (
        "the config names a model_file, 'own.py', whose code builds the model; pass "
        "trust_remote_code=True (--trust-remote-code) if you trust it"
    )
    assert not ran.exists()

    trusting: dict[str, Any] = {"loader": "mlx-vlm", "trust_remote_code": True}
    lm.convert(source, tmp_path / "target", {"**": 4}, **trusting)
    assert ran.exists()
    model = utils.load_model(tmp_path / "target")
    lm.save(model, tmp_path / "again", source, trust_remote_code=True)
    model_folders.assert_same_arrays(utils.load_model(tmp_path / "again"), model)


def test_the_config_and_the_files_of_inner_folders_are_kept(tmp_path):
    source = vision_zoo.folder(vision_zoo.record("qwen2_vl"), tmp_path / "source")
    config = {**model_folders.config_of(source), "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "encoder_config").mkdir()
    (source / "encoder_config" / "config.json").write_text("{}")
    model = utils.load_model(source)
    lm.quantize(model, {"**": 4})
    table = lm.quantization_config(model)

    lm.save(model, tmp_path / "save", source)
    lm.convert(source, tmp_path / "convert", {"**": 4}, loader="mlx-vlm")

    for name in ("save", "convert"):
        written = model_folders.config_of(tmp_path / name)
        assert written == {**config, "quantization": table, "quantization_config": table}
        assert (tmp_path / name / "encoder_config" / "config.json").read_text() == "{}"


def test_a_model_with_a_block_less_is_saved_with_a_changed_config(tmp_path):
    model = loaded("aya_vision", tmp_path / "source")
    model.language_model.model.layers.pop()
    config = model_folders.config_of(tmp_path / "source")
    text = {**config["text_config"], "num_hidden_layers": 1}

    lm.save(model, tmp_path / "target", tmp_path / "source", config={"text_config": text})

    model_folders.assert_same_arrays(utils.load_model(tmp_path / "target"), model)


def test_mlx_lm_converts_the_language_model_of_a_config_without_an_inner_one(tmp_path):
    source = vision_zoo.folder(vision_zoo.record("qwen2_vl"), tmp_path / "source")

    lm.convert(source, tmp_path / "target", {"**": 4})

    model = mlx_lm.utils.load_model(tmp_path / "target")[0]
    assert "vision_config" not in model_folders.config_of(tmp_path / "target")
    assert all(name.startswith("language_model.") for name in model_folders.arrays_of(model))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["arch"])
def test_a_model_is_built_from_its_config_alone(tmp_path, record):
    (tmp_path / "config.json").write_text(json.dumps(record["config"]))
    model = Source(tmp_path, VisionLoader(), False).build()
    specs = {name: array.shape for name, array in vision_zoo.arrays_of(model).items()}
    expected = vision_zoo.arrays_of(vision_zoo.build(record))
    assert specs == {name: array.shape for name, array in expected.items()}


def test_the_command_line_draws_and_converts_with_mlx_vlm(tmp_path, capsys):
    source = vision_zoo.folder(vision_zoo.record("qwen2_vl"), tmp_path / "source")
    target = tmp_path / "target"

    assert main(["tree", str(source), "--loader", "mlx-vlm"]) == 0
    assert "vision_tower" in capsys.readouterr().out
    assert main(["convert", str(source), str(target), "**=4", "--loader", "mlx-vlm"]) == 0
    assert "bits per weight" in capsys.readouterr().out

    model = vision_zoo.build(vision_zoo.record("qwen2_vl"))
    lm.quantize(model, {"**": 4})
    model_folders.assert_same_arrays(utils.load_model(target), model)
