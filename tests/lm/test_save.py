"""``lm.save``: a folder that mlx-lm loads as the model that was saved, or no folder at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="mlx_modswap.lm is made of functions of mlx-lm")

import mlx_lm
import model_folders
import zoo
from mlx_lm import utils
from mlx_lm.models.bitlinear_layers import bitnet_quantize
from mlx_lm.tuner.lora import LoRALinear

from mlx_modswap import Wrapper, lm, replace_layers

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

CASTING = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def sanitize(self, weights):
        norm = "model.norm.weight"
        return {**super().sanitize(weights), norm: weights[norm].astype(mx.float32)}
"""


@pytest.fixture(autouse=True)
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_folders.llama_folder(tmp_path / "source")


def load(folder: Path, **keywords: Any) -> Any:
    return utils.load_model(folder, **keywords)[0]


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


def test_a_model_of_bitlinear_layers_keeps_what_its_config_says_of_them(tmp_path):
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    model = bitnet_quantize(model_folders.llama(), quantization)
    config = {**model_folders.LLAMA, "quantization_config": quantization}
    source = model_folders.write_folder(tmp_path / "source", model, config)
    lm.save(load(source), tmp_path / "saved", source)

    assert model_folders.config_of(tmp_path / "saved") == config
    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


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
    (source / "original").mkdir()
    tokenizer = {path.name for path in source.glob("tokenizer*")}
    lm.save(load(source), tmp_path / "saved", source)

    assert tokenizer >= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        *tokenizer,
        *("chat_template.jinja", "README.md", "LICENSE", "generation_config.json"),
        *("config.json", "model.safetensors", "model.safetensors.index.json"),
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


# Entries of the config that differ


def test_a_model_with_fewer_blocks_is_saved_with_its_number_of_blocks(tmp_path, source):
    model = load(source)
    del model.model.layers[1:3]
    lm.save(model, tmp_path / "saved", source, config={"num_hidden_layers": 2})
    loaded = load(tmp_path / "saved")

    assert len(loaded.layers) == 2
    model_folders.assert_same_arrays(loaded, model)


def test_a_config_that_changes_what_layers_compute_is_refused_unless_they_compute_that(
    tmp_path, source
):
    model = load(source)
    with pytest.raises(ValueError, match=r"mlx-lm sets eps of .+ to 0\.001, the model has 1e-05"):
        lm.save(model, tmp_path / "saved", source, config={"rms_norm_eps": 1e-3})

    for path, norm in model.named_modules():
        if path.endswith("norm"):
            norm.eps = 1e-3
    lm.save(model, tmp_path / "saved", source, config={"rms_norm_eps": 1e-3})


def test_a_whole_config_may_be_given(tmp_path, source):
    lm.convert(source, tmp_path / "quantized", {"**": 4})
    model, config = utils.load_model(tmp_path / "quantized")
    lm.quantize(model, {"**": {"bits": 8, "group_size": 32}})  # what did not fit before
    lm.save(model, tmp_path / "saved", tmp_path / "quantized", config=config)

    model_folders.assert_same_arrays(load(tmp_path / "saved"), model)


# Own layers


def test_own_layers_are_loaded_by_a_model_file(tmp_path, source):
    (tmp_path / "gated.py").write_text(OWN_LAYERS)
    names: dict[str, Any] = {"__name__": "gated"}
    exec(OWN_LAYERS, names)
    model = load(source)
    replace_layers(model, names["RULES"])
    for layer in model.layers[-2:]:
        layer.self_attn.o_proj.gate = mx.arange(64) / 64
    model_file = {"model_file": str(tmp_path / "gated.py")}
    lm.save(model, tmp_path / "saved", source, config=model_file, trust_remote_code=True)
    loaded = load(tmp_path / "saved", trust_remote_code=True)

    assert model_folders.config_of(tmp_path / "saved")["model_file"] == "gated.py"
    assert type(loaded.layers[-1].self_attn.o_proj).__name__ == "Gated"
    model_folders.assert_same_arrays(loaded, model)
    assert mx.array_equal(loaded(mx.array([[3, 5]])), model(mx.array([[3, 5]])))


