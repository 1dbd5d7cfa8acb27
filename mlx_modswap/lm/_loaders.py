"""The packages that load a folder. Each says what it does with a folder and with a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import utils

Config = dict[str, Any]
Predicate = Callable[[str, Any], Any]  # whether, or with which settings, to quantize a layer


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
    ) -> tuple[nn.Module, Config]:
        """Return the model and the config of a folder; the weights are lazy."""
        return utils.load_model(
            folder, lazy=True, strict=strict, trust_remote_code=trust_remote_code
        )

    def build(self, folder: Path, config: Config, *, trust_remote_code: bool) -> nn.Module:
        """Return the model of a folder, built from its config alone."""
        model, _ = utils.load_model(
            folder,
            lazy=True,
            strict=False,
            get_model_classes=_classes_without_sanitize,
            trust_remote_code=trust_remote_code,
        )
        return model

    def keeps_vision(self, model: nn.Module) -> bool:
        """Return whether a model needs the ``vision_config`` of its config."""
        return "vision_tower" in getattr(model, "model", {})  # the expression is mlx-lm's

    def predicate(self, model: nn.Module, settings: Mapping[str, Any]) -> Predicate | None:
        """Return what its own conversion asks about each layer whose width fits."""
        return getattr(model, "quant_predicate", None)


def _classes_without_sanitize(config: Config) -> tuple[type, type]:
    """Return the classes that mlx-lm finds by default, but with a ``sanitize`` that does nothing.

    The ``sanitize`` of some models fails if there are no weights.
    """
    parameters = inspect.signature(utils.load_model).parameters
    model_class, args_class = parameters["get_model_classes"].default(config)
    keep: dict[str, Any] = {"sanitize": lambda self, weights: weights}
    return type(model_class.__name__, (model_class,), keep), args_class


def loader_of(model: nn.Module) -> Loader:
    """Return the package that a model is from, which the classes of its MRO tell."""
    return Loader()


def loader_named(name: str) -> Loader:
    """Return a package by its name."""
    if name != Loader.name:
        raise ValueError(f"loader must be {Loader.name!r}, not {name!r}")
    return Loader()
