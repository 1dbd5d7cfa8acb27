"""The packages that load a folder. Each says what it does with a folder and with a model."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ._shards import stale_shards, without

Config = dict[str, Any]
Arrays = dict[str, mx.array]
Predicate = Callable[[str, Any], Any]  # whether, or with which settings, to quantize a layer


class Loaded(NamedTuple):
    """What a loader makes of a folder. None of the arrays is computed yet.

    Attributes:
        model (mlx.nn.Module): The model.
        config (dict): The config, as the loader leaves it.
        read (dict): The arrays of the files, by name, before the loader changed any. While
            they are kept, they take memory as soon as they are computed.
    """

    model: nn.Module
    config: Config
    read: Arrays


class Loader:
    """mlx-lm."""

    name = "mlx-lm"

    def download(self, source: str, files: Any = utils.DEFAULT_ALLOW_PATTERNS) -> Path:
        """Return the folder of a model on the hub, which is downloaded if it is not here yet."""
        # As in mlx-lm, which imports it from the hub that the environment names.
        download: Any = vars(utils)["snapshot_download"]
        return Path(download(source, allow_patterns=files))

    def load(
        self, folder: Path, config: Config, *, strict: bool, trust_remote_code: bool
    ) -> Loaded:
        """Return the model that a folder holds if its config is ``config``."""
        read: Arrays = {}

        def keep(model: Any) -> None:
            sanitize = getattr(model, "sanitize", lambda weights: weights)

            def keep_and_sanitize(weights: Arrays) -> Arrays:
                read.update(weights)
                del model.sanitize  # so that the model has its own again
                return sanitize(weights)

            model.sanitize = keep_and_sanitize

        with without(folder, stale_shards(folder)) as files:
            return Loaded(*_load(files, config, strict, trust_remote_code, keep), read)

    def build(self, folder: Path, config: Config, *, trust_remote_code: bool) -> nn.Module:
        """Return the model of a folder, built from its config alone."""

        # The `sanitize` of some models fails if there are no weights.
        def skip(model: Any) -> None:
            model.sanitize = lambda weights: weights

        model, _ = _load(folder, config, False, trust_remote_code, skip)
        del model.sanitize
        return model

    def arguments(self, folder: Path, config: Config) -> Any:
        """Return the arguments from which the model of a folder is built if it has this config."""
        _, arguments = _classes(folder, config)
        return arguments.from_dict(deepcopy(config))

    def keeps_vision(self, model: nn.Module) -> bool:
        """Return whether a model needs the ``vision_config`` of its config."""
        return "vision_tower" in getattr(model, "model", {})  # the expression is mlx-lm's

    def predicate(self, model: nn.Module, settings: Mapping[str, Any]) -> Predicate | None:
        """Return what its own conversion asks about each layer whose width fits."""
        return getattr(model, "quant_predicate", None)

    def skips(self, path: str) -> bool:
        """Return whether its own conversion skips a layer because of its path."""
        return False


def _load(
    folder: Path,
    config: Config,
    strict: bool,
    trust_remote_code: bool,
    prepare: Callable[[Any], None],
) -> tuple[Any, Config]:
    """Load a model with mlx-lm, and call ``prepare`` with it before it gets its weights.

    mlx-lm builds a model by calling the class that it gets for the config. A function can
    take the place of the class, but mlx-lm asks for none if there is a ``model_file``.
    """
    model_file = config.get("model_file")

    def classes(config: Config) -> tuple[Any, Any]:
        config.pop("model_file")
        if model_file is not None:
            config["model_file"] = model_file
        model_class, arguments_class = _classes(folder, config)

        def build(arguments: Any) -> Any:
            model = model_class(arguments)
            prepare(model)
            return model

        return build, arguments_class

    return utils.load_model(
        folder,
        lazy=True,
        strict=strict,
        model_config={**config, "model_file": None},
        get_model_classes=classes,
        trust_remote_code=trust_remote_code,
    )


def _classes(folder: Path, config: Config) -> tuple[Any, Any]:
    """Return the classes of the model and of its arguments, as mlx-lm finds them."""
    model_file = config.get("model_file")
    if model_file is None:
        parameters = inspect.signature(utils.load_model).parameters
        return parameters["get_model_classes"].default(config)
    spec: Any = importlib.util.spec_from_file_location("custom_model", folder / model_file)
    code: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code.Model, code.ModelArgs


def loader_of(model: nn.Module) -> Loader:
    """Return the package that a model is from, which the classes of its MRO tell."""
    return Loader()


def loader_named(name: str) -> Loader:
    """Return a package by its name."""
    if name != Loader.name:
        raise ValueError(f"loader must be {Loader.name!r}, not {name!r}")
    return Loader()