def test_a_folder_with_a_model_file_is_quantized_and_saved_and_converted(tmp_path, source):
    (source / "gated.py").write_text(OWN_LAYERS)
    model = load(source)
    exec(OWN_LAYERS, names := {"__name__": "gated"})
    replace_layers(model, names["RULES"])
    how: dict[str, Any] = {"trust_remote_code": True}
    lm.save(model, tmp_path / "own", source, config={"model_file": "gated.py"}, **how)

    model = load(tmp_path / "own", **how)
    lm.quantize(model, {"**": 4})
    lm.save(model, tmp_path / "saved", tmp_path / "own", **how)
    lm.convert(tmp_path / "own", tmp_path / "converted", {"**": 4}, dtype="float16", **how)

    for folder in ("saved", "converted"):
        loaded = load(tmp_path / folder, **how)
        assert loaded.layers[-1].self_attn.o_proj.layer.bits == 4
        assert loaded.layers[-1].self_attn.o_proj.gate.dtype == {"saved": mx.float32}.get(
            folder, mx.float16
        )


# What mlx-lm would not build


class Scaled(Wrapper):
    pass


def with_adapters(model: Any) -> None:
    replace_layers(
        model,
        "model.layers[:2].self_attn.{q,v}_proj",
        lambda path, layer: LoRALinear.from_base(layer),
    )


def with_wrappers_and_without_mlps(model: Any) -> None:
    replace_layers(model, "**.v_proj", lambda path, layer: Scaled(layer))
    replace_layers(model, "**.mlp", lambda path, layer: nn.Identity())


class RMSNorm(nn.RMSNorm):
    pass


def with_a_norm_of_its_own(model: Any) -> None:
    norm = RMSNorm(64)
    norm.set_dtype(mx.float16)
    model.model.norm = norm


def without_a_block(model: Any) -> None:
    del model.layers[1]


def with_another_scale(model: Any) -> None:
    for layer in model.layers[1:]:
        layer.self_attn.scale = 0.5


def with_a_note(model: Any) -> None:
    model.note = "trained on Monday"


def with_a_bias(model: Any) -> None:
    model.model.norm.bias = mx.zeros((64,))


def with_a_long_norm(model: Any) -> None:
    model.model.norm.weight = mx.zeros((65,))


def with_other_arguments(model: Any) -> None:
    model.args.rms_norm_eps = 1e-6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            with_adapters,
            "mlx-lm builds Linear at model.layers[0:2].self_attn.{q,v}_proj, the model has "
            "LoRALinear: fuse or unwrap it, or give a model_file",
        ),
        (
            with_wrappers_and_without_mlps,
            "mlx-lm builds Linear at model.layers[0:4].self_attn.v_proj, the model has Scaled, and "
            "mlx-lm builds MLP at model.layers[0:4].mlp, the model has Identity: fuse or unwrap "
            "it, or give a model_file",
        ),
        (
            with_a_norm_of_its_own,
            "mlx-lm builds mlx.nn.layers.normalization.RMSNorm at model.norm, the model has "
            "test_save.RMSNorm: fuse or unwrap it, or give a model_file",
        ),
        (
            without_a_block,
            "mlx-lm builds TransformerBlock at model.layers.3, the model has nothing: give the "
            "entries of its config that have changed with config={...}",
        ),
        (
            with_another_scale,
            "mlx-lm sets scale of model.layers[1:4].self_attn to 0.25, the model has 0.5: set it "
            "in the model, or give the entry of the config that sets it with config={...}",
        ),
        (
            with_a_note,
            "mlx-lm sets note of the model itself to nothing, the model has 'trained on Monday': "
            "set it in the model, or give the entry of the config that sets it with config={...}",
        ),
        (
            with_a_bias,
            "mlx-lm cannot load '{target}': Received 1 parameters not in model: model.norm.bias.",
        ),
        (
            with_a_long_norm,
            "mlx-lm cannot load '{target}': Expected shape (64,) but received shape (65,) for "
            "parameter model.norm.weight",
        ),
        (
            with_other_arguments,
            "mlx-lm sets args.rms_norm_eps of the model itself, model, model.layers[0:4] to "
            "1e-05, the model has 1e-06: set it in the model, or give the entry of the config that "
            "sets it with config={...}",
        ),
    ],
)
def test_a_model_that_would_not_load_is_refused(tmp_path, source, change, told):
    model = load(source)
    change(model)
    before, arrays = model_folders.content(tmp_path), model_folders.arrays_of(model)
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.save(model, tmp_path / "saved", source)

    target = str(tmp_path / "saved")
    assert str(caught.value) == f"{target!r} was not written: {told}".replace("{target}", target)
    assert model_folders.content(tmp_path) == before
    assert all(model_folders.arrays_of(model)[name] is array for name, array in arrays.items())


def test_a_folder_whose_weights_mlx_lm_would_cast_is_refused(tmp_path, source):
    (source / "casting.py").write_text(CASTING)
    how: dict[str, Any] = {"config": {"model_file": "casting.py"}, "trust_remote_code": True}
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.save(load(source), tmp_path / "saved", source, **how)

    assert str(caught.value) == (
        f"'{tmp_path}/saved' was not written: mlx-lm builds float32 (64,) at model.norm.weight, "
        "the model has float16 (64,)"
    )


