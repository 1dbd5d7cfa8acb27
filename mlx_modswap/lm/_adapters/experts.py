"""Turn PEFT's adapters of experts into those of mlx-lm, which has one for all experts of a layer.

PEFT writes them in two layouts. Where the experts are modules, each has a pair of arrays of its
own (``experts.3.down_proj``). Where all experts are one parameter with three axes, as in
transformers 5, there is one pair for all. Then ``gate_up_proj`` is two layers of mlx-lm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .files import MERGE
from .kinds import EXPERTS, Adapter, Fit
from .uniform import unify

# The parameters, in the order in which transformers defines them, and the layers that they are.
PARAMETERS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_MODULES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # of Mixtral, and named after it
_ONE_EXPERT = re.compile(r"(?P<block>.+\.)?experts\.(?P<index>0|[1-9]\d*)\.(?P<name>\w+)")


# ---------------------------------------------------------------- experts that are modules


def join_modules(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Join the adapters of the experts of each layer; adapters of other layers stay as they are.

    Ranks and scales that differ between the experts of a layer become one, as in :func:`unify`.
    """
    joined: dict[str, Adapter] = {}
    layers: dict[str, dict[int, tuple[str, Adapter]]] = {}
    for path, adapter in adapters.items():
        if found := _ONE_EXPERT.fullmatch(path):
            name = _MODULES.get(found["name"], found["name"])
            layer = layers.setdefault(f"{found['block'] or ''}switch_mlp.{name}", {})
            layer[int(found["index"])] = path, _with_an_axis_of_experts(adapter)
        else:
            joined[path] = adapter
    for path, layer in layers.items():
        indices = sorted(layer)
        uniform, _ = unify(dict(layer[index] for index in indices))
        one, *_ = uniform.values()
        arrays = {
            name: mx.concatenate([adapter.arrays[name] for adapter in uniform.values()])
            for name in one.arrays
        }
        joined[path] = one._replace(arrays=arrays, fits=(_fill(indices),))
    return joined


def _with_an_axis_of_experts(adapter: Adapter) -> Adapter:
    return adapter._replace(arrays={name: array.T[None] for name, array in adapter.arrays.items()})


def _fill(indices: list[int]) -> Fit:
    """Return a function that gives the experts without an adapter one that adds zero."""

    def fit(path: str, layer: Any, adapter: Adapter) -> Adapter:
        if not isinstance(layer, EXPERTS) or indices == list(range(layer.num_experts)):
            return adapter
        if indices[-1] >= layer.num_experts:
            raise ValueError(
                f"there is an adapter for expert {indices[-1]} of {path!r}, which has "
                f"{layer.num_experts} experts"
            )
        arrays = {}
        for name, array in adapter.arrays.items():
            arrays[name] = mx.zeros((layer.num_experts, *array.shape[1:]), array.dtype)
            arrays[name][mx.array(indices)] = array
        return adapter._replace(arrays=arrays)

    return fit


# ---------------------------------------------------------------- experts that are one parameter


def split_parameters(
    path: str, parameters: Mapping[str, Adapter], *, is_old: bool
) -> dict[str, Adapter]:
    """Return the adapters, by path in mlx-lm, for parameters of a module that holds all experts.

    Args:
        path (str): The path of the module.
        parameters (Mapping): By name, which is one of ``PARAMETERS``, the adapter with ``lora_A``
            and ``lora_B`` transposed, as for a linear layer. PEFT gives an expert consecutive
            rows of ``lora_A``, but every n-th column of ``lora_B`` if there are n experts.
        is_old (bool): Whether the version of PEFT is older than 0.19.
    """
    block, dot, last = path.rpartition(".")
    block = block + dot if last == "experts" else f"{path}."
    is_swapped = _is_swapped(parameters)
    layers: dict[str, Adapter] = {}
    for name, adapter in parameters.items():
        a, b = adapter.arrays["lora_a"].T, adapter.arrays["lora_b"].T
        experts = a.shape[0] // adapter.rank
        arrays = {
            "lora_a": a.reshape(experts, adapter.rank, -1),
            "lora_b": b.reshape(-1, adapter.rank, experts).transpose(2, 0, 1),
        }
        parts = PARAMETERS[name]
        for number, part in enumerate(parts):
            fit = _take_part(number, len(parts), is_swapped, is_old)
            layers[f"{block}switch_mlp.{part}"] = adapter._replace(arrays=arrays, fits=(fit,))
    return layers


def _is_swapped(parameters: Mapping[str, Adapter]) -> bool | None:
    """Return whether ``lora_A`` is on the side of the outputs; ``None`` if the shapes do not tell.

    PEFT takes the second axis of a parameter for the inputs or for the outputs, depending on its
    version and on that of transformers, and writes neither down. But what goes into
    ``down_proj`` is half of what comes out of ``gate_up_proj``, and the reverse.
    """
    if not {"gate_up_proj", "down_proj"} <= parameters.keys():
        return None
    (up_a, up_b), (down_a, down_b) = (
        (parameters[name].arrays["lora_a"].shape[0], parameters[name].arrays["lora_b"].shape[1])
        for name in ("gate_up_proj", "down_proj")
    )
    return (up_a, up_b) == (2 * down_b, down_a)


def _take_part(number: int, parts: int, is_swapped: bool | None, is_old: bool) -> Fit:
    """Return a function that takes the rows of one layer from the arrays of a parameter."""

    def fit(path: str, layer: Any, adapter: Adapter) -> Adapter:
        if not isinstance(layer, EXPERTS):
            return adapter
        a, b = adapter.arrays["lora_a"], adapter.arrays["lora_b"]
        inputs, outputs = layer.input_dims, layer.output_dims * parts
        # With PEFT 0.19 and transformers 5, lora_A is always on the side of the inputs. Of the two
        # only PEFT's version is known, and transformers 4 differed for gpt-oss.
        if is_swapped is None and inputs == outputs and (is_old or "bias" in layer):
            raise ValueError(
                f"PEFT adapted only one parameter of the experts at {path!r}, which is square, and "
                f"does not write which side is that of the inputs; {MERGE}"
            )
        if is_swapped or (is_swapped is None and a.shape[2] == outputs != inputs):
            a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
        # Gate and up alternate in the models whose experts have biases (gpt-oss); in all others,
        # one comes after the other.
        rows = b.shape[1] // parts
        half = slice(number * rows, (number + 1) * rows)
        b = b[:, slice(number, None, parts) if "bias" in layer else half]
        return adapter._replace(arrays={"lora_a": a, "lora_b": b})

    return fit
