"""Run all benchmarks, each case in a process of its own, and print tables in Markdown.

python -m benchmarks                     # everything
python -m benchmarks --only time         # one of the PARTS below
python -m benchmarks --only time llama   # the cases whose names contain a word
"""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import date
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from . import after, conversion, gpu, hooks, memory, times
from .alone import alone
from .tables import markdown, missed

Cases = dict[str, tuple[Any, ...]]  # name -> module, function, arguments

PARTS: dict[str, dict[str, Cases]] = {
    "time": {"Time of a swap": times.SWAP_CASES, "Time, other": times.OTHER_CASES},
    "memory": {"Memory": memory.LAZY_CASES, "Memory, Python": memory.PYTHON_CASES},
    "after": {"After the swap": after.CASES},
    "hooks": {
        "Hooks, a call": hooks.CALL_CASES,
        "Hooks, a block": hooks.BLOCK_CASES,
        "Adapters by request": hooks.SWITCH_CASES,
    },
    "conversion": {"Conversion": conversion.CASES},
    "gpu": {"GPU, memory": gpu.MEMORY_CASES, "GPU, LoRA": gpu.LORA_CASES},
    # Last, since nobody has such models.
    "growth": {"Growth": times.GROWTH_CASES, "Growth, other": times.OTHER_GROWTH_CASES},
}
IN_SHORT = {"Time of a swap", "Growth"}  # tables that are followed by a summary


def main() -> None:
    options = _options()
    print(f"Python {platform.python_version()}, MLX {version('mlx')}, {_device()}, {date.today()}")
    count = sum(_print_part(part, options.words) for part in options.only or _able_parts())
    print(f"\n{count} goals missed.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part only")
    parser.add_argument("words", nargs="*", help="run the cases whose names hold one of these")
    return parser.parse_args()


def _able_parts() -> list[str]:
    return [part for part in PARTS if part != "gpu" or mx.is_available(mx.gpu)]


def _print_part(part: str, words: list[str]) -> int:
    """Print the tables of a part, and return how many goals were missed."""
    count = 0
    for title, cases in PARTS[part].items():
        chosen = [name for name in cases if not words or any(word in name for word in words)]
        rows = [row for name in chosen for row in _run(name, cases[name])]
        if rows:
            print(f"\n## {title}\n\n{markdown(rows)}", flush=True)
        if title in IN_SHORT and not words:
            print(f"\n## {title}, in short\n\n{markdown(times.in_short(rows))}", flush=True)
        count += missed(rows)
    return count


def _run(name: str, call: tuple[Any, ...]) -> Any:
    print(f"{name} ...", file=sys.stderr, flush=True)
    return alone(*call)


def _device() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return f"CPU ({platform.system()} {platform.machine()})"
    return str(mx.device_info().get("device_name", "GPU"))


if __name__ == "__main__":
    main()
