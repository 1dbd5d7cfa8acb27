"""Folders of little models, as users have them: with weights, without, quantized, broken."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
OWN_CODE = """\
import mlx.nn as nn
from mlx_lm.models.llama import Model as Llama, ModelArgs


class Scaled(nn.Linear):
    pass


class Model(Llama):
    def __init__(self, args):
        super().__init__(args)
        for layer in self.layers:
            layer.mlp.down_proj = Scaled(args.intermediate_size, args.hidden_size, bias=False)
"""


def make_models(folder: Path) -> None:
    write(folder / "llama")
    write(folder / "config", with_weights=False)
    quantization = {
        "group_size": 64,
        "bits": 4,
        "model.norm": False,
        "model.embed_tokens": {"bits": 8},
    }
    write(folder / "config_4_bit", {"quantization": quantization}, with_weights=False)
    convert_with_mlx_lm(folder / "llama", folder / "by_mlx_lm")
    four = {"quantization": {"group_size": 64, "bits": 4}}
    write(folder / "quantized", four, prepare=lambda model: nn.quantize(model))
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4"}}
    write(folder / "mxfp4", mxfp4, prepare=lambda model: nn.quantize(model, mode="mxfp4"))
    write(folder / "own_code", {"model_file": "own.py"})
    (folder / "own_code" / "own.py").write_text(OWN_CODE)
    write(folder / "unknown", {"model_type": "no_such_model"}, with_weights=False)
    write(folder / "truncated")
    os.truncate(folder / "truncated" / "model.safetensors", 5000)
    write(folder / "no_json", with_weights=False)
    (folder / "no_json" / "config.json").write_text("{")
    (folder / "empty").mkdir()
    (folder / "rules.json").write_text(
        '[[["**.v_proj", "**.down_proj"], 8], ["**", {"bits": 4, "group_size": 32}]]'
    )
    (folder / "twice.json").write_text('{"**": 4, "**": 8}')


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    with_weights: bool = True,
    prepare: Callable[[Any], object] = lambda model: None,
) -> None:
    """Write the folder of a little llama with random weights, with some of its config changed."""
    from mlx_lm import utils
    from mlx_lm.models import llama

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **(config or {})}))
    if with_weights:
        mx.random.seed(0)
        model = llama.Model(llama.ModelArgs.from_dict({**LLAMA, **(config or {})}))
        model.set_dtype(mx.bfloat16)
        prepare(model)
        utils.save_model(folder, model)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(LLAMA["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def convert_with_mlx_lm(source: Path, folder: Path) -> None:
    """Convert a model as a user of mlx-lm does who wants other bits in some places."""

    def bits(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if "layers.0." in path:
            return False
        return {"group_size": 32, "bits": 8 if path.endswith("v_proj") else 4}

    with contextlib.redirect_stdout(io.StringIO()):
        convert = importlib.import_module("mlx_lm.convert").convert
        convert(str(source), str(folder), quantize=True, quant_predicate=bits)


def write_hole(file: Path, model: nn.Module) -> int:
    """Write a file of weights that takes no space: all of its bytes but the header are a hole."""
    header: dict[str, Any] = {}
    end = 0
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return end
