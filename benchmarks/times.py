"""The time of a whole ``replace_layers``, with all of its checks."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory

from . import models
from .alone import alone
from .swaps import SUBJECTS
from .tables import Row, ms, verdict
from .turns import ratio, take_turns, timed
from .ways import Bench, Swap, Way, idiom, ours, quantize

# The models whose leaves `nn.quantize` does not reach. It uses `leaf_modules`, which is recursive,
# and which treats a module as a leaf if its inner modules hold no arrays.
UNSEEN = ("mixture", "chain")


def swap(subject: str, name: str) -> list[Row]:
    """Time one swap in each way."""
    title, build, swaps, goal, goal_exact, _ = SUBJECTS[subject]
    asked = swaps[name]
    bench = Bench(build(), asked)
    runs = {
        "ours": lambda: bench.run(ours, asked),
        "idiom": lambda: bench.run(idiom, asked),
        "limit": bench.run_limit,
    }
    if subject not in UNSEEN:
        runs["quantize"] = lambda: bench.run(quantize, asked)
    taken = take_turns(runs)
    row = {"model": title, "pattern": name, "layers": f"{len(bench.paths):,}"}
    row |= _times(taken)
    goal = goal_exact if name == "one path" else goal
    if goal:
        met = ratio(taken["idiom"], taken["ours"]) >= goal
        row |= {"goal": f"{goal:g} x", "verdict": verdict(met)}
    return [row]


def _times(taken: dict[str, list[float]]) -> Row:
    """The ratios come first, since they are the claim."""
    row = {"idiom / ours": f"**{ratio(taken['idiom'], taken['ours']):.1f}**"}
    for text, slow, fast in (
        ("quantize / ours", "quantize", "ours"),
        ("ours / limit", "ours", "limit"),
    ):
        both = slow in taken and fast in taken
        row[text] = f"{ratio(taken[slow], taken[fast]):.1f}" if both else ""
    for way in ("ours", "idiom", "quantize", "limit"):
        row[f"{way}, ms"] = ms(median(taken[way])) if way in taken else ""
    return row


def single() -> list[Row]:
    """Swap the only layer of a model, in a loop, because one swap is too short to be timed."""
    number = 50  # few enough that the median loop is not interrupted
    model, other = models.Single(), models.Linear()
    layers = [model.linear, other]
    asked = Swap("linear", "linear")

    def loop(way: Way) -> float:
        def repeat() -> None:
            for at in range(number):
                models.ready.append(layers[(at + 1) % 2])
                way(model, asked)

        return timed(repeat) / number

    taken = take_turns({w.__name__: partial(loop, w) for w in (ours, idiom, quantize)})
    return [{"model": "a single Linear", "pattern": "one path", "layers": "1", **_times(taken)}]


def ten_rules(subject: str) -> list[Row]:
    """Time ten rules, and one rule that selects the same layers."""
    title, build, swaps, *_, union = SUBJECTS[subject]
    ten = swaps["ten rules"]
    one = Swap([union], ten.regex)
    bench = Bench(build(), ten)
    taken = take_turns({"ten": lambda: bench.run(ours, ten), "one": lambda: bench.run(ours, one)})
    much = ratio(taken["ten"], taken["one"])
    return [
        {
            "what": f"ten rules / one rule, {title}",
            "ratio": f"**{much:.2f}**",
            "ms": " / ".join(ms(median(taken[way])) for way in ("ten", "one")),
            "goal": "1.2 at most",
            "verdict": verdict(much <= 1.2),
        }
    ]


def in_short(rows: list[Row]) -> list[Row]:
    """For each model, the least and the greatest speed-up over the other ways."""
    short: list[Row] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        line = {"model": model}
        for others in ("idiom / ours", "quantize / ours"):
            for what, is_one in (("one path", True), ("many layers", False)):
                cells = [
                    row[others].strip("*")
                    for row in rows
                    if row["model"] == model and (row["pattern"] == "one path") == is_one
                ]
                cells = sorted(filter(None, cells), key=float)
                line[f"{others}, {what}"] = " to ".join(dict.fromkeys(cells[:1] + cells[-1:]))
        short.append(line)
    return short


# ---------------------------------------------------------------- growth


SIZES = {1: "1,003", 10: "10,021", 100: "100,201"}  # blocks -> modules


def growth() -> list[Row]:
    """The microseconds per module in models of three sizes, each in its own processes."""
    rounds = [{size: alone("times", "growth_at", size) for size in SIZES} for _ in range(11)]
    rows: list[Row] = []
    for size, modules in SIZES.items():
        much = median(r[size] / r[1] for r in rounds)
        row = {
            "what": f"time a module, `**.*_proj`, {modules} modules / 1,003 modules",
            "ratio": f"**{much:.2f}**",
            "ms": f"{median(r[size] for r in rounds):.3g} us a module",
        }
        if size == 100:
            row |= {"goal": "linear: 1.5 at most", "verdict": verdict(much <= 1.5)}
        rows.append(row)
    return rows


def growth_at(blocks: int) -> float:
    """The microseconds per module, in this process."""
    asked = Swap("**.*_proj", r".*_proj")
    bench = Bench(models.Mixture(blocks, 250), asked)
    taken = take_turns({"ours": lambda: bench.run(ours, asked)}, seconds=0.6, least=5)
    return median(taken["ours"]) / (1 + 1002 * blocks) * 1e6


# ---------------------------------------------------------------- import

_IMPORT = """
from time import perf_counter
import mlx.nn
start = perf_counter()
import mlx_modswap
print(perf_counter() - start)
"""


def import_time() -> list[Row]:
    """What ``import mlx_modswap`` adds to ``import mlx.nn``, in fresh processes."""
    with TemporaryDirectory() as folder:
        # The first import compiles to bytecode, as pip does when it installs the library.
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-c", _IMPORT]

        def fresh() -> float:
            return float(subprocess.check_output(command, env=environment, text=True))

        fresh()
        seconds = median(fresh() for _ in range(21))
    return [
        {
            "what": "`import mlx_modswap` after `import mlx.nn`",
            "ms": ms(seconds),
            "goal": "15 ms at most",
            "verdict": verdict(seconds <= 0.015),
        }
    ]


def _swaps(subjects: list[str]) -> dict[str, tuple[str, ...]]:
    return {
        f"{subject}, {name}": ("times", "swap", subject, name)
        for subject in subjects
        for name in SUBJECTS[subject].swaps
    }


def _ten_rules(subjects: list[str]) -> dict[str, tuple[str, ...]]:
    return {f"ten rules, {subject}": ("times", "ten_rules", subject) for subject in subjects}


SWAP_CASES = {**_swaps(["llama"]), "single": ("times", "single")}
OTHER_CASES = {**_ten_rules(["llama"]), "import": ("times", "import_time")}
GROWTH_CASES = _swaps(["mixture", "arrays", "list", "chain"])
OTHER_GROWTH_CASES = {**_ten_rules(["mixture", "list"]), "growth": ("times", "growth")}
