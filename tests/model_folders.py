"""Folders of tiny models, as people download them, and what is in a folder."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from mlx.utils import tree_flatten
from mlx_lm import utils
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_modswap import lm

# A llama that fits in a few kilobytes. Its widths are 64, and 96 for mlp.down_proj.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}

# Code of a model that casts a weight when it is loaded.
CASTING = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def sanitize(self, weights):
        norm = "model.norm.weight"
        return {**super().sanitize(weights), norm: weights[norm].astype(mx.float32)}
"""


def llama(**config: Any) -> nn.Module:
    """A new model, with the same parameters each time."""
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    return Model(ModelArgs.from_dict({**LLAMA, **config}))


def llama_folder(folder: Path, **config: Any) -> Path:
    """A folder of a llama in float16."""
    model = llama(**config)
    model.set_dtype(mx.float16)
    return write_folder(folder, model, {**LLAMA, **config})


def zoo_folder(folder: Path, name: str) -> Path:
    """A folder of an architecture of the zoo, with random weights."""
    return write_folder(folder, zoo.build(name), {"model_type": name, **zoo.ZOO[name]["config"]})


def write_folder(folder: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **keywords: Any) -> Any:
    return utils.load_model(folder, **keywords)[0]


def refusal(model: nn.Module, target: Path, source: Path, **keywords: Any) -> str:
    """Return the reason for which ``lm.save`` refuses a model. The folder is not written."""
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.save(model, target, source, **keywords)
    start = f"{str(target)!r} was not written: "
    assert str(caught.value).startswith(start)
    assert not target.exists()
    return str(caught.value).removeprefix(start)


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer of a hundred words, ``w2`` to ``w99``, and two special tokens."""
    words = {"<unk>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, 100)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    arrays: Any = tree_flatten(model.parameters())
    return dict(arrays)


def assert_same_arrays(model: nn.Module, other: nn.Module) -> None:
    """Names, dtypes, shapes and every bit are the same."""
    arrays, others = arrays_of(model), arrays_of(other)
    assert list(arrays) == list(others)
    assert [name for name in arrays if not zoo.same(arrays[name], others[name])] == []


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def content(folder: Path) -> dict[str, bytes | None]:
    """The bytes of all files in a folder, hidden ones too; ``None`` for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def small_files_only() -> Iterator[None]:
    """Let this process write no file of more than 30 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
