"""Layers to wrap, wrappers as a user writes them, and what a layer holds."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_modswap import (
    Wrapper,
)


class Block(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.scale = 0.5
        self.attn = nn.Linear(width, width)
        self.mlp = [nn.Linear(width, width), nn.ReLU()]
        self.by_name = {"norm": nn.LayerNorm(width), "0": nn.Identity()}
        self._hidden = nn.Linear(1, 1)

    def __call__(self, x: mx.array, *, twice: bool = False) -> mx.array:
        x = x + self.scale * self.attn(x)
        for layer in self.mlp:
            x = layer(x)
        x = self.by_name["norm"](x)
        return 2 * x if twice else x

    @property
    def width(self) -> int:
        return self.attn.weight.shape[0]


class Peculiar(nn.Module):
    """Overrides what MLX itself calls."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
        vars(self)["values"] = 3

    def __call__(self, x: mx.array) -> mx.array:
        return self[1](self[0](x))

    def __getitem__(self, key: Any) -> Any:
        return self.layers[key] if isinstance(key, int) else super().__getitem__(key)

    def __len__(self) -> int:
        return 7

    def parameters(self):
        return {"all": [layer.weight for layer in self.layers]}

    def train(self, mode: bool = True):
        super().train(mode)
        self._training = False
        return self


class Recorder(Wrapper):
    """A wrapper as a user writes one."""

    names: tuple[str, ...] = ("a", "b")

    def __init__(self, layer: nn.Module, scale: Any = None):
        super().__init__(layer)
        self.scale = scale
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(super().__call__(*args, **kwargs))
        return self.outputs[-1]

    def last(self) -> Any:
        return self.outputs[-1]


class Noting(Wrapper):
    """A wrapper with a constant, that notes what it was called with."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._one = mx.ones(1)

    def __call__(self, x: mx.array) -> mx.array:
        self.last = x
        return super().__call__(x) * self._one


def quantized() -> nn.Module:
    return nn.Linear(64, 64).to_quantized(32, 4)


LAYERS = {
    "Linear": lambda: nn.Linear(4, 4),
    "Embedding": lambda: nn.Embedding(8, 4),
    "QuantizedLinear": quantized,
    "BatchNorm": lambda: nn.BatchNorm(4),
    "ReLU": nn.ReLU,
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "Block": Block,
    "Peculiar": Peculiar,
    "a wrapper": lambda: Wrapper(Block()),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def wrap(path: str, layer: nn.Module) -> nn.Module:
    return Wrapper(layer)


def unwrap(path: str, wrapper: Any) -> nn.Module:
    return wrapper.__wrapped__


def arrays(parameters: Any) -> Any:
    return tree_flatten(parameters)


def names(parameters: Any) -> list[str]:
    return [name for name, _ in arrays(parameters)]


def flat(parameters: Any) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in arrays(parameters)]


def state(container: Any) -> Any:
    """All that a container holds, to compare."""
    if isinstance(container, nn.Module):
        attributes = vars(container).items()
        plain = {key: value for key, value in attributes if not isinstance(value, mx.Dtype)}
        return type(container), str(plain), state(dict(dict.items(container)))
    if isinstance(container, dict):
        return {key: state(value) for key, value in container.items()}
    if isinstance(container, list):
        return [state(value) for value in container]
    if isinstance(container, mx.array):
        return container.dtype, container.tolist()
    return container
