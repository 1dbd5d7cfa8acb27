"""``lm.save``: a folder that mlx-lm loads as the model that was saved, or no folder at all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import model_folders
import pytest
import zoo
from mlx_lm import utils
from mlx_lm.models.bitlinear_layers import bitnet_quantize
from model_folders import load, refusal
from transformers import AutoTokenizer

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

OWN_LAYERS = '''
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs
import mlx.nn as nn
from mlx_modswap import replace_layers

class Gated(nn.Module):
    """A layer whose output goes through a gate that is trained."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gate = mx.ones(layer.weight.shape[:1])

    def __call__(self, x):
        return self.gate * self.layer(x)

RULES = {"model.layers[-2:].**.o_proj": lambda path, layer: Gated(layer)}

class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        replace_layers(self, RULES)
'''

RECORDING = """
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs
from mlx_modswap import Wrapper, replace_layers

class Recorded(Wrapper):
    def __init__(self, layer):
        super().__init__(layer)
        self.first = None

    def __call__(self, x):
        self.first, self.last, self._calls = x, x, 1
        return super().__call__(x)

RULES = {"model.layers[-2:].**.o_proj": lambda path, layer: Recorded(layer)}

class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        replace_layers(self, RULES)
"""


# What is written


def test_mixed_bits_are_loaded_bit_by_bit(tmp_path, source):
    model = load(source)
    lm.quantize(model, {"**.{v,down}_proj": {"bits": 6, "group_size": 32}, "lm_head": 8, "**": 4})
    lm.save(model, tmp_path / "saved", source)
    loaded = load(tmp_path / "saved")

    model_folders.assert_same_arrays(loaded, model)
    assert mx.array_equal(loaded(mx.array([[3, 5]])), model(mx.array([[3, 5]])))
    assert loaded.model.layers[0].mlp.down_proj.bits == 6


def test_the_config_is_that_of_the_source_with_both_entries_for_the_quantization(tmp_path, source):
    model = load(source)
    lm.quantize(model, {"**.q_proj": 8})
    lm.save(model, tmp_path / "saved", source)
    entries = lm.quantization_config(model)

    assert model_folders.config_of(tmp_path / "saved") == {
        **model_folders.LLAMA,
        "quantization": entries,
        "quantization_config": entries,
    }


def test_a_dequantized_model_leaves_no_quantization_in_the_config(tmp_path, source):
    lm.convert(source, tmp_path / "quantized", {"**": 4})
    model = utils.dequantize_model(load(tmp_path / "quantized"))
    lm.save(model, tmp_path / "saved", tmp_path / "quantized")

    assert model_folders.config_of(tmp_path / "saved") == model_folders.LLAMA
    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_the_quantization_of_the_original_format_is_left_out_of_the_config(tmp_path):
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    source = model_folders.llama_folder(
        tmp_path / "source", text_config={"quantization_config": packed, "dtype": "float16"}
    )
    lm.save(load(source), tmp_path / "saved", source)

    assert model_folders.config_of(tmp_path / "saved")["text_config"] == {"dtype": "float16"}


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "mistral3", "qwen3_5"])
def test_models_that_keep_the_quantization_of_their_original_format_are_saved(tmp_path, name):
    source = model_folders.zoo_folder(tmp_path / "source", name)
    config = model_folders.config_of(source)
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    model = load(source)
    lm.save(model, tmp_path / "saved", source)
    lm.convert(source, tmp_path / "converted", {"**": None})
    lm.convert(source, tmp_path / "quantized", {"**": 4}, group_size=32)
    dequantized = utils.dequantize_model(load(tmp_path / "quantized"))
    lm.save(dequantized, tmp_path / "dequantized", tmp_path / "quantized")

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)
    model_folders.assert_same_arrays(load(tmp_path / "converted"), model)
    model_folders.assert_same_arrays(load(tmp_path / "dequantized"), dequantized)


def test_a_model_of_bitlinear_layers_keeps_what_its_config_says_of_them(tmp_path):
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    model = bitnet_quantize(model_folders.llama(), quantization)
    config = {**model_folders.LLAMA, "quantization_config": quantization}
    source = model_folders.write_folder(tmp_path / "source", model, config)
    lm.save(load(source), tmp_path / "saved", source)

    assert model_folders.config_of(tmp_path / "saved") == config
    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_the_config_of_the_vision_tower_is_kept_if_the_model_has_the_tower(tmp_path):
    for name in ("muse_spark", "gemma3"):
        source = model_folders.zoo_folder(tmp_path / name, name)
        config = {"vision_config": {}, "_name_or_path": "a", **model_folders.config_of(source)}
        (source / "config.json").write_text(json.dumps(config))
        lm.save(load(source), tmp_path / f"{name}-saved", source)
        saved = model_folders.config_of(tmp_path / f"{name}-saved")

        assert "_name_or_path" not in saved
        assert saved.get("vision_config") == {"muse_spark": config["vision_config"]}.get(name)


@pytest.mark.parametrize("keywords", [{"mode": "mxfp4"}, {"mode": "nvfp4"}, {"mode": "mxfp8"}])
def test_other_modes_are_loaded(tmp_path, source, keywords):
    model = load(source)
    lm.quantize(model, {"**": keywords})
    lm.save(model, tmp_path / "saved", source)

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_quantized_inputs_are_loaded(tmp_path, source):
    model = load(source)
    lm.quantize(model, {"**.q_proj": {"mode": "nvfp4", "quantize_input": True}})
    lm.save(model, tmp_path / "saved", source)

    assert type(load(tmp_path / "saved").model.layers[0].self_attn.q_proj) is nn.QQLinear
    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_the_other_files_of_the_source_come_along_but_nothing_about_its_weights(tmp_path, source):
    model_folders.add_tokenizer(source)
    for name in ("chat_template.jinja", "README.md", "LICENSE", "generation_config.json"):
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "hf_quant_config.json"):
        (source / name).write_text("{}")
    for name in ("rust_model.ot", "64.TFLITE", "weights.npy", "model.onnx_data", "a.pkl", "a.part"):
        (source / name).write_text("{}")
    (source / "original").mkdir()
    tokenizer = {path.name for path in source.glob("tokenizer*")}
    lm.save(load(source), tmp_path / "saved", source)

    assert tokenizer >= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        *tokenizer,
        *("chat_template.jinja", "README.md", "LICENSE", "generation_config.json"),
        *("config.json", "model.safetensors", "model.safetensors.index.json"),
    }


def test_further_chat_templates_come_along(tmp_path, source):
    folder = model_folders.add_tokenizer(source) / "additional_chat_templates"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(source)
    lm.save(load(source), tmp_path / "saved", source)

    assert model_folders.content(tmp_path / "saved" / folder.name) == {"tool_use.jinja": b"b"}
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == {
        "default": "a",
        "tool_use": "b",
    }


def test_links_in_the_source_as_in_the_cache_of_the_hub_become_files(tmp_path, source):
    blobs = source.rename(tmp_path / "blobs")
    model_folders.add_tokenizer(blobs)
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    lm.save(load(source), tmp_path / "saved", source)

    assert not any(path.is_symlink() for path in (tmp_path / "saved").iterdir())
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (
        blobs / "tokenizer.json"
    ).read_bytes()


def test_the_model_and_the_source_stay_as_they_are(tmp_path, source):
    model = load(source)
    lm.quantize(model, {"**": 4})
    before, on_disk = model_folders.arrays_of(model), model_folders.content(source)
    modules = {path: id(module) for path, module in model.named_modules()}
    lm.save(model, tmp_path / "saved", source)

    assert all(model_folders.arrays_of(model)[name] is array for name, array in before.items())
    assert {path: id(module) for path, module in model.named_modules()} == modules
    assert model_folders.content(source) == on_disk
    assert model(mx.array([[3, 5]])).shape == (1, 2, 100)


def test_folders_above_the_target_are_made(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm.save(load(source), "a/b/saved", source)

    assert load(Path("a/b/saved"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["saved"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path, source):
    (tmp_path / "other").mkdir()
    lm.save(load(source), tmp_path / "saved", source)

    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_mlx_lm_load_gives_the_model_and_its_tokenizer(tmp_path, source):
    model_folders.add_tokenizer(source)
    model, tokenizer = mlx_lm.load(str(source))[:2]
    lm.quantize(model, {"**": 8})
    lm.save(model, tmp_path / "saved", source)
    loaded, again = mlx_lm.load(str(tmp_path / "saved"))[:2]

    model_folders.assert_same_arrays(loaded, model)
    assert again.encode("w3 w5") == tokenizer.encode("w3 w5") == [3, 5]


def test_zoo_models_that_have_run_are_saved(tmp_path):
    """What a model keeps of a run is not what it is made of."""
    for name in ("mamba2", "qwen3_next", "gemma3n", "rwkv7"):
        source = model_folders.zoo_folder(tmp_path / name, name)
        model = load(source)
        zoo.run(name, model)
        lm.save(model, tmp_path / f"{name}-saved", source)
        model_folders.assert_same_arrays(load(tmp_path / f"{name}-saved"), model)


# Entries of the config that differ


def test_a_model_with_fewer_blocks_is_saved_with_its_number_of_blocks(tmp_path, source):
    model = load(source)
    del model.model.layers[1:3]
    lm.save(model, tmp_path / "saved", source, config={"num_hidden_layers": 2})
    loaded = load(tmp_path / "saved")

    assert len(loaded.layers) == 2
    model_folders.assert_same_arrays(loaded, model)


def test_a_model_with_more_blocks_is_saved_with_its_number_of_blocks(tmp_path, source):
    model = load(source)
    blocks = model.model.layers
    blocks.insert(2, blocks[1])
    blocks.append(copy.deepcopy(blocks[0]))
    lm.quantize(model, {"**": 4})
    lm.save(model, tmp_path / "saved", source, config={"num_hidden_layers": 6})
    loaded = load(tmp_path / "saved")

    assert len(loaded.layers) == 6
    assert mx.array_equal(loaded(mx.array([[3, 5]])), model(mx.array([[3, 5]])))


def test_a_quantized_model_with_more_words_is_saved_with_its_number_of_words(tmp_path, source):
    model = load(source)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.weight = mx.concatenate([layer.weight, layer.weight[:2]])
    model.model.vocab_size = 102
    lm.quantize(model, {"**": 4})
    lm.save(model, tmp_path / "saved", source, config={"vocab_size": 102})

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_a_config_that_changes_what_layers_compute_is_refused_unless_they_compute_that(
    tmp_path, source
):
    model = load(source)
    with pytest.raises(
        ValueError, match=r"mlx-lm would set eps of .+ to 0\.001, but the model has 1e-05"
    ):
        lm.save(model, tmp_path / "saved", source, config={"rms_norm_eps": 1e-3})

    for path, norm in model.named_modules():
        if path.endswith("norm"):
            norm.eps = 1e-3
    model.args.rms_norm_eps = 1e-3
    lm.save(model, tmp_path / "saved", source, config={"rms_norm_eps": 1e-3})


def test_a_multimodal_model_with_fewer_blocks_is_saved_with_the_whole_of_its_text_config(tmp_path):
    source = model_folders.zoo_folder(tmp_path / "source", "gemma3")
    model = load(source)
    del model.layers[-1]

    assert refusal(model, tmp_path / "saved", source, config={"num_hidden_layers": 3}) == (
        "mlx-lm would build TransformerBlock at language_model.model.layers.3, but the model "
        "has nothing: "
        "pass the changed config entries: config={...}; if they are in its 'text_config', pass "
        "the complete 'text_config'"
    )
    text_config = {**model_folders.config_of(source)["text_config"], "num_hidden_layers": 3}
    lm.save(model, tmp_path / "saved", source, config={"text_config": text_config})

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_a_model_without_all_of_its_weights_is_saved_with_fewer_blocks(tmp_path, source):
    arrays: Any = mx.load(str(source / "model.safetensors"))
    del arrays["lm_head.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    model = load(source, strict=False)
    del model.layers[1]
    lm.save(model, tmp_path / "saved", source, config={"num_hidden_layers": 3})

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_a_whole_config_may_be_given(tmp_path, source):
    lm.convert(source, tmp_path / "quantized", {"**": 4})
    model, config = utils.load_model(tmp_path / "quantized")
    lm.quantize(model, {"**": {"bits": 8, "group_size": 32}})  # what did not fit before
    lm.save(model, tmp_path / "saved", tmp_path / "quantized", config=config)

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


def test_an_entry_of_the_generation_config_is_changed_there_too(tmp_path, source):
    generation = {"eos_token_id": [1, 7], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    lm.save(load(source), tmp_path / "saved", source, config={"eos_token_id": 5})
    text = (tmp_path / "saved" / "generation_config.json").read_text()

    assert text == '{\n  "eos_token_id": 5,\n  "temperature": 0.6\n}'
    assert utils.load_config(tmp_path / "saved")["eos_token_id"] == 5


def test_a_generation_config_that_no_entry_changes_is_copied_as_it_is(tmp_path, source):
    for name, text in (("same", '{"eos_token_id":[1,7]}'), ("broken", "{'eos_token_id': 1}")):
        (source / "generation_config.json").write_text(text)
        changes = {"eos_token_id": [1, 7]}
        lm.save(load(source), tmp_path / name, source, config=changes)

        assert (tmp_path / name / "generation_config.json").read_text() == text


# Own layers


def test_own_layers_are_loaded_by_a_model_file(tmp_path, source):
    (tmp_path / "gated.py").write_text(OWN_LAYERS)
    names: dict[str, Any] = {"__name__": "gated"}
    exec(OWN_LAYERS, names)
    model = load(source)
    replace_layers(model, names["RULES"])
    for layer in model.layers[-2:]:
        layer.self_attn.o_proj.gate = mx.arange(64) / 64
    model_file = {"model_file": tmp_path / "gated.py"}
    lm.save(model, tmp_path / "saved", source, config=model_file, trust_remote_code=True)
    loaded = load(tmp_path / "saved", trust_remote_code=True)

    assert model_folders.config_of(tmp_path / "saved")["model_file"] == "gated.py"
    assert type(loaded.layers[-1].self_attn.o_proj).__name__ == "Gated"
    model_folders.assert_same_arrays(loaded, model)
    assert mx.array_equal(loaded(mx.array([[3, 5]])), model(mx.array([[3, 5]])))


def test_what_wrappers_recorded_in_a_run_is_not_compared(tmp_path, source):
    (source / "recording.py").write_text(RECORDING)
    exec(RECORDING, names := {"__name__": "recording"})
    model = load(source)
    replace_layers(model, names["RULES"])
    model(mx.array([[3, 5]]))
    how: dict[str, Any] = {"config": {"model_file": "recording.py"}, "trust_remote_code": True}
    lm.save(model, tmp_path / "saved", source, **how)

    model_folders.assert_same_arrays(load(tmp_path / "saved", trust_remote_code=True), model)


def test_a_folder_with_a_model_file_is_quantized_and_saved_and_converted(tmp_path, source):
    (source / "gated.py").write_text(OWN_LAYERS)
    model = load(source)
    exec(OWN_LAYERS, names := {"__name__": "gated"})
    replace_layers(model, names["RULES"])
    how: dict[str, Any] = {"trust_remote_code": True}
    lm.save(model, tmp_path / "own", source, config={"model_file": "gated.py"}, **how)

    model = load(tmp_path / "own", **how)
    del model.layers[0]
    lm.quantize(model, {"**": 4})
    lm.save(model, tmp_path / "saved", tmp_path / "own", config={"num_hidden_layers": 3}, **how)
    lm.convert(tmp_path / "own", tmp_path / "converted", {"**": 4}, dtype="float16", **how)

    for folder in ("saved", "converted"):
        loaded = load(tmp_path / folder, **how)
        assert loaded.layers[-1].self_attn.o_proj.layer.bits == 4
        assert loaded.layers[-1].self_attn.o_proj.gate.dtype == {"saved": mx.float32}.get(
            folder, mx.float16
        )
