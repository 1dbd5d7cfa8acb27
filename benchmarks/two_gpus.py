"""Time a llama of about 4 billion parameters on one GPU, and on two by examples/tensor_parallel.py:

mlx.launch -n 2 python benchmarks/two_gpus.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx

sys.path.append(str(Path(__file__).parent.parent / "examples"))
example: Any = importlib.import_module("tensor_parallel")
SIZES = {"WIDTH": 4096, "HEADS": 32, "KV_HEADS": 8, "HEAD_WIDTH": 128, "HIDDEN": 14_336}
SIZES |= {"BLOCKS": 16, "WORDS": 32_000}
SHAPES = ((1, 1), (1, 32), (4, 512))  # sequences x length


def main() -> None:
    group = mx.distributed.init()
    for name, value in SIZES.items():
        setattr(example, name, value)
    mx.random.seed(0)
    model = example.build()
    model.set_dtype(mx.bfloat16)
    for block in model.layers:  # one by one: in float32 the model is twice as large
        mx.eval(block.parameters())
    texts = [mx.random.randint(0, SIZES["WORDS"], shape) for shape in SHAPES]
    whole, whole_memory = steps(model, texts), memory()
    tokens = greedy(model, texts[1])
    example.shard(model, group)
    mx.eval(model.parameters())
    mx.clear_cache()
    shared, shared_memory = steps(model, texts), memory()
    shared_tokens = greedy(model, texts[1])
    with no_sums():
        silent = steps(model, texts)
    sums = [sum_step(group, shape) for shape in SHAPES]
    if group.rank() == 0:
        print(f"memory: {whole_memory:.2f} GB on one GPU, {shared_memory:.2f} GB on each of two")
        for shape, one, two, without, alone in zip(SHAPES, whole, shared, silent, sums):
            print(
                f"step of {shape[0]} x {shape[1]} tokens: {one:.2f} ms -> {two:.2f} ms; "
                f"without its {2 * SIZES['BLOCKS']} sums {without:.2f} ms, "
                f"the sums alone {alone:.2f} ms"
            )
        same = sum(a == b for a, b in zip(tokens, shared_tokens))
        print(f"greedy tokens: {same} of {len(tokens)} are equal")


def steps(model: Any, texts: list[mx.array]) -> list[float]:
    return [milliseconds(lambda text=text: model(text)) for text in texts]


def milliseconds(step: Callable[[], Any]) -> float:
    taken: list[float] = []
    for _ in range(23):
        start = perf_counter()
        mx.eval(step())
        taken.append(1e3 * (perf_counter() - start))
    return median(taken[3:])


@contextmanager
def no_sums() -> Iterator[None]:
    """Replace each sum over the processes with the part of this process, so that nothing is sent.

    The outputs are wrong, but a step takes as long as to compute half of the model.
    """
    all_sum = mx.distributed.all_sum
    mx.distributed.all_sum = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        mx.distributed.all_sum = all_sum


def sum_step(group: mx.distributed.Group, shape: tuple[int, int]) -> float:
    """The milliseconds for the sums of a step alone: two sums for each block."""

    def step() -> mx.array:
        x = mx.ones((*shape, SIZES["WIDTH"]), mx.bfloat16)
        for _ in range(2 * SIZES["BLOCKS"]):
            x = 0.5 * mx.distributed.all_sum(x, group=group)
        return x

    return milliseconds(step)


def greedy(model: Any, text: mx.array, count: int = 16) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        token = model(text)[:, -1:].argmax(axis=-1)
        text = mx.concatenate([text, token], axis=1)
        found.append(int(token.item()))
    return found


def memory() -> float:
    return mx.get_active_memory() / 1e9


if __name__ == "__main__":
    main()
