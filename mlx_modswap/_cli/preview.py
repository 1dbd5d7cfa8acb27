"""Build the model that ``mlx_lm.load`` would, without reading or downloading its weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ..lm._source import Config, check_trust, load, one_line, read_config, text_config

FROM_CONFIG = "drawn from config.json alone, without weights: bits are not known"


def preview(source: str, *, trust_remote_code: bool) -> tuple[nn.Module, str]:
    """Build the model of a folder or of the hub.

    Args:
        source (str): A folder, or the id of a model on the hub. If its weights
            are not here, only its ``config.json`` is fetched.
        trust_remote_code (bool): Whether a ``model_file`` may be run.

    Returns:
        tuple[mlx.nn.Module, str]: The model, whose weights are lazy, and ``""``; or
        the model built from its config alone, and :data:`FROM_CONFIG`.

    Raises:
        OSError: If there is no such folder, and no such model can be downloaded.
        ValueError: If mlx-lm cannot build a model from it.
    """
    folder, has_weights = _locate(source)
    config = read_config(folder)
    check_trust(config, trust_remote_code)
    if has_weights:
        model, _ = load(folder, trust_remote_code=trust_remote_code)
        return model, ""
    return _built(folder, config, trust_remote_code), FROM_CONFIG


def _locate(source: str) -> tuple[Path, bool]:
    """Return the folder of a model, and whether all of its weights are there."""
    folder = Path(source)
    if folder.is_dir():
        return folder, _holds_weights(folder)
    if folder.exists():
        raise NotADirectoryError(f"{source!r} is a file, not a folder")
    huggingface_hub.logging.set_verbosity_error()  # it would report each attempt
    try:
        folder = utils.hf_repo_to_path(source)
        return folder, _holds_weights(folder)
    except huggingface_hub.errors.LocalEntryNotFoundError:  # not in the cache, or not all of it
        pass
    except huggingface_hub.errors.HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {source!r}, and it is not the id of a model on the hub"
        ) from None
    try:
        file = huggingface_hub.hf_hub_download(source, "config.json")
    except Exception as error:  # of the hub, the network or the disk
        raise FileNotFoundError(
            f"there is no folder {source!r}, and the hub does not have the config.json of a model "
            f"of that name: {one_line(error)}"
        ) from error
    return Path(file).parent, False


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors"))


def _built(folder: Path, config: Config, trust_remote_code: bool) -> nn.Module:
    """Return the model that mlx-lm builds for a config, with the dtype of the config."""
    try:
        model, _ = utils.load_model(
            folder,
            lazy=True,
            strict=False,
            get_model_classes=_classes_without_sanitize,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # code of mlx-lm and of the model may raise anything
        raise ValueError(
            f"mlx-lm cannot build a model from {str(folder)!r}: {one_line(error)}"
        ) from error
    for one in (config, text_config(config)):
        name = str(one.get("dtype") or one.get("torch_dtype")).removeprefix("torch.")
        if isinstance(dtype := getattr(mx, name, None), mx.Dtype):
            model.set_dtype(dtype)
            break
    return model


def _classes_without_sanitize(config: Config) -> tuple[type, type]:
    """Return the classes that mlx-lm finds by default, but with a ``sanitize`` that does nothing.

    The ``sanitize`` of some models fails if there are no weights.
    """
    parameters = inspect.signature(utils.load_model).parameters
    model_class, args_class = parameters["get_model_classes"].default(config)
    keep: dict[str, Any] = {"sanitize": lambda self, weights: weights}
    return type(model_class.__name__, (model_class,), keep), args_class
