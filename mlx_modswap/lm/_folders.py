"""Read the folder of a model with mlx-lm, and write one under another name until it is complete."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from .._report import size

Config = dict[str, Any]
Folder = str | Path

# What `copy_files` does not copy: weights in any format, and files that describe them.
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".npy", ".npz", ".onnx", ".onnx_data", ".ot", ".part", ".pkl", ".tflite"),
}
_DESCRIPTIONS = {"config.json", "hf_quant_config.json"}
_GENERATION = "generation_config.json"
_CHAT_TEMPLATES = "additional_chat_templates"  # a folder that transformers writes and reads


def find(source: Folder, kind: str = "a model", files: Any = utils.DEFAULT_ALLOW_PATTERNS) -> Path:
    """Return a folder, which is downloaded if it is on the hub and not here yet.

    Raises:
        FileNotFoundError: If there is no such folder, and no such model can be downloaded.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{str(source)!r} is a file, not a folder")
    try:
        # As in mlx-lm, which imports it from the hub that the environment names.
        download: Any = vars(utils)["snapshot_download"]
        return Path(download(str(source), allow_patterns=files))
    except Exception as error:  # of the hub, the network or the disk
        raise FileNotFoundError(
            f"{str(source)!r} is not a folder here, and the hub does not have {kind} of that name: "
            f"{one_line(error)}"
        ) from error


def read_config(folder: Path) -> Config:
    """Return the config of a folder, as mlx-lm reads it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a JSON object.
    """
    file = folder / "config.json"
    try:
        config: Any = utils.load_config(folder)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config.json in {str(folder)!r}") from None
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {one_line(error)}") from error
    except (AttributeError, TypeError):  # mlx-lm takes each of the two files for an object
        for one in (file, folder / _GENERATION):
            _check_object(one, json.loads(one.read_text()))
        raise
    _check_object(file, config)
    return config


def _check_object(file: Path, held: Any) -> None:
    """Raise a ``ValueError`` if what a file of JSON holds is not an object."""
    if not isinstance(held, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, not a {type(held).__name__}")


def text_config(config: Config) -> Config:
    """Return the part of a config that is about the language model of a multimodal model."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def check_trust(config: Config, trust_remote_code: bool) -> None:
    """Raise a ``ValueError`` if a config names code that was not allowed to run."""
    if config.get("model_file") is not None and not trust_remote_code:
        raise ValueError(
            f"the config names a model_file, {config['model_file']!r}, whose code builds the "
            "model; pass trust_remote_code=True if you trust it"
        )


def load(folder: Path, *, trust_remote_code: bool, strict: bool = True) -> tuple[nn.Module, Config]:
    """Return the model and the config of a folder; only the headers of the weights are read.

    Raises:
        ValueError: If mlx-lm cannot build a model from the folder.
    """
    try:
        return utils.load_model(
            folder, lazy=True, strict=strict, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # code of mlx-lm and of the model may raise anything
        _check_weights(folder)
        raise ValueError(f"mlx-lm cannot load {str(folder)!r}: {one_line(error)}") from error


def _check_weights(folder: Path) -> None:
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            mx.load(str(file))
        except Exception as error:
            raise ValueError(f"{str(file)!r} is broken: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, cut if it is too long."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, RuntimeError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else f"{text[:400]}..."


# ---------------------------------------------------------------- write a folder


@contextmanager
def staged(folder: Path, nbytes: int) -> Iterator[Path]:
    """Yield an empty folder beside the target, and rename it to the target at the end.

    Args:
        folder (Path): The target.
        nbytes (int): The size of what will be written, in bytes.

    Raises:
        FileExistsError: If the target exists.
        OSError: If the disk does not have enough space.
    """
    check_free(folder)
    # Missing parents are made at the end, so that none is left after a failure. The first folder
    # above the target that exists is on the disk where the target will be.
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    left = shutil.disk_usage(above).free
    if nbytes > left:
        raise OSError(
            f"{str(folder)!r} needs {size(nbytes)}, and its disk has {size(left)} left; "
            "nothing was written"
        )
    outer = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=above))
    try:
        inner = outer / folder.name  # with the usual permissions, unlike the outer folder
        inner.mkdir()
        yield inner
        check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        inner.rename(folder)
    except BaseException:
        _remove(outer)
        raise
    outer.rmdir()


def check_free(folder: Path) -> None:
    """Raise a ``FileExistsError`` if something has that name."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{str(folder)!r} exists already; give the name of a new folder")


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(
            f"{str(folder)!r} holds an unfinished model and could not be removed: {error}",
            stacklevel=2,
        )


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise an ``OSError`` that says what could not be written, since MLX's error does not."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{what} could not be written: {one_line(error)}") from error


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the other files of a source, except those of its weights."""
    for file in _files_to_copy(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def copied_nbytes(source: Path) -> int:
    """Return the size of the files that are copied, in bytes."""
    return sum(file.stat().st_size for file in _files_to_copy(source))


def _files_to_copy(source: Path) -> list[Path]:
    """List the top-level files of a source, except those of its weights, and its chat templates."""
    return [
        file
        for file in sorted([*source.iterdir(), *source.glob(f"{_CHAT_TEMPLATES}/*.jinja")])
        if file.is_file()
        and file.suffix.lower() not in _WEIGHTS
        and file.name not in _DESCRIPTIONS
        and not file.name.endswith(".index.json")
    ]


def change_generation(folder: Path, changes: Config) -> None:
    """Give entries new values in the generation config of a folder, where it has them.

    Otherwise mlx-lm, which prefers the end tokens of this file, would not see theirs.
    """
    file = folder / _GENERATION
    if not file.is_file():
        return
    try:
        old: Config = json.loads(file.read_text())
    except ValueError:  # mlx-lm ignores such a file
        return
    new = {key: changes.get(key, value) for key, value in old.items()}
    if new != old:
        file.write_text(json.dumps(new, indent=2))


def write_config(config: Config, folder: Path, model: nn.Module) -> None:
    """Write a config as ``mlx_lm.utils.save`` does."""
    # The expression is mlx-lm's: a model with a vision tower needs its vision config, too.
    keep_vision_config = "vision_tower" in getattr(model, "model", {})
    utils.save_config(
        dict(config),  # a copy, since `save_config` removes entries
        config_path=folder / "config.json",
        keep_vision_config=keep_vision_config,
    )
