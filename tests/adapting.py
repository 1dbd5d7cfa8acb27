"""Adapters for tests, made by mlx-lm's own classes, and the text of a folder of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


def adapted(layer: Any, method: str = "lora", **options: Any) -> Any:
    """An adapter of mlx-lm around a layer, that changes what the layer computes."""
    if method == "dora":
        cls: Any = DoRAEmbedding if isinstance(layer, EMBEDDING) else DoRALinear
    elif isinstance(layer, EXPERTS):
        cls = LoRASwitchLinear
    else:
        cls = LoRAEmbedding if isinstance(layer, EMBEDDING) else LoRALinear
    adapter = cls.from_base(layer, **options)
    adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.02
    if method == "dora":
        adapter.m = adapter.m * mx.random.uniform(0.9, 1.1, adapter.m.shape)
    return adapter


def frozen(name: str, **config: Any) -> Any:
    """A model of the zoo that is frozen, as a model should be before it gets adapters."""
    return freeze(zoo.build(name, **config))


def freeze(model: Any) -> Any:
    """Freeze a model; that of recurrent_gemma never calls ``super().__init__()``, and cannot be."""
    for module in [model] if hasattr(model, "_no_grad") else model.children().values():
        module.freeze()
    return model


def adaptable(layer: Any, method: str = "lora") -> bool:
    """Whether mlx-lm has such an adapter for a layer, and reads it back."""
    if hasattr(layer, "to_lora"):  # afm7: its adapters have lists of arrays, which nothing reads
        return False
    if method == "dora":
        return isinstance(layer, (*LINEAR, nn.Embedding))
    return isinstance(layer, LINEAR + EXPERTS + EMBEDDING)


def lora(r: int, scale: float = 10.0, **options: Any) -> Callable[[str, Any], nn.Module]:
    """A factory."""
    return lambda path, layer: adapted(layer, r=r, scale=scale, **options)


def adapters_in(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if "lora_a" in module}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def arrays_of(folder: Path) -> dict[str, mx.array]:
    arrays: Any = mx.load(str(folder / "adapters.safetensors"))
    return arrays


def identical(one: mx.array, other: mx.array) -> bool:
    """Whether two arrays are the same, bit by bit."""
    return one.dtype == other.dtype and mx.array_equal(one, other).item() is True


def identical_adapters(one: Any, other: Any) -> bool:
    """Whether two adapters are of one class, and have the same arrays, scale and dropout."""
    names = [name for name in ("lora_a", "lora_b", "m") if name in one]
    return (
        type(one) is type(other)
        and one.scale == other.scale
        and one.dropout._p_1 == other.dropout._p_1
        and all(identical(one[name], other[name]) for name in names)
    )


def message(action: Callable[[], Any], folder: Path) -> str:
    """The class and the text of an error, in which the folder is called ``math``."""
    with pytest.raises((OSError, ValueError, TypeError, LookupError)) as caught:
        action()
    return f"{caught.type.__name__}: {caught.value}".replace(str(folder), "math")


def is_expected(text: str, expected: str) -> bool:
    """Whether it is this text; ``...`` at its end is what MLX or the hub has to say."""
    if expected.endswith("..."):
        return text.startswith(expected[:-3])
    return text == expected


def contents(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What there is in a model, and all objects in it, so that no other one gets the id of one."""
    modules = model.named_modules()
    objects = [value for _, module in modules for value in module.values()]
    state = [
        (path, id(module), module.training, set(module._no_grad), list(map(id, module.values())))
        for path, module in modules
    ]
    return state, objects
