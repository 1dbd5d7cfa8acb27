"""What the sweep over the zoo of mlx-vlm does with each model."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import vision_zoo
from mlx_vlm import quant_utils, utils

from mlx_modswap import select


def mixed_rules(model: nn.Module) -> dict[str, Any]:
    """Eight bits for one layer, six for another, four for the rest; or four for all."""
    found: dict[str, Any] = select(model, "**", where=is_quantizable)
    layers = [path for path, layer in found.items() if layer.weight.shape[-1] % 32 == 0]
    first, middle = layers[0], layers[len(layers) // 2]
    own = {first: {"bits": 8, "group_size": 32}, middle: {"bits": 6, "group_size": 32}}
    return {**own, "**": 4}


def is_quantizable(path: str, layer: Any) -> bool:
    return hasattr(layer, "to_quantized")


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the paths and layers that can be quantized."""
    return list(select(model, "**", where=is_quantizable).items())


def quantize_as_mlx_vlm(model: Any, group_size: int | None = None) -> dict[str, tuple[int, int]]:
    """Quantize a model as ``mlx_vlm.convert`` does; return the settings of its layers."""
    own = getattr(model, "quant_predicate", None)

    def predicate(path: str, layer: nn.Module) -> Any:
        if utils.skip_multimodal_module(path):
            return False
        return own(path, layer) if own is not None else True

    with contextlib.redirect_stdout(io.StringIO()):
        quant_utils.quantize_model(model, {}, group_size, 4, quant_predicate=predicate)
    return settings_of(model)


def settings_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        path: (layer.bits, layer.group_size)
        for path, layer in model.named_modules()
        if "scales" in layer
    }


def adaptable(model: nn.Module) -> list[str]:
    """Return the paths of a few linear layers outside the towers."""
    layers = select(model, "**", where=nn.Linear)
    paths = [path for path, layer in layers.items() if type(layer) is nn.Linear]
    outside = [path for path in paths if not utils.skip_multimodal_module(path)]
    return outside[:: max(len(outside) // 8, 1)]


def output(model: Any, record: vision_zoo.Record) -> mx.array:
    mx.random.seed(0)  # diffusion begins with noise
    return vision_zoo.outputs(model, record)
