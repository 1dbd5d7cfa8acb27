"""The files of an adapter folder: found, read, and not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download  # which mlx-lm brings

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
TRUTH = "mlx_modswap"  # the key of the config that has the true rank and scale of each path


def find_folder(folder: str | Path) -> Path:
    """The folder itself, or where the files of a hub id are in the cache."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the folder that it is in")
    if not isinstance(folder, str):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return Path(snapshot_download(folder, allow_patterns=[CONFIG, WEIGHTS, PEFT_WEIGHTS]))
    except Exception as error:  # of the hub, of HTTP or of the network
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{folder!r} is not a folder, and not to be had from the Hugging Face Hub: {reason}"
        ) from error


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    _check_exists(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return read_object(config, str(file))


def read_arrays(file: Path) -> dict[str, mx.array]:
    """Read all arrays of a safetensors file into memory.

    Not lazily: a file that is cut short is found out here, and one that is
    written again later, as in training, changes nothing.
    """
    _check_exists(file)
    try:
        arrays: Any = mx.load(str(file))  # of a safetensors file: a dict
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    if not arrays:
        raise ValueError(f"{file} has no arrays")
    for name in arrays:
        if "" in name.split("."):
            raise ValueError(f"{file} has an array {name!r}, which is not the name of a parameter")
    return arrays


def _check_exists(file: Path) -> None:
    if file.is_file():
        return
    pickled = file.with_suffix(".bin")
    if pickled.is_file():
        raise ValueError(
            f"{pickled} is not safetensors: save the adapter again with PEFT, whose "
            "save_pretrained writes safetensors"
        )
    raise FileNotFoundError(
        f"{file} does not exist; an adapter is a folder with {CONFIG} and {WEIGHTS} "
        f"(mlx-lm) or {PEFT_WEIGHTS} (PEFT)"
    )


# ---------------------------------------------------------------- values of a config


def read_object(value: Any, what: str) -> dict[str, Any]:
    """Check that a value is a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a JSON object, not {_shown(value)}")
    return dict(value)


def read_rank(value: Any, what: str) -> int:
    """Check that a value is a rank."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number from 1 on, not {_shown(value)}")
    return value


def read_number(value: Any, what: str) -> float:
    """Check that a value is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{what} must be a number, not {_shown(value)}")
    return value


def read_dropout(value: Any, what: str) -> float:
    """Check that a value is a probability that ``nn.Dropout`` takes."""
    if not 0 <= read_number(value, what) < 1:
        raise ValueError(f"{what} must be at least 0 and less than 1, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
