"""Let a measurement decide which parts of all-MiniLM-L6-v2 get 8 bits, and which get 4.

Each part is quantized alone for a moment, to see what that costs. The rules are made of what was
seen, and compared with a rule of thumb of the same size: keep the first and the last block::

    python examples/mixed_precision.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import minilm
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from quantize_minilm import SENTENCES, bits

from mlx_modswap import Replacement, select, swapped

MEASURE = SENTENCES[1::9]
JUDGE = SENTENCES[::6]  # none of those
THUMB = ["encoder.layer[0].**", "encoder.layer[-1].**"]


def main() -> None:
    model, tokenizer = minilm.load()

    def embed(sentences: Sequence[str]) -> mx.array:
        vectors = minilm.embed(model, tokenizer, sentences)
        mx.eval(vectors)  # now, while the layers that it is about are in the model
        return vectors

    original = embed(MEASURE)
    cost: dict[str, float] = {}
    for part in parts(model):
        with swapped(model, part, bits(4), where=nn.Linear):
            similarity = cosine(original, embed(MEASURE))
        cost[part] = (1 - similarity) / weights(model, part)
    ranking = sorted(cost, key=cost.__getitem__, reverse=True)

    print("lost by 4 bits, for each million of weights")
    for part in ranking:
        print(f"{1e6 * cost[part]:.4f}   {part}")

    original = embed(JUDGE)
    budget = sum(weights(model, pattern) for pattern in THUMB)
    print()
    for name, precious in {
        "4 bits everywhere         ": [],
        "first and last in 8 bits  ": THUMB,
        "measured ones in 8 bits   ": take(ranking, model, budget),
    }.items():
        rules = {**{pattern: bits(8) for pattern in precious}, "encoder.**": bits(4)}
        with swapped(model, rules, where=nn.Linear) as replaced:
            similarity = cosine(original, embed(JUDGE))
            print(f"{name} {megabytes(replaced):4.1f} MB   cosine similarity {similarity:.4f}")


def parts(model: nn.Module) -> list[str]:
    """The attention and the feed-forward part of each block. A path is a pattern, too."""
    blocks = select(model, "encoder.layer.*")
    inside = ("attention.**", "{intermediate,output}.dense")
    return [f"{block}.{part}" for block in blocks for part in inside]


def weights(model: nn.Module, pattern: str) -> int:
    """How many weights there are to quantize."""
    layers: dict[str, Any] = select(model, pattern, where=nn.Linear)
    return sum(layer.weight.size for layer in layers.values())


def take(ranking: list[str], model: nn.Module, budget: int) -> list[str]:
    """The parts that lose most, as many as the budget has room for."""
    taken: list[str] = []
    for part in ranking:
        if weights(model, part) <= budget:
            taken.append(part)
            budget -= weights(model, part)
    return taken


def cosine(one: mx.array, other: mx.array) -> float:
    return float((one * other).sum(axis=-1).mean())


def megabytes(replaced: Replacement) -> float:
    arrays = dict(tree_flatten([layer.parameters() for layer in replaced.values()]))
    return sum(array.nbytes for array in arrays.values()) / 1e6


if __name__ == "__main__":
    main()
