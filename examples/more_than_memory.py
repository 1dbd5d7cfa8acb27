"""Quantize a model that does not fit into memory, one layer at a time.

MLX is lazy: a swap to 4 bits computes nothing yet. If the new layers are evaluated in one go, all
of the old weights are in memory at once. If the layers that `replace_layers` returns are evaluated
one by one, only the old weights of one layer are. This program does both, each in a process of its
own::

    python examples/more_than_memory.py
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_modswap import replace_layers

BLOCKS, WIDTH = 8, 1024
BUDGET = 100e6  # bytes; the weights take 269 million


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down_proj(nn.silu(self.up_proj(self.norm(x))))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"weights    {size / 1e6:6.1f} MB in float32, in {BLOCKS} files")
        print(f"budget     {BUDGET / 1e6:6.1f} MB")
        slow, output = alone(in_one_go, folder)
        fast, same = alone(layer_by_layer, folder)
    print(f"at once    {slow / 1e6:6.1f} MB at the peak{', too much' if slow > BUDGET else ''}")
    print(f"by layer   {fast / 1e6:6.1f} MB at the peak{', too much' if fast > BUDGET else ''}")
    print(f"the outputs are {'equal' if output == same else 'different'}")


def in_one_go(folder: str) -> tuple[int, float]:
    model = load(folder)
    nn.quantize(model, bits=4)
    mx.eval(model.parameters())
    return mx.get_peak_memory(), run(model)


def layer_by_layer(folder: str) -> tuple[int, float]:
    model = load(folder)
    replaced = replace_layers(model, "layers.**", to_4_bits, where=nn.Linear)
    for layer in progress(list(replaced.values())):
        mx.eval(layer.parameters())  # reads the old weights of this layer, and frees them
    mx.eval(model.parameters())  # the few weights that are left
    return mx.get_peak_memory(), run(model)


def to_4_bits(path: str, layer: Any) -> nn.Module:
    return layer.to_quantized(bits=4)


def load(folder: str) -> nn.Module:
    """Load lazily: no array is read before it is needed.

    When this returns, only the model refers to the arrays. An array that is also referred to by a
    dict of all weights, or by an old layer, would stay in memory once it has been read.
    """
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    for file in sorted(Path(folder).glob("*.safetensors")):
        model.load_weights(str(file), strict=False)  # each file holds a part
    return model


def run(model: nn.Module) -> float:
    """Return one number that depends on everything that the model computes."""
    return model(mx.linspace(-1, 1, WIDTH)[None]).square().mean().item()


def progress(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield the layers, and draw a progress bar on stderr meanwhile."""
    count = len(layers)
    for done, layer in enumerate(layers):
        bar = "#" * done + "." * (count - done)
        print(f"\r[{bar}] {done} of {count} layers", end="", file=sys.stderr, flush=True)
        yield layer
    print(f"\r[{'#' * count}] {count} of {count} layers", file=sys.stderr)


def alone(work: Callable[[str], tuple[int, float]], folder: str) -> tuple[int, float]:
    """Call a function in a new process, which has a peak memory of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (folder,))


def write(folder: Path) -> None:
    """Write random weights in several files, like those of large models."""
    mx.random.seed(0)
    for number in range(BLOCKS):
        weights = dict(tree_flatten({"layers": {number: Block().parameters()}}))
        mx.save_safetensors(str(folder / f"model-{number}.safetensors"), weights)


if __name__ == "__main__":
    main()
