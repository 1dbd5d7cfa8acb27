"""The memory that a swap needs."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_modswap import replace_layers

from .models import Leaf, Parts, mixture
from .swaps import Bench, Swap, by, idiom
from .tables import Row, mb, verdict
from .timing import Case, alone

# ---------------------------------------------------------------- arrays

LAZY = {
    "ours, then a layer at a time": (True, True),
    "ours, then one `mx.eval`": (True, False),
    "`nn.quantize`, then a layer at a time": (False, True),
    "`nn.quantize`, then one `mx.eval`": (False, False),
}


def lazy(layers: int, dims: int, dtype: str, goal: float) -> list[Row]:
    """Load weights lazily, quantize to 4 bits, evaluate: the peak of each way, in a new process."""
    weight = mx.random.normal((dims, dims)).astype(getattr(mx, dtype))
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "weights.safetensors"))
        mx.save_safetensors(path, {f"layers.{i}.weight": weight for i in range(layers)})
        found = {way: alone("memory", "peak", path, layers, dims, way) for way in LAZY}
    least, result = found["ours, then a layer at a time"]
    most = result + 1.5 * weight.nbytes
    rows = [
        {
            "model": f"{layers} layers of {dims} x {dims} {dtype}, {mb(weight.nbytes)} each",
            "way": way,
            "peak": mb(peak),
            "result": mb(result),
            "peak / ours": f"**{peak / least:.1f}**",
        }
        for way, (peak, result) in found.items()
    ]
    rows[0] |= {"goal": f"{mb(most)}: the result and 1.5 layers", "verdict": verdict(least <= most)}
    if goal:
        met = found["`nn.quantize`, then one `mx.eval`"][0] / least >= goal
        rows[-1] |= {"goal": f"{goal:g} x ours", "verdict": verdict(met)}
    return rows


def peak(path: str, layers: int, dims: int, way: str) -> tuple[int, int]:
    """The peak in bytes, and the bytes of the model at the end."""
    by_ours, one_by_one = LAZY[way]
    mx.reset_peak_memory()
    model: Any = Parts(layers=[nn.Linear(dims, dims, bias=False) for _ in range(layers)])
    model.load_weights(path)
    if by_ours:
        report = replace_layers(model, "layers.*", lambda path, layer: layer.to_quantized(bits=4))
        assert len(report) == layers  # the report is kept until the end, as a caller might do
    else:
        nn.quantize(model, bits=4)
    for part in model.layers if one_by_one else [model]:
        mx.eval(part.parameters())
    mx.synchronize()
    arrays: Any = tree_flatten(model.parameters())
    return mx.get_peak_memory(), sum(array.nbytes for _, array in arrays)


# ---------------------------------------------------------------- Python objects

PATH = "layers.7.mlp.experts.99.up_proj"
SWAPS = {"one path": Swap(PATH, [PATH.replace(".", r"\.")]), "`**`, where": Swap("**", [], Leaf)}


def python(name: str) -> Case:
    """The Python memory that a swap needs while it runs."""
    bench = Bench(mixture(blocks=10, experts=256), SWAPS[name])

    def peak(way: Callable[..., object]) -> float:
        return bench.run(way, measure=traced)

    others = {"ours / idiom": partial(peak, idiom)}
    return Case(lambda build: peak(by(build)), others, {"ours / idiom": 1}, shown=mb)


def traced(work: Callable[[], object]) -> float:
    gc.collect()
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


TABLES = {
    "Memory": {"lazy": partial(lazy, 16, 2048, "float32", 4)},
    "Memory, Python": {
        f"Python memory while it runs, 10,261 modules, {name}": partial(python, name)
        for name in SWAPS
    },
    # No goal for the ratio: 16-bit layers shrink less than 32-bit ones, so there is less to gain.
    "GPU, memory": {"lazy": partial(lazy, 32, 4096, "float16", 0)},
}
