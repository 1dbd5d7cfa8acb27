"""Time several ways to do one thing alternately, so that a busy machine slows all of them down."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, util
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, thread_time
from typing import Any

import mlx_modswap

from .tables import Row, markdown

Work = Callable[[], object]
Run = Callable[[], float]  # does the thing once, and returns the seconds that it took
Build = Any  # the library as a module: this one, or another version of it


def timed(work: Work, number: int = 1, clock: Run = thread_time) -> float:
    """The seconds that ``work`` takes, after a garbage collection: the mean of ``number`` calls.

    The default clock leaves out the time in which other processes run on the processor. It is
    right for Python code, not for computations of MLX, which take place in other threads.
    """
    gc.collect()
    start = clock()
    for _ in range(number):
        work()
    return (clock() - start) / number


def alternate(
    runs: Mapping[str, Run], seconds: float = 6.0, least: int = 9, most: int = 501
) -> dict[str, list[float]]:
    """The seconds that each way took in each round, after a round to warm up."""
    for run in runs.values():
        run()
    gc.collect()
    gc.freeze()  # so that the collections in `timed` are quick, and there are many rounds
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and perf_counter() < end):
        for name in names:
            taken[name].append(runs[name]())
        names.append(names.pop(0))  # another way goes first in the next round
        rounds += 1
    gc.unfreeze()
    return taken


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long ``slow`` takes as ``fast``: the median over the rounds."""
    return median(a / b for a, b in zip(slow, fast))


# ---------------------------------------------------------------- in a process of its own


def alone(module: str, function: str, *arguments: Any) -> Any:
    """Call a function of this package in a new process. All values have to be JSON."""
    call = json.dumps([module, function, *arguments])
    command = [sys.executable, "-m", "benchmarks.timing", call]
    return json.loads(subprocess.check_output(command, text=True))


def import_seconds(folder: str | Path, cache: str) -> float:
    """What ``import mlx_modswap`` in a folder adds to ``import mlx.nn``, in a new process.

    Bytecode goes to the folder ``cache``, whatever the environment says, since pip compiles what
    it installs. So the first import takes longer.
    """
    code = (
        "from time import thread_time; import mlx.nn; start = thread_time(); "
        "import mlx_modswap; print(thread_time() - start)"
    )
    environment = os.environ | {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-c", code]
    return float(subprocess.check_output(command, cwd=folder, env=environment, text=True))


# ---------------------------------------------------------------- against another build

HERE = Path(mlx_modswap.__file__).parent.parent


def load_build(folder: str | Path) -> Build:
    """Import the library of another checkout beside this one, under another name."""
    package = Path(folder, "mlx_modswap").resolve()
    name = "mlx_modswap_of_another_checkout"
    spec = util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)  # all imports inside the library are relative
    return module


def versus(what: str, new: Run, old: Run, scale: float = 1e3, unit: str = "ms") -> Row:
    """A row that compares two builds, with the middle half of the ratios of all rounds."""
    taken = alternate({"new": new, "old": old})
    low, middle, high = quantiles(map(float.__truediv__, taken["new"], taken["old"]), n=4)
    return {
        "what": what,
        "new / old": f"**{middle:.3f}**",
        "middle half": f"{low:.3f} to {high:.3f}",
        "new": f"{median(taken['new']) * scale:.3g} {unit}",
        "old": f"{median(taken['old']) * scale:.3g} {unit}",
    }


def compare_builds(program: str, rows: Callable[[Build, Build, str], Iterator[Row]]) -> None:
    """The command line of a program that compares this build with that of another checkout."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}")
    parser.add_argument("--against", required=True, metavar="CHECKOUT", help="the older build")
    folder = parser.parse_args().against
    print(f"new: {HERE}\nold: {Path(folder).resolve()}\n")
    found: list[Row] = []
    for row in rows(mlx_modswap, load_build(folder), folder):
        print(row["what"], "...", file=sys.stderr, flush=True)
        found.append(row)
    print(markdown(found))


if __name__ == "__main__":
    module, function, *arguments = json.loads(sys.argv[1])
    print(json.dumps(getattr(import_module(f"benchmarks.{module}"), function)(*arguments)))
