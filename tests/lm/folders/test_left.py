"""What of a folder does not come along into a new one is named: arrays and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="mlx_modswap.lm is made of functions of mlx-lm")

import model_folders
import oracle
import zoo
from hypothesis import assume, given
from hypothesis import strategies as st
from model_folders import load

from mlx_modswap import lm
from mlx_modswap.lm._folders.left import _folded_arrays

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NOT_USED = "left: {}: mlx-lm does not use them ({})"


def add_arrays(folder: Path, names: list[str], file: str = "model.safetensors") -> None:
    """Add arrays of 4 KB to a file of weights."""
    arrays: Any = mx.load(str(folder / file)) if (folder / file).exists() else {}
    mx.eval(arrays)
    added = {name: mx.zeros((32, 32)) for name in names}
    mx.save_safetensors(str(folder / file), {**arrays, **added})


def lines(folder: Path, target: Path) -> list[str]:
    """The lines of the report for what was left."""
    report = lm.convert(folder, target, {"**": {"bits": 4, "group_size": 32}})
    return [line for line in str(report).splitlines() if line.startswith("left:")]


# Arrays


def test_towers_and_heads_that_the_loader_drops_are_named(tmp_path):
    source = model_folders.zoo_folder(tmp_path / "source", "qwen3_5")
    mtp = ["mtp.fc.weight", "mtp.layers.0.norm.weight"]
    visual = [f"model.visual.blocks.{n}.attn.{end}" for n in range(3) for end in ("qkv", "proj")]
    written: Any = mx.load(str(source / "model.safetensors"))
    arrays = {  # named as by transformers
        name.replace("language_model.model", "model.language_model"): array
        for name, array in written.items()
    }
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    add_arrays(source, [*visual, *mtp])
    report = lm.convert(source, tmp_path / "converted", {"**": {"bits": 4, "group_size": 32}})

    assert tuple(report.left[-1]) == (
        "arrays",
        "mlx-lm does not use them",
        8,
        8 * 4096,
        ("model.visual.**", "mtp.**"),
    )
    assert str(report).splitlines()[-1] == NOT_USED.format(
        "8 arrays, 32.8 KB", "model.visual.**, mtp.**"
    )
    assert load(tmp_path / "converted")


def test_single_arrays_are_named_and_folded(tmp_path):
    source = model_folders.llama_folder(tmp_path / "source", tie_word_embeddings=True)
    rope = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(4)]
    add_arrays(source, [*rope, "lm_head.weight"])

    assert lines(source, tmp_path / "converted") == [
        NOT_USED.format(
            "5 arrays, 20.5 KB",
            "lm_head.weight, model.layers[0:4].self_attn.rotary_emb.inv_freq",
        )
    ]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_arrays_from_which_others_are_computed_are_not_left(tmp_path, name):
    source = model_folders.zoo_folder(tmp_path / "source", name)
    try:
        report = lm.convert(source, tmp_path / "converted", {"**": 4}, strict=False)
    except (TypeError, ValueError):
        pytest.skip("cannot be converted")

    assert [one for one in report.left if one.what != "layers"] == []


def test_experts_that_are_joined_are_not_left(tmp_path):
    model = zoo.build("mixtral")
    config = {"model_type": "mixtral", **zoo.ZOO["mixtral"]["config"]}
    arrays = model_folders.arrays_of(model)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name in [name for name in arrays if "switch_mlp" in name]:
        start, _, end = name.partition("switch_mlp.")
        proj, _, kind = end.partition(".")
        for number, one in enumerate(arrays.pop(name)):
            arrays[f"{start}experts.{number}.{names[proj]}.{kind}"] = one
    source = tmp_path / "source"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    (source / "config.json").write_text(json.dumps(config))

    assert lines(source, tmp_path / "converted") == []


SEGMENT = st.sampled_from(["a", "b", "0", "1"])
NAMES = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)


@given(st.sets(NAMES), st.sets(NAMES))
def test_patterns_of_arrays_match_what_is_left_and_nothing_that_is_used(unused, used):
    names = unused | used
    assume(not any(one.startswith(f"{other}.") for one in names for other in names))
    unused -= used
    patterns = _folded_arrays(sorted(unused), sorted(used))
    matched = {one for one in names if any(oracle.matches(each, place(one)) for each in patterns)}

    assert matched == unused


def place(name: str) -> oracle.Place:
    """A place of that name, whose digits are indices of lists of ten."""
    segments = tuple(
        oracle.Segment(text, int(text), 10) if text.isdigit() else oracle.Segment(text)
        for text in name.split(".")
    )
    return oracle.Place(name, None, None, nn.Module(), segments, ())


# Files


def test_small_files_of_sub_folders_come_along_and_the_rest_is_named(tmp_path):
    source = model_folders.llama_folder(tmp_path / "source")
    files = {
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "1_Pooling/deeper/notes.txt": b"notes",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": bytes(2000),
        "onnx/model.onnx": bytes(3000),
        "onnx/model_q4.onnx": bytes(1000),
        "pytorch_model.bin": bytes(4000),
        ".git/HEAD": b"ref",
        "__pycache__/own.pyc": b"",
        ".gitattributes": b"*",
        "large/data.json": bytes(10**7 + 1),
    }
    for name, held in files.items():
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_bytes(held)
    before = model_folders.content(source)

    assert lines(source, tmp_path / "converted") == [
        "left: 5 files, 10.0 MB: not copied (pytorch_model.bin, 2_Dense/model.safetensors, "
        "large/**, onnx/**)"
    ]
    lm.save(load(source), tmp_path / "saved", source)
    for name in ("converted", "saved"):
        copied = model_folders.content(tmp_path / name)
        assert copied.keys() >= {
            *("modules.json", "1_Pooling/config.json", "1_Pooling/deeper/notes.txt"),
            *("2_Dense/config.json", ".gitattributes"),
        }
        assert copied.keys().isdisjoint({"onnx", "large", ".git", "__pycache__"})
        assert all(copied[one] == before[one] for one in ("1_Pooling/config.json", "modules.json"))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    source = model_folders.llama_folder(tmp_path / "source")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").symlink_to(tmp_path / "blobs" / "a")
    (source / "gone.txt").symlink_to(tmp_path / "nowhere")

    assert lines(source, tmp_path / "converted") == []
    assert (tmp_path / "converted" / "1_Pooling" / "config.json").read_text() == "{}"
    assert not (tmp_path / "converted" / "1_Pooling" / "config.json").is_symlink()


# Shards


def sharded(folder: Path) -> Path:
    """A llama in two files and an index."""
    model_folders.llama_folder(folder)
    whole: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(whole)
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: whole[name] for name in some})
        weight_map.update(dict.fromkeys(some, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("stale", ["model.safetensors", "model-00003-of-00003.safetensors"])
def test_a_stale_shard_is_not_read(tmp_path, stale):
    source = sharded(tmp_path / "source")
    expected = load(source)
    zeros = {name: mx.zeros_like(one) for name, one in model_folders.arrays_of(expected).items()}
    mx.save_safetensors(str(source / stale), {**zeros, "extra": mx.zeros((8,))})
    size = (source / stale).stat().st_size

    assert lines(source, tmp_path / "converted") == [
        f"left: 1 file, {size / 1000:.1f} KB: not in model.safetensors.index.json ({stale})"
    ]
    lm.quantize(expected, {"**": {"bits": 4, "group_size": 32}})
    model_folders.assert_same_arrays(load(tmp_path / "converted"), expected)


def test_a_stale_shard_beside_own_code_is_not_read(tmp_path):
    source = sharded(tmp_path / "source")
    mx.save_safetensors(str(source / "model-old.safetensors"), {"extra": mx.zeros((8,))})
    code = "from mlx_lm.models.llama import Model, ModelArgs\nassert __file__.endswith('own.py')\n"
    (source / "own.py").write_text(code)
    config = {**model_folders.LLAMA, "model_file": "own.py"}
    (source / "config.json").write_text(json.dumps(config))
    report = lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)

    assert report.left[-1].pattern == ("model-old.safetensors",)


def test_a_missing_shard_is_named(tmp_path):
    source = sharded(tmp_path / "source")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing") as caught:
        lm.convert(source, tmp_path / "converted", {"**": 4})

    assert str(caught.value) == (
        f"mlx-lm cannot load '{source}': model-00002-of-00002.safetensors is missing, which "
        "model.safetensors.index.json names"
    )


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": "b"}}'])
def test_an_index_that_names_no_file_of_the_folder_is_ignored(tmp_path, index):
    source = model_folders.llama_folder(tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(index)

    assert lines(source, tmp_path / "converted") == []
