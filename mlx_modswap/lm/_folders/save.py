"""Save a model as a folder that mlx-lm loads, checked before it gets its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models.bitlinear_layers import BitLinear

from ..._select.arguments import check_model
from ..._select.select import select
from ..._words import described
from .._loaders import loader_of
from .._quantize import quantization_config, quantized
from .._source import Config, Folder, Source, locate
from .compare import Outline, difference, other_layers, outline
from .values import other_values
from .write import (
    change_generation,
    check_free,
    copied_nbytes,
    copy_files,
    staged,
    write_config,
    writing,
)


def save(
    model: nn.Module,
    folder: Folder,
    source: Folder,
    *,
    config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Save a model as a folder from which ``mlx_lm.load`` builds the same model.

    The folder contains the weights, the config, and copies of the tokenizer and the
    other files of the source folder. It is first written under another name, loaded
    with ``mlx_lm.utils.load_model``, which reads only the names of the weights, and
    compared with the model. It gets its own name when all of this has worked;
    otherwise nothing is left of it. The model is not changed.

    Args:
        model (mlx.nn.Module): The model to save, for example one that ``mlx_lm.load``
            returned and :func:`quantize` changed.
        folder (str or pathlib.Path): The folder to make. It must not exist.
        source (str or pathlib.Path): The folder, or the name on the hub, from
            which the model was loaded.
        config (Mapping, optional): Entries of the config that differ from those of
            the source, such as ``{"num_hidden_layers": 20}`` after blocks were
            removed. The quantization is always taken from the model. The entry
            ``"text_config"`` of a multimodal model must be given as a whole. The
            entry ``"model_file"`` is the path of a Python file that builds the model;
            the file is copied. An entry that the source's ``generation_config.json``
            has too is changed in both files. Default: ``None``.
        trust_remote_code (bool): Whether to run the ``model_file`` that the config
            names. Default: ``False``.

    Raises:
        ValueError: If mlx-lm would build another model from the folder (the message
            says where it differs), or if the source has no valid config.
        FileNotFoundError: If the source is not a folder here and cannot be downloaded.
        FileExistsError: If the folder exists.
        OSError: If the disk has too little space.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx_lm
        >>> from mlx_modswap import lm
        >>> model, tokenizer = mlx_lm.load("my_model")
        >>> _ = lm.quantize(model, {"**.self_attn.*": 8, "**": 4})
        >>> lm.save(model, "my_model_mixed", "my_model")
        >>> model, tokenizer = mlx_lm.load("my_model_mixed")
    """
    check_model(model)
    target, changes = Path(folder), _checked(config)
    check_free(target)
    loader = loader_of(model)
    origin = Source(locate(source, loader.download), loader, trust_remote_code)
    old_config = origin.config()
    code = _model_file(changes, origin.folder)
    new_config = {**old_config, **changes}
    origin.check_trust(new_config)

    expected = outline(model)
    original = _original(origin) if changes else None
    arrays: Any = tree_flatten(model.parameters())
    nbytes = sum(array.nbytes for _, array in arrays)
    with staged(target, nbytes + copied_nbytes(origin.folder)) as staging:
        with writing("the weights"):
            utils.save_model(staging, model)
        finish(staging, origin, new_config, model)
        change_generation(staging, changes)
        if code is not None:
            shutil.copyfile(code, staging / code.name)
        check(origin._replace(folder=staging), target, expected, original)


def finish(staging: Path, origin: Source, config: Config, model: nn.Module) -> None:
    """Write everything in a folder except the weights."""
    copy_files(origin.folder, staging)
    keep_vision_config = origin.loader.keeps_vision(model)
    write_config(_with_quantization(config, model), staging, keep_vision_config=keep_vision_config)


def check(
    staged: Source,
    target: Path,
    expected: Outline,
    original: Outline | None,
) -> None:
    """Load a folder that was written, and compare the result with the model it was written from.

    Raises:
        ValueError: If mlx-lm cannot load it, or builds something else.
    """
    try:
        loaded = staged.load()
    except ValueError as error:
        # If the weights do not fit because mlx-lm builds other layers, the message is about these,
        # and mlx-lm's list of the weights that do not fit is left out.
        differs = _other_layers(staged, expected)
        message = differs or str(error).replace(str(staged.folder), str(target))
        cause = None if differs else error
        raise ValueError(f"{str(target)!r} was not written: {message}") from cause
    by = staged.loader.name
    differs = difference(outline(loaded.model), expected, original, by)
    if differs := differs or other_values(staged.folder, loaded, by):
        raise ValueError(f"{str(target)!r} was not written: {differs}")


def _other_layers(staged: Source, expected: Outline) -> str:
    try:
        built = staged.load(strict=False).model
    except ValueError:
        return ""
    return other_layers(outline(built), expected, staged.loader.name)


def _original(origin: Source) -> Outline | None:
    """Return what mlx-lm builds from the source; ``None`` if it cannot, say without weights."""
    try:
        built = origin.load(strict=False).model
    except ValueError:
        return None
    return outline(built)


def _checked(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entries of a config, all of which JSON can hold."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict of entries, not {described(config)}")
    changes = dict(config)
    for key in changes:
        if not isinstance(key, str):
            raise TypeError(f"the name of a config entry must be a str, not {key!r}")
    if isinstance(file := changes.get("model_file"), Path):
        changes["model_file"] = str(file)
    for key, value in changes.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise TypeError(f"the config entry {key!r} is not JSON: {error}") from None
    return changes


def _model_file(changes: dict[str, Any], origin: Path) -> Path | None:
    """Return the file to copy for a new ``model_file``, and leave only its name in ``changes``."""
    if changes.get("model_file") is None:
        return None
    file = Path(changes["model_file"])
    for candidate in (file, origin / file):
        if candidate.is_file():
            changes["model_file"] = candidate.name
            return candidate
    raise FileNotFoundError(f"model_file {str(file)!r} is not a file, here or in {str(origin)!r}")


def _with_quantization(config: Config, model: nn.Module) -> Config:
    """Return a config that says how the layers of a model are quantized now."""
    if select(model, "**", where=quantized, strict=False):
        return {**config, "quantization": quantization_config(model)}
    if select(model, "**", where=BitLinear, strict=False):
        return config  # with another kind of quantization, which is the same as in the source
    left = {key: value for key, value in config.items() if not key.startswith("quantization")}
    if isinstance(text_config := left.get("text_config"), dict):
        kept = {key: one for key, one in text_config.items() if key != "quantization_config"}
        left["text_config"] = kept
    return left
