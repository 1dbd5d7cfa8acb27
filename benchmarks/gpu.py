"""Adapters on a llama of mlx-lm with a billion parameters: the library's share of training them."""

from __future__ import annotations

from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_modswap import partial_modules, replace_layers, select

from .conversion import llama_config
from .tables import Row, duration
from .timing import timed

ADAPTED = "model.layers.*.self_attn.{q,v}_proj"


def lora(blocks: int, width: int, hidden: int, heads: int, words: int) -> list[Row]:
    """Attach adapters, train a step, detach them: the median of seven rounds."""
    from mlx_lm.models import llama

    config = llama_config(blocks, width, hidden, heads, words)
    model: Any = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model.freeze()
    for block in [*model.layers, model]:  # one by one: in float32 the model is twice as large
        mx.eval(block.parameters())
    arrays: Any = tree_flatten(model.parameters())
    tokens = mx.random.randint(0, words, (4, 512))
    rounds = [_round(model, tokens) for _ in range(7)]
    attach, factory, step, detach = map(median, zip(*rounds))
    own = attach - factory + detach
    return [
        {
            "model": f"{sum(array.size for _, array in arrays) / 1e9:.2f} billion parameters",
            "layers": str(2 * blocks),
            "attach": duration(attach),
            "the factory's share": duration(factory),
            "training step, 4 x 512 tokens": duration(step),
            "detach": duration(detach),
            "the library's share": f"{duration(own)}, **{own / (attach + step + detach):.1%}**",
        }
    ]


def _round(model: Any, tokens: mx.array) -> tuple[float, float, float, float]:
    """The seconds to attach, in the factory alone, for a training step, and to detach."""
    from mlx_lm.tuner.lora import LoRALinear

    making: list[float] = []

    def factory(path: str, layer: Any) -> nn.Module:
        start = perf_counter()
        new = LoRALinear.from_base(layer)  # its arrays are lazy, and are computed later
        making.append(perf_counter() - start)
        return new

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    def step() -> None:
        value, gradients = nn.value_and_grad(model, loss)(tokens)
        optimizer.update(model, gradients)
        mx.eval(value, model.trainable_parameters(), optimizer.state)

    clocked = partial(timed, clock=perf_counter)
    originals = select(model, ADAPTED)
    attach = clocked(lambda: replace_layers(model, ADAPTED, factory))
    optimizer = optim.Adam(1e-4)
    step()  # compiles the kernels
    train = median(clocked(step) for _ in range(3))
    detach = clocked(lambda: model.update_modules(partial_modules(model, originals)))
    return attach, sum(making), train, detach


TABLES = {"GPU, LoRA": {"LoRA": partial(lora, 16, 2048, 8192, 32, 32_000)}}
