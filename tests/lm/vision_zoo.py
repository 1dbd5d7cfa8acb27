"""Architectures of mlx-vlm that see or hear, at a size that is built and loaded in milliseconds.

``data/mlx_vlm_zoo.json`` holds one record per line: ``arch`` (the folder in ``mlx_vlm.models``),
``config`` (what ``config.json`` of a tiny model says) and ``inputs``: ``"tokens"`` where the model
takes a text alone, ``"language_model"`` where only its language model does, and ``null`` where
nothing does, for the reason in ``why``.

The configs have the keys of those on the hub, but four name sizes in the parts where
``update_module_configs`` looks for them, since it replaces what ``from_dict`` found elsewhere:
jina_vlm, molmo_point, nemotron_parse and phi4_siglip.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_vlm import utils

Arrays = dict[str, mx.array]
Record = dict[str, Any]

MADE_FOR = "0.7.10"  # the mlx-vlm whose architectures these are

_DATA = Path(__file__).parents[1] / "data" / "mlx_vlm_zoo.json"
_PARTS = ["text", "vision", "perceiver", "projector", "audio"]  # as in `utils.load_model`


def records() -> list[Record]:
    """All records, sorted by ``arch``."""
    return json.loads(_DATA.read_text())


def record(arch: str) -> Record:
    """The record of one architecture."""
    return next(record for record in records() if record["arch"] == arch)


def build(record: Record) -> Any:
    """A new model as ``mlx_vlm.utils.load_model`` makes it, with the same parameters each time."""
    config = copy.deepcopy(record["config"])  # the classes of mlx-vlm change what they are given
    package, _ = utils.get_model_and_args(config)
    config.setdefault("text_config", config.pop("llm_config", {}))
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    settings = package.ModelConfig.from_dict(config)
    settings = utils.update_module_configs(settings, package, config, _PARTS)
    settings = utils.apply_generation_config_defaults(settings, config)
    mx.random.seed(0)
    model = package.Model(settings)
    model.update(tree_map(_not_constant, model.parameters()))
    model.eval()
    return model


def folder(record: Record, path: Path) -> Path:
    """Write the model of a record in the form that ``mlx_vlm.utils.load_model`` reads."""
    return write(record, build(record), path)


def write(record: Record, model: nn.Module, path: Path) -> Path:
    """Write a model of a record in the form that ``mlx_vlm.utils.load_model`` reads."""
    arrays = _ON_DISK.get(record["arch"], dict)(arrays_of(model))
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(record["config"]))
    return path


def outputs(model: Any, record: Record) -> mx.array:
    """What the model makes of a few tokens."""
    if record["inputs"] is None:
        raise ValueError(f"{record['arch']} takes no text alone: {record['why']}")
    module = model if record["inputs"] == "tokens" else model.language_model
    result = module(mx.arange(1, 9)[None])
    output = result.text_embeds if hasattr(result, "text_embeds") else result.logits
    mx.eval(output)
    return output


def arrays_of(model: nn.Module) -> Arrays:
    arrays: Any = tree_flatten(model.parameters())
    return dict(arrays)


def _not_constant(array: mx.array) -> mx.array:
    """The array with a little noise if all of it is one number: a lost one would not be noticed."""
    if array.size < 2 or not mx.issubdtype(array.dtype, mx.floating) or array.max() != array.min():
        return array
    return array + mx.random.uniform(0, 0.01, array.shape).astype(array.dtype)


def _interleaved(arrays: Arrays) -> Arrays:
    """Rows of w1 and w3 alternate in the file, and are taken apart on every load."""
    return {
        name: _alternating(array) if ".w13." in name else array for name, array in arrays.items()
    }


def _alternating(array: mx.array) -> mx.array:
    first, second = mx.split(array, 2)
    return mx.stack([first, second], axis=1).reshape(array.shape)


def _channels_first(arrays: Arrays) -> Arrays:
    """Convolutions are as in PyTorch in the file, and are transposed on every load."""
    return {
        name: mx.contiguous(array.transpose(0, 3, 1, 2))
        if name.endswith(".conv.weight") and array.ndim == 4
        else array
        for name, array in arrays.items()
    }


# What a folder must hold of architectures whose `sanitize` takes its own result for something else.
_ON_DISK: dict[str, Callable[[Arrays], Arrays]] = {
    "falcon_ocr": _interleaved,
    "falcon_perception": _interleaved,
    "rt_detr_v2": _channels_first,
}
