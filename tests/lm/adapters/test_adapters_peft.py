"""Adapters of PEFT, by PEFT's own formula: ``W + alpha / r * B @ A``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapting import frozen, identical_adapters, is_expected, message
from mlx_lm.tuner.utils import load_adapters

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# What LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).save_pretrained writes.
CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
Q0, V0, Q3 = (
    f"model.layers.{place}_proj" for place in ("0.self_attn.q", "0.self_attn.v", "3.self_attn.q")
)


def layer_at(model: Any, path: str) -> Any:
    return dict(model.named_modules())[path]


def write(folder: Path, ranks: dict[str, int], **entries: Any) -> dict[str, np.ndarray]:
    """Write a folder as PEFT does. Returns ``B @ A`` of each path."""
    chance, model = np.random.default_rng(0), frozen("llama")
    arrays: dict[str, mx.array] = {}
    deltas: dict[str, np.ndarray] = {}
    for path, rank in ranks.items():
        outputs, inputs = layer_at(model, path).weight.shape
        a = chance.normal(size=(rank, inputs)).astype(np.float32) / 8
        b = chance.normal(size=(outputs, rank)).astype(np.float32) / 8
        start = f"base_model.model.{path}"
        arrays |= {f"{start}.lora_A.weight": mx.array(a), f"{start}.lora_B.weight": mx.array(b)}
        deltas[path] = b @ a
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **entries}))
    return deltas


# The entries of the config that differ, the rank of each path, and the scale that PEFT gives it.
SCALES = {
    "plain": ({}, {Q0: 4, V0: 4}, {Q0: 2.0, V0: 2.0}),
    "alpha": ({"lora_alpha": 1}, {Q0: 4}, {Q0: 0.25}),
    "rslora": ({"use_rslora": True}, {Q0: 4}, {Q0: 4.0}),
    "rank of the end of a path": (
        {"rank_pattern": {"q_proj": 2}},
        {Q0: 2, V0: 4, Q3: 2},
        {Q0: 4.0, V0: 2.0, Q3: 4.0},
    ),
    "rank of a whole path": (
        {"rank_pattern": {Q0: 16}},
        {Q0: 16, Q3: 4},
        {Q0: 0.5, Q3: 2.0},
    ),
    "rank by a regular expression": (
        {"rank_pattern": {r"layers\.[12]\..*": 2, r"layers\.\d\..*q_proj": 8}},
        {Q0: 8, V0: 4, Q3: 8},
        {Q0: 1.0, V0: 2.0, Q3: 1.0},
    ),
    "no part of a name": (
        {"rank_pattern": {"_proj": 2, "proj": 2, "self_attn": 2, "q_proj.weight": 2}},
        {Q0: 4},
        {Q0: 2.0},
    ),
    "the first of two patterns": (
        {"rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 8}},
        {Q0: 2, Q3: 8},
        {Q0: 4.0, Q3: 1.0},
    ),
    "alpha by pattern": (
        {"alpha_pattern": {"v_proj": 12}},
        {Q0: 4, V0: 4},
        {Q0: 2.0, V0: 3.0},
    ),
    "rank and alpha by pattern, rslora": (
        {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"3.*q_proj": 6}, "use_rslora": True},
        {Q0: 16, V0: 4, Q3: 16},
        {Q0: 2.0, V0: 4.0, Q3: 1.5},
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_ranks_scales_and_outputs_are_those_of_peft(name, tmp_path):
    entries, ranks, scales = SCALES[name]
    deltas = write(tmp_path, ranks, **entries)
    model, merged = frozen("llama").eval(), frozen("llama")
    for path, scale in scales.items():
        layer_at(merged, path).weight += mx.array(scale * deltas[path])
    news: Any = replace_layers(model, lm.adapter_rules(tmp_path))

    assert {path: new.scale for path, new in news.items()} == scales
    assert {path: new.lora_b.shape[0] for path, new in news.items()} == ranks
    assert {new.dropout._p_1 for new in news.values()} == {0.95}
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.allclose(model(tokens), merged(tokens), rtol=1e-4, atol=1e-5)
    assert not mx.allclose(frozen("llama")(tokens), merged(tokens), rtol=1e-2, atol=1e-2)


def test_around_quantized_layers(tmp_path):
    write(tmp_path, {Q0: 4})
    model = frozen("llama")
    nn.quantize(model, 32, 4)
    news: Any = replace_layers(model, lm.adapter_rules(tmp_path))

    assert isinstance(news[Q0].linear, nn.QuantizedLinear)
    assert model(mx.array([[1, 2]])).shape == (1, 2, 96)


def test_without_entries_the_rank_is_8_and_the_scale_is_1_as_in_peft(tmp_path):
    write(tmp_path, {Q0: 8})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    news: Any = replace_layers(frozen("llama"), lm.adapter_rules(tmp_path))

    assert (news[Q0].lora_a.shape, news[Q0].scale) == ((64, 8), 1.0)


def test_an_adapter_of_peft_becomes_one_of_mlx_lm(tmp_path):
    write(tmp_path, {Q0: 2, V0: 4}, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 12})
    model, again, theirs = (frozen("llama").eval() for _ in range(3))
    news = replace_layers(model, lm.adapter_rules(tmp_path))
    lm.save_adapters(model, tmp_path / "mlx")
    restored: Any = replace_layers(again, lm.adapter_rules(tmp_path / "mlx"))
    load_adapters(theirs, str(tmp_path / "mlx")).eval()
    tokens = mx.array([[1, 2, 3, 4]])

    assert restored[Q0].lora_a.shape == (64, 2)
    assert identical_adapters(restored[Q0], news[Q0])
    assert mx.allclose(again(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    assert mx.allclose(theirs(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_paths_that_mlx_lm_spells_differently_are_changed_in_the_keys_of_the_rules(tmp_path):
    write(tmp_path, {Q0: 4, Q3: 4})
    model = frozen("mistral3")
    before = dict(model.named_modules())
    rules = lm.adapter_rules(tmp_path)
    text = message(lambda: replace_layers(model, rules), tmp_path)

    assert is_expected(text, f"NoMatchError: '{Q0}' matches nothing..."), text
    assert all(module is before[path] for path, module in model.named_modules())
    news = replace_layers(model, {f"language_model.{path}": rules[path] for path in rules})
    assert list(news) == [f"language_model.{Q0}", f"language_model.{Q3}"]


# ---------------------------------------------------------------- what is more than LoRA

MERGE = (
    "merge the adapter with PEFT (merge_and_unload), after untying the head if it is tied to the "
    "embedding, and convert the merged model; if its config has rope_parameters, check that mlx-lm "
    "reads them"
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 4], [2, 6]]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("a_variant_that_is_not_known", {"on": True}),
    ],
)
def test_a_variant_of_lora_is_one_clear_error(key, value, tmp_path):
    write(tmp_path, {Q0: 4}, **{key: value})

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        f"ValueError: 'math/adapter_config.json' sets {key!r} to {value!r}, which is not plain "
        f"LoRA; {MERGE}"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "mica"),
        ("bias", ""),
        ("fan_in_fan_out", True),
        ("auto_mapping", {"base_model_class": "LlamaForCausalLM"}),
        ("a_variant_that_is_not_known", None),
        ("layers_to_transform", [0]),
    ],
)
def test_an_entry_that_changes_no_result_is_fine(key, value, tmp_path):
    write(tmp_path, {Q0: 4}, **{key: value})

    assert list(lm.adapter_rules(tmp_path)) == [Q0]


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        (f"base_model.model.{Q0}.lora_magnitude_vector", (64,), ""),
        ("base_model.model.lm_head.weight", (96, 64), ""),
        ("base_model.model.lm_head.modules_to_save.weight", (96, 64), ""),
        (f"base_model.model.{Q0}.bias", (64,), ""),
        (f"base_model.model.{Q0}.lora_B.bias", (64,), ""),
        (f"base_model.model.{Q0}.lora_A.default.weight", (4, 64), ""),
        ("base_model.model.conv.lora_A.weight", (4, 3, 3, 3), " of shape (4, 3, 3, 3)"),
    ],
)
def test_an_array_that_is_not_lora_is_one_clear_error(name, shape, told, tmp_path):
    write(tmp_path, {Q0: 4})
    file = str(tmp_path / "adapter_model.safetensors")
    arrays: Any = mx.load(file)
    mx.eval(arrays)
    mx.save_safetensors(file, {**arrays, name: mx.ones(shape)})

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        f"ValueError: 'math/adapter_model.safetensors' has an array {name!r}{told}, which is not "
        f"LoRA of a linear layer; {MERGE}"
    )


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_of_an_embedding_is_one_clear_error(with_base, tmp_path):
    write(tmp_path, {Q0: 4})
    file = str(tmp_path / "adapter_model.safetensors")
    arrays: Any = mx.load(file)
    mx.eval(arrays)
    start = "base_model.model.model.embed_tokens"
    if with_base:  # which save_pretrained writes unless it is told not to
        arrays[f"{start}.base_layer.weight"] = mx.ones((96, 64))
    pair = {"A": mx.ones((4, 96)), "B": mx.ones((64, 4))}
    arrays |= {f"{start}.lora_embedding_{side}": array for side, array in pair.items()}
    mx.save_safetensors(file, arrays)

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        "ValueError: 'math/adapter_model.safetensors' has an adapter of an embedding, "
        "'model.embed_tokens': PEFT adapts only the inputs, but mlx-lm would adapt the outputs as "
        f"well if the head is tied to the embedding; {MERGE}"
    )


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            {"r": 8},
            "'math/adapter_model.safetensors' has lora_a of shape (64, 4) and lora_b of shape "
            f"(4, 64) for '{Q0}', which are not of rank 8, as adapter_config.json says",
        ),
        (
            {"r": "4"},
            "'r' in 'math/adapter_config.json' must be a whole number of at least 1, not \"4\"",
        ),
        (
            {"lora_alpha": None},
            "'lora_alpha' in 'math/adapter_config.json' must be a finite number, not null",
        ),
        (
            {"lora_dropout": 2},
            "'lora_dropout' in 'math/adapter_config.json' must be at least 0 and less than 1, "
            "not 2",
        ),
        (
            {"rank_pattern": ["q_proj"]},
            "'rank_pattern' in 'math/adapter_config.json' must be a JSON object, not [\"q_proj\"]",
        ),
        (
            {"rank_pattern": {"q_proj": 4.5}},
            "'q_proj' of 'rank_pattern' in 'math/adapter_config.json' must be a whole number of at "
            "least 1, not 4.5",
        ),
        (
            {"alpha_pattern": {"(q_proj": 16}},
            "'alpha_pattern' in 'math/adapter_config.json' has '(q_proj', which is not a regular "
            "expression: ...",
        ),
    ],
)
def test_a_bad_value_is_one_clear_error(entries, expected, tmp_path):
    write(tmp_path, {Q0: 4}, **entries)
    text = message(lambda: lm.adapter_rules(tmp_path), tmp_path)

    assert is_expected(text, f"ValueError: {expected}"), text


def test_pickled_weights_are_one_clear_error(tmp_path):
    write(tmp_path, {Q0: 4})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")

    assert message(lambda: lm.adapter_rules(tmp_path), tmp_path) == (
        "ValueError: 'math/adapter_model.bin' is not a safetensors file; save the adapter again "
        "with PEFT, whose save_pretrained writes one"
    )
