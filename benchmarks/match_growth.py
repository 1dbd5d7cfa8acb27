"""How the time of one match grows with the length of the path, for patterns that are hard to match.

python benchmarks/match_growth.py
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import mlx.nn as nn

from mlx_modswap import select

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "patterns")]

fuzz = importlib.import_module("test_fuzz")
turns = importlib.import_module("benchmarks.turns")
EASY, GROWTH, chain = fuzz.EASY, fuzz.GROWTH, fuzz.chain
DEPTH = 2000


def seconds(model: nn.Module, pattern: str) -> float:
    """The shortest time of one match in seven runs."""
    return min(turns.timed(lambda: select(model, pattern, strict=False)) for _ in range(7))


def main() -> None:
    print("| pattern | length of the path | ms | times the one before |")
    print("|---|---|---|---|")
    for name, (build, pattern, sizes) in GROWTH.items():
        before = None
        for size in sizes:
            took = seconds(build(size), pattern)
            growth = f"{took / before:.1f}" if before else ""
            print(f"| {name if before is None else ''} | {size:,} | {1e3 * took:.2f} | {growth} |")
            before = took
    print(f"\n| pattern | ms at {DEPTH:,} levels, all of whose paths are looked at |")
    print("|---|---|")
    deep = chain(DEPTH)
    print(f"| an easy one, {EASY!r} | {1e3 * seconds(deep, EASY):.2f} |")
    for name, (build, pattern, _) in GROWTH.items():
        if build is chain:
            print(f"| {name} | {1e3 * seconds(deep, pattern):.2f} |")


if __name__ == "__main__":
    main()
