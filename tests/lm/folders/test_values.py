"""Values that a loader computes from those in the files: they must be what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx_modswap.lm is made of functions of mlx-lm")

import model_folders
import zoo
from hypothesis import given
from hypothesis import strategies as st
from model_folders import load

from mlx_modswap import lm
from mlx_modswap.lm._folders.values import is_same

pytestmark = pytest.mark.usefixtures("on_the_cpu")

OWN_SANITIZE = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
UP, GATE = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.gate_proj.weight"

class Model(llama.Model):
    def sanitize(self, weights):
        weights = super().sanitize(weights)
        {change}
        return weights
"""
AGAIN = (
    "mlx-lm would compute {} anew each time it loads the folder, and get other values than the "
    "model has"
)


def folder_with(folder: Path, change: str, **config: Any) -> Path:
    """A llama in float32 whose ``sanitize`` changes weights."""
    config = {**model_folders.LLAMA, **config, "model_file": "own.py"}
    model_folders.write_folder(folder, model_folders.llama(**config), config)
    (folder / "own.py").write_text(OWN_SANITIZE.format(change=change))
    return folder


def saved(tmp_path: Path, source: Path) -> str:
    """Load and save a model; the reason why it is not saved, or ``''``."""
    model = load(source, trust_remote_code=True)
    try:
        lm.save(model, tmp_path / "saved", source, trust_remote_code=True)
    except ValueError as error:
        assert not (tmp_path / "saved").exists()
        return str(error).removeprefix(f"'{tmp_path}/saved' was not written: ")
    again = model_folders.arrays_of(load(tmp_path / "saved", trust_remote_code=True))
    for name, array in model_folders.arrays_of(model).items():
        assert mx.allclose(array, again[name], rtol=1e-6, atol=0), name
    return ""


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("pass", ""),
        ("weights[NORM] = weights[NORM] + 0", ""),
        ("weights[NORM] = weights[NORM].reshape(8, 8).reshape(-1)", ""),
        ("weights[Q] = weights[Q] * mx.array(1 + 2**-22)", ""),
        ("weights = {name: weights[name] for name in sorted(weights)}", ""),
        ("weights[NORM] = weights[NORM] * 2", "model.norm.weight"),
        ("weights[NORM] *= 2", "model.norm.weight"),
        ("weights[Q] = weights[Q].T", "model.layers.0.self_attn.q_proj.weight"),
        (
            "weights[Q] = weights[Q] * mx.array(1 + 2**-15)",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        (
            "weights[UP], weights[GATE] = weights[GATE], weights[UP]",
            "model.layers.2.mlp.{gate,up}_proj.weight",
        ),
        (
            "weights = {name: -w if 'mlp' in name else w for name, w in weights.items()}",
            "model.layers[0:4].mlp.{gate,down,up}_proj.weight",
        ),
        (
            "weights[NORM] = weights[NORM] * mx.array([2.0] + 63 * [1.0]); mx.eval(weights[NORM])",
            "model.norm.weight",
        ),
    ],
)
def test_values_that_change_with_each_load_are_refused(tmp_path, change, names):
    source = folder_with(tmp_path / "source", change)

    assert saved(tmp_path, source) == (AGAIN.format(names) if names else "")


@pytest.mark.parametrize("norm_head", [False, True])
def test_a_head_that_is_normalized_on_each_load_cannot_be_quantized(tmp_path, norm_head):
    config = {**zoo.ZOO["bailing_moe"]["config"], "norm_head": norm_head}
    model = zoo.build("bailing_moe", norm_head=norm_head)
    source = model_folders.write_folder(
        tmp_path / "source", model, {"model_type": "bailing_moe", **config}
    )
    loaded = load(source)
    target = tmp_path / "target"
    lm.quantize(loaded, {"**": 4})
    message = (
        f"'{target}' was not written: mlx-lm would compute lm_head.weight anew each time it loads "
        "the folder, and get other values than the model has; other settings for lm_head, or None "
        "(keep), may avoid that"
    )

    def save() -> None:
        lm.save(loaded, target, source)

    def convert() -> None:
        lm.convert(source, target, {"**": 4})

    for write in (save, convert):
        if norm_head:
            with pytest.raises(ValueError, match="anew each time") as caught:
                write()
            assert str(caught.value) == message
            assert not target.exists()
        else:
            write()
            model_folders.assert_same_arrays(load(target), loaded)
            target.rename(tmp_path / write.__name__)

    lm.convert(source, target, {"lm_head": None, "**": 4})
    expected = load(source)
    lm.quantize(expected, {"lm_head": None, "**": 4})
    outputs = [zoo.run("bailing_moe", one) for one in (load(target), expected)]
    assert mx.allclose(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_head_that_is_normalized_twice_is_the_same_head(tmp_path, dtype):
    source = model_folders.zoo_folder(tmp_path / "source", "baichuan_m1")
    lm.convert(source, tmp_path / "converted", {"lm_head": None, "**": 4}, dtype=dtype)
    lm.save(load(tmp_path / "converted"), tmp_path / "saved", tmp_path / "converted")

    once, twice = (load(tmp_path / name).lm_head.weight for name in ("converted", "saved"))
    assert once.dtype == twice.dtype == getattr(mx, dtype)
    assert mx.allclose(once, twice, atol=1e-3)


def test_a_model_that_was_not_loaded_may_have_weights_that_mlx_lm_changes(tmp_path):
    model = zoo.build("baichuan_m1")
    source = model_folders.write_folder(
        tmp_path / "source",
        model,
        {"model_type": "baichuan_m1", **zoo.ZOO["baichuan_m1"]["config"]},
    )

    assert model_folders.refusal(model, tmp_path / "saved", source) == AGAIN.format(
        "lm_head.weight"
    )


@given(
    values=st.lists(st.floats(width=16, allow_nan=True), min_size=1, max_size=5),
    dtype=st.sampled_from([mx.float16, mx.bfloat16, mx.float32]),
    factor=st.sampled_from([1.0, 1.1, -1.0]),
)
def test_arrays_are_the_same_if_each_value_is(values, dtype, factor):
    array = mx.array(values).astype(dtype)
    changed = (mx.array(values) * factor).astype(dtype)
    both: list[Any] = [array.tolist(), changed.tolist()]
    kept = all(one == other or one != one for one, other in zip(*both))
    if dtype == mx.float16:  # the smallest numbers may be rounded to their neighbours
        kept = kept or mx.abs(array - changed).max().item() <= 2**-24

    assert is_same(array, changed) is kept


@pytest.mark.parametrize("dtype", [mx.uint32, mx.uint8, mx.bool_, mx.int64])
def test_numbers_that_are_not_floats_must_be_equal(dtype):
    array = mx.array([0, 1, 1, 0]).astype(dtype)

    assert is_same(array, mx.array([0, 1, 1, 0]).astype(dtype))
    assert not is_same(array, mx.array([0, 1, 1, 1]).astype(dtype))


def test_values_are_compared_one_array_after_the_other(tmp_path):
    source = folder_with(
        tmp_path / "source",
        "weights = {name: w + 0 for name, w in weights.items()}",
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=8,
    )
    largest, size = 256 * 4096 * 4, (source / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    rules = {"**.q_proj": 8, "**": None}
    lm.convert(source, tmp_path / "converted", rules, max_shard_mb=1, trust_remote_code=True)

    assert mx.get_peak_memory() - before <= 1_000_000 + 3 * largest
    assert 1_000_000 + 3 * largest < size / 3
