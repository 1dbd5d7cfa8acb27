"""examples/mixed_precision.py on a small model: what it chooses fits, and lm.quantize takes it."""

from __future__ import annotations

import importlib
import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import compute_bits_per_weight

from mlx_modswap import lm

mixed: Any = importlib.import_module("mixed_precision")
TEXT = mx.arange(96).reshape(3, 32)


def build() -> Any:
    mx.random.seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **heads}
    return llama.Model(llama.ModelArgs.from_dict(config))


@pytest.fixture(scope="module")
def search() -> Any:
    return mixed.Search(build(), TEXT)


@pytest.mark.parametrize("bits", [3.2, 3.7, 4.6, 6.0])
def test_what_is_chosen_fits_into_the_budget_and_loses_no_more_than_the_same_bits_everywhere(
    search, bits
):
    budget = search.budget(None, bits)
    choice = search.choose(budget, rounds=2)
    assert search.size(choice) <= budget
    for same in ([setting] * len(choice) for setting in search.fitting(budget)):
        assert search.loss(choice) <= search.loss(same)


def test_a_rounded_layer_computes_what_the_quantized_one_does(search):
    model = build()
    choice = [at % len(mixed.SETTINGS) for at in range(len(search.parts))]
    with mx.stream(mx.cpu):  # a GPU may multiply in TF32
        with search.put(choice):
            rounded = search.model(TEXT)
            mx.eval(rounded)
        lm.quantize(model, rules_of(search, choice))
        assert mx.allclose(model(TEXT), rounded, atol=1e-4)


def test_the_size_is_that_of_the_quantized_model(search):
    model = build()
    choice = [at % len(mixed.SETTINGS) for at in range(len(search.parts))]
    lm.quantize(model, rules_of(search, choice))
    weights = search.budget(None, 8)
    assert search.size(choice) == pytest.approx(compute_bits_per_weight(model) * weights / 8)


def test_a_budget_that_is_too_small_is_one_line(search):
    with pytest.raises(SystemExit) as error:
        search.choose(1000, rounds=0)
    assert str(error.value) == "0.0 MB is too small: the least is 0.1 MB"


def rules_of(search: Any, choice: list[int]) -> dict[tuple[str, ...], Any]:
    written = json.loads(json.dumps(mixed.rules(search.parts, choice)))
    return {tuple(paths): settings for paths, settings in written}
