"""Read an adapter folder as rules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..._swap.factories import Factory
from .._loaders import Loader
from .._source import locate
from .attach import attach
from .files import (
    CONFIG,
    ORIGINALS,
    PEFT_WEIGHTS,
    WEIGHTS,
    quoted,
    read_adapter_config,
    read_arrays,
    read_dropout,
    read_number,
    read_object,
    read_rank,
)
from .kinds import A_RANK, METHODS, Adapter, Fit, b_rank
from .peft import read_peft
from .uniform import restore

_NAME = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_NOT_LITERAL = re.compile(r"[*?\[\]{}]")


def adapter_rules(folder: str | Path) -> dict[Any, Factory]:
    """Read an adapter folder as rules for ``replace_layers`` or ``swapped``.

    ``replace_layers(model, lm.adapter_rules(folder))`` puts the adapters into the
    model; ``swapped`` does so inside a ``with`` block. Either all adapters of the
    folder are put in, or nothing changes: a path that the model does not have
    raises a :class:`~mlx_modswap.NoMatchError`, and the factories check the shapes.

    The folder may contain

    * LoRA or DoRA of mlx-lm, or of mlx-vlm in the same format. If :func:`save_adapters`
      wrote the folder, each adapter gets the rank and the scale with which it was saved;
    * LoRA of PEFT, of linear layers, with ``rank_pattern``, ``alpha_pattern`` and
      ``use_rslora``; of a tied embedding, with ``ensure_weight_tying``; and of the
      experts of a mixture, whether these are modules or, as in transformers 5,
      ``target_parameters``.

    The paths of PEFT are those of the model in transformers, but experts are called
    ``switch_mlp``, as in most models of mlx-lm: ``mlp.experts.3.down_proj`` and
    ``mlp.experts.down_proj`` are ``mlp.switch_mlp.down_proj``. If mlx-lm has other
    paths, change the keys:
    ``{f"language_model.{path}": rule for path, rule in rules.items()}``.

    The layers that get an adapter may be quantized. Their frozen state does not
    change, and the adapters are trainable: to continue a training, call
    ``model.freeze()`` first.

    Args:
        folder (str or Path): A folder with ``adapter_config.json`` and
            ``adapters.safetensors`` (mlx-lm) or ``adapter_model.safetensors``
            (PEFT), or the id of such a folder on the Hugging Face Hub, which is
            downloaded unless it is in the cache.

    Returns:
        dict[str, Callable]: A factory for each path. The factories hold the arrays,
        which are read once, and can be used any number of times and in any thread. A
        path with ``*``, ``?``, brackets or braces is given as a compiled regular
        expression.

    Raises:
        FileNotFoundError: If there is no such folder, or one of its files is missing.
        ValueError: If a file is damaged, if the files do not fit each other, or if
            the folder contains something that is not an adapter in MLX: a full
            fine-tune, ``modules_to_save``, biases, or a variant of LoRA such as
            PEFT's DoRA. PEFT's adapters of embeddings without ``ensure_weight_tying``
            are refused as well: they change only the inputs, but mlx-lm's would also
            change the outputs of a tied head. The factories raise a ``ValueError`` if
            an array does not fit the layer, or if the folder says that the layer had
            another weight (PEFT) or was quantized in another way (mlx-vlm).

    Example:
        >>> import tempfile
        >>> import mlx.nn as nn
        >>> from mlx_lm.tuner.lora import LoRALinear
        >>> from mlx_modswap import lm, replace_layers, swapped
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> model = model.freeze()
        >>> lora = {
        ...     "layers[0]": lambda path, layer: LoRALinear.from_base(layer, r=4, scale=10.0),
        ...     "layers[2]": lambda path, layer: LoRALinear.from_base(layer, r=8, scale=20.0),
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with swapped(model, lora):
        ...         lm.save_adapters(model, folder)
        ...     rules = lm.adapter_rules(folder)
        >>> for path, layer in replace_layers(model, rules).items():
        ...     print(path, layer.lora_a.shape, layer.scale)
        layers.0 (64, 4) 10.0
        layers.2 (64, 8) 20.0
    """
    download = partial(Loader().download, files=[CONFIG, WEIGHTS, PEFT_WEIGHTS])
    where = locate(os.path.expanduser(folder), download, "an adapter")
    config = read_adapter_config(where / CONFIG)
    if "peft_type" in config:
        file, adapters = where / PEFT_WEIGHTS, read_peft(where, config)
    else:
        file, adapters = where / WEIGHTS, _read_mlx_lm(where, config)
    for path, adapter in adapters.items():
        _check_complete(path, adapter, file)
    if ORIGINALS in config:
        adapters = restore(
            adapters, config[ORIGINALS], f"{ORIGINALS!r} in {quoted(where / CONFIG)}"
        )
    mx.eval([adapter.arrays for adapter in adapters.values()])  # only this thread can
    return {_literal(path): _factory(adapter, quoted(file)) for path, adapter in adapters.items()}


def _factory(adapter: Adapter, file: str) -> Factory:
    def adapt(path: str, layer: Any) -> nn.Module:
        return attach(path, layer, adapter, file)

    return adapt


def _literal(path: str) -> Any:
    """Return a pattern that matches only this path."""
    return re.compile(re.escape(path)) if _NOT_LITERAL.search(path) else path


def _read_mlx_lm(folder: Path, config: Mapping[str, Any]) -> dict[str, Adapter]:
    """Read the adapters, by path, of a folder that mlx-lm or :func:`save_adapters` wrote."""
    what = f"in {quoted(folder / CONFIG)}"
    if "lora_parameters" not in config and "alpha" in config:
        raise ValueError(
            f"{quoted(folder)} is an adapter of an older mlx-vlm, with arrays 'A' and 'B' for each "
            "layer; mlx_vlm.load(..., adapter_path=...) loads it"
        )
    method = config.get("fine_tune_type", "lora")
    if method == "full":
        raise ValueError(
            f"{quoted(folder)} is a full fine-tune, not an adapter: its arrays take the place of "
            "the model's; mlx_lm.load(..., adapter_path=...) loads it"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"'fine_tune_type' {what} must be 'lora' or 'dora', not {method!r}")
    parameters = read_object(config.get("lora_parameters"), f"'lora_parameters' {what}")
    rank = read_rank(parameters.get("rank"), f"'rank' {what}")
    scale = read_number(parameters.get("scale"), f"'scale' {what}")
    dropout = read_dropout(parameters.get("dropout", 0.0), f"'dropout' {what}")
    quantized = read_object(config.get("base_quantization", {}), f"'base_quantization' {what}")
    by_path: dict[str, dict[str, mx.array]] = {}
    for name, array in read_arrays(folder / WEIGHTS).items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{quoted(folder / WEIGHTS)} has an array {name!r}, which is not one of an adapter "
                "(lora_a, lora_b or m)"
            )
        by_path.setdefault(found[1], {})[found[2]] = array
    adapters = {
        path: Adapter(arrays, method, rank, scale, dropout) for path, arrays in by_path.items()
    }
    for path in adapters.keys() & quantized.keys():
        fit = _check_quantization(quantized[path], what)
        adapters[path] = adapters[path]._replace(fits=(fit,))
    return adapters


def _check_quantization(expected: Any, what: str) -> Fit:
    """Return a function that compares how a layer is quantized with how it was in training."""

    def fit(path: str, layer: Any, adapter: Adapter) -> Adapter:
        names = ("bits", "group_size", "mode")
        found = {name: getattr(layer, name) for name in names} if "scales" in layer else None
        if found != expected:
            raise ValueError(
                f"{path!r} was quantized with {expected} when the adapter was trained "
                f"('base_quantization' {what}), and in this model it is "
                f"{f'quantized with {found}' if found else 'not quantized'}; use the model that "
                "the adapter was trained on, or remove the entry to put the adapter there anyway"
            )
        return adapter

    return fit


def _check_complete(path: str, adapter: Adapter, file: Path) -> None:
    """Check that all arrays that the method needs are there, and have the rank of the config."""
    arrays, rank = adapter.arrays, adapter.rank
    needed = {"lora_a", "lora_b", "m"} if adapter.method == "dora" else {"lora_a", "lora_b"}
    if set(arrays) != needed:
        raise ValueError(
            f"{quoted(file)} has {_listed(arrays)} for {path!r}, and {METHODS[adapter.method]} "
            f"needs {_listed(needed)}"
        )
    a, b = arrays["lora_a"], arrays["lora_b"]
    fit = a.ndim in (2, 3) and a.ndim == b.ndim
    if not (fit and a.shape[A_RANK] == rank and b.shape[b_rank(b)] == rank):
        raise ValueError(
            f"{quoted(file)} has lora_a of shape {a.shape} and lora_b of shape {b.shape} for "
            f"{path!r}, which are not of rank {rank}, as {CONFIG} says"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
