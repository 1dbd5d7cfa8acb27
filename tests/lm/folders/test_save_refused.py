"""What ``lm.save`` refuses: one error that names the place, the model and the disk as before."""

from __future__ import annotations

import json
import os
import re
import shutil
import traceback
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import model_folders
import pytest
from mlx_lm.tuner.lora import LoRALinear
from model_folders import load, refusal

from mlx_modswap import Wrapper, lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

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
            "mlx-lm would build Linear at model.layers[0:2].self_attn.{q,v}_proj, but the model "
            "has "
            "LoRALinear: fuse or unwrap it, or pass a model_file; lm.save_adapters writes the "
            "adapters alone",
        ),
        (
            with_wrappers_and_without_mlps,
            "mlx-lm would build Linear at model.layers[0:4].self_attn.v_proj, but the model has "
            "Scaled, and "
            "mlx-lm would build MLP at model.layers[0:4].mlp, but the model has Identity: fuse "
            "or unwrap "
            "it, or pass a model_file",
        ),
        (
            with_a_norm_of_its_own,
            "mlx-lm would build mlx.nn.layers.normalization.RMSNorm at model.norm, but the "
            "model has "
            "test_save_refused.RMSNorm: fuse or unwrap it, or pass a model_file",
        ),
        (
            without_a_block,
            "mlx-lm would build TransformerBlock at model.layers.3, but the model has nothing: "
            "pass the changed config entries: config={...}",
        ),
        (
            with_another_scale,
            "mlx-lm would set scale of model.layers[1:4].self_attn to 0.25, but the model has "
            "0.5: set it "
            "in the model, or pass the config entry that sets it: config={...}",
        ),
        (
            with_a_note,
            "mlx-lm would set note of the model itself to nothing, but the model has 'trained "
            "on Monday': "
            "set it in the model, or pass the config entry that sets it: config={...}",
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
            "mlx-lm would set args.rms_norm_eps of the model itself, model, model.layers[0:4] to "
            "1e-05, but the model has 1e-06: set it in the model, or pass the config entry "
            "that sets it: config={...}",
        ),
    ],
)
def test_a_model_that_would_not_load_is_refused(tmp_path, source, change, told):
    model = load(source)
    change(model)
    before, arrays = model_folders.content(tmp_path), model_folders.arrays_of(model)
    target = tmp_path / "saved"

    assert refusal(model, target, source) == told.replace("{target}", str(target))
    assert model_folders.content(tmp_path) == before
    assert all(model_folders.arrays_of(model)[name] is array for name, array in arrays.items())


def test_the_refusal_of_other_layers_comes_without_the_traceback_of_mlx_lm(tmp_path, source):
    model = load(source)
    with_adapters(model)
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.save(model, tmp_path / "saved", source)

    error = caught.value
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert shown.count("Traceback") == 1


def test_a_refusal_for_another_reason_has_the_error_of_mlx_lm_as_its_cause(tmp_path, source):
    model = load(source)
    with_a_bias(model)
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.save(model, tmp_path / "saved", source)

    assert "mlx-lm cannot load" in str(caught.value.__cause__)


def test_other_layers_are_named_for_a_model_with_a_model_file(tmp_path, source):
    (source / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs")
    model = load(source)
    with_adapters(model)
    how: dict[str, Any] = {"config": {"model_file": "own.py"}, "trust_remote_code": True}

    assert refusal(model, tmp_path / "saved", source, **how) == (
        "mlx-lm would build Linear at model.layers[0:2].self_attn.{q,v}_proj, but the model "
        "has LoRALinear: "
        "fuse or unwrap it, or pass a model_file; lm.save_adapters writes the adapters alone"
    )


def test_a_folder_whose_weights_mlx_lm_would_cast_is_refused(tmp_path, source):
    (source / "casting.py").write_text(model_folders.CASTING)
    how: dict[str, Any] = {"config": {"model_file": "casting.py"}, "trust_remote_code": True}

    assert refusal(load(source), tmp_path / "saved", source, **how) == (
        "mlx-lm would build float32 (64,) at model.norm.weight, but the model has float16 (64,)"
    )


# Bad input


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


def no_json(source: Path) -> None:
    (source / "config.json").write_text("{'model_type': 'llama'}")


def no_object(source: Path) -> None:
    (source / "config.json").write_text("[1, 2]")


def no_object_for_generation(source: Path) -> None:
    (source / "generation_config.json").write_text("[1]")


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
            no_object_for_generation,
            ValueError,
            "'{source}/generation_config.json' must hold a JSON object, not a list",
        ),
        (
            unknown_type,
            ValueError,
            "'{target}' was not written: mlx-lm cannot load '{target}': Model type paligemma not "
            "supported.",
        ),
        (no_folder, NotADirectoryError, "'{source}' is a file, not a folder"),
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
        ({"config": 3}, TypeError, "config must be a dict of entries, not an int"),
        (
            {"config": {1: 2}},
            TypeError,
            "the name of a config entry must be a str, not 1",
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
            "trust_remote_code=True (--trust-remote-code) if you trust it",
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

    assert str(caught.value) == f"{str(target)!r} exists already; use a new folder name"
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

    (source / "notes.txt").touch()
    os.truncate(source / "notes.txt", 2**40)  # it takes no space, but its copy would
    with pytest.raises(OSError, match=r"needs 71\.5 TB"):
        lm.save(model, tmp_path / "saved", source)


def test_weights_that_cannot_be_written_are_named(tmp_path, source):
    model, before = load(source), model_folders.content(tmp_path)
    with (
        model_folders.small_files_only(),
        pytest.raises(OSError, match="could not be written") as caught,
    ):
        lm.save(model, tmp_path / "saved", source)

    text = str(caught.value)
    assert re.fullmatch(
        r"the weights could not be written: \[write\] Unable to write \d+ bytes to file\.", text
    )
    assert model_folders.content(tmp_path) == before
