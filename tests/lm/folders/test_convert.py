"""``lm.convert``: from folder to folder, without the model in memory, all or nothing."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import model_folders
import pytest
from mlx_lm import utils
from mlx_lm.models.mixtral import Model as Mixtral
from mlx_lm.models.mixtral import ModelArgs as MixtralArgs
from model_folders import load

from mlx_modswap import NoMatchError, lm
from mlx_modswap.lm._folders import convert as _convert

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# What is written


@pytest.mark.parametrize(
    ("config", "rules", "ours", "theirs"),
    [
        ({}, {"**": 4}, {}, {}),
        ({"torch_dtype": "bfloat16"}, {"**": 4}, {}, {}),
        ({"text_config": {"dtype": "float32"}}, {"**": 4}, {}, {}),
        ({"torch_dtype": "float16"}, {"**": 4}, {"dtype": "float32"}, {"dtype": "float32"}),
        ({}, {"**": 8}, {"group_size": 32}, {"q_bits": 8, "q_group_size": 32}),
        (
            {},
            {"**": {"mode": "mxfp4"}},
            {"dtype": mx.bfloat16},
            {"q_mode": "mxfp4", "dtype": "bfloat16"},
        ),
    ],
)
def test_the_same_settings_give_the_arrays_that_mlx_lm_writes(
    tmp_path, config, rules, ours, theirs
):
    source = model_folders.llama_folder(tmp_path / "source", **config)
    model_folders.add_tokenizer(source)
    lm.convert(source, tmp_path / "ours", rules, max_shard_mb=0.02, **ours)
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, **theirs)

    model_folders.assert_same_arrays(load(tmp_path / "ours"), load(tmp_path / "theirs"))
    our_config = model_folders.config_of(tmp_path / "ours")
    for key, value in model_folders.config_of(tmp_path / "theirs").items():
        if key.startswith("quantization"):
            assert {name: our_config[key][name] for name in value} == value
        else:
            assert our_config[key] == value


def test_what_a_model_does_not_want_cast_keeps_its_dtype(tmp_path):
    source = model_folders.zoo_folder(tmp_path / "source", "glm4_moe")
    model_folders.add_tokenizer(source)
    lm.convert(source, tmp_path / "ours", {"**": 4}, dtype="float16")
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, dtype="float16")
    arrays = model_folders.arrays_of(load(tmp_path / "ours"))

    model_folders.assert_same_arrays(load(tmp_path / "ours"), load(tmp_path / "theirs"))
    assert {array.dtype for array in arrays.values()} == {mx.uint32, mx.float16, mx.float32}


def test_rules_give_what_quantize_and_save_give(tmp_path, source):
    rules = {"model.layers[0].**": None, "**.{v,down}_proj": {"bits": 6, "group_size": 32}, "**": 4}
    lm.convert(source, tmp_path / "converted", rules)
    model = load(source)
    lm.quantize(model, rules)
    lm.save(model, tmp_path / "saved", source)

    model_folders.assert_same_arrays(load(tmp_path / "converted"), model)
    assert model_folders.config_of(tmp_path / "converted") == model_folders.config_of(
        tmp_path / "saved"
    )


def test_a_model_that_is_partly_quantized_keeps_what_is(tmp_path, source):
    lm.convert(source, tmp_path / "first", {"**.q_proj": 8})
    lm.convert(tmp_path / "first", tmp_path / "second", {"**": 4})
    entries = model_folders.config_of(tmp_path / "second")["quantization"]

    assert entries["model.layers.0.self_attn.q_proj"]["bits"] == 8
    assert entries["model.layers.0.self_attn.k_proj"]["bits"] == entries["bits"] == 4


def test_shards_are_no_larger_than_asked_and_hold_each_array_once(tmp_path, source):
    lm.convert(source, tmp_path / "converted", {"**": 4}, max_shard_mb=0.02)
    files = sorted((tmp_path / "converted").glob("*.safetensors"))
    shards: list[Any] = [mx.load(str(file)) for file in files]
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    names = [name for shard in shards for name in shard]

    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 5
    assert all(sum(a.nbytes for a in shard.values()) <= 20_000 for shard in shards)
    assert len(names) == len(set(names))
    assert index["weight_map"] == {
        name: file.name for file, shard in zip(files, shards) for name in shard
    }
    assert index["metadata"] == {
        "total_size": sum(array.nbytes for shard in shards for array in shard.values()),
        "total_parameters": utils.get_total_parameters(load(source)),
    }


def test_an_array_that_is_larger_than_a_shard_has_a_file_of_its_own(tmp_path, source):
    lm.convert(source, tmp_path / "converted", {"**": 4}, max_shard_mb=1e-6)
    files = list((tmp_path / "converted").glob("*.safetensors"))

    assert len(files) == len(model_folders.arrays_of(load(tmp_path / "converted")))


def test_a_model_of_one_shard_has_one_file_as_mlx_lm_names_it(tmp_path, source):
    lm.convert(source, tmp_path / "converted", {"**": 4}, max_shard_mb=float("inf"))

    files = {path.name for path in (tmp_path / "converted").iterdir()}
    assert files == {"config.json", "model.safetensors", "model.safetensors.index.json"}


def test_the_index_and_the_metadata_of_the_weights_are_those_of_mlx_lm(tmp_path, source):
    model_folders.add_tokenizer(source)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    lm.convert(source, ours, {"**": 4})
    mlx_lm.convert(str(source), str(theirs), quantize=True, q_bits=4)
    index = "model.safetensors.index.json"
    loaded: list[Any] = [
        mx.load(str(folder / "model.safetensors"), return_metadata=True)
        for folder in (ours, theirs)
    ]

    assert (ours / index).read_text() == (theirs / index).read_text()
    assert [metadata for _, metadata in loaded] == [{"format": "mlx"}] * 2


@pytest.mark.parametrize(
    ("most", "shards"),
    [
        (7, ["a", "b", "c", "d", "e"]),
        (8, ["ab", "c", "d", "e"]),
        (12, ["ab", "c", "d", "e"]),
        (20, ["abc", "de"]),
    ],
)
def test_shards_are_filled_up_to_the_last_byte(most, shards):
    arrays = {name: mx.zeros((size,), mx.uint8) for name, size in zip("abcde", (4, 4, 12, 12, 8))}
    assert ["".join(shard) for shard in _convert._shards(arrays, most)] == shards


def test_a_rule_without_effect_is_skipped_if_not_strict(tmp_path, source):
    rules = {"**.nowhere": 8, "**": 4}
    with pytest.raises(NoMatchError, match=r"\*\*\.nowhere' matches nothing"):
        lm.convert(source, tmp_path / "converted", rules)
    report = lm.convert(source, tmp_path / "converted", rules, strict=False)
    assert len(report) == 26


def test_the_source_stays_as_it_is(tmp_path, source):
    before = model_folders.content(source)
    lm.convert(source, tmp_path / "converted", {"**": 4})

    assert model_folders.content(source) == before


# What is returned


def test_the_figures_of_what_is_returned_are_valid_and_its_arrays_gone(tmp_path, source):
    rules = {"**.q_proj": 8, "**": 4}
    quantized = lm.quantize(model := load(source), rules)
    expected = str(quantized), quantized.changes, quantized.old_nbytes, quantized.new_nbytes
    del model, quantized
    mx.clear_cache()
    before = mx.get_active_memory()
    report = lm.convert(source, tmp_path / "converted", rules)

    assert mx.get_active_memory() - before < 1000
    assert (str(report), report.changes, report.old_nbytes, report.new_nbytes) == expected
    assert list(report) == list(lm.quantization_config(load(tmp_path / "converted")))[3:]
    layers = map(model_folders.arrays_of, report.values())
    assert all(array.size == 0 for arrays in layers for array in arrays.values())


def test_the_plan_of_a_conversion_writes_nothing(tmp_path, source):
    from mlx_modswap.lm._folders.convert import plan

    before = model_folders.content(tmp_path)
    rules = {"**.q_proj": 8, "**": 4}
    planned = plan(
        source,
        rules,
        group_size=None,
        mode="affine",
        dtype="float16",
        strict=True,
        trust_remote_code=False,
    )
    memory = mx.get_active_memory()
    bits = utils.compute_bits_per_weight(planned.model)
    text = str(planned.report)

    assert mx.get_active_memory() == memory
    assert model_folders.content(tmp_path) == before
    assert text == str(lm.convert(source, tmp_path / "converted", rules, dtype="float16"))
    assert bits == utils.compute_bits_per_weight(load(tmp_path / "converted"))


# Memory


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
LARGEST = 512 * 2048  # numbers in the largest layer


@pytest.mark.parametrize(
    ("stored", "dtype", "bits"),
    [
        (mx.float16, None, 4),
        (mx.float16, None, 8),
        (mx.bfloat16, "float16", 8),
        (mx.float32, "float16", 8),
        (mx.float16, "float32", 4),
    ],
)
@pytest.mark.parametrize("blocks", [2, 6])
def test_memory_is_one_shard_and_one_and_a_half_layers_however_many_there_are(
    tmp_path, stored, dtype, bits, blocks
):
    config = {**WIDE, "num_hidden_layers": blocks}
    model = model_folders.llama(**config)
    model.set_dtype(stored)
    size = sum(array.nbytes for array in model_folders.arrays_of(model).values())
    source = model_folders.write_folder(
        tmp_path / "source", model, {**model_folders.LLAMA, **config}
    )
    del model
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lm.convert(source, tmp_path / "converted", {"**": bits}, dtype=dtype, max_shard_mb=1)
    peak = mx.get_peak_memory() - before
    itemsize = max(stored.size, getattr(mx, dtype).size if dtype else 0)
    # A shard is at most 1 MB here, or one array if that is larger.
    shard = max(1_000_000, LARGEST * bits // 8)

    assert peak <= shard + 1.5 * LARGEST * itemsize
    assert peak < size


def test_experts_that_are_stored_one_by_one_take_twice_what_they_take_together(tmp_path):
    source = experts_folder(tmp_path / "source")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lm.convert(source, tmp_path / "converted", {"**": 4}, max_shard_mb=0.1)

    assert mx.get_peak_memory() - before <= 1_000_000 + 2 * 8 * 256 * 512 * 4


def experts_folder(folder: Path) -> Path:
    """A mixtral whose experts are arrays of their own, as they are on the hub."""
    config = {
        **model_folders.LLAMA,
        "model_type": "mixtral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    arrays = model_folders.arrays_of(Mixtral(MixtralArgs.from_dict(config)))
    names = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}
    for name in [name for name in arrays if "switch_mlp" in name]:
        start, _, end = name.partition("switch_mlp.")
        stacked = arrays.pop(name)
        for number in range(8):
            arrays[f"{start}experts.{number}.{names[end]}.weight"] = stacked[number]
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# The bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_that_ends_full(tmp_path, source, capsys):
    with redirect_stderr(Terminal()) as terminal:
        lm.convert(source, tmp_path / "converted", {"**": 4})
    first, *_, last = terminal.getvalue().strip().split("\r")

    assert re.fullmatch(r"converted: +0%\|.*\| 0\.00/113k \[.*", first)
    assert re.fullmatch(r"converted: 100%\|.*\| 113k/113k \[.*[kM]B/s\]", last)
    assert capsys.readouterr().out == ""


def test_without_a_terminal_nothing_is_shown(tmp_path, source, capsys):
    lm.convert(source, tmp_path / "converted", {"**": 4})

    assert capsys.readouterr() == ("", "")
