"""The memory that a swap needs, and the old layers that it releases."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_modswap import replace_layers

from . import models
from .alone import alone
from .swaps import SUBJECTS
from .tables import Row, mb, verdict
from .ways import Bench, idiom, ours

# ---------------------------------------------------------------- arrays


class Stack(nn.Module):
    def __init__(self, layers: int, dims: int):
        super().__init__()
        self.layers = [nn.Linear(dims, dims, bias=False) for _ in range(layers)]


LAZY = {
    "ours, then a layer at a time": (True, True),
    "ours, then one `mx.eval`": (True, False),
    "`nn.quantize`, then a layer at a time": (False, True),
    "`nn.quantize`, then one `mx.eval`": (False, False),
}


def lazy(layers: int = 16, dims: int = 2048, dtype: str = "float32", goal: float = 4) -> list[Row]:
    """Load weights lazily, quantize to 4 bits, evaluate: the peak of each way, in a new process."""
    weight = mx.random.normal((dims, dims)).astype(getattr(mx, dtype))
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "weights.safetensors"))
        mx.save_safetensors(path, {f"layers.{i}.weight": weight for i in range(layers)})
        found = {way: alone("memory", "peak", path, layers, dims, way) for way in LAZY}
    first, *_, last = LAZY
    peak, result = found[first]
    most = result + 1.5 * weight.nbytes
    better = found[last][0] / peak
    rows = [
        {
            "way": way,
            "peak": mb(found[way][0]),
            "result": mb(found[way][1]),
            "peak / ours": f"**{found[way][0] / peak:.1f}**",
        }
        for way in LAZY
    ]
    of = f"{layers} layers of {dims} x {dims} {dtype}, {mb(weight.nbytes)} each"
    rows[0] |= {"goal": f"{mb(most)}: the result and 1.5 layers", "verdict": verdict(peak <= most)}
    if goal:
        rows[-1] |= {"goal": f"{goal:g} x ours", "verdict": verdict(better >= goal)}
    return [{"model": of, **row} for row in rows]


def peak(path: str, layers: int, dims: int, way: str) -> tuple[int, int]:
    """The peak in bytes, and the bytes of the model at the end."""
    by_ours, one_by_one = LAZY[way]
    mx.reset_peak_memory()
    model = Stack(layers, dims)
    model.load_weights(path)
    if by_ours:
        report = replace_layers(model, "layers.*", _to_4_bits)
        assert len(report) == layers  # the report is kept until the end, as a caller might do
    else:
        nn.quantize(model, bits=4)
    if one_by_one:
        for layer in model.layers:
            mx.eval(layer.parameters())
    else:
        mx.eval(model.parameters())
    mx.synchronize()
    arrays: Any = tree_flatten(model.parameters())
    return mx.get_peak_memory(), sum(array.nbytes for _, array in arrays)


def _to_4_bits(path: str, layer: Any) -> nn.Module:
    return layer.to_quantized(bits=4)


# ---------------------------------------------------------------- Python objects


def python(name: str) -> list[Row]:
    """The Python memory that a swap of a large model needs while it runs."""
    ours_peak, idiom_peak = (alone("memory", "traced_peak", way, name) for way in ("ours", "idiom"))
    much = ours_peak / idiom_peak
    return [
        {
            "what": f"Python memory while it runs, 61,561 modules, {name}: ours / idiom",
            "ratio": f"**{much:.2f}**",
            "MB": f"{mb(ours_peak)} / {mb(idiom_peak)}",
            "goal": "1 at most",
            "verdict": verdict(much <= 1),
        }
    ]


def traced_peak(way: str, name: str) -> float:
    asked = SUBJECTS["mixture"].swaps[name]
    bench = Bench(SUBJECTS["mixture"].build(), asked)
    work = {"ours": ours, "idiom": idiom}[way]
    bench.run(work, asked)  # fill the caches
    return bench.run(work, asked, measure=traced)


def traced(work: Callable[[], object]) -> float:
    gc.collect()
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


# ---------------------------------------------------------------- old layers


def survivors() -> list[Row]:
    """Old layers that are alive after a swap, without a garbage collection."""
    return [_survivors("a llama", tie=False), _survivors("a llama with a tied layer", tie=True)]


def _survivors(what: str, tie: bool) -> Row:
    model = models.Llama()
    layers = model.model.layers
    if tie:
        layers[0].mlp.up_proj = layers[1].mlp.up_proj
    olds = [weakref.ref(m) for _, m in model.named_modules() if isinstance(m, nn.Linear)]
    gc.collect()
    gc.disable()
    report = replace_layers(model, "**", lambda path, layer: nn.Identity(), where=nn.Linear)
    alive = sum(old() is not None for old in olds)
    gc.enable()
    return {
        "what": f"old layers alive of {len(report)}, {what}; report kept, no garbage collection",
        "ratio": f"**{alive}**",
        "goal": "0",
        "verdict": verdict(alive == 0),
    }


LAZY_CASES = {"lazy": ("memory", "lazy")}
PYTHON_CASES = {
    f"python, {name}": ("memory", "python", name)
    for name in ("one path", "`**.down_proj`", "`**`, where", "ten rules")
} | {"survivors": ("memory", "survivors")}
