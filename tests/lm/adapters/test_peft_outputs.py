"""Adapters that PEFT wrote give the outputs that PEFT gave.

The folders and outputs in ``tests/data/peft`` are those of PEFT 0.21.2 with transformers 5.24.0,
and of PEFT 0.18.1 with transformers 4.57.3 or 5.24.0; ``tests/programs/peft_folders.py`` made them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapting import adapters_in, message
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_modswap import lm, replace_layers, select

pytestmark = pytest.mark.usefixtures("on_the_cpu")

DATA = Path(__file__).parents[2] / "data" / "peft"
MERGE = (
    "merge the adapter with PEFT (merge_and_unload), after untying the head if it is tied to the "
    "embedding, and convert the merged model; if its config has rope_parameters, check that mlx-lm "
    "reads them"
)

# The folder, what mlx-lm calls the experts if not switch_mlp, and the adapters of a block.
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "experts_as_parameters": (
        "switch_mlp",
        {
            "mlp.gate": "LoRALinear of rank 2, scale 1.5",
            "mlp.switch_mlp.down_proj": "LoRASwitchLinear of rank 2, scale 2.5",
            "mlp.switch_mlp.gate_proj": "LoRASwitchLinear of rank 3, scale 1.0",
            "mlp.switch_mlp.up_proj": "LoRASwitchLinear of rank 3, scale 1.0",
            "self_attn.q_proj": "LoRALinear of rank 2, scale 1.5",
        },
    ),
    "experts_as_parameters_PEFT_0.18": (
        "switch_mlp",
        {
            "mlp.switch_mlp.down_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "mlp.switch_mlp.gate_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "mlp.switch_mlp.up_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "self_attn.q_proj": "LoRALinear of rank 2, scale 1.5",
        },
    ),
    "experts_as_modules": (
        "switch_mlp",
        {
            "block_sparse_moe.gate": "LoRALinear of rank 2, scale 1.5",
            "block_sparse_moe.switch_mlp.down_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "block_sparse_moe.switch_mlp.gate_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "block_sparse_moe.switch_mlp.up_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "self_attn.q_proj": "LoRALinear of rank 2, scale 1.5",
        },
    ),
    "experts_of_gpt-oss": (
        "experts",
        {
            "mlp.experts.down_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "mlp.experts.gate_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "mlp.experts.up_proj": "LoRASwitchLinear of rank 2, scale 1.5",
            "self_attn.q_proj": "LoRALinear of rank 2, scale 1.5",
        },
    ),
    "tied_embedding": ("switch_mlp", {"self_attn.q_proj": "LoRALinear of rank 2, scale 1.5"}),
    "head": ("switch_mlp", {"self_attn.q_proj": "LoRALinear of rank 2, scale 1.5"}),
}


class Case:
    """A model, the adapter for it, and PEFT's outputs."""

    def __init__(self, name: str):
        self.folder = DATA / name
        arrays: Any = mx.load(str(self.folder / "logits.safetensors"))
        self.tokens, self.logits = arrays["tokens"], arrays["logits"]
        self.base = arrays["base"]
        self.experts, self.expected = CASES[name]

    def model(self) -> Any:
        model, _ = load_model(self.folder / "model")
        return model.freeze()

    def rules(self) -> dict[str, Any]:
        rules = lm.adapter_rules(self.folder / "adapter")
        return {path.replace("switch_mlp", self.experts): rule for path, rule in rules.items()}


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    return Case(request.param)


def close(one: mx.array, other: mx.array) -> bool:
    return mx.allclose(one, other, rtol=1e-5, atol=1e-5).item() is True


def described(adapter: Any) -> str:
    rank = adapter.lora_a.shape[1]
    return f"{type(adapter).__name__} of rank {rank}, scale {adapter.scale}"


def test_the_outputs_are_those_of_peft(case):
    model = case.model()
    assert close(model(case.tokens), case.base)

    replace_layers(model, case.rules())
    assert close(model(case.tokens), case.logits)
    assert not mx.allclose(case.base, case.logits, rtol=0.01, atol=0.01)


def test_classes_ranks_and_scales(case):
    news = replace_layers(case.model(), case.rules())
    found = {path.removeprefix("model.layers.0."): described(one) for path, one in news.items()}
    embedding = {
        "tied_embedding": {"model.embed_tokens": "LoRAEmbedding of rank 2, scale 1.5"},
        "head": {"lm_head": "LoRALinear of rank 2, scale 1.5"},
    }
    first = {path: text for path, text in found.items() if "layers.1" not in path}

    assert first == {**case.expected, **embedding.get(case.folder.name, {})}


def test_mlx_lm_reads_them_after_they_were_saved_again(case, tmp_path):
    model, theirs = case.model(), case.model()
    replace_layers(model, case.rules())
    lm.save_adapters(model, tmp_path)
    load_adapters(theirs, str(tmp_path)).eval()

    assert list(adapters_in(theirs)) == list(adapters_in(model))
    assert close(theirs(case.tokens), case.logits)


