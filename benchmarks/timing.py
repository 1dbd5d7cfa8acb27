"""Time several ways to do one thing alternately, so that a busy machine slows all of them down."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module, util
from operator import truediv
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import mlx_modswap

from .tables import Row, duration, markdown, verdict, versions

Run = Callable[[], float]  # does a thing once, and returns the seconds that it took
Build = Any  # the library as a module: this one, or that of another checkout


def timed(work: Callable[[], object], number: int = 1, clock: Run = thread_time) -> float:
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
    runs: Mapping[str, Run], seconds: float = 6, least: int = 9, most: int = 501
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
    return median(map(truediv, slow, fast))


# ---------------------------------------------------------------- cases


class Case(NamedTuple):
    """A use of the library to time.

    Attributes:
        ours: Does it with a build of the library, and returns the seconds that it took.
        others: Other ways to do the same, by ratio: ``"idiom / ours"`` or ``"ours / limit"``.
        goals: By ratio, or ``"ours"`` for seconds. What starts with "ours" is to be at most
            that, another ratio at least that.
        about: More columns of its row.
        shown: Formats a figure that is not a ratio.
    """

    ours: Callable[[Build], float]
    others: Mapping[str, Run] = {}
    goals: Mapping[str, float] = {}
    about: Mapping[str, str] = {}
    shown: Callable[[float], str] = duration


Cases = Mapping[str, Callable[[], Case]]  # the rows of a table: what is timed -> prepares it


def case_row(what: str, case: Case) -> Row:
    ways = {(set(name.split(" / ")) - {"ours"}).pop(): name for name in case.others}
    runs = {"ours": partial(case.ours, mlx_modswap)}
    taken = alternate(runs | {way: case.others[name] for way, name in ways.items()})
    ratios = {name: ratio(*(taken[way] for way in name.split(" / "))) for name in case.others}
    figures = ratios | {"ours": median(taken["ours"])}
    row = {"what": what, **case.about}
    row |= {name: f"**{figure:.2f}**" for name, figure in ratios.items()}
    row |= {way: case.shown(median(taken[way])) for way in taken}
    if case.goals:
        met = [
            figures[name] <= goal if name.startswith("ours") else figures[name] >= goal
            for name, goal in case.goals.items()
        ]
        row |= {"goal": ", ".join(map(_goal, case.goals.items())), "verdict": verdict(all(met))}
    return row


def _goal(goal: tuple[str, float]) -> str:
    name, number = goal
    limit = "at most" if name.startswith("ours") else "at least"
    return f"{name} {limit} {f'{number:g}' if '/' in name else duration(number)}"


# ---------------------------------------------------------------- in a process of its own


def alone(module: str, function: str, *arguments: Any) -> Any:
    """Call a function of this package in a new process. All values have to be JSON."""
    call = json.dumps([module, function, *arguments])
    command = [sys.executable, "-m", "benchmarks.timing", call]
    return json.loads(subprocess.check_output(command, text=True))


def rows(module: str, table: str, what: str) -> list[Row]:
    """The rows of an entry in ``TABLES`` of a module of this package: of a case, or its own."""
    found = import_module(f"benchmarks.{module}").TABLES[table][what]()
    return [case_row(what, found)] if isinstance(found, Case) else found


# ---------------------------------------------------------------- against another build


def checkout(build: Build) -> Path:
    return Path(build.__file__).parent.parent


def import_seconds(cache: Any, build: Build) -> float:
    """What an import of a build adds to ``import mlx.nn``, in a new process.

    Bytecode goes to a temporary folder, whatever the environment says, since pip compiles what it
    installs. So the first import takes longer.
    """
    code = (
        "from time import thread_time; import mlx.nn; start = thread_time(); "
        "import mlx_modswap; print(thread_time() - start)"
    )
    environment = os.environ | {"PYTHONPYCACHEPREFIX": cache.name, "PYTHONDONTWRITEBYTECODE": ""}
    environment["PYTHONPATH"] = str(checkout(build))
    command = [sys.executable, "-c", code]
    return float(subprocess.check_output(command, cwd=cache.name, env=environment, text=True))


def load_build(folder: str) -> Build:
    """Import the library of another checkout beside this one, under another name."""
    package = Path(folder, "mlx_modswap").resolve()
    name = "mlx_modswap_of_another_checkout"
    spec = util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)  # all imports inside the library are relative
    return module


def compare_builds(program: str, tables: Mapping[str, Cases]) -> None:
    """The command line of a program that compares this build with that of another checkout.

    It prints the ratio of the times, and the middle half of the ratios of all rounds.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}")
    parser.add_argument("--against", required=True, metavar="CHECKOUT", help="the older build")
    parser.add_argument("words", nargs="*", help="run the cases whose names contain one of these")
    options = parser.parse_args()
    old = load_build(options.against)
    print(f"{versions()}\n\nnew: {checkout(mlx_modswap)}\nold: {checkout(old)}\n")
    rows: list[Row] = []
    for what, prepare in (item for cases in tables.values() for item in cases.items()):
        if not options.words or any(word in what for word in options.words):
            print(what, "...", file=sys.stderr, flush=True)
            ours = prepare().ours
            taken = alternate({"new": partial(ours, mlx_modswap), "old": partial(ours, old)})
            low, middle, high = quantiles(map(truediv, taken["new"], taken["old"]), n=4)
            row = {"what": what, "new / old": f"**{middle:.3f}**"}
            row["middle half"] = f"{low:.3f} to {high:.3f}"
            rows.append(row | {way: duration(median(taken[way])) for way in taken})
    print(markdown(rows))


if __name__ == "__main__":
    module, function, *arguments = json.loads(sys.argv[1])
    print(json.dumps(getattr(import_module(f"benchmarks.{module}"), function)(*arguments)))
