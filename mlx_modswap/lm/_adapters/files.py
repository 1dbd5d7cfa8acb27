"""Find, read and check the files of an adapter folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._source import one_line

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
ORIGINALS = "mlx_modswap"  # the config's key for the true rank and scale of each adapter

# What to do with an adapter of PEFT that mlx-lm cannot represent.
MERGE = (
    "merge the adapter with PEFT (merge_and_unload), after untying the head if it is tied to the "
    "embedding, and convert the merged model; if its config has rope_parameters, check that mlx-lm "
    "reads them"
)


def read_adapter_config(file: Path) -> dict[str, Any]:
    """Read a config, which must be a JSON object."""
    _check_exists(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{quoted(file)} is not JSON: {one_line(error)}") from error
    return read_object(config, quoted(file))


def read_arrays(file: Path) -> dict[str, mx.array]:
    """Read all arrays of a safetensors file into memory.

    The arrays are not lazy. So a truncated file is an error here, and a file that is
    overwritten later, as in training, does not matter.
    """
    _check_exists(file)
    try:
        arrays: Any = mx.load(str(file))  # a dict, for a safetensors file
        mx.eval(arrays)
    except Exception as error:  # MLX raises many kinds of errors
        raise ValueError(f"{quoted(file)} is broken: {one_line(error)}") from error
    if not arrays:
        raise ValueError(f"{quoted(file)} has no arrays")
    for name, array in arrays.items():
        if "" in name.split("."):
            raise ValueError(
                f"{quoted(file)} has an array {name!r}, which is not the name of a parameter"
            )
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{quoted(file)} has {name!r} as {array.dtype}, which is not a float")
    return dict(sorted(arrays.items()))


def _check_exists(file: Path) -> None:
    if file.is_file():
        return
    pickled = file.with_suffix(".bin")
    if pickled.is_file():
        raise ValueError(
            f"{quoted(pickled)} is not a safetensors file; save the adapter again with PEFT, whose "
            "save_pretrained writes one"
        )
    raise FileNotFoundError(
        f"{quoted(file)} does not exist; an adapter is a folder with {CONFIG}, and with {WEIGHTS} "
        f"(mlx-lm) or {PEFT_WEIGHTS} (PEFT)"
    )


def quoted(path: Path) -> str:
    """Return a path as messages show it."""
    return repr(str(path))


# ---------------------------------------------------------------- values of a config


def read_object(value: Any, what: str) -> dict[str, Any]:
    """Check that a value is a JSON object, and return it."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a JSON object, not {_shown(value)}")
    return dict(value)


def read_rank(value: Any, what: str) -> int:
    """Check that a value is a rank, and return it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {_shown(value)}")
    return value


def read_number(value: Any, what: str) -> float:
    """Check that a value is a finite number, and return it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer of more than 300 digits
            if math.isfinite(number := float(value)):
                return number
    raise ValueError(f"{what} must be a finite number, not {_shown(value)}")


def read_dropout(value: Any, what: str) -> float:
    """Check that a value is a probability that ``nn.Dropout`` takes, and return it."""
    number = read_number(value, what)
    if not 0 <= number < 1:
        raise ValueError(f"{what} must be at least 0 and less than 1, not {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
