"""An adapter folder holds only adapters, so what else may have been trained is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import model_folders
import pytest
import zoo
from adapting import adapters_in, arrays_of, frozen, identical, lora, message

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q = "model.layers[2:].self_attn.q_proj"
WAYS_OUT = (
    "if nothing else was trained, pass trained='drop'; if it was, fuse the adapters and save the "
    "whole model with lm.save; next time, call model.freeze() before the adapters are put in"
)


def with_adapters(model: Any) -> Any:
    replace_layers(model, Q, lora(4))
    return model


def unfrozen(*paths: str) -> Any:
    """A frozen llama with adapters, in which some modules are trained as well."""
    model = with_adapters(frozen("llama", tie_word_embeddings=False))
    modules = dict(model.named_modules())
    for path in paths:
        modules[path].unfreeze()
    return model


def quantized_after_the_freeze() -> Any:
    model = frozen("qwen2")  # its q, k and v have biases
    nn.quantize(model, 32, 4)
    return with_adapters(model)


NORMS = [
    f"model.layers.{n}.{name}_layernorm" for n in range(4) for name in ("input", "post_attention")
]

TRAINABLE = {
    "the head": (lambda: unfrozen("lm_head"), "lm_head.weight"),
    "norms": (
        lambda: unfrozen("model.norm", *NORMS),
        "model.layers[0:4].{input,post_attention}_layernorm.weight, model.norm.weight",
    ),
    "the layer of an adapter": (
        lambda: unfrozen("model.layers.3.self_attn.q_proj.linear"),
        "model.layers.3.self_attn.q_proj.linear.weight",
    ),
    "biases of layers that were quantized after the freeze": (
        quantized_after_the_freeze,
        "model.layers[0:2].self_attn.q_proj.bias, model.layers[0:4].self_attn.{k,v}_proj.bias, "
        "model.layers[2:4].self_attn.q_proj.linear.bias",
    ),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_trainable_arrays_outside_adapters_are_named(name, tmp_path):
    make, names = TRAINABLE[name]
    text = message(lambda: lm.save_adapters(make(), tmp_path / "math"), tmp_path)

    assert text == (
        "ValueError: an adapter folder cannot hold the trainable arrays outside the adapters: "
        f"{names}; {WAYS_OUT}"
    )
    assert list(tmp_path.iterdir()) == []


NEVER_FROZEN = {
    "llama": (lambda: with_adapters(zoo.build("llama")), 38),
    "quantized": (lambda: with_adapters(nn.quantize(m := zoo.build("llama"), 32, 4) or m), 9),
}


@pytest.mark.parametrize("name", NEVER_FROZEN)
def test_a_model_that_was_never_frozen_gets_one_line(name, tmp_path):
    make, count = NEVER_FROZEN[name]

    assert message(lambda: lm.save_adapters(make(), tmp_path), tmp_path) == (
        f"ValueError: the model was never frozen: {count} arrays outside the adapters are "
        f"trainable, and an adapter folder cannot hold them; {WAYS_OUT}"
    )


def test_a_model_that_mlx_lm_loaded_with_an_adapter_was_never_frozen(tmp_path):
    folder = model_folders.add_tokenizer(model_folders.llama_folder(tmp_path / "model"))
    model, *_ = mlx_lm.load(str(folder))
    model.freeze()
    lm.save_adapters(with_adapters(model), tmp_path / "math")
    loaded, *_ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "math"))

    text = message(lambda: lm.save_adapters(loaded, tmp_path / "again"), tmp_path)
    assert text.startswith("ValueError: the model was never frozen: ")
    lm.save_adapters(loaded, tmp_path / "again", trained="drop")
    first, again = arrays_of(tmp_path / "math"), arrays_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(identical(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", TRAINABLE)
def test_they_are_dropped_if_one_says_so(name, tmp_path):
    make, _ = TRAINABLE[name]
    model = make()
    lm.save_adapters(model, tmp_path, trained="drop")

    assert arrays_of(tmp_path).keys() == {
        f"{path}.{array}" for path in adapters_in(model) for array in ("lora_a", "lora_b")
    }


def test_adapters_that_are_frozen_are_saved(tmp_path):
    model = with_adapters(frozen("llama"))
    model.freeze()
    lm.save_adapters(model, tmp_path)

    assert len(arrays_of(tmp_path)) == 4


def test_trained_is_error_or_drop(tmp_path):
    wrong: Any = "fuse"

    assert message(lambda: lm.save_adapters(unfrozen(), tmp_path, trained=wrong), tmp_path) == (
        "ValueError: trained must be 'error' or 'drop', not 'fuse'"
    )


def test_the_way_out_for_a_model_that_was_trained(tmp_path):
    folder = model_folders.llama_folder(tmp_path / "model")
    model: Any = mlx_lm.utils.load_model(folder)[0]
    model.set_dtype(mx.float32)
    model.freeze()
    with_adapters(model)
    model.model.norm.unfreeze()
    model.model.norm.weight = model.model.norm.weight * 1.5  # as if it was trained
    tokens = mx.array([[1, 2, 3]])
    expected = model(tokens)
    replace_layers(model, Q, lambda path, layer: layer.fuse())
    lm.save(model, tmp_path / "fused", folder)
    loaded, _ = mlx_lm.utils.load_model(Path(tmp_path / "fused"))

    assert mx.allclose(loaded(tokens), expected, rtol=1e-3, atol=1e-3)
