"""Adapters saved and read again: by mlx-lm with the same outputs, by us with the same arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapting import (
    EMBEDDING,
    adapted,
    adapters_in,
    arrays_of,
    config_of,
    frozen,
    identical,
    identical_adapters,
    lora,
)
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_modswap import capture, lm, replace_layers, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q = "model.layers.*.self_attn.q_proj"
EXPERTS = "model.layers[1].block_sparse_moe.switch_mlp.*_proj"


def quantized(model: nn.Module, bits: int) -> nn.Module:
    def fits(path: str, layer: nn.Module) -> bool:
        return hasattr(layer, "to_quantized") and layer["weight"].shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    return model.freeze()


# ---------------------------------------------------------------- what is written


def test_places_in_the_last_blocks_are_written_as_mlx_lm_writes_them(tmp_path):
    model = frozen("llama")
    replace_layers(model, "model.layers[2:].self_attn.{q,v}_proj", lora(4, scale=20.0))
    lm.save_adapters(model, tmp_path)

    places = [f"model.layers.{n}.self_attn.{name}_proj" for n in (2, 3) for name in "qv"]
    assert config_of(tmp_path) == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 4,
            "scale": 20.0,
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        },
        "mlx_modswap": {path: {"rank": 4, "scale": 20.0} for path in places},
    }
    assert {name: array.shape for name, array in arrays_of(tmp_path).items()} == {
        f"{path}.{name}": shape
        for path in places
        for name, shape in (
            ("lora_a", (64, 4)),
            ("lora_b", (4, 64 if "q_proj" in path else 32)),
        )
    }


def test_other_places_are_written_as_whole_paths(tmp_path):
    model = frozen("llama")
    rules = {"model.layers[1].self_attn.q_proj": lora(2, 5.0), "model.embed_tokens": lora(8, 20.0)}
    replace_layers(model, rules)
    lm.save_adapters(model, tmp_path)

    assert config_of(tmp_path) == {
        "fine_tune_type": "lora",
        "num_layers": 4,
        "lora_parameters": {
            "rank": 8,
            "scale": 20.0,
            "dropout": 0.0,
            "keys": ["model.embed_tokens", "model.layers.1.self_attn.q_proj"],
        },
        "mlx_modswap": {
            "model.embed_tokens": {"rank": 8, "scale": 20.0},
            "model.layers.1.self_attn.q_proj": {"rank": 2, "scale": 5.0},
        },
    }
    arrays, adapters = arrays_of(tmp_path), adapters_in(model)
    q = adapters["model.layers.1.self_attn.q_proj"]
    a = arrays["model.layers.1.self_attn.q_proj.lora_a"]
    b = arrays["model.layers.1.self_attn.q_proj.lora_b"]
    assert identical(a, mx.concatenate([q.lora_a, mx.zeros((64, 6))], axis=1))
    assert identical(b, mx.concatenate([q.lora_b / 4, mx.zeros((6, 64))]))
    assert identical(arrays["model.embed_tokens.lora_b"], adapters["model.embed_tokens"].lora_b)


@pytest.mark.parametrize(
    ("pattern", "keys", "num_layers"),
    [
        ("model.layers.*.self_attn.q_proj", ["self_attn.q_proj"], 4),
        ("model.layers[3:].mlp.*_proj", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"], 1),
        ("model.layers[:2].self_attn.q_proj", None, 4),
        ("model.layers[::2].self_attn.q_proj", None, 4),
        (["model.layers[2:].self_attn.q_proj", "lm_head"], None, 4),
        (["model.layers[2:].self_attn.q_proj", "model.layers.3.mlp.up_proj"], None, 4),
    ],
)
def test_keys_are_relative_to_a_block_where_they_can_say_the_same(
    pattern, keys, num_layers, tmp_path
):
    model = frozen("llama", tie_word_embeddings=False)
    news = replace_layers(model, pattern, lora(4))
    lm.save_adapters(model, tmp_path)

    parameters = config_of(tmp_path)["lora_parameters"]
    assert parameters["keys"] == (list(news) if keys is None else keys)
    assert config_of(tmp_path)["num_layers"] == num_layers


def test_in_blocks_of_several_kinds_the_keys_are_relative_to_those_that_have_them(tmp_path):
    model = frozen("jamba")  # some blocks have attention, others have mamba
    news = replace_layers(model, "model.layers.*.self_attn.q_proj", lora(4))
    lm.save_adapters(model, tmp_path)
    fresh = load_adapters(frozen("jamba"), str(tmp_path))

    assert 0 < len(news) < len(model.layers)
    assert config_of(tmp_path)["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    assert list(adapters_in(fresh)) == list(adapters_in(model))


def plain() -> Any:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Nested(nn.Module):
    """A model whose ``layers`` are not a list."""

    def __init__(self):
        super().__init__()
        self.layers = plain()


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (plain, ["layers.0", "layers.2"]),
        (Nested, ["layers.layers.0", "layers.layers.2"]),
    ],
)
def test_a_model_without_blocks_is_saved_for_adapter_rules(model, keys, tmp_path):
    adapted_model, fresh = model().freeze(), model()
    ours = replace_layers(adapted_model, "**", lora(2), where=nn.Linear)
    lm.save_adapters(adapted_model, tmp_path)
    theirs = replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert config_of(tmp_path)["lora_parameters"]["keys"] == keys
    assert all(identical_adapters(ours[path], theirs[path]) for path in ours)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 8)


class Headed(nn.Module):
    """A model in which a path inside a block is also one of the whole model."""

    def __init__(self):
        super().__init__()
        self.layers = [Block(), Block()]
        self.head = nn.Linear(8, 8)


class Recurrent(nn.Module):
    """A model that goes twice through its blocks."""

    def __init__(self):
        super().__init__()
        self.layers = [Block(), Block()] * 2


@pytest.mark.parametrize("model", [Headed, Recurrent, lambda: nn.Sequential(nn.Linear(8, 8))])
def test_keys_are_whole_paths_where_mlx_lm_would_take_relative_ones_amiss(model, tmp_path):
    adapted_model, fresh = model().freeze(), model()
    news = replace_layers(adapted_model, "layers.**", lora(2), where=nn.Linear)
    lm.save_adapters(adapted_model, tmp_path)
    load_adapters(fresh, str(tmp_path))

    assert config_of(tmp_path)["lora_parameters"]["keys"] == list(news)
    assert set(adapters_in(fresh)) == set(news)


class Parts(nn.Module):
    """A model whose paths hold characters of patterns."""

    def __init__(self):
        super().__init__()
        self.parts = {name: nn.Linear(8, 8) for name in ("a*", "ab", "a?", "[0]", "{q,k}", "q")}


def test_a_path_with_characters_of_patterns_is_a_rule_for_this_path_alone(tmp_path):
    model, fresh = Parts(), Parts()
    model.freeze()
    names = ["a*", "a?", "[0]", "{q,k}"]
    for name in names:
        model.parts[name] = adapted(model.parts[name], r=2)
    lm.save_adapters(model, tmp_path)
    news = replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert list(news) == [f"parts.{name}" for name in names]
    assert all(identical_adapters(fresh.parts[name], model.parts[name]) for name in names)


# ---------------------------------------------------------------- and read again


CASES = {  # the architecture, the bits of its layers, the method, and the rank and scale of places
    "one rank": ("llama", 0, "lora", {Q: (4, 20.0)}),
    "ranks": ("llama", 0, "lora", {"**.q_proj": (2, 10.0), "**.{k,v}_proj": (8, 10.0)}),
    "scales": ("llama", 0, "lora", {"**.q_proj": (4, 7.3), "**.{k,v}_proj": (8, 0.6)}),
    "negative scale": ("llama", 0, "lora", {"**.q_proj": (4, -3.0), "**.k_proj": (4, 7.0)}),
    "3 bits": ("llama", 3, "lora", {"**.q_proj": (2, 3.0), "model.embed_tokens": (8, 16.0)}),
    "8 bits": ("llama", 8, "lora", {"**.q_proj": (2, 3.0), "model.embed_tokens": (8, 16.0)}),
    "embedding": ("llama", 0, "lora", {"model.embed_tokens": (3, 5.0), "**.up_proj": (5, 3.0)}),
    "experts": ("mixtral", 0, "lora", {EXPERTS: (2, 5.0), "**.gate": (3, 11.0)}),
    "experts, 4 bits": ("mixtral", 4, "lora", {EXPERTS: (2, 5.0), "**.gate": (3, 11.0)}),
    "DoRA": ("llama", 0, "dora", {"**.q_proj": (2, 3.0), "model.embed_tokens": (8, 16.0)}),
    "DoRA, 4 bits": ("llama", 4, "dora", {"**.q_proj": (2, 3.0), "**.up_proj": (5, 7.0)}),
    "DoRA, biases": ("qwen2", 0, "dora", {"**.q_proj": (2, 3.0), "**.up_proj": (5, 7.0)}),
}


@pytest.fixture(params=list(CASES))
def case(request, tmp_path) -> tuple[Any, Any, Any]:
    """A model with adapters, the same without, and the folder to which they were saved."""
    name, bits, method, rules = CASES[request.param]
    model, fresh = frozen(name), frozen(name)
    if bits:
        quantized(model, bits)
        quantized(fresh, bits)
    factories = {
        pattern: lora(r, scale, method=method, dropout=0.1) for pattern, (r, scale) in rules.items()
    }
    replace_layers(model, factories)
    model.eval()
    fresh.eval()
    lm.save_adapters(model, tmp_path / "adapters")
    return model, fresh, tmp_path / "adapters"


def test_mlx_lm_reads_them_into_the_same_places_with_the_same_output(case):
    model, fresh, folder = case
    tokens = mx.array([[1, 2, 3, 4]])
    before, expected = fresh(tokens), model(tokens)
    load_adapters(fresh, str(folder)).eval()

    assert list(adapters_in(fresh)) == list(adapters_in(model))
    assert mx.allclose(fresh(tokens), expected, rtol=1e-4, atol=1e-5)
    assert not mx.allclose(before, expected, rtol=1e-2, atol=1e-2)


def test_adapter_rules_restore_rank_scale_dropout_and_output(case):
    model, fresh, folder = case
    tokens = mx.array([[1, 2, 3, 4]])
    news: Any = replace_layers(fresh, lm.adapter_rules(folder))

    adapters = adapters_in(model)
    assert list(news) == [path for path, _ in reversed(list(adapters.items()))]
    for path, adapter in adapters.items():
        assert type(news[path]) is type(adapter)
        assert news[path].lora_a.shape == adapter.lora_a.shape
        assert (news[path].scale, news[path].dropout._p_1) == (adapter.scale, 0.9)
        assert identical(news[path].lora_a, adapter.lora_a)
        assert "m" not in adapter or identical(news[path].m, adapter.m)
        assert not news[path].training
    assert mx.allclose(fresh(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def test_inside_swapped_the_adapters_are_there_for_the_length_of_the_block(case):
    model, fresh, folder = case
    tokens = mx.array([[1, 2, 3, 4]])
    before, modules = fresh(tokens), dict(fresh.named_modules())
    rules = lm.adapter_rules(folder)
    for _ in range(2):  # rules can be used again
        with swapped(fresh, rules):
            assert mx.allclose(fresh(tokens), model(tokens), rtol=1e-5, atol=1e-6)
        assert identical(fresh(tokens), before)
        assert all(module is modules[path] for path, module in fresh.named_modules())


def test_adapters_of_mlx_lm_lora_are_read(tmp_path):
    model = frozen("llama").freeze()
    options = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, options)
    for adapter in adapters_in(model).values():
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    weights = {
        f"{path}.{name}": adapter[name]
        for path, adapter in adapters_in(model).items()
        for name in ("lora_a", "lora_b")
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": '
        '{"rank": 4, "scale": 20.0, "dropout": 0.0}, "iters": 100, "model": "llama"}'
    )
    news = replace_layers(frozen("llama"), lm.adapter_rules(tmp_path))

    assert set(news) == set(adapters_in(model))
    assert all(identical_adapters(news[path], one) for path, one in adapters_in(model).items())


def test_what_was_saved_is_saved_again_with_the_same_files(case, tmp_path):
    _, fresh, folder = case
    replace_layers(fresh, lm.adapter_rules(folder))
    lm.save_adapters(fresh, tmp_path / "again")

    assert config_of(tmp_path / "again") == config_of(folder)
    first, second = arrays_of(folder), arrays_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(mx.allclose(second[name], first[name], rtol=2e-7, atol=0) for name in first)


def test_an_adapter_that_a_hook_wraps_is_saved(tmp_path):
    model = frozen("llama")
    replace_layers(model, Q, lora(4))
    lm.save_adapters(model, tmp_path / "plain")
    with capture(model, Q):
        lm.save_adapters(model, tmp_path / "hooked")
        model(mx.array([[1]]))

    plain, hooked = arrays_of(tmp_path / "plain"), arrays_of(tmp_path / "hooked")
    assert config_of(tmp_path / "hooked") == config_of(tmp_path / "plain")
    assert plain.keys() == hooked.keys()
    assert all(identical(hooked[name], plain[name]) for name in plain)


def test_padding_stays_zero_in_training(tmp_path):
    model = frozen("llama")
    replace_layers(model, {"**.q_proj": lora(2, 3.0), "**.v_proj": lora(8, 7.0)})
    lm.save_adapters(model, tmp_path)
    fresh = load_adapters(frozen("llama").freeze(), str(tmp_path))
    tokens = mx.array([[1, 2, 3, 4]])
    gradients = nn.value_and_grad(fresh, lambda model: model(tokens).square().mean())(fresh)[1]

    q = gradients["model"]["layers"][0]["self_attn"]["q_proj"]
    assert mx.any(q["lora_a"][:, :2])
    assert mx.any(q["lora_b"][:2])
    assert not mx.any(q["lora_a"][:, 2:])
    assert not mx.any(q["lora_b"][2:])


def test_an_embedding_that_is_also_the_head_is_adapted_in_both_uses(tmp_path):
    model, fresh = frozen("gemma2"), frozen("gemma2")  # the head is embed_tokens.as_linear
    for one in (model, fresh):
        quantized(one, 8)
    (path,) = replace_layers(model, "**.embed_tokens", lora(3), where=EMBEDDING)
    lm.save_adapters(model, tmp_path)
    replace_layers(fresh, lm.adapter_rules(tmp_path))
    tokens = mx.array([[1, 2, 3]])

    assert identical_adapters(adapters_in(fresh)[path], adapters_in(model)[path])
    assert identical(fresh(tokens), model(tokens))


def test_dora_goes_around_layers_of_six_bits_where_mlx_lm_has_the_wrong_width(tmp_path):
    model = frozen("llama")
    replace_layers(model, Q, lambda path, layer: adapted(layer, "dora", r=4))
    lm.save_adapters(model, tmp_path)
    fresh = quantized(frozen("llama"), 6)
    with pytest.raises(ValueError, match="adapter shape"):
        load_adapters(quantized(frozen("llama"), 6), str(tmp_path))
    replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert fresh(mx.array([[1, 2, 3]])).shape == (1, 3, 96)
