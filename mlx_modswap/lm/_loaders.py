"""The packages that load a folder. Each says what it does with a folder and with a model."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from ._shards import named_shards, stale_shards, weight_files, without

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

    def files(self, folder: Path) -> list[Path]:
        """Return the files from which it reads the weights of a folder."""
        stale = stale_shards(folder)
        return [file for file in weight_files(folder) if file.name not in stale]

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

    def predicate(self, model: nn.Module, settings: Mapping[str, Any]) -> Predicate:
        """Return what its own conversion asks about each layer that can be quantized."""
        own = getattr(model, "quant_predicate", None) or (lambda path, layer: True)
        group_size = settings["group_size"]

        def predicate(path: str, layer: Any) -> Any:
            return layer.weight.shape[-1] % group_size == 0 and own(path, layer)

        return predicate

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


class VisionLoader(Loader):
    """mlx-vlm, for vision-language models."""

    name = "mlx-vlm"

    def __init__(self) -> None:
        try:
            self._utils: Any = importlib.import_module("mlx_vlm.utils")
            self._quantization: Any = importlib.import_module("mlx_vlm.quant_utils")
        except ImportError as error:
            raise ImportError(
                "vision-language models need mlx-vlm 0.7.10 or newer: "
                f"pip install 'mlx-modswap[vlm]' ({error})",
                name=error.name,
            ) from error

    def download(self, source: str, files: Any = None) -> Path:
        return Path(self._utils.get_model_path(source, allow_patterns=files))

    def load(
        self, folder: Path, config: Config, *, strict: bool, trust_remote_code: bool
    ) -> Loaded:
        # `load_model` runs a `model_file` without asking, so its caller has asked already.
        read: Arrays = {}

        def keep(file: str) -> Arrays:
            arrays = self._utils._load_safetensors(file)
            read.update(arrays)
            return arrays

        names = {"load_config": self._reads(folder, config), "_load_safetensors": keep}
        load_model = _with(self._utils.load_model, names)
        return Loaded(load_model(folder, lazy=True, strict=strict), config, read)

    def files(self, folder: Path) -> list[Path]:
        found = [file for file in folder.glob("*.safetensors") if file.stem != "consolidated"]
        return super().files(folder) if named_shards(folder) else found

    def build(self, folder: Path, config: Config, *, trust_remote_code: bool) -> nn.Module:
        # The model is complete before mlx-vlm changes and loads the weights, of which it has none.
        names = {
            "load_config": self._reads(folder, config),
            "glob": SimpleNamespace(glob=lambda pattern: [pattern]),
            "_load_safetensors": lambda file: {},
            "sanitize_weights": lambda model, weights, config=None: weights,
            "load_model_weights": lambda model, *others, **keywords: model,
        }
        return _with(self._utils.load_model, names)(folder, lazy=True)

    def arguments(self, folder: Path, config: Config) -> Any:
        return self.build(folder, config, trust_remote_code=False).config

    def keeps_vision(self, model: nn.Module) -> bool:
        return True

    def predicate(self, model: nn.Module, settings: Mapping[str, Any]) -> Predicate:
        # `quantize_model` calls `nn.quantize` with its predicate.
        asked: list[Predicate] = []
        names = {
            "nn": SimpleNamespace(
                quantize=lambda *others, class_predicate, **keywords: asked.append(class_predicate)
            ),
            "compute_bits_per_weight": lambda model: 0.0,
            "print": lambda *texts: None,
        }
        quantize_model = _with(self._quantization.quantize_model, names)
        quantize_model(model, {}, settings["group_size"], settings["bits"], settings["mode"])
        return asked[0]

    def skips(self, path: str) -> bool:
        return self._utils.skip_multimodal_module(path)

    def _reads(self, folder: Path, config: Config) -> Callable[..., Config]:
        """Return mlx-vlm's ``load_config``, but with the entries that differ from the folder's."""
        old = utils.load_config(folder)
        changes = {key: one for key, one in config.items() if key not in old or old[key] != one}

        def load_config(folder: Path, **keywords: Any) -> Config:
            return {**self._utils.load_config(folder, **keywords), **deepcopy(changes)}

        return load_config


def _with(function: Any, names: Mapping[str, Any]) -> Any:
    """Return a function with the same code, which finds other objects under some global names."""
    own = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def loader_of(model: nn.Module) -> Loader:
    """Return the package that a model is from, which the classes of its MRO tell."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    return VisionLoader() if "mlx_vlm" in packages else Loader()


def loader_named(name: str) -> Loader:
    """Return a package by its name."""
    for loader in LOADERS:
        if loader.name == name:
            return loader()
    known = " or ".join(repr(loader.name) for loader in LOADERS)
    raise ValueError(f"loader must be {known}, not {name!r}")


LOADERS = (Loader, VisionLoader)
