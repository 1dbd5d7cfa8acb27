"""Run all benchmarks, each case in a process of its own, and print tables in Markdown.

python -m benchmarks                      # everything
python -m benchmarks --only swaps         # one module
python -m benchmarks --only swaps single  # the cases whose names contain a word
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx

from . import conversion, gpu, growth, hooks, memory, swaps
from .tables import markdown, missed, versions
from .timing import alone

MODULES: dict[str, Any] = {
    module.__name__.split(".")[-1]: module.TABLES
    for module in (swaps, hooks, memory, conversion, gpu, growth)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--only", choices=MODULES, action="append", help="run this module only")
    parser.add_argument("words", nargs="*", help="run the cases whose names contain one of these")
    options = parser.parse_args()
    print(versions())
    count = 0
    for module in options.only or MODULES:
        for table, cases in MODULES[module].items():
            if mx.is_available(mx.gpu) or not table.startswith("GPU"):
                count += _print_table(module, table, cases, options.words)
    print(f"\n{count} goals missed.")


def _print_table(module: str, table: str, cases: Any, words: list[str]) -> int:
    """Print the rows of the chosen cases, and return how many goals were missed."""
    rows: list[Any] = []
    for what in cases:
        if not words or any(word in what for word in words):
            print(what, "...", file=sys.stderr, flush=True)
            rows += alone("timing", "rows", module, table, what)
    if rows:
        print(f"\n## {table}\n\n{markdown(rows)}", flush=True)
    return missed(rows)


if __name__ == "__main__":
    main()
