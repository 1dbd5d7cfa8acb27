"""How exact an adapter is after it was saved and read: bit by bit, or to one rounding."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapting import arrays_of, config_of, identical, identical_adapters
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.lora import LoRALinear

from mlx_modswap import lm, replace_layers


@pytest.fixture(autouse=True)
def seed():
    mx.random.seed(0)


def through_a_folder(adapters: list[Any], folder: Any) -> list[Any]:
    """What adapters around plain layers become when they are saved and read."""
    model = nn.Sequential(*adapters)
    for adapter in adapters:
        adapter.linear.freeze()
    lm.save_adapters(model, folder)
    plain = nn.Sequential(*(adapter.linear for adapter in adapters))
    replace_layers(plain, lm.adapter_rules(folder))
    return plain.layers


def around_a_linear(lora_b: mx.array, scale: float) -> LoRALinear:
    adapter = LoRALinear.from_base(nn.Linear(2, lora_b.shape[1]), r=lora_b.shape[0], scale=scale)
    adapter.lora_a = adapter.lora_a.astype(lora_b.dtype)
    adapter.lora_b = lora_b
    return adapter


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.3125, 2.5, 10.0, -5.0, 1280.0])
def test_scales_that_differ_by_a_power_of_two_are_restored_bit_by_bit(scale, dtype, tmp_path):
    arrays = [mx.random.normal((r, 64)).astype(dtype) for r in (2, 8)]
    adapters = [around_a_linear(arrays[0], 10.0), around_a_linear(arrays[1], scale)]
    restored = through_a_folder(adapters, tmp_path)

    assert all(identical_adapters(new, old) for new, old in zip(restored, adapters))
    assert {array.dtype for array in arrays_of(tmp_path).values()} == {dtype}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.7, 3.0, 9.999, 333.3])
def test_any_scale_is_restored_bit_by_bit_in_16_bits(scale, dtype, tmp_path):
    arrays = [mx.random.normal((r, 64)).astype(dtype) for r in (2, 8)]
    adapters = [around_a_linear(arrays[0], 10.0), around_a_linear(arrays[1], scale)]
    restored = through_a_folder(adapters, tmp_path)

    assert all(identical_adapters(new, old) for new, old in zip(restored, adapters))
    assert config_of(tmp_path)["mlx_modswap"]["layers.1"]["dtype"] == str(dtype).split(".")[-1]
    assert arrays_of(tmp_path)["layers.1.lora_b"].dtype == mx.float32


numbers = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
scales = st.floats(0.01, 1000)


@given(st.lists(numbers, min_size=1, max_size=20), scales, scales)
def test_any_scale_is_restored_within_one_unit_in_the_last_place(
    tmp_path_factory, values, scale, other
):
    adapters = [around_a_linear(mx.ones((1, 1)), other), around_a_linear(mx.array([values]), scale)]
    first, second = through_a_folder(adapters, tmp_path_factory.mktemp("adapters"))
    old, new = np.array(adapters[1].lora_b), np.array(second.lora_b)

    assert (first.scale, second.scale) == (other, scale)
    assert identical(first.lora_b, adapters[0].lora_b)
    assert (np.abs(new - old) <= np.spacing(np.abs(old))).all()


@given(st.lists(numbers, min_size=1, max_size=20), scales, scales)
def test_what_mlx_lm_multiplies_is_right_to_one_rounding(tmp_path_factory, values, scale, other):
    adapters = [around_a_linear(mx.ones((1, 1)), other), around_a_linear(mx.array([values]), scale)]
    folder = tmp_path_factory.mktemp("adapters")
    through_a_folder(adapters, folder)
    theirs = np.array(arrays_of(folder)["layers.1.lora_b"], dtype=np.float64) * other
    ours = np.array(adapters[1].lora_b, dtype=np.float64) * scale

    assert (np.abs(theirs - ours) <= 2.0**-24 * np.abs(ours) * (1 + 1e-9)).all()


def test_the_most_frequent_scale_is_not_folded(tmp_path):
    scales = [3.0, 7.0, 7.0, 11.0]
    adapters = [around_a_linear(mx.random.normal((2, 8)), scale) for scale in scales]
    restored = through_a_folder(adapters, tmp_path)

    assert config_of(tmp_path)["lora_parameters"]["scale"] == 7.0
    assert all(identical_adapters(restored[n], adapters[n]) for n in (1, 2))
