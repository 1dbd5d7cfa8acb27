"""Every architecture of mlx-lm through ``mlx_modswap.lm``, and what stands in the way of a few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import model_folders
import pytest
import zoo
from mlx_lm import utils

from mlx_modswap import NoMatchError, lm, select

pytestmark = pytest.mark.usefixtures("on_the_cpu")

INSTALLED = zoo.installed()
RECORDS = [name for name in zoo.ZOO if zoo.ZOO[name].get("module", name) in INSTALLED]
ARCHITECTURES = [name for name in RECORDS if name in zoo.ARCHITECTURES]

NO_FOLDER = {
    "afm7": (
        TypeError,
        "'model.layers.0.self_attn.qkv_proj' (FusedLinear) cannot be quantized: its to_quantized "
        "takes group_size, bits, not 'mode'",
    ),
    "prism_hadamard_qwen35": (
        ValueError,
        "'{target}' was not written: mlx-lm cannot load '{target}': Hadamard packs require 2-bit "
        "affine weights, group size 128",
    ),
}
NOT_AS_MLX_LM = {
    "afm7": TypeError,  # as for mlx-lm: its to_quantized has no mode
    "muse_spark": NoMatchError,  # widths of 32 and 96, and its predicate keeps the others
    "phi3small": NoMatchError,  # widths of 32 and 96
}
NO_LIST = {
    "afm7": "Model.layers is not a list in the tree: only some of its 4 blocks are in "
    "'model.layers'",
}


def mixed_rules(model: nn.Module) -> dict[str, Any]:
    """Eight bits for one layer, six for another, four for the rest; or four for all."""
    found: dict[str, Any] = select(model, "**", where=is_quantizable)
    layers = [path for path, layer in found.items() if layer.weight.shape[-1] % 32 == 0]
    if not layers:
        return {"**": 4}
    first, middle = layers[0], layers[len(layers) // 2]
    own = {first: {"bits": 8, "group_size": 32}, middle: {"bits": 6, "group_size": 32}}
    return {**own, "**": 4}


def is_quantizable(path: str, layer: Any) -> bool:
    return hasattr(layer, "to_quantized")


def load(folder: Path) -> Any:
    return utils.load_model(folder)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_bits_are_saved_and_converted_and_loaded_bit_by_bit(tmp_path, name):
    source = model_folders.zoo_folder(tmp_path / "source", name)
    model = load(source)
    rules = mixed_rules(model)

    def save(target: Path) -> None:
        lm.quantize(model, rules, strict=False)
        lm.save(model, target, source)

    def convert(target: Path) -> None:
        lm.convert(source, target, rules, strict=False, max_shard_mb=0.1)

    for write in (save, convert):
        target = tmp_path / write.__name__
        if name in NO_FOLDER:
            error, message = NO_FOLDER[name]
            with pytest.raises(error) as caught:
                write(target)
            assert str(caught.value) == message.replace("{target}", str(target))
        else:
            write(target)
            model_folders.assert_same_arrays(load(target), model)
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "save", "convert"}


@pytest.mark.parametrize("name", RECORDS)
def test_the_catch_all_rule_does_what_mlx_lm_does(name):
    ours = zoo.build(name)
    if name in NOT_AS_MLX_LM:
        with pytest.raises(NOT_AS_MLX_LM[name]):
            lm.quantize(ours, {"**": 4})
        return
    lm.quantize(ours, {"**": 4})
    theirs, config = utils.quantize_model(zoo.build(name), {}, None, 4)
    entries = lm.quantization_config(ours)

    model_folders.assert_same_arrays(ours, theirs)
    for path, settings in config["quantization"].items():
        if isinstance(settings, dict):  # which may be less than all
            assert {key: entries[path][key] for key in settings} == settings


def test_the_blocks_of_all_records_but_one_are_found_in_the_tree():
    lost = {}
    for name in RECORDS:
        model = zoo.build(name)
        try:
            path = lm.layers_path(model)
        except ValueError as error:
            lost[name] = str(error)
            continue
        found = list(select(model, f"{path}[:]").values())
        blocks = [id(block) for block in model.layers]
        assert [id(block) for block in found if id(block) in blocks] == blocks

    assert lost == {name: NO_LIST[name] for name in RECORDS if name in NO_LIST}
