"""The speed of a model after a swap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_modswap import replace_layers

from .models import Llama, LoRALinear
from .tables import Row, ms, verdict
from .turns import ratio, take_turns, timed

# ---------------------------------------------------------------- the swapped model


def same_cost(kind: str, compiled: bool) -> list[Row]:
    """Time a swapped model, and a model that was built by hand with the same layers."""
    call = {"forward": forward, "training step": training_step}[kind]
    calls = {
        "swapped": call(_swapped(), compiled),
        "by hand": call(_by_hand(), compiled),
        "by hand, again": call(_by_hand(), compiled),  # to measure the noise
    }
    taken = take_turns({name: partial(_loop, work) for name, work in calls.items()}, seconds=10)
    much = ratio(taken["swapped"], taken["by hand"])
    return [
        {
            "what": f"{kind}{', `mx.compile`' if compiled else ''}: swapped / built by hand",
            "ratio": f"**{much:.3f}**",
            "noise": f"{ratio(taken['by hand, again'], taken['by hand']):.3f}",
            "time": f"{ms(median(taken['swapped']))} / {ms(median(taken['by hand']))} ms",
            "goal": "1.05 at most",
            "verdict": verdict(much <= 1.05),
        }
    ]


def _loop(work: Callable[[], object], number: int = 20) -> float:
    def repeat() -> None:
        for _ in range(number):
            work()

    return timed(repeat) / number


def _llama(linear: Any) -> Llama:
    return Llama(layers=4, dims=64, hidden=128, heads=4, words=256, linear=linear)


def _plain(input_dims: int, output_dims: int) -> nn.Module:
    return nn.Linear(input_dims, output_dims, bias=False)


def _adapted(input_dims: int, output_dims: int) -> nn.Module:
    return LoRALinear(_plain(input_dims, output_dims))


def _swapped() -> Llama:
    model = _llama(_plain)
    replace_layers(model, "**", lambda path, layer: LoRALinear(layer), where=nn.Linear)
    mx.eval(model.parameters())
    return model


def _by_hand() -> Llama:
    model = _llama(_adapted)
    mx.eval(model.parameters())
    return model


def forward(model: Llama, compiled: bool) -> Callable[[], object]:
    tokens = mx.arange(32).reshape(2, 16)
    function = mx.compile(model.__call__, inputs=model.state) if compiled else model
    return lambda: mx.eval(function(tokens))


def training_step(model: Llama, compiled: bool) -> Callable[[], object]:
    tokens = mx.arange(32).reshape(2, 16)
    optimizer = optim.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def loss(model: Llama, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    def step(tokens: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, tokens)
        optimizer.update(model, gradients)
        return value

    function = mx.compile(step, inputs=state, outputs=state) if compiled else step
    return lambda: mx.eval(function(tokens), state)


CASES = {
    f"{kind}{', compiled' if compiled else ''}": ("after", "same_cost", kind, compiled)
    for kind in ("forward", "training step")
    for compiled in (False, True)
}
