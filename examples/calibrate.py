"""Find out which layers of a language model lose most at 4 bits, on real inputs.

::

    python examples/calibrate.py                              # SmolLM2, see smollm2.py
    python examples/calibrate.py --model FOLDER --text FILE --tokens 16384

Calibration looks at the inputs of layers, batch after batch. Keeping all inputs would take more
memory than the model, but only a sum of them is needed. ``observe`` passes the inputs to a function
that adds their second moments, ``x.T @ x``, to the running sum of each layer. These are the sums
from which mlx-lm's GPTQ starts, bit for bit.

Let ``D = W - W4`` be the error of a weight at 4 bits, and ``H`` the sum over all inputs. Then the
error of the outputs, ``(x @ D.T).square().sum()``, is ``((D @ H) * D).sum()``. Inputs are larger in
some directions than in others, so the outputs may lose much more, or less, than the weights do.

Without a GPU only the first blocks are calibrated, on a short text; ``--blocks`` and ``--tokens``
say how much.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import smollm2

from mlx_modswap import observe, select

try:
    import mlx_lm
    from mlx_lm.models.switch_layers import SwitchLinear
    from tqdm import tqdm

    from mlx_modswap import lm
except ImportError:
    sys.exit("mlx-lm is not installed: pip install 'mlx-modswap[lm]'")

BATCH = 8  # sequences in one call of the model
GROUP_SIZE = 64

Moments = dict[str, mx.array]


class Loss(NamedTuple):
    """The relative error of a layer after quantization: the root of a ratio of sums of squares.

    Attributes:
        weights (float): The error of its weights.
        outputs (float): The error of its outputs, on the inputs that it got.
    """

    path: str
    weights: float
    outputs: float


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model, tokenizer, *_ = mlx_lm.load(args.model or str(smollm2.make("smollm2")))
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # the fastest dtype on a CPU
    pattern = "**" if args.blocks is None else f"{lm.layers_path(model)}[:{args.blocks}].**"
    batches = read(tokenizer, args.text, args.tokens)

    moments = collect(model, pattern, tqdm(batches, "batches", disable=None, leave=False))
    held = sum(moment.nbytes for moment in moments.values())
    print(f"second moments of the inputs of {len(moments)} layers: {held / 1e6:.1f} MB\n")

    layers = fitting(model, moments)
    losses = [loss(path, layer, moments[path], args.bits) for path, layer in layers.items()]
    print_table(sorted(losses, key=lambda loss: -loss.outputs)[: args.top], args.bits)


def parse(argv: list[str] | None) -> argparse.Namespace:
    small = mx.default_device() == mx.cpu
    parser = argparse.ArgumentParser(description="Show which layers lose most when quantized.")
    parser.add_argument("--model", help="a folder or hub id (default: smollm2, made if new)")
    parser.add_argument("--text", type=Path, help="a text to calibrate on (default: Python's help)")
    parser.add_argument("--blocks", type=int, default=4 if small else None, help="how many blocks")
    parser.add_argument("--tokens", type=int, default=128 if small else 16_384)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--top", type=int, default=12, help="how many layers to show")
    return parser.parse_args(argv)


def read(tokenizer: Any, text: Path | None, tokens: int) -> list[mx.array]:
    """Return batches of sequences: arrays of sequences x length."""
    words = text.read_text() if text else "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer.encode(words[: 10 * tokens])[:tokens]  # of about 4 characters each
    length = min(512, len(ids))
    if not length:
        sys.exit("the text is empty")
    sequences = mx.array(ids[: len(ids) // length * length]).reshape(-1, length)
    return [sequences[at : at + BATCH] for at in range(0, len(sequences), BATCH)]


def collect(model: Any, pattern: str, batches: Iterable[mx.array]) -> Moments:
    """Sum the second moments of the inputs of linear layers.

    Args:
        model (mlx.nn.Module): A model that takes an array of tokens.
        pattern (str): The paths of the layers.
        batches (Iterable[mlx.core.array]): Arrays of sequences x length.

    Returns:
        dict[str, mlx.core.array]: A matrix of inputs x inputs for each layer that was called.
    """
    moments: Moments = {}

    def add(path: str, output: mx.array, x: mx.array, *args: Any, **kwargs: Any) -> None:
        x = x.flatten(0, -2)
        moments[path] = moments.get(path, mx.array(0.0)) + x.T @ x

    with observe(model, pattern, add, where=is_linear):
        for batch in batches:
            model(batch)
            mx.eval(moments)  # otherwise the inputs of all batches stay in memory until the end
    return moments


def is_linear(path: str, layer: nn.Module) -> bool:
    """Return whether mlx-lm's GPTQ takes a layer. A subclass may compute something else."""
    return type(layer) in (nn.Linear, SwitchLinear)


def fitting(model: Any, moments: Moments) -> dict[str, Any]:
    """Return the observed layers whose width the group size divides."""

    def fits(path: str, layer: Any) -> bool:
        return path in moments and layer.weight.shape[-1] % GROUP_SIZE == 0

    return select(model, "**", where=fits)


def loss(path: str, layer: Any, moment: mx.array, bits: int) -> Loss:
    """Return what a layer would lose by quantization."""
    packed = mx.quantize(layer.weight, group_size=GROUP_SIZE, bits=bits)
    rounded = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits)
    weight = layer.weight.astype(mx.float32)
    change = weight - rounded.astype(mx.float32)

    def energy(w: mx.array) -> mx.array:
        return ((w @ moment) * w).sum()  # the sum of squares of the outputs with these weights

    weights = mx.sqrt(change.square().sum() / weight.square().sum())
    outputs = mx.sqrt(energy(change) / energy(weight))
    return Loss(path, float(weights), float(outputs))


def print_table(losses: list[Loss], bits: int) -> None:
    width = max(len(loss.path) for loss in losses)
    print(f"{f'lost at {bits} bits':{width}}   of the weights   of the outputs")
    for path, weights, outputs in losses:
        print(f"{path:{width}}   {weights:14.1%}   {outputs:14.1%}")


if __name__ == "__main__":
    main()
