"""Time several ways to do one thing alternately, so that a busy machine slows them all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

Work = Callable[[], object]
Run = Callable[[], float]  # does the thing once, and returns the seconds that it took


def timed(work: Work) -> float:
    """The seconds that ``work`` takes, after a garbage collection."""
    gc.collect()
    start = perf_counter()
    work()
    return perf_counter() - start


def take_turns(
    runs: Mapping[str, Run], seconds: float = 6.0, least: int = 9, most: int = 101
) -> dict[str, list[float]]:
    """The seconds that each way took in each round, after a round to warm up."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and perf_counter() < end):
        for name in names:
            taken[name].append(runs[name]())
        names.append(names.pop(0))  # another way goes first in the next round
        rounds += 1
    return taken


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long ``slow`` takes as ``fast``: the median over the rounds."""
    return median(a / b for a, b in zip(slow, fast))
