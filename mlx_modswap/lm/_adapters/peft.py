"""Read the ``LoraConfig`` and the arrays of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .files import (
    CONFIG,
    PEFT_WEIGHTS,
    quoted,
    read_arrays,
    read_dropout,
    read_number,
    read_object,
    read_rank,
)
from .kinds import Adapter

_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_embedding_[AB]")

# Keys that do not change the result of plain LoRA, or that are read below. Any other key that is
# set may change it, as the keys of PEFT's many variants of LoRA do.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("runtime_config", "task_type", "megatron_core", "fan_in_fan_out", "qalora_group_size"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of init_lora_weights
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    }
)
_MERGE = "merge the adapter with PEFT (merge_and_unload), and convert the merged model"
_PLAIN = {  # the values that are plain LoRA, of keys that are never empty
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others change the base weights
}


def read_peft(folder: Path, config: Mapping[str, Any]) -> dict[str, Adapter]:
    """Read a folder with LoRA of PEFT.

    Returns:
        dict: The adapter of each path, in the order of the file. ``lora_a`` and
        ``lora_b`` are the transposed ``lora_A`` and ``lora_B``.

    Raises:
        ValueError: If it is not plain LoRA, or the files do not fit each other.
    """
    _check_plain(config, folder / CONFIG)
    file = folder / PEFT_WEIGHTS
    dropout = read_dropout(config.get("lora_dropout", 0.0), _key(folder, "lora_dropout"))
    adapters: dict[str, Adapter] = {}
    for path, arrays in _pairs(file).items():
        rank, scale = _rank_and_scale(config, path, folder)
        adapters[path] = Adapter(arrays, "lora", rank, scale, dropout)
    return adapters


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    for key, value in config.items():
        if key == "peft_type":
            is_plain = value == "LORA"
        elif key in _PLAIN and value:
            is_plain = value in _PLAIN[key]
        else:
            is_plain = not value or key in _HARMLESS
        if not is_plain:
            raise ValueError(
                f"{quoted(file)} sets {key!r} to {value!r}, which is not plain LoRA; {_MERGE}"
            )


def _pairs(file: Path) -> dict[str, dict[str, mx.array]]:
    """Read the arrays by path, under the names that mlx-lm gives them."""
    given = read_arrays(file)
    for found in filter(None, map(_EMBEDDING.fullmatch, given)):
        raise ValueError(
            f"{quoted(file)} has an adapter of an embedding, {found['path']!r}: PEFT "
            "adapts only the inputs, but mlx-lm would adapt the outputs as well if the head is "
            f"tied to the embedding; untie the two, {_MERGE}"
        )
    pairs: dict[str, dict[str, mx.array]] = {}
    for name, array in given.items():
        found = _NAME.fullmatch(name)
        if found is None or array.ndim != 2:
            shape = "" if found is None else f" of shape {array.shape}"
            raise ValueError(
                f"{quoted(file)} has an array {name!r}{shape}, which is not LoRA of a linear "
                f"layer; {_MERGE}"
            )
        pairs.setdefault(found["path"], {})[f"lora_{found['side'].lower()}"] = array.T
    return pairs


def _rank_and_scale(config: Mapping[str, Any], path: str, folder: Path) -> tuple[int, float]:
    """Return the rank, and PEFT's scale: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
    rank = read_rank(*_for(path, config, "rank_pattern", "r", folder))
    alpha = read_number(*_for(path, config, "alpha_pattern", "lora_alpha", folder))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _for(
    path: str, config: Mapping[str, Any], patterns: str, usual: str, folder: Path
) -> tuple[Any, str]:
    """Return the value of the first pattern that matches the end of a path, and name the value."""
    what = _key(folder, patterns)
    for pattern, value in read_object(config.get(patterns) or {}, what).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", path)  # as in PEFT's get_pattern_key
        except re.error as error:
            raise ValueError(
                f"{what} has {pattern!r}, which is not a regular expression: {error}"
            ) from error
        if matches:
            return value, f"{pattern!r} of {what}"
    return config.get(usual, 8), _key(folder, usual)  # 8 is PEFT's default for both


def _key(folder: Path, key: str) -> str:
    return f"{key!r} in {quoted(folder / CONFIG)}"
