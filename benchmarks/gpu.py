"""Memory and time on a GPU, with layers and a model of realistic size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_modswap import partial_modules, replace_layers, select

from .models import Llama, LoRALinear
from .tables import Row, ms
from .turns import timed

ADAPTED = "model.layers.*.self_attn.{q,v}_proj"


def lora(
    layers: int = 16, dims: int = 2048, hidden: int = 8192, words: int = 32_000, length: int = 512
) -> list[Row]:
    """Attach adapters to a llama of about a billion parameters, train a step, detach them."""
    model = _llama(layers, dims, hidden, words)
    tokens = mx.random.randint(0, words, (4, length))
    rounds = [_round(model, tokens) for _ in range(7)]
    attach, factory, step, detach = map(median, zip(*rounds))
    own = attach - factory + detach
    return [
        {
            "what": "model",
            "value": f"{_size(model)}, bfloat16, {len(select(model, ADAPTED))} layers adapted",
        },
        {"what": "attach", "value": f"{ms(attach)} ms, the factory's share {ms(factory)} ms"},
        {"what": f"training step, 4 x {length} tokens", "value": f"{ms(step)} ms"},
        {"what": "detach", "value": f"{ms(detach)} ms"},
        {
            "what": "the library's share of attach, step and detach",
            "value": f"{ms(own)} ms, **{own / (attach + step + detach):.1%}**",
        },
    ]


def _llama(layers: int, dims: int, hidden: int, words: int) -> Llama:
    model = Llama(layers, dims, hidden, dims // 64, words, partial(nn.Linear, bias=False))
    model.set_dtype(mx.bfloat16)
    model.freeze()
    for _, module in model.named_modules():  # one by one: in float32 the model is twice as large
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    return model


def _round(model: nn.Module, tokens: mx.array) -> tuple[float, float, float, float]:
    """The seconds to attach, in the factory alone, for a training step, and to detach."""
    originals = select(model, ADAPTED)
    making: list[float] = []
    attach = timed(lambda: _attach(model, making))
    step = _training_step(model, tokens)
    step()  # compiles the kernels
    train = median(timed(step) for _ in range(3))
    detach = timed(lambda: model.update_modules(partial_modules(model, originals)))
    assert all(layer is originals[path] for path, layer in select(model, ADAPTED).items())
    return attach, sum(making), train, detach


def _attach(model: nn.Module, making: list[float]) -> None:
    """Attach the adapters. Their arrays are lazy, and are computed later."""

    def factory(path: str, layer: nn.Module) -> nn.Module:
        start = perf_counter()
        new = LoRALinear(layer)
        making.append(perf_counter() - start)
        return new

    replace_layers(model, ADAPTED, factory)


def _training_step(model: nn.Module, tokens: mx.array) -> Callable[[], Any]:
    optimizer = optim.Adam(1e-4)
    optimizer.init(model.trainable_parameters())

    def loss(model: Any, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    def step() -> None:
        value, gradients = nn.value_and_grad(model, loss)(model, tokens)
        optimizer.update(model, gradients)
        mx.eval(value, model.trainable_parameters(), optimizer.state)

    return step


def _size(model: nn.Module) -> str:
    arrays: Any = tree_flatten(model.parameters())
    return f"{sum(array.size for _, array in arrays) / 1e9:.2f} billion parameters"


# No goal for the ratio: 16-bit layers shrink less than 32-bit ones, so there is less to gain.
MEMORY_CASES = {"gpu memory": ("memory", "lazy", 32, 4096, "float16", 0)}
LORA_CASES = {"gpu LoRA": ("gpu", "lora")}
