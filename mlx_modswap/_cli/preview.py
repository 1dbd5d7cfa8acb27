"""Build the model that ``mlx_lm.load`` would, without reading or downloading its weights."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ..lm._loaders import Loader
from ..lm._source import Source, one_line, text_config

FROM_CONFIG = "drawn from config.json alone, without weights: bits are not known"


def preview(model: str, loader: Loader, *, trust_remote_code: bool) -> tuple[nn.Module, str]:
    """Build the model of a folder or of the hub.

    Args:
        model (str): A folder, or the id of a model on the hub. If its weights
            are not here, only its ``config.json`` is fetched.
        loader (Loader): The package that builds the model.
        trust_remote_code (bool): Whether a ``model_file`` may be run.

    Returns:
        tuple[mlx.nn.Module, str]: The model, whose weights are lazy, and ``""``; or
        the model built from its config alone, and :data:`FROM_CONFIG`.

    Raises:
        OSError: If there is no such folder, and no such model can be downloaded.
        ValueError: If mlx-lm cannot build a model from it.
    """
    folder, has_weights = _locate(model)
    source = Source(folder, loader, trust_remote_code)
    if has_weights:
        return source.load().model, ""
    return _built(source), FROM_CONFIG


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


def _built(source: Source) -> nn.Module:
    """Return the model that is built for a config, with the dtype of the config."""
    model, config = source.build(), source.config()
    for one in (config, text_config(config)):
        name = str(one.get("dtype") or one.get("torch_dtype")).removeprefix("torch.")
        if isinstance(dtype := getattr(mx, name, None), mx.Dtype):
            model.set_dtype(dtype)
            break
    return model
