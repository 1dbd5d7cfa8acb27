"""Find and read the folder of a model with mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from .._words import listed
from ._loaders import Config, Loaded, Loader
from ._shards import INDEX, missing_shards, weight_files

Folder = str | Path

GENERATION = "generation_config.json"


class Source(NamedTuple):
    """A folder of a model, and how to load it.

    Attributes:
        folder (Path): The folder.
        loader (Loader): The package that loads it.
        trust_remote_code (bool): Whether the code of a ``model_file`` may run.
        changes (dict): Entries of the config that take the place of those in the folder.
    """

    folder: Path
    loader: Loader
    trust_remote_code: bool
    changes: Config = {}  # noqa: RUF012  # never changed

    def config(self) -> Config:
        """Return the config of the folder, as mlx-lm reads it, with the changes."""
        return {**read_config(self.folder), **self.changes}

    def check_trust(self, config: Config) -> None:
        """Raise a ``ValueError`` if a config names code that was not allowed to run."""
        if config.get("model_file") is not None and not self.trust_remote_code:
            raise ValueError(
                f"the config names a model_file, {config['model_file']!r}, whose code builds the "
                "model; pass trust_remote_code=True (--trust-remote-code) if you trust it"
            )

    def load(self, *, strict: bool = True) -> Loaded:
        """Return the model and its config; only the headers of the weights are read.

        Raises:
            ValueError: If no model can be built from the folder.
        """
        config = self.config()
        self.check_trust(config)
        try:
            return self.loader.load(
                self.folder, config, strict=strict, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # code of the loader and of the model may raise anything
            _check_weights(self.folder)
            self._check_shards()
            message = one_line(error)
            if self.loader.name == Loader.name and "vision_config" in config:
                message = message.removesuffix(".")
                message += "; loader='mlx-vlm' (--loader mlx-vlm) loads vision-language models"
            raise ValueError(
                f"{self.loader.name} cannot load {str(self.folder)!r}: {message}"
            ) from error

    def _check_shards(self) -> None:
        """Raise a ``ValueError`` if a file that the index of the weights names is missing."""
        if missing := missing_shards(self.folder):
            are = "are" if len(missing) > 1 else "is"
            raise ValueError(
                f"{self.loader.name} cannot load {str(self.folder)!r}: {listed(missing, 4)} "
                f"{are} missing, which {INDEX} names"
            ) from None

    def build(self) -> nn.Module:
        """Return the model that is built from the config alone.

        Raises:
            ValueError: If no model can be built from it.
        """
        config = self.config()
        self.check_trust(config)
        try:
            return self.loader.build(self.folder, config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # code of the loader and of the model may raise anything
            raise ValueError(
                f"{self.loader.name} cannot build a model from {str(self.folder)!r}: "
                f"{one_line(error)}"
            ) from error


def locate(source: Folder, download: Callable[[str], Path], kind: str = "a model") -> Path:
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
        return download(str(source))
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
        for one in (file, folder / GENERATION):
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


def _check_weights(folder: Path) -> None:
    for file in weight_files(folder):
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
