"""Make the folders in ``tests/data/peft`` with PEFT itself: models, adapters, and PEFT's logits.

    python tests/programs/peft_folders.py tests/data/peft

Which of them are made depends on the versions that are installed (see ``CASES``). They were made
with PyTorch 2.13.0, and with PEFT 0.21.2 and transformers 5.24.0, or PEFT 0.18.1 and transformers
4.57.3 or 5.24.0. The tests read the folders and need none of these.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "head_dim": 4,
}
QWEN = {**SIZES, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
MIXTRAL = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}
GPT_OSS = {
    **MIXTRAL,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# The versions of PEFT and transformers, the model, its config, and the LoraConfig.
CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "experts as parameters": (
        "0.21",
        "5",
        "Qwen3Moe",
        QWEN,
        {
            "target_modules": ["q_proj", "gate"],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {"gate_up_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
    "experts as parameters, PEFT 0.18": (
        "0.18",
        "5",
        "Qwen3Moe",
        QWEN,
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
    ),
    "experts as modules": (
        "0.18",
        "4",
        "Mixtral",
        MIXTRAL,
        {
            "target_modules": ["q_proj", "gate", "experts.0.w1", "w2", "experts.1.w3"],
            "rank_pattern": {"experts.2.w2": 1},
            "alpha_pattern": {"experts.1.w2": 7},
        },
    ),
    "experts of gpt-oss": (
        "0.21",
        "5",
        "GptOss",
        GPT_OSS,
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
    ),
    "tied embedding": (
        "0.21",
        "5",
        "Llama",
        {**SIZES, "tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "head": (
        "0.21",
        "5",
        "Llama",
        {**SIZES, "tie_word_embeddings": False},
        {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": "mica"},
    ),
}


def main(folder: str) -> None:
    """Make the folders of all cases for the versions that are installed."""
    for name, (peft, transformers, model, config, lora) in CASES.items():
        if version("peft").startswith(peft) and version("transformers").startswith(transformers):
            make(Path(folder) / name.replace(" ", "_").replace(",", ""), model, config, lora)
            print(name)


def make(folder: Path, name: str, config: dict[str, Any], lora: dict[str, Any]) -> None:
    """Make the folder of one case."""
    torch: Any = import_module("torch")
    peft: Any = import_module("peft")
    transformers: Any = import_module("transformers")
    safetensors: Any = import_module("safetensors.torch")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**config)
    ).eval()
    randomize(model.named_parameters(), lambda name: "norm" not in name)
    model.save_pretrained(folder / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **lora)).eval()
    randomize(adapted.named_parameters(), lambda name: ".lora_" in name)
    adapted.save_pretrained(folder / "adapter")
    tokens = torch.tensor([[1, 5, 9, 2, 10, 7, 8, 4]])
    with torch.no_grad():
        logits = {"tokens": tokens, "logits": adapted(tokens).logits}
        with adapted.disable_adapter():
            logits["base"] = adapted(tokens).logits
    safetensors.save_file(logits, folder / "logits.safetensors")
    tidy(folder)


def randomize(parameters: Any, chosen: Callable[[str], bool]) -> None:
    """Fill the chosen parameters with small random numbers; those that share memory once."""
    torch: Any = import_module("torch")
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in parameters:
            if chosen(name) and parameter.data_ptr() not in done:
                done.add(parameter.data_ptr())
                parameter.copy_(torch.randn(parameter.shape) * 0.4)


def tidy(folder: Path) -> None:
    """Remove what is not read, and give mlx-lm what it reads in another form."""
    for file in ("model/generation_config.json", "adapter/README.md"):
        (folder / file).unlink(missing_ok=True)
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.get("num_experts") or config["num_local_experts"]
    if config["model_type"] == "gpt_oss":
        turn_experts(folder / "model" / "model.safetensors")
    config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def turn_experts(file: Path) -> None:
    """Write the experts of gpt-oss as in its quantized folders, which are all that mlx-lm reads."""
    safetensors: Any = import_module("safetensors.torch")
    arrays = safetensors.load_file(file)
    for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
        arrays[f"{name}.weight"] = arrays.pop(name).transpose(1, 2).contiguous()
    safetensors.save_file(arrays, file, {"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
