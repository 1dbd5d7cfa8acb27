"""The cost of hooks and wrappers: for each call, and to enter and leave a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_modswap import Wrapper, capture, observe, patch, replace_layers, swapped

from .models import Llama, LoRALinear
from .tables import Row, ms, verdict
from .turns import ratio, take_turns, timed

Call = Callable[[mx.array], object]
NUMBER = 500  # calls in a loop: few enough that a busy machine does not interrupt most loops

# ---------------------------------------------------------------- a call


class Layer(nn.Module):
    """Does nothing, so that only the cost of the code around it is measured."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer: Any = Layer()


def see(path: str, output: mx.array, *args: Any) -> mx.array:
    """A hook for `observe`, and a change for `patch`, that does nothing."""
    return output


def wrapper_call() -> list[Row]:
    return [_overhead("a call through a `Wrapper` / without", Wrapper(Layer()), Layer(), 0.5)]


def captured_call() -> list[Row]:
    net = Net()
    with capture(net, "layer"):
        return [_overhead("a call inside `capture` / without", net.layer, Layer(), 2)]


def observed_call() -> list[Row]:
    layer = Layer()

    def by_hand(x: mx.array) -> None:
        see("layer", layer(x), x)

    net = Net()
    with observe(net, "layer", see):
        what = "a call inside `observe` / of the layer and the function"
        return [_overhead(what, net.layer, by_hand, 1.5)]


def patched_call() -> list[Row]:
    layer = Layer()

    def by_hand(x: mx.array) -> None:
        see("layer", layer(x))

    net = Net()
    with patch(net, "layer", see):
        what = "a call inside `patch` / of the layer and the function"
        return [_overhead(what, net.layer, by_hand, None)]


def _overhead(what: str, layer: Call, bare: Call, most: float | None) -> Row:
    """By how many microseconds a call of ``layer`` takes longer than one of ``bare``."""
    x = mx.zeros((1,))

    def loop(call: Call) -> float:
        def repeat() -> None:
            for _ in range(NUMBER):
                call(x)

        return timed(repeat) / NUMBER

    runs = {"bare": partial(loop, bare), "layer": partial(loop, layer)}
    taken = take_turns(runs, seconds=3)
    more = median(b - a for a, b in zip(taken["bare"], taken["layer"])) * 1e6
    row = {
        "what": what,
        "ratio": f"**{ratio(taken['layer'], taken['bare']):.2f}**",
        "time": f"{more:+.2f} us",
    }
    if most is not None:
        row |= {"goal": f"{most} us at most", "verdict": verdict(more <= most)}
    return row


# ---------------------------------------------------------------- a block


class Caller(nn.Module):
    """What people write if they have no hooks, such as mlx-lm's GPTQ: a module around a layer."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        return see("layer", self.layer(x))


BLOCKS: dict[str, Callable[[nn.Module, str], AbstractContextManager[Any]]] = {
    "observe": lambda model, pattern: observe(model, pattern, see, where=nn.Linear),
    "capture": lambda model, pattern: capture(model, pattern, where=nn.Linear),
    "patch": lambda model, pattern: patch(model, pattern, see, where=nn.Linear),
}
LAYERS = {"**": 225, "lm_head": 1}  # pattern -> how many layers of a llama it matches


def block(name: str, pattern: str) -> list[Row]:
    """Time a block with one call of one layer inside."""
    model, x = Llama(), mx.zeros((1, 8))

    def ours() -> None:
        with BLOCKS[name](model, pattern):
            model.lm_head(x)

    def by_hand() -> None:
        named: Any = model.named_modules()
        olds = [(path, layer) for path, layer in named if _is_chosen(pattern, path, layer)]
        model.update_modules(tree_unflatten([(path, Caller(layer)) for path, layer in olds]))
        model.lm_head(x)
        model.update_modules(tree_unflatten(olds))

    taken = take_turns({"ours": lambda: timed(ours), "by hand": lambda: timed(by_hand)})
    return [
        {
            "what": f"enter and leave `{name}`, `{pattern}`, a llama of 453 modules",
            "layers": str(LAYERS[pattern]),
            "by hand / ours": f"**{ratio(taken['by hand'], taken['ours']):.2f}**",
            "ours, ms": ms(median(taken["ours"])),
            "by hand, ms": ms(median(taken["by hand"])),
        }
    ]


def _is_chosen(pattern: str, path: str, layer: Any) -> bool:
    return isinstance(layer, nn.Linear) and pattern in ("**", path)


# ---------------------------------------------------------------- adapters by request

CURRENT: ContextVar[str | None] = ContextVar("CURRENT", default=None)
ADAPTED = "**.{q,v}_proj"


class Switch(Wrapper):
    """Calls the adapter that the current context names, or the layer if it names none."""

    def __init__(self, layer: nn.Module, adapters: Mapping[str | None, nn.Module]):
        super().__init__(layer)
        self._adapters = adapters

    def __call__(self, x: mx.array) -> mx.array:
        layer: Any = self._adapters.get(CURRENT.get(), self.__wrapped__)
        return layer(x)


def switched_call() -> list[Row]:
    switch = Switch(Layer(), {"math": Layer()})
    return [_overhead("a call through a switch of adapters / without", switch, Layer(), None)]


def switch() -> list[Row]:
    """Choose an adapter for a request: set a variable, or swap the layers."""
    model, other = Llama(), Llama()
    ready = {path: LoRALinear(layer) for path, layer in _linear(model).items()}
    found = replace_layers(
        other, ADAPTED, lambda path, layer: Switch(layer, {"math": LoRALinear(layer)})
    )

    def by_variable() -> None:
        for _ in range(NUMBER):
            token = CURRENT.set("math")
            CURRENT.reset(token)

    def by_swap() -> None:
        with swapped(model, ADAPTED, lambda path, layer: ready[path]):
            pass

    runs = {"variable": lambda: timed(by_variable) / NUMBER, "swap": lambda: timed(by_swap)}
    taken = take_turns(runs)
    return [
        {
            "what": "choose an adapter for a request: `swapped` / a switch and a `ContextVar`",
            "layers": str(len(found)),
            "ratio": f"**{ratio(taken['swap'], taken['variable']):,.0f}**",
            "switch, us": f"{median(taken['variable']) * 1e6:.2f}",
            "swapped, us": f"{median(taken['swap']) * 1e6:.0f}",
        }
    ]


def _linear(model: nn.Module) -> dict[str, Any]:
    named: Any = model.named_modules()
    return {path: layer for path, layer in named if isinstance(layer, nn.Linear)}


CALL_CASES = {
    name: ("hooks", name)
    for name in ("wrapper_call", "captured_call", "observed_call", "patched_call", "switched_call")
}
BLOCK_CASES = {
    f"{name}, {pattern}": ("hooks", "block", name, pattern) for name in BLOCKS for pattern in LAYERS
}
SWITCH_CASES = {"switch": ("hooks", "switch")}