# Bad input


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


def no_json(source: Path) -> None:
    (source / "config.json").write_text("{'model_type': 'llama'}")


def no_object(source: Path) -> None:
    (source / "config.json").write_text("[1, 2]")


def unknown_type(source: Path) -> None:
    config = {**model_folders.LLAMA, "model_type": "paligemma"}
    (source / "config.json").write_text(json.dumps(config))


def no_folder(source: Path) -> None:
    shutil.rmtree(source)
    source.write_text("")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_config, FileNotFoundError, "there is no config.json in '{source}'"),
        (
            no_json,
            ValueError,
            "'{source}/config.json' is not JSON: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)",
        ),
        (
            no_object,
            ValueError,
            "'{source}/config.json' must hold a JSON object, not a list",
        ),
        (
            unknown_type,
            ValueError,
            "'{target}' was not written: mlx-lm cannot load '{target}': Model type paligemma not "
            "supported.",
        ),
        (no_folder, NotADirectoryError, "the source, '{source}', is a file, not a folder"),
    ],
)
def test_a_source_that_is_broken_is_named(tmp_path, source, spoil, error, message):
    model = load(source)
    spoil(source)
    before = model_folders.content(tmp_path)
    with pytest.raises(error) as caught:
        lm.save(model, tmp_path / "saved", source)

    expected = message.replace("{source}", str(source)).replace("{target}", f"{tmp_path}/saved")
    assert str(caught.value) == expected
    assert model_folders.content(tmp_path) == before


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"config": {"note": {1, 2}}},
            TypeError,
            "the config entry 'note' is not JSON: Object of type set is not JSON serializable",
        ),
        (
            {"config": {"model_file": "own.py"}},
            FileNotFoundError,
            "model_file 'own.py' is not a file, here or in '{source}'",
        ),
        (
            {"config": {"model_file": "own.py"}, "files": ["own.py"]},
            ValueError,
            "the config names a model_file, 'own.py', whose code builds the model; pass "
            "trust_remote_code=True if you trust it",
        ),
        (
            {"config": {"vocab_size": 7}},
            ValueError,
            "'{target}' was not written: mlx-lm cannot load '{target}': Expected shape (7, 64) but "
            "received shape (100, 64) for parameter model.embed_tokens.weight",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, source, keywords, error, message):
    for name in keywords.pop("files", ()):
        (source / name).write_text("")
    model, before = load(source), model_folders.content(tmp_path)
    with pytest.raises(error) as caught:
        lm.save(model, tmp_path / "saved", source, **keywords)

    expected = message.replace("{source}", str(source)).replace("{target}", f"{tmp_path}/saved")
    assert str(caught.value) == expected
    assert model_folders.content(tmp_path) == before


def test_only_a_module_is_saved(tmp_path, source):
    with pytest.raises(TypeError, match=r"^model must be an mlx\.nn\.Module, not a str$"):
        lm.save("model", tmp_path / "saved", source)  # type: ignore # it is the mistake


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_target_that_exists_is_refused(tmp_path, source, kind):
    target = tmp_path / "saved"
    {
        "folder": target.mkdir,
        "file": target.touch,
        "link": lambda: target.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    before = model_folders.content(tmp_path)
    with pytest.raises(FileExistsError) as caught:
        lm.save(load(source), target, source)

    assert str(caught.value) == f"{str(target)!r} exists already; give the name of a new folder"
    assert model_folders.content(tmp_path) == before


def test_a_model_that_is_larger_than_the_disk_is_refused_before_the_first_byte(tmp_path, source):
    model = load(source)
    model.model.norm.weight = mx.zeros((2**22, 2**22))  # 70 terabytes, never computed
    before = model_folders.content(tmp_path)
    with pytest.raises(OSError, match=r"needs 70\.4 TB, and its disk has .+ left") as caught:
        lm.save(model, tmp_path / "saved", source)

    assert str(caught.value).startswith(repr(str(tmp_path / "saved")))
    assert str(caught.value).endswith("left; nothing was written")
    assert model_folders.content(tmp_path) == before


def test_zoo_models_that_have_run_are_saved(tmp_path):
    """What a model keeps of a run is not what it is made of."""
    for name in ("mamba2", "qwen3_next", "gemma3n", "rwkv7"):
        source = model_folders.zoo_folder(tmp_path / name, name)
        model = load(source)
        zoo.run(name, model)
        lm.save(model, tmp_path / f"{name}-saved", source)
        model_folders.assert_same_arrays(load(tmp_path / f"{name}-saved"), model)