def test_they_can_be_fused(case):
    model = case.model()
    replace_layers(model, case.rules())
    replace_layers(model, "**", lambda path, layer: layer.fuse(), where=lambda p, m: "lora_a" in m)

    assert adapters_in(model) == {}
    assert close(model(case.tokens), case.logits)


# ---------------------------------------------------------------- experts


def copied(name: str, tmp_path: Path, **entries: Any) -> Path:
    """A copy of an adapter folder, with some entries of its config changed."""
    folder = tmp_path / "math"
    shutil.copytree(DATA / name / "adapter", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return folder


def change(folder: Path, arrays: dict[str, mx.array | None]) -> None:
    """Set or remove arrays of PEFT's file."""
    file = str(folder / "adapter_model.safetensors")
    held: Any = mx.load(file)
    mx.eval(held)
    held = {name: array for name, array in {**held, **arrays}.items() if array is not None}
    mx.save_safetensors(file, held)


def test_experts_without_an_adapter_are_not_changed():
    case = Case("experts_as_modules")  # w1 of expert 0 and w3 of expert 1 alone have adapters
    path = "model.layers.0.block_sparse_moe.switch_mlp"
    rules = lm.adapter_rules(case.folder / "adapter")
    news: Any = replace_layers(case.model(), rules)

    for name, expert in (("gate_proj", 0), ("up_proj", 1)):
        lora_b = news[f"{path}.{name}"].lora_b
        assert [mx.any(lora_b[index]).item() for index in range(3)] == [
            index == expert for index in range(3)
        ]


EXPERTS = "base_model.model.model.layers.0.mlp.experts"

BAD_EXPERTS: dict[str, tuple[dict[str, Any], dict[str, mx.array | None], str]] = {
    "another rank": (
        {"r": 5},
        {},
        "'math/adapter_model.safetensors' has arrays of the shapes [(6, 12), (8, 6)] for "
        "'model.layers.0.mlp.experts.down_proj', which are not lora_A and lora_B of rank 5 for "
        "each expert, as adapter_config.json says",
    ),
    "one array of two": (
        {},
        {f"{EXPERTS}.lora_B.weight": None},
        "'math/adapter_model.safetensors' has arrays of the shapes [(6, 12)] for "
        "'model.layers.0.mlp.experts.down_proj', which are not lora_A and lora_B of rank 2 for "
        "each expert, as adapter_config.json says",
    ),
    "one parameter more than the config names": (
        {"target_parameters": ["down_proj", "gate.weight"]},
        {},
        "'math/adapter_model.safetensors' has more adapters for 'model.layers.0.mlp.experts' than "
        "'target_parameters' in 'math/adapter_config.json' has parameters",
    ),
    "a parameter with another name": (
        {"target_parameters": ["experts.wi", "gate.weight"]},
        {},
        "'math/adapter_model.safetensors' has an adapter of the parameter 'wi' of "
        "'model.layers.0.mlp.experts', which mlx-lm has under another name than gate_up_proj, "
        f"gate_proj, up_proj, down_proj; {MERGE}",
    ),
    "parameters that are not a list": (
        {"target_parameters": "down_proj"},
        {},
        "'target_parameters' in 'math/adapter_config.json' must be a list of names",
    ),
}


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_bad_experts_are_one_clear_error(name, tmp_path):
    entries, arrays, expected = BAD_EXPERTS[name]
    folder = copied("experts_as_parameters", tmp_path, **entries)
    change(folder, arrays)

    assert message(lambda: lm.adapter_rules(folder), folder) == f"ValueError: {expected}"


def test_experts_of_another_number_do_not_fit(tmp_path):
    model, _ = load_model(DATA / "experts_as_modules" / "model")
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    layer: Any = select(model, path)[path]
    layer.weight = layer.weight[:2]
    rules = lm.adapter_rules(DATA / "experts_as_modules" / "adapter")

    assert message(lambda: replace_layers(model, rules), tmp_path) == (
        f"ValueError: there is an adapter for expert 2 of '{path}', which has 2 experts"
    )


def test_experts_around_a_linear_layer_do_not_fit():
    model = nn.Module()
    model["layer"] = nn.Linear(12, 8)
    folder = DATA / "experts_as_parameters" / "adapter"
    rules = lm.adapter_rules(folder)
    rule = rules["model.layers.0.mlp.switch_mlp.down_proj"]

    assert message(lambda: replace_layers(model, "layer", rule), folder) == (
        "ValueError: 'math/adapter_model.safetensors' does not fit 'layer': lora_a has the shape "
        "(3, 2, 12), and the Linear needs (12, 2)"
    )


@pytest.mark.parametrize(
    ("version", "is_read"), [("0.18.1", False), (None, False), ("0.21.2", True)]
)
def test_one_square_parameter_is_read_only_if_the_version_tells_its_sides(
    version, is_read, tmp_path
):
    folder = copied(
        "experts_as_parameters",
        tmp_path,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj"],
        peft_version=version,
    )
    a, b = mx.random.normal((6, 8)), mx.random.normal((8, 6))
    arrays = dict.fromkeys(
        [f"{EXPERTS}.base_layer.lora_{side}.weight" for side in "AB"]
        + [f"{EXPERTS.removesuffix('experts')}gate.lora_{side}.weight" for side in "AB"]
    )
    pair = {f"{EXPERTS}.lora_A.weight": a, f"{EXPERTS}.lora_B.weight": b}
    change(folder, {**arrays, **pair})
    model, _ = load_model(DATA / "experts_as_parameters" / "model")
    path = "model.layers.0.mlp.switch_mlp.down_proj"
    layer: Any = select(model, path)[path]
    layer.weight = layer.weight[:, :, :8]
    rules = lm.adapter_rules(folder)

    if is_read:
        news: Any = replace_layers(model, rules)
        deltas = [2.5 * b[:, expert::3] @ a[2 * expert : 2 * expert + 2] for expert in range(3)]
        assert mx.allclose(news[path].fuse().weight - layer.weight, mx.stack(deltas), atol=1e-5)
    else:
        assert message(lambda: replace_layers(model, rules), folder) == (
            f"ValueError: PEFT adapted only one parameter of the experts at '{path}', which is "
            f"square, and does not write which side is that of the inputs; {MERGE}"
        )


# ---------------------------------------------------------------- embeddings and heads


def test_a_tied_embedding_is_read_only_with_ensure_weight_tying(tmp_path):
    folder = copied("tied_embedding", tmp_path, ensure_weight_tying=False)

    assert message(lambda: lm.adapter_rules(folder), folder) == (
        "ValueError: 'math/adapter_model.safetensors' has an adapter of an embedding, "
        "'model.embed_tokens': PEFT adapts only the inputs, but mlx-lm would adapt the outputs as "
        f"well if the head is tied to the embedding; {MERGE}"
    )


def test_tied_adapters_of_two_scales_are_one_clear_error(tmp_path):
    folder = copied("tied_embedding", tmp_path, alpha_pattern={"lm_head": 8})

    assert message(lambda: lm.adapter_rules(folder), folder) == (
        "ValueError: 'math/adapter_model.safetensors' has one adapter for 'model.embed_tokens' and "
        "'lm_head', which are tied, but the scales are 1.5 and 4.0, and mlx-lm has one for both; "
        f"{MERGE}"
    )


HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.mark.parametrize("name", ["head", "tied_embedding"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_copy_of_the_base_is_ignored_in_any_dtype(name, dtype):
    case = Case(name)
    model = case.model()
    model.set_dtype(dtype)

    assert (
        "lora_a"
        in replace_layers(model, case.rules())[
            "lm_head" if name == "head" else "model.embed_tokens"
        ]
    )


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 8}, {"bits": 4, "mode": "mxfp4"}])
def test_a_copy_of_the_base_is_compared_after_the_quantization_of_the_layer(settings, tmp_path):
    folder = copied("head", tmp_path)
    arrays: Any = mx.load(str(folder / "adapter_model.safetensors"))
    weight = mx.random.normal((11, 32))
    wide = {"base_model.model.lm_head.lora_A.weight": mx.random.normal((2, 32)), HEAD: weight}
    change(
        folder,
        {
            **dict.fromkeys(arrays),
            **wide,
            **{name: arrays[name] for name in arrays if name.endswith("lm_head.lora_B.weight")},
        },
    )
    model: Any = nn.Module()
    model.lm_head = nn.Linear(32, 11, bias=False)
    model.lm_head.weight = weight
    quantized = nn.Module()
    quantized["lm_head"] = model.lm_head.to_quantized(group_size=32, **settings)
    other = nn.Module()
    other["lm_head"] = nn.QuantizedLinear(32, 11, group_size=32, **settings)
    rules = lm.adapter_rules(folder)
    news = replace_layers(quantized, rules)

    assert list(news) == ["lm_head"]
    assert message(lambda: replace_layers(other, rules), folder).startswith(
        "ValueError: 'math/adapter_model.safetensors' has a copy of the weight of 'lm_head'"
    )


def test_a_copy_of_another_base_is_one_clear_error(tmp_path):
    folder = copied("head", tmp_path)
    change(folder, {HEAD: mx.ones((11, 8))})
    model = Case("head").model()
    rules = lm.adapter_rules(folder)

    assert message(lambda: replace_layers(model, rules), folder) == (
        "ValueError: 'math/adapter_model.safetensors' has a copy of the weight of 'lm_head', as "
        "PEFT writes it for an adapted head or embedding, and it differs from the weight of the "
        "model; use the model that the adapter was trained on; if this is that model, only "
        f"quantized by another method, remove the array {HEAD} from the file"
    )


def test_a_weight_of_the_base_without_an_adapter_is_one_clear_error(tmp_path):
    folder = copied("head", tmp_path)
    name = "base_model.model.model.norm.base_layer.weight"
    change(folder, {name: mx.ones((11, 8))})

    assert message(lambda: lm.adapter_rules(folder), folder) == (
        f"ValueError: 'math/adapter_model.safetensors' has the weight of 'model.norm' ({name}), "
        f"but no adapter for it; {MERGE}"
    )
