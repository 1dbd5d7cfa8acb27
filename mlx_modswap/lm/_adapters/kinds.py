"""The adapters of mlx-lm: which class goes around which layer, and the shapes of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from ..._hooks.hooks import unhooked
from ..._words import class_names

METHODS = {"lora": "LoRA", "dora": "DoRA"}  # the names in a config, and in a message
A_RANK = 1  # the axis of the rank in `lora_a`, for every kind of layer


class Kind(NamedTuple):
    """A class of adapters that mlx-lm makes.

    Attributes:
        adapter (type): The class.
        method (str): ``"lora"`` or ``"dora"``.
        layers (tuple[type, ...]): The layers that it goes around.
        holds (str): The attribute in which it holds its layer.
    """

    adapter: Any  # a class; `from_base` is not in `type`
    method: str
    layers: tuple[type, ...]
    holds: str


LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)

# As in mlx-lm's `linear_to_lora_layers`, but without DoRA of a quantized embedding, which fails.
KINDS = (
    Kind(LoRALinear, "lora", LINEAR, "linear"),
    Kind(LoRASwitchLinear, "lora", EXPERTS, "linear"),
    Kind(LoRAEmbedding, "lora", EMBEDDING, "embedding"),
    Kind(DoRALinear, "dora", LINEAR, "linear"),
    Kind(DoRAEmbedding, "dora", (nn.Embedding,), "embedding"),
)


class Adapter(NamedTuple):
    """What an adapter adds to a layer: ``scale * (x @ lora_a) @ lora_b``.

    Attributes:
        arrays (dict[str, mx.array]): ``lora_a``, ``lora_b`` and, for DoRA, ``m``.
        method (str): ``"lora"`` or ``"dora"``.
        rank (int): The length of the axis that ``lora_a`` and ``lora_b`` share.
        scale (float): What the product of the two is multiplied by.
        dropout (float): The probability that an input is set to zero in training.
        fits (tuple[Fit, ...]): What the folder says about the layer.
    """

    arrays: dict[str, mx.array]
    method: str
    rank: int
    scale: float
    dropout: float
    fits: tuple[Fit, ...] = ()


# Called with the path, the layer and the adapter. Returns the adapter for this layer, or raises a
# ValueError if it is not the layer that the adapter was trained on.
Fit = Callable[[str, Any, Adapter], Adapter]


def class_of(module: Any) -> type:
    """Return the class of a module or, inside a block such as ``capture``, of the hooked module."""
    return type(unhooked(module))


def name_of(module: Any) -> str:
    """Return the name of a module's class, in full if mlx-lm has another class of that name."""
    cls = class_of(module)
    known = [known for kind in KINDS for known in (kind.adapter, *kind.layers)]
    return class_names([cls, *known])[cls]


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of an adapter; ``None`` if it is not one of mlx-lm's adapters."""
    # `is`, since a subclass or a Wrapper may compute something else, and mlx-lm would not build it.
    return next((kind for kind in KINDS if class_of(module) is kind.adapter), None)


def kind_for(layer: nn.Module, method: str) -> Kind | None:
    """Return the kind of adapter that goes around a layer; ``None`` if mlx-lm has none."""
    if hasattr(layer, "to_lora"):  # makes an adapter with other arrays, which no file holds
        return None
    fits = (kind for kind in KINDS if kind.method == method and isinstance(layer, kind.layers))
    return next(fits, None)


def shapes(layer: Any, method: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of an adapter around a layer."""
    *experts, outputs, inputs = layer.weight.shape
    if "scales" in layer:
        inputs = inputs * 32 // layer.bits
    if experts:
        return {"lora_a": (*experts, rank, inputs), "lora_b": (*experts, outputs, rank)}
    if isinstance(layer, EMBEDDING):
        pair = {"lora_a": (outputs, rank), "lora_b": (rank, inputs)}
    else:
        pair = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
    return {**pair, "m": (outputs,)} if method == "dora" else pair


def mismatch(layer: Any, arrays: Mapping[str, mx.array], method: str, rank: int) -> str:
    """Write which of the arrays has the wrong shape for a layer; ``""`` if none has."""
    for name, shape in shapes(layer, method, rank).items():
        if arrays[name].shape != shape:
            return (
                f"{name} has the shape {arrays[name].shape}, and the {name_of(layer)} needs {shape}"
            )
    return ""


def b_rank(lora_b: mx.array) -> int:
    """Return the axis of the rank in ``lora_b``: the last for experts, whose arrays have three."""
    return 2 if lora_b.ndim == 3 else 0
